"""Plays a `Program` in time: roles take its steps, and share what an SM has one of.

Units work in order: who asks first is served first. Products and exponentials are asked for in
steps of equal length, so that roles that ask at once share a unit fairly. A role that begins
products goes on when their last step has begun: the tensor cores are fed against back-pressure.

There is no contention for issue slots, no conflict in shared memory and no limit of power: an SM
is at least as slow as this.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import singledispatchmethod

from .rates import Rates
from .steps import (
    Arrive,
    Arrived,
    Begin,
    Claim,
    Commit,
    Copy,
    Fetch,
    Fill,
    Load,
    Multiply,
    Program,
    Release,
    Send,
    Sync,
    Until,
    Wait,
    Work,
)
from .timeline import STEADY, Lane, Span, Timeline, busy

COPIES, EXPONENTIALS = "copies", "exponentials"
"""The names of the units' lanes beside the one that multiplies (`Program.unit`)."""
_STEP = 32.0
"""Clocks of a unit that are asked for at once: a `wgmma` of 64 x 64 x 16."""
_Process = Iterator["float | _Event"]


class _Event:
    """Something that happens once; `at` says when, and is None before."""

    def __init__(self):
        self.at: float | None = None
        self.waiting: list[_Process] = []


class _Engine:
    """The clock, the units and the spans of an SM."""

    def __init__(self):
        self.now, self.spans = 0.0, defaultdict(list)
        self._queue, self._number = [], 0
        self._free: dict[str, float] = defaultdict(float)

    def begin(self, process: _Process, at: float | None = None) -> None:
        """Let a process go on, at once or at a time."""
        self._number += 1
        heapq.heappush(self._queue, (self.now if at is None else at, self._number, process))

    def fire(self, event: _Event) -> None:
        """An event happens, and who waits for it goes on."""
        event.at = self.now
        for process in event.waiting:
            self.begin(process)

    def run(self) -> None:
        """Until nothing is left that can happen."""
        while self._queue:
            self.now, _, process = heapq.heappop(self._queue)
            for wanted in process:
                if isinstance(wanted, _Event):
                    if wanted.at is None:
                        wanted.waiting.append(process)
                        break
                elif wanted > self.now:
                    self.begin(process, wanted)
                    break

    def use(self, unit: str, clocks: float, kind: str, label: str, owner: str) -> float:
        """Ask a unit for work; when it will be done."""
        start = max(self.now, self._free[unit])
        self._free[unit] = start + clocks
        self.note(Span(unit, start, start + clocks, kind, label, owner))
        return start + clocks

    def note(self, span: Span) -> None:
        """Keep a span, or add it to the one before it that it continues."""
        if span.end <= span.start:
            return
        spans = self.spans[span.lane]
        if spans and _continues(spans[-1], span):
            span = Span(span.lane, spans.pop().start, *(getattr(span, x) for x in _LATER))
        spans.append(span)


_LATER = "end", "kind", "label", "owner"


def _title(tile: str) -> str:
    """A tile in shared memory, in words."""
    return "dO" if tile == "do" else tile.removesuffix("_codes").upper()


def _steps(clocks: float) -> list[float]:
    """The clocks of each step of so many."""
    count = max(1, round(clocks / _STEP))
    return [clocks / count] * count


def _continues(last: Span, span: Span) -> bool:
    same = (last.kind, last.label, last.owner) == (span.kind, span.label, span.owner)
    return same and span.start <= last.end


class _Buffer:
    """A buffer of a channel: its phases, full and empty."""

    def __init__(self):
        self.full: dict[int, _Event] = defaultdict(_Event)
        self.empty: dict[int, _Event] = defaultdict(_Event)
        self.written, self.released = Counter(), Counter()
        self.label, self.began = "", {}


