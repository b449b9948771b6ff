"""numflash in the place of torch's attention: `enable`, `disable` and `replacing_sdpa`."""

import threading
from contextlib import contextmanager, nullcontext

import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "numflash[torch]"')

from torch.nn import functional  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as imported_before  # noqa: E402

import numflash.torch as nt  # noqa: E402

BACKWARD = ["delta", "backward-dkdv", "backward-dq"]
HEADS, WIDTH, SEQLEN = 2, 16, 5


@pytest.fixture(autouse=True)
def disabled():
    """Each test begins and ends with torch's own."""
    yield
    nt.disable()


@contextmanager
def enabled():
    nt.enable()
    try:
        yield
    finally:
        nt.disable()


WAYS = {"enable": enabled, "replacing_sdpa": nt.replacing_sdpa, "torch's own": nullcontext}


def attend(x, function=None):
    """Causal attention of (1, seqlen, 3 * WIDTH)."""
    q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in x.chunk(3, -1))
    function = function or functional.scaled_dot_product_attention
    return function(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)


def by_module(x, training=True, grad=True):
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).train(training)
    x = x[..., :WIDTH]
    with torch.set_grad_enabled(grad):
        return module(x, x, x, need_weights=False)[0]


def in_another_thread(x):
    found = []
    thread = threading.Thread(target=lambda: found.append(attend(x)))
    thread.start()
    thread.join()
    return found[0]


