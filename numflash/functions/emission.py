"""A program as Python source of device functions: straight lines, one operation each.

    known_of_head(given, b, h) -> known      what b, h and numbers decide, a flat tuple
    score(s, i, j, known) -> (s, ds)         the score and its derivative by s
    keep(i, j, known) -> bool
    partial_N(s, i, j, known) -> float       derivative of the score by what read N reads, and
    offset_N(s, i, j, known) -> i64          the offset of that, in elements

    score_of_pair(s, right, scale, i, key, step, j, j_right, left, known) -> (s, ds, right, ds)
    keep_of_pair(i, key, step, j, j_right, left, known) -> (bool, bool)

are of two neighbouring keys, whose elements one read gives, from key + step on, an even number,
where `left` are left; elsewhere they are j and j_right. The scores are s scale and right scale.
There are such functions where something is read so (`Program.pairs`).
`score_by_distance` and `keep_by_distance` are the same with float32 places, of which only i - j
counts; a program that looks at a place itself has none.

The source is made of checked nodes only, and means the same on the GPU and in the simulator:
floats are float32, integers int32 but for offsets. A division by what a head knows is a product,
and a product that is added to something is an fma. A place that is an index as it is, is inside
its array; a computed one is brought inside. `tiles.programs` has the functions that it calls.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from numflash.functions.arrays import PAIR_BYTES
from numflash.functions.distance import DISTANCE, by_distance
from numflash.functions.nodes import (
    FUNCTIONS,
    LEAF,
    LEAVES,
    Node,
    apply,
    const,
    has_reciprocal,
    is_const,
    make,
    order,
)
from numflash.functions.program import Program, axes_of

_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "shl": "<<",
    "shr": ">>",
    "and": "&",
    "or": "|",
    "xor": "^",
    "lt": "<",
    "le": "<=",
    "eq": "==",
    "ne": "!=",
}
_PLACES_OF_SCORES = frozenset("sij")
# The node of a read of two neighbours, and that of one of them: the first is 0, the second 1.
_PAIR, _OF_PAIR = "pair", "of pair"
_READS = ("load", _PAIR)
_PLACES_OF_PAIR = "i, key, step, j, j_right, left"
_ATOMS = frozenset(("const", "number", "argument", *LEAVES))


def source_of(program: Program, with_partials: bool = False) -> str:
    """The source of a program's functions; `partial_N` and `offset_N` only if asked for."""
    nodes = [program.score or Node("s", "f"), program.slope]
    nodes.append(const(True) if program.keep is None else program.keep)
    partials = program.partials if with_partials else ()
    nodes += [partial.slope for partial in partials]
    nodes += [partial.load for partial in partials]
    far = [by_distance(node) for node in nodes[:3]]
    score, slope, keep, *rest = _rewritten(nodes)
    known = _Known(program.aux)
    functions = [
        _function("score(s, i, j, known)", [score, slope], known),
        _function("keep(i, j, known)", [keep], known),
    ]
    for n, (value, read) in enumerate(
        zip(rest[: len(partials)], rest[len(partials) :], strict=True)
    ):
        functions.append(_function(f"partial_{n}(s, i, j, known)", [value], known))
        functions.append(_function(f"offset_{n}(s, i, j, known)", [read], known, offset=True))
    if program.pairs & set(order(nodes[:2])):
        head = f"score_of_pair(s, right, scale, {_PLACES_OF_PAIR}, known)"
        functions.append(_function(head, _of_pair(nodes[:2], program.pairs), known))
    if program.pairs & set(order(nodes[2:3])):
        head = f"keep_of_pair({_PLACES_OF_PAIR}, known)"
        functions.append(_function(head, _of_pair(nodes[2:3], program.pairs), known))
    if None not in far[:2]:
        functions.append(
            _function("score_by_distance(s, i, j, known)", _rewritten(far[:2]), known)
        )
    if far[2] is not None:
        functions.append(_function("keep_by_distance(i, j, known)", _rewritten(far[2:]), known))
    return "\n\n".join([known.function(), *functions])


def _rewritten(roots: list[Node]) -> list[Node]:
    """The nodes with products for divisions by what a head knows, and its factors together."""
    new: dict[Node, Node] = {}
    for node in order(roots):
        args = tuple(new[a] for a in node.args)
        if node.op == "div" and not _of_head(args[0]) and _of_head(args[1]):
            new[node] = _product(args[0], make("div", const(1.0), args[1]))
        elif node.op == "mul" and node.type == "f":
            new[node] = _product(*args)
        elif node.args:
            new[node] = Node(node.op, node.type, args, node.value)
        else:
            new[node] = node
    return [new[root] for root in roots]


