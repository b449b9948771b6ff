"""Hopper's backward as machine code: registers, products, and what lies under them.

No spill, no warning of the assembler (it says C75xx where it waits for each product by itself),
all exponentials beside products; by roles those are the other warpgroup's. NUMFLASH_TEST_ALL=1
compiles every candidate, in both dtypes.
"""

import itertools
from dataclasses import replace

import pytest

from numflash.configs import Traits
from numflash.configs.wgmma_backward import Sm90BackwardConfig, candidates, misfit
from numflash.machine_code.compiler import get_cubin
from numflash.machine_code.main_loop import read_main_loops
from numflash.machine_code.report import inspect_kernel
from numflash.machine_code.sass import disassemble
from numflash.runtime.devices import architecture
from numflash.selection.rules import choose
from tests.support.covering import ALL, some, thorough

HOPPER = architecture("sm_90a")
# Of dK and dV by head_dim, of dQ: instructions of a tile that are issued at most, with toolchains
# from 12.8 to 13.5 in mind.
MOST_ISSUED = {
    ("backward-dkdv", 64): 312,
    ("backward-dkdv", 128): 345,
    ("backward-dq", 128): 505,
    ("backward-dq", 192): 430,
    ("backward-dq", 256): 336,
    # Of a warpgroup without dQ, and of one with its part.
    ("backward", 64): 308,
    ("backward", 96): 323,
    ("backward", 128): 408,
}
FAMILIES = ("backward-dkdv", "backward-dq", "backward")


def _cases() -> list:
    dims = (64, 96, 128, 192, 256) if ALL else (64, 128)
    dtypes = ("float16", "bfloat16") if ALL else ("bfloat16",)
    found = []
    for family, head_dim, dtype in itertools.product(FAMILIES, dims, dtypes):
        traits = Traits(dtype, head_dim, head_dim)
        configs = [x for x in candidates(family, traits) if not getattr(x, "roles", False)]
        found += [(config, traits) for config in (configs if ALL else configs[:1])]
    bent = Traits("bfloat16", 128, 128, ("softcap",))
    return [*found, *((candidates(f, bent)[0], bent) for f in ("backward-dkdv", "backward"))]


# By roles: of head dims, features; and instructions of a tile that each of the two issues at most.
BY_ROLES = (
    ((256, 256), (), 290),
    ((256, 256), ("softcap",), 920),
    ((256, 256), ("dropout",), 800),
    ((192, 192), (), 335),
    ((192, 128), (), 310),
)


def _by_roles() -> list:
    found = []
    for dims, features, most in BY_ROLES:
        for dtype in ("bfloat16", "float16") if ALL else ("bfloat16",):
            traits = Traits(dtype, *dims, features)
            fit = [x for x in candidates("backward-dkdv", traits) if fits(x, traits)]
            found += [(config, traits, most) for config in (fit if ALL else fit[:1])]
    return found


def fits(config, traits) -> bool:
    return misfit(config, traits, HOPPER, 2 * config.block_rows) is None


def expect_that_registers_fit(report, config, traits):
    """Those of warps that copy and of warps that multiply, after `setmaxnreg`."""
    copying, multiplying = report.setmaxnreg["dec"], report.setmaxnreg["inc"]
    assert (copying.available, multiplying.available) == config.registers_of(traits)
    assert copying.named <= copying.available and multiplying.named <= multiplying.available


