"""One problem over several ranks, as a rank sees it; every method reads it."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from numflash.distributed.arrays import Arrays
from numflash.distributed.communicators import Communicator
from numflash.distributed.layouts import Layout
from numflash.distributed.local_calls import LocalCalls
from numflash.distributed.pairs import Band
from numflash.distributed.sizes import Sizes, gathered_at_once
from numflash.distributed.wire import Wire, recipe_of, wire_of
from numflash.runtime.views import numpy_dtype

Result = TypeVar("Result")


@dataclass(frozen=True)
class Problem:
    """What the ranks compute together, and this rank's place.

    Attributes:
        layout: who holds which tokens; it has as many ranks as comm.
        comm: the ranks.
        band: what a query sees.
        calls: attention on this rank's arrays, with the options of the problem.
        arrays: of this rank.
        max_workspace: bytes that a method may take beyond inputs and results, None for its own
            default.
        wire: how keys and values travel, as `wire.recipe_of` reads it.
        made: what `once` has made, by name. Arrays of a problem always have the same shapes.
    """

    layout: Layout
    comm: Communicator
    band: Band
    calls: LocalCalls
    arrays: Arrays
    max_workspace: int | None = None
    wire: Any = None
    made: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, name: Hashable, make: Callable[[], Result]) -> Result:
        """What `make` makes, made once: from shapes, but neither from arrays nor from options."""
        found = self.made.get(name)
        if found is None:
            found = self.made[name] = make()
        return found

    @property
    def rank(self) -> int:
        """This rank's number."""
        return self.comm.rank

    @property
    def tokens(self) -> int:
        """Tokens of this rank."""
        return self.layout.tokens(self.rank)

    def with_options(self, options: dict[str, Any]) -> "Problem":
        """The same problem with more options of its calls."""
        return replace(self, calls=self.calls.with_options(options))

    def wire_of(self, k, v) -> Wire:
        """How these keys and values travel."""
        return self.once(
            ("wire", k.shape[2]),
            lambda: wire_of(self.wire, k, v, in_codes=self.calls.in_codes),
        )

    def heads_at_once(self, q, k, v, *, backward: bool) -> int:
        """The key-value heads that gather fetches together."""
        sizes = sizes_of(q, k, v, self.arrays.dtype_of(q), self.wire)
        return _gathered_at_once(self.layout, sizes, self.max_workspace, backward=backward)


def sizes_of(q, k, v, dtype: str, wire) -> Sizes:
    """Of one token: of arrays of a rank, or views of them, (batch, tokens, heads, head_dim)."""
    (batch, _, heads_q, head_dim), (heads_kv, head_dim_v) = q.shape, v.shape[2:]
    recipe, itemsize = recipe_of(wire, head_dim), numpy_dtype(dtype).itemsize
    return Sizes(heads_q, heads_kv, head_dim, head_dim_v, itemsize, batch, recipe)


_gathered_at_once = lru_cache(maxsize=1024)(gathered_at_once)

Gradients = dict[str, Any]
"""By name: q, k, v as of `attention_backward`; of what all ranks have this rank's share."""


class Method(Protocol):
    """How ranks compute a problem together: the modules `gather`, `ring` and `heads`."""

    def forward(
        self, problem: Problem, q, k, v, first_head: int = 0, *, float32: bool
    ) -> tuple[Any, Any]:
        """Attention of this rank's queries over the keys of all ranks.

        Args:
            problem: this rank's.
            q: (batch, tokens, heads_q, head_dim) of this rank.
            k, v: (batch, tokens, heads_kv, head_dim or head_dim_v) of this rank.
            first_head: the number of the first query head in the whole problem.
            float32: whether out is float32, and not of the dtype of q.

        Returns:
            out (batch, tokens, heads_q, head_dim_v) and lse (batch, heads_q, tokens) float32; 0
            and -inf for a query that sees nothing.

        Raises:
            CommunicatorError: a peer is gone or did not come.
        """

    def backward(
        self,
        problem: Problem,
        operands: dict[str, Any],
        first_head: int = 0,
        wrt: tuple[str, ...] = ("q", "k", "v"),
    ) -> Gradients:
        """The gradients of `forward`, of this rank's rows.

        Args:
            problem: this rank's.
            operands: dout, q, k, v, lse and out, or in its place delta, of this rank's rows; dlse,
                where lse has a gradient of its own, else None or left out.
            first_head: as of `forward`.
            wrt: as of `attention_backward`.

        Returns:
            A float32 gradient by each name in wrt. Those of what all ranks have, as sinks and a
            bias, have the shapes of the whole problem's, and are this rank's share: the sum over
            ranks is the gradient.

        Raises:
            CommunicatorError: a peer is gone or did not come.
        """
