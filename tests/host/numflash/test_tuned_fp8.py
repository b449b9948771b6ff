"""Tuned configs of calls on 8-bit floats: which call finds them, and what is captured."""

from dataclasses import replace

import numpy as np
import pytest

import numflash
from numflash.api import plans
from numflash.problem.classes import ProblemClass
from numflash.selection import autotune, capture, store
from tests.support.tuned_classes import (
    SIMULATED_DEVICE,
    WANTED,
    arrays,
    entry,
    needs_simulator,
    use_empty_cache,
)

pytestmark = needs_simulator
FP8 = ProblemClass.parse("forward float16-d64-dv64-vec-fp8 full q512 k512 bh8 g1")
KEY_SCALES = replace(FP8, traits=replace(FP8.traits, key_scales=True))


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """A config cache of the test's own, no shipped tables, and tuned configs turned on."""
    use_empty_cache(tmp_path, monkeypatch)


@pytest.fixture
def captured(tmp_path, monkeypatch):
    """Reads the classes that were noted so far."""
    path = tmp_path / "classes.txt"
    monkeypatch.setattr(capture, "_noted", set())
    monkeypatch.setenv("NUMFLASH_CAPTURE", str(path))
    return lambda: capture.read(path) if path.exists() else []


def chosen(precision="fp8", seqlen=512, **options):
    """The forward of a call of the class FP8, or of WANTED without precision."""
    return numflash.explain_dispatch(
        *arrays(seqlen=seqlen), precision=precision, **options
    ).forward


def block(tokens):
    """The recipe with a scale for so many tokens."""
    return numflash.Fp8Recipe("block", block=tokens)


def test_a_call_finds_what_was_tuned_for_its_precision():
    store.add(
        SIMULATED_DEVICE,
        [entry(FP8, "fp8-sm80-m32n32w2s1x2-h4", origin="measured"), entry(WANTED)],
    )
    found = chosen()
    assert str(found.config) == "fp8-sm80-m32n32w2s1x2-h4" and found.is_final
    assert found.rule == "tuned on this device for this class (measured 1 ms, 2026-11-21)"
    assert str(chosen(precision=None).config) == "sm80-m64n32w4s2"
    near = chosen(seqlen=1000)
    assert near.config.without_geometry == found.config.without_geometry and not near.is_final
    assert "the nearest class, forward float16-d64-dv64-vec-fp8" in near.rule


def test_without_tuning_and_where_heads_choose_their_precision_the_rules_decide(monkeypatch):
    store.add(SIMULATED_DEVICE, [entry(FP8, "fp8-sm80-m32n32w2s1")])
    assert "tuned" not in chosen("auto").rule
    monkeypatch.setenv("NUMFLASH_TUNED", "0")
    assert "tuned" not in chosen().rule


@pytest.mark.parametrize("text", [str(WANTED), str(KEY_SCALES)])
def test_configs_of_16_bits_and_of_other_scales_are_not_near(text):
    config = "sm80-m64n32w4s2" if text == str(WANTED) else "fp8-sm80-m32n32w2s1"
    store.add(SIMULATED_DEVICE, [entry(text, config)])
    assert "tuned" not in chosen().rule


def test_a_tile_never_holds_keys_of_several_scales():
    store.add(SIMULATED_DEVICE, [entry(FP8, "fp8-sm80-m64n128w4s1")])
    store.add(SIMULATED_DEVICE, [entry(KEY_SCALES, "fp8-sm80-m32n128w2s1")])
    by_rule = chosen(fp8=block(1024), config="fp8-sm80-m128n64w4s1").config
    for tokens, wanted in (
        (1024, "fp8-sm80-m64n128w4s1"),
        (128, "fp8-sm80-m64n128w4s1"),
        # The tiles by rule hold keys of one scale, those that were tuned would not.
        (64, str(by_rule)),
        # Those by rule do not: each key's scale is looked up, with any tiles.
        (32, "fp8-sm80-m32n128w2s1"),
    ):
        found = chosen(fp8=block(tokens))
        assert str(found.config) == wanted
        assert found.traits.key_scales == (tokens == 32)
    assert chosen(fp8=numflash.Fp8Recipe("token")).traits.key_scales


