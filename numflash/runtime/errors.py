"""What numflash raises besides TypeError (wrong types, dtypes) and ValueError (wrong values)."""


class UnsupportedError(RuntimeError):
    """What was asked for is valid, but not possible here: on this GPU, with this installation.

    Example:
        >>> import numpy as np, numflash
        >>> x = np.zeros((1, 16, 1, 300), "float16")
        >>> try:
        ...     numflash.attention(x, x, x)
        ... except numflash.UnsupportedError as error:
        ...     print(error)
        head_dim of q and k must be at most 256, got 300
    """
