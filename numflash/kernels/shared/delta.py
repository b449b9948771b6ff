"""Delta: softmax_scale rowsum(O * dO), what all keys of a row share of dS; and lse in base 2.

The gradient of the scores before they are scaled is dS = P * (softmax_scale dP - delta). One warp
computes one row. lse_log2 = lse log2 e is what kernels in base 2 subtract; +inf for a query
without keys, which makes its P zero. Only -inf means that: a NaN stays one.

The derivative of lse by a score is P, too: a gradient of lse, dlse, is taken off rowsum(O * dO),
here and in row_gradients. Of a query without keys lse is a constant. Callers who have
rowsum(O * dO) already give it, and neither O nor dO is read.

Kernels that want dS by the scaled scores, also where softmax_scale is 0, get delta unscaled too.

Where a feature ends rows, row_gradients is what each row adds to the gradient of its argument;
`array_sums` adds that up.

Where weights are dropped, those that are kept have a common factor. Kernels take it from here:
with P times the factor, which is another lse, and delta over it, dS is the same.

Source: FlashAttention, arXiv 2205.14135, Appendix B.4.
"""

import math

from numflash.configs import DeltaConfig, Traits
from numflash.configs.features import Features
from numflash.kernels.arguments import Pointer, Shape, Tensor, of_rows
from numflash.kernels.kernel import Kernel
from numflash.ptx import cuda, f32, fma_rn_f32, i32, mov_ctaid_x
from numflash.tiles.addresses import first_of_rows, first_of_statistics
from numflash.tiles.blocks import place_in_heads
from numflash.tiles.division import tiles_of
from numflash.tiles.features import make_gradient_of_end
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.portable.lanes import FULL_WARP
from numflash.tiles.portable.softmax import LOG2_E
from numflash.tiles.scores import NEG_INF


def make_delta_kernel(config: DeltaConfig, traits: Traits) -> Kernel:
    """The delta kernel for one config; see the module's docstring."""
    element, num_warps = ELEMENTS[traits.dtype], config.num_warps
    storage, to_f32, load_vector = element.storage, element.to_f32, element.load_vector
    result = ELEMENTS[traits.out_dtype]
    out_storage, out_to_f32, load_out = result.storage, result.to_f32, result.load_vector
    # O in float32 takes two loads where dO takes one. Without a loop 5 instructions fewer.
    out_vector, in_one_load = result.vector, result.vector >= element.vector
    gradient_of_end = make_gradient_of_end(traits.features)
    ends_rows = gradient_of_end is not None
    drops = traits.drops_weights
    vector = element.vector if traits.vectorized else 1
    vectorized, step = traits.vectorized, 32 * vector
    columns = 0 if traits.given_delta else traits.head_dim_v
    given = of_rows(traits)
    has_dlse = traits.dlse
    has_delta = traits.given_delta
    keeps_plain = traits.plain_delta

    def delta(
        out: Tensor[out_storage],  # (batch, seqlen_q, num_heads_q, head_dim_v)
        do: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim_v)
        lse: Pointer(f32),  # (batch, num_heads_q, seqlen_q)
        delta: Pointer(f32),  # (batch, num_heads_q, seqlen_q)
        lse_log2: Pointer(f32),  # (batch, num_heads_q, seqlen_q)
        shape: Shape,
        softmax_scale: f32,
        features: Features,
        row_gradients: Pointer(f32),  # (batch, num_heads_q, seqlen_q)
        of_rows: given,
    ):
        out_values = cuda.local.array(vector, f32)
        do_values = cuda.local.array(vector, f32)
        lane = cuda.threadIdx.x % 32
        num_tiles = tiles_of(shape.seqlen_q, num_warps)
        tile, head, batch = place_in_heads(mov_ctaid_x(), num_tiles, shape.num_heads_q)
        row = i32(tile * num_warps + cuda.threadIdx.x // 32)
        out_base = first_of_rows(out, batch, head, row)
        do_base = first_of_rows(do, batch, head, row)

        total = f32(0)
        for column in range(lane * vector, columns, step):
            if row < shape.seqlen_q and column < shape.head_dim_v:
                if vectorized:
                    if in_one_load:
                        load_out(out_values, out.data, out_base + column)
                    else:
                        for i in range(0, vector, out_vector):
                            part = out_values[i : i + out_vector]
                            load_out(part, out.data, out_base + column + i)
                    load_vector(do_values, do.data, do_base + column)
                else:
                    out_values[0] = out_to_f32(out.data[out_base + column])
                    do_values[0] = to_f32(do.data[do_base + column])
                for i in range(vector):
                    total = fma_rn_f32(out_values[i], do_values[i], total)
        for distance in (16, 8, 4, 2, 1):
            total += cuda.shfl_xor_sync(FULL_WARP, total, distance)
        if lane == 0 and row < shape.seqlen_q:
            i = first_of_statistics(batch, head, shape) + row
            if has_delta:
                at = first_of_rows(of_rows.delta, batch, head, row)
                total = of_rows.delta.data[at]
            if has_dlse:
                at = first_of_rows(of_rows.dlse, batch, head, row)
                total = total - of_rows.dlse.data[at] if lse[i] != NEG_INF else f32(0)
            per_weight = total
            if drops:
                per_weight /= features.dropout.scale
            if keeps_plain:
                of_rows.plain[i] = per_weight
            delta[i] = per_weight * softmax_scale
            if ends_rows:
                row_gradients[i] = gradient_of_end(lse[i], total, features, batch, head)
            lse_log2[i] = lse[i] * LOG2_E if lse[i] != NEG_INF else f32(math.inf)
            if drops:
                lse_log2[i] -= features.dropout.log2_scale

    return Kernel(config.family, delta, config.num_threads, 0)
