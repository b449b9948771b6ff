"""The error that numflash raises besides TypeError and ValueError; and errors in one line."""


class UnsupportedError(RuntimeError):
    """A valid call that is not possible here: on this GPU, or with this installation.

    Example:
        >>> import numpy as np, numflash
        >>> x = np.zeros((1, 16, 1, 300), "float16")
        >>> try:
        ...     numflash.attention(x, x, x)
        ... except numflash.UnsupportedError as error:
        ...     print(error)
        head_dim of q and k must be at most 256, got 300
    """


def in_one_line(error: Exception) -> str:
    """An error's type and message, for records and tables: 600 characters at most."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:600]
