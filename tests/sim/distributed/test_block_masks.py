"""Block masks over several ranks: one GPU's bits, gradients and refusals."""

import numpy as np
import pytest

import numflash
from numflash import UnsupportedError
from numflash.distributed import Layout, attention, attention_backward, blocks
from numflash.distributed.whole import pinned_config
from numflash.problem.options import AttentionOptions
from numflash.runtime.numpy_arrays import NumPy
from tests.support.covering import some, thorough
from tests.support.ranks import on_ranks

TOKENS, HEADS_Q, HEADS_KV, BLOCK = 40, 4, 2, 16
LAYOUT = Layout.of_segments([TOKENS], [[(0, 0, 16), (0, 32, 8)], [(0, 16, 16)]])
SLOPES = np.linspace(-1, 2, HEADS_Q, dtype=np.float32)
TABLE = np.random.default_rng(5).random(TOKENS + 8).astype(np.float32)


def _seen(b, h, i, j, table):
    """By the numbers of rows and of heads; some blocks are full, some not."""
    return (i >= j) & ((i - j < 20 + 4 * h) | (table[j] < 0.3))


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    heads = {"q": HEADS_Q, "k": HEADS_KV, "v": HEADS_KV, "dout": HEADS_Q}
    return {x: rng.standard_normal((1, TOKENS, n, 16)).astype("f2") for x, n in heads.items()}


def mask_of_function():
    like = arrays()["q"]
    heads = (1, HEADS_Q, TOKENS, TOKENS)
    return numflash.create_block_mask(_seen, *heads, BLOCK, aux=(TABLE,), like=like)


def mask_of_tiles():
    tiles = np.tril(np.ones((3, 3), bool))
    tiles[2, 1] = False
    return numflash.BlockMask.from_tiles(tiles, block_size=BLOCK)


ASKED = {
    "function": lambda: {"block_mask": mask_of_function()},
    "tiles, sinks and slopes": lambda: {
        "block_mask": mask_of_tiles(),
        "causal": True,
        "sinks": SLOPES,
        "alibi_slopes": SLOPES,
    },
}


def config_of(options: dict) -> str:
    asked = AttentionOptions(**options)
    given = {name: x for name, x in arrays().items() if name != "dout"} | asked.arrays()
    views = {name: NumPy().view(x, name) for name, x in given.items()}
    return pinned_config(views, Layout.zigzag(TOKENS, 1), asked)


def on(method: str, options: dict, wrt: tuple[str, ...] = (), **of_backward) -> list[np.ndarray]:
    """out, lse and the gradients, of all tokens."""
    layout, whole = LAYOUT, arrays()

    def work(comm):
        dout, q, k, v = (layout.shard(whole[x], comm.rank) for x in ("dout", "q", "k", "v"))
        given = {"layout": layout, "comm": comm, "method": method, **options}
        out, lse = attention(q, k, v, return_lse=True, **given)
        found = [layout.gather(out, comm), layout.gather(lse, comm, axis=2)]
        if wrt:
            more = {"wrt": wrt, "grad_dtype": "float32", **given, **of_backward}
            gradients = attention_backward(dout, q, k, v, out, lse, **more)
            for name, x in zip(wrt, gradients, strict=True):
                found.append(layout.gather(x, comm) if name in "qkv" else x)
        return found

    return on_ranks(2, work)[0]


@pytest.mark.parametrize("method", some(["gather", "heads"], "gather"))
@pytest.mark.parametrize("name", some(ASKED, "function"))
def test_bits_are_those_of_one_gpu(name, method):
    options, whole = ASKED[name](), arrays()
    given = {"return_lse": True, "config": config_of(options), **options}
    expected = numflash.attention(whole["q"], whole["k"], whole["v"], **given)
    for found, x in zip(on(method, options), expected, strict=True):
        np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize("name", some(ASKED, "tiles, sinks and slopes"))
