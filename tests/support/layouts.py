"""Layouts and bands at random, and what a query sees as a dense mask."""

import random

import numpy as np

from numflash.distributed.layouts import Layout
from numflash.distributed.pairs import Band, Call

BANDS = {
    "causal": Band(None, 0),
    "full": Band(),
    "window": Band(5, 0),
    "both ways": Band(3, 2),
    "backwards": Band(4, None),
    "forwards": Band(None, 3),
    "itself": Band(0, 0),
}


def shuffled(lengths: list[int], ranks: int, draw: random.Random) -> Layout:
    """Segments of random lengths on random ranks, in random order; some ranks may be empty."""
    pieces = []
    for document, length in enumerate(lengths):
        first = 0
        while first < length:
            size = draw.randint(1, max(1, min(length - first, length // ranks + 1)))
            pieces.append((document, first, size))
            first += size
    draw.shuffle(pieces)
    held = [[] for _ in range(ranks)]
    for piece in pieces:
        held[draw.randrange(ranks)].append(piece)
    return Layout.of_segments(lengths, held)


def random_layout(ranks: int, draw: random.Random, tokens: int = 40) -> Layout:
    """A layout of any kind, of about so many tokens; documents may be empty."""
    documents = draw.choice([1, 1, 2, 3, 4])
    lengths = [draw.randint(0, 2 * tokens // documents) for _ in range(documents)]
    multiple = draw.choice([1, 1, 1, 4])
    kind = draw.choice(["zigzag", "documents", "contiguous", "stream", "shuffled"])
    if kind == "zigzag":
        return Layout.zigzag(lengths[0], ranks, multiple=multiple)
    if kind == "documents":
        return Layout.zigzag_documents(lengths, ranks, multiple=multiple)
    if kind == "contiguous":
        return Layout.contiguous(lengths[0], ranks, multiple=multiple)
    if kind == "stream":
        return Layout.contiguous(lengths, ranks, multiple=multiple)
    return shuffled(lengths, ranks, draw)


def dense(layout: Layout, band: Band) -> np.ndarray:
    """(tokens, tokens) bool: whether a query, by global row, sees a key."""
    document = np.repeat(np.arange(len(layout.lengths)), layout.lengths)
    position = np.concatenate([np.empty(0, int), *map(np.arange, layout.lengths)])
    return (document[:, None] == document) & in_band(position[None] - position[:, None], band)


def in_band(distance: np.ndarray, band: Band) -> np.ndarray:
    """Whether keys so far behind a query are visible."""
    seen = np.ones(distance.shape, bool)
    if band.left is not None:
        seen &= distance >= -band.left
    if band.right is not None:
        seen &= distance <= band.right
    return seen


def seen_by(call: Call) -> np.ndarray:
    """(queries, keys) bool: what a call computes, of its own rows."""
    rows, keys = np.arange(call.q[1] - call.q[0]), np.arange(call.k[1] - call.k[0])
    return in_band(keys[None] - rows[:, None] - call.shift, call.window)
