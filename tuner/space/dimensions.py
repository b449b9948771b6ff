"""The dimensions of a space: the choices that the configs of each implementation have.

Choices of one dimension that exclude choices of another are not treated here, except where they
belong together by construction, as the warps of a Hopper config and its rows do.
"""

from numflash.configs import (
    IMPLEMENTATIONS,
    MMA_CONFIGS,
    WARPGROUP_ROWS,
    Config,
    Fp8ForwardConfig,
    Sm90ForwardConfig,
    Sm90Fp8ForwardConfig,
    implementation_of,
    wgmma,
)
from numflash.configs import fp8 as fp8_configs
from numflash.configs.wgmma_backward import WGMMA_BACKWARD_CONFIGS
from numflash.problem.classes import ProblemClass

from .machines import Machine

GEOMETRY = ("num_splits", "packed", "heads_in_flight")
"""Dimensions that are arguments of a kernel rather than its code."""
HOPPER_ONLY = {
    "v_stages": 0,
    "overlap": False,
    "pingpong": False,
    "persistent": False,
    "consumer_registers": 0,
    "cluster": 1,
    "roles": False,
}
"""Fields that only configs for Hopper have, with the values that all others count as."""
_ABSENT = {**HOPPER_ONLY, "half": False}
"""Likewise fields that not all configs of a space have."""
HOPPER_CONFIGS: dict[str, type] = {
    family: config
    for family, config in {"forward": Sm90ForwardConfig, **WGMMA_BACKWARD_CONFIGS}.items()
    if family in MMA_CONFIGS and family != "reduce-dq"
}
"""Kernel family -> its config class for Hopper."""

_BLOCKS_PER_SM = 8
"""With more blocks than this per SM a machine is full, whatever the blocks do."""
_FEWER_REGISTERS = {1: (), 2: (232,), 3: (152,)}
"""By warpgroups: fewer registers than usual for those that multiply, which leaves the one that
copies more."""
_HOPPER_TILES_N = tuple(range(64, 257, 16))
_WALKED_TILES = (32, 48, 64, 80, 96, 128, 160, 192)
"""Rows of a tile that Hopper's backward walks in."""
_FP8_TILES_N = {1: (64, 128, 192, 256), 2: (32, 64, 96, 128, 192, 256)}
"""By bytes of an operand: keys of a tile on 8-bit floats; rows of V are 64 bytes, or several."""
_HOPPER_FP8_TILES_N = (64, 128, 256)
_CLUSTERS = (1, 2)
_STAGES_OF_V = (0, 2, 3)
"""Of the forward: buffers of V where K has others; 0 is as many as K."""
_OFF_ON = (False, True)


def products(
    problem: ProblemClass,
    machine: Machine,
    default: Config,
    rows_packed: int,
    is_measured: bool = False,
) -> tuple[dict[str, tuple], ...]:
    """Name -> choices in order, of each product whose union is the space; names are the same.

    Args:
        problem: the class.
        machine: the GPU.
        default: the config that runs untuned; its choices are among those of one product.
        rows_packed: query heads that the forward packs by rule.
        is_measured: whether a GPU judges. Only then clusters are tried, and a backward whose
            blocks draw places, which no GPU has run yet: what is predicted alone is never one.
    """
    row = implementation_of(default)
    if not row.has_tensor_cores:
        found = [_portable(problem.family)]
    elif problem.traits.fp8:
        found = _fp8(problem, machine, default, rows_packed, is_measured)
    elif has_wgmma(problem, machine):
        laid_out = _layouts(problem, machine, rows_packed)
        # Bulk copies store whole results of sequences, never parts.
        unsplit = {"num_splits": (1,)} if problem.traits.ragged else {}
        if problem.family == Sm90ForwardConfig.family:
            found = [_hopper(groups, is_measured) | laid_out | unsplit for groups in (1, 2, 3)]
        else:
            found = [_hopper_backward(problem.family, groups, is_measured) for groups in (1, 2, 3)]
            if problem.family == "backward-dkdv":
                roles = {"tile_n": (WARPGROUP_ROWS,), "roles": (True,)}
                found.append(_hopper_backward(problem.family, 2, is_measured) | roles)
        off = {name: (HOPPER_ONLY[name],) for name in found[0] if name in HOPPER_ONLY}
        found.append({"generation": ("sm80",)} | off | _mma(problem.family) | laid_out)
    else:
        found = [_mma(problem.family) | _layouts(problem, machine, rows_packed)]
    own = default.num_warpgroups - 1 if row.needs_maps else -1
    if getattr(default, "roles", False):
        own = -2
    found[own] = {
        name: tuple(sorted({*choices, value_of(default, name)}))
        for name, choices in found[own].items()
    }
    return tuple(found)


