"""The recipe of 8-bit floats that stands for a class, whose times do not depend on its numbers."""

from numflash.problem.classes import ProblemClass
from numflash.problem.fp8 import Fp8Recipe

_KEYS_PER_SCALE = Fp8Recipe().block


def recipe_of(problem: ProblemClass) -> Fp8Recipe:
    """How the calls of a class on 8-bit floats are quantised.

    A class whose kernels look up a scale for each key stands for all recipes with fewer keys a
    scale than a tile holds; the others for the default's, and all with more keys a scale.
    """
    return Fp8Recipe("token") if problem.traits.key_scales else Fp8Recipe()


def several_scales(problem: ProblemClass, tile_n: int) -> str | None:
    """Why tiles of so many keys cannot have one scale each, as a class's kernels need, or None."""
    if problem.traits.key_scales or _KEYS_PER_SCALE % tile_n == 0:
        return None
    return f"its tiles of {tile_n} keys have several scales, each of {_KEYS_PER_SCALE} keys"
