"""Merge onto: O and lse of the keys so far, and a part over other keys, made one, in place.

    lse' = log(exp(lse) + exp(lse_part)),   O' = exp(lse - lse') O + exp(lse_part - lse') O_part

`lanes` neighbouring threads share a row. Where the part weighs nothing the row stays as it is, and
neither O nor O_part is read; where all so far weighs nothing O is not read.
"""

import math

from numflash.configs import MergeOntoConfig, Traits
from numflash.kernels.arguments import Shape, Tensor
from numflash.kernels.kernel import Kernel
from numflash.ptx import (
    cuda,
    f32,
    fma_rn_f32,
    i32,
    ld_global_v4_f32,
    max_f32,
    mov_ctaid_x,
    st_global_v4_f32,
)
from numflash.tiles.addresses import first_of_rows
from numflash.tiles.blocks import place_in_heads
from numflash.tiles.division import tiles_of
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.portable.softmax import exp_f32
from numflash.tiles.rows import LOWEST
from numflash.tiles.scores import NEG_INF


def make_merge_onto_kernel(config: MergeOntoConfig, traits: Traits) -> Kernel:
    """The kernel for one config; `traits.dtype` is that of the part."""
    element, vectorized = ELEMENTS[traits.dtype], traits.vectorized
    storage, to_f32, load_vector = element.storage, element.to_f32, element.load_vector
    vector = element.vector if vectorized else 1
    lanes, block_rows = config.lanes(traits), config.rows(traits)

    def merge_onto(
        out: Tensor[f32],  # (batch, seqlen_q, num_heads_q, head_dim_v)
        lse: Tensor[f32],  # (batch, seqlen_q, num_heads_q)
        part: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim_v)
        part_lse: Tensor[f32],  # (batch, seqlen_q, num_heads_q)
        shape: Shape,
    ):
        old_values = cuda.local.array(vector, f32)
        values = cuda.local.array(vector, f32)
        lane = i32(cuda.threadIdx.x % lanes)
        tiles = tiles_of(shape.seqlen_q, block_rows)
        tile, head, batch = place_in_heads(mov_ctaid_x(), tiles, shape.num_heads_q)
        row = i32(tile * block_rows + cuda.threadIdx.x // lanes)
        old_lse, new_lse = NEG_INF, NEG_INF
        if row < shape.seqlen_q:
            old_lse = lse.data[first_of_rows(lse, batch, head, row)]
            new_lse = part_lse.data[first_of_rows(part_lse, batch, head, row)]
        # Hazard: other lanes of the row would see the new lse.
        cuda.syncwarp()
        # Finite: of a row that sees no key both are -inf, and -inf - -inf would be NaN.
        top = max_f32(max_f32(old_lse, new_lse), LOWEST)
        old_weight, weight = exp_f32(old_lse - top), exp_f32(new_lse - top)
        total = f32(old_weight + weight)
        factor = f32(1) / total if total != f32(0) else f32(0)
        old_weight, weight = f32(old_weight * factor), f32(weight * factor)
        if row < shape.seqlen_q and (weight != f32(0) or old_weight == f32(0)):
            out_row = first_of_rows(out, batch, head, row)
            part_row = first_of_rows(part, batch, head, row)
            for column in range(lane * vector, shape.head_dim_v, lanes * vector):
                # Both loads before the sums, so that they wait for memory together.
                for i in range(vector):
                    values[i] = f32(0)
                    old_values[i] = f32(0)
                if weight != f32(0):
                    if vectorized:
                        load_vector(values, part.data, part_row + column)
                    else:
                        values[0] = to_f32(part.data[part_row + column])
                if old_weight != f32(0):
                    if vectorized:
                        for i in range(0, vector, 4):
                            four = old_values[i : i + 4]
                            ld_global_v4_f32(four, out.data, out_row + column + i)
                    else:
                        old_values[0] = out.data[out_row + column]
                for i in range(vector):
                    values[i] = fma_rn_f32(old_weight, old_values[i], weight * values[i])
                if vectorized:
                    for i in range(0, vector, 4):
                        st_global_v4_f32(out.data, out_row + column + i, values[i : i + 4])
                else:
                    out.data[out_row + column] = values[0]
            if lane == 0 and weight != f32(0):
                at = first_of_rows(lse, batch, head, row)
                lse.data[at] = top + f32(math.log(total))

    return Kernel(config.family, merge_onto, config.num_threads, 0)
