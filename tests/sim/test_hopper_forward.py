"""The Hopper forward against float64 in the simulator, with every kind of config.

All cases that kernels of 16-bit elements run, on small configs in turn, and cases with several of
Hopper's larger tiles. Grids of one, two and three blocks, since a block of a persistent kernel
takes several tiles of rows, some of which may see no key.
"""

import importlib

import numpy as np
import pytest

import numflash
from bench.points.points import Point
from numflash import simulator
from numflash.configs.wgmma import Sm90ForwardConfig
from numflash.runtime import driver
from numflash.runtime.devices import ARCHITECTURES
from numflash.selection import choice as selection
from numflash.simulator import SEED
from tests.gpu.test_attention import check_sample, hopper_cases, inputs_of
from tests.support.attention_cases import (
    SIM_CASES,
    SMALL_CONFIGS,
    AttentionCase,
    is_of_masks,
    masks_of,
)
from tests.support.covering import ALL, FULL, covering, some, thorough
from tests.support.hopper_cases import HOPPER_CASES, on_hopper

FEATURES = "softcap", "alibi_slopes", "sinks", "dropout_p"
CONFIGS = tuple(configs["forward"] for configs in SMALL_CONFIGS["sm90"])


def _cases() -> list[tuple[str, AttentionCase]]:
    """(config, case): each small case on one config, or on all of them, and the larger cases.

    Masks are those of other kernels: of their cases each form and each mask once. Where not whole
    tables run, what a config can say is there, each feature, and each head_dim; of these
    `make test` takes two (`covering.thinned`).
    """
    small = on_hopper(SIM_CASES)
    masked = covering([case for case in small if is_of_masks(case)], masks_of, together=1)
    small = [*masked, *(case for case in small if not is_of_masks(case))]
    if FULL:
        found = [(config, case) for case in small for config in CONFIGS]
    else:
        found = [(CONFIGS[i % len(CONFIGS)], case) for i, case in enumerate(small)]
    found += HOPPER_CASES
    return found if ALL else covering(found, _told, together=1, cost=_cost)


def _told(row: tuple[str, AttentionCase]) -> tuple:
    """What a config can say, and what is special about a case."""
    text, case = row
    config = Sm90ForwardConfig.parse(text)
    switches = config.pingpong, config.overlap, config.persistent
    numbers = (
        config.num_stages,
        config.v_stages,
        config.num_warpgroups,
        config.num_splits,
        config.tile_n,
    )
    others = config.packed, config.min_blocks, config.fixed, config.l2_bytes, config.cluster
    features = [name if name in case.options else None for name in FEATURES]
    return (switches, *numbers, *(str(x) for x in others), case.shape[5], case.inputs, *features)


def _cost(row: tuple[str, AttentionCase]) -> float:
    """Products of a case, and what each tile costs."""
    batch, seqlen_q, seqlen_k, heads, _, head_dim, _ = row[1].shape
    return batch * heads * (seqlen_q + 64) * (seqlen_k + 32) * (head_dim + 32)


@pytest.fixture(autouse=True)
def hopper(on):
    """A simulated GPU that is a Hopper, and results that hold NaN before they are written."""
    on("sm_90a")


@pytest.fixture
def grid(monkeypatch):
    """A function that sets the number of SMs, each with a block, and returns the blocks run."""
    # `numflash.simulator.launch` is the function of that name.
    simulated_launch = importlib.import_module("numflash.simulator.launch")
    run_block = simulated_launch.run_block
    blocks = []

    def noting(kernel, grid, block, position, *more):
        blocks.append(position[0])
        run_block(kernel, grid, block, position, *more)

    def sized(multiprocessors: int) -> list[int]:
        monkeypatch.setattr(driver, "multiprocessors", lambda device: (multiprocessors, 2**20))
        monkeypatch.setattr(selection, "resident_blocks", lambda *about: 1)
        monkeypatch.setattr(simulated_launch, "run_block", noting)
        return blocks

    return sized


