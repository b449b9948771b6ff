"""`explain`: what each rank sends, receives and computes; no GPU and no communicator is needed."""

from dataclasses import dataclass
from numbers import Real

from numflash.configs import DTYPES
from numflash.distributed.layouts import Layout, expect_whole
from numflash.distributed.memory import Memory, best_method, memory_of, memory_of_heads
from numflash.distributed.pairs import Band
from numflash.distributed.sizes import Sizes, expect_heads, what_travels
from numflash.distributed.steps import Balance
from numflash.distributed.turns import Turn, Turns, of_gather, of_heads, of_ring, share_of
from numflash.distributed.wire import (
    expect_layout_for,
    expect_method_of_codes,
    expect_precision,
    recipe_of,
)
from numflash.problem.options import AttentionOptions, expect_bool, expect_one_of, kind_of
from numflash.problem.problem import expect_head_dim
from numflash.problem.problem import expect_precision as of_one_gpu
from numflash.runtime.views import numpy_dtype

_METHODS = ("auto", "gather", "ring", "heads")
_ACROSS = ("gather", "ring")
_TRAVELS = ("auto", "keys", "queries")


@dataclass(frozen=True)
class Explanation:
    """What the ranks of one problem do; `print` shows it as a table.

    Attributes:
        layout: who holds which tokens.
        method: ("gather",), ("ring",), or ("heads", the method across groups).
        backward: whether of the backward.
        travels: "keys" or "queries" in the backward of a ring, else None.
        turns: for each rank what it does from one wait to the next. All ranks have as many.
        memory: for each rank the bytes that it takes beyond operands and results, by what takes
            them, at most at a time.
        flops_per_score: floating-point operations for each visible score of a head.
        flops: a GPU's operations a second, as given.
        bandwidth: bytes a second that a rank can send, and receive, as given.

    Example:
        >>> from numflash.distributed import Layout, explain
        >>> heads = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 64}
        >>> layout = Layout.contiguous(4096, ranks=4)
        >>> explanation = explain(layout, **heads, method="ring", window_size=(500, 0))
        >>> [turn.what for turn in explanation.turns[0]]
        ['step 1 of 2', 'step 2 of 2']
        >>> explanation.sent[0], explanation.memory[0]["keys and values"]
        (524288, 524288)
    """

    layout: Layout
    method: tuple[str, ...]
    backward: bool
    travels: str | None
    turns: tuple[Turns, ...]
    memory: tuple[Memory, ...]
    flops_per_score: int
    flops: float | None = None
    bandwidth: float | None = None

    @property
    def sent(self) -> tuple[int, ...]:
        """Bytes that each rank sends."""
        return tuple(sum(turn.sent for turn in of_rank) for of_rank in self.turns)

    @property
    def received(self) -> tuple[int, ...]:
        """Bytes that each rank receives."""
        return tuple(sum(turn.received for turn in of_rank) for of_rank in self.turns)

    @property
    def work(self) -> tuple[int, ...]:
        """Floating-point operations of each rank, on visible scores alone."""
        return tuple(sum(map(self._work, of_rank)) for of_rank in self.turns)

    @property
    def balance(self) -> Balance:
        """How evenly the ranks share the work; 1 is best."""
        mean = sum(self.work) / len(self.work)
        if not mean:
            return Balance(1.0, 1.0)
        slowest = sum(max(map(self._work, now)) for now in self._by_turn())
        return Balance(max(self.work) / mean, slowest / mean)

    @property
    def workspace(self) -> int:
        """Bytes beyond operands and results, of the rank that takes most."""
        return max(sum(of_rank.values()) for of_rank in self.memory)

    @property
    def seconds(self) -> tuple[float, ...] | None:
        """For each turn how long its slowest rank takes by the figures given; None without.

        Calls and messages of a turn go on at the same time: it takes as long as the longer of
        the two. A figure that was not given counts as infinitely fast.
        """
        if self.flops is None and self.bandwidth is None:
            return None
        return tuple(max(map(self._seconds, now)) for now in self._by_turn())

    def of_rank(self, rank: int) -> str:
        """The turns of one rank with their calls, as a table.

        Raises:
            ValueError: no such rank.
        """
        tokens = self.layout.tokens(rank)
        lines = [f"rank {rank} of {self.layout.ranks}, {tokens} tokens"]
        for number, turn in enumerate(self.turns[rank], 1):
            sent, received = _bytes(turn.sent), _bytes(turn.received)
            lines.append(f"{number:3} {turn.what}: sends {sent}, receives {received}")
            for call in turn.calls:
                window = "all" if call.window == Band() else _window(call.window)
                lines.append(
                    f"      queries {call.q[0]} to {call.q[1] - 1}, keys {call.k[0]} to "
                    f"{call.k[1] - 1}, {turn.heads} heads, sees {window}, shift {call.shift}, "
                    f"{_operations(self._of_scores(call.scores, turn))}"
                )
        return "\n".join(lines)

    def __str__(self) -> str:
        n, tokens = self.layout.ranks, self.layout.seqlen
        which = "backward" if self.backward else "forward"
        travels = f", {self.travels} travel" if self.travels else ""
        busiest, lockstep = self.balance
        lines = [
            f"{' and '.join(self.method)}, {which}{travels}: {tokens} tokens on {n} ranks",
            f"busiest rank {busiest:.2f} of the mean, in lockstep {lockstep:.2f}",
            "",
        ]
        rows = [["turn", "", "calls", "mean work", "most work", "most sent", "most received"]]
        if self.seconds is not None:
            rows[0].append("predicted")
        for number, now in enumerate(self._by_turn()):
            work = [self._work(turn) for turn in now]
            calls = sorted({len(turn.calls) for turn in now})
            rows.append(
                [
                    str(number + 1),
                    now[0].what,
                    "-".join(map(str, sorted({calls[0], calls[-1]}))),
                    _operations(sum(work) / n),
                    _operations(max(work)),
                    _bytes(max(turn.sent for turn in now)),
                    _bytes(max(turn.received for turn in now)),
                ]
            )
            if self.seconds is not None:
                rows[-1].append(f"{1e3 * self.seconds[number]:.3f} ms")
        lines += _table(rows)
        lines.append("")
        most = max(self.memory, key=lambda of_rank: sum(of_rank.values()))
        parts = ", ".join(f"{name} {_bytes(size)}" for name, size in most.items() if size)
        lines.append(f"sent by a rank, at most: {_bytes(max(self.sent))}")
        lines.append(f"memory beyond operands and results: {_bytes(self.workspace)}")
        if parts:
            lines[-1] += f" ({parts})"
        if self.seconds is not None:
            figures = [f"{self.flops / 1e12:g} TFLOP/s"] if self.flops else []
            figures += [f"{self.bandwidth / 1e9:g} GB/s"] if self.bandwidth else []
            total = f"{1e3 * sum(self.seconds):.3f} ms"
            lines.append(f"predicted from {' and '.join(figures)}, as given: {total}")
        return "\n".join(lines)

    def _by_turn(self) -> list[tuple[Turn, ...]]:
        return list(zip(*self.turns, strict=True))

    def _work(self, turn: Turn) -> int:
        return turn.scores * self.flops_per_score

    def _of_scores(self, scores: int, turn: Turn) -> float:
        """The operations of one of a turn's calls."""
        of_all = sum(call.scores for call in turn.calls)
        return self._work(turn) * scores / of_all

    def _seconds(self, turn: Turn) -> float:
        computes = self._work(turn) / self.flops if self.flops else 0.0
        moves = max(turn.sent, turn.received) / self.bandwidth if self.bandwidth else 0.0
        return max(computes, moves)


