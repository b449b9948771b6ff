"""`flash_attn.bert_padding`: rows of a padded batch taken out, and put back.

Plain PyTorch; gradients go through all of it.
"""

import torch
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows of `input` that int64 (rows,) `indices` name: (rows, ...)."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...) with `values` in the rows that `indices` name, and 0 in others."""
    output = values.new_zeros(first_axis_dim, *values.shape[1:])
    return output.index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch, one sequence after another.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), boolean or integer: 1 where there is a token.
        unused_mask: likewise: tokens that are packed, but not used.

    Returns:
        packed: (tokens, ...).
        indices: int64 (tokens,): where each lies in batch * seqlen rows.
        cu_seqlens: int32 (batch + 1,): where each sequence begins.
        max_seqlen: int; reading it waits for the device.
        seqused: int32 (batch,): tokens of each sequence without the unused.
    """
    allocated = attention_mask if unused_mask is None else attention_mask + unused_mask
    seqused = attention_mask.sum(dim=-1, dtype=torch.int32)
    lengths = allocated.sum(dim=-1, dtype=torch.int32)
    indices = allocated.flatten().nonzero().flatten()
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, _cumulative(lengths), int(lengths.max()), seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """`unpad_input` of rows that hold several sequences each.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen), integers: the lengths of a row's sequences, in
            any places, and 0 elsewhere.

    Returns:
        packed, indices, cu_seqlens, max_seqlen: as of `unpad_input`.
    """
    in_row = attention_mask_in_length.sum(dim=-1, keepdim=True)
    places = torch.arange(attention_mask_in_length.shape[-1], device=in_row.device)
    indices = (places < in_row).flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths.nonzero().flatten()].to(torch.int32)
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, _cumulative(lengths), int(lengths.max())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """(batch, seqlen, ...) of (tokens, ...) that `unpad_input` took out; padding is 0."""
    output = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return output.unflatten(0, (batch, seqlen))


def _cumulative(lengths: Tensor) -> Tensor:
    """int32 (n + 1,): 0, and sums of the first 1, 2, ... of int32 (n,) lengths."""
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
