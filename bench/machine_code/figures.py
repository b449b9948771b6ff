"""Figures of a kernel's machine code, and the file that holds them.

The opcode sequence is stored whole, compressed, so that two files tell which instructions differ.
The main loop is the innermost loop with products and exponentials, or with products alone where
there is none: those of tensor cores, or multiply-adds where a kernel has none, or else any
instructions. What a loop inside repeats counts once. Of several main loops, as with and without a
mask, it is the one whose turn issues least. A turn issues what cannot be avoided on the way round
through the block with the most products: a mask can, and so can a whole tile that nothing sees. An
instruction is one issue slot of a scheduler.
"""

import base64
import hashlib
import itertools
import json
import zlib
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from bench.machine_code.kernels import NamedKernel
from numflash.configs import Traits, parse_config
from numflash.machine_code.compiler import get_cubin, versions
from numflash.machine_code.main_loop import MainLoop, read_main_loop, read_setmaxnreg
from numflash.machine_code.sass import Block, Loop, basic_blocks, disassemble, loops, opcodes
from numflash.machine_code.sources import source_hash
from numflash.runtime.devices import architecture, blocks_per_sm
from numflash.runtime.errors import in_one_line

SCHEMA = 1
_TENSOR_PRODUCTS = ("HGMMA", "QGMMA", "HMMA", "QMMA")


def figures_of(kernel: NamedKernel) -> dict:
    """Compile a kernel, or find it in the cache; its figures, or "failed" with the reason."""
    limits = architecture(kernel.arch)
    try:
        config = parse_config(kernel.family, kernel.config)
        cubin = get_cubin(config, Traits.parse(kernel.traits), limits)
        sass = disassemble(cubin.code)
    except Exception as error:
        return {"failed": in_one_line(error)}
    blocks, limited_by = blocks_per_sm(
        limits, cubin.num_threads, cubin.registers, cubin.smem_bytes
    )
    return {
        "registers": cubin.registers,
        "blocks_per_sm": blocks,
        "limited_by": limited_by,
        "threads": cubin.num_threads,
        "smem_bytes": cubin.smem_bytes,
        "spill_store_bytes": cubin.spill_store_bytes,
        "spill_load_bytes": cubin.spill_load_bytes,
        "stack_bytes": cubin.stack_bytes,
        "warnings": list(cubin.warnings),
        "parameters": [list(each) for each in cubin.parameters],
        "main_loop": main_loop(sass),
        "later_registers": {
            action: found.named for action, found in read_setmaxnreg(sass).items()
        },
        **of_opcodes(opcodes(sass)),
    }


def of_opcodes(sequence: list[str]) -> dict:
    """The figures that follow from the opcodes of a kernel in order, with their modifiers.

    NOPs at the end only fill up the last lines of the instruction cache, and are left out.
    """
    end = next((i for i in range(len(sequence), 0, -1) if sequence[i - 1] != "NOP"), 0)
    sequence = sequence[:end]
    text = "\n".join(sequence).encode()
    return {
        "instructions": len(sequence),
        "opcodes": dict(sorted(Counter(name.split(".")[0] for name in sequence).items())),
        "sequence_hash": hashlib.sha256(text).hexdigest()[:16],
        "sequence": base64.b64encode(zlib.compress(text, 9)).decode(),
    }


def main_loop(sass: str) -> dict | None:
    """The main loop of nvdisasm's text; None if the kernel has no loop.

    Returns:
        "issued", instructions of a turn with products; "instructions", all of the loop;
        "products" among them; "opcodes" of what is issued. Of warpgroups' products also
        "overlapped", exponentials that are issued while products are under way, and "clocks".
    """
    blocks = basic_blocks(sass)
    names = [Counter(x.name for x in block.instructions) for block in blocks]
    found = loops(blocks)
    exponentials = [any(x.opcode.startswith("MUFU.EX2") for x in b.instructions) for b in blocks]
    for kind, with_softmax in itertools.product(
        (_TENSOR_PRODUCTS, ("FFMA",), None), (True, False)
    ):
        products = [x.total() if kind is None else sum(x[name] for name in kind) for x in names]
        candidates = [
            loop
            for loop in found
            if any(products[n] for n in loop.body)
            and (any(exponentials[n] for n in loop.body) or not with_softmax)
        ]
        innermost = [x for x in candidates if not any(y.body < x.body for y in candidates)]
        turns = [_turn(blocks, names, loop, products) for loop in innermost]
        if turns:
            turn = min(turns, key=lambda turn: (-turn["products"], turn["issued"]))
            steady = read_main_loop(sass)
            return turn if steady is None else turn | _of_warpgroups(steady)
    return None


def _of_warpgroups(steady: MainLoop) -> dict:
    return {"overlapped": steady.overlapped_exponentials, "clocks": steady.clocks}


def _turn(blocks: list[Block], names: list[Counter], loop: Loop, products: list[int]) -> dict:
    """The figures of a loop; `products` are those of each block."""
    most = max(loop.body, key=lambda n: (products[n], -n))
    passed = sum((names[n] for n in _passed(blocks, loop, most)), Counter())
    return {
        "issued": passed.total(),
        "instructions": sum(names[n].total() for n in loop.body),
        "products": sum(products[n] for n in loop.body),
        "opcodes": dict(sorted(passed.items())),
    }


def _passed(blocks: list[Block], loop: Loop, through: int) -> list[int]:
    """The blocks of a loop that every turn through one of them passes."""
    first = loop.path[0]

    def leads(start: int, end: int, without: int) -> bool:
        seen, pending = set(), [start]
        while pending:
            for number in blocks[pending.pop()].successors:
                if number == end:
                    return True
                if number in loop.body and number != without and number not in seen:
                    seen.add(number)
                    pending.append(number)
        return False

    def is_passed(number: int) -> bool:
        there = first == through or leads(first, through, number)
        return number in (first, through) or not (there and leads(through, first, number))

    return [n for n in loop.body if is_passed(n)]


def unpacked(figures: dict) -> list[str]:
    """The opcode sequence of a kernel's figures."""
    return zlib.decompress(base64.b64decode(figures["sequence"])).decode().split("\n")


def write(path: Path, only: list[str], kernels: dict[str, dict]) -> None:
    """Write figures by kernels' names, a line for each kernel."""
    made = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "compilers": versions(),
        "sources": source_hash(),
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in kernels.items()]
    head = f'{{"schema": {SCHEMA}, "made": {json.dumps(made)}, "only": {json.dumps(only)},'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, '"kernels": {', ",\n".join(lines), "}}", ""]))


def read(path: Path) -> dict:
    """A file that `write` wrote.

    Raises:
        ValueError: it is none.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text())
        if found["schema"] == SCHEMA and isinstance(found["kernels"], dict):
            return found
        reason = f"its schema is {found['schema']!r}, not {SCHEMA}"
    except (ValueError, KeyError, TypeError) as error:
        reason = in_one_line(error)
    raise ValueError(f"{path} is no file of `python -m bench machine-code`: {reason}")