def test_a_tile_of_a_near_class_does_not_either():
    other = replace(FP8, seqlen_q=1024, seqlen_k=1024)
    smaller = replace(FP8, seqlen_q=2048, seqlen_k=2048)
    store.add(SIMULATED_DEVICE, [entry(other, "fp8-sm80-m64n128w4s1")])
    assert chosen(fp8=block(128)).config.tile_n == 128
    assert "tuned" not in chosen(fp8=block(64)).rule
    store.add(SIMULATED_DEVICE, [entry(smaller, "fp8-sm80-m32n64w2s2")])
    assert str(chosen(fp8=block(64)).config) == "fp8-sm80-m32n64w2s2"


def test_a_tuned_config_computes_the_same_numbers():
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 8, 1, 64)).astype(np.float16)
    problem = ProblemClass.parse("forward float16-d64-dv64-vec-fp8 full q8 k8 bh1 g1")
    store.add(SIMULATED_DEVICE, [entry(problem, "fp8-sm80-m16n32w1s2")])
    report = numflash.check(q, k, v, precision="fp8")
    assert report.passed
    plan = numflash.plan(q, k, v, precision="fp8")
    assert "fp8-sm80-m16n32w1s2" in plan.kernel


def test_calls_are_captured_but_not_questions_nor_what_is_compiled_ahead(captured):
    numflash.warmup("float16", head_dim=64, seqlen_q=512, seqlen_k=512, precision="fp8")
    chosen()
    assert captured() == []
    numflash.plan(*arrays(), precision="fp8")
    assert captured() == [FP8]
    numflash.plan(*arrays(), precision="auto")
    numflash.plan(*arrays(), precision="fp8", fp8=numflash.Fp8Recipe("token"))
    numflash.plan(*arrays(), precision="fp8", config="fp8-sm80-m64n32w4s1x2")
    # The kernel that puts parts together is that of 16 bits.
    combine = "combine float16-d64-dv64-vec full q512 k512 bh8 g1"
    assert list(map(str, captured())) == [str(FP8), str(KEY_SCALES), combine]


def test_warmup_compiles_what_was_tuned_for_these_scales(monkeypatch):
    compiled = set()
    monkeypatch.setattr(plans, "SIMULATED", False)
    monkeypatch.setattr(plans, "get_cubin", lambda config, *given: compiled.add(str(config)))
    monkeypatch.setattr(plans, "load", lambda *given: None)
    store.add(
        SIMULATED_DEVICE,
        [entry(FP8, "fp8-sm80-m32n32w2s1"), entry(KEY_SCALES, "fp8-sm80-m16n32w1s2"), entry()],
    )
    for recipe, wanted in (
        (None, "fp8-sm80-m32n32w2s1"),
        (numflash.Fp8Recipe("token"), "fp8-sm80-m16n32w1s2"),
    ):
        compiled.clear()
        numflash.warmup("float16", head_dim=64, precision="fp8", fp8=recipe)
        assert compiled == {wanted}


def test_a_class_whose_tiles_a_recipe_rules_out_is_not_tuned_again(monkeypatch):
    asked = []
    monkeypatch.setattr(autotune, "tune", lambda *given: asked.append(given) or False)
    store.add(SIMULATED_DEVICE, [entry(FP8, "fp8-sm80-m64n128w4s1", origin="measured")])
    numflash.plan(*arrays(), precision="fp8", fp8=block(64))
    assert asked == []
    numflash.plan(*arrays(seqlen=100), precision="fp8", fp8=block(64))
    assert asked == [(replace(FP8, seqlen_q=128, seqlen_k=128), -1)]


@pytest.mark.parametrize(
    ("problem", "config", "words"),
    [
        (FP8, "sm80-m64n32w4s2", "a config on 8-bit floats"),
        (WANTED, "fp8-sm80-m64n32w4s2", "a config not on 8-bit floats"),
    ],
)
def test_an_entry_has_a_config_of_its_precision(problem, config, words):
    with pytest.raises(ValueError, match=words):
        entry(problem, config)
