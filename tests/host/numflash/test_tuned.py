"""Which tuned config a call gets: of its class, of a near one, of this device or another."""

import logging
from dataclasses import replace
from timeit import timeit

import numpy as np
import pytest

import numflash
from numflash.configs import parse_config
from numflash.problem.classes import ProblemClass
from numflash.runtime import driver
from numflash.runtime.devices import architecture
from numflash.selection import choice as selection
from numflash.selection import store, tuned
from numflash.selection.entries import DeviceKey
from tests.support.tuned_classes import (
    HERE,
    LIMITS,
    SIMULATED_DEVICE,
    WANTED,
    arrays,
    entry,
    find,
    needs_simulator,
    use_empty_cache,
)

OTHER = DeviceKey("NVIDIA A30", "sm_80", 56)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """A config cache of the test's own, no shipped tables, and tuned configs turned on."""
    use_empty_cache(tmp_path, monkeypatch)


ELSEWHERE = DeviceKey("NVIDIA H200", "sm_90a", 132)


def near(text):
    """WANTED with other sizes, mask or traits."""
    return ProblemClass.parse(text)


def test_nothing_tuned_is_nothing_found():
    assert find() is None


def test_an_exact_entry_comes_with_its_splits_packing_and_order():
    store.add(HERE, [entry(config="sm80-m64n32w4s2x4-h2", origin="measured")])
    choice = find()
    assert str(choice.config) == "sm80-m64n32w4s2x4-h2"
    assert choice.is_final and choice.measured_ms == 1.0
    assert choice.rule == "tuned on this device for this class (measured 1 ms, 2026-11-21)"


def test_a_predicted_entry_is_no_measurement():
    store.add(HERE, [entry()])
    assert find().measured_ms is None and tuned.measured(WANTED, HERE, LIMITS) is None


def test_exact_comes_before_nearer_in_time_and_before_other_devices():
    other = near("forward float16-d64-dv64-vec full q1024 k1024 bh8 g1")
    store.add(HERE, [entry(other, "sm80-m32n32w2s1", origin="measured"), entry()])
    store.add(OTHER, [entry(config="sm80-m16n16w1s1", origin="measured")])
    assert str(find().config) == "sm80-m64n32w4s2"


def test_the_nearest_class_of_this_device_gives_only_its_tiles():
    store.add(
        HERE,
        [
            entry("forward float16-d64-dv64-vec full q4096 k4096 bh8 g1", "sm80-m32n32w2s1"),
            entry("forward float16-d64-dv64-vec full q1024 k1024 bh8 g1", "sm80-m64n64w4s1x8-h1"),
        ],
    )
    choice = find()
    assert str(choice.config) == "sm80-m64n64w4s1" and not choice.is_final
    assert "the nearest class, forward float16-d64-dv64-vec full q1024" in choice.rule


NEAR = "forward float16-d64-dv64-vec full q1024 k1024 bh8 g1"


BY_RULE = {
    "sm90": parse_config("forward", "sm90-m128n64w8s2-overlap"),
    "sm80": parse_config("forward", "sm80-m128n64w4s1"),
}


def find_on_hopper(default, bulk_copies=True):
    """The tuned config where the rules choose `default`, as a string; None if there is none."""
    limits = architecture("sm_90a")
    found = tuned.find(WANTED, ELSEWHERE, limits, 512, BY_RULE.get(default), bulk_copies)
    return found and str(found.config)


def test_on_hopper_only_configs_of_one_kind_are_near():
    store.add(ELSEWHERE, [entry(NEAR, "sm80-m64n64w4s1")])
    assert find_on_hopper("sm80") == find_on_hopper(None) == "sm80-m64n64w4s1"
    assert find_on_hopper("sm90") is None
    farther = NEAR.replace("q1024 k1024", "q2048 k2048")
    store.add(ELSEWHERE, [entry(farther, "sm90-m192n128w12s2x3-persistent")])
    assert find_on_hopper("sm90") == "sm90-m192n128w12s2-persistent"
    assert find_on_hopper("sm80") == "sm80-m64n64w4s1"
    assert find_on_hopper("sm80", bulk_copies=False) == "sm80-m64n64w4s1"


def test_on_hopper_the_class_itself_may_have_another_kernel_if_it_can_run():
    store.add(ELSEWHERE, [entry(config="sm80-m64n64w4s1")])
    assert find_on_hopper("sm90") == "sm80-m64n64w4s1"
    store.add(ELSEWHERE, [entry(config="sm90-m64n64w4s1", origin="measured")])
    assert find_on_hopper("sm80") == find_on_hopper("sm90") == "sm90-m64n64w4s1"
    assert find_on_hopper("sm80", bulk_copies=False) is None


