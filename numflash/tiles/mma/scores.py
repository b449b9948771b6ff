"""Masks, scale and features on accumulators; see `tiles.scores` for their meaning.

The loops run over products of 16 x 8, four scores of a thread at a time: written out like this the
compiler unrolls them for every GPU, and the scores stay in registers.
"""

from functools import cache

from numflash.ptx import cuda, device_function, f32, i32, i64
from numflash.tiles.addresses import token_of_row
from numflash.tiles.features import At, has_places, make_keep, make_score
from numflash.tiles.mma.fragments import MMA_COLUMNS, MMA_ROWS, ROW_STEP
from numflash.tiles.pairs import Pair, make_keep_of_pair, make_score_of_pair
from numflash.tiles.scores import NEG_INF, make_distance, make_place, make_place_of_score
from numflash.tiles.unrolled import make_unrolled


@device_function
def _masked(score, column, first, last):
    return score if (column >= first) & (column <= last) else NEG_INF


@cache
def make_mask_scores(m_tiles, n_tiles):
    """mask_scores(s_acc, row, column, end, mask, pack)

    As `tiles.scores.make_mask_scores`; `pack` consecutive rows stand at the same place.
    """
    rows, tiles = 2 * m_tiles, m_tiles * n_tiles

    @device_function
    def mask_scores(s_acc, row, column, end, mask, pack):
        # The columns that each row sees, from this thread's first column on.
        firsts = cuda.local.array(rows, i32)
        lasts = cuda.local.array(rows, i32)
        for r in range(rows):
            token = token_of_row(row + ROW_STEP * r, pack)
            firsts[r] = i32(token + mask.lo - column)
            lasts[r] = i32(min(token + mask.hi, end - 1) - column)
        for tile in range(tiles):
            i, r, c = 4 * tile, tile // n_tiles * 2, tile % n_tiles * MMA_COLUMNS
            s_acc[i] = _masked(s_acc[i], c, firsts[r], lasts[r])
            s_acc[i + 1] = _masked(s_acc[i + 1], c + 1, firsts[r], lasts[r])
            s_acc[i + 2] = _masked(s_acc[i + 2], c, firsts[r + 1], lasts[r + 1])
            s_acc[i + 3] = _masked(s_acc[i + 3], c + 1, firsts[r + 1], lasts[r + 1])

    return mask_scores


@cache
def make_mask_rows(m_tiles, n_tiles):
    """mask_rows(s_acc, row, end): the scores of rows from `end` on become -inf.

    Where rows are keys whose scores meet in a sum over them, as in dQ: K is zero there, but the P
    of a zero may be as large as lse makes it, and 0 * inf is NaN.
    """
    tiles = m_tiles * n_tiles

    @device_function
    def mask_rows(s_acc, row, end):
        for tile in range(tiles):
            i, r = 4 * tile, row + tile // n_tiles * MMA_ROWS
            s_acc[i] = s_acc[i] if r < end else NEG_INF
            s_acc[i + 1] = s_acc[i + 1] if r < end else NEG_INF
            s_acc[i + 2] = s_acc[i + 2] if r + ROW_STEP < end else NEG_INF
            s_acc[i + 3] = s_acc[i + 3] if r + ROW_STEP < end else NEG_INF

    return mask_rows


@cache
def make_apply_functions(m_tiles, n_tiles, traits, by_row, keeps_slopes, after_features=False):
    """apply_functions(s_acc, slopes, corner, scale, scores, args)

    As `tiles.scores.make_apply_functions`, with `scale` for that of `scores`; products stay
    unscaled where no function shapes scores.

    Places that index arrays stop at the ends of sequences only in tiles that reach there: between
    them the compiler has one address for a row, and the distances of columns in the instructions.
    Where two neighbouring keys of a thread are read at once, queries always stop: there are few.
    """
    indexes, of_slopes = traits.program_indexes, (keeps_slopes, after_features)
    of_pairs = by_row and (make_score_of_pair(traits), make_keep_of_pair(traits)) != (None, None)
    always = indexes & {"i"} if of_pairs else frozenset()
    inside = _make_apply_functions(m_tiles, n_tiles, traits, by_row, always, *of_slopes)
    if not indexes:
        return inside
    at_ends = _make_apply_functions(m_tiles, n_tiles, traits, by_row, indexes, *of_slopes)
    last_row = (m_tiles - 1) * MMA_ROWS + ROW_STEP
    last_column = (n_tiles - 1) * MMA_COLUMNS + 1
    last_i, last_j = (last_row, last_column) if by_row else (last_column, last_row)
    has_i, has_j = "i" in indexes - always, "j" in indexes

    @device_function
    def apply_functions(s_acc, slopes, corner, scale, scores, args):
        i, j = (corner.row, corner.column) if by_row else (corner.column, corner.row)
        is_inside = True
        if has_i:
            is_inside = i + last_i < corner.sequence.seqlen_q
        if has_j:
            is_inside &= j + last_j < corner.sequence.seqlen_k
        if is_inside:
            inside(s_acc, slopes, corner, scale, scores, args)
        else:
            at_ends(s_acc, slopes, corner, scale, scores, args)

    return apply_functions


