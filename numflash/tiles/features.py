"""The functions of features: one for each row of `configs.features`, with its name.

A score function maps score s of the query at place i and the key at place j to the final score,
and gives its derivative by s:

    score(s, i, j, args) -> (s, ds)

Only the distance i - j of the places counts; they are float32, because integers would have to be
converted one by one, and exact below 2 ** 24. `args` is the result of the feature's other
function, NAME_of_head, which reads the records of a kernel's arguments once for all rows of a
head.

After these comes the caller's program (`functions`, `tiles.programs`): its score function, and
its keep function, which says whether a query sees a key. They get both places as int32, as the
caller counts them.

A function that ends a row takes its largest score and the sum of its exponentials relative to
that, both natural, and also returns the factor of the exponentials so far:

    finish(row_max, row_sum, args) -> (row_max, row_sum, kept)

Its gradient is a row's share in that of `args`, from its lse and the product of dO and O, less
the gradient of lse; that of a score is the score's share, from the gradient of the final score:

    NAME_gradient(lse, product, args) -> the row's share
    NAME_gradient(ds, i - j) -> the score's share

A function that weighs P gives the random bits of eight scores, in four words: of the eight with
these counters of row and column (`tiles.philox`). `args` holds the limit below which bits drop a
score.

    weigh(row_counter, column_counter, args) -> (w0, w1, w2, w3)
"""

import math
from functools import cache
from typing import NamedTuple

from numflash.ptx import (
    device_function,
    ex2_approx_ftz_f32,
    f32,
    fma_rn_f32,
    i32,
    max_f32,
    tanh_approx_f32,
    u32,
)
from numflash.tiles.philox import philox
from numflash.tiles.programs import make_program

_LOG2_E = f32(math.log2(math.e))
_NEG_INF = f32(-math.inf)


@device_function
def _exp(x):
    return ex2_approx_ftz_f32(x * _LOG2_E)


@device_function
def softcap(s, i, j, cap):
    """cap tanh(s), of a score that comes divided by cap."""
    bent = f32(math.tanh(s))
    return cap * bent, fma_rn_f32(-bent, bent, f32(1))


@device_function
def softcap_of_bfloat16(s, i, j, cap):
    """As `softcap`, with a tanh that is less exact than float16 and more than bfloat16."""
    bent = tanh_approx_f32(s)
    return cap * bent, fma_rn_f32(-bent, bent, f32(1))


@device_function
def _softcap_of_head(features, batch, head):
    return features.softcap.cap


@device_function
def alibi(s, i, j, slope):
    """s - slope |i - j|."""
    return fma_rn_f32(-slope, f32(abs(i - j)), s), f32(1)


@device_function
def _alibi_of_head(features, batch, head):
    record = features.alibi
    return record.slopes[batch * record.batch + head * record.head]


@device_function
def sinks(row_max, row_sum, sink):
    """The row with one more score, the sink, that has no value."""
    top = max_f32(row_max, sink)
    # -inf - -inf would be NaN: of a row without keys, and a sink that is none.
    shift = top if top > _NEG_INF else f32(0)
    kept = _exp(row_max - shift)
    return top, fma_rn_f32(row_sum, kept, _exp(sink - shift)), kept


@device_function
def _sinks_gradient(lse, product, sink):
    # A row that sees no key and has no sink has lse -inf, and O = 0.
    return -_exp(sink - lse) * product if lse > _NEG_INF else f32(0)


@device_function
def _sinks_of_head(features, batch, head):
    return features.sinks.data[head * features.sinks.head]


class Drawn(NamedTuple):
    """What random bits depend on besides rows and columns, and the limit of those dropped.

    The caller's first row and column are added to those of a problem.
    """

    k0: u32
    k1: u32
    head: u32
    batch: u32
    limit: u32
    first_row: i32
    first_column: i32


@device_function
def dropout(row_counter, column_counter, args):
    """The random bits of eight scores."""
    c0, c1 = u32(row_counter), u32(column_counter)
    return philox(c0, c1, args.head, args.batch, args.k0, args.k1)


@device_function
def _dropout_of_head(features, batch, head):
    record = features.dropout
    k0, k1 = u32(record.low), u32(record.high)
    # The same for all threads. A number of 32 bits keeps its sign.
    if record.words > 0:
        k0 = u32(record.seed[0])
        k1 = u32(record.seed[1]) if record.words > 1 else u32(i32(k0) >> i32(31))
    head, batch, limit = u32(head + record.head), u32(batch), u32(record.limit)
    return Drawn(k0, k1, head, batch, limit, record.row, record.column)


