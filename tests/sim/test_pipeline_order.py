"""The programs of `numflash_tuner.pipeline` have the order of the kernels, in the simulator.

A role's waits, arrivals and products must be those of its generator, one by one. A kernel that is
changed fails here.
"""

import re

import numpy as np
import pytest
from numflash_tuner.pipeline.programs import program_of
from numflash_tuner.pipeline.steps import Walk

import numflash
from numflash.configs import WARPGROUP_ROWS, Traits, parse_config
from numflash.kernels.wgmma import backward
from numflash.kernels.wgmma.gradient_ring import channels_of
from numflash.kernels.wgmma.ring import make_ring
from numflash.problem.fp8 import Fp8Recipe
from numflash.runtime import driver
from numflash.selection import choice as selection
from numflash.simulator import warpgroup
from tests.support.covering import some
from tests.support.faults import Early, Mutation, Twice, load
from tests.support.program_order import Kernel, Memory, difference, record


@pytest.fixture(autouse=True)
def hopper(on, monkeypatch):
    """A simulated Hopper with one SM, that runs one block at a time."""
    on("sm_90a")
    monkeypatch.setattr(driver, "multiprocessors", lambda device: (1, 2**20))
    monkeypatch.setattr(selection, "resident_blocks", lambda *about: 1)


def walks_of(config, seqlen_q, seqlen_k, causal):
    """A `Walk` for each tile of rows of a head, by rows."""
    found, n = [], config.stage_n

    def end_of(first, last):
        if first >= seqlen_q:
            return 0
        last = min(last, seqlen_q - 1)
        most = min(seqlen_k, last + seqlen_k - seqlen_q + 1) if causal else seqlen_k
        return -(-max(0, most) // n)

    for start in range(0, seqlen_q, config.tile_m):
        tiles = end_of(start, start + config.tile_m - 1)
        groups = [start + WARPGROUP_ROWS * g for g in range(config.num_warpgroups)]
        seen = tuple((0, end_of(row, row + WARPGROUP_ROWS - 1)) for row in groups)
        found.append(Walk(tiles, seen))
    return found


def kernel_of(config, traits) -> Kernel:
    """What numbers mean in the forward."""
    ring, groups = make_ring(config, traits), config.num_warpgroups
    buffers = {"q": groups, "k": config.num_stages, "v": config.stages_of_v}
    channels = {name: (getattr(ring, name), buffers[name.lower()]) for name in "QKV"}
    roles = {4 * group: f"WG {group}" for group in range(groups)} | {4 * groups: "producer"}
    if traits.key_scales:
        channels["SCALES"] = ring.SCALES, config.num_stages
        roles[4 * groups + 1] = "scales"
    return Kernel(
        "forward",
        channels=channels,
        barriers={1 + group: f"turn {group}" for group in range(groups)},
        memory=Memory(config.smem_offsets(traits), config.tiles(traits), buffers),
        roles=roles,
    )


def run_forward(config, head_dim, seqlen_q, seqlen_k, causal, key_scales):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, seqlen_q, 1, head_dim)).astype(np.float16)
    k, v = (rng.standard_normal((1, seqlen_k, 1, head_dim)).astype(np.float16) for _ in "kv")
    precision = "fp8" if config.operand_bytes == 1 else None
    recipe = Fp8Recipe("token") if key_scales else None
    options = {"causal": causal, "precision": precision, "fp8": recipe}
    numflash.attention(q, k, v, config=str(config), **options)


