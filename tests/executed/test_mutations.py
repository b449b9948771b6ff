"""Compiled kernels broken by one change of their PTX: each gives another result, or is refused."""

import re

import numpy as np
import pytest

import numflash
from numflash.executor.text import PtxError
from numflash.simulator import SEED, SimulationError
from tests.executed.conftest import normal
from tests.support.covering import some, thorough

# Scores are large, so that rows' maxima are followed.
KERNELS = {
    "portable": ("sm_80", np.float32, 80, 16),
    "sm80": ("sm_80", np.float16, 130, 32),
    "sm90": ("sm_90a", np.float16, 200, 64),
    "clusters": ("sm_90a", np.float16, 150, 64),
}
CONFIGS = {"clusters": "sm90-m64n64w4s2-c2"}
# Statements that may be missing. "first" and "last" are places; without either all are taken out.
DROPPED = [
    ("portable", "bar.sync", "first"),
    ("portable", "bar.sync", "last"),
    ("sm80", "bar.sync", "first"),
    ("sm80", "cp.async.wait_group", "first"),
    ("sm80", "cp.async.wait_group", "last"),
    ("sm80", "cp.async.commit_group", "first"),
    ("sm90", "mbarrier.init", "first"),
    ("sm90", "mbarrier.arrive.shared", "last"),
    ("sm90", "mbarrier.arrive.expect_tx", "first"),
    ("sm90", "fence.mbarrier_init", "all"),
    ("sm90", "fence.proxy.async", "all"),
    ("sm90", "wgmma.fence", "first"),
    ("sm90", "wgmma.commit_group", "first"),
    ("sm90", "wgmma.wait_group", "first"),
    ("sm90", "wgmma.wait_group", "last"),
    ("sm90", "setmaxnreg.dec", "all"),
    ("sm90", "bar.sync", "last"),
    ("sm90", "bar.arrive", "first"),
    ("sm90", "cp.async.bulk.commit_group", "all"),
    ("sm90", "cp.async.bulk.wait_group", "first"),
    ("sm90", "stmatrix", "first"),
]
CHANGED = [
    ("sm80", r"\bmax\.f32", "min.f32"),
    ("sm80", r"\bmul\.rn\.f32", "add.rn.f32"),
    ("sm80", r"\bsub\.rn\.f32", "add.rn.f32"),
    ("sm80", r"\bneg\.f32", "abs.f32"),
    ("sm80", r"\bex2\.approx\.ftz\.f32", "abs.f32"),
    ("sm80", r"\bsetp\.lt\.s32", "setp.gt.s32"),
    ("sm80", r"f32\.f16\.f16\.f32", "f32.bf16.bf16.f32"),
    ("sm80", r"x4\.trans\.shared", "x4.shared"),
    ("sm80", r"cvt\.rn\.f16x2\.f32", "cvt.rn.bf16x2.f32"),
    ("sm80", r", 16, %r\d+;", ", 16, 0;"),
    ("sm90", r"(\}, %rd\d+, %rd\d+, )0(, 1, 1, 0, 0;)", r"\g<1>1\2"),
]
_MEETING = r"barrier\.cluster\.arrive\S*;\s*(?://.*\s*)*barrier\.cluster\.wait\S*;"
OF_CLUSTERS = {
    "the first meeting": (_MEETING, "", "first"),
    "the last meeting": (_MEETING, "", "last"),
    "who is told of empty buffers": (r"(mapa\S* there, %r\d+, )%r\d+", r"\g<1>0", "all"),
    "which half and which rows": (
        r"mov\.u32 (%r\d+), %cluster_ctarank;",
        r"mov.u32 \1, 0;",
        "all",
    ),
    "who gets the halves": (r"(::cluster\.L2\S* .*, )%rs\d+,", r"\g<1>1,", "all"),
}
_SEEDS = range(3)
_expected: dict[str, list[bytes]] = {}


@pytest.mark.parametrize("kernel, instruction, where", some(DROPPED, DROPPED[0]))
def test_what_is_missing_is_seen(executed, monkeypatch, kernel, instruction, where):
    pattern = rf"(?<=[\s{{;])(@!?%p\d+\s+)?{re.escape(instruction)}[^;]*;"
    assert _is_seen(executed, monkeypatch, kernel, pattern, ";", where)


@pytest.mark.parametrize("kernel, pattern, other", some(CHANGED, CHANGED[-1]))
def test_what_is_another_instruction_is_seen(executed, monkeypatch, kernel, pattern, other):
    assert _is_seen(executed, monkeypatch, kernel, pattern, other, "first")


@thorough
@pytest.mark.parametrize("fault", some(OF_CLUSTERS, "who gets the halves", every=2))
def test_what_is_wrong_between_blocks_is_seen(executed, monkeypatch, fault):
    assert _is_seen(executed, monkeypatch, "clusters", *OF_CLUSTERS[fault])


@thorough
@pytest.mark.parametrize("kernel", some(KERNELS, "sm90"))
def test_a_comment_changes_nothing(executed, monkeypatch, kernel):
    """Nor does the order of warps: what is seen above is the change."""
    assert not _is_seen(executed, monkeypatch, kernel, "ret;", "ret; // the end", "first")


@thorough
def test_a_buffer_of_dq_returned_early_is_seen(executed, monkeypatch):
    """Before the reduction has read it; few orders of warps show it."""
    early = r"(cp\.async\.bulk\.wait_group\.read 0;)(.*?)(mbarrier\.arrive\.shared[^;]*;)"
    kernels_with_it = []

    def mutate(ptx: str) -> str:
        changed, count = re.subn(early, r"\2\3 \1", ptx, flags=re.DOTALL)
        kernels_with_it.append(count)
        return changed

    arrays = [normal((1, 180, 1, 32), np.float16, seed) for seed in range(5)]
    lse = normal((1, 1, 180), np.float32, 5)
    executed("sm_90a", mutate)
    config = {"backward": "sm90-m64n64w4s2"}
    for seed in range(12):
        monkeypatch.setattr(SEED, "value", seed)
        try:
            numflash.attention_backward(*arrays, lse, causal=True, config=config)
        except SimulationError as error:
            assert "changed after the store was issued" in str(error)
            break
    else:
        pytest.fail("nobody has seen it")
    assert sum(kernels_with_it) == 1


def _is_seen(executed, monkeypatch, kernel: str, pattern: str, other: str, where: str) -> bool:
    """Whether a kernel with the change fails, or differs, in one of a few orders of warps."""

    def mutate(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx))
        assert found, f"{pattern} is not in the PTX"
        chosen = {"first": found[:1], "last": found[-1:], "all": found}[where]
        for match in reversed(chosen):
            ptx = ptx[: match.start()] + match.expand(other) + ptx[match.end() :]
        return ptx

    arch = KERNELS[kernel][0]
    if kernel not in _expected:
        executed(arch)
        _expected[kernel] = _results(kernel)
    executed(arch, mutate)
    for seed in _SEEDS:
        monkeypatch.setattr(SEED, "value", seed)
        try:
            results = _results(kernel)
        except PtxError:
            raise  # the change itself is wrong
        except (RuntimeError, ValueError, IndexError):
            return True
        if results != _expected[kernel]:
            return True
    return False


def _results(kernel: str) -> list[bytes]:
    _, dtype, tokens, head_dim = KERNELS[kernel]
    q, k, v = (normal((1, tokens, 1, head_dim), dtype, seed) for seed in range(3))
    options = {"causal": True, "return_lse": True, "config": CONFIGS.get(kernel)}
    results = numflash.attention(16 * q, k, v, **options)
    return [x.tobytes() for x in results]