def report_of(case: AttentionCase, config: str | None):
    """The errors of the forward."""
    arrays = case.arrays()
    del arrays["dout"]
    # The simulator runs all threads of the kernel that puts splits together, also idle ones.
    configs = config and {"forward": config, "combine": "w2"}
    return numflash.check(**arrays, config=configs, **case.call_options())


@pytest.mark.parametrize(("config", "case"), _cases(), ids=str)
def test_errors_are_within_budget(config, case):
    report = report_of(case, config)
    assert [error.name for error in report.errors] == ["out", "lse"]
    assert report.passed, f"\n{report}"


def test_cases_cover_what_a_config_can_say():
    configs = [Sm90ForwardConfig.parse(config) for config, _ in _cases()]
    seen = {
        name: {getattr(config, name) for config in configs}
        for name in ("num_stages", "num_warpgroups", "num_splits", "packed", "min_blocks")
    }
    assert seen["num_stages"] == seen["num_warpgroups"] == seen["num_splits"] == {1, 2, 3}
    assert seen["packed"] == {None, True, False} and seen["min_blocks"] == {0, 2}
    assert {c.fixed for c in configs} == {False, True}
    assert {c.l2_bytes for c in configs} == {128, 256}
    assert {c.cluster for c in configs} == {1, 2}
    switches = {(c.overlap, c.persistent) for c in configs if not c.pingpong}
    switches_of_turns = {(c.overlap, c.persistent) for c in configs if c.pingpong}
    every = {(a, b) for a in (False, True) for b in (False, True)}
    assert switches == switches_of_turns == every
    assert {32, 64, 96, 128} <= {config.tile_n for config in configs}
    assert {32, 64, 96, 128, 192, 256} <= {case.shape[5] for _, case in _cases()}


ORDERS = [
    ("sm90-m64n32w4s2-overlap-persistent", (1, 100, 70, 1, 1, 32, 32)),
    ("sm90-m128n32w8s2-overlap-pingpong", (1, 90, 70, 1, 1, 32, 32)),
    ("sm90-m64n32w4s2-c2-overlap-persistent", (1, 150, 70, 1, 1, 32, 32)),
]


@pytest.mark.parametrize(("config", "shape"), some(ORDERS, *ORDERS[1:]))
def test_no_order_of_threads_changes_a_bit(config, shape, monkeypatch):
    case = AttentionCase("order", shape, "float16", options={"causal": True})
    q, k, v, _ = case.arrays().values()

    def run(seed):
        monkeypatch.setattr(SEED, "value", seed)
        options = dict(case.options, config=config, return_lse=True)
        return [x.tobytes() for x in numflash.attention(q, k, v, **options)]

    assert len({tuple(run(seed)) for seed in range(10 if FULL else 3)}) == 1


# Tiles of rows in blocks. Where rows are many and keys few, some tiles see no key: the first or
# the last of a head, so that with heads one after the other they lie between tiles that do.
_MANY_TILES = {
    "even": ((1, 100, 40, 3, 3, 32, 32), {}),
    "odd": ((1, 150, 40, 3, 1, 32, 32), {"causal": True, "causal_align": "top_left"}),
    "no-keys-between": ((1, 150, 40, 3, 1, 32, 32), {"causal": True}),
    "no-keys-first": (
        (1, 150, 20, 3, 1, 32, 32),
        {"window_size": (9, 9), "causal_align": "top_left"},
    ),
}


@pytest.mark.parametrize("num_sms", some([2, 3], 2))
@pytest.mark.parametrize("name", some(_MANY_TILES, "no-keys-between", "no-keys-first"))
def test_blocks_take_several_tiles_of_rows(name, num_sms, grid):
    shape, options = _MANY_TILES[name]
    case = AttentionCase(name, shape, ("float16", "bfloat16")[num_sms % 2], options=options)
    blocks = grid(num_sms)
    report = report_of(case, "sm90-m64n32w4s2-h1-unpacked-overlap-persistent")
    assert report.passed, f"\n{report}"
    assert blocks == list(range(num_sms))


