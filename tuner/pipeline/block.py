"""A block on an SM: its buffers and barriers, in time."""

from collections import Counter, defaultdict

from .clock import Clock, Event
from .rates import Rates
from .steps import Program
from .timeline import Span


class Buffer:
    """A buffer of a channel: its phases, full and empty."""

    def __init__(self):
        self.full: dict[int, Event] = defaultdict(Event)
        self.empty: dict[int, Event] = defaultdict(Event)
        self.written, self.released = Counter(), Counter()
        # Of a phase: when its tile began to come, and the tile's label.
        self.began: dict[int, tuple[float, str]] = {}


class Block:
    """A block on an SM: its buffers and barriers, and the names of its lanes.

    Args:
        clock: of the SM.
        program: of the block.
        rates: of its steps.
        prefix: of its lanes' names: "", or "block 0: " where several blocks share the SM.
    """

    def __init__(self, clock: Clock, program: Program, rates: Rates, prefix: str):
        self.clock, self.program, self.rates, self.prefix = clock, program, rates, prefix
        self.name = prefix.removesuffix(": ")
        self.channels = {
            name: [Buffer() for _ in range(channel.buffers)]
            for name, channel in program.channels.items()
        }
        self.phases: dict[str, dict[int, Event]] = defaultdict(lambda: defaultdict(Event))
        self.came = Counter()
        # Of tiles without a channel: when a buffer's tile came, and when it was read last.
        self.held: dict[tuple[str, int], list] = {}

    def lane_of(self, channel: str, buffer: int) -> str:
        """The lane of a channel's buffer."""
        return self.prefix + self.program.channels[channel].lane(buffer)

    def lane_of_tile(self, name: str, buffer: int) -> str:
        """The lane of a buffer of a tile without a channel."""
        several = f" {buffer}" if self.program.buffers[name] > 1 else ""
        return f"{self.prefix}{title_of(name)}{several}"

    def arrive(self, barrier: str) -> Event:
        """The event that ends the barrier's phase, once one more has come."""
        most = self.program.barriers[barrier]
        phase = self.phases[barrier][self.came[barrier] // most]
        self.came[barrier] += 1
        if self.came[barrier] % most == 0:
            self.clock.fire(phase)
        return phase

    def wrote(self, channel: str, buffer: int, phase: int) -> None:
        """One writer of a buffer is done; the last one makes it full."""
        state = self.channels[channel][buffer]
        state.written[phase] += 1
        if state.written[phase] == self.program.channels[channel].writers:
            lane = self.lane_of(channel, buffer)
            began, label = state.began[phase]
            self.note(lane, began, "copy", label)
            self.clock.fire(state.full[phase])

    def released(self, channel: str, buffer: int, phase: int) -> None:
        """One reader of a buffer is done; the last one makes it empty."""
        state = self.channels[channel][buffer]
        state.released[phase] += 1
        if state.released[phase] == self.program.channels[channel].readers:
            lane = self.lane_of(channel, buffer)
            self.note(lane, state.full[phase].at, "held", state.began[phase][1])
            self.clock.fire(state.empty[phase])

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
        end = state.began.get(phase + 1, (self.clock.now,))[0]
        label = state.began[phase][1]
        self.clock.note(Span(lane, state.full[phase].at, end, "held", label, self.name))

    def came_to(self, name: str, buffer: int, began: float, label: str) -> None:
        """A tile without a channel is there, whose copy began at a time."""
        self.note(self.lane_of_tile(name, buffer), began, "copy", label)
        self.held[name, buffer] = [self.clock.now, self.clock.now, label]

    def was_read(self, operand: tuple[str, int] | None) -> None:
        """A tile without a channel is held at least until now."""
        if operand in self.held:
            self.held[operand][1] = self.clock.now

    def forget(self, name: str, buffer: int) -> None:
        """A tile is read no more: another takes its place, or all is over."""
        if (held := self.held.pop((name, buffer), None)) is not None:
            came, last, label = held
            span = Span(self.lane_of_tile(name, buffer), came, last, "held", label, self.name)
            self.clock.note(span)

    def note(self, lane: str, start: float, kind: str, label: str = "") -> None:
        """A lane of this block has done something since `start`."""
        self.clock.note(Span(lane, start, self.clock.now, kind, label, self.name))


def title_of(tile: str) -> str:
    """A tile in shared memory, in words."""
    return "dO" if tile == "do" else tile.removesuffix("_codes").upper()
