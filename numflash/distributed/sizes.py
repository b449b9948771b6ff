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
        in_codes: whether calls multiply these codes, and not the numbers that they stand for.
    """

    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    itemsize: int
    batch: int = 1
    recipe: Fp8Recipe | None = None
    in_codes: bool = False

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

    def copied_keys(self, tokens: int) -> int:
        """Bytes of copies of keys and values that have travelled as codes, for calls to read."""
        if self.recipe is None:
            return 0
        if not self.in_codes:
            return self._replace(recipe=None).keys(tokens)
        columns = self.head_dim
        if self.recipe.hadamard:
            columns = padded_fp8_head_dim(columns)
        # Rows are padded, and begin at multiples of 16 bytes: as `wire.Codes` leaves them.
        aligned = (columns + self.head_dim_v) % 16 == 0
        sides = [(n, padded_fp8_head_dim(n)) for n in (columns, self.head_dim_v)]
        copied = sum(padded for n, padded in sides if not aligned or n != padded)
        return tokens * self.batch * self.heads_kv * copied

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
