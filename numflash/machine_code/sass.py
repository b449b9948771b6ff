"""Machine code as text: NVIDIA's disassembler, and its output, counted and taken apart.

Instructions are counted by opcode, or read as basic blocks with the jumps between them, and loops
are found in these. `main_loop` reads the work of a loop.

`nvdisasm` comes from pip (`nvidia-cuda-nvdisasm`, which reads the cubins of every CUDA version) or
with a CUDA toolkit. It needs neither GPU nor driver.
"""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from heapq import heappop, heappush
from importlib import metadata
from pathlib import Path

from numflash.runtime.errors import UnsupportedError

INSTALL_HINT = "pip install nvidia-cuda-nvdisasm brings one"

COUNTED = (
    "HGMMA",
    "QGMMA",
    "HMMA",
    "QMMA",
    "MUFU.EX2",
    "FFMA",
    "F2FP",
    "LDS",
    "LDG",
    "LDGSTS",
    "UTMALDG",
    "SHFL",
    "BAR",
    "LDL",
    "STL",
)
"""Opcodes that are counted one by one, whatever modifiers follow them.

QMMA and QGMMA multiply 8-bit floats, HMMA and HGMMA 16-bit ones: a kernel on 8-bit floats
that consists of HMMA converts them first, by F2FP from sm_89 on.
"""

_DISTRIBUTION = "nvidia-cuda-nvdisasm"
# Arithmetic in float64, and conversions from and to it.
_F64_OPCODES = {"DFMA", "DADD", "DMUL", "DSETP", "DMNMX", "DMMA"}
_F64_MODIFIERS = {"F64", "RCP64H", "RSQ64H"}
# /*0230*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P(?:\d+|T)\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)",
    re.MULTILINE,
)
# A label, or an instruction with its guard and operands.
_LINE = re.compile(
    r"^(?P<label>\.\w+):"
    r"|^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@(?P<guard>!?U?P(?:\d+|T))\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_]*(?:\.\w+)*)(?P<operands>[^;]*);",
    re.MULTILINE,
)
_TARGET = re.compile(r"^(?P<conditions>.*?)`\((?P<label>\.\w+)\)")
_ALWAYS, _NEVER = (None, "PT", "UPT"), ("!PT", "!UPT")
# Nothing follows these, unless a guard skips them.
_ENDS = {"BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU", "EXIT", "RET", "KILL"}


@dataclass(frozen=True)
class Instruction:
    """An instruction: its guard as in "!P0" or None, opcode with modifiers, operands as text."""

    guard: str | None
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".", 1)[0]


@dataclass(frozen=True)
class Block:
    """Instructions that always run together, and the blocks that may be next, by their number."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """A natural loop, as numbers of blocks.

    Attributes:
        body: every block of it, those of loops inside included.
        path: the blocks of the turn that takes the fewest instructions, in order, from the one
            where it is entered. A block that a branch may skip is not among them, of an if and
            else the longer side is not.
    """

    body: frozenset[int]
    path: tuple[int, ...]


def find_disassembler() -> Path | None:
    """nvdisasm of the pip package, of PATH or of the CUDA toolkit; None if there is none."""
    try:
        files = metadata.files(_DISTRIBUTION) or ()
    except metadata.PackageNotFoundError:
        files = ()
    for file in files:
        if file.stem == "nvdisasm" and file.locate().is_file():
            return Path(file.locate())
    if on_path := shutil.which("nvdisasm"):
        return Path(on_path)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if toolkit := os.environ.get(variable):
            found = shutil.which("nvdisasm", path=os.path.join(toolkit, "bin"))
            if found is not None:
                return Path(found)
    return None


def disassemble(code: bytes, symbol: int | None = None) -> str:
    """The text of a cubin's kernels, or of the one with this number in its table of symbols.

    Raises:
        UnsupportedError: there is no disassembler, or it does not know this GPU.
    """
    program = find_disassembler()
    if program is None:
        raise UnsupportedError(f"there is no disassembler; {INSTALL_HINT}")
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(code)
        only = [] if symbol is None else ["-fun", str(symbol)]
        try:
            done = subprocess.run([program, "-c", *only, cubin], capture_output=True, text=True)
        except OSError as error:
            raise UnsupportedError(f"{program} cannot be run: {error}; {INSTALL_HINT}") from error
    if done.returncode:
        raise UnsupportedError(
            f"{program} cannot read this cubin: {' '.join(done.stderr.split())}; {INSTALL_HINT}"
        )
    return done.stdout


def opcodes(sass: str) -> list[str]:
    """The opcode of every instruction, in order, with its modifiers: "LDG.E.128"."""
    return _INSTRUCTION.findall(sass)


def count_instructions(sass: str) -> dict[str, int]:
    """Count each opcode of `COUNTED`; "F64" counts all instructions in float64."""
    counts = dict.fromkeys((*COUNTED, "F64"), 0)
    for opcode in opcodes(sass):
        name, *modifiers = opcode.split(".")
        for counted in (name, ".".join([name, *modifiers[:1]])):
            if counted in COUNTED:
                counts[counted] += 1
                break
        if name in _F64_OPCODES or not _F64_MODIFIERS.isdisjoint(modifiers):
            counts["F64"] += 1
    return counts


def basic_blocks(sass: str) -> list[Block]:
    """The basic blocks of a kernel, the entry first, in the order of their addresses.

    A call is taken to come back to where it was made; where an indirect jump leads is not known.
    """
    lines = list(_LINE.finditer(sass))
    branches = (line for line in lines if (line["opcode"] or "").split(".")[0] == "BRA")
    targets = {found["label"] for line in branches if (found := _jump(line["operands"]))}
    groups: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for line in lines:
        if label := line["label"]:
            if label in targets:
                if groups[-1]:
                    groups.append([])
                labels[label] = len(groups) - 1
            continue
        instruction = Instruction(line["guard"], line["opcode"], line["operands"].strip())
        groups[-1].append(instruction)
        if instruction.name in _ENDS:
            groups.append([])
    if not groups[-1]:
        groups.pop()
    return [
        Block(tuple(group), _successors(group[-1], number, labels, len(groups)))
        for number, group in enumerate(groups)
    ]


def _jump(operands: str) -> re.Match | None:
    """A branch's further condition, besides its guard, and its label."""
    return _TARGET.match(operands.strip())


