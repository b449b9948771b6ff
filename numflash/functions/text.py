"""The text of a program: written, and read as if it came from a stranger.

The text is canonical: programs that compute the same in another order, with other names or with
operands exchanged, have the same one. It goes wherever a kernel's key goes, and back:

    1;float32[1];score=add(mul(aux0[h],float(sub(j,i))),s);keep=le(j,i)

A version, the kinds of `aux`, then parts: `t0=`, `t1=`, ... for what is used more than once, and
the results. None of it is evaluated.
"""

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

from numflash.functions.arrays import Array, Number
from numflash.functions.nodes import (
    LEAF,
    LEAVES,
    MAX_NODES,
    SIGNATURES,
    Node,
    const,
    load,
    make,
    number,
    order,
)

VERSION = "1"
RESULTS = "score", "keep", "slope"
_MAX_LENGTH = 200_000
# Deeper expressions are written in parts.
_DEPTH = 12
_KIND = re.compile(r"(?:(f32|i32)|([a-z0-9]{1,10})\[(\d)([up]?)\])", re.ASCII)
_TOKEN = re.compile(
    r"(-?\d+\.\d+(?:e[+-]?\d+)?|-?\d+e[+-]?\d+|-?inf|nan)|(-?\d+)|aux(\d+)|([a-z]\w*)|([(),\[\]])",
    re.ASCII,
)


def written(aux: Iterable[Array | Number], results: dict[str, Node | None]) -> str:
    """The text of a program with these `aux` and these results by their names."""
    roots = tuple(node for node in results.values() if node is not None)
    nodes, used = list(order(roots)), Counter(roots)
    for node in nodes:
        used.update(node.args)
    texts: dict[Node, str] = {}
    depths: dict[Node, int] = {}
    parts = []
    for node in nodes:
        depth = 1 + max((depths[a] for a in node.args), default=-1)
        operands = ",".join(texts[a] for a in node.args)
        if node.op == "load":
            text = f"aux{node.value}[{operands}]"
        elif node.op in SIGNATURES:
            text = f"{node.op}({operands})"
        else:
            text, depth = _leaf_text(node), 0
        is_atom = node.op not in SIGNATURES and node.op != "load"
        if not is_atom and (used[node] > 1 or depth >= _DEPTH):
            parts.append(f"t{len(parts)}={text}")
            text, depth = f"t{len(parts) - 1}", 0
        texts[node], depths[node] = text, depth
    for name, root in results.items():
        if root is not None:
            parts.append(f"{name}={texts[root]}")
    return ";".join([VERSION, ",".join(map(str, aux)), *parts])


def _leaf_text(node: Node) -> str:
    if node.op == "number":
        return f"aux{node.value}"
    if node.op != "const":
        return node.op
    if node.type == "b":
        return "true" if node.value else "false"
    if node.type == "i":
        return str(node.value)
    return str(np.float32(node.value))  # inf, -inf or nan, if it is not finite


def read(text: str) -> tuple[tuple[Array | Number, ...], dict[str, Node]]:
    """(aux, results by their names) of a text, which need not be canonical.

    Raises:
        ValueError: no program has this text.
    """
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"the text of a program has up to {_MAX_LENGTH} characters")
    version, *rest = text.split(";")
    if version != VERSION or len(rest) < 2:
        raise ValueError(f"a program must begin like {VERSION};float32[1];..., got {text[:40]!r}")
    kinds = [_kind(kind) for kind in rest[0].split(",")] if rest[0] else []
    reader, results = _Reader(tuple(kinds)), {}
    for part in rest[1:]:
        name, equals, expression = part.partition("=")
        if not equals or name in results:
            raise ValueError(f"a part of a program must be a name and an expression, got {part!r}")
        node = reader.read(expression)
        if name in RESULTS:
            results[name] = node
        elif name == f"t{len(reader.parts)}":
            reader.parts[name] = node
        else:
            raise ValueError(f"{name!r} is no name of a part of a program")
    return reader.aux, results


def _kind(text: str) -> Array | Number:
    match = _KIND.fullmatch(text)
    try:
        if match is None:
            raise TypeError("no such kind")
        if match[1]:
            return Number(match[1])
        return Array(match[2], int(match[3]), bool(match[4]), match[4] == "p")
    except TypeError:
        raise ValueError(f"{text[:40]!r} is no kind of an array or number of aux") from None


class _Reader:
    """Reads expressions: node by node, of known operations on operands of the right types."""

    def __init__(self, aux: tuple):
        self.aux, self.parts, self.count = aux, {}, 0

    def read(self, text: str) -> Node:
        """The node of a whole expression."""
        self.tokens, self.text, at = [], text, 0
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise self._wrong()
            self.tokens.append(match)
            at = match.end()
        self.tokens.reverse()
        node = self._expression(0)
        if self.tokens:
            raise self._wrong()
        return node

    def _wrong(self) -> ValueError:
        return ValueError(f"{self.text[:80]!r} is no expression of a program")

    def _expression(self, depth: int) -> Node:
        self.count += 1
        if not self.tokens or depth > _DEPTH or self.count > 4 * MAX_NODES:
            raise self._wrong()
        real, whole, k, name, _ = (token := self.tokens.pop()).groups()
        if real is not None:
            return const(float(real), "f")
        if whole is not None:
            return const(int(whole), "i")
        if k is not None:
            return self._of_aux(int(k), depth)
        if name in ("true", "false"):
            return const(name == "true")
        if name in LEAVES:
            return LEAF[name]
        if name in self.parts:
            return self.parts[name]
        if name in SIGNATURES and self._next("("):
            return make(name, *self._operands(")", depth))
        raise ValueError(f"{token[0]!r} is no operation or operand of a program")

    def _of_aux(self, k: int, depth: int) -> Node:
        if k >= len(self.aux):
            raise ValueError(f"the program reads aux{k} of {len(self.aux)}")
        type = self.aux[k].type
        return load(k, type, self._operands("]", depth)) if self._next("[") else number(k, type)

    def _next(self, text: str) -> bool:
        if self.tokens and self.tokens[-1][0] == text:
            self.tokens.pop()
            return True
        return False

    def _operands(self, end: str, depth: int) -> list[Node]:
        operands = []
        if self._next(end):
            return operands
        while True:
            operands.append(self._expression(depth + 1))
            if self._next(end):
                return operands
            if not self._next(","):
                raise self._wrong()
