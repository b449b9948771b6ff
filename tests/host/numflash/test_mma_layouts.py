"""Tiles for tensor cores: where chunks lie, which elements a lane holds, no bank conflicts.

What is proven is the index arithmetic of the kernels themselves: in the simulator's mode the
functions of `numflash.tiles.mma` are plain Python, which runs here lane after lane, and every
address is noted.

The hardware's side. Shared memory has 32 banks of 4 bytes; an access of 16 bytes a lane, and each
matrix of ldmatrix, is served for 8 lanes at once, one of 4 bytes for all 32. Two different words
of one bank in one go are a conflict. Which elements of a product's operands and result a register
holds is PTX ISA 9.7.14.5.7 and 9.7.14.5.8, written down here once more.
"""

import itertools
import types
from dataclasses import replace

import numpy as np
import pytest

from numflash.configs import mma_rules
from numflash.runtime.mode import SIMULATED

if not SIMULATED:
    pytest.skip("needs NUMBA_ENABLE_CUDASIM=1", allow_module_level=True)

from numflash.kernels.arguments import Tensor
from numflash.ptx import bits_as_float
from numflash.tiles.mma import copies, elements, fragments, products
from numflash.tiles.mma.elements import MMA_ELEMENTS, make_transposed_operand
from numflash.tiles.mma.layouts import (
    ALIGNMENT_WORDS,
    CHUNK_WORDS,
    TileLayout,
    make_advance,
    make_word,
)

