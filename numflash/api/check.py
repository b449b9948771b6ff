"""`numflash.check`: the error of a result, next to the error that it may have.

The rule is FlashAttention's own: a kernel's largest error against float64 may be twice that of a
naive implementation that works in the kernel's input precision throughout, plus the rounding of
one result. What the rule allows is the `budget`. The budget also
holds float32's rounding of the summed numbers, which is left where these cancel.

The gradients begin at lse, a float32: their P = exp(S - lse) may be wrong by a factor of
exp(2**-22 |lse|), so that scores in the millions have no useful gradients. Where that exceeds the
input precision it is part of the budget, and the report says so.

A gradient of what heads give their scores is a number for all rows of a head, and an element of an
array that scores read may be one for many rows. Each row's O was rounded to the input precision,
independently of others, and the naive error of one number says little: the budget also holds that
rounding, of the summed numbers of a row, for the root of rows.

On 8-bit floats the specification, `reference.attention_fp8`, takes the place of the naive
implementation: the error of quantisation is in it, and is not the kernel's.
"""

import re
from dataclasses import dataclass, replace

import numpy as np

from numflash import reference
from numflash.api import attention as api
from numflash.api.block_masks import own
from numflash.api.explain import explain_dispatch
from numflash.calls.fp8_options import has_fp8, refuse_backward
from numflash.configs.features import FEATURES
from numflash.problem.fp8 import Fp8Array, Fp8Recipe
from numflash.problem.options import ARRAY_OPTIONS
from numflash.reference.attention import heads_first, names_of_gradients
from numflash.runtime.arrays import library_of, stream_address, to_numpy
from numflash.selection.choice import split_configs

# Options that `attention_backward` alone has.
_OF_BACKWARD = ("dlse", "wrt", "grad_dtype")
_OF_HEADS = {
    f"d{row.option}" for row in FEATURES if row.gradient is not None and row.hook == "score"
}
_OF_ARRAYS = re.compile(r"dbias|daux\d+", re.ASCII)
_EPSILON = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "tf32": 2.0**-11}


@dataclass(frozen=True)
class Error:
    """The error of one result.

    Attributes:
        name: "out", "lse", "dq", "dk" or "dv".
        error: largest absolute difference from float64; infinite if NaN or infinities differ.
        naive_error: the same for the naive computation in the input precision; on 8-bit floats for
            the specification.
        budget: what `error` may be.
    """

    name: str
    error: float
    naive_error: float
    budget: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its budget."""
        return self.error <= self.budget


@dataclass(frozen=True)
class CheckReport:
    """The errors of one attention call; `print` shows them as a table.

    Attributes:
        errors: of each result.
        lse_factor: the relative error that gradients may have because lse is a float32; 0 where
            the input precision is coarser.

    Example:
        >>> import numpy as np, numflash
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16)).astype("float16")
        >>> report = numflash.check(q, k, v, causal=True)
        >>> report.passed, [error.name for error in report.errors]
        (True, ['out', 'lse'])
    """

    errors: tuple[Error, ...]
    lse_factor: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every error is within its budget."""
        return all(error.passed for error in self.errors)

    def __str__(self) -> str:
        lines = [f"{'':6}{'error':>10}{'naive':>10}{'budget':>10}"]
        for e in self.errors:
            verdict = "ok" if e.passed else "TOO LARGE"
            lines.append(
                f"{e.name:6}{e.error:10.1e}{e.naive_error:10.1e}{e.budget:10.1e}  {verdict}"
            )
        if self.lse_factor:
            lines.append(
                f"lse is so large that its rounding to float32 may change P of the backward, and "
                f"gradients with it, by {self.lse_factor:.1g} times itself"
            )
        return "\n".join(lines)


