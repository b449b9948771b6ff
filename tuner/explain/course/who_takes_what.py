"""Lesson 5: which block takes what, in FlashAttention-1, in -2, and with split keys."""

import numpy as np

import numflash

from ...drawing.axes import chart
from ...drawing.figures import Figure, Table
from ...drawing.markup import escaped, joined
from ...space.machines import find
from .lesson import Check, Lesson, Slip, Step
from .looking import TENSOR_CORES, matrix, rows
from .matrices import ROW, cells, named

_GPU = "NVIDIA A100-SXM4-80GB"
_HEADS, _D = 16, 128
_KEYS = 65536
_PARTS = 4


def lesson() -> Lesson:
    """Blocks of FlashAttention-1, FlashAttention-2 and split keys."""
    num_sms = find(_GPU).num_sms
    prompt = _blocks(_KEYS // 4, _KEYS // 4)
    decode = _blocks(1, _KEYS)
    config, geometry = decode.forward.config, decode.geometry
    tile_m = prompt.forward.config.tile_m
    whole, split, joined_by_hand = _run()
    difference = float(np.abs(whole - split).max())
    return Lesson(
        5,
        "Who takes what: FlashAttention-1, -2, and split keys",
        "FlashAttention-2 is said to be more parallel. What exactly is shared out, and to whom?",
        (
            Step(
                "Three ways to deal out a score matrix",
                f"{_HEADS} heads and one sequence of {_KEYS // 4:,} tokens, on {num_sms} SMs. "
                "FlashAttention-1 gives a block a whole head: "
                f"{_HEADS} blocks, so {num_sms - _HEADS} SMs have nothing to do. FlashAttention-2 "
                f"also cuts the queries: tiles of {tile_m} make {prompt.geometry.blocks:,} "
                "blocks. No block needs another's result, because each row of the softmax is in "
                "one block.",
                "counted",
                Table(
                    ("", "blocks", "SMs at work"),
                    [
                        ("a block per head", _HEADS, min(_HEADS, num_sms)),
                        ("and per tile of queries", f"{prompt.geometry.blocks:,}", num_sms),
                        ("one query: per head", _HEADS, min(_HEADS, num_sms)),
                        ("one query: keys split", geometry.blocks, num_sms),
                    ],
                    (1, 2),
                ),
            ),
            Step(
                "One query, many keys",
                "While text is generated there is one query a head, and nothing to cut but its "
                f"keys. For {_KEYS:,} keys we choose `{config}`: {geometry.num_splits} parts a "
                f"head, {geometry.blocks} blocks. Each part gives an O and an lse, and a second "
                "kernel joins them, as in lesson 2. This is split-KV, or Flash-Decoding.",
                "counted",
            ),
            Step(
                "The result is the same",
                f"The same call in the simulator, once as `{TENSOR_CORES}` and once with "
                f"`x{_PARTS}`, {_PARTS} parts of the keys: the largest difference is "
                f"{difference:.1e}. Four calls over a quarter of the keys each, joined by "
                "`merge_partials`, give it too.",
                "kernel",
            ),
        ),
        (
            Slip(
                "FlashAttention-1 splits queries, FlashAttention-2 splits keys.",
                "FlashAttention-1: a block for each batch entry and head. -2: also for each tile "
                "of queries. The keys of one query are split only by split-KV.",
            ),
            Slip(
                "A block is one query.",
                "Tensor cores multiply 16 rows at least; a block has 16 to 192 queries here. "
                "With one query 15 of 16 rows are empty, unless heads that share K and V fill "
                "them.",
            ),
        ),
        (
            Check.equal("Decoding splits the keys", geometry.num_splits > 1, True),
            Check.equal(
                "Blocks are heads times parts", geometry.blocks, _HEADS * geometry.num_splits
            ),
            Check.equal(
                "Blocks are heads times tiles of queries",
                prompt.geometry.blocks,
                _HEADS * -(-_KEYS // 4 // tile_m),
            ),
            Check.equal("and no keys are split there", prompt.geometry.num_splits, 1),
            Check.close("Split keys give the same O", split, whole, 1e-3),
            Check.close("So do parts that are joined", joined_by_hand, whole, 1e-3),
        ),
        (_figure(),),
    )


def _blocks(queries: int, keys: int) -> numflash.Explanation:
    """What a call of these sizes runs; only shapes are looked at."""
    q, k = (np.empty((1, n, _HEADS, _D), np.float16) for n in (queries, keys))
    return numflash.explain_dispatch(q, k, k, arch=_GPU)


def _run() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """O of one query: unsplit, split by the kernel, split by us and joined."""
    random, n = np.random.default_rng(4), 64
    q = rows(random.standard_normal((1, 16)), np.float16)
    k, v = (rows(random.standard_normal((n, 16)), np.float16) for _ in "kv")
    whole = numflash.attention(q, k, v, config=TENSOR_CORES)
    split = numflash.attention(q, k, v, config=f"{TENSOR_CORES}x{_PARTS}")
    parts = [slice(i, i + n // _PARTS) for i in range(0, n, n // _PARTS)]
    outs, lses = zip(
        *(
            numflash.attention(q, k[:, part], v[:, part], config=TENSOR_CORES, return_lse=True)
            for part in parts
        ),
        strict=True,
    )
    return matrix(whole), matrix(split), matrix(numflash.merge_partials(outs, lses)[0])


_ROLES = ("s", "pv", "copy", "exp")
_WIDTH = 23.0


def _figure() -> Figure:
    ways = {
        "FA-1": lambda i, j: 0,
        "FA-2": lambda i, j: i,
        "split": lambda i, j: j,
    }
    parts, x, y = [], 6.0, 24.0
    for name, owner in ways.items():
        count = 1 if name == "split" else 4
        shown = [[str(owner(i, j)) for j in range(4)] for i in range(count)]
        parts.append(named(name, x, y, 4, _WIDTH))
        parts.append(
            cells(
                shown,
                x,
                y,
                lambda i, j, owner=owner: _ROLES[owner(i, j)],
                lambda i, j, owner=owner: f"query tile {i}, key tile {j}: block {owner(i, j)}",
                _WIDTH,
            )
        )
        x += 4 * _WIDTH + 26
    return Figure(
        "The tiles of one head, and the block that takes each",
        escaped(
            "Rows are tiles of queries, columns tiles of keys; the number is the block. "
            "With split keys there is one row of tiles, a single query."
        ),
        chart(
            "FlashAttention-1 gives all tiles of a head to one block, FlashAttention-2 a row of "
            "tiles, split keys a column.",
            joined(parts),
            height=y + 4 * ROW + 6,
        ),
        Table(
            ("", "block of query tile i, key tile j"),
            [
                ("FlashAttention-1", "0: one for the head"),
                ("FlashAttention-2", "i: one for each tile of queries"),
                ("split keys", "j: one for each part of the keys"),
            ],
        ),
    )
