"""The mask function: what transformers asks for as a mask, as options of a call.

No array (seqlen_q, seqlen_k) is made. A mask is a band (causal, a window), an array of the keys
that padding hides, and a function for the rest, as of packed sequences. What cannot be traced is a
dense array of booleans, as `sdpa` has it: slower, and right.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from numflash.api.block_masks import create_block_mask
from numflash.frontends.transformers.bands import Band, split
from numflash.frontends.transformers.tracing import traced_mask
from numflash.functions.program import Program
from numflash.functions.written import WrittenFunction
from numflash.problem.block_masks import ListedBlocks

_LOG = logging.getLogger("numflash.transformers")
BLOCKS_FROM = 1024
"""With so many queries and keys a block mask is made of what is left to a function.

It asks the function once for all layers and their gradients, and empty blocks cost nothing.
"""
# Rows of keys begin at multiples of 16 bytes, so that kernels of any length read them alike.
_ALIGNMENT = 16


class Mask(BlockMask):
    """What the attention function takes for a mask.

    A BlockMask by its type alone: transformers passes masks that were made before on if they are
    tensors or those, and have a shape of four axes.

    Attributes:
        shape: (batch, 1, queries, keys).
        options: of `numflash.torch.attention`; `of_call` gives all of them.
        rest: options that say a function, for which a block mask may stand; None if there are
            none.
        blocks: what makes the block mask, until it is made; None if there is none.
        packed: if the mask is that of sequences that lie one after another, with a band for each:
            the options of `numflash.torch.attention_varlen` that say the band. Else None.
    """

    shape = None  # a property of BlockMask

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        options: dict[str, Any],
        packed: dict[str, Any] | None = None,
    ):
        # BlockMask's own fields are lists of blocks, of which there are none.
        self.shape, self.options, self.packed = shape, options, packed
        self.rest, self.blocks = None, None

    def of_call(self) -> dict[str, Any]:
        """The options of a call with this mask."""
        if self.rest is None:
            return self.options
        if self.blocks is None or torch.compiler.is_compiling():
            return self.options | self.rest  # a graph does not make block masks
        self.options["block_mask"] = self.blocks()
        self.rest = self.blocks = None
        return self.options

    def __repr__(self):
        said = ", ".join([*self.options, *(self.rest or ())])
        return f"<mask of {self.shape}: {said or 'nothing hidden'}>"

    __str__ = __repr__

    @property
    def ndim(self) -> int:
        """The number of axes of the shape."""
        return len(self.shape)

    def __getitem__(self, index):
        raise TypeError(
            f"a mask of numflash has no elements, asked for [{index!r:.60}]: a model that changes "
            'its masks needs attn_implementation="sdpa" or "eager"'
        )

    def to(self, device: torch.device | str, *_, **__) -> "Mask":
        """The mask with its arrays on a device, as a model on several devices needs it."""
        options = {name: _moved(x, device) for name, x in self.of_call().items()}
        return Mask(self.shape, options, self.packed)


def _moved(x, device):
    if isinstance(x, tuple):
        return tuple([_moved(each, device) for each in x])
    if isinstance(x, ListedBlocks):
        return x.with_arrays({name: each.to(device) for name, each in x.arrays().items()})
    return x.to(device) if isinstance(x, Tensor) else x


def mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Tensor | int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = False,
    local_size: int | None = None,
    config: Any = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_,
) -> Mask | Tensor:
    """The mask function that transformers calls once a forward pass for all layers of a kind.

    Args:
        batch_size, q_length, kv_length: sizes of the mask.
        q_offset, kv_offset: numbers of the first query and key. A static cache has its length as
            a tensor, which nobody reads on the host.
        mask_function: (batch, head, q_idx, kv_idx) -> whether the query sees the key.
        attention_mask: (batch, keys) boolean: the tokens that are no padding.
        allow_is_causal_skip: true if mask_function is the library's own, without a user's.
        local_size: of a sliding window or a chunk, where mask_function has one.
        config: the model's.
        use_vmap: whether a dense mask is made by `torch.vmap`.
        device: of the model's inputs.

    Returns:
        A `Mask`; a dense boolean tensor (batch, 1, q_length, kv_length) where mask_function cannot
        be traced. Inside a region that `torch.compile` traces functions are not called with
        symbols: there causal, sliding and padded masks alone are a `Mask`.
    """
    sizes = batch_size, q_length, kv_length

    def dense() -> Tensor:
        return sdpa_mask(
            *sizes,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )

    band = _own_band(mask_function, q_offset, kv_offset)
    if band is None and torch.compiler.is_compiling():
        if not (allow_is_causal_skip and _is_sliding(local_size, config)):
            return dense()
        high, moves = _diagonal(q_offset, kv_offset)
        band = Band(high - local_size + 1, high, moves)
    rest = packed = None
    if band is None:
        try:
            traced = traced_mask(mask_function, q_offset, kv_offset, device)
        except Exception as error:  # whatever a user's function does that symbols cannot
            _say_once(mask_function, error)
            return dense()
        parts = split(traced.keep, traced.numbers(), traced.offset, q_length, kv_length)
        band, rest = parts.band, None if parts.rest is None else traced.program_of(parts.rest)
        if parts.packed is not None and attention_mask is None:
            packed = _options_of(parts.packed, 0, (1, 1, 1), device)
    options = _options_of(band.within(q_length, kv_length), q_offset, sizes, device)
    if attention_mask is not None:
        options["mask"] = _keys(attention_mask, kv_length, kv_offset)
    shape = batch_size, 1, q_length, kv_length
    if rest is None:
        return Mask(shape, options, packed)
    return _with_rest(Mask(shape, options, packed), *rest, device)


def _own_band(mask_function: Callable, q_offset: Tensor | int, kv_offset: int) -> Band | None:
    """The band of the library's functions that are no closures; None of any other."""
    if mask_function is bidirectional_mask_function:
        return Band()
    if mask_function is causal_mask_function:
        return Band(None, *_diagonal(q_offset, kv_offset))
    return None