def explain(
    layout: Layout,
    *,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    head_dim_v: int | None = None,
    dtype: str = "float16",
    batch: int = 1,
    method: str | tuple[str, str] = "auto",
    groups: int | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    by_position: bool = False,
    wire=None,
    precision: str | None = None,
    max_workspace: int | None = None,
    backward: bool = False,
    travels: str = "auto",
    flops: float | None = None,
    bandwidth: float | None = None,
) -> Explanation:
    """Say what each rank sends, receives and computes, step by step; nothing is run.

    Args:
        layout: who holds which tokens.
        num_heads_q, num_heads_kv: of queries, and of keys and values.
        head_dim, head_dim_v: of a head of queries and keys, and of values; None: the same.
        dtype: of q, k and v: "float16", "bfloat16" or "float32".
        batch: entries.
        method, wire, max_workspace, causal, window_size: as of `attention`.
        groups: neighbouring ranks that change tokens for heads, with a method of two.
        by_position: whether scores depend on positions: with ALiBi, dropout, a bias or functions.
            A call then has neighbouring tokens only.
        precision: as of `attention`. With "fp8" calls read the codes that travel.
        backward: whether of the backward.
        travels: as of `attention_backward`.
        flops: operations a second of one GPU in this pass, for a predicted time.
        bandwidth: bytes a second between a rank and the others, in each direction, likewise.

    Returns:
        an `Explanation`, whose numbers are attributes, and whose str is a table.

    Raises:
        TypeError, ValueError: bad input.
        UnsupportedError: a precision that `attention` refuses.

    Example:
        >>> from numflash.distributed import Layout, explain
        >>> layout = Layout.zigzag(8192, ranks=4)
        >>> heads = {"num_heads_q": 32, "num_heads_kv": 8, "head_dim": 128}
        >>> explanation = explain(layout, **heads, method="ring", causal=True)
        >>> explanation.sent
        (25165824, 25165824, 25165824, 25165824)
        >>> round(explanation.balance.lockstep, 2)
        1.0
        >>> print(explanation.of_rank(1).splitlines()[4].strip())
        queries 0 to 2047, keys 0 to 1023, 32 heads, sees all, shift 0, 34.36 GFLOP
    """
    AttentionOptions.of("explain", {"causal": causal, "window_size": window_size}).check()
    band = Band.of(causal, window_size)
    sizes = _sizes(layout, num_heads_q, num_heads_kv, head_dim, head_dim_v, dtype, batch, wire)
    sizes = sizes._replace(in_codes=_is_in_codes(precision, dtype, wire, method, backward))
    for name, value in (("by_position", by_position), ("backward", backward)):
        expect_bool(name, value)
    for name, figure in (("flops", flops), ("bandwidth", bandwidth)):
        _expect_figure(name, figure)
    if max_workspace is not None:
        expect_whole("max_workspace", max_workspace, 0)
    expect_one_of("travels", travels, _TRAVELS)
    size, across = _methods(method, groups, layout)
    merged, mine = layout, sizes
    if size > 1:
        expect_heads(size, num_heads_q, num_heads_kv)
        merged, mine = layout.merged(size), share_of(sizes, size)
    # Of two methods keys and values are quantised for the second.
    within = sizes if isinstance(method, str) else sizes._replace(recipe=None)
    asked = {"max_workspace": max_workspace, "backward": backward}
    if across == "auto":
        across = best_method(merged, band, mine, by_position=by_position, **asked)
    going = None
    if across == "ring" and backward:
        going = what_travels(merged, band, by_position, mine) if travels == "auto" else travels
    if across == "ring":
        turns = of_ring(merged, band, mine, by_position=by_position, travels=going)
    else:
        turns = of_gather(merged, band, mine, **asked)
    asked |= {"by_position": by_position, "travels": going}
    memory = [
        memory_of(across, merged, band, group, mine, **asked) for group in range(merged.ranks)
    ]
    names: tuple[str, ...] = (across,)
    if size > 1:
        share, tokens = share_of(within, size), merged.tokens
        memory = [
            memory_of_heads(share, within, tokens(r // size), layout.tokens(r), backward=backward)
            | memory[r // size]
            for r in range(layout.ranks)
        ]
        turns = of_heads(layout, within, size, turns, backward=backward)
        names = ("heads", across) if merged.ranks > 1 else ("heads",)
    d, dv = sizes.head_dim, sizes.head_dim_v
    per_score = 2 * (3 * d + 2 * dv) if backward else 2 * (d + dv)
    return Explanation(
        layout, names, backward, going, tuple(turns), tuple(memory), per_score, flops, bandwidth
    )


def _sizes(layout, num_heads_q, num_heads_kv, head_dim, head_dim_v, dtype, batch, wire) -> Sizes:
    """Raises TypeError, ValueError, UnsupportedError."""
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout, got {layout!r} ({kind_of(layout)})")
    for name, value in (("num_heads_q", num_heads_q), ("num_heads_kv", num_heads_kv)):
        expect_whole(name, value, 1)
    if num_heads_q % num_heads_kv:
        raise ValueError(
            f"num_heads_q must be a multiple of num_heads_kv, got {num_heads_q} and {num_heads_kv}"
        )
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    for name, value in (("head_dim", head_dim), ("head_dim_v", head_dim_v)):
        expect_head_dim(name, value)
    expect_one_of("dtype", dtype, DTYPES)
    expect_whole("batch", batch, 0)
    expect_layout_for(wire, layout)
    itemsize, recipe = numpy_dtype(dtype).itemsize, recipe_of(wire, head_dim)
    return Sizes(num_heads_q, num_heads_kv, head_dim, head_dim_v, itemsize, batch, recipe)


def _is_in_codes(precision, dtype: str, wire, method, backward: bool) -> bool:
    """Whether calls multiply codes. Raises TypeError, ValueError, UnsupportedError."""
    of_one_gpu(precision, dtype)
    expect_precision("explain", precision, wire, backward)
    if precision != "fp8":
        return False
    expect_method_of_codes(method)
    if dtype == "float32":
        raise TypeError('precision="fp8" is for float16 and bfloat16, got dtype float32')
    return True


def _methods(method, groups: int | None, layout: Layout) -> tuple[int, str]:
    """Ranks of a group that changes tokens for heads, 1 for none, and the method across groups.

    Raises TypeError, ValueError.
    """
    if isinstance(method, tuple | list):
        if len(method) != 2 or method[0] != "heads" or method[1] not in _ACROSS:
            raise ValueError(
                f'method must be ("heads", "gather") or ("heads", "ring") for two, got {method!r}'
            )
        if groups is None:
            raise ValueError(f"groups must be given with method={method!r}")
        expect_whole("groups", groups, 1)
        if layout.ranks % groups:
            raise ValueError(f"groups must divide the {layout.ranks} ranks, got {groups}")
        return groups, method[1]
    expect_one_of("method", method, _METHODS)
    if groups is not None:
        raise ValueError(f"groups must be None with method={method!r}, got {groups!r}")
    return (layout.ranks, "gather") if method == "heads" else (1, method)


def _expect_figure(name: str, figure) -> None:
    """Raises TypeError, ValueError."""
    if figure is None:
        return
    if isinstance(figure, bool) or not isinstance(figure, Real):
        raise TypeError(f"{name} must be a number, got {figure!r} ({kind_of(figure)})")
    if not 0 < figure < float("inf"):
        raise ValueError(f"{name} must be above 0, got {figure}")


def _window(band: Band) -> str:
    """The window in words."""
    left, right = ("all" if side is None else side for side in band)
    return f"{left} before and {right} after"


def _bytes(number: int) -> str:
    """Bytes, in the unit in which they read best."""
    return _in_units(number, 1024, ("bytes", "KiB", "MiB", "GiB"))


def _operations(number: float) -> str:
    """Floating-point operations, likewise."""
    return _in_units(number, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"))


def _in_units(number: float, base: int, units: tuple[str, ...]) -> str:
    """A number of at most four digits, in the first unit of which there are fewer than base."""
    if not number:
        return "0"
    power = 0
    while number >= base and power < len(units) - 1:
        number, power = number / base, power + 1
    return f"{number:.{1 if number >= 100 else 2}f}".rstrip("0").rstrip(".") + f" {units[power]}"


def _table(rows: list[list[str]]) -> list[str]:
    """Rows in columns: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    found = []
    for row in rows:
        cells = [
            cell.ljust(width) if i == 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        found.append("  ".join(cells).rstrip())
    return found
