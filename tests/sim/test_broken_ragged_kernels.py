"""Faults of kernels where sequences have lengths of their own: the tests of these find each.

They are slips of the same kind: the sizes of all instead of those of a sequence, the rows of the
array instead of the sequence's, the band of the call instead of the sequence's. Where Hopper
copies boxes of pages they are of coordinates, of rows, and of the table.
"""

import numpy as np
import pytest

import numflash
from numflash.problem.tensor_maps import TensorLayout
from numflash.simulator import SimulationError
from numflash.simulator.errors import DeadlockError
from tests.support.covering import some
from tests.support.faults import Dropped, Mutation, load
from tests.support.page_cases import Paged, arrays_of, called, compare, expected_of
from tests.support.varlen_cases import VarlenCase

ROOM = "numflash.kernels"
PORTABLE = {
    name: f"{ROOM}.portable.{name}" for name in ("forward", "backward_dq", "backward_dkdv")
}
MMA = {name: f"{ROOM}.mma.{name}" for name in ("forward", "backward_dq", "backward_dkdv")}
BLOCKS, ADDRESSES = "numflash.tiles.blocks", "numflash.tiles.addresses"
QUERIES = f"{ROOM}.mma.queries"


def fault(text: str, old: str, new: str, times: int = 1) -> Mutation:
    """In a text, whose place for it is {}, one thing instead of another, wherever it stands."""
    return Mutation(text, text.format(old), text.format(new), times)


SHAPE = "sequence", "shape"
STATISTICS = "first_of_statistics(batch, head, shape){}", " + sequence.first_q", ""
SHIFT = "shift = i32({})", "shape.aligned * (seqlen_k - seqlen_q)"


# Of each fault the module that has it, the kernel that must see it, and (kernel, form, option).
FAULTS = {
    "keys of the next sequence are not hidden, portable": (
        PORTABLE["forward"],
        fault("i, j, {}.seqlen_k, sequence)", *SHAPE),
        *(PORTABLE["forward"], ("portable", "packed", "full")),
    ),
    "keys of the next sequence are not hidden": (
        MMA["forward"],
        fault("i, j, {}.seqlen_k, sequence, l", *SHAPE),
        *(MMA["forward"], ("sm80", "packed", "full")),
    ),
    "keys of another sequence": (
        MMA["backward_dq"],
        fault("k_base = first_of_rows(k, batch, head_kv, sequence.{})", "first_k", "first_q"),
        *(MMA["backward_dq"], ("sm80", "packed", "full")),
    ),
    "NaN behind the keys is copied": (
        MMA["forward"],
        fault("fetch_v(smem, v, v_from, n_block, stage, {}.", *SHAPE),
        *(MMA["forward"], ("sm80", "packed, parts", "causal")),
    ),
    "rows behind a sequence are written": (
        MMA["forward"],
        fault("num_rows = i32({}.seqlen_q", *SHAPE),
        *(MMA["forward"], ("sm80", "padded", "full")),
    ),
    "dK of rows behind a sequence is written": (
        MMA["backward_dkdv"],
        fault("dk_base, row, {}.seqlen_k", *SHAPE),
        *(MMA["backward_dkdv"], ("sm80", "padded", "full")),
    ),
    "dK of rows behind a sequence is written, portable": (
        PORTABLE["backward_dkdv"],
        fault("n_start + row, {}.seqlen_k, shape.head_dim)", *SHAPE),
        *(PORTABLE["backward_dkdv"], ("portable", "padded", "full")),
    ),
    "statistics of the first sequence": (
        QUERIES,
        fault(*STATISTICS),
        *(MMA["backward_dkdv"], ("sm80", "packed", "causal")),
    ),
    "statistics of the first sequence, portable": (
        PORTABLE["backward_dq"],
        fault(*STATISTICS),
        *(PORTABLE["backward_dq"], ("portable", "packed", "causal")),
    ),
    "the diagonal ends with the array": (
        BLOCKS,
        fault(*SHIFT, "shape.seqlen_k - shape.seqlen_q"),
        *(MMA["forward"], ("sm80", "packed", "causal")),
    ),
    "top left is bottom right": (
        BLOCKS,
        fault(*SHIFT, "seqlen_k - seqlen_q"),
        *(MMA["forward"], ("sm80", "packed", "causal top left")),
    ),
    "distances of ALiBi are those of the array": (
        BLOCKS,
        fault("        i32(mask.hi + shift),\n        {},", "shift", "i32(0)"),
        *(PORTABLE["forward"], ("portable", "packed", "alibi by sequence")),
    ),
    "lse of another sequence": (
        ADDRESSES,
        fault("(place.batch, head, shape){}", " + sequence.first_q", ""),
        *(MMA["forward"], ("sm80", "packed", "full")),
    ),
}


