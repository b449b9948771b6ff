"""Caches and sequences one after another: points, inputs, checks, peers, and the two commands."""

import json
import sys
import time
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from bench import __main__ as bench
from bench import serving
from bench.measuring import inputs, measure, supervisor
from bench.peers import methods as peers
from bench.points import points, work
from bench.points.points import KVCACHE, VARLEN, Point
from bench.points.work import Ceilings
from bench.records import record
from bench.tables import tables
from numflash.runtime.mode import SIMULATED
from tests.support.covering import some, thorough
from tests.support.numpy_devices import NumpyDevice
from tests.support.small_kernels import prefer_small_kernels

CACHE = Point("forward", KVCACHE, "float16", 3, 1, 32, 2, 1, 16, False)
PACKED = Point("forward", VARLEN, "float16", 4, 9, 9, 2, 2, 16, True, draw=0)
needs_simulator = pytest.mark.skipif(not SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM=1")


# Points and their work


def test_caches_are_those_that_were_asked_for():
    found = points.caches()
    assert len(set(found)) == len(found)
    assert {p.seqlen_q for p in found} == {1, 4, 16}
    assert {p.page_size for p in found} == {0, 16, 256}
    assert {p.seqlen_k for p in found} == {1024, 4096, 16384, 65536, 131072}
    assert {p.batch for p in found} == {1, 4, 16, 64}
    assert {(p.num_heads_q, p.num_heads_kv, p.head_dim) for p in found} == {(32, 8, 128)}
    assert {p.dtype for p in found} == {"bfloat16"}
    assert all(p.causal == (p.seqlen_q > 1) for p in found)
    left_out = {(64, 131072)}
    sizes = {(b, k) for b in points.CACHE_BATCHES for k in points.CACHE_KEYS} - left_out
    assert {(p.batch, p.seqlen_k) for p in found} >= sizes - {(64, 65536)}
    assert max(map(work.cache_bytes, found)) <= 2**34
    quick = points.caches(quick=True)
    assert found[: len(quick)] == quick and len(quick) == 18
    assert {p.page_size for p in quick} == {0, 16, 256}


def test_sequences_are_the_papers_and_long_tailed():
    found = points.sequences("backward")
    assert len(set(found)) == len(found) == 2 * (6 + 6)
    alike = [p for p in found if p.draw is None]
    assert all(p.batch * p.seqlen_q == 16384 and p.causal for p in alike)
    drawn = [p for p in found if p.draw is not None]
    assert {p.batch for p in drawn} == {16, 64, 300}
    for point in drawn:
        assert sum(point.seqlens) == point.batch * point.seqlen_k
        assert len(set(point.seqlens)) > 12
        if point.batch > 16:
            assert max(point.seqlens) > 4 * sorted(point.seqlens)[point.batch // 2]
    assert len({p.seqlens for p in drawn if p.head_dim == 64}) == 6
    quick = points.sequences("backward", quick=True)
    assert found[: len(quick)] == quick and {p.draw for p in quick} == {None, 0}
    both = serving.points_of("varlen", quick=True)
    assert [p.direction for p in both[:4]] == ["forward", "backward"] * 2


@pytest.mark.parametrize("point", [CACHE, PACKED, replace(CACHE, page_size=16)])
def test_points_survive_json_and_old_ones_are_read(point):
    kept = json.loads(json.dumps(point.as_dict()))
    assert Point.from_dict({**kept, "methods": {}}) == point
    dense = points.decode()[0]
    assert not {"page_size", "draw"} & set(dense.as_dict())


def test_the_work_is_what_sequences_have():
    alike = replace(PACKED, draw=None)
    dense = replace(alike, kind="grid")
    assert work.flops(alike) == work.flops(dense)
    squares = sum(n * n for n in PACKED.seqlens)
    assert work.flops(PACKED) == 4 * 2 * 16 * squares / 2 > work.flops(alike)
    assert work.cache_bytes(CACHE) == 2 * 3 * 32 * 16 * 2
    ceilings = Ceilings(700.0, 6.144, 132, None)
    assert work.share_of_copy(CACHE, 1e-3, ceilings) == pytest.approx(1.0)


# Inputs, and whether methods are right


def test_pages_hold_the_rows_of_the_cache_in_another_order():
    point = replace(CACHE, page_size=8)
    made = inputs.make(NumpyDevice(), point)
    whole = {name: made[name].copy() for name in "kv"}
    inputs.into_cache(NumpyDevice(), point, made)
    table = made["page_table"]
    assert sorted(table.ravel()) == list(range(12)) and (table.ravel() != range(12)).any()
    for name in "kv":
        read = made[f"{name}_cache"][table].reshape(whole[name].shape)
        assert np.array_equal(read, whole[name]) and name not in made


def _measure(point, names=(peers.OURS,)):
    return measure.measure_point(
        NumpyDevice(),
        point,
        list(names),
        exclude={},
        begin=lambda name: None,
        deadline=time.monotonic() + 60,
        budget_ms=0,
    )


POINTS = [
    CACHE,
    replace(CACHE, page_size=8),
    replace(CACHE, page_size=16, seqlen_q=4, causal=True),
    PACKED,
    replace(PACKED, direction="backward"),
]


@pytest.fixture
def small_kernels(monkeypatch):
    """What is measured runs small kernels: whose they are is not the point."""
    prefer_small_kernels(monkeypatch)


@thorough
@needs_simulator
@pytest.mark.usefixtures("small_kernels")
@pytest.mark.parametrize("point", some(POINTS, POINTS[2]), ids=str)
def test_numflash_is_right_on_caches_and_sequences(point):
    found = _measure(point)["methods"][peers.OURS]
    assert found["status"] == "measured", found
    assert found["check"]["outcome"] == "checked", found
    assert "not" in str(measure.kernels_of(NumpyDevice(), point))


@thorough
@needs_simulator
@pytest.mark.usefixtures("small_kernels")
@pytest.mark.parametrize("point", some([POINTS[1], PACKED], PACKED), ids=str)
def test_what_reads_other_rows_is_wrong(monkeypatch, point):
    prepare = peers.PEERS[peers.OURS].prepare

    def other(point, given):
        name = "page_table" if "page_table" in given else "cu_seqlens"
        changed = given[name].copy()
        if name == "page_table":
            changed[:, 1] = changed[:, 2]
        else:
            changed[1:-1] -= 1
        return prepare(point, {**given, name: changed})

    wrong = replace(peers.PEERS[peers.OURS], prepare=other)
    monkeypatch.setitem(peers.PEERS, peers.OURS, wrong)
    assert _measure(point)["methods"][peers.OURS]["check"]["outcome"] == "failed"


# Peers


@pytest.fixture
def torch(monkeypatch):
    """A module in the place of PyTorch's whose tensors are NumPy's arrays."""
    found = ModuleType("torch")
    found.Tensor, found.int32, found.uint8 = np.ndarray, np.int32, np.uint8
    found.arange = lambda n, dtype, device: np.arange(n, dtype=dtype)
    found.full = lambda shape, value, dtype, device: np.full(shape, value, dtype)
    found.empty = lambda n, dtype, device: np.empty(1, dtype)
    monkeypatch.setitem(sys.modules, "torch", found)
    return found


def _inputs(point):
    made = inputs.make(NumpyDevice(), point)
    inputs.into_cache(NumpyDevice(), point, made)
    return made


@pytest.mark.parametrize(
    ("name", "module", "table"),
    [
        ("flash-attention-2", "flash_attn", "block_table"),
        ("flash-attention-3", "flash_attn_interface", "page_table"),
        ("fa3-fwd", "fa3_fwd_interface", "page_table"),
    ],
)
def test_flash_attention_is_asked_in_its_own_words(monkeypatch, torch, name, module, table):
    asked = {}

    def called(function):
        def call(*arrays, **options):
            asked[function] = arrays, options
            return "out"

        return call

    names = "flash_attn_with_kvcache", "flash_attn_varlen_func"
    interface = SimpleNamespace(**{each: called(each) for each in names})
    monkeypatch.setitem(sys.modules, module, interface)
    for size in (0, 8):
        point = replace(CACHE, page_size=size, seqlen_q=4, causal=True)
        made = _inputs(point)
        assert peers.find(name).prepare(point, made).call() == {"out": "out"}
        arrays, options = asked["flash_attn_with_kvcache"]
        assert [x is made[n] for x, n in zip(arrays, ("q", "k_cache", "v_cache"), strict=True)]
        assert options["cache_seqlens"].tolist() == [32] * 3 and options["causal"]
        assert (table in options) == (size > 0)
    peers.find(name).prepare(PACKED, _inputs(PACKED)).call()
    _, options = asked["flash_attn_varlen_func"]
    assert options["max_seqlen_q"] == options["max_seqlen_k"] == max(PACKED.seqlens)
    assert options["cu_seqlens_k"].tolist() == [0, *np.cumsum(PACKED.seqlens)]


def test_flashinfer_is_planned_once_and_given_all_pages(monkeypatch, torch):
    made, asked = [], []

    class Wrapper:
        def __init__(self, workspace, layout, **options):
            made.append((type(self).__name__, layout))

        def plan(self, *arguments, **options):
            asked.append((arguments, options))

        def run(self, q, cache):
            return q

    kinds = {f"Batch{k}WithPagedKVCacheWrapper": 0 for k in ("Decode", "Prefill")}
    library = SimpleNamespace(**{name: type(name, (Wrapper,), {}) for name in kinds})
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    # NumPy's arrays of before 2 have no device.
    monkeypatch.setattr(
        "bench.peers.sequences._caches",
        lambda given: (_OnDevice(given["q"]), given["k_cache"], given["v_cache"]),
    )
    for queries in (1, 4):
        point = replace(CACHE, page_size=8, seqlen_q=queries, causal=queries > 1)
        call = peers.find("flashinfer").prepare(point, _inputs(point)).call
        assert call()["out"].shape == point.q_shape and call()
    assert [name for name, _ in made] == list(kinds) and len(asked) == 2
    (indptr, indices, last, *sizes), _ = asked[0]
    assert indptr.tolist() == [0, 4, 8, 12] and sorted(indices) == list(range(12))
    assert last.tolist() == [8] * 3 and sizes == [2, 1, 16, 8]
    (rows, *_), options = asked[1]
    assert rows.tolist() == [0, 4, 8, 12] and options["causal"]
    for point in (CACHE, PACKED):
        with pytest.raises(NotImplementedError, match="pages only"):
            peers.find("flashinfer").prepare(point, {})


class _OnDevice:
    """An array that knows where it lies."""

    def __init__(self, array):
        self.array, self.device = array, "cuda"
        self.shape, self.dtype = array.shape, array.dtype

    def reshape(self, *shape):
        """As NumPy's."""
        return self.array.reshape(*shape)


# The commands


@pytest.mark.parametrize("command", ["decode", "varlen"])
def test_without_a_gpu_points_are_counted(monkeypatch, capsys, tmp_path, command):
    monkeypatch.setattr(record, "_gpu", lambda *_: None)
    assert bench.main([command, "--quick", f"--out={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "no NVIDIA GPU here" in said and not list(tmp_path.iterdir())
    assert said.count("\n| ") == len(serving.points_of(command, quick=True)) + 1
    assert ("GB of K and V" in said) == (command == "decode")
    assert bench.main([command, "--peers=none"]) == 2


_MEASURED = {"status": "measured", "check": {"outcome": "checked"}, "median_ms": 0.5}


@pytest.mark.parametrize("command", ["decode", "varlen"])
def test_a_command_measures_prints_and_records(monkeypatch, capsys, tmp_path, command):
    values = {"name": "NVIDIA H200", "compute_cap": "9.0"}
    monkeypatch.setattr(record, "_gpu", lambda field, device=0: values.get(field))
    asked = []

    def run(tasks, settings, *, on_result):
        for task in tasks:
            if task["kind"] == "ceilings":
                on_result(task, {"matmul_tflops": 700.0, "copy_gbps": 4000.0, "num_sms": 132})
                continue
            asked.append(task)
            entry = {**_MEASURED, "tflops": 137.0, "gbps": 2000.0}
            methods = {peers.OURS: entry, "flash-attention-3": {**entry, "median_ms": 1.0}}
            methods["flashinfer"] = {"status": "unavailable", "reason": "not importable: none"}
            ratios = {"flash-attention-3": 2.0}
            on_result(task, {"methods": methods, "ratios": ratios, "timed": [], "kernel": "k"})

    monkeypatch.setattr(supervisor, "run", run)
    assert bench.main([command, "--quick", f"--out={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert len(asked) == len(serving.points_of(command, quick=True))
    assert asked[0]["peers"] == list(peers.OF_SEQUENCES)
    assert "2.00 to 2.00" in said and "flashinfer, first at" in said
    (path,) = tmp_path.glob("*.json")
    kept = json.loads(path.read_text())
    assert kept["kind"] == command and len(kept["points"]) == len(asked)
    if command == "decode":
        # 16 sequences of 4096 keys: 0.268 GB in 0.5 ms are 13 % of 4 TB/s.
        assert "| 500.0 (13%)" in said and "1000.0 (7%)" in said and "GB/s" in said
    else:
        assert "| 137 " in said and "TFLOP/s" in said


def test_what_has_no_time_or_is_wrong_says_so_in_the_table():
    wrong = {**_MEASURED, "check": {"outcome": "failed"}, "tflops": 1.0}
    crashed = {"status": "crashed", "reason": "gone"}
    entries = [
        {**CACHE.as_dict(), "methods": {peers.OURS: _MEASURED, "fa3-fwd": wrong}},
        {**replace(CACHE, page_size=16).as_dict(), "methods": {"fa3-fwd": crashed}},
    ]
    text = tables.caches(entries, None)
    assert "500.0" in text and "wrong" in text and "crashed" in text and "%" not in text
    assert "no method has a time" in tables.caches([], None).lower()
