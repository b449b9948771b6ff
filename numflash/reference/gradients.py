"""Gradients of what goes into attention beside q, k and v: of features, bias and `aux`."""

import math

import ml_dtypes
import numpy as np

from numflash.configs.features import FEATURES, default_gradients
from numflash.functions.plain import on_arrays
from numflash.reference.arrays import dtype_of_sums
from numflash.reference.scores import NEAR, asked, numbers_of, places_of, scores


def names_of_gradients(options: dict) -> tuple[str, ...]:
    """What `attention_backward` returns gradients of with these options, in order."""
    asked = (row for row in FEATURES if row.is_asked(options.get(row.option, row.default)))
    return options.get("wrt") or default_gradients(tuple(row.name for row in asked))


def slope_of_scores(slopes: dict[str, np.ndarray]):
    """The derivative of scores by scaled products, from those of one feature by another."""
    return math.prod(slopes.values())


def gradients_of_heads(lse, product, of_scores, slopes, options) -> dict[str, np.ndarray]:
    """By name, as in "sinks": the gradients of options that heads have.

    `lse`, and `product`, that of dO and O less the gradient of lse, are (batch, head, query);
    `of_scores` is the gradient of the final scores, (batch, head, query, key).
    """
    found, places = {}, places_of(*of_scores.shape[2:], options)
    for row, value in asked(options, lse.shape[1]):
        if row.gradient is None:
            continue
        if row.hook == "finish":
            shares = row.gradient.shares(lse, product, value)
        else:
            names = list(slopes)
            later = {name: slopes[name] for name in names[names.index(row.name) + 1 :]}
            of_this = of_scores.astype(lse.dtype) * slope_of_scores(later)
            shares = row.gradient.shares(of_this, *places)
        batches = 0 if np.ndim(value) == 1 else ()
        whole = np.zeros(np.shape(options[row.option]), lse.dtype)
        first = (options.get("origin") or (0, 0, 0))[2]
        part = shares.sum(-1, dtype=lse.dtype).sum(batches)
        whole[..., first : first + lse.shape[1]] = part
        found[row.option] = whole
    return found


def gradients_of_arrays(operands, of_scores, slopes, options, sign=np.asarray) -> dict:
    """By name: the gradients of the bias, and of arrays of `aux`, that `wrt` names.

    `operands` are those of `scores`, `of_scores` is the gradient of the final scores, 0 where P
    is; `sign` is applied to derivatives. A function's derivative by an element that it reads is,
    for each score, the slope of a short line through it, in float64.
    """
    q, k, dtype, matmul = operands
    found, wanted = {}, names_of_gradients(options)
    if "bias" in wanted:
        found["bias"] = _gradient_of_bias(of_scores * slopes["given"], options, dtype)
    arrays = [name for name in wanted if name.startswith("aux")]
    if not arrays:
        return found
    unmasked = {"mask": None, "mask_mod": None, "causal": False, "window_size": (-1, -1)}
    before, *_ = scores(q, k, dtype, matmul, options | unmasked | {"score_mod": None})
    before, axes = before.astype(np.float64), numbers_of(before.shape, options)
    aux = [np.asarray(x).astype(np.float64) if _is_real(x) else x for x in options["aux"]]
    for name in arrays:
        place = int(name[3:])
        gradient, number, count = np.zeros(aux[place].shape, dtype_of_sums(dtype)), 0, 1
        is_read_whole = aux[place].ndim == 0
        while number < count:
            ends = []
            for step in (-NEAR, NEAR):
                probe = _Probe(aux[place], number, step)
                if is_read_whole:
                    probe = aux[place] + step
                given = [*aux[:place], probe, *aux[place + 1 :]]
                with np.errstate(all="ignore"):
                    of_both = options.get("mask_mod") is not None
                    places = (before, *axes)
                    ends.append(on_arrays(options["score_mod"], places, given, of_both))
            count = 1 if is_read_whole else probe.count
            index = () if is_read_whole else probe.index
            if index is not None:
                slope = np.where(of_scores == 0, 0, (ends[1] - ends[0]) / (2 * NEAR))
                shares = of_scores * sign(slope).astype(dtype)
                shape = np.shape(aux[place][index])
                np.add.at(gradient, index, _sum_to(shares, shape, dtype_of_sums(dtype)))
            number += 1
        found[name] = gradient.astype(dtype)
    return found


class _Probe:
    """An array of `aux` whose read `number`, of those that a function makes, is larger by `step`.

    Attributes:
        count: reads so far.
        index: of that read.
    """

    def __init__(self, array: np.ndarray, number: int, step: float):
        self._array, self._number, self._step = array, number, step
        self.count, self.index = 0, None

    def __getitem__(self, index):
        read = self._array[index]
        if self.count == self._number:
            self.index, read = index, read + self._step
        self.count += 1
        return read

    def __getattr__(self, name):
        return getattr(self._array, name)


def _gradient_of_bias(of_bias, options, dtype) -> np.ndarray:
    """Of a bias of a larger problem that of the part where `origin` says, and zeros elsewhere."""
    shape, (row, column, head) = np.shape(options["bias"]), options.get("origin") or (0, 0, 0)
    if options.get("origin") is None:
        return _sum_to(of_bias, shape, dtype)
    axes = zip(shape, of_bias.shape[4 - len(shape) :], strict=True)
    part = tuple(1 if n == 1 else full for n, full in axes)
    first = (0, head, row, column)[4 - len(shape) :]
    whole = np.zeros(shape, dtype)
    places = zip(first, part, shape, strict=True)
    inside = tuple(slice(None) if n == 1 else slice(x, x + m) for x, m, n in places)
    whole[inside] = _sum_to(of_bias, part, dtype)
    return whole


def _is_real(x) -> bool:
    """Whether something of `aux` is a float, or an array of them."""
    kind = np.asarray(x).dtype
    return kind.kind == "f" or kind == ml_dtypes.bfloat16


def _sum_to(x, shape: tuple[int, ...], dtype) -> np.ndarray:
    """The sums of x over the axes along which `shape` is broadcast to it."""
    full = (1,) * (x.ndim - len(shape)) + shape
    axes = tuple(axis for axis, n in enumerate(full) if n == 1)
    return (
        x.sum(axes, dtype=dtype_of_sums(np.dtype(dtype)), keepdims=True)
        .astype(dtype)
        .reshape(shape)
    )
