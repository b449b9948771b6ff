"""The attention calls that stand for a problem class: the timed one, and the checked one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from numflash.configs.features import rows_of
from numflash.problem.classes import ProblemClass
from numflash.problem.options import PACKED
from numflash.selection.geometry import PACKED_SEQLEN

from ..lengths import Sequences, heads_of, room_of_pages, sequences_of
from ..recipes import recipe_of

CHECK_SEQLENS = (113, 257)
"""(seqlen_q, seqlen_k) that no tile divides."""
FORWARD = ("forward", "combine")
BACKWARD = ("backward-dkdv", "backward-dq", "backward")
_CHECKED_WINDOW = 64
_PAGES_SEED = 1


@dataclass(frozen=True)
class Call:
    """One attention call in numbers.

    Attributes:
        batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv, head_dim, head_dim_v: sizes.
        dtype: of q, k and v.
        is_aligned: rows are 16-byte aligned. On 8-bit floats those of q, k and v always are, and
            those of the result where head_dim_v is a multiple of 8.
        features: names of those that the call asks for; arrays are made with the others.
        options: the other options of `numflash.attention`, without config.
        sequences: of a class whose lengths lie on the device, else None. Then seqlen_q and
            seqlen_k are means, or with pages what there is room for.
        page_size: keys of a page that K and V lie in; 0: they lie in none.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    dtype: str
    is_aligned: bool
    features: tuple[str, ...]
    options: Mapping[str, Any]
    sequences: Sequences | None = None
    page_size: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, int, int, int]]:
        """(batch, seqlen, heads, head_dim) of q, k, v and dout; packed, batch is 1."""
        q, k = (
            (self.batch, self.seqlen_q, self.num_heads_q),
            (self.batch, self.seqlen_k, self.num_heads_kv),
        )
        if self.is_packed:
            q = 1, sum(self.sequences.seqlens_q), self.num_heads_q
            k = 1, sum(self.sequences.seqlens_k), self.num_heads_kv
        return {
            "q": (*q, self.head_dim),
            "k": (*k, self.head_dim),
            "v": (*k, self.head_dim_v),
            "dout": (*q, self.head_dim_v),
        }

    @property
    def is_packed(self) -> bool:
        """Whether its arrays are (tokens, heads, head_dim)."""
        return self.sequences is not None and not self.page_size

    @property
    def is_fp8(self) -> bool:
        """Whether q, k and v are quantised."""
        return self.options.get("precision") == "fp8"

    def of_sequences(self) -> dict[str, np.ndarray]:
        """The arrays that say where its sequences lie, by option; pages in any order."""
        if self.sequences is None:
            return {}
        lengths = {
            side: np.array(x, np.int32) for side, x in zip("qk", self.sequences, strict=True)
        }
        if not self.page_size:
            return {
                f"cu_seqlens_{side}": np.concatenate([[0], np.cumsum(x)]).astype(np.int32)
                for side, x in lengths.items()
            }
        width = self.seqlen_k // self.page_size
        pages = np.random.default_rng(_PAGES_SEED).permutation(self.batch * width)
        table = pages.reshape(self.batch, width).astype(np.int32)
        return {"seqlens_k": lengths["k"], "page_table": table}

    def num_bytes(self, family: str) -> int:
        """Memory of the inputs and results; of the gradients too if the family makes them."""
        element = 4 if self.dtype == "float32" else 2
        rows_q = self.batch * self.seqlen_q * self.num_heads_q
        rows_k = self.batch * self.seqlen_k * self.num_heads_kv
        q_and_out, k_and_v = rows_q * self.head_dims, rows_k * self.head_dims
        if self.is_fp8:
            # Codes beside q, k and v, and scales, of which a token may have its own.
            codes = rows_q * self.head_dim + rows_k * self.head_dims + 4 * (rows_q + 2 * rows_k)
            return (q_and_out + k_and_v) * element + 4 * rows_q + codes
        if family in FORWARD:
            return (q_and_out + k_and_v) * element + 4 * rows_q
        # q, out, dout, dq; k, v, dk, dv; lse, delta and lse_log2.
        return 2 * (q_and_out + k_and_v) * element + 3 * 4 * rows_q

    def multiply_adds(self, window: int | None) -> int:
        """Multiply-adds of a forward whose queries each see all keys, or a window of them."""
        if self.sequences is not None:
            pairs = zip(*self.sequences, strict=True)
            scores = sum(q * (k if window is None else min(k, window)) for q, k in pairs)
            return self.num_heads_q * scores * self.head_dims
        keys = self.seqlen_k if window is None else min(self.seqlen_k, window)
        return self.batch * self.num_heads_q * self.seqlen_q * keys * self.head_dims

    @property
    def head_dims(self) -> int:
        """head_dim and head_dim_v together."""
        return self.head_dim + self.head_dim_v