@pytest.mark.parametrize(("config", "traits", "most"), some(_by_roles(), every=5), ids=str)
def test_each_role_has_its_products_and_waits_for_nothing_else(config, traits, most):
    assert config.roles
    report = inspect_kernel(config, traits, HOPPER)
    assert report.faults == ()
    expect_that_registers_fit(report, config, traits)
    own_dk, own_dv = sorted(
        read_main_loops(disassemble(get_cubin(config, traits, HOPPER).code)),
        key=lambda loop: loop.exponentials,
    )
    tile = config.tile_m // 16
    assert own_dv.groups == (traits.head_dim // 16, tile)
    assert own_dk.groups == (traits.head_dim_v // 16, tile)
    assert own_dk.waits == own_dv.waits == (0, 0)
    assert own_dk.exponentials == 0
    if not traits.shapes_scores:
        assert own_dv.exponentials == config.tile_m // 2
    for loop in (own_dk, own_dv):
        assert loop.issued <= most
        if not traits.shapes_scores:
            assert max(loop.clocks.values()) == loop.clocks["tensor"]


@pytest.mark.parametrize(("config", "traits"), some(_cases(), every=4), ids=str)
def test_machine_code_is_as_designed(config, traits):
    report = inspect_kernel(config, traits, HOPPER)
    assert report.faults == ()
    expect_that_registers_fit(report, config, traits)
    loop, columns = report.main_loop, traits.head_dim // 16
    if config.family == "backward-dkdv":
        walked = config.tile_m
        assert loop.groups == (columns, columns, walked // 16, walked // 16)
        assert loop.waits == (1, 1, 1, 0)
    elif config.family == "backward":
        walked = config.tile_m
        groups, waits = (columns, columns, walked // 16, walked // 16), (1, 1, 1, 0)
        if config.dq_groups(traits) == config.num_warpgroups:
            groups, waits = (*groups, config.tile_n // 16), (1, 1, 2, 1, 0)
        assert loop.groups == groups
        assert loop.waits == waits
    else:
        walked = config.tile_n
        assert loop.groups == (columns, columns, walked // 16)
        assert loop.waits == (1, 0, 0)
    assert loop.overlapped_exponentials == loop.exponentials
    if not traits.shapes_scores:
        # A warpgroup's scores of a tile are 64 x `walked`.
        assert loop.exponentials == walked // 2
        most = MOST_ISSUED.get((config.family, traits.head_dim))
        assert most is None or loop.issued <= most
        assert max(loop.clocks.values()) == loop.clocks["tensor"]


WITH_FEATURES = (
    ("backward-dkdv", 128, {"features": ("dropout",), "ragged": True}),
    ("backward-dkdv", 64, {"features": ("dropout",)}),
    ("backward-dkdv", 128, {"features": ("softcap", "dropout")}),
    ("backward-dkdv", 256, {"features": ("dropout",)}),
    ("backward-dkdv", 128, {"blocks": (128, 128)}),
    ("backward", 128, {"features": ("dropout",), "ragged": True}),
    ("backward", 64, {"ragged": True}),
    ("backward", 128, {"blocks": (128, 128)}),
    ("backward", 64, {"blocks": (128, 128)}),
    ("backward-dq", 128, {"features": ("dropout",), "ragged": True}),
    ("backward-dq", 256, {"features": ("softcap", "dropout")}),
    ("backward-dq", 256, {"blocks": (128, 96)}),
)
"""What takes most registers, of warps that multiply and of those that copy."""


@thorough
@pytest.mark.parametrize(("family", "head_dim", "more"), WITH_FEATURES, ids=str)
def test_features_spill_nothing(family, head_dim, more):
    choice = choose(family, Traits("bfloat16", head_dim, head_dim, **more), HOPPER)
    assert choice.implementation.name == "wgmma-backward"
    report = inspect_kernel(choice.config, choice.traits, HOPPER)
    assert report.faults == ()
    expect_that_registers_fit(report, choice.config, choice.traits)


PLACES = (
    (128, {}),
    (64, {}),
    (96, {}),
    (128, {"ragged": True}),
    (128, {"blocks": (128, 128)}),
    (64, {"features": ("softcap",)}),
)


@pytest.mark.parametrize(("head_dim", "more"), some(PLACES, PLACES[0]), ids=str)
def test_places_that_blocks_draw_cost_the_main_loop_next_to_nothing(head_dim, more):
    traits = Traits("bfloat16", head_dim, head_dim, **more)
    own = Sm90BackwardConfig.parse("sm90-m64n128w8s2")
    drawn = replace(own, persistent=True)
    report = inspect_kernel(drawn, traits, HOPPER)
    assert report.faults == ()
    expect_that_registers_fit(report, drawn, traits)
    assert report.main_loop.issued <= inspect_kernel(own, traits, HOPPER).main_loop.issued + 4
