"""The attention function that transformers calls in every layer."""

from typing import Any

import torch
from torch import Tensor

from numflash.frontends.torch.attention import attention as torch_attention
from numflash.frontends.torch.attention import attention_varlen
from numflash.frontends.torch.calls import DTYPES
from numflash.frontends.transformers.masks import Mask


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by numflash, as transformers asks for it.

    Args:
        module: the layer's, whose `is_causal` holds where there is no mask and is_causal is None.
        query, key, value: (batch, heads, tokens, head_dim); grouped heads as they are.
        attention_mask: what the mask function made; or (batch or 1, heads or 1, queries, keys),
            boolean or a float to add; None hides nothing but what is_causal says.
        dropout: share of the weights that become 0; transformers gives it in training alone.
        scaling: factor of the scores; None is head_dim ** -0.5.
        sliding_window: of the layer; masks have it already. It holds for sequences of
            cu_seq_lens_q without a mask.
        softcap: scores s become softcap * tanh(s / softcap).
        is_causal: with no mask, whether queries see the keys up to their own position.
        s_aux: (heads,): a logit of each head without a key, which takes part in the softmax.
        position_bias: broadcastable to (batch, heads, queries, keys), added to the scores.
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1,) int32, of a collator without padding: where
            sequences begin in a batch of one.
        kwargs: what else models hand on.

    Returns:
        (batch, tokens, heads, head_dim), contiguous; and None, because weights are not stored.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.torch.attention`; ValueError for
            output_attentions, for a head_mask, for sinks of each token, for a mask of other sizes.
    """
    _refuse(kwargs)
    options: dict[str, Any] = {"softmax_scale": scaling, "softcap": softcap or 0.0}
    if s_aux is not None:
        options["sinks"] = s_aux.float()
    if dropout:
        options["dropout_p"] = dropout
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if cu_seq_lens_q is not None and position_bias is None:
        band = _band_of_sequences(attention_mask, causal, sliding_window)
        # Of several batch entries a mask says what cu_seq_lens_q cannot.
        if band is not None and (attention_mask is None or query.shape[0] == 1):
            sequences = cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
            return _of_sequences(q, k, v, sequences, options | band), None
    if isinstance(attention_mask, Mask):
        _expect_sizes(attention_mask, query, key)
        options |= attention_mask.of_call()
    elif attention_mask is None:
        options["causal"] = bool(causal) and query.shape[2] > 1
    elif attention_mask.dtype == torch.bool:
        options["mask"] = attention_mask
    elif attention_mask.dtype in DTYPES:
        options["bias"] = attention_mask
    else:
        raise TypeError(
            "attention_mask must be boolean, or floats of at most 32 bits that are added, got "
            f"{attention_mask.dtype}"
        )
    if position_bias is not None:
        bias = options.get("bias")
        options["bias"] = position_bias if bias is None else position_bias + bias
    return torch_attention(q, k, v, **options), None


def _band_of_sequences(
    attention_mask: Mask | Tensor | None, causal: bool, sliding_window: int | None
) -> dict[str, Any] | None:
    """The options that say what queries see of their own sequence; None if a mask says more."""
    if isinstance(attention_mask, Mask):
        return attention_mask.packed
    if attention_mask is not None:
        return None
    left = -1 if sliding_window is None else sliding_window - 1
    return {"causal": bool(causal), "window_size": (left, -1 if causal else left)}


def _of_sequences(
    q: Tensor, k: Tensor, v: Tensor, sequences: tuple[Tensor, Tensor], options: dict[str, Any]
) -> Tensor:
    """(1, tokens, heads, head_dim): attention of sequences that lie one after another."""
    if q.shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q goes with a batch of one, in which all sequences lie, got {q.shape[0]}"
        )
    places = (x.to(torch.int32) for x in sequences)
    return attention_varlen(q[0], k[0], v[0], *places, **options)[None]


def _expect_sizes(mask: Mask, query: Tensor, key: Tensor) -> None:
    batch, _, *wanted = mask.shape
    given = [query.shape[2], key.shape[2]]
    if wanted != given or batch not in (1, query.shape[0]):
        raise ValueError(
            f"the mask was made for (batch, queries, keys) = {(batch, *wanted)}, the layer has "
            f"{(query.shape[0], *given)}"
        )


def _refuse(kwargs: dict[str, Any]) -> None:
    """Raise ValueError for what models ask for and numflash has not."""
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True asks for the weights, which numflash never stores; call "
            'model.set_attn_implementation("eager") to have them'
        )
    for name in ("head_mask", "sinks"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"numflash has no {name} that a model gives each layer; call "
                'model.set_attn_implementation("eager")'
            )
