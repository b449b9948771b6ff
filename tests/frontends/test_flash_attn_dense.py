"""flash-attn's own grid of `test_flash_attn_output`, small, by its own rule of tolerance.

Errors against float64 may be twice those of the same in 16 bits, of gradients three times. Cases
in which each two choices meet run with NUMFLASH_TEST_ALL=1.
"""

import random
from itertools import product

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install numflash[torch]")

import numflash.flash_attn as flash_attn  # noqa: E402
from numflash.reference import dropout_mask  # noqa: E402
from tests.frontends.flash_attn_reference import attend, is_close_enough  # noqa: E402
from tests.support.covering import ALL, covering  # noqa: E402

AXES = {
    "packed": ("kv", None, "qkv"),
    "dtype": (torch.float16, torch.bfloat16),
    "heads_kv": (4, 1, 2),
    "deterministic": (False, True),
    "alibi": (False, True),
    "local": (False, True),
    "causal": (False, True),
    "d": (16, 11) if not ALL else (16, 11, 32, 40, 59, 64),
    "seqlens": ((1, 18), (13, 16), (16, 16), (17, 9)),
    "dropout_p": (0.0, 0.17),
    "softcap": (0.0, 2.5),
}
HEADS = 4


def _is_possible(case) -> bool:
    packs_all = case["packed"] == "qkv"
    alike = case["heads_kv"] == HEADS and case["seqlens"][0] == case["seqlens"][1]
    return not packs_all or alike


def _cases():
    rows = [dict(zip(AXES, row, strict=True)) for row in product(*AXES.values())]
    rows = [row for row in rows if _is_possible(row)]
    random.Random(2).shuffle(rows)
    return covering(
        rows[:400],
        lambda row: (*row.values(), (row["local"], row["causal"])),
        together=2 if ALL else 1,
    )


def _id(case) -> str:
    return "-".join(str(each).replace(" ", "") for each in case.values())


@pytest.mark.parametrize("case", _cases(), ids=_id)
def test_its_own_grid_by_its_own_rule(case, launched):
    torch.manual_seed(0)
    (seqlen_q, seqlen_k), d, dtype = case["seqlens"], case["d"], case["dtype"]

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    if case["packed"] == "qkv":
        given = {"qkv": normal(2, seqlen_q, 3, HEADS, d)}
        function, operands = flash_attn.flash_attn_qkvpacked_func, given["qkv"].unbind(2)
    else:
        q = normal(2, seqlen_q, HEADS, d)
        if case["packed"] == "kv":
            given = {"q": q, "kv": normal(2, seqlen_k, 2, case["heads_kv"], d)}
            function, operands = flash_attn.flash_attn_kvpacked_func, (q, *given["kv"].unbind(2))
        else:
            k, v = (normal(2, seqlen_k, case["heads_kv"], d) for _ in "kv")
            given, operands = {"q": q, "k": k, "v": v}, (q, k, v)
            function = flash_attn.flash_attn_func
    options = {"causal": case["causal"], "softcap": case["softcap"]}
    if case["local"]:
        options["window_size"] = torch.randint(0, seqlen_k, (2,))
    if case["alibi"]:
        options["alibi_slopes"] = torch.rand(2, HEADS) * 0.3
    kept = {}
    if case["dropout_p"]:
        torch.manual_seed(5)
        seed = int(torch.randint(2**62, (1,), dtype=torch.int64))
        shape = 2, HEADS, seqlen_q, seqlen_k
        mask = dropout_mask(*shape, dropout_p=case["dropout_p"], seed=seed)
        kept = {"kept": torch.from_numpy(mask.copy()), "dropout_p": case["dropout_p"]}
    torch.manual_seed(5)
    out, lse, s_dmask = function(
        **given,
        dropout_p=case["dropout_p"],
        deterministic=case["deterministic"],
        return_attn_probs=True,
        **options,
    )
    assert launched.take() == ["forward"]
    assert (out.dtype, lse.dtype, s_dmask) == (dtype, torch.float32, None)
    assert lse.shape == (2, HEADS, seqlen_q)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, tuple(given.values()), dout)
    assert launched.take() == ["delta", "backward-dkdv", "backward-dq"]
    exact, exact_lse = attend(*operands, **options, **kept)
    rounded, _ = attend(*operands, dtype=dtype, **options, **kept)
    assert is_close_enough(out, exact, rounded, 2)
    torch.testing.assert_close(lse, exact_lse.float(), atol=1e-3, rtol=1e-3)
    wanted = torch.autograd.grad(exact, tuple(given.values()), dout.double())
    of_rounding = torch.autograd.grad(rounded, tuple(given.values()), dout)
    for name, *three in zip(given, grads, wanted, of_rounding, strict=True):
        assert three[0].shape == given[name].shape
        assert is_close_enough(*three, 3, 1e-4), name


