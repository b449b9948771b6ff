"""Tensor-core kernels broken on purpose: every barrier and every wait is needed, and every idea.

As `test_broken_kernels`: a mutation replaces a piece of source text, and the kernel must then give
a wrong result, or an error of the simulator, for at least one seed.
"""

import importlib

import numpy as np
import pytest

import numflash
from numflash import reference
from numflash.api.comparison import compare, gradients_by_name
from numflash.calls import ready
from tests.sim.test_broken_kernels import first_failure
from tests.support.covering import some
from tests.support.faults import (
    Dropped,
    Mutation,
    attempts,
    events,
    load,
    source_of,
)
from tests.support.gradient_problems import GRADIENTS

KERNELS = "numflash.kernels.mma"
TILES = "numflash.tiles"
# Two warps, so that they need each other; several tiles to walk over.
CONFIGS = {
    "forward": ("sm80-m32n16w2s1", "sm80-m32n16w2s2"),
    "backward-dq": ("sm80-m32n16w2s1", "sm80-m32n16w2s2"),
    "backward-dkdv": ("sm80-m16n32w2s1", "sm80-m16n32w2s2"),
    "backward": ("sm80-m32n32w2s1", "sm80-m32n32w2s2x2"),
}
SEEDS = range(4)


def module_of(family: str) -> str:
    """The module of a family's kernel."""
    return f"{KERNELS}.{family.replace('-', '_')}"


def sizes_of(family: str) -> tuple[int, int]:
    """seqlen_q and seqlen_k of a small problem with several tiles to walk over."""
    return (18, 50) if family != "backward-dkdv" else (50, 18)


def check(family: str, config: str, sizes: tuple[int, int], window: int = 30) -> bool:
    """Whether the family's kernel with this config solves a small problem."""
    rng = np.random.default_rng(0)
    seqlen_q, seqlen_k = sizes
    q, k, v, dout = (
        rng.standard_normal((1, n, 1, 32)).astype(np.float16)
        for n in (seqlen_q, seqlen_k, seqlen_k, seqlen_q)
    )
    # Scores grow along the keys, so that maxima move and what was summed is rescaled.
    k *= np.linspace(1, 12, seqlen_k, dtype=np.float16)[:, None, None]
    options = {"causal": True, "window_size": (window, 0)}
    if family == "forward":
        return numflash.check(q, k, v, config=config, **options).passed
    # What the forward makes, and what other kernels of gradients make, is not looked at.
    out, lse = reference.attention(q, k, v, **options)
    given = dout, q, k, v, out.astype(np.float16), lse.astype(np.float32)
    options["wrt"] = GRADIENTS[family]
    found = numflash.attention_backward(*given, config={family: config}, **options)
    got = dict(zip(gradients_by_name(options), found, strict=True))
    return compare(got, q, k, v, precision="float16", dout=dout, **options).passed


def first_failure_of(
    family, monkeypatch, module=None, mutation=None, seeds=SEEDS, configs=None, problem=None
) -> str | None:
    """The failure of the family's kernel with a mutated `module`, for any config and seed.

    `problem` are the arguments of `check` behind the config.
    """
    if mutation is not None:
        own = module_of(family)
        chain = (own,) if module == own else (module, f"{KERNELS}.queries", own)
        changed = load(chain, module, mutation, monkeypatch)
        factory = f"make_{family.replace('-', '_')}_kernel"
        whole = importlib.import_module(own)
        monkeypatch.setattr(whole, factory, getattr(changed, factory))
    monkeypatch.setattr(ready, "_ready", {})

    def run(config):
        ready._ready.clear()
        return check(family, config, *(problem or [sizes_of(family)]))

    for config, seed in attempts(configs or CONFIGS[family], lambda config: seeds):
        failure = first_failure(lambda config=config: run(config), monkeypatch, [seed])
        if failure:
            return f"{config}: {failure}"
    return None


def synchronisations() -> list:
    """(family, fault) that leaves out one barrier or wait, for each of them."""
    found = [
        (family, fault)
        for family in CONFIGS
        for fault in events(source_of(module_of(family)), r"cuda\.syncthreads|wait_for_tile")
    ]
    return [pytest.param(*row, id=f"{row[0]} without {row[1]}") for row in found]


