"""`python -m bench machine-code --against`, on cubins that our own compiler makes."""

import pytest

from bench.machine_code import against
from bench.machine_code.fat_binaries import kernels_in
from bench.machine_code.kernels import NamedKernel
from numflash.configs import Traits, parse_config
from numflash.machine_code.compiler import get_cubin
from numflash.machine_code.sass import disassemble, opcodes
from numflash.runtime.devices import architecture
from tests.support.compilations import CONFIG, LIMITS, TRAITS
from tests.support.covering import thorough
from tests.support.fat_binaries import CUBIN, LZ4, fat_binary, library, wheel

FORWARD = NamedKernel("forward", "sm_80", "float16-d64-dv64-vec", "sm80-m64n64w4s1")


def written(path, code, flags):
    path.write_bytes(wheel(kernels=library(fat_binary((CUBIN, code, flags)))))
    return path


@pytest.mark.parametrize("flags", [0, LZ4], ids=["plain", "lz4"])
def test_a_kernel_of_a_wheel_is_the_one_that_was_compiled(tmp_path, flags):
    cubin = get_cubin(CONFIG, TRAITS, LIMITS)
    (found,) = kernels_in(written(tmp_path / "ours-1.0.whl", cubin.code, flags))
    assert (found.arch, found.name) == (LIMITS.arch, cubin.entry)
    assert (found.registers, found.stack_bytes) == (cubin.registers, cubin.stack_bytes)
    assert found.code.rstrip(b"\0") == cubin.code.rstrip(b"\0")
    assert opcodes(disassemble(found.code, found.symbol)) == opcodes(disassemble(cubin.code))


@thorough
def test_our_kernel_out_of_a_wheel_has_the_row_of_our_kernel(tmp_path):
    traits, limits = Traits.parse(FORWARD.traits), architecture(FORWARD.arch)
    cubin = get_cubin(parse_config(FORWARD.family, FORWARD.config), traits, limits)
    path = written(tmp_path / "ours-1.0.whl", cubin.code, 0)
    lines = against.report([path], "sm_80/", [FORWARD]).splitlines()
    theirs, ours = ([x.strip() for x in line.split("|")] for line in lines[2:4])
    assert theirs[1] == "ours 1" and FORWARD.config in ours[1]
    assert theirs[2:] == ours[2:]
    cells = dict(zip(against.COLUMNS, ours[1:-1], strict=True))
    # 64 x 64 scores of four warps: 32 a thread. Each product is 16 x 8 x 16.
    assert cells["products"] == "64 16816" and int(cells["MUFU"]) == 32
    assert lines[-1].startswith("ours 1: sm_80/")
