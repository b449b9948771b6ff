"""Two files of machine-code figures: what differs, and whether it got worse.

A kernel is worse where fewer blocks fit on an SM (registers or shared memory crossed a step of
occupancy), where it or its main loop has more instructions or a turn of that issues more, where
fewer exponentials overlap with products, where it spills more or has another warning, where its
main loop is found on one side only, where it no longer compiles, or where it is gone. More
registers that leave room for as many blocks are counted apart: they fail nothing. Names of
parameters and functions are free to change; a change of the parameters' types in order is shown.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from bench.machine_code.figures import unpacked
from bench.machine_code.kernels import is_wanted
from bench.tables import tables

COLUMNS = (
    "kernel",
    "verdict",
    "registers",
    "blocks/SM",
    "instructions",
    "main loop",
    "spill bytes",
    "warnings",
    "notes",
)
BETTER, SAME, WORSE = "better", "same", "WORSE"
_VERDICTS = (WORSE, BETTER, SAME)
_FREE = ("sequence", "opcodes", "limited_by")
_SYMBOL = re.compile(r"'[^']*'|\b_Z\w+")
_MORE_REGISTERS = "more registers, as many blocks"


@dataclass(frozen=True)
class Difference:
    """A kernel that differs.

    Attributes:
        kernel: its name.
        verdict: `BETTER`, `SAME` or `WORSE`.
        notes: what the columns of numbers do not say.
        before, after: its figures; None where the file has no such kernel.
    """

    kernel: str
    verdict: str
    notes: tuple[str, ...]
    before: dict | None
    after: dict | None

    @property
    def more_registers(self) -> bool:
        """Whether registers were added and as many blocks fit on an SM."""
        return _MORE_REGISTERS in self.notes

    @property
    def row(self) -> list[str]:
        """Cells of `COLUMNS`."""
        sides = [_cells(self.before), _cells(self.after)]
        cells = [x if x == y else f"{x} -> {y}" for x, y in zip(*sides, strict=True)]
        return [self.kernel, self.verdict, *cells, "; ".join(self.notes)]


def compare(before: dict, after: dict) -> list[Difference]:
    """The kernels that differ between two files, the worse first.

    Kernels that only one of the files was asked for (`--only`) are left out.
    """
    sides = [
        {n: f for n, f in x["kernels"].items() if is_wanted(n, y.get("only", ()))}
        for x, y in ((before, after), (after, before))
    ]
    names = dict.fromkeys([*sides[0], *sides[1]])
    found = [_difference(name, *(side.get(name) for side in sides)) for name in names]
    return sorted(filter(None, found), key=lambda each: _VERDICTS.index(each.verdict))


def report(before: dict, after: dict) -> tuple[str, bool]:
    """The table with a summary, and whether the second file passes."""
    found = compare(before, after)
    common = set(before["kernels"]) & set(after["kernels"])
    if not common:
        return "the files have no kernel in common", False
    lines = []
    versions = [each["made"]["compilers"] for each in (before, after)]
    names = dict.fromkeys([*versions[0], *versions[1]])
    pairs = {name: [each.get(name) for each in versions] for name in names}
    if other := [f"{name} {x} -> {y}" for name, (x, y) in pairs.items() if x != y]:
        lines.append(f"other compilers: {', '.join(other)}")
    if not found:
        lines.append(f"{_kernels(len(common))} compared: no kernel changed")
        return "\n".join(lines), True
    lines.append(tables.markdown(COLUMNS, [each.row for each in found]))
    counts = Counter(each.verdict for each in found)
    listed = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _VERDICTS)
    total = len(common) + sum(None in (each.before, each.after) for each in found)
    lines.append(f"{len(found)} of {_kernels(total)} changed: {listed}")
    if more := sum(each.more_registers for each in found):
        verb = "has" if more == 1 else "have"
        lines.append(
            f"{more} {verb} more registers and as many blocks on an SM, which fails nothing"
        )
    return "\n".join(lines), not counts[WORSE]


def _kernels(count: int) -> str:
    return "1 kernel" if count == 1 else f"{count} kernels"


def opcode_differences(before: dict, after: dict, text: str) -> Iterator[str]:
    """Unified diffs of the opcodes of kernels that changed and whose name contains `text`."""
    for each in compare(before, after):
        sides = [each.before, each.after]
        if text in each.kernel and all(side and "sequence" in side for side in sides):
            yield from difflib.unified_diff(
                *map(unpacked, sides), f"before {each.kernel}", f"after {each.kernel}", lineterm=""
            )


def _difference(name: str, before: dict | None, after: dict | None) -> Difference | None:
    """None if nothing differs."""
    if after is None:
        return Difference(name, WORSE, ("gone",), before, after)
    if "failed" in after:
        was_so = before is not None and "failed" in before
        return None if was_so else Difference(name, WORSE, (after["failed"],), before, after)
    if before is None:
        return Difference(name, SAME, ("new",), before, after)
    if "failed" in before:
        return Difference(name, BETTER, ("compiles now",), before, after)
    if _content(before) == _content(after):
        return None
    worse = _worse(before, after)
    is_better = any((y - x) * sign < 0 for _, sign, x, y in _measures(before, after))
    notes = [f"worse: {', '.join(worse)}"] if worse else []
    verdict = WORSE if worse else BETTER if is_better else SAME
    return Difference(name, verdict, (*notes, *_notes(before, after)), before, after)


def _worse(before: dict, after: dict) -> list[str]:
    """In what a kernel got worse."""
    worse = [
        f"{what} {x} -> {y}" for what, sign, x, y in _measures(before, after) if (y - x) * sign > 0
    ]
    if (before["main_loop"] is None) != (after["main_loop"] is None):
        worse.append("a main loop on one side only")
    if new := set(_warnings(after)) - set(_warnings(before)):
        worse.append(f"new warnings: {' | '.join(sorted(new))}")
    return worse


def _notes(before: dict, after: dict) -> Iterator[str]:
    """What else changed."""
    if _more_registers(before, after) and after["blocks_per_sm"] >= before["blocks_per_sm"]:
        yield _MORE_REGISTERS
    for what, x, y in (
        ("parameters", _letters(before), _letters(after)),
        ("threads", before["threads"], after["threads"]),
        ("shared memory", before["smem_bytes"], after["smem_bytes"]),
        ("named registers", before["later_registers"], after["later_registers"]),
    ):
        if x != y:
            yield f"{what} {x} -> {y}"
    if before["sequence_hash"] != after["sequence_hash"]:
        if before["opcodes"] == after["opcodes"]:
            yield "the same opcodes in another order or with other modifiers"
        elif before["instructions"] == after["instructions"]:
            yield "other opcodes"
    elif before["main_loop"] != after["main_loop"]:
        yield "the main loop is read in another way"


def _content(figures: dict) -> dict:
    """The figures that must be equal, which the names of parameters need not be."""
    kept = {name: value for name, value in figures.items() if name not in _FREE}
    return kept | {"parameters": _letters(figures), "warnings": _warnings(figures)}


def _warnings(figures: dict) -> list[str]:
    """Without the symbols of functions, which hold the names of modules."""
    return sorted(_SYMBOL.sub("...", text) for text in figures["warnings"])


def _letters(figures: dict) -> str:
    return "".join(letter for _, letter in figures["parameters"])


def _more_registers(before: dict, after: dict) -> bool:
    pairs = [(before["registers"], after["registers"])]
    later = before["later_registers"], after["later_registers"]
    pairs += [(n, later[1].get(name, n)) for name, n in later[0].items()]
    return any(y > x for x, y in pairs)


def _measures(before: dict, after: dict) -> Iterator[tuple[str, int, int, int]]:
    """(what, 1 where more is worse and -1 where fewer are, before, after)."""
    blocks = before["blocks_per_sm"], after["blocks_per_sm"]
    yield "fewer blocks fit on an SM", -1, *blocks
    for name in ("instructions", "spill_store_bytes", "spill_load_bytes", "stack_bytes"):
        yield name.replace("_", " "), 1, before[name], after[name]
    yield "warnings", 1, len(before["warnings"]), len(after["warnings"])
    loops = before["main_loop"], after["main_loop"]
    if all(loops):
        yield "main loop issues", 1, *(loop["issued"] for loop in loops)
        yield "main loop has", 1, *(loop["instructions"] for loop in loops)
        yield "overlapped exponentials", -1, *(loop.get("overlapped", 0) for loop in loops)
    # More registers count by the blocks that they leave room for.
    if not _more_registers(before, after):
        yield "registers", 1, before["registers"], after["registers"]


def _cells(figures: dict | None) -> list[str]:
    """The cells of numbers; "-" where there are none."""
    if figures is None or "failed" in figures:
        return ["-" if figures is None else "failed", *["-"] * 5]
    loop = figures["main_loop"]
    return [
        str(figures["registers"]),
        str(figures["blocks_per_sm"]),
        str(figures["instructions"]),
        "-" if loop is None else f"{loop['issued']} of {loop['instructions']}",
        str(figures["spill_store_bytes"] + figures["spill_load_bytes"]),
        str(len(figures["warnings"])),
    ]
