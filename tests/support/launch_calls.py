"""Random calls, small and odd, on arrays without content: whose launches a driver must accept."""

from collections.abc import Callable
from contextlib import suppress
from random import Random

import numpy as np

import numflash
from tests.support.launch_limits import claimed

CONFIGS = {
    "sm_75": ("m16n8w2", "sm75-m32n16w2s1", "sm75-m32n16w2s1x3"),
    "sm_80": ("m16n16w2", "sm80-m32n16w2s2", "sm80-m16n16w1s3x4", "sm80-m64n64w4s1x2"),
    "sm_89": ("m16n16w2", "sm80-m32n16w2s2", "sm80-m16n16w1s3x4"),
    "sm_90a": (
        "sm80-m32n16w2s2x3",
        "sm90-m64n64w4s2",
        "sm90-m64n64w4s2x5",
        "sm90-m64n64w4s1x2-packed-persistent",
        "sm90-m64n32w4s2-overlap-persistent",
        "sm90-m64n64w4s2-c2-overlap",
    ),
}
GRADIENTS = {
    "sm_75": ({"backward-dq": "sm75-m16n16w1s1", "backward-dkdv": "sm75-m16n16w1s1-apart"},),
    "sm_80": (
        {"backward-dq": "sm80-m16n32w1s3", "backward-dkdv": "sm80-m16n32w1s3-apart"},
        {"backward": "sm80-m32n64w4s1x2"},
    ),
    "sm_89": ({"backward-dq": "m8n8w1", "backward-dkdv": "m16n8w1"},),
    "sm_90a": (
        {"backward-dq": "sm90-m64n16w4s2", "backward-dkdv": "sm90-m32n64w4s2"},
        {"backward": "sm90-m64n64w4s2"},
        {"backward": "sm90-m64n64w4s2-persistent"},
    ),
}
"""Configs of gradients in two kernels, or in one."""
_LENGTHS = 0, 0, 1, 2, 7, 16, 63, 64, 65, 129, 500, 4096, 70_001
_HEADS = (1, 1), (2, 1), (4, 4), (6, 2), (16, 1), (40, 8)
_DIMS = (16, 16), (64, 64), (128, 128), (128, 64), (72, 8), (192, 128), (256, 256), (1, 5)


def _later(b, h, i, j):
    return j >= i


def _halved(score, b, h, i, j):
    return score * 0.5


def _options(rng: Random, heads: int) -> dict:
    """Of every forward."""
    found = {}
    for probability, name, make in (
        (0.5, "causal", lambda: True),
        (0.2, "causal_align", lambda: "top_left"),
        (0.2, "window_size", lambda: (rng.randrange(9), rng.choice([-1, 0, 9]))),
        # Beyond all keys, or before them: tiles see none.
        (0.1, "shift", lambda: rng.choice([-100_000, 100_000])),
        (0.1, "softcap", lambda: 2.0),
        (0.1, "alibi_slopes", lambda: claimed((heads,), "float32")),
        (0.1, "sinks", lambda: claimed((heads,), "float32")),
        (0.1, "dropout_p", lambda: 0.5),
        (0.1, "mask_mod", lambda: _later),
        (0.1, "score_mod", lambda: _halved),
    ):
        if rng.random() < probability:
            found[name] = make()
    if "dropout_p" in found:
        found["seed"] = 7
    return found


def _configs(rng: Random, arch: str) -> tuple[str | None, dict | None]:
    """Of the forward and of gradients."""
    forward = rng.choice(CONFIGS[arch]) if rng.random() < 0.5 else None
    return forward, rng.choice([None, None, rng.choice(GRADIENTS[arch])])


