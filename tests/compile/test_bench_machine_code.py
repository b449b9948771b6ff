"""`python -m bench machine-code` on one kernel: figures as the compiler and the text have them."""

from dataclasses import replace

from bench import __main__ as bench
from bench.machine_code import asked, figures
from bench.machine_code.kernels import kernels
from numflash.configs import Traits, parse_config
from numflash.machine_code.compiler import get_cubin
from numflash.machine_code.sass import disassemble, opcodes
from numflash.runtime.devices import architecture
from tests.support.covering import thorough


@thorough
def test_a_kernel_is_read_whole_and_equals_itself(tmp_path, capsys):
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, jobs in zip(paths, ("1", "2"), strict=True):
        command = ["machine-code", "--out", str(path), "--jobs", jobs, "--only", "combine/sm_75"]
        assert bench.main(command) == 0
    assert bench.main(["machine-code", *map(str, paths)]) == 0
    assert "no kernel changed" in capsys.readouterr().out
    (named,) = kernels(["combine/sm_75"])
    found = figures.read(paths[0])["kernels"][str(named)]
    traits, limits = Traits.parse(named.traits), architecture(named.arch)
    cubin = get_cubin(parse_config(named.family, named.config), traits, limits)
    sequence = opcodes(disassemble(cubin.code))
    while sequence[-1] == "NOP":
        sequence.pop()
    assert figures.unpacked(found) == sequence
    assert sum(found["opcodes"].values()) == found["instructions"] == len(sequence)
    assert found["registers"] == cubin.registers > 0
    assert [letter for _, letter in found["parameters"]].count("P") >= 3
    assert 0 < found["main_loop"]["issued"] <= found["main_loop"]["instructions"]
    assert found["blocks_per_sm"] > 0 and found["spill_store_bytes"] == 0


def test_a_kernel_with_a_function_is_told_from_one_without():
    """Its name holds the function's text, by which it is compiled again."""
    (named,) = kernels(["mask-tiles/sm_75"])
    assert Traits.parse(named.traits).program == asked.PROGRAMS["document"]
    found = figures.figures_of(named)
    assert found["registers"] > 0 and found["spill_store_bytes"] == 0
    causal = replace(Traits.parse(named.traits), program=asked.PROGRAMS["causal"])
    other = figures.figures_of(replace(named, traits=str(causal)))
    assert other["instructions"] < found["instructions"]
