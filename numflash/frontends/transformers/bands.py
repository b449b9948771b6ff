"""What of a mask's expression is a band, which kernels have: the rest is asked of each key.

A mask is a conjunction of terms. Those that compare q_idx and kv_idx, each with factor 1, are a
band: query i sees the keys j with low <= j - i <= high.
"""

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import NamedTuple

from numflash.functions.nodes import LEAF, Node, apply, is_const

_BATCH, _QUERY, _KEY = (LEAF[letter] for letter in "bij")
# A linear form: factors by node, and a number under None.
_Form = dict[Node | None, int]


class Band(NamedTuple):
    """The keys j of query i with low <= j - i <= high; None is no limit.

    With `moves` both limits lie further on by the query's offset, which is a tensor.
    """

    low: int | None = None
    high: int | None = None
    moves: bool = False

    def within(self, q_length: int, kv_length: int) -> "Band":
        """The band without limits that hide nothing of so many queries and keys."""
        low, high, moves = self
        if moves:
            return self
        if low is not None and low <= 1 - q_length:
            low = None
        if high is not None and high >= kv_length - 1:
            high = None
        return Band(low, high)


class Split(NamedTuple):
    """A mask in parts.

    Attributes:
        band: keys outside are hidden.
        rest: what else the mask asks, a node; None if nothing.
        packed: where the rest asks for nothing but that query and key belong to one sequence, and
            for a band of their positions in it: that band. Else None.
    """

    band: Band
    rest: Node | None
    packed: Band | None


def split(
    keep: Node,
    numbers: Mapping[int, int],
    offset: int | None,
    q_length: int,
    kv_length: int,
) -> Split:
    """A mask's expression in parts.

    Args:
        keep: the expression.
        numbers: values of numbers of `aux` that it reads, by their places.
        offset: the place in `aux` of a query's offset that is a tensor, at least 0.
        q_length, kv_length: how many queries and keys there are. What always holds for them is
            left out.
    """
    ends = {_QUERY: q_length - 1, _KEY: kv_length - 1}
    lows, highs, rest = [], [], []
    for term in _terms(keep):
        form = _excess(term, numbers)
        if is_const(term, True) or (form is not None and _most(form, ends, offset) <= 0):
            continue
        side, limit = _limit(form, _KEY, _QUERY, offset)
        {"low": lows, "high": highs, "": rest}[side].append((term, limit))
    moves = any(limit[1] for _, limit in highs)
    for side in lows, highs:
        rest += [each for each in side if each[1][1] != moves]
        side[:] = [each for each in side if each[1][1] == moves]
    low = max((limit[0] for _, limit in lows), default=None)
    high = min((limit[0] for _, limit in highs), default=None)
    if low is not None and high is not None and low > high:
        rest, low, high = [*rest, *lows, *highs], None, None
    terms = [term for term, _ in rest]
    if not terms:
        return Split(Band(low, high, moves), None, None)
    packed = _packed(terms, numbers) if (low, high) == (None, None) else None
    return Split(Band(low, high, moves), reduce(_and, terms), packed)


def _and(a: Node, b: Node) -> Node:
    return apply("and", a, b)


def _terms(node: Node) -> Iterable[Node]:
    """The terms of a conjunction; |x| <= y is two of them."""
    if node.op == "and" and node.type == "b":
        for each in node.args:
            yield from _terms(each)
    elif node.op in ("lt", "le") and node.args[0].op == "abs" and node.args[0].type == "i":
        (x,), y = node.args[0].args, node.args[1]
        yield apply(node.op, x, y)
        yield apply(node.op, apply("neg", x), y)
    else:
        yield node


def _excess(term: Node, numbers: Mapping[int, int]) -> _Form | None:
    """The form that is at most 0 where the term holds; None if there is none."""
    if term.op not in ("lt", "le") or term.args[0].type != "i":
        return None
    form = _sum(_form(term.args[0], numbers), _form(term.args[1], numbers), -1)
    return _sum(form, {None: int(term.op == "lt")}, 1)


def _form(node: Node, numbers: Mapping[int, int]) -> _Form:
    if node.op == "const":
        return {None: node.value}
    if node.op == "number" and node.value in numbers:
        return {None: numbers[node.value]}
    if node.op in ("add", "sub"):
        a, b = (_form(each, numbers) for each in node.args)
        return _sum(a, b, 1 if node.op == "add" else -1)
    if node.op == "neg":
        return _sum({}, _form(node.args[0], numbers), -1)
    if node.op == "mul" and is_const(node.args[1]):  # constants come last
        return _sum({}, _form(node.args[0], numbers), node.args[1].value)
    return {node: 1}


def _sum(a: _Form, b: _Form, factor: int) -> _Form:
    found = {x: a.get(x, 0) + factor * b.get(x, 0) for x in a | b}
    return {x: n for x, n in found.items() if n}


def _most(form: _Form, ends: Mapping[Node, int], offset: int | None) -> float:
    """The largest value of a form, or infinity where nobody can tell."""
    most = form.get(None, 0)
    for node, factor in form.items():
        if node is None or (factor < 0 and (node in ends or _is_offset(node, offset))):
            continue  # at least 0, so that the product is at most 0
        if node not in ends:
            return float("inf")
        most += factor * ends[node]
    return most


def _is_offset(node: Node, offset: int | None) -> bool:
    return node.op == "load" and node.value == offset and not node.args


def _limit(
    form: _Form | None, key: Node, query: Node, offset: int | None
) -> tuple[str, tuple[int, bool]]:
    """("low" or "high", (limit, whether it moves)) of key - query; ("", ...) of another form."""
    found = dict(form or {})
    number, of_key, of_query = (found.pop(each, 0) for each in (None, key, query))
    nothing = "", (0, False)
    if (of_key, of_query) not in ((1, -1), (-1, 1)) or len(found) > 1:
        return nothing
    moves = bool(found)
    if moves and not all(_is_offset(x, offset) and n == -of_key for x, n in found.items()):
        return nothing
    return ("high", (-number, moves)) if of_key == 1 else ("low", (number, moves))


def _packed(terms: list[Node], numbers: Mapping[int, int]) -> Band | None:
    """The band of positions in sequences, where terms ask for nothing else but one sequence."""
    lows, highs, same, arrays = [], [], 0, set()
    for term in terms:
        if term.op == "eq" and (read := _of_both(term.args)) is not None:
            same += 1
            continue
        form = _excess(term, numbers) or {}
        read = _of_both([x for x in form if x is not None])
        if read is None:
            return None
        key, query, k = read
        arrays.add(k)
        side, (limit, _) = _limit(form, key, query, None)
        if not side:
            return None
        (lows if side == "low" else highs).append(limit)
    if same != 1 or len(arrays) > 1:
        return None
    return Band(max(lows, default=None), min(highs, default=None))


def _of_both(reads: Iterable[Node]) -> tuple[Node, Node, int] | None:
    """(array[b, j], array[b, i], array) of two reads that are these, in any order."""
    reads = list(reads)
    if len(reads) == 2:
        for key, query in (reads, reads[::-1]):
            if (
                key.op == query.op == "load"
                and key.value == query.value
                and key.args == (_BATCH, _KEY)
                and query.args == (_BATCH, _QUERY)
            ):
                return key, query, key.value
    return None
