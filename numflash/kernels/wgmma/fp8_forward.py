"""Forward on 8-bit floats on Hopper: O = softmax(softmax_scale Q K^T) V of e4m3 codes.

The block is that of `forward` (`skeleton`), the numerics are those of `kernels.mma.fp8_forward`:
P is e4m3 in units of its tile's largest score. A tile's P V goes to accumulators `part_acc` of its
own, and is added to O in float32 with its weight. So it does not matter that FP8 tensor cores are
reported to add with 14 bits, and the scale of V of a tile costs nothing.

e4m3 products read both operands along k, which for P V are the keys: V comes with tokens
innermost, in the order in which P leaves the accumulators. Results of more than 128 columns are
added in parts of 64. A tile of keys has one scale of K and one of V. Where they change within, a
stage of keys has its scales in shared memory (`key_scales`), and P holds V's.

A tile of 128 keys costs a warpgroup, at head_dim 128 with overlap and pingpong, 512 clocks of the
tensor cores (8 QGMMA), 528 of the special-function units (66 exponentials, two of them for the
weights) and 484 instructions of each scheduler, 64 FFMA of them to add the tile's share to O: the
clocks that 16 bits leave free are about used up. Where keys have scales of their own, 64 FMUL, 64
FFMA and 24 LDS come in addition. Then the schedulers bound it, not the tensor cores, by 622
instructions without overlap, for which there are no registers. No GPU has timed any of it yet.

Source: FlashAttention-3, arXiv 2407.08608, section 3.3.
"""

from typing import NamedTuple

from numflash.configs import WARPGROUP_ROWS, Sm90Fp8ForwardConfig, Traits
from numflash.kernels.arguments import Descales, Layout, Part, Pointer, Shape, mask_of, scores_of
from numflash.kernels.kernel import Kernel
from numflash.kernels.wgmma.key_scales import make_assist
from numflash.kernels.wgmma.ring import make_ring
from numflash.kernels.wgmma.skeleton import make_skeleton
from numflash.ptx import TensorMap, cuda, device_function, f32, i32, u16, u32
from numflash.ptx.wgmma import make_wgmma_wait_group
from numflash.tiles import features, steps
from numflash.tiles.addresses import first_of_head, token_of_row
from numflash.tiles.mma.fp8_operands import scale_of_key
from numflash.tiles.mma.fp8_softmax import KeyScales, make_add_v_scales, make_scale_keys
from numflash.tiles.mma.fragments import (
    MMA_ROWS,
    ROW_STEP,
    accumulator_column,
    accumulator_row,
    place_of_column,
)
from numflash.tiles.mma.softmax import make_scale_rows
from numflash.tiles.portable.softmax import LOG2_E
from numflash.tiles.wgmma import fp8, products, turns
from numflash.tiles.wgmma.fp8 import begin_rows
from numflash.tiles.wgmma.scores import make_shape_scores
from numflash.tiles.wgmma.turns import group_of_thread, softmax_before_wait


class RowScales(NamedTuple):
    """Scales of a thread's two rows of Q, the first scales of the head's K and V, its `args`."""

    q: object
    k_first: object
    v_first: object
    args: object


def make_fp8_forward_kernel(config: Sm90Fp8ForwardConfig, traits: Traits) -> Kernel:
    """The forward kernel for one config; see the module's docstring."""
    out_storage = f32 if config.num_splits > 1 or traits.float32_out else u16
    look_up, attend = _make_look_up(traits), make_attend(config, traits)
    assist = make_assist(config, traits) if traits.key_scales else None
    tiles_per_stage = config.stage_n // config.tile_n
    run_block = make_skeleton(config, traits, look_up, attend, tiles_per_stage, assist)

    def forward(
        out: Part[out_storage],  # (split, batch, seqlen_q, num_heads_q, head_dim_v)
        lse: Pointer(f32),  # (split, batch, num_heads_q, seqlen_q)
        descales: Descales,
        q_map: TensorMap,  # (batch, num_heads_q / pack, seqlen_q, pack, head_dim)
        k_map: TensorMap,  # (batch, num_heads_kv, seqlen_k, head_dim)
        v_map: TensorMap,  # (batch, num_heads_kv, head_dim_v, seqlen_k)
        out_map: TensorMap,  # (batch, num_heads_q / pack, seqlen_q, pack, head_dim_v)
        in_fp8: Pointer(i32),  # (batch, num_heads_kv)
        mask: mask_of(traits),
        shape: Shape,
        layout: Layout,
        scores: scores_of(traits.program),
    ):
        results, maps = (out, lse, out_map, scores.features), (q_map, k_map, v_map)
        # Scores are in base 2 before their maximum is taken.
        run_block(results, maps, in_fp8, mask, shape, layout, f32(1), (descales, scores))

    smem_bytes = config.smem_bytes(traits)
    return Kernel(config.family, forward, config.num_threads, smem_bytes, config.cluster)


