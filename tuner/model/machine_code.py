"""Work of each turn of a kernel's loops, counted from its disassembly.

The blocks of instructions between labels and branches form a graph. A loop is a backward branch to
a block that dominates it, and everything on the way. Its counts are those of one turn of one warp:

- Inner loops are counted apart, each for one turn of its own; how often they turn is not in the
  machine code.
- Code that a branch may skip is counted if it moves data, multiplies matrices or waits for others:
  such branches guard the edges of a tensor, and nearly every turn takes them. Skipped arithmetic
  is `rare`: masks of tiles that an edge crosses, the rescaling when a maximum has grown. The
  compiler may put it between the rest or out of line behind the loop.
- Of two alternatives the longer one counts.

The loop over tiles is found by its products and barriers. Where whole warpgroups multiply, it is
the innermost one with products; those around it go over tiles of rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from .control_flow import Graph, read_blocks

_LANES = 32
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}

_SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}
_GLOBAL = {"LDG", "STG", "LDGSTS", "RED", "REDG", "ATOMG", "LD", "ST"}
_LOCAL = {"LDL", "STL"}
_WARPGROUP_MATRIX = {"HGMMA", "IGMMA", "QGMMA"}
_MATRIX_OF_CODES = {"QMMA", "QGMMA"}
_MATRIX = {"HMMA", "IMMA", "QMMA", "DMMA", *_WARPGROUP_MATRIX}
_MEETINGS = {"BAR", "UTMALDG", "SYNCS"}
_FMA = {"FFMA", "FADD", "FMUL", "IMAD", "HFMA2", "HADD2", "HMUL2", "FFMA2", "FADD2", "FMUL2"}
_CONVERSIONS = {"F2FP", "F2F", "F2I", "I2F", "I2FP", "FRND", "F2IP", "I2IP"}
# A branch around these guards an edge: it is nearly always taken.
_WORK = _SHARED | _GLOBAL | _MATRIX | _MEETINGS
# Neither arithmetic nor memory: branches, waits, moves of special registers.
_CONTROL = {
    *("BRA", "BRX", "JMP", "EXIT", "RET", "CALL", "BREAK", "KILL", "BSSY", "BSYNC", "WARPSYNC"),
    *("NOP", "YIELD", "NANOSLEEP", "DEPBAR", "LDGDEPBAR", "ACQBULK", "MEMBAR", "ERRBAR", "CCTL"),
    *("S2R", "CS2R", "S2UR", "R2P", "P2R", "LDC", "ULDC", "LDCU", "VOTE", "ELECT"),
    *_MEETINGS,
}


@dataclass
class Counts:
    """Instructions of one warp, by the unit that they occupy.

    Attributes:
        issued: all of them.
        matrix: on the tensor cores.
        multiply_adds, multiply_adds_tf32, multiply_adds_e4m3: of those, over the whole warp; with
            operands of 16 bits, tf32 and e4m3. Of a warpgroup's product a quarter is each warp's.
        special: on the special function units (MUFU).
        exponentials: of those, ex2.
        fma: on the float32 pipe: FFMA, FADD, FMUL, IMAD.
        ffma: of those, FFMA.
        alu: minima, comparisons, selections, logic, integer sums.
        conversions: between number formats, F2FP among them.
        shared: loads and stores of shared memory.
        shared_bytes: their bytes, as if no two lanes read the same. Bytes that asynchronous copies
            write do not count: FlashAttention-2 with head_dim 256 leaves no room for them.
        global_bytes: bytes between registers or shared memory and global memory.
        global_loads: instructions that read global memory into registers.
        shuffles, barriers: exchanges within a warp; meetings of a block.
        local: loads and stores of spilled registers and local arrays.
    """

    issued: int = 0
    matrix: int = 0
    multiply_adds: int = 0
    multiply_adds_tf32: int = 0
    multiply_adds_e4m3: int = 0
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
            multiply_adds = _multiply_adds(modifiers) // (4 if name in _WARPGROUP_MATRIX else 1)
            if "TF32" in modifiers:
                self.multiply_adds_tf32 += multiply_adds
            elif name in _MATRIX_OF_CODES:
                self.multiply_adds_e4m3 += multiply_adds
            else:
                self.multiply_adds += multiply_adds
        elif name == "MUFU":
            self.special += 1
            self.exponentials += "EX2" in modifiers
        elif name in _SHARED:
            self.shared += 1
            self.shared_bytes += _bytes(name, modifiers)
        elif name in _GLOBAL:
            self.global_bytes += _bytes(name, modifiers)
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


_FIELDS = tuple(each.name for each in fields(Counts))


@dataclass(frozen=True)
class Loop:
    """One loop.

    Attributes:
        counts: of a warp in each turn, inner loops left out.
        rare: of few turns only.
        inner: the loops in it, in order.
    """

    counts: Counts
    rare: Counts
    inner: tuple["Loop", ...]

    def walk(self) -> Iterator["Loop"]:
        """This loop and all in it, outer ones first."""
        yield self
        yield from self.deeper()

    def deeper(self) -> Iterator["Loop"]:
        """All loops in it."""
        for loop in self.inner:
            yield from loop.walk()


@dataclass(frozen=True)
class MachineCode:
    """A kernel's machine code.

    Attributes:
        loops: the outermost loops, in order.
        main: the loop that walks over tiles; None if the kernel has no loop.
        outside: the instructions in no loop, every branch taken once.
        around: one turn of each loop around `main`, without `main` itself.
    """

    loops: tuple[Loop, ...]
    main: Loop | None
    outside: Counts
    around: Counts = field(default_factory=Counts)


def analyse(sass: str) -> MachineCode:
    """The loops of the first kernel in a disassembly, and their instructions.

    Args:
        sass: as `numflash.machine_code.sass.disassemble` returns it.

    Raises:
        ValueError: it holds no instructions.
    """
    blocks = read_blocks(sass)
    if not blocks:
        raise ValueError("the disassembly holds no instructions")
    graph = Graph(blocks)
    loops = graph.loops()
    rare = graph.rare(loops, _WORK)
    innermost = graph.innermost(loops)
    own = [(Counts(), Counts()) for _ in loops]
    outside = Counts()
    for index, block in enumerate(blocks):
        owner = innermost[index]
        target = outside if owner is None else own[owner][index in rare]
        for opcode in block.opcodes if index in graph.reachable else ():
            target._add(opcode)
    found = _nest(loops, own)
    every = [loop for top in found for loop in top.walk()]
    if any(op.split(".")[0] in _WARPGROUP_MATRIX for block in blocks for op in block.opcodes):
        innermost = [x for x in every if not any(each.counts.matrix for each in x.deeper())]
        main = max(innermost, key=_work, default=None)
    else:
        main = _tile_loop(found, max(every, key=_work, default=None))
    around = Counts()
    for top in found:
        for loop in _chain(top, main)[:-1]:
            around += loop.counts
    return MachineCode(found, main, outside, around)


def _work(loop: Loop) -> tuple[int, int]:
    """The products of a loop, for comparisons: those of matrices first."""
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
    """Bytes that one memory instruction moves for a warp."""
    if name in ("LDSM", "STSM"):
        # "16.M88.4": that many 8 x 8 matrices of 16 bits.
        return 8 * 8 * 2 * next((int(m) for m in modifiers if m in ("2", "4")), 1)
    return _LANES * next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), 4)


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
