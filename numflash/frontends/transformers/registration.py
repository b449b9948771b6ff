"""numflash as an attention implementation of transformers."""

from transformers import AttentionInterface, AttentionMaskInterface

from numflash.frontends.transformers.attention import attention
from numflash.frontends.transformers.masks import mask

NAME = "numfa"
"""What a model is told: `attn_implementation="numfa"`.

transformers takes whatever has "flash" in its name for FlashAttention, and looks for a package or
a kernel of that name on its hub, although it is registered.
"""


def register() -> None:
    """Make numflash an attention implementation of transformers, under the name "numfa".

    Then `from_pretrained(..., attn_implementation="numfa")` and
    `model.set_attn_implementation("numfa")` choose it. Both the attention function and the mask
    function are registered: without the second, models would pass no mask at all. Registering
    again changes nothing.

    Example:
        >>> import torch, transformers, numflash.transformers
        >>> numflash.transformers.register()
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        ...     num_attention_heads=2, attn_implementation=numflash.transformers.NAME)
        >>> model = transformers.LlamaForCausalLM(config)
        >>> model(torch.arange(16)[None]).logits.shape
        torch.Size([1, 16, 32])
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
