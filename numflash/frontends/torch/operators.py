"""numflash::attention and numflash::attention_backward, as graphs hold them.

The operators make the calls that eager mode makes. A second derivative is an error.
"""

import torch

from numflash.frontends.encoding import decode
from numflash.frontends.torch import calls
from numflash.problem.options import AttentionOptions
from numflash.runtime.errors import UnsupportedError

TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
LIBRARY = torch.library.Library("numflash", "DEF")
LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] arrays, str options) -> (Tensor, Tensor)",
    tags=TAGS,
)
LIBRARY.define(
    "attention_backward(Tensor? dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? dlse, Tensor[] arrays, str options, str wrt) -> Tensor[]",
    tags=TAGS,
)
ATTENTION = torch.ops.numflash.attention.default
BACKWARD = torch.ops.numflash.attention_backward.default
DEVICES = {"CPU": "cpu", "CUDA": "cuda"}


def _attention(q, k, v, arrays, text: str):
    with torch.no_grad():
        out, lse, _ = calls.forward(q, k, v, decode(text, arrays))
    return out, lse


def _backward(dout, q, k, v, out, lse, dlse, arrays, text: str, wrt: str):
    with torch.no_grad():
        options, names = decode(text, arrays), tuple(wrt.split())
        # A mapped lse may be a view of broadcast ones.
        given = dout, q, k, v, out, lse.contiguous(), dlse
        return list(calls.backward(*given, options, names))


def _fake_attention(q, k, v, arrays, text: str):
    options = decode(text, arrays)
    _expect_alike(q, k, v)
    dtype = q.dtype if options.out_dtype is None else getattr(torch, options.out_dtype)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=dtype)
    return out, q.new_empty(_shape_of_lse(q, options), dtype=torch.float32)


def _expect_alike(q, k, v) -> None:
    """Check what a graph may know before it runs; the rest is checked then."""
    if not (q.dim() == k.dim() == v.dim()) or not 2 <= q.dim() <= 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v must have the same number of axes, 2 to 4, got {shapes}")
    if not (q.dtype == k.dtype == v.dtype):
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.dtype not in calls.DTYPES:
        raise TypeError(f"q must be float16, bfloat16 or float32, got {q.dtype}")
    if not (q.device == k.device == v.device):
        devices = f"{q.device}, {k.device}, {v.device}"
        raise ValueError(f"q, k and v must lie on one device, got {devices}")


def _shape_of_lse(q, options: AttentionOptions) -> tuple:
    if options.layout == "bhsd" or q.dim() == 2:
        return tuple(q.shape[:-1])
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])


def _fake_backward(dout, q, k, v, out, lse, dlse, arrays, text: str, wrt: str):
    options = decode(text, arrays)
    given = {"q": q, "k": k, "v": v} | options.arrays()
    return [given[name].new_empty(given[name].shape) for name in wrt.split()]


def _setup(ctx, inputs, output):
    q, k, v, arrays, ctx.text = inputs
    options = decode(ctx.text, arrays)
    ctx.names = tuple(options.arrays())
    calls.expect_gradients(ctx.names, tuple(ctx.needs_input_grad[3 : 3 + len(arrays)]), options)
    ctx.save_for_backward(q, k, v, *output, *arrays)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dlse):
    *own, of_arrays, _ = ctx.needs_input_grad
    if dout is None and dlse is None:
        return None, None, None, [None] * len(of_arrays), None
    q, k, v, out, lse, *arrays = ctx.saved_tensors
    wrt = calls.wanted(ctx.names, (*own, *of_arrays))
    made = BACKWARD(dout, q, k, v, out, lse, dlse, arrays, ctx.text, " ".join(wrt))
    own, of_arrays = calls.dealt(wrt, made, ctx.names)
    return *own, of_arrays, None


def no_second(*_):
    """Raise the error of a second derivative."""
    raise UnsupportedError(
        "numflash has first derivatives only: the gradients of attention cannot be differentiated "
        "again (create_graph=True, torch.func.hessian, a gradient penalty)"
    )


def _autocast(device: str, key: str):
    """The operator on tensors of autocast's dtype, as PyTorch's own attention has it."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def attention(q, k, v, arrays, text: str):
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return ATTENTION(*(calls.as_autocast(x, dtype) for x in (q, k, v)), arrays, text)

    return attention


for _key, _device in DEVICES.items():
    LIBRARY.impl("attention", _attention, _key)
    LIBRARY.impl("attention_backward", _backward, _key)
    LIBRARY.impl("attention", _autocast(_device, f"Autocast{_key}"), f"Autocast{_key}")
torch.library.register_fake("numflash::attention", _fake_attention, lib=LIBRARY)
torch.library.register_fake("numflash::attention_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd(
    "numflash::attention", _gradients, setup_context=_setup, lib=LIBRARY
)
torch.library.register_autograd("numflash::attention_backward", no_second, lib=LIBRARY)
