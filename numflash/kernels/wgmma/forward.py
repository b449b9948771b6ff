"""Forward on Hopper: O = softmax(softmax_scale Q K^T) V and lse, by specialised warps.

`attend` is the algorithm, as 128 threads run it for 64 rows of Q. In `skeleton`, around it, one
thread of the block fetches Q, K and V to shared memory by bulk copies, and several of these
warpgroups consume them. They multiply asynchronously: S = Q K^T from shared memory, O += P V with
P in registers. A tile of K or V has arrived when its channel says so (`K.wait`), and is given back
when it has been read (`K.release`).

A warpgroup keeps the tensor cores busy while it computes exponentials, in two ways that a config
switches on: with `overlap` it begins the next S and O += P V together, and turns S to P while the
latter is under way; with `pingpong` warpgroups take turns, so that one multiplies while another
computes its softmax.

The main loop in machine code, a warpgroup and a tile of 128 keys (bfloat16, head_dim 128, overlap
and pingpong; `numflash-inspect forward --arch sm_90a` shows it for any config):

     16 HGMMA         1024 clocks of the SM's tensor cores: 8 for S = Q K^T, 8 for O += P V
     64 MUFU          512 clocks, at 16 exponentials a clock: all of them beside O += P V
     64 FFMA          the exponents
     66 FMNMX         the row's maximum, with 4 SHFL across its four lanes
     64 FADD          its sum
     32 F2FP          P to bfloat16
     84 others        descriptors of the products, barriers, the loop
     64 FMUL          O rescaled, only when a maximum has grown by 2 ** 8
    256 ISETP, FSEL   the mask, only on tiles that an edge crosses

Each scheduler issues 394 instructions in the 1024 clocks of a turn, so two warpgroups that
alternate leave the tensor cores no reason to wait. At head_dim 64 products and exponentials take
512 clocks each and 373 instructions are issued: three warpgroups share the SM then.

Source: FlashAttention-3, arXiv 2407.08608, Algorithms 1 and 2.
"""

from numflash.configs import WARPGROUP_ROWS, Sm90ForwardConfig, Traits
from numflash.kernels.arguments import (
    Part,
    Pointer,
    mapped_layout_of,
    mask_of,
    scores_of,
    shape_of,
)
from numflash.kernels.kernel import Kernel
from numflash.kernels.wgmma.ring import make_ring
from numflash.kernels.wgmma.skeleton import make_skeleton
from numflash.ptx import TensorMap, cuda, device_function, f32, i32, u16, u32
from numflash.ptx.wgmma import make_wgmma_wait_group
from numflash.tiles import features, steps
from numflash.tiles.mma import softmax
from numflash.tiles.portable.softmax import LOG2_E
from numflash.tiles.wgmma import products, turns
from numflash.tiles.wgmma.scores import make_shape_scores, make_weigh_scores
from numflash.tiles.wgmma.softmax import begin_rows, make_online_softmax
from numflash.tiles.wgmma.turns import group_of_thread, softmax_before_wait


def make_forward_kernel(config: Sm90ForwardConfig, traits: Traits) -> Kernel:
    """The forward kernel for one config; see the module's docstring."""
    out_storage = f32 if config.num_splits > 1 or traits.float32_out else u16
    bends, args_of_head = traits.shapes_scores, features.make_args_of_head(traits)

    @device_function
    def look_up(rows, shape, scores):
        return args_of_head(scores, rows.place.batch, rows.place.head)

    run_block = make_skeleton(config, traits, look_up, make_attend(config, traits))

    def forward(
        out: Part[out_storage],  # (split, batch, seqlen_q, num_heads_q, head_dim_v)
        lse: Pointer(f32),  # (split, batch, num_heads_q, seqlen_q)
        q_map: TensorMap,  # (batch, num_heads_q / pack, seqlen_q, pack, head_dim)
        k_map: TensorMap,  # (batch, num_heads_kv, seqlen_k, head_dim)
        v_map: TensorMap,  # (batch, num_heads_kv, seqlen_k, head_dim_v)
        out_map: TensorMap,  # (batch, num_heads_q / pack, seqlen_q, pack, head_dim_v)
        in_fp8: Pointer(i32),  # (batch, num_heads_kv)
        mask: mask_of(traits),
        shape: shape_of(traits),
        layout: mapped_layout_of(traits),
        scores: scores_of(traits.program),
    ):
        results, maps = (out, lse, out_map, scores.features), (q_map, k_map, v_map)
        scale_log2 = LOG2_E
        if not bends:
            scale_log2 = scores.scale * LOG2_E
        run_block(results, maps, in_fp8, mask, shape, layout, scale_log2, scores)

    smem_bytes = config.smem_bytes(traits)
    return Kernel(config.family, forward, config.num_threads, smem_bytes, config.cluster)