class _Block:
    """A block on an SM: its buffers and barriers, and the names of its lanes."""

    def __init__(self, engine: _Engine, program: Program, rates: Rates, prefix: str):
        self.engine, self.program, self.rates, self.prefix = engine, program, rates, prefix
        self.channels = {
            name: [_Buffer() for _ in range(channel.buffers)]
            for name, channel in program.channels.items()
        }
        self.phases: dict[str, dict[int, _Event]] = defaultdict(lambda: defaultdict(_Event))
        self.came = Counter()
        # Of tiles without a channel: when a buffer's tile came, and when it was read last.
        self.held: dict[tuple[str, int], list] = {}

    def lane_of(self, channel: str, buffer: int) -> str:
        return self.prefix + self.program.channels[channel].lane(buffer)

    def lane_of_tile(self, name: str, buffer: int) -> str:
        several = f" {buffer}" if self.program.buffers[name] > 1 else ""
        return f"{self.prefix}{_title(name)}{several}"

    def arrive(self, barrier: str) -> _Event:
        """The event that ends the barrier's phase, once one more has come."""
        most = self.program.barriers[barrier]
        phase = self.phases[barrier][self.came[barrier] // most]
        self.came[barrier] += 1
        if self.came[barrier] % most == 0:
            self.engine.fire(phase)
        return phase

    def wrote(self, channel: str, buffer: int, phase: int) -> None:
        """One writer of a buffer is done; the last one makes it full."""
        state = self.channels[channel][buffer]
        state.written[phase] += 1
        if state.written[phase] == self.program.channels[channel].writers:
            lane = self.lane_of(channel, buffer)
            began, label = state.began[phase]
            self.note(lane, began, "copy", label)
            self.engine.fire(state.full[phase])

    def released(self, channel: str, buffer: int, phase: int) -> None:
        """One reader of a buffer is done; the last one makes it empty."""
        state = self.channels[channel][buffer]
        state.released[phase] += 1
        if state.released[phase] == self.program.channels[channel].readers:
            lane = self.lane_of(channel, buffer)
            self.note(lane, state.full[phase].at, "held", state.began[phase][1])
            self.engine.fire(state.empty[phase])

    def close(self) -> None:
        """All is over: what buffers still hold they have held until now."""
        for name, channel in self.program.channels.items():
            for buffer, state in enumerate(self.channels[name]):
                for phase in state.written if not channel.readers else ():
                    self.keep(name, buffer, phase)
        for name, buffer in list(self.held):
            self.forget(name, buffer)

    def keep(self, channel: str, buffer: int, phase: int) -> None:
        """What nobody releases is held until it is written again, or until the end."""
        state, lane = self.channels[channel][buffer], self.lane_of(channel, buffer)
        end = state.began.get(phase + 1, (self.engine.now,))[0]
        label = state.began[phase][1]
        self.engine.note(Span(lane, state.full[phase].at, end, "held", label, self.prefix))

    def was_read(self, operand: tuple[str, int] | None) -> None:
        """A tile without a channel is held at least until now."""
        if operand in self.held:
            self.held[operand][1] = self.engine.now

    def forget(self, name: str, buffer: int) -> None:
        """A tile is read no more: another takes its place, or all is over."""
        if (held := self.held.pop((name, buffer), None)) is not None:
            came, last, label = held
            span = Span(self.lane_of_tile(name, buffer), came, last, "held", label, self.prefix)
            self.engine.note(span)

    def note(self, lane: str, start: float, kind: str, label: str = "") -> None:
        self.engine.note(Span(lane, start, self.engine.now, kind, label, self.prefix))


class _Player:
    """Takes the steps of one role of one block."""

    def __init__(self, block: _Block, role: str):
        self.block, self.engine, self.rates = block, block.engine, block.rates
        self.lane = block.prefix + role
        # How often this role has claimed, filled, waited for and released each buffer.
        self.visits = Counter()
        # (label, end) of groups of products under way; copies of each group and of the next one.
        self.products, self.groups, self.copies = [], [], []

    def play(self, steps: Iterator) -> _Process:
        """The whole role."""
        for step in steps:
            yield from self._take(step) or ()

    def _visit(self, verb: str, channel: str, buffer: int) -> int:
        """The phase that a verb is about: how often it was said of this buffer before."""
        self.visits[verb, channel, buffer] += 1
        return self.visits[verb, channel, buffer] - 1

    def _spend(self, wanted, kind: str, label: str = "") -> _Process:
        began = self.engine.now
        yield wanted
        self.block.note(self.lane, began, kind, label)

    @singledispatchmethod
    def _take(self, step) -> _Process | None:
        """What a step waits for, if it does."""
        raise TypeError(f"{step!r} is no step")

    @_take.register
    def _(self, step: Claim) -> _Process:
        phase = self._visit("claim", *step)
        if phase:
            state = self.block.channels[step.channel][step.buffer]
            label = self.block.program.channels[step.channel].title
            yield from self._spend(state.empty[phase - 1], "wait", f"room for {label}")

    @_take.register
    def _(self, step: Fetch) -> _Process:
        channel, buffer, tile = step
        phase, label = self._name(channel, buffer, tile)
        done = self.engine.use(
            COPIES, self.rates.copies[channel], "copy", label, self.block.prefix + channel
        )
        arrival = self._arrival(channel, buffer, phase)
        self.engine.begin(arrival, done + self.rates.latency)
        yield from self._spend(self.engine.now + self.rates.issue, "issue", label)

    def _name(self, channel: str, buffer: int, tile: int) -> tuple[int, str]:
        """(phase, label) of a tile that begins to come."""
        phase = self._visit("fill", channel, buffer)
        label = f"{self.block.program.channels[channel].title} {tile}"
        state = self.block.channels[channel][buffer]
        state.began.setdefault(phase, (self.engine.now, label))
        return phase, label

    def _arrival(self, channel: str, buffer: int, phase: int) -> _Process:
        self.block.wrote(channel, buffer, phase)
        yield from ()

    @_take.register
    def _(self, step: Fill) -> _Process:
        channel, buffer, tile, work = step
        phase, label = self._name(channel, buffer, tile)
        yield from self._spend(self.engine.now + self.rates.work[work], work, label)
        self.block.wrote(channel, buffer, phase)

    @_take.register
    def _(self, step: Wait) -> _Process:
        phase, channel = self._visit("wait", *step), self.block.program.channels[step.channel]
        if channel.readers:
            # Until it gives the buffer back, a role may wait for the same tile again.
            phase = self.visits["release", *step]
        state, label = self.block.channels[step.channel][step.buffer], channel.title
        yield from self._spend(state.full[phase], "wait", label)

    @_take.register
    def _(self, step: Release) -> None:
        self.block.released(*step, self._visit("release", *step))

    @_take.register
    def _(self, step: Send) -> _Process:
        channel, _, tile = step
        label = f"{self.block.program.channels[channel].title} {tile}"
        done = self.engine.use(
            COPIES, self.rates.copies[channel], "copy", label, self.block.prefix + channel
        )
        yield from self._spend(done, "send", label)

    @_take.register
    def _(self, step: Begin) -> _Process:
        label, began = f"{step.product} {step.tile}", self.engine.now
        for clocks in _steps(self.rates.products[step.product]):
            done = self._multiply(step.product, clocks, label)
            yield done - clocks
        self.products.append((label, done))
        self.block.note(self.lane, began, "issue", label)

    def _multiply(self, product: str, clocks: float, label: str) -> float:
        return self.engine.use(self.block.program.unit, clocks, product, label, self.lane)

    @_take.register
    def _(self, step: Until) -> _Process:
        left = max(0, len(self.products) - step.pending)
        over, self.products = self.products[:left], self.products[left:]
        for label, end in over:
            yield from self._spend(end, "products", label)

    @_take.register
    def _(self, step: Multiply) -> _Process:
        label, began = f"{step.product} {step.tile}", self.engine.now
        for clocks in _steps(self.rates.products[step.product]):
            yield self._multiply(step.product, clocks, label)
        self.block.note(self.lane, began, "products", label)
        for operand in step.operands:
            self.block.was_read(operand)

    @_take.register
    def _(self, step: Copy) -> _Process:
        name, buffer, tile = step
        label, event = f"{_title(name)} {tile}", _Event()
        self.block.forget(name, buffer)
        done = self.engine.use(
            COPIES, self.rates.copies[name], "copy", label, self.block.prefix + name
        )
        self.engine.begin(
            self._landing(name, buffer, label, event, self.engine.now), done + self.rates.latency
        )
        self.copies.append(event)
        yield from self._spend(self.engine.now + self.rates.issue, "issue", label)

    def _landing(self, name, buffer, label, event, began) -> _Process:
        self.block.note(self.block.lane_of_tile(name, buffer), began, "copy", label)
        self.block.held[name, buffer] = [self.engine.now, self.engine.now, label]
        self.engine.fire(event)
        yield from ()

    @_take.register
    def _(self, step: Load) -> _Process:
        yield from self._take(Copy(*step))
        yield from self._spend(self.copies.pop(), "wait", f"{_title(step.name)} {step.tile}")

    @_take.register
    def _(self, step: Commit) -> None:
        self.groups.append(self.copies)
        self.copies = []

    @_take.register
    def _(self, step: Arrived) -> _Process:
        left = max(0, len(self.groups) - step.pending)
        over, self.groups = self.groups[:left], self.groups[left:]
        for event in (event for group in over for event in group):
            yield from self._spend(event, "wait", "copies")

    @_take.register
    def _(self, step: Arrive) -> None:
        self.block.arrive(step.barrier)

    @_take.register
    def _(self, step: Sync) -> _Process:
        kind = "turn" if step.barrier.startswith("turn") else "wait"
        yield from self._spend(self.block.arrive(step.barrier), kind, step.barrier)
        yield from self._spend(self.engine.now + self.rates.barrier, kind, step.barrier)

    @_take.register
    def _(self, step: Work) -> _Process:
        clocks, label = self.rates.work[step.kind], f"{step.kind} {step.tile}"
        if step.kind != "exp":
            yield from self._spend(self.engine.now + clocks, step.kind, label)
            self.block.was_read(step.reads)
            return
        began = self.engine.now
        for each in _steps(clocks):
            yield self.engine.use(EXPONENTIALS, each, "exp", label, self.lane)
        self.block.note(self.lane, began, "exp", label)


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
    engine, players, ended = _Engine(), [], {}
    for number in range(blocks):
        prefix = f"block {number}: " if blocks > 1 else ""
        block = _Block(engine, program, rates, prefix)
        for role, steps in program.roles.items():
            player = _Player(block, role)
            players.append(player)
            engine.begin(_to_its_end(player, steps, ended), number * rates.offset)
    engine.run()
    waiting = [player.lane for player in players if player.lane not in ended]
    if waiting:
        raise RuntimeError(f"roles that wait for ever: {', '.join(waiting)}")
    for block in dict.fromkeys(player.block for player in players):
        block.close()
    return _timeline(engine.spans, program, players)


def _to_its_end(player: _Player, steps: Callable[[], Iterator], ended: dict) -> _Process:
    yield from player.play(steps())
    ended[player.lane] = player.engine.now


def _timeline(
    spans: Mapping[str, list[Span]], program: Program, players: Sequence[_Player]
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


def _lanes(program: Program, players: Sequence[_Player]) -> list[Lane]:
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
