"""What a kernel's machine code does in each turn of its loops, counted from its disassembly.

The blocks of instructions between labels and branches form a graph. A loop is a backward branch to
a block that dominates it, and everything on the way. Its counts are those of one turn of one warp:

- Inner loops are counted apart, each for one turn of its own; how often they turn is not in the
  machine code.
- Code that a branch may skip is counted if it moves data, multiplies matrices or waits for others:
  such branches guard the edges of a tensor, and nearly every turn takes them. Skipped arithmetic
  is `rare`: masks of tiles that an edge crosses, the rescaling when a maximum has grown. It does
  not matter where the compiler put it, between the rest or out of line behind the loop.
- Of two alternatives the longer one counts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields

_LANES = 32
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?P<guard>@!?U?P(?:\d+|T)\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_]*(?:\.\w+)*)(?P<operands>[^;]*)"
)
_LABEL = re.compile(r"^(\.L_\w+|\$?[\w$.]+):\s*$")
_TARGET = re.compile(r"`\(([^)]+)\)")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}

_SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}
_GLOBAL = {"LDG", "STG", "LDGSTS", "RED", "REDG", "ATOMG", "LD", "ST"}
_LOCAL = {"LDL", "STL"}
_MATRIX = {"HMMA", "IMMA", "QMMA", "HGMMA", "DMMA"}
_MEETINGS = {"BAR", "UTMALDG", "SYNCS"}
_FMA = {"FFMA", "FADD", "FMUL", "IMAD", "HFMA2", "HADD2", "HMUL2", "FFMA2", "FADD2", "FMUL2"}
_CONVERSIONS = {"F2FP", "F2F", "F2I", "I2F", "I2FP", "FRND", "F2IP", "I2IP"}
# Neither arithmetic nor memory: branches, waits, moves of special registers.
_CONTROL = {
    *("BRA", "BRX", "JMP", "EXIT", "RET", "CALL", "BREAK", "KILL", "BSSY", "BSYNC", "WARPSYNC"),
    *("NOP", "YIELD", "NANOSLEEP", "DEPBAR", "LDGDEPBAR", "ACQBULK", "MEMBAR", "ERRBAR", "CCTL"),
    *("S2R", "CS2R", "S2UR", "R2P", "P2R", "LDC", "ULDC", "LDCU", "VOTE", "ELECT"),
    *_MEETINGS,
}


@dataclass
class Counts:
    """Instructions of one warp, by what they occupy.

    Attributes:
        issued: all of them.
        matrix: on the tensor cores.
        multiply_adds, multiply_adds_tf32: of those, over the whole warp; 16-bit and tf32 operands.
        special: on the special function units (MUFU).
        exponentials: of those, ex2.
        fma: on the float32 pipe: FFMA, FADD, FMUL, IMAD.
        ffma: of those, FFMA.
        alu: minima, comparisons, selections, logic, integer sums.
        conversions: between number formats, F2FP among them.
        shared: loads and stores of shared memory.
        shared_bytes: their bytes, as if no two lanes read the same; asynchronous copies write
            theirs, too.
        global_bytes: bytes between registers or shared memory and global memory.
        global_loads: instructions that read global memory into registers.
        shuffles, barriers: exchanges within a warp; meetings of a block.
        local: loads and stores of spilled registers and local arrays.
    """

    issued: int = 0
    matrix: int = 0
    multiply_adds: int = 0
    multiply_adds_tf32: int = 0
    special: int = 0
    exponentials: int = 0
    fma: int = 0
    ffma: int = 0
    alu: int = 0
    conversions: int = 0
    shared: int = 0
    shared_bytes: int = 0
    global_bytes: int = 0
    global_loads: int = 0
    shuffles: int = 0
    barriers: int = 0
    local: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return self.plus(other, 1)

    def plus(self, other: "Counts", times: float) -> "Counts":
        """These and `times` the others."""
        return Counts(
            **{name: getattr(self, name) + times * getattr(other, name) for name in _FIELDS}
        )

    def _add(self, opcode: str) -> None:
        """Count one instruction."""
        name, *modifiers = opcode.split(".")
        self.issued += 1
        if name in _MATRIX:
            self.matrix += 1
            if "TF32" in modifiers:
                self.multiply_adds_tf32 += _multiply_adds(modifiers)
            else:
                self.multiply_adds += _multiply_adds(modifiers)
        elif name == "MUFU":
            self.special += 1
            self.exponentials += "EX2" in modifiers
        elif name in _SHARED:
            self.shared += 1
            self.shared_bytes += _bytes(name, modifiers)
        elif name in _GLOBAL:
            moved = _bytes(name, modifiers)
            self.global_bytes += moved
            self.shared_bytes += moved if name == "LDGSTS" else 0
            self.global_loads += name in ("LDG", "LD")
        elif name in _LOCAL:
            self.local += 1
        elif name == "SHFL":
            self.shuffles += 1
        elif name == "BAR":
            self.barriers += 1
        elif name in _FMA:
            self.fma += 1
            self.ffma += name == "FFMA"
        elif name in _CONVERSIONS:
            self.conversions += 1
        elif name not in _CONTROL and not name.startswith("U"):
            self.alu += 1


_FIELDS = tuple(field.name for field in fields(Counts))


@dataclass(frozen=True)
class Loop:
    """One loop.

    Attributes:
        counts: what a warp does in each turn, inner loops left out.
        rare: what it does in few turns only.
        inner: the loops in it, in order.
    """

    counts: Counts
    rare: Counts
    inner: tuple["Loop", ...]

    def walk(self) -> Iterator["Loop"]:
        """This loop and all in it, outer ones first."""
        yield self
        for loop in self.inner:
            yield from loop.walk()


@dataclass(frozen=True)
class MachineCode:
    """A kernel's machine code.

    Attributes:
        loops: the outermost loops, in order.
        main: the loop that walks over tiles; None if the kernel has no loop.
        outside: what is in no loop, every branch taken once.
    """

    loops: tuple[Loop, ...]
    main: Loop | None
    outside: Counts


def analyse(sass: str) -> MachineCode:
    """The loops of the first kernel in a disassembly, and what is in them.

    Args:
        sass: as `numflash.sass.disassemble` returns it.

    Raises:
        ValueError: it holds no instructions.
    """
    blocks = _blocks(sass)
    if not blocks:
        raise ValueError("the disassembly holds no instructions")
    graph = _Graph(blocks)
    loops = graph.loops()
    rare = graph.rare(loops)
    innermost = graph.innermost(loops)
    own = [(Counts(), Counts()) for _ in loops]
    outside = Counts()
    for index, block in enumerate(blocks):
        owner = innermost[index]
        target = outside if owner is None else own[owner][index in rare]
        for opcode in block.opcodes if index in graph.reachable else ():
            target._add(opcode)
    found = _nest(loops, own)
    main = max((loop for top in found for loop in top.walk()), key=_work, default=None)
    return MachineCode(found, _tile_loop(found, main), outside)


def _work(loop: Loop) -> tuple[int, int]:
    """How much a loop multiplies: matrices first."""
    return loop.counts.matrix, loop.counts.ffma


def _tile_loop(loops: tuple[Loop, ...], busiest: Loop | None) -> Loop | None:
    """The loop over tiles: the busiest one, or that around it in which the block meets.

    Where products are loops of their own they are the busiest, and the tile's loop around them
    has the barriers.
    """
    for top in loops:
        chain = _chain(top, busiest)
        for loop in reversed(chain):
            if loop.counts.barriers:
                return loop
    return busiest


def _chain(loop: Loop, wanted: Loop | None) -> list[Loop]:
    """The loops from `loop` down to `wanted`; empty if it is not in there."""
    if loop is wanted:
        return [loop]
    for inner in loop.inner:
        if chain := _chain(inner, wanted):
            return [loop, *chain]
    return []


def _multiply_adds(modifiers: list[str]) -> int:
    """Of one instruction, from its shape: "16816" is 16 x 8 x 16, "64x128x16" as it stands."""
    for shape in modifiers:
        if "x" in shape:
            m, n, k = map(int, shape.split("x"))
            return m * n * k
        if shape.isdecimal() and shape.startswith(("168", "848")):
            return 16 * 8 * int(shape[3:]) if shape.startswith("168") else 8 * 8 * int(shape[2:])
    return 0


def _bytes(name: str, modifiers: list[str]) -> int:
    """What one memory instruction moves for a warp."""
    if name in ("LDSM", "STSM"):
        # "16.M88.4": that many 8 x 8 matrices of 16 bits.
        return 8 * 8 * 2 * next((int(m) for m in modifiers if m in ("2", "4")), 1)
    return _LANES * next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), 4)


@dataclass
class _Block:
    """Instructions that are executed one after another, and the blocks that may follow."""

    opcodes: list[str]
    followers: list[int]


def _blocks(sass: str) -> list[_Block]:
    """The basic blocks of the first kernel."""
    blocks: list[_Block] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    ends: set[int] = set()
    start_new = True
    for line in sass.splitlines():
        if line.startswith((".section", "\t.section")) and blocks:
            break
        if label := _LABEL.match(line):
            labels[label[1]] = len(blocks)
            start_new = True
            continue
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        if start_new:
            blocks.append(_Block([], []))
            start_new = False
        index, opcode = len(blocks) - 1, found["opcode"]
        guard = (found["guard"] or "").strip()
        # What never happens takes an issue slot only: the assembler waits with such loads.
        blocks[index].opcodes.append("NOP" if guard == "@!PT" else opcode)
        name = opcode.split(".")[0]
        target = _TARGET.search(found["operands"])
        # A call of a label within the kernel does not come back: it is a jump.
        leaves = name in ("BRA", "JMP", "EXIT", "RET")
        if leaves or (name == "CALL" and target and target[1].startswith(".L_x")):
            if target and name != "RET":
                jumps.append((index, target[1]))
            start_new = True
            if not _is_conditional(guard, found["operands"], name):
                ends.add(index)
    for index, block in enumerate(blocks):
        if index not in ends and index + 1 < len(blocks):
            block.followers.append(index + 1)
    for index, label in jumps:
        target = labels.get(label)
        if target is not None and target < len(blocks) and target not in blocks[index].followers:
            blocks[index].followers.append(target)
    return blocks


def _is_conditional(guard: str, operands: str, name: str) -> bool:
    """Whether execution may go on behind this branch."""
    if guard and guard not in ("@PT", "@UPT"):
        return True
    before_target = operands.split("`")[0]
    return name in ("BRA", "JMP") and re.search(r"\bU?P\d|\bUR\d|~?URZ", before_target) is not None


class _Graph:
    """Who follows whom, who dominates whom, which blocks form loops."""

    def __init__(self, blocks: list[_Block]):
        self.blocks = blocks
        self.followers = [block.followers for block in blocks]
        self.leaders: list[list[int]] = [[] for _ in blocks]
        for index, block in enumerate(blocks):
            for follower in block.followers:
                self.leaders[follower].append(index)
        self.reachable = self._reachable()
        self.dominators = _dominators(self.leaders, {0})
        exits = {index for index, followers in enumerate(self.followers) if not followers}
        self.post_dominators = _dominators(self.followers, exits)

    def _reachable(self) -> set[int]:
        """Blocks of the kernel itself, not of functions that it calls."""
        found, todo = {0}, [0]
        while todo:
            new = set(self.followers[todo.pop()]) - found
            found |= new
            todo += new
        return found

    def loops(self) -> list[set[int]]:
        """The blocks of each loop, inner loops' included; by header, smallest first."""
        bodies: dict[int, set[int]] = {}
        for index in sorted(self.reachable):
            for header in self.followers[index]:
                if self.dominators[index] >> header & 1:
                    bodies.setdefault(header, {header}).update(self._body(header, index))
        return [bodies[header] for header in sorted(bodies, key=lambda h: (len(bodies[h]), h))]

    def _body(self, header: int, latch: int) -> set[int]:
        body, todo = {header, latch}, [latch]
        while todo:
            index = todo.pop()
            if index == header:
                continue
            for leader in self.leaders[index]:
                if leader not in body:
                    body.add(leader)
                    todo.append(leader)
        return body

    def innermost(self, loops: list[set[int]]) -> list[int | None]:
        """Of each block the innermost loop that it is in."""
        return [
            next((number for number, body in enumerate(loops) if index in body), None)
            for index in range(len(self.blocks))
        ]

    def rare(self, loops: list[set[int]]) -> set[int]:
        """Blocks in loops that most turns skip."""
        rare: set[int] = set()
        innermost = self.innermost(loops)
        for index, followers in enumerate(self.followers):
            if innermost[index] is None or len(followers) != 2:
                continue
            body = loops[innermost[index]]
            join = self._join(index)
            if join is None or join not in body or not body.issuperset(followers):
                continue
            sides = [self._region(follower, index, join, body) for follower in followers]
            if not any(map(self._does_work, sides)):
                rare |= sides[0] | sides[1]
            elif all(sides) and sides[0].isdisjoint(sides[1]):
                rare |= min(sides, key=self._length)
        return rare

    def _join(self, index: int) -> int | None:
        """Where the ways from a block meet again: its nearest post-dominator."""
        candidates = self.post_dominators[index] & ~(1 << index)
        nearest, count = None, -1
        while candidates:
            bit = candidates & -candidates
            candidates ^= bit
            other = bit.bit_length() - 1
            if (passed := self.post_dominators[other].bit_count()) > count:
                nearest, count = other, passed
        return nearest

    def _region(self, start: int, branch: int, join: int, body: set[int]) -> set[int]:
        """Blocks on the way from `start` to `join`."""
        region, todo = set(), [start]
        while todo:
            index = todo.pop()
            if index in (join, branch) or index in region or index not in body:
                continue
            region.add(index)
            todo += self.followers[index]
        return region

    def _does_work(self, region: set[int]) -> bool:
        """Whether it moves data, multiplies matrices or meets others."""
        kinds = _SHARED | _GLOBAL | _MATRIX | _MEETINGS
        return any(
            opcode.split(".")[0] in kinds
            for index in region
            for opcode in self.blocks[index].opcodes
        )

    def _length(self, region: set[int]) -> int:
        return sum(len(self.blocks[index].opcodes) for index in region)


