"""Schedules as people make them, and as calls use them."""

import numpy as np
import pytest

import numflash
from numflash.calls.launch import Launcher
from numflash.calls.sequences import ScheduleKernel
from numflash.problem.sequences import ListShape
from numflash.reference.sequences import lists_of
from numflash.runtime.arrays import library_of
from tests.support.covering import thorough
from tests.support.sequence_cases import CAUSAL, ints, packed

SHAPES = ListShape(16, 32, **CAUSAL), ListShape(64, 16, by_keys=True, **CAUSAL)


@pytest.fixture(autouse=True)
def launches(on, monkeypatch):
    """The number of blocks of each launch."""
    on("sm_80")
    found, built = [], Launcher._built

    def counted(self):
        made = built(self)
        bind = made.bind

        def of(operands):
            launch = bind(operands)

            def launched(stream):
                found.append(self._num_blocks)
                return launch(stream)

            return launched

        made.bind = of
        return made

    monkeypatch.setattr(Launcher, "_built", counted)
    return found


def bound(schedule, given, shapes, lengths=None):
    """(the operands of a call, a function that launches)."""
    operands = {name: library_of(x, name).operand(x) for name, x in given.arrays.items()}
    kernel = ScheduleKernel(lengths or given.lengths, shapes, -1)
    launch = schedule.bind(kernel, operands)
    return operands, lambda: launch(0)


def expect_lists(given, operands, shapes):
    for shape in shapes:
        wanted = lists_of(*given.extents(), shape).tiles
        np.testing.assert_array_equal(operands[shape.name].array[: len(wanted)], wanted)


def test_lists_are_made_once_for_all_layers(launches):
    given = packed([30, 0, 100], [50, 20, 10])
    schedule = numflash.plan_varlen(**given.arrays)
    for _ in range(3):
        operands, launch = bound(schedule, given, SHAPES[:1])
        launch()
    assert launches == [1]
    expect_lists(given, operands, SHAPES[:1])
    # The backward has lists of its own.
    operands, launch = bound(schedule, given, SHAPES)
    assert launches == [1]
    launch()
    assert launches == [1, 2]
    expect_lists(given, operands, SHAPES)
    assert repr(schedule) == "Schedule(3 sequences, cu_seqlens_q, cu_seqlens_k, 3 lists)"


def test_lists_are_renewed_where_they_are_when_lengths_have_changed(launches):
    given = packed([30, 0, 100], [50, 20, 10])
    schedule = numflash.plan_varlen(**given.arrays)
    operands, launch = bound(schedule, given, SHAPES)
    launch()
    given.arrays["cu_seqlens_q"][:] = 0, 100, 101, 130
    schedule.renew()
    assert launches == [2, 2]
    expect_lists(given, operands, SHAPES)
    again, launch = bound(schedule, given, SHAPES)
    launch()
    assert launches == [2, 2] and all(again[s.name] is operands[s.name] for s in SHAPES)


def test_lists_that_were_renewed_before_a_launch_are_made(launches):
    given = packed([30, 0, 100], [50, 20, 10])
    schedule = numflash.plan_varlen(**given.arrays)
    operands, launch = bound(schedule, given, SHAPES)
    schedule.renew()
    launch()
    assert launches == [2]
    expect_lists(given, operands, SHAPES)


def test_masks_splits_and_arrays_of_another_size_have_lists_of_their_own(launches):
    given = packed([30, 0, 100], [50, 20, 10])
    schedule = numflash.plan_varlen(**given.arrays)
    wide = SHAPES[0]
    for shape in (wide, wide._replace(lo=-20), wide._replace(least=1)):
        operands, launch = bound(schedule, given, [shape])
        launch()
        expect_lists(given, operands, [shape])
        assert set(shape.operands) <= set(operands)
    bound(schedule, given, [wide], given.lengths._replace(bound_q=500))[1]()
    assert launches == [1, 1, 1, 1]


def test_a_schedule_is_for_its_own_arrays():
    given = packed([30, 0], [50, 20])
    schedule = numflash.plan_varlen(**given.arrays)
    other = given._replace(arrays=given.arrays | {"cu_seqlens_k": ints(0, 50, 70)})
    more = given._replace(arrays=given.arrays | {"seqlens_q": ints(3, 0)})
    for call, name in ((other, "cu_seqlens_k"), (more, "seqlens_q")):
        with pytest.raises(ValueError, match=f"arrays of the call: {name} is another one"):
            bound(schedule, call, SHAPES)
    with pytest.raises(ValueError, match="arrays of the call: seqlens_q is another one"):
        bound(numflash.plan_varlen(**more.arrays), given, SHAPES)


@thorough
def test_calls_of_all_layers_share_lists(launches):
    """Forward and backward, two layers: the same bits as without, and a list for each of three."""
    given = packed([20, 0, 33], [40, 5, 20])
    rng = np.random.default_rng(0)
    q, dout = rng.standard_normal((2, 53, 2, 32)).astype(np.float32)
    k, v = rng.standard_normal((2, 65, 2, 32)).astype(np.float32)
    ends = given.arrays["cu_seqlens_q"], given.arrays["cu_seqlens_k"]

    def layer(**more):
        options = {"causal": True, **more}
        out, lse = numflash.attention_varlen(q, k, v, *ends, return_lse=True, **options)
        backward = numflash.attention_varlen_backward
        return out, lse, *backward(dout, q, k, v, out, lse, *ends, **options)

    plain = layer()
    schedule = numflash.plan_varlen(**given.arrays)
    launches.clear()
    first = layer(schedule=schedule)
    of_first = len(launches)
    launches.clear()
    second = layer(schedule=schedule)
    assert len(launches) == of_first - 2
    for one, two, wanted in zip(first, second, plain, strict=True):
        assert one.tobytes() == two.tobytes() == wanted.tobytes()
    other = ints(0, 20, 20, 50)
    with pytest.raises(ValueError, match="cu_seqlens_q is another one"):
        numflash.attention_varlen(q, k, v, other, ends[1], schedule=schedule)


BAD = {
    "nothing": ({}, TypeError, "plan_varlen needs cu_seqlens_q and cu_seqlens_k"),
    "no array": ({"cu_seqlens_q": [0, 5]}, TypeError, "cu_seqlens_q must be a NumPy array"),
    "int64": ({"cu_seqlens_q": np.array([0, 5])}, TypeError, "must be int32, got int64"),
    "one too few": ({"cu_seqlens_q": ints(0, 5)}, ValueError, "need cu_seqlens_k, or both"),
    "different numbers": (
        {"cu_seqlens_q": ints(0, 5), "cu_seqlens_k": ints(0, 5, 6)},
        ValueError,
        "cu_seqlens_k must have 2 elements",
    ),
    "every second": (
        {"cu_seqlens_q": ints(0, 0, 5)[::2], "cu_seqlens_k": ints(0, 5)},
        ValueError,
        "cu_seqlens_q must be contiguous, got a stride of 2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arrays_are_refused(case):
    arrays, error, message = BAD[case]
    with pytest.raises(error, match=message):
        numflash.plan_varlen(**arrays)
