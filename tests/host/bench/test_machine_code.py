"""`python -m bench machine-code`: which kernels are compiled, and when one of them got worse."""

import dataclasses
import json

import numpy as np
import pytest

from bench import __main__ as bench
from bench.machine_code import asked, command, compare, figures
from bench.machine_code.kernels import MAIN_ARCHS, is_wanted, kernels
from numflash import masks
from numflash.configs import (
    BLOCK_MASK_CONFIGS,
    FAMILIES,
    MERGING_CONFIGS,
    QUANTIZE_CONFIGS,
    SEQUENCE_CONFIGS,
    Traits,
    fp8,
    parse_config,
    portable,
)
from numflash.configs import mma_rules as sm80
from numflash.configs import wgmma as sm90
from numflash.configs.features import FEATURES
from numflash.functions.trace import trace
from numflash.runtime.arrays import metadata
from numflash.runtime.devices import ARCHITECTURES

NAME = "forward/sm_80/float16-d64-dv64-vec/sm80-m64n64w4s1"
OPCODES = ["LDG.E", "HMMA.16816.F32", "EXIT"]
LOOP = {"issued": 100, "instructions": 180, "products": 64, "opcodes": {"HMMA": 64, "FADD": 36}}
# A loop whose turn may skip a block, and before it a smaller one without products.
SASS = """
        /*0000*/ MOV R1, R2 ;
.L_1:
        /*0010*/ IADD3 R1, R1, 0x1, RZ ;
        /*0020*/ @P1 BRA `(.L_1) ;
.L_2:
        /*0030*/ @P0 BRA `(.L_3) ;
        /*0040*/ FMUL R4, R4, R5 ;
        /*0050*/ FMUL R6, R6, R5 ;
.L_3:
        /*0060*/ HMMA.16816.F32 R8, R12, R2, R8 ;
        /*0070*/ FFMA R4, R4, R5, R6 ;
        /*0080*/ @P2 BRA `(.L_2) ;
.L_4:
        /*0090*/ FFMA R4, R4, R5, R6 ;
        /*00a0*/ @P3 BRA `(.L_4) ;
        /*00b0*/ EXIT ;
"""


def kernel(opcodes=OPCODES, **changes) -> dict:
    """Figures of a kernel that does not exist."""
    return {
        "registers": 128,
        "blocks_per_sm": 4,
        "limited_by": "registers",
        "threads": 128,
        "smem_bytes": 4096,
        "spill_store_bytes": 0,
        "spill_load_bytes": 0,
        "stack_bytes": 0,
        "warnings": [],
        "parameters": [["q", "P"], ["seqlen_q", "i"]],
        "main_loop": LOOP,
        "later_registers": {},
        **figures.of_opcodes(opcodes),
        **changes,
    }


def file(**found) -> dict:
    """A file's content; a kernel that is not given stays as it is."""
    return {
        "schema": 1,
        "made": {"compilers": {}},
        "only": [],
        "kernels": {NAME: kernel()} | found,
    }


def only_difference(**changes) -> compare.Difference:
    """The report on a kernel that changed."""
    after = file(**{NAME: kernel(**changes)})
    (found,) = compare.compare(file(), after)
    return found