class Weigh(NamedTuple):
    """A function that weighs P, and the one that finds its `args`."""

    function: object
    of_head: object


WEIGHS = {"dropout": Weigh(dropout, _dropout_of_head)}


class Finish(NamedTuple):
    """A function that ends a row, the one that finds its `args`, and its gradient."""

    function: object
    of_head: object
    gradient: object


FINISHES = {"sinks": Finish(sinks, _sinks_of_head, _sinks_gradient)}


@device_function
def _alibi_gradient(ds, distance):
    return ds * -abs(distance)


@device_function
def _ones_gradient(ds, distance):
    return ds


class Score(NamedTuple):
    """A score function, the one that finds its `args`, and its gradient if these have one.

    It may look at places. `of_bfloat16` takes its place where inputs are that, if there is one.
    """

    function: object
    of_head: object
    has_places: bool
    gradient: object = None
    of_bfloat16: object = None


SCORES = {
    "softcap": Score(softcap, _softcap_of_head, False, of_bfloat16=softcap_of_bfloat16),
    "alibi": Score(alibi, _alibi_of_head, True, _alibi_gradient),
}


def has_places(traits) -> bool:
    """Whether a function of these traits looks at the places of scores."""
    return traits.program != "" or any(
        SCORES[name].has_places for name in traits.features if name in SCORES
    )


class At(NamedTuple):
    """The place of a score.

    `first` and `step` are numbers whose difference is the distance of query and key, which the
    functions of features take for i and j. For the caller's program they are `far` and `step`, if
    it looks at distances alone, or the places themselves, `i` and `j`.
    """

    first: f32
    far: f32
    step: f32
    i: i32
    j: i32


class Args(NamedTuple):
    """What functions know of a head: the `args` of score functions, of the program, of `weigh`."""

    features: object
    program: object
    drawn: object


def _function_of(row: Score, traits):
    """The score function of a row for these traits."""
    return row.of_bfloat16 or row.function if traits.dtype == "bfloat16" else row.function


def functions_of(traits):
    """The program's functions, with those of its reads where a kernel is about one."""
    return make_program(traits.program, with_partials=traits.read != "")


@cache
def make_score(traits, after_features=False):
    """score(s, at, args): all score functions one after another, at an `At`.

    With after_features the derivative is by the score that features give, not by s. With
    `traits.read` it is by the element that is read.
    """
    score = _plain
    for name in reversed(traits.features):
        if name in SCORES:
            score = _followed_by(_function_of(SCORES[name], traits), score)
    of_features = score
    if not traits.program_scores:

        @device_function
        def score(s, at, args):
            return of_features(s, at.first, at.step, args.features)

        return score
    program = functions_of(traits)
    of_program, by_distance = program.score, program.score_by_distance
    if traits.read:
        partial, _ = program.partials[int(traits.read)]

        @device_function
        def score_with_partial(s, at, args):
            t, _ = of_features(s, at.first, at.step, args.features)
            u, _ = of_program(t, at.i, at.j, args.program)
            return u, partial(t, at.i, at.j, args.program)

        return score_with_partial

    @device_function
    def score_by_place(s, at, args):
        t, slope = of_features(s, at.first, at.step, args.features)
        u, more = of_program(t, at.i, at.j, args.program)
        return u, more if after_features else slope * more

    @device_function
    def score_by_distance(s, at, args):
        t, slope = of_features(s, at.first, at.step, args.features)
        u, more = by_distance(t, at.far, at.step, args.program)
        return u, more if after_features else slope * more

    return score_by_place if by_distance is None else score_by_distance


@cache
def make_keep(traits):
    """keep(at, args): whether the caller's program lets a query see a key, at an `At`."""
    if not traits.keeps_scores:
        return _keep_all
    program = functions_of(traits)
    of_program, by_distance = program.keep, program.keep_by_distance

    @device_function
    def keep_by_place(at, args):
        return of_program(at.i, at.j, args.program)

    @device_function
    def keep_by_distance(at, args):
        return by_distance(at.far, at.step, args.program)

    return keep_by_place if by_distance is None else keep_by_distance


def looks_at_distances(traits) -> bool:
    """Whether a function of the caller's program looks at distances alone."""
    if not traits.program:
        return False
    program = make_program(traits.program)
    return program.score_by_distance is not None or program.keep_by_distance is not None


