"""Every keyword of flash-attn 2.8 and of flash-attn 3 is taken, in their orders of positions."""

from inspect import Parameter, signature
from itertools import zip_longest

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install numflash[torch]")

import numflash.flash_attn as flash_attn  # noqa: E402
from numflash.flash_attn import version_3  # noqa: E402

# In the order of flash-attn 2.8.4's signatures, with the defaults of what has one.
_TAIL_2 = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
_ENDS = dict.fromkeys(["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"], ...)
_NEW = {"k": None, "v": None}
VERSION_2 = {
    "flash_attn_func": {"q": ..., "k": ..., "v": ..., **_TAIL_2},
    "flash_attn_qkvpacked_func": {"qkv": ..., **_TAIL_2},
    "flash_attn_kvpacked_func": {"q": ..., "kv": ..., **_TAIL_2},
    "flash_attn_varlen_func": {
        **{"q": ..., "k": ..., "v": ..., **_ENDS, **_TAIL_2},
        "block_table": None,
    },
    "flash_attn_varlen_qkvpacked_func": {
        **{"qkv": ..., "cu_seqlens": ..., "max_seqlen": ...},
        **_TAIL_2,
    },
    "flash_attn_varlen_kvpacked_func": {"q": ..., "kv": ..., **_ENDS, **_TAIL_2},
    "flash_attn_with_kvcache": {
        **{"q": ..., "k_cache": ..., "v_cache": ..., **_NEW},
        "rotary_cos": None,
        "rotary_sin": None,
        "cache_seqlens": None,
        "cache_batch_idx": None,
        "cache_leftpad": None,
        "block_table": None,
        "softmax_scale": None,
        "causal": False,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "rotary_interleaved": True,
        "alibi_slopes": None,
        "num_splits": 0,
        "return_softmax_lse": False,
    },
}
# In the order of flash-attn 3's (hopper/flash_attn_interface.py).
_DESCALES = {"q_descale": None, "k_descale": None, "v_descale": None}
_WINDOW = {"window_size": (-1, -1), "attention_chunk": 0, "softcap": 0.0}
_SCALE = {"softmax_scale": None, "causal": False}
_TAIL_3 = {
    **{**_SCALE, "qv": None, **_DESCALES, **_WINDOW},
    "num_splits": 1,
    "pack_gqa": None,
    "deterministic": False,
    "sm_margin": 0,
    "return_attn_probs": False,
}
_COMBINE = {"out_partial": ..., "lse_partial": ..., "out": None, "out_dtype": None}
_SIZES = "batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads_q", "num_heads_kv", "headdim"
_METADATA = {
    **dict.fromkeys([*_SIZES, "cache_seqlens"], ...),
    "qkv_dtype": torch.bfloat16,
    "headdim_v": None,
    "cu_seqlens_q": None,
    "cu_seqlens_k_new": None,
    "cache_leftpad": None,
    "page_size": None,
    "max_seqlen_k_new": 0,
    "causal": False,
    "window_size": (-1, -1),
    "attention_chunk": 0,
    "has_softcap": False,
    "num_splits": 0,
    "pack_gqa": None,
    "sm_margin": 0,
}
VERSION_3 = {
    "flash_attn_func": {"q": ..., "k": ..., "v": ..., **_TAIL_3},
    "flash_attn_qkvpacked_func": {
        **{"qkv": ..., **_SCALE, **_DESCALES, **_WINDOW},
        "deterministic": False,
        "num_heads_q": None,
        "sm_margin": 0,
        "return_attn_probs": False,
    },
    "flash_attn_varlen_func": {
        **{"q": ..., "k": ..., "v": ..., **_ENDS},
        **{"seqused_q": None, "seqused_k": None, **_TAIL_3},
    },
    "flash_attn_with_kvcache": {
        **{"q": ..., "k_cache": ..., "v_cache": ..., **_NEW},
        "qv": None,
        "rotary_cos": None,
        "rotary_sin": None,
        "cache_seqlens": None,
        "cache_batch_idx": None,
        "cache_leftpad": None,
        "page_table": None,
        "cu_seqlens_q": None,
        "cu_seqlens_k_new": None,
        "max_seqlen_q": None,
        "rotary_seqlens": None,
        **{**_DESCALES, **_SCALE, **_WINDOW},
        "rotary_interleaved": True,
        "scheduler_metadata": None,
        "num_splits": 0,
        "pack_gqa": None,
        "sm_margin": 0,
        "return_softmax_lse": False,
    },
    "flash_attn_combine": _COMBINE,
    "get_scheduler_metadata": _METADATA,
}
# What decides nothing may have another default, which says so better.
_HINTS = ("num_splits",)
_MODULES = [(flash_attn, VERSION_2), (version_3, VERSION_3)]
_CASES = [(module, name, rows[name]) for module, rows in _MODULES for name in rows]