def check(q, k, v, *, dout=None, **options) -> CheckReport:
    """Run attention on these arrays and compare it with float64.

    Args:
        q, k, v: as for `numflash.attention`.
        dout: gradient of the output; with it the gradients are checked as well.
        options: the options of `numflash.attention`, and `dlse`, `wrt` and `grad_dtype` of
            `numflash.attention_backward`. `config` may be a dictionary that also names configs
            for the backward, by family.

    On 8-bit floats the exact result is that of the arrays before they are quantised; of an
    `Fp8Array`, and of codes with scales, that of the numbers they stand for.

    Returns:
        The errors of out and lse, and with dout of the gradients.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention`.

    The comparison runs in NumPy on the host and holds the whole score matrix.

    Example:
        >>> import numpy as np, numflash
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16)).astype("float16")
        >>> report = numflash.check(q, k, v, dout=v, causal=True)
        >>> all(error.error <= error.budget for error in report.errors)
        True
    """
    stream = options.pop("stream", None)
    if stream is not None:
        # Results are copied to the host on the current stream, which this one becomes.
        first = q.data if isinstance(q, Fp8Array) else q
        library = library_of(first, "q")
        device = library.view(first, "q").device
        with library.ordered_on(stream_address(stream), device):
            return check(q, k, v, dout=dout, **options)
    for name in ("return_lse", "return_decision"):
        options.pop(name, None)
    given = {"q": q, "k": k, "v": v}
    descales = {name: options.get(f"{name}_descale") for name in given}
    is_fp8 = options.get("precision") in ("fp8", "auto") or any(
        x is not None for x in descales.values()
    )
    if is_fp8 or has_fp8(q, k, v):
        if dout is not None:
            refuse_backward(q, k, v, options.get("precision") or "fp8")
        return _check_fp8(given, descales, options)
    of_backward = {name: options.pop(name) for name in _OF_BACKWARD if name in options}
    forward_configs, backward_configs = split_configs(options.pop("config", None))
    out, lse = api.attention(q, k, v, return_lse=True, config=forward_configs, **options)
    got = {"out": out, "lse": lse}
    if dout is not None:
        backward_options = {n: o for n, o in options.items() if n not in ("out", "out_dtype")}
        gradients = api.attention_backward(
            dout, q, k, v, out, lse, config=backward_configs, **backward_options, **of_backward
        )
        got |= zip(_names_of_gradients(options | of_backward), gradients, strict=True)

    host = {name: to_numpy(array) for name, array in given.items()}
    host_options = _on_host(options, q, k)
    precision = host_options.pop("precision", None) or library_of(q, "q").view(q, "q").dtype
    # The gradient of an array that scores read has the array's dtype.
    dtypes = {
        name: library_of(array, name).view(array, name).dtype
        for name, array in got.items()
        if _OF_ARRAYS.fullmatch(name)
    }
    return compare(
        {name: to_numpy(array) for name, array in got.items()},
        *host.values(),
        precision=precision,
        dtypes=dtypes,
        dout=None if dout is None else to_numpy(dout),
        **host_options,
        **_on_host(of_backward, q, k),
    )


def _names_of_gradients(options: dict) -> tuple[str, ...]:
    """Of what `attention_backward` returns with these options."""
    return tuple(f"d{name}" for name in names_of_gradients(options))


def _on_host(options: dict, q, k) -> dict:
    """The options that decide the result, with arrays in NumPy; a block mask as a mask."""
    options = {name: option for name, option in options.items() if name != "out"}
    arrays = *ARRAY_OPTIONS, "dlse"
    given = [name for name in arrays if options.get(name) is not None]
    options |= {name: to_numpy(options[name]) for name in given}
    if "aux" in options:
        given = options["aux"]
        options["aux"] = tuple(to_numpy(x) if hasattr(x, "shape") else x for x in given)
    blocks = options.pop("block_mask", None)
    if blocks is not None:
        layout, mask = options.get("layout", "bshd"), options.get("mask")
        kept = own(blocks).dense(_seqlen(q, layout), _seqlen(k, layout))
        options["mask"] = kept if mask is None else kept & mask
    return options


def _seqlen(x, layout: str) -> int:
    return x.shape[-2 if layout == "bhsd" or len(x.shape) == 2 else -3]


