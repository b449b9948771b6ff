"""What hides keys or shapes scores, together, where one of it could silence another."""

import numpy as np
import pytest

import numflash
from numflash.functions.trace import trace
from numflash.math import floor
from tests.support.covering import some, thorough

SEQLEN_Q, SEQLEN_K = 24, 40
RNG = np.random.default_rng(0)
Q, DOUT = RNG.standard_normal((2, 1, SEQLEN_Q, 2, 32)).astype("float16")
K = RNG.standard_normal((1, SEQLEN_K, 2, 32)).astype("float16")
MASK = RNG.random((SEQLEN_Q, SEQLEN_K)) > 0.4


def in_blocks(batch, head, q_idx, kv_idx):
    return q_idx // 16 == kv_idx // 16


def by_threes(batch, head, q_idx, kv_idx):
    return (q_idx + kv_idx) % 3 != 0


def by_head(batch, head, q_idx, kv_idx):
    return (q_idx // 16 + kv_idx // 16 + head) % 2 == 0


def of_blocks(mask_mod, heads=1):
    return numflash.create_block_mask(mask_mod, 1, heads, SEQLEN_Q, SEQLEN_K, block_size=16)


def of_tiles():
    tiles = np.ones((2, 3), bool)
    sizes = {"block_size": 16, "seqlen_q": SEQLEN_Q, "seqlen_k": SEQLEN_K}
    return numflash.BlockMask.from_tiles(tiles, **sizes)


@thorough
@pytest.mark.parametrize("others", [{"mask": MASK}, {"mask_mod": by_threes}], ids=[*"ab"])
@pytest.mark.parametrize("blocks", [lambda: of_blocks(in_blocks), of_tiles], ids=["made", "full"])
def test_full_blocks_do_not_silence_other_masks(blocks, others):
    options = {"block_mask": blocks(), **others}
    assert numflash.check(Q, K, K, dout=DOUT, **options).passed


def test_a_block_mask_of_one_head_is_refused_where_its_function_tells_heads_apart():
    with pytest.raises(ValueError, match="block_mask must be made for heads 2, as q has"):
        numflash.attention(Q, K, K, block_mask=of_blocks(by_head))
    assert numflash.check(Q, K, K, block_mask=of_blocks(by_head, 2)).passed


def test_a_block_mask_and_an_origin_are_refused_together():
    with pytest.raises(ValueError, match=r"block_mask is made for .* origin"):
        numflash.attention(Q, K, K, block_mask=of_blocks(in_blocks), origin=(16, 0, 0))


@pytest.mark.parametrize(
    "mask_mod",
    [
        lambda b, h, i, j: (i - j) * (i - j) <= 25_010_000,
        lambda b, h, i, j: i + 33_554_433 <= j + 33_554_433 + 5000,
        lambda b, h, i, j: (i - j) * 1001 <= 20_019_999 // 4,
    ],
    ids=["square", "far", "scaled"],
)
def test_whole_numbers_that_no_float_holds_are_compared_as_whole_numbers(mask_mod):
    options = {"mask_mod": mask_mod, "origin": (5001, 0, 0)}
    q, k = Q[:, :2], K[:, :2]
    _, lse = numflash.attention(q, k, k, return_lse=True, **options)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k, dtype=np.float64) * 32**-0.5
    kept = mask_mod(0, 0, 5001 + np.arange(2)[:, None], np.arange(2)[None])
    with np.errstate(divide="ignore"):
        wanted = np.log((np.exp(scores) * kept).sum(-1))
    np.testing.assert_allclose(lse, wanted, atol=1e-3)


def test_a_quotient_of_whole_numbers_is_whole_where_it_is():
    bucket = {"mask_mod": lambda b, h, i, j: floor(j / 41) == floor(i / 41)}
    k = RNG.standard_normal((1, 48, 2, 32)).astype("float16")
    assert numflash.check(Q, k, k, **bucket).passed
    whole = trace(None, lambda b, h, i, j: (j / 41).int() == 1).program
    assert "floordiv" in whole.text


def test_a_power_above_1_has_gradient_0_at_0():
    q = Q.copy()
    q[:, 3] = 0
    options = {"score_mod": lambda s, b, h, i, j: abs(s) ** 1.5}
    assert numflash.check(q, K, K, dout=DOUT, **options).passed


@pytest.mark.parametrize("number", [1e300, np.complex64(1 + 2j)], ids=["large", "complex"])
def test_a_number_of_aux_is_a_float32(number):
    with pytest.raises((ValueError, TypeError), match="aux0 must"):
        numflash.attention(Q, K, K, score_mod=lambda s, b, h, i, j, x: s * x, aux=(number,))


CHECKED = {
    "a part's bias": {
        "bias": RNG.standard_normal((3, 40, 60)).astype("float16"),
        "origin": (8, 16, 1),
        "wrt": ("bias",),
    },
    "an array without axes": {
        "score_mod": lambda s, b, h, i, j, x: s * x,
        "aux": (np.array(1.5, np.float32),),
        "wrt": ("aux0",),
    },
    "a constant": {"score_mod": lambda s, b, h, i, j: 1.0},
}


@pytest.mark.parametrize("name", some(CHECKED, every=2))
def test_check_compares_what_attention_takes(name):
    assert numflash.check(Q, K, K, dout=DOUT, **CHECKED[name]).passed
