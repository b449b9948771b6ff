"""flash-attn's names: what programs written for flash-attn 2 and 3 call, computed by numflash.

options     flash-attn's options as those of numflash
dense       sequences of one length, also packed with their keys and values
varlen      sequences that lie one after another
kvcache     over a cache that grows
combine     parts of attention joined
padding     `flash_attn.bert_padding`: rows of a padded batch taken out, and put back
rotary      `flash_attn.layers.rotary`: rotary embeddings

Positions of arguments are those of flash-attn 2.8; what only flash-attn 3 has is given by name.
`version_3` has flash-attn 3's positions and results.
"""

# Says which PyTorch it needs, where there is none or an old one.
import numflash.frontends.torch  # noqa: F401
