"""The rules in the words of explain_dispatch."""

from dataclasses import replace

import numpy as np
import pytest

import numflash
from numflash import BlockMask
from numflash.calls import forward as calls
from numflash.calls import launch, ready
from numflash.configs import (
    Traits,
    parse_config,
)
from numflash.problem.options import AttentionOptions
from numflash.runtime import driver
from numflash.runtime.arrays import library_of
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.mode import SIMULATED
from numflash.runtime.views import numpy_dtype
from numflash.selection import choice as selection
from numflash.selection.choice import BACKWARD, FUSED, select
from numflash.selection.rules import choose
from tests.host.numflash.test_dispatch import ADA, AMPERE, EXACT, HOPPER, TURING
from tests.support import fake_gpu


class Machine:
    """Arrays for a GPU of one's choice, of this process's kind."""

    def __init__(self, monkeypatch):
        self.gpu = None if SIMULATED else fake_gpu.install(monkeypatch)
        self.patch = monkeypatch

    def be(self, limits, num_sms=1, l2_bytes=2**20):
        """Have these limits."""
        for module in (driver, selection):
            self.patch.setattr(module, "limits_of_device", lambda device: limits)
            self.patch.setattr(module, "multiprocessors", lambda device: (num_sms, l2_bytes))
        self.patch.setattr(ready, "_ready", {})

    def arrays(self, *shapes, dtype="float16"):
        """Arrays of zeros."""
        if self.gpu is None:
            return [np.zeros(shape, numpy_dtype(dtype)) for shape in shapes]
        return [self.gpu.array(shape, dtype) for shape in shapes]


@pytest.fixture
def machine(monkeypatch):
    """A `Machine`."""
    return Machine(monkeypatch)


LONG = (2, 500, 4, 64)


@pytest.mark.parametrize("limits", [TURING, AMPERE, ADA, HOPPER], ids=lambda limits: limits.arch)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_explanation_lists_the_kernels_and_why_not_others(machine, limits, dtype):
    machine.be(limits)
    q, k, v = machine.arrays(LONG, LONG, LONG, dtype=dtype)
    explanation = numflash.explain_dispatch(q, k, v, causal=True)
    choices = {"forward": explanation.forward, **explanation.backward}
    # On Hopper one kernel makes all gradients: this machine has few SMs for its blocks.
    in_one = limits is HOPPER and dtype != "float32"
    assert list(choices) == ["forward", *([FUSED] if in_one else BACKWARD)]
    for family, choice in choices.items():
        expected = choose(family, Traits(dtype, 64, 64), limits, 500)
        if in_one and family == FUSED:
            *passed_over, (other, why) = choice.passed_over
            assert (other, "SMs" in why) == ("a kernel for dq apart", True)
            assert replace(choice, passed_over=tuple(passed_over)) == expected
        else:
            assert choice == expected
        assert str(choice) in str(explanation)
        assert f"{family}: {choice.config} ({choice.config.implementation})" in str(explanation)
        for what, why in choice.passed_over:
            assert f"not {what}: {why}" in str(explanation)
    assert (EXACT in str(explanation)) is (dtype == "float32")
    is_turing = dtype == "bfloat16" and limits is TURING
    assert ("have float16, not bfloat16" in str(explanation)) is is_turing


@pytest.mark.parametrize("kind", ["lengths", "blocks"])
def test_one_kernel_makes_gradients_of_what_lists_say(machine, kind):
    machine.be(HOPPER)
    q, k, v = machine.arrays(LONG, LONG, LONG)
    (lengths,) = machine.arrays((2,), dtype="int32")
    options = {"seqlens_q": lengths, "seqlens_k": lengths}
    if kind == "blocks":
        (tiles,) = machine.arrays((4, 4), dtype="bool")
        options = {"block_mask": BlockMask.from_tiles(tiles, block_size=128)}
    explanation = numflash.explain_dispatch(q, k, v, **options)
    assert list(explanation.backward) == [FUSED]
    # 192 keys a block; of a block mask 128, which divide its blocks.
    blocks, keys = (24, 192) if kind == "lengths" else (32, 128)
    assert explanation.backward[FUSED].config.tile_n == keys
    why = f"of one kernel {blocks} blocks share 1 SMs, which is enough"
    assert f"not a kernel for dq apart: {why}" in str(explanation)
    # Of 132 SMs most would have nothing to do.
    machine.be(HOPPER, 132)
    explanation = numflash.explain_dispatch(q, k, v, **options)
    assert list(explanation.backward) == list(BACKWARD)


