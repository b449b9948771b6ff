"""The main loop of a `wgmma` kernel, one turn for each tile of keys, read from machine code.

The main loop is the innermost loop that holds products of warpgroups. Its path is the shortest
turn: blocks that a branch can skip are left out, because in the steady state it skips them, and
of an if and else the longer side. They are sorted by their content, so that nothing is left out
unseen:

    mask            more than half compares integers and selects, for tiles that an edge crosses
    new maximum     holds exponentials, and is run by a warp where a row's maximum has grown
    rescaling       more than half are multiplications, of O after a new maximum
    waits           waits for an mbarrier again
    other           anything else: the tiles at a sequence's end of a function that reads arrays

Instructions whose guard is false still take the place of one, and count.

The clocks of an SM that a turn takes at least of each unit are those of one warpgroup, which has a
warp on each of the four schedulers. Where several share the SM each takes as many.

    tensor          4096 FLOP a clock of 16-bit operands, 8192 of 8-bit ones
    special         16 exponentials or other special functions a clock: 8 for a warp's instruction
    half_rate       64 minima, maxima or conversions a clock: 2
    issue           one instruction a clock and scheduler: 1

Source of the rates: CUDA C++ Programming Guide, throughput of native arithmetic instructions,
compute capability 9.0; NVIDIA H100 Tensor Core GPU Architecture, dense rates.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from numflash.machine_code.sass import Block, Instruction, Loop, basic_blocks, loops

PRODUCTS = ("HGMMA", "QGMMA")
WARP_PRODUCTS = ("HMMA", "QMMA")
"""Products of single warps, which are finished before the next instruction reads them."""
_KINDS = {
    "FFMA": "ffma",
    "FMUL": "fmul",
    "FADD": "fadd",
    "FMNMX": "fmnmx",
    "FMNMX3": "fmnmx",
    "F2FP": "conversions",
    "SHFL": "shuffles",
    "HGMMA": "products",
    "QGMMA": "products",
}
KINDS = ("exponentials", "other_special", *dict.fromkeys(_KINDS.values()), "other")
"""Kinds of instructions that are counted; `other_special` are the other functions of MUFU."""
SKIPPED = ("mask", "new maximum", "rescaling", "waits", "other")
"""Kinds of blocks that the path leaves out."""
_FLOP_PER_CLOCK = {"HGMMA": 4096, "QGMMA": 8192}
_SPECIAL_CLOCKS, _HALF_RATE_CLOCKS = 8, 2
_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)\b")
_REGISTER = re.compile(r"\bR(\d+)")
_WAIT = re.compile(r"gsb0\s*,\s*(0x[0-9a-f]+)")
# A wait is repeated by few instructions.
_LONGEST_WAIT = 8


@dataclass(frozen=True)
class MainLoop:
    """The steady state of a main loop; see the module.

    Attributes:
        groups: products issued before each commit, in order; a last number without a commit of
            its own would be products that the next turn commits.
        waits: groups that may still be under way after each wait, in order.
        overlapped_exponentials: exponentials of the path that are issued while this warpgroup has
            products under way.
        instructions: of the path, by kind (`KINDS`).
        skipped: instructions that the path leaves out, by their purpose (`SKIPPED`).
        clocks: the least that a turn takes of each unit.
        opcodes: of the path, by opcode without modifiers.
        shapes: of the path's products, m x n x k as their opcodes have it, how many of each a
            group has: "8 64x128x16"; in order.
    """

    groups: tuple[int, ...]
    waits: tuple[int, ...]
    overlapped_exponentials: int
    instructions: dict[str, int]
    skipped: dict[str, int]
    clocks: dict[str, int]
    opcodes: dict[str, int]
    shapes: tuple[str, ...]

    @property
    def exponentials(self) -> int:
        """Exponentials of the path."""
        return self.instructions["exponentials"]

    @property
    def issued(self) -> int:
        """Instructions of the path."""
        return sum(self.instructions.values())


def read_main_loop(sass: str) -> MainLoop | None:
    """The main loop of a kernel, of nvdisasm's text; None if no loop has products of warpgroups.

    Where the compiler has made several of it, the one with the fewest instructions on its path.
    """
    return min(read_main_loops(sass), key=lambda loop: loop.issued, default=None)


def read_main_loops(sass: str, products: Sequence[str] = PRODUCTS) -> list[MainLoop]:
    """The innermost loops with products, one of each role.

    Roles differ in their products, or in whether they have exponentials. Of several alike, as with
    and without a mask, the one with the fewest instructions on its path.
    """
    blocks = basic_blocks(sass)
    with_products = [x for x in loops(blocks) if _has_products(blocks, x.body, products)]
    innermost = [x for x in with_products if not any(y.body < x.body for y in with_products)]
    best: dict[tuple, MainLoop] = {}
    for loop in sorted((_read(blocks, x) for x in innermost), key=lambda loop: loop.issued):
        best.setdefault((tuple(sorted(loop.shapes)), loop.exponentials > 0), loop)
    return list(best.values())


@dataclass(frozen=True)
class Registers:
    """Registers that `setmaxnreg` leaves a thread of some warps.

    Attributes:
        available: registers a thread.
        named: one more than the highest that an instruction after it names, as the first of a
            vector, say.
    """

    available: int
    named: int


def read_setmaxnreg(sass: str) -> dict[str, Registers]:
    """The registers of the warps that give some back ("dec") and of those that take them ("inc").

    Warps are told apart by the blocks that can be reached from their `setmaxnreg`.
    """
    blocks, found = basic_blocks(sass), {}
    for block in blocks:
        for i, x in enumerate(block.instructions):
            if x.name == "USETMAXREG":
                action = "dec" if "DEALLOC" in x.opcode else "inc"
                later = [*block.instructions[i + 1 :], *_reached(blocks, block.successors)]
                named = [int(n) for y in later for n in _REGISTER.findall(y.operands)]
                available = int(x.operands.split(",")[-1], 16)
                found[action] = Registers(available, max(named, default=-1) + 1)
    return found


def _reached(blocks: list[Block], numbers: Iterable[int]) -> list[Instruction]:
    """All instructions of blocks that may run after these have begun."""
    seen: set[int] = set()
    pending = list(numbers)
    while pending:
        number = pending.pop()
        if number not in seen:
            seen.add(number)
            pending += blocks[number].successors
    return [x for number in seen for x in blocks[number].instructions]


def _has_products(blocks: list[Block], numbers: Iterable[int], products: Sequence[str]) -> bool:
    return any(x.name in products for n in numbers for x in blocks[n].instructions)


def _read(blocks: list[Block], loop: Loop) -> MainLoop:
    path = [x for number in loop.path for x in blocks[number].instructions]
    groups, shapes, under_way = [], [], Counter()
    for x in path:
        if (shape := _shape(x)) is not None:
            under_way[shape] += 1
        if under_way and (_commits(x) or x is path[-1]):
            groups.append(under_way.total())
            shapes += [f"{count} {shape}" for shape, count in under_way.items()]
            under_way = Counter()
    counts = dict.fromkeys(KINDS, 0) | Counter(map(_kind, path))
    special = counts["exponentials"] + counts["other_special"]
    return MainLoop(
        groups=tuple(groups),
        waits=tuple(n for x in path if (n := _waits_for(x)) is not None),
        overlapped_exponentials=_overlapped(path),
        instructions=counts,
        skipped=_skipped(blocks, loop),
        clocks={
            "tensor": round(sum(map(_tensor_clocks, path))),
            "special": _SPECIAL_CLOCKS * special,
            "half_rate": _HALF_RATE_CLOCKS * (counts["fmnmx"] + counts["conversions"]),
            "issue": len(path),
        },
        opcodes=dict(Counter(x.name for x in path)),
        shapes=tuple(shapes),
    )


def _kind(x: Instruction) -> str:
    if x.name == "MUFU":
        return "exponentials" if x.opcode.startswith("MUFU.EX2") else "other_special"
    return _KINDS.get(x.name, "other")


def _commits(x: Instruction) -> bool:
    return x.name in PRODUCTS and "gsb0" in x.operands


def _waits_for(x: Instruction) -> int | None:
    """Groups that a wait leaves under way; None if this is none."""
    found = _WAIT.search(x.operands) if x.opcode.startswith("WARPGROUP.DEPBAR") else None
    return int(found[1], 16) if found else None


def _shape(x: Instruction) -> str | None:
    """m x n x k of a product, as its opcode has it: "64x128x16", or "16816" of a warp's."""
    if x.name not in PRODUCTS + WARP_PRODUCTS:
        return None
    found = _SHAPE.search(x.opcode)
    return found[0][1:] if found else x.opcode.partition(".")[2].split(".")[0]