@needs_simulator
def test_a_tuned_config_for_hopper_is_not_for_what_bulk_copies_cannot_fetch(monkeypatch):
    monkeypatch.setattr(driver, "limits_of_device", lambda device: architecture("sm_90a"))
    monkeypatch.setattr(selection, "device_key", lambda device: ELSEWHERE)
    store.add(ELSEWHERE, [entry(config="sm90-m64n64w4s1")])
    whole = np.zeros((1, 512, 8, 64), np.float16)
    assert str(numflash.explain_dispatch(whole, whole, whole).forward.config) == "sm90-m64n64w4s1"
    reversed_v = whole[:, ::-1]
    choice = numflash.explain_dispatch(whole, whole, reversed_v).forward
    assert choice.config.implementation == "sm80"
    assert choice.passed_over[0][0] == "sm90" and "is not positive" in choice.passed_over[0][1]


def test_this_device_comes_before_its_architecture_and_that_before_the_shipped(monkeypatch):
    shipped = {HERE: [entry(config="sm80-m32n32w2s1")], ELSEWHERE: [entry()]}
    monkeypatch.setattr(store, "read_shipped", lambda: shipped)
    choice = find()
    assert str(choice.config) == "sm80-m32n32w2s1"
    assert "in the table that numflash ships for this device" in choice.rule
    store.add(OTHER, [entry(config="sm80-m64n16w4s1")])
    choice = find()
    assert str(choice.config) == "sm80-m64n16w4s1" and "on another sm_80" in choice.rule
    far = "forward float16-d64-dv64-vec causal q2048 k2048 bh8 g1"
    store.add(HERE, [entry(far, "sm80-m64n64w4s1")])
    choice = find()
    assert str(choice.config) == "sm80-m64n64w4s1" and "tuned on this device" in choice.rule


def test_a_shipped_table_serves_its_architecture(monkeypatch):
    monkeypatch.setattr(store, "read_shipped", lambda: {OTHER: [entry()], ELSEWHERE: [entry()]})
    assert "numflash ships for sm_80" in find().rule
    monkeypatch.setattr(store, "read_shipped", lambda: {ELSEWHERE: [entry()]})
    tuned._state.clear()
    assert find() is None


@pytest.mark.parametrize(
    "other",
    [
        "backward-dq float16-d64-dv64-vec full q512 k512 bh8 g1",
        "forward float32-d64-dv64-vec full q512 k512 bh8 g1",
        "forward float16-d96-dv64-vec full q512 k512 bh8 g1",
        "forward float16-d64-dv96-vec full q512 k512 bh8 g1",
        "forward float16-d64-dv64-vec full q1 k65536 bh8 g1",
    ],
)
def test_other_kernels_and_far_sizes_are_no_advice(other):
    config = "sm80-m64n32w4s1"
    store.add(HERE, [entry(other, config)])
    assert find() is None


PAGED = ProblemClass.parse("forward float16-d64-dv64-vec-ragged-paged full q512 k512 bh8 g1 p16")


def test_pages_are_a_way_off_from_none_and_from_pages_of_other_sizes():
    same = replace(PAGED, page_size=16)
    others = [
        replace(PAGED, page_size=64),
        replace(WANTED, traits=replace(WANTED.traits, ragged=True)),
    ]
    assert [tuned.distance(PAGED, other) for other in (same, *others, WANTED)] == [0, 1, 2, 4]


def test_an_entry_of_tiles_that_pages_tear_is_no_advice_for_them():
    near = replace(PAGED, page_size=64, seqlen_q=1024)
    store.add(ELSEWHERE, [entry(near, "sm90-m128n64w8s2"), entry(WANTED, "sm90-m64n64w4s1")])
    for size, config in ((16, "sm90-m128n64w8s2"), (128, "sm90-m128n64w8s2"), (48, None)):
        wanted = replace(PAGED, page_size=size)
        found = tuned.find(wanted, ELSEWHERE, architecture("sm_90a"), 512, BY_RULE["sm90"])
        assert (found and str(found.config)) == config


def test_entries_of_before_and_of_pages_lie_in_one_file():
    store.add(HERE, [entry()])
    before = store.path_of(HERE).read_text()
    store.add(HERE, [entry(PAGED)])
    assert {found.problem for found in store.read(HERE)} == {WANTED, PAGED}
    assert find(PAGED).is_final and find().is_final
    assert str(WANTED) in before and "p16" in store.path_of(HERE).read_text()
    assert store.validate(store.path_of(HERE)) == []


