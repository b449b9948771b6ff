"""The ways through a function whose Python `if` looks at symbols.

A function is called once for each way, and gets other truth values each time. What it returned
becomes one node, in which the conditions choose.
"""

from collections.abc import Callable

from numflash.functions.nodes import Node, apply, const

MAX_PATHS = 64
"""Ways through a function whose Python `if` looks at symbols."""


class TraceError(TypeError):
    """A function does what symbols cannot record; the message says what, and what to write."""


class BranchError(TraceError):
    """A Python `if` asks for the truth of a symbol."""


class Path:
    """One way through a function.

    Attributes:
        decisions: truth values for `if`, in the order in which they are asked for. What is asked
            for beyond them is true, and appended.
        asked: the conditions of the decisions.
    """

    def __init__(self, decisions: list[bool]):
        self.decisions, self.asked = decisions, []

    def decide(self, condition: Node) -> bool:
        """The truth value of a condition on this way."""
        if condition in self.asked:
            return self.decisions[self.asked.index(condition)]
        if len(self.asked) == MAX_PATHS:
            raise TraceError(
                f"a loop or an `if` asks more than {MAX_PATHS} times for what is known on the "
                "device only; write where(), or a loop over a constant number of steps"
            )
        self.asked.append(condition)
        if len(self.asked) > len(self.decisions):
            self.decisions.append(True)
        return self.decisions[len(self.asked) - 1]


def along_all_paths(once: Callable[[Path], Node], named: str) -> Node:
    """What a function returns, whichever way it takes.

    Args:
        once: calls the function on one way.
        named: the function, for the message.

    Raises:
        TypeError: it has more than MAX_PATHS ways.
    """
    # Each way decides otherwise than those before.
    decisions: list[bool] = []
    ways = []
    while True:
        path = Path(decisions)
        result = once(path)
        if result in path.asked:  # as of `x and y`, which is x where x is false
            result = const(decisions[path.asked.index(result)])
        ways.append((tuple(path.asked), tuple(decisions), result))
        if len(ways) > MAX_PATHS:
            raise TypeError(
                f"{named} has more than {MAX_PATHS} ways through it, because its `if` and loops "
                "ask for numbers that are known on the device only; write where() instead"
            )
        decisions = list(decisions[: len(path.asked)])
        while decisions and not decisions[-1]:
            decisions.pop()
        if not decisions:
            return _joined(ways, 0)
        decisions[-1] = False


def _joined(ways: list, depth: int) -> Node:
    """One node of the ways that agree in their first `depth` decisions."""
    if len(ways) == 1:
        return ways[0][2]
    condition = ways[0][0][depth]
    sides = ([w for w in ways if w[1][depth] is truth] for truth in (True, False))
    return apply("where", condition, *(_joined(side, depth + 1) for side in sides))
