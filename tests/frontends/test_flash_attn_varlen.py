"""flash-attn's own grid of `test_flash_attn_varlen_output`, small, by its own rule of tolerance.

Padded batches are packed by `unpad_input`, with empty sequences and with rows that are allocated
but not used. Cases in which each two choices meet run with NUMFLASH_TEST_ALL=1.
"""

import random
from itertools import product

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install numflash[torch]")

import numflash.flash_attn as flash_attn  # noqa: E402
from numflash.flash_attn.bert_padding import unpad_input  # noqa: E402
from numflash.reference import dropout_mask  # noqa: E402
from tests.frontends.flash_attn_reference import attend_alone, is_close_enough  # noqa: E402
from tests.support.covering import ALL, covering  # noqa: E402

AXES = {
    "packed": ("kv", None, "qkv"),
    "dtype": (torch.float16, torch.bfloat16),
    "heads_kv": (4, 1, 2),
    "alibi": (False, True),
    "local": (False, True),
    "causal": (False, True),
    "d": (16, 11) if not ALL else (16, 11, 32, 40, 59, 64),
    "seqlens": ((1, 18), (13, 16), (16, 16), (17, 9)),
    "dropout_p": (0.0, 0.17),
    "softcap": (0.0, 2.5),
    "lengths": ("random", "zeros", "unused"),
    "sink": (False, True),
}
HEADS = 4
BATCH = 3


def _is_possible(case) -> bool:
    packs_all = case["packed"] == "qkv"
    alike = case["heads_kv"] == HEADS and case["seqlens"][0] == case["seqlens"][1]
    # Only flash_attn_varlen_func itself has seqused and a sink.
    is_more = case["lengths"] == "unused" or case["sink"]
    return (not packs_all or alike) and not (case["packed"] and is_more)


def _cases():
    rows = [dict(zip(AXES, row, strict=True)) for row in product(*AXES.values())]
    rows = [row for row in rows if _is_possible(row)]
    random.Random(4).shuffle(rows)
    return covering(rows[:400], lambda row: tuple(row.values()), together=2 if ALL else 1)


def _id(case) -> str:
    return "-".join(str(each).replace(" ", "") for each in case.values())


def _masks(seqlen: int, kind: str):
    """(attention_mask, unused_mask) of a padded batch."""
    lengths = torch.randint(1, seqlen + 1, (BATCH, 1))
    if kind == "zeros":
        lengths[0] = lengths[-1] = 0
    places = torch.arange(seqlen)
    if kind != "unused":
        return places < lengths, None
    allocated = places < lengths
    return allocated & (places < lengths // 2), allocated & (places >= lengths // 2)


def _ends(cu_seqlens, seqused):
    starts = cu_seqlens[:-1].tolist()
    return [(a, a + n) for a, n in zip(starts, seqused.tolist(), strict=True)]


@pytest.mark.parametrize("case", _cases(), ids=_id)
def test_its_own_grid_by_its_own_rule(case, launched):
    torch.manual_seed(0)
    (seqlen_q, seqlen_k), d, dtype = case["seqlens"], case["d"], case["dtype"]
    masks = _masks(seqlen_q, case["lengths"])
    of_keys = masks if case["packed"] == "qkv" else _masks(seqlen_k, case["lengths"])

    def normal(masks, *shape):
        x = torch.randn(*masks[0].shape, *shape, dtype=dtype)
        packed, _, *of_rows = unpad_input(x, *masks)
        return packed.requires_grad_(), of_rows

    if case["packed"] == "qkv":
        qkv, (cu, longest, used) = normal(masks, 3, HEADS, d)
        given, lengths = {"qkv": qkv}, {"cu_seqlens": cu, "max_seqlen": longest}
        operands, ends = qkv.unbind(1), (_ends(cu, used),) * 2
        function, longest_k = flash_attn.flash_attn_varlen_qkvpacked_func, longest
    else:
        q, (cu, longest, used) = normal(masks, HEADS, d)
        kv, (cu_k, longest_k, used_k) = normal(of_keys, 2, case["heads_kv"], d)
        lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu_k}
        lengths |= {"max_seqlen_q": longest, "max_seqlen_k": longest_k}
        ends = _ends(cu, used), _ends(cu_k, used_k)
        if case["packed"] == "kv":
            given, operands = {"q": q, "kv": kv}, (q, *kv.unbind(1))
            function = flash_attn.flash_attn_varlen_kvpacked_func
        else:
            k, v = (x.detach().clone().requires_grad_() for x in kv.unbind(1))
            given, operands = {"q": q, "k": k, "v": v}, (q, k, v)
            function = flash_attn.flash_attn_varlen_func
            if case["lengths"] == "unused":
                lengths |= {"seqused_q": used, "seqused_k": used_k}
    options = {"causal": case["causal"], "softcap": case["softcap"]}
    if case["local"]:
        options["window_size"] = torch.randint(0, seqlen_k, (2,))
    if case["alibi"]:
        options["alibi_slopes"] = torch.rand(BATCH, HEADS) * 0.3
    if case["sink"]:
        options["learnable_sink"] = torch.randn(HEADS)
    kept = {}
    if case["dropout_p"]:
        torch.manual_seed(5)
        seed = int(torch.randint(2**62, (1,), dtype=torch.int64))
        shape = BATCH, HEADS, seqlen_q, seqlen_k
        mask = dropout_mask(*shape, dropout_p=case["dropout_p"], seed=seed)
        kept = {"kept": torch.from_numpy(mask.copy()), "dropout_p": case["dropout_p"]}
    torch.manual_seed(5)
    more = {"dropout_p": case["dropout_p"], "return_attn_probs": True}
    out, lse, s_dmask = function(**given, **lengths, **more, **options)
    assert launched.take() == ["schedule", "forward"]
    assert (out.dtype, lse.shape, s_dmask) == (dtype, (HEADS, out.shape[0]), None)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, tuple(given.values()), dout)
    assert {"backward-dkdv", "backward-dq"} <= set(launched.take())
    exact, exact_lse = attend_alone(*operands, *ends, **options, **kept)
    rounded, _ = attend_alone(*operands, *ends, dtype=dtype, **options, **kept)
    if not out.numel():
        return
    assert is_close_enough(out, exact, rounded, 2)
    torch.testing.assert_close(lse, exact_lse.float(), atol=1e-3, rtol=1e-3)
    wanted = torch.autograd.grad(exact, tuple(given.values()), dout.double())
    of_rounding = torch.autograd.grad(rounded, tuple(given.values()), dout)
    for name, *three in zip(given, grads, wanted, of_rounding, strict=True):
        assert three[0].shape == given[name].shape
        assert is_close_enough(*three, 3, 1e-4), name


