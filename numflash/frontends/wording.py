"""Errors of a function that calls numflash, in the names of its own parameters."""

import re
from collections.abc import Callable
from functools import wraps

from numflash.runtime.errors import UnsupportedError

# Not their subclasses, which are others' and may be made of anything.
_OURS = TypeError, ValueError, UnsupportedError


def says(**names: str) -> Callable[[Callable], Callable]:
    """A decorator: errors that come out of a function name its own parameters.

    Args:
        names: numflash's name of a parameter -> the function's own.
    """
    spoken = re.compile(rf"\b({'|'.join(names)})\b")

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def called(*args, **options):
            try:
                return function(*args, **options)
            except _OURS as error:
                if type(error) in _OURS and error.args and isinstance(error.args[0], str):
                    said = spoken.sub(lambda found: names[found[1]], error.args[0])
                    error.args = (said, *error.args[1:])
                raise

        return called

    return decorate
