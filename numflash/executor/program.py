"""An entry as straight pieces of Python, which the warps of a block execute.

A piece begins where a branch may arrive, after a branch, and at every instruction that lanes or
warps execute together or that may have to wait: such a one is the first of its piece, so that it
can be tried again. A piece is a function of the warp, its registers and the mask of lanes, and
returns what comes next:

    WAITS               it cannot go on now, and nothing has happened
    number              of the next piece; END after the last
    (taken, x, y)       the next piece of the lanes `taken`, and that of the others

Pieces are compiled when they are first executed, but every instruction is looked at before that.
"""

from functools import lru_cache
from itertools import count

import numpy as np

from numflash.executor import arithmetic
from numflash.executor.memory import CONSTANTS, Region
from numflash.executor.one_lane import OneLane, is_one_lane
from numflash.executor.one_lane.accesses import WIDE_SCOPES
from numflash.executor.operands import WAITS
from numflash.executor.text import (
    Entry,
    Label,
    PtxError,
    Statement,
    UnknownError,
    check_operands,
    parse,
)
from numflash.executor.together import make_operation
from numflash.simulator.memory import SharedMemory

END = -1
TRUE, FALSE = np.ones(32, bool), np.zeros(32, bool)
_DYNAMIC_START = 1024
_serial = count()


@lru_cache(64)
def program_of(ptx: str, entry: str | None, dynamic_bytes: int) -> "Program":
    """The program of an entry of PTX text, remembered.

    Raises:
        PtxError: the text is no PTX, or has no such entry.
        UnknownError: it has an instruction that the executor does not know.
    """
    return Program(parse(ptx, entry), dynamic_bytes)


def _says_something(opcode: str) -> bool:
    """Whether an opcode is what `numflash.ptx.between_blocks` has: a load or store."""
    head, *parts = opcode.split(".")
    order = {"ld": "acquire", "st": "release"}.get(head)
    return order in parts and any(scope in parts for scope in WIDE_SCOPES)


