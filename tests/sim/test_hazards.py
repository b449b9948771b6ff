"""Hazards of numbers, each on every family of kernels that has a softmax: one table.

    tails   keys and queries beyond the end, which kernels compute and multiply by zero, with a
            log-sum-exp from -1e4 to 1e4: nothing of theirs may become infinite, or 0 * inf is NaN
    huge    scores whose product with the scale, rounded, is whole powers of two off
    alone   a row's bits depend on its own query only, not on its neighbours in a warp
    nan     a NaN in an input is a NaN in what float64 makes of it: it is no row without keys
    scaled  float16 gradients of a large loss, whose dS fits once it is scaled, and not before

`RUNS` are calls; a kernel family that none of them reaches fails `test_every_family_has_a_row`.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

import numflash
from numflash.calls import launch, ready
from numflash.configs import implementation_of, parse_config
from numflash.kernels.factories import FACTORIES
from numflash.problem.fp8 import Fp8Recipe
from numflash.runtime.driver import limits_of_device
from numflash.runtime.numpy_arrays import NumPy
from tests.support.covering import FULL, covering, some

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
LARGEST = {"float16": 60000.0, "bfloat16": 133120.0, "float32": 133120.0}


@dataclass(frozen=True)
class Run:
    """One way to compute attention.

    Attributes:
        dtype: of the arrays.
        forward, backward: configs; no backward where a kernel has none.
        head_dim: of q, k and v.
        more: other options of `attention`.
        arch: of the simulated GPU.
    """

    dtype: str
    forward: str | dict
    backward: dict | None = None
    head_dim: int = 16
    more: tuple = ()
    arch: str = "sm_80"

    @property
    def options(self) -> dict:
        return dict(self.more)

    def arrays(self, *values) -> tuple:
        return tuple(np.asarray(x).astype(DTYPES[self.dtype]) for x in values)


PORTABLE = {"backward-dq": "m16n16w2", "backward-dkdv": "m16n16w2"}
TF32 = (("precision", "tf32"),)


def fp8(granularity: str, block: int = 128) -> tuple:
    return ("precision", "fp8"), ("fp8", Fp8Recipe(granularity, block))


RUNS = {
    "portable": Run("float32", "m16n16w2", PORTABLE),
    "portable-bfloat16": Run("bfloat16", "m16n16w2", PORTABLE),
    "sm80": Run(
        "float16",
        "sm80-m32n16w1s1",
        {"backward-dq": "sm80-m32n16w1s2", "backward-dkdv": "sm80-m32n16w1s2"},
    ),
    "sm80-apart": Run(
        "bfloat16",
        "sm80-m16n16w1s2",
        {"backward-dq": "sm80-m16n16w1s1", "backward-dkdv": "sm80-m16n32w1s3-apart"},
    ),
    "sm80-splits": Run(
        "bfloat16",
        {"forward": "sm80-m16n16w1s3x3", "combine": "w2"},
        {"backward": "sm80-m16n16w1s2x2"},
    ),
    "sm80-fused": Run("float16", "sm80-m32n32w2s1", {"backward": "sm80-m32n32w2s2"}),
    "sm75": Run(
        "float16",
        "sm75-m32n16w2s1",
        {"backward-dq": "sm75-m16n16w1s1", "backward-dkdv": "sm75-m16n16w1s1-apart"},
        arch="sm_75",
    ),
    "sm75-fused": Run(
        "float16", "sm75-m16n16w1s1x2", {"backward": "sm75-m16n16w1s1x2"}, arch="sm_75"
    ),
    "tf32": Run(
        "float32",
        "sm80-m32n16w1s1",
        {"backward-dq": "sm80-m32n16w1s2", "backward-dkdv": "sm80-m16n16w1s1"},
        more=TF32,
    ),
    "sm90": Run("bfloat16", "sm90-m64n32w4s2-overlap-persistent", head_dim=32, arch="sm_90a"),
    "sm90-backward": Run(
        "float16",
        "sm90-m64n64w4s1",
        {"backward-dq": "sm90-m64n32w4s2", "backward-dkdv": "sm90-m32n64w4s2"},
        arch="sm_90a",
    ),
    # P is rounded before it becomes dS.
    "sm90-backward-roles": Run(
        "float16",
        "sm90-m64n64w4s1",
        {"backward-dq": "sm90-m64n32w4s2", "backward-dkdv": "sm90-m32n64w8s1-roles"},
        arch="sm_90a",
    ),
    "sm90-fused": Run(
        "float16", "sm80-m32n32w2s1", {"backward": "sm90-m64n64w4s2"}, arch="sm_90a"
    ),
    "sm90-splits": Run("float16", "sm90-m64n16w4s2x3", head_dim=32, arch="sm_90a"),
    "fp8": Run("bfloat16", "fp8-sm89-m16n64w1s1", more=fp8("head"), arch="sm_89"),
    "fp8-key-scales": Run("float16", "fp8-sm80-m16n32w1s1", more=fp8("token")),
    "fp8-half": Run("float16", "fp8-sm75-m32n32w2s1", more=fp8("block", 32), arch="sm_75"),
    "fp8-sm90": Run(
        "bfloat16",
        "fp8-sm90-m64n64w4s2",
        head_dim=32,
        more=fp8("block", 64),
        arch="sm_90a",
    ),
    "fp8-sm90-key-scales": Run(
        "float16",
        "fp8-sm90-m64n128w4s2-overlap",
        head_dim=32,
        more=fp8("token"),
        arch="sm_90a",
    ),
}
# The softmax of each: what one of these does with a number, the others of its kind do.
SOFTMAXES = {
    name: run.forward if "fp8-sm90" in name else "fp8" if "fp8" in name else name.split("-")[0]
    for name, run in RUNS.items()
}
# Forwards that differ in more than their tiles from all before them.
FORWARDS = [
    name
    for name in RUNS
    if FULL or name not in ("portable-bfloat16", "sm80-apart", "sm80-fused", "sm75-fused")
]
WITH_BACKWARD = [name for name, run in RUNS.items() if run.backward]
# Of each softmax the first: where not all tests run each hazard meets each softmax.
FIRST = list({SOFTMAXES[name]: name for name in reversed(RUNS)}.values())
FIRST_WITH_BACKWARD = [name for name in FIRST if name in WITH_BACKWARD]
WITHOUT_SOFTMAX = {
    ("quantize", family): "makes no scores; test_quantize.py and test_fp8_auto.py are about it"
    for family in ("quantize", "amax", "dequantize", "estimate")
}
WITHOUT_SOFTMAX |= (
    {
        ("block-mask", family): "makes lists, no scores; api/test_block_masks.py is about it"
        for family in ("mask-tiles", "mask-scatter", "mask-lists")
    }
    | {("sequences", "schedule"): "makes lists, no scores; test_schedule.py is about it"}
    | {("sequences", "rotary"): "rotates rows, no scores; test_rotary.py is about it"}
    | {("merging", "merge-onto"): "makes no scores; test_merge_onto.py is about it"}
    | {("sequences", "prepare"): "moves rows, no scores; test_kvcache.py is about it"}
    | {
        ("portable", family): "ends gradients of arrays; test_array_gradients.py is about it"
        for family in ("array-sums", "clear-sums", "round-sums")
    }
    | {
        (row, f"backward-{way}"): "makes P as backward-dq; test_array_gradients.py is about it"
        for row in ("portable", "mma")
        for way in ("rows", "columns", "tiles", "scatter")
    }
)


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch):
    """Results hold NaN before they are written, and no call is remembered."""
    empty = NumPy.empty

    def poisoned(self, shape, dtype, device):
        array = empty(self, shape, dtype, device)
        array.view(np.uint8).fill(0xFF)
        return array

    monkeypatch.setattr(NumPy, "empty", poisoned)
    monkeypatch.setattr(ready, "_ready", {})
    yield
    limits_of_device.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes the simulated GPU that of a run."""

    def simulate(run: Run):
        monkeypatch.setenv("NUMFLASH_SIM_ARCH", run.arch)
        limits_of_device.cache_clear()
        return run

    return simulate