def test_the_nearer_mask_and_features_win():
    store.add(
        HERE,
        [
            entry("forward float16-d64-dv64-vec causal q512 k512 bh8 g1", "sm80-m32n32w2s1"),
            entry("forward float16-d64-dv64-softcap-vec full q512 k512 bh8 g1"),
        ],
    )
    assert str(find().config) == "sm80-m64n32w4s2"


def test_of_equal_distance_the_current_then_the_measured_wins():
    old = entry(config="sm80-m32n32w2s1", kernels="other", origin="measured")
    side = "forward float16-d64-dv64-vec full q1024 k512 bh8 g1"
    other_side = "forward float16-d64-dv64-vec full q512 k1024 bh8 g1"
    store.add(HERE, [old])
    assert "this class with other kernels or compilers" in find().rule and not find().is_final
    store.add(HERE, [entry(side, "sm80-m64n64w4s1"), entry(other_side, origin="measured")])
    assert str(find().config) == "sm80-m32n32w2s1"
    store.add(HERE, [entry(config="sm80-m16n16w1s1")])
    assert str(find().config) == "sm80-m16n16w1s1" and find().is_final


def test_of_entries_of_other_kernels_the_newest_is_near_and_one_of_the_future_last():
    configs = {"2026-11-03": 32, "2026-11-05": 64, "2026-11-04": 128, "2099-01-01": 16}
    for date, n in configs.items():
        old = {"kernels": f"of {date}", "date": f"{date}T00:00:00Z"}
        store.add(HERE, [entry(config=f"sm80-m{n}n32w{n // 16}s1", **old)])
    assert str(find().config).startswith("sm80-m64n32")
    store.add(HERE, [entry(kernels="other", date="2026-11-01T00:00:00Z", origin="measured")])
    assert str(find().config) == "sm80-m64n32w4s2"


def test_tiles_that_would_mostly_idle_are_passed_over():
    side = "forward float16-d64-dv64-vec full q1024 k512 bh8 g1"
    store.add(HERE, [entry(side, "sm80-m128n64w4s1")])
    assert find(rows=65) is not None
    assert find(rows=64) is None


def test_a_config_that_cannot_run_here_is_ignored_with_a_warning(caplog):
    wanted = replace(WANTED, traits=replace(WANTED.traits, head_dim=256, head_dim_v=256))
    config = "sm80-m256n128w8s3"
    store.add(HERE, [entry(wanted, config)])
    with caplog.at_level(logging.WARNING, "numflash"):
        assert find(wanted) is None
        tuned._state.clear()
        assert find(wanted) is None
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and "shared memory" in messages[0] and str(wanted) in messages[0]


def test_a_warm_lookup_takes_microseconds():
    store.add(HERE, [entry()])
    find()
    times = [timeit(find, number=200) / 200 for _ in range(5)]
    # The promise is 5 microseconds; on a shared core four times that.
    assert min(times) < 20e-6


def test_entries_added_by_this_process_are_seen_at_once():
    assert find() is None
    store.add(HERE, [entry()])
    assert find() is not None


def test_the_cache_is_read_once_for_all_sizes(monkeypatch):
    store.add(HERE, [entry()])
    find()
    monkeypatch.setattr(store, "read_all", None)
    for rows in range(1, 100):
        find(rows=rows)
        find(near(f"forward float16-d64-dv64-vec full q{2 ** (rows % 8)} k512 bh8 g1"))


def test_the_packing_of_a_near_entry_is_no_hindrance():
    alibi = replace(WANTED, traits=replace(WANTED.traits, features=("alibi",)))
    store.add(HERE, [entry(config="sm80-m64n32w4s2x4-packed")])
    assert str(find(alibi).config) == "sm80-m64n32w4s2"


@needs_simulator
def test_what_was_ready_before_an_entry_was_added_is_chosen_anew():
    q, k, v = arrays()
    numflash.plan(q, k, v)
    store.add(SIMULATED_DEVICE, [entry(config="sm80-m32n16w2s1")])
    assert "sm80-m32n16w2s1 " in numflash.plan(q, k, v).kernel


def test_warmup_takes_what_was_tuned_and_passes_over_what_cannot_run():
    big = replace(WANTED, traits=replace(WANTED.traits, head_dim=256, head_dim_v=256))
    store.add(HERE, [entry(), entry(big, "sm80-m256n128w8s3")])
    found = tuned.choices("forward", WANTED.traits, HERE, LIMITS)
    assert [str(choice.config) for choice in found] == ["sm80-m64n32w4s2"]
    assert tuned.choices("forward", big.traits, HERE, LIMITS) == []
    assert tuned.choices("backward-dq", WANTED.traits, HERE, LIMITS) == []


