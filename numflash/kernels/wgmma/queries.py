"""The walk of a Hopper block that owns keys over tiles of queries, and the warps that fetch.

In each of its `places` a block owns tile_n rows of K and V and walks over Q and dO in tiles of
tile_m, for every query head of the group that shares the key-value head. One thread fetches them
by bulk copies, and warps beside it lse and delta. `given` are the statistics, the results, and
the `Mask`, `Shape` and `Scores` of the call.
"""

import math

from numflash.configs import Traits
from numflash.kernels.mma.queries import Walk, make_steps_of_heads
from numflash.kernels.wgmma.gradient_ring import make_fetch, matrix_of
from numflash.kernels.wgmma.origins import make_origins_of_gradients
from numflash.kernels.wgmma.places import make_each
from numflash.ptx import device_function, f32, i32, mov_tid_x, u32
from numflash.ptx.bulk_copies import EVICT_FIRST, EVICT_LAST, prefetch_tensormap
from numflash.ptx.memory import st_shared_f32
from numflash.tiles import addresses, blocks, sequences, steps
from numflash.tiles.addresses import first_of_rows
from numflash.tiles.mma import copies
from numflash.tiles.mma.elements import MMA_ELEMENTS
from numflash.tiles.mma.fragments import place_of_column
from numflash.tiles.sequences import last_of, seen_from_keys, tiles_seen


def make_walk_of(config, traits: Traits, place_of_keys=None):
    """walk_of(number, mask, shape): a `Place`, its sequence, and its `Walk` over queries.

    `place_of_keys` says in which order places begin; by default, as in `tiles.blocks`.
    """
    tile_m, tile_n = config.tile_m, config.tile_n
    place_of_keys = place_of_keys or blocks.make_place_of_keys(tile_n, traits)
    sequence_of = sequences.make_sequence_of(traits)

    @device_function
    def walk_of(number, mask, shape):
        place = place_of_keys(number, shape, mask)
        n_start, first_head, _, batch, _ = place[:5]
        sequence = sequence_of(place, shape, mask)
        last_key = last_of(n_start, tile_n, sequence.seqlen_k)
        tiles = tiles_seen(n_start, last_key, tile_m, seen_from_keys(sequence))
        walk = Walk(mask, batch, n_start, first_head, shape.group_size, tiles)
        return place, sequence, walk

    return walk_of


def make_produce(config, traits: Traits, channels, walk_of, places):
    """produce(smem, barriers, maps, given): for each place K and V, then Q and dO tile by tile."""
    OWNED, Q, DO = channels[:3]
    q, do, k, v = (matrix_of(config, traits, name) for name in ("q", "do", "k", "v"))
    fetch_q, fetch_do = make_fetch(q, EVICT_LAST), make_fetch(do, EVICT_LAST)
    fetch_k, fetch_v = make_fetch(k, EVICT_FIRST), make_fetch(v, EVICT_FIRST)
    owned_bytes, q_bytes, do_bytes = u32(k.n_bytes + v.n_bytes), u32(q.n_bytes), u32(do.n_bytes)
    tile_m, origins_of = config.tile_m, make_origins_of_gradients(traits)
    count_steps, first_step, next_step = make_steps_of_heads(traits, tile_m)
    tile_at = steps.make_tile_at(traits, tile_m, by_keys=True)

    @device_function
    def produce_place(smem, barriers, work, number, turn, at):
        (q_map, k_map, v_map, do_map), (_, _, mask, shape, _) = work
        stage, parity = at
        place, sequence, walk = walk_of(number, mask, shape)
        n_start, head_kv = place.start, place.head_kv
        of_q, of_k, of_v, of_do = origins_of(place, sequence, shape)
        step, head, end = first_step(walk)
        num_steps = count_steps(walk)
        # Hazard: K and V would count as full before all of their slabs have arrived.
        OWNED.expect(barriers, 0, owned_bytes if num_steps > 0 else u32(0))
        # Without queries nobody reads K and V.
        if num_steps > 0:
            own, at_k, at_v = i32(0), i32(n_start + of_k.row), i32(n_start + of_v.row)
            fetch_k(smem, barriers, OWNED.full, k_map, own, at_k, head_kv, of_k.entry)
            fetch_v(smem, barriers, OWNED.full, v_map, own, at_v, head_kv, of_v.entry)
        for _ in range(num_steps):
            tile, _ = tile_at(mask, step)
            at_q, at_do = i32(tile * tile_m + of_q.row), i32(tile * tile_m + of_do.row)
            # Hazard: this Q would overwrite the one that a warpgroup still multiplies.
            Q.claim(barriers, stage, parity)
            # Hazard: Q would count as full before all of its slabs have arrived.
            Q.expect(barriers, stage, q_bytes)
            fetch_q(smem, barriers, Q.full + stage, q_map, stage, at_q, head, of_q.entry)
            # Hazard: this dO would overwrite the one that a warpgroup still multiplies.
            DO.claim(barriers, stage, parity)
            # Hazard: dO would count as full before all of its slabs have arrived.
            DO.expect(barriers, stage, do_bytes)
            fetch_do(smem, barriers, DO.full + stage, do_map, stage, at_do, head, of_do.entry)
            stage, parity = Q.following(stage, parity)
            step, head, end = next_step(walk, step, head, end)
        return (stage, parity), turn

    produce_places = make_each(places, produce_place, draws=True)

    @device_function
    def produce(smem, barriers, maps, given):
        q_map, k_map, v_map, do_map = maps
        prefetch_tensormap(q_map)
        prefetch_tensormap(k_map)
        prefetch_tensormap(v_map)
        prefetch_tensormap(do_map)
        # Buffers are empty at first, as if a phase of parity 1 had ended.
        produce_places(smem, barriers, (maps, given), (i32(0), u32(1)))

    return produce