WARP = range(32)
BANKS = 32
ROWS = 64
HEAD_DIMS = range(32, 257, 32)
# A tile may begin at any multiple of ALIGNMENT_WORDS.
TILE = 3 * ALIGNMENT_WORDS
LAYOUTS = {
    f"d{head_dim}-{8 * n_bytes}bit": TileLayout(head_dim * n_bytes // 16)
    for n_bytes, head_dim in itertools.product((2, 4), HEAD_DIMS)
}
FLOAT32_LAYOUTS = {name: layout for name, layout in LAYOUTS.items() if name.endswith("32bit")}
PRODUCTS = list(MMA_ELEMENTS)


def each(layouts):
    return pytest.mark.parametrize("layout", layouts.values(), ids=layouts)


each_layout = each(LAYOUTS)
each_element = pytest.mark.parametrize("product", PRODUCTS, ids="-".join)


def layouts_of(product):
    """The layouts of tiles of this product's element type."""
    suffix = "32bit" if product[1] == "float32" else "16bit"
    return [layout for name, layout in LAYOUTS.items() if name.endswith(suffix)]


def conflicts(addresses, n_lanes) -> int:
    """Banks that hold two different words of one go; `addresses` are the lanes' in turn.

    With 8 lanes at once each wants the four words from its address on, with 32 the one there. None
    is a lane that takes no part.
    """
    found = 0
    for first in range(0, len(addresses), n_lanes):
        wanted = [a for a in addresses[first : first + n_lanes] if a is not None]
        width = BANKS // n_lanes
        assert all(address % width == 0 for address in wanted)
        words = {address + i for address in wanted for i in range(width)}
        found += len(words) - len({word % BANKS for word in words})
    return found


def test_conflicts_are_counted():
    assert conflicts([4 * lane for lane in range(32)], 8) == 0
    assert conflicts([0] * 32, 8) == 0
    assert conflicts([0, 32, *[None] * 6], 8) == 4
    assert conflicts([32 * lane for lane in range(32)], 8) == 4 * 4 * 7
    assert conflicts(list(range(32)), 32) == 0
    assert conflicts([5] * 32, 32) == 0
    assert conflicts([64 * lane for lane in range(32)], 32) == 31


# Layouts


@each_layout
@pytest.mark.parametrize("swizzled", [True, False])
def test_every_chunk_has_a_place_of_its_own_in_its_row(layout, swizzled):
    layout = replace(layout, swizzled=swizzled)
    word = make_word(layout)
    for row in range(ROWS):
        places = sorted(word(row, chunk) for chunk in range(layout.chunks))
        first = row * layout.chunks * CHUNK_WORDS
        expected = range(first, first + layout.pitch, CHUNK_WORDS)
        assert places == list(expected)


@each_layout
@pytest.mark.parametrize("swizzled", [True, False])
def test_advance_reaches_the_chunk_it_claims(layout, swizzled):
    layout = replace(layout, swizzled=swizzled)
    word, advance = make_word(layout), make_advance(layout)
    steps = layout.chunks // 2
    for row, chunk, step in itertools.product(range(ROWS), (0, 1), range(steps)):
        reached = advance(TILE + word(row, chunk), step)
        assert reached == TILE + word(row, chunk + 2 * step), (row, chunk, step)


@each_layout
def test_the_swizzle_repeats_after_eight_rows(layout):
    word = make_word(layout)
    for row, chunk in itertools.product(range(ROWS), range(layout.chunks)):
        assert word(row + 8, chunk) == word(row, chunk) + 8 * layout.pitch
    assert 8 * layout.pitch % ALIGNMENT_WORDS == 0


# What products read


class Notes:
    """Stands in for what reads shared memory in a product: notes the addresses in order."""

    def __init__(self):
        self.loads, self.products = [], 0
        self.cuda = types.SimpleNamespace(
            local=types.SimpleNamespace(array=lambda n, dtype: np.zeros(n, dtype))
        )

    def load(self, frag, smem, word):
        assert len(frag) == 4
        self.loads.append(word)

    def load_word(self, smem, word):
        self.loads.append(word)
        return np.uint32(0)

    def mma(self, acc, a, b):
        assert (len(acc), len(a), len(b)) == (4, 4, 2)
        self.products += 1


@pytest.fixture
def notes(monkeypatch):
    """Loads of products are noted instead of made."""
    notes = Notes()
    monkeypatch.setattr(products, "cuda", notes.cuda)
    monkeypatch.setattr(elements, "ldmatrix_x4_trans", notes.load)
    monkeypatch.setattr(elements, "ld_shared_u32", notes.load_word)
    make = make_transposed_operand.__wrapped__
    monkeypatch.setattr(products, "make_transposed_operand", make)
    return notes


def loads_of_lanes(notes, run):
    """The reads of each lane in turn: a list of 32 addresses for every load of the warp."""
    lanes = []
    for lane in WARP:
        notes.loads = []
        run(lane)
        lanes.append(notes.loads)
    return [list(addresses) for addresses in zip(*lanes, strict=True)]


def product_nt_loads(notes, product, m_tiles, n_tiles, layout):
    """The loads of A and of B of a product of rows, with the row and chunk of each lane's."""
    element = replace(MMA_ELEMENTS[product], load_frag=notes.load, mma=notes.mma)
    multiply = products.make_product_nt.__wrapped__(element, m_tiles, n_tiles, layout, layout)
    word = make_word(layout)
    b_tile = TILE + 16 * m_tiles * layout.pitch

    def run(lane):
        a = TILE + word(fragments.row_operand_row(lane), fragments.row_operand_chunk(lane))
        b = b_tile + word(fragments.column_operand_row(lane), fragments.column_operand_chunk(lane))
        multiply(np.zeros(4 * m_tiles * n_tiles, np.float32), None, a, b)

    loads = iter(loads_of_lanes(notes, run))
    expected = []
    for step in range(layout.chunks // 2):
        for i in range(m_tiles):
            expected.append([(TILE, 16 * i + m % 2 * 8, 2 * step + m // 2) for m in range(4)])
        for j in range(n_tiles // 2):
            expected.append([(b_tile, 16 * j + m // 2 * 8, 2 * step + m % 2) for m in range(4)])
    assert notes.products == len(WARP) * m_tiles * n_tiles * layout.chunks // 2
    return [(next(loads), matrices) for matrices in expected], next(loads, None)


@each_element
@pytest.mark.parametrize("m_tiles", [1, 2])
def test_products_of_rows_read_their_operands_once_without_conflicts(notes, product, m_tiles):
    for layout in layouts_of(product):
        notes.products = 0
        word = make_word(layout)
        loads, more = product_nt_loads(notes, product, m_tiles, 4, layout)
        assert more is None
        for addresses, matrices in loads:
            # Lanes 8 m to 8 m + 7 name the rows of matrix m.
            for m, (tile, row, chunk) in enumerate(matrices):
                expected = [tile + word(row + i, chunk) for i in range(8)]
                assert addresses[8 * m : 8 * m + 8] == expected, (layout, m)
            assert conflicts(addresses, 8) == 0, layout


@each_layout
def test_without_the_swizzle_products_of_rows_have_conflicts(notes, layout):
    product = ("sm80", "float16")
    loads, _ = product_nt_loads(notes, product, 1, 2, replace(layout, swizzled=False))
    # Eight rows whose pitch is an even number of 32-byte sectors share their banks.
    assert all(conflicts(addresses, 8) > 0 for addresses, _ in loads)


def product_pn_loads(notes, product, m_tiles, n_tiles, layout, k_tiles=4):
    """The loads of B, which lies by rows of k."""
    element = replace(MMA_ELEMENTS[product], mma=notes.mma, pack=lambda frag, acc, first: None)
    multiply = products.make_product_pn.__wrapped__(element, m_tiles, k_tiles, n_tiles, layout)
    first, _ = make_transposed_operand.__wrapped__(element, layout)
    acc = np.zeros(4 * m_tiles * n_tiles, np.float32)

    def run(lane):
        multiply(acc, None, None, TILE + first(lane))

    return loads_of_lanes(notes, run)


@pytest.mark.parametrize("product", [p for p in PRODUCTS if p[1] != "float32"], ids="-".join)
@pytest.mark.parametrize("m_tiles", [1, 2])
def test_transposed_operands_are_read_once_without_conflicts(notes, product, m_tiles):
    k_tiles = 4
    for layout in layouts_of(product):
        word, n_tiles = make_word(layout), layout.chunks
        loads = iter(product_pn_loads(notes, product, m_tiles, n_tiles, layout, k_tiles))
        for step, j in itertools.product(range(k_tiles // 2), range(n_tiles // 2)):
            addresses = next(loads)
            for m in range(4):
                row, chunk = 16 * step + m % 2 * 8, 2 * j + m // 2
                expected = [TILE + word(row + i, chunk) for i in range(8)]
                assert addresses[8 * m : 8 * m + 8] == expected
            assert conflicts(addresses, 8) == 0
        assert next(loads, None) is None


@each(FLOAT32_LAYOUTS)
def test_transposed_operands_of_tf32_are_read_once_without_conflicts(notes, layout):
    k_tiles, product = 4, ("sm80", "float32")
    word, n_tiles = make_word(layout), layout.chunks // 2
    loads = iter(product_pn_loads(notes, product, 1, n_tiles, layout, k_tiles))
    for step, j, i in itertools.product(range(k_tiles), range(n_tiles), range(2)):
        addresses = next(loads)
        for lane, address in enumerate(addresses):
            g, t = divmod(lane, 4)
            # b[i] is row t + 4 i of a product, column g; it stands for row 2 t + i of the tile.
            row, column = 8 * step + 2 * t + i, 8 * j + g
            assert address == TILE + word(row, column // 4) + column % 4
        assert conflicts(addresses, 32) == 0
    assert next(loads, None) is None


@each_layout
def test_without_the_swizzle_transposed_operands_have_conflicts(notes, layout):
    linear = replace(layout, swizzled=False)
    loads = product_pn_loads(notes, ("sm80", "float16"), 1, layout.chunks, linear)
    assert all(conflicts(addresses, 8) > 0 for addresses in loads)


@each(FLOAT32_LAYOUTS)
def test_without_the_swizzle_transposed_operands_of_tf32_have_conflicts(notes, layout):
    linear = replace(layout, swizzled=False)
    loads = product_pn_loads(notes, ("sm80", "float32"), 1, layout.chunks // 2, linear)
    assert all(conflicts(addresses, 32) > 0 for addresses in loads)


# Copies


class Thread:
    """One thread of a block at a time, and what it copies: (target, offset) in order."""

    def __init__(self):
        self.index, self.copied, self.loaded = 0, [], None
        self.local = types.SimpleNamespace(array=lambda n, dtype: np.zeros(n, dtype))

    def cp_async(self, smem, target, source, offset, n_bytes):
        assert n_bytes in (0, 16)
        self.copied.append((int(target), int(offset) if n_bytes else None))

    def load(self, frag, source, offset):
        self.loaded = int(offset)

    def store(self, smem, target, frag):
        self.copied.append((int(target), self.loaded))
        self.loaded = None


@pytest.fixture
def thread(monkeypatch):
    """Copies are noted instead of made."""
    thread = Thread()
    for name, value in {
        "cuda": thread,
        "mov_tid_x": lambda: thread.index,
        "cp_async_16": thread.cp_async,
        "ld_global_v4_u32": thread.load,
        "st_shared_v4_u32": thread.store,
    }.items():
        monkeypatch.setattr(copies, name, value)
    return thread


def shapes():
    """(rows, threads) of every tile that a shipped config copies."""
    found = {
        (rows, config.num_threads)
        for family in ("forward", "backward-dkdv", "backward-dq")
        for config in mma_rules.candidates(family, "sm80")
        for rows in (config.tile_m, config.tile_n)
    }
    return sorted(found)


def copies_of_threads(thread, make, num_threads, arguments):
    """The copies of each thread."""
    copy_tile = copies.make_copy_tile.__wrapped__(*make)
    threads = []
    for thread.index in range(num_threads):
        thread.copied = []
        copy_tile(*arguments)
        threads.append(thread.copied)
    return threads


def conflicts_of_stores(threads) -> int:
    """Over all the stores of a block, warp by warp."""
    found = 0
    for first in range(0, len(threads), 32):
        lanes = threads[first : first + 32]
        passes = max(map(len, lanes))
        # A thread without a row in the tile has none in any pass.
        assert {len(lane) for lane in lanes} <= {0, passes}
        for i in range(passes):
            found += conflicts([lane[i][0] if lane else None for lane in lanes], 8)
    return found


@pytest.mark.parametrize("product", [("sm80", "float16"), ("sm80", "float32")], ids="-".join)
@pytest.mark.parametrize(("rows", "num_threads"), shapes())
def test_copies_fill_a_tile_once_without_conflicts(thread, product, rows, num_threads):
    element = MMA_ELEMENTS[product]
    base, row_stride, first = 1000, 4096, 48
    for layout in layouts_of(product):
        make = element, layout, rows, num_threads, True, True
        columns = layout.chunks * element.per_chunk
        # The last rows and the last chunk lie outside.
        end, num_columns = first + rows - 3, columns - element.per_chunk
        source = Tensor(None, 0, row_stride, 0)
        arguments = None, TILE, source, base, first, end, num_columns
        threads = copies_of_threads(thread, make, num_threads, arguments)
        word = make_word(layout)
        expected = {}
        for row, chunk in itertools.product(range(rows), range(layout.chunks)):
            inside = row < rows - 3 and chunk < layout.chunks - 1
            offset = base + (first + row) * row_stride + chunk * element.per_chunk
            expected[TILE + word(row, chunk)] = offset if inside else None
        copied = list(itertools.chain(*threads))
        assert len(copied) == len(expected) and dict(copied) == expected
        assert conflicts_of_stores(threads) == 0, layout


@each_layout
def test_copies_through_registers_store_as_asynchronous_ones(thread, layout):
    element = MMA_ELEMENTS["sm80", "float16"]
    arguments = None, TILE, Tensor(None, 0, 4096, 0), 1000, 0, 61, layout.chunks * 8
    direct, through = (
        copies_of_threads(thread, (element, layout, 64, 128, True, asynchronous), 128, arguments)
        for asynchronous in (True, False)
    )
    assert direct == through


@pytest.mark.parametrize("pack", [1, 3, 4])
@each(LAYOUTS)
def test_copies_of_packed_heads_take_each_row_from_its_head(thread, layout, pack):
    element = MMA_ELEMENTS["sm80", "float16"]
    base, row_stride, pack_stride, first, rows = 1000, 8192, 512, 32, 32
    make = element, layout, rows, 64, True, True, copies.row_of_packed_heads
    source = Tensor(None, 0, row_stride, pack_stride)
    arguments = None, TILE, source, (base, pack), first, 60, 8 * layout.chunks
    copied = dict(itertools.chain(*copies_of_threads(thread, make, 64, arguments)))
    word = make_word(layout)
    for row, chunk in itertools.product(range(rows), range(layout.chunks)):
        token, head = divmod(first + row, pack)
        offset = base + token * row_stride + head * pack_stride + 8 * chunk
        assert copied[TILE + word(row, chunk)] == (offset if first + row < 60 else None)


@each_layout
def test_copies_without_the_swizzle_have_no_conflicts_either(thread, layout):
    # Neighbouring threads write neighbouring chunks: the swizzle is for those who read.
    make = MMA_ELEMENTS["sm80", "float16"], replace(layout, swizzled=False), 64, 128, True, True
    source = Tensor(None, 0, 4096, 0)
    arguments = None, TILE, source, 0, 0, 64, 8 * layout.chunks
    assert conflicts_of_stores(copies_of_threads(thread, make, 128, arguments)) == 0


def test_stores_that_conflict_are_seen():
    rows_first = [[(TILE + 32 * lane, 0)] for lane in range(64)]
    assert conflicts_of_stores(rows_first) == 8 * 4 * 7


# Registers


def accumulator(lane, e):
    """Row and column of register e of a 16 x 8 result: PTX ISA 9.7.14.5.8."""
    g, t = divmod(lane, 4)
    return g + 8 * (e // 2), 2 * t + e % 2


def operand_a_16_bit(lane, i, h):
    """Row and k of half h of register i of a 16 x 16 operand A: PTX ISA 9.7.14.5.8."""
    g, t = divmod(lane, 4)
    return g + 8 * (i % 2), 2 * t + h + 8 * (i // 2)


def operand_a_tf32(lane, i):
    """Row and k of register i of a 16 x 8 operand A: PTX ISA 9.7.14.5.7."""
    g, t = divmod(lane, 4)
    return g + 8 * (i % 2), t + 4 * (i // 2)


@pytest.mark.parametrize(("m_tiles", "n_tiles"), [(1, 2), (2, 4), (2, 8)])
def test_the_accumulators_of_a_block_cover_its_tile_once(monkeypatch, m_tiles, n_tiles):
    thread = types.SimpleNamespace(x=0)
    monkeypatch.setattr(fragments, "mov_tid_x", lambda: thread.x)
    monkeypatch.setattr(fragments, "cuda", types.SimpleNamespace(threadIdx=thread))
    rows_per_warp, num_warps = 16 * m_tiles, 3
    owners = {}
    for thread.x in range(32 * num_warps):
        warp, lane = divmod(thread.x, 32)
        assert fragments.first_row_of_warp(rows_per_warp) == warp * rows_per_warp
        first_row = fragments.accumulator_row(rows_per_warp)
        first_column = fragments.accumulator_column()
        for i, j, e in itertools.product(range(m_tiles), range(n_tiles), range(4)):
            row = first_row + fragments.ROW_STEP * (2 * i + e // 2)
            column = first_column + fragments.MMA_COLUMNS * j + e % 2
            in_product = accumulator(lane, e)
            assert row - warp * rows_per_warp - fragments.MMA_ROWS * i == in_product[0]
            assert column - fragments.MMA_COLUMNS * j == in_product[1]
            owners.setdefault((row, column), []).append((thread.x, i, j, e))
    assert len(owners) == num_warps * rows_per_warp * 8 * n_tiles
    assert all(len(owner) == 1 for owner in owners.values())


@pytest.mark.parametrize("product", [p for p in PRODUCTS if p[1] != "float32"], ids="-".join)
def test_two_packed_accumulators_are_an_operand_a(product):
    element, first = MMA_ELEMENTS[product], 8
    for lane in WARP:
        # Numbers that both 16-bit types hold exactly: below 256.
        acc = np.full(first + 8, np.nan, np.float32)
        for j, e in itertools.product(range(2), range(4)):
            row, column = accumulator(lane, e)
            acc[first + 4 * j + e] = 16 * row + column + 8 * j
        frag = np.zeros(4, np.uint32)
        element.pack(frag, acc, first)
        for i, h in itertools.product(range(4), range(2)):
            row, k = operand_a_16_bit(lane, i, h)
            half = np.uint16(int(frag[i]) >> 16 * h & 0xFFFF)
            assert as_float32(half, product[1]) == 16 * row + k


def as_float32(half, dtype):
    """The value of the bits of a 16-bit number."""
    if dtype == "float16":
        return np.float32(half.view(np.float16))
    return np.uint32(int(half) << 16).view(np.float32)


def test_a_packed_accumulator_of_tf32_is_an_operand_a_with_k_in_another_order():
    element, first = MMA_ELEMENTS["sm80", "float32"], 4
    for lane in WARP:
        acc = np.full(first + 4, np.nan, np.float32)
        for e in range(4):
            row, column = accumulator(lane, e)
            acc[first + e] = 16 * row + column
        frag = np.zeros(4, np.uint32)
        element.pack(frag, acc, first)
        for i in range(4):
            row, k = operand_a_tf32(lane, i)
            # As `test_transposed_operands_of_tf32...` has the rows of B: k = t + 4 i is 2 t + i.
            column = 2 * (k % 4) + k // 4
            assert bits_as_float(frag[i]) == 16 * row + column
