"""Plots of measured points: TFLOP/s over seqlen for each peer, and the fraction of the floor.

Drawn only where matplotlib is importable (`pip install matplotlib`), only from records.
"""

from pathlib import Path

from bench.peers import methods as peers
from bench.points import work
from bench.points.points import Point
from bench.records.entries import is_right
from bench.tables import tables

NO_MATPLOTLIB = "no plots: matplotlib is not importable (pip install matplotlib)"


def draw(points: list[dict], ceilings, title: str, stem: str, folder: Path) -> list[Path]:
    """Plots of the grid's points; the files, SVG.

    Args:
        points: entries of one direction, dtype and device.
        ceilings: of their record; None draws no fraction of the floor.
        title: device, direction and dtype in words.
        stem: of the file names.
        folder: where the files go.

    Raises:
        ImportError: there is no matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    # So that drawing the same records again gives the same files.
    matplotlib.rcParams["svg.hashsalt"] = "numflash"

    folder.mkdir(parents=True, exist_ok=True)
    panels = sorted({(entry["causal"], entry["head_dim"]) for entry in points})
    if not panels:
        return []
    speed = folder / f"{stem}-tflops.svg"
    _draw_panels(points, panels, f"{title}: TFLOP/s", "TFLOP/s", _tflops, speed)
    if ceilings is None:
        return [speed]

    def of_floor(entry: dict, method: dict) -> float:
        return work.floor_ms(Point.from_dict(entry), ceilings)["floor"] / method["median_ms"]

    fraction = folder / f"{stem}-floor.svg"
    heading = f"{title}: fraction of the fastest possible"
    _draw_panels(points, panels, heading, "floor / time", of_floor, fraction)
    return [speed, fraction]


def _tflops(entry: dict, method: dict) -> float:
    return method["tflops"]


def _draw_panels(points, panels, title: str, label: str, value, path: Path) -> None:
    from matplotlib import pyplot

    head_dims = sorted({head_dim for _, head_dim in panels})
    masks = sorted({causal for causal, _ in panels})
    names = tables.method_names(points)
    shades = pyplot.cm.tab20.colors
    colours = dict(zip(names, shades[::2] + shades[1::2], strict=False))
    figure, axes = pyplot.subplots(
        len(masks), len(head_dims), figsize=(4 * len(head_dims) + 2, 3 * len(masks) + 1),
        squeeze=False, sharey=True,
    )  # fmt: skip
    for i, causal in enumerate(masks):
        for j, head_dim in enumerate(head_dims):
            axis = axes[i][j]
            axis.set_title(f"head_dim {head_dim}, {'causal' if causal else 'full'}", fontsize=9)
            chosen = [e for e in points if (e["causal"], e["head_dim"]) == (causal, head_dim)]
            chosen.sort(key=lambda entry: entry["seqlen_q"])
            for name in names:
                line = [
                    (e["seqlen_q"], value(e, e["methods"][name]))
                    for e in chosen
                    if is_right(e["methods"].get(name, {}))
                ]
                if line:
                    width = 2.5 if name == peers.OURS else 1.2
                    axis.plot(
                        *zip(*line, strict=True), marker="o", markersize=3, label=name,
                        linewidth=width, color=colours.get(name),
                    )  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel(label)
    for axis in axes[-1]:
        axis.set_xlabel("seqlen")
    handles = {
        text: line
        for axis in figure.axes
        for line, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.suptitle(title)
    figure.legend(handles.values(), handles.keys(), loc="center right", fontsize=8)
    figure.tight_layout(rect=(0, 0, 1 - 1.6 / figure.get_figwidth(), 1))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
