"""The steps of first light, in order of worth: tasks of `bench.measuring.worker`.

A step is a dictionary with "title", "section", "expected_s" (seconds that it takes on a GPU, which
decide whether it still fits) and what its "kind" needs.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.peers import methods as peers
from bench.points import points
from bench.points.points import Point
from bench.studies import ablation, static
from numflash.configs import implementation_of
from numflash.configs.traits import Traits
from numflash.problem.classes import ProblemClass, round_up
from numflash.runtime.devices import Architecture

_ARITHMETIC = (
    *("ex2_", "lg2_", "sqrt_", "rsqrt_", "sin_", "cos_", "tanh_"),
    *("max_", "min_", "mul_", "div_", "fma_"),
)
_ONE_LANE = (*_ARITHMETIC, "cvt_", "lop3_", "mov_", "float_", "bits_", "ld_", "st_")
_RECORD = json.loads((Path(__file__).parents[2] / "docs" / "evidence.json").read_text())
NO_WITNESS = tuple(name for name in _RECORD["without"] if not name.startswith(_ONE_LANE))
"""Instructions of more than one lane that no other compiler's kernel has confirmed."""

INSTRUCTIONS, FORWARD, GRADIENTS = "instructions", "forward", "gradients"
SPEED, QUESTIONS, FRAMEWORKS, TUNER = "speed", "questions", "frameworks", "tuner"

HEADLINE_PEERS = (
    peers.OURS,
    "torch-cudnn",
    "torch-flash",
    "flash-attention-2",
    "flash-attention-3",
    "fa3-fwd",
)
"""numflash, cuDNN, and FlashAttention-2 and -3 as PyTorch has it and as packages."""

_DTYPE = "bfloat16"
# The sizes of checks against float64: no tile divides them.
_BATCH, _SEQLEN, _HEADS = 2, 300, 2
_REHEARSED_SEQLEN = 24
_PAGE_SIZE = 16
_TILE = 176
_BEST = 2
_FRAMEWORKS = {"torch": "tests/gpu/test_torch.py", "jax": "tests/gpu/test_jax.py"}

# Seconds on a GPU: of one instruction that is compiled for it and of one that is compiled ahead,
# of a forward and a backward that are compiled, of a point, and of one more config on it.
_INSTRUCTION_S, _COMPILED_S = 1.5, 0.3
_FORWARD_S, _BACKWARD_S = 8.0, 14.0
_CEILINGS_S, _POINT_S, _CONFIG_S = 3.0, 8.0, 5.0
_PARTS_S, _CANDIDATES_S, _TESTS_S = 5.0, 6.0, 15.0
# Of a config whose kernels an earlier point has compiled; of a kernel with a change that is timed
# beside it; of the times of a turn.
_KNOWN_S, _CHANGED_S, _TURNS_S = 1.0, 7.0, 4.0


def steps(cases: Iterable[Any], limits: Architecture, rehearsal: bool) -> list[dict]:
    """The steps on an architecture.

    Args:
        cases: of instructions, as `tests.support.instruction_cases.CASES` has them.
        limits: the GPU.
        rehearsal: sizes that the simulator runs in a second.
    """
    found = [
        *_instructions(cases),
        *_forwards(),
        *_gradients(),
        _step(SPEED, "matrix product and copy", _CEILINGS_S, "ceilings"),
        *_headlines(),
        *_questions_of_gradients(limits),
        *_questions(limits),
        *_decode(limits, rehearsal),
        *_frameworks(),
        *_predictions(),
        *_question_of_clusters(limits),
    ]
    return [_small(step) for step in found] if rehearsal else found


def _step(section: str, title: str, expected_s: float, kind: str, **what: Any) -> dict:
    step = {"section": section, "title": title, "expected_s": round(expected_s, 1), "kind": kind}
    return {**step, **what}


def _small(step: dict) -> dict:
    """The same step with sizes for the simulator."""
    if "shape" in step:
        return {**step, "shape": [1, _REHEARSED_SEQLEN, 1, *step["shape"][3:]]}
    if "point" not in step:
        return step
    point = Point.from_dict(step["point"])
    small = replace(
        point,
        kind="rehearsal",
        batch=1,
        seqlen_q=min(point.seqlen_q, _REHEARSED_SEQLEN),
        seqlen_k=_REHEARSED_SEQLEN,
        num_heads_q=1,
        num_heads_kv=1,
    )
    return {**step, "point": small.as_dict()}


# Is it right?


