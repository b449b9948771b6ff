"""numflash as an attention implementation of transformers: see `numflash.frontends`."""

from numflash.frontends.transformers.registration import NAME, register

__all__ = ["NAME", "register"]
