"""Elements of a call's arrays: small parts of the caller's, or samples that stand for them."""

from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np

from numflash.problem.problem import AttentionProblem
from numflash.runtime.arrays import to_numpy

from .asked import Asked, NotShownError

SEED = 0
_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
_OF_SEQUENCES = ("cu_seqlens_q", "cu_seqlens_k", "page_table", "seqlens_q", "seqlens_k")


class Part(NamedTuple):
    """Tokens [first, end) of heads [head, head_end) of a batch entry."""

    batch: int
    first: int
    end: int
    head: int
    head_end: int

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, heads)."""
        return self.end - self.first, self.head_end - self.head


@dataclass(frozen=True)
class Elements:
    """Where the elements of a page come from.

    Attributes:
        asked: the call.
        samples: why they are samples of a normal distribution; "" if they are the caller's.
    """

    asked: Asked
    samples: str

    @property
    def origin(self) -> str:
        """The elements in words."""
        if not self.samples:
            return "the caller's arrays"
        return f"samples of a normal distribution, seed {SEED}, because {self.samples}"

    def read(self, name: str, part: Part) -> np.ndarray:
        """A part of q, k or v, (tokens, heads, columns), in its dtype.

        Raises:
            NotShownError: not all of it is finite.
        """
        if self.samples:
            found = _drawn(self.asked.problem, name, part)
        else:
            found = _of_caller(self.asked, name, part)
        bad = np.argwhere(~np.isfinite(found.astype(np.float32)))
        if len(bad):
            token, head, column = bad[0]
            place = f"token {part.first + token}, head {part.head + head}, column {column}"
            raise NotShownError(
                f"{name} has {len(bad):,} elements that are NaN or infinite among the "
                f"{found.size:,} that were read, the first at batch entry {part.batch}, {place}; "
                "numbers about its errors would mean nothing"
            )
        return found


def elements_of(asked: Asked) -> Elements:
    """The caller's elements if they may and can be read, else samples."""
    question, options = asked.question, asked.question.options
    if not question.data:
        return Elements(asked, "only metadata of the arrays was read")
    if any(options.get(name) is not None for name in _OF_SEQUENCES):
        return Elements(asked, "sequences of the caller's arrays have lengths of their own")
    try:
        for name in "qkv":
            _of_caller(asked, name, Part(0, 0, 1, 0, 1))
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return Elements(asked, f"elements of {name} cannot be read")
    return Elements(asked, "")


def _of_caller(asked: Asked, name: str, part: Part) -> np.ndarray:
    array, layout = asked.question.arrays[name], asked.question.options.get("layout", "bshd")
    tokens, heads = slice(part.first, part.end), slice(part.head, part.head_end)
    if len(array.shape) == 2:
        found = to_numpy(array[tokens])[:, None]
    else:
        place = (heads, tokens) if layout == "bhsd" else (tokens, heads)
        found = to_numpy(array[(part.batch, *place) if len(array.shape) == 4 else place])
        found = found.swapaxes(0, 1) if layout == "bhsd" else found
    # PyTorch's bfloat16 arrives as float32, without loss.
    return np.ascontiguousarray(found.astype(_DTYPES[asked.problem.dtype]))


def _drawn(problem: AttentionProblem, name: str, part: Part) -> np.ndarray:
    """The same numbers for the same part, whichever others are asked for."""
    columns = problem.head_dim_v if name == "v" else problem.head_dim
    random = np.random.default_rng((SEED, ord(name), *part))
    found = random.standard_normal((*part.shape, columns), np.float32)
    return found.astype(_DTYPES[problem.dtype])