def test_a_ring_gives_what_one_gpu_gives(name):
    """Each call gets the part of the mask that has its queries and keys."""
    options, whole = ASKED[name](), arrays()
    expected = numflash.attention(whole["q"], whole["k"], whole["v"], return_lse=True, **options)
    for found, x in zip(on("ring", options), expected, strict=True):
        np.testing.assert_allclose(found, x, rtol=2e-3, atol=2e-3)


@thorough
@pytest.mark.parametrize("method", some(["gather", "heads", "ring", "queries"], "queries"))
@pytest.mark.parametrize("name", some(ASKED, "function"))
def test_gradients_are_those_of_one_gpu(name, method):
    options, whole = ASKED[name](), arrays()
    wrt = ("q", "k", "v", *[x for x in ("sinks", "alibi_slopes") if x in options])
    given = {"return_lse": True, "config": config_of(options), **options}
    operands = [whole[x] for x in ("q", "k", "v")]
    results = numflash.attention(*operands, **given)
    more = {"wrt": wrt, "grad_dtype": "float32", **options}
    expected = numflash.attention_backward(whole["dout"], *operands, *results, **more)
    # A ring rounds its results otherwise than one GPU, and so delta.
    tolerance = 2e-4 if method in ("gather", "heads") else 2e-3
    travels = {"travels": "queries"} if method == "queries" else {}
    method = "ring" if travels else method
    for name, found, x in zip(wrt, on(method, options, wrt, **travels)[2:], expected, strict=True):
        np.testing.assert_allclose(found, x, rtol=tolerance, atol=tolerance, err_msg=name)


def test_parts_are_made_once():
    mask = mask_of_tiles()
    part = blocks.part_of(mask, (16, 48), (0, 48), (0, 2))
    np.testing.assert_array_equal(part.tiles()[0, 0], mask.tiles()[0, 0, 1:])
    assert blocks.part_of(mask, (16, 48), (0, 48), (0, 2)) is part


@pytest.mark.parametrize("keys", [(0, 16), (16, 40), (32, 40)])
@pytest.mark.parametrize("of", [mask_of_function, mask_of_tiles])
def test_a_part_keeps_what_the_whole_keeps(of, keys):
    """Of lists of which some are empty, and others end before the part begins."""
    mask, rows = of(), (16, 40)
    whole = mask.dense(TOKENS, TOKENS)
    heads = (1, 3) if len(whole[0]) > 1 else (0, 1)
    part = blocks.part_of(mask, rows, keys, heads).dense(24, keys[1] - keys[0])
    np.testing.assert_array_equal(part, whole[:, slice(*heads), slice(*rows), slice(*keys)])


def test_what_is_refused():
    x = np.zeros((1, 32, 2, 16), np.float16)

    def refused(error, message, **given):
        layout = given.pop("layout", Layout.zigzag(64, 2, multiple=BLOCK))

        def work(comm):
            with pytest.raises(error, match=message):
                attention(x, x, x, layout=layout, comm=comm, **{"block_mask": mask} | given)

        on_ranks(2, work)

    mask = numflash.BlockMask.from_tiles(np.ones((4, 4), bool), block_size=BLOCK)
    by_16 = Layout.of_segments([64], [[(0, 0, 16), (0, 48, 16)], [(0, 16, 32)]])
    longer = numflash.BlockMask.from_tiles(np.ones((4, 2), bool), block_size=(BLOCK, 2 * BLOCK))
    keys = "32 keys, and one begins at token (16|48): .*multiple=32"
    refused(ValueError, keys, method="ring", layout=by_16, block_mask=longer)
    refused(UnsupportedError, "no origin, by which dropout_p goes", dropout_p=0.5, seed=1)
    documents = Layout.zigzag_documents([32, 32], 2, multiple=8)
    refused((UnsupportedError, TypeError), "block_mask", layout=documents)
    refused(
        ValueError,
        "begins at token 40.*multiple=16",
        layout=Layout.of_segments([64], [[(0, 0, 8), (0, 40, 24)], [(0, 8, 32)]]),
    )
    refused(
        ValueError,
        "block_mask must be made for|must have 4 x 4 blocks",
        block_mask=mask_of_tiles(),
    )
    refused(TypeError, "block_mask must be a BlockMask", block_mask=object())
