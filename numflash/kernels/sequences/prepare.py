"""Prepare: what comes before attention over a cache, in one launch.

The first block makes the list of tiles (`schedule`). Of the others the first rotate q into a
workspace, the next rotate new keys into their slots of the cache, and the last copy new values
there. A thread has chunks of a row (`tiles.rotary`) in several heads of a token. No block waits
for another: attention, launched later, reads what all have written.

New row i of an entry goes to row lengths[entry] + i, in its page where the cache has pages. A row
behind the last of the cache, or in a page that does not exist, is not written. Its number is the
position that the key is rotated by; where the tables do not have it, the key is copied as it is.

Keys and values go to a cache of e4m3 codes as codes, by the factor of their sequence and head.

Source: `flash_attn_with_kvcache` of flash-attn, whose positions these are.
"""

from numflash.configs import PrepareConfig, Traits
from numflash.kernels.arguments import Pointer, Tensor, kv_of
from numflash.kernels.kernel import Kernel
from numflash.kernels.sequences.arguments import (
    AngleTable,
    AppendSizes,
    BothEnds,
    CacheSlots,
    ListPlan,
)
from numflash.kernels.sequences.schedule import make_list_maker
from numflash.ptx import cuda, device_function, f32, i32, i64, mov_ctaid_x, u32
from numflash.tiles import rotary
from numflash.tiles.addresses import first_of_rows
from numflash.tiles.division import divide, tiles_of
from numflash.tiles.portable.elements import ELEMENTS
from numflash.tiles.quantize.encoded_rows import make_code_stores


@device_function
def _slot_of(slots, entry, row):
    """(page, row within it) of a row of an entry; page -1 where the cache has no such row."""
    page, within = i32(-1), i32(0)
    if row >= 0 and row < slots.rows:
        page, within = i32(entry), i32(row)
        if slots.has_table != 0:
            column, within = divide(i32(row), slots.size)
            page = i32(slots.table[entry * slots.pitch + column])
        if page >= slots.count:
            page = i32(-1)
    return page, within


def make_prepare_kernel(config: PrepareConfig, traits: Traits) -> Kernel:
    """The kernel for one config; see the module's docstring."""
    table_dtype = traits.dtype if config.narrow else "float32"
    storage, table = ELEMENTS[traits.dtype].storage, ELEMENTS[table_dtype].storage
    lanes, tokens, heads = config.lanes(traits), config.tokens(traits), config.num_heads
    of_rows = traits.dtype, table_dtype, config.interleaved, traits.vectorized, heads, lanes
    turn_heads, coded, kv = rotary.make_turn_heads(*of_rows), traits.codes, kv_of(traits, storage)
    encode_heads = rotary.make_turn_heads(*of_rows, make_code_stores) if coded else None
    make_list = make_list_maker(config.num_warps, config.splits)

    @device_function
    def append(block, q, rotated_q, k_new, v_new, k, v, cos, sin, slots, sizes):
        row, lane = divide(cuda.threadIdx.x, lanes)
        is_new, x, out, cached = False, q, rotated_q, k
        num_tokens, seqlen, num_heads = sizes.tokens_q, sizes.seqlen_q, sizes.num_heads_q
        copied, half, step = sizes.head_dim, sizes.half, sizes.step
        if block >= sizes.blocks_q:
            block, is_new, x = i32(block - sizes.blocks_q), True, k_new
            if not coded:
                out = k
            num_tokens, seqlen = sizes.tokens_new, sizes.seqlen_new
            num_heads, step = sizes.num_heads_kv, i32(1)
            if block >= sizes.blocks_new:
                block, x, cached = i32(block - sizes.blocks_new), v_new, v
                if not coded:
                    out = v
                copied, half = sizes.head_dim_v, i32(0)
        tile, group = divide(block, tiles_of(num_heads, heads))
        number = i32(tile * tokens + row)
        if row < tokens and number < num_tokens:
            entry, token = divide(number, seqlen)
            head = i32(group * heads)
            position = i64(slots.lengths[entry]) + token * step
            page, to_row = entry, token
            if is_new:
                page, to_row = _slot_of(slots, entry, position)
            rotated = i32(0)
            if position >= 0 and position < sizes.positions:
                rotated = half
            from_x, left = first_of_rows(x, entry, head, token), i32(num_heads - head)
            angles = lane, cos, sin, position, sizes.half, rotated, copied, f32(1)
            if coded and is_new and page >= 0:
                to_out = first_of_rows(cached, page, head, to_row), entry, head
                encode_heads(x, cached, from_x, to_out, left, *angles)
            elif page >= 0:
                turn_heads(x, out, from_x, first_of_rows(out, page, head, to_row), left, *angles)

    def prepare(
        lengths: BothEnds,
        lists: Pointer(i32),  # (words,): the list, from its plan's `begin` on
        first: ListPlan,
        q: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        rotated_q: Tensor[storage],  # (batch, seqlen_q, num_heads_q, head_dim)
        k_new: Tensor[storage],  # (batch, seqlen_new, num_heads_kv, head_dim)
        v_new: Tensor[storage],  # (batch, seqlen_new, num_heads_kv, head_dim_v)
        k: kv,  # (pages, page_size, num_heads_kv, head_dim)
        v: kv,  # (pages, page_size, num_heads_kv, head_dim_v)
        cos: AngleTable[table],  # (positions, rotary_dim / 2)
        sin: AngleTable[table],  # (positions, rotary_dim / 2)
        slots: CacheSlots,
        sizes: AppendSizes,
    ):
        smem, block = cuda.shared.array(0, u32), i32(mov_ctaid_x())
        if block == 0:
            make_list(smem, lengths, lists, first)
        else:
            append(i32(block - 1), q, rotated_q, k_new, v_new, k, v, cos, sin, slots, sizes)

    return Kernel(config.family, prepare, config.num_threads, config.smem_bytes(traits))
