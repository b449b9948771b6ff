"""Plays a `Program` in time: roles take its steps, and share what an SM has one of.

There is no contention for issue slots, no conflict in shared memory and no limit of power: an SM
is at least as slow as this.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from .block import Block
from .clock import Clock, Process
from .player import COPIES, EXPONENTIALS, Player
from .rates import Rates
from .steps import Program
from .timeline import STEADY, Lane, Span, Timeline, busy


def play(program: Program, rates: Rates, blocks: int = 1) -> Timeline:
    """Run blocks of a program on one SM until they are done.

    Args:
        program: what the roles of each block do.
        rates: the clocks of each step.
        blocks: that share the SM; block i begins i x `rates.offset` clocks late.

    Raises:
        RuntimeError: the roles wait for each other for ever; the message names them.

    Example:
        >>> timeline = play(program_of(config, traits, 8), rates_of(machine, config, traits))
        >>> timeline.busy["tensor"]
    """
    clock, players, ended = Clock(), [], {}
    for number in range(blocks):
        prefix = f"block {number}: " if blocks > 1 else ""
        block = Block(clock, program, rates, prefix)
        for role, steps in program.roles.items():
            player = Player(block, role)
            players.append(player)
            clock.begin(_to_its_end(player, steps, ended), number * rates.offset)
    clock.run()
    waiting = [player.lane for player in players if player.lane not in ended]
    if waiting:
        raise RuntimeError(f"roles that wait for ever: {', '.join(waiting)}")
    for block in dict.fromkeys(player.block for player in players):
        block.close()
    return _timeline(clock.spans, program, players)


def _to_its_end(player: Player, steps: Callable[[], Iterator], ended: dict) -> Process:
    yield from player.play(steps())
    ended[player.lane] = player.clock.now


def _timeline(
    spans: Mapping[str, list[Span]], program: Program, players: Sequence[Player]
) -> Timeline:
    lanes, units = _lanes(program, players), (COPIES, program.unit, EXPONENTIALS)
    ordered = {lane.name: sorted(spans[lane.name], key=lambda span: span.start) for lane in lanes}
    end = max((span.end for found in ordered.values() for span in found), default=0.0)
    window, turn = _steady(ordered[program.unit], program, end)
    return Timeline(
        spans=tuple(span for lane in lanes for span in ordered[lane.name]),
        lanes=tuple(lane for lane in lanes if ordered[lane.name]),
        turn=turn,
        steady=window,
        busy={name: busy(found, window, name in units) for name, found in ordered.items()},
        end=end,
    )


def _lanes(program: Program, players: Sequence[Player]) -> list[Lane]:
    found = []
    for block in dict.fromkeys(player.block for player in players):
        for name, channel in program.channels.items():
            found += [Lane(block.lane_of(name, i), "buffer") for i in range(channel.buffers)]
        for name, buffers in program.buffers.items():
            found += [Lane(block.lane_of_tile(name, i), "buffer") for i in range(buffers)]
    found += [Lane(player.lane, "role") for player in players]
    return found + [Lane(name, "unit") for name in (COPIES, program.unit, EXPONENTIALS)]


def _steady(products: list[Span], program: Program, end: float) -> tuple[tuple, float]:
    """((start, end) of the steady state, clocks of a turn), by the first role that multiplies."""
    first = [span for span in products if span.kind == program.first]
    owner = first[0].owner if first else ""
    starts: dict[str, float] = {}
    for span in first:
        if span.owner == owner:
            starts.setdefault(span.label, span.start)
    times = list(starts.values())
    low, high = (int(share * len(times)) for share in STEADY)
    if high <= low:
        return (0.0, end), end / max(1, len(times))
    window = times[low], times[high]
    return window, (window[1] - window[0]) / (high - low)
