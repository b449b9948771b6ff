"""The control flow of a kernel's machine code: basic blocks, and the loops that they form.

Blocks are numbered in the order of the disassembly; a set of numbers is a part of the graph.
"""

import re
from dataclasses import dataclass

_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?P<guard>@!?U?P(?:\d+|T)\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_]*(?:\.\w+)*)(?P<operands>[^;]*)"
)
_LABEL = re.compile(r"^(\.L_\w+|\$?[\w$.]+):\s*$")
_TARGET = re.compile(r"`\(([^)]+)\)")


@dataclass
class Block:
    """Instructions that are executed one after another, and the blocks that may follow."""

    opcodes: list[str]
    followers: list[int]


def read_blocks(sass: str) -> list[Block]:
    """The basic blocks of the first kernel."""
    blocks: list[Block] = []
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
            blocks.append(Block([], []))
            start_new = False
        index, opcode = len(blocks) - 1, found["opcode"]
        guard = (found["guard"] or "").strip()
        # Instructions that never run take an issue slot only: the assembler delays by them.
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


class Graph:
    """The successors, dominators and loops of blocks."""

    def __init__(self, blocks: list[Block]):
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

    def rare(self, loops: list[set[int]], kinds: set[str]) -> set[int]:
        """Blocks in loops that most turns skip: a branch may, and they have no such opcodes."""
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
            if not any(self._has(side, kinds) for side in sides):
                rare |= sides[0] | sides[1]
            elif all(sides) and sides[0].isdisjoint(sides[1]):
                rare |= min(sides, key=self._length)
        return rare

    def _join(self, index: int) -> int | None:
        """The block at which the ways from a block meet again: its nearest post-dominator."""
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

    def _has(self, region: set[int], kinds: set[str]) -> bool:
        """Whether some opcode of the region is of these kinds."""
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