def _of_pair(roots: list[Node], pairs: frozenset[Node]) -> list[Node]:
    """The nodes for the first key, then for the second; scores are products, for fmas."""
    found, scale, key = [], _argument("scale", LEAF["s"]), _argument("key", LEAF["j"])
    names = {"s": ("s", "right"), "j": ("j", "j_right")}
    for n in range(2):
        s, j = (_argument(names[each][n], LEAF[each]) for each in "sj")
        new = {LEAF["s"]: make("mul", s, scale), LEAF["j"]: j}
        for node in order(roots):
            if node in pairs:
                pair = Node(_PAIR, node.type, (*node.args[:-1], key), node.value)
                new[node] = Node(_OF_PAIR, node.type, (pair,), n)
            elif node not in new:
                args = tuple(new[a] for a in node.args)
                new[node] = Node(node.op, node.type, args, node.value) if args else node
        found += [new[root] for root in roots]
    return _rewritten(found)


def _load_of(pair: Node) -> Node:
    """The read of a first element that a read of two stands for."""
    return Node("load", pair.type, (*pair.args[:-1], LEAF["j"]), pair.value)


def _argument(name: str, leaf: Node) -> Node:
    """An argument of the generated function in place of a leaf."""
    node = Node("argument", leaf.type, (), name)
    node.uses = leaf.uses
    return node


def _product(a: Node, b: Node) -> Node:
    """A product a b; of what a head knows and a product with more of that, c (d x), (c d) x."""
    for x, y in ((a, b), (b, a)):
        if _of_head(x) and y.op == "mul" and not _of_head(y):
            inner = next((z for z in y.args if _of_head(z)), None)
            if inner is not None:
                (other,) = (z for z in y.args if z is not inner)
                together = apply("mul", x, inner)
                if not is_const(together) or has_reciprocal(together.value):
                    return apply("mul", other, together)
    return make("mul", a, b)


def _of_head(node: Node) -> bool:
    return not node.uses & _PLACES_OF_SCORES


@dataclass
class _Known:
    """What is known of a head: name -> the expression that `known_of_head` returns for it."""

    aux: tuple
    entries: dict[str, str] = field(default_factory=dict)
    roots: list[Node] = field(default_factory=list)
    offsets: list[Node] = field(default_factory=list)

    def value(self, node: Node) -> str:
        """The name of a node's value."""
        if node.op in LEAVES:
            return self.given(node.op, node.op)
        if node.op == "number":
            return self.given(f"a{node.value}")
        return self._numbered("v", self.roots, node)

    def given(self, name: str, value: str | None = None) -> str:
        """The name of an argument of the kernel."""
        self.entries.setdefault(name, value or f"given.{name}")
        return name

    def offset(self, node: Node) -> str:
        """The name of the part of a read's offset that a head knows."""
        return self._numbered("o", self.offsets, node)

    def _numbered(self, letter: str, known: list[Node], node: Node) -> str:
        if node not in known:
            known.append(node)
        name = f"{letter}{known.index(node)}"
        self.entries.setdefault(name, name)
        return name

    def function(self) -> str:
        """The source of `known_of_head`."""
        lines = _Lines(self.aux, "", lambda name: f"given.{name}")
        lines.write([*self.roots, *(a for node in self.offsets for a in _head_indices(node))])
        for n, node in enumerate(self.roots):
            lines.line(f"v{n}", lines.name(node))
        for n, node in enumerate(self.offsets):
            lines.line(f"o{n}", lines.offset(node, of_head=True))
        values = "".join(f"{value}, " for value in self.entries.values()) or "f32(0), "
        head = "def known_of_head(given, b, h):"
        return "\n".join([head, *lines.lines, f"    return ({values})"])


def _head_indices(read: Node) -> list[Node]:
    return [index for index in read.args if _of_head(index) and not is_const(index, 0)]


def _function(head: str, roots: list[Node], known: _Known, offset: bool = False) -> str:
    used: dict[str, None] = {}

    def from_known(name: str) -> str:
        known.given(name)
        used[name] = None
        return name

    lines = _Lines(known.aux, _PLACES_OF_SCORES, from_known, known, used)
    if offset:
        (read,) = roots
        lines.write([index for index in read.args if not _of_head(index)])
        results = [lines.offset(read)]
    else:
        lines.write(roots)
        results = [lines.name(root) for root in roots]
    places = list(known.entries)
    first = [f"    {name} = known[{places.index(name)}]" for name in used]
    return "\n".join([f"def {head}:", *first, *lines.lines, f"    return {', '.join(results)}"])