@needs_simulator
def test_explain_dispatch_names_the_rule_and_calls_run_the_config():
    q, k, v = arrays()
    default = numflash.explain_dispatch(q, k, v).forward
    store.add(SIMULATED_DEVICE, [entry(config="sm80-m32n16w2s1x2")])
    found = numflash.explain_dispatch(q, k, v)
    assert str(found.forward.config) == "sm80-m32n16w2s1x2" and found.geometry.num_splits == 2
    assert "tuned on this device for this class" in str(found)
    assert f"not {default.config}: the default" in str(found)
    assert "sm80-m32n16w2s1x2" in numflash.plan(q, k, v).kernel


@needs_simulator
def test_no_tuned_tile_changes_the_bits_of_a_sequence_with_the_batch():
    """With batch_invariant=True: entries are of classes, which batches and lengths decide."""
    q, k, v = arrays()
    store.add(SIMULATED_DEVICE, [entry(config="sm80-m32n16w2s1")])
    lengths = {"seqlens_k": np.array([500], np.int32)}
    assert "tuned" in numflash.explain_dispatch(q, k, v, **lengths).forward.rule
    found = numflash.explain_dispatch(q, k, v, batch_invariant=True, **lengths)
    assert "tuned" not in found.forward.rule


@needs_simulator
def test_forced_configs_and_the_switch_come_first(monkeypatch):
    q, k, v = arrays()
    store.add(SIMULATED_DEVICE, [entry(config="sm80-m32n16w2s1")])
    forced = numflash.explain_dispatch(q, k, v, config="sm80-m16n16w1s1").forward
    assert str(forced.config) == "sm80-m16n16w1s1" and forced.rule == "as the caller asks"
    monkeypatch.setenv("NUMFLASH_TUNED", "0")
    assert "tuned" not in numflash.explain_dispatch(q, k, v).forward.rule


@needs_simulator
def test_a_scale_that_is_not_positive_stays_with_the_portable_kernels():
    q, k, v = arrays()
    store.add(SIMULATED_DEVICE, [entry(config="sm80-m32n16w2s1")])
    choice = numflash.explain_dispatch(q, k, v, softmax_scale=-1.0).forward
    assert choice.config.implementation == "portable"


@needs_simulator
@pytest.mark.parametrize(
    "fused_ms, origin, runs_fused",
    [
        (1.9, "measured", True),
        (2.1, "measured", False),
        (0.1, "predicted", False),
    ],
)
def test_one_kernel_for_all_gradients_runs_where_it_was_measured_faster(
    fused_ms, origin, runs_fused
):
    configs = {
        "backward-dkdv": "sm80-m32n32w2s1",
        "backward-dq": "sm80-m32n32w2s1",
        "backward": "sm80-m64n64w4s1x2",
    }
    for family, config in configs.items():
        is_fused = family == "backward"
        store.add(
            SIMULATED_DEVICE,
            [
                entry(
                    replace(WANTED, family=family),
                    config,
                    origin=origin if is_fused else "measured",
                    time_ms=fused_ms if is_fused else 1.0,
                )
            ],
        )
    backward = numflash.explain_dispatch(*arrays()).backward
    assert set(backward) == ({"backward"} if runs_fused else {"backward-dkdv", "backward-dq"})
    if runs_fused:
        assert str(backward["backward"].config) == configs["backward"]


@needs_simulator
def test_one_kernel_measured_faster_runs_only_where_bulk_copies_can():
    """Its class does not say how arrays lie; the two kernels on mma run in any case."""
    q, k, v = arrays()
    shared = np.broadcast_to(k[:, :, :1], k.shape)
    configs = {
        "backward-dkdv": "sm80-m32n32w2s1",
        "backward-dq": "sm80-m32n32w2s1",
        "backward": "sm90-m64n128w8s2",
    }
    for family, config in configs.items():
        time_ms = 1.5 if family == "backward" else 1.0
        wanted = entry(replace(WANTED, family=family), config, origin="measured", time_ms=time_ms)
        store.add(DeviceKey("sm_90", "sm_90a", 0), [wanted])
    assert set(numflash.explain_dispatch(q, k, v, arch="sm_90").backward) == {"backward"}
    backward = numflash.explain_dispatch(q, shared, v, arch="sm_90").backward
    assert set(backward) == {"backward-dkdv", "backward-dq"}