def _diagonal(q_offset: Tensor | int, kv_offset: int) -> tuple[int, bool]:
    """The limit of a causal band, and whether it moves."""
    moves = isinstance(q_offset, Tensor)
    return (-kv_offset if moves else q_offset - kv_offset), moves


def _is_sliding(local_size: int | None, config: Any) -> bool:
    """Whether the library's own function with a local size has a window; else it has chunks."""
    return local_size is not None and getattr(config, "attention_chunk_size", None) is None


def _with_rest(made: Mask, text: str, aux: tuple, device: torch.device | str) -> Mask:
    """The mask, which hides also what a program does."""
    batch, _, q_length, kv_length = made.shape
    function, uses = WrittenFunction(text, "keep"), Program.parse(text).uses
    made.rest = {"mask_mod": function, "aux": aux}
    if min(q_length, kv_length) < BLOCKS_FROM or "h" in uses:
        return made

    def blocks() -> ListedBlocks:
        like, entries = torch.empty(0, device=device), batch if "b" in uses else 1
        return create_block_mask(function, entries, 1, q_length, kv_length, aux=aux, like=like)

    made.blocks = blocks
    return made


def _options_of(
    band: Band, q_offset: Tensor | int, sizes: tuple[int, int, int], device: torch.device | str
) -> dict[str, Any]:
    """The options of a call that say a band, with `shift` at 0 where possible.

    A number that changes from token to token would make every call ready again: seqlens_k, which
    kernels read, says it.
    """
    low, high, moves = band
    batch, q_length, kv_length = sizes
    if low is None and high is None:
        return {}
    base = low if high is None else high  # of query 0
    options: dict[str, Any] = {} if high is None else {"causal": True}
    if low is not None:
        options["window_size"] = (base - low, -1)
    length = base + q_length  # as if the last query saw the last key
    if moves:
        options["seqlens_k"] = (q_offset.reshape(1) + length).to(device, torch.int32).repeat(batch)
    elif length == kv_length:
        pass
    elif high is not None and base > 0 and length < kv_length:
        options["seqlens_k"] = torch.full((batch,), length, dtype=torch.int32, device=device)
    else:
        options |= {"causal_align": "top_left"} | ({"shift": base} if base else {})
    return options


def _keys(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """(batch, 1, 1, kv_length) boolean: the keys that are no padding."""
    wide = -(-kv_length // _ALIGNMENT) * _ALIGNMENT
    behind = kv_offset + wide - attention_mask.shape[-1]
    keys = pad(attention_mask.to(torch.bool), (-kv_offset, behind))
    return keys[:, None, None, :kv_length]


_said: set[str] = set()


def _say_once(mask_function: Callable, error: Exception) -> None:
    """Warn that a mask is dense, once for each function."""
    name = getattr(mask_function, "__qualname__", repr(mask_function))
    if name not in _said:
        _said.add(name)
        _LOG.warning(
            "the mask function %s cannot be traced, so that its mask is an array of all queries "
            "and keys, which is slower: %s",
            name,
            error,
        )
