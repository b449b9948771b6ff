"""The schedule: a list of the tiles that sequences have, from lengths on the device.

A block makes one list. A tile is of queries of one sequence, or of its keys; its work is the
number of tiles of the other side that the band lets it see. The tiles with the most work come
first; tiles of equal work are in the order of sequences and rows. Where blocks add in turn the
work is that of the sequence, its number of tiles, and the last rows of a sequence come first. The
list is the same in every run, and the host needs no number of it.

    list        word 0: number of records; word 1: 1 where something was cut, else 0; 6 words of 0
    record      q_first, seqlen_q, k_first, seqlen_k, start, begin, end, entry | split << 20

1. A thread has a sequence: its extents, cut, and its number of tiles. The block adds them up, so
   that behind the list stands the number of tiles before each sequence.
2. A warp has a run of records, and finds the sequence of each by bisection. It counts those of
   each amount of work.
3. The counts of all warps, most work first, become the place of a warp's first record of its work.
4. Warps go through their records again, in order, and write each in its place.

With splits, a tile of much work has a record for each of its parts. Splits end at multiples of one
length, counted from the first tile of the other side. If the caller gives the length, the part
that a key is in depends on no other sequence. The block finds the length after step 1; then a
thread has a tile, and the numbers of records and of parts before each tile stand behind the list,
too. Two more arrays follow the records:

    split tiles     a list of the tiles with several parts: q_first, seqlen_q, first slot, parts,
                    start, first split, last split + 1, entry
    slots           of each record the slot of its part, -1 where it is its tile's only one

`reference.sequences` is the same in NumPy.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from numflash.configs import ScheduleConfig, Traits
from numflash.configs.sequences import BINS
from numflash.kernels.arguments import Pointer
from numflash.kernels.kernel import Kernel
from numflash.kernels.sequences.arguments import BothEnds, ListPlan
from numflash.ptx import cuda, device_function, i32, i64, mov_ctaid_x, u32
from numflash.ptx.memory import ld_shared_u32, st_global_v4_u32, st_shared_u32
from numflash.tiles.blocks import ENTRY_BITS, HEADER_WORDS, RECORD_WORDS
from numflash.tiles.division import quotient, tiles_of
from numflash.tiles.lengths import extent_of
from numflash.tiles.portable.lanes import FULL_WARP
from numflash.tiles.sequences import Keys, Sequence, seen_from_keys, tiles_seen, tokens_of

_BIN_BITS = BINS.bit_length() - 1


class _Tile(NamedTuple):
    """A tile of a sequence, from row `start` on, and the tiles of the other side that it sees."""

    entry: i32
    sequence: Sequence
    start: i32
    keys: Keys


class _Record(NamedTuple):
    """A tile, or a part of one: the words of its record.

    Attributes:
        tile: its `keys` are those of the part.
        split: the number of the split that the part is.
        slot: the place of the part among those of all tiles; -1 where the tile is not split.
    """

    tile: _Tile
    split: i32
    slot: i32


class _Places(NamedTuple):
    """Words of `lists` where the parts of one list begin."""

    records: i64
    split_tiles: i64
    slots: i64
    tiles_before: i64  # (entries): tiles before each
    records_before: i64  # (tiles): records before each
    slots_before: i64  # (tiles): slots before each


@device_function
def _sequence_of(lengths, plan, entry):
    """(`Sequence`, whether one of its extents was cut) of an entry."""
    q, k = extent_of(lengths.q, entry), extent_of(lengths.k, entry)
    moved = i32(plan.aligned * (k.length - q.length))
    lo, hi = i32(plan.lo + moved), i32(plan.hi + moved)
    sequence = Sequence(q.length, k.length, q.first, k.first, lo, hi, moved)
    return sequence, i32(q.is_cut | k.is_cut)


@device_function
def _owning(sequence, plan):
    """The `Sequence` as the list sees it: in a list by keys, keys stand for queries."""
    if plan.by_keys != 0:
        sequence = seen_from_keys(sequence)
    return sequence


@device_function
def _tiles_of(owning, plan):
    """The tiles of a sequence."""
    return tiles_of(owning.seqlen_q * plan.pack, plan.tile)


@device_function
def _last_with(lists, before, count, number):
    """The last of `count` that has no more than `number` before it."""
    low, high = i32(0), i32(count)
    while high - low > 1:
        middle = i32((low + high) >> 1)
        if lists[before + middle] <= number:
            low = middle
        else:
            high = middle
    return low


@device_function
def _tile_of(lists, places, lengths, plan, number):
    """The `_Tile` of this number."""
    entry = _last_with(lists, places.tiles_before, lengths.entries, number)
    sequence, _ = _sequence_of(lengths, plan, entry)
    owning = _owning(sequence, plan)
    place = i32(number - lists[places.tiles_before + entry])
    if plan.in_turn != 0:
        place = i32(_tiles_of(owning, plan) - 1 - place)
    start = i32(place * plan.tile)
    first, last = tokens_of(start, plan.tile, plan.pack, owning)
    return _Tile(entry, sequence, start, tiles_seen(first, last, plan.stage, owning))


@device_function
def _parts_of(keys, length):
    """(first split, number of splits) of a tile; at least one."""
    first, count = i32(0), i32(1)
    if keys.begin < keys.end:
        first = quotient(keys.begin, length)
        count = i32(quotient(keys.end - 1, length) - first + 1)
    return first, count


@device_function
def _whole_record_of(lists, places, lengths, plan, totals, number):
    """The `_Record` of a tile that is not split."""
    return _Record(_tile_of(lists, places, lengths, plan, number), i32(0), i32(-1))


@device_function
def _split_record_of(lists, places, lengths, plan, totals, number):
    """The `_Record` of this number; `totals` are the number of tiles, and the splits' length."""
    tiles, length = totals
    of_tile = _last_with(lists, places.records_before, tiles, number)
    tile = _tile_of(lists, places, lengths, plan, of_tile)
    first, count = _parts_of(tile.keys, length)
    part, slot, keys = i32(number - lists[places.records_before + of_tile]), i32(-1), tile.keys
    split = i32(first + part)
    if count > 1:
        begin, end = max(keys.begin, split * length), min(keys.end, (split + 1) * length)
        keys = Keys(i32(begin), i32(end))
        slot = i32(lists[places.slots_before + of_tile] + part)
        if slot >= plan.most_slots:
            slot = i32(-1)
    return _Record(_Tile(tile.entry, tile.sequence, tile.start, keys), split, slot)