def _make_apply_functions(m_tiles, n_tiles, traits, by_row, stopped, keeps_slopes, after_features):
    shapes, has_keep = traits.shapes_scores, traits.keeps_scores
    of_tile = m_tiles, n_tiles, traits, by_row, stopped
    scale_scores = _make_scale_scores(*of_tile, keeps_slopes, after_features)
    keep_scores = _make_keep_scores(*of_tile)

    @device_function
    def apply_functions(s_acc, slopes, corner, scale, scores, args):
        if shapes:
            scale_scores(s_acc, slopes, corner, scale, scores, args)
        if has_keep and not corner.is_full:
            keep_scores(s_acc, corner, scores, args)

    return apply_functions


@cache
def _make_pair_at(stopped):
    """pair_at(corner, r, c, scores): (i, `Pair`) of the score r rows and c columns from a corner.

    And of the one right of it. Rows are queries; the columns of a thread, and the first of a tile,
    are even. Places are as in `tiles.scores.make_place`.
    """
    at_end, place, stopped_place = (
        "j" in stopped,
        *(make_place(True, frozenset(each)) for each in (stopped - {"j"}, stopped)),
    )

    @device_function
    def pair_at(corner, r, c, scores):
        i, j = place(corner, r, c, scores)
        key, step = i32(corner.column + scores.given.column), i64(c)
        step_right = f32(c + 1 - r)
        if not at_end:
            return i, Pair(key, step, j, i32(j + 1), i32(2), step_right)
        _, j = stopped_place(corner, r, c, scores)
        _, j_right = stopped_place(corner, r, c + 1, scores)
        left = i32(corner.sequence.seqlen_k - corner.column - c)
        return i, Pair(key, step, j, j_right, left, step_right)

    return pair_at