def _check_fp8(given: dict, descales: dict, options: dict) -> CheckReport:
    """A forward on 8-bit floats; everything is brought into (batch, heads, seqlen, head_dim)."""
    out, lse = api.attention(*given.values(), return_lse=True, **options)
    dtype = library_of(out, "out").view(out, "out").dtype
    asked = {name: option for name, option in options.items() if name != "out"}
    config = explain_dispatch(*given.values(), **asked).forward.config
    of_call = _on_host(options, given["q"], given["k"])
    for name in ("precision", "max_rel_error", "config", *(f"{name}_descale" for name in given)):
        of_call.pop(name, None)
    bhsd = of_call.pop("layout", "bshd") == "bhsd"
    recipe = _recipe(given, descales, of_call.pop("fp8", None))
    read = {name: _read(name, x, descales[name], recipe, bhsd) for name, x in given.items()}
    q, k, v = (each.numbers for each in read.values())
    if of_call.get("softmax_scale") is None:
        of_call["softmax_scale"] = q.shape[-1] ** -0.5
    exact = reference.attention(q, k, v, layout="bhsd", **of_call)
    specified = reference.attention_of_codes(
        *(each.codes for each in read.values()),
        *(each.descale for each in read.values()),
        blocks=tuple(each.block for each in read.values()),
        tile_n=config.tile_n,
        layout="bhsd",
        **of_call,
    )
    epsilon = _EPSILON[dtype]
    got_lse = to_numpy(lse).reshape(exact[1].shape)
    return CheckReport(
        (
            measure(
                "out",
                heads_first(to_numpy(out), bhsd),
                exact[0],
                specified[0][..., : v.shape[-1]],
                epsilon,
                remainder_of_codes(*exact),
            ),
            measure("lse", got_lse, exact[1], specified[1], epsilon),
        )
    )


def remainder_of_codes(out: np.ndarray, lse: np.ndarray) -> float:
    """The error of a result on 8-bit floats that comes from float32's rounding of large scores.

    It moves exponentials by the same factor in a row's sum and in its P, but P is rounded to 8
    bits, where a small move is lost.
    """
    with np.errstate(over="ignore"):
        return float(np.expm1(2.0**-23 * _largest_finite(lse)) * _largest_finite(out))


def _recipe(given: dict, descales: dict, recipe: Fp8Recipe | None) -> Fp8Recipe:
    """The recipe by which `attention` quantises arrays that are not in 8 bits yet."""
    arrays = [given[name].recipe for name in "qk" if isinstance(given[name], Fp8Array)]
    if any(x is not None for x in descales.values()):
        return replace(recipe or Fp8Recipe(), hadamard=False)
    if recipe is None and arrays:
        return replace(Fp8Recipe(), hadamard=arrays[0].hadamard, seed=arrays[0].seed)
    return recipe or Fp8Recipe()


@dataclass(frozen=True)
class _Read:
    """One of q, k and v, (batch, heads, seqlen, head_dim): codes, and the numbers to be exact on.

    The numbers are those of the array before it is quantised, or those that its codes stand for.
    """

    numbers: np.ndarray
    codes: np.ndarray
    descale: np.ndarray
    block: int


