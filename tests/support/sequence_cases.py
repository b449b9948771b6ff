"""Sequences of uneven lengths: what a caller gives, and lists made of it."""

from typing import NamedTuple

import numpy as np

from numflash.calls.sequences import ScheduleKernel
from numflash.problem.sequences import NO_LIMIT, Lengths, ListShape, lengths_of
from numflash.reference.sequences import extents_of, lists_of
from numflash.runtime.arrays import library_of


class Given(NamedTuple):
    """A call's sequences: arrays by name, rows of q and k, and entries if it is padded.

    And of keys in a cache how many are added to each length, and whether it counts from row 0.
    """

    arrays: dict[str, np.ndarray]
    bounds: tuple[int, int]
    batch: int | None = None
    added_k: int = 0
    with_start_k: bool = False

    @property
    def lengths(self) -> Lengths:
        """Checked."""
        views = {name: library_of(x, name).view(x, name) for name, x in self.arrays.items()}
        lengths = lengths_of(views, self.bounds, -1, batch=self.batch)
        return lengths._replace(added_k=self.added_k, with_start_k=self.with_start_k)

    def extents(self):
        """Of q and of k, by the reference."""
        of_keys = {"added": self.added_k, "with_start": self.with_start_k}
        found = []
        for side, bound, more in zip("qk", self.bounds, ({}, of_keys), strict=True):
            kinds = "cu_seqlens", "seqlens", "starts"
            arrays = (self.arrays.get(f"{kind}_{side}") for kind in kinds)
            found.append(extents_of(bound, self.lengths.entries, *arrays, **more))
        return found


def ints(*numbers) -> np.ndarray:
    return np.array(numbers, np.int32)


def cumulative(lengths) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def packed(lengths_q, lengths_k, **more) -> Given:
    """Sequences of these lengths, one after the other."""
    arrays = {"cu_seqlens_q": cumulative(lengths_q), "cu_seqlens_k": cumulative(lengths_k)}
    return Given(arrays | more, (int(np.sum(lengths_q)), int(np.sum(lengths_k))))


def lists_made(given: Given, shapes, config=None):
    """([each list], by the kernel; by the reference): with splits three, in turn two."""
    kernel = ScheduleKernel(given.lengths, shapes, -1, config)
    library = library_of(next(iter(given.arrays.values())), "q")
    operands = {name: library.operand(x) for name, x in given.arrays.items()}
    kernel.bind(operands, library)(0)
    made, wanted = [], []
    for shape, room in zip(shapes, kernel.rooms, strict=True):
        found = lists_of(*given.extents(), shape, room)
        for name in shape.operands:
            names = shape.name, shape.slots, shape.split_tiles, shape.tiles_before
            kinds = {kind: place for place, kind in enumerate(names)}
            wanted.append(found[kinds[name]])
            made.append(operands[name].array[: len(wanted[-1])])
    return made, wanted


CAUSAL = {"hi": 0, "aligned": 1}
RNG = np.random.default_rng(3)
UNEVEN_Q, UNEVEN_K = RNG.integers(0, 90, (2, 13))

