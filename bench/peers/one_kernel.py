"""numflash's one kernel for gradients on Hopper, with a change to the way of dQ to memory.

Each change is a question that only speed answers, and is timed beside the kernel as it is. dQ is
added in turns in all of them: its sums have the same bits in every run.

    one-buffer   one buffer of dQ, not two: warpgroups wait until the tile before has been read
    at-end       a warpgroup leaves dQ behind its product, not beside the next tile's first one
    shifted      blocks of a head begin at tiles of their own and walk round, not all at the first

A changed kernel is made of the kernels' own modules, executed again with a few lines or names
replaced. No cache keeps it.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from bench.points.interleave import Method
from bench.points.points import Point
from numflash.configs import Traits
from numflash.configs.wgmma_backward import Sm90BackwardConfig
from numflash.kernels.kernel import Kernel

CHANGES = ("one-buffer", "at-end", "shifted")
_KERNEL, _QUERIES = "numflash.kernels.wgmma.backward", "numflash.kernels.wgmma.queries"
_ADD_DQ = "numflash.kernels.wgmma.add_dq"
_AT_END = (
    (
        "        if leaves_dq:\n            leave_dq(dq_acc, smem, barriers, i32(number - 1))\n",
        "",
    ),
    (
        "            wait_for_dq(dq_acc)\n",
        "            wait_for_dq(dq_acc)\n            leave_dq(dq_acc, smem, barriers, number)\n",
    ),
    ("            leave_dq(dq_acc, smem, barriers, i32(after - 1))\n", ""),
)
"""(text in the kernel's module, what stands for it): dQ of a tile is left in the tile itself."""


class Start(NamedTuple):
    """Where the blocks of a head begin, `shifted`.

    Attributes:
        blocks: of a head, which own keys.
        tiles: of queries; every block sees all of them.
        group: blocks that begin at tiles of their own, 1 to `tiles`. So many of a head must run
            together: they wait for each other.
    """

    blocks: int
    tiles: int
    group: int


def changed(change: str, config: str) -> Callable[[Point, dict[str, Any]], Method]:
    """Preparation of numflash's gradients by one kernel with a change.

    Args:
        change: one of CHANGES.
        config: of the family "backward", for Hopper.

    Raises:
        ValueError: there is no such change, at once; or, when a point is prepared, the change
            makes no difference there, or would give wrong results.
    """
    if change not in CHANGES:
        raise ValueError(f"dq must be one of {', '.join(CHANGES)}, got {change!r}")

    def prepare(point: Point, inputs: dict[str, Any]) -> Method:
        from numflash.calls.backward import Backward
        from numflash.problem.options import AttentionOptions
        from numflash.runtime.arrays import library_of
        from numflash.runtime.driver import machine_of

        arrays = {name: inputs[name] for name in ("q", "k", "v", "dout", "out", "lse")}
        library = library_of(arrays["q"], "q")
        views = {name: library.view(array, name) for name, array in arrays.items()}
        options = AttentionOptions(causal=point.causal, config={"backward": config})
        ready = Backward(views, options)
        choice = ready.kernels["backward"]
        num_sms = machine_of(ready.device).num_sms

        def make(arguments: dict) -> Kernel:
            start = None
            if change == "shifted":
                start = start_of(point, choice.config, num_sms, arguments["shape"].heads_in_flight)
            return make_kernel(change, choice.config, choice.traits, start)

        ready.replace("backward", make)
        operands = {name: library.operand(array) for name, array in arrays.items()}
        results, launches = ready.bind(operands, library)
        stream = library.stream(ready.device)

        def gradients() -> dict:
            for launch in launches.values():
                launch(stream)
            return dict(zip(("dq", "dk", "dv"), results, strict=True))

        return Method("numflash", gradients)

    return prepare


def start_of(point: Point, config: Sm90BackwardConfig, num_sms: int, heads: int) -> Start:
    """Where blocks begin, with groups as large as run together for certain.

    Args:
        point: without a mask, and with a head of K and V for each of Q.
        config: an SM runs one block of its kernel.
        num_sms: of the GPU.
        heads: whose blocks are launched in turn.

    Raises:
        ValueError: blocks of the point do not see all queries of one head.
    """
    if point.causal or point.group_size > 1 or point.is_packed:
        raise ValueError("shifted: blocks must see all queries, of one head")
    blocks, tiles = -(-point.seqlen_k // config.tile_n), -(-point.seqlen_q // config.tile_m)
    return Start(blocks, tiles, max(1, min(blocks, tiles, num_sms // heads)))


def make_kernel(
    change: str, config: Sm90BackwardConfig, traits: Traits, start: Start | None = None
) -> Kernel:
    """The kernel with a change; `start` is of `shifted` alone. Raises ValueError, as `changed`."""
    if change == "shifted":
        return _shifted(start, config).make_backward_kernel(config, traits)
    if config.dq_buffers(traits) == 1 and change == "one-buffer":
        raise ValueError(f"one-buffer: {config} has one buffer of dQ")
    if change == "one-buffer":
        values = {each.name: getattr(config, each.name) for each in fields(config)}
        return import_module(_KERNEL).make_backward_kernel(_OneBufferConfig(**values), traits)
    return _executed(_KERNEL, *_AT_END).make_backward_kernel(config, traits)


@dataclass(frozen=True)
class _OneBufferConfig(Sm90BackwardConfig):
    def dq_buffers(self, traits: Traits) -> int:
        return 1


def _executed(name: str, *changes: tuple[str, str], **names: Any) -> ModuleType:
    """A module executed again, with pieces of its text replaced, and then what names stand for.

    Raises:
        ValueError: a piece of text does not stand there exactly once.
    """
    source = inspect.getsource(import_module(name))
    for old, new in changes:
        if source.count(old) != 1:
            raise ValueError(f"{name} does not hold this once, which was to be changed: {old!r}")
        source = source.replace(old, new)
    module = ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    exec(compile(source, f"{name}, changed", "exec"), module.__dict__)
    # Functions look these up when they are called.
    vars(module).update(names)
    return module


def _shifted(start: Start, config: Sm90BackwardConfig) -> ModuleType:
    """The kernel's module with blocks that begin at tiles of their own.

    Blocks are counted in the order in which they begin, the last keys first. Block r of a group of
    `size` begins at tile r * tiles // size, so that at tile m those have begun whose r is below
    `begun` = ceil((m + 1) * size / tiles). The last of them is there first, then the one before
    it. Groups add one after the other.
    """
    from numflash.ptx import device_function, i32, u32
    from numflash.tiles.division import quotient

    blocks, tiles, group, tile_n = *start, config.tile_n

    @device_function
    def place_in_group(block):
        """(blocks of earlier groups, r, size) of the block that owns tile `block` of keys."""
        order = i32(blocks - 1 - block)
        first = i32(quotient(order, group) * group)
        return first, i32(order - first), i32(min(group, blocks - first))

    @device_function
    def count_steps(walk):
        return i32(tiles)

    @device_function
    def first_step(walk):
        _, r, size = place_in_group(quotient(walk.n_start, tile_n))
        return quotient(r * tiles, size), walk.first_head, i32(tiles)

    @device_function
    def next_step(walk, number, head, end):
        following = i32(number + 1)
        return i32(0) if following == end else following, head, end

    @device_function
    def rank_of(block, tile, head, batch, sequence, mask):
        first, r, size = place_in_group(block)
        begun = quotient((tile + 1) * size + tiles - 1, tiles)
        after = i32(begun - 1 - r)
        return u32(first + (after + size if after < 0 else after))

    @device_function
    def adds_last(block, tile, head, batch, sequence, mask):
        return rank_of(block, tile, head, batch, sequence, mask) == u32(blocks - 1)

    def make_steps_of_heads(traits, tile_m):
        return count_steps, first_step, next_step

    queries = _executed(_QUERIES, make_steps_of_heads=make_steps_of_heads)
    add_dq = _executed(
        _ADD_DQ,
        make_steps_of_heads=make_steps_of_heads,
        make_rank_of=lambda *of_tiles: rank_of,
        make_adds_last=lambda *of_tiles: adds_last,
    )
    return _executed(
        _KERNEL,
        make_steps_of_heads=make_steps_of_heads,
        make_produce=queries.make_produce,
        make_assist=queries.make_assist,
        make_add_dq=add_dq.make_add_dq,
    )
