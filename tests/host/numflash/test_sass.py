"""The reading of disassembly, on lines as nvdisasm writes them, and the search for nvdisasm."""

import stat
from importlib import metadata

import pytest

from numflash.machine_code import sass
from numflash.runtime.errors import UnsupportedError

# Of sm_75, sm_90a and sm_120: predicates, uniform predicates, modifiers, labels, reuse flags.
LISTING = """\
	.target	sm_120

//--------------------- .text.kernel --------------------------
	.section	.text.kernel,"ax",@progbits
        .global         kernel
        .type           kernel,@function
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
        /*0010*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/               @P6 LDG.E R4, desc[UR4][R2.64+0x10] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0050*/                   LDS.128 R8, [R0] ;
        /*0060*/                   LDSM.16.M88.4 R8, [R0] ;
        /*0070*/                   MUFU.EX2 R7, R6 ;
        /*0080*/                   MUFU.EX2.F16 R7, R6 ;
        /*0090*/                   MUFU.RCP R7, R6 ;
        /*00a0*/                   FFMA R8, R9.reuse, R10, R8 ;
        /*00b0*/              @!PT FFMA.FTZ R8, R9, R10, R8 ;
        /*00c0*/                   SHFL.BFLY PT, R3, R2, 0x1, 0x1f ;
        /*00d0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00e0*/                   BAR.ARV 0x1, 0x80 ;
        /*00f0*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*00f8*/                   QMMA.16832.F32.E4M3.E4M3 R4, R8, R12, R4 ;
        /*00fc*/                   F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C R5, R7, R6, RZ ;
        /*0100*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], R24, gsb0 ;
        /*0110*/             @!UP0 UTMALDG.2D [UR8], [UR4], desc[URZ] ;
        /*0120*/                   LDL.LU R2, [R1+0x4] ;
        /*0130*/                   STL.64 [R1], R2 ;
        /*0140*/              @UPT STL [R1], R2 ;
.L_x_0:
        /*0150*/               @P1 BRA `(.L_x_0) ;
        /*12340*/                  EXIT ;
        /*12350*/                  NOP;
.L_x_1:
"""


def test_every_instruction_is_read():
    opcodes = sass.opcodes(LISTING)
    assert len(opcodes) == LISTING.count(";")
    assert opcodes[:4] == ["LDC", "IMAD.MOV.U32", "LDG.E.128", "LDG.E"]
    assert opcodes[-3:] == ["BRA", "EXIT", "NOP"]
    assert "BAR.SYNC.DEFER_BLOCKING" in opcodes
    assert "HGMMA.64x128x16.F32" in opcodes


def test_counts():
    assert sass.count_instructions(LISTING) == {
        "HGMMA": 1,
        "QGMMA": 0,
        "HMMA": 1,
        "QMMA": 1,
        "MUFU.EX2": 2,
        "FFMA": 2,
        "F2FP": 1,
        "LDS": 1,
        "LDG": 2,
        "LDGSTS": 1,
        "UTMALDG": 1,
        "SHFL": 1,
        "BAR": 2,
        "LDL": 1,
        "STL": 2,
        "F64": 0,
    }


@pytest.mark.parametrize(
    "line",
    [
        "DFMA R2, R4, R6, R2",
        "@P0 DADD R2, R4, R6",
        "DMUL R2, R4, 0.5",
        "DSETP.GT.AND P0, PT, R2, R4, PT",
        "F2F.F64.F32 R2, R4",
        "F2F.F32.F64 R2, R4",
        "I2F.F64 R2, R4",
        "F2I.F64.TRUNC R2, R4",
        "MUFU.RCP64H R3, R5",
    ],
)
def test_float64_counts(line):
    assert sass.count_instructions(f"        /*0000*/   {line} ;\n")["F64"] == 1


@pytest.mark.parametrize(
    "line",
    ["DEPBAR.LE SB0, 0x1", "IMAD.WIDE R2, R3, R4, R6", "F2F.F16.F32 R2, R4", "LDS.64 R2, [R3]"],
)
def test_what_is_not_float64(line):
    assert sass.count_instructions(f"        /*0000*/   {line} ;\n")["F64"] == 0


def test_nothing_to_count():
    assert set(sass.count_instructions("").values()) == {0}


