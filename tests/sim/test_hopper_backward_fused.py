"""Hopper's backward in one kernel: against float64, against two kernels, and its order of sums."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import numflash
from numflash.calls import ready
from numflash.calls.backward import Backward
from numflash.calls.launch import Launcher
from numflash.configs import Traits, parse_config
from numflash.configs.wgmma_backward import misfit
from numflash.kernels.arguments import BundledShape, Mask
from numflash.runtime.devices import ARCHITECTURES
from numflash.runtime.errors import UnsupportedError
from numflash.simulator import SEED
from numflash.tiles.sequences import last_of, seen_from_keys, sequence_of_all, tiles_seen
from numflash.tiles.wgmma.turns_of_blocks import (
    make_first_block,
    make_is_seen,
    make_last_block,
    make_place_of_last_keys,
)
from tests.support.attention_cases import SIM_CASES, AttentionCase, is_of_masks, masks_of
from tests.support.covering import ALL, covering, some, thorough
from tests.support.hopper_cases import on_hopper

# dQ of a tile by one warpgroup alone, by the first of two, by queries.
FORWARD = "sm80-m32n32w2s1"
TRAITS = Traits("float16", 64, 64)
CONFIGS = ("sm90-m64n64w4s1", "sm90-m64n128w8s2", "sm90-m128n128w8s2", "sm90-m64n64w4s3")
# Several tiles each way, several slabs: name, config, shape, options.
LARGER = (
    ("causal", "sm90-m64n64w4s2", (1, 200, 210, 1, 1, 64, 64), {"causal": True}),
    ("rows", "sm90-m128n128w8s2", (1, 200, 150, 1, 1, 64, 64), {"causal": True}),
    ("columns", "sm90-m64n128w8s2", (1, 130, 140, 2, 1, 128, 64), {"softcap": 3.0}),
    ("first-of-two", "sm90-m64n128w8s2", (1, 140, 150, 2, 1, 96, 96), {"window_size": (40, 9)}),
    ("first-of-three", "sm90-m64n192w12s2", (1, 130, 250, 2, 2, 64, 64), {"causal": True}),
    ("bundles", "sm90-m64n64w4s2", (2, 70, 130, 4, 2, 32, 32), {"causal": True}),
)


def _cases() -> list:
    """(config, case): masks as far as they cover forms and masks, other cases by turns."""
    small = [case for case in on_hopper(SIM_CASES) if "dropout_p" not in case.options]
    masked = covering([case for case in small if is_of_masks(case)], masks_of, together=1)
    others = [case for case in small if not is_of_masks(case)]
    turns, found = Counter(), []
    for case in [*masked, *others[:: 1 if ALL else 4]]:
        found.append((CONFIGS[turns["small"] % len(CONFIGS)], case))
        turns["small"] += 1
    for number, (name, config, shape, options) in enumerate(LARGER if ALL else ()):
        dtype = ("float16", "bfloat16")[number % 2]
        found.append((config, AttentionCase(name, shape, dtype, options=options)))
    return [pytest.param(*each, id=f"{each[1]}-{number}") for number, each in enumerate(found)]


@pytest.fixture(autouse=True)
def hopper(on):
    """A simulated GPU that is a Hopper, and results that hold NaN before they are written."""
    on("sm_90a")


@pytest.mark.parametrize(("config", "case"), some(_cases(), every=5))
def test_errors_are_within_budget(config, case, monkeypatch):
    launched, bind = [], Launcher.bind

    def counted(self, operands):
        launched.append((self._config.family, str(self._config)))
        return bind(self, operands)

    monkeypatch.setattr(Launcher, "bind", counted)
    configs = {"backward": config, "forward": FORWARD}
    report = numflash.check(**case.arrays(), config=configs, **case.call_options())
    assert report.passed, f"\n{report}"
    assert {("backward", config), ("reduce-dq", config)} <= set(launched)


def gradients_of(case, configs, integers=False, **more):
    arrays = case.arrays()
    if integers:
        rng = np.random.default_rng(5)
        arrays = {name: rng.integers(-2, 3, x.shape).astype(x.dtype) for name, x in arrays.items()}
    dout = arrays.pop("dout")
    out, lse = numflash.attention(**arrays, **case.options, config=FORWARD, return_lse=True)
    given = dict(case.options, config=configs, **more)
    return numflash.attention_backward(dout, *arrays.values(), out, lse, **given)


@thorough
def test_bits_of_dk_and_dv_are_those_of_two_kernels_and_no_order_of_threads_changes_any(
    monkeypatch,
):
    case = AttentionCase("bits", (1, 100, 140, 1, 1, 32, 32), "float16", options={"causal": True})

    def run(configs, seed):
        monkeypatch.setattr(SEED, "value", seed)
        return gradients_of(case, configs)

    on_mma = {"backward-dq": "sm80-m16n16w1s2", "backward-dkdv": "sm80-m16n16w1s2"}
    expected, first = run(on_mma, 0), run({"backward": CONFIGS[0]}, 0)
    for got, wanted in zip(first[1:], expected[1:], strict=True):
        assert got.tobytes() == wanted.tobytes()
    assert np.abs(first[0].astype(float) - expected[0]).max() < 2e-3
    for seed in range(1, 6 if ALL else 2):
        again = run({"backward": CONFIGS[3]}, seed)
        assert [x.tobytes() for x in again] == [x.tobytes() for x in first]


@thorough
def test_gradients_in_float32_and_of_lse():
    case = AttentionCase("float32", (1, 70, 66, 2, 1, 32, 32), "bfloat16")
    dlse = np.random.default_rng(3).standard_normal((1, 2, 70)).astype(np.float32)
    on_mma = {"backward-dq": "sm80-m16n16w1s2", "backward-dkdv": "sm80-m16n16w1s2"}
    more = {"grad_dtype": "float32", "dlse": dlse}
    got = gradients_of(case, {"backward": CONFIGS[1]}, **more)
    for mine, expected in zip(got, gradients_of(case, on_mma, **more), strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, expected, atol=3e-6, rtol=1e-5)


def test_lse_far_below_zero_makes_nothing_infinite():
    """Keys past the end are zeros, whose P may be as large as lse makes it."""
    q = np.full((1, 48, 1, 32), 8, np.float16)
    k, v = -q[:, :40], np.ones((1, 40, 1, 32), np.float16)
    out, lse = numflash.attention(q, k, v, return_lse=True)
    assert lse.max() < -300
    dout, config = v[:, :1].repeat(48, 1), {"backward": CONFIGS[0]}
    gradients = numflash.attention_backward(dout, q, k, v, out, lse, config=config)
    assert all(np.isfinite(x).all() for x in gradients)


@thorough
def test_whole_tiles():
    case = AttentionCase("ends", (1, 64, 128, 1, 1, 32, 32), "float16")
    got = gradients_of(case, {"backward": CONFIGS[0]})
    on_mma = {"backward-dq": "sm80-m16n16w1s2", "backward-dkdv": "sm80-m16n16w1s2"}
    for mine, expected in zip(got, gradients_of(case, on_mma), strict=True):
        np.testing.assert_allclose(mine.astype(float), expected.astype(float), atol=2e-3)


# The order of sums


LISTED = numflash.BlockMask.from_tiles(
    np.array([[1, 1, 0], [0, 0, 0], [0, 1, 1]], bool), block_size=64
)
LENGTHS = {"seqlens_q": np.array([100], np.int32), "seqlens_k": np.array([130], np.int32)}


@thorough
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        pytest.param(LENGTHS, marks=thorough),
        pytest.param({"block_mask": LISTED}, marks=thorough),
    ],
    ids=["all", "lengths", "blocks"],
)
def test_a_launch_may_be_repeated(options, monkeypatch):
    """As a timer does: turns are 0 again when it ends."""
    bound, bind = {}, Backward.bind

    def recorded(self, operands, library):
        results, launches = bind(self, operands, library)
        bound.update(launches)
        return results, launches

    monkeypatch.setattr(Backward, "bind", recorded)
    monkeypatch.setattr(ready, "_ready", {})
    case = AttentionCase("again", (1, 130, 140, 1, 1, 32, 32), "float16", options=options)
    gradients = gradients_of(case, {"backward": CONFIGS[0]})
    first = [x.tobytes() for x in gradients]
    for name in ("backward", "reduce-dq"):
        bound[name](0)
    assert [x.tobytes() for x in gradients] == first


def _shape(batch, seqlen_q, seqlen_k, heads_q, group, in_flight):
    return BundledShape(seqlen_q, seqlen_k, heads_q, group, 64, 64, batch, in_flight)


def test_each_block_has_a_rank_of_its_own_and_waits_for_earlier_ones_only():
    """Whatever the mask: ranks in a tile count from 0, in the order in which blocks begin."""
    rng = np.random.default_rng(7)
    for _ in range(400 if ALL else 150):
        tile_m, tile_n = (int(rng.choice(each)) for each in ((64, 128), (64, 128, 192)))
        seqlen_q, seqlen_k = (int(x) for x in rng.integers(1, 900, 2))
        lo, hi = sorted(int(x) for x in rng.integers(-900, 900, 2))
        lo, hi = (lo if rng.random() < 0.6 else -(2**30)), (hi if rng.random() < 0.8 else 2**30)
        shape = _shape(1, seqlen_q, seqlen_k, 1, 1, 1)
        sequence = sequence_of_all(shape, Mask(lo, hi))
        place_of = make_place_of_last_keys(tile_n, TRAITS)
        of_tiles = tile_m, tile_n
        last_block, first_block = make_last_block(*of_tiles), make_first_block(*of_tiles)
        is_seen, adding, last = make_is_seen(tile_m, tile_n), Counter(), {}
        for number in range(-(-seqlen_k // tile_n)):
            start = place_of(number, shape, None).start
            last_key = last_of(start, tile_n, seqlen_k)
            tiles = tiles_seen(start, last_key, tile_m, seen_from_keys(sequence))
            for tile in range(tiles.begin, tiles.end):
                assert last_block(tile, sequence) - start // tile_n == adding[tile]
                adding[tile] += 1
                last[tile] = start // tile_n
        assert all(first_block(tile, sequence) == block for tile, block in last.items())
        for tile in range(-(-seqlen_q // tile_m)):
            assert is_seen(tile, sequence) == (adding[tile] > 0)


@pytest.mark.parametrize("in_flight", [1, 2, 3, 4, 8])
def test_blocks_go_through_all_heads_and_keys(in_flight):
    shape, tile_n = _shape(2, 100, 300, 8, 2, in_flight), 64
    place_of = make_place_of_last_keys(tile_n, TRAITS)
    places = [place_of(number, shape, None) for number in range(5 * 8)]
    assert all(place.head == 2 * place.head_kv for place in places)
    found = [(place.batch, place.head_kv, place.start) for place in places]
    assert len(set(found)) == 40 and {start for _, _, start in found} == set(range(0, 300, 64))
    for head in {each[:2] for each in found}:
        starts = [start for *of, start in found if tuple(of) == head]
        assert starts == sorted(starts, reverse=True)
    # So many heads take turns.
    assert len({each[:2] for each in found[:in_flight]}) == in_flight
    assert len({each[:2] for each in found[: 5 * in_flight]}) == in_flight


# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sm90-m64n128w4s2", "tile_n must be 16 x num_warps, 4, 8 or 12"),
        ("sm90-m32n64w4s2", "tile_m must be 64 or tile_n"),
        ("sm90-m192n128w8s2", "tile_m must be 64 or tile_n"),
        ("sm90-m64n64w4s2x2", "neither b, nor x, nor -apart"),
    ],
)
def test_a_config_that_cannot_be_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_config("backward", text)


def test_a_config_that_cannot_run_is_refused():
    for columns, config, message in (
        (192, "sm90-m64n128w8s2", "dK and dV of at most 128 columns, there are 192"),
        (128, "sm90-m64n192w12s2", "bytes of shared memory per block"),
    ):
        shape = (1, 9, 9, 1, 1, columns, columns)
        with pytest.raises(UnsupportedError, match=message):
            gradients_of(AttentionCase("refused", shape, "float16"), {"backward": config})


@pytest.mark.parametrize(
    ("text", "columns", "features"),
    [("m64n192w12s1", 96, ()), ("m64n192w12s2", 64, ("softcap",))],
)
def test_a_config_that_spills_is_no_candidate(text, columns, features):
    config, traits = parse_config("backward", f"sm90-{text}"), Traits("float16", columns, columns)
    traits = replace(traits, features=features)
    why = misfit(config, traits, ARCHITECTURES["sm_90a"], 4096)
    assert "accumulators a thread, at most" in why


def test_dq_has_two_buffers_where_shared_memory_has_room():
    most = ARCHITECTURES["sm_90a"].max_smem_per_block
    for columns, stages, buffers in ((128, 2, 2), (64, 3, 2), (128, 1, 2)):
        traits = Traits("float16", columns, columns)
        config = parse_config("backward", f"sm90-m64n128w8s{stages}")
        assert config.dq_buffers(traits) == buffers
        assert config.smem_bytes(traits) <= most
    wide = parse_config("backward", "sm90-m64n192w12s3")
    assert wide.dq_buffers(Traits("float16", 96, 96)) == 1