def forward(run: Run, q, k, v, **more):
    return numflash.attention(
        q, k, v, return_lse=True, config=run.forward, **{**run.options, **more}
    )


def backward(run: Run, dout, q, k, v, out, lse, **more):
    options = {**run.options, **more}
    return numflash.attention_backward(dout, q, k, v, out, lse, config=run.backward, **options)


def as_float(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def assert_within(out, v):
    """Outputs are means of values, up to the rounding of 8 bits."""
    largest = np.abs(as_float(v)).max()
    assert (np.abs(as_float(out)) <= 1.07 * largest).all()  # not of a NaN either


def test_every_family_has_a_row(gpu, monkeypatch):
    reached = set()
    make = launch.Launcher.__init__

    def noting(self, config, *arguments):
        reached.add((implementation_of(config).name, config.family))
        make(self, config, *arguments)

    monkeypatch.setattr(launch.Launcher, "__init__", noting)
    # They need not run for it.
    monkeypatch.setattr(launch.Launcher, "bind", lambda self, operands: lambda stream: None)
    for run in RUNS.values():
        gpu(run)
        ready._ready.clear()
        q, k, v = run.arrays(*np.ones((3, 1, 3, 1, run.head_dim)))
        out, lse = forward(run, q, k, v)
        if run.backward:
            backward(run, q, q, k, v, out, lse)
    assert set(FACTORIES) - set(WITHOUT_SOFTMAX) <= reached, "a family without a row in RUNS"
    assert set(WITHOUT_SOFTMAX) <= set(FACTORIES)


def each_with_each_softmax(values) -> list:
    """(run, value): each run with some value, and each softmax with each value."""
    table = [(name, value) for name in RUNS for value in values]
    return covering(table, lambda row: (row[0], (SOFTMAXES[row[0]], row[1])), together=1)


@pytest.mark.parametrize(("name", "lse"), each_with_each_softmax([-1e4, -12.0, 1e4]))
def test_tails(name, lse, gpu):
    """Sizes that no tile divides; one dimension of q and k makes the score of every pair `lse`.

    Without a mask, which would hide keys beyond the end.
    """
    run = gpu(RUNS[name])
    rng = np.random.default_rng(1)
    q, k, v, dout = rng.standard_normal((4, 1, 37, 1, run.head_dim)) / 4
    q, dout = q[:, :9], 64 * dout[:, :9]
    root = np.sqrt(abs(lse) * np.sqrt(run.head_dim))
    q[..., 0], k[..., 0] = root, np.copysign(root, lse)
    q, k, v, dout = run.arrays(q, k, v, dout)
    if run.options.get("precision") == "fp8":
        # 8 bits leave too little of such scores: O is only some weighted mean of the values.
        out, got_lse = forward(run, q, k, v)
        assert_within(out, v)
        assert np.isfinite(got_lse).all()
        return
    config = {"forward": run.forward} if isinstance(run.forward, str) else run.forward
    more = {"dout": dout} if run.backward else {}
    report = numflash.check(q, k, v, config=config | (run.backward or {}), **run.options, **more)
    assert report.passed, f"\n{report}"


@pytest.mark.parametrize(("name", "form"), each_with_each_softmax([(1, 1), (37, -1)]))
def test_huge_scores_that_are_equal_give_the_mean_of_v(name, form, gpu):
    run, (seqlen_k, sign) = gpu(RUNS[name]), form
    # Numbers whose sums of products fill a float32: of powers of two all products are exact.
    patterns = np.random.default_rng(10).uniform(0.5, 1, (3, run.head_dim))
    q, k, v = (LARGEST[run.dtype] * np.broadcast_to(x, (1, 37, 1, run.head_dim)) for x in patterns)
    q, k, v = run.arrays(sign * q[:, :5], k[:, :seqlen_k], v[:, :seqlen_k])
    out, lse = forward(run, q, k, v)
    exact, exact_lse = numflash.reference.attention(q, k, v)
    # These are rounded to 8 bits, rotated, or to the 10 bits of tf32.
    of_lse = {"fp8": 0.1, "tf32": 2e-3, None: 1e-5}[run.options.get("precision")]
    np.testing.assert_allclose(as_float(out), exact, rtol=max(2.0**-7, 0.7 * of_lse))
    np.testing.assert_allclose(lse, exact_lse, rtol=of_lse)


@pytest.mark.parametrize("name", some(FORWARDS, *FIRST))
def test_the_largest_of_huge_scores_wins_and_ordinary_rows_are_as_without(name, gpu):
    """Every third query is huge, of either sign; the winning key changes from tile to tile."""
    run = gpu(RUNS[name])
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((3, 1, 40, 1, run.head_dim)).astype(np.float32)
    k[0, :, 0, 0] = 1 + np.arange(40) // 8 * 0.25  # increases over the tiles
    ordinary = q.copy()
    q[0, ::3, 0] = 0
    q[0, ::6, 0, 0], q[0, 3::6, 0, 0] = 60000, -60000
    k[0, :, 0, 0] *= 2048
    ordinary[..., 0] /= 2048
    q = np.where((np.arange(40) % 3 == 0)[None, :, None, None], q, ordinary)
    q, k, v = run.arrays(q, k, v)
    out, _ = forward(run, q, k, v)
    exact, _ = numflash.reference.attention(q, k, v)
    if run.options.get("precision") != "fp8":  # in 8 bits other keys win
        np.testing.assert_allclose(as_float(out), exact, atol=0.03)
    assert_within(out, v)


@pytest.mark.parametrize("name", some(FORWARDS, *FIRST))
def test_a_rows_bits_are_its_own(name, gpu):
    run = gpu(RUNS[name])
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((3, 1, 37, 1, run.head_dim))
    others = q * rng.choice([0.1, 8, 300], (1, 37, 1, 1))
    mine = np.arange(37) % 5 == 2
    q, others, k, v = run.arrays(q, np.where(mine[:, None, None], q, others), 4 * k, v)
    more = {}
    if run.options.get("precision") == "fp8":
        # A scale that tokens share is a neighbour's business.
        more = {"fp8": Fp8Recipe("token")} if "token" in str(run.more) else {}
        others = run.arrays(np.where(mine[:, None, None], q, -as_float(q)))[0]
    results = [forward(run, queries, k, v, **more) for queries in (q, others)]
    (out, lse), (other_out, other_lse) = results
    assert out[:, mine].tobytes() == other_out[:, mine].tobytes()
    assert lse[..., mine].tobytes() == other_lse[..., mine].tobytes()
    assert out.tobytes() != other_out.tobytes()


@pytest.mark.parametrize("name", some(RUNS, *FIRST))
def test_a_nan_in_a_key_reaches_all_that_sees_it(name, gpu):
    run = gpu(RUNS[name])
    rng = np.random.default_rng(4)
    q, k, v, dout = run.arrays(*rng.standard_normal((4, 2, 20, 1, run.head_dim)))
    k[0, 18, 0, 3] = np.nan
    out, lse = forward(run, q, k, v)
    assert np.isnan(as_float(out[0])).all() and np.isnan(lse[0]).all()
    assert np.isfinite(as_float(out[1])).all() and np.isfinite(lse[1]).all()
    if run.backward:
        for gradient in backward(run, dout, q, k, v, out, lse):
            assert np.isnan(as_float(gradient[0])).all()
            assert np.isfinite(as_float(gradient[1])).all()


def reached(run_tile: tuple[int, int], n: int, key: int) -> np.ndarray:
    """Which queries of a causal (n, n) problem share a computed tile with a key."""
    tile_m, tile_n = run_tile
    return np.arange(n) // tile_m >= key // tile_n * tile_n // tile_m


@pytest.mark.parametrize("name", some(RUNS, *FIRST))
def test_a_nan_that_the_mask_hides_reaches_its_tiles_and_no_further(name, gpu):
    """Of V in O; of V and dO in the gradients. docs/decisions.md says which rows these are."""
    run = gpu(RUNS[name])
    text = run.forward if isinstance(run.forward, str) else run.forward["forward"]
    config = parse_config("forward", text)
    tile = (
        64 if "sm90" in text else config.tile_m,  # a warpgroup's own rows
        getattr(config, "stage_n", config.tile_n),
    )
    n = 2 * max(tile) + 3
    rng = np.random.default_rng(9)
    q, k, v, dout = run.arrays(*rng.standard_normal((4, 1, n, 1, run.head_dim)))
    key = 2 * max(tile) - 3
    with_nan = v.copy()
    with_nan[0, key] = np.nan
    out, _ = forward(run, q, k, with_nan, causal=True)
    affected = np.isnan(as_float(out)).all((0, 2, 3))
    np.testing.assert_array_equal(affected, reached(tile, n, key))
    assert affected[key:].all() and np.isnan(as_float(out)).any((0, 2, 3)).sum() == affected.sum()
    if not run.backward:
        return

    out, lse = forward(run, q, k, v, causal=True)
    configs = {family: parse_config(family, text) for family, text in run.backward.items()}
    of_dq = configs.get("backward-dq") or configs["backward"]
    of_dkdv = configs.get("backward-dkdv") or configs["backward"]
    dq, _, _ = backward(run, dout, q, k, with_nan, out, lse, causal=True)
    affected = np.isnan(as_float(dq)).all((0, 2, 3))
    np.testing.assert_array_equal(affected, reached((of_dq.tile_m, of_dq.tile_n), n, key))

    with_nan = dout.copy()
    with_nan[0, key] = np.nan
    _, dk, dv = backward(run, with_nan, q, k, v, out, lse, causal=True)
    tile = of_dkdv.tile_m, of_dkdv.tile_n
    by_key = np.array([reached(tile, n, j)[key] for j in range(n)])
    for gradient in (dk, dv):
        np.testing.assert_array_equal(np.isnan(as_float(gradient)).all((0, 2, 3)), by_key)


@pytest.mark.parametrize("name", some(WITH_BACKWARD, *FIRST_WITH_BACKWARD))
def test_a_nan_lse_reaches_the_gradients(name, gpu):
    """That of one row: its dQ, and dK and dV of all keys."""
    run = gpu(RUNS[name])
    rng = np.random.default_rng(5)
    q, k, v, dout = run.arrays(*rng.standard_normal((4, 1, 20, 1, run.head_dim)))
    out, lse = forward(run, q, k, v)
    lse[0, 0, 18] = np.nan
    dq, dk, dv = (as_float(x) for x in backward(run, dout, q, k, v, out, lse))
    assert np.isnan(dk).all() and np.isnan(dv).all()
    assert (np.isnan(dq).all((0, 2, 3)) == (np.arange(20) == 18)).all()


@pytest.mark.parametrize("name", [n for n in WITH_BACKWARD if RUNS[n].dtype == "float16"])
def test_float16_gradients_that_fit_are_finite(name, gpu):
    """dS does not fit before it is scaled, and does after; k and q are small."""
    run = gpu(RUNS[name])
    rng = np.random.default_rng(6)
    q, k, v, dout = rng.standard_normal((4, 1, 20, 1, run.head_dim))
    q, k = q / 50, k / 50
    v, dout = v * 12, dout * 16000
    q, k, v, dout = run.arrays(q, k, v, dout)
    exact = numflash.reference.attention_backward(dout, q, k, v)
    dp = as_float(dout)[0, :, 0] @ as_float(v)[0, :, 0].T
    ds = np.abs(dp - dp.mean(1, keepdims=True)).max() / 20  # P is about 1 / 20 everywhere
    assert 1.2 * 65504 < ds < 0.8 * 65504 * np.sqrt(run.head_dim)
    assert max(np.abs(x).max() for x in exact) < 65504
    out, lse = forward(run, q, k, v)
    for got, wanted in zip(backward(run, dout, q, k, v, out, lse), exact, strict=True):
        assert np.isfinite(as_float(got)).all()
        np.testing.assert_allclose(as_float(got), wanted, atol=4e-3 * np.abs(wanted).max())


def test_a_nan_in_a_part_reaches_the_whole(gpu):
    """One of several splits, whose lse is NaN: `combine` must not take it for an empty one."""
    run = gpu(RUNS["sm80-splits"])
    q, k, v = run.arrays(*np.random.default_rng(7).standard_normal((3, 1, 48, 1, 16)))
    for key in (0, 20, 40):
        with_nan = k.copy()
        with_nan[0, key] = np.nan
        out, lse = forward(run, q, with_nan, v)
        assert np.isnan(as_float(out)).all() and np.isnan(lse).all()


def test_check_says_how_exact_lse_is(gpu):
    """Five equal keys, scores of 8e6: dV is 25 % off, and nothing can be done about it."""
    run = gpu(RUNS["sm80-apart"])
    q = np.full((1, 3, 1, 16), 1414.0)
    k = np.full((1, 5, 1, 16), 1414.0)
    q, k, v, dout = run.arrays(q, k, np.ones_like(k), np.ones_like(q))
    config = {"forward": run.forward, **run.backward}
    report = numflash.check(q, k, v, dout=dout, config=config)
    assert report.lse_factor > 0.5 and report.passed
    assert "lse is so large" in str(report)
    ordinary = numflash.check(q / q, k / k, v, dout=dout, config=config)
    assert ordinary.lse_factor == 0 and "lse is so large" not in str(ordinary)


def test_one_visible_key_has_gradients_within_budget(gpu):
    """dQ is 0, and what float32 leaves of dP - delta is not."""
    for name in ("portable", "sm80"):
        run = gpu(RUNS[name])
        rng = np.random.default_rng(8)
        q, k, v, dout = run.arrays(*rng.standard_normal((4, 1, 1, 1, run.head_dim)))
        config = {"forward": run.forward, **run.backward}
        report = numflash.check(q, k, v, dout=dout, config=config)
        assert report.passed, f"\n{report}"
        assert all(e.budget < 1e-5 for e in report.errors if e.name in ("dq", "dk"))
