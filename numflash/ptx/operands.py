"""The kinds of operands of an instruction that are no scalars; see `instruction`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Regs:
    """n registers of one type: a local array, or a slice of one with constant bounds."""

    type: type
    n: int
    mode: str = "rw"

    def __post_init__(self):
        if self.mode not in ("r", "w", "rw"):
            raise ValueError(f"mode of Regs must be 'r', 'w' or 'rw', got {self.mode!r}")


@dataclass(frozen=True)
class Accumulator(Regs):
    """Registers that an asynchronous product writes later: one whole local array."""


@dataclass(frozen=True)
class LaterRead(Regs):
    """Registers that an asynchronous product reads later."""

    mode: str = "r"


@dataclass(frozen=True)
class Shared:
    """The 32-bit shared-memory address of element `index` of an array in shared memory."""

    type: type
    index: str


@dataclass(frozen=True)
class Global:
    """The 64-bit address of element `index` behind a `Pointer`."""

    type: type
    index: str
