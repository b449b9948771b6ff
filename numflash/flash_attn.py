"""flash-attn's names on numflash's kernels: `import numflash.flash_attn as flash_attn`.

See `numflash.frontends.flash_attn`, and docs/frontends.md.
"""

import sys

from numflash.frontends.flash_attn import layers, version_3
from numflash.frontends.flash_attn import padding as bert_padding
from numflash.frontends.flash_attn.combine import flash_attn_combine
from numflash.frontends.flash_attn.dense import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from numflash.frontends.flash_attn.kvcache import flash_attn_with_kvcache, get_scheduler_metadata
from numflash.frontends.flash_attn.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__version__ = "2.8.4"
"""Of flash-attn, whose functions these stand for: programs ask for at least some version."""

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]

# Programs import from these, too.
flash_attn_interface = sys.modules[__name__]
sys.modules |= {
    f"{__name__}.bert_padding": bert_padding,
    f"{__name__}.flash_attn_interface": flash_attn_interface,
    f"{__name__}.layers": layers,
    f"{__name__}.layers.rotary": layers.rotary,
    f"{__name__}.version_3": version_3,
}
