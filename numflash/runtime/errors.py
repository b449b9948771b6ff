"""What numflash raises besides TypeError (wrong types, dtypes) and ValueError (wrong values)."""


class UnsupportedError(RuntimeError):
    """What was asked for is valid, but not possible here: on this GPU, with this installation."""
