"""Other libraries' attention over ranks, causal, on tokens in zigzag order.

Each is a function (case, own arrays, ProcessGroup) -> (call, context) of the forward. A peer says
what it cannot do by raising; the benchmark records the reason and goes on.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from bench.distributed.cases import Case

Prepared = tuple[Callable[[], Any], Callable[[], AbstractContextManager]]


def ring_flash_attention(case: Case, own: dict[str, Any], group) -> Prepared:
    """ring-flash-attention, zigzag."""
    from ring_flash_attn import zigzag_ring_flash_attn_func

    _expect_causal(case)
    attend = partial(zigzag_ring_flash_attn_func, causal=True, group=group)
    return (lambda: attend(own["q"], own["k"], own["v"])), nullcontext


def yunchang(case: Case, own: dict[str, Any], group) -> Prepared:
    """Long-context attention by Tencent and others: its ring alone."""
    import torch.distributed as dist
    from yunchang import LongContextAttention, set_seq_parallel_pg

    _expect_causal(case)
    size = dist.get_world_size(group)
    if size != dist.get_world_size():
        raise NotImplementedError("it takes all ranks of the world")
    set_seq_parallel_pg(1, size, dist.get_rank(), size)
    attend = LongContextAttention(ring_impl_type="zigzag")
    return (lambda: attend(own["q"], own["k"], own["v"], causal=True)), nullcontext


def torch_context_parallel(case: Case, own: dict[str, Any], group) -> Prepared:
    """PyTorch's context_parallel around scaled_dot_product_attention."""
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.functional import scaled_dot_product_attention

    _expect_causal(case)
    heads_first = [own[name].transpose(1, 2) for name in "qkv"]
    device = own["q"].device
    mesh = DeviceMesh.from_group(group, device.type)
    # It takes the order of tokens from the buffers that it cuts.
    positions = torch.arange(case.seqlen, device=device)
    options = {"is_causal": True}
    if case.heads_q != case.heads_kv:
        options["enable_gqa"] = True

    def call():
        return scaled_dot_product_attention(*heads_first, **options).transpose(1, 2)

    return call, lambda: context_parallel(mesh, buffers=[positions], buffer_seq_dims=[0])


PEERS = {
    "ring-flash-attention": ring_flash_attention,
    "yunchang": yunchang,
    "torch context_parallel": torch_context_parallel,
}


def _expect_causal(case: Case) -> None:
    """Raises NotImplementedError."""
    if case.window is not None:
        raise NotImplementedError("its zigzag has no windows")