FORWARDS = {
    "overlap and turns": ("sm90-m128n16w8s2-overlap-pingpong", 64, 100, 80, False),
    "causal": ("sm90-m128n16w8s2-overlap-pingpong-persistent", 64, 200, 90, True),
    "turns": ("sm90-m128n16w8s2-pingpong", 64, 128, 70, True),
    "neither": ("sm90-m64n32w4s3", 64, 64, 150, False),
    "overlap": ("sm90-m64n32w4s2-overlap-persistent", 64, 140, 100, True),
    "stages of V": ("sm90-m128n16w8s2-v3-overlap-pingpong", 64, 128, 110, True),
    "fewer of V": ("sm90-m64n16w4s3-v2", 64, 64, 110, False),
    "one stage": ("sm90-m128n32w8s1", 64, 128, 100, True),
    "three": ("sm90-m192n32w12s1-pingpong", 64, 192, 100, False),
    "O in place of Q": ("sm90-m64n96w4s2-overlap-persistent", 256, 70, 130, False),
    "one arrival": ("sm90-m64n16w4s2-a1-overlap", 64, 64, 60, False),
    "8 bits": ("fp8-sm90-m64n128w4s2-overlap", 64, 64, 300, False),
    "8 bits, two tiles a stage": ("fp8-sm90-m128n64w8s2-pingpong", 64, 128, 300, True),
    "8 bits, in parts": ("fp8-sm90-m64n128w4s1", 192, 64, 200, False),
    "scales of keys": ("fp8-sm90-m128n128w8s2-overlap-pingpong-persistent", 64, 140, 300, True),
    "scales of keys, two tiles a stage": ("fp8-sm90-m64n64w4s1", 64, 64, 300, False),
}


def of_forward(case, monkeypatch) -> str | None:
    """How the forward's roles differ from its program; None if they do not."""
    text, head_dim, seqlen_q, seqlen_k, causal = case
    key_scales = case in (x for name, x in FORWARDS.items() if name.startswith("scales"))
    config = parse_config("forward", text)
    is_fp8 = text.startswith("fp8")
    traits = Traits("float16", head_dim, head_dim, fp8=is_fp8, key_scales=key_scales)
    heard = record(monkeypatch, kernel_of(config, traits))
    monkeypatch.setattr(warpgroup, "WARPS_APART", config.arrivals == 4)
    run_forward(config, head_dim, seqlen_q, seqlen_k, causal, key_scales)
    walks = walks_of(config, seqlen_q, seqlen_k, causal)
    if causal:
        # The longest walks begin first.
        walks.reverse()
    blocks = [walks] if config.persistent else [[walk] for walk in walks]
    return difference(heard, [program_of(config, traits, mine) for mine in blocks])


@pytest.mark.parametrize("name", some(FORWARDS, "turns", "stages of V"))
def test_the_forward(name, monkeypatch):
    assert of_forward(FORWARDS[name], monkeypatch) is None


