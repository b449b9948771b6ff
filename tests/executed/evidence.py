"""Who vouches for our instructions: the record that witnesses write, and the page made of it.

    python -m tests.executed.evidence      draws docs/evidence.md of docs/evidence.json

A witness is a test that runs another compiler's kernel in the executor. One that passes enters
what was executed into the record; so does each wrong meaning that a witness noticed.
"""

import json
from collections.abc import Iterable
from datetime import date
from pathlib import Path

_DOCS = Path(__file__).parents[2] / "docs"
RECORD, PAGE = _DOCS / "evidence.json", _DOCS / "evidence.md"

WITHOUT = {
    "fence_proxy_tensormap": "changes nothing on a CPU: a wrong meaning could not be noticed",
    "prefetch_tensormap": "changes nothing on a CPU: a wrong meaning could not be noticed",
    "bra_over_store": "a branch that is never taken; no other compiler has it",
}
"""Instructions of `numflash/ptx` that can have no witness, and why."""


def read() -> dict:
    """The record.

    {"witnesses": {test: {"compiler", "module", "date", "instructions"}},
    "noticed": {wrong meaning: {"instruction", "witness", "date"}}, "without": {name: why}}.
    """
    return json.loads(RECORD.read_text())


def enter(
    module: str, witnesses: dict[str, dict], noticed: dict[str, dict], wrong: Iterable[str] | None
) -> None:
    """Replace these entries of the record; what says the same keeps its date.

    Args:
        module: whose witnesses ran.
        witnesses, noticed: what passed, as in the record.
        wrong: the wrong meanings that witnesses of this module are tried with, if they were:
            others that these have noticed once are dropped.
    """
    record = read() if RECORD.exists() else {"witnesses": {}, "noticed": {}}
    for kept, entries in (
        (record["witnesses"], witnesses),
        (record["noticed"], noticed),
    ):
        for name, entry in entries.items():
            if {**kept.get(name, {}), "date": None} != {**entry, "date": None}:
                kept[name] = {**entry, "date": date.today().isoformat()}
    if wrong is not None:
        by = {name for name, entry in record["witnesses"].items() if entry["module"] == module}
        record["noticed"] = {
            meaning: entry
            for meaning, entry in record["noticed"].items()
            if meaning in set(wrong) or entry["witness"] not in by
        }
    record = {part: dict(sorted(record[part].items())) for part in ("witnesses", "noticed")}
    record["without"] = WITHOUT
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def witnesses_of(record: dict) -> dict[str, list[str]]:
    """The tests that vouch for each instruction that has any."""
    found: dict[str, list[str]] = {}
    for test, entry in record["witnesses"].items():
        for name in entry["instructions"]:
            found.setdefault(name, []).append(test)
    return found


def page(record: dict) -> str:
    """docs/evidence.md."""
    found = witnesses_of(record)
    rows = [
        (
            f"`{name}`",
            ", ".join(f"`{test}`" for test in tests),
            "; ".join(
                meaning
                for meaning, entry in record["noticed"].items()
                if entry["instruction"] == name
            ),
        )
        for name, tests in sorted(found.items())
    ]
    compilers = {}
    for entry in record["witnesses"].values():
        compilers[entry["compiler"]] = max(compilers.get(entry["compiler"], ""), entry["date"])
    seen = ", ".join(f"{name} (last changed {day})" for name, day in sorted(compilers.items()))
    without = [(f"`{name}`", why) for name, why in sorted(WITHOUT.items())]
    return _TEXT.format(
        seen=seen,
        table=_table(("instruction", "witness", "wrong on purpose, and noticed"), rows),
        without=_table(("instruction", "why"), without),
    )


def _table(header: Iterable[str], rows: Iterable[tuple]) -> str:
    header = tuple(header)
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_TEXT = """\
# Who vouches for our instructions

*Drawn from [evidence.json](evidence.json) by `python -m tests.executed.evidence`; do not edit it.*

No GPU has run numflash. What instructions mean is written in the bodies of `numflash/ptx/` and in the parts of
the simulator, read from the manuals. The executor uses the same bodies. So when it runs a kernel of another
compiler, whose code GPUs run every day, and the result is right, that compiler vouches for our meanings.

The witnesses are tests of `tests/executed/test_witnesses.py`: kernels of {seen}, which compile without a GPU,
against float64. They write the record where they pass:

    pip install triton          # 290 MB to load, 1 GB on disk
    NUMBA_ENABLE_CUDASIM=1 NUMFLASH_TEST_PEERS=1 pytest tests/executed/test_witnesses.py

A witness shows that kernels which use an instruction compute what they should. It does not show what the
instruction does with operands that no kernel gives it, nor how fast it is, nor what ptxas makes of it. CI does
not run the witnesses: they take 76 s of user CPU time beside the installation.

## Instructions with a witness

The last column is what `test_a_wrong_meaning_is_noticed` makes of the instruction on purpose; its witness fails
then. Where the column is empty nobody has tried. Loads and stores of Triton are typed `.b32`: they vouch
for `.u32` and `.f32` of the same size. `bar_sync` is executed as `bar.sync 0`, for all threads. `mul.f32` of Triton vouches for `mul.rn.f32`, which it is.

{table}

Tiles of three to five dimensions are loaded and stored with the same swizzle, so that a wrong one would cancel
out: only the 2-D copies, whose tiles `wgmma` reads, show it. What matters there is which elements a tile is.

## Instructions without a witness

{without}

Nor has anybody vouched for `wgmma` whose K-major stride offset is not 1024 bytes (every kernel here uses the
swizzle of 128 bytes, and a simulator that ignored the stride would pass), for `setmaxnreg`, for `bar.sync`
with a count, and for the 128 bytes that the driver makes of a tensor map: `libcuda` would have to run.

## Where Triton and our checks differ

- Triton sets no fence between `mbarrier.init` and bulk copies. We demand `fence.mbarrier_init`; the tests put it
  into Triton's text (`test_where_we_ask_for_more_fences_than_triton_sets` shows the refusal without).
- Triton's attention for sm_90 stores Q, waits at a barrier, and then the *readers* execute
  `fence.proxy.async`. We demand it of the writer, before the barrier; the tests add that one.
  Whether the PTX ISA allows Triton's order we have not settled.
- Triton passes float32 to `mma` of tf32 unrounded; the tests cut the low 13 bits of their reference.
"""  # noqa: E501


if __name__ == "__main__":
    PAGE.write_text(page(read()))