@device_function
def _bin_of(tile, plan):
    """The place of a tile's work among amounts of work, most first."""
    work = max(i32(tile.keys.end - tile.keys.begin), i32(0))
    if plan.in_turn != 0:
        work = i32(_tiles_of(_owning(tile.sequence, plan), plan))
    return i32(BINS - 1 - min(work, BINS - 1))


@device_function
def _peers_of(bin_, is_there):
    """The lanes whose tiles have as much work, as bits; without those that have no tile."""
    peers = u32(cuda.ballot_sync(FULL_WARP, is_there))
    for bit in range(_BIN_BITS):
        is_set = (bin_ >> bit) & 1 != 0
        votes = u32(cuda.ballot_sync(FULL_WARP, is_set))
        peers &= votes if is_set else u32(~votes)
    return peers


@cache
def _make_sum_before(num_warps: int):
    """sum_before(x, most, smem, first): (the sum of the threads before, that of all).

    Sums beyond `most` are cut to it. smem[first : first + num_warps] is written, and
    no thread comes back before all have read it.
    """

    @device_function
    def sum_before(x, most, smem, first):
        lane, warp = i32(cuda.threadIdx.x % 32), i32(cuda.threadIdx.x // 32)
        total = i32(x)
        for step in (1, 2, 4, 8, 16):
            below = cuda.shfl_up_sync(FULL_WARP, total, step)
            if lane >= step:
                total = i32(min(total + below, most))
        if lane == 31:
            st_shared_u32(smem, i32(first + warp), u32(total))
        before = cuda.shfl_up_sync(FULL_WARP, total, 1)
        if lane == 0:
            before = i32(0)
        # Hazard: the sum of a warp would be missing.
        cuda.syncthreads()
        of_all = i32(0)
        for other in range(num_warps):
            if other == warp:
                before = i32(min(before + of_all, most))
            of_all = i32(min(of_all + i32(ld_shared_u32(smem, i32(first + other))), most))
        # Hazard: the next sum would overwrite this one's.
        cuda.syncthreads()
        return before, of_all

    return sum_before


@cache
def _make_sum_of_all(num_warps: int):
    """sum_of_all(x, smem, first): the sum of all threads, of 64 bits.

    smem[first : first + 2 num_warps] is written, and no thread comes back before all have read it.
    """

    @device_function
    def sum_of_all(x, smem, first):
        total = i64(x)
        for distance in (16, 8, 4, 2, 1):
            total += cuda.shfl_xor_sync(FULL_WARP, total, distance)
        if cuda.threadIdx.x % 32 == 0:
            at = i32(first + 2 * (cuda.threadIdx.x // 32))
            st_shared_u32(smem, at, u32(total & 0xFFFFFFFF))
            st_shared_u32(smem, i32(at + 1), u32(total >> 32))
        # Hazard: the sum of a warp would be missing.
        cuda.syncthreads()
        total = i64(0)
        for warp in range(num_warps):
            low = i64(ld_shared_u32(smem, i32(first + 2 * warp)))
            total += low + (i64(ld_shared_u32(smem, i32(first + 2 * warp + 1))) << 32)
        # Hazard: the next sum would overwrite this one's.
        cuda.syncthreads()
        return total

    return sum_of_all


@cache
def make_list_maker(num_warps: int, splits: bool) -> Callable:
    """make_list(smem, lengths, lists, plan): a block makes a list; see the module's docstring.

    `smem` are `ScheduleConfig.smem_bytes` of shared memory.
    """
    num_threads = 32 * num_warps
    num_counts, bins_per_thread = num_warps * BINS, BINS // num_threads
    sum_before, sum_of_all = _make_sum_before(num_warps), _make_sum_of_all(num_warps)
    record_of = _split_record_of if splits else _whole_record_of

    @device_function
    def places_of(lengths, plan):
        """The `_Places` of a list."""
        records = plan.begin + HEADER_WORDS
        end = records + i64(plan.most_records) * RECORD_WORDS
        if not splits:
            return _Places(records, end, end, end, end, end)
        slots = end + HEADER_WORDS + i64(plan.most_split) * RECORD_WORDS
        tiles_before = slots + plan.most_records
        records_before = tiles_before + lengths.entries
        slots_before = records_before + plan.most_tiles
        return _Places(records, end, slots, tiles_before, records_before, slots_before)

    @device_function
    def count_tiles(smem, lists, places, lengths, plan):
        """(number of tiles, whether this thread saw something that was cut); step 1."""
        total, flags = i32(0), i32(0)
        for begin in range(0, lengths.entries, num_threads):
            entry, tiles = i32(begin + cuda.threadIdx.x), i32(0)
            if entry < lengths.entries:
                sequence, is_cut = _sequence_of(lengths, plan, entry)
                owning = _owning(sequence, plan)
                tiles = i32(_tiles_of(owning, plan))
                flags = i32(flags | is_cut)
            earlier, of_all = sum_before(tiles, plan.most_tiles, smem, num_counts)
            if entry < lengths.entries:
                first = i32(total + earlier)
                lists[places.tiles_before + entry] = first
                # Sequences that overlap have more tiles than there is room for.
                if first + tiles > plan.most_tiles:
                    flags = i32(1)
            total = i32(min(total + of_all, plan.most_tiles))
        # Hazard: numbers of tiles would be read before they are written.
        cuda.syncthreads()
        return total, flags

    @device_function
    def length_of_splits(smem, lists, places, lengths, plan, tiles):
        """Tiles of the other side in a split."""
        if plan.shares == 0:
            return plan.least
        work = i64(0)
        for number in range(cuda.threadIdx.x, tiles, num_threads):
            keys = _tile_of(lists, places, lengths, plan, i32(number)).keys
            work += max(i32(keys.end - keys.begin), i32(0))
        work = sum_of_all(work, smem, num_counts)
        return i32(max(i64(plan.least), (work + plan.shares - 1) // plan.shares))

    @device_function
    def count_parts(smem, lists, places, lengths, plan, totals):
        """The number of records; makes the list of split tiles.

        There is room for all of them unless the caller's numbers were cut. What has no room is
        left out.
        """
        tiles, length = totals
        records, slots, split_tiles = i32(0), i32(0), i32(0)
        most_records, most_slots, most_split = plan.most_records, plan.most_slots, plan.most_split
        for begin in range(0, tiles, num_threads):
            number, count, parts, first = i32(begin + cuda.threadIdx.x), i32(0), i32(0), i32(0)
            tile = _tile_of(lists, places, lengths, plan, i32(min(number, tiles - 1)))
            if number < tiles:
                first, count = _parts_of(tile.keys, length)
                if count > 1:
                    parts = count
            one = i32(min(parts, 1))
            records_earlier, all_records = sum_before(count, most_records, smem, num_counts)
            slots_earlier, all_slots = sum_before(parts, most_slots, smem, num_counts)
            split_earlier, all_split = sum_before(one, most_split, smem, num_counts)
            record = i32(records + records_earlier)
            slot = i32(min(slots + slots_earlier, most_slots))
            place = i32(split_tiles + split_earlier)
            if number < tiles:
                lists[places.records_before + number] = record
                lists[places.slots_before + number] = slot
                if parts > 0 and place < most_split:
                    at = places.split_tiles + HEADER_WORDS + i64(place) * RECORD_WORDS
                    lists[at] = tile.sequence.first_q
                    lists[at + 1] = tile.sequence.seqlen_q
                    lists[at + 2] = slot
                    # If the caller's numbers were cut, there may be fewer slots than parts.
                    parts = i32(min(parts, most_slots - slot))
                    lists[at + 3] = parts
                    lists[at + 4] = tile.start
                    lists[at + 5] = first
                    lists[at + 6] = i32(first + parts)
                    lists[at + 7] = tile.entry
            records = i32(min(records + all_records, most_records))
            slots = i32(min(slots + all_slots, most_slots))
            split_tiles = i32(min(split_tiles + all_split, most_split))
        thread = i32(cuda.threadIdx.x)
        if thread < HEADER_WORDS:
            lists[places.split_tiles + thread] = split_tiles if thread == 0 else i32(0)
        # Hazard: numbers of records would be read before they are written.
        cuda.syncthreads()
        return records

    @device_function
    def make_list(smem, lengths, lists, plan):
        thread = i32(cuda.threadIdx.x)
        lane, warp = i32(thread % 32), i32(thread // 32)
        places = places_of(lengths, plan)
        for place in range(thread, num_counts, num_threads):
            st_shared_u32(smem, i32(place), u32(0))
        if thread < HEADER_WORDS:
            lists[plan.begin + thread] = i32(0)
        # Its barrier also shows the zeros to all threads.
        total, flags = count_tiles(smem, lists, places, lengths, plan)
        totals = total, i32(0)
        if splits:
            length = length_of_splits(smem, lists, places, lengths, plan, total)
            totals = total, length
            total = count_parts(smem, lists, places, lengths, plan, totals)
        if thread == 0:
            lists[plan.begin] = total
        if flags != 0:
            lists[plan.begin + 1] = i32(1)

        # A warp's records, 32 at a time; counts lie apart for each warp.
        share = i32(32 * tiles_of(total, 32 * num_warps))
        share_begin = i32(min(warp * share, total))
        share_end = i32(min(share_begin + share, total))
        counts = i32(warp * BINS)
        below = u32(u32(u32(1) << u32(lane)) - u32(1))
        for begin in range(share_begin, share_end, 32):
            is_there = begin + lane < share_end
            number = i32(begin + lane if is_there else begin)
            bin_ = _bin_of(record_of(lists, places, lengths, plan, totals, number).tile, plan)
            peers = _peers_of(bin_, is_there)
            if is_there and peers & below == u32(0):
                place = i32(counts + bin_)
                counted = ld_shared_u32(smem, place) + u32(cuda.popc(peers))
                st_shared_u32(smem, place, u32(counted))
            # Hazard: another lane counts the same work next, and votes order no memory.
            cuda.syncwarp(FULL_WARP)
        # Hazard: a warp would still count.
        cuda.syncthreads()

        # Counts become places: of less work behind, of later warps behind.
        of_thread = i32(0)
        for bin_ in range(bins_per_thread * thread, bins_per_thread * (thread + 1)):
            for other in range(num_warps):
                of_thread += i32(ld_shared_u32(smem, i32(other * BINS + bin_)))
        place, _ = sum_before(of_thread, plan.most_records, smem, num_counts)
        for bin_ in range(bins_per_thread * thread, bins_per_thread * (thread + 1)):
            for other in range(num_warps):
                counter = i32(other * BINS + bin_)
                count = i32(ld_shared_u32(smem, counter))
                st_shared_u32(smem, counter, u32(place))
                place = i32(place + count)
        # Hazard: a place would still be a count.
        cuda.syncthreads()

        words = cuda.local.array(4, u32)
        for begin in range(share_begin, share_end, 32):
            is_there = begin + lane < share_end
            number = i32(begin + lane if is_there else begin)
            tile, split, slot = record_of(lists, places, lengths, plan, totals, number)
            bin_ = _bin_of(tile, plan)
            peers = _peers_of(bin_, is_there)
            earlier = i32(cuda.popc(u32(peers & below)))
            counter = i32(counts + bin_)
            place = i32(i32(ld_shared_u32(smem, counter)) + earlier)
            # Hazard: a lane would find the place of the next records.
            cuda.syncwarp(FULL_WARP)
            if is_there:
                if earlier == 0:
                    st_shared_u32(smem, counter, u32(place + cuda.popc(peers)))
                sequence, at = tile.sequence, places.records + i64(place) * RECORD_WORDS
                words[0], words[1] = u32(sequence.first_q), u32(sequence.seqlen_q)
                words[2], words[3] = u32(sequence.first_k), u32(sequence.seqlen_k)
                st_global_v4_u32(lists, at, words)
                words[0], words[1] = u32(tile.start), u32(tile.keys.begin)
                words[2], words[3] = u32(tile.keys.end), u32(tile.entry | split << ENTRY_BITS)
                st_global_v4_u32(lists, at + 4, words)
                if splits:
                    lists[places.slots + place] = slot
            # Hazard: another lane reads the place next, and votes order no memory.
            cuda.syncwarp(FULL_WARP)

    return make_list


def make_schedule_kernel(config: ScheduleConfig, traits: Traits) -> Kernel:
    """The kernel; see the module's docstring."""
    make_list = make_list_maker(config.num_warps, config.splits)

    def schedule(
        lengths: BothEnds,
        lists: Pointer(i32),  # (words,): both lists, each from its plan's `begin` on
        first: ListPlan,
        second: ListPlan,
    ):
        smem = cuda.shared.array(0, u32)
        plan = first
        if mov_ctaid_x() != 0:
            plan = second
        make_list(smem, lengths, lists, plan)

    return Kernel(config.family, schedule, config.num_threads, config.smem_bytes(traits))
