"""The portable kernels: who owns which element of a tile; no bank conflicts in shared memory.

The index arithmetic that is proven here is that of the kernels themselves: the functions of
`numflash.tiles` run as plain Python, lane after lane, and every address they touch is noted.

The hardware's side: shared memory has 32 banks of 4 bytes. An access of 4 bytes a lane is served
for a whole warp at once, one of 16 bytes in four phases of 8 lanes. In a phase each bank gives one
word; lanes that want the same word share it. Two different words of one bank are a conflict.
"""

import types
from array import array
from collections import Counter

import pytest

from numflash.configs import SmemLayout, Traits, portable
from numflash.kernels.arguments import Tensor
from numflash.tiles.portable import copies, gradients, lanes, products, scores, softmax

HEAD_DIMS = range(32, 257, 32)
WARP = range(32)
BANKS = 32


CONFIGS = [c for f in ("forward", "backward-dkdv", "backward-dq") for c in portable.candidates(f)]
each_config = pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: f"{config.family}-{config}"
)


class Thread:
    """The `cuda` module of one thread, and what that thread does to memory."""

    def __init__(self):
        self.threadIdx = types.SimpleNamespace(x=0)
        self.local = types.SimpleNamespace(array=lambda n, _: memoryview(array("d", bytes(8 * n))))
        self.accesses = []

    def load(self, frag, smem, offset):
        """Stands in for ld_shared_v4_f32."""
        self.accesses.append((offset, 4))

    def store(self, smem, offset, frag):
        """Stands in for st_shared_f32 and st_shared_v4_f32."""
        values = frag.tolist() if isinstance(frag, memoryview) else [frag]
        self.accesses.append((offset, len(values)))
        for i, value in enumerate(values):
            smem[offset + i].append(value)


def tensor(data, row) -> Tensor:
    """One head with this stride of its rows."""
    return Tensor(data, 0, row, 0)


class Tile:
    """A shared tile: what was written to each element."""

    def __init__(self):
        self.written = {}

    def __getitem__(self, offset):
        return self.written.setdefault(offset, [])

    def once(self, tile, rows, columns, pitch) -> dict:
        """The values of the tile by (row, column), each of which must have been written once."""
        values = {}
        for offset, written in self.written.items():
            row, column = divmod(offset - tile, pitch)
            assert 0 <= row < rows and 0 <= column < columns, "outside the tile"
            assert len(written) == 1, f"({row}, {column}) is written {len(written)} times"
            values[row, column] = written[0]
        assert len(values) == rows * columns
        return values


@pytest.fixture
def thread(monkeypatch):
    """Make `numflash.tiles` run as plain Python on a `Thread`."""
    thread = Thread()
    for module in (copies, gradients, lanes, products, scores, softmax):
        for name, value in {
            "cuda": thread,
            "device_function": lambda function: function,
            "f32": float,
            "ld_shared_v4_f32": thread.load,
            "st_shared_f32": thread.store,
            "st_shared_v4_f32": thread.store,
        }.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    return thread


def make(factory, *arguments):
    """The function of a factory, uncached, as plain Python."""
    return factory.__wrapped__(*arguments)


def python(function):
    """The Python function of a device function."""
    return getattr(function, "py_func", function)


def place(thread, lane, config) -> tuple[int, int]:
    """The first row and column of a thread, as the kernels compute them."""
    thread.threadIdx.x = lane
    rows = lanes.rows_per_thread(config.row_tile, config.num_warps)
    row = python(lanes.first_row_of_thread)(lanes.ROW_LANES * rows)
    return row, lane % lanes.COLUMN_LANES


def shape(config) -> tuple[int, int]:
    """Rows and score columns of one thread."""
    rows = lanes.rows_per_thread(config.row_tile, config.num_warps)
    return rows, lanes.columns_per_thread(config.column_tile)


def p_pitch(config) -> int:
    return config.smem_layout(Traits("float16", 32, 32)).pitches["p"]


def head_dim_pitch(head_dim: int) -> int:
    return SmemLayout(k=(8, head_dim)).pitches["k"]


def conflicts(offsets: list[int], width: int) -> int:
    """Words that the busiest bank must give in the worst phase of one access of a warp: 1 is free.

    Args:
        offsets: of the 32 lanes, in floats.
        width: floats of a lane: 1 or 4.
    """
    worst, lanes_at_once = 0, 32 // width
    for begin in range(0, 32, lanes_at_once):
        phase = offsets[begin : begin + lanes_at_once]
        words = {offset + i for offset in phase for i in range(width)}
        worst = max(worst, *Counter(word % BANKS for word in words).values())
    return worst


def ways(accesses_of_lanes: list[list]) -> int:
    """The worst `conflicts` of a warp's accesses, which all its lanes make in the same order."""
    worst = 0
    for together in zip(*accesses_of_lanes, strict=True):
        offsets, widths = zip(*together, strict=True)
        assert len(set(widths)) == 1
        worst = max(worst, conflicts(list(offsets), widths[0]))
    return worst


