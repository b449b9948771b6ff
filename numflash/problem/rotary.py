"""Rotary embeddings: a call of `apply_rotary` checked and in numbers, and the tables of angles."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from numflash.configs import DTYPES
from numflash.problem.options import LAYOUTS, expect_bool, expect_one_of, kind_of
from numflash.problem.problem import (
    Tensor,
    as_tensor,
    expect_head_dim,
    expect_like,
    expect_writeable,
)
from numflash.problem.sequences import expect_list
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.views import ArrayView, fresh, numpy_dtype

# Tokens, and differences of positions, are 32-bit in kernels.
_MAX_TOKENS = 2**30
_VECTOR_BYTES = 16
# Rows of a table that are computed at once: 32 MB of float64 at rotary_dim 256.
_ROWS_AT_ONCE = 2**15


@dataclass(frozen=True)
class RotaryProblem:
    """A call of `apply_rotary`.

    Attributes:
        x, out: the array and the result.
        cos, sin: the tables, with contiguous rows.
        half: pairs of columns that are rotated.
        is_packed: whether cu_seqlens says where sequences begin.
        has_offsets: whether each sequence has an offset of its own.
        entries: sequences, or batch entries.
        vectorized: whether rows and tables are read 16 bytes at a time.
        copied: arrays whose rows are not contiguous, and must be copied for that.
    """

    x: Tensor
    out: Tensor
    cos: ArrayView
    sin: ArrayView
    half: int
    is_packed: bool
    has_offsets: bool
    entries: int
    vectorized: bool
    copied: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all batch entries."""
        return self.x.shape[0] * self.x.shape[1]

    def expect_offset(self, offset: int) -> None:
        """Check the offset of all sequences. Raises ValueError."""
        # How long packed sequences are is known on the device only.
        seqlen = 0 if self.is_packed else self.x.shape[1]
        positions = self.cos.shape[0]
        if not self.has_offsets and not 0 <= offset <= positions - seqlen:
            of_x = f" and the {seqlen} tokens of x fit" if seqlen else ""
            raise ValueError(
                f"offsets must be at least 0{of_x} into the {positions} positions of cos and "
                f"sin, got {offset}"
            )


def describe_rotary(
    views: dict[str, ArrayView], interleaved: bool, conjugate: bool, layout: str
) -> RotaryProblem:
    """Check a call.

    Args:
        views: of x, cos and sin, and where the call has them cu_seqlens, offsets and out.
        interleaved, conjugate, layout: as for `numflash.apply_rotary`.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.apply_rotary` documents.
    """
    expect_bool("interleaved", interleaved)
    expect_bool("conjugate", conjugate)
    expect_one_of("layout", layout, LAYOUTS)
    x = views["x"]
    if x.dtype not in DTYPES:
        raise TypeError(f"x must have one of the dtypes {', '.join(DTYPES)}, got {x.dtype}")
    copied = [name for name in ("x", "cos", "sin") if not views[name].has_contiguous_rows]
    rows = views | {n: fresh(views[n].shape, views[n].dtype, views[n].device) for n in copied}
    tensor = as_tensor("x", rows["x"], layout)
    batch, seqlen, _, head_dim = tensor.shape
    expect_head_dim("head_dim of x", head_dim)
    if batch * seqlen >= _MAX_TOKENS:
        raise UnsupportedError(
            f"x must have below {_MAX_TOKENS} tokens in all batch entries, got {batch * seqlen}"
        )
    half = expect_tables(views, head_dim)

    is_packed, has_offsets, entries = "cu_seqlens" in views, "offsets" in views, batch
    if is_packed:
        if len(x.shape) == 4:
            raise ValueError(
                "x must be packed, (tokens, heads, head_dim), with cu_seqlens, got 4 dimensions"
            )
        expect_list("cu_seqlens", views["cu_seqlens"], x.device, of="x")
        entries = views["cu_seqlens"].shape[0] - 1
        if entries < 0:
            raise ValueError(
                "cu_seqlens must have one element more than there are sequences, got 0"
            )
    if has_offsets:
        expect_list("offsets", views["offsets"], x.device, of="x")
        if views["offsets"].shape[0] != entries:
            raise ValueError(
                f"offsets must have an element for each of the {entries} sequences, got "
                f"{views['offsets'].shape[0]}"
            )

    out = views.get("out", fresh(x.shape, x.dtype, x.device))
    expect_like("out", out, x.shape, x.dtype, x.device, of="x")
    expect_writeable("out", out)
    target = as_tensor("out", out, layout)
    vector = _VECTOR_BYTES // x.itemsize
    vectorized = (
        tensor.is_vectorizable
        and target.is_vectorizable
        and half % vector == 0
        and all(has_aligned_rows(rows[name]) for name in ("cos", "sin"))
    )
    of_sequences = is_packed, has_offsets, entries
    return RotaryProblem(
        tensor, target, rows["cos"], rows["sin"], half, *of_sequences, vectorized, tuple(copied)
    )