class _Lines:
    """The lines of a function, for what is not known where it begins."""

    def __init__(
        self,
        aux: tuple,
        places: Iterable[str],
        given: Callable[[str], str],
        known: _Known | None = None,
        used: dict[str, None] | None = None,
    ):
        self.aux, self.places, self.given = aux, frozenset(places), given
        self.known, self.used = known, used
        self.lines: list[str] = []
        self.names: dict[Node, str] = {}
        self.not_negative: dict[Node, bool] = {}

    def line(self, name: str, expression: str) -> None:
        self.lines.append(f"    {name} = {expression}")

    def write(self, roots: list[Node]) -> None:
        """The lines of these nodes and of what they need."""
        nodes = self._needed(roots)
        in_fma = self._products_in_fma(nodes, roots)
        for node in nodes:
            if node in in_fma:
                continue
            expression = self._expression(node, in_fma)
            if node.op in _ATOMS or self._is_known(node):
                self.names[node] = expression
            else:
                name = f"t{len(self.lines)}"
                self.line(name, expression)
                self.names[node] = name

    def name(self, node: Node) -> str:
        return self.names[node]

    def _is_known(self, node: Node) -> bool:
        return self.known is not None and node.op != "const" and _of_head(node)

    def _needed(self, roots: list[Node]) -> list[Node]:
        """The nodes to write, operands first: those below what is known are not among them."""
        found, seen = [], set()
        stack = [(root, False) for root in reversed(roots)]
        while stack:
            node, done = stack.pop()
            if done:
                found.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                if not self._is_known(node):
                    stack += [(a, False) for a in reversed(self._operands(node))]
        return found

    def _operands(self, node: Node) -> list[Node]:
        """What the node's own line names."""
        if node.op not in _READS:
            return list(node.args)
        known = self.known is not None
        return [a for a in node.args if not is_const(a, 0) and not (known and _of_head(a))]

    def _products_in_fma(self, nodes: list[Node], roots: list[Node]) -> set[Node]:
        """The products that only one sum takes, and not as its second product."""
        used = Counter(roots)
        for node in nodes:
            if not self._is_known(node):
                used.update(self._operands(node))
        found = set()
        for node in nodes:
            if node.op in ("add", "sub") and node.type == "f" and not self._is_known(node):
                product = next(
                    (
                        a
                        for a in node.args
                        if a.op == "mul" and used[a] == 1 and not self._is_known(a)
                    ),
                    None,
                )
                if product is not None:
                    found.add(product)
        return found

    def _expression(self, node: Node, in_fma: set[Node]) -> str:
        if node.op == "const":
            return _literal(node)
        if self._is_known(node):
            name = self.known.value(node)
            self.used[name] = None
            return name
        if node.op in LEAVES:
            return node.op
        if node.op == "argument":
            return node.value
        if node == DISTANCE:
            return "i - j"
        if node.op == "number":
            return self.given(f"a{node.value}")
        if node.op == "load":
            return self._load(node)
        if node.op == _PAIR:
            return self._load_pair(node)
        if node.op == _OF_PAIR:
            (pair,) = node.args
            which = "second" if node.value else "first"
            return f"{which}_{self.aux[pair.value].dtype}({self.names[pair]})"
        product = next((a for a in node.args if a in in_fma), None)
        if product is not None and node.op in ("add", "sub"):
            return self._fma(node, product)
        x = [self.names[a] for a in node.args]
        if node.op in ("floordiv", "mod"):
            return self._whole_division(node, *x)
        if node.op in _CALLS:
            return f"{_CALLS[node.op]}({', '.join(x)})"
        return _PLAIN[node.op, node.type](*x)

    def _fma(self, node: Node, product: Node) -> str:
        a, b = node.args
        x, y = (self.names[p] for p in product.args)
        if node.op == "add":
            return f"fma_rn_f32({x}, {y}, {self.names[b if a is product else a]})"
        if a is product:
            return f"fma_rn_f32({x}, {y}, -{self.names[b]})"
        return f"fma_rn_f32(-{x}, {y}, {self.names[a]})"

    def _load(self, node: Node) -> str:
        given = self.aux[node.value]
        pointer = self.given(f"a{node.value}")
        return _LOADS[given.dtype](f"{pointer}[{self.offset(node)}]")

    def _load_pair(self, node: Node) -> str:
        dtype, pointer = self.aux[node.value].dtype, self.given(f"a{node.value}")
        # The step last: what comes before it is one address for a row.
        offset = self.offset(node, known_as=_load_of(node)) + " + step"
        return f"ld_global_pair_b{8 * PAIR_BYTES[dtype]}({pointer}, {offset}, left)"

    def offset(self, node: Node, of_head: bool = False, known_as: Node | None = None) -> str:
        """The offset of a read, in elements; with `of_head` only what a head knows of it.

        `known_as` is another read of which a head knows the same.
        """
        k, terms = node.value, []
        array = self.aux[k]
        if self.known is not None and _head_indices(node):
            name = self.known.offset(known_as or node)
            self.used[name] = None
            terms.append(name)
        for axis, (index, by) in enumerate(zip(node.args, axes_of(node), strict=True)):
            in_head = _of_head(index)
            if by == "0" or (in_head and self.known is not None) or (of_head and not in_head):
                continue
            position = self.names[index]
            if by == "" and index.op != "argument":
                size = self.given(f"a{k}_n{axis}")
                position = f"max(0, min({position}, {size} - 1))"
            unit = array.unit and axis == array.rank - 1
            terms.append(
                f"i64({position})" + ("" if unit else f" * {self.given(f'a{k}_s{axis}')}")
            )
        return " + ".join(terms) or "i64(0)"

    def _whole_division(self, node: Node, x: str, y: str) -> str:
        a, b = node.args
        if is_const(b) and b.value > 0 and b.value & (b.value - 1) == 0:
            if node.op == "mod":
                return f"i32({x} & {b.value - 1})"
            return f"i32({x} >> {b.value.bit_length() - 1})"
        if is_const(b) and b.value > 0:
            kind = "counts" if self._at_least_0(a) else "by_count"
            return f"{node.op}_{kind}({x}, {y})"
        return f"{node.op}_i32({x}, {y})"

    def _at_least_0(self, node: Node) -> bool:
        """Whether an integer cannot be negative, as far as that is known, overflows aside."""
        found = self.not_negative
        for n in order([node]):
            inner = [found[a] for a in n.args]
            found[n] = (
                n.op in ("b", "h", "i", "j", "abs")
                or (n.op == "const" and n.value >= 0)
                or (n.op == "load" and self.aux[n.value].dtype in ("uint8", "bool"))
                or (n.op in ("mod", "and", "max") and n.type == "i" and any(inner[-1:]))
                or (n.op in ("add", "mul", "floordiv", "min", "shr") and all(inner))
                or (n.op == "where" and all(inner[1:]))
            )
        return found[node]