def timed(problem: ProblemClass, batch_heads: int | None = None) -> Call:
    """The call whose time stands for a class: its sizes are those that the class rounds up to.

    Args:
        problem: the class.
        batch_heads: instead of the class's, where memory is short.

    Raises:
        ValueError: batch_heads is no multiple of the group size.
    """
    batch_heads = problem.batch_heads if batch_heads is None else batch_heads
    group = problem.group_size
    if batch_heads % group:
        raise ValueError(
            f"batch_heads must be a multiple of the group size, {group}, got {batch_heads}"
        )
    heads, traits = heads_of(problem, batch_heads), problem.traits
    # Of 8-bit floats only the result may have rows that are not aligned.
    is_torn = traits.fp8 and not traits.vectorized
    return Call(
        batch_heads // heads,
        problem.seqlen_q,
        room_of_pages(problem) if problem.page_size else problem.seqlen_k,
        heads,
        heads // group,
        traits.head_dim,
        traits.head_dim_v - is_torn,
        traits.dtype,
        traits.vectorized or traits.fp8,
        traits.features,
        _options(problem, problem.seqlen_k, problem.window),
        sequences_of(problem, batch_heads) if traits.ragged else None,
        problem.page_size,
    )


def fitting(problem: ProblemClass, num_bytes: float, multiply_adds: float) -> Call:
    """The call of `timed`, with batch x heads halved until it is small enough.

    Args:
        problem: the class.
        num_bytes: for inputs and results.
        multiply_adds: of a forward; beyond these too, a single group of heads is still timed.

    Raises:
        MemoryError: not even one group of heads has room.
    """
    batch_heads = problem.batch_heads
    while True:
        call = timed(problem, batch_heads)
        needed = call.num_bytes(problem.family)
        if needed <= num_bytes and call.multiply_adds(problem.window) <= multiply_adds:
            return call
        if batch_heads % (2 * problem.group_size):
            break
        batch_heads //= 2
    if needed > num_bytes:
        raise MemoryError(
            f"{problem} takes {needed} bytes with no more than {batch_heads} heads, "
            f"{int(num_bytes)} are allowed"
        )
    return call


def checked(problem: ProblemClass, seqlens: tuple[int, int] = CHECK_SEQLENS) -> Call:
    """A small call of the same kernel, of sizes that no tile divides."""
    seqlen_q, seqlen_k = (
        min(odd, max(1, seqlen - 1))
        for odd, seqlen in zip(seqlens, (problem.seqlen_q, problem.seqlen_k), strict=True)
    )
    group = min(problem.group_size, 8 if seqlen_q <= PACKED_SEQLEN else 2)
    window = None if problem.window is None else min(problem.window, _CHECKED_WINDOW)
    # Whole vectors are left out where rows must stay aligned.
    padding = (4 if problem.traits.dtype == "float32" else 8) if problem.traits.vectorized else 3
    sequences, room, page_size = None, seqlen_k, problem.page_size
    if problem.traits.ragged:
        # One as the others, one without keys, and a short one.
        seqlens_q = (seqlen_q,) * 3 if page_size else (seqlen_q, 1, max(1, seqlen_q // 3))
        sequences = Sequences(seqlens_q, (seqlen_k, 0, max(1, seqlen_k // 5)))
    if page_size:
        room = -(-seqlen_k // page_size) * page_size
    return replace(
        timed(replace(problem, batch_heads=2 * group, group_size=group)),
        batch=1 if sequences is None else len(sequences.seqlens_k),
        seqlen_q=seqlen_q,
        seqlen_k=room,
        sequences=sequences,
        num_heads_q=2 * group,
        num_heads_kv=2,
        head_dim=problem.traits.head_dim - padding,
        head_dim_v=problem.traits.head_dim_v - padding,
        options=_options(problem, seqlen_k, window),
    )


def _options(problem: ProblemClass, seqlen_k: int, window: int | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if problem.mask == "causal":
        options["causal"] = True
    if window is not None:
        # Half of the keys on either side, but no window so wide that it hides none to the left.
        left = min((window - 1) // 2, max(0, seqlen_k - 2))
        options["window_size"] = (left, window - 1 - left)
    for row in rows_of(problem.traits.features):
        if not row.is_array:
            options[row.option] = row.example(problem.batch_heads)
        options |= {each.name: each.example for each in row.beside}
    if problem.traits.tf32:
        options["precision"] = "tf32"
    if problem.traits.fp8:
        options |= {"precision": "fp8", "fp8": recipe_of(problem)}
    if problem.traits.ragged and not problem.page_size:
        options["layout"] = PACKED
    return options