def _make_scale_scores(m_tiles, n_tiles, traits, by_row, stopped, keeps_slopes, after_features):
    tiles, score = m_tiles * n_tiles, make_score(traits, after_features)
    place_of_score = make_place_of_score(traits, by_row, stopped)
    distance = make_distance(traits, by_row)
    of_pair = make_score_of_pair(traits, after_features) if by_row else None
    pair_at = _make_pair_at(stopped)

    @device_function
    def scale_one(s_acc, slopes, e, at, scale, args):
        s, slope = score(s_acc[e] * scale, at, args)
        if keeps_slopes:
            slopes[e] = slope
        s_acc[e] = s

    @device_function
    def scale_pair(s_acc, slopes, e, r, c, corner, first, far, scale, scores, args):
        i, pair = pair_at(corner, r, c, scores)
        at = At(first, far, f32(c - r), i, pair.j)
        s, slope, right, slope_right = of_pair(s_acc[e], s_acc[e + 1], scale, at, pair, args)
        if keeps_slopes:
            slopes[e] = slope
            slopes[e + 1] = slope_right
        s_acc[e] = s
        s_acc[e + 1] = right

    @device_function
    def scale_tile_of_pairs(tile, s_acc, slopes, *rest):
        e, r, c = 4 * tile, tile // n_tiles * MMA_ROWS, tile % n_tiles * MMA_COLUMNS
        scale_pair(s_acc, slopes, e, r, c, *rest)
        scale_pair(s_acc, slopes, e + 2, r + ROW_STEP, c, *rest)

    @device_function
    def scale_without_places(s_acc, slopes, corner, scale, scores, args):
        for e in range(4 * tiles):
            scale_one(s_acc, slopes, e, At(f32(0), f32(0), f32(0), i32(0), i32(0)), scale, args)

    @device_function
    def scale_tile(tile, s_acc, slopes, corner, first, far, scale, scores, args):
        """One product of 16 x 8: four scores of a thread."""
        # All that is known of a distance is in step, one number for the compiler.
        e, r, c = 4 * tile, tile // n_tiles * MMA_ROWS, tile % n_tiles * MMA_COLUMNS
        right, below = f32(1 if by_row else -1), f32(-ROW_STEP if by_row else ROW_STEP)
        step = f32(c - r if by_row else r - c)
        i, j = place_of_score(corner, r, c, scores)
        scale_one(s_acc, slopes, e, At(first, far, step, i, j), scale, args)
        i, j = place_of_score(corner, r, c + 1, scores)
        scale_one(s_acc, slopes, e + 1, At(first, far, step + right, i, j), scale, args)
        i, j = place_of_score(corner, r + ROW_STEP, c, scores)
        scale_one(s_acc, slopes, e + 2, At(first, far, step + below, i, j), scale, args)
        i, j = place_of_score(corner, r + ROW_STEP, c + 1, scores)
        scale_one(s_acc, slopes, e + 3, At(first, far, step + below + right, i, j), scale, args)

    # A function of the caller's may be long: the compiler would leave the loop as it is.
    body = scale_tile if of_pair is None else scale_tile_of_pairs
    scale_tiles = make_unrolled(body, tiles) if traits.program_scores else None

    @device_function
    def scale_scores(s_acc, slopes, corner, scale, scores, args):
        row, column = corner.row, corner.column
        shift = i32(scores.shift + corner.sequence.shift)
        first = f32(i32(row + shift - column if by_row else column + shift - row))
        far = distance(corner, scores)
        if scale_tiles is not None:
            scale_tiles(i32(0), s_acc, slopes, corner, first, far, scale, scores, args)
        else:
            for tile in range(tiles):
                scale_tile(tile, s_acc, slopes, corner, first, far, scale, scores, args)

    # Without places Blackwell's compiler unrolls a loop over scores, but not one over products.
    return scale_scores if has_places(traits) else scale_without_places


def _make_keep_scores(m_tiles, n_tiles, traits, by_row, stopped):
    tiles, keep, place = m_tiles * n_tiles, make_keep(traits), make_place(by_row, stopped)
    distance = make_distance(traits, by_row)

    @device_function
    def keep_one(s_acc, e, corner, far, r, c, scores, args):
        i, j = place(corner, r, c, scores)
        step = f32(c - r if by_row else r - c)
        is_kept = keep(At(f32(0), far, step, i, j), args)
        s_acc[e] = s_acc[e] if is_kept else NEG_INF

    @device_function
    def keep_tile(tile, s_acc, corner, far, scores, args):
        e, r, c = 4 * tile, tile // n_tiles * MMA_ROWS, tile % n_tiles * MMA_COLUMNS
        keep_one(s_acc, e, corner, far, r, c, scores, args)
        keep_one(s_acc, e + 1, corner, far, r, c + 1, scores, args)
        keep_one(s_acc, e + 2, corner, far, r + ROW_STEP, c, scores, args)
        keep_one(s_acc, e + 3, corner, far, r + ROW_STEP, c + 1, scores, args)

    of_pair, pair_at = make_keep_of_pair(traits) if by_row else None, _make_pair_at(stopped)

    @device_function
    def keep_pair(s_acc, e, r, c, corner, scores, args):
        is_kept, is_right_kept = of_pair(*pair_at(corner, r, c, scores), args)
        s_acc[e] = s_acc[e] if is_kept else NEG_INF
        s_acc[e + 1] = s_acc[e + 1] if is_right_kept else NEG_INF

    @device_function
    def keep_tile_of_pairs(tile, s_acc, corner, far, scores, args):
        e, r, c = 4 * tile, tile // n_tiles * MMA_ROWS, tile % n_tiles * MMA_COLUMNS
        keep_pair(s_acc, e, r, c, corner, scores, args)
        keep_pair(s_acc, e + 2, r + ROW_STEP, c, corner, scores, args)

    keep_tiles = make_unrolled(keep_tile if of_pair is None else keep_tile_of_pairs, tiles)

    @device_function
    def keep_scores(s_acc, corner, scores, args):
        keep_tiles(i32(0), s_acc, corner, distance(corner, scores), scores, args)

    return keep_scores
