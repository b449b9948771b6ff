"""`flash_attn.layers`, of which there is `rotary`."""

from numflash.frontends.flash_attn import rotary

__all__ = ["rotary"]