def _tensor_clocks(x: Instruction) -> float:
    shape = _SHAPE.search(x.opcode)
    if x.name not in PRODUCTS or shape is None:
        return 0.0
    m, n, k = map(int, shape.groups())
    return 2 * m * n * k / _FLOP_PER_CLOCK[x.name]


def _overlapped(path: list[Instruction]) -> int:
    """Exponentials issued while products are under way, in the second of two turns."""
    under_way, has_open, found = 0, False, 0
    for x in path + path:
        if x is path[0]:
            found = 0
        if x.name in PRODUCTS:
            has_open = not _commits(x)
            under_way += not has_open
        elif (left := _waits_for(x)) is not None:
            under_way = min(under_way, left)
        elif _kind(x) == "exponentials":
            found += under_way > 0 or has_open
    return found


def _skipped(blocks: list[Block], loop: Loop) -> dict[str, int]:
    counts, left = dict.fromkeys(SKIPPED, 0), set(loop.body) - set(loop.path)
    neighbours: dict[int, set[int]] = {number: set() for number in left}
    for number in left:
        for other in left.intersection(blocks[number].successors):
            neighbours[number].add(other)
            neighbours[other].add(number)
    while left:
        pending, region = [min(left)], set()
        while pending:
            number = pending.pop()
            region.add(number)
            pending += neighbours[number] - region
        left -= region
        instructions = [x for number in region for x in blocks[number].instructions]
        counts[_purpose(instructions)] += len(instructions)
    return counts


def _purpose(instructions: list[Instruction]) -> str:
    names, half = Counter(x.name for x in instructions), len(instructions) / 2
    if names["SYNCS"] and len(instructions) <= _LONGEST_WAIT:
        return "waits"
    if any(_kind(x) == "exponentials" for x in instructions):
        return "new maximum"
    if names["ISETP"] + names["FSEL"] > half:
        return "mask"
    return "rescaling" if names["FMUL"] > half else "other"
