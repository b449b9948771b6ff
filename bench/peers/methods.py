"""The peers that numflash is measured against, each a function that prepares a call.

Arrays are (batch, seqlen, heads, head_dim), results too. What a peer needs that is no part of its
work is done while preparing: other layouts, block masks, the forward before a backward. A peer
says what it cannot do by raising; the benchmark records the reason and goes on.
"""

import importlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.peers import fp8 as peers_fp8
from bench.peers import one_kernel, sequences
from bench.points.interleave import Method
from bench.points.points import Point

OURS = "numflash"
FP8, FP8_QUANTIZING = "numflash-fp8", "numflash-fp8+quantize"
FP8_TOLERANCE = 0.1
"""Root mean square of an FP8 result's error over that of the result; on random numbers 0.05."""
ALL = "all"


@dataclass(frozen=True)
class Peer:
    """A method to measure.

    Attributes:
        name: as in tables and records.
        modules: what must be importable.
        prepare: (point, inputs) -> Method; inputs are q, k, v, and for a backward dout, out, lse.
        distribution: the pip package whose version the record names.
        max_rel_rms: how far off results may be: a root mean square relative to that of the exact
            ones. None holds them to the rule for the input precision.
        operand_bytes: bytes of an element of q, k and v as the method reads them; None for the
            point's.
    """

    name: str
    modules: tuple[str, ...]
    prepare: Callable[[Point, dict[str, Any]], Method]
    distribution: str | None = None
    max_rel_rms: float | None = None
    operand_bytes: int | None = None

    def unavailable(self) -> str | None:
        """Why the peer cannot be used here; None if it can."""
        for module in self.modules:
            try:
                importlib.import_module(module)
            except Exception as error:
                return f"not importable: {' '.join(str(error).split()) or repr(error)}"
        return None


def numflash(config: Any = None) -> Callable:
    """Preparation of numflash, with a config other than its own choice."""

    def prepare(point: Point, inputs: dict) -> Method:
        if point.kind in sequences.KINDS:
            return sequences.numflash(config)(point, inputs)
        import numflash as library

        options = {"causal": point.causal, **({} if config is None else {"config": config})}
        q, k, v = (inputs[name] for name in "qkv")
        if point.direction == "forward":
            return Method(OURS, lambda: {"out": library.attention(q, k, v, **options)})
        arrays = inputs["dout"], q, k, v, inputs["out"], inputs["lse"]
        return Method(OURS, lambda: _gradients(library.attention_backward(*arrays, **options)))

    return prepare


def torch_sdpa(backend: str) -> Callable:
    """Preparation of PyTorch's SDPA, restricted to one back end."""

    def prepare(point: Point, inputs: dict) -> Method:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        if point.causal and point.seqlen_q != point.seqlen_k:
            raise NotImplementedError("its causal mask is aligned to the top left")
        options = {"is_causal": point.causal}
        if point.group_size > 1:
            options["enable_gqa"] = True
        kind = getattr(SDPBackend, backend)

        def attend(q, k, v):
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(*heads_first, **options).transpose(1, 2)

        return _torch_method(backend, point, inputs, attend, lambda: sdpa_kernel(kind))

    return prepare


