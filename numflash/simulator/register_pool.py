"""The registers that the warps of a block give back and take (`setmaxnreg`).

A block is launched with as many registers a thread as fit its share of an SM. "inc" waits until
others have given back enough. All four warps of a warpgroup must execute it, each when it comes
to it.
"""

from numflash.simulator.engine import current_thread
from numflash.simulator.errors import SimulationError
from numflash.simulator.parts import Part
from numflash.simulator.waiting import who_waits
from numflash.simulator.warpgroup import execute

_REGISTERS = 64 * 1024
_WARP_SIZE = 32
_MOST = 256


class RegisterPool(Part):
    """The registers of a block that no warp has, counted a thread."""

    def __init__(self, block):
        super().__init__(block)
        threads = block.size * block.blocks_per_sm
        self.at_launch = min(_MOST, _REGISTERS // threads // 8 * 8)
        self.free = 0
        self._owned: dict[int, int] = {}
        self._wanted: dict[int, int] = {}
        self._waiting: dict[int, list] = {}

    def set(self, action: str, registers: int) -> None:
        """All threads of a warp have `registers` from here on."""
        thread = current_thread()
        number = thread.warp

        def together(payloads):
            self.ask(action, registers)
            return [None] * len(payloads)

        thread.collective(f"setmaxnreg.{action} {registers}", _WARP_SIZE, None, together)
        while not self.has_what_it_asked_for(number):
            self._waiting.setdefault(number, []).append(thread)
            self.block.park()

    def ask(self, action: str, registers: int) -> None:
        """The running thread's warp gives registers back, or gets them once there are enough."""
        execute(f"setmaxnreg.{action}", registers)
        self._change(current_thread().warp, action, registers)

    def has_what_it_asked_for(self, number: int) -> bool:
        """Whether a warp need not wait for registers."""
        return number not in self._wanted

    def report(self) -> list[str]:
        """The warps that wait, and the registers that the pool lacks."""
        lines = []
        for number, registers in self._wanted.items():
            lines.append(
                f"  setmaxnreg.inc {registers}: warp {number} has {self._owns(number)} "
                f"registers a thread, {self.free} are free"
            )
            lines += who_waits(self._waiting.get(number, ()))
        return lines

    def _owns(self, number: int) -> int:
        return self._owned.get(number, self.at_launch)

    def _change(self, number: int, action: str, registers: int) -> None:
        own = self._owns(number)
        if (registers > own) if action == "dec" else (registers < own):
            raise SimulationError(
                f"setmaxnreg.{action} {registers}: warp {number} has {own} registers a thread"
            )
        self._wanted[number] = registers
        for waiting, wanted in sorted(self._wanted.items(), key=lambda item: item[1]):
            more = wanted - self._owns(waiting)
            if more <= self.free:
                self.free -= more
                self._owned[waiting] = wanted
                del self._wanted[waiting]
                for thread in self._waiting.pop(waiting, ()):
                    self.block.wake(thread)
