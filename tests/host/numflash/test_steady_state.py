"""The reading of a main loop, on machine code written by hand as the assembler writes it."""

import pytest

from numflash.machine_code.main_loop import (
    KINDS,
    SKIPPED,
    WARP_PRODUCTS,
    Registers,
    read_main_loop,
    read_main_loops,
    read_setmaxnreg,
)

PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24"
COMMITTED = f"{PRODUCT}, gsb0"
MASK = ["ISETP.GT.AND P0, PT, R1, R2, PT", "FSEL R1, R1, -INF , P0"] * 8
GROWTH = ["MUFU.EX2 R1, R1", "FMUL R2, R2, R1"]
RESCALE = ["FMUL R24, R24, R1"] * 4


def listing(lines):
    return "".join(
        f"{line}\n" if line.endswith(":") else f"        /*{16 * i:04x}*/   {line} ;\n"
        for i, line in enumerate(lines)
    )


def wait(n):
    return f"WARPGROUP.DEPBAR.LE gsb0, {n:#x}"


def skippable(name, lines):
    return [f"@P0 BRA `(.L_{name})", *lines, f".L_{name}:"]


def kernel(softmax, more=()):
    """Two groups, a wait for the first of them, then softmax; `more` at the end of the turn."""
    return listing(
        [
            "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0",
            PRODUCT,
            COMMITTED,
            wait(0),
            "MUFU.EX2 R1, R1",
            ".L_turn:",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1+UR14], R2",
            "@!P0 BRA `(.L_again)",
            ".L_goes_on:",
            "WARPGROUP.ARRIVE",
            PRODUCT,
            COMMITTED,
            PRODUCT,
            PRODUCT,
            COMMITTED,
            wait(1),
            *skippable("masked", MASK),
            "FMNMX R1, R2, R3, !PT",
            "SHFL.BFLY PT, R1, R2, 0x1, 0x1f",
            *skippable("grown", GROWTH),
            *softmax,
            "@!P5 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R1+UR14], RZ",
            "F2FP.BF16.F32.PACK_AB R1, R2, R3",
            *skippable("rescaled", RESCALE),
            *more,
            "@P0 BRA `(.L_turn)",
            "EXIT",
            "USETMAXREG.DEALLOC.CTAPOOL 0x18",
            "EXIT",
            ".L_again:",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1+UR14], R2",
            "@!P0 BRA `(.L_again)",
            "BRA `(.L_goes_on)",
        ]
    )


EXPONENTIALS = ["FFMA R1, R2, R3, R4", "MUFU.EX2 R1, R1", "FADD R2, R2, R1"] * 3


def test_the_wait_stands_behind_the_softmax():
    loop = read_main_loop(kernel([*EXPONENTIALS, wait(0)]))
    assert loop.groups == (2, 3) and loop.waits == (1, 0)
    assert (loop.overlapped_exponentials, loop.exponentials) == (3, 3)
    kinds = {"exponentials": 3, "ffma": 3, "fadd": 3, "fmnmx": 1, "conversions": 1, "shuffles": 1}
    # PHASECHK and ARRIVE, their SYNCS, two waits, and five branches.
    expected = dict.fromkeys(KINDS, 0) | kinds | {"products": 5, "other": 10}
    assert loop.instructions == expected
    assert loop.issued == sum(expected.values())
    skipped = {"mask": 16, "new maximum": 2, "rescaling": 4, "waits": 3, "other": 0}
    assert loop.skipped == skipped and tuple(skipped) == SKIPPED
    # 5 products of 64 x 128 x 16 x 2 FLOP.
    clocks = {"tensor": 5 * 64, "special": 24, "half_rate": 4, "issue": loop.issued}
    assert loop.clocks == clocks


def test_the_wait_stands_before_the_softmax():
    loop = read_main_loop(kernel([wait(0), *EXPONENTIALS]))
    assert (loop.overlapped_exponentials, loop.exponentials) == (0, 3)


def test_the_wait_stands_in_the_middle():
    loop = read_main_loop(kernel([*EXPONENTIALS[:3], wait(0), *EXPONENTIALS[3:]]))
    assert (loop.overlapped_exponentials, loop.exponentials) == (1, 3)


def turn(*lines):
    """A kernel that is one loop."""
    return listing([".L_turn:", *lines, "@P0 BRA `(.L_turn)", "EXIT"])


@pytest.mark.parametrize(
    ("lines", "overlapped"),
    [
        # Under way since the turn before.
        (["MUFU.EX2 R1", wait(0), "MUFU.EX2 R2", COMMITTED], 1),
        (["MUFU.EX2 R1", wait(1), "MUFU.EX2 R2", COMMITTED], 2),
        # Not committed yet, which no wait is for.
        ([PRODUCT, "MUFU.EX2 R1", COMMITTED, wait(0), "MUFU.EX2 R2"], 1),
        ([PRODUCT, wait(0), "MUFU.EX2 R1", COMMITTED, wait(0)], 1),
        ([COMMITTED, COMMITTED, COMMITTED, wait(1), "MUFU.EX2 R1", wait(0), "MUFU.EX2 R2"], 1),
    ],
)
def test_what_is_under_way(lines, overlapped):
    loop = read_main_loop(turn(*lines))
    assert loop.overlapped_exponentials == overlapped
    assert sum(loop.groups) == sum(x in (PRODUCT, COMMITTED) for x in lines)


