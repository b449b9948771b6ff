"""The space of configs: what is feasible, what is not and why."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from numflash.configs import MmaConfig, Sm90ForwardConfig, Traits, parse_config
from numflash.configs.wgmma_backward import Sm90BackwardConfig
from numflash.problem.classes import ProblemClass
from tests.support.covering import ALL, covering, some, thorough
from tuner.records import ResourceUsage
from tuner.space import machines
from tuner.space.configs import Budgets, EmptySpaceError, Space, warpgroup_registers
from tuner.space.dimensions import value_of

FORWARD = "forward float16-d64-dv64-vec full q4096 k4096 bh64 g1"
DECODE = "forward bfloat16-d128-dv128-vec full q1 k65536 bh32 g4"
PROBLEMS = [
    FORWARD,
    DECODE,
    "forward float16-d256-dv256-softcap-alibi full q4096 k4096 bh64 g1",
    "forward float32-d64-dv64-vec causal q512 k512 bh8 g1",
    "forward float32-d64-dv64-vec-tf32 causal q512 k512 bh8 g1",
    "backward-dkdv bfloat16-d128-dv128-vec causal q4096 k4096 bh64 g1",
    "backward-dq float16-d128-dv64-vec window256 q4096 k4096 bh64 g1",
    "backward float16-d128-dv128-vec full q4096 k4096 bh64 g1",
    "combine float16-d64-dv64-vec full q1 k65536 bh32 g1",
    "forward bfloat16-d128-dv128-vec-ragged causal q1024 k1024 bh512 g4",
    "forward bfloat16-d128-dv128-vec-ragged-paged full q1 k65536 bh512 g4 p16",
    "forward float16-d64-dv64-vec-ragged-paged causal q1024 k4096 bh64 g1 p48",
    "backward-dkdv bfloat16-d128-dv128-vec-ragged causal q1024 k1024 bh512 g4",
    "combine bfloat16-d128-dv128-vec-ragged full q1 k65536 bh512 g4",
    "forward float16-d128-dv64-vec-fp8 causal q4096 k4096 bh64 g4",
    "forward bfloat16-d64-dv64-fp8-keyscales full q1 k65536 bh32 g4",
]
RESOURCES = ResourceUsage(128, 0, 32768, 128, 4, "registers")


def space(problem=FORWARD, machine="NVIDIA A100-SXM4-80GB", budgets=None):
    """The space of a class."""
    return Space(ProblemClass.parse(problem), machines.find(machine), budgets or Budgets())


# Each problem, and all machines in turn.
MACHINES = "Tesla T4", "NVIDIA A100-SXM4-80GB", "NVIDIA H200", "sm_120"
PLACES = list(itertools.product(MACHINES, PROBLEMS))


@pytest.mark.parametrize(
    ("machine", "problem"), covering(PLACES, lambda row: row, together=1, full=ALL)
)
def test_every_feasible_config_obeys_the_rules_and_the_default_is_among_them(problem, machine):
    if problem.startswith("backward ") and machine == "Tesla T4":
        pytest.skip("there is nothing to find the default in: Turing runs two kernels")
    found = space(problem, machine)
    found.expect_any()
    limits = found.machine.limits
    for config, values in found.feasible.items():
        assert config.smem_bytes(found.problem.traits) <= limits.max_smem_per_block
        assert found.failure(config) is None
        assert values == {name: value_of(config, name) for name in found.dimensions}
        assert all(each in found.dimensions[name] for name, each in values.items())
        assert parse_config(found.problem.family, str(config)) == config
    assert found.default in found.feasible


def test_bulk_copies_read_pages_that_agree_with_their_tiles_and_split_no_sequence():
    text = "forward float16-d64-dv64-vec-ragged-paged causal q1024 k4096 bh64 g1"
    for page_size, tiles in (
        (16, set(range(64, 257, 16))),
        (48, {96, 144, 192, 240}),
        (128, {64, 128, 256}),
        (7, set()),
    ):
        found = space(f"{text} p{page_size}", "NVIDIA H200")
        hopper = [each for each in found.feasible if isinstance(each, Sm90ForwardConfig)]
        assert {each.stage_n for each in hopper} == tiles
        assert {each.num_splits for each in hopper} <= {1}
        assert (found.excluded["pages"] > 0) == (page_size != 16)
        others = {each.num_splits for each in found.feasible} - {1}
        assert others == {2} and {each.heads_in_flight for each in found.feasible} == {0}


def test_gradients_of_sequences_are_those_of_two_kernels():
    text = "float16-d64-dv64-vec-ragged causal q1024 k1024 bh64 g1"
    assert not space(f"backward {text}").runs
    assert space(f"backward-dq {text}").runs and space(f"backward-dkdv {text}").runs


@pytest.mark.parametrize(
    ("gpu", "head_dim"),
    some([("H200", 128), ("H200", 256), ("A100", 128), ("T4", 64), ("H200", 64)], ("H200", 128)),
)
def test_gradients_of_sequences_have_every_form_that_those_of_one_length_have(gpu, head_dim):
    """Two kernels, dK and dV by roles or apart, and one for all where blocks add in turn."""
    machine = machines.find(gpu)
    for family in ("backward-dq", "backward-dkdv", "backward"):
        text = f"{family} float16-d{head_dim}-dv{head_dim}-vec{{}} causal q4096 k4096 bh64 g4"
        ragged, dense = (
            Space(ProblemClass.parse(text.format(x)), machine) for x in ("-ragged", "")
        )
        in_turn = gpu == "H200" and head_dim <= 128
        assert ragged.runs == (family != "backward" or in_turn)
        if not ragged.runs:
            continue
        found = set(map(str, ragged.feasible))
        # Who walks through lists leaves warps that multiply 8 registers fewer.
        few = [each for each in dense.feasible if "may have 232" in str(ragged.failure(each))]
        # One kernel on `mma` leaves parts of dQ, which no list of tiles describes.
        wanted = {x for x in map(str, dense.feasible) if family != "backward" or "sm90" in x}
        assert found == wanted - set(map(str, few)) and len(found) > 4 * len(few)
        has_roles = any(x.endswith("-roles") for x in found)
        assert has_roles == (gpu == "H200" and family == "backward-dkdv")


def test_feasible_and_excluded_are_the_whole_product():
    found = space()
    product = 1
    for choices in found.dimensions.values():
        product *= len(choices)
    assert len(found.feasible) + found.excluded.total() == product


def test_every_constraint_has_an_example_with_its_reason():
    found = space(budgets=Budgets(smem_bytes=32 * 1024, min_occupancy=0.1))
    assert set(found.examples) == set(found.excluded)
    for constraint, words in {
        "instruction shapes": "must be a multiple of",
        "registers": "accumulators, may have",
        "--sram-budget": "granted are 32768",
        "register caps": "blocks per SM",
    }.items():
        assert words in found.examples[constraint]


def test_the_default_is_what_dispatch_would_run():
    decode = space(DECODE).default
    assert decode.packed and decode.num_splits > 8
    assert space().default == parse_config("forward", "sm80-m128n64w4s1")


UNTUNED = list(
    itertools.product(
        ("Tesla T4", "NVIDIA H200"),
        ((1, 1), (1, 4096), (16, 4096), (64, 16), (4096, 32)),
        ("forward", "backward-dkdv", "backward-dq"),
        ("float16-d64-dv64-vec", "float32-d128-dv128", "float32-d64-dv64-vec"),
    )
)


@pytest.mark.parametrize(
    ("machine", "seqlens", "family", "traits"), covering(UNTUNED, lambda row: row, full=ALL)
)
def test_what_runs_untuned_is_always_feasible(machine, seqlens, family, traits):
    q, k = seqlens
    found = space(f"{family} {traits} full q{q} k{k} bh64 g8", machine)
    assert found.default in found.feasible
    assert min(found.excluded.values(), default=0) >= 0


def test_splits_are_tried_only_where_blocks_are_few():
    assert space().dimensions["num_splits"] == (1,)
    assert max(space(DECODE).dimensions["num_splits"]) >= 64


def test_orders_are_tried_only_where_keys_and_values_outgrow_the_cache():
    assert len(space().dimensions["heads_in_flight"]) > 1
    small = "forward float16-d64-dv64-vec full q512 k512 bh8 g1"
    assert space(small).dimensions["heads_in_flight"] == (0,)


@pytest.mark.parametrize(
    "config, outcome, words",
    [
        ("sm80-m128n128w4s3", None, ""),
        ("sm80-m256n128w8s3", None, ""),
        ("sm80-m256n256w8s3", "over_budget", "shared memory"),
        ("sm80-m256n64w4s1", "over_budget", "registers"),
        ("sm80-m128n64w4s1b2", "invalid", "leave all registers"),
        ("sm80-m128n128w4s3b3", "invalid", "room for 1 blocks"),
        ("sm80-m64n64w4s1-packed", None, ""),
    ],
)
def test_a_config_that_may_not_be_tried_has_a_reason(config, outcome, words):
    failure = space().failure(parse_config("forward", config))
    if outcome is None:
        assert failure is None or failure[0] == "over_budget"
    else:
        assert failure[0] == outcome and words in failure[1]


def test_tiles_larger_than_the_problem_are_excluded():
    few = space("forward float16-d64-dv64-vec full q64 k64 bh8 g1")
    assert max(config.tile_m for config in few.feasible) == 64 + 32
    assert max(config.tile_n for config in few.feasible) <= 96


def test_blocks_of_one_kernel_for_gradients_share_out_keys():
    few_queries = space("backward bfloat16-d64-dv64-vec full q64 k8192 bh64 g1", "NVIDIA H200")
    assert str(few_queries.default) == "sm90-m64n192w12s2"
    assert few_queries.default in few_queries.feasible
    few_keys = space("backward bfloat16-d64-dv64-vec full q8192 k64 bh64 g1", "NVIDIA H200")
    assert few_keys.default.implementation == "sm80"
    assert all(config.tile_n <= 64 for config in few_keys.feasible)


def test_a_shared_memory_budget_is_kept():
    found = space(budgets=Budgets(smem_bytes=24 * 1024))
    needed = [config.smem_bytes(found.problem.traits) for config in found.feasible]
    assert 0 < max(needed) <= 24 * 1024 and found.excluded["--sram-budget"] > 0
    failure = found.failure(parse_config("forward", "sm80-m128n64w4s1"))
    assert failure == ("over_budget", "needs 32768 bytes of shared memory, granted are 24576")


def test_an_occupancy_is_kept_before_and_after_compiling():
    found = space(budgets=Budgets(min_occupancy=0.25))
    assert found.excluded["--min-occupancy"] > 0
    # 4 blocks of 128 threads are a quarter of 2048.
    assert found.judge_resources(RESOURCES) is None
    outcome, why = found.judge_resources(replace(RESOURCES, blocks_per_sm=3))
    assert outcome == "over_budget" and "3 blocks of 128 threads" in why and "25%" in why


@pytest.mark.parametrize(
    "changes, outcome, words",
    [
        ({"spill_bytes": 8}, "spilled", "8 bytes"),
        ({"warnings": ("C7510: wgmma serialised",)}, "spilled", "C7510"),
        ({"blocks_per_sm": 0}, "over_budget", "no block fits"),
    ],
)
def test_what_the_compiler_found_excludes(changes, outcome, words):
    found = space().judge_resources(replace(RESOURCES, **changes))
    assert found[0] == outcome and words in found[1]


def test_an_impossible_budget_names_the_constraints():
    with pytest.raises(EmptySpaceError) as error:
        space(budgets=Budgets(smem_bytes=1024)).expect_any()
    assert "--sram-budget" in str(error.value) and "NVIDIA A100" in str(error.value)
    with pytest.raises(EmptySpaceError, match="--min-occupancy"):
        space(budgets=Budgets(min_occupancy=1.0, smem_bytes=60000)).expect_any()


@pytest.mark.parametrize(
    "wrong", [{"smem_bytes": 0}, {"min_occupancy": 1.5}, {"min_occupancy": -1}]
)
def test_budgets_are_checked(wrong):
    with pytest.raises(ValueError):
        Budgets(**wrong)


def test_float32_and_bfloat16_on_turing_search_the_portable_kernels():
    for problem in (PROBLEMS[3], "forward bfloat16-d64-dv64-vec full q512 k512 bh8 g1"):
        found = space(problem, "Tesla T4")
        assert not any(isinstance(config, MmaConfig) for config in found.feasible)


HOPPER = "forward bfloat16-d128-dv128-vec full q4096 k4096 bh64 g4"


def hopper_configs(found):
    """The configs for Hopper of a space."""
    return [config for config in found.feasible if isinstance(config, Sm90ForwardConfig)]


def test_on_hopper_both_implementations_are_searched():
    found = space(HOPPER, "NVIDIA H200")
    configs = hopper_configs(found)
    assert isinstance(found.default, Sm90ForwardConfig) and found.default in configs
    assert len(configs) < len(found.feasible)
    assert {value_of(config, "generation") for config in found.feasible} == {"sm80", "sm90"}
    product = 0
    for choices in found.products:
        sizes = [len(each) for each in choices.values()]
        product += np.prod(sizes)
    assert len(found.feasible) + found.excluded.total() == product
    for name, wanted in {
        "tile_m": {64, 128, 192},
        "num_stages": {1, 2, 3},
        "v_stages": {0, 2, 3},
        "min_blocks": {0, 2},
        "overlap": {False, True},
        "pingpong": {False, True},
        "persistent": {False, True},
        "consumer_registers": {0, 152, 232},
        "packed": {False, True},
    }.items():
        assert {getattr(config, name) for config in configs} == wanted
    assert {64, 80, 112, 176} <= {config.tile_n for config in configs}


@thorough
def test_clusters_are_tried_where_a_gpu_judges_and_nowhere_else():
    predicted = space(HOPPER, "NVIDIA H200")
    measured = replace(predicted, is_measured=True)
    found = [{config.cluster for config in hopper_configs(each)} for each in (predicted, measured)]
    assert found == [{1}, {1, 2}]
    # What spills with fewer registers than usual has no other number in clusters.
    pairs = [config for config in hopper_configs(measured) if config.cluster == 2]
    assert all(config.registers[1] <= 232 for config in pairs if config.num_warpgroups == 2)
    assert {value_of(config, "cluster") for config in measured.feasible} == {1, 2}


def test_blocks_that_draw_places_are_tried_where_a_gpu_judges_and_nowhere_else():
    predicted = space("backward bfloat16-d64-dv64-vec full q4096 k4096 bh64 g1", "NVIDIA H200")
    found = []
    for each in (predicted, replace(predicted, is_measured=True)):
        configs = [x for x in each.feasible if isinstance(x, Sm90BackwardConfig)]
        found.append({(x.num_warpgroups, x.persistent) for x in configs})
    alone = {(groups, False) for groups in (1, 2, 3)}
    assert found == [alone, alone | {(1, True), (2, True)}]


@pytest.mark.parametrize(
    "problem",
    [
        "forward float32-d64-dv64-vec-tf32 full q4096 k4096 bh64 g1",
        "forward bfloat16-d128-dv128 full q4096 k4096 bh64 g1",
        "backward-dq bfloat16-d128-dv128-vec full q4096 k4096 bh64 g1",
    ],
)
def test_other_kernels_and_rows_that_are_not_aligned_have_no_configs_for_hopper(problem):
    found = space(problem, "NVIDIA H200")
    assert found.feasible and not hopper_configs(found)
    assert "overlap" not in found.dimensions


# Compiled with numba-cuda 0.30.4: head_dim, config, whether it spilled or was serialised.
COMPILED = [
    (128, "m128n192w8s2-overlap", False),
    (128, "m128n192w8s2-r232-overlap", True),
    (128, "m128n208w8s1-overlap", True),
    (128, "m192n80w12s2-overlap", False),
    (128, "m192n96w12s2-overlap", True),
    (128, "m192n112w12s1", False),
    (128, "m192n144w12s1", True),
    (64, "m192n144w12s2-overlap-persistent", True),
    (64, "m192n192w12s2", False),
    (64, "m192n208w12s2", True),
    (64, "m128n224w8s2-overlap", False),
    (64, "m128n256w8s2-overlap", True),
    (256, "m128n96w8s1-overlap", True),
    (256, "m128n80w8s2-overlap-persistent", False),
    (256, "m64n96w4s1-overlap", False),
    (256, "m64n144w4s1-overlap", True),
    (256, "m64n80w4s1b2-overlap", True),
    (128, "m64n128w4s1b2-overlap", False),
]


@pytest.mark.parametrize(("head_dim", "config", "spilled"), COMPILED)
def test_registers_of_warpgroups_are_judged_as_the_compiler_does(head_dim, config, spilled):
    text = f"forward bfloat16-d{head_dim}-dv{head_dim}-vec full q4096 k4096 bh64 g1"
    found = space(text, "NVIDIA H200")
    failure = found.failure(parse_config("forward", f"sm90-{config}"))
    assert (failure is not None) == spilled
    assert failure is None or "registers" in failure[1] or "accumulators" in failure[1]


def test_overlap_keeps_p_beside_s():
    traits = Traits.parse("bfloat16-d128-dv128-vec")
    without, overlap = (
        warpgroup_registers(parse_config("forward", f"sm90-m128n128w8s2{x}"), traits)
        for x in ("", "-overlap")
    )
    assert overlap - without == 128 // 4


def test_heads_that_do_not_divide_the_rows_of_a_warpgroup_are_not_packed():
    found = space("forward bfloat16-d64-dv64-vec full q64 k4096 bh128 g128", "NVIDIA H200")
    assert {config.packed for config in hopper_configs(found)} == {False}
    assert "do not divide 64 rows" in found.examples["rows of a warpgroup"]


def test_a_shared_memory_budget_is_kept_on_hopper():
    found = space(HOPPER, "NVIDIA H200", Budgets(smem_bytes=128 * 1024))
    needed = [config.smem_bytes(found.problem.traits) for config in hopper_configs(found)]
    assert 0 < max(needed) <= 128 * 1024
