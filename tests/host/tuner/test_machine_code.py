"""Loops in machine code: what each turn does and what is rare, on listings like nvdisasm's."""

import pytest

from tuner.model.machine_code import Counts, analyse

HEAD = """
	.section	.text.kernel,"ax",@progbits
kernel:
.text.kernel:
"""


def listing(body: str) -> str:
    """Instructions and labels, one a line, as a disassembly."""
    lines = []
    for number, line in enumerate(body.strip().splitlines()):
        line = line.strip()
        if line.endswith(":"):
            lines.append(line)
            continue
        guard, text = line.split(" ", 1) if line.startswith("@") else ("", line)
        lines.append(f"        /*{16 * number:04x}*/ {guard:>18} {text} ;")
    return HEAD + "\n".join(lines) + "\n"


MASKED = """
    S2R R0, SR_TID.X
    BRA `(.L_x_9)
.L_x_1:
    BAR.SYNC.DEFER_BLOCKING 0x0
    @!P1 BRA `(.L_x_2)
    LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64]
    IADD3 R5, R5, 0x10, RZ
.L_x_2:
    LDSM.16.M88.4 R8, [R0]
    LDSM.16.MT88.2 R8, [R0]
    HMMA.16816.F32.BF16 R4, R8, R12, R4
    HMMA.1688.F32.TF32 R4, R8, R12, R4
    @P0 BRA `(.L_x_3)
    @!P2 BRA P3, `(.L_x_4)
.L_x_3:
    FSEL R4, R4, -INF , P1
    ISETP.GE.AND P1, PT, R4, R5, PT
.L_x_4:
    FMNMX R6, R4, R5, !PT
    SHFL.BFLY PT, R3, R2, 0x1, 0x1f
    VOTE.ANY P0, P0
    @P0 BRA `(.L_x_8)
.L_x_5:
    MUFU.EX2 R7, R6
    FFMA R8, R9.reuse, R10, R8
    F2FP.BF16.F32.PACK_AB R4, R5, R4
    @!PT LDS RZ, [RZ]
    UIADD3 UR4, UR4, 0x1, URZ
    %s
.L_x_6:
    STG.E.128 desc[UR4][R2.64], R4
    EXIT
.L_x_8:
    FMUL R8, R8, R9
    MUFU.EX2 R9, R9
    BRA `(.L_x_5)
.L_x_9:
    BRA `(.L_x_1)
"""
ENDS = {
    "sm_90a": "@P0 BRA `(.L_x_1)",
    "sm_80, whose call does not come back": "@!P0 CALL.REL.NOINC `(.L_x_6)\n    BRA `(.L_x_1)",
}


@pytest.mark.parametrize("end", ENDS)
def test_one_turn_of_a_loop(end):
    code = analyse(listing(MASKED % ENDS[end]))
    (loop,) = code.loops
    assert code.main is loop
    turn = loop.counts
    assert turn.multiply_adds == 16 * 8 * 16
    assert turn.multiply_adds_tf32 == 16 * 8 * 8
    assert (turn.matrix, turn.special, turn.ffma, turn.conversions) == (2, 1, 1, 1)
    assert (turn.barriers, turn.shuffles) == (1, 1)
    # A load that is predicated off reads nothing; an asynchronous copy takes no time of loads.
    assert turn.shared == 2
    assert turn.shared_bytes == 512 + 256
    assert turn.global_bytes == 512


@pytest.mark.parametrize("end", ENDS)
def test_arithmetic_that_may_be_skipped_is_rare_and_copies_are_not(end):
    (loop,) = analyse(listing(MASKED % ENDS[end])).loops
    # The mask, between the rest, and the rescaling, out of line behind the loop.
    assert (loop.rare.alu, loop.rare.fma, loop.rare.exponentials) == (2, 1, 1)
    # FMNMX of the maximum, IADD3 of the copy's address.
    assert loop.counts.alu == 2
    assert loop.counts.fma == 1


def test_what_is_outside_of_loops():
    code = analyse(listing(MASKED % ENDS["sm_90a"]))
    assert code.outside.global_bytes == 512
    assert code.outside.issued == 5


