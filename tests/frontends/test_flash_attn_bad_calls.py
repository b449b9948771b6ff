"""What flash-attn's names refuse, each before a kernel runs."""

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install numflash[torch]")

import numflash.flash_attn as flash_attn  # noqa: E402
from numflash.runtime.errors import UnsupportedError  # noqa: E402

_CU = torch.tensor([0, 16], dtype=torch.int32)


def _dense(**more):
    q, k, v = torch.randn(3, 1, 16, 2, 16)
    return flash_attn.flash_attn_func(**{"q": q, "k": k, "v": v} | more)


def _varlen(**more):
    q, k, v = torch.randn(3, 16, 2, 16)
    given = {"q": q, "k": k, "v": v, "cu_seqlens_q": _CU, "cu_seqlens_k": _CU} | more
    return flash_attn.flash_attn_varlen_func(**given, max_seqlen_q=16, max_seqlen_k=16)


def _cached(**more):
    q, new = torch.randn(1, 2, 2, 16), torch.randn(2, 1, 2, 2, 16)
    caches = torch.randn(2, 1, 16, 2, 16)
    given = {"q": q, "k_cache": caches[0], "v_cache": caches[1], "k": new[0], "v": new[1]}
    return flash_attn.flash_attn_with_kvcache(**given | {"cache_seqlens": 3} | more)