def flex_attention(point: Point, inputs: dict) -> Method:
    """FlexAttention, compiled for the point's shapes, with a block mask if causal."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    torch.compiler.reset()  # or it would give up recompiling after a few shapes
    options = {"enable_gqa": True} if point.group_size > 1 else {}
    if point.causal:
        shift = point.seqlen_k - point.seqlen_q

        def is_seen(batch, head, query, key):
            return key <= query + shift

        options["block_mask"] = create_block_mask(
            is_seen, None, None, point.seqlen_q, point.seqlen_k, device=inputs["q"].device
        )
    compiled = torch.compile(flex, dynamic=False)
    # Its kernels read rows of heads-first arrays: copied outside the timed region.
    copies = {n: x.transpose(1, 2).contiguous() for n, x in inputs.items() if n in "qkv"}

    def attend(q, k, v):
        return compiled(q, k, v, **options).transpose(1, 2)

    return _torch_method("FlexAttention", point, {**inputs, **copies}, attend, heads_first=True)


def flash_attention_2(point: Point, inputs: dict) -> Method:
    """The flash_attn package."""
    if point.kind in sequences.KINDS:
        attend = sequences.flash_attention("flash_attn", "block_table")(point, inputs)
        return _torch_method("FlashAttention-2", point, inputs, attend)
    from flash_attn import flash_attn_func

    def attend(q, k, v):
        return flash_attn_func(q, k, v, causal=point.causal)

    return _torch_method("FlashAttention-2", point, inputs, attend)


def flash_attention_3(module: str) -> Callable:
    """The FlashAttention-3 package, or the fa3-fwd wheel, which names its module otherwise."""

    def prepare(point: Point, inputs: dict) -> Method:
        interface = importlib.import_module(module)
        if module == "fa3_fwd_interface" and point.direction == "backward":
            raise NotImplementedError("the fa3-fwd wheel has no backward")
        if point.kind in sequences.KINDS:
            inner = sequences.flash_attention(module, "page_table")(point, inputs)
        else:
            # Of one query only this function splits the keys by itself.
            is_decode = point.kind == "decode"
            function = "flash_attn_with_kvcache" if is_decode else "flash_attn_func"
            inner = partial(getattr(interface, function), causal=point.causal)

        def attend(*tensors):
            # Some versions return more beside the result.
            result = inner(*tensors)
            return result[0] if isinstance(result, tuple) else result

        return _torch_method("FlashAttention-3", point, inputs, attend)

    return prepare


def triton(point: Point, inputs: dict) -> Method:
    """A straightforward Triton kernel: `bench.peers.triton`."""
    from bench.peers.triton import attention

    if point.direction == "backward":
        raise NotImplementedError("bench.peers.triton has a forward only")
    q, k, v = (inputs[name] for name in "qkv")
    return Method("Triton", lambda: {"out": attention(q, k, v, point.causal)})


def cupy_standard(function: str) -> Callable:
    """Preparation of one of the CuPy implementations of `bench.peers.standard`."""

    def prepare(point: Point, inputs: dict) -> Method:
        from bench.peers import standard

        arrays = standard.as_cupy(point, inputs)
        call = getattr(standard, function)(point, **arrays)
        return Method(function, lambda: _back(call(), inputs["q"]))

    return prepare


def _back(results: dict, like) -> dict:
    """CuPy arrays as tensors of PyTorch, without copying, if the inputs were those."""
    if not hasattr(like, "data_ptr"):
        return results
    import torch

    return {name: torch.from_dlpack(x) for name, x in results.items()}


def _torch_method(
    name: str, point: Point, inputs: dict, attend, context=nullcontext, heads_first: bool = False
) -> Method:
    """A method from a forward function on tensors; its backward is autograd's."""
    import torch

    of_cache = "q", "k_cache", "v_cache"
    tensors = [inputs[key] for key in (of_cache if "k_cache" in inputs else "qkv")]
    if not isinstance(tensors[0], torch.Tensor):
        raise NotImplementedError("needs PyTorch to use the GPU")
    if point.direction == "forward":
        return Method(name, lambda: {"out": attend(*tensors)}, context)
    leaves = [x.detach().requires_grad_() for x in tensors]
    with context(), torch.enable_grad():
        out = attend(*leaves)

    def gradients() -> dict:
        found = torch.autograd.grad(out, leaves, inputs["dout"], retain_graph=True)
        return _gradients(x.transpose(1, 2) for x in found) if heads_first else _gradients(found)

    return Method(name, gradients, context)


def _fp8(
    name: str, modules: tuple[str, ...], prepare: Callable, distribution=None, operand_bytes=1
) -> Peer:
    return Peer(name, modules, prepare, distribution, FP8_TOLERANCE, operand_bytes)


