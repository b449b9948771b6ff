"""Switches of the environment: one reader, so that all of them are spelled alike.

`is_on` reads those that are on or off, `choice` those that name one of several things,
`whole_number` numbers.
"""

import os

_WORDS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


def is_on(name: str, default: bool = False) -> bool:
    """Whether an environment variable is on; `default` where it is unset or empty.

    As in Numba's variables an integer is on unless it is 0 ("00" is 0, too). Words count as well,
    in any case: true, on, yes; false, off, no.

    Raises:
        ValueError: it is anything else.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        return bool(int(text))
    except ValueError:
        pass
    try:
        return _WORDS[text.lower()]
    except KeyError:
        raise ValueError(
            f"{name} must be 0 or 1 (or another integer, or {', '.join(_WORDS)}), got {text!r}"
        ) from None


def choice(name: str, choices: tuple[str, ...]) -> str:
    """The choice of an environment variable, in any case; the first choice if unset or empty.

    Choices are lower case.

    Raises:
        ValueError: it names none of them.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return choices[0]
    if text.lower() not in choices:
        listed = ", ".join(choices[:-1]) + f" or {choices[-1]}"
        raise ValueError(f"{name} must be {listed}, got {text!r}")
    return text.lower()


def whole_number(name: str, at_least: int) -> int | None:
    """The integer of an environment variable; None if unset or empty.

    Raises:
        ValueError: it is no integer, or less than `at_least`.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    try:
        found = int(text)
    except ValueError:
        found = at_least - 1
    if found < at_least:
        raise ValueError(f"{name} must be an integer from {at_least} on, got {text!r}")
    return found
