"""precision="auto" where wgmma multiplies the heads of both precisions."""

import numpy as np
import pytest

import numflash
from numflash.calls import forward, ready
from numflash.calls import fp8_forward as fp8_calls
from numflash.runtime import driver
from numflash.runtime.driver import limits_of_device
from tests.sim.test_fp8_auto import by_head
from tests.support.covering import some, thorough

RECIPES = {
    "tiles": numflash.Fp8Recipe(hadamard=False),
    # Warps that fetch scales must pass over the other kernel's heads, too.
    "keys": numflash.Fp8Recipe("token", hadamard=False),
}
# Rows in each of two tiles, and in one, and query heads, of two key-value heads.
SIZES = ((1, 150, 140, 2), (2, 40, 70, 4))


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A simulated Hopper of two SMs: blocks that go on take heads of both precisions."""
    monkeypatch.setenv("NUMFLASH_SIM_ARCH", "sm_90a")
    monkeypatch.setattr(driver, "multiprocessors", lambda device: (2, 2**20))
    monkeypatch.setattr(ready, "_ready", {})
    limits_of_device.cache_clear()
    yield
    limits_of_device.cache_clear()


def arrays(batch, seqlen_q, seqlen_k, heads_q=4):
    """q, k, v whose second key-value head is too large for 8 bits in every other entry."""
    rng = np.random.default_rng(seqlen_q)
    q, k, v = (
        rng.standard_normal((batch, seqlen, heads, 64)).astype(np.float16)
        for seqlen, heads in ((seqlen_q, heads_q), (seqlen_k, 2), (seqlen_k, 2))
    )
    q[::2, :, heads_q // 2 :] *= 4
    k[::2, :, 1] *= 4
    return q, k, v


@thorough
@pytest.mark.usefixtures("shipped_kernels")
@pytest.mark.parametrize(
    ("scales", "sizes"),
    some([(scales, sizes) for scales in RECIPES for sizes in SIZES], ("tiles", SIZES[0])),
)
def test_each_head_is_that_of_its_precision(scales, sizes):
    q, k, v = arrays(*sizes)
    options = {"causal": True, "fp8": RECIPES[scales]}
    chosen = numflash.explain_dispatch(q, k, v, precision="auto", **options)
    assert chosen.forward.implementation.name == "wgmma-fp8"
    assert chosen.forward.traits.key_scales == (scales == "keys")
    assert chosen.in_16_bits.implementation.name == "wgmma"
    out, decision = numflash.attention(q, k, v, precision="auto", return_decision=True, **options)
    in_fp8 = np.array(decision.in_fp8, bool)
    assert in_fp8.tolist() == [[True, False], [True, True]][: len(q)]
    in_8_bits = numflash.attention(q, k, v, precision="fp8", **options)
    in_16_bits = numflash.attention(q, k, v, causal=True)
    got, eight, sixteen = map(by_head, (out, in_8_bits, in_16_bits))
    assert (got[in_fp8] == eight[in_fp8]).all() and (got[~in_fp8] == sixteen[~in_fp8]).all()


@thorough
@pytest.mark.usefixtures("shipped_kernels")
def test_in_8_bits_heads_for_16_bits_are_passed_over(monkeypatch):
    """The kernel in 16 bits comes last, and would hide what the first one does in vain."""

    def in_8_bits_only(request, config):
        if request.traits.fp8:
            return forward.kernels_of(request, config)
        return forward.ForwardKernels(request, {}, {})

    q, k, v = arrays(1, 70, 9)
    out = np.full_like(q, np.nan)
    with monkeypatch.context() as patch:
        patch.setattr(fp8_calls, "kernels_of", in_8_bits_only)
        numflash.plan(q, k, v, out=out, precision="auto", fp8=RECIPES["tiles"]).launch()
    assert np.isnan(by_head(out)).all((2, 3, 4)).tolist() == [[False, True]]