def has_wgmma(problem: ProblemClass, machine: Machine) -> bool:
    """Whether configs for Hopper can run a class; bulk copies need aligned rows."""
    if problem.family not in HOPPER_CONFIGS or not problem.traits.vectorized:
        return False
    return wgmma.no_wgmma(problem.traits, machine.limits) is None


def preferred(problem: ProblemClass, machine: Machine) -> tuple[Config, ...]:
    """The configs that numflash chooses from by rule, of the fastest implementation first."""
    traits, limits = problem.traits, machine.limits
    rows = (row for row in IMPLEMENTATIONS if row.serves(problem.family, traits, limits))
    return tuple(x for row in rows for x in row.candidates(problem.family, traits, limits))


def kind_of(problem: ProblemClass, generation: str) -> type | None:
    """The class of a class's configs for tensor cores, by a generation of instructions."""
    of_mma, of_hopper = MMA_CONFIGS.get(problem.family), HOPPER_CONFIGS.get(problem.family)
    if problem.traits.fp8:
        of_mma, of_hopper = Fp8ForwardConfig, Sm90Fp8ForwardConfig
    is_hopper = of_hopper is not None and generation in of_hopper.generations
    return of_hopper if is_hopper else of_mma


def value_of(config: Config, name: str) -> object:
    """A config's choice in a dimension."""
    return getattr(config, name, _ABSENT.get(name))


def _portable(family: str) -> dict[str, tuple]:
    if family == "combine":
        return {"num_warps": (2, 4, 8, 16)}
    if family == "delta":
        return {"num_warps": (1, 2, 4, 8, 16)}
    return {
        "tile_m": (8, 16, 32, 64, 128),
        "tile_n": (8, 16, 32, 64, 128),
        "num_warps": (1, 2, 4, 8),
    }


def _mma(family: str) -> dict[str, tuple]:
    dimensions: dict[str, tuple] = {
        "tile_m": (16, 32, 48, 64, 96, 128, 192, 256),
        "tile_n": (16, 32, 48, 64, 96, 128, 192, 256),
        "num_warps": (1, 2, 4, 8),
        "num_stages": (1, 2, 3),
        # One block is promised anyway, where a kernel spills without.
        "min_blocks": (0, 2, 3, 4),
    }
    if family == "backward-dkdv":
        dimensions["apart"] = _OFF_ON
    return dimensions


def _hopper(num_warpgroups: int, is_measured: bool) -> dict[str, tuple]:
    """The dimensions for so many warpgroups that multiply."""
    return {
        "generation": ("sm90",),
        "tile_m": (WARPGROUP_ROWS * num_warpgroups,),
        "tile_n": _HOPPER_TILES_N,
        "num_warps": (4 * num_warpgroups,),
        "num_stages": (1, 2, 3),
        "v_stages": _STAGES_OF_V,
        "min_blocks": (0, 2) if num_warpgroups == 1 else (0,),
        "overlap": _OFF_ON,
        "pingpong": _OFF_ON if num_warpgroups > 1 else (False,),
        "persistent": _OFF_ON,
        "consumer_registers": (0, *_FEWER_REGISTERS[num_warpgroups]),
        "cluster": _CLUSTERS if is_measured else (1,),
    }


