"""`numflash.torch.attention_with_kvcache`: eager, compiled, exported; caches in place."""

import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "numflash[torch]"')

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import numflash  # noqa: E402
import numflash.flash_attn as flash_attn  # noqa: E402
import numflash.torch as nt  # noqa: E402
from numflash.runtime.errors import UnsupportedError  # noqa: E402
from tests.support.covering import some, thorough  # noqa: E402


@pytest.fixture(autouse=True)
def compiled_anew():
    torch.compiler.reset()


class Decoding(torch.nn.Module):
    """A decoding step of one layer, whose caches are buffers."""

    def __init__(self, call):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = torch.nn.Linear(16, 48, bias=False)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(2, 12, 1, 16))
        self.register_buffer("lengths", torch.tensor([3, 5], dtype=torch.int32))
        angles = torch.rand(12, 8)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.call = call

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 16)).unbind(-3)
        out = self.call(
            q,
            self.k_cache,
            self.v_cache,
            k,
            v,
            cache_seqlens=self.lengths,
            rotary_cos=self.cos,
            rotary_sin=self.sin,
            causal=True,
        )
        self.lengths += 1
        return x + out.flatten(-2)


CALLS = {
    "torch": nt.attention_with_kvcache,
    "flash_attn": flash_attn.flash_attn_with_kvcache,
}


@pytest.mark.parametrize("call", some(CALLS, "flash_attn"))
def test_a_compiled_step_of_decoding(call, launched):
    eager, compiled = Decoding(CALLS[call]), Decoding(CALLS[call])
    step = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for n in range(3):
            x = torch.randn(2, 1, 16)
            wanted = eager(x)
            ran = launched.take()
            if n == 1:
                torch._dynamo.config.error_on_recompile = True
            try:
                out = step(x)
            finally:
                torch._dynamo.config.error_on_recompile = False
            assert launched.take() == ran == ["prepare", "forward"]
            assert torch.equal(out, wanted)
    for name, buffer in eager.named_buffers():
        assert torch.equal(buffer, compiled.get_buffer(name)), name
    assert not torch.equal(eager.k_cache, torch.zeros_like(eager.k_cache))


def test_a_step_is_exported(launched):
    module = Decoding(nt.attention_with_kvcache)
    with torch.no_grad():
        x = torch.randn(2, 1, 16)
        program = torch.export.export(Decoding(nt.attention_with_kvcache), (x,))
        assert launched == []
        exported = program.module()
        for _ in range(2):
            assert torch.equal(exported(x), module(x))
    assert torch.equal(exported.k_cache, module.k_cache)
    assert any("attention_with_append" in str(node.target) for node in program.graph.nodes)
    assert launched.families.count("forward") == 4


def _arguments(**more):
    torch.manual_seed(0)
    q, k_cache, v_cache = torch.randn(2, 2, 2, 16), *torch.randn(2, 2, 12, 1, 16)
    lengths = torch.tensor([3, 5], dtype=torch.int32)
    return {"q": q, "k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": lengths} | more


def _new():
    return dict(zip("kv", torch.randn(2, 2, 2, 1, 16), strict=True))


def _far(b, h, i, j, least):
    return j >= least[b]


_TABLE, _FIRST = (torch.tensor(x, dtype=torch.int32) for x in ([[1], [0]], [1, 2]))
OPTIONS = {
    "features": {
        "window_size": (4, 0),
        "softcap": 3.0,
        "softmax_scale": 0.2,
        "alibi_slopes": torch.rand(2, 2),
        "out_dtype": "float32",
        "new": True,
    },
    "places": {"cache_batch_idx": _FIRST - 1, "cache_leftpad": _FIRST, "new": True},
    "pages": {"page_table": _TABLE, "num_splits": 1, "new": False},
    "a function": {"mask_mod": _far, "aux": (_FIRST,), "new": False},
    "one length": {"cache_seqlens": 4, "check_lengths": True, "new": True},
}


@pytest.mark.parametrize("options", some(OPTIONS, "features", "a function"))
def test_a_graph_gives_what_eager_mode_gives(options, launched):
    more = dict(OPTIONS[options])
    more |= _new() if more.pop("new") else {}
    given, same = (_arguments(return_lse=True, **more) for _ in range(2))
    wanted = numflash.attention_with_kvcache(**given)
    ran = launched.take()
    compiled = torch.compile(nt.attention_with_kvcache, backend="aot_eager", fullgraph=True)
    for x, y in zip(compiled(**same), wanted, strict=True):
        assert torch.equal(x, y)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(given[name], same[name])
    assert launched.take() == ran


@pytest.mark.parametrize("out_dtype", [None, "float32"])
def test_a_fake_result_is_like_the_real_one(out_dtype, launched):
    given = _arguments(return_lse=True, out_dtype=out_dtype, **_new())
    given = {n: x.half() if n in _OF_HALF else x for n, x in given.items()}
    wanted = nt.attention_with_kvcache(**given)
    assert launched.take() == ["prepare", "forward"]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = {n: mode.from_tensor(x) if n in _OF_HALF else x for n, x in given.items()}
        found = nt.attention_with_kvcache(**given)
    for x, y in zip(found, wanted, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
    assert launched == []


_OF_HALF = "q", "k_cache", "v_cache", "k", "v"


@thorough
@pytest.mark.parametrize("has_new", [False, True])
def test_opcheck(has_new):
    given = _arguments(**(_new() if has_new else {}))
    lengths, own = given.pop("cache_seqlens"), list(given.values())
    name = "attention_with_append" if has_new else "attention_on_cache"
    arguments = *own, None, lengths, *[None] * 7, True, False, [], '{"arrays":[],"aux":[]}'
    with torch.no_grad():
        torch.library.opcheck(getattr(torch.ops.numflash, name).default, arguments)


def test_changing_lengths_of_one_graph():
    given = _arguments()
    compiled = torch.compile(
        nt.attention_with_kvcache, backend="aot_eager", fullgraph=True, dynamic=True
    )
    for length in (4, 6, 9):
        given["cache_seqlens"] = length
        assert torch.equal(compiled(**given), nt.attention_with_kvcache(**given))


def test_gradients_are_refused(launched):
    given = _arguments(**_new())
    for name in ("q", "k_cache", "v"):
        more = given | {name: given[name].clone().requires_grad_()}
        with pytest.raises(UnsupportedError, match=f"no gradients, and {name} requires one"):
            nt.attention_with_kvcache(**more)
        with torch.inference_mode():
            nt.attention_with_kvcache(**more)
    assert launched.families.count("forward") == 3


@pytest.mark.parametrize("name", ["out", "stream", "layout", "seqlens_k", "block_mask"])
def test_options_that_it_does_not_have(name, launched):
    with pytest.raises(TypeError, match=f"has no {name}"):
        nt.attention_with_kvcache(**_arguments(**{name: None}))
    assert launched == []


def test_an_unknown_option_of_a_graph():
    compiled = torch.compile(nt.attention_with_kvcache, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="unknown options: colour"):
        compiled(**_arguments(colour=1))
    with pytest.raises(TypeError, match="unknown options: colour"):
        nt.attention_with_kvcache(**_arguments(colour=1))
