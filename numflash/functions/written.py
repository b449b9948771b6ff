"""Functions that are texts: the way of a program's text back into a call.

Front ends hand a user's function through graphs that live longer than the process, as text. There
it becomes a function again, which is traced like any other and gives the same program.
"""

from dataclasses import dataclass

from numflash.functions.nodes import LEAF, Node, apply
from numflash.functions.paths import TraceError
from numflash.functions.program import Program
from numflash.functions.symbols import Symbol, node_of


@dataclass(frozen=True)
class WrittenFunction:
    """One result of a program, as a function of symbols.

    Attributes:
        text: of the program (`Program.text`).
        result: "score", "slope" (the derivative that was given with it) or "keep".

    Raises:
        ValueError: no program has this text, or it has no such result.
    """

    text: str
    result: str

    def __post_init__(self):
        if Program.parse(self.text).results[self.result] is None:
            raise ValueError(f"the program has no {self.result}: {self.text[:80]!r}")

    def __call__(self, *arguments):
        """Of (score, batch, head, q_idx, kv_idx, *aux), for "keep" without the score."""
        program = Program.parse(self.text)
        letters = "bhij" if self.result == "keep" else "sbhij"
        places, aux = arguments[: len(letters)], arguments[len(letters) :]
        trace = next((x.trace for x in arguments if isinstance(x, Symbol)), None)
        if trace is None:
            raise TraceError("a function that is a text takes symbols")
        found = {LEAF[name]: node_of(x) for name, x in zip(letters, places, strict=True)}
        for node in program.nodes:
            if node not in found:
                found[node] = _again(node, [found[each] for each in node.args], aux, trace)
        return trace.symbol(found[program.results[self.result]])


def _again(node: Node, operands: list[Node], aux: tuple, trace) -> Node:
    """A node over other operands, which reads what stands in its place of `aux`."""
    if node.op == "number":
        return node_of(aux[node.value])
    if node.op == "load":
        array = aux[node.value]  # one without axes is given as its element
        return node_of(array[tuple(map(trace.symbol, operands))] if operands else array)
    return apply(node.op, *operands) if operands else node