def _successors(last: Instruction, number: int, labels: dict[str, int], end: int) -> tuple:
    """The numbers of the blocks that may follow one whose last instruction this is."""
    following = (number + 1,) if number + 1 < end else ()
    if last.name not in _ENDS or last.guard in _NEVER:
        return following
    jump = _jump(last.operands) if last.name == "BRA" else None
    target = (labels[jump["label"]],) if jump is not None and jump["label"] in labels else ()
    if last.guard in _ALWAYS and not (jump and jump["conditions"]):
        return target
    return tuple(dict.fromkeys(following + target))


def loops(blocks: list[Block]) -> list[Loop]:
    """The natural loops: jumps back to a block without which the jump cannot be reached."""
    dominators, predecessors = _dominators(blocks)
    latches: dict[int, list[int]] = {}
    for number, block in enumerate(blocks):
        for header in block.successors:
            if number in dominators and dominators[number] >> header & 1:
                latches.setdefault(header, []).append(number)
    found = []
    for header, ends in latches.items():
        body, pending = {header}, list(ends)
        while pending:
            number = pending.pop()
            if number not in body:
                body.add(number)
                pending += predecessors[number]
        found.append(Loop(frozenset(body), _shortest(blocks, header, body, set(ends))))
    return found


def _shortest(blocks: list[Block], header: int, body: set[int], ends: set[int]) -> tuple[int, ...]:
    """The way from a loop's header to a jump back that takes the fewest instructions."""
    pending, seen = [(len(blocks[header].instructions), (header,))], set()
    while pending:
        length, way = heappop(pending)
        if way[-1] in ends:
            return way
        if way[-1] not in seen:
            seen.add(way[-1])
            for number in set(blocks[way[-1]].successors) & body - seen:
                heappush(pending, (length + len(blocks[number].instructions), (*way, number)))
    return (header,)


def _dominators(blocks: list[Block]) -> tuple[dict[int, int], dict[int, list[int]]]:
    """Of each block that can be reached: its dominators as a set of bits, and its predecessors."""
    predecessors: dict[int, list[int]] = {0: []} if blocks else {}
    pending = list(predecessors)
    while pending:
        number = pending.pop()
        for successor in blocks[number].successors:
            if successor not in predecessors:
                predecessors[successor] = []
                pending.append(successor)
            predecessors[successor].append(number)
    everything = (1 << len(blocks)) - 1
    dominators = {number: everything for number in sorted(predecessors)}
    if blocks:
        dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for number in dominators:
            if number == 0:
                continue
            common = everything
            for predecessor in predecessors[number]:
                common &= dominators[predecessor]
            common |= 1 << number
            changed |= common != dominators[number]
            dominators[number] = common
    return dominators, predecessors
