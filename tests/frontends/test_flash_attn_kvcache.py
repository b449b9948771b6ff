"""flash-attn's own grid of `test_flash_attn_kvcache`, small, by its own rule of tolerance.

Errors against float64 may be three times those of the same in 16 bits, with ALiBi five times.
Cases in which each two choices meet run with NUMFLASH_TEST_ALL=1.
"""

import math
import random
from itertools import product

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install numflash[torch]")

import numflash.flash_attn as flash_attn  # noqa: E402
from tests.frontends.flash_attn_reference import attend, is_close_enough, rotate  # noqa: E402
from tests.support.covering import ALL, covering  # noqa: E402

AXES = {
    "heads_kv": (4, 1, 2),
    "new_kv": (True, False),
    "alibi": (False, True),
    "local": (False, True),
    "causal": (False, True),
    "seqlen_new_eq_seqlen_q": (True, False),
    "interleaved": (False, True),
    "fraction": (0.0, 0.5, 1.0),
    "page": (None, 4, 7),
    "leftpad": (False, True),
    "batch_idx": (False, True),
    "d": (32, 59),
    "seqlens": ((1, 28), (3, 21), (9, 20), (16, 16)),
    "num_splits": (1, 0, 2),
    "chunk": (0, 5),
    "sink": (False, True),
}
HEADS, BATCH = 4, 2


# Where what `_is_possible` asks for stands.
_ASKED = [
    list(AXES).index(name) for name in ("new_kv", "fraction", "page", "leftpad", "batch_idx")
]


def _is_possible(new_kv, fraction, page, leftpad, batch_idx) -> bool:
    if fraction and not new_kv:
        return False
    return not (page and (leftpad or batch_idx))


def _cases():
    rows = [row for row in product(*AXES.values()) if _is_possible(*(row[n] for n in _ASKED))]
    random.Random(3).shuffle(rows)
    rows = [dict(zip(AXES, row, strict=True)) for row in rows[:400]]

    def labels(row):
        of_rotary = row["fraction"] > 0, row["interleaved"] and row["fraction"] > 0
        return (*row.values(), of_rotary, (row["page"] is None, row["new_kv"]))

    return covering(rows, labels, together=2 if ALL else 1)


def _id(case) -> str:
    return "-".join(str(each).replace(" ", "") for each in case.values())


def _int32(values):
    return torch.as_tensor(values).to(torch.int32)


def _wanted(q, rows, new, lengths, leftpad, rotary, options, dtype):
    """(out, lse, keys with the new ones) of sequences, each by itself, computed in `dtype`.

    `rows`: (batch, rows, heads, d) of each sequence's keys and values, as they were.
    """
    outs, lses, keys = [], [], []
    slopes = options.pop("alibi_slopes", None)
    for n, (length, first) in enumerate(zip(lengths.tolist(), leftpad.tolist(), strict=True)):
        k, v = (x[n, first:length] for x in rows)
        own_q = q[n : n + 1].to(dtype)
        if new is not None:
            k_new, v_new = (x[n : n + 1] for x in new)
            if rotary is not None:
                *tables, interleaved = rotary
                k_new, own_q = (
                    rotate(x.to(dtype), *tables, length + places[None], interleaved)
                    for x, places in (
                        (k_new, torch.arange(k_new.shape[1])),
                        (own_q, torch.arange(q.shape[1]) * options["is_band"]),
                    )
                )
            k, v = (torch.cat([x.to(dtype), y[0].to(dtype)]) for x, y in ((k, k_new), (v, v_new)))
        keys.append(k)
        given = {n: x for n, x in options.items() if n != "is_band"}
        if slopes is not None:
            given["alibi_slopes"] = slopes[n]
        out, lse = attend(own_q, k[None], v[None], dtype=dtype, **given)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses), keys