def without_fast_path(x):
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return by_module(x, training=False, grad=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# What reaches attention: the ways by which numflash then runs.
CALLS = {
    "the function": (attend, {"enable", "replacing_sdpa"}),
    "imported before": (lambda x: attend(x, imported_before), {"enable", "replacing_sdpa"}),
    "the operator": (lambda x: attend(x, torch.ops.aten.scaled_dot_product_attention), {"enable"}),
    "another thread": (in_another_thread, {"enable"}),
    "a module": (by_module, {"enable"}),
    "a module, evaluating": (lambda x: by_module(x, training=False), {"enable"}),
    # Another operator of torch's, in C++.
    "a module, its fast path": (lambda x: by_module(x, False, grad=False), set()),
    "a module without fast path": (without_fast_path, {"enable"}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", CALLS)
def test_what_reaches_numflash(call, way, launched):
    function, ways = CALLS[call]
    x = torch.randn(1, SEQLEN, 3 * WIDTH, requires_grad=True)
    want = function(x)
    assert launched == []
    with WAYS[way]():
        found = function(x)
        assert launched.take() == (["forward"] if way in ways else [])
    torch.testing.assert_close(found, want, atol=2e-6, rtol=0)
    assert function(x).equal(want) and launched == []
    if found.requires_grad:
        slope, same = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, want))
        assert launched.take() == (BACKWARD if way in ways else [])
        torch.testing.assert_close(slope, same, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["enable", "replacing_sdpa"])
def test_torchs_own_runs_where_numflash_cannot(way, launched):
    x = torch.randn(1, SEQLEN, 3 * WIDTH, requires_grad=True, dtype=torch.float64)
    want = attend(x)
    with WAYS[way]():
        found = attend(x)
        assert found.equal(want) and found.requires_grad
        (slope,) = torch.autograd.grad(found.sum(), x)
        with sdpa_kernel(SDPBackend.MATH):
            attend(x.float())
    assert launched == [] and slope.equal(torch.autograd.grad(want.sum(), x)[0])


@pytest.mark.parametrize("way", ["enable", "replacing_sdpa"])
def test_errors_are_those_of_torchs_math_path(way, launched):
    q = torch.randn(1, 1, 4, 8)
    with WAYS[way]():
        for given in (
            {"attn_mask": torch.ones(4, 4) > 0, "is_causal": True},
            {"value": q[:, :, :3]},
        ):
            with pytest.raises(RuntimeError, match=r"is_causal=True|Expected size"):
                functional.scaled_dot_product_attention(
                    **{"query": q, "key": q, "value": q} | given
                )
        with pytest.raises(TypeError):
            functional.scaled_dot_product_attention(q, q, q, scale="a")
    assert launched == []


def test_enabling_twice_is_enabling_once(launched):
    q = torch.randn(1, 1, 4, 8)
    tag = torch.compiler.config.cache_key_tag
    nt.disable()
    assert not nt.is_enabled()
    nt.enable()
    nt.enable()
    assert nt.is_enabled() and torch.compiler.config.cache_key_tag.count("numflash") == 1
    functional.scaled_dot_product_attention(q, q, q)
    # What runs where numflash cannot is torch's own, and not what was enabled first.
    functional.scaled_dot_product_attention(q.double(), q.double(), q.double())
    nt.disable()
    assert not nt.is_enabled() and torch.compiler.config.cache_key_tag == tag
    nt.disable()
    functional.scaled_dot_product_attention(q, q, q)
    assert launched.take() == ["forward"]


def test_both_ways_at_once(launched):
    q = torch.randn(1, 1, 4, 8)
    nt.enable()
    with nt.replacing_sdpa(), nt.replacing_sdpa():
        functional.scaled_dot_product_attention(q, q, q)
        nt.disable()
        functional.scaled_dot_product_attention(q, q, q)
        functional.scaled_dot_product_attention(q.double(), q.double(), q.double())
        nt.enable()
    functional.scaled_dot_product_attention(q, q, q)
    nt.disable()
    functional.scaled_dot_product_attention(q, q, q)
    assert launched.take() == ["forward"] * 3


def test_a_context_is_of_its_thread(launched):
    with nt.replacing_sdpa():
        in_another_thread(torch.randn(1, SEQLEN, 3 * WIDTH))
    assert launched == []


def test_threads_enable_and_disable_while_others_attend():
    x = torch.randn(1, SEQLEN, 3 * WIDTH, dtype=torch.float64)
    want, failed, done = attend(x), [], threading.Event()

    def use():
        while not done.is_set():
            if not attend(x).equal(want):
                failed.append("another result")

    def switch():
        try:
            for _ in range(40):
                nt.enable()
                nt.disable()
        except Exception as error:
            failed.append(error)

    users, switchers = ([threading.Thread(target=f) for _ in "ab"] for f in (use, switch))
    for thread in (*users, *switchers):
        thread.start()
    for thread in switchers:
        thread.join()
    done.set()
    for thread in users:
        thread.join()
    assert failed == [] and not nt.is_enabled()


def test_transforms(launched):
    x = torch.randn(2, 1, SEQLEN, 3 * WIDTH)
    want = torch.func.vmap(attend)(x), torch.func.grad(lambda x: attend(x).square().sum())(x[0])
    nt.enable()
    found = torch.func.vmap(attend)(x)
    assert launched.take() == ["forward"]
    slope = torch.func.grad(lambda x: attend(x).square().sum())(x[0])
    assert launched.take() == ["forward", *BACKWARD]
    torch.testing.assert_close((found, slope), want, atol=1e-5, rtol=0)


def test_autocast_and_dropout(launched):
    x = torch.randn(1, SEQLEN, 3 * WIDTH)
    nt.enable()
    with torch.autocast("cpu", torch.float16):
        assert attend(x).dtype is torch.float16
    torch.manual_seed(0)
    q = x.view(1, 1, SEQLEN, -1)
    first = functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    torch.manual_seed(0)
    assert functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5).equal(first)
    assert launched.take() == ["forward"] * 3


def test_nobody_warns_of_what_was_asked_for(recwarn):
    nt.enable()
    nt.disable()
    assert not recwarn.list


def test_what_is_kept_on_disk_is_not_confused():
    """Graphs do not say whose operator it was: their keys must."""
    config = torch.compiler.config
    before = config.cache_key_tag
    config.cache_key_tag = "users"
    try:
        nt.enable()
        assert config.cache_key_tag not in ("users", before) and "users" in config.cache_key_tag
        nt.disable()
        assert config.cache_key_tag == "users"
    finally:
        config.cache_key_tag = before
