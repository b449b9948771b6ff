"""Instructions of one lane as lines of Python over the 32 lanes of a warp.

A register holds bits: an unsigned array of its size, shape (32,), or of booleans for a predicate;
instructions view them as the type that they name. Arrays are never changed in place, so that a
move is a reference. Generated code knows

    R     the warp's registers, by number
    M     the mask of lanes that execute it, where not all do
    K     constants
    w     the warp: its memory and its special registers
    a     the module `arithmetic`

and what is in none of the tables of this folder is refused by its name: `UnknownError`.
"""

from numflash.executor.one_lane import accesses, bits, calculations, choices, moves
from numflash.executor.one_lane.making import Making, Sources
from numflash.executor.text import TYPE_BYTES, PtxError, Statement, UnknownError, check_operands

_MAKERS = {
    **calculations.MAKERS,
    **bits.MAKERS,
    **choices.MAKERS,
    **moves.MAKERS,
    **accesses.MAKERS,
}


def is_one_lane(opcode: str) -> bool:
    """Whether instructions of this name act in one lane, and wait for nothing."""
    return opcode.split(".")[0] in _MAKERS


class OneLane(Sources):
    """Makes lines of one-lane instructions."""

    def lines(self, statement: Statement, mask: str | None) -> list[str]:
        """Python for a statement, executed by the lanes of `mask`, by all where it is None.

        Raises:
            UnknownError: there is no such instruction, or not in this form.
            PtxError: it has too few or too many operands.
        """
        head, *parts = statement.opcode.split(".")
        known = _MAKERS.get(head)
        if known is None:
            raise UnknownError(f"the executor does not know {statement.opcode}")
        make, counts, allowed = known
        types = [part for part in parts if part in TYPE_BYTES]
        modifiers = [part for part in parts if part not in TYPE_BYTES]
        if refused := [part for part in modifiers if part not in allowed]:
            raise UnknownError(f"the executor does not know {statement.opcode}: .{refused[0]}")
        check_operands(statement, *counts)
        try:
            return make(Making(self, statement, modifiers, types, mask))
        except PtxError:
            raise
        except (IndexError, KeyError, ValueError, AttributeError) as error:
            # A table above has no such type, or the operands are of another kind.
            raise UnknownError(
                f"the executor does not know {statement.opcode} with these operands ({error!r})"
            ) from error