def _instructions(cases: Iterable[Any]) -> list[dict]:
    """Those without a witness one by one, then the others, of which the last use tensor maps.

    By then most are compiled.
    """
    cases = list(cases)
    found, left = [], []
    for name in NO_WITNESS:
        mine = [str(case) for case in cases if case.instruction == name]
        if mine:
            seconds = _INSTRUCTION_S * len(mine)
            found.append(_step(INSTRUCTIONS, name, seconds, "instructions", names=mine))
    left = [case for case in cases if case.instruction not in NO_WITNESS]
    groups: dict[str, list[str]] = {}
    for case in left:
        if not case.tensor_maps:
            groups.setdefault(_subject(case.instruction), []).append(str(case))
    mapped = [str(case) for case in left if case.tensor_maps]
    for subject, names in [*groups.items(), ("tensor maps as the driver encodes them", mapped)]:
        seconds = _INSTRUCTION_S + _COMPILED_S * len(names)
        found.append(_step(INSTRUCTIONS, subject, seconds, "instructions", names=names))
    return found


def _subject(instruction: str) -> str:
    """The first word of a mnemonic, or arithmetic: what is alike is one step."""
    return "arithmetic" if instruction.startswith(_ARITHMETIC) else instruction.partition("_")[0]


def _forwards() -> list[dict]:
    found = [
        _check(FORWARD, f"forward, head_dim {head_dim}", _FORWARD_S, head_dim, head_dim)
        for head_dim in (64, 128, 256)
    ]
    found.append(_check(FORWARD, "forward, head_dim 128, head_dim_v 96", _FORWARD_S, 128, 96))
    title = "forward, sequences one after another"
    found.append(_check(FORWARD, title, _FORWARD_S, 128, 128, is_packed=True))
    title = f"decode step, cache in pages of {_PAGE_SIZE} keys"
    return [*found, _check(FORWARD, title, _FORWARD_S, 128, 128, page_size=_PAGE_SIZE)]


def _gradients() -> list[dict]:
    """In two kernels, then in one, where Hopper shares dQ out otherwise at 64 than at 128."""
    found = [
        _check(GRADIENTS, f"gradients, head_dim {d}", _BACKWARD_S, d, d, gradients=True)
        for d in (64, 128, 256)
    ]
    for d in (64, 128):
        title = f"gradients, head_dim {d}, one kernel for all"
        found.append(_check(GRADIENTS, title, _BACKWARD_S, d, d, gradients=True, fused=True))
    return found


def _check(section: str, title: str, seconds: float, head_dim: int, head_dim_v: int, **what):
    shape = [_BATCH, _SEQLEN, _HEADS, head_dim, head_dim_v]
    return _step(section, title, seconds, "check", shape=shape, causal=True, **what)


# How fast is it?


def _grid_point(
    head_dim: int, seqlen: int, causal: bool, kind: str = "grid", direction: str = "forward"
) -> Point:
    grid = points.grid(direction, (seqlen,), (head_dim,), (_DTYPE,))
    return replace(next(p for p in grid if p.causal == causal), kind=kind)


def _headlines() -> list[dict]:
    forward = [
        _grid_point(head_dim, seqlen, causal)
        for head_dim, seqlen in ((128, 4096), (128, 16384), (64, 16384))
        for causal in (False, True)
    ]
    backward = [
        _grid_point(head_dim, 16384, causal, direction="backward")
        for head_dim, causal in ((128, False), (128, True), (64, False), (256, False))
    ]
    return [_timed(SPEED, point, list(HEADLINE_PEERS)) for point in (*forward, *backward)]


def _timed(
    section: str, point: Point, names: list[str], title: str = "", known: int = 0, **what
) -> dict:
    """A point. Of the configs that are forced an earlier step has compiled the first `known`."""
    costs = [_CHANGED_S if ",dq=" in name else _CONFIG_S for name in names if ":" in name]
    seconds = _POINT_S + known * _KNOWN_S + sum(costs[known:])
    what |= {"point": point.as_dict(), "peers": names}
    return _step(section, title or str(point), seconds, "point", **what)


# What only speed answers


def _questions(limits: Architecture) -> list[dict]:
    """Forced configs in the same run; the first of "labels" is today's choice."""
    if not _is_hopper(limits):
        return []
    config = static.choose_config("forward", static.traits_of(_DTYPE, 128), limits)
    point = _grid_point(128, 16384, False, "question")
    labels = {
        _name(config): "as today",
        _name(replace(config, v_stages=config.num_stages + 1)): "one more stage of V",
        _name(replace(config, tile_n=_TILE)): f"tiles of {_TILE} keys",
    }
    found = [_question("v_stages or tile_n at head_dim 128", point, labels)]
    for name in ("overlap", "pingpong"):
        labels = {
            _name(each): f"{name} {'on' if getattr(each, name) else 'off'}"
            for each in (config, ablation.switched(config, name))
        }
        found.append(_question(f"{name} at head_dim 128", point, labels))
    return found


