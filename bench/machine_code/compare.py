"""Two files of machine-code figures: what differs, and whether it got worse.

A kernel is worse where fewer blocks fit on an SM (registers or shared memory crossed a step of
occupancy), where it has more instructions or its main loop issues more, where fewer exponentials
overlap with products, where it spills more or has another warning, where its main loop is found on
one side only, where it compiles no more, or where it is gone. More registers that leave room for
as many blocks are counted apart: they fail nothing. Names of parameters are free to change, their
types in order are not: a change of them is shown.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench import tables
from bench.machine_code.figures import unpacked
from bench.machine_code.kernels import is_wanted

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
_FREE = ("sequence", "opcodes", "limited_by")


@dataclass(frozen=True)
class Difference:
    """A kernel that differs.

    Attributes:
        kernel: its name.
        verdict: `BETTER`, `SAME` or `WORSE`.
        notes: what the columns of numbers do not say.
        before, after: its figures; None where the file has no such kernel.
        more_registers: registers were added and as many blocks fit.
    """

    kernel: str
    verdict: str
    notes: tuple[str, ...]
    before: dict | None
    after: dict | None
    more_registers: bool = False

    @property
    def row(self) -> list[str]:
        """Cells of `COLUMNS`."""
        sides = [_cells(self.before), _cells(self.after)]
        cells = [x if x == y else f"{x} -> {y}" for x, y in zip(*sides, strict=True)]
        return [self.kernel, self.verdict, *cells, "; ".join(self.notes)]


def compare(before: dict, after: dict) -> list[Difference]:
    """The kernels that differ between two files, the worse first.

    A file made with `only` is compared for the kernels that it asked for.
    """
    sides = [
        {n: f for n, f in x["kernels"].items() if is_wanted(n, y.get("only", ()))}
        for x, y in ((before, after), (after, before))
    ]
    names = dict.fromkeys([*sides[0], *sides[1]])
    found = [_difference(name, *(side.get(name) for side in sides)) for name in names]
    order = [WORSE, BETTER, SAME]
    return sorted(filter(None, found), key=lambda each: order.index(each.verdict))


def report(before: dict, after: dict) -> tuple[str, bool]:
    """The table with a summary, and whether anything is worse."""
    found = compare(before, after)
    lines = []
    compilers = [each["made"]["compilers"] for each in (before, after)]
    if compilers[0] != compilers[1]:
        lines.append(f"Other compilers: {compilers[0]} before, {compilers[1]} after.")
    if not found:
        count = len(set(before["kernels"]) & set(after["kernels"]))
        return "\n".join([*lines, f"{count} kernels compared: no kernel changed"]), False
    lines.append(tables.markdown(COLUMNS, [each.row for each in found]))
    counts = ", ".join(
        f"{sum(each.verdict == verdict for each in found)} {verdict}"
        for verdict in (WORSE, BETTER, SAME)
    )
    lines.append(f"{len(found)} kernels changed: {counts}")
    if more := sum(each.more_registers for each in found):
        lines.append(
            f"{more} have more registers and as many blocks on an SM, which fails nothing"
        )
    return "\n".join(lines), any(each.verdict == WORSE for each in found)


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
    if before is None:
        verdict = WORSE if "failed" in after else SAME
        return Difference(name, verdict, ("new",), before, after)
    if after is None:
        return Difference(name, WORSE, ("gone",), before, after)
    if "failed" in after:
        if "failed" in before:
            return None
        return Difference(name, WORSE, (after["failed"],), before, after)
    if "failed" in before:
        return Difference(name, BETTER, ("compiles now",), before, after)
    if _content(before) == _content(after):
        return None
    worse, better, notes = [], [], []
    for what, sign, x, y in _measures(before, after):
        if x != y:
            (worse if (y - x) * sign > 0 else better).append(what)
    if (before["main_loop"] is None) != (after["main_loop"] is None):
        worse.append("a main loop on one side only")
    if new := set(after["warnings"]) - set(before["warnings"]):
        worse.append(f"new warnings: {' | '.join(sorted(new))}")
    more_registers = not _fewer_blocks(before, after) and _more_registers(before, after)
    if more_registers:
        notes.append("more registers, as many blocks")
    if _letters(before) != _letters(after):
        notes.append(f"parameters {_letters(before)} -> {_letters(after)}")
    for name_of, what in (("threads", "threads"), ("smem_bytes", "shared memory")):
        if before[name_of] != after[name_of]:
            notes.append(f"{what} {before[name_of]} -> {after[name_of]}")
    if before["later_registers"] != after["later_registers"]:
        notes.append(f"named registers {before['later_registers']} -> {after['later_registers']}")
    if before["sequence_hash"] != after["sequence_hash"]:
        if before["opcodes"] == after["opcodes"]:
            notes.append("the same opcodes in another order or with other modifiers")
        elif before["instructions"] == after["instructions"]:
            notes.append("other opcodes")
    if worse:
        notes.insert(0, f"worse: {', '.join(worse)}")
    verdict = WORSE if worse else BETTER if better else SAME
    return Difference(name, verdict, tuple(notes), before, after, more_registers)


def _content(figures: dict) -> dict:
    """What must be equal: not what parameters are called."""
    kept = {name: value for name, value in figures.items() if name not in _FREE}
    return kept | {"parameters": _letters(figures)}


def _letters(figures: dict) -> str:
    return "".join(letter for _, letter in figures["parameters"])


def _fewer_blocks(before: dict, after: dict) -> bool:
    return after["blocks_per_sm"] < before["blocks_per_sm"]


def _more_registers(before: dict, after: dict) -> bool:
    pairs = [(before["registers"], after["registers"])]
    later = before["later_registers"], after["later_registers"]
    pairs += [(n, later[1].get(name, n)) for name, n in later[0].items()]
    return any(y > x for x, y in pairs)


def _measures(before: dict, after: dict) -> Iterator[tuple[str, int, int, int]]:
    """(what, 1 where more is worse and -1 where less is, before, after)."""
    fewer = "fewer blocks fit on an SM" if _fewer_blocks(before, after) else "more blocks"
    yield fewer, -1, before["blocks_per_sm"], after["blocks_per_sm"]
    yield "instructions", 1, before["instructions"], after["instructions"]
    for name in ("spill_store_bytes", "spill_load_bytes", "stack_bytes"):
        yield name.replace("_", " "), 1, before[name], after[name]
    yield "warnings", 1, len(before["warnings"]), len(after["warnings"])
    loops = before["main_loop"], after["main_loop"]
    if all(loops):
        yield "the main loop issues more", 1, loops[0]["issued"], loops[1]["issued"]
        both = [loop.get("overlapped", 0) for loop in loops]
        yield "fewer exponentials overlap", -1, *both
    if not _more_registers(before, after):
        yield "registers", 1, before["registers"], after["registers"]


def _cells(figures: dict | None) -> Sequence[str]:
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
