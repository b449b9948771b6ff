"""Colours: each is a token of both schemes, and can be told from what lies below it."""

import itertools
import re

import pytest

from tuner.drawing import style
from tuner.drawing.roles import ROLES

SCHEMES = pytest.mark.parametrize("scheme", [style.LIGHT, style.DARK], ids=["light", "dark"])


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@SCHEMES
def test_text(scheme):
    names = ("text", "muted", "accent", "second", "failed", "good")
    for ground, name in itertools.product(("page", "card"), names):
        assert contrast(scheme[ground], scheme[name]) >= 4.5, (ground, name)
    for role in ROLES:
        assert contrast(scheme[role], scheme[f"on-{role}"]) >= 4.5, role
    # The ground of an empty lane is text's, too.
    for name in ("text", "second"):
        assert contrast(scheme["none"], scheme[name]) >= 4.5, name


@SCHEMES
@pytest.mark.parametrize("role", [role for role in ROLES if role != "none"])
def test_marks_on_the_card_and_on_an_empty_lane(scheme, role):
    seen = ROLES[role].outline or role
    for ground in ("card", "none"):
        assert contrast(scheme[ground], scheme[seen]) >= 3, (role, ground)
    if ROLES[role].outline:
        assert contrast(scheme[role], scheme[seen]) >= 3, f"the outline of {role}"


@SCHEMES
def test_lines_and_areas(scheme):
    for ground in ("card", "none"):
        for name in ("axis", "accent", "second", "text", "failed"):
            assert contrast(scheme[ground], scheme[name]) >= 3, (ground, name)
    # The diagonal of a masked tile, which says so without colour.
    assert contrast(scheme["edge"], scheme["on-edge"]) >= 3


@SCHEMES
def test_heat_and_walks_are_ordered(scheme):
    for i in range(style.HEAT_STEPS):
        assert contrast(scheme[f"heat{i}"], scheme[f"on-heat{i}"]) >= 4.5, i
    steps = [luminance(scheme[f"heat{i}"]) for i in range(style.HEAT_STEPS)]
    assert steps in (sorted(steps), sorted(steps, reverse=True))
    walks = [scheme[f"walk{i}"] for i in range(4)]
    shades = [luminance(walk) for walk in walks]
    assert shades in (sorted(shades), sorted(shades, reverse=True))
    for a, b in itertools.pairwise(walks):
        assert contrast(a, b) >= 1.3, (a, b)


def test_every_colour_of_the_style_is_a_token_of_both_schemes():
    used = set(re.findall(r"var\(--([\w-]+)\)", style.STYLE))
    assert used <= set(style.LIGHT) and set(style.LIGHT) == set(style.DARK)
    rules = style.STYLE.split("@media screen", 1)[1].split("\n", 1)[1]
    assert not re.search(r"#[0-9a-f]{3,6}\b", rules)