def _gradients(arrays) -> dict:
    return dict(zip(("dq", "dk", "dv"), arrays, strict=True))


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(OURS, ("numflash",), numflash()),
        _fp8(FP8, ("numflash",), peers_fp8.quantized()),
        _fp8(FP8_QUANTIZING, ("numflash",), peers_fp8.quantizing, operand_bytes=None),
        Peer("torch-cudnn", ("torch",), torch_sdpa("CUDNN_ATTENTION"), "torch"),
        Peer("torch-flash", ("torch",), torch_sdpa("FLASH_ATTENTION"), "torch"),
        Peer("torch-efficient", ("torch",), torch_sdpa("EFFICIENT_ATTENTION"), "torch"),
        Peer("torch-math", ("torch",), torch_sdpa("MATH"), "torch"),
        Peer("flash-attention-2", ("flash_attn",), flash_attention_2, "flash-attn"),
        Peer(
            "flash-attention-3",
            ("flash_attn_interface",),
            flash_attention_3("flash_attn_interface"),
            "flash-attn-3",
        ),
        Peer("fa3-fwd", ("fa3_fwd_interface",), flash_attention_3("fa3_fwd_interface"), "fa3-fwd"),
        *(
            _fp8(f"{name}-fp8", (module,), peers_fp8.flash_attention_3(module), distribution)
            for name, module, distribution in (
                ("flash-attention-3", "flash_attn_interface", "flash-attn-3"),
                ("fa3-fwd", "fa3_fwd_interface", "fa3-fwd"),
            )
        ),
        Peer("triton", ("torch", "triton"), triton, "triton"),
        Peer("cupy", ("cupy",), cupy_standard("whole_matrix")),
        Peer("flex-attention", ("torch",), flex_attention, "torch"),
    )
}
"""Name -> peer. The first is numflash; those that compile long come last."""
OF_SEQUENCES = (OURS, "flash-attention-2", "flash-attention-3", "fa3-fwd", "flashinfer")
"""Those that have functions for sequences one after another, or for caches."""
_FLASHINFER = Peer("flashinfer", ("flashinfer",), sequences.flashinfer, "flashinfer-python")


def find(name: str) -> Peer:
    """The peer of a name; variants: "numflash:CONFIG", "numflash-fp8:CONFIG", "cupy:FUNCTION".

    A backward's CONFIG is family=config pairs: "numflash:backward-dq=m64n64w4,backward-dkdv=...".
    To "numflash:backward=CONFIG" ",dq=CHANGE" adds one of the changes of `one_kernel`.

    Raises:
        ValueError: there is none.
    """
    if name in PEERS:
        return PEERS[name]
    if name == _FLASHINFER.name:
        return _FLASHINFER
    kind, _, variant = name.partition(":")
    if kind == OURS and variant:
        config: Any = variant
        if "=" in variant:
            config = dict(pair.split("=", 1) for pair in variant.split(","))
            if (change := config.pop("dq", None)) is not None:
                return Peer(name, ("numflash",), one_kernel.changed(change, config["backward"]))
        return Peer(name, ("numflash",), numflash(config))
    if kind == FP8 and variant:
        return _fp8(name, ("numflash",), peers_fp8.quantized(variant))
    if kind == "cupy" and variant:
        return Peer(name, ("cupy",), cupy_standard(variant))
    raise ValueError(f"peer must be one of {', '.join(PEERS)}, got {name!r}")


def chosen(text: str, everyone: Iterable[str] | None = None) -> list[str]:
    """The peers that `--peers` names, numflash always among them. Raises ValueError.

    `everyone` are those of "all"; by default `PEERS`.
    """
    names = (
        list(everyone or PEERS)
        if text == ALL
        else [name.strip() for name in text.split(",") if name]
    )
    return list(dict.fromkeys([OURS, *(find(name).name for name in names)]))
