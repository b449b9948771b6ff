"""Philox4x32-10, and which of its bits decide over which score of attention.

128 random bits serve eight scores, 16 bits each. The eight are those of a thread in two
neighbouring 16 x 8 products of tensor cores: rows r and r + 8, columns c, c + 1, c + 8 and c + 9,
with r % 16 < 8 and c % 16 in (0, 2, 4, 6). Of the score in row i and column j:

    counter     i // 16 * 8 + i % 8,   j // 16 * 4 + j % 8 // 2,   head,   batch
    halfword    i // 8 % 2  +  2 (j % 2)  +  4 (j // 8 % 2)     of the result's eight
    key         the seed's low and high 32 bits

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11.
"""

import numpy as np

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
"""What the two words of a key grow by from round to round."""
ALIGNMENT = 16
"""Rows and columns whose scores are decided together begin at multiples of this."""
_LOW = np.uint64(0xFFFFFFFF)


def philox(c0, c1, c2, c3, key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """The four words of 32 bits for each counter, as uint64; counters broadcast."""
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in (c0, c1, c2, c3))
    for i in range(ROUNDS):
        k0, k1 = (np.uint64(k + i * w & 0xFFFFFFFF) for k, w in zip(key, WEYL, strict=True))
        a, b = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        high_a, high_b = a >> np.uint64(32), b >> np.uint64(32)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, b & _LOW, high_a ^ c3 ^ k1, a & _LOW
    return np.broadcast_arrays(c0, c1, c2, c3)


def key_of(seed: int) -> tuple[int, int]:
    """The two words of a key; of a negative seed those of its two's complement."""
    return seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF


def random_bits(
    shape: tuple[int, int, int, int], seed: int, origin: tuple[int, int, int] = (0, 0, 0)
) -> np.ndarray:
    """The 16 bits, as uint16, of each score of (batch, heads, seqlen_q, seqlen_k).

    `origin` has the numbers of the first row, column and head.
    """
    batch, heads, rows, columns = shape
    first_row, first_column, first_head = origin
    i, j = first_row + np.arange(rows), first_column + np.arange(columns)
    row, column = i // 16 * 8 + i % 8, j // 16 * 4 + j % 8 // 2
    # The counters that occur, each computed once.
    row_counters, row = np.unique(row, return_inverse=True)
    column_counters, column = np.unique(column, return_inverse=True)
    words = philox(
        row_counters[:, None],
        column_counters,
        first_head + np.arange(heads)[:, None, None],
        np.arange(batch)[:, None, None, None],
        key_of(seed),
    )
    words = np.stack(words, -1).astype(np.uint32).view(np.uint16)
    if words.dtype.newbyteorder("<") != words.dtype:
        words = words[..., [1, 0, 3, 2, 5, 4, 7, 6]]
    halfword = (i // 8 % 2)[:, None] + 2 * (j % 2) + 4 * (j // 8 % 2)
    return words[:, :, row[:, None], column, halfword]