def expect_tables(
    views: Mapping[str, ArrayView],
    head_dim: int,
    names: tuple[str, str, str] = ("x", "cos", "sin"),
) -> int:
    """Check tables of cosines and sines; pairs of columns that they rotate.

    `names` are those of what is rotated, and of the tables. Raises TypeError, ValueError.
    """
    (of, of_cos, of_sin), (x, cos, sin) = names, (views[name] for name in names)
    dtypes = dict.fromkeys(("float32", x.dtype))
    if cos.dtype not in dtypes:
        raise TypeError(f"{of_cos} must be {' or '.join(dtypes)}, got {cos.dtype}")
    if len(cos.shape) != 2:
        raise ValueError(
            f"{of_cos} must have shape (positions, rotary_dim / 2), got {tuple(cos.shape)}"
        )
    positions, half = cos.shape
    if not 1 <= half <= head_dim // 2:
        raise ValueError(
            f"{of_cos} must have rotary_dim / 2 columns, 1 to {head_dim // 2} for head_dim "
            f"{head_dim} of {of}, got {half}"
        )
    if positions >= _MAX_TOKENS:
        raise UnsupportedError(
            f"{of_cos} must have below {_MAX_TOKENS} positions, got {positions}"
        )
    expect_like(of_cos, cos, cos.shape, cos.dtype, x.device, of=of)
    expect_like(of_sin, sin, cos.shape, cos.dtype, x.device, of=of)
    return half


def has_aligned_rows(view: ArrayView) -> bool:
    """Whether every row of a table can be read 16 bytes at a time."""
    step = view.strides[0] * view.itemsize if view.shape[0] > 1 else 0
    return view.pointer % _VECTOR_BYTES == 0 and step % _VECTOR_BYTES == 0