def _make_look_up(traits: Traits):
    """look_up(rows, shape, arguments): the `RowScales` of a thread's rows."""
    bends, args_of_head = traits.shapes_scores, features.make_args_of_head(traits)

    @device_function
    def look_up(rows, shape, arguments):
        descales, scores = arguments
        batch, head = rows.place.batch, rows.place.head
        k_first = first_of_head(descales.k, batch, rows.place.head_kv)
        v_first = first_of_head(descales.v, batch, rows.place.head_kv)
        args = args_of_head(scores, batch, head)
        q_scales = cuda.local.array(2, f32)
        base = first_of_head(descales.q, batch, token_of_row(head, descales.q.group))
        for r in range(2):
            # Beyond the last row any scale will do.
            i = rows.place.start + accumulator_row(MMA_ROWS) + ROW_STEP * r
            i = i32(min(i, i32(shape.seqlen_q * rows.pack) - 1))
            token = token_of_row(i, rows.pack)
            offset = base + (i - token * rows.pack) * descales.q.packed
            q_scales[r] = descales.q.data[offset + (token >> descales.q.shift)] * scores.scale
            # To base 2, unless softcap or ALiBi come first.
            if not bends:
                q_scales[r] *= LOG2_E
        return RowScales((q_scales[0], q_scales[1]), k_first, v_first, args)

    return look_up


