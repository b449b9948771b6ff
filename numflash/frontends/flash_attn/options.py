"""flash-attn's options as those of numflash, and what has no meaning here, by its name."""

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from numflash.frontends.torch.traced import as_constant
from numflash.runtime.errors import UnsupportedError

CODES = (torch.float8_e4m3fn, torch.uint8)
"""The dtypes of e4m3 codes."""
EVERYWHERE = (-1, -1)


def options_of(
    *,
    softmax_scale: float | None,
    causal: bool,
    window_size,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    learnable_sink: Tensor | None = None,
    dropout_p: float = 0.0,
) -> dict[str, Any]:
    """numflash's options of a call, of flash-attn's.

    Raises:
        TypeError: arguments at the positions of flash-attn 3.
    """
    if isinstance(softmax_scale, bool) or dropout_p is None or isinstance(dropout_p, Tensor):
        raise TypeError(
            "positions of arguments are those of flash-attn 2, (..., dropout_p, softmax_scale, "
            f"causal, ...), got dropout_p {dropout_p!r} and softmax_scale {softmax_scale!r}; give "
            "arguments of flash-attn 3 by name, or call numflash.flash_attn.version_3"
        )
    is_off = softcap is None or (isinstance(softcap, float | int) and softcap <= 0)
    options = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_of(window_size),
        "softcap": 0.0 if is_off else softcap,
        "alibi_slopes": alibi_slopes,
    }
    if learnable_sink is not None:
        options["sinks"] = learnable_sink.float()
    if dropout_p:
        options["dropout_p"] = dropout_p
    return options


def window_of(window_size) -> tuple:
    """A window as numflash has it: of a pair, a list or a tensor, each side a number or None.

    A number below 0 is no limit.
    """
    if type(window_size) is tuple and len(window_size) == 2:
        left, right = window_size
        if type(left) is int and type(right) is int:
            return max(left, -1), max(right, -1)
    if window_size is None:
        return EVERYWHERE
    if isinstance(window_size, Tensor):
        window_size = window_size.tolist()
    if not isinstance(window_size, tuple | list):
        return window_size  # what it should be says the check of options
    sides = [each.item() if isinstance(each, Tensor) else each for each in window_size]
    return tuple(-1 if _is_below_0(each) else each for each in sides)


def _is_below_0(side) -> bool:
    return side is None or (isinstance(side, Integral) and side < 0)


def with_chunks(options: dict[str, Any], chunk: int, first: int | Tensor) -> dict[str, Any]:
    """The options with flash-attn 3's `attention_chunk`.

    A query sees the keys of its own chunk of so many positions alone.

    Args:
        options: numflash's, with the window.
        chunk: positions of a chunk.
        first: the position of a sequence's first query among its keys: a number for all
            sequences, or int32 (sequences,) on the device.

    Raises:
        TypeError, ValueError: chunk is no number of positions.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, Integral):
        raise TypeError(f"attention_chunk must be an integer, got {chunk!r}")
    if chunk < 0:
        raise ValueError(f"attention_chunk must be at least 0, got {chunk}")
    window = options["window_size"]
    if isinstance(window, tuple) and len(window) == 2:
        # Tiles of keys that lie farther away are left out.
        window = tuple(chunk - 1 if each == -1 else min(each, chunk - 1) for each in window)
    keep = _of_one_chunk_from if isinstance(first, Tensor) else _of_one_chunk
    chunked = {"window_size": window, "mask_mod": keep(as_constant(chunk)), "aux": (first,)}
    return options | chunked


def _of_one_chunk(chunk: int) -> Callable:
    def keep(b, h, i, j, first):
        return (i + first) // chunk == j // chunk

    return keep


def _of_one_chunk_from(chunk: int) -> Callable:
    def keep(b, h, i, j, first):
        return (i + first[b]) // chunk == j // chunk

    return keep


def expect_tensors(axes: str, **given) -> None:
    """Check tensors that all have these axes. Raises TypeError, ValueError."""
    count = axes.count(",") + 1
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor of PyTorch, got {type(x).__name__}")
        if x.ndim != count:
            raise ValueError(f"{name} must have the axes {axes}, got shape {tuple(x.shape)}")


def refuse(**given) -> None:
    """Raise UnsupportedError for the first of these arguments that is given; see `_WHY`."""
    for name, value in given.items():
        if value is not None:
            raise UnsupportedError(f"numflash.flash_attn has no {name}: {_WHY[name]}")


_WHY = {
    "qv": "numflash multiplies keys by one array of queries; join q and qv, and k and v, along "
    "head_dim if that is at most 256",
    "cu_seqlens_k_new": "new keys and values are (batch, new tokens, heads, head_dim), the same "
    "number for each sequence",
    "rotary_seqlens": "queries and new keys are rotated at the positions from cache_seqlens on; "
    "rotate q and k with apply_rotary_emb, and leave rotary_cos and rotary_sin out",
}


def results(out: Tensor, lse: Tensor, return_attn_probs: bool):
    """What flash-attn 2 returns: out, or (out, softmax_lse, S_dmask).

    S_dmask is None: the probabilities are nowhere in memory.
    """
    return (out, lse, None) if return_attn_probs else out


def parts_of(packed: Tensor, name: str, count: int, axes: str) -> tuple[Tensor, ...]:
    """The tensors that lie in one, along its third axis from behind.

    Raises:
        TypeError: no tensor.
        ValueError: another shape.
    """
    expect_tensors(axes, **{name: packed})
    if packed.shape[-3] != count:
        raise ValueError(f"{name} must have the axes {axes}, got shape {tuple(packed.shape)}")
    return packed.unbind(dim=-3)
