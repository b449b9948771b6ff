"""The comparisons that show the gain of each idea."""

from dataclasses import replace

import pytest

from bench.peers import methods as peers
from bench.studies import ablation, static
from numflash.configs import parse_config
from numflash.runtime.devices import ARCHITECTURES
from numflash.selection.rules import force


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_idea_can_be_asked_for(direction, arch):
    limits = ARCHITECTURES[arch]
    ideas = ablation.ideas(direction, limits)
    wanted = {"fusion", "staging", "swizzle"}
    wanted |= {"recomputation"} if direction == "backward" else {"tiling", "split"}
    assert wanted <= {idea.name for idea in ideas}
    for idea in ideas:
        assert peers.find(idea.with_it)
        assert idea.without is None or peers.find(idea.without).name != idea.with_it


def test_the_ideas_of_hopper_are_turned_off_one_by_one():
    limits = ARCHITECTURES["sm_90a"]
    names = {"wgmma and bulk copies", "overlap", "pingpong", "persistent", "arrivals", "staging"}
    rows = [idea for idea in ablation.ideas("forward", limits) if idea.name in names]
    assert {idea.name for idea in rows} == names
    # Not a baseline of its own: everything is compared with one kernel, and differs in one thing.
    for head_dim in (64, 128):
        traits = static.traits_of("float16", head_dim)
        config = static.choose_config("forward", traits, limits)
        assert ablation.has_switches({"forward": config})
        for idea in rows:
            if idea.point.head_dim != head_dim or idea.without is None:
                continue
            texts = [
                name.partition(":")[2] or str(config) for name in (idea.with_it, idea.without)
            ]
            assert str(config) in texts
            if idea.name == "wgmma and bulk copies":
                assert texts[1].startswith("sm80-")
                continue
            on, off = (parse_config("forward", text) for text in texts)
            field = "num_stages" if idea.name == "staging" else idea.name
            assert getattr(on, field) > getattr(off, field)
            assert replace(on, **{field: getattr(off, field)}) == off
    assert not ablation.has_switches({"backward": config})


def test_the_table_of_ideas_by_hand():
    idea = next(i for i in ablation.ideas("forward", ARCHITECTURES["sm_80"]) if i.name == "tiling")
    entry = {"status": "measured", "check": {"outcome": "checked"}, "median_ms": 2.0}
    found = {
        idea.with_it: {**entry, "peak_bytes": 3 * 2**20},
        idea.without: {**entry, "median_ms": 5.0},
    }
    row = ablation.table([idea], {idea.point: found}).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:8] == ["2.000", "5.000", "2.50", "3.0", "-"]
    found[idea.without] = {"status": "out of memory"}
    assert "out of memory" in ablation.table([idea], {idea.point: found})
    found[idea.without] = {**entry, "check": {"outcome": "failed"}}
    assert "wrong" in ablation.table([idea], {idea.point: found})
    assert "not measured" in ablation.table([idea], {})


def test_block_sizes_fit_and_begin_with_the_default():
    limits = ARCHITECTURES["sm_86"]
    traits = static.traits_of("float16", 256)
    for family in ("forward", "backward-dq", "backward-dkdv"):
        configs = ablation.block_sizes(family, 256, "float16", limits)
        assert configs[0] == static.choose_config(family, traits, limits)
        assert len(configs) == len(set(map(str, configs)))
        assert len(configs) > 2 or family != "forward"
        assert all(c.smem_bytes(traits) <= limits.max_smem_per_block for c in configs)


def test_the_swizzle_frees_ldmatrix_of_conflicts():
    pytest.importorskip("numflash.tiles.mma.layouts")
    for head_dim in (64, 128, 256):
        assert ablation.bank_conflicts(head_dim, True) == 1
        assert ablation.bank_conflicts(head_dim, False) == 8


@pytest.mark.parametrize("family", ["forward", "backward-dq", "backward-dkdv", "backward"])
def test_block_sizes_on_hopper_are_configs_that_can_be_forced(family):
    limits = ARCHITECTURES["sm_90a"]
    found = ablation.block_sizes(family, 128, "bfloat16", limits)
    traits = static.traits_of("bfloat16", 128)
    assert found[0] == static.choose_config(family, traits, limits)
    for config in found:
        force(family, config, traits, limits)
    assert family == "backward" or len({(c.tile_m, c.tile_n) for c in found}) > 3
