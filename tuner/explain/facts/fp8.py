"""Q, K and V as 8-bit floats: what rotation does, scales, what is flushed to 0, and errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from numflash import reference
from numflash.calls.fp8_options import MAX_REL_ERROR
from numflash.configs.formats import FORMATS
from numflash.problem.fp8 import Fp8Recipe
from numflash.reference.fp8 import padded_head_dim, per_token, rotate

from ..asked import Asked, NotShownError
from ..elements import Elements, Part, elements_of
from ..numbers import Number

MOST_TOKENS = 4096
"""Of a head whose elements are counted."""
MOST_OF_ERRORS = (128, 512)
"""Queries and keys of the slice whose errors are computed, in float64."""
MOST_HEADS = 32
"""Key-value heads that are estimated, of MOST_ESTIMATED tokens."""
MOST_ESTIMATED = 512
_OCTAVES, _STEP = 22, 0.5
_E4M3 = FORMATS["e4m3"]
_SMALLEST = 2.0**-9
P_NOISE = 7.05e-4
"""As `kernels.quantize.estimate` has it, which is not imported: it would import Numba."""


@dataclass(frozen=True)
class Sizes:
    """How large the elements of one array are, and what their codes keep.

    Attributes:
        edges: of bins of |x|, powers of two; the first bin holds all that is smaller.
        before, after: the share of elements in each bin, before and after the rotation.
        largest: the largest |x| before and after.
        reach: what the largest code stands for, before and after, by the scale in the middle.
        smallest: what the smallest subnormal code stands for, likewise.
        flushed: the share of elements that are not 0 and whose code is, before and after.
    """

    edges: np.ndarray
    before: np.ndarray
    after: np.ndarray
    largest: tuple[Number, Number]
    reach: tuple[Number, Number]
    smallest: tuple[Number, Number]
    flushed: tuple[Number, Number]


@dataclass(frozen=True)
class Heads:
    """What `precision="auto"` decides, of the tokens that were read.

    Attributes:
        estimated: of each key-value head the error of 8 bits, relative to the result.
        in_16_bits: those beyond the budget.
        tokens: that were read.
    """

    estimated: Number
    in_16_bits: Sequence[int]
    tokens: Number


@dataclass(frozen=True)
class Fp8Facts:
    """A call on 8-bit floats.

    Attributes:
        what_if: whether nobody asked for 8 bits.
        elements: whose they are, in words.
        recipe: granularity, tokens of a scale and rotation.
        tokens: of the head that is drawn: of q, and of k and v.
        sizes: of "q" and "k", by name.
        scales: by name "q", "k" and "v": a scale for each block of tokens.
        block: tokens of a scale.
        flushed_v: the share of V's elements that are flushed to 0.
        errors: root mean square of the result's error relative to the result, by way: "16 bits",
            "8 bits", and "8 bits, not rotated"; without those whose scores overflow.
        budget: of such errors.
        part: queries and keys of the slice whose errors these are.
        heads: with precision="auto", else None.
    """

    what_if: bool
    elements: str
    recipe: str
    tokens: tuple[Number, Number]
    sizes: Mapping[str, Sizes]
    scales: Mapping[str, np.ndarray]
    block: Number
    flushed_v: Number
    errors: Mapping[str, Number]
    budget: Number
    part: tuple[Number, Number]
    heads: Heads | None


def find(asked: Asked) -> Fp8Facts:
    """The facts of a call.

    Raises:
        NotShownError: it has no scores, or elements are not finite.
    """
    problem, options = asked.problem, asked.question.options
    if not problem.seqlen_q * problem.seqlen_k * problem.num_heads_q * problem.batch:
        raise NotShownError("there are no scores, so there is nothing to quantise")
    elements, recipe = elements_of(asked), options.get("fp8") or Fp8Recipe()
    tokens = tuple(min(n, MOST_TOKENS) for n in (problem.seqlen_q, problem.seqlen_k))
    read = {
        name: elements.read(name, Part(0, 0, n, 0, 1))[None]
        for name, n in zip("qkv", (tokens[0], tokens[1], tokens[1]), strict=True)
    }
    errors, part = _errors(asked, elements, recipe)
    budget = options.get("max_rel_error") or MAX_REL_ERROR
    codes_v, _ = _quantized(read["v"], replace(recipe, hadamard=False))
    wanted = options.get("precision")
    return Fp8Facts(
        what_if=wanted not in ("fp8", "auto") and not asked.forward.traits.fp8,
        elements=elements.origin,
        recipe=_in_words(recipe),
        tokens=tuple(Number(n, "counted") for n in tokens),
        sizes={name: _sizes(read[name], recipe) for name in "qk"},
        scales={
            name: _quantized(x, recipe if name != "v" else replace(recipe, hadamard=False))[1]
            for name, x in read.items()
        },
        block=Number(_tokens_of_scale(recipe, tokens[1]), "chosen", "tokens"),
        flushed_v=_flushed(read["v"].astype(np.float32), codes_v),
        errors=errors,
        budget=Number(budget, "chosen"),
        part=part,
        heads=_heads(asked, elements, recipe, budget) if wanted == "auto" else None,
    )


def _in_words(recipe: Fp8Recipe) -> str:
    shares = f"each block of {recipe.block} tokens of a head"
    if recipe.granularity != "block":
        shares = "the tensor" if recipe.granularity == "tensor" else f"each {recipe.granularity}"
    return f"a scale for {shares}, {'' if recipe.hadamard else 'not '}rotated"


def _tokens_of_scale(recipe: Fp8Recipe, seqlen: int) -> int:
    return {"token": 1, "block": recipe.block}.get(recipe.granularity, seqlen)


def _quantized(x: np.ndarray, recipe: Fp8Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Codes (1, tokens, 1, columns) and scales (n,) of one head."""
    codes, scales = reference.quantize_fp8(
        x, recipe.granularity, recipe.block, recipe.hadamard, recipe.seed
    )
    return codes, scales.reshape(-1)