def accesses(thread, lane_call) -> list[list]:
    """The accesses of each lane of the first warp in a call."""
    found = []
    for lane in WARP:
        thread.accesses.clear()
        lane_call(lane)
        found.append(list(thread.accesses))
    return found


# The model of the banks


@pytest.mark.parametrize(
    "offsets, width, expected",
    [
        (list(range(32)), 1, 1),
        ([0] * 32, 1, 1),
        ([2 * lane for lane in WARP], 1, 2),
        ([32 * lane for lane in WARP], 1, 32),
        ([4 * lane for lane in WARP], 4, 1),
        ([8 * lane for lane in WARP], 4, 2),
        ([32 * lane for lane in WARP], 4, 8),
        ([100 * lane for lane in WARP], 4, 1),
        # Lanes of different phases do not meet.
        ([4 * (lane % 8) + 32 * (lane // 8) for lane in WARP], 4, 1),
    ],
)
def test_the_model_counts_conflicts(offsets, width, expected):
    assert conflicts(offsets, width) == expected


# Ownership


@each_config
def test_each_score_belongs_to_one_thread(thread, config):
    rows, columns = shape(config)
    pitch, tile = p_pitch(config), Tile()
    store_scores = make(gradients.make_store_scores, rows, columns, pitch)
    for lane in range(config.num_threads):
        row, column = place(thread, lane, config)
        names = memoryview(array("d", [lane * 10_000 + i for i in range(rows * columns)]))
        store_scores(names, tile, 400 + row * pitch + column)
    values = tile.once(400, config.row_tile, config.column_tile, pitch)
    assert len(set(values.values())) == len(values)
    # Element (r, c) of a thread is at its row + 4 r, its column + 8 c.
    for (row, column), name in values.items():
        lane, i = divmod(int(name), 10_000)
        first_row, first_column = place(thread, lane, config)
        r, c = divmod(i, columns)
        assert (row, column) == (first_row + 4 * r, first_column + 8 * c)


@each_config
def test_a_row_of_scores_belongs_to_eight_neighbouring_lanes_of_one_warp(thread, config):
    owners = {}
    for lane in range(config.num_threads):
        owners.setdefault(place(thread, lane, config)[0], []).append(lane)
    for owned in owners.values():
        assert owned == list(range(owned[0], owned[0] + 8)) and owned[0] % 8 == 0


@each_config
@pytest.mark.parametrize("vectorized", [True, False], ids=["vectors", "elements"])
@pytest.mark.parametrize("head_dim", [32, 96, 256])
def test_each_output_belongs_to_one_thread(thread, config, vectorized, head_dim):
    rows, groups = shape(config)[0], lanes.groups_per_thread(head_dim)
    valid_rows, valid_columns = config.row_tile - 3, head_dim - 8
    pitch, target = head_dim + 7, {}

    def write(target, offset, values):
        for i, value in enumerate(values):
            assert offset + i not in target, "written twice"
            target[offset + i] = value

    element = types.SimpleNamespace(store_four=write, from_f32=lambda x: x)
    store_rows = make(copies.make_store_rows, element, rows, groups, vectorized)
    for lane in range(config.num_threads):
        row, _ = place(thread, lane, config)
        acc = memoryview(array("d", [lane * 10_000 + i for i in range(rows * 4 * groups)]))
        store_rows(acc, tensor(target, pitch), 1000, row, valid_rows, valid_columns)
    assert set(target) == {
        1000 + pitch * row + column for row in range(valid_rows) for column in range(valid_columns)
    }
    # Element (r, g, i) of a thread is at its row + 4 r, 4 (lane % 8) + 32 g + i.
    for offset, name in target.items():
        lane, index = divmod(int(name), 10_000)
        r, g, i = index // (4 * groups), index // 4 % groups, index % 4
        row = place(thread, lane, config)[0] + 4 * r
        assert offset == 1000 + pitch * row + 4 * (lane % 8) + 32 * g + i


# Copies

COPIES = sorted(
    {
        (rows, config.num_threads)
        for config in CONFIGS
        for rows in (config.row_tile, config.column_tile)
    }
)


class Source:
    """A global array whose element (row, column) is 1000 row + column + 1; notes what is read."""

    def __init__(self, base, row_stride):
        self.base, self.row_stride, self.read = base, row_stride, Counter()

    def __getitem__(self, offset):
        self.read[offset] += 1
        row, column = divmod(offset - self.base, self.row_stride)
        return 1000.0 * row + column + 1


def load_vector(frag, source, offset):
    """Stands in for `Element.load_vector`."""
    for i in range(len(frag)):
        frag[i] = source[offset + i]


@pytest.mark.parametrize("vector", [1, 4, 8], ids=["elements", "vectors-of-4", "vectors-of-8"])
@pytest.mark.parametrize("rows, num_threads", COPIES)
def test_each_element_is_copied_once(thread, rows, num_threads, vector):
    element = types.SimpleNamespace(vector=vector, to_f32=lambda x: x, load_vector=load_vector)
    for head_dim in HEAD_DIMS:
        pitch = head_dim_pitch(head_dim)
        load_tile = make(
            copies.make_load_tile, element, rows, head_dim, pitch, num_threads, vector > 1
        )
        # The tile begins at row 5 of the source; the source ends 3 rows, 8 columns before it.
        first_row, valid_rows, valid_columns = 5, rows - 3, head_dim - 8
        source, tile = Source(77, 512), Tile()
        for lane in range(num_threads):
            thread.threadIdx.x = lane
            end_row = first_row + valid_rows
            load_tile(tile, 400, tensor(source, 512), 77, first_row, end_row, valid_columns)
        values = tile.once(400, rows, head_dim, pitch)
        for (row, column), value in values.items():
            inside = row < valid_rows and column < valid_columns
            assert value == (1000 * (first_row + row) + column + 1 if inside else 0)
        assert set(source.read.values()) == {1}
        assert len(source.read) == valid_rows * valid_columns


@pytest.mark.parametrize(
    "vector, expected",
    # Sixteen-bit elements come 8 at a time and are stored as two vectors, 8 floats apart from the
    # next lane's: two ways. A copy stores each element once, so it is left at that.
    [(1, 1), (4, 1), (8, 2)],
    ids=["elements", "vectors-of-4", "vectors-of-8"],
)
def test_conflicts_of_copies(thread, vector, expected):
    element = types.SimpleNamespace(vector=vector, to_f32=lambda x: x, load_vector=load_vector)
    for head_dim in HEAD_DIMS:
        pitch = head_dim_pitch(head_dim)
        load_tile = make(copies.make_load_tile, element, 32, head_dim, pitch, 128, vector > 1)

        def copy(lane, load_tile=load_tile):
            thread.threadIdx.x = lane
            load_tile(Tile(), 0, tensor(Source(0, 512), 512), 0, 0, 32, 512)

        assert ways(accesses(thread, copy)) <= expected


# Products and scores


@each_config
def test_products_of_rows_read_them_without_conflicts(thread, config):
    # S = Q K^T: 16 bytes of rows of A and of rows of B.
    rows, columns = shape(config)
    for head_dim in HEAD_DIMS:
        pitch = head_dim_pitch(head_dim)
        # A step along the inner dimension moves all lanes alike: two steps show them all.
        product_nt = make(products.make_product_nt, rows, columns, 8, pitch, pitch)

        def multiply(lane, product_nt=product_nt, pitch=pitch):
            row, column = place(thread, lane, config)
            product_nt([0.0] * rows * columns, None, 400 + row * pitch, 80_000 + column * pitch)
            of_a = {400 + (row + 4 * r) * pitch + k for r in range(rows) for k in (0, 4)}
            of_b = {80_000 + (column + 8 * c) * pitch + k for c in range(columns) for k in (0, 4)}
            assert Counter(thread.accesses) == Counter((offset, 4) for offset in of_a | of_b)

        assert ways(accesses(thread, multiply)) == 1


@each_config
def test_products_of_scores_read_them_without_conflicts(thread, config):
    # O = P V: 16 bytes of rows of P and of columns of V.
    rows, _ = shape(config)
    for head_dim in HEAD_DIMS:
        pitch, groups = head_dim_pitch(head_dim), lanes.groups_per_thread(head_dim)
        product_nn = make(products.make_product_nn, rows, groups, 8, p_pitch(config), pitch)

        def multiply(lane, product_nn=product_nn, pitch=pitch, groups=groups):
            row, column = place(thread, lane, config)
            acc = [0.0] * rows * 4 * groups
            product_nn(acc, None, 400 + row * p_pitch(config), 80_000 + 4 * column)
            of_p = {400 + (row + 4 * r) * p_pitch(config) + k for r in range(rows) for k in (0, 4)}
            of_v = {
                80_000 + i * pitch + 4 * column + 32 * g for i in range(8) for g in range(groups)
            }
            assert Counter(thread.accesses) == Counter((offset, 4) for offset in of_p | of_v)

        assert ways(accesses(thread, multiply)) == 1


@each_config
def test_stores_of_scores_are_free_of_conflicts(thread, monkeypatch, config):
    rows, columns = shape(config)
    pitch = p_pitch(config)
    store_scores = make(gradients.make_store_scores, rows, columns, pitch)
    online_softmax = make(softmax.make_online_softmax, rows, columns, 1, pitch, ())
    for name in ("exp_f32", "row_max_of_lanes"):
        monkeypatch.setattr(softmax, name, lambda x: x)
    monkeypatch.setattr(softmax, "max_f32", max)

    def store(lane):
        row, column = place(thread, lane, config)
        store_scores([0.0] * rows * columns, Tile(), 400 + row * pitch + column)

    def softmax_store(lane):
        row, column = place(thread, lane, config)
        zeros = [[0.0] * n for n in (rows * columns, rows, rows, rows)]
        online_softmax(*zeros, Tile(), 400 + row * pitch + column, [])

    for call in (store, softmax_store):
        found = accesses(thread, call)
        assert [len(of_lane) for of_lane in found] == [rows * columns] * 32
        assert ways(found) == 1
