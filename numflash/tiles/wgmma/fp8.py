"""Softmax whose P is 8 bits wide, and O's share of a tile, of a warpgroup; see `tiles.fp8`.

P of a tile is in units of its own largest score of the row. What a tile adds to O is summed up by
itself and gets its weight, by which it comes to the units of O, when it is added.
"""

from functools import cache

from numflash.ptx import cuda, device_function, ex2_approx_ftz_f32, f32, max_f32
from numflash.tiles.fp8.conversions import make_encode
from numflash.tiles.fp8.softmax import P_SCALE_LOG2
from numflash.tiles.lanes import FULL_WARP
from numflash.tiles.mma.softmax import LAG, row_max_of_quad
from numflash.tiles.scores import NEG_INF


@cache
def make_tile_softmax(n_tiles):
    """tile_softmax(s_acc, row_max, row_sum, factors, scales, weights): S -> P in place.

    `scales`, positive, bring each row of S to base 2. `weights` are set: factors of this tile's
    part of O. True if O must be multiplied by `factors` before that is added. row_sum stays this
    lane's share until the end.
    """

    @device_function
    def tile_softmax(s_acc, row_max, row_sum, factors, scales, weights):
        above, above_too, below, below_too = s_acc[0], s_acc[1], s_acc[2], s_acc[3]
        for tile in range(1, n_tiles):
            above = max_f32(above, s_acc[4 * tile])
            above_too = max_f32(above_too, s_acc[4 * tile + 1])
            below = max_f32(below, s_acc[4 * tile + 2])
            below_too = max_f32(below_too, s_acc[4 * tile + 3])
        above = row_max_of_quad(max_f32(above, above_too)) * scales[0]
        below = row_max_of_quad(max_f32(below, below_too)) * scales[1]
        has_grown = (above - row_max[0] > LAG) | (below - row_max[1] > LAG)
        has_grown = cuda.any_sync(FULL_WARP, has_grown)
        if has_grown:
            # Where a row has seen no key its maximum is -inf, and -inf - -inf would be NaN.
            new_max = max_f32(row_max[0], above)
            factors[0] = ex2_approx_ftz_f32(
                row_max[0] - (new_max if new_max > NEG_INF else f32(0))
            )
            row_max[0] = new_max
            new_max = max_f32(row_max[1], below)
            factors[1] = ex2_approx_ftz_f32(
                row_max[1] - (new_max if new_max > NEG_INF else f32(0))
            )
            row_max[1] = new_max
            row_sum[0] *= factors[0]
            row_sum[1] *= factors[1]
        unit = row_max[0] if row_max[0] > NEG_INF else f32(0)
        weights[0] = ex2_approx_ftz_f32(above - unit - P_SCALE_LOG2)
        unit = row_max[1] if row_max[1] > NEG_INF else f32(0)
        weights[1] = ex2_approx_ftz_f32(below - unit - P_SCALE_LOG2)
        above = (above if above > NEG_INF else f32(0)) - P_SCALE_LOG2
        below = (below if below > NEG_INF else f32(0)) - P_SCALE_LOG2
        sum_above, sum_below = f32(0), f32(0)
        for tile in range(n_tiles):
            i = 4 * tile
            p0 = ex2_approx_ftz_f32(s_acc[i] * scales[0] - above)
            p1 = ex2_approx_ftz_f32(s_acc[i + 1] * scales[0] - above)
            p2 = ex2_approx_ftz_f32(s_acc[i + 2] * scales[1] - below)
            p3 = ex2_approx_ftz_f32(s_acc[i + 3] * scales[1] - below)
            sum_above += p0 + p1
            sum_below += p2 + p3
            s_acc[i], s_acc[i + 1], s_acc[i + 2], s_acc[i + 3] = p0, p1, p2, p3
        row_sum[0] += sum_above * weights[0]
        row_sum[1] += sum_below * weights[1]
        return has_grown

    return tile_softmax


@cache
def make_pack(n_tiles):
    """pack(p_frag, s_acc): probabilities as an operand A of e4m3.

    Of each 16 keys a thread has two in either of two products: the order of V's tokens.
    """
    encode_four = make_encode("e4m3", "sm89")

    @device_function
    def pack(p_frag, s_acc):
        for half in range(n_tiles // 2):
            i = 8 * half
            p_frag[2 * half] = encode_four(s_acc[i], s_acc[i + 1], s_acc[i + 4], s_acc[i + 5])
            p_frag[2 * half + 1] = encode_four(
                s_acc[i + 2], s_acc[i + 3], s_acc[i + 6], s_acc[i + 7]
            )

    return pack


@cache
def make_add_part(n_tiles):
    """add_part(acc, first, part, weights): acc[first:] += weights * part, row by row."""

    @device_function
    def add_part(acc, first, part, weights):
        for tile in range(n_tiles):
            i = 4 * tile
            acc[first + i] += part[i] * weights[0]
            acc[first + i + 1] += part[i + 1] * weights[0]
            acc[first + i + 2] += part[i + 2] * weights[1]
            acc[first + i + 3] += part[i + 3] * weights[1]

    return add_part
