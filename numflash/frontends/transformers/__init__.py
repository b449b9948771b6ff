"""transformers: an attention function, and the masks that it takes.

registration    `register`, and the name
attention       the attention function
masks           the mask function: a mask as options of a call, without an array of its size
tracing         a mask function of transformers as an expression
bands           what of such an expression is a band
"""

import re

_LEAST = 5, 10


def expect_version(version: str) -> None:
    """Raise ImportError for a version of transformers whose masks have other arguments."""
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _LEAST:
        least = ".".join(map(str, _LEAST))
        raise ImportError(
            f"numflash.transformers needs transformers {least} or later, got {version}: "
            'pip install "numflash[transformers]"'
        )


try:
    import transformers
except ImportError as error:
    raise ImportError(
        'numflash.transformers needs transformers: pip install "numflash[transformers]"'
    ) from error

expect_version(transformers.__version__)
