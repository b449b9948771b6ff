"""One problem over several ranks, as a rank sees it; every method reads it."""

from dataclasses import dataclass
from typing import Any

from numflash.distributed.arrays import Arrays
from numflash.distributed.communicators import Communicator
from numflash.distributed.layouts import Layout
from numflash.distributed.local_calls import LocalCalls
from numflash.distributed.pairs import Band


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
        wire: None, or "e4m3": keys and values travel in 8 bits.
    """

    layout: Layout
    comm: Communicator
    band: Band
    calls: LocalCalls
    arrays: Arrays
    max_workspace: int | None = None
    wire: str | None = None

    @property
    def rank(self) -> int:
        """This rank's number."""
        return self.comm.rank

    @property
    def tokens(self) -> int:
        """Tokens of this rank."""
        return self.layout.tokens(self.rank)


Gradients = dict[str, Any]
"""By name: q, k, v as of `attention_backward`; sinks and alibi_slopes of this rank's rows only."""
