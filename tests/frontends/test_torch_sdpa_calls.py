"""`numflash.torch.scaled_dot_product_attention`: calls of each kind, by numflash or by torch."""

import math
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "numflash[torch]"')

from torch.nn import functional  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.attention.bias import causal_lower_right, causal_upper_left  # noqa: E402

import numflash.torch as nt  # noqa: E402
from numflash.frontends.torch import sdpa  # noqa: E402
from numflash.runtime.errors import UnsupportedError  # noqa: E402
from tests.support.covering import ALL  # noqa: E402

BACKWARD = ["delta", "backward-dkdv", "backward-dq"]


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def math_path(*args, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return functional.scaled_dot_product_attention(*args, **options)


def expect_as_math_path(launched, query, key, value, mask=None, tolerance=2e-6, **options):
    """numflash ran, its result and gradients are those of torch's math path."""
    tensors = [query, key, value] if mask is None else [query, key, value, mask]
    wanted = [x for x in tensors if x.requires_grad]
    out = nt.scaled_dot_product_attention(*tensors, **options)
    assert launched.take() == ["forward"]
    same = math_path(*tensors, **options)
    assert out.shape == same.shape and out.dtype == same.dtype
    dout = torch.randn_like(same)
    found = torch.autograd.grad(out, wanted, dout)
    families = launched.take()
    assert families[:3] == BACKWARD
    if mask is not None and mask.requires_grad:
        assert any(each.startswith("backward-") for each in families[3:])
    for x, y in zip((out, *found), (same, *torch.autograd.grad(same, wanted, dout)), strict=True):
        assert x.dtype == y.dtype and (x - y).abs().max() <= tolerance * max(1, y.abs().max())


SHAPES = {
    "2 dimensions": ((5, 8), (6, 8), (6, 4), {}),
    "3": ((2, 5, 8), (2, 6, 8), (2, 6, 8), {"is_causal": True}),
    "5": ((2, 1, 1, 3, 8), (2, 1, 1, 4, 8), (2, 1, 1, 4, 8), {}),
    "5, batches broadcast": ((2, 1, 1, 3, 8), (1, 2, 1, 4, 8), (1, 1, 1, 4, 8), {}),
    "heads of q broadcast": ((1, 1, 3, 8), (1, 2, 4, 8), (1, 2, 4, 8), {}),
    "one head of k and v": ((1, 2, 3, 8), (1, 1, 4, 8), (1, 1, 4, 8), {}),
    "k and v broadcast": ((1, 1, 3, 8), (2, 1, 3, 8), (1, 1, 3, 8), {}),
    "fewer dimensions of k and v": ((1, 2, 3, 8), (2, 3, 8), (3, 8), {}),
    "grouped heads": ((1, 4, 3, 8), (1, 2, 5, 8), (1, 2, 5, 8), {"enable_gqa": True}),
    "grouped, 3": ((2, 3, 8), (1, 3, 8), (1, 3, 8), {"enable_gqa": True, "is_causal": True}),
    "grouped, broadcast": ((2, 2, 3, 8), (1, 3, 8), (1, 3, 8), {"enable_gqa": True}),
    "more queries, causal": ((1, 1, 7, 8), (1, 1, 4, 8), (1, 1, 4, 8), {"is_causal": True}),
    "more keys, causal": ((1, 1, 4, 8), (1, 1, 7, 8), (1, 1, 7, 8), {"is_causal": True}),
    "a negative scale": ((1, 1, 4, 8), (1, 1, 4, 8), (1, 1, 4, 8), {"scale": -0.5}),
    "a scale of NumPy's": ((1, 1, 4, 8), (1, 1, 4, 8), (1, 1, 4, 8), {"scale": np.float64(0.3)}),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes(case, launched):
    *shapes, options = SHAPES[case]
    expect_as_math_path(launched, *(randn(*shape) for shape in shapes), **options)


def test_one_head_of_keys_for_all_is_a_group():
    """Its gradient adds up in the kernel: no gradients of each head lie in memory."""
    query, key = randn(1, 4, 3, 8), randn(1, 1, 3, 8)
    arranged = sdpa.arrange(query, key, key, None, 0.0, False, None, False)
    assert arranged.k.shape == (1, 3, 1, 8) and arranged.k.data_ptr() == key.data_ptr()


MASKS = {
    "no dimension": ((1, 1, 3, 8), ()),
    "keys": ((1, 2, 3, 8), (4,)),
    "queries and keys": ((2, 1, 3, 8), (3, 4)),
    "of each head": ((1, 2, 3, 8), (2, 3, 4)),
    "padding": ((2, 1, 3, 8), (2, 1, 1, 4)),
    "one for all keys": ((1, 2, 3, 8), (1, 2, 3, 1)),
    "2 dimensions": ((3, 8), (3, 4)),
    "3 dimensions": ((2, 3, 8), (1, 3, 4)),
    "5 dimensions, of all": ((2, 1, 2, 3, 8), (2, 1, 4)),
    "5 dimensions, of some": ((2, 2, 1, 3, 8), (2, 1, 1, 1, 4)),
}


# By default each case with the one or the other, or with none.
BOTH = [(case, kind) for case in MASKS for kind in ("bool", "float32")]


@pytest.mark.parametrize("case, of", BOTH if ALL else BOTH[::3])
def test_masks(case, of, launched):
    shape, shape_of_mask = MASKS[case]
    query = randn(*shape)
    key, value = (randn(*shape[:-2], 4, 8) for _ in "kv")
    mask = torch.rand(shape_of_mask) < 0.6 if of == "bool" else randn(*shape_of_mask)
    expect_as_math_path(launched, query, key, value, mask)


@pytest.mark.parametrize("infinite", [False, True])
def test_a_row_that_is_masked_whole_gives_0(infinite, launched):
    query, key, value = (randn(1, 2, 4, 8) for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[1] = False
    if infinite:
        mask = torch.where(mask, 0.0, -torch.inf).requires_grad_()
    expect_as_math_path(launched, query, key, value, mask)
    assert not nt.scaled_dot_product_attention(query, key, value, mask)[:, :, 1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_float32_mask_of_16_bit_inputs(dtype, launched):
    query, key, value = (randn(1, 2, 4, 8, dtype=dtype) for _ in range(3))
    tolerance = 4 * torch.finfo(dtype).eps
    expect_as_math_path(launched, query, key, value, randn(4, 4), tolerance)


@pytest.mark.parametrize("seqlen_q, seqlen_k, batch", [(3, 0, 2), (0, 3, 2), (3, 3, 0)])
def test_nothing(seqlen_q, seqlen_k, batch):
    query, key = randn(batch, 2, seqlen_q, 8), randn(batch, 2, seqlen_k, 8)
    out = nt.scaled_dot_product_attention(query, key, key)
    assert out.shape == query.shape and not out.any()
    out.sum().backward()
    assert not query.grad.any() and not key.grad.any()
    assert nt.explain(query, key, key).reason is None


def test_heads_are_put_together_without_a_copy():
    """As after torch's flash kernels, where q, k and v are views of what a layer gave."""
    query, key, value = torch.randn(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    out = nt.scaled_dot_product_attention(query, key, value)
    assert out.transpose(1, 2).is_contiguous()
    assert nt.scaled_dot_product_attention(query[0], key[0], value[0]).is_contiguous()


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("sizes", [(3, 5), (5, 5)], ids=str)
def test_causal_biases_of_torch(make, sizes, launched):
    query, key = randn(1, 1, sizes[0], 8), randn(1, 1, sizes[1], 8)
    bias = make(*sizes)
    out = nt.scaled_dot_product_attention(query, key, key, bias)
    assert launched.take() == ["forward"]
    same = math_path(query, key, key, bias._materialize())
    torch.testing.assert_close(out, same, atol=2e-6, rtol=0)
    explained = nt.explain(query, key, key, make(4, 4))
    assert explained.reason.startswith("attn_mask is a CausalBias of other lengths")
    with pytest.raises(ValueError, match="causal=True"):
        nt.scaled_dot_product_attention(query, key, key, bias, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, launched):
    query, key, mask = randn(1, 2, 4, 8), randn(1, 2, 4, 8, dtype=torch.float16), randn(4, 4)
    with torch.autocast("cpu", dtype):
        out = nt.scaled_dot_product_attention(query, key, key, mask)
        explained = nt.explain(query, key, key, mask)
        assert launched.take() == ["forward"] and explained.reason is None
        same = math_path(query, key, key, mask)
        double = nt.scaled_dot_product_attention(query.double(), query.double(), query.double())
    assert out.dtype is same.dtype is dtype and double.dtype is torch.float64
    torch.testing.assert_close(out, same, atol=4 * torch.finfo(dtype).eps, rtol=0)
    out.sum().backward()
    assert launched.take()[:3] == BACKWARD
    assert query.grad.dtype is mask.grad.dtype is torch.float32


def test_dropout_repeats(launched):
    query = randn(1, 1, 8, 8)

    def run(seed):
        torch.manual_seed(seed)
        return nt.scaled_dot_product_attention(query, query, query, dropout_p=0.5)

    first, second, again = run(0), run(1), run(0)
    assert launched.take() == ["forward"] * 3
    assert (first == again).all() and (first != second).any()


class Named(torch.Tensor):
    """A class of tensors of somebody's."""


x, wide = torch.randn(1, 2, 4, 8), torch.randn(1, 1, 4, 257)
NOT_NUMFLASHS = {
    "query is torch.float64: numflash takes": ([x.double()] * 3, {}),
    "head_dim of query is 257: numflash takes 1 to 256": ([wide, wide, x[:, :1]], {}),
    "head_dim of value is 257: numflash takes 1 to 256": ([x[:, :1], x[:, :1], wide], {}),
    "head_dim of query is 0: numflash takes 1 to 256": ([x[..., :0], x[..., :0], x], {}),
    "query has 0 heads: numflash takes at least 1": ([x[:, :0]] * 3, {}),
    "key has 2 heads and value 1": ([x, x, x[:, :1]], {"enable_gqa": True}),
    "dropout_p is 1.0: numflash takes": ([x] * 3, {"dropout_p": 1.0}),
    "scale is inf: numflash takes finite numbers": ([x] * 3, {"scale": math.inf}),
    "dropout_p and scale must be numbers": ([x] * 3, {"scale": torch.tensor(0.5)}),
    "query is on meta: numflash runs on CPU": ([x.to("meta")] * 3, {}),
    "query is a Named: numflash takes plain tensors": ([x.as_subclass(Named), x, x], {}),
    "attn_mask is a Named": ([x, x, x, torch.ones(4, 4).as_subclass(Named)], {}),
    "query is nested": ([torch.nested.nested_tensor(list(x.transpose(1, 2)))] * 3, {}),
    "query is nested or torch.sparse": ([x[0, 0].to_sparse(), x[0, 0], x[0, 0]], {}),
}


@pytest.mark.parametrize("reason", NOT_NUMFLASHS)
def test_torchs_own_runs_where_numflash_cannot(reason, launched):
    tensors, options = NOT_NUMFLASHS[reason]
    explained = nt.explain(*tensors, **options)
    assert explained.reason.startswith(reason) and explained.kernels is None
    assert str(explained) == f"torch's own: {explained.reason}"
    out = nt.scaled_dot_product_attention(*tensors, **options)
    same = functional.scaled_dot_product_attention(*tensors, **options)
    assert type(out) is type(same) and launched == []
    if not (out.is_meta or out.is_nested):
        torch.testing.assert_close(out, same, equal_nan=True)


def test_torchs_math_path_runs_where_it_is_asked_for(launched):
    query = randn(1, 1, 4, 8)
    with sdpa_kernel(SDPBackend.MATH):
        assert "math path" in nt.explain(query, query, query).reason
        out = nt.scaled_dot_product_attention(query, query, query)
        (slope,) = torch.autograd.grad(out.sum(), query, create_graph=True)
        slope.sum().backward()
    assert launched == [] and query.grad.any()
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        nt.scaled_dot_product_attention(query, query, query)
    assert launched.take() == ["forward"]


def test_what_kernels_lack_is_torchs(monkeypatch, launched):
    """What only the choice of kernels finds, as a GPU before Turing."""

    def refuse(*arguments, **options):
        raise UnsupportedError("no kernel for this GPU")

    monkeypatch.setattr(sdpa, "attention", refuse)
    monkeypatch.setattr("numflash.frontends.torch.explaining.explain_dispatch", refuse)
    same = functional.scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(nt.scaled_dot_product_attention(x, x, x), same)
    assert nt.explain(x, x, x).reason == "no kernel for this GPU" and launched == []


ERRORS = {
    "both": (
        {"attn_mask": torch.ones(4, 4) > 0, "is_causal": True},
        RuntimeError,
        "is_causal=True",
    ),
    "integers": ({"attn_mask": torch.ones(4, 4).int()}, RuntimeError, "mask dtype to be bool"),
    "half": ({"attn_mask": torch.ones(4, 4).half()}, RuntimeError, "mask dtype to be bool"),
    "small mask": ({"attn_mask": torch.ones(4, 3)}, RuntimeError, "must match the size"),
    "large mask": ({"attn_mask": torch.ones(2, 2, 4, 4)}, RuntimeError, "broadcast shape"),
    "5 of mask": ({"attn_mask": torch.ones(1, 1, 2, 4, 4)}, RuntimeError, "broadcast shape"),
    "a list": ({"attn_mask": [1]}, TypeError, "must be Tensor"),
    "dropout": ({"dropout_p": 1.5}, RuntimeError, "between 0 and 1, but got 1.5"),
    "causal": ({"is_causal": 1}, TypeError, "must be bool"),
    "word": ({"scale": "a"}, TypeError, "must be float"),
    "gqa": ({"enable_gqa": 1}, TypeError, "must be bool"),
    "dtypes": ({"key": x.half()}, RuntimeError, "same dtype"),
    "devices": ({"key": x.to("meta")}, RuntimeError, "same device"),
    "1 dimension": ({"query": x[0, 0, 0]}, RuntimeError, "at least 2 dim"),
    "head_dim": ({"key": x[..., :4]}, RuntimeError, "Expected size"),
    "seqlen": ({"value": x[:, :, :3]}, RuntimeError, "Expected size"),
    "batch": (
        {"query": x.expand(3, -1, -1, -1), "key": x.expand(2, -1, -1, -1)},
        RuntimeError,
        "size",
    ),
    "heads": ({"query": torch.cat([x, x], 1)}, RuntimeError, "must match"),
    "groups": ({"query": x[:, :1], "enable_gqa": True}, RuntimeError, "must divide"),
    "2 of groups": ({"query": x[0, 0], "enable_gqa": True}, IndexError, "out of range"),
    "complex": (
        {n: x.cfloat() for n in ("query", "key", "value")},
        RuntimeError,
        "ot implemented",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_those_of_torchs_math_path(case, launched):
    options, error, text = ERRORS[case]
    call = {"query": x, "key": x, "value": x} | options
    with pytest.raises(error, match=text):
        nt.scaled_dot_product_attention(**call)
    assert nt.explain(**call).reason and launched == []


def test_scale_and_grouped_heads_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        nt.scaled_dot_product_attention(x, x, x, None, 0.0, False, 1.0)


def test_a_second_derivative_is_an_error():
    query = randn(1, 1, 4, 8)
    out = nt.scaled_dot_product_attention(query, query, query)
    (slope,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(UnsupportedError, match="first derivatives only"):
        slope.sum().backward()


def test_explain_names_the_kernels_that_run(launched):
    query, key, value = (randn(1, 2, 4, 8) for _ in range(3))
    mask, state = randn(4, 4), torch.get_rng_state()
    call = {"attn_mask": mask, "dropout_p": 0.5}
    kernels = nt.explain(query, key, value, **call).kernels
    assert launched == [] and (torch.get_rng_state() == state).all()
    nt.scaled_dot_product_attention(query, key, value, **call).sum().backward()
    chosen = [kernels.forward, *kernels.of_backward.values()]
    assert launched == [f"{each.family} {each.config}" for each in chosen]
    assert str(nt.explain(query, key, value)).startswith("forward: ")


def test_explain_of_a_gpu_that_is_not_here():
    query = torch.empty(2, 16, 1024, 64, dtype=torch.float16, device="meta")
    assert (
        str(nt.explain(query, query, query, arch="h200"))
        .splitlines()[1]
        .startswith("forward: sm90")
    )
    with pytest.raises(ValueError, match="sm_99"):
        nt.explain(query, query, query, arch="sm_99x")


OUTSIDE = """
import torch, numflash.torch as nt
x = torch.randn(1, 2, 4, 8)
print(nt.explain(x, x, x))
print(nt.explain(x, x, x, arch="h200").kernels.forward.family)
same = torch.nn.functional.scaled_dot_product_attention(x, x, x)
nt.enable()
assert (nt.scaled_dot_product_attention(x, x, x) == same).all()
assert (torch.nn.functional.scaled_dot_product_attention(x, x, x) == same).all()
"""


def test_tensors_on_a_cpu_outside_the_simulator_are_torchs(monkeypatch):
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
    done = subprocess.run([sys.executable, "-c", OUTSIDE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch's own: query is on cpu: numflash runs on CUDA devices")
    assert done.stdout.endswith("\nforward\n")
