"""The common part of forwards on Hopper: the warps of a block, and its walk over tiles of rows.

The last warpgroup of a block copies: one of its threads, the producer (`producer`), fetches Q, K
and V. The others multiply: each consumes these for 64 rows of Q. Both walk over the same tiles of
rows in the same order, and meet at channels (`channels`) only:

    producer        for each tile of rows: Q of each warpgroup, K and V of each stage of keys
    assistants      for each tile of rows: scales of each stage of keys, where keys have their own
    consumers       for each tile of rows: wait for Q; skip the keys that none of their rows see;
                    attend to those they see; skip the rest; release Q; finish the rows

Where two blocks are a cluster, they are one of twice as many rows to all of this: both walk over
the same places and keys, each computes its own rows of a place, and each producer fetches half of
K and V for both (`tiles.wgmma.clusters`).

`attend` is the algorithm, and a forward's own: O, row_max and row_sum of 64 rows, from all the
stages of keys that they see. `finish` (`finish`) is the only end of a row.
"""

from typing import NamedTuple

from numflash.configs import WARPGROUP_ROWS, Sm90ForwardConfig, Traits
from numflash.kernels.wgmma.finish import make_finish
from numflash.kernels.wgmma.producer import make_produce
from numflash.kernels.wgmma.ring import make_ring
from numflash.ptx import cuda, device_function, f32, i32, mov_tid_x, u32, u64
from numflash.ptx.bulk_copies import cp_async_bulk_wait_group_read
from numflash.ptx.memory import mov_shared_address
from numflash.ptx.warpgroups import elect_sync, fence_mbarrier_init, make_setmaxnreg
from numflash.tiles import blocks, sequences, steps
from numflash.tiles.blocks import grid_of, next_place, next_place_of_cluster
from numflash.tiles.scores import NEG_INF
from numflash.tiles.selected import make_is_computed
from numflash.tiles.wgmma import clusters, products, turns
from numflash.tiles.wgmma.clusters import meet_cluster
from numflash.tiles.wgmma.scores import Rows
from numflash.tiles.wgmma.turns import group_of_thread, leads


class Sums(NamedTuple):
    """A thread's registers for its two rows: `attend` adds to them and `finish` reads them.

    `o_acc` is O, not yet divided by the sums; `row_max` the largest score; `row_sum` this lane's
    share of the sum.
    """

    o_acc: object
    row_max: object
    row_sum: object


class Operands(NamedTuple):
    """The first buffers of Q, K and V as operands of products (`tiles.wgmma.products`)."""

    q: object
    k: object
    v: object


