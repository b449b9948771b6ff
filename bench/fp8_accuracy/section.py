"""The accuracy in docs/fp8.md, from the record of `python -m bench fp8-accuracy`."""

import json
from dataclasses import dataclass
from pathlib import Path

from bench.fp8_accuracy import figure as fp8_figure
from bench.fp8_accuracy.inputs import PAPER_HEAD_DIM, PAPER_SEQLEN
from bench.fp8_accuracy.methods import KERNELS, METHODS, NUMPY, SPECIFICATION
from bench.tables import tables

FILE_NAME = "fp8-accuracy.json"
LEAST_GAIN, LARGEST_RMSE = 2.6, 9.1e-3
"""The goal of the full recipe on the paper's distribution: times less than per tensor, and
the paper's own figure."""
_STANDARD_ERRORS = 2
REACHED, NOT_REFUTED, MISSED = "reached", "within two standard errors of it", "missed"


@dataclass(frozen=True)
class Requirement:
    """The full recipe's result on the paper's distribution, also in words."""

    gain: float
    gain_standard_error: float
    rmse: float
    standard_error: float

    @property
    def verdict(self) -> str:
        """REACHED; NOT_REFUTED, if the heads that were drawn may be why it is not; or MISSED."""
        for allowed, verdict in ((0, REACHED), (_STANDARD_ERRORS, NOT_REFUTED)):
            enough = self.gain + allowed * self.gain_standard_error >= LEAST_GAIN
            if enough and self.rmse - allowed * self.standard_error <= LARGEST_RMSE:
                return verdict
        return MISSED

    @property
    def text(self) -> str:
        """The figures and what they have to be."""
        rmse, error, asked = self.rmse, self.standard_error, LARGEST_RMSE
        return (
            f"full recipe: RMSE {_short(rmse, 2)} ± {_short(error, 1)} (asked for: at most "
            f"{_short(asked, 1)}), {self.gain:.2f} ± {self.gain_standard_error:.2f} times lower "
            f"than per tensor (at least {LEAST_GAIN}): {self.verdict}"
        )


def read(folder: Path) -> dict | None:
    """The record in a folder of results; None if there is none."""
    path = folder / FILE_NAME
    return json.loads(path.read_text()) if path.exists() else None


def requirement(record: dict) -> Requirement | None:
    """None if the record has no input that the paper's table can be compared with."""
    for case in record["inputs"]:
        if is_papers(case):
            full = entry_of(case, "fp8-full", SPECIFICATION)
            names = ("gain", "gain_standard_error", "rmse", "standard_error")
            return Requirement(*(full[name] for name in names))
    return None


def entry_of(case: dict, method: str, *engines: str) -> dict | None:
    """The entry of a method by one of these engines in an input's record."""
    found = (e for e in case["methods"] if e["method"] == method and e["engine"] in engines)
    return next(found, None)


def title_of(case: dict) -> str:
    """An input in the head of a column."""
    if case["name"] == "activations":
        return "MiniLM activations"
    return f"{case['name']}, d = {case['head_dim']}, {case['seqlen']:,} keys"


def tables_of(record: dict) -> str:
    """A table of the CPU's figures, and one of the kernels' where they ran."""
    parts = [_table(record, SPECIFICATION, NUMPY)]
    if record["kernels"]["device"]:
        parts += [f"The kernels on {record['kernels']['device']}:", _table(record, KERNELS)]
    return "\n\n".join(parts)


def render(record: dict, figure: Path, relative_to: Path) -> str:
    """The text between the markers; draws the figure on the way."""
    fp8_figure.draw(record, figure)
    try:
        link = figure.resolve().relative_to(relative_to.resolve()).as_posix()
    except ValueError:
        link = figure.as_posix()
    parts = [
        "RMSE against float64, in parentheses over the RMS of the output. `outliers` is the "
        "distribution of FlashAttention-3's Table 3 (arXiv 2407.08608), N(0, 1) with N(0, 100) "
        "added to one entry in 1,000; the paper does not name its sizes. float64 starts from "
        "entries that are not yet rounded to float16, which gives the paper's float16 figures. "
        "`MiniLM activations` are a trained encoder's (`examples/data`). In `sinks` the scores of "
        "the first 4 keys lie 8 to 12 above the mean of the others, and their values are nearly "
        "zero. d is head_dim.",
        tables_of(record),
        "In the last two methods P is relative to the row's maximum so far, over tiles of 128 "
        "keys, as in FlashAttention; in the FP8 methods above them to that of a tile of 64 keys.",
    ]
    reached = requirement(record)
    if reached is not None:
        parts.append(f"{reached.text[0].upper()}{reached.text[1:]}.")
    parts += [f"![RMSE of each method]({link})", _origin(record)]
    return "\n\n".join(parts)


def is_papers(case: dict) -> bool:
    """Whether an input's record can be compared with the paper's table."""
    sizes = case["name"], case["head_dim"], case["seqlen"]
    return sizes == ("outliers", PAPER_HEAD_DIM, PAPER_SEQLEN)


def _table(record: dict, *engines: str) -> str:
    cases = record["inputs"]
    rows = []
    for method in METHODS:
        entries = [entry_of(case, method.name, *engines) for case in cases]
        if any(entries):
            paper = "" if method.paper is None else _short(method.paper, 1)
            rows.append([method.label, paper, *map(_cell, entries)])
    for name, label, paper in (("fp8-both", "block", "2.6"), ("fp8-full", "full", "")):
        entries = [entry_of(case, name, *engines) for case in cases]
        rows.append([f"per tensor / {label}", paper, *map(_gain, entries)])
    return tables.markdown(["method", "paper", *map(title_of, cases)], rows)


def _short(number: float, digits: int) -> str:
    """1.2e-3, not 1.2e-03."""
    return f"{number:.{digits}e}".replace("e-0", "e-")


def _cell(entry: dict | None) -> str:
    if entry is None:
        return "-"
    if "rmse" not in entry:
        return "failed"
    return f"{_short(entry['rmse'], 2)} ({entry['relative_rmse']:.2%})"


def _gain(full: dict | None) -> str:
    if full is None or "gain" not in full:
        return "-"
    error = full["gain_standard_error"]
    return f"{full['gain']:.2f}" + (f" ± {error:.2f}" if error else "")


def _origin(record: dict) -> str:
    kernels = record["kernels"]
    ran = (
        f"Those of the kernels were measured on {kernels['device']}."
        if kernels["device"]
        else f"No number here comes from a GPU yet ({kernels['reason'].partition(':')[0]})."
    )
    commit = (record.get("commit") or "unknown")[:10]
    drawn = [
        f"{case['draws']} heads at d = {case['head_dim']}"
        for case in record["inputs"]
        if case["name"] == "outliers"
    ]
    return (
        "FP8 and step-by-step float16 are the specification, `numflash.reference`, on a CPU; "
        "`float16, FlashAttention` and the running maximum are a NumPy loop over tiles "
        f"(`bench/fp8_accuracy/methods.py`). {ran} Outliers: {', '.join(drawn)}; "
        "± is a standard error "
        f"over heads. `python -m bench fp8-accuracy`, commit {commit}, {record.get('date')}."
    )
