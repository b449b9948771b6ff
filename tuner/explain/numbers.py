"""Numbers that name their origin, and facts as JSON.

Origins are "measured" (a GPU took this time), "machine code" (read from the compiled kernel),
"counted" (of the problem and the layout, exactly), "model" (predicted offline), "assumed" (a
constant that nobody has measured here), "chosen" (by the caller, or by the rules for him) and
"computed" (by a kernel in the simulator, or by NumPy).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Literal

import numpy as np

Origin = Literal["measured", "machine code", "counted", "model", "assumed", "chosen", "computed"]


@dataclass(frozen=True)
class Number:
    """A number, or a row of numbers, of one origin.

    Attributes:
        value: it, or them.
        origin: where it is from.
        unit: as in "ms"; "" of what is only counted.
    """

    value: float | Sequence[float] | np.ndarray
    origin: Origin
    unit: str = ""

    def __str__(self) -> str:
        return f"{written(self.value)} {self.unit}".rstrip()


def written(value: float) -> str:
    """A number as people write it: three digits, thousands apart."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def as_json(facts: object) -> object:
    """Facts as what JSON can hold: dataclasses become objects, arrays lists."""
    if isinstance(facts, np.ndarray | np.generic):
        return facts.tolist()
    if is_dataclass(facts) and not isinstance(facts, type):
        return {each.name: as_json(getattr(facts, each.name)) for each in fields(facts)}
    if isinstance(facts, Mapping):
        return {str(key): as_json(value) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [as_json(value) for value in facts]
    return facts