@cache
def make_offset(traits):
    """(known, offset): where the read of `traits` lies in its array.

    known(given, batch, head) is what a head knows; offset(i, j, known) is in elements.
    """
    functions = functions_of(traits)
    known_of_head, (_, offset) = functions.known_of_head, functions.partials[int(traits.read)]

    @device_function
    def known(given, batch, head):
        return known_of_head(given, i32(batch), i32(head + given.first_head))

    return known, offset


@device_function
def _absolute_gradient(ds, distance):
    return abs(ds)


def make_gradient_of_score(traits):
    """gradient_of_score(ds, i - j): the share of one score in the gradient of a head's argument.

    `ds` is the gradient of the score that features give. Only one of them has such an argument,
    and none after it bends scores; without it the share is that of a number added to all scores.
    With `traits.read` ds is the gradient of the element that is read.
    """
    if traits.read:
        return _absolute_gradient if traits.absolute else _ones_gradient
    found = [SCORES[name].gradient for name in traits.features if name in SCORES]
    found = [gradient for gradient in found if gradient is not None]
    (gradient,) = found or [_ones_gradient]
    return gradient


@cache
def make_args_of_head(traits):
    """args_of_head(scores, batch, head): the `Args` of a head, of a record `Scores`."""
    args_of_head = _no_args
    for name in reversed(traits.features):
        if name in SCORES:
            args_of_head = _besides(SCORES[name].of_head, args_of_head)
    of_features, (_, weigh_of_head, _) = args_of_head, make_weigh(traits.features)
    if not traits.program:

        @device_function
        def args_of_head(scores, batch, head):
            features = scores.features
            drawn = weigh_of_head(features, batch, head)
            return Args(of_features(features, batch, head), f32(0), drawn)

        return args_of_head
    known_of_head = functions_of(traits).known_of_head

    @device_function
    def args_with_program(scores, batch, head):
        given, features = scores.given, scores.features
        known = known_of_head(given, i32(batch), i32(head + given.first_head))
        drawn = weigh_of_head(features, batch, head)
        return Args(of_features(features, batch, head), known, drawn)

    return args_with_program


@device_function
def _keep_all(at, args):
    return True


@device_function
def _plain(s, i, j, args):
    return s, f32(1)


def _followed_by(first, rest):
    @device_function
    def score(s, i, j, args):
        t, slope = first(s, i, j, args[0])
        u, more = rest(t, i, j, args[1])
        return u, slope * more

    return score


@device_function
def _no_args(records, batch, head):
    return f32(0)


def _besides(first, rest):
    @device_function
    def args_of_head(records, batch, head):
        return first(records, batch, head), rest(records, batch, head)

    return args_of_head


@cache
def make_weigh(features):
    """(weigh, weigh_of_head, whether they do anything): see the module's docstring.

    weigh_of_head(records, batch, head) gives the `args` of `weigh`, of the record `Features`. Only
    one feature can weigh P.
    """
    weighing = [WEIGHS[name] for name in features if name in WEIGHS]
    if not weighing:
        return _no_bits, _no_args, False
    (row,) = weighing
    return row.function, row.of_head, True


@device_function
def _no_bits(row_counter, column_counter, args):
    return u32(0), u32(0), u32(0), u32(0)


@cache
def make_finish(features):
    """(finish, whether it does anything): the functions of `features` that end a row, in order.

    finish(row_max, row_sum, records, batch, head) -> (row_max, row_sum, kept), of the record
    `Features`.
    """
    finish, ending = _unfinished, [name for name in features if name in FINISHES]
    for name in reversed(ending):
        finish = _finished_by(FINISHES[name], finish)
    return finish, bool(ending)


@cache
def make_gradient_of_end(features):
    """gradient_of_end(lse, product, records, batch, head): a row's share in a head's gradient.

    None if no feature of these ends rows. Only one can.
    """
    ending = [FINISHES[name] for name in features if name in FINISHES]
    if not ending:
        return None
    (row,) = ending
    gradient, of_head = row.gradient, row.of_head

    @device_function
    def gradient_of_end(lse, product, records, batch, head):
        return gradient(lse, product, of_head(records, batch, head))

    return gradient_of_end


@device_function
def _unfinished(row_max, row_sum, records, batch, head):
    return row_max, row_sum, f32(1)


def _finished_by(row, rest):
    function, of_head = row.function, row.of_head

    @device_function
    def finish(row_max, row_sum, records, batch, head):
        top, total, kept = function(row_max, row_sum, of_head(records, batch, head))
        last_top, last_total, more = rest(top, total, records, batch, head)
        return last_top, last_total, kept * more

    return finish
