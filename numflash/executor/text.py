"""PTX text as statements: parameters, variables, registers and the body of one entry.

Registers are numbered over all scopes of the body, so that a name that an inner `{ }` declares
again is another register, and labels belong to the scope that holds them, as `{ }` of inline
assembly needs it. Line numbers are those of the text, comments included.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass, field

from numflash.runtime.errors import UnsupportedError

TYPE_BYTES = {
    **dict.fromkeys(("b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16", "e4m3x2", "e5m2x2"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 8),
    "pred": 0,
}
"""Bytes of each type that the executor knows."""


class PtxError(ValueError):
    """Text that is no PTX, or an entry that it does not have."""


class UnknownError(UnsupportedError):
    """An instruction that the executor does not know."""


@dataclass(frozen=True, slots=True)
class Register:
    """A register by its number; `negated` is `!p`."""

    number: int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Immediate:
    """A number, as it is written."""

    text: str

    def integer(self) -> int:
        """Its value. Raises PtxError where it is no integer."""
        try:
            return int(self.text.rstrip("U"), 0)
        except ValueError:
            raise PtxError(f"{self.text} where an integer is expected") from None


@dataclass(frozen=True, slots=True)
class Symbol:
    """The address of a variable or parameter, and bytes behind it."""

    name: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Special:
    """A special register, such as %tid.x."""

    name: str


@dataclass(frozen=True, slots=True)
class Placeholder:
    """`<name>` in the template of an instruction."""

    name: str


@dataclass(frozen=True, slots=True)
class Vector:
    """`{a, b}`."""

    items: tuple


@dataclass(frozen=True, slots=True)
class Memory:
    """`[base + offset, {coordinates}]`."""

    base: object
    offset: int = 0
    coordinates: tuple = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """`first|second`, two results."""

    first: object
    second: object


@dataclass(frozen=True, slots=True)
class Nothing:
    """`_`: a result that is dropped."""


@dataclass(frozen=True, slots=True)
class Label:
    """The target of a branch: its name, and the scope that holds it."""

    name: str
    scope: int


@dataclass(frozen=True, slots=True)
class Statement:
    """One instruction of the text."""

    opcode: str
    operands: tuple
    predicate: Register | None
    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {shortened(self.text)}"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of an entry: where it lies among their bytes, and in the text."""

    name: str
    type: str
    offset: int
    n_bytes: int
    line: int


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable, and its first content. The dynamic shared memory has no `n_bytes`."""

    name: str
    space: str
    n_bytes: int | None
    alignment: int
    content: bytes = b""


@dataclass
class Entry:
    """A kernel of a PTX module.

    Attributes:
        line: where it begins in the text.
        target: as in `.target`: "sm_90a".
        max_threads: extents that `.maxntid` or `.reqntid` allows; None where nothing is said.
        cluster: blocks of a cluster, by `.reqnctapercluster`.
        register_types: the type of each register, by number.
        body: `Statement` and `Label` in the order of the text.
    """

    name: str
    line: int
    target: str
    parameters: list[Parameter]
    max_threads: tuple[int, int, int] | None
    cluster: tuple[int, int, int]
    variables: dict[str, Variable] = field(default_factory=dict)
    register_types: list[str] = field(default_factory=list)
    body: list = field(default_factory=list)


def shortened(text: str, limit: int = 120) -> str:
    """A statement for a message; names of kernels are long."""
    text = re.sub(r"[\w$]{60,}", lambda name: f"{name[0][:20]}...{name[0][-20:]}", text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def check_operands(statement: Statement, *counts: int) -> None:
    """Raise PtxError unless a statement has one of these numbers of operands."""
    found = len(statement.operands)
    if found not in counts:
        takes = " or ".join(str(n) for n in counts) if any(counts) else "none"
        raise PtxError(f"{statement.opcode} has {found} operands; it takes {takes}")


def parse(ptx: str, name: str | None = None) -> Entry:
    """The entry `name` of PTX text, or its only one.

    Raises:
        PtxError: the text is no PTX, or has no such entry. The message names the line.
    """
    text = _without_comments(ptx)
    if not re.search(r"^\s*\.version\b", text, re.M):
        raise PtxError("line 1: this is no PTX: it has no .version")
    target = re.search(r"^\s*\.target\s+([\w]+)", text, re.M)
    if target is None:
        raise PtxError("line 1: this is no PTX: it has no .target")
    heads = list(re.finditer(r"\.entry\s+([\w$%.]+)\s*(?:\((.*?)\))?([^{;]*)\{", text, re.S))
    names = [head[1] for head in heads]
    places = ", ".join(f"{head[1]!r} (line {_line(text, head.start())})" for head in heads)
    if name is None and len(heads) == 1:
        head = heads[0]
    elif name in names:
        head = heads[names.index(name)]
    elif name is None:
        raise PtxError(f"entry must name one of the module's {len(names)} entries: {places}")
    else:
        raise PtxError(f"the module has no entry {name!r}; it has {places or 'none'}")
    line = _line(text, head.start())
    parameters = _parameters(head[2] or "", _line(text, max(0, head.start(2))))
    cluster = _extents(head[3], "reqnctapercluster") or (1, 1, 1)
    threads = _extents(head[3], "maxntid|reqntid")
    entry = Entry(head[1], line, target[1], parameters, threads, cluster)
    _module_variables(text[: heads[0].start()], entry)
    _Body(text, head.end(), entry).read()
    return entry


def operand_of(text: str, registers=None):
    """One operand; `registers(name)` gives a register's number or None."""
    text = text.strip()
    look_up = registers or (lambda name: None)
    if (number := look_up(text)) is not None:
        return Register(number)
    if text.startswith("{"):
        return Vector(tuple(operand_of(x, look_up) for x in split(_inside(text, "}"))))
    if text.startswith("["):
        return _memory(_inside(text, "]"), look_up)
    if "|" in text:
        first, _, second = text.partition("|")
        return Pair(operand_of(first, look_up), operand_of(second, look_up))
    if text == "_":
        return Nothing()
    if placeholder := re.fullmatch(r"<(\w+)>", text):
        return Placeholder(placeholder[1])
    if text.startswith("!") and (number := look_up(text[1:].strip())) is not None:
        return Register(number, negated=True)
    if _NUMBER.fullmatch(text):
        return Immediate(text)
    if text.startswith("%") or text in ("WARP_SZ",):
        return Special(text)
    if symbol := re.fullmatch(r"([A-Za-z_$][\w$.]*)\s*(?:\+\s*(\d+))?", text):
        return Symbol(symbol[1], int(symbol[2] or 0))
    raise PtxError(f"{text!r} is no operand")