CASES = {
    "one sequence": (packed([70], [100]), ListShape(16, 16)),
    "causal": (packed(UNEVEN_Q, UNEVEN_K), ListShape(16, 32, **CAUSAL)),
    "top left": (packed(UNEVEN_Q, UNEVEN_K), ListShape(32, 16, hi=0)),
    "window": (packed(UNEVEN_Q, UNEVEN_K), ListShape(16, 16, lo=-20, hi=7, aligned=1)),
    "packed heads": (packed(UNEVEN_Q, UNEVEN_K), ListShape(16, 16, pack=6, **CAUSAL)),
    "of keys": (packed(UNEVEN_Q, UNEVEN_K), ListShape(32, 16, by_keys=True, **CAUSAL)),
    "of keys, window": (
        packed(UNEVEN_Q, UNEVEN_K),
        ListShape(16, 16, by_keys=True, lo=-9, hi=11, aligned=1),
    ),
    "of keys, in turn": (
        packed(UNEVEN_Q, UNEVEN_K),
        ListShape(32, 16, by_keys=True, in_turn=True, **CAUSAL),
    ),
    "in turn, more tiles than bins": (
        packed([40, 3, 1], [9, 1030, 1025]),
        ListShape(1, 16, by_keys=True, in_turn=True),
    ),
    "in turn, starts and empty ones": (
        packed([0, 50, 0, 31], [5, 0, 0, 9], starts_q=ints(0, 31, 4, 0)),
        ListShape(16, 16, in_turn=True),
    ),
    "a query longer than its keys": (packed([200, 3], [5, 90]), ListShape(16, 16, **CAUSAL)),
    "empty sequences": (packed([0, 0, 5, 0, 40, 0], [3, 0, 0, 0, 17, 0]), ListShape(16, 16)),
    "nothing": (packed([0, 0], [0, 9]), ListShape(16, 16)),
    "no sequence": (packed([], []), ListShape(16, 16)),
    "one long among short": (packed([700, *[3] * 40], [700, *[5] * 40]), ListShape(16, 16)),
    "more sequences than threads": (
        packed(np.arange(150) % 5, np.arange(150) % 7),
        ListShape(16, 16),
    ),
    "more work than bins": (
        packed([40, 5, 3, 16], [1040 * 16, 1100 * 16, 1022 * 16, 1023 * 16]),
        ListShape(16, 16),
    ),
    "starts and lengths": (
        Given(
            {
                "seqlens_q": ints(20, 0, 33),
                "starts_q": ints(100, 0, 7),
                "cu_seqlens_k": ints(0, 40, 50, 90),
                "seqlens_k": ints(30, 10, 0),
            },
            (130, 90),
        ),
        ListShape(16, 16, **CAUSAL),
    ),
    "parts of sequences": (
        packed([40, 50], [60, 70], starts_q=ints(10, 45), seqlens_q=ints(30, 20)),
        ListShape(16, 16, **CAUSAL),
    ),
    "padded": (
        Given({"seqlens_q": ints(20, 0, 64), "seqlens_k": ints(1, 80, 33)}, (64, 80), 3),
        ListShape(16, 16, **CAUSAL),
    ),
    "padded keys": (
        Given({"seqlens_k": ints(3, 0, 50), "starts_k": ints(0, 4, 2)}, (20, 64), 3),
        ListShape(16, 16, pack=4, **CAUSAL),
    ),
    "padded, starts only": (
        Given({"starts_k": ints(5, 64, 0), "starts_q": ints(1, 2, 3)}, (20, 64), 3),
        ListShape(16, 16),
    ),
    "a cache and new keys": (
        Given({"seqlens_k": ints(3, 0, 60, 64)}, (5, 69), 4, added_k=5),
        ListShape(16, 16, pack=4, **CAUSAL),
    ),
    "a cache padded on the left": (
        Given({"seqlens_k": ints(30, 64, 7), "starts_k": ints(0, 9, 7)}, (1, 65), 3, 1, True),
        ListShape(16, 16, **CAUSAL),
    ),
    "far ends": (
        Given({"seqlens_k": ints(2**28 - 1, 5)}, (2, 2**28 - 1), 2),
        ListShape(16, 2**14, lo=-NO_LIMIT, aligned=1),
    ),
}
"""Name -> (what is given, the shape of a list)."""

