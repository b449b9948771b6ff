"""String forms of configs: one codec, and the forms that users have in their caches."""

import itertools
from dataclasses import dataclass, fields, replace

import pytest

from numflash.configs import IMPLEMENTATIONS
from numflash.configs.letters import Lettered, chosen, number, switch, word

KINDS = [kind for row in IMPLEMENTATIONS for kind in row.configs.values()]


@dataclass(frozen=True)
class Example(Lettered):
    """A config with a field of each kind."""

    generation: str = word(r"sm\d+", "-")
    tile_m: int = number("m")
    num_warps: int = number("w", 4, always=True)
    num_splits: int = number("x", 1)
    packed: bool | None = chosen({None: "", True: "-packed", False: "-unpacked"}, None)
    fixed: bool = switch("fixed")
    swizzled: bool = switch("linear", default=True)

    family = "forward"
    prefix = "new-"
    example = "new-sm80-m16w4"


EXAMPLES = {
    "new-sm80-m16w4": Example("sm80", 16),
    "new-sm80-m128w8": Example("sm80", 128, 8),
    "new-sm100-m16w4x3": Example("sm100", 16, num_splits=3),
    "new-sm80-m16w4-unpacked-fixed": Example("sm80", 16, packed=False, fixed=True),
    "new-sm80-m16w4x2-packed-linear": Example(
        "sm80", 16, num_splits=2, packed=True, swizzled=False
    ),
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_a_config_is_written_and_read_by_its_fields(text):
    assert str(EXAMPLES[text]) == text and Example.parse(text) == EXAMPLES[text]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sm80-m16w4",
        "new-sm80-m16",
        "new-sm80-m16w4x1",  # a default is not written
        "new-sm80-m016w4",
        "new-sm80-m0w4",
        "new-sm80-w4m16",
        "new-sm80-m16w4-linear-fixed",
        "new-sm80-m16w4-packed-unpacked",
        "new-sm80-m16w4 ",
        "new-sm80-m16w4\n",
        "new-sm80-m\u0663w4",
        "NEW-sm80-m16w4",
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="a forward config must look like new-sm80-m16w4, got"):
        Example.parse(text)


def test_an_impossible_value_can_be_written_in_the_error_that_refuses_it():
    assert str(Example("sm80", 16, packed="no")) == "new-sm80-m16w4-no"


# With nothing switched on; each kind of config has one of these.
PLAIN = (
    "sm90-m64n64w4s2",
    "fp8-sm90-m64n64w4s2",
    "fp8-sm89-m64n64w4s2",
    "sm80-m64n64w4s2",
    "m64n64w4",
    "w4",
    "sm89-t128w8",
    "sm89-w4",
    "w4h4",
)
VALUES = (False, True, None, 1, 2, 3, 8, 32, 128, 232, "sm75", "sm80", "token", "given", "e5m2")


def plain(kind):
    """A config of a kind with nothing switched on."""
    for text in PLAIN:
        try:
            return kind.parse(text)
        except ValueError:
            continue
    raise AssertionError(f"{kind.__name__} reads none of {PLAIN}")


def neighbours(config):
    """The configs that differ from a config in one or two fields."""
    names = [field.name for field in fields(config)]
    for pair in itertools.combinations(names, 2):
        for values in itertools.product(VALUES, repeat=2):
            kinds = [type(getattr(config, name)) for name in pair]
            kinds = [bool if kind is type(None) else kind for kind in kinds]
            if [type(value) for value in values] == kinds:
                try:
                    yield replace(config, **dict(zip(pair, values, strict=True)))
                except ValueError:
                    continue


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_has_a_letter_and_what_differs_is_written_otherwise(kind):
    assert all("letter" in field.metadata for field in fields(kind))
    config = plain(kind)
    found = {config, *neighbours(config)}
    texts = {str(other): other for other in found}
    assert len(texts) == len(found)
    assert {text: kind.parse(text) for text in texts} == texts