def test_an_explanation_tells_of_packed_heads_and_splits(machine):
    machine.be(HOPPER, 132, 50 * 2**20)
    q, k = machine.arrays((1, 1, 32, 128), (1, 65536, 4, 128))
    explanation = numflash.explain_dispatch(q, k, k)
    splits = explanation.geometry.num_splits
    assert explanation.geometry.pack == 8
    assert splits > 1 and explanation.forward.config.num_splits == splits
    assert "  8 query heads of a group are packed into the rows of a tile" in str(explanation)
    assert f"  the keys are split over {splits} blocks" in str(explanation)
    (q,) = machine.arrays((1, 4096, 32, 128))
    explanation = numflash.explain_dispatch(q, k, k)
    assert (explanation.geometry.pack, explanation.geometry.num_splits) == (1, 1)
    assert "packed" not in str(explanation) and "split over" not in str(explanation)


def test_an_explanation_of_forced_configs(machine):
    machine.be(AMPERE)
    q, k, v = machine.arrays(LONG, LONG, LONG)
    forced = {"forward": "m16n16w4", "backward-dq": parse_config("backward-dq", "m32n32w4")}
    before = dict(forced)
    explanation = numflash.explain_dispatch(q, k, v, config=forced)
    assert forced == before
    assert str(explanation.forward.config) == "m16n16w4"
    assert explanation.forward.rule == "as the caller asks"
    assert str(explanation.backward["backward-dq"].config) == "m32n32w4"
    dkdv = explanation.backward["backward-dkdv"]
    assert dkdv == choose("backward-dkdv", Traits("float16", 64, 64), AMPERE, 500)
    explanation = numflash.explain_dispatch(q, k, v, config="sm80-m16n16w1s1x3")
    assert str(explanation.forward.config) == "sm80-m16n16w1s1x3"
    assert explanation.geometry.num_splits == 3


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"softmax_scale": -1.0}, "softmax_scale is not positive"),
        ({"softmax_scale": 0}, "softmax_scale is not positive"),
        ({"config": "m64n32w4"}, "forward: m64n32w4 (portable), as the caller asks"),
        ({"softcap": 2.0, "window_size": (5, 0)}, "forward: sm80-"),
    ],
)
def test_an_explanation_goes_by_the_options(machine, options, part):
    machine.be(AMPERE)
    q, k, v = machine.arrays(LONG, LONG, LONG)
    assert part in str(numflash.explain_dispatch(q, k, v, **options))


def test_an_explanation_says_why_bulk_copies_cannot_be_told_of_a_tensor(machine):
    machine.be(HOPPER)
    q, k = machine.arrays((2, 500, 1, 64), (2, 500, 1, 33))
    explanation = numflash.explain_dispatch(q, q, q)
    assert explanation.forward.config.implementation == "sm90"
    assert "cannot be described" not in str(explanation)
    explanation = numflash.explain_dispatch(k, k, k)
    assert explanation.forward.config.implementation == "sm80"
    line = (
        "  not sm90: q cannot be described to bulk copies: its row stride of 66 bytes is not a "
        "multiple of 16"
    )
    assert str(explanation).splitlines()[1] == line
    with pytest.raises(UnsupportedError, match="q cannot be described to bulk copies"):
        numflash.explain_dispatch(k, k, k, config="sm90-m64n64w4s1")
    (five,) = machine.arrays((2, 20, 5, 64))
    explanation = numflash.explain_dispatch(five, q, q)
    assert "not sm90: the 5 query heads of a group cannot be packed" in str(explanation)