def make_attend(config: Sm90ForwardConfig, traits: Traits):
    """attend(smem, barriers, at, rows, sums, scale_log2, scores, args, keys, stages)

    O += softmax(Q K^T) V over the tiles of keys that a warpgroup's rows see; see `skeleton`.
    """
    ring, tile_n, overlap = make_ring(config, traits), config.tile_n, config.overlap
    K, V, following = ring.K, ring.V, ring.following
    dtype, tile_at = traits.dtype, steps.make_tile_at(traits, tile_n)
    # Operands count in units of 16 bytes.
    q_step, k_step, v_step = ring.q.words >> 2, ring.k.words >> 2, ring.v.words >> 2
    n_tiles, o_tiles, rows_are_long = tile_n // 8, traits.head_dim_v // 8, traits.head_dim > 128
    n_scores, n_p = 4 * n_tiles, 2 * n_tiles
    take_turn, pass_turn, _ = turns.make_turns(config.num_warpgroups if config.pingpong else 1)
    begin_q_k = products.make_product_nt(dtype, WARPGROUP_ROWS, tile_n, tile_n, traits.head_dim)
    begin_p_v = products.make_product_pn(dtype, tile_n, traits.head_dim_v)
    wait_for_s, wait_for_next_s = (make_wgmma_wait_group(i, n_scores) for i in range(2))
    wait_for_o = make_wgmma_wait_group(0, 4 * o_tiles)
    shape_scores, online_softmax = make_shape_scores(tile_n, traits), make_online_softmax(n_tiles)
    weigh_scores = make_weigh_scores(tile_n, traits)
    pack_p, scale_rows = products.make_pack(dtype, n_tiles), softmax.make_scale_rows(1, o_tiles)

    @device_function
    def q_of(q, group):
        """Operand Q of a warpgroup; of long rows computed again, or all its steps are kept."""
        if rows_are_long:
            group = group_of_thread()
        return products.advance(q, group, q_step)

    @device_function
    def attend(smem, barriers, at, rows, sums, scale_log2, scores, args, keys, stages):
        stage, parity = stages[0], stages[1]
        s_acc, p_frag = cuda.local.array(n_scores, f32), cuda.local.array(n_p, u32)
        limits, shifts = cuda.local.array(2, f32), cuda.local.array(2, f32)
        factors = cuda.local.array(2, f32)
        o_acc, row_sum, group, (first, end) = sums.o_acc, sums.row_sum, rows.group, keys
        running = sums.row_max, row_sum, limits, shifts
        begin_rows(limits, shifts)

        # S = Q K^T, P = softmax(S) of the first tile of keys: no P V is there to overlap with.
        take_turn(group)
        # Hazard: S would be made of a K that has not arrived.
        K.wait(barriers, stage, parity)
        begin_q_k(s_acc, q_of(at.q, group), products.advance(at.k, stage, k_step))
        pass_turn(group)
        # Hazard: the tensor cores still write S, and read K.
        wait_for_s(s_acc)
        # Hazard: before this wait for S the next K would have overwritten this one.
        K.release(barriers, stage)
        tile, is_full = tile_at(rows.mask, first)
        shape_scores(s_acc, rows, i32(tile * tile_n), is_full, scores.scale, scores, args)
        online_softmax(s_acc, running, factors, scale_log2)
        weigh_scores(s_acc, rows, i32(tile * tile_n), args.drawn)
        pack_p(p_frag, s_acc)

        n = i32(first + 1)
        while n < end:
            # S = Q K^T of step n, O += P V of step n - 1
            v_stage, v_parity = stages[-2], stages[-1]
            stages = following(stages)
            stage, parity = stages[0], stages[1]
            take_turn(group)
            if overlap:
                # Hazard: S would be made of the K of a tile before.
                K.wait(barriers, stage, parity)
                begin_q_k(s_acc, q_of(at.q, group), products.advance(at.k, stage, k_step))
            # Hazard: O would get a V that has not arrived.
            V.wait(barriers, v_stage, v_parity)
            begin_p_v(o_acc, p_frag, products.advance(at.v, v_stage, v_step))
            if not overlap:
                # Hazard: the tensor cores still write O, and read P and V.
                wait_for_o(o_acc)
                # Hazard: before this wait for O the next V would have overwritten this one.
                V.release(barriers, v_stage)
                # Hazard: S would be made of the K of a tile before.
                K.wait(barriers, stage, parity)
                begin_q_k(s_acc, q_of(at.q, group), products.advance(at.k, stage, k_step))
            pass_turn(group)
            if overlap:
                # Hazard: the tensor cores still write S. P V, begun after it, may go on.
                wait_for_next_s(s_acc)
            else:
                # Hazard: the tensor cores still write S, and read K.
                wait_for_s(s_acc)
            # Hazard: before S is there the next K would overwrite this one.
            K.release(barriers, stage)

            # P = softmax(S) of step n, with overlap beside O += P V of step n - 1
            tile, is_full = tile_at(rows.mask, n)
            shape_scores(s_acc, rows, i32(tile * tile_n), is_full, scores.scale, scores, args)
            has_grown = online_softmax(s_acc, running, factors, scale_log2)
            weigh_scores(s_acc, rows, i32(tile * tile_n), args.drawn)
            if overlap:
                softmax_before_wait(row_sum[0], row_sum[1])
                # Hazard: P would change under the product, and O would be rescaled before it is
                # added to.
                wait_for_o(o_acc)
                # Hazard: before this wait for O the next V would have overwritten this one.
                V.release(barriers, v_stage)
            pack_p(p_frag, s_acc)
            if has_grown:
                scale_rows(o_acc, factors)
            n = i32(n + 1)

        # O += P V of the last tile
        v_stage, v_parity = stages[-2], stages[-1]
        # Hazard: O would get a V that has not arrived.
        V.wait(barriers, v_stage, v_parity)
        begin_p_v(o_acc, p_frag, products.advance(at.v, v_stage, v_step))
        # Hazard: `finish` reads O.
        wait_for_o(o_acc)
        # Hazard: before this wait for O the next V would have overwritten this one.
        V.release(barriers, v_stage)
        return following(stages)

    return attend