def _literal(node: Node) -> str:
    if node.type != "f":
        return repr(node.value)
    value = node.value
    if value != value:
        return "NAN"
    if value in (float("inf"), float("-inf")):
        return "INF" if value > 0 else "NEG_INF"
    return f"f32({value!r})"


def _infix(sign: str, wrap: str = "{}") -> Callable:
    return lambda x, y: wrap.format(f"{x} {sign} {y}")


_PLAIN = {
    **{(op, "f"): _infix(sign) for op, sign in _INFIX.items()},
    **{(op, "b"): _infix(sign) for op, sign in _INFIX.items()},
    **{(op, "i"): _infix(sign, "i32({})") for op, sign in _INFIX.items()},
    ("xor", "b"): _infix("!="),
    ("neg", "f"): lambda x: f"-{x}",
    ("neg", "i"): lambda x: f"i32(-{x})",
    ("not", "b"): lambda x: f"not {x}",
    ("not", "i"): lambda x: f"i32(~{x})",
    ("abs", "f"): lambda x: f"abs({x})",
    ("abs", "i"): lambda x: f"i32(abs({x}))",
    ("min", "f"): lambda x, y: f"min_f32({x}, {y})",
    ("max", "f"): lambda x, y: f"max_f32({x}, {y})",
    ("min", "i"): lambda x, y: f"i32(min({x}, {y}))",
    ("max", "i"): lambda x, y: f"i32(max({x}, {y}))",
    ("where", "f"): lambda c, x, y: f"{x} if {c} else {y}",
    ("where", "b"): lambda c, x, y: f"{x} if {c} else {y}",
    ("where", "i"): lambda c, x, y: f"i32({x} if {c} else {y})",
}
_CALLS = {
    "div": "div",
    "pow": "power",
    "float": "f32",
    "int": "to_i32",
    **{name: name for name in FUNCTIONS},
}
_LOADS = {
    "float32": "{}".format,
    "float16": "cvt_f32_f16({})".format,
    "bfloat16": "from_bf16({})".format,
    "int32": "{}".format,
    "int64": "i32({})".format,
    "uint8": "i32({})".format,
    "bool": "{} != 0".format,
}