# Those of tensor cores: portable kernels have the same ones.
NEEDLESS = "top left is bottom right", "dK of rows behind a sequence is written"
SOME_FAULTS = [n for n in FAULTS if "portable" not in n and n not in NEEDLESS]


@pytest.mark.parametrize("name", some(FAULTS, *SOME_FAULTS))
def test_a_fault_is_found(name, monkeypatch, on):
    faulty, mutation, kernel, (implementation, form, option) = FAULTS[name]
    case = VarlenCase(implementation, "uneven", form, option)
    on(case.arch)
    load((faulty, kernel), faulty, mutation, monkeypatch)
    (q, k, v, dout), options = case.arguments(np.random.default_rng(2))
    if not kernel.endswith("forward"):
        options |= {"dout": dout, "wrt": ("k", "v") if kernel.endswith("dkdv") else ("q",)}
    try:
        report = numflash.check(q, k, v, **options)
    except (SimulationError, IndexError):
        return
    assert not report.passed, f"nobody has found that {name}"


ORIGINS, PRODUCER, *OTHERS = (
    f"{ROOM}.wgmma.{name}" for name in ("origins", "producer", "skeleton", "forward")
)
# Four pages a tile, and some that are not full. The table ends within the last tile.
SEVERAL = Paged("sm90-m64n32w4s2", 8, (9, 41), heads=(1, 1), arch="sm_90a")
# Two tiles a page, and one that is not full.
PART = Paged("sm90-m64n16w4s2", 32, (60, 45), heads=(1, 1), arch="sm_90a")
SLABS = Paged("sm90-m64n32w4s2", 16, (41,), heads=(1, 1), head_dims=(128, 128), arch="sm_90a")
# Three tiles of keys in two buffers, and two tiles of rows.
BUFFERS = Paged("sm90-m64n32w4s2", 8, (90,), 70, heads=(1, 1), arch="sm_90a")
K_BOX, V_BOX = " + stage * k.words + (slab * stage_n{}", "* v_slab_words{}"

