"""Work of a warp for a tile, and of a block once, by formula, before anything is compiled.

The formulas follow the kernels' docstrings: products and operands exactly, softmax by instructions
a score, copies by instructions a load. `complete` puts the same together from machine code.
"""

from dataclasses import dataclass, replace

from numflash.configs import Config, MmaConfig, Traits, implementation_of

from ..space.machines import Machine
from .machine_code import Counts, Loop

_WARP = 32
_VECTOR_BYTES = 16
_LOAD_BYTES = _WARP * _VECTOR_BYTES
# Multiply-adds of one instruction.
_MMA = {"sm80": 16 * 8 * 16, "sm75": 16 * 8 * 8, "tf32": 16 * 8 * 8, "e4m3": 16 * 8 * 32}
# Instructions beside each 16-byte copy to shared memory, for its address and bounds: in the
# docstring of `kernels.mma.forward`; in the portable kernels, which also convert, by disassembly.
_COPY_FMA, _COPY_ALU = 2, 5
_PORTABLE_COPY_FMA, _PORTABLE_COPY_ALU = 9, 8
# Instructions a score of the features, by disassembly.
_OF_FEATURES = {
    "softcap": Counts(issued=16, special=2, fma=10, alu=4),
    "alibi": Counts(issued=4, fma=2, alu=2),
    "dropout": Counts(issued=10, fma=2, alu=8),
}
_OF_BFLOAT16 = {"softcap": Counts(issued=3, special=1, fma=2)}
# 8-bit floats: conversions of a product of e4m3 where there is no such instruction; of a row, the
# unit and the weight of its share; of two scores, P as e4m3 in float16, less the conversion that
# 16 bits have; of four codes, as float16; of a copy of 16 through registers, its addresses; of a
# score, the scales of its key. All by disassembly.
_CONVERSIONS_OF_PRODUCT, _WORDS_OF_A_COPY = 12, 4
_OF_A_ROW = Counts(fma=8, alu=6, shared=4)
_OF_A_COPY = Counts(fma=15, alu=13)
_ROUNDED = {
    "sm89": Counts(conversions=1),
    "sm80": Counts(fma=4, alu=4),
    "sm75": Counts(fma=6, alu=6),
}
_DECODED = {
    "sm89": Counts(conversions=2, alu=1),
    "sm80": Counts(fma=2, alu=9),
    "sm75": Counts(fma=2, alu=9),
}
_OF_A_KEY = Counts(fma=3, alu=2, shared=0.85, shared_bytes=0.75 * 8 * _WARP)
# (fma, alu) for the addresses and bounds of a tile, by disassembly.
_ADDRESSES = {
    "forward": (10, 70),
    "backward-dq": (20, 70),
    "backward-dkdv": (30, 55),
    "backward": (90, 140),
}
_PORTABLE_ADDRESSES = (230, 250)
# A masked score takes two comparisons and a selection.
_MASK_ALU = 3
# A loop's counter, stages and branches; the indices of a block; storing one output.
_LOOP_CONTROL, _BLOCK_CONTROL, _STORE = 50, 600, 8
_CODE_EXECUTED = 0.5
"""Share of the code outside loops that a warp executes: alternatives exclude each other, such as
aligned and unaligned stores, and slow paths of divisions. Assumed."""


@dataclass(frozen=True)
class Work:
    """Work of the warps of a block.

    Attributes:
        tile: by one warp, for each tile.
        rare: by one warp, more for a tile that an edge crosses.
        once: by one warp, before and after its walk over tiles.
        steps: multiplications that wait for each other, for each tile.
        products: matrix products that follow each other, for each tile.
        loads: copies in a row that a thread waits for, for each tile; 0 if they are asynchronous.
        phases: of a tile, between which asynchronous copies are fetched.
    """

    tile: Counts
    rare: Counts
    once: Counts
    steps: int
    products: int
    loads: float
    phases: int


def by_formula(config: Config, traits: Traits) -> Work:
    """The counts of a tiled kernel."""
    of_kind = _mma if implementation_of(config).has_tensor_cores else _portable
    return of_kind(config, traits)


