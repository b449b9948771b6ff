"""What kernels for gradients of scores' arguments ask of an implementation: dS, in registers.

`portable.score_gradients` and `mma.score_gradients` have it.
"""

from typing import NamedTuple


class ScoreGradients(NamedTuple):
    """Device functions that all threads of a block call together, and sizes.

    `inputs` is (q, k, v, do, tile_statistics), as kernels take them: delta is not scaled, and lse
    is in base 2 on the tensor cores.

    Attributes:
        load_queries: (smem, lses, deltas, inputs, batch, head, m_start, sequence, shape): a tile
            of Q and dO to shared memory, and the thread's rows of the statistics.
        load_keys: (smem, stage, inputs, batch, head_kv, n_start, sequence, shape): a tile of K and
            V, to one of the stages.
        commit: (): this thread's loads since the last commit are those of a stage.
        wait: (): until all of this thread's loads have arrived but those of the last
            num_stages - 2 commits; a barrier must follow.
        compute: (ds_acc, s_acc, smem, stage, of_rows, tile, sequence, scores, args): dS, and P to
            s_acc, of the K and V of a stage. With `traits.read` dS is the gradient of the element
            that the program reads for each score, else that of the scores that features give.
            of_rows is (lses, deltas), tile is (m_start, n_start, whether no edge of the band
            crosses it, `is_full` of `tiles.scores.Corner`).
        place: () -> (row, column): the thread's first, in a tile.
        beyond: (e) -> (rows, columns) from the thread's first to score e.
        rows_beyond: (r) -> rows from the thread's first to its row r.
        columns_beyond: (c) -> columns from the thread's first to its column c.
        row_of: (e) -> the number r of the row of score e.
        column_of: (e) -> the number c of the column of score e.
        sum_of_row: (x) -> the sum over the lanes that share a row, of which one has column 0.
        sum_of_column: (x) -> the sum over the lanes that share a column.
        leads_column: () -> whether this thread is the one of its warp that has its columns' sums.
        read_float: (smem, i) -> the float32 in word i of shared memory.
        memory: the scalar type of shared memory, in words of 4 bytes.
        alignment: of shared memory.
        num_stages: tiles of K and V in shared memory at once.
        rows, columns: of a thread; lses and deltas have `rows` elements.
        n_scores: of a thread, in ds_acc and s_acc.
    """

    load_queries: object
    load_keys: object
    commit: object
    wait: object
    compute: object
    place: object
    beyond: object
    rows_beyond: object
    columns_beyond: object
    row_of: object
    column_of: object
    sum_of_row: object
    sum_of_column: object
    leads_column: object
    read_float: object
    memory: type
    alignment: int
    num_stages: int
    rows: int
    columns: int
    n_scores: int