def make_assist(config, traits: Traits, channels, walk_of, places):
    """assist(smem, barriers, given): lse and delta of each tile of queries, by one to three warps.

    Bulk copies begin at multiples of 16 bytes only, and could not put them in the order in which
    they are read.
    """
    ROWS, tile_m, threads = channels[3], config.tile_m, config.assisting_threads
    parts = tile_m // threads
    offsets = config.smem_offsets(traits)
    lse_smem, delta_smem = offsets["lse"], offsets["delta"]
    count_steps, first_step, next_step = make_steps_of_heads(traits, tile_m)
    tile_at = steps.make_tile_at(traits, tile_m, by_keys=True)
    first_of_statistics = addresses.make_first_of_statistics(traits)

    @device_function
    def assist_place(smem, barriers, given, number, turn, at):
        statistics, _, mask, shape, _ = given
        stage, parity = at
        place, sequence, walk = walk_of(number, mask, shape)
        batch = place.batch
        step, head, end = first_step(walk)
        for _ in range(count_steps(walk)):
            tile, _ = tile_at(mask, step)
            # Computed again in each tile: kept, it would take registers, of which there are
            # few.
            thread = i32(mov_tid_x() % threads)
            first = first_of_statistics(batch, head, shape) + sequence.first_q
            # Hazard: these would overwrite the statistics that a warpgroup still reads.
            ROWS.claim(barriers, stage, parity)
            i, at = i32(tile * tile_m + thread), i32(tile_m * stage + place_of_column(thread))
            first += i
            left = i32(sequence.seqlen_q - i)
            for part in range(parts):
                # A query past the end is like one that sees no key: its P is zero.
                lse, delta = f32(math.inf), f32(0)
                if left > threads * part:
                    lse = statistics.lse[first + threads * part]
                    delta = statistics.delta[first + threads * part]
                st_shared_f32(smem, lse_smem + at + threads * part, lse)
                st_shared_f32(smem, delta_smem + at + threads * part, delta)
            # Hazard: warpgroups would wait for these statistics for ever.
            ROWS.filled(barriers, stage)
            stage, parity = ROWS.following(stage, parity)
            step, head, end = next_step(walk, step, head, end)
        # Read again, so that no register keeps it through the walk.
        turn = places.turn_of(smem)
        places.give_back(barriers)
        return (stage, parity), turn

    assist_places = make_each(places, assist_place)

    @device_function
    def assist(smem, barriers, given):
        assist_places(smem, barriers, given, (i32(0), u32(1)))

    return assist


def make_finish(traits: Traits, walk_of, head_dim):
    """finish(acc, target, row, num_columns, number, mask, shape)

    A warpgroup writes its rows of dK or dV, of `head_dim` padded columns, to the record `target`;
    `row` is this thread's first in the block's tile. The place is computed again of its number, so
    that no register keeps it through the walk.
    """
    element = MMA_ELEMENTS["sm80", traits.dtype]
    store_as = traits.vectorized, traits.float32_out, addresses.row_of_head, traits.float32_out
    store_rows = copies.make_store_rows(element, 1, head_dim // 8, *store_as)

    @device_function
    def finish(acc, target, row, num_columns, number, mask, shape):
        place, sequence, _ = walk_of(number, mask, shape)
        n_start, _, head_kv, batch, _ = place[:5]
        base = first_of_rows(target, batch, head_kv, sequence.first_k)
        store_rows(acc, target, base, i32(n_start + row), sequence.seqlen_k, num_columns)

    return finish