@pytest.mark.parametrize("module, name, row", _CASES, ids=lambda x: x if type(x) is str else "")
def test_positions_and_defaults(module, name, row):
    parameters = list(signature(getattr(module, name)).parameters.values())
    by_position = [x for x in parameters if x.kind is Parameter.POSITIONAL_OR_KEYWORD]
    assert [x.name for x in by_position] == [*row]
    for parameter in by_position:
        wanted = row[parameter.name]
        if parameter.name not in _HINTS:
            given = ... if parameter.default is Parameter.empty else parameter.default
            assert given == wanted, parameter.name


@pytest.mark.parametrize("name", sorted({*VERSION_2, *VERSION_3}))
def test_one_function_takes_the_keywords_of_both(name):
    asked = {*VERSION_2.get(name, ()), *VERSION_3.get(name, ())}
    assert asked <= {*signature(getattr(flash_attn, name)).parameters}


_CU = torch.tensor([0, 8], dtype=torch.int32)


def _operands(name: str) -> dict:
    """The arguments without defaults, of 8 tokens in one sequence."""
    qkv = torch.randn(1, 8, 3, 1, 16)
    q, k, v = qkv.unbind(2)
    if name == "flash_attn_combine":
        return {"out_partial": qkv.transpose(0, 2), "lse_partial": torch.randn(3, 8, 1, 1)}
    if name == "get_scheduler_metadata":
        return dict.fromkeys(_SIZES, 1) | {"cache_seqlens": _CU[1:]}
    if name == "flash_attn_with_kvcache":
        return {"q": q, "k_cache": k.clone(), "v_cache": v.clone()}
    every = {"q": q, "k": k, "v": v, "qkv": qkv, "kv": qkv[:, :, 1:]}
    if "varlen" in name:
        every = {name: x[0] for name, x in every.items()}
        every |= {"cu_seqlens_q": _CU, "cu_seqlens_k": _CU, "cu_seqlens": _CU}
        every |= dict.fromkeys(["max_seqlen_q", "max_seqlen_k", "max_seqlen"], 8)
    taken = signature(getattr(flash_attn, name)).parameters.values()
    return {x.name: every[x.name] for x in taken if x.default is Parameter.empty}


@pytest.mark.parametrize("module, name, row", _CASES, ids=lambda x: x if type(x) is str else "")
def test_all_of_them_by_name_and_by_position(module, name, row, launched):
    torch.manual_seed(0)
    function, operands = getattr(module, name), _operands(name)
    plain = function(**operands)
    given = row | operands
    assert ... not in given.values()
    by_name, by_position = function(**given), function(*given.values())
    for found in (by_name, by_position):
        for x, y in zip(_tensors(found), _tensors(plain), strict=True):
            assert torch.equal(x, y)
    if name != "get_scheduler_metadata":
        assert launched.families[-1] in ("forward", "combine")


def _tensors(found) -> tuple:
    return found if isinstance(found, tuple) else (found,)


# What flash-attn takes for an option that is off, besides its default.
_OFF = {
    "window_size": [(None, None), [-1, -1], torch.tensor([-1, -1]), (-5, torch.tensor(-1))],
    "softcap": [0, -1.0],
    "attention_chunk": [0],
    "num_splits": [0, 1],
    "pack_gqa": [True, False],
    "deterministic": [True],
    "sm_margin": [8],
    "scheduler_metadata": [torch.empty(0, dtype=torch.int32)],
}
_OR_NONE = "window_size", "softcap", "attention_chunk", "num_splits"


@pytest.mark.parametrize(
    "name", ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
)
def test_ways_to_say_that_an_option_is_off(name, launched):
    torch.manual_seed(0)
    function, operands = getattr(flash_attn, name), _operands(name)
    plain = function(**operands)
    taken = {n: values for n, values in _OFF.items() if n in signature(function).parameters}
    for row in zip_longest(*taken.values()):
        given = {n: x for n, x in zip(taken, row, strict=True) if x is not None}
        assert torch.equal(function(**operands, **given), plain), given
    nothing = dict.fromkeys({*_OR_NONE} & {*taken})
    assert torch.equal(function(**operands, **nothing), plain), nothing
    assert set(launched.families) <= {"schedule", "forward"}


@pytest.mark.parametrize(
    "pair", [(5, 3), [5, 3], torch.tensor([5, 3]), (torch.tensor(5), 3)], ids=repr
)
def test_windows_in_any_form(pair):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 16, 1, 16)
    wanted = flash_attn.flash_attn_func(q, k, v, window_size=(5, 3))
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, window_size=pair), wanted)
    assert not torch.equal(flash_attn.flash_attn_func(q, k, v), wanted)