def test_of_two_alternatives_the_longer_one_counts():
    (loop,) = analyse(
        listing(
            """
            .L_x_1:
                @P0 BRA `(.L_x_2)
                LDG.E.128 R4, desc[UR4][R2.64]
                FADD R1, R1, R2
                BRA `(.L_x_3)
            .L_x_2:
                MOV R4, RZ
            .L_x_3:
                STG.E.64 desc[UR4][R2.64], R4
                @P1 BRA `(.L_x_1)
                EXIT
            """
        )
    ).loops
    assert loop.counts.global_loads == 1
    assert loop.counts.global_bytes == 512 + 256
    assert loop.counts.alu == 0
    assert loop.rare == Counts(issued=1, alu=1)


NESTED = """
.L_x_1:
    BAR.SYNC.DEFER_BLOCKING 0x0
.L_x_2:
    LDG.E.U16 R4, desc[UR4][R2.64]
    STS.U16 [R0], R4
    @P0 BRA `(.L_x_2)
.L_x_3:
    LDS.128 R4, [R0]
    FFMA R8, R4, R5, R8
    FFMA R9, R4, R6, R9
    @P0 BRA `(.L_x_3)
    MUFU.EX2 R7, R6
    @P1 BRA `(.L_x_1)
    EXIT
.L_x_4:
    FMUL R1, R1, R1
    BRA `(.L_x_4)
"""


def test_inner_loops_are_apart_and_the_walk_is_the_one_with_barriers():
    code = analyse(listing(NESTED))
    (walk,) = code.loops
    assert code.main is walk
    copies, products = walk.inner
    assert (copies.counts.global_bytes, copies.counts.shared_bytes) == (64, 64)
    assert (products.counts.ffma, products.counts.shared_bytes) == (2, 512)
    assert walk.counts.ffma == 0
    assert walk.counts.exponentials == 1
    assert [loop.counts for loop in walk.walk()] == [
        walk.counts,
        copies.counts,
        products.counts,
    ]


WARPGROUPS = """
    S2R R0, SR_TID.X
.L_x_1:
    BAR.SYNC.DEFER_BLOCKING 0x1, 0x80
    HGMMA.64x128x16.F32.BF16 R88, gdesc[UR24], RZ, !UPT
    HGMMA.64x128x16.F32.BF16 R88, gdesc[UR24], R88, gsb0
    MUFU.EX2 R7, R6
.L_x_2:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R5+URZ], R4
    @P0 BRA `(.L_x_2)
    HGMMA.64x128x16.F32.BF16 R88, gdesc[UR24], R88
    HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR24], R24, gsb0
    MUFU.EX2 R7, R6
    MUFU.EX2 R8, R6
.L_x_3:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R5+URZ], R4
    @P0 BRA `(.L_x_3)
    @P1 BRA `(.L_x_2)
    FMUL R8, R8, R9
    @P2 BRA `(.L_x_1)
    EXIT
"""


def test_where_warpgroups_multiply_the_innermost_products_are_the_walk():
    code = analyse(listing(WARPGROUPS))
    (rows,) = code.loops
    assert code.main is rows.inner[0]
    turn = code.main.counts
    # Of each product of 64 rows a warp does 16.
    assert turn.multiply_adds == 16 * (128 + 64) * 16
    assert (turn.matrix, turn.exponentials, turn.fma) == (2, 2, 0)
    # Work done once for each tile of rows, the first tile of keys among it.
    assert code.around == rows.counts
    assert (code.around.matrix, code.around.exponentials, code.around.fma) == (2, 1, 1)
    assert analyse(listing(NESTED)).around == Counts()


def test_the_code_of_called_functions_and_of_no_use_is_left_out():
    assert analyse(listing(NESTED)).outside == Counts(issued=1)


def test_only_the_first_kernel_is_read():
    twice = listing(NESTED) + listing(NESTED)
    assert analyse(twice) == analyse(listing(NESTED))


def test_text_without_instructions_is_refused():
    with pytest.raises(ValueError, match="holds no instructions"):
        analyse("nvdisasm fatal: nothing here")