def _flushed(numbers: np.ndarray, codes: np.ndarray) -> Number:
    """The share of numbers that are not 0 and whose code stands for 0."""
    is_lost = (numbers != 0) & (_E4M3.decode(codes[..., : numbers.shape[-1]]) == 0)
    return Number(float(is_lost.mean()), "counted")


def _sizes(x: np.ndarray, recipe: Fp8Recipe) -> Sizes:
    """Before and after the rotation, which also fills columns up to a multiple of 64."""
    before = x.astype(np.float32)
    padding = padded_head_dim(x.shape[-1]) - x.shape[-1]
    after = rotate(np.pad(before, [(0, 0)] * 3 + [(0, padding)]), recipe.seed)
    largest = [float(np.abs(each).max()) for each in (before, after)]
    top = np.ceil(np.log2(max(largest) or 1.0))
    edges = 2.0 ** np.arange(top - _OCTAVES, top + _STEP, _STEP)
    found = []
    for numbers, turned in ((before, False), (after, True)):
        size = np.maximum(np.abs(numbers), edges[0])
        share = np.histogram(size, edges)[0] / numbers.size
        codes, scales = _quantized(x, replace(recipe, hadamard=turned))
        middle = float(np.median(scales))
        ends = (_E4M3.largest * middle, _SMALLEST * middle)
        found.append((share, *ends, _flushed(numbers, codes)))
    shares, reach, smallest, flushed = zip(*found, strict=True)

    def both(values: Sequence[float]) -> tuple[Number, Number]:
        return tuple(Number(value, "computed") for value in values)

    return Sizes(edges, *shares, both(largest), both(reach), both(smallest), flushed)


# Errors


def _errors(asked: Asked, elements: Elements, recipe: Fp8Recipe):
    """(errors by way, (queries, keys)) of a slice of one head."""
    problem = asked.problem
    queries = min(problem.seqlen_q, MOST_OF_ERRORS[0])
    keys = min(problem.seqlen_k, MOST_OF_ERRORS[1])
    # The last queries, and the keys up to the last that they see.
    first = problem.seqlen_q - queries
    end = min(max(problem.seqlen_q + problem.band_hi, keys), problem.seqlen_k)
    parts = {"q": Part(0, first, problem.seqlen_q, 0, 1)}
    parts |= dict.fromkeys("kv", Part(0, end - keys, end, 0, 1))
    arrays = [elements.read(name, part)[None].astype(np.float32) for name, part in parts.items()]
    moved = first - (end - keys)
    away = np.arange(keys) - np.arange(queries)[:, None]
    lo, hi = problem.band_lo + moved, problem.band_hi + moved
    options = {"softmax_scale": problem.softmax_scale, "mask": (away >= lo) & (away <= hi)}
    if softcap := asked.question.options.get("softcap"):
        options["softcap"] = softcap
    exact, _ = reference.attention(*arrays, **options)
    size = float(np.sqrt(np.square(exact).mean())) or 1.0

    def relative(found: np.ndarray) -> Number:
        return Number(float(np.sqrt(np.square(found - exact).mean())) / size, "computed")

    given = {"granularity": recipe.granularity, "block": recipe.block, "seed": recipe.seed}
    with np.errstate(over="ignore", invalid="ignore"):
        naive, _ = reference.naive(*arrays, precision=problem.dtype, **options)
    found = {}
    if np.isfinite(naive).all():
        bits = "32 bits" if problem.dtype == "float32" else "16 bits"
        found[bits] = relative(np.asarray(naive, np.float64))
    for name, turned in (("8 bits", recipe.hadamard), ("8 bits, not rotated", False)):
        out, _ = reference.attention_fp8(*arrays, hadamard=turned, **given, **options)
        found[name] = relative(out)
    return found, (Number(queries, "counted"), Number(keys, "counted"))


