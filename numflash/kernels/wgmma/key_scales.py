"""The warps of a block that fetch the scales of keys, where keys of a tile have their own.

They walk as the producer does. The scales of a stage are three rows of `stage_n` words
(`tiles.mma.fp8_softmax.KeyScales`), which bulk copies could not make of the arrays: those begin at
multiples of 16 bytes only, and here scales lie in the order in which they are read, with the
logarithm and the inverse of V's computed once for all rows.
"""

from numflash.configs import Sm90Fp8ForwardConfig, Traits
from numflash.kernels.wgmma.ring import make_ring
from numflash.ptx import (
    cuda,
    device_function,
    ex2_approx_ftz_f32,
    f32,
    i32,
    lg2_approx_ftz_f32,
    mov_tid_x,
    u32,
)
from numflash.ptx.memory import st_shared_f32
from numflash.tiles import blocks, sequences, steps
from numflash.tiles.addresses import first_of_head
from numflash.tiles.blocks import next_place, next_place_of_cluster
from numflash.tiles.mma.fp8_operands import scale_of_key
from numflash.tiles.mma.fp8_softmax import KeyScales
from numflash.tiles.mma.fragments import place_of_column
from numflash.tiles.selected import make_is_computed


def make_assist(config: Sm90Fp8ForwardConfig, traits: Traits):
    """assist(smem, barriers, work, given)

    The scales of all stages of keys of all tiles of rows of this block; `work` is as in
    `producer`, `given` are `Descales` and `Scores`.
    """
    ring, stage_n, threads = make_ring(config, traits), config.stage_n, config.assisting_threads
    SCALES, words, parts = ring.SCALES, ring.scales.words, config.stage_n // threads
    at = KeyScales(ring.scales.first, stage_n)
    of_k, of_v_log2, of_v_inverse = at.k, at.v_log2, at.v_inverse
    place_of = blocks.make_place_of(config.block_rows, traits)
    following_place = next_place if config.cluster == 1 else next_place_of_cluster
    sequence_of, keys_of = sequences.make_sequence_of(traits), steps.make_keys_of(config, traits)
    is_computed, tile_at = make_is_computed(traits), steps.make_tile_at(traits, stage_n)

    @device_function
    def look_up(k_scales, v_scales, descales, bases, n, seqlen_k):
        k_first, v_first = bases
        for part in range(parts):
            # Beyond the last key any scale will do.
            key = i32(n * stage_n + mov_tid_x() % threads + threads * part)
            key = i32(min(key, seqlen_k - 1))
            k_scales[part] = scale_of_key(descales.k, k_first, key)
            v_scales[part] = scale_of_key(descales.v, v_first, key)

    @device_function
    def store(smem, stage, k_scales, v_scales):
        first = i32(stage * words + place_of_column(mov_tid_x() % threads))
        for part in range(parts):
            i, v_log2 = first + threads * part, lg2_approx_ftz_f32(v_scales[part])
            st_shared_f32(smem, of_k + i, k_scales[part])
            st_shared_f32(smem, of_v_log2 + i, v_log2)
            st_shared_f32(smem, of_v_inverse + i, ex2_approx_ftz_f32(-v_log2))

    @device_function
    def assist(smem, barriers, work, given):
        (number, num_places), grid, shape, _, mask, in_fp8 = work
        descales, _ = given
        k_scales, v_scales = cuda.local.array(parts, f32), cuda.local.array(parts, f32)
        # Buffers are empty at first, as if a phase of parity 1 had ended.
        stage, parity, turn = i32(0), u32(1), u32(1)
        while number < num_places:
            place = place_of(number, grid, shape, mask)
            sequence = sequence_of(place, shape, mask)
            n_begin, n_end = keys_of(place, grid, sequence, mask)
            if not is_computed(in_fp8, place, shape):
                n_end = n_begin
            k_first = first_of_head(descales.k, place.batch, place.head_kv)
            v_first = first_of_head(descales.v, place.batch, place.head_kv)
            step = n_begin
            while step < n_end:
                n, _ = tile_at(mask, step)
                # They are fetched before there is room for them.
                bases = k_first, v_first
                look_up(k_scales, v_scales, descales, bases, n, sequence.seqlen_k)
                # Hazard: these would overwrite the scales that a warpgroup still reads.
                SCALES.claim(barriers, stage, parity)
                store(smem, stage, k_scales, v_scales)
                # Hazard: warpgroups would wait for these scales for ever.
                SCALES.filled(barriers, stage)
                stage, parity = SCALES.following(stage, parity)
                step = i32(step + 1)
            number = following_place(number, turn)
            turn = u32(turn ^ u32(1))

    return assist