_CHUNKS = [(1, {}), (5, {"causal": True}), (8, {"window_size": (3, 20)}), (100, {})]


@pytest.mark.parametrize("chunk, more", _CHUNKS, ids=str)
def test_chunks(chunk, more, launched):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 1, 16).requires_grad_() for n in (20, 15, 15))
    out = flash_attn.flash_attn_func(q, k, v, attention_chunk=chunk, **more)
    exact, _ = attend(q, k, v, attention_chunk=chunk, **more)
    torch.testing.assert_close(out.double(), exact, atol=2e-3, rtol=2e-3)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), dout)
    for x, y in zip(got, torch.autograd.grad(exact, (q, k, v), dout.double()), strict=True):
        torch.testing.assert_close(x, y, atol=5e-3, rtol=5e-3)
    assert launched.take() == ["forward", "delta", "backward-dkdv", "backward-dq"]


def test_gradients_of_sinks_and_slopes_and_by_lse(launched):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 16, 2, 16).requires_grad_() for _ in range(3))
    sink = torch.randn(2, dtype=torch.bfloat16).requires_grad_()
    slopes = (torch.rand(2) * 0.3).requires_grad_()
    options = {"learnable_sink": sink, "alibi_slopes": slopes}
    found = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    exact = attend(q, k, v, **options)
    given, douts = (q, k, v, sink, slopes), [torch.randn_like(x) for x in found[:2]]
    for x, y in zip(found[:2], exact, strict=True):
        torch.testing.assert_close(x.double(), y, atol=2e-3, rtol=2e-3)
    got = torch.autograd.grad(found[:2], given, douts)
    wanted = torch.autograd.grad(exact, given, [x.double() for x in douts])
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=1e-2, rtol=1e-2)
    assert launched.take()[:2] == ["forward", "delta"]


def test_heads_that_lie_one_after_another(launched):
    torch.manual_seed(0)
    qkv = torch.randn(2, 16, 8, 16).requires_grad_()
    out = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=4)
    exact, _ = attend(*qkv.split([4, 2, 2], dim=2), causal=True)
    torch.testing.assert_close(out.double(), exact, atol=2e-3, rtol=2e-3)
    dout = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, qkv, dout)
    (wanted,) = torch.autograd.grad(exact, qkv, dout.double())
    torch.testing.assert_close(got, wanted, atol=5e-3, rtol=5e-3)
    assert launched.take()[0] == "forward"


@pytest.mark.parametrize("given", [None, 0.5])
def test_codes(given, launched):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 20, 2, 16).to(torch.float8_e4m3fn) for _ in range(3))
    descale = None if given is None else torch.full((1, 2), given)
    descales = {f"{name}_descale": descale for name in "qkv"}
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, **descales, return_attn_probs=True)
    assert out.dtype == torch.bfloat16
    exact, exact_lse = attend(*(x.double() * (given or 1) for x in (q, k, v)))
    torch.testing.assert_close(out.double(), exact, atol=0.1, rtol=0.1)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-2, rtol=1e-2)
    assert launched.take()[-1] == "forward"


def test_scales_without_codes_decide_nothing():
    q, k, v = torch.randn(3, 1, 16, 2, 16)
    descales = {f"{name}_descale": torch.full((1, 2), 0.5) for name in "qkv"}
    scaled = flash_attn.flash_attn_func(q, k, v, **descales)
    assert torch.equal(scaled, flash_attn.flash_attn_func(q, k, v))
