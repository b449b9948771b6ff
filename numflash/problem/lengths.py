"""What a call says of the lengths of its sequences, and what its options ask of them."""

from numflash.problem.options import PACKED, AttentionOptions
from numflash.problem.pages import PageTable
from numflash.problem.sequences import NAMES, Lengths, lengths_of
from numflash.runtime.views import ArrayView


def lengths_asked(
    views: dict[str, ArrayView], layout: str, batch: int, bounds: tuple[int, int]
) -> Lengths | None:
    """What a call says of the lengths of its sequences; None if nothing.

    Raises as `problem.describe`; `bounds` are the rows of q and k.
    """
    given = [name for name in NAMES if name in views]
    if layout == PACKED:
        return lengths_of(views, bounds, views["q"].device, paged="page_table" in views)
    if not given:
        return None
    if given[0].startswith("cu_seqlens"):
        raise ValueError(
            f"{given[0]} goes with packed arrays (tokens, heads, head_dim), as attention_varlen "
            f'has them; of arrays in the layout "{layout}" seqlens_q and seqlens_k say how long '
            "their sequences are"
        )
    return lengths_of(views, bounds, views["q"].device, batch=batch)


def expect_lengths(
    lengths: Lengths | None, pages: PageTable | None, options: AttentionOptions
) -> None:
    """Check that lengths and pages are as the options ask. Raises ValueError."""
    given = () if lengths is None else lengths.given
    rules = {
        "page_table": (pages is not None, "how many keys of its pages each sequence has"),
        "appended": (options.appended > 0, "the keys that appended does not count"),
        "cached": (options.cached, "the rows that cached counts"),
    }
    for name, (is_asked, what) in rules.items():
        if is_asked and "seqlens_k" not in given:
            raise ValueError(f"{name} goes with seqlens_k, {what}, got no seqlens_k")
    if pages is not None and "cu_seqlens_k" in given:
        raise ValueError(
            "cu_seqlens_k and page_table cannot be given together: each sequence has pages of its "
            "own, and seqlens_k says how many keys it has"
        )
    if pages is not None and pages.entries != lengths.entries:
        raise ValueError(
            f"page_table must have a row for each of the {lengths.entries} sequences, got "
            f"{pages.entries}"
        )
    asked = {
        "batch_invariant=True": options.batch_invariant,
        "num_splits": options.num_splits is not None,
        "schedule": options.schedule is not None,
    }
    for name in (name for name, is_asked in asked.items() if is_asked and lengths is None):
        raise ValueError(
            f"{name} goes with sequences that have lengths of their own: seqlens_q, seqlens_k, or "
            "cu_seqlens_q and cu_seqlens_k; got none of these"
        )
