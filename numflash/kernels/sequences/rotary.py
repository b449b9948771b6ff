"""Rotary: rows of x rotated by the angles of their positions, and the way back, their gradient.

A thread has chunks of a row (`tiles.rotary`) in several heads of a token. The columns behind
rotary_dim, and rows whose position the tables do not have, are copied as they are. `out` may be x.

The tokens of all batch entries are numbered one after another, so that blocks are full even where
each entry has few. A packed array is one entry; a token finds its sequence by bisection.

Source: RoFormer, arXiv 2104.09864, section 3.4.2.
"""

from numflash.configs import RotaryConfig, Traits
from numflash.kernels.arguments import Tensor
from numflash.kernels.kernel import Kernel
from numflash.kernels.sequences.arguments import AngleTable, Positions, RotarySizes
from numflash.ptx import cuda, f32, i32, mov_ctaid_x
from numflash.tiles.addresses import first_of_rows
from numflash.tiles.division import divide, tiles_of
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.rotary import make_turn_heads, position_of


def make_rotary_kernel(config: RotaryConfig, traits: Traits) -> Kernel:
    """The rotary kernel for one config; see the module's docstring."""
    table_dtype = traits.dtype if config.narrow else "float32"
    storage, table = ELEMENTS[traits.dtype].storage, ELEMENTS[table_dtype].storage
    lanes, tokens, heads = config.lanes(traits), config.tokens(traits), config.num_heads
    turn_heads = make_turn_heads(
        traits.dtype, table_dtype, config.interleaved, traits.vectorized, heads, lanes
    )

    def rotary(
        x: Tensor[storage],  # (batch, seqlen, num_heads, head_dim)
        out: Tensor[storage],  # (batch, seqlen, num_heads, head_dim), or x itself
        cos: AngleTable[table],  # (positions, rotary_dim / 2)
        sin: AngleTable[table],  # (positions, rotary_dim / 2)
        positions: Positions,
        sizes: RotarySizes,
        sign: f32,
    ):
        row, lane = divide(cuda.threadIdx.x, lanes)
        tile, group = divide(mov_ctaid_x(), tiles_of(sizes.num_heads, heads))
        number = i32(tile * tokens + row)
        if row < tokens and number < sizes.num_tokens:
            batch, token = divide(number, sizes.seqlen)
            head = i32(group * heads)
            left = i32(sizes.num_heads - head)
            position = position_of(positions, batch, token)
            rotated = i32(0)
            if position >= 0 and position < sizes.positions:
                rotated = sizes.half
            from_x = first_of_rows(x, batch, head, token)
            to_out = first_of_rows(out, batch, head, token)
            angles = lane, cos, sin, position, sizes.half, rotated, sizes.copied, sign
            turn_heads(x, out, from_x, to_out, left, *angles)

    return Kernel(config.family, rotary, config.num_threads, 0)