def _fp8(
    problem: ProblemClass, machine: Machine, default: Config, rows_packed: int, is_measured: bool
) -> list[dict[str, tuple]]:
    """The products of the forward on 8-bit floats.

    e4m3 is multiplied as it is where that is an instruction of its own; everywhere else, and
    there as well, as float16. The two have other tiles, and so products of their own.
    """
    laid_out = _layouts(problem, machine, rows_packed)
    generation = fp8_configs.generation(machine.limits)
    halves = (False,)
    if generation == "sm89":
        halves = (True, False) if fp8_configs.multiplies_codes(machine.limits) else (True,)
    found = []
    if has_wgmma(problem, machine):
        tiles = {"tile_n": _HOPPER_FP8_TILES_N, "v_stages": (0,), "half": (False,)}
        found = [_hopper(groups, is_measured) | tiles | laid_out for groups in (1, 2, 3)]
    off = {name: (HOPPER_ONLY[name],) for name in found[0] if name in HOPPER_ONLY} if found else {}
    for half in halves:
        of_codes = generation == "sm89" and not half
        own = {"generation": (generation,), "half": (half,)}
        tiles = {"tile_n": _FP8_TILES_N[1 if of_codes else 2]}
        found.append(own | off | _mma(problem.family) | tiles | laid_out)
    return found


def _hopper_backward(family: str, num_warpgroups: int, is_measured: bool) -> dict[str, tuple]:
    """The dimensions of gradients for so many warpgroups that multiply."""
    owned, walked = (WARPGROUP_ROWS * num_warpgroups,), _WALKED_TILES
    by_queries = family == "backward-dq"
    found = {
        "generation": ("sm90",),
        "tile_m": owned if by_queries else walked,
        "tile_n": walked if by_queries else owned,
        "num_warps": (4 * num_warpgroups,),
        "num_stages": (1, 2, 3),
        "min_blocks": (0,),
    }
    if family == "backward-dkdv":
        found |= {"apart": (False,), "roles": (False,)}
    if family == "backward":
        # Three warpgroups have no register for it (`Sm90BackwardConfig`).
        is_offered = is_measured and num_warpgroups < 3
        found |= {"num_splits": (1,), "persistent": _OFF_ON if is_offered else (False,)}
    return found


def _layouts(problem: ProblemClass, machine: Machine, rows_packed: int) -> dict[str, tuple]:
    """Choices for laying kernels for tensor cores out over the machine."""
    if problem.family == "backward":
        return {"num_splits": (1, 2, 4, 8)}
    if problem.family != "forward":
        return {}
    # Where one row block a head fills the machine, splitting the keys only costs.
    heads = problem.batch_heads // rows_packed
    fewest = max(1, heads) * -(-problem.seqlen_q // 256)
    most = max(1, _BLOCKS_PER_SM * machine.num_sms // fewest)
    layouts = {"num_splits": tuple(2**i for i in range(8) if 2**i <= most)}
    if problem.traits.ragged:
        # Whether a sequence's keys may be split: into how many parts, the device finds.
        layouts["num_splits"] = (1, 2)
    if problem.group_size > 1 and problem.traits.of_a_head is None:
        layouts["packed"] = _OFF_ON
    layouts["heads_in_flight"] = _orders(problem, machine)
    return layouts


def _orders(problem: ProblemClass, machine: Machine) -> tuple[int, ...]:
    """Choices for the heads in flight; 0 is as many as the L2 has room for.

    In a list of tiles all heads of a tile follow each other.
    """
    traits = problem.traits
    if traits.ragged:
        return (0,)
    head = problem.seqlen_k * (traits.head_dim + traits.head_dim_v) * traits.operand_bytes
    if head * problem.batch_heads <= machine.l2_bytes // 2:
        return (0,)
    return tuple(n for n in (0, 1, 4, 16, 64) if n < problem.batch_heads) or (0,)
