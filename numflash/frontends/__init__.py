"""Front ends: numflash as PyTorch, transformers, JAX and users of flash-attn call it.

encoding        a call's options as arrays and a text, which graphs of frameworks can hold
wording         errors in the names that the called function has for its parameters
torch/          `numflash.torch`
flash_attn/     `numflash.flash_attn`
transformers/   `numflash.transformers`
jax/            `numflash.jax`

The modules `numflash.torch` and so on are doors: they name what is public. Each framework is
imported by its own front end only.
"""
