"""FP8 in the benchmark: its methods compute attention, and what their figures mean."""

import sys
import time
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

import numflash
from bench.measuring import agreement, measure, quantize
from bench.peers import fp8 as peers_fp8
from bench.peers import methods as peers
from bench.peers.methods import FP8, FP8_QUANTIZING
from bench.points import work
from bench.points.points import Point
from bench.records import checks
from bench.records.entries import is_right
from bench.studies import static
from bench.tables import quantization, tables
from numflash.runtime.mode import SIMULATED
from tests.support.covering import thorough
from tests.support.numpy_devices import NumpyDevice
from tests.support.small_kernels import prefer_small_kernels

POINT = Point("forward", "grid", "float16", 1, 20, 36, 2, 1, 16, True)
needs_simulator = pytest.mark.skipif(not SIMULATED, reason="runs the kernels on NumPy arrays")


class Device(NumpyDevice):
    """Arrays on the host; nothing is called to be timed."""

    def time_method(self, method):
        return self.milliseconds.get(method.name, 1.0)

    def copy(self, size):
        self.copied = size
        return lambda: None


def samples_of(point):
    device = NumpyDevice()
    shapes = {"q": point.q_shape, "k": point.kv_shape, "v": point.kv_shape}
    inputs = {n: device.normal(s, point.dtype, i) for i, (n, s) in enumerate(shapes.items())}
    return inputs, agreement.make_samples(np, point, device.round_to(point.dtype), **inputs)


def test_the_methods_without_quantisation_do_none_when_called(monkeypatch):
    made, called = [], []

    def quantize_fp8(x, *recipe, **options):
        made.append((*recipe, options["transposed"]))
        return f"8 bits of {x}"

    monkeypatch.setattr(numflash, "quantize_fp8", quantize_fp8)
    monkeypatch.setattr(numflash, "attention", lambda *x, **options: called.append((x, options)))
    inputs = {name: name for name in "qkv"}
    method = peers.find(FP8).prepare(POINT, inputs)
    default = numflash.Fp8Recipe()
    share = default.granularity, default.block
    assert made == [(*share, True, 0, False)] * 2 + [(*share, False, 0, True)]
    method.call()
    peers.find(FP8_QUANTIZING).prepare(POINT, inputs).call()
    assert len(made) == 3
    assert called == [
        (("8 bits of q", "8 bits of k", "8 bits of v"), {"causal": True}),
        (("q", "k", "v"), {"causal": True, "precision": "fp8"}),
    ]


def test_there_is_no_backward():
    for name in (FP8, FP8_QUANTIZING):
        with pytest.raises(NotImplementedError, match="no backward on 8-bit floats"):
            peers.find(name).prepare(replace(POINT, direction="backward"), {})


def test_flash_attention_3_gets_codes_and_scales(monkeypatch):
    seen = []
    module = ModuleType("fa3_fwd_interface")
    module.flash_attn_func = lambda *x, **options: seen.append((x, options)) or ("out", "lse")
    module.flash_attn_with_kvcache = lambda *x, **options: "decoded"
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", module)
    monkeypatch.setattr(peers_fp8, "per_head", lambda x, heads: (f"codes of {x}", (x, heads)))
    inputs, peer = {name: name for name in "qkv"}, peers.find("fa3-fwd-fp8")
    assert peer.unavailable() is None and peer.operand_bytes == 1
    assert peer.prepare(POINT, inputs).call() == {"out": "out"}
    ((arrays, options),) = seen
    assert arrays == ("codes of q", "codes of k", "codes of v")
    scales = {f"{name}_descale": (name, POINT.num_heads_kv) for name in "qkv"}
    assert options == {"causal": True, **scales}
    decoding = peer.prepare(replace(POINT, kind="decode"), inputs)
    assert decoding.call() == {"out": "decoded"}


@thorough
def test_scales_of_flash_attention_3():
    torch = pytest.importorskip("torch")
    x = torch.randn(2, 24, 4, 16).half()
    codes, descale = peers_fp8.per_head(x, 2)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == x.shape
    assert descale.shape == (2, 2)
    back = codes.float() * descale.repeat_interleave(2, 1)[:, None, :, None]
    assert ((back - x.float()) ** 2).mean() ** 0.5 < 0.04


def test_relative_errors_by_hand():
    inputs, samples = samples_of(POINT)
    out = numflash.reference.attention(*inputs.values(), causal=True)[0]
    worse = agreement.compare({"out": 1.05 * out}, samples, 0.1)
    assert worse["errors"]["out"] == pytest.approx(0.05, rel=1e-3)
    assert worse["outcome"] == "checked"
    assert agreement.compare({"out": 1.05 * out}, samples, 0.04)["outcome"] == "failed"
    # The rule for 16 bits would not do.
    assert agreement.compare({"out": 1.05 * out}, samples)["outcome"] == "failed"
    out[0, 3, 0, 5] = np.nan
    assert agreement.compare({"out": out}, samples, 0.1)["outcome"] == "failed"


