"""Which kernels would compute a call of `scaled_dot_product_attention`, or why torch's own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from numflash.api.explain import Explanation, explain_dispatch
from numflash.frontends.torch.sdpa import Reason, arrange
from numflash.runtime.errors import UnsupportedError


@dataclass(frozen=True)
class SdpaExplanation:
    """What runs for one call of `scaled_dot_product_attention`; `print` shows it.

    Attributes:
        kernels: numflash's, as `numflash.explain_dispatch` describes them; None where torch's own
            attention runs.
        reason: why torch's own runs; None where numflash does.

    Example:
        >>> import torch, numflash.torch
        >>> q = torch.empty(2, 16, 1024, 320, dtype=torch.float16)
        >>> print(numflash.torch.explain(q, q, q, arch="NVIDIA H200"))
        torch's own: head_dim of query is 320: numflash takes 1 to 256
    """

    kernels: Explanation | None
    reason: str | None

    def __str__(self) -> str:
        return str(self.kernels) if self.reason is None else f"torch's own: {self.reason}"


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    arch: str | None = None,
) -> SdpaExplanation:
    """Say which kernels `scaled_dot_product_attention` runs, or why torch's own.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa: as there. Only
            metadata matters; those of query, key, value and attn_mask that require a gradient say
            which gradients the kernels are to give.
        arch: answer for a GPU that need not be here, as `numflash.explain_dispatch`; tensors then
            may be on any device.

    Nothing is computed. Of a call that torch refuses the reason says what is wrong, in short.

    Raises:
        ValueError: an arch that is none.

    Example:
        >>> import torch, numflash.torch
        >>> q = torch.empty(2, 16, 1024, 64, dtype=torch.float16)
        >>> print(numflash.torch.explain(q, q, q, is_causal=True, arch="NVIDIA H200"))
        ... # doctest: +ELLIPSIS
        on NVIDIA H200...
        forward: sm90-...
    """
    call = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    anywhere = {} if arch is None else {"is_on": None}
    with torch.no_grad():
        arranged = arrange(*call, **anywhere, cast=_like)
        if isinstance(arranged, Reason):
            return SdpaExplanation(None, arranged.text)
        q, k, v, options, _ = arranged
        names = {
            "q": query,
            "k": key,
            "v": value,
            "bias": attn_mask if "bias" in options else None,
        }
        wrt = tuple(name for name, x in names.items() if x is not None and x.requires_grad)
        if "dropout_p" in options:
            options["seed"] = 0
        try:
            kernels = explain_dispatch(q, k, v, arch=arch, wrt=wrt or None, **options)
        except UnsupportedError as error:
            return SdpaExplanation(None, str(error))
    return SdpaExplanation(kernels, None)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)