@pytest.mark.parametrize(("num_sms", "num_blocks"), some([(1, 2), (2, 2), (5, 4)], (5, 4)))
@pytest.mark.parametrize("name", some(_MANY_TILES, "no-keys-between"))
def test_clusters_take_several_tiles_of_rows(name, num_sms, num_blocks, grid, monkeypatch):
    shape, options = _MANY_TILES[name]
    case = AttentionCase(name, shape, ("float16", "bfloat16")[num_sms % 2], options=options)
    grid(num_sms)
    launches, launch = [], simulator.launch

    def noting(kernel, blocks, *more):
        launches.append(blocks)
        launch(kernel, blocks, *more)

    monkeypatch.setattr(simulator, "launch", noting)
    report = report_of(case, "sm90-m64n32w4s2-h1-unpacked-c2-overlap-persistent")
    assert report.passed, f"\n{report}"
    # A grid of whole clusters, of which no more run than there are SMs for.
    assert launches == [num_blocks]


PERSISTENT = [
    ("m128n32w8s2-h1-pingpong-persistent", 2),
    ("m64n16w4s3x2-h1-unpacked-persistent", 3),
    # No room for O beside Q.
    ("m64n96w4s2-h1-overlap-persistent", 2),
]


@thorough
@pytest.mark.parametrize(("config", "num_sms"), some(PERSISTENT, PERSISTENT[1]))
def test_other_persistent_configs_take_several_tiles_of_rows(config, num_sms, grid):
    head_dim = 256 if "n96" in config else 64
    rows = 270 if "m128" in config else 140
    shape = (1, rows, 60, 1, 1, head_dim, head_dim)
    case = AttentionCase(config, shape, "bfloat16", options={"causal": True})
    blocks = grid(num_sms)
    report = report_of(case, f"sm90-{config}")
    assert report.passed, f"\n{report}"
    assert blocks[:num_sms] == list(range(num_sms))


@thorough
def test_a_grid_that_is_not_persistent_has_a_block_for_each_tile(grid):
    case = AttentionCase("blocks", (2, 70, 40, 2, 2, 32, 32), "float16", options={"causal": True})
    blocks = grid(1)
    report = report_of(case, "sm90-m64n32w4s2-overlap")
    assert report.passed, f"\n{report}"
    assert blocks == list(range(8))


CHOSEN = (64, 70), (128, 70), (192, 33), (256, 33)


@pytest.mark.usefixtures("shipped_kernels")
@pytest.mark.parametrize(("head_dim", "seqlen_q"), some(CHOSEN, (64, 70)))
def test_configs_chosen_by_dispatch_are_within_budget(head_dim, seqlen_q):
    shape = (1, seqlen_q, 140, 1, 1, head_dim, head_dim)
    case = AttentionCase(f"default-{head_dim}", shape, "bfloat16", options={"causal": True})
    arrays = case.arrays()
    chosen = numflash.explain_dispatch(arrays["q"], arrays["k"], arrays["v"], **case.options)
    assert isinstance(chosen.forward.config, Sm90ForwardConfig)
    report = report_of(case, None)
    assert report.passed, f"\n{report}"


@thorough
@pytest.mark.usefixtures("shipped_kernels")
def test_configs_of_the_tests_on_a_gpu_can_run_their_cases():
    limits = ARCHITECTURES["sm_90a"]
    for param in hopper_cases():
        config, case = param.values
        arrays, options = case.arrays(), case.call_options()
        chosen = numflash.explain_dispatch(
            arrays["q"], arrays["k"], arrays["v"], config=config, **options
        )
        assert str(chosen.forward.config) == config
        assert chosen.forward.config.smem_bytes(chosen.forward.traits) <= limits.max_smem_per_block


@thorough
def test_the_check_of_long_sequences_on_a_gpu_can_fail():
    point = Point("forward", "here", "float16", 1, 70, 70, 2, 1, 64, True)
    q, k, v = inputs_of(np, point)
    out = numflash.attention(q, k, v, causal=True, config="sm90-m64n32w4s2-overlap")
    check_sample(np, point, q, k, v, out)
    out[0, 69, 1, 63] += np.float16(0.02)
    with pytest.raises(AssertionError, match="failed"):
        check_sample(np, point, q, k, v, out)