def _read(name: str, x, descale, recipe: Fp8Recipe, bhsd: bool) -> _Read:
    if not isinstance(x, Fp8Array) and descale is None:
        numbers, turned = heads_first(to_numpy(x), bhsd), recipe.hadamard and name != "v"
        codes, descale = reference.quantize_fp8(
            numbers, recipe.granularity, recipe.block, turned, recipe.seed, layout="bhsd"
        )
        return _Read(numbers, codes, descale, _tokens_per_scale(recipe))
    if isinstance(x, Fp8Array):
        recipe, descale, head_dim = x.recipe, to_numpy(x.descale), x.shape[-1]
        codes = to_numpy(x.data)
        if x.transposed:
            seqlen = x.shape[-2 if x.layout == "bhsd" or len(x.shape) == 2 else -3]
            codes = reference.tokens_outermost(codes, seqlen)
        codes = codes.swapaxes(1, 2)
    else:
        codes = heads_first(to_numpy(x).view(np.uint8), bhsd)
        recipe, descale = Fp8Recipe("head", hadamard=False), to_numpy(descale)[..., None]
        head_dim = codes.shape[-1]
        if descale.shape[1] != 1:
            # Query heads share the scale of their group.
            descale = np.repeat(descale, codes.shape[1] // descale.shape[1], axis=1)
    block = _tokens_per_scale(recipe)
    turned = recipe.hadamard, recipe.seed
    numbers = reference.dequantize_fp8(codes, descale, head_dim, block, *turned, layout="bhsd")
    return _Read(numbers, codes, descale, block)


def _tokens_per_scale(recipe: Fp8Recipe) -> int:
    return 1 if recipe.granularity == "token" else recipe.block


def compare(
    got: dict, q, k, v, *, precision: str, dtypes: dict | None = None, dout=None, **options
) -> CheckReport:
    """Compare results, by name, with float64; everything in NumPy.

    `dtypes` are those of results that do not have `precision`.
    """
    exact = dict(zip(("out", "lse"), reference.attention(q, k, v, **options), strict=True))
    naive = dict(
        zip(
            ("out", "lse"),
            reference.naive(q, k, v, precision=precision, **options),
            strict=True,
        )
    )
    epsilon, lse_factor = _EPSILON[precision], 0.0
    if dout is not None:
        names = _names_of_gradients(options)
        exact |= zip(names, reference.attention_backward(dout, q, k, v, **options), strict=True)
        naive |= zip(
            names,
            reference.naive_backward(dout, q, k, v, precision=precision, **options),
            strict=True,
        )
        lse_factor = _factor_of_lse(exact["lse"], epsilon)
    magnitudes = reference.magnitudes(q, k, v, dout, **options)
    remainders = {
        name: (2 * _EPSILON["float32"] + (lse_factor if name.startswith("d") else 0))
        * _largest_finite(sums)
        for name, sums in magnitudes.items()
    }
    for name, sums in magnitudes.items():
        rows = exact["lse"].size / max(sums.size, 1)
        if name in _OF_HEADS or (_OF_ARRAYS.fullmatch(name) and rows > 1):
            remainders[name] += epsilon * _largest_finite(sums) / rows**0.5
    dtypes = dtypes or {}
    epsilons = {n: max(epsilon, _EPSILON[dtypes[n]]) if n in dtypes else epsilon for n in got}
    # lse is float32 whatever the inputs are, but its scores are not more exact than they.
    return CheckReport(
        tuple(
            measure(name, array, exact[name], naive[name], epsilons[name], remainders[name])
            for name, array in got.items()
        ),
        lse_factor,
    )


def _factor_of_lse(lse: np.ndarray, epsilon: float) -> float:
    """The relative error that exp(S - lse) may have, where that is more than epsilon, else 0.

    lse is rounded when it is made, when it is brought to base 2, and through its largest score:
    each time by 2**-24 of itself. In float32 the naive implementation's errors show as much.
    """
    with np.errstate(over="ignore"):
        factor = float(np.expm1(2.0**-22 * _largest_finite(lse)))
    return factor if factor > epsilon > _EPSILON["float32"] else 0.0


def measure(name: str, got, exact, naive, epsilon: float, remainder: float = 0.0) -> Error:
    """The error of one result against its budget; `remainder` may be left by cancelling."""
    naive_error = _largest_difference(naive, exact)
    budget = 2 * naive_error + epsilon * _largest_finite(exact) + remainder
    return Error(name, _largest_difference(got, exact), naive_error, budget)


def _largest_finite(x: np.ndarray) -> float:
    return float(np.abs(x[np.isfinite(x)]).max(initial=0))


def _largest_difference(a, exact) -> float:
    """max |a - exact|; infinite unless shapes, NaN and infinities agree."""
    a = np.asarray(a).astype(np.float64)
    if a.shape != exact.shape:
        return np.inf
    same = (a == exact) | (np.isnan(a) & np.isnan(exact))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - exact))
    difference = np.where(np.isnan(difference), np.inf, difference)
    return float(difference.max(initial=0))
