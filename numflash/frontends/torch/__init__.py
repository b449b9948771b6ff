"""PyTorch: attention that autograd differentiates, that compiles, exports and maps.

calls             the forward and the backward that all layers call; options apart from tensors
attention         the public functions, and their gradients in eager mode
traced            options where something traces: as tensors and a text
operators         numflash::attention and numflash::attention_backward: fakes, gradients, autocast
rotary            rotary embeddings, and their gradient
merging           parts of attention put together, and their gradients
kvcache           over a cache that is written in place, in eager mode and as operators
mapped            the same under the transforms of torch.func
sdpa              torch's scaled_dot_product_attention, by numflash where numflash can
enabling          numflash in torch's place
distributed       over the ranks of a communicator, in eager mode
context_parallel  the same for sdpa, over the ranks of a DeviceMesh
explaining        which of the two runs, and why
untraced          numflash's own functions, which Dynamo is not to trace
"""

try:
    import torch
except ImportError as error:
    raise ImportError('numflash.torch needs PyTorch: pip install "numflash[torch]"') from error

if not hasattr(torch.library, "get_kernel"):
    raise ImportError(
        "numflash.torch needs a PyTorch with torch.library.get_kernel (2.9 or newer), got "
        f"PyTorch {torch.__version__}"
    )

from numflash.frontends.torch.untraced import keep_untraced

keep_untraced()