def backward_kernel(family, config, traits) -> Kernel:
    """What numbers mean in one of the backward's kernels."""
    groups, stages, buffers = config.num_warpgroups, config.num_stages, {}
    walked = ("k", "v") if family == "backward-dq" else ("q", "do")
    names = ["OWNED", *(name.upper() for name in walked)]
    if family != "backward-dq":
        names.append("ROWS")
    roles = {4 * group: f"WG {group}" for group in range(groups)} | {4 * groups: "producer"}
    of_stages = dict.fromkeys(walked, stages)
    if config.assisting_threads:
        roles[4 * groups + 1] = "statistics"
    if family == "backward":
        channels = backward._channels_of(config, traits)
        names.append("DQ")
        buffers["DQ"], of_stages["ds"] = config.dq_buffers(traits), 2
        roles[4 * groups + 1 + config.assisting_threads // 32] = "adder"
    else:
        roles_of_dkdv = family == "backward-dkdv" and config.roles
        names += ["P"] * roles_of_dkdv
        channels = channels_of(config, traits, len(names) - 1)
    buffers = dict.fromkeys(names, stages) | {"OWNED": 1} | buffers
    return Kernel(
        family.replace("-", "_"),
        channels={
            name: (channel, buffers[name]) for name, channel in zip(names, channels, strict=True)
        },
        barriers={1: "dS complete"} if family == "backward" else {},
        memory=Memory(config.smem_offsets(traits), config.tiles(traits), of_stages),
        roles=roles,
    )


def run_backward(configs, head_dim, seqlen_q, seqlen_k, heads=1):
    """Gradients, of the forward's results made by NumPy."""
    rng = np.random.default_rng(0)
    shapes = (seqlen_q, heads), (seqlen_k, 1), (seqlen_k, 1)
    q, k, v = (rng.standard_normal((1, *x, head_dim)).astype(np.float16) for x in shapes)
    out, lse = np.zeros_like(q), np.zeros((1, heads, seqlen_q), np.float32)
    numflash.attention_backward(q, q, k, v, out, lse, config=configs)


DQ, DKDV = "sm90-m64n32w4s2", "sm90-m32n64w4s2"
BACKWARDS = {
    "one kernel": ("backward", "m64n128w8s2", 64, 140, 100),
    "one kernel, dQ by one of three": ("backward", "m64n192w12s1", 64, 130, 192),
    "one kernel, one warpgroup": ("backward", "m64n64w4s3", 32, 200, 60),
    "dQ": ("backward-dq", "m64n32w4s2", 64, 64, 110),
    "dQ, two warpgroups": ("backward-dq", "m128n32w8s1", 64, 128, 70),
    "dK and dV": ("backward-dkdv", "m32n128w8s2", 64, 110, 128),
    "dK and dV, three stages": ("backward-dkdv", "m32n64w4s3", 64, 140, 60),
    "roles": ("backward-dkdv", "m32n64w8s2-roles", 64, 110, 64),
    "roles, one stage": ("backward-dkdv", "m64n64w8s1-roles", 64, 110, 64),
}


def of_backward(case, monkeypatch) -> str | None:
    """How one of the backward's kernels differs from its program; None if it does not."""
    family, text, head_dim, seqlen_q, seqlen_k = case
    config = parse_config(family, f"sm90-{text}")
    traits = Traits("float16", head_dim, head_dim)
    configs = {"backward": str(config)}
    if family != "backward":
        configs = {"backward-dq": DQ, "backward-dkdv": DKDV, family: str(config)}
    heard = record(monkeypatch, backward_kernel(family, config, traits))
    run_backward(configs, head_dim, seqlen_q, seqlen_k)
    of_queries = family == "backward-dq"
    own, walked = (seqlen_q, seqlen_k) if of_queries else (seqlen_k, seqlen_q)
    program = program_of(config, traits, -(-walked // config.column_tile))
    return difference(heard, [program] * -(-own // config.block_rows))


@pytest.mark.parametrize("name", some(BACKWARDS, "dQ"))
def test_the_backward(name, monkeypatch):
    assert of_backward(BACKWARDS[name], monkeypatch) is None


# Kernels with another order, which still compute the same: (module, fault, check, case, message).
CHANGED = {
    "the turn is given before S": (
        *("forward", Early("make_attend.attend", "pass_turn"), of_forward, FORWARDS["turns"]),
        r"WG 0, step 3: the kernel has \('arrive', 'turn 1'\), its program \('begin', ",
    ),
    "V is fetched before the next K": (
        "producer",
        Mutation("", "k_leads = num_stages > 1 or stage_n == config.tile_n", "k_leads = False"),
        *(of_forward, FORWARDS["neither"]),
        r"producer, step 4: the kernel has \('claim', 'V', 0\), its program \('claim', 'K', 1\)",
    ),
    "Q is waited for twice": (
        "skeleton",
        Twice("make_skeleton.consume", "Q.wait"),
        *(of_forward, FORWARDS["neither"]),
        r"WG 0, step 1: the kernel has \('wait', 'Q', 0\), its program \('wait', 'K', 0\)",
    ),
    "dO is waited for before S": (
        "backward_dkdv",
        Early("_make_consume.consume", "DO.wait"),
        *(of_backward, BACKWARDS["dK and dV"]),
        r"WG 0, step 2: the kernel has \('wait', 'DO', 0\), its program \('begin', ",
    ),
}
_CHAIN = "producer", "skeleton", "forward"


@pytest.mark.parametrize("name", some(CHANGED, every=3))
def test_a_changed_kernel_is_seen(name, monkeypatch):
    module, fault, how, case, message = CHANGED[name]
    chain = _CHAIN[_CHAIN.index(module) :] if module in _CHAIN else (module,)
    names = [f"numflash.kernels.wgmma.{name}" for name in chain]
    load(names, names[0], fault, monkeypatch)
    assert re.search(message, how(case, monkeypatch))