# Tables


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by a factor: position interpolation.

    Args:
        factor: at least 1.

    Example:
        >>> import numflash
        >>> cos, sin = numflash.rotary_tables(16, 8, scaling=numflash.LinearScaling(4.0))
        >>> plain, _ = numflash.rotary_tables(4, 8)
        >>> bool((cos[::4] == plain).all())
        True

    Source: arXiv 2306.15595.
    """

    factor: float

    def __post_init__(self):
        _expect_factor(self)

    def frequencies(self, plain: np.ndarray, base: float) -> np.ndarray:
        """Angles from one position to the next, from those without scaling."""
        return plain / self.factor

    @property
    def magnitude(self) -> float:
        """The factor of cosines and sines."""
        return 1.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: slow pairs are interpolated, fast ones are kept, and scores become larger.

    Args:
        factor: at least 1: of the new length over the old.
        original_seqlen: the length that the model was trained for.
        beta_fast, beta_slow: pairs that turn as often or more within original_seqlen are kept,
            those that turn as often or less are interpolated, those between go from one to the
            other.
        mscale, mscale_all_dim: both or none. The tables are multiplied by the quotient of
            0.1 mscale ln factor + 1 and the same of mscale_all_dim; without both by
            0.1 ln factor + 1, so that scores of rotated q and k grow by its square.
        attention_factor: of the tables, instead of that.
        truncate: whether the first and the last pair between are whole numbers, as most models
            have it.

    Example:
        >>> import numflash
        >>> scaling = numflash.YarnScaling(4.0, original_seqlen=4096)
        >>> cos, sin = numflash.rotary_tables(16, 64, scaling=scaling)
        >>> round(float(cos[0, 0]), 4)  # 0.1 ln 4 + 1
        1.1386

    Source: arXiv 2309.00071, section 3; the rounding and mscale are those of transformers.
    """

    factor: float
    original_seqlen: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        _expect_factor(self)
        _expect_length("original_seqlen of YarnScaling", self.original_seqlen)
        for name in ("beta_fast", "beta_slow"):
            _expect_positive(f"{name} of YarnScaling", getattr(self, name))
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"beta_fast of YarnScaling must be above beta_slow, got {self.beta_fast} and "
                f"{self.beta_slow}"
            )
        for name in ("mscale", "mscale_all_dim", "attention_factor"):
            if getattr(self, name) is not None:
                _expect_positive(f"{name} of YarnScaling", getattr(self, name))
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError(
                "mscale and mscale_all_dim of YarnScaling go together, got "
                f"{self.mscale} and {self.mscale_all_dim}"
            )
        expect_bool("truncate of YarnScaling", self.truncate)

    def frequencies(self, plain: np.ndarray, base: float) -> np.ndarray:
        """As `LinearScaling.frequencies`."""
        rotary_dim = 2 * len(plain)

        def pair_of(turns: float) -> float:
            """The pair that turns so often within original_seqlen."""
            turned = math.log(self.original_seqlen / (turns * 2 * math.pi))
            return rotary_dim * turned / (2 * math.log(base))

        first, last = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotary_dim - 1)
        if first == last:
            last += 0.001
        interpolated = np.clip((np.arange(len(plain)) - first) / (last - first), 0, 1)
        return plain * (interpolated / self.factor + 1 - interpolated)

    @property
    def magnitude(self) -> float:
        """As `LinearScaling.magnitude`."""
        if self.attention_factor is not None:
            return float(self.attention_factor)

        def of(mscale: float) -> float:
            return 0.1 * mscale * math.log(self.factor) + 1

        if self.mscale is None:
            return of(1.0)
        return of(self.mscale) / of(self.mscale_all_dim)


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: pairs with long waves are interpolated, those with short ones are kept.

    Args:
        factor: at least 1.
        original_seqlen: the length that the model was trained for first.
        low_freq_factor, high_freq_factor: pairs whose waves are longer than original_seqlen over
            the first are interpolated, those with waves shorter than over the second are kept,
            those between go from one to the other.

    Example:
        >>> import numflash
        >>> scaling = numflash.Llama3Scaling(8.0, original_seqlen=8192)
        >>> cos, sin = numflash.rotary_tables(16, 64, base=500000.0, scaling=scaling)
        >>> cos.shape
        (16, 32)

    Source: github.com/meta-llama/llama-models, `apply_scaling`.
    """

    factor: float
    original_seqlen: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        _expect_factor(self)
        _expect_length("original_seqlen of Llama3Scaling", self.original_seqlen)
        for name in ("low_freq_factor", "high_freq_factor"):
            _expect_positive(f"{name} of Llama3Scaling", getattr(self, name))
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                "high_freq_factor of Llama3Scaling must be above low_freq_factor, got "
                f"{self.high_freq_factor} and {self.low_freq_factor}"
            )

    def frequencies(self, plain: np.ndarray, base: float) -> np.ndarray:
        """As `LinearScaling.frequencies`."""
        waves = self.original_seqlen * plain / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((waves - low) / (high - low), 0, 1)
        return plain * ((1 - kept) / self.factor + kept)

    @property
    def magnitude(self) -> float:
        """As `LinearScaling.magnitude`."""
        return 1.0


Scaling = LinearScaling | YarnScaling | Llama3Scaling


def angles_of(
    positions: np.ndarray, rotary_dim: int, base: float, scaling: Scaling | None
) -> np.ndarray:
    """(positions, rotary_dim / 2) angles in float64."""
    frequencies = float(base) ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    if scaling is not None:
        frequencies = scaling.frequencies(frequencies, float(base))
    return positions[:, None].astype(np.float64) * frequencies


def make_tables(
    seqlen: int, rotary_dim: int, base: float, scaling: Scaling | None, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin) on the host, as `numflash.rotary_tables` documents them, and its errors."""
    if isinstance(seqlen, bool) or not isinstance(seqlen, Integral):
        raise TypeError(f"seqlen must be an integer, got {seqlen!r} ({kind_of(seqlen)})")
    if not 0 <= seqlen < _MAX_TOKENS:
        raise ValueError(f"seqlen must be 0 or more and below {_MAX_TOKENS}, got {seqlen}")
    expect_head_dim("rotary_dim", rotary_dim)
    if rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even, for its columns go in pairs, got {rotary_dim}")
    _expect_positive("base", base)
    if base <= 1:
        raise ValueError(f"base must be above 1, got {base}")
    if scaling is not None and not isinstance(scaling, Scaling):
        kinds = "LinearScaling, YarnScaling, Llama3Scaling"
        raise TypeError(
            f"scaling must be None or one of {kinds}, got {scaling!r} ({kind_of(scaling)})"
        )
    expect_one_of("dtype", dtype, DTYPES)
    shape, magnitude = (int(seqlen), rotary_dim // 2), scaling.magnitude if scaling else 1.0
    cos, sin = (np.empty(shape, numpy_dtype(dtype)) for _ in range(2))
    for begin in range(0, shape[0], _ROWS_AT_ONCE):
        rows = slice(begin, min(begin + _ROWS_AT_ONCE, shape[0]))
        angles = angles_of(np.arange(rows.start, rows.stop), rotary_dim, base, scaling)
        cos[rows], sin[rows] = magnitude * np.cos(angles), magnitude * np.sin(angles)
    return cos, sin


def _expect_factor(scaling) -> None:
    name = f"factor of {kind_of(scaling)}"
    _expect_positive(name, scaling.factor)
    if scaling.factor < 1:
        raise ValueError(f"{name} must be at least 1, got {scaling.factor}")


def _expect_positive(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {value!r} ({kind_of(value)})")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _expect_length(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} ({kind_of(value)})")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
