"""How fast arrays were quantised, next to a device copy, as a table."""

from bench.measuring import quantize
from bench.tables.tables import markdown


def is_measured(found: dict | None) -> bool:
    """Whether what a record holds is what `measure` returned."""
    return bool(found) and "failed" not in found


def table(found: dict[str, dict]) -> str:
    """What was measured, in Markdown."""
    rows = []
    for name, entry in found.items():
        if "reason" in entry:
            rows.append([name, entry["reason"], "", "", ""])
        elif not entry["is_right"]:
            rows.append([name, f"wrong: relative RMS {entry['relative_rms']:.2g}", "", "", ""])
        else:
            verdict = "yes" if entry["of_copy"] >= quantize.TARGET else "no"
            numbers = f"{1e3 * entry['median_ms']:.1f}", f"{entry['gbps']:.0f}"
            rows.append([name, *numbers, f"{entry['of_copy']:.0%}", verdict])
    header = ["quantisation", "us", "GB/s", "of a copy", f"at least {quantize.TARGET:.0%}"]
    return (
        f"{markdown(header, rows)}\n\n{quantize.DTYPE}, {quantize.SEQLEN} tokens of "
        f"{quantize.HIDDEN} numbers; bytes are read and written once. A scale of a whole tensor "
        "takes a second pass over it."
    )