def _dominators(leaders: list[list[int]], roots: set[int]) -> list[int]:
    """Of each block those that lie on every way to it from the roots, itself included, as bits."""
    everything = (1 << len(leaders)) - 1
    found = [1 << i if i in roots else everything for i in range(len(leaders))]
    order = range(len(leaders)) if 0 in roots else range(len(leaders) - 1, -1, -1)
    changed = True
    while changed:
        changed = False
        for index in order:
            if index in roots:
                continue
            common = everything
            for leader in leaders[index]:
                common &= found[leader]
            common |= 1 << index
            if common != found[index]:
                found[index] = common
                changed = True
    return found


def _nest(bodies: list[set[int]], own: list[tuple[Counts, Counts]]) -> tuple[Loop, ...]:
    """Loops in loops, from their bodies, smallest first."""
    inner: list[list[tuple[int, Loop]]] = [[] for _ in bodies]
    top: list[tuple[int, Loop]] = []
    for number, body in enumerate(bodies):
        loop = Loop(*own[number], _in_order(inner[number]))
        around = next((n for n in range(number + 1, len(bodies)) if body < bodies[n]), None)
        (top if around is None else inner[around]).append((min(body), loop))
    return _in_order(top)


def _in_order(placed: list[tuple[int, Loop]]) -> tuple[Loop, ...]:
    return tuple(loop for _, loop in sorted(placed, key=lambda pair: pair[0]))