_ONE = torch.ones(1)
_LEARNED = torch.randn(1, 2, 2, 16).requires_grad_()
_PAGES = torch.zeros(1, 4, dtype=torch.int32)
BAD = {
    "no qv": (_dense, {"qv": _ONE}, UnsupportedError, "no qv"),
    "no qv of packed": (_varlen, {"qv": _ONE}, UnsupportedError, "no qv"),
    "no qv of caches": (_cached, {"qv": _ONE}, UnsupportedError, "no qv"),
    "rotary_seqlens": (_cached, {"rotary_seqlens": _ONE}, UnsupportedError, "rotary_seqlens"),
    "cu_seqlens_k_new": (_cached, {"cu_seqlens_k_new": _CU}, UnsupportedError, "cu_seqlens_k_new"),
    "positions of 3": (_dense, {"dropout_p": None}, TypeError, "those of flash-attn 2"),
    "causal as a scale": (_dense, {"softmax_scale": True}, TypeError, "those of flash-attn 2"),
    "seqused as dropout": (_varlen, {"dropout_p": _CU}, TypeError, "those of flash-attn 2"),
    "dropout": (_dense, {"dropout_p": 1.5}, ValueError, "dropout_p"),
    "causal": (_dense, {"causal": 1}, TypeError, "causal"),
    "window": (_dense, {"window_size": 3}, TypeError, "window_size"),
    "window of three": (_dense, {"window_size": (1, 2, 3)}, ValueError, "window_size"),
    "softcap": (_dense, {"softcap": "x"}, TypeError, "softcap"),
    "sink": (_dense, {"learnable_sink": torch.ones(3)}, ValueError, "^learnable_sink must"),
    "sink of packed": (_varlen, {"learnable_sink": _ONE}, ValueError, "^learnable_sink must"),
    "used": (_varlen, {"seqused_k": _CU.long()}, TypeError, "^seqused_k must"),
    "used of queries": (_varlen, {"seqused_q": _CU}, ValueError, "^seqused_q must"),
    "chunk": (_dense, {"attention_chunk": 2.5}, TypeError, "attention_chunk"),
    "chunk below 0": (_dense, {"attention_chunk": -1}, ValueError, "attention_chunk"),
    "dtype": (_dense, {"q": torch.ones(1, 16, 2, 16).double()}, TypeError, "float64"),
    "dtypes": (_dense, {"k": torch.ones(1, 16, 2, 16).half()}, TypeError, "k must"),
    "no tensor": (_dense, {"q": [1.0]}, TypeError, "q must be a tensor of PyTorch, got list"),
    "device": (_dense, {"q": torch.ones(1, 16, 2, 16, device="meta")}, ValueError, "one device"),
    "axes": (_dense, {"v": torch.ones(16, 2, 16)}, ValueError, "v must have the axes"),
    "heads": (_dense, {"q": torch.ones(1, 16, 3, 16)}, ValueError, "num_heads|heads"),
    "axes of packed": (_varlen, {"k": torch.ones(1, 16, 2, 16)}, ValueError, "k must have the ax"),
    "ends of int64": (_varlen, {"cu_seqlens_q": _CU.long()}, TypeError, "cu_seqlens_q"),
    "no ends": (_varlen, {"cu_seqlens_k": None}, ValueError, "cu_seqlens_k"),
    "codes": (_varlen, {"q": torch.ones(16, 2, 16).to(torch.float8_e4m3fn)}, TypeError, "float8"),
    "two tables": (_cached, {"block_table": _PAGES, "page_table": _PAGES}, ValueError, "names"),
    "nowhere": (_cached, {"cache_seqlens": None}, ValueError, "cache_seqlens"),
    "k alone": (_cached, {"v": None}, ValueError, "k and v must be given together"),
    "too long": (_cached, {"cache_seqlens": 15}, ValueError, "cache_seqlens"),
    "table and entries": (
        _cached,
        {"block_table": _PAGES, "cache_batch_idx": _CU[:1]},
        ValueError,
        "page_table and cache_batch_idx",
    ),
    "new keys of packed queries": (
        _cached,
        {"q": torch.ones(16, 2, 16), "cu_seqlens_q": _CU},
        UnsupportedError,
        "k does not go with cu_seqlens_q",
    ),
    "codes of packed queries": (
        _cached,
        {
            "q": torch.ones(16, 2, 16).half(),
            "k_cache": torch.ones(1, 16, 2, 16).to(torch.float8_e4m3fn),
            "v_cache": torch.ones(1, 16, 2, 16).to(torch.float8_e4m3fn),
            "cu_seqlens_q": _CU,
            **dict.fromkeys("kv"),
        },
        TypeError,
        "k must have the dtype of q",
    ),
    "a gradient of q": (_cached, {"q": _LEARNED}, UnsupportedError, "q requires one"),
    "a gradient of k": (_cached, {"k": _LEARNED}, UnsupportedError, "k requires one"),
    "a gradient of slopes": (
        _cached,
        {"alibi_slopes": torch.ones(2).requires_grad_()},
        UnsupportedError,
        "alibi_slopes requires one",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_launch_nothing(case, launched):
    call, given, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call(**given)
    assert launched == []


def test_pages_have_no_gradients(launched):
    k, v = (torch.randn(4, 4, 2, 16).requires_grad_() for _ in "kv")
    given = {"k": k, "v": v, "block_table": _PAGES}
    with pytest.raises(UnsupportedError, match="block_table has no gradients, and k requires"):
        _varlen(**given)
    with torch.no_grad():
        _varlen(**given)
        _cached(q=_LEARNED)
    assert launched.families.count("forward") == 2


@pytest.mark.parametrize(
    "function, given, words",
    [
        ("flash_attn_qkvpacked_func", (torch.ones(1, 16, 2, 2, 16),), "qkv must have the axes"),
        ("flash_attn_qkvpacked_func", (torch.ones(1, 16, 3, 16),), "qkv must have the axes"),
        ("flash_attn_kvpacked_func", (torch.ones(1, 16, 2, 16),) * 2, "kv must have the axes"),
        ("flash_attn_varlen_qkvpacked_func", (torch.ones(16, 2, 16), _CU, 16), "qkv must have"),
        ("flash_attn_varlen_kvpacked_func", (torch.ones(16, 2, 16),) * 6, "kv must have the axes"),
    ],
)
def test_shapes_of_packed_tensors(function, given, words):
    with pytest.raises(ValueError, match=words):
        getattr(flash_attn, function)(*given)


def test_heads_that_do_not_fill_qkv():
    with pytest.raises(ValueError, match="num_heads_q"):
        flash_attn.flash_attn_qkvpacked_func(torch.ones(1, 16, 7, 16), num_heads_q=4)
