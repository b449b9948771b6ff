"""How many bytes tokens have on their way, and what follows from that. Pure numbers.

Which messages there are stands in `steps`; how large they are, here. Methods, `explain` and the
benchmark read both.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from numflash.configs import padded_fp8_head_dim
from numflash.distributed import steps
from numflash.distributed.layouts import Layout
from numflash.distributed.pairs import Band
from numflash.distributed.steps import Exchange
from numflash.problem.fp8 import Fp8Recipe

ALIGNMENT = 128
"""Bytes, of each array of a message that has several."""

_OF_TOKENS = ("q", "k", "v")


class Sizes(NamedTuple):
    """One token on a rank.

    Attributes:
        heads_q, heads_kv: of queries, and of keys and values.
        head_dim, head_dim_v: of a head of queries and keys, and of values.
        itemsize: bytes of an element of q, k, v, dout.
        batch: entries.
        recipe: how keys and values are quantised before they travel; None: they are not.
    """

    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    itemsize: int
    batch: int = 1
    recipe: Fp8Recipe | None = None

    def keys(self, tokens: int) -> int:
        """Bytes of keys and values as they travel."""
        if self.recipe is None:
            return tokens * self.batch * self.heads_kv * self._dims * self.itemsize
        columns = self.head_dim
        if self.recipe.hadamard:
            columns = padded_fp8_head_dim(columns)
        per_scale = self.recipe.block if self.recipe.granularity == "block" else 1
        codes, scales = tokens * (columns + self.head_dim_v), -(-tokens // per_scale) * 2
        return self.batch * self.heads_kv * (codes + 4 * scales)

    def key_sums(self, tokens: int, wrt: tuple[str, ...] = _OF_TOKENS) -> int:
        """Bytes of float32 gradients of keys and values, of those in wrt."""
        columns = self.head_dim * ("k" in wrt) + self.head_dim_v * ("v" in wrt)
        return 4 * tokens * self.batch * self.heads_kv * columns

    def q(self, tokens: int) -> int:
        """Bytes of queries."""
        return tokens * self.batch * self.heads_q * self.head_dim * self.itemsize

    def queries(self, tokens: int) -> int:
        """Bytes of q and dout, and of float32 lse and delta: a message of four arrays."""
        rows = tokens * self.batch * self.heads_q
        dout = self.out(tokens, self.itemsize)
        return in_one_message([self.q(tokens), dout, 4 * rows, 4 * rows])

    def query_sums(self, tokens: int, wrt: tuple[str, ...] = _OF_TOKENS) -> int:
        """Bytes of the float32 gradient of queries."""
        return 4 * tokens * self.batch * self.heads_q * self.head_dim * ("q" in wrt)

    def out(self, tokens: int, itemsize: int = 4) -> int:
        """Bytes of the output, float32 unless said otherwise."""
        return tokens * self.batch * self.heads_q * self.head_dim_v * itemsize

    def rows(self, tokens: int) -> int:
        """Bytes of a float32 number for each row: lse, or delta."""
        return 4 * tokens * self.batch * self.heads_q

    def of_heads(self, heads_kv: int) -> "Sizes":
        """The same with so many key-value heads, and the query heads that share them."""
        group = self.heads_q // self.heads_kv
        return self._replace(heads_q=group * heads_kv, heads_kv=heads_kv)

    @property
    def _dims(self) -> int:
        return self.head_dim + self.head_dim_v


def in_one_message(parts: list[int]) -> int:
    """Bytes of arrays that travel together, each but the first at a multiple of ALIGNMENT."""
    total = 0
    for part in parts:
        total = -(-total // ALIGNMENT) * ALIGNMENT + part
    return total


def tokens_of(exchange: Exchange) -> tuple[int, int]:
    """How many tokens a rank sends and receives."""
    sent, received = (sum(end - begin for _, (begin, end), _ in side) for side in exchange)
    return sent, received


def sent_in_backwards(
    layout: Layout,
    band: Band,
    by_position: bool,
    sizes: Sizes,
    wrt: tuple[str, ...] = _OF_TOKENS,
) -> dict[str, int]:
    """The bytes that all ranks together send in the backward of a ring.

    Args:
        layout: who holds what.
        band: what a query sees.
        by_position: as of `pairs.calls_of`.
        sizes: of one token.
        wrt: the gradients that are wanted.

    Returns:
        By what travels: "keys" (K and V, and dK and dV in float32), or "queries" (q, dout, lse
        and delta, and dQ in float32).
    """
    found = {}
    for name, ring, operands, sums in (
        ("keys", steps.ring, sizes.keys, sizes.key_sums),
        ("queries", steps.ring_of_queries, sizes.queries, sizes.query_sums),
    ):
        fetched, given = _messages(ring, layout, band, by_position)
        found[name] = sum(operands(tokens) for tokens in fetched)
        found[name] += sum(sums(tokens, wrt) for tokens in given)
    return found


def what_travels(
    layout: Layout,
    band: Band,
    by_position: bool,
    sizes: Sizes,
    wrt: tuple[str, ...] = _OF_TOKENS,
) -> str:
    """In which backward of a ring all ranks together send fewer bytes: "keys" or "queries".

    The same on all ranks; keys where both are equal. Arguments as of `sent_in_backwards`.
    """
    sent = sent_in_backwards(layout, band, by_position, sizes, wrt)
    return "queries" if sent["queries"] < sent["keys"] else "keys"


@lru_cache(maxsize=256)
def _messages(
    ring: Callable, layout: Layout, band: Band, by_position: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of each message that a rank sends: of operands, and of sums."""
    every = [step for plan in ring(layout, band, by_position) for step in plan]
    sides = [step.fetch for step in every], [step.give for step in every]
    fetched, given = (
        tuple(end - begin for exchange in side for _, (begin, end), _ in exchange.sends)
        for side in sides
    )
    return fetched, given