def make_skeleton(
    config: Sm90ForwardConfig, traits: Traits, look_up, attend, tiles_per_stage=1, assist=None
):
    """run_block(results, maps, in_fp8, mask, shape, layout, max_scale, given): a whole forward.

    `results` are out, a `Part`, lse, the map of out and the record `Features`; `maps` those of Q,
    K and V; max_scale brings row_max to base 2; `given` goes to these three. Consumers run the
    first while Q is on its way, and the second if their rows see any key. The third, if there is
    one, is the work of the warps that assist the producer; `work` is as in `producer`:

        look_up(rows, shape, given) -> `known`, which the second needs of these rows
        attend(smem, barriers, at, rows, sums, max_scale, given, known, keys, stages)
            -> the `stages` after the last
        assist(smem, barriers, work, given)

    `at` are `Operands`, `rows` `Rows`, `sums` `Sums`, `stages` as in `ring`. `keys` are (first,
    end) of the steps (`tiles.steps`) of stages of keys that the rows see, each of
    `tiles_per_stage` tiles, in which a warpgroup takes a turn.
    """
    ring, num_groups = make_ring(config, traits), config.num_warpgroups
    Q, K, V, SCALES, o_replaces_q = ring.Q, ring.K, ring.V, ring.SCALES, ring.o_replaces_q
    begin, following = ring.begin, ring.following
    q_first, k_first, v_first = ring.q.first, ring.k.first, ring.v.first
    # From one slab to the next: products ask for it where rows of V are keys.
    operand = products.make_operand(config.stage_n * products.SLAB_BYTES)
    num_consumers, n_o = 128 * num_groups, traits.head_dim_v // 2
    assists, assisting = assist is not None, config.assisting_threads
    give_registers, take_registers = _make_register_exchange(config, traits)
    take_turn, pass_turn, give_first_turn = turns.make_turns(num_groups if config.pingpong else 1)
    produce, finish = make_produce(config, traits), make_finish(config, traits)
    cluster = config.cluster
    walk = blocks.make_walk(config.block_rows, traits, cluster)
    place_of = blocks.make_place_of(config.block_rows, traits)
    following_place = next_place if cluster == 1 else next_place_of_cluster
    own_rows = clusters.make_own_rows(cluster, config.tile_m, traits)
    sequence_of = sequences.make_sequence_of(traits)
    keys_of = steps.make_keys_of(config, traits)
    is_computed = make_is_computed(traits)
    keys_of_part = steps.make_keys_of_part(config, traits, WARPGROUP_ROWS)
    whole_keys = sequences.make_whole_keys(config.tile_n, WARPGROUP_ROWS)

    @device_function
    def skip_keys(barriers, group, first, end, stages):
        """Leave stages of keys to the other warpgroups; the `stages` after them."""
        for _ in range(first, end):
            for _ in range(tiles_per_stage):
                take_turn(group)
                pass_turn(group)
            # Hazard: the producer waits for all warpgroups, those too whose rows see no such key.
            # It may want K's buffer for the next K before it fetches this V.
            K.skip(barriers, group, stages[0], stages[1])
            V.skip(barriers, group, stages[-2], stages[-1])
            SCALES.skip(barriers, group, stages[0], stages[1])
            stages = following(stages)
        return stages

    @device_function
    def consume(smem, barriers, results, work, max_scale, given):
        places, grid, shape, layout, mask, in_fp8 = work
        sums = Sums(cuda.local.array(n_o, f32), cuda.local.array(2, f32), cuda.local.array(2, f32))
        at = Operands(
            operand(mov_shared_address(smem, q_first)),
            operand(mov_shared_address(smem, k_first)),
            operand(mov_shared_address(smem, v_first)),
        )
        group = group_of_thread()
        give_first_turn(group)
        number, num_places = places
        stages, q_parity = begin(u32(0)), u32(0)
        while number < num_places:
            place = place_of(number, grid, shape, mask)
            sequence = sequence_of(place, shape, mask)
            n_begin, n_end = keys_of(place, grid, sequence, mask)
            if not is_computed(in_fp8, place, shape):
                # Of a head of another kernel's nothing but Q is fetched, and nothing is stored.
                n_end = n_begin
            place = own_rows(place)
            row = i32(place.start + WARPGROUP_ROWS * group)
            first, end = keys_of_part(row, n_begin, n_end, grid, sequence)
            whole = whole_keys(row, grid, sequence)
            rows = Rows(group, place, whole, sequence, grid.pack, mask)
            known = look_up(rows, shape, given)
            for i in range(n_o):
                sums.o_acc[i] = f32(0)
            for r in range(2):
                sums.row_max[r], sums.row_sum[r] = NEG_INF, f32(0)
            # Which mbarriers are Q's is found out each time: registers are scarce in `attend`.
            # Hazard: S would be made of the Q of the tile of rows before, or of no Q.
            Q.wait(barriers, group_of_thread(), q_parity)
            q_parity = u32(q_parity ^ u32(1))

            stages = skip_keys(barriers, group, n_begin, first, stages)
            if first < end:
                keys = first, end
                about = max_scale, given, known, keys, stages
                stages = attend(smem, barriers, at, rows, sums, *about)
            else:
                # Hazard: no product has held threads together; one may not have seen Q yet.
                Q.gather(group_of_thread())

            # The place of this tile of rows is computed again: registers are scarce in `attend`.
            place = place_of(number, grid, shape, mask)
            sequence = sequence_of(place, shape, mask)
            n_begin, n_end = keys_of(place, grid, sequence, mask)
            computed = is_computed(in_fp8, place, shape)
            if computed:
                stages = skip_keys(barriers, group, end, n_end, stages)
            if not o_replaces_q:
                # Hazard: products must have read Q; the next comes while these rows are finished.
                Q.release(barriers, group_of_thread())
            if computed:
                finish(sums, max_scale, smem, results, number, grid, shape, layout, mask)
            if o_replaces_q:
                if leads():
                    # Hazard: the next Q would overwrite O, which a bulk copy still reads.
                    cp_async_bulk_wait_group_read()
                # Hazard: before that wait the next Q would overwrite O.
                Q.release(barriers, group_of_thread())
            number = following_place(number, q_parity)
        if leads():
            # Hazard: shared memory is gone once the block has ended, and a copy may still read O.
            cp_async_bulk_wait_group_read()

    @device_function
    def run_block(results, maps, in_fp8, mask, shape, layout, max_scale, given):
        smem = cuda.shared.array(0, u32, alignment=1024)
        barriers = cuda.shared.array(0, u64, alignment=1024)
        if mov_tid_x() == 0:
            Q.init(barriers)
            K.init(barriers)
            V.init(barriers)
            SCALES.init(barriers)
            # Hazard: bulk copies would not see the mbarriers at which they complete.
            fence_mbarrier_init()
        if cluster > 1:
            # Hazard: a thread would wait, or a block's copy or release arrive in the other one, at
            # an mbarrier that has not been made.
            meet_cluster()
        else:
            # Hazard: a thread would wait at an mbarrier that has not been made.
            cuda.syncthreads()

        grid = grid_of(shape, layout)
        work = walk(grid, shape), grid, shape, layout, mask, in_fp8
        if mov_tid_x() >= num_consumers:
            # Hazard: consumers wait in `take_registers` until all warps that copy have given.
            give_registers()
            if mov_tid_x() < num_consumers + 32:
                if elect_sync() != 0:
                    produce(smem, barriers, maps, work)
            # `assists` is a constant, tested by itself: the compiler removes the branch.
            elif assists:  # noqa: SIM102
                if mov_tid_x() < num_consumers + 32 + assisting:
                    assist(smem, barriers, work, given)
        else:
            # Hazard: without it accumulators would not fit into a thread's registers.
            take_registers()
            consume(smem, barriers, results, work, max_scale, given)
        if cluster > 1:
            # Hazard: shared memory is gone once a block has ended, and the other may still release
            # a buffer there.
            meet_cluster()

    return run_block


def _make_register_exchange(config: Sm90ForwardConfig, traits: Traits):
    """(give_registers(), take_registers()): by all warps that copy, and by all that multiply.

    With fixed registers both do nothing.
    """
    few, many = config.registers_of(traits)
    if not config.fixed:
        return make_setmaxnreg("dec", few), make_setmaxnreg("inc", many)

    @device_function
    def keep_registers():
        pass

    return keep_registers, keep_registers