def test_what_is_read_in_8_bits_counts_as_such():
    point = replace(POINT, dtype="bfloat16", num_heads_q=4, num_heads_kv=4)
    q, kv, lse = 20 * 4 * 16, 36 * 4 * 16, 20 * 4 * 4
    assert work.min_bytes(point, 1) == q + 2 * kv + 2 * q + lse
    assert work.min_bytes(point) == work.min_bytes(point, 2) == 2 * (2 * q + 2 * kv) + lse
    assert work.gbps(point, 2.0, 1) == pytest.approx(work.min_bytes(point, 1) / 2e6)


@thorough
@needs_simulator
def test_a_point_with_fp8(monkeypatch):
    prefer_small_kernels(monkeypatch)
    # Small tiles, by the names of variants.
    monkeypatch.setitem(peers.PEERS, FP8, peers.find(f"{FP8}:fp8-sm80-m16n32w1s1"))
    monkeypatch.setitem(peers.PEERS, "numflash", peers.find("numflash:sm80-m16n16w1s1"))
    device = Device({"numflash": 3.0, FP8: 2.0, FP8_QUANTIZING: 2.5})
    result = measure.measure_point(
        device,
        POINT,
        ["numflash", FP8, FP8_QUANTIZING],
        exclude={},
        begin=lambda name: None,
        deadline=time.monotonic() + 60,
        budget_ms=0,
    )
    assert all(is_right(entry) for entry in result["methods"].values())
    for name in (FP8, FP8_QUANTIZING):
        check = result["methods"][name]["check"]
        assert 0.01 < check["errors"]["out"] < 0.1
        assert check["budgets"] == {"out": peers.FP8_TOLERANCE}
    assert result["methods"][FP8]["gbps"] == pytest.approx(work.gbps(POINT, 2.0, 1))
    table = tables.fp8([{**POINT.as_dict(), **result}])
    cells = [cell.strip() for cell in table.splitlines()[2].strip("|").split("|")]
    assert cells[1:] == ["3.000", "2.000", "2.500", "1.50", "1.20"]
    assert "sm_90" in table and "float16" in table


def test_without_a_time_on_8_bits_there_is_no_table():
    entry = {**POINT.as_dict(), "methods": {FP8: {"status": "failed"}}, "ratios": {}}
    assert tables.fp8([entry]) == tables.fp8([]) == ""


# Quantisation


@pytest.fixture
def small(monkeypatch):
    prefer_small_kernels(monkeypatch)
    monkeypatch.setattr(quantize, "SEQLEN", 48)
    monkeypatch.setattr(quantize, "HIDDEN", 128)
    monkeypatch.setattr(quantize, "DTYPE", "float16")
    cases = quantize.Case(64, hadamard=True), quantize.Case(64, "token", transposed=True)
    monkeypatch.setattr(quantize, "CASES", cases)


@thorough
@needs_simulator
def test_quantisation_is_measured_next_to_a_copy_of_as_many_bytes(small):
    device, begun = Device({"quantize": 5.0, "copy": 4.0}), []
    found = quantize.measure(device, begun.append, {}, 0)
    assert list(found) == begun == ["d64 block hadamard", "d64 token transposed"]
    for entry, scales in zip(found.values(), (2, 2 * 48), strict=True):
        assert entry["bytes"] == 48 * 128 * 3 + 4 * scales
        assert entry["of_copy"] == 0.8 and entry["is_right"]
        assert 0.01 < entry["relative_rms"] < quantize.MAX_REL_RMS
        assert entry["gbps"] == pytest.approx(entry["bytes"] / 5e6)
    assert device.copied == entry["bytes"] // 2
    lines = quantization.table(found).splitlines()
    assert "80%" in lines[2] and lines[2].split()[-2] == "yes"


@needs_simulator
def test_a_wrong_or_failed_quantisation_has_no_figure(small, monkeypatch):
    right = numflash.dequantize_fp8
    monkeypatch.setattr(numflash, "dequantize_fp8", lambda x, dtype: 1.1 * right(x, dtype))
    found = quantize.measure(Device(), lambda name: None, {"d64 block hadamard": "it died"}, 0)
    assert found["d64 block hadamard"] == {"reason": "it died"}
    assert not found["d64 token transposed"]["is_right"]
    table = quantization.table(found)
    assert "it died" in table and "wrong: relative RMS 0.1" in table and "GB/s |" in table
    monkeypatch.setattr(numflash, "quantize_fp8", lambda *x, **options: 1 / 0)
    found = quantize.measure(Device(), lambda name: None, {}, 0)
    assert all("ZeroDivisionError" in entry["reason"] for entry in found.values())


def test_static_rows_of_quantisation(monkeypatch):
    asked = []
    monkeypatch.setattr(static, "row", lambda *kernel: asked.append(kernel) or {})
    assert len(list(static.quantize_rows())) == len(asked) > 60
    for family, traits, limits, config in asked:
        assert config.family == family and config.misfit(traits) is None
        assert config.smem_bytes(traits) <= limits.max_smem_per_block
    assert {config.scale for *_, config in asked} == {"block", "token", "given"}


def test_verify_runs_the_checks_of_8_bit_floats():
    (group,) = [group for group in checks.GROUPS if "tests/gpu/test_fp8.py" in group.selection]
    assert group.name == "8-bit floats"
