"""A role of a block, which takes the steps of its program, each in its time.

A role that begins products goes on when the last of their steps has begun: the tensor cores are
fed against back-pressure.
"""

from collections import Counter
from collections.abc import Iterator
from functools import singledispatchmethod

from .block import Block, title_of
from .clock import Event, Process, steps_of
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
    Release,
    Send,
    Sync,
    Until,
    Wait,
    Work,
)

COPIES, EXPONENTIALS = "copies", "exponentials"
"""The names of the units' lanes beside the one that multiplies (`Program.unit`)."""


class Player:
    """Takes the steps of one role of one block."""

    def __init__(self, block: Block, role: str):
        self.block, self.clock, self.rates = block, block.clock, block.rates
        self.lane = block.prefix + role
        # How often this role has claimed, filled, waited for and released each buffer.
        self.visits = Counter()
        # (label, end) of groups of products under way; copies of each group and of the next one.
        self.products, self.groups, self.copies = [], [], []

    def play(self, steps: Iterator) -> Process:
        """The whole role."""
        for step in steps:
            yield from self._take(step) or ()

    def _visit(self, verb: str, channel: str, buffer: int) -> int:
        """The phase that a verb is about: how often it was said of this buffer before."""
        self.visits[verb, channel, buffer] += 1
        return self.visits[verb, channel, buffer] - 1

    def _spend(self, wanted, kind: str, label: str = "") -> Process:
        began = self.clock.now
        yield wanted
        self.block.note(self.lane, began, kind, label)

    @singledispatchmethod
    def _take(self, step) -> Process | None:
        """What a step waits for, if it does."""
        raise TypeError(f"{step!r} is no step")

    @_take.register
    def _(self, step: Claim) -> Process:
        phase = self._visit("claim", *step)
        if phase:
            state = self.block.channels[step.channel][step.buffer]
            label = self.block.program.channels[step.channel].title
            yield from self._spend(state.empty[phase - 1], "wait", f"room for {label}")

    @_take.register
    def _(self, step: Fetch) -> Process:
        channel, buffer, tile = step
        phase, label = self._name(channel, buffer, tile)
        arrival = self._copy(channel, label) + self.rates.latency
        self.clock.later(arrival, lambda: self.block.wrote(channel, buffer, phase))
        yield from self._spend(self.clock.now + self.rates.issue, "issue", label)

    def _copy(self, name: str, label: str) -> float:
        """Ask for the bytes of a channel's buffer, or of a tile; when the last is on its way."""
        owner = self.block.prefix + name
        return self.clock.use(COPIES, self.rates.copies[name], "copy", label, owner)

    def _name(self, channel: str, buffer: int, tile: int) -> tuple[int, str]:
        """(phase, label) of a tile that begins to come."""
        phase = self._visit("fill", channel, buffer)
        label = f"{self.block.program.channels[channel].title} {tile}"
        state = self.block.channels[channel][buffer]
        state.began.setdefault(phase, (self.clock.now, label))
        return phase, label

    @_take.register
    def _(self, step: Fill) -> Process:
        channel, buffer, tile, work = step
        phase, label = self._name(channel, buffer, tile)
        yield from self._spend(self.clock.now + self.rates.work[work], work, label)
        self.block.wrote(channel, buffer, phase)

    @_take.register
    def _(self, step: Wait) -> Process:
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
    def _(self, step: Send) -> Process:
        channel, _, tile = step
        label = f"{self.block.program.channels[channel].title} {tile}"
        yield from self._spend(self._copy(channel, label), "send", label)

    @_take.register
    def _(self, step: Begin) -> Process:
        label, began = f"{step.product} {step.tile}", self.clock.now
        for clocks in steps_of(self.rates.products[step.product]):
            done = self._multiply(step.product, clocks, label)
            yield done - clocks
        self.products.append((label, done))
        self.block.note(self.lane, began, "issue", label)

    def _multiply(self, product: str, clocks: float, label: str) -> float:
        return self.clock.use(self.block.program.unit, clocks, product, label, self.lane)

    @_take.register
    def _(self, step: Until) -> Process:
        left = max(0, len(self.products) - step.pending)
        over, self.products = self.products[:left], self.products[left:]
        for label, end in over:
            yield from self._spend(end, "products", label)

    @_take.register
    def _(self, step: Multiply) -> Process:
        label, began = f"{step.product} {step.tile}", self.clock.now
        for clocks in steps_of(self.rates.products[step.product]):
            yield self._multiply(step.product, clocks, label)
        self.block.note(self.lane, began, "products", label)
        for operand in step.operands:
            self.block.was_read(operand)

    @_take.register
    def _(self, step: Copy) -> Process:
        name, buffer, tile = step
        label, arrived, began = f"{title_of(name)} {tile}", Event(), self.clock.now
        self.block.forget(name, buffer)

        def arrives():
            self.block.came_to(name, buffer, began, label)
            self.clock.fire(arrived)

        self.clock.later(self._copy(name, label) + self.rates.latency, arrives)
        self.copies.append(arrived)
        yield from self._spend(self.clock.now + self.rates.issue, "issue", label)

    @_take.register
    def _(self, step: Load) -> Process:
        yield from self._take(Copy(*step))
        yield from self._spend(self.copies.pop(), "wait", f"{title_of(step.name)} {step.tile}")

    @_take.register
    def _(self, step: Commit) -> None:
        self.groups.append(self.copies)
        self.copies = []

    @_take.register
    def _(self, step: Arrived) -> Process:
        left = max(0, len(self.groups) - step.pending)
        over, self.groups = self.groups[:left], self.groups[left:]
        for event in (event for group in over for event in group):
            yield from self._spend(event, "wait", "copies")

    @_take.register
    def _(self, step: Arrive) -> None:
        self.block.arrive(step.barrier)

    @_take.register
    def _(self, step: Sync) -> Process:
        kind = "turn" if step.barrier.startswith("turn") else "wait"
        yield from self._spend(self.block.arrive(step.barrier), kind, step.barrier)
        yield from self._spend(self.clock.now + self.rates.barrier, kind, step.barrier)

    @_take.register
    def _(self, step: Work) -> Process:
        clocks, label = self.rates.work[step.kind], f"{step.kind} {step.tile}"
        if step.kind != "exp":
            yield from self._spend(self.clock.now + clocks, step.kind, label)
            self.block.was_read(step.reads)
            return
        began = self.clock.now
        for each in steps_of(clocks):
            yield self.clock.use(EXPONENTIALS, each, "exp", label, self.lane)
        self.block.note(self.lane, began, "exp", label)