@pytest.mark.parametrize(
    ("changes", "verdict", "note"),
    [
        ({"registers": 129, "blocks_per_sm": 3}, "WORSE", "fewer blocks fit on an SM"),
        ({"smem_bytes": 65536, "blocks_per_sm": 3}, "WORSE", "fewer blocks fit on an SM"),
        ({"registers": 129}, "same", "more registers, as many blocks"),
        ({"later_registers": {"inc": 200}}, "same", "named registers"),
        ({"registers": 100}, "better", ""),
        ({"registers": 129, "blocks_per_sm": 5}, "better", "more registers, as many blocks"),
        ({"spill_store_bytes": 4}, "WORSE", "spill store bytes 0 -> 4"),
        ({"spill_load_bytes": 4}, "WORSE", "spill load bytes 0 -> 4"),
        ({"stack_bytes": 8}, "WORSE", "stack bytes 0 -> 8"),
        ({"warnings": ["C7510"]}, "WORSE", "new warnings: C7510"),
        ({"main_loop": LOOP | {"issued": 101}}, "WORSE", "main loop issues 100 -> 101"),
        ({"main_loop": LOOP | {"issued": 99}}, "better", ""),
        ({"main_loop": LOOP | {"overlapped": 1}}, "better", ""),
        ({"main_loop": LOOP | {"instructions": 181}}, "WORSE", "main loop has 180 -> 181"),
        ({"main_loop": LOOP | {"products": 65}}, "same", "the main loop is read in another way"),
        ({"main_loop": None}, "WORSE", "main loop on one side only"),
        ({"opcodes": [*OPCODES, "MOV"]}, "WORSE", "instructions 3 -> 4"),
        ({"opcodes": OPCODES[1:]}, "better", ""),
        ({"opcodes": [*OPCODES[1:], "MOV"]}, "same", "other opcodes"),
        ({"opcodes": [OPCODES[1], OPCODES[0], OPCODES[2]]}, "same", "another order"),
        ({"opcodes": ["LDG.E.128", *OPCODES[1:]]}, "same", "other modifiers"),
        ({"parameters": [["q", "P"], ["seqlen_q", "q"]]}, "same", "parameters Pi -> Pq"),
        ({"smem_bytes": 8192}, "same", "shared memory 4096 -> 8192"),
        ({"threads": 256}, "same", "threads 128 -> 256"),
        ({"registers": 100, "spill_load_bytes": 4}, "WORSE", "spill load bytes"),
    ],
)
def test_what_a_change_is_called(changes, verdict, note):
    found = only_difference(**changes)
    assert found.verdict == verdict
    assert note in "; ".join(found.notes)


def test_a_shorter_overlap_is_worse():
    sides = [file(**{NAME: kernel(main_loop=LOOP | {"overlapped": n})}) for n in (64, 63)]
    (found,) = compare.compare(*sides)
    assert found.verdict == "WORSE" and "overlapped exponentials 64 -> 63" in found.notes[0]


def test_what_fills_up_the_last_line_is_no_change():
    assert compare.compare(file(), file(**{NAME: kernel([*OPCODES, "NOP", "NOP"])})) == []
    (found,) = compare.compare(file(), file(**{NAME: kernel([OPCODES[0], "NOP", *OPCODES[1:]])}))
    assert found.verdict == "WORSE"


def test_names_of_parameters_are_free():
    renamed = kernel(parameters=[["q.data", "P"], ["shape.seqlen_q", "i"]])
    assert compare.compare(file(), file(**{NAME: renamed})) == []


def test_names_of_functions_are_free():
    texts = [f"C7510 in function '_ZN{n}kernel', see _ZN{n}x" for n in ("8old", "9newer")]
    sides = [file(**{NAME: kernel(warnings=[text])}) for text in texts]
    assert compare.compare(*sides) == []


def test_fewer_warnings_are_better():
    (found,) = compare.compare(file(**{NAME: kernel(warnings=["C7510"])}), file())
    assert found.verdict == "better"


def test_a_warning_in_place_of_another_is_worse():
    sides = [file(**{NAME: kernel(warnings=[text])}) for text in ("C7510", "C7504")]
    (found,) = compare.compare(*sides)
    assert found.verdict == "WORSE" and "C7504" in found.notes[0]


@pytest.mark.parametrize(
    ("before", "after", "verdict", "note"),
    [
        (None, kernel(), "same", "new"),
        (None, {"failed": "X"}, "WORSE", "X"),
        (kernel(), None, "WORSE", "gone"),
        (kernel(), {"failed": "RuntimeError: no"}, "WORSE", "RuntimeError: no"),
        ({"failed": "X"}, kernel(), "better", "compiles now"),
        ({"failed": "X"}, None, "WORSE", "gone"),
    ],
)
def test_a_kernel_on_one_side_only(before, after, verdict, note):
    name = NAME.replace("d64", "d128")
    sides = [file(**({} if each is None else {name: each})) for each in (before, after)]
    (found,) = compare.compare(*sides)
    assert (found.kernel, found.verdict) == (name, verdict)
    assert note in found.notes
    assert len(found.row) == len(compare.COLUMNS)