def on_machine(machine: Machine, config: Config, traits: Traits) -> Work:
    """The same on a GPU: where `mma.sync` of e4m3 is no instruction, float16 is multiplied."""
    work = by_formula(config, traits)
    tile = work.tile
    if not tile.multiply_adds_e4m3 or machine.mma_e4m3:
        return work
    # A product becomes conversions of its operands and two products.
    converted = _CONVERSIONS_OF_PRODUCT * tile.matrix
    tile = replace(
        tile,
        issued=tile.issued + converted + tile.matrix,
        matrix=2 * tile.matrix,
        multiply_adds=tile.multiply_adds + tile.multiply_adds_e4m3,
        multiply_adds_e4m3=0,
        conversions=tile.conversions + converted,
    )
    return replace(work, tile=tile)


def complete(work: Work, loop: Loop, outside: Counts) -> Work:
    """The same from machine code: `work` tells how often its inner loops turn.

    Args:
        work: by formula, of the same kernel.
        loop: the kernel's loop over tiles.
        outside: the instructions in no loop.
    """
    tile, wanted = loop.counts, work.tile
    leaves = [inner for top in loop.inner for inner in top.walk() if not inner.inner]
    products = [leaf.counts for leaf in leaves if leaf.counts.matrix]
    if not wanted.matrix:
        products = [leaf.counts for leaf in leaves if leaf.counts.ffma]
    copies = [leaf.counts for leaf in leaves if leaf.counts.global_bytes]
    tile = _turned(tile, products, "matrix" if wanted.matrix else "ffma", wanted)
    tile = _turned(tile, copies, "global_bytes", wanted)
    once = replace(work.once, issued=_CODE_EXECUTED * outside.issued)
    return replace(work, tile=tile, rare=loop.rare, once=once)


def _turned(tile: Counts, loops: list[Counts], kind: str, wanted: Counts) -> Counts:
    """`tile` and as many turns of its inner loops as bring `kind` to the number by formula."""
    each = sum(getattr(counts, kind) for counts in loops)
    missing = getattr(wanted, kind) - getattr(tile, kind)
    turns = max(0.0, missing / each) if each else 0.0
    for counts in loops:
        tile = tile.plus(counts, turns)
    return tile


