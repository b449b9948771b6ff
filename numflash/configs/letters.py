"""The string forms of configs, read off their fields.

A field says in its metadata how it is written: `number`, `switch`, `word` and `chosen` make such
fields. A config is written as its fields in order, and read by the pattern that they make
together. A field that is not written has its default.

    sm80-m128n64w4s2-packed     generation, tile_m, tile_n, num_warps, num_stages, packed
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, Self

_KEY = "letter"
_NOTHING = object()


@dataclass(frozen=True)
class Letter:
    """The text of one field.

    Attributes:
        pattern: that its text matches.
        texts: the text of each value where there are few; None for a number or a word.
        before, after: the text around a number or a word.
        left_out: the value that is not written.
    """

    pattern: str
    texts: Mapping[Any, str] | None = None
    before: str = ""
    after: str = ""
    left_out: Any = _NOTHING

    def read(self, text: str):
        """The value of a text that matches the pattern."""
        if self.texts is not None:
            return next(value for value, each in self.texts.items() if each == text)
        if not text:
            return self.left_out
        text = text.removeprefix(self.before).removesuffix(self.after)
        return int(text) if text.isdecimal() else text


def number(letter: str, default: Any = MISSING, *, always: bool = False, **options) -> Any:
    """A field that is written as its letter and a positive number, as in `w4`.

    `always` says that its default is written, too.
    """
    pattern = rf"{letter}[1-9]\d*"
    if always or default is MISSING:
        return _field(Letter(pattern, before=letter), default, options)
    return _field(Letter(f"(?:{pattern})?", before=letter, left_out=default), default, options)


def word(pattern: str, after: str = "", **options) -> Any:
    """A field that is written as it is, as in `sm80`, with the text after it."""
    return _field(Letter(pattern + re.escape(after), after=after), MISSING, options)


def chosen(texts: Mapping[Any, str], default: Any, **options) -> Any:
    """A field of few values, each with a text, as in `-packed`; one of them may be empty."""
    pattern = "|".join(re.escape(text) for text in texts.values() if text)
    return _field(Letter(f"(?:{pattern})?", texts), default, options)


def switch(text: str, default: bool = False, **options) -> Any:
    """A field that is True or False, and written as `-text` where it is not the default."""
    return chosen({default: "", not default: f"-{text}"}, default, **options)


def _field(letter: Letter, default: Any, options: dict) -> Any:
    return field(default=default, metadata={_KEY: letter}, **options)


@cache
def _letters(kind: type) -> dict[str, Letter]:
    """Field -> its letter, in the order in which they are written."""
    return {each.name: each.metadata[_KEY] for each in fields(kind)}


@cache
def _pattern(kind: type) -> re.Pattern:
    letters = _letters(kind)
    text = "".join(f"(?P<{name}>{letter.pattern})" for name, letter in letters.items())
    return re.compile(re.escape(kind.prefix) + text, re.ASCII)


class Lettered:
    """A config with a string form; every field has a letter.

    Attributes:
        prefix: of the string form, before the fields.
        example: a string form, for errors.
        cluster: blocks of a cluster; a field where there may be several.
    """

    family: ClassVar[str]
    prefix: ClassVar[str] = ""
    example: ClassVar[str]
    cluster: ClassVar[int] = 1

    def __str__(self) -> str:
        # In one loop and without calls: a choice of kernels writes every config that it rejects.
        text = self.prefix
        for name, letter in _letters(type(self)).items():
            value = getattr(self, name)
            if letter.texts is not None:
                # The config may be about to be refused.
                text += letter.texts.get(value, f"-{value}")
            elif value != letter.left_out:
                text += f"{letter.before}{value}{letter.after}"
        return text

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `str`. Raises ValueError for anything else."""
        match = _pattern(cls).fullmatch(text)
        if match is not None:
            letters = _letters(cls).items()
            config = cls(**{name: letter.read(match[name]) for name, letter in letters})
            if str(config) == text:
                return config
        article = "an" if cls.family[0] in "aeiou" else "a"
        raise ValueError(
            f"{article} {cls.family} config must look like {cls.example}, got {text!r}"
        )