_CU_Q, _CU_K = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 5, 16], [0, 9, 12, 20]))


def _normal(tokens: int, *shape: int):
    return torch.randn(tokens, *shape, dtype=torch.float32)


@pytest.mark.parametrize("causal", [False, True])
def test_chunks(causal, launched):
    torch.manual_seed(0)
    q, k, v = _normal(16, 1, 16), _normal(20, 1, 16), _normal(20, 1, 16)
    options = {"causal": causal, "attention_chunk": 4}
    out = flash_attn.flash_attn_varlen_func(q, k, v, _CU_Q, _CU_K, 11, 9, **options)
    ends = (_ends(cu, cu.diff()) for cu in (_CU_Q, _CU_K))
    exact, _ = attend_alone(q, k, v, *ends, **options)
    torch.testing.assert_close(out.double(), exact, atol=2e-3, rtol=2e-3)
    assert launched.take() == ["schedule", "forward"]


@pytest.mark.parametrize("name", ["block_table", "page_table"])
@pytest.mark.parametrize("has_ends", [False, True])
def test_keys_in_pages(name, has_ends, launched):
    torch.manual_seed(0)
    q, pages = _normal(16, 2, 16), _normal(8, 2, 4, 1, 16)
    k, v = pages.unbind(1)
    table = torch.randperm(8)[:6].reshape(3, 2).to(torch.int32)
    lengths = torch.tensor([7, 3, 8], dtype=torch.int32)
    ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    given = {"cu_seqlens_k": ends} if has_ends else {"cu_seqlens_k": None, "seqused_k": lengths}
    given |= {"cu_seqlens_q": _CU_Q, "max_seqlen_q": 11, "max_seqlen_k": 8, "num_splits": 1}
    out = flash_attn.flash_attn_varlen_func(q, k, v, causal=True, **given, **{name: table})
    rows = [x[table.long()].flatten(1, 2) for x in (k, v)]
    for n, length in enumerate(lengths.tolist()):
        own = slice(*_CU_Q[n : n + 2].tolist())
        keys = (x[n, :length] for x in rows)
        wanted, _ = attend_alone(
            q[own], *keys, [(0, own.stop - own.start)], [(0, length)], causal=True
        )
        torch.testing.assert_close(out[own].double(), wanted, atol=2e-3, rtol=2e-3)
    assert launched.take() == ["schedule", "forward"]
