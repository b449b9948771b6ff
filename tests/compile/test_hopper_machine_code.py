"""The forward of `wgmma` as machine code: registers, products, waits, and what overlaps.

The assembler says nothing of what hurts most: it may wait for each product by itself, spill, or
move a wait above the softmax that was to run beside products. A mask is data of these kernels, so
that causal attention runs the same code. NUMFLASH_TEST_FULL=1 compiles every candidate
with every feature.
"""

import itertools
import struct
from collections import Counter
from dataclasses import replace

import pytest

from numflash.configs import Sm90ForwardConfig, Traits
from numflash.configs.wgmma import candidates
from numflash.machine_code.compiler import compile_cubin, compile_ptx, get_cubin
from numflash.machine_code.main_loop import MainLoop, Registers, read_main_loop
from numflash.machine_code.report import inspect_kernel
from numflash.machine_code.sass import disassemble, opcodes
from numflash.ptx import device_function
from numflash.runtime.devices import architecture
from numflash.selection.rules import choose
from tests.support.covering import FULL, some, thorough

HOPPER = architecture("sm_90a")
DTYPES = ("float16", "bfloat16")
HEAD_DIMS = (64, 128, 192, 256)
PLAIN, BENT = {}, {"features": ("softcap", "alibi")}
MOST_OF_CLUSTERS = 8
"""Instructions of a turn that two releases in two blocks take more, and moves of descriptors."""
REGISTERS, WARPGROUP = 64 * 1024, 128
# Instructions of a turn: for a score its maximum, exponential, product, sum and half a conversion;
# for a product its descriptor; the rest, which assemblers from 12.8 to 13.5 write with 35 to 70.
PER_SCORE, PER_PRODUCT, REST = 4.5, 8, 80
# Of a turn of the chosen configs, by head_dim: the most. Where uniform registers run out,
# descriptors are moved in each turn, some 20 instructions (docs/machine-code.md).
MOST_ISSUED = {64: 383, 128: 403, 192: 337, 256: 338}


def chosen(head_dim: int) -> Sm90ForwardConfig:
    """The config that runs this where there are many rows."""
    return choose("forward", Traits("bfloat16", head_dim, head_dim), HOPPER).config


def every(head_dim: int) -> tuple[Sm90ForwardConfig, ...]:
    """The candidates, those for fewer rows last."""
    return candidates(Traits("bfloat16", head_dim, head_dim))


def _cases():
    """(config, dtype, head_dim, features): what is chosen; in full every candidate."""
    if FULL:
        features = [PLAIN, {"features": ("softcap",)}, {"features": ("alibi",)}, BENT]
        for head_dim, dtype in itertools.product(HEAD_DIMS, DTYPES):
            for config, feature in itertools.product(every(head_dim), features):
                yield config, dtype, head_dim, feature
            for config in every(head_dim):
                yield replace(config, num_splits=2), dtype, head_dim, PLAIN
        return
    for head_dim, dtype in zip(HEAD_DIMS, DTYPES * 2, strict=True):
        yield chosen(head_dim), dtype, head_dim, PLAIN
    yield chosen(128), "bfloat16", 128, BENT
    # What first light asks for: more stages of V, more keys in a tile.
    yield replace(chosen(128), v_stages=3), "bfloat16", 128, PLAIN
    yield replace(chosen(128), tile_n=176), "bfloat16", 128, PLAIN
    yield replace(chosen(256), cluster=2), "bfloat16", 256, PLAIN
    # As few warps as there are, without `setmaxnreg`.
    yield replace(every(128)[-1], fixed=True), "bfloat16", 128, PLAIN
    # Few rows: smaller tiles, and keys in splits.
    yield replace(every(128)[-1], num_splits=2), "bfloat16", 128, PLAIN


def _name(case) -> str:
    config, dtype, head_dim, features = case
    return "-".join([str(config), dtype, f"d{head_dim}", *features])


CASES = tuple(_cases())


@pytest.mark.parametrize("case", some(CASES, CASES[0]), ids=_name)
def test_machine_code_is_as_designed(case):
    config, dtype, head_dim, features = case
    traits = Traits(dtype, head_dim, head_dim, **features)
    report = inspect_kernel(config, traits, HOPPER)
    assert report.faults == ()
    _expect_registers(config, report.registers, report.setmaxnreg)
    of_s, of_o = traits.head_dim // 16, config.tile_n // 16
    counts = report.instructions
    # The first tile of keys has an S of its own, the last an O.
    assert (counts["HGMMA"], counts["HMMA"]) == (2 * (of_s + of_o), 0)
    _expect_main_loop(config, traits, report.main_loop)


def _expect_registers(config: Sm90ForwardConfig, at_entry: int, later: dict[str, Registers]):
    """All that the launch bounds allow at the start, and no more than that after `setmaxnreg`."""
    blocks = config.min_blocks_per_sm
    allowed = REGISTERS // blocks // config.num_threads // 8 * 8
    if config.fixed:
        # Registers that are not handed on are not asked for: as many as are named.
        assert at_entry <= 255 and (later, config.registers) == ({}, (allowed, allowed))
        return
    assert at_entry == min(allowed, 255)
    copying, multiplying = later["dec"], later["inc"]
    assert (copying.available, multiplying.available) == config.registers
    assert copying.named <= copying.available and multiplying.named <= multiplying.available
    taken = copying.available + config.num_warpgroups * multiplying.available
    assert WARPGROUP * taken <= allowed * config.num_threads