class Program:
    """An entry with its pieces and the layout of its memory.

    Attributes:
        pieces: the statements of each piece.
        shared_end: the first address behind the block's shared memory.
        in_window: the shared variables, where the blocks of a cluster have them at addresses of
            their own: each behind its window's beginning.
        local_bytes: of each lane.
        follows_stores: whether anything reads shared memory by the asynchronous proxy, so that
            stores to it have to be remembered until a fence.
        talks: whether blocks say something to each other.
    """

    def __init__(self, entry: Entry, dynamic_bytes: int):
        self.entry, self.dynamic_bytes = entry, dynamic_bytes
        self._addresses: dict[str, int] = {}
        self._place_variables()
        shared = [v.name for v in entry.variables.values() if v.space == "shared"]
        self.in_window = frozenset(shared if entry.cluster != (1, 1, 1) else ())
        self.one_lane = OneLane(entry.register_types, self.address_of, self.in_window)
        self.pieces: list[list[Statement]] = []
        self._labels: dict[Label, int] = {}
        self._cut()
        opcodes = {statement.opcode for piece in self.pieces for statement in piece}
        self.follows_stores = any(o.startswith(("wgmma", "cp.async.bulk")) for o in opcodes)
        self.talks = any(map(_says_something, opcodes))
        self._operations = []
        self._operation_numbers: dict[int, int] = {}  # by the identity of statements
        self._masked_lines = [self._lines(piece, "M") for piece in self.pieces]
        self._functions: list[list] = [[None, None] for _ in self.pieces]
        # By the name of generated code, the statement of each of its lines.
        self._statements: dict[str, list[Statement]] = {}
        self._name = f"<ptx {next(_serial)}>"

    def address_of(self, name: str) -> int:
        """The address of a variable or parameter. Raises PtxError."""
        try:
            return self._addresses[name]
        except KeyError:
            raise PtxError(f"{name} is not declared") from None

    def function(self, number: int, masked: bool):
        """The Python of a piece; `masked` for fewer than all lanes."""
        functions = self._functions[number]
        if functions[masked] is None:
            functions[masked] = self._compile(number, masked)
        return functions[masked]

    def statement_at(self, filename: str, line: int) -> Statement | None:
        """The statement of a line of generated code; None for other code."""
        statements = self._statements.get(filename)
        return statements[line - 2] if statements and 2 <= line < len(statements) + 2 else None

    def shared_memory(self) -> SharedMemory:
        """A block's shared memory, poisoned, with the static arrays where the program has them."""
        shared = SharedMemory(self.dynamic_bytes)
        for variable in self._static:
            # Of bytes: SharedMemory places them one behind the other.
            shared.array(variable.n_bytes, np.uint8, variable.alignment, site=variable.name)
        return shared

    def _place_variables(self) -> None:
        for parameter in self.entry.parameters:
            self._addresses[parameter.name] = parameter.offset
        self._static = []
        content, self.local_bytes = bytearray(), 0
        for variable in self.entry.variables.values():
            if variable.space == "shared":
                if variable.n_bytes is None:
                    self._addresses[variable.name] = _DYNAMIC_START
                else:
                    self._static.append(variable)
            elif variable.space == "local":
                start = -(-self.local_bytes // variable.alignment) * variable.alignment
                self._addresses[variable.name] = start
                self.local_bytes = start + variable.n_bytes
            else:
                start = -(-len(content) // variable.alignment) * variable.alignment
                content.extend(bytes(start - len(content)))
                self._addresses[variable.name] = CONSTANTS + start
                content.extend(variable.content.ljust(variable.n_bytes, b"\0"))
        self._constants = np.frombuffer(bytes(content), np.uint8)
        shared = self.shared_memory()
        base = shared.bytes.__array_interface__["data"][0]
        self.shared_end = _DYNAMIC_START + self.dynamic_bytes
        for variable in self._static:
            array = shared.array(
                variable.n_bytes, np.uint8, variable.alignment, site=variable.name
            )
            start = array.__array_interface__["data"][0] - base
            self._addresses[variable.name] = start
            self.shared_end = max(self.shared_end, start + variable.n_bytes)

    @property
    def static_bytes(self) -> int:
        """Bytes of shared memory that the text itself declares."""
        return sum(variable.n_bytes for variable in self._static)

    def constants(self) -> Region:
        """Variables in global and constant memory, as a launch begins with them."""
        return Region("the module's variables", CONSTANTS, self._constants.copy())

    def _cut(self) -> None:
        pending, new_piece = [], True
        for item in self.entry.body:
            if isinstance(item, Label):
                pending.append(item)
                new_piece = True
                continue
            head = item.opcode.split(".")[0]
            branches = head in ("bra", "ret", "exit")
            if new_piece or not (branches or is_one_lane(item.opcode)):
                self.pieces.append([])
            for label in pending:
                self._labels[label] = len(self.pieces) - 1
            pending = []
            self.pieces[-1].append(item)
            new_piece = branches
        for label in pending:
            self._labels[label] = END

    def _next(self, number: int) -> int:
        return number + 1 if number + 1 < len(self.pieces) else END

    def _lines(self, piece: list[Statement], mask: str | None) -> list[list[str]]:
        """For each statement but a branch its lines, executed by the lanes of `mask`."""
        found = []
        for statement in piece:
            try:
                found.append(self._statement_lines(statement, mask))
            except (UnknownError, PtxError) as error:
                raise type(error)(f"{statement}: {error}") from error
        return found

    def _statement_lines(self, statement: Statement, mask: str | None) -> list[str]:
        guard, lanes = statement.predicate, mask
        if guard is not None:
            predicate = self.one_lane.predicate(guard)
            lanes = predicate if mask is None else f"({mask}&{predicate})"
        if (head := statement.opcode.split(".")[0]) in ("bra", "ret", "exit"):
            check_operands(statement, 1 if head == "bra" else 0)
            return []
        if is_one_lane(statement.opcode):
            return self.one_lane.lines(statement, lanes)
        number = self._operation_numbers.get(id(statement))
        if number is None:
            number = self._operation_numbers[id(statement)] = len(self._operations)
            self._operations.append(make_operation(statement, self))
        if guard is None:
            return [f"if O[{number}](w,{lanes or 'TRUE'}) is WAITS: return WAITS"]
        return [f"m={lanes}", f"if m.any() and O[{number}](w,m) is WAITS: return WAITS"]

    def _compile(self, number: int, masked: bool):
        piece = self.pieces[number]
        lines = self._masked_lines[number] if masked else self._lines(piece, None)
        text, statements = [], []
        for statement, own in zip(piece, lines, strict=True):
            text += own
            statements += [statement] * len(own)
        text.append(f"return {self._what_follows(number)}")
        statements.append(piece[-1])
        filename = f"{self._name} {number}{' masked' if masked else ''}"
        self._statements[filename] = statements
        scope = {
            "O": self._operations,
            "K": self.one_lane.constants,
            "a": arithmetic,
            "np": np,
            "where": np.where,
            "ascontiguous": np.ascontiguousarray,
            "TRUE": TRUE,
            "FALSE": FALSE,
            "WAITS": WAITS,
        }
        source = "def piece(w, R, M):\n " + "\n ".join(text)
        exec(compile(source, filename, "exec"), scope)
        return scope["piece"]

    def _what_follows(self, number: int) -> str:
        last, following = self.pieces[number][-1], self._next(number)
        head = last.opcode.split(".")[0]
        if head == "bra":
            target = self._labels[last.operands[0]]
        elif head in ("ret", "exit"):
            target = END
        else:
            return str(following)
        if last.predicate is None:
            return str(target)
        return f"({self.one_lane.predicate(last.predicate)}, {target}, {following})"