def test_only_what_both_files_asked_for_is_compared():
    backward = NAME.replace("forward", "backward-dq")
    whole, part = file(**{backward: kernel()}), file() | {"only": ["forward"]}
    assert compare.compare(whole, part) == compare.compare(part, whole) == []
    (found,) = compare.compare(whole, file())
    assert found.kernel == backward


def run(tmp_path, capsys, before, after, *options) -> tuple[int, str]:
    """Exit status and output of comparing two files."""
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, content in zip(paths, (before, after), strict=True):
        path.write_text(json.dumps(content))
    status = bench.main(["machine-code", *map(str, paths), *options])
    return status, capsys.readouterr().out


def test_equal_files_pass(tmp_path, capsys):
    assert run(tmp_path, capsys, file(), file()) == (0, "1 kernel compared: no kernel changed\n")


def test_files_without_a_common_kernel_do_not_pass(tmp_path, capsys):
    sides = [file() | {"only": [pattern]} for pattern in ("forward", "delta")]
    sides[1]["kernels"] = {NAME.replace("forward", "delta"): kernel()}
    status, output = run(tmp_path, capsys, *sides)
    assert (status, output) == (1, "the files have no kernel in common\n")


def test_a_worse_kernel_fails_and_comes_first(tmp_path, capsys):
    names = [NAME.replace("d64", f"d{n}") for n in (96, 128, 160)]
    before = file(**dict.fromkeys(names, kernel()))
    after = file(
        **{
            names[0]: kernel(registers=120),
            names[1]: kernel(registers=160, blocks_per_sm=3),
            names[2]: kernel(registers=130),
        }
    )
    status, output = run(tmp_path, capsys, before, after)
    assert status == 1
    rows = [line for line in output.splitlines() if line.startswith("| forward")]
    assert [row.split("|")[2].strip() for row in rows] == ["WORSE", "better", "same"]
    assert "| 128 -> 160 | 4 -> 3 " in " ".join(rows[0].split())
    assert "3 of 4 kernels changed: 1 WORSE, 1 better, 1 same" in output
    assert "1 has more registers and as many blocks on an SM" in output
    del after["kernels"][names[1]], before["kernels"][names[1]]
    assert run(tmp_path, capsys, before, after)[0] == 0


def test_other_compilers_are_named(tmp_path, capsys):
    other = file() | {"made": {"compilers": {"numba": "1"}}}
    assert "other compilers: numba None -> 1" in run(tmp_path, capsys, file(), other)[1]


def test_the_difference_of_opcodes(tmp_path, capsys):
    after = file(**{NAME: kernel([*OPCODES[:2], "NOP", "EXIT"])})
    lines = run(tmp_path, capsys, file(), after, "--diff", "sm_80")[1].splitlines()
    assert f"+++ after {NAME}" in lines and "+NOP" in lines and "-NOP" not in lines
    assert "+NOP" not in run(tmp_path, capsys, file(), after, "--diff", "sm_75")[1]


def test_the_main_loop_has_the_most_products():
    found = figures.main_loop(SASS)
    # One block of two multiplications may be skipped.
    assert (found["issued"], found["instructions"], found["products"]) == (4, 6, 1)
    assert found["opcodes"] == {"BRA": 2, "FFMA": 1, "HMMA": 1}
    of_fma = figures.main_loop(SASS.replace("HMMA.16816.F32", "IMAD"))
    assert (of_fma["issued"], of_fma["products"]) == (2, 1)
    plain = figures.main_loop(SASS.replace("HMMA.16816.F32", "IMAD").replace("FFMA", "FADD"))
    assert plain["instructions"] == plain["products"] == 6
    assert figures.main_loop("        /*0000*/ EXIT ;\n") is None