@thorough
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_sequences_of_any_lengths_cost_the_main_loop_next_to_nothing(head_dim):
    config = chosen(head_dim)
    one_length = Traits("bfloat16", head_dim, head_dim)
    report = inspect_kernel(config, replace(one_length, ragged=True), HOPPER)
    assert report.faults == ()
    _expect_registers(config, report.registers, report.setmaxnreg)
    _expect_main_loop(config, one_length, report.main_loop, 1)
    of_one_length = inspect_kernel(config, one_length, HOPPER).main_loop
    assert report.main_loop.issued <= of_one_length.issued + 1


@thorough
@pytest.mark.parametrize("head_dim", [128, 256])
def test_clusters_cost_the_main_loop_next_to_nothing(head_dim):
    """Two lanes of a warp release a buffer, each in a block, and no fence stands before them."""
    config, traits = chosen(head_dim), Traits("bfloat16", head_dim, head_dim)
    pairs = replace(config, cluster=2)
    report = inspect_kernel(pairs, traits, HOPPER)
    assert report.faults == ()
    _expect_registers(pairs, report.registers, report.setmaxnreg)
    _expect_main_loop(pairs, traits, report.main_loop)
    alone = inspect_kernel(config, traits, HOPPER)
    assert report.main_loop.issued <= alone.main_loop.issued + MOST_OF_CLUSTERS
    # They meet at the beginning and at the end. Copies of K and V are for both, of Q they are not.
    code = get_cubin(pairs, traits, HOPPER).code
    found = Counter(opcodes(disassemble(code)))
    assert found["UCGABAR_ARV"] == found["UCGABAR_WAIT"] == found["MEMBAR.ALL.GPU"] == 2
    assert found["UTMALDG.4D.MULTICAST"] and not found["UTMALDG.4D"]
    assert found["UTMALDG.5D"] and not found["UTMALDG.5D.MULTICAST"]
    assert ".reqnctapercluster 2, 1, 1" in compile_ptx(pairs, traits, HOPPER)
    # And so the driver reads it: EIATTR_CTA_PER_CLUSTER, with its length and three numbers.
    assert b"\x04\x3d\x0c\x00" + struct.pack("<3I", 2, 1, 1) in code
    assert "percluster" not in compile_ptx(config, traits, HOPPER)


@thorough
def test_what_the_l2_cache_fetches_is_no_matter_of_machine_code():
    config, traits = chosen(64), Traits("bfloat16", 64, 64)
    fewer = replace(config, l2_bytes=128)
    assert get_cubin(fewer, traits, HOPPER) is get_cubin(config, traits, HOPPER)


def _expect_main_loop(config: Sm90ForwardConfig, traits: Traits, loop: MainLoop, moves: int = 0):
    of_s, of_o = traits.head_dim // 16, config.tile_n // 16
    # Only the last product of each group commits it.
    assert loop.groups == ((of_s, of_o) if config.overlap else (of_o, of_s))
    assert loop.waits == ((1, 0) if config.overlap else (0, 0))
    # A thread has 2 scores of each 8 columns for each of 2 rows.
    scores, results = config.tile_n // 2, traits.head_dim_v // 2
    # softcap's tanh is an exponential and a reciprocal; of bfloat16 it is one instruction.
    has_exponentials = "softcap" in traits.features and traits.dtype != "bfloat16"
    exponentials = scores * (2 if has_exponentials else 1)
    assert loop.exponentials == exponentials
    assert loop.overlapped_exponentials == (exponentials if config.overlap else 0)
    issued = loop.instructions
    assert issued["conversions"] == scores // 2
    # The row's maximum; with long rows of Q the warpgroup's number, too.
    assert issued["shuffles"] == 4 + (traits.head_dim > 128)
    assert issued["fmnmx"] == scores + 2
    assert loop.skipped["rescaling"] == results
    assert loop.skipped["other"] == 0
    if not traits.shapes_scores:
        assert (issued["ffma"], issued["other_special"]) == (scores, 0)
        assert issued["fadd"] <= scores + 4
        assert loop.issued <= PER_SCORE * scores + PER_PRODUCT * (of_s + of_o) + REST
        if config == chosen(traits.head_dim):
            assert loop.issued <= MOST_ISSUED[traits.head_dim] + moves
        # Per tile the tensor cores are what there is least of.
        assert max(loop.clocks.values()) == loop.clocks["tensor"]


@thorough
def test_without_its_guard_the_softmax_does_not_overlap_more(monkeypatch):
    """Many assemblers move the wait above all exponentials: `python -m bench toolchains`."""
    config, traits = chosen(128), Traits("bfloat16", 128, 128)
    assert config.overlap

    @device_function
    def nothing(x, y):
        pass

    guarded = read_main_loop(disassemble(get_cubin(config, traits, HOPPER).code))
    monkeypatch.setattr("numflash.kernels.wgmma.forward.softmax_before_wait", nothing)
    bare = read_main_loop(disassemble(compile_cubin(config, traits, HOPPER).code))
    assert bare.groups == guarded.groups and bare.waits == guarded.waits
    assert guarded.overlapped_exponentials == guarded.exponentials == bare.exponentials
    assert guarded.overlapped_exponentials >= bare.overlapped_exponentials