def _questions_of_gradients(limits: Architecture) -> list[dict]:
    """One kernel or two, how long each of two takes, and how the one adds dQ, on Hopper.

    With a causal mask also whether blocks that draw one place after another are faster.

    dK and dV alone have four of the five products, and nothing of dQ: if shared memory binds as
    the tuner's model says, they are as much faster than the whole as their bytes are fewer.
    """
    found = []
    if not _is_hopper(limits):
        return found
    for head_dim, causal in ((128, False), (128, True), (64, False)):
        traits = static.traits_of(_DTYPE, head_dim)
        two = {
            family: static.choose_config(family, traits, limits)
            for family in ("backward-dq", "backward-dkdv")
        }
        fused = static.choose_config("backward", traits, limits)
        ways = [(two, "two kernels"), ({"backward": fused}, "one kernel for all")]
        if implementation_of(fused).blocks_to_fuse is not None:
            ways.reverse()
        if head_dim == 128 and causal:
            ways.append(({"backward": replace(fused, persistent=True)}, "blocks that draw places"))
        labels = {ablation.variants_named(configs): label for configs, label in ways}
        mask = "causal" if causal else "no mask"
        title = f"gradients in one kernel or two at head_dim {head_dim}, {mask}"
        point = _grid_point(head_dim, 16384, causal, "question", "backward")
        # With a mask the same kernels run.
        found.append(_question(title, point, labels, known=1 + causal))
        if head_dim == 128 and not causal:
            texts = {family: str(config) for family, config in two.items()}
            what = {"point": point.as_dict(), "config": texts}
            title = "gradients at head_dim 128, kernel by kernel"
            found.append(_step(QUESTIONS, title, _PARTS_S, "parts", **what))
            found.append(_order_of_dq(point, fused))
    title = "a turn at dQ, of tiles of 64 x 128"
    return [*found, _step(QUESTIONS, title, _TURNS_S, "turns")]


def _order_of_dq(point: Point, config: Any) -> dict:
    """Whether dQ's buffers, the place at which it is left, and where blocks begin matter."""
    as_it_is = ablation.variants_named({"backward": config})
    labels = {as_it_is: "as today"}
    labels |= {
        f"{as_it_is},dq={change}": label
        for change, label in (
            ("one-buffer", "one buffer of dQ"),
            ("at-end", "dQ left at the end of its tile"),
            ("shifted", "blocks begin at tiles of their own"),
        )
    }
    title = f"gradients in one kernel at head_dim {point.head_dim}, the way of dQ"
    return _question(title, point, labels)


def _question_of_clusters(limits: Architecture) -> list[dict]:
    """Clusters where the model likes them most. The last step: blocks that wait may hang."""
    if not _is_hopper(limits):
        return []
    config = static.choose_config("forward", static.traits_of(_DTYPE, 256), limits)
    labels = {
        _name(config): "as today",
        _name(replace(config, cluster=2)): "clusters of two blocks",
    }
    point = _grid_point(256, 16384, False, "question")
    return [_question("cluster at head_dim 256", point, labels, known=0)]


def _question(title: str, point: Point, labels: dict[str, str], known: int = 1) -> dict:
    """As `_timed`: today's choice, the first of the labels, was timed among the headlines."""
    return _timed(QUESTIONS, point, list(labels), title, known, labels=labels)


def _name(config: Any) -> str:
    return ablation.variants_named({"forward": config})


def _decode(limits: Architecture, rehearsal: bool) -> list[dict]:
    """Decoding beside its peers, and its two kernels apart."""
    found = []
    for point in points.decode():
        found.append(_timed(SPEED, point, list(HEADLINE_PEERS), f"decode, {point}"))
        config = None
        if rehearsal:
            # The simulated GPU has one SM, over which nothing is split unless it is asked for.
            traits = static.traits_of(_DTYPE, point.head_dim)
            config = static.choose_config("forward", traits, limits, rows=16)
            config = str(replace(config, num_splits=2))
        title = f"attention and combine apart, {point}"
        what = {"point": point.as_dict(), "config": config}
        found.append(_step(QUESTIONS, title, _PARTS_S, "parts", **what))
    return found


def _frameworks() -> list[dict]:
    """What only a device shows of PyTorch's and JAX's front ends."""
    return [
        _step(FRAMEWORKS, path, _TESTS_S, "tests", module=module, path=path)
        for module, path in _FRAMEWORKS.items()
    ]


def _predictions() -> list[dict]:
    """The model's best of the class of a headline point, beside today's choice."""
    found = []
    for head_dim, causal in ((128, True),):
        point = _grid_point(head_dim, 16384, causal, "tuner")
        heads = round_up(point.batch * point.num_heads_q)
        mask = "causal" if causal else "full"
        traits: Traits = static.traits_of(_DTYPE, head_dim)
        sizes = round_up(point.seqlen_q), round_up(point.seqlen_k), heads, 1
        problem = str(ProblemClass("forward", traits, mask, *sizes))
        seconds = _CANDIDATES_S + _POINT_S + _BEST * _CONFIG_S
        what = {"class": problem, "count": _BEST, "point": point.as_dict()}
        found.append(_step(TUNER, f"{_BEST} best of {problem}", seconds, "predicted", **what))
    return found


def _is_hopper(limits: Architecture) -> bool:
    return limits.compute_capability == (9, 0)