def test_a_loop_over_columns_is_not_the_main_loop():
    sass = """
.L_1:
        /*0000*/ IADD3 R1, R1, 0x1, RZ ;
.L_2:
        /*0010*/ HMMA.16816.F32 R8, R12, R2, R8 ;
        /*0020*/ @P0 BRA `(.L_2) ;
        /*0030*/ MUFU.EX2 R4, R4 ;
        /*0040*/ @P2 BRA `(.L_1) ;
        /*0050*/ EXIT ;
"""
    found = figures.main_loop(sass)
    assert (found["issued"], found["instructions"]) == (5, 5)
    assert figures.main_loop(sass.replace("EX2", "RCP"))["instructions"] == 2


def test_a_tile_that_is_passed_over_is_no_turn():
    sass = """
.L_1:
        /*0000*/ IADD3 R1, R1, 0x1, RZ ;
        /*0010*/ @P0 BRA `(.L_3) ;
        /*0020*/ HMMA.16816.F32 R8, R12, R2, R8 ;
        /*0030*/ @P1 BRA `(.L_2) ;
        /*0040*/ FSEL R4, R4, R5, P3 ;
.L_2:
        /*0050*/ FADD R4, R4, R5 ;
.L_3:
        /*0060*/ @P2 BRA `(.L_1) ;
        /*0070*/ EXIT ;
"""
    found = figures.main_loop(sass)
    assert found["opcodes"] == {"BRA": 3, "FADD": 1, "HMMA": 1, "IADD3": 1}
    assert (found["issued"], found["instructions"]) == (6, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{file}"], "BEFORE and AFTER, or no file; got 1"),
        (["{file}", "{absent}"], "absent.json"),
        (["{file}", "{other}"], "is no file of"),
        (["--only", "forwards"], "got 'forwards', which matches none"),
        (["--only", "forward/sm_1"], "got 'forward/sm_1', which matches none"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
    ],
)
def test_what_is_refused(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(command, "SIMULATED", False)
    (tmp_path / "file.json").write_text(json.dumps(file()))
    (tmp_path / "other.json").write_text('{"schema": 0}')
    names = {name: tmp_path / f"{name}.json" for name in ("file", "absent", "other")}
    assert bench.main(["machine-code", *(each.format(**names) for each in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_the_simulator_compiles_nothing(capsys, monkeypatch):
    monkeypatch.setattr(command, "SIMULATED", True)
    assert bench.main(["machine-code"]) == 2
    assert "NUMBA_ENABLE_CUDASIM" in capsys.readouterr().err


def test_a_kernel_that_fails_is_named_and_fails_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "SIMULATED", False)

    def compile_or_fail(named):
        return {"failed": "RuntimeError: no"} if named.arch == "sm_86" else kernel()

    monkeypatch.setattr(figures, "figures_of", compile_or_fail)
    out = tmp_path / "new" / "file.json"
    status = bench.main(["machine-code", "--out", str(out), "--only", "delta", "combine/sm_80"])
    output = capsys.readouterr()
    assert status == 1
    assert "delta/sm_86/" in output.out and "RuntimeError: no" in output.out
    content = figures.read(out)
    assert content["only"] == ["delta", "combine/sm_80"]
    assert set(content["made"]) == {"date", "compilers", "sources"}
    assert figures.unpacked(content["kernels"][str(kernels(["delta/sm_80"])[0])]) == OPCODES
    count = len(content["kernels"])
    assert f"{count} of {count} kernels" in output.err


def test_every_config_of_the_tables_is_among_the_kernels():
    found = kernels()
    assert len(set(found)) == len(found)
    named = {(each.family, each.config) for each in found}
    for family in FAMILIES:
        for generation in ("sm75", "sm80"):
            for config in sm80.candidates(family, generation):
                assert (family, str(config)) in named
    for family in ("forward", "backward-dq", "backward-dkdv", "delta", "combine"):
        for config in portable.candidates(family):
            assert (family, str(config)) in named
    for arch, limits in ARCHITECTURES.items():
        assert any(each.arch == arch for each in found)
        for config in fp8.candidates(limits):
            assert ("forward", str(config)) in named
    for head_dim in (64, 128, 192, 256):
        for is_fp8 in (False, True):
            traits = Traits("bfloat16", head_dim, head_dim, fp8=is_fp8)
            for config in sm90.candidates(traits):
                if config.misfit(traits) is None:
                    assert ("forward", str(config.compiled)) in named
    families = {
        *FAMILIES,
        *QUANTIZE_CONFIGS,
        *BLOCK_MASK_CONFIGS,
        *SEQUENCE_CONFIGS,
        *MERGING_CONFIGS,
    }
    assert {each.family for each in found} == families


def test_the_names_of_kernels_can_be_read():
    for each in kernels():
        assert str(parse_config(each.family, each.config)) == each.config
        assert str(Traits.parse(each.traits)) == each.traits
        assert str(each).split("/") == [each.family, each.arch, each.traits, each.config]


@pytest.mark.parametrize(
    ("only", "wanted"),
    [
        ([], True),
        (["forward"], True),
        (["forward/sm_80"], True),
        (["*/sm_80"], True),
        (["backward*", "forward/sm_8?"], True),
        (["backward*"], False),
        (["forward/sm_8"], False),
        (["*/sm_75"], False),
    ],
)
def test_patterns(only, wanted):
    assert is_wanted(NAME, only) is wanted


def test_what_callers_ask_for_is_among_the_kernels():
    """So that the net sees a change of a function, a block mask, a feature or a gradient."""
    only = [f"*/{arch}" for arch in MAIN_ARCHS]
    found = [(each.family, each.arch, Traits.parse(each.traits)) for each in kernels(only)]
    for arch in MAIN_ARCHS:
        families = {family for family, its, _ in found if its == arch}
        assert families >= {*FAMILIES, *BLOCK_MASK_CONFIGS, *SEQUENCE_CONFIGS}
        for row in FEATURES:
            of_row = {f for f, its, traits in found if its == arch and row.name in traits.features}
            assert "forward" in of_row and of_row & {"delta", "backward-dkdv"}, row.name
    for families, changes in asked.ROWS:
        for family in families:
            there = {
                arch
                for each, arch, traits in found
                if each == family and all(getattr(traits, n) == x for n, x in changes.items())
            }
            # The one kernel for all gradients does not fit the shared memory of Turing, and walks
            # over lists on Hopper only.
            lacks = {"sm_75"} if family == "backward" else set()
            lacks |= {"sm_80"} if lacks and {"ragged", "blocks"} & changes.keys() else set()
            assert there == {*MAIN_ARCHS} - lacks
    # None of the traits is forgotten.
    for each in dataclasses.fields(Traits)[3:]:
        assert any(getattr(traits, each.name) != each.default for *_, traits in found), each.name


def test_programs_of_the_net_are_those_of_functions():
    of_aux = {
        "bias": lambda s, b, h, i, j, bias: s + bias[b, h, i, j],
        "bias of keys": lambda s, b, h, i, j, bias: s + bias[b, h, 0, j],
        "table": lambda s, b, h, i, j, table: s + table[h, i - j + 511],
        "gate": lambda s, b, h, i, j, gate: s * gate[h],
        "soft cap": masks.soft_cap(30.0),
    }
    arrays = {
        "bias": np.zeros((1, 2, 3, 4), np.float16),
        "bias of keys": np.zeros((1, 2, 1, 4), np.float16),
        "table": np.zeros((2, 1023), np.float32),
        "gate": np.zeros(2, np.float32),
        "document": np.zeros(4, np.int32),
    }
    masks_of = {"document": masks.document, "causal": masks.causal}
    found = {}
    for name in (*of_aux, *masks_of):
        aux = (metadata(arrays[name], name),) if name in arrays else ()
        found[name] = trace(of_aux.get(name), masks_of.get(name), aux).program.text
    assert found == asked.PROGRAMS
