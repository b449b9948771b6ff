"""Score and keep functions of two neighbouring keys, whose elements a program reads at once."""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

from numflash.ptx import device_function, f32, i32, i64
from numflash.tiles.features import SCORES, At, functions_of, make_score


class Pair(NamedTuple):
    """Two neighbouring keys whose elements are read at once.

    Attributes:
        key, step: key + step is the first, an even number. In a row only `step` changes.
        j, j_right: the two keys, brought inside the arrays.
        left: how many keys the arrays still have from the first on; 2 may stand for more.
        step_right: as `At.step`, of the second.
    """

    key: i32
    step: i64
    j: i32
    j_right: i32
    left: i32
    step_right: f32


@cache
def make_score_of_pair(traits, after_features=False):
    """score_of_pair(s, right, scale, at, pair, args): `make_score` of the two keys of a `Pair`.

    `at` is the place of the first. Both are products, and become scores by `scale`. The result is
    (score, derivative) of the first, then of the second.

    None where the program reads nothing by pairs.
    """
    if traits.read or not traits.program_scores:
        return None
    of_program = functions_of(traits).score_of_pair
    if of_program is None:
        return None
    of_features = make_score(replace(traits, program=""))

    @device_function
    def of_pair(s, right, scale, at, pair, args):
        places = at.i, pair.key, pair.step, pair.j, pair.j_right, pair.left
        return of_program(s, right, scale, *places, args.program)

    @device_function
    def of_pair_after_features(s, right, scale, at, pair, args):
        t, slope = of_features(s * scale, at, args)
        at_right = At(at.first, at.far, pair.step_right, at.i, at.j)
        t_right, slope_right = of_features(right * scale, at_right, args)
        u, more, u_right, more_right = of_pair(t, t_right, f32(1), at, pair, args)
        if after_features:
            return u, more, u_right, more_right
        return u, slope * more, u_right, slope_right * more_right

    return of_pair_after_features if set(traits.features) & set(SCORES) else of_pair


@cache
def make_keep_of_pair(traits):
    """keep_of_pair(i, pair, args): `make_keep` of query i and the two keys of a `Pair`.

    None where the program reads nothing for it by pairs.
    """
    of_program = functions_of(traits).keep_of_pair if traits.keeps_scores else None
    if of_program is None:
        return None

    @device_function
    def keep_of_pair(i, pair, args):
        places = i, pair.key, pair.step, pair.j, pair.j_right, pair.left
        return of_program(*places, args.program)

    return keep_of_pair