# (family, module of the tiles, mutation): one for each idea that a kernel could get wrong.
MUTATIONS = [
    (
        "forward",
        "mma.copies",
        Mutation("rows past the end", "is_inside = source_row < end", "is_inside = True"),
    ),
    (
        "forward",
        "mma.softmax",
        Mutation("a maximum that never moves", "row_max[r] = new_max\n", "pass\n"),
    ),
    (
        "forward",
        "mma.softmax",
        Mutation("sums that are not rescaled", "row_sum[r] *= factors[r]", "pass"),
    ),
    (
        "forward",
        "mma.softmax",
        Dropped("make_online_softmax.online_softmax", "scale_rows"),
    ),
    (
        "forward",
        "mma.softmax",
        Mutation(
            "a maximum of half a row", "max_f32(x, cuda.shfl_xor_sync(FULL_WARP, x, 2))", "x"
        ),
    ),
    (
        "forward",
        "mma.scores",
        Mutation("the first column of the mask", "(column >= first)", "(column > first)"),
    ),
    (
        "forward",
        "mma.scores",
        Mutation("the last column of the mask", "(column <= last)", "(column < last)"),
    ),
    (
        "forward",
        "mma.products",
        Mutation("operand A of the first step", "advance_a(a_period, step)", "a_period"),
    ),
    (
        "forward",
        "mma.copies",
        Dropped("make_store_rows.store_packed", "transpose_quad"),
    ),
    (
        "forward",
        "sequences",
        Mutation("no mask at the upper edge", "i32(end - tile_n)", "i32(end - 1)"),
    ),
    (
        "backward-dkdv",
        "sequences",
        Mutation("queries that see keys as keys see them", "i32(-sequence.hi)", "sequence.lo"),
    ),
    (
        "backward-dq",
        "mma.softmax",
        Mutation("delta left out", "softmax_scale, -delta)", "softmax_scale, f32(0))"),
    ),
    (
        "backward-dkdv",
        "mma.copies",
        Mutation(
            "statistics of one query", "source, base + first + i, n", "source, base + first, n"
        ),
    ),
    (
        "backward",
        "mma.products",
        Mutation("dS of the first keys", "smem, a + step * a_step)", "smem, a)"),
    ),
    (
        "backward",
        "mma.copies",
        Mutation("rows of dS on top of others", "above + ROW_STEP * layout_pitch", "above"),
    ),
]


@pytest.mark.parametrize("family", some(CONFIGS, "forward"))
def test_a_tensor_core_kernel_is_right_for_every_seed(family, monkeypatch):
    assert first_failure_of(family, monkeypatch, seeds=range(1)) is None


@pytest.mark.parametrize(("family", "mutation"), synchronisations())
def test_no_barrier_and_no_wait_can_be_left_out(family, mutation, monkeypatch, record_property):
    caught = first_failure_of(family, monkeypatch, module_of(family), mutation)
    record_property("caught", caught)
    assert caught


@pytest.mark.parametrize(("family", "module", "mutation"), MUTATIONS, ids=str)
def test_a_broken_tile_is_caught(family, module, mutation, monkeypatch, record_property):
    caught = first_failure_of(family, monkeypatch, f"{TILES}.{module}", mutation)
    record_property("caught", caught)
    assert caught


# By family: when there are tiles, configs, and a problem of which blocks have no tile to visit:
# (seqlen_q, seqlen_k) and the window.
WITHOUT_TILES = {
    "forward": ("n_begin < n_end:", ("sm80-m32n16w2s1", "sm80-m32n16w2s3"), ((70, 18), 9)),
    "backward-dq": ("n_begin < n_end:", ("sm80-m32n16w2s1", "sm80-m32n16w2s3"), ((70, 18), 9)),
    "backward-dkdv": (
        "next_m < next_end:",
        ("sm80-m16n32w2s1", "sm80-m16n32w2s3"),
        ((18, 100), 9),
    ),
    # Three walks without a tile come before one that has some, in either split.
    "backward": ("m_begin < m_end:", [f"sm80-m32n32w2s{s}x2" for s in (1, 2, 3)], ((32, 256), 16)),
}


_WITHOUT_TILES = [(f, c) for f, (_, configs, _) in WITHOUT_TILES.items() for c in configs]


@pytest.mark.parametrize(
    ("family", "config"),
    _WITHOUT_TILES,
)
def test_what_no_tile_needs_is_not_copied(family, config, monkeypatch, record_property):
    """Nobody waits for such a copy, and what comes next may copy to the same bytes."""
    condition, _, problem = WITHOUT_TILES[family]
    mutation = Mutation("copies for no tile", condition, "True:")
    about = {"configs": (config,), "problem": problem}
    with monkeypatch.context() as broken:
        caught = first_failure_of(family, broken, module_of(family), mutation, **about)
    record_property("caught", caught)
    assert "cp.async of thread" in caught
    assert first_failure_of(family, monkeypatch, seeds=range(1), **about) is None