def test_every_product_waits():
    loop = read_main_loop(turn(*[COMMITTED, wait(0)] * 3, "MUFU.EX2 R1, R1"))
    assert loop.groups == (1, 1, 1) and loop.waits == (0, 0, 0)
    assert loop.overlapped_exponentials == 0


def test_the_smaller_of_two_loops():
    """The compiler may make one loop for tiles that are masked and one for those that are not."""
    with_mask = [".L_first:", COMMITTED, wait(0), *MASK, "@P0 BRA `(.L_first)"]
    without = [".L_second:", COMMITTED, wait(0), "@P0 BRA `(.L_second)"]
    for lines in ([*with_mask, *without], [*without, *with_mask]):
        loop = read_main_loop(listing([*lines, "EXIT"]))
        assert loop.issued == 3


def test_the_innermost_loop():
    """Also where the loop around it skips it, and so has a shorter path."""
    inner = [".L_inner:", *EXPONENTIALS, COMMITTED, wait(0), "@P0 BRA `(.L_inner)"]
    for around in (inner, skippable("none", inner)):
        assert read_main_loop(turn(PRODUCT, *around, PRODUCT)).groups == (1,)


@pytest.mark.parametrize(
    ("product", "clocks"),
    [
        ("HGMMA.64x256x16.F32 R24, R4, gdesc[UR8].tnspB, R24, gsb0", 128),
        ("HGMMA.64x8x16.F32 R24, gdesc[UR8], R24, gsb0", 4),
        ("QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24, gsb0", 64),
    ],
)
def test_clocks_of_a_product(product, clocks):
    loop = read_main_loop(turn(product))
    assert loop.clocks["tensor"] == clocks


def test_what_is_skipped_without_a_known_purpose_is_said():
    loop = read_main_loop(kernel([wait(0), *skippable("odd", ["LDG.E R1, [R2]", "IADD3 R1"])]))
    assert loop.skipped["other"] == 2
    # The longer side of an if and else is such a thing.
    sides = ["@P0 BRA `(.L_else)", "IADD3 R1", "BRA `(.L_end)", ".L_else:", "LDG R1", ".L_end:"]
    assert read_main_loop(kernel([wait(0), *sides])).skipped["other"] == 2


@pytest.mark.parametrize("lines", [[], ["EXIT"], [COMMITTED, "EXIT"], [".L_0:", "BRA `(.L_0)"]])
def test_no_main_loop(lines):
    assert read_main_loop(listing(lines)) is None


def test_registers_of_warps_are_told_apart():
    lines = [
        "MOV R200, R1",
        "@!P0 BRA `(.L_copy)",
        "MOV R201, R1",
        "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0",
        ".L_again:",
        "FFMA R4, R5, R30, R6.reuse",
        "@P0 BRA `(.L_far)",
        "EXIT",
        ".L_copy:",
        "MOV R100, RZ",
        "USETMAXREG.DEALLOC.CTAPOOL 0x18",
        "UTMALDG.4D [UR64], [UR4], desc[UR99]",
        "MOV R2, desc[UR4][R22.64+0x10]",
        "@P0 EXIT",
        "MOV R2, 0x40",
        "EXIT",
        # Out of line as the copying warps' code, but of the others.
        ".L_far:",
        "FMNMX R1, R150, R7, !PT",
        "BRA `(.L_again)",
    ]
    found = read_setmaxnreg(listing(lines))
    assert found == {"inc": Registers(240, 151), "dec": Registers(24, 23)}
    assert read_setmaxnreg(listing(["EXIT"])) == {}
    assert read_setmaxnreg(listing(["USETMAXREG.DEALLOC.CTAPOOL 0x18", "EXIT"])) == {
        "dec": Registers(24, 0)
    }


def test_loops_of_several_roles():
    """One for each set of products, without a mask; products of warps only where asked for."""
    plain = ["WARPGROUP.ARRIVE", COMMITTED, wait(0), "MUFU.EX2 R1, R1"]
    roles = [
        [".L_a:", *plain, *MASK, "@P1 BRA `(.L_a)"],
        [".L_b:", *plain, "@P1 BRA `(.L_b)"],
        [".L_c:", COMMITTED.replace("64x128", "64x64"), *plain, "@P1 BRA `(.L_c)"],
        [".L_d:", "HMMA.16816.F32 R8, R12, R2, R8", "MUFU.EX2 R1, R1", "@P1 BRA `(.L_d)"],
    ]
    sass = listing([line for role in roles for line in role] + ["EXIT"])
    found = read_main_loops(sass)
    assert [loop.shapes for loop in found] == [("1 64x128x16",), ("1 64x64x16", "1 64x128x16")]
    assert [loop.issued for loop in found] == [5, 6]
    assert found[0].opcodes == {"WARPGROUP": 2, "HGMMA": 1, "MUFU": 1, "BRA": 1}
    assert read_main_loop(sass) == found[0]
    (of_warps,) = read_main_loops(sass, WARP_PRODUCTS)
    assert (of_warps.shapes, of_warps.groups, of_warps.issued) == (("1 16816",), (1,), 3)