def _mma(config: MmaConfig, traits: Traits) -> Work:
    """Of a kernel for tensor cores: products by operands, in bytes of shared memory."""
    size = config.operand_bytes if traits.fp8 else traits.dtype_bytes
    family, of_codes = config.family, traits.fp8 and config.multiplies_codes
    d, dv, warps = traits.head_dim, traits.head_dim_v, config.num_warps
    rows, columns = 16 * config.m_tiles, config.column_tile
    scores = rows * columns // _WARP
    # Rows stay, columns are walked over: operands of S (and dP), and of the sums over them.
    row_bytes, column_bytes = rows * d * size, columns * (d + dv) * size
    if family == "forward":
        multiply_adds, products, depth = rows * columns * (d + dv), 2, d + columns
        loads = row_bytes + column_bytes
        kinds = Counts(special=scores, exponentials=scores, fma=2 * scores, alu=scores)
        outputs, phases, shuffles = rows * dv // _WARP, 2, 4 * config.m_tiles
        # Of each score its exponent; of each row of a thread whether it grows.
        ffma = scores + 2 * config.m_tiles
        converted = scores // 2
    else:
        row_bytes += rows * dv * size
        kinds = Counts(special=scores, exponentials=scores, fma=3 * scores)
        phases, shuffles, converted = 1, 0, scores
        ffma = 2 * scores
        if family == "backward-dq":
            multiply_adds, products = rows * columns * (2 * d + dv), 3
            loads = row_bytes + column_bytes + columns * d * size
            outputs, converted = rows * d // _WARP, scores // 2
        else:
            multiply_adds, products = rows * columns * 2 * (d + dv), 4
            loads = row_bytes + 2 * column_bytes
            outputs = rows * (d + dv) // _WARP
        depth = d + dv + columns * (products - 2)
        if config.apart:
            # Half of the blocks compute S and dV, the others S, dP and dK.
            multiply_adds, loads, outputs = 5 * multiply_adds // 8, 5 * loads // 8, outputs // 2
    extra_global, extra_shared = 0, 0
    if family == "backward":
        products, depth = 5, depth + config.tile_n
        multiply_adds += config.tile_m * config.tile_n * d // warps
        column_warps = warps * 16 // config.tile_m
        loads += (16 + d // column_warps) * config.tile_n * size
        extra_global = 2 * config.tile_m * d * 4 // warps
        extra_shared = scores // 2 * 4 * _WARP
    is_tf32 = traits.tf32
    # Codes that become float16 are half as many bytes in global memory.
    from_global = column_bytes // size if traits.fp8 else column_bytes
    copied = (from_global + (0 if family == "forward" else 8 * columns)) // warps
    by_vectors = traits.vectorized or traits.fp8
    copies = -(-from_global // warps // (_LOAD_BYTES if by_vectors else _WARP * size))
    asynchronous = of_codes if traits.fp8 else config.generation != "sm75" and traits.vectorized
    statistics = 0 if family in ("forward", "backward-dq") else columns // 4
    shared_loads = loads // _LOAD_BYTES + statistics + extra_shared // (4 * _WARP)
    # A tf32 operand is rounded when it is loaded, and V cannot be loaded transposed.
    rounded = loads // (4 * _WARP) if is_tf32 else 0
    if is_tf32:
        shared_loads += 3 * columns * dv * size // _LOAD_BYTES
    elements = "tf32" if is_tf32 else "e4m3" if of_codes else _shape_of(config)
    rate = {"tf32": "multiply_adds_tf32", "e4m3": "multiply_adds_e4m3"}
    tile = Counts(
        **{rate.get(elements, "multiply_adds"): multiply_adds},
        matrix=multiply_adds // _MMA[elements],
        special=kinds.special,
        exponentials=kinds.exponentials,
        fma=kinds.fma + _COPY_FMA * copies + rounded,
        ffma=ffma,
        alu=kinds.alu + _COPY_ALU * copies + rounded,
        conversions=0 if is_tf32 else converted,
        shared=shared_loads + (0 if asynchronous else copies),
        shared_bytes=loads
        + statistics * 8 * _WARP
        + extra_shared
        + (0 if asynchronous else copied),
        global_bytes=copied + extra_global,
        global_loads=(0 if asynchronous else copies) + extra_global // 2 // _LOAD_BYTES,
        shuffles=shuffles,
        barriers=2 if config.num_stages == 1 or family in ("forward", "backward") else 1,
    )
    if traits.fp8:
        tile += _of_8_bits(config, traits, scores, outputs, copies)
    tile = _with_issued(tile, _ADDRESSES[family], copies if asynchronous else 0)
    tile = _with_features(tile, traits, scores)
    blocking = 0.0 if asynchronous else float(phases)
    return Work(
        tile,
        Counts(issued=_MASK_ALU * scores, alu=_MASK_ALU * scores),
        _once(config, traits, rows, outputs),
        depth // {"tf32": 8, "e4m3": 32}.get(elements, 16),
        products,
        blocking,
        phases,
    )


def _shape_of(config: MmaConfig) -> str:
    """The generation whose products of 16 bits a config has."""
    return "sm75" if config.generation == "sm75" else "sm80"


def _of_8_bits(
    config: MmaConfig, traits: Traits, scores: int, outputs: int, copies: int
) -> Counts:
    """What the forward on 8-bit floats adds to that on 16 bits, for a tile, by disassembly.

    O's share of a tile is added with its weight. Where codes are multiplied as float16, P is
    rounded to e4m3, and a thread decodes the codes that it copies.
    """
    rows = 2 * config.m_tiles
    added = Counts(special=rows, exponentials=rows, fma=outputs, ffma=outputs, global_loads=2)
    added = added.plus(_OF_A_ROW, rows)
    if not config.multiplies_codes:
        added = added.plus(_ROUNDED[config.generation], scores / 2)
        added = added.plus(_DECODED[config.generation], _WORDS_OF_A_COPY * copies)
        # Stores of twice the bytes.
        added = added.plus(_OF_A_COPY, copies)
        added += Counts(shared=copies, shared_bytes=_LOAD_BYTES * copies)
    return added.plus(_OF_A_KEY, scores) if traits.key_scales else added


def _portable(config: Config, traits: Traits) -> Work:
    """Of a portable kernel: one FFMA a term, each 16-byte load feeds a row or column of them."""
    d, dv, warps, size = traits.head_dim, traits.head_dim_v, config.num_warps, traits.dtype_bytes
    rows, columns = config.row_tile // (4 * warps), config.column_tile // 8
    scores, depth = rows * columns, config.column_tile
    score_products = [d] if config.family == "forward" else [d, dv]
    outputs = {"forward": [dv], "backward-dq": [d], "backward-dkdv": [dv, d]}[config.family]
    ffma = sum(scores * k for k in score_products) + sum(rows * n // 8 * depth for n in outputs)
    loads = sum((rows + columns) * k // 4 for k in score_products)
    loads += sum((rows + n // 8) * depth // 4 for n in outputs)
    written = len(outputs) * scores
    copied = config.column_tile * (d + dv) * size // warps
    copies = -(-copied // (_LOAD_BYTES if traits.vectorized else _WARP * size))
    stored = -(-config.column_tile * (d + dv) * 4 // warps // _LOAD_BYTES)
    softmax_fma = 4 * scores + rows * dv // 8 if config.family == "forward" else 5 * scores
    tile = Counts(
        special=scores,
        exponentials=scores,
        fma=ffma + softmax_fma + _PORTABLE_COPY_FMA * copies,
        ffma=ffma,
        alu=(2 if config.family == "forward" else 1) * scores + _PORTABLE_COPY_ALU * copies,
        shared=loads + written + stored,
        shared_bytes=_LOAD_BYTES * (loads + stored) + 4 * _WARP * written,
        global_bytes=copied,
        global_loads=copies,
        shuffles=3 * rows if config.family == "forward" else 0,
        barriers=2,
    )
    tile = _with_features(_with_issued(tile, _PORTABLE_ADDRESSES, 0), traits, scores)
    steps = (sum(score_products) + len(outputs) * depth) // 4
    # Four loads are in flight at a time.
    blocking = max(2.0, copies / 4)
    return Work(
        tile,
        Counts(issued=_MASK_ALU * scores, alu=_MASK_ALU * scores),
        _once(config, traits, 4 * rows, rows * sum(outputs) // 8),
        steps,
        len(score_products) + len(outputs),
        blocking,
        1,
    )


def _with_issued(tile: Counts, addresses: tuple[int, int], asynchronous_copies: int) -> Counts:
    """Add the instructions for addresses, and the sum of all."""
    fma, alu = addresses
    tile.fma, tile.alu = tile.fma + fma, tile.alu + alu
    kinds = ("matrix", "special", "fma", "alu", "conversions", "shared", "shuffles", "barriers")
    issued = sum(getattr(tile, kind) for kind in kinds) + tile.global_loads + asynchronous_copies
    tile.issued = issued + _LOOP_CONTROL
    return tile


def _with_features(tile: Counts, traits: Traits, scores: int) -> Counts:
    return tile.plus(feature_counts(traits), scores)


def feature_counts(traits: Traits) -> Counts:
    """Instructions that features add to each score."""
    of_features, added = _OF_FEATURES, Counts()
    if traits.dtype == "bfloat16":
        of_features = _OF_FEATURES | _OF_BFLOAT16
    for name in traits.features:
        added = added.plus(of_features.get(name, Counts()), 1)
    return added


def _once(config: Config, traits: Traits, rows: int, outputs: int) -> Counts:
    """Loading the rows that stay, and storing the outputs, by one warp."""
    columns = (
        traits.head_dim if config.family == "forward" else traits.head_dim + traits.head_dim_v
    )
    loaded = rows * columns * traits.dtype_bytes
    stored = outputs * _WARP * (4 if getattr(config, "num_splits", 1) > 1 else traits.dtype_bytes)
    return Counts(
        issued=_BLOCK_CONTROL + _STORE * outputs + 8 * loaded // _LOAD_BYTES,
        shared_bytes=loaded,
        global_bytes=loaded + stored,
    )