BAD_LENGTHS = {
    "falling": Given(
        {"cu_seqlens_q": ints(0, 50, 20, 70), "cu_seqlens_k": ints(0, 9, 9, 9)}, (70, 9)
    ),
    "below zero": Given(
        {"cu_seqlens_q": ints(-7, 10, 20), "cu_seqlens_k": ints(0, 10, 20)}, (20, 20)
    ),
    "beyond the end": Given(
        {"cu_seqlens_q": ints(0, 10, 2**31 - 1), "cu_seqlens_k": ints(0, 10, 20)}, (20, 20)
    ),
    "from end to end of int32": Given(
        {
            "cu_seqlens_q": ints(-(2**31), 2**31 - 1, -(2**31)),
            "cu_seqlens_k": ints(2**31 - 1, -(2**31), 5),
        },
        (20, 20),
    ),
    "longer than the batch's rows": Given({"seqlens_k": ints(5, 65)}, (20, 64), 2),
    "a cache without room for new keys": Given({"seqlens_k": ints(5, 62)}, (3, 64), 2, 3),
    "a cache padded beyond its keys": Given(
        {"seqlens_k": ints(5, 62), "starts_k": ints(6, 0)}, (3, 64), 2, 0, True
    ),
    "a length below zero": Given({"seqlens_q": ints(5, -1)}, (20, 64), 2),
    "start beyond the rows": Given({"starts_k": ints(65, 0)}, (20, 64), 2),
    "the same queries in all sequences": Given(
        {
            "starts_q": ints(*[0] * 20),
            "seqlens_q": ints(*[90] * 20),
            "cu_seqlens_k": ints(*range(0, 105, 5)),
        },
        (90, 100),
    ),
    "the same keys in every second sequence": Given(
        {"cu_seqlens_q": ints(*range(129)), "cu_seqlens_k": ints(0, *[70, 0] * 64)}, (128, 70)
    ),
    "the same keys in some sequences": Given(
        {
            "cu_seqlens_q": ints(*range(129)),
            "cu_seqlens_k": ints(0, *[*[70, 0] * 20, *[0] * 24] * 2),
        },
        (128, 70),
    ),
    "overlapping: more tiles than there is room for": Given(
        {
            "cu_seqlens_q": ints(0, *[90, 0] * 20),
            "cu_seqlens_k": ints(0, *[90, 0] * 20),
        },
        (90, 90),
    ),
}
"""Name -> what is given: numbers that leave the arrays."""

LONG_Q, LONG_K = [3, 1, 40, 70, 0, 9], [500, 3, 900, 64, 700, 0]
SPLITS = {
    "constant": (packed(LONG_Q, LONG_K), ListShape(16, 16, least=4, **CAUSAL)),
    "by work": (packed(LONG_Q, LONG_K), ListShape(16, 16, least=4, shares=9, **CAUSAL)),
    "by work, without a mask": (packed(LONG_Q, LONG_K), ListShape(32, 16, least=4, shares=20)),
    "window": (packed(LONG_Q, LONG_K), ListShape(16, 16, lo=-70, least=4, **CAUSAL)),
    "window, by work": (
        packed(LONG_Q, LONG_K),
        ListShape(16, 16, lo=-200, least=4, shares=5, **CAUSAL),
    ),
    "a prefix that all share": (
        packed([20, 1, 9], [300, 10, 20], starts_k=ints(0, 0, 0), seqlens_k=ints(300, 320, 330)),
        ListShape(16, 16, least=2, **CAUSAL),
    ),
    "ends of sequences that overlap": (
        packed([20] * 9, [30] * 9, seqlens_k=ints(*range(270, 0, -30))),
        ListShape(16, 16, least=1, **CAUSAL),
    ),
    "nothing is split": (packed(LONG_Q, LONG_K), ListShape(16, 16, least=90)),
    "every tile": (packed([1] * 70, [40] * 70), ListShape(16, 16, pack=4, least=1)),
    "nothing": (packed([0, 0], [0, 9]), ListShape(16, 16, least=4, shares=7)),
    "no sequence": (packed([], []), ListShape(16, 16, least=4)),
    "decoding": (
        Given({"seqlens_k": ints(1000, 3, 0, 4000)}, (1, 4096), 4),
        ListShape(16, 64, pack=8, least=4, shares=10, **CAUSAL),
    ),
    "the most splits": (
        Given({"seqlens_k": ints(2**23, 5)}, (1, 2**23), 2),
        ListShape(16, 256, least=16),
    ),
    "more work than can be numbered": (
        Given({"seqlens_k": ints(2**27, 5)}, (1, 2**27), 2),
        ListShape(16, 2**13, least=4, shares=2**20),
    ),
    "work beyond 32 bits": (
        Given({"seqlens_k": ints(*[2**28 - 1] * 540)}, (1, 2**28 - 1), 540),
        ListShape(16, 16, least=4, shares=300),
    ),
}
"""Name -> (what is given, the shape of a list of tiles that are split)."""
