"""FlexAttention's examples, as they are written for numflash: masks and scores, with gradients.

A function gets symbols once and becomes part of the kernel; here each is compared with float64,
its gradients too. With NUMBA_ENABLE_CUDASIM=1 this runs on the CPU, on small arrays.

    python examples/masks_and_scores.py [NAME ...]
"""

import argparse
import sys

import numpy as np

import numflash
from numflash import masks
from numflash.math import tanh, where
from numflash.runtime.commands import command

HEADS, DOCUMENTS = 2, (5, 9, 2, 8)
LENGTH = sum(DOCUMENTS)
DOCUMENT = np.repeat(np.arange(4), DOCUMENTS).astype(np.int32)
"""The document of each token."""
FIRST = np.cumsum((0, *DOCUMENTS)).astype(np.int32)
"""The first token of each document."""
GRID = 6
"""Tokens of a row of an image."""
RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((32, HEADS)).astype(np.float32)
EXAMPLES = {}


def example(**options):
    """Register a function as a `score_mod` or a `mask_mod`, with options beside it."""

    def register(function):
        takes_score = function.__code__.co_varnames[0] == "score"
        role = "score_mod" if takes_score else "mask_mod"
        EXAMPLES[function.__name__] = {role: function, **options}
        return function

    return register


# Scores.


@example()
def relative_bias(score, batch, head, q_idx, kv_idx):
    """A number for each distance."""
    return score + (q_idx - kv_idx)


@example(aux=(np.array([0.5, 0.25], np.float32),), causal=True)
def alibi(score, batch, head, q_idx, kv_idx, slopes):
    """As `alibi_slopes=` of causal attention."""
    return score + slopes[head] * (kv_idx - q_idx)


@example()
def soft_cap(score, batch, head, q_idx, kv_idx):
    """As `softcap=20`."""
    return 20 * tanh(score / 20)


@example(aux=(RNG.standard_normal((2, HEADS)).astype(np.float16),))
def bias_of_head(score, batch, head, q_idx, kv_idx, bias):
    """A number of each batch entry and head."""
    return score + bias[batch, head]


@example()
def checkerboard(score, batch, head, q_idx, kv_idx):
    """Half of a score, or twice it."""
    score = where(abs(kv_idx - q_idx) % 2 == 1, score * 0.5, score)
    return where(abs(kv_idx - q_idx) % 2 == 0, score * 2.0, score)


@example()
def causal_as_a_score(score, batch, head, q_idx, kv_idx):
    """Slower than a mask, and right."""
    return where(q_idx >= kv_idx, score, -float("inf"))


# A function of numflash.masks is made with its numbers, and takes its arrays from aux.
EXAMPLES["relative_position"] = {"score_mod": masks.relative_position(), "aux": (TABLE,)}


# Masks.


@example()
def causal(batch, head, q_idx, kv_idx):
    """As `causal=True`."""
    return q_idx >= kv_idx


@example()
def sliding_window(batch, head, q_idx, kv_idx):
    """As `window_size=(7, 0)`."""
    return (q_idx >= kv_idx) & (q_idx - kv_idx <= 7)


@example()
def dilated_window(batch, head, q_idx, kv_idx):
    """Every third key."""
    distance = q_idx - kv_idx
    return (distance >= 0) & (distance <= 12) & (distance % 3 == 0)


@example(aux=(np.array([4, 11], np.int32),))
def prefix_lm(batch, head, q_idx, kv_idx, lengths):
    """A prompt is seen as a whole, what follows it is causal."""
    return (kv_idx < lengths[batch]) | (q_idx >= kv_idx)


@example(aux=(DOCUMENT,))
def documents(batch, head, q_idx, kv_idx, document):
    """Of several in a sequence a token sees its own."""
    return document[q_idx] == document[kv_idx]


@example(aux=(DOCUMENT, FIRST))
def window_in_documents(batch, head, q_idx, kv_idx, document, first):
    """A mask of places in a document, as nested tensors have it: jagged sequences in one."""
    row = q_idx - first[document[q_idx]]
    column = kv_idx - first[document[kv_idx]]
    return (document[q_idx] == document[kv_idx]) & (row >= column) & (row - column < 4)


@example(aux=(np.array([LENGTH, 13], np.int32),))
def padding(batch, head, q_idx, kv_idx, lengths):
    """Sequences of a batch have their own lengths."""
    return kv_idx < lengths[batch]


@example()
def neighbourhood(batch, head, q_idx, kv_idx):
    """NATTEN: a token of an image sees a square around it."""
    rows = abs(q_idx // GRID - kv_idx // GRID)
    columns = abs(q_idx % GRID - kv_idx % GRID)
    return (rows <= 1) & (columns <= 1)


@example(aux=(3,))
def later_queries(batch, head, q_idx, kv_idx, offset):
    """Of decoding: the number in aux may change from call to call, and compiles nothing."""
    return q_idx + offset >= kv_idx


@example(aux=(np.repeat([0, 1, 0, 2], 6).astype(np.uint8),))
def transfusion(batch, head, q_idx, kv_idx, image):
    """Text is causal; the tokens of an image see each other."""
    together = (image[q_idx] == image[kv_idx]) & (image[q_idx] != 0)
    return (q_idx >= kv_idx) | together


EXAMPLES["window_and_prefix"] = {
    "mask_mod": masks.or_masks(
        masks.and_masks(masks.causal, masks.sliding_window(6)), masks.prefix(3)
    )
}


# The same without a function, and both together.

EXAMPLES["bias"] = {"bias": RNG.standard_normal((HEADS, LENGTH, LENGTH)).astype(np.float16)}
EXAMPLES["keys"] = {"mask": RNG.random((2, 1, 1, LENGTH)) < 0.7}
EXAMPLES["together"] = {
    **EXAMPLES["alibi"],
    "mask": EXAMPLES["keys"]["mask"],
    "window_size": (15, 0),
}


@command
def main(arguments=None) -> int:
    """Run examples, all of them by default; the exit status says whether all were right."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *EXAMPLES])
    names = parser.parse_args(arguments).names or list(EXAMPLES)
    array = np.asarray
    if not numflash.simulating():
        import cupy

        array = cupy.asarray
    shape, right = (2, LENGTH, HEADS, 16), True
    q, k, v, dout = (array(RNG.standard_normal(shape).astype(np.float16)) for _ in range(4))
    for name in names:
        options = {
            option: array(value) if isinstance(value, np.ndarray) else value
            for option, value in EXAMPLES[name].items()
        }
        options["aux"] = tuple(
            array(x) if isinstance(x, np.ndarray) else x for x in options.get("aux", ())
        )
        report = numflash.check(q, k, v, dout=dout, **options)
        right &= report.passed
        errors = ", ".join(f"{error.name} {error.error:.0e}" for error in report.errors)
        print(f"{name:20} {errors}  {'ok' if report.passed else 'TOO LARGE'}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
