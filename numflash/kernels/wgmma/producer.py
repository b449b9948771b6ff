"""The producer of a block: one thread that fetches Q, K and V for the others, tile after tile."""

from functools import cache

from numflash.configs import WARPGROUP_ROWS, Sm90ForwardConfig, Traits
from numflash.kernels.wgmma.origins import box_in_pages, make_origins, make_pages_of
from numflash.kernels.wgmma.ring import SLAB_WORDS, make_ring
from numflash.ptx import device_function, i32, u32
from numflash.ptx.bulk_copies import (
    EVICT_FIRST,
    EVICT_LAST,
    cp_async_bulk_tensor_5d,
    prefetch_tensormap,
)
from numflash.tiles import blocks, sequences, steps
from numflash.tiles.addresses import token_of_row
from numflash.tiles.blocks import next_place, next_place_of_cluster
from numflash.tiles.selected import make_is_computed
from numflash.tiles.wgmma import clusters
from numflash.tiles.wgmma.products import SLAB_BYTES


@cache
def make_produce(config: Sm90ForwardConfig, traits: Traits):
    """produce(smem, barriers, maps, work)

    All tiles of rows of this block, as the consumers take them: Q of a tile, and K and V tile by
    tile of keys, each as soon as its buffer is empty. `maps` are those of Q, K and V; `work` is
    the result of `walk`, a `Grid`, and the kernel's shape, layout, mask and `in_fp8`.
    """
    ring, stage_n, box_n = make_ring(config, traits), config.stage_n, config.box_n
    num_groups, num_stages, cluster = config.num_warpgroups, config.num_stages, config.cluster
    Q, K, V, q, k, v = ring.Q, ring.K, ring.V, ring.q, ring.k, ring.v
    begin, following = ring.begin, ring.following
    q_bytes, k_bytes, v_bytes = u32(ring.q_bytes), u32(ring.k_bytes), u32(ring.v_bytes)
    slab_elements = SLAB_BYTES // config.operand_bytes
    columns_innermost = not traits.fp8
    k_slabs, v_slabs = config.slabs(traits.head_dim), config.v_slabs(traits)
    v_slab_words = v.words // v_slabs
    place_of = blocks.make_place_of(config.block_rows, traits)
    following_place = next_place if cluster == 1 else next_place_of_cluster
    own_rows = clusters.make_own_rows(cluster, config.tile_m, traits)
    load_4d, load_5d = clusters.make_loads(cluster)
    # Of each slab a block fetches its share of the rows: of keys, or of V's columns in 8 bits.
    first_key = clusters.make_share(cluster, stage_n)
    first_column = clusters.make_share(cluster, traits.head_dim_v)
    keys_of = steps.make_keys_of(config, traits)
    is_computed = make_is_computed(traits)
    tile_at, sequence_of = steps.make_tile_at(traits, stage_n), sequences.make_sequence_of(traits)
    (origins_of_inputs, _), pages_of = make_origins(traits), make_pages_of(traits)
    # K's only buffer is not empty before V has been used, if it holds several tiles.
    k_leads = num_stages > 1 or stage_n == config.tile_n

    @device_function
    def fetch_q(smem, barriers, q_map, group, parity, token, head, entry):
        # Hazard: this Q would overwrite the one before, or O, which takes its place.
        Q.claim(barriers, group, parity)
        # Hazard: Q would count as full before all of its slabs have arrived.
        Q.expect(barriers, group, q_bytes)
        for slab in range(k_slabs):
            target = i32(q.first + group * q.words + slab * WARPGROUP_ROWS * SLAB_WORDS)
            column = i32(slab * slab_elements)
            cp_async_bulk_tensor_5d(
                smem,
                target,
                q_map,
                barriers,
                Q.full + group,
                EVICT_FIRST,
                column,
                0,
                token,
                head,
                entry,
            )

    @device_function
    def fetch_k(smem, barriers, k_map, stage, parity, n, head, origin, pages):
        key, full = i32(n * stage_n + origin.row), K.full + stage
        first = first_key()
        key = i32(key + first)
        # Hazard: this K would overwrite the one that a warpgroup still multiplies.
        K.claim(barriers, stage, parity)
        # Hazard: K would count as full before all of its slabs have arrived.
        K.expect(barriers, stage, k_bytes)
        for slab in range(k_slabs):
            target = i32(k.first + stage * k.words + (slab * stage_n + first) * SLAB_WORDS)
            column = i32(slab * slab_elements)
            load_4d(
                smem, target, k_map, barriers, full, EVICT_LAST, column, key, head, origin.entry
            )

    @device_function
    def fetch_v(smem, barriers, v_map, stage, parity, n, head, origin, pages):
        key, full = i32(n * stage_n + origin.row), V.full + stage
        first = first_key() if columns_innermost else first_column()
        # Hazard: this V would overwrite the one that a warpgroup still multiplies.
        V.claim(barriers, stage, parity)
        # Hazard: V would count as full before all of its slabs have arrived.
        V.expect(barriers, stage, v_bytes)
        for slab in range(v_slabs):
            target = i32(v.first + stage * v.words + slab * v_slab_words + first * SLAB_WORDS)
            # Slabs are side by side along the axis that is innermost in memory.
            inner, outer = i32(slab * slab_elements), i32(key + first)
            if not columns_innermost:
                inner, outer = i32(key + slab * slab_elements), first
            load_4d(
                smem, target, v_map, barriers, full, EVICT_LAST, inner, outer, head, origin.entry
            )

    @device_function
    def fetch_paged_k(smem, barriers, k_map, stage, parity, n, head, keys, pages):
        # A box is a page's part of the stage: rows x SLAB_WORDS words, one below the other.
        rows, full = min(pages.size, box_n), K.full + stage
        # Hazard: this K would overwrite the one that a warpgroup still multiplies.
        K.claim(barriers, stage, parity)
        # Hazard: K would count as full before all boxes of all pages have arrived.
        K.expect(barriers, stage, k_bytes)
        share = first_key()
        for first in range(share, share + box_n, rows):
            x, y, page = box_in_pages(i32(n * stage_n + first), keys, pages)
            for slab in range(k_slabs):
                target = i32(k.first + stage * k.words + (slab * stage_n + first) * SLAB_WORDS)
                at = i32(slab * slab_elements), x, head, y, page
                load_5d(smem, target, k_map, barriers, full, EVICT_LAST, *at)

    @device_function
    def fetch_paged_v(smem, barriers, v_map, stage, parity, n, head, keys, pages):
        # As of K: V's rows are keys, too.
        rows, full = min(pages.size, box_n), V.full + stage
        # Hazard: this V would overwrite the one that a warpgroup still multiplies.
        V.claim(barriers, stage, parity)
        # Hazard: V would count as full before all boxes of all pages have arrived.
        V.expect(barriers, stage, v_bytes)
        share = first_key()
        for first in range(share, share + box_n, rows):
            x, y, page = box_in_pages(i32(n * stage_n + first), keys, pages)
            for slab in range(v_slabs):
                target = i32(v.first + stage * v.words + slab * v_slab_words + first * SLAB_WORDS)
                at = i32(slab * slab_elements), x, head, y, page
                load_5d(smem, target, v_map, barriers, full, EVICT_LAST, *at)

    if traits.paged:
        fetch_k, fetch_v = fetch_paged_k, fetch_paged_v

    @device_function
    def produce(smem, barriers, maps, work):
        q_map, k_map, v_map = maps
        (number, num_places), grid, shape, layout, mask, in_fp8 = work
        pack, pages = grid.pack, pages_of(shape)
        prefetch_tensormap(q_map)
        prefetch_tensormap(k_map)
        prefetch_tensormap(v_map)
        tokens = i32(u32(WARPGROUP_ROWS) // u32(pack))
        # Buffers are empty at first, as if a phase of parity 1 had ended.
        stages, q_parity = begin(u32(1)), u32(1)
        while number < num_places:
            place = place_of(number, grid, shape, mask)
            m_start, head, head_kv = own_rows(place).start, place.head, place.head_kv
            sequence = sequence_of(place, shape, mask)
            in_q, in_k, in_v = origins_of_inputs(place, sequence, shape, layout)
            n_begin, n_end = keys_of(place, grid, sequence, mask)
            if not is_computed(in_fp8, place, shape):
                n_end = n_begin
            # The first K while the tile of rows before is finished, and still has Q's buffers.
            if n_begin < n_end:
                n, _ = tile_at(mask, n_begin)
                fetch_k(smem, barriers, k_map, stages[0], stages[1], n, head_kv, in_k, pages)
            packed_head = token_of_row(head, pack)
            for group in range(num_groups):
                token = i32(token_of_row(m_start, pack) + group * tokens + in_q.row)
                fetch_q(smem, barriers, q_map, group, q_parity, token, packed_head, in_q.entry)
            q_parity = u32(q_parity ^ u32(1))
            for step in range(n_begin, n_end):
                # The next K comes before this V, as the consumers want them.
                stage, parity = stages[-2], stages[-1]
                stages = following(stages)
                next_k, next_parity = stages[0], stages[1]
                if k_leads and step + 1 < n_end:
                    n, _ = tile_at(mask, step + 1)
                    fetch_k(smem, barriers, k_map, next_k, next_parity, n, head_kv, in_k, pages)
                n, _ = tile_at(mask, step)
                fetch_v(smem, barriers, v_map, stage, parity, n, head_kv, in_v, pages)
                if not k_leads and step + 1 < n_end:
                    n, _ = tile_at(mask, step + 1)
                    fetch_k(smem, barriers, k_map, next_k, next_parity, n, head_kv, in_k, pages)
            number = following_place(number, u32(q_parity ^ u32(1)))

    return produce
