"""How many blocks on an SM the assembler is promised when it spills."""

import pytest

from numflash.machine_code import compiler
from numflash.machine_code.compiler import Cubin, compile_kernel
from numflash.runtime.devices import KB, architecture

SM_90 = architecture("sm_90a")


def compiled(monkeypatch, of_promise, smem_bytes):
    """(promises in order, the kernel) with a compiler of {promise: (registers, spilled bytes)}."""
    promises = []

    def compile_once(make, limits, min_blocks=None):
        promises.append(min_blocks)
        registers, spill = of_promise[min_blocks]
        return Cubin(
            "k", (), 128, smem_bytes, registers, spill, spill, spill, (), min_blocks, 0.0, b""
        )

    monkeypatch.setattr(compiler, "_compile", compile_once)
    return promises, compile_kernel(lambda: None, SM_90)


def test_a_kernel_that_does_not_spill_is_compiled_once(monkeypatch):
    promises, cubin = compiled(monkeypatch, {None: (128, 0)}, 1 * KB)
    assert promises == [None] and cubin.min_blocks is None


def test_where_shared_memory_limits_the_blocks_they_are_promised_first(monkeypatch):
    # Registers would let four blocks fit, shared memory has room for three.
    found = {None: (128, 20), 3: (168, 0), 1: (216, 0)}
    promises, cubin = compiled(monkeypatch, found, 70 * KB)
    assert promises == [None, 3] and (cubin.min_blocks, cubin.registers) == (3, 168)


def test_what_still_spills_is_promised_one_block(monkeypatch):
    found = {None: (128, 20), 3: (168, 8), 1: (216, 0)}
    promises, cubin = compiled(monkeypatch, found, 70 * KB)
    assert promises == [None, 3, 1] and cubin.min_blocks == 1
    # Of three that spill that which spills least.
    found[1] = 255, 12
    assert compiled(monkeypatch, found, 70 * KB)[1].min_blocks == 3


@pytest.mark.parametrize("smem", [1 * KB, 120 * KB])
def test_where_the_promise_would_leave_no_more_registers_it_is_not_made(monkeypatch, smem):
    # Registers limit the blocks to three; or shared memory to one.
    promises, cubin = compiled(monkeypatch, {None: (168, 16), 1: (209, 0)}, smem)
    assert promises == [None, 1] and cubin.registers == 209


def test_what_the_caller_promises_stays(monkeypatch):
    monkeypatch.setattr(
        compiler,
        "_compile",
        lambda make, limits, n: Cubin("k", (), 128, 0, 168, 8, 8, 8, (), n, 0.0, b""),
    )
    assert compile_kernel(lambda: None, SM_90, 2).min_blocks == 2
