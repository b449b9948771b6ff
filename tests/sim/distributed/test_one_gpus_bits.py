"""Gather and heads give the bits of one GPU, whatever the number of ranks."""

from dataclasses import replace

import numpy as np
import pytest

import numflash
from numflash.distributed import Layout, attention
from numflash.distributed.whole import pinned_config
from numflash.problem.options import AttentionOptions
from numflash.runtime.gpus import find
from numflash.runtime.numpy_arrays import NumPy
from numflash.runtime.views import fresh
from tests.support.covering import ALL, some, thorough
from tests.support.ranks import on_ranks

HEADS, TOKENS, LENGTHS = (4, 2), 20, (5, 1, 14)
SLOPES = np.linspace(-1, 2, 4, dtype=np.float32)
ENDS = np.cumsum((0, *LENGTHS), dtype=np.int32)
OPTIONS = {
    "causal": {"causal": True},
    "window": {"window_size": (9, 3)},
    "features": {"causal": True, "alibi_slopes": SLOPES, "sinks": SLOPES, "softcap": 3.0},
    "score_mod": {"score_mod": lambda s, b, h, i, j: s + 0.1 * h - 0.01 * (i + 2 * j)},
}


def inputs() -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    shapes = [(1, TOKENS, n, 16) for n in (HEADS[0], HEADS[1], HEADS[1])]
    return [rng.standard_normal(shape).astype(np.float16) for shape in shapes]


def config_of(layout: Layout, options: dict) -> str:
    views = {name: NumPy().view(x, name) for name, x in zip("qkv", inputs(), strict=True)}
    views |= {n: NumPy().view(x, n) for n, x in options.items() if isinstance(x, np.ndarray)}
    return pinned_config(views, layout, AttentionOptions(**options))


def on(
    layout: Layout, method: str, options: dict, whole: list[np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """out and lse of all tokens."""

    def work(comm):
        own = [layout.shard(x, comm.rank) for x in whole or inputs()]
        given = {"layout": layout, "comm": comm, "method": method, **options}
        out, lse = attention(*own, return_lse=True, **given)
        return layout.gather(out, comm), layout.gather(lse, comm, axis=2)

    return on_ranks(layout.ranks, work)[0]


@thorough
@pytest.mark.parametrize("option", some(OPTIONS, "features"))
def test_one_sequence(option):
    options = OPTIONS[option]
    config = config_of(Layout.zigzag(TOKENS, 1), options)
    assert config.startswith("sm80-")
    expected = numflash.attention(*inputs(), return_lse=True, config=config, **options)
    make = Layout.contiguous if option == "window" else Layout.zigzag
    for ranks in (1, 2, 3, 4) if option == "causal" and ALL else (2,):
        for method in ("gather", *["heads"] * (ranks == 2)):
            for found, x in zip(on(make(TOKENS, ranks), method, options), expected, strict=True):
                np.testing.assert_array_equal(found, x, err_msg=f"{method} on {ranks}")


@pytest.mark.parametrize(
    "options", some([{"causal": True}, {"window_size": (4, 2)}], {"causal": True}), ids=str
)
def test_documents(options):
    layouts = [Layout.zigzag_documents(LENGTHS, n) for n in ((1, 2, 3) if ALL else (2,))]
    config = config_of(layouts[0], options)
    packed = [x[0] for x in inputs()]
    given = {"return_lse": True, "config": config, **options}
    out, lse = numflash.attention_varlen(*packed, ENDS, ENDS, **given)
    for layout in layouts:
        found = on(layout, "gather", options)
        np.testing.assert_array_equal(found[0][0], out, err_msg=f"{layout.ranks} ranks")
        np.testing.assert_array_equal(found[1][0], lse, err_msg=f"{layout.ranks} ranks")


BY_DOCUMENT = {
    "dropout": {"causal": True, "dropout_p": 0.25, "seed": 7},
    "functions": {
        "score_mod": lambda s, b, h, i, j: s + 0.1 * b - 0.01 * (i + 2 * j + h),
        "mask_mod": lambda b, h, i, j: (i + j + b) % 3 != 0,
    },
    "bias, slopes": {
        "causal": True,
        "bias": np.random.default_rng(3).standard_normal((3, 1, 35, 35)).astype(np.float32),
        "alibi_slopes": SLOPES,
    },
    "mask": {"window_size": (9, 3), "mask": np.random.default_rng(4).random((3, 4, 35, 35)) < 0.7},
}


@thorough
@pytest.mark.parametrize("option", some(BY_DOCUMENT, "functions"))
def test_options_by_documents_and_positions_in_them(option):
    """A document's number is its batch entry, as one GPU's `attention_varlen` counts them."""
    options, lengths = BY_DOCUMENT[option], (35, 3, 0, 18) if option == "dropout" else (14, 1, 5)
    rng, tokens = np.random.default_rng(2), sum(lengths)
    whole = [rng.standard_normal((1, tokens, n, 16)).astype(np.float16) for n in (4, 2, 2)]
    layout = Layout.zigzag_documents(lengths, 2, multiple=16 if option == "dropout" else 1)
    ends = np.cumsum((0, *lengths), dtype=np.int32)
    config = config_of(layout, options)
    given = {"return_lse": True, "config": config, **options}
    out, lse = numflash.attention_varlen(*(x[0] for x in whole), ends, ends, **given)
    for method in ("gather", "heads"):
        found = on(layout, method, options, whole)
        np.testing.assert_array_equal(found[0][0], out, err_msg=method)
        np.testing.assert_array_equal(found[1][0], lse, err_msg=method)


def test_a_pinned_config_splits_no_keys():
    """One GPU alone splits the keys of few queries: the bits then are not those of one walk."""
    shape, gpu = (1, 2048, 1, 128), find("A100")
    views = dict.fromkeys("qkv", fresh(shape, "float16", gpu))
    x = np.broadcast_to(np.float16(0), shape)
    alone = numflash.explain_dispatch(x, x, x, causal=True, arch="A100")
    config = pinned_config(views, Layout.zigzag(2048, 4), AttentionOptions(causal=True))
    assert alone.geometry.num_splits > 1
    assert config == str(replace(alone.forward.config, num_splits=1))