def heads_at_once(
    layout: Layout, batch: int, heads_kv: int, key_bytes: int, most_bytes: int | None
) -> int:
    """The key-value heads that "gather" fetches together: the same on all ranks.

    It divides heads_kv, so that all groups are equal. It is one where `most_bytes` is too little
    even for that.

    Args:
        layout: who holds what.
        batch: entries.
        heads_kv: key-value heads.
        key_bytes: what one key of one head takes at a time, with its value: in two buffers where
            there are more heads than these, and in a backward in the shares of gradients, those
            that leave and those that arrive.
        most_bytes: of all of it; None for a group for each rank.
    """
    most = max(1, heads_kv // layout.ranks)
    if most_bytes is not None:
        most = max(1, most_bytes // max(1, layout.seqlen * batch * key_bytes))
    return max(n for n in range(1, heads_kv + 1) if heads_kv % n == 0 and n <= most)


def gathered_at_once(
    layout: Layout, sizes: Sizes, max_workspace: int | None = None, *, backward: bool = False
) -> int:
    """`heads_at_once` of the forward or backward of a problem."""
    many = 2**10
    one_head = sizes.of_heads(1)._replace(batch=1)
    key_bytes = 2 * (one_head.keys(many) // many)
    if backward:
        key_bytes += 2 * one_head.key_sums(1)
    return heads_at_once(layout, sizes.batch, sizes.heads_kv, key_bytes, max_workspace)


Memory = dict[str, int]
"""Bytes beyond operands and results, by what takes them."""


def memory_of_gather(
    layout: Layout,
    band: Band,
    rank: int,
    sizes: Sizes,
    max_workspace: int | None = None,
    *,
    backward: bool = False,
) -> Memory:
    """What "gather" takes on a rank, at most at a time.

    Two buffers of keys and values if there are several groups of heads; in the backward the
    float32 shares of their gradients, those that leave and those that arrive, and float32 sums.
    """
    plan = steps.gathering(layout, band)[rank]
    if not plan.fetch and plan.is_whole and all(rows == place for rows, place in plan.own):
        return {}
    at_once = gathered_at_once(layout, sizes, max_workspace, backward=backward)
    group = sizes.of_heads(at_once)
    buffers = 1 if at_once == sizes.heads_kv else 2
    found = {"keys and values": buffers * group.keys(layout.seqlen)}
    found |= _as_numbers(group, layout.seqlen)
    if backward:
        _, arriving = tokens_of(plan.give)
        found["shares of dK and dV"] = group.key_sums(layout.seqlen)
        found["arriving shares"] = group.key_sums(arriving)
    return found


def memory_of_ring(
    layout: Layout,
    band: Band,
    rank: int,
    sizes: Sizes,
    *,
    by_position: bool = False,
    travels: str | None = None,
) -> Memory:
    """What "ring" takes on a rank, at most at a time.

    Args:
        layout: who holds what.
        band: what a query sees.
        rank: whose memory.
        sizes: of one token.
        by_position: as of `pairs.calls_of`.
        travels: None for the forward; else the backward in which "keys" or "queries" travel.

    Returns:
        In the forward two pieces of keys and values, out in float32 where q is not, and one part.
        In the backward two pieces of what travels, and of its float32 gradients the own share,
        the sum that leaves and those that arrive; delta; and one part of the gradients that stay.
    """
    ring = steps.ring_of_queries if travels == "queries" else steps.ring
    plan, tokens = ring(layout, band, by_position)[rank], layout.tokens(rank)
    operands = sizes.queries if travels == "queries" else sizes.keys
    found = {_NAMES[travels]: _most_at_a_time(plan, operands)}
    longest = max((layout.tokens(step.owner) for step in plan if step.calls), default=0)
    found |= _as_numbers(sizes, tokens if travels == "queries" else longest)
    if travels is None:
        merges = sum(len(step.calls) for step in plan) > 1
        if merges and sizes.itemsize < 4:
            found["out in float32"] = sizes.out(tokens)
        if merges:
            part = max(_longest(step, 0) for step in plan[1:] or plan)
            found["a part of out and lse"] = sizes.out(part) + sizes.rows(part)
        return found
    sums, side = (sizes.query_sums, 1) if travels == "queries" else (sizes.key_sums, 0)
    name = "dQ" if travels == "queries" else "dK and dV"
    found[f"{name} on their way"] = _sums_at_a_time(plan, layout, sums)
    stays = sizes.key_sums if travels == "queries" else sizes.query_sums
    found["a part of what stays"] = stays(max(_longest(step, side) for step in plan))
    found["delta"] = sizes.rows(tokens)
    return found


def _as_numbers(sizes: Sizes, tokens: int) -> Memory:
    """Keys and values that have travelled as codes, once more in the dtype of the queries."""
    if sizes.recipe is None:
        return {}
    return {"keys and values as numbers": sizes._replace(recipe=None).keys(tokens)}


_NAMES = {None: "keys and values", "keys": "keys and values", "queries": "queries"}


def _most_at_a_time(plan: tuple[steps.Step, ...], size: Callable[[int], int]) -> int:
    """Bytes of what is here, in a buffer, and of what arrives."""
    here, most = size(tokens_of(plan[0].fetch)[0]), 0
    for step in plan:
        coming = size(tokens_of(step.fetch)[1])
        most, here = max(most, here + coming), coming
    return most


def _sums_at_a_time(
    plan: tuple[steps.Step, ...], layout: Layout, size: Callable[[int], int]
) -> int:
    """Bytes of a step's own share, of the sum that leaves, and of those that arrive."""
    most = 0
    for step in plan:
        sent, received = tokens_of(step.give)
        own = layout.tokens(step.owner) if step.calls else 0
        most = max(most, size(own) + size(sent) + size(received))
    return most


def _longest(step: steps.Step, side: int) -> int:
    """The most queries (side 0) or keys (side 1) of a call."""
    return max((call[side][1] - call[side][0] for call in step.calls), default=0)


class Share(NamedTuple):
    """The heads of one rank of a group that changes tokens for heads."""

    q: slice
    kv: slice


def expect_heads(ranks: int, heads_q: int, heads_kv: int) -> None:
    """Check that ranks of a group can share heads. Raises ValueError."""
    if heads_q % ranks:
        raise ValueError(
            f'method "heads" needs query heads that its ranks can share evenly, got {heads_q} '
            f"heads and {ranks} ranks"
        )
    if heads_kv % ranks and ranks % heads_kv:
        raise ValueError(
            'method "heads" needs as many key-value heads as ranks, or a multiple or divisor of '
            f"that, got {heads_kv} heads and {ranks} ranks"
        )


def shares_of(ranks: int, heads_q: int, heads_kv: int) -> list[Share]:
    """The heads of each rank of a group. Ranks may share a key-value head."""
    each, group = heads_q // ranks, heads_q // heads_kv
    found = []
    for first in range(0, heads_q, each):
        last = first + each - 1
        found.append(Share(slice(first, last + 1), slice(first // group, last // group + 1)))
    return found


def memory_of_heads(sizes: Sizes, tokens: int, home: Sizes, *, backward: bool = False) -> Memory:
    """What "heads" takes on a rank beside the method that follows, at most at a time.

    Args:
        sizes: of this rank's heads.
        tokens: of its group.
        home: of all heads; for so many tokens as a rank has on average.
        backward: whether of the backward.
    """
    own_tokens = tokens * sizes.heads_q // home.heads_q
    row = sizes.out(tokens, sizes.itemsize) + sizes.rows(tokens)
    operands = sizes.q(tokens) + sizes.keys(tokens) + (row + sizes.rows(tokens)) * backward
    numbers = _as_numbers(sizes, tokens)
    results, arriving = row, home.out(own_tokens, home.itemsize) + home.rows(own_tokens)
    if backward:
        results = sizes.query_sums(tokens) + sizes.key_sums(tokens)
        arriving = home.query_sums(own_tokens) + home.key_sums(own_tokens)
    return {"heads of all tokens": results + max(operands, arriving)} | numbers


def memory_of(
    method: str,
    layout: Layout,
    band: Band,
    rank: int,
    sizes: Sizes,
    *,
    by_position: bool = False,
    max_workspace: int | None = None,
    travels: str | None = None,
    backward: bool = False,
) -> Memory:
    """`memory_of_gather` or `memory_of_ring`."""
    if method == "gather":
        return memory_of_gather(layout, band, rank, sizes, max_workspace, backward=backward)
    if backward and travels in (None, "auto"):
        travels = what_travels(layout, band, by_position, sizes)
    return memory_of_ring(
        layout, band, rank, sizes, by_position=by_position, travels=travels if backward else None
    )


MOST_MESSAGES = 256
"""That a rank posts together: more have hung in NCCL (PyTorch's pull request 174942)."""


@lru_cache(maxsize=256)
def best_method(
    layout: Layout,
    band: Band,
    sizes: Sizes,
    *,
    by_position: bool = False,
    max_workspace: int | None = None,
    backward: bool = False,
) -> str:
    """What method="auto" means: the same on all ranks.

    Args:
        layout: who holds what.
        band: what a query sees.
        sizes: of one token.
        by_position: as of `pairs.calls_of`.
        max_workspace: bytes that a rank may take beyond operands and results; None: as many as a
            ring takes.
        backward: whether of the backward.

    Returns:
        "gather", or "ring" where gathering takes more memory than that, even with one key-value
        head at a time, or more messages together than libraries bear.
    """
    a_run = 1 if sizes.recipe is None else 2
    messages = (a_run * sum(map(len, plan.fetch)) for plan in steps.gathering(layout, band))
    if any(number > MOST_MESSAGES for number in messages):
        return "ring"
    ranks = range(layout.ranks)
    most = max(
        sum(memory_of_gather(layout, band, rank, sizes, max_workspace, backward=backward).values())
        for rank in ranks
    )
    if max_workspace is None:
        options = {"by_position": by_position, "backward": backward}
        rings = (memory_of("ring", layout, band, rank, sizes, **options) for rank in ranks)
        max_workspace = max(sum(memory.values()) for memory in rings)
    return "gather" if most <= max_workspace else "ring"
