"""`python -m bench machine-code --against`: what is read of other compilers' files, and said."""

import sys
from types import SimpleNamespace

import pytest

from bench import __main__ as bench
from bench.machine_code import against, command
from bench.machine_code.fat_binaries import kernels_in, lz4_decompressed
from numflash.runtime.errors import UnsupportedError
from tests.support.fat_binaries import CUBIN, LZ4, PTX, ZSTD, cubin, fat_binary, library, wheel

TWO = cubin({"_Z7forwardPf": (168, 0), "_Z8backwardPf": (255, 40)})
# A loop of a warpgroup: two products, four exponentials of 32 while one of them is under way.
SASS = """
        /*0000*/ USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ;
.L_1:
        /*0010*/ UMOV UR7, 0x40000040 ;
        /*0020*/ R2UR UR6, R4 ;
        /*0030*/ WARPGROUP.ARRIVE ;
        /*0040*/ HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*0050*/ HGMMA.64x128x16.F32.BF16 R56, R8, gdesc[UR6].tnspB, R56, gsb0 ;
        /*0060*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
{exponentials}
        /*0070*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/ FFMA R24, R24, R5, R6 ;
        /*0090*/ LDSM.16.M88.4 R200, [R3] ;
        /*00a0*/ STL [R1], R201 ;
        /*00b0*/ UTMALDG.4D [UR8], [UR10], desc[URZ] ;
        /*00c0*/ @P0 BRA `(.L_1) ;
        /*00d0*/ LDL R7, [R1] ;
        /*00e0*/ EXIT ;
""".format(exponentials="\n".join(["        /*0061*/ MUFU.EX2 R24, R24 ;"] * 34))


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path


def names(found):
    return [str(kernel) for kernel in found]


BOTH = ["sm_90/_Z7forwardPf", "sm_90/_Z8backwardPf"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("kernel.cubin", TWO),
        ("peer.so", library(fat_binary((PTX, b"ptx", 0), (CUBIN, TWO, 0)))),
        ("packed.so", library(fat_binary((CUBIN, TWO, LZ4)))),
        ("twice.so", library(*[fat_binary((CUBIN, TWO, 0))] * 2)),
        ("peer-1.0-py3-none-any.whl", wheel(a=library(fat_binary((CUBIN, TWO, LZ4))), b=b"")),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_kernels_are_found_wherever_cubins_lie(tmp_path, name, content):
    path = write(tmp_path, name, content)
    (tmp_path / "empty.txt").write_bytes(b"")
    for given in (path, tmp_path):
        found = kernels_in(given)
        assert names(found) == BOTH
        assert [(x.registers, x.stack_bytes, x.symbol) for x in found] == [
            (168, 0, 1),
            (255, 40, 2),
        ]
        assert all(x.code.rstrip(b"\0") == TWO.rstrip(b"\0") for x in found)
    assert names(kernels_in(path, "sm_90/.*backward")) == BOTH[1:]


def test_kernels_of_one_name_in_a_folder_are_others(tmp_path, monkeypatch):
    """Compilers at run time write a file for each shape, whose kernels are called alike."""
    for name, registers in (("peer-d64", 168), ("peer-d128", 255)):
        write(tmp_path, f"{name}.cubin", cubin({"kernel": (registers, 0)}))
    assert [kernel.registers for kernel in kernels_in(tmp_path)] == [255, 168]
    monkeypatch.setattr(against, "disassemble", lambda code, symbol: SASS)
    text = against.report([tmp_path], "", [])
    assert "| peer-d128 1 " in text and "peer-d64 1: sm_90/kernel" in text


def test_the_gpu_of_a_cubin_of_older_compilers(tmp_path):
    path = write(tmp_path, "old.cubin", cubin({"k": (1, 2)}, flags=0x5A0556, version=7))
    assert names(kernels_in(path)) == ["sm_86/k"]


def test_zstd_needs_a_decoder(tmp_path, monkeypatch):
    path = write(tmp_path, "peer.so", library(fat_binary((CUBIN, b"packed", ZSTD))))
    monkeypatch.setitem(sys.modules, "compression", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UnsupportedError, match="pip install zstandard"):
        kernels_in(path)
    decoder = SimpleNamespace(decompress=lambda data: {b"packed": TWO[:6]}[data])
    zstandard = SimpleNamespace(ZstdDecompressor=lambda: decoder)
    monkeypatch.setitem(sys.modules, "zstandard", zstandard)
    # Decompressed, it must have the bytes that were announced, and be a cubin.
    with pytest.raises(ValueError, match=r"peer\.so: a cubin cannot be read"):
        kernels_in(path)
    monkeypatch.setattr(decoder, "decompress", lambda data: TWO)
    with pytest.raises(ValueError, match=f"a cubin of 6 bytes was decompressed to {len(TWO)}"):
        kernels_in(path)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"hello", "holds no cubin"),
        (b"", "holds no cubin"),
        (wheel(a=b"host code"), "holds no cubin"),
        (library(fat_binary((PTX, b"ptx", 0))), "holds no cubin"),
        (TWO[:200], "file: a cubin cannot be read"),
        (library(fat_binary((CUBIN, TWO[:100], 0))), "file: a cubin cannot be read"),
        (library(fat_binary((CUBIN, TWO, 0)))[:-9], "holds no cubin"),
    ],
)
def test_files_without_a_cubin_and_damaged_ones(tmp_path, content, error):
    with pytest.raises(ValueError, match=error):
        kernels_in(write(tmp_path, "file", content))