def test_an_explanation_of_codes_on_hopper(machine):
    machine.be(HOPPER)
    (q,) = machine.arrays((2, 500, 4, 64))
    text = str(numflash.explain_dispatch(q, q, q, precision="fp8"))
    assert text.startswith("forward: fp8-sm90-m128n128w8s2-") and "as float16" not in text
    # One of 64 tokens, where tiles have 128.
    narrow = numflash.Fp8Recipe("block", 64)
    text = str(numflash.explain_dispatch(q, q, q, precision="fp8", fp8=narrow))
    assert text.startswith("forward: fp8-sm90-m128n128w8s2-") and "as float16" not in text
    config = "fp8-sm90-m64n64w4s2"
    explanation = numflash.explain_dispatch(q, q, q, precision="fp8", fp8=narrow, config=config)
    assert str(explanation.forward.config) == config
    # Codes are padded, results are not.
    (odd,) = machine.arrays((2, 500, 4, 20))
    explanation = numflash.explain_dispatch(odd, odd, q, precision="fp8")
    assert explanation.forward.config.implementation == "sm90"
    text = str(numflash.explain_dispatch(q, q, odd, precision="fp8"))
    assert "not fp8-sm90: out cannot be described to bulk copies: its head stride of 40" in text


def test_an_explanation_of_tf32(machine):
    machine.be(HOPPER)
    q, k, v = machine.arrays(LONG, LONG, LONG, dtype="float32")
    explanation = numflash.explain_dispatch(q, k, v, precision="tf32")
    for choice in (explanation.forward, *explanation.backward.values()):
        assert choice.traits.tf32 and choice.config.implementation == "sm80"


@pytest.mark.parametrize("limits", [AMPERE, HOPPER], ids=lambda limits: limits.arch)
@pytest.mark.parametrize("precision", [None, "fp8", "auto"])
def test_explaining_builds_nothing(machine, monkeypatch, limits, precision):
    def refuse(self):
        raise AssertionError(f"{self} is compiled")

    monkeypatch.setattr(launch.Launcher, "build", refuse)
    machine.be(limits)
    (q,) = machine.arrays(LONG)
    explanation = numflash.explain_dispatch(q, q, q, precision=precision)
    assert explanation.forward.traits.fp8 is (precision is not None)
    with pytest.raises(AssertionError, match="is compiled"):
        numflash.plan(q, q, q, precision=precision)


def test_an_explanation_is_the_selection_of_the_call(machine, monkeypatch):
    selections = []

    def noting(*arguments, **options):
        selections.append(select(*arguments, **options))
        return selections[-1]

    machine.be(HOPPER, 132, 50 * 2**20)
    q, k = machine.arrays((1, 1, 32, 128), (1, 65536, 4, 128))
    explanation = numflash.explain_dispatch(q, k, k)
    monkeypatch.setattr(calls, "select", noting)
    monkeypatch.setattr(calls.ForwardKernels, "build", lambda self: None)
    calls.Forward(
        {n: library_of(x, n).view(x, n) for n, x in (("q", q), ("k", k), ("v", k))},
        AttentionOptions(),
    )
    (selection,) = selections
    for name in ("forward", "geometry", "combine"):
        assert getattr(selection, name) == getattr(explanation, name)
    assert selection.geometry.blocks == selection.geometry.num_splits * 4
    assert selection.backward == {} and list(explanation.backward) == [FUSED]


def test_persistent_kernels_leave_multiprocessors_to_others(machine, monkeypatch):
    """As NCCL's kernels, which run beside those of attention over several GPUs."""
    machine.be(HOPPER, 132, 50 * 2**20)
    (q,) = machine.arrays((4, 4096, 16, 128))
    blocks = {}
    for spare in ("", "8", "500"):
        monkeypatch.setenv("NUMFLASH_SPARE_SMS", spare)
        explanation = numflash.explain_dispatch(q, q, q, causal=True)
        assert explanation.forward.config.persistent
        blocks[spare] = explanation.geometry.blocks
    assert blocks == {"": 132, "8": 124, "500": 1}
    monkeypatch.setenv("NUMFLASH_SPARE_SMS", "few")
    with pytest.raises(ValueError, match="NUMFLASH_SPARE_SMS must be an integer from 0 on"):
        numflash.explain_dispatch(q, q, q, causal=True)