def dense(rng: Random, arch: str) -> None:
    """`attention` of a batch, and its gradients."""
    (heads, heads_kv), (d, dv) = rng.choice(_HEADS), rng.choice(_DIMS)
    batch, sq, sk = rng.choice([0, 1, 1, 3]), rng.choice(_LENGTHS), rng.choice(_LENGTHS)
    dtype = rng.choice(["float16", "float16", "bfloat16", "float32"])
    shapes = (batch, sq, heads, d), (batch, sk, heads_kv, d), (batch, sk, heads_kv, dv)
    q, k, v = (claimed(shape, dtype) for shape in shapes)
    options, (forward, backward) = _options(rng, heads), _configs(rng, arch)
    if rng.random() < 0.2:
        size = rng.choice([16, 64, 128])
        tiles = np.array([[rng.random() < 0.5 for _ in range(-(-sk // size))]] * -(-sq // size))
        if tiles.size and tiles.size < 10_000:
            options["block_mask"] = numflash.BlockMask.from_tiles(tiles, block_size=size)
    out, lse = numflash.attention(q, k, v, return_lse=True, config=forward, **options)
    _gradients(numflash.attention_backward, rng, (out, q, k, v, out, lse), backward, options)


def ragged(rng: Random, arch: str) -> None:
    """Sequences of lengths of their own, packed or padded, and their gradients."""
    (heads, heads_kv), (d, dv) = rng.choice(_HEADS), rng.choice(_DIMS)
    entries, sq, sk = rng.choice([0, 1, 1, 3, 200]), rng.choice(_LENGTHS), rng.choice(_LENGTHS)
    options, (forward, backward) = _options(rng, heads), _configs(rng, arch)
    dtype = rng.choice(["float16", "bfloat16", "float32"])
    is_packed = rng.random() < 0.6
    batch = () if is_packed else (entries,)
    shapes = ((*batch, n, h, e) for n, h, e in ((sq, heads, d), (sk, heads_kv, d)))
    q, k = (claimed(shape, dtype) for shape in shapes)
    v = claimed((*batch, sk, heads_kv, dv), dtype)
    names = ("cu_seqlens_q", "cu_seqlens_k") if is_packed else ("seqlens_q", "seqlens_k")
    given = {name: claimed((entries + is_packed,), "int32") for name in names}
    if not is_packed and rng.random() < 0.5:
        del given["seqlens_q"]
    if rng.random() < 0.3:
        given |= {"starts_k": claimed((entries,), "int32")}
    both = (numflash.attention_varlen, numflash.attention_varlen_backward)
    attend, backward_of = both if is_packed else (numflash.attention, numflash.attention_backward)
    if rng.random() < 0.2:
        options["batch_invariant"] = True
        forward = None
    out, lse = attend(q, k, v, return_lse=True, config=forward, **given, **options)
    options.pop("batch_invariant", None)
    _gradients(backward_of, rng, (out, q, k, v, out, lse), backward, given | options)


def _gradients(function: Callable, rng: Random, arrays: tuple, config, options: dict) -> None:
    if rng.random() < 0.3:
        options["wrt"] = rng.choice([("q",), ("k", "v"), ("v",)])
        config = None
    if "sinks" in options and "wrt" not in options:
        options["wrt"] = ("q", "k", "v", "sinks")
    function(*arrays, config=config, **options)


def cached(rng: Random, arch: str) -> None:
    """New tokens on a cache of keys and values, in entries or in pages, appended or not."""
    (heads, heads_kv), (d, dv) = rng.choice(_HEADS), rng.choice(_DIMS[:6])
    batch, rows = rng.choice([0, 1, 3, 70]), rng.choice([1, 66, 1000, 40_000])
    new = min(rows, rng.choice([0, 1, 1, 4, 130]))
    page = rng.choice([None, None, 1, 16, 64, 256])
    dtype = rng.choice(["float16", "bfloat16"])
    given = {"cache_seqlens": claimed((batch,), "int32"), "causal": rng.random() < 0.7}
    place = (batch, rows)
    if page is not None:
        width = -(-rows // page)
        place = (batch * width, page)
        given["page_table"] = claimed((batch, width), "int32")
    q = claimed((batch, max(new, rng.choice([0, 1, 5])), heads, d), dtype)
    caches = [claimed((*place, heads_kv, e), dtype) for e in (d, dv)]
    tokens = [claimed((batch, new, heads_kv, e), dtype) for e in (d, dv)] if new else []
    if new and d % 2 == 0 and rng.random() < 0.5:
        table = claimed((rows + new, d // 2), "float32")
        given |= {"rotary_cos": table, "rotary_sin": table}
    if rng.random() < 0.3:
        given["cache_leftpad"] = claimed((batch,), "int32")
    given |= rng.choice([{}, {"num_splits": 1}, {"num_splits": 7}, {"batch_invariant": True}])
    if "num_splits" not in given and "batch_invariant" not in given:
        given["config"] = rng.choice([None, *CONFIGS[arch]])
    numflash.attention_with_kvcache(q, *caches, *tokens, return_lse=True, **given)


def others(rng: Random, arch: str) -> None:
    """What is done around attention: parts merged, rows rotated, arrays and calls in 8 bits."""
    heads, d = rng.choice([1, 3, 16]), rng.choice([16, 64, 72, 128, 256])
    batch, rows = rng.choice([0, 1, 3]), rng.choice(_LENGTHS[:-2])
    dtype = rng.choice(["float16", "bfloat16", "float32"])
    x, lse = claimed((batch, rows, heads, d), dtype), claimed((batch, heads, rows), "float32")
    numflash.merge_partials([x] * 3, [lse] * 3)
    numflash.merge_onto(claimed(x.shape, "float32"), claimed(lse.shape, "float32"), x, lse)
    table = claimed((rows + 1, d // 2), "float32")
    numflash.apply_rotary(x, table, table)
    numflash.apply_rotary(x[0] if batch else x[:, :, 0], table, table)
    numflash.rotary_tables(max(rows, 1), d, like=x)
    numflash.create_block_mask(_later, batch or None, heads, rows, rows + 3, like=x)
    granularity = rng.choice(["tensor", "head", "block", "token"])
    numflash.dequantize_fp8(
        numflash.quantize_fp8(x, granularity, transposed=rng.random() < 0.5, hadamard=d >= 64)
    )
    if dtype != "float32":
        k = claimed((batch, rng.choice(_LENGTHS[:-2]), heads, d), dtype)
        precision = rng.choice(["fp8", "auto"])
        numflash.attention(x, k, k, precision=precision, causal=rng.random() < 0.5)


def huge(rng: Random, arch: str) -> None:
    """As `dense` and `ragged`, of as many rows as arrays may have, and more than a grid can."""
    heads, d = rng.choice([1, 64, 2**15]), rng.choice([16, 64])
    batch, rows = 2 ** rng.randrange(32), 2 ** rng.randrange(32)
    if batch * rows * heads > 2**48:
        batch = 1
    forward, backward = _configs(rng, arch)
    if rng.random() < 0.6:
        x, lse = claimed((batch, rows, heads, d)), claimed((batch, heads, rows), "float32")
        given, attend, backward_of = {}, numflash.attention, numflash.attention_backward
    else:
        x, lse = claimed((rows, heads, d)), claimed((heads, rows), "float32")
        ends = claimed((batch + 1,), "int32")
        given = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        attend, backward_of = numflash.attention_varlen, numflash.attention_varlen_backward
    for call in (
        lambda: attend(x, x, x, config=forward, **given),
        lambda: backward_of(x, x, x, x, x, lse, config=backward, **given),
    ):
        with suppress(numflash.UnsupportedError):
            call()


KINDS = (dense, ragged, cached, others, huge)
