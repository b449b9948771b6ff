"""Memory that methods take beyond operands and results, and the method that takes least.

Pure numbers, from the schedules and the sizes of what travels.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

from numflash.distributed import steps
from numflash.distributed.layouts import Layout
from numflash.distributed.packing import are_packed, has_many_messages
from numflash.distributed.pairs import Band, Call
from numflash.distributed.sizes import Sizes, gathered_at_once, tokens_of, what_travels

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
    float32 shares of their gradients, those that leave and those that arrive, the part of a call,
    and where operands have 16 bits float32 results.
    """
    plan = steps.gathering(layout, band)[rank]
    if not plan.fetch and plan.is_whole and all(rows == place for rows, place in plan.own):
        return {}
    at_once = gathered_at_once(layout, sizes, max_workspace, backward=backward)
    group = sizes.of_heads(at_once)
    buffers = 1 if at_once == sizes.heads_kv else 2
    found = {"keys and values": buffers * group.keys(layout.seqlen)}
    found |= _copied(group, layout.seqlen)
    sent, received = tokens_of(plan.fetch)
    is_packed = are_packed(layout, band, sizes.recipe)
    if is_packed:
        found["rows put together"] = group.keys(sent) + group.keys(received)
    if backward:
        _, arriving = tokens_of(plan.give)
        found["shares of dK and dV"] = group.key_sums(layout.seqlen)
        found["arriving shares"] = group.key_sums(arriving)
        if is_packed:
            found["rows put together"] += group.key_sums(received)
        rows, keys = (_longest(plan.calls, side) for side in (0, 1))
        found["a part"] = group.query_sums(rows) + group.key_sums(keys)
        tokens = layout.tokens(rank)
        found |= _in_float32(sizes, sizes.query_sums(tokens) + sizes.key_sums(tokens))
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

    In the forward two pieces of keys and values, out in float32 where q is not, and one part. In
    the backward two pieces of what travels, and of its float32 gradients the own share, the sum
    that leaves and those that arrive; delta; and of the gradients that stay one part, and where
    operands have 16 bits their float32 sum.

    Args:
        layout: who holds what.
        band: what a query sees.
        rank: whose memory.
        sizes: of one token.
        by_position: as of `pairs.calls_of`.
        travels: None for the forward; else the backward in which "keys" or "queries" travel.
    """
    ring = steps.ring_of_queries if travels == "queries" else steps.ring
    plan, tokens = ring(layout, band, by_position)[rank], layout.tokens(rank)
    operands = sizes.queries if travels == "queries" else sizes.keys
    found = {_NAMES[travels]: _most_at_a_time(plan, operands)}
    longest = max((layout.tokens(step.owner) for step in plan if step.calls), default=0)
    found |= _copied(sizes, tokens if travels == "queries" else longest)
    if travels is None:
        merges = sum(len(step.calls) for step in plan) > 1
        if merges:
            found |= _in_float32(sizes, sizes.out(tokens))
            part = _longest_of(plan[1:] or plan, 0)
            found["a part"] = sizes.out(part) + sizes.rows(part)
        return found
    sums, side = (sizes.query_sums, 1) if travels == "queries" else (sizes.key_sums, 0)
    name = "dQ" if travels == "queries" else "dK and dV"
    found[f"{name} on their way"] = _sums_at_a_time(plan, layout, sums)
    stays = sizes.key_sums if travels == "queries" else sizes.query_sums
    found["a part"] = stays(_longest_of(plan, side))
    found["delta"] = sizes.rows(tokens)
    return found | _in_float32(sizes, stays(tokens))


def _copied(sizes: Sizes, tokens: int) -> Memory:
    """Keys and values that have travelled as codes, once more as calls read them."""
    copied = sizes.copied_keys(tokens)
    name = "padded codes" if sizes.in_codes else "keys and values as numbers"
    return {name: copied} if copied else {}


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


def _in_float32(sizes: Sizes, nbytes: int) -> Memory:
    """Results in float32, which are rounded in the end."""
    return {"results in float32": nbytes} if sizes.itemsize < 4 else {}


def _longest_of(plan: tuple[steps.Step, ...], side: int) -> int:
    """The most queries (side 0) or keys (side 1) of a call of some steps."""
    return _longest([call for step in plan for call in step.calls], side)


def _longest(calls: Sequence[Call], side: int) -> int:
    """The same, of some calls."""
    return max((call[side][1] - call[side][0] for call in calls), default=0)


def memory_of_heads(
    sizes: Sizes, home: Sizes, tokens: int, own: int, *, backward: bool = False
) -> Memory:
    """What "heads" takes on a rank beside the method that follows, at most at a time.

    What travels lies in two arrays: one of the tokens of the group, and one of the rank's own
    tokens once for each rank of the group: ranks that share a key-value head have it each.

    Args:
        sizes: of this rank's heads.
        home: of all heads.
        tokens: of its group.
        own: tokens of this rank.
        backward: whether of the backward.
    """
    rows = own * (home.heads_q // sizes.heads_q)

    def queries(tokens: int) -> int:
        of_out = sizes.out(tokens, sizes.itemsize) + 2 * sizes.rows(tokens)
        return sizes.q(tokens) + of_out * backward

    def results(tokens: int) -> int:
        if backward:
            return sizes.query_sums(tokens) + sizes.key_sums(tokens)
        return sizes.out(tokens, sizes.itemsize) + sizes.rows(tokens)

    # dK and dV are put side by side; lse is turned.
    joined = sizes.key_sums(tokens) if backward else sizes.rows(tokens)
    at_a_time = (
        queries(rows) + queries(tokens),
        queries(tokens) + sizes.keys(rows) + sizes.keys(tokens),
        queries(tokens) + sizes.keys(tokens) + results(tokens),
        results(tokens) + max(joined, results(rows)),
    )
    found = {"heads of all tokens": max(at_a_time)} | _copied(sizes, tokens)
    if backward:
        found |= _in_float32(sizes, home.query_sums(own) + home.key_sums(own))
    return found


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
    is_packed = are_packed(layout, band, sizes.recipe)
    if not is_packed and has_many_messages(layout, band, sizes.recipe):
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