def listing(text):
    """As nvdisasm writes it: a line that ends in a colon is a label."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return "".join(
        f"{line}\n" if line.endswith(":") else f"        /*{16 * i:04x}*/   {line} ;\n"
        for i, line in enumerate(lines)
    )


def test_basic_blocks():
    blocks = sass.basic_blocks(
        listing("""
        .text.kernel:
        S2R R0, SR_TID.X
        .L_x_0:
        @!P0 BRA `(.L_x_1)
        BSSY B0, `(.L_x_3)
        .L_x_3:
        @PT BRA `(.L_x_2)
        .L_x_1:
        @!P0 BRA P1, `(.L_x_2)
        @!PT BRA `(.L_x_2)
        @P0 EXIT
        BRA P1, `(.L_x_1)
        .L_x_2:
        CALL.REL.NOINC `(slow)
        EXIT
        BRX R2 -0x10
        """)
    )
    assert [[x.name for x in block.instructions] for block in blocks] == [
        ["S2R", "BRA"],
        ["BSSY", "BRA"],
        ["BRA"],
        ["BRA"],
        ["EXIT"],
        ["BRA"],
        ["CALL", "EXIT"],
        ["BRX"],
    ]
    assert [block.successors for block in blocks] == [
        (1, 2),
        (6,),
        (3, 6),
        (4,),
        (5,),
        (6, 2),
        (),
        (),
    ]
    assert blocks[0].instructions[1] == sass.Instruction("!P0", "BRA", "`(.L_x_1)")
    assert sass.basic_blocks("") == []


def test_loops():
    """A loop in a loop, a wait that is repeated out of line, skipped blocks and two sides."""
    blocks = sass.basic_blocks(
        listing("""
        MOV R1, R2
        .L_x_0:
        @P0 BRA `(.L_x_1)
        FMUL R1, R1, R1
        .L_x_1:
        SYNCS.PHASECHK P1, [R1]
        @!P1 BRA `(.L_x_9)
        .L_x_2:
        @P2 BRA `(.L_x_3)
        FADD R1, R1, R1
        BRA `(.L_x_4)
        .L_x_3:
        FFMA R1, R1, R1
        .L_x_4:
        @P3 BRA `(.L_x_2)
        @P4 BRA `(.L_x_0)
        EXIT
        .L_x_9:
        SYNCS.PHASECHK P1, [R1]
        @!P1 BRA `(.L_x_9)
        BRA `(.L_x_2)
        """)
    )
    numbers = {x.operands: n for n, block in enumerate(blocks) for x in block.instructions}
    assert len(blocks) == 12
    found = {frozenset(loop.body): loop.path for loop in sass.loops(blocks)}
    again, inner = {10}, {4, 5, 6, 7}
    outer = {1, 2, 3, 8, 10, 11} | inner
    assert numbers["`(.L_x_2)"] == 11 and numbers["R1, R2"] == 0
    assert found == {
        frozenset(again): (10,),
        frozenset(inner): (4, 6, 7),
        frozenset(outer): (1, 3, 4, 6, 7, 8),
    }


def test_code_that_nothing_reaches_is_no_loop():
    blocks = sass.basic_blocks(
        listing("""
        EXIT
        .L_x_0:
        BRA `(.L_x_0)
        """)
    )
    assert len(blocks) == 2 and sass.loops(blocks) == [] and sass.loops([]) == []


@pytest.fixture
def no_wheel(monkeypatch):
    """As if no pip package had brought a disassembler, and PATH and CUDA_HOME were empty."""

    def files(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(sass.metadata, "files", files)
    for variable in ("PATH", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)


def program(folder, script):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nvdisasm"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_no_disassembler(no_wheel):
    assert sass.find_disassembler() is None
    with pytest.raises(UnsupportedError, match="pip install nvidia-cuda-nvdisasm"):
        sass.disassemble(b"")


def test_disassembler_of_path_and_of_the_toolkit(no_wheel, monkeypatch, tmp_path):
    of_toolkit = program(tmp_path / "cuda" / "bin", "exit 0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert sass.find_disassembler() == of_toolkit
    of_path = program(tmp_path / "bin", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert sass.find_disassembler() == of_path


def test_the_cubin_reaches_the_disassembler(no_wheel, monkeypatch, tmp_path):
    program(tmp_path, 'echo "$1"; while read -r line; do echo "$line"; done < "$2"')
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sass.disassemble(b"machine code\n") == "-c\nmachine code\n"


def test_a_disassembler_that_fails(no_wheel, monkeypatch, tmp_path):
    program(tmp_path, "echo 'nvdisasm fatal: unknown SM' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"cannot read this cubin: .*unknown SM; pip"):
        sass.disassemble(b"")


def test_a_disassembler_that_cannot_start(monkeypatch, tmp_path):
    monkeypatch.setattr(sass, "find_disassembler", lambda: tmp_path)
    with pytest.raises(UnsupportedError, match="cannot be run"):
        sass.disassemble(b"")