@pytest.mark.parametrize("case", _cases(), ids=_id)
def test_its_own_grid_by_its_own_rule(case, launched):
    torch.manual_seed(0)
    (seqlen_q, seqlen_k), d, heads_kv = case["seqlens"], case["d"], case["heads_kv"]
    new = seqlen_q if case["seqlen_new_eq_seqlen_q"] else int(torch.randint(1, seqlen_q + 1, ()))
    half = math.floor(int(case["fraction"] * d) / 16) * 8

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float16)

    q, given = normal(BATCH, seqlen_q, HEADS, d), {}
    added = None
    if case["new_kv"]:
        added = normal(2, BATCH, new, heads_kv, d).unbind(0)
        given |= {"k": added[0], "v": added[1]}
    if case["page"]:
        pages = -(-seqlen_k // case["page"])
        caches = normal(2, 3 * pages, case["page"], heads_kv, d).unbind(0)
        table = torch.randperm(3 * pages)[: BATCH * pages].reshape(BATCH, -1)
        given["block_table"] = _int32(table)

        def rows_of(cache):
            return cache[table].flatten(1, 2)
    else:
        caches = normal(2, 4 if case["batch_idx"] else BATCH, seqlen_k, heads_kv, d).unbind(0)
        entries = torch.arange(BATCH)
        if case["batch_idx"]:
            entries = torch.randperm(4)[:BATCH]
            given["cache_batch_idx"] = _int32(entries)

        def rows_of(cache):
            return cache[entries]

    is_band = case["causal"] or case["local"] or bool(case["chunk"])
    # Where q is rotated token by token its positions must be in the tables, too.
    longest = seqlen_q if is_band and half else new
    most = seqlen_k - longest if case["new_kv"] else seqlen_k
    lengths = torch.randint(0 if case["new_kv"] else 1, most + 1, (BATCH,))
    leftpad = torch.zeros(BATCH, dtype=torch.int64)
    if case["leftpad"]:
        leftpad = torch.tensor([int(torch.randint(0, max(int(n), 1), ())) for n in lengths])
        given["cache_leftpad"] = _int32(leftpad)
    options = {"causal": case["causal"], "attention_chunk": case["chunk"]}
    if case["local"]:
        options["window_size"] = torch.randint(0, seqlen_k, (2,))
    if case["alibi"]:
        options["alibi_slopes"] = torch.rand(BATCH, HEADS) * 0.3
    if case["sink"]:
        options["learnable_sink"] = torch.randn(HEADS)
    rotary = None
    if half:
        angles = torch.rand(seqlen_k, half) * 2 * math.pi
        rotary = angles.cos().half(), angles.sin().half(), case["interleaved"]
        given |= {"rotary_cos": rotary[0], "rotary_sin": rotary[1]}
        given["rotary_interleaved"] = case["interleaved"]
    before = [rows_of(x).clone() for x in caches]
    of_reference = q, before, added, lengths, leftpad, rotary
    named = options | {"is_band": is_band}
    exact, exact_lse, keys = _wanted(*of_reference, dict(named), torch.float64)
    rounded, _, _ = _wanted(*of_reference, dict(named), torch.float16)
    out, lse = flash_attn.flash_attn_with_kvcache(
        q,
        *caches,
        cache_seqlens=_int32(lengths),
        num_splits=case["num_splits"],
        return_softmax_lse=True,
        **given,
        **options,
    )
    ran = launched.take()
    assert "forward" in ran
    assert case["num_splits"] != 1 or "combine" not in ran
    assert is_close_enough(out, exact, rounded, 5 if case["alibi"] else 3)
    torch.testing.assert_close(lse, exact_lse.float(), atol=4e-3, rtol=4e-3)
    for n, (length, first) in enumerate(zip(lengths.tolist(), leftpad.tolist(), strict=True)):
        after, count = rows_of(caches[0])[n], length + new * case["new_kv"]
        wanted = before[0][n].double()
        wanted[first:count] = keys[n].double()
        torch.testing.assert_close(after.double(), wanted, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("places", ["entries", "batch_idx", "pages"])
def test_queries_that_lie_one_after_another(places, launched):
    torch.manual_seed(0)
    ends, lengths = _int32([0, 3, 3, 8]), _int32([9, 4, 12])
    q = torch.randn(8, 2, 16)
    k_cache, v_cache = torch.randn(2, 8, 12, 1, 16).unbind(0)
    given, entries = {}, torch.arange(3)
    leftpad = _int32([0, 0, 0])
    if places == "batch_idx":
        entries, leftpad = torch.tensor([5, 2, 7]), _int32([2, 0, 5])
        given = {"cache_batch_idx": _int32(entries), "cache_leftpad": leftpad}
    elif places == "pages":
        entries = torch.tensor([6, 0, 4])
        given = {"page_table": _int32(entries)[:, None]}
    out, lse = flash_attn.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        cache_seqlens=lengths,
        cu_seqlens_q=ends,
        max_seqlen_q=5,
        causal=True,
        attention_chunk=4,
        return_softmax_lse=True,
        **given,
    )
    for n, entry in enumerate(entries.tolist()):
        own, rows = slice(*ends[n : n + 2].tolist()), slice(int(leftpad[n]), int(lengths[n]))
        wanted = attend(
            q[None, own],
            k_cache[None, entry, rows],
            v_cache[None, entry, rows],
            causal=True,
            attention_chunk=4,
        )
        torch.testing.assert_close(out[own].double(), wanted[0][0], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(lse[:, own].double(), wanted[1][0], atol=2e-3, rtol=2e-3)
    assert launched.take() == ["schedule", "forward"]


def test_a_cache_of_codes(launched):
    torch.manual_seed(0)
    q, new = torch.randn(2, 1, 2, 16).half(), torch.randn(2, 2, 1, 2, 16).half()
    codes = torch.randn(2, 2, 12, 2, 16).to(torch.float8_e4m3fn)
    descale, lengths = torch.full((2, 2), 0.5), _int32([4, 7])
    out = flash_attn.flash_attn_with_kvcache(
        q, *codes, *new, cache_seqlens=lengths, k_descale=descale, v_descale=descale
    )
    for n, length in enumerate((5, 8)):
        rows = (x[n : n + 1, :length].double() * 0.5 for x in codes)
        wanted, _ = attend(q[n : n + 1], *rows)
        torch.testing.assert_close(out[n : n + 1].double(), wanted, atol=4e-3, rtol=4e-3)
    assert "forward" in launched.take()


def test_all_rows_of_a_cache_and_one_length_for_all(launched):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 16) for n in (3, 10, 10))
    out = flash_attn.flash_attn_with_kvcache(q, k, v)
    torch.testing.assert_close(out.double(), attend(q, k, v)[0], atol=2e-3, rtol=2e-3)
    out = flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=6, attention_chunk=3)
    wanted, _ = attend(q, k[:, :6], v[:, :6], attention_chunk=3)
    torch.testing.assert_close(out.double(), wanted, atol=2e-3, rtol=2e-3)
    table = _int32([[1], [0]])
    out = flash_attn.flash_attn_with_kvcache(q, k, v, block_table=table)
    wanted, _ = attend(q, k.flip(0), v.flip(0))
    torch.testing.assert_close(out.double(), wanted, atol=2e-3, rtol=2e-3)
    assert launched.families.count("forward") == 3


@pytest.mark.parametrize("num_splits, joins", [(0, True), (2, True), (1, False)])
def test_parts_of_a_sequence(num_splits, joins, launched):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 1, 16).half() for n in (1, 160, 160))
    out = flash_attn.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=_int32([150]), num_splits=num_splits
    )
    torch.testing.assert_close(
        out.double(), attend(q, k[:, :150], v[:, :150])[0], atol=2e-3, rtol=2e-3
    )
    assert ("combine" in launched.take()) == joins
    ends, used = _int32([0, 1]), {"seqused_k": _int32([150]), "num_splits": num_splits}
    packed = flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], ends, 160 * ends, 1, 160, **used)
    torch.testing.assert_close(packed, out[0], atol=2e-3, rtol=2e-3)
    assert ("combine" in launched.take()) == joins
