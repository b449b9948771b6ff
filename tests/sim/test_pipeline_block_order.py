"""The programs of kernels whose warps all do the same have the order of the kernels.

As `test_pipeline_order`, for the kernels on `mma.sync` and the portable ones.
"""

import numpy as np
import pytest
from numflash_tuner.pipeline.mma import WARPS
from numflash_tuner.pipeline.programs import program_of
from numflash_tuner.pipeline.steps import Load, Walk

import numflash
from numflash.configs import Traits, parse_config
from numflash.configs.formats import FORMATS
from tests.support.block_order import difference, record_block
from tests.support.covering import some
from tests.support.faults import Twice, load
from tests.support.program_order import Memory

# (GPU, family, config, dtype, head_dim, queries, keys)
CASES = {
    "forward": ("sm_80", "forward", "sm80-m32n32w2s1", "float16", 32, 40, 100),
    "forward, two stages": ("sm_80", "forward", "sm80-m16n16w1s2", "float16", 32, 16, 70),
    "forward, three stages": ("sm_80", "forward", "sm80-m16n16w1s3", "float16", 32, 16, 40),
    "forward, copies through registers": (
        *("sm_75", "forward", "sm75-m16n16w1s2", "float16", 32, 16, 70),
    ),
    "forward, 8 bits": ("sm_89", "forward", "fp8-sm89-m16n64w1s2", "float16", 64, 16, 200),
    "forward, 8 bits as 16": ("sm_80", "forward", "fp8-sm80-m16n32w1s1", "float16", 64, 16, 70),
    "dQ": ("sm_80", "backward-dq", "sm80-m16n16w1s1", "float16", 32, 16, 40),
    "dQ, two stages": ("sm_80", "backward-dq", "sm80-m16n16w1s2", "float16", 32, 16, 70),
    "dK and dV": ("sm_80", "backward-dkdv", "sm80-m16n16w1s1", "float16", 32, 40, 16),
    "dK and dV, two stages": ("sm_80", "backward-dkdv", "sm80-m16n16w1s2", "float16", 32, 70, 16),
    "one kernel": ("sm_80", "backward", "sm80-m32n32w2s1", "float16", 32, 70, 70),
    "one kernel, two stages": ("sm_80", "backward", "sm80-m32n32w2s2", "float16", 32, 100, 40),
    "portable forward": ("sm_80", "forward", "m16n16w2", "float32", 32, 16, 40),
    "portable dQ": ("sm_80", "backward-dq", "m16n16w2", "float32", 32, 16, 40),
    "portable dK and dV": ("sm_80", "backward-dkdv", "m16n16w2", "float32", 32, 40, 16),
}
OTHERS = {
    "float16": {"backward-dq": "sm80-m16n16w1s1", "backward-dkdv": "sm80-m16n16w1s1"},
    "float32": {"backward-dq": "m16n16w2", "backward-dkdv": "m16n16w2"},
}


def run(family, config, dtype, head_dim, seqlen_q, seqlen_k):
    """The forward, or gradients of results made of nothing."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, seqlen_q, 1, head_dim)).astype(dtype)
    k, v = (rng.standard_normal((1, seqlen_k, 1, head_dim)).astype(dtype) for _ in "kv")
    if family == "forward":
        precision = "fp8" if str(config).startswith("fp8") else None
        numflash.attention(q, k, v, config=str(config), precision=precision)
        return
    configs = {} if family == "backward" else OTHERS[dtype]
    lse = np.zeros((1, 1, seqlen_q), np.float32)
    given = configs | {family: str(config)}
    numflash.attention_backward(q, q, k, v, np.zeros_like(q), lse, config=given)


def memory_of(config, traits, buffers) -> Memory:
    """The map of a block's shared memory."""
    if hasattr(config, "tiles"):
        return Memory(config.smem_offsets(traits), config.tiles(traits), buffers)
    layout = config.smem_layout(traits)
    ends = [*list(layout.offsets.values())[1:], layout.smem_bytes // 4]
    words = {
        name: end - start for (name, start), end in zip(layout.offsets.items(), ends, strict=True)
    }
    return Memory(layout.offsets, words, {})


# The default run has each kernel once.
ONCE = "forward, two stages", "forward, 8 bits", "dQ", "dK and dV, two stages", "one kernel"
PORTABLE = "portable forward", "portable dQ", "portable dK and dV"


def differences(case, on, monkeypatch) -> list[str | None]:
    """Of each block, how a kernel differs from its program; None where it does not."""
    arch, family, text, dtype, head_dim, seqlen_q, seqlen_k = case
    on(arch)
    config = parse_config(family, text)
    traits = Traits(dtype, head_dim, head_dim, fp8=text.startswith("fp8"))
    rows = seqlen_q if family in ("forward", "backward-dq") else seqlen_k
    walked = seqlen_k if family in ("forward", "backward-dq") else seqlen_q
    walk, blocks = Walk(-(-walked // config.column_tile)), -(-rows // config.row_tile)
    walks = [[walk]] * blocks if family != "backward" else [[walk] * blocks]
    programs = [program_of(config, traits, mine) for mine in walks]
    memory = memory_of(config, traits, programs[0].buffers)
    by_lanes = any(isinstance(step, Load) for step in programs[0].roles[WARPS]())
    heard = record_block(monkeypatch, family.replace("-", "_"), memory, by_lanes)
    run(family, config, dtype, head_dim, seqlen_q, seqlen_k)
    blocks = zip(heard.blocks, programs, strict=True)
    return [difference(program, WARPS, steps) for steps, program in blocks]


@pytest.mark.parametrize("name", some(CASES, *ONCE, *PORTABLE))
def test_the_order(name, on, monkeypatch):
    assert set(differences(CASES[name], on, monkeypatch)) == {None}


def test_a_changed_kernel_is_seen(on, monkeypatch):
    module, factory = "numflash.kernels.mma.forward", "make_forward_kernel.forward"
    load([module], module, Twice(factory, "cuda.syncthreads", 1), monkeypatch)
    (found,) = differences(CASES["forward, two stages"], on, monkeypatch)
    assert "Copy(name='k', buffer=0, tile=2), is not heard, but [('sync', 'block')," in found


@pytest.mark.parametrize("stages", [1, 2])
def test_codes_of_a_cache_are_decoded_behind_their_copies(stages, on, monkeypatch):
    on("sm_80")
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 1, 2, 32)).astype(np.float16)
    caches = FORMATS["e4m3"].encode(rng.standard_normal((2, 1, 80, 1, 32)))
    config = parse_config("forward", f"sm80-m16n16w1s{stages}")
    traits = Traits("float16", 32, 32, codes=True, ragged=True)
    program = program_of(config, traits, 5)
    heard = record_block(
        monkeypatch, "forward", memory_of(config, traits, program.buffers), by_lanes=False
    )
    lengths = np.array([75], np.int32)
    numflash.attention_with_kvcache(q, *caches, cache_seqlens=lengths, config=str(config))
    (steps,) = heard.blocks
    assert difference(program, WARPS, steps) is None
