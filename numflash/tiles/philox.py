"""Philox4x32-10 on the device; `runtime.philox` says which bits decide over which score."""

from numflash.ptx import device_function, i32, u32, u64

ROWS, COLUMNS = 8, 4
"""The counters of 16 rows, and of 16 columns."""
_ROUNDS = 10
_M0, _M1 = u64(0xD2511F53), u64(0xCD9E8D57)
_W0, _W1 = u64(0x9E3779B9), u64(0xBB67AE85)
_32 = u64(32)


@device_function
def _ended(c0, c1, c2, c3, k0, k1):
    return c0, c1, c2, c3


def _one_round_before(rest):
    @device_function
    def rounds(c0, c1, c2, c3, k0, k1):
        # Products of 32 bits have 64: one instruction for both halves.
        a, b = u64(c0) * _M0, u64(c2) * _M1
        high_a, high_b = u32(a >> _32), u32(b >> _32)
        # In 64 bits, as the simulator's numbers of 32 warn of overflows.
        next_0, next_1 = u32(u64(k0) + _W0), u32(u64(k1) + _W1)
        return rest(high_b ^ c1 ^ k0, u32(b), high_a ^ c3 ^ k1, u32(a), next_0, next_1)

    return rounds


philox = _ended
"""philox(c0, c1, c2, c3, k0, k1): the four words for a counter and a key, all u32."""
for _ in range(_ROUNDS):
    philox = _one_round_before(philox)


@device_function
def counters_of(row, column, args):
    """The counters of a row and a column of a problem; `args` has the caller's first ones."""
    i, j = row + args.first_row, column + args.first_column
    return i32((i >> 4 << 3) + (i & 7)), i32((j >> 4 << 2) + ((j & 7) >> 1))
