"""Online softmax of a warpgroup in base 2, apart from the rescaling of O.

While the tensor cores still add to O, it cannot be rescaled: `make_online_softmax` turns S to P
and says by how much O must be; `tiles.mma.softmax` tells the rest.
"""

from functools import cache

from numflash.ptx import cuda, device_function, ex2_approx_ftz_f32, f32, max_f32
from numflash.tiles.lanes import FULL_WARP
from numflash.tiles.mma.softmax import LAG, row_max_of_quad
from numflash.tiles.scores import NEG_INF


@cache
def make_online_softmax(n_tiles):
    """online_softmax(s_acc, row_max, row_sum, factors, scale_log2): S -> P in place.

    True if O must be multiplied by `factors`, a row each, before anything is added to it. row_sum
    stays this lane's share until the end; scale_log2 is positive.
    """

    @device_function
    def online_softmax(s_acc, row_max, row_sum, factors, scale_log2):
        # Two chains of maxima a row: half the latency.
        above, above_too = max_f32(row_max[0], s_acc[0]), s_acc[1]
        below, below_too = max_f32(row_max[1], s_acc[2]), s_acc[3]
        for tile in range(1, n_tiles):
            above = max_f32(above, s_acc[4 * tile])
            above_too = max_f32(above_too, s_acc[4 * tile + 1])
            below = max_f32(below, s_acc[4 * tile + 2])
            below_too = max_f32(below_too, s_acc[4 * tile + 3])
        above = row_max_of_quad(max_f32(above, above_too))
        below = row_max_of_quad(max_f32(below, below_too))
        has_grown = (above - row_max[0]) * scale_log2 > LAG
        has_grown |= (below - row_max[1]) * scale_log2 > LAG
        has_grown = cuda.any_sync(FULL_WARP, has_grown)
        if has_grown:
            # Where a row has seen no key its maximum is -inf, and -inf - -inf would be NaN.
            shift = above if above > NEG_INF else f32(0)
            factors[0] = ex2_approx_ftz_f32((row_max[0] - shift) * scale_log2)
            shift = below if below > NEG_INF else f32(0)
            factors[1] = ex2_approx_ftz_f32((row_max[1] - shift) * scale_log2)
            row_max[0], row_max[1] = above, below
            row_sum[0] *= factors[0]
            row_sum[1] *= factors[1]
        above = (row_max[0] if row_max[0] > NEG_INF else f32(0)) * scale_log2
        below = (row_max[1] if row_max[1] > NEG_INF else f32(0)) * scale_log2
        for tile in range(n_tiles):
            p0 = ex2_approx_ftz_f32(s_acc[4 * tile] * scale_log2 - above)
            p1 = ex2_approx_ftz_f32(s_acc[4 * tile + 1] * scale_log2 - above)
            p2 = ex2_approx_ftz_f32(s_acc[4 * tile + 2] * scale_log2 - below)
            p3 = ex2_approx_ftz_f32(s_acc[4 * tile + 3] * scale_log2 - below)
            row_sum[0] += p0 + p1
            row_sum[1] += p2 + p3
            i = 4 * tile
            s_acc[i], s_acc[i + 1], s_acc[i + 2], s_acc[i + 3] = p0, p1, p2, p3
        return has_grown

    return online_softmax
