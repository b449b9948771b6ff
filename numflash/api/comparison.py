"""Results compared with float64: the error of each, next to the error that it may have.

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

Sequences with lengths of their own are compared one by one; of each result the report has the
sequence that comes closest to its budget, or exceeds it by most.

On 8-bit floats the specification, `reference.attention_fp8`, takes the place of the naive
implementation: the error of quantisation is in it, and is not the kernel's.
"""

import re
from dataclasses import dataclass

import numpy as np

from numflash import reference
from numflash.configs.features import FEATURES
from numflash.reference.gradients import names_of_gradients
from numflash.reference.varlen import each_alone

_OF_HEADS = {
    f"d{row.option}" for row in FEATURES if row.gradient is not None and row.hook == "score"
}
OF_ARRAYS = re.compile(r"dbias|daux\d+", re.ASCII)
EPSILON = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "tf32": 2.0**-11}


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
    epsilon, lse_factor = EPSILON[precision], 0.0
    if dout is not None:
        names = gradients_by_name(options)
        exact |= zip(names, reference.attention_backward(dout, q, k, v, **options), strict=True)
        naive |= zip(
            names,
            reference.naive_backward(dout, q, k, v, precision=precision, **options),
            strict=True,
        )
        lse_factor = _factor_of_lse(exact["lse"], epsilon)
    magnitudes = reference.magnitudes(q, k, v, dout, **options)
    remainders = {
        name: (2 * EPSILON["float32"] + (lse_factor if name.startswith("d") else 0))
        * _largest_finite(sums)
        for name, sums in magnitudes.items()
    }
    for name, sums in magnitudes.items():
        rows = exact["lse"].size / max(sums.size, 1)
        if name in _OF_HEADS or (OF_ARRAYS.fullmatch(name) and rows > 1):
            remainders[name] += epsilon * _largest_finite(sums) / rows**0.5
    dtypes = dtypes or {}
    epsilons = {n: max(epsilon, EPSILON[dtypes[n]]) if n in dtypes else epsilon for n in got}
    # lse is float32 whatever the inputs are, but its scores are not more exact than they.
    return CheckReport(
        tuple(
            measure(name, array, exact[name], naive[name], epsilons[name], remainders[name])
            for name, array in got.items()
        ),
        lse_factor,
    )


def compare_each(
    got: dict, q, k, v, *, precision: str, dtypes: dict | None = None, dout=None, **options
) -> CheckReport:
    """As `compare`, each sequence by itself; of a call whose sequences have lengths of their own.

    Rows that no sequence has must be 0, and their lse -inf.
    """
    sequences = each_alone(q, k, options)
    wanted = names_of_gradients(options)
    own = tuple(name for name in wanted if name in "qkv") if dout is not None else ()
    shared = [name for name in wanted if name not in "qkv"] if dout is not None else []
    found: dict[str, list[Error]] = {name: [] for name in got}
    nobodys = {name: np.ones(x.shape, bool) for name, x in got.items() if name[1:] not in shared}
    lse_factor = 0.0
    for rows, given in sequences:
        parts = {name: x[rows[name]] for name, x in got.items() if name in nobodys}
        for name in parts:
            nobodys[name][rows[name]] = False
        report = compare(
            parts,
            *(x[rows[name]] for name, x in (("q", q), ("k", k), ("v", v))),
            precision=precision,
            dtypes=dtypes,
            dout=dout[rows["dout"]] if own else None,
            **(given | ({"wrt": own} if own else {})),
        )
        lse_factor = max(lse_factor, report.lse_factor)
        for error in report.errors:
            found[error.name].append(error)
    for name, is_nobodys in nobodys.items():
        of_nobody = -np.inf if name == "lse" else 0.0
        is_right = (got[name][is_nobodys].astype(np.float64) == of_nobody).all()
        found[name].append(Error(name, 0.0 if is_right else np.inf, 0.0, 0.0))
    for name in shared:
        operands = got[f"d{name}"], q, k, v, dout
        found[f"d{name}"].append(_compare_shared(name, *operands, sequences, precision, dtypes))
    return CheckReport(tuple(max(found[name], key=_share_of_budget) for name in got), lse_factor)


def _compare_shared(name: str, got, q, k, v, dout, sequences, precision, dtypes) -> Error:
    """The error of the gradient of what sequences share: the sum of theirs."""
    exact, naive, sums = (np.zeros(got.shape) for _ in range(3))
    largest_lse, num_rows = 0.0, 0
    for rows, given in sequences:
        arrays = [x[rows[n]] for n, x in (("dout", dout), ("q", q), ("k", k), ("v", v))]
        given, place = given | {"wrt": (name,)}, rows.get(name, ())
        exact[place] += reference.attention_backward(*arrays, **given)[0]
        naive[place] += reference.naive_backward(*arrays, precision=precision, **given)[0]
        sums[place] += reference.magnitudes(*arrays[1:], arrays[0], **given)[f"d{name}"]
        _, lse = reference.attention(*arrays[1:], **given)
        num_rows, largest_lse = num_rows + lse.size, max(largest_lse, _largest_finite(lse))
    epsilon = EPSILON[precision]
    factor = 2 * EPSILON["float32"] + _factor_of_lse(np.array([largest_lse]), epsilon)
    name = f"d{name}"
    if name in _OF_HEADS or OF_ARRAYS.fullmatch(name):
        factor += epsilon / max(num_rows / max(sums.size, 1), 1) ** 0.5
    epsilon = max(epsilon, EPSILON[(dtypes or {}).get(name, precision)])
    return measure(name, got, exact, naive, epsilon, factor * _largest_finite(sums))


def _share_of_budget(error: Error) -> float:
    """How much of its budget an error takes."""
    return error.error / error.budget if error.budget else np.inf if error.error else 0.0


def _factor_of_lse(lse: np.ndarray, epsilon: float) -> float:
    """The relative error that exp(S - lse) may have, where that is more than epsilon, else 0.

    lse is rounded when it is made, when it is brought to base 2, and through its largest score:
    each time by 2**-24 of itself. In float32 the naive implementation's errors show as much.
    """
    with np.errstate(over="ignore"):
        factor = float(np.expm1(2.0**-22 * _largest_finite(lse)))
    return factor if factor > epsilon > EPSILON["float32"] else 0.0


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


def remainder_of_codes(out: np.ndarray, lse: np.ndarray) -> float:
    """The error of a result on 8-bit floats that comes from float32's rounding of large scores.

    It moves exponentials by the same factor in a row's sum and in its P, but P is rounded to 8
    bits, where a small move is lost.
    """
    with np.errstate(over="ignore"):
        return float(np.expm1(2.0**-23 * _largest_finite(lse)) * _largest_finite(out))


def gradients_by_name(options: dict) -> tuple[str, ...]:
    """Of what `attention_backward` returns with these options."""
    return tuple(f"d{name}" for name in names_of_gradients(options))