def _heads(asked: Asked, elements: Elements, recipe: Fp8Recipe, budget: float) -> Heads:
    """The decision for each key-value head of the first batch entry."""
    problem, group = asked.problem, asked.problem.group_size
    heads = min(problem.num_heads_kv, MOST_HEADS)
    tokens = [min(n, MOST_ESTIMATED) for n in (problem.seqlen_q, problem.seqlen_k)]
    q = elements.read("q", Part(0, 0, tokens[0], 0, heads * group))
    k, v = (elements.read(name, Part(0, 0, tokens[1], 0, heads)) for name in "kv")
    found = estimates(q[None], k[None], v[None], problem.softmax_scale, recipe)[0]
    return Heads(
        Number(found, "computed"),
        np.flatnonzero(found > budget).tolist(),
        Number(max(tokens), "counted", "tokens"),
    )


def estimates(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, softmax_scale: float, recipe: Fp8Recipe
) -> np.ndarray:
    """The error that 8 bits make of each key-value head, as `kernels.quantize.estimate` has it.

    Args:
        q, k, v: (batch, tokens, heads, columns).
        softmax_scale: of the scores.
        recipe: with a scale for each block, or what has its squares summed up by blocks.

    Returns:
        (batch, key-value heads), relative to the size of the result.
    """
    plain, heads = replace(recipe, hadamard=False), k.shape[2]
    q_size, q_error = _largest_means(q, recipe, heads)
    k_size, k_error = _largest_means(k, recipe, heads)
    squares, errors = _squares(v, plain)
    v_share = np.divide(errors, squares, out=np.zeros_like(errors), where=squares > 0).max(-1)
    columns = q.shape[-1]
    dims = padded_head_dim(columns) if recipe.hadamard else columns
    scores = softmax_scale**2 / dims * (q_size * k_error + q_error * k_size)
    return np.sqrt(scores + v_share + P_NOISE)


def _largest_means(x: np.ndarray, recipe: Fp8Recipe, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """(batch, key-value heads): the largest mean of a block's tokens of |x|^2, and of |dx|^2."""
    counts = np.diff([*range(0, x.shape[1], recipe.block), x.shape[1]])
    found = (each / counts for each in _squares(x, recipe))
    return tuple(each.reshape(x.shape[0], heads, -1).max(-1) for each in found)


def _squares(x: np.ndarray, recipe: Fp8Recipe) -> tuple[np.ndarray, np.ndarray]:
    """(batch, heads, blocks): sums of squares, and of squared errors, of what is quantised."""
    batch, tokens, heads, columns = x.shape
    padding = padded_head_dim(columns) - columns
    x = np.pad(x.astype(np.float32), [(0, 0)] * 3 + [(0, padding)])
    turned = rotate(x, recipe.seed) if recipe.hadamard else x
    codes, scales = reference.quantize_fp8(
        x, recipe.granularity, recipe.block, recipe.hadamard, recipe.seed
    )
    size = _tokens_of_scale(recipe, tokens)
    scale = per_token(scales, batch, heads, tokens, size).swapaxes(1, 2)[..., None]
    lost = _E4M3.decode(codes) * scale - turned
    first = range(0, tokens, recipe.block)
    return tuple(
        np.add.reduceat(np.square(each).sum(-1), first, axis=1).swapaxes(1, 2)
        for each in (turned, lost)
    )