# Of each fault of boxes the module that has it, and the case that must show it.
FAULTS_OF_BOXES = {
    "a page ends with itself, y": (
        ORIGINS,
        fault("y = i32({})", "min(pages.size, keys.seqlen - first)", "pages.size"),
        SEVERAL,
    ),
    "a page ends a key early, y": (
        ORIGINS,
        fault("y = i32(min(pages.size, keys.seqlen - first{}", "))", " - 1))"),
        SEVERAL,
    ),
    "each tile begins its page, x": (
        ORIGINS,
        fault("x = i32(pages.size - y{}", " + key - first)", ")"),
        PART,
    ),
    "x does not know where the page ends": (
        ORIGINS,
        fault("x = i32({}key - first)", "pages.size - y + ", ""),
        PART,
    ),
    "the page of the sequence's first keys": (
        ORIGINS,
        fault("pages.pitch{}]", " + column", ""),
        SEVERAL,
    ),
    "the page of the next keys": (
        ORIGINS,
        fault("pages.pitch + column{}]", "", " + 1"),
        PART,
    ),
    "pages of the first sequence": (
        ORIGINS,
        fault("pages.table[{}column]", "keys.entry * pages.pitch + ", ""),
        SEVERAL,
    ),
    "rows of the table are packed": (
        ORIGINS,
        fault("keys.entry * {}", "pages.pitch + column", "(pages.pitch - 2) + column"),
        SEVERAL._replace(gap=2),
    ),
    "the page of a key past the end": (
        ORIGINS,
        fault("if key {}:", "< keys.seqlen", ">= 0"),
        SEVERAL,
    ),
    "keys of the longest sequence": (
        ORIGINS,
        fault("keys = KeysInPages({}.seqlen_k, batch)", "sequence", "shape"),
        SEVERAL,
    ),
    "boxes of K upon one another": (
        PRODUCER,
        fault(K_BOX, " + first", "", times=2),
        SEVERAL,
    ),
    "boxes of V upon one another": (
        PRODUCER,
        fault(V_BOX, " + first * SLAB_WORDS", "", times=2),
        SEVERAL,
    ),
    "slabs of K are as long as boxes": (
        PRODUCER,
        fault("k.words + (slab * {} + first)", "stage_n", "rows", times=2),
        SLABS,
    ),
    "boxes of K are whole tiles": (
        PRODUCER,
        fault("rows, full = {}, K.full", "min(pages.size, box_n)", "box_n"),
        SEVERAL,
    ),
    "boxes of V are whole tiles": (
        PRODUCER,
        fault("rows, full = {}, V.full", "min(pages.size, box_n)", "box_n"),
        SEVERAL,
    ),
}


def is_right(case: Paged) -> bool:
    """Whether a call of the case gives what float64 does."""
    arrays = arrays_of(case)
    try:
        compare(case, called(*arrays[:4]), expected_of(case, arrays))
    except (AssertionError, SimulationError, DeadlockError, IndexError):
        return False
    return True


CASES_OF_BOXES = {
    "several a tile": SEVERAL,
    "a wide table": SEVERAL._replace(gap=2),
    "parts of pages": PART,
    "slabs": SLABS,
    "buffers": BUFFERS,
}


@pytest.mark.parametrize("name", some(CASES_OF_BOXES, "a wide table", "parts of pages"))
def test_boxes_of_pages_are_right(name, on):
    case = CASES_OF_BOXES[name]
    on(case.arch)
    assert is_right(case)


# How far a page goes, where in it a tile begins, each index of the table, its end, and boxes.
SOME_FAULTS_OF_BOXES = (
    "a page ends with itself, y",
    "each tile begins its page, x",
    "the page of the next keys",
    "pages of the first sequence",
    "the page of a key past the end",
    "boxes of K upon one another",
    "boxes of V are whole tiles",
)


@pytest.mark.parametrize("name", some(FAULTS_OF_BOXES, *SOME_FAULTS_OF_BOXES))
def test_a_fault_of_boxes_is_found(name, monkeypatch, on):
    faulty, mutation, case = FAULTS_OF_BOXES[name]
    on(case.arch)
    chain = [ORIGINS, PRODUCER, *OTHERS]
    load(chain[chain.index(faulty) :], faulty, mutation, monkeypatch)
    assert not is_right(case), f"nobody has found that {name}"


@pytest.mark.parametrize(
    "event", some(["K.claim", "K.expect", "V.claim", "V.expect"], "K.claim", "V.expect")
)
def test_a_box_of_pages_waits_for_its_buffer_and_is_waited_for(event, monkeypatch, on):
    on("sm_90a")
    left_out = Dropped(f"make_produce.fetch_paged_{event[0].lower()}", event)
    load([PRODUCER, *OTHERS], PRODUCER, left_out, monkeypatch)
    assert not all(is_right(BUFFERS) for _ in range(8)), f"nobody has missed {event}"


@pytest.mark.parametrize("rows", some([8, 32], 8))
def test_maps_of_other_rows_are_found(rows, monkeypatch, on):
    """Boxes of half of a page, and of two: not the bytes that a barrier awaits."""
    on("sm_90a")
    of_pages = TensorLayout.of_pages
    monkeypatch.setattr(TensorLayout, "of_pages", lambda tensor, _: of_pages(tensor, rows))
    assert not is_right(SEVERAL._replace(page=16))
