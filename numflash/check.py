"""numflash.check: how far a result is from the exact one, next to how far it may be.

The rule is FlashAttention's own: a kernel's largest error against float64 may be twice that of a
naive implementation that works in the kernel's input precision throughout, plus the rounding of
one result. What the rule allows is the `budget`.

On 8-bit floats the specification, `reference.attention_fp8`, takes the place of the naive
implementation: the error of quantisation is in it, and is not the kernel's.
"""

from dataclasses import dataclass, replace

import numpy as np

from numflash import api, reference
from numflash.arrays import library_of, stream_address
from numflash.explain import explain_dispatch
from numflash.fp8 import Fp8Array, Fp8Recipe
from numflash.reference.attention import heads_first
from numflash.selection import split_configs

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
    """The errors of one attention call; `print` shows them as a table."""

    errors: tuple[Error, ...]

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
        return "\n".join(lines)


def check(q, k, v, *, dout=None, **options) -> CheckReport:
    """Run attention on these arrays and compare it with float64.

    Args:
        q, k, v: as for `numflash.attention`.
        dout: gradient of the output; with it the gradients are checked as well.
        options: the options of `numflash.attention`. `config` may be a dictionary that also names
            configs for the backward, by family.

    With precision="fp8" the exact result is that of the arrays before they are quantised; of an
    `Fp8Array`, and of codes with scales, that of the numbers they stand for.

    Returns:
        The errors of out and lse, and with dout of dq, dk and dv.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention`.

    The comparison runs in NumPy on the host and holds the whole score matrix.
    """
    stream = options.pop("stream", None)
    if stream is not None:
        # Results are copied to the host on the current stream, which this one becomes.
        first = q.data if isinstance(q, Fp8Array) else q
        library = library_of(first, "q")
        device = library.view(first, "q").device
        with library.ordered_on(stream_address(stream), device):
            return check(q, k, v, dout=dout, **options)
    options.pop("return_lse", None)
    forward_configs, backward_configs = split_configs(options.pop("config", None))
    out, lse = api.attention(q, k, v, return_lse=True, config=forward_configs, **options)
    got = {"out": out, "lse": lse}
    if dout is not None:
        backward_options = {n: o for n, o in options.items() if n != "out"}
        gradients = api.attention_backward(
            dout, q, k, v, out, lse, config=backward_configs, **backward_options
        )
        got |= zip(("dq", "dk", "dv"), gradients, strict=True)

    host = {name: to_numpy(array) for name, array in (("q", q), ("k", k), ("v", v))}
    host_options = {n: o for n, o in options.items() if n != "out"}
    if host_options.get("alibi_slopes") is not None:
        host_options["alibi_slopes"] = to_numpy(host_options["alibi_slopes"])
    precision = host_options.pop("precision", None) or library_of(q, "q").view(q, "q").dtype
    return compare(
        {name: to_numpy(array) for name, array in got.items()},
        *host.values(),
        precision=precision,
        dout=None if dout is None else to_numpy(dout),
        **host_options,
    )


def compare(got: dict, q, k, v, *, precision: str, dout=None, **options) -> CheckReport:
    """Compare results, by name, with float64; everything in NumPy."""
    exact = dict(zip(("out", "lse"), reference.attention(q, k, v, **options), strict=True))
    naive = dict(
        zip(
            ("out", "lse"),
            reference.naive(q, k, v, precision=precision, **options),
            strict=True,
        )
    )
    if dout is not None:
        names = "dq", "dk", "dv"
        exact |= zip(names, reference.attention_backward(dout, q, k, v, **options), strict=True)
        naive |= zip(
            names,
            reference.naive_backward(dout, q, k, v, precision=precision, **options),
            strict=True,
        )
    # lse is float32 whatever the inputs are, but its scores are not more exact than they.
    return CheckReport(
        tuple(
            measure(name, array, exact[name], naive[name], _EPSILON[precision])
            for name, array in got.items()
        )
    )


def measure(name: str, got, exact, naive, epsilon: float) -> Error:
    """The error of one result against its budget."""
    finite = np.abs(exact[np.isfinite(exact)])
    rounding = epsilon * float(finite.max(initial=0))
    naive_error = _largest_difference(naive, exact)
    budget = 2 * naive_error + rounding
    return Error(name, _largest_difference(got, exact), naive_error, budget)


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


def to_numpy(array) -> np.ndarray:
    """A host copy of an array of any library."""
    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "get"):  # CuPy
        return array.get()
    if hasattr(array, "detach"):  # PyTorch; NumPy has no bfloat16 of its own to copy to
        tensor = array.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":
            return tensor.float().numpy()
        return tensor.numpy()
    if hasattr(array, "copy_to_host"):  # Numba
        return array.copy_to_host()
    return np.asarray(array)
