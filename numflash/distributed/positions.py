"""Checks of options that go by position, against who holds which tokens."""

import math

from numflash.distributed import steps
from numflash.distributed.layouts import Layout
from numflash.distributed.local_calls import OF_DOCUMENT, is_given
from numflash.distributed.pairs import Band, Call
from numflash.problem.options import AttentionOptions
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.philox import ALIGNMENT


def expect_documents(options: AttentionOptions, documents: int, batch: int) -> None:
    """Check that options can tell so many documents apart. Raises UnsupportedError."""
    given = _of_document(options)
    if not given or documents <= 1:
        return
    if batch != 1:
        reason = f"its batch entry is the number of a document, and q has {batch} entries"
    elif options.precision == "fp8":
        reason = "kernels on 8-bit floats know no packed documents, whose numbers it needs"
    else:
        return
    raise UnsupportedError(f"{given[0]} over several ranks with {documents} documents: {reason}")


def expect_random_bits(options: AttentionOptions, layout: Layout, method: str) -> None:
    """Check that calls with dropout begin where random bits do.

    Args:
        options: of the call.
        layout: of the method across groups.
        method: its name.

    Raises:
        ValueError: one does not.
    """
    if not is_given("dropout_p", options.dropout_p):
        return
    band = Band.of(options.causal, options.window_size)
    if any(n % ALIGNMENT for call in _calls(layout, band, method) for n in call.origin):
        raise ValueError(
            f"with dropout_p calls must begin at multiples of {ALIGNMENT} tokens, to which random "
            f"bits belong: make the layout with multiple={ALIGNMENT}, and with a ring a window "
            "that is such a multiple"
        )


def expect_blocks(options: AttentionOptions, layout: Layout, method: str) -> None:
    """Check a block mask: each call begins where blocks do.

    Args:
        options: of the call.
        layout: of the method across groups.
        method: its name.

    Raises:
        ValueError: one begins within a block.
        UnsupportedError: several documents, or another option by position.
    """
    if options.block_mask is None:
        return
    others, reason = _of_document(options), None
    if len(layout.lengths) > 1:
        reason = f"it is of one sequence, and the layout has {len(layout.lengths)}"
    elif others:
        reason = f"a call with lists of its own rows has no origin, by which {others[0]} goes"
    if reason:
        raise UnsupportedError(f"block_mask over several ranks: {reason}")
    size = options.block_mask.block_size
    band = Band.of(options.causal, options.window_size)
    for call in _calls(layout, band, method):
        for begin, step, of in zip(call.origin, size, ("queries", "keys"), strict=True):
            if begin % step:
                raise ValueError(
                    f"with a block_mask calls must begin at multiples of its blocks' {step} {of}, "
                    f"and one begins at token {begin}: make the layout with "
                    f"multiple={math.lcm(*size)}, and with a ring a window that is such a multiple"
                )


def _of_document(options: AttentionOptions) -> list[str]:
    return [name for name in OF_DOCUMENT if is_given(name, getattr(options, name))]


def _calls(layout: Layout, band: Band, method: str) -> list[Call]:
    """Those of all ranks, where scores depend on positions."""
    if method == "gather":
        return [call for plan in steps.gathering(layout, band) for call in plan.calls]
    return [
        call for plan in steps.ring(layout, band, True) for step in plan for call in step.calls
    ]