def split(text: str, separator: str = ",") -> list[str]:
    """Parts between separators outside all brackets."""
    if not _BRACKETS.search(text):
        parts = [part.strip() for part in text.split(separator)]
        return parts if parts[-1] else parts[:-1]
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == separator and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last or parts else []


_BRACKETS = re.compile(r"[{\[(]")
_NUMBER = re.compile(
    r"-?(0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|\d+U?|"
    r"\d*\.\d+([eE][+-]?\d+)?)"
)
_TYPE = "|".join(sorted(TYPE_BYTES, key=len, reverse=True))
_VARIABLE = re.compile(
    rf"((?:\.(?:extern|visible|weak|common)\s+)*)\.(shared|global|const|local)\b\s*"
    rf"(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(\d+)\s*)?\.({_TYPE})\s+([\w$%.]+)\s*"
    r"(?:\[\s*(\w*)\s*\])?\s*(?:=\s*(.*))?",
    re.S,
)
_PARAMETER = re.compile(
    rf"\.param\s+(?:\.align\s+(\d+)\s+)?\.({_TYPE})\s+(?:\.ptr\s+)?(?:\.(?:global|shared|const|"
    r"local)\s+)?(?:\.align\s+\d+\s+)?([\w$%.]+)\s*(?:\[\s*(\d+)\s*\])?"
)
_BLANK = re.compile(r"[\s;]+")
_LINE_DIRECTIVE = re.compile(r"\.(loc|file)\b[^\n;]*")
_SECTION = re.compile(r"\.section[^{]*\{.*?\}", re.S)
_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
_INSTRUCTION = re.compile(r"(?:@\s*(!?)\s*([\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)


def _without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda c: re.sub(r"[^\n]", " ", c[0]), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def _inside(text: str, closing: str) -> str:
    if not text.endswith(closing):
        raise PtxError(f"{text!r} lacks its {closing!r}")
    return text[1:-1]


def _memory(text: str, registers) -> Memory:
    base, *rest = split(text) or [""]
    address = re.fullmatch(r"(<?[\w$%.]+>?)\s*(?:\+\s*(-?\w+)|(-\d+))?", base)
    if address is None or len(rest) > 1:
        raise PtxError(f"[{text}] is no address")
    coordinates = operand_of(rest[0], registers).items if rest else ()
    offset = int(address[2] or address[3] or "0", 0)
    return Memory(operand_of(address[1], registers), offset, coordinates)


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _parameters(text: str, line: int) -> list[Parameter]:
    """The parameters of text that begins in a line."""
    found, end, position = [], 0, 0
    for part in split(text):
        position = text.index(part, position)
        own_line = line + _line(text, position) - 1
        declared = _PARAMETER.fullmatch(part)
        if declared is None:
            raise PtxError(
                f"line {own_line}: {shortened(part)!r} is no parameter that the executor knows"
            )
        alignment, type_, name, count = declared.groups()
        size = TYPE_BYTES[type_]
        alignment = int(alignment or size)
        start = -(-end // alignment) * alignment
        found.append(Parameter(name, type_, start, size * int(count or 1), own_line))
        end = start + size * int(count or 1)
    return found


def _extents(directives: str, names: str) -> tuple[int, int, int] | None:
    """One to three numbers behind a directive of these names; None where there is none."""
    numbers = r"\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?"
    found = re.search(rf"\.(?:{names}){numbers}", directives)
    return tuple(int(n or 1) for n in found.groups()) if found else None


def _module_variables(text: str, entry: Entry) -> None:
    position = 0
    for part in text.split(";")[:-1]:
        start = re.search(
            r"^\s*\.(?:extern|visible|weak|common|shared|global|const)\b", part, re.M
        )
        if start and ".func" not in part:
            declaration = part[start.start() :].strip()
            try:
                _declare(declaration, entry)
            except PtxError as error:
                line = _line(text, text.index(declaration, position))
                raise PtxError(f"line {line}: {error}") from None
        position += len(part) + 1


def _declare(text: str, entry: Entry) -> None:
    declared = _VARIABLE.fullmatch(text)
    if declared is None:
        raise PtxError(f"{shortened(text)!r} is no declaration that the executor knows")
    linkage, space, alignment, type_, name, count, initial = declared.groups()
    size = TYPE_BYTES[type_]
    n_bytes = size if count is None else size * int(count, 0) if count else None
    if n_bytes is None and not (space == "shared" and "extern" in linkage):
        raise PtxError(f"{shortened(text)!r}: only extern shared arrays have no size")
    content = b""
    if initial:
        values = re.findall(r"-?0[xX][0-9a-fA-F]+|-?\d+", initial)
        content = b"".join((int(v, 0) % 256**size).to_bytes(size, "little") for v in values)
    alignment = int(alignment or size)
    entry.variables[name] = Variable(name, space, n_bytes, alignment, content)


class _Body:
    """Reads the statements between an entry's braces."""

    def __init__(self, text: str, start: int, entry: Entry):
        self.text, self.position, self.entry = text, start, entry
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        # Register names and number of each open scope, the outermost first.
        self.scopes: list[tuple[dict[str, int], int]] = [({}, 0)]
        self.num_scopes = 1
        self.branches: list[tuple[int, list[int]]] = []

    def read(self) -> None:
        try:
            while self.scopes:
                self._next()
            self._resolve_branches()
        except PtxError as error:
            if str(error).startswith("line "):
                raise
            raise PtxError(f"line {self._line(self.position)}: {error}") from None

    def _line(self, position: int) -> int:
        return bisect_right(self.newlines, position - 1) + 1

    def _next(self) -> None:
        text = self.text
        if blank := _BLANK.match(text, self.position):
            self.position = blank.end()
        if self.position >= len(text):
            raise PtxError(f"the body of {shortened(self.entry.name)} has no closing brace")
        if text[self.position] == "{":
            self.scopes.append(({}, self.num_scopes))
            self.num_scopes += 1
            self.position += 1
        elif text[self.position] == "}":
            self.scopes.pop()
            self.position += 1
        elif skipped := (
            _LINE_DIRECTIVE.match(text, self.position) or _SECTION.match(text, self.position)
        ):
            self.position = skipped.end()
        elif label := _LABEL.match(text, self.position):
            self.entry.body.append(Label(label[1], self.scopes[-1][1]))
            self.position = label.end()
        else:
            end = text.find(";", self.position)
            if end < 0:
                raise PtxError("a statement without a semicolon")
            self._statement(" ".join(text[self.position : end].split()))
            self.position = end + 1

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith(".pragma"):
            pass
        elif text.startswith("."):
            _declare(text, self.entry)
        else:
            self._instruction(text)

    def _registers(self, text: str) -> None:
        declared = _REGISTERS.fullmatch(text)
        if declared is None or declared[1] not in TYPE_BYTES:
            raise PtxError(f"{text!r}: the executor has no such registers")
        for name in split(declared[2]):
            counted = re.fullmatch(r"(.*)<(\d+)>", name)
            names = [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [name]
            for each in names:
                self.scopes[-1][0][each] = len(self.entry.register_types)
                self.entry.register_types.append(declared[1])

    def _register(self, name: str) -> int | None:
        for names, _ in reversed(self.scopes):
            if name in names:
                return names[name]
        return None

    def _instruction(self, text: str) -> None:
        line = self._line(self.position)
        matched = _INSTRUCTION.fullmatch(text)
        if matched is None:
            raise PtxError(f"{shortened(text)!r} is no instruction")
        negated, predicate, opcode, rest = matched.groups()
        guard = None
        if predicate is not None:
            number = self._register(predicate)
            if number is None:
                raise PtxError(f"{shortened(text)!r}: {predicate} is not declared")
            guard = Register(number, bool(negated))
        if rest.startswith("("):
            # A call: the executor refuses it when it is compiled, by its name.
            operands = ()
        else:
            operands = tuple(operand_of(x, self._register) for x in split(rest))
        if opcode.split(".")[0] == "bra":
            self.branches.append((len(self.entry.body), [scope for _, scope in self.scopes]))
        self.entry.body.append(Statement(opcode, operands, guard, line, text))

    def _resolve_branches(self) -> None:
        body = self.entry.body
        labels = {item for item in body if isinstance(item, Label)}
        for position, scopes in self.branches:
            branch = body[position]
            try:
                check_operands(branch, 1)
            except PtxError as error:
                raise PtxError(f"{branch}: {error}") from None
            name = getattr(branch.operands[-1] if branch.operands else None, "name", None)
            found = [Label(name, s) for s in reversed(scopes) if Label(name, s) in labels]
            if not found:
                raise PtxError(f"line {branch.line}: there is no label {name}")
            body[position] = Statement(
                branch.opcode, (found[0],), branch.predicate, branch.line, branch.text
            )
