"""Colours by role: what a mark stands for, the same in each figure of a page.

A mark has a contrast of 3 at least to the card and to `none`, the ground of an empty lane; a pale
one has it by its outline. Text on a mark has 4.5 and is of class `on-ROLE`. A test computes them.
"""

from dataclasses import dataclass

INK, PAPER, SNOW = "#0b1017", "#ffffff", "#f4f7fb"
"""Colours of text on marks: dark, and light in the light and the dark scheme."""


@dataclass(frozen=True)
class Role:
    """A fill in each scheme, the text on it, and the token of the outline of a pale fill."""

    light: str
    dark: str
    on_light: str
    on_dark: str
    outline: str | None = None


ROLES = {
    "copy": Role("#0d766a", "#4cc4b3", PAPER, INK),
    "held": Role("#cfe9e4", "#1d4640", INK, SNOW, "copy"),
    "s": Role("#0b62c4", "#6cb0ff", PAPER, INK),
    "pv": Role("#6d47b8", "#b79cf0", PAPER, INK),
    "under": Role("#d5e4f7", "#22364f", INK, SNOW, "s"),
    "exp": Role("#a84b00", "#f0a35a", PAPER, INK),
    "max": Role("#b87a2e", "#b97f3c", INK, INK),
    "wait": Role("#e8ebf0", "#2b313a", INK, SNOW, "axis"),
    "edge": Role("#c26a12", "#f0a35a", INK, INK),
    "full": Role("#4a8ad2", "#4f8fd6", INK, INK),
    "none": Role("#eef1f5", "#20252c", INK, SNOW),
    "walk0": Role("#08306b", "#cfe3ff", PAPER, INK),
    "walk1": Role("#0f55aa", "#8cbcf5", PAPER, INK),
    "walk2": Role("#2b74c4", "#5590dc", PAPER, INK),
    "walk3": Role("#4a8ad2", "#3c70b6", INK, SNOW),
}
"""copy: bytes on their way. held: a buffer that holds a tile. s, pv: the products Q K^T and P V;
under: one that is under way. exp: exponentials; max: the rest of the softmax. wait: a wait.
edge: masked; full: not masked; none: nothing. walk0 ... walk3: the longest quarter of all walks
to the shortest."""


def tokens(scheme: str) -> dict[str, str]:
    """The tokens of the roles in "light" or "dark"."""
    fills = {name: getattr(role, scheme) for name, role in ROLES.items()}
    return fills | {f"on-{name}": getattr(role, f"on_{scheme}") for name, role in ROLES.items()}


def rules() -> str:
    """The rules of the roles: fill, outline, text on a mark, and swatch."""
    return "".join(map(_rule, ROLES)) + "".join(
        f".lanes.{name}{{fill:none;stroke:var(--{name})}}\n"
        for name in ROLES
        if name[-1] in "0123"
    )


def _rule(name: str) -> str:
    outline = ROLES[name].outline
    edge = f";stroke:var(--{outline});stroke-width:.8" if outline else ""
    border = f";border-color:var(--{outline})" if outline else ""
    return (
        f".{name}{{fill:var(--{name}){edge}}}svg .on-{name}{{fill:var(--on-{name})}}"
        f"i.{name}{{background:var(--{name}){border}}}\n"
    )