def make_attend(config: Sm90Fp8ForwardConfig, traits: Traits):
    """attend(smem, barriers, at, rows, sums, _, arguments, known, keys, stages)

    O += softmax(Q K^T) V over the stages of keys that a warpgroup's rows see; see `skeleton`. A
    stage holds one tile of keys, or two. `known` are the `RowScales`.
    """
    ring, tile_n, overlap = make_ring(config, traits), config.tile_n, config.overlap
    K, V, SCALES, tile_at = ring.K, ring.V, ring.SCALES, steps.make_tile_at(traits, tile_n)
    tiles_per_stage = config.stage_n // tile_n
    last_of_stage = tiles_per_stage - 1
    part_columns, bends = config.part_columns(traits), traits.shapes_scores
    num_parts, n_part = traits.head_dim_v // part_columns, part_columns // 2
    n_tiles, o_tiles = tile_n // 8, traits.head_dim_v // 8
    n_scores, n_p = 4 * n_tiles, n_tiles
    # Operands count in units of 16 bytes.
    q_step, k_step, v_step = ring.q.words >> 2, ring.k.words >> 2, ring.v.words >> 2
    part_step = part_columns * products.SLAB_BYTES >> 4
    k_tile_step, v_tile_step = tile_n * products.SLAB_BYTES >> 4, tile_n >> 4
    take_turn, pass_turn, _ = turns.make_turns(config.num_warpgroups if config.pingpong else 1)
    begin_q_k = products.make_product_nt(
        "e4m3", WARPGROUP_ROWS, config.stage_n, tile_n, traits.head_dim
    )
    begin_p_v = products.make_product_pt(tile_n, part_columns, traits.head_dim_v)
    wait_for_s, wait_for_next_s = (make_wgmma_wait_group(i, n_scores) for i in range(2))
    wait_for_part = make_wgmma_wait_group(0, n_part)
    add_part = fp8.make_add_part(part_columns // 8)
    scale_s_rows, scale_rows = make_scale_rows(1, n_tiles), make_scale_rows(1, o_tiles)
    shape_scores, pack_p = make_shape_scores(tile_n, traits), fp8.make_pack(n_tiles)
    key_scales, scale_words = traits.key_scales, ring.scales.words
    of_keys = KeyScales(ring.scales.first, config.stage_n)
    of_k, of_v_log2, of_v_inverse = of_keys.k, of_keys.v_log2, of_keys.v_inverse
    scale_keys, add_v_scales = make_scale_keys(1, n_tiles), make_add_v_scales(1, n_tiles)
    tile_softmax = fp8.make_tile_softmax(n_tiles, key_scales)

    @device_function
    def q_of(q):
        """Operand Q of this warpgroup, computed again: its many steps would be kept otherwise."""
        return products.advance(q, group_of_thread(), q_step)

    @device_function
    def k_of(k, stage, tile):
        """Operand K of one of the tiles of a stage."""
        return products.advance(products.advance(k, stage, k_step), tile, k_tile_step)

    @device_function
    def v_of(v, stage, tile):
        """Operand V of one of the tiles of a stage."""
        return products.advance(products.advance(v, stage, v_step), tile, v_tile_step)

    @device_function
    def scales_of_tile(descales, known, n_start, end):
        """The scales of K and V, if not of keys; the last tile may be beyond all keys."""
        if key_scales:
            return f32(1), f32(1)
        key = i32(min(n_start, end - 1)) if last_of_stage else n_start
        return scale_of_key(descales.k, known.k_first, key), scale_of_key(
            descales.v, known.v_first, key
        )

    @device_function
    def scales_at(smem, stage, tile):
        """Where a thread finds the scales of its keys of a tile."""
        within = i32(tile * tile_n + place_of_column(accumulator_column()))
        return smem, i32(stage * scale_words + within)

    @device_function
    def softmax(s_acc, running, factors, weights, rows, tile, k_scale, arguments, known, of_tile):
        """S -> P and the weights of P V; whether O must be multiplied by the factors before.

        `tile` is its first key, and `is_full` as in `tiles.scores.Corner`.
        """
        scores, (smem, at) = arguments[1], of_tile
        scales = cuda.local.array(2, f32)
        scales[0], scales[1] = known.q[0] * k_scale, known.q[1] * k_scale
        if key_scales:
            scale_keys(s_acc, smem, i32(of_k + at))
        if bends:
            # Softcap and ALiBi take scores that are scaled.
            scale_s_rows(s_acc, scales)
            scales[0], scales[1] = LOG2_E, LOG2_E
        n_start, is_full = tile
        shape_scores(s_acc, rows, n_start, is_full, f32(1), scores, known.args)
        if key_scales:
            add_v_scales(s_acc, scales, smem, i32(of_v_log2 + at))
            scales[0], scales[1] = f32(1), f32(1)
        return tile_softmax(s_acc, running, factors, scales, weights, smem, i32(of_v_inverse + at))

    @device_function
    def give_scales(barriers, group, stage, tile):
        """Give the scales of a stage back once its last tile has used them."""
        if tile == last_of_stage:
            # Hazard: no product holds lanes together here; one may not have read the last scales.
            SCALES.gather(group)
            # Hazard: before the last tile has been scaled the next scales would overwrite these.
            SCALES.release(barriers, stage)

    @device_function
    def add_tile(o_acc, part_acc, p_frag, v_operand, weights):
        """O += weights * (P V), begun and waited for."""
        for part in range(num_parts):
            begin_p_v(part_acc, p_frag, products.behind(v_operand, part * part_step))
            # Hazard: the tensor cores still write this part, and read P and V.
            wait_for_part(part_acc)
            add_part(o_acc, n_part * part, part_acc, weights)

    @device_function
    def attend(smem, barriers, at, rows, sums, _, arguments, known, keys, stages):
        stage, parity = stages
        s_acc, p_frag = cuda.local.array(n_scores, f32), cuda.local.array(n_p, u32)
        part_acc = cuda.local.array(n_part, f32)
        limits, units = cuda.local.array(2, f32), cuda.local.array(2, f32)
        factors = cuda.local.array(2, f32)
        weights, next_weights = cuda.local.array(2, f32), cuda.local.array(2, f32)
        o_acc, row_sum, group, (first, end) = sums.o_acc, sums.row_sum, rows.group, keys
        running = sums.row_max, row_sum, limits, units
        begin_rows(limits, units)

        # S = Q K^T, P = softmax(S) of the first tile of keys: no P V is there to overlap with.
        n_block, is_full = tile_at(rows.mask, i32(first * tiles_per_stage))
        tile, n_start = i32(0), i32(n_block * tile_n)
        k_scale, v_scale = scales_of_tile(arguments[0], known, n_start, rows.sequence.seqlen_k)
        take_turn(group)
        # Hazard: S would be made of a K that has not arrived.
        K.wait(barriers, stage, parity)
        begin_q_k(s_acc, q_of(at.q), k_of(at.k, stage, tile))
        pass_turn(group)
        # Hazard: the tensor cores still write S, and read K.
        wait_for_s(s_acc)
        if tile == last_of_stage:
            # Hazard: before the last tile has been read the next K would overwrite it.
            K.release(barriers, stage)
        keys_of_tile = n_start, is_full
        # Hazard: scores would be scaled by scales that are not there yet.
        SCALES.wait(barriers, stage, parity)
        about = arguments, known, scales_at(smem, stage, tile)
        softmax(s_acc, running, factors, weights, rows, keys_of_tile, k_scale, *about)
        give_scales(barriers, group, stage, tile)
        weights[0], weights[1] = weights[0] * v_scale, weights[1] * v_scale
        pack_p(p_frag, s_acc)

        n, end = i32(first * tiles_per_stage + 1), i32(end * tiles_per_stage)
        while n < end:
            # S = Q K^T of tile n, O += weights * (P V) of tile n - 1
            v_stage, v_parity, v_tile = stage, parity, tile
            if tile == last_of_stage:
                tile = i32(0)
                stage, parity = K.following(stage, parity)
            else:
                tile = i32(tile + 1)
            n_block, is_full = tile_at(rows.mask, n)
            n_start = i32(n_block * tile_n)
            k_scale, v_scale = scales_of_tile(arguments[0], known, n_start, rows.sequence.seqlen_k)
            take_turn(group)
            if overlap:
                # Hazard: S would be made of the K of a stage before.
                K.wait(barriers, stage, parity)
                begin_q_k(s_acc, q_of(at.q), k_of(at.k, stage, tile))
            # Hazard: O would get a V that has not arrived.
            V.wait(barriers, v_stage, v_parity)
            if overlap:
                begin_p_v(part_acc, p_frag, v_of(at.v, v_stage, v_tile))
                pass_turn(group)
                # Hazard: the tensor cores still write S. P V, begun after it, may go on.
                wait_for_next_s(s_acc)
            else:
                add_tile(o_acc, part_acc, p_frag, v_of(at.v, v_stage, v_tile), weights)
                if v_tile == last_of_stage:
                    # Hazard: before the last tile has been read the next V would overwrite it.
                    V.release(barriers, v_stage)
                # Hazard: S would be made of the K of a stage before.
                K.wait(barriers, stage, parity)
                begin_q_k(s_acc, q_of(at.q), k_of(at.k, stage, tile))
                pass_turn(group)
                # Hazard: the tensor cores still write S, and read K.
                wait_for_s(s_acc)
            if tile == last_of_stage:
                # Hazard: before the last tile has been read the next K would overwrite it.
                K.release(barriers, stage)

            # P = softmax(S) of tile n, with overlap beside P V of tile n - 1
            keys_of_tile = n_start, is_full
            # Hazard: scores would be scaled by the scales of a stage before.
            SCALES.wait(barriers, stage, parity)
            about = arguments, known, scales_at(smem, stage, tile)
            has_grown = softmax(
                s_acc, running, factors, next_weights, rows, keys_of_tile, k_scale, *about
            )
            give_scales(barriers, group, stage, tile)
            if overlap:
                softmax_before_wait(row_sum[0], row_sum[1])
                # Hazard: P would change under the product, which still writes its part of O.
                wait_for_part(part_acc)
                # Hazard: before this wait the next V would have overwritten this one.
                V.release(barriers, v_stage)
                add_part(o_acc, 0, part_acc, weights)
            if has_grown:
                scale_rows(o_acc, factors)
            weights[0], weights[1] = next_weights[0] * v_scale, next_weights[1] * v_scale
            pack_p(p_frag, s_acc)
            n = i32(n + 1)

        # O += weights * (P V) of the last tile
        # Hazard: O would get a V that has not arrived.
        V.wait(barriers, stage, parity)
        add_tile(o_acc, part_acc, p_frag, v_of(at.v, stage, tile), weights)
        # Hazard: before `add_tile` has waited the next V would overwrite this one.
        V.release(barriers, stage)
        return V.following(stage, parity)

    return attend
