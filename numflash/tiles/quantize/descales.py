"""Factors of e4m3 codes of K and V, which a sequence and a head share."""

from numflash.ptx import device_function, f32


@device_function
def descale_of(keys, entry, head):
    """The factor of a head of a sequence; `keys` is a record `CodedKeys`."""
    factor = f32(1)
    if keys.has_descale != 0:
        factor = keys.descale[entry * keys.descale_entry + head * keys.descale_head]
    return factor


@device_function
def _one(keys, entry, head):
    return f32(1)


def make_descale_of(traits):
    """descale_of(keys, entry, head), also of K and V that are no codes: 1."""
    return descale_of if traits.codes else _one


__all__ = ["descale_of", "make_descale_of"]