def test_names_that_match_nothing(tmp_path):
    path = write(tmp_path, "kernel.cubin", TWO)
    with pytest.raises(ValueError, match=r"holds 1 cubins, and no kernel that matches 'sm_80'"):
        kernels_in(path, "sm_80")


def test_lz4():
    text = b"abcabcabcabcabcabcabcabcabcabcX" * 20
    # 3 literals, then 4 + 15 + 8 bytes from 3 back; 1 literal, then 4 + 15 + 255 + 0 from 31 back.
    block = b"\x3fabc\x03\0\x08" + b"\x1fX\x1f\0\xff\x00" + b"\x50cabcX"
    out = lz4_decompressed(block)
    assert out == (text[:30] + b"X" + (text * 2)[:274] + b"cabcX")
    assert lz4_decompressed(b"\x00") == b"" and lz4_decompressed(b"") == b""
    for cut in (b"\x30ab", b"\x3fabc\x03", b"\xf0", b"\x3fabc\x03\0"):
        with pytest.raises(ValueError, match="cut short"):
            lz4_decompressed(cut)
    for back in (b"\x30abc\x04\0", b"\x30abc\0\0"):
        with pytest.raises(ValueError, match="bytes back from 3"):
            lz4_decompressed(back)


def test_a_turn_by_pipes():
    budget = against.budget_of(SASS, 168, 16)
    (row,) = against.rows_of("peer 1", budget)
    cells = dict(zip(against.COLUMNS, row, strict=True))
    assert cells == {
        "kernel": "peer 1",
        "products": "1 64x64x16 + 1 64x128x16",
        "clocks": "96",
        "slots": "46",
        # 34 exponentials: two of them are not of scores.
        "/score": f"{46 / 32:.2f}",
        "overlapped": "34 of 34",
        "MUFU": "34",
        "FFMA": "1",
        "FMUL": "0",
        "FADD": "0",
        "FMNMX": "0",
        "F2FP": "0",
        "SHFL": "0",
        "LDS, STS": "1",
        "uniform": "2",
        "barriers": "3",
        "branches": "1",
        "others": "2",
        "registers": "168, 202",
        "local": "1 of 2",
        "stack": "16",
    }


def test_every_instruction_has_a_pipe():
    pipes = {
        "USEL": "uniform",
        "UTMASTG": "others",
        "UBLKCP": "others",
        "R2UR": "uniform",
        "STSM": "LDS, STS",
        "QGMMA": "products",
        "FMNMX3": "FMNMX",
        "IMAD": "others",
        "BSYNC": "branches",
    }
    assert {opcode: against.pipe_of(opcode) for opcode in pipes} == pipes


def test_rows_that_are_equal_are_one(tmp_path, monkeypatch):
    path = write(tmp_path, "fa3_fwd-1.0.whl", wheel(a=library(fat_binary((CUBIN, TWO, 0)))))
    monkeypatch.setattr(against, "disassemble", lambda code, symbol: SASS)
    monkeypatch.setattr(against, "defaults", lambda archs: {("sm_90a",): []}[tuple(archs)])
    lines = against.report([path], "", None).splitlines()
    rows = [line for line in lines if line.startswith("| fa3_fwd")]
    # Their stacks differ, by which they are two rows; without that they are one.
    assert [row.split(" | ")[0] for row in rows] == ["| fa3_fwd 1", "| fa3_fwd 2"]
    assert lines[-2:] == [f"fa3_fwd {i + 1}: {name}" for i, name in enumerate(BOTH)]
    same = cubin({"_Z7forwardPf": (168, 0), "_Z8backwardPf": (168, 0)})
    path = write(tmp_path, "fa3_fwd-1.0.whl", wheel(a=library(fat_binary((CUBIN, same, 0)))))
    assert "| fa3_fwd 1, 2 | 1 64x64x16" in against.report([path], "", [])


def test_a_kernel_without_products_has_no_row(tmp_path, monkeypatch):
    path = write(tmp_path, "kernel.cubin", TWO)
    monkeypatch.setattr(against, "disassemble", lambda code, symbol: "/*0000*/ EXIT ;")
    with pytest.raises(ValueError, match="no kernel that matches has a loop with products"):
        against.report([path], "", [])


def test_hundreds_of_kernels_must_be_chosen_from(tmp_path):
    kernels = {f"_Z5many{i}": (32, 0) for i in range(against.MOST_KERNELS + 1)}
    path = write(tmp_path, "kernel.cubin", cubin(kernels))
    with pytest.raises(ValueError, match=r"65 kernels match, at most 64 .*--matching REGEX"):
        list(against.foreign_budgets([path], ""))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--against", "{missing}"], "No such file"),
        (["--against", "{empty}"], "holds no cubin"),
        (["--against", "{cubin}", "--matching", "["], "--matching '[' is no regex"),
        (["{cubin}", "{cubin}", "--against", "{cubin}"], "stands without BEFORE and AFTER"),
        (["--against", "{cubin}", "--matching", "sm_80"], "no kernel that matches"),
        (["--against", "{cubin}", "--only", "sideways"], "--only must name kernels"),
        (["--matching", "sm_80"], "--matching stands with --against only"),
    ],
)
def test_misuse(tmp_path, monkeypatch, capsys, arguments, error):
    monkeypatch.setattr(command, "SIMULATED", False)
    paths = {
        "missing": tmp_path / "missing",
        "empty": write(tmp_path, "empty", b""),
        "cubin": write(tmp_path, "kernel.cubin", TWO),
    }
    assert bench.main(["machine-code", *(each.format(**paths) for each in arguments)]) == 2
    assert error in capsys.readouterr().err
