"""Results of tuning runs, and their page as a parser sees it."""

from dataclasses import replace
from html.parser import HTMLParser

from numflash.problem.classes import ProblemClass
from numflash.runtime.devices import architecture, blocks_per_sm
from tuner import report
from tuner.records import Record, ResourceUsage
from tuner.search.results import Result

PROBLEM = ProblemClass.parse("forward float16-d64-dv64-vec causal q4096 k4096 bh64 g1")
VOID = {"meta"}


def resources(registers=128, smem_bytes=32768, num_threads=128, spill_bytes=0):
    blocks, limited_by = blocks_per_sm(architecture("sm_90a"), num_threads, registers, smem_bytes)
    return ResourceUsage(registers, spill_bytes, smem_bytes, num_threads, blocks, limited_by)


def measured(config, milliseconds, predicted_ms=None, **changes):
    samples = (milliseconds * 0.99, milliseconds, milliseconds * 1.01)
    return replace(
        Record(config, "measured", predicted_ms=predicted_ms, samples_ms=samples), **changes
    )


RECORDS = [
    measured("sm80-m64n64w4s1", 2.0, 1.9, resources=resources()),
    measured("sm80-m64n64w4s2", 1.5, 1.6, resources=resources(168, 49152)),
    measured("sm80-m128n64w4s1", 1.25, 1.2, resources=resources(255, 49152), finished=1.79e9),
    measured("sm80-m128n64w8s1", 3.0, 2.5, resources=resources(128, 49152, 256)),
    measured("sm80-m32n32w2s1", 9.0, 8.0, outcome="slow", resources=resources(90, 8192, 64)),
    Record("sm80-m256n128w4s1", "spilled", "812 bytes", resources(255, 90000)),
    Record("sm80-m256n128w4s2", "spilled", "96 bytes", resources(255, 90000)),
    Record("sm80-m256n32w4s1", "spilled", "a warning", resources(255, 90000)),
    Record("sm80-m512n64w4s1", "over_budget", "needs <much> & 'more'"),
    Record("sm80-m16n16w1s1", "wrong_result", "out: 0.3", samples_ms=(0.1, 0.1)),
]
BEST = RECORDS[2]


def result(records=RECORDS, **changes):
    made = Result(
        device="NVIDIA H200",
        arch="sm_90a",
        num_sms=132,
        problem=PROBLEM,
        origin="measured",
        default=records[0],
        best=min(records, key=lambda record: record.time_ms),
        records=list(records),
        floor_ms={"matrix": 0.5, "exponential": 0.75},
        space_size=1000,
        pruned={"shared memory": 600, "threads": 250},
        pruned_examples={"shared memory": "m256n64w4 needs <600> bytes"},
        importances={"tile_m": 0.7, "num_stages": 0.3},
        budgets={"sram_budget_bytes": 65536, "min_occupancy": 0.125, "max_registers": 200},
    )
    return replace(made, **changes)


def predicted_result():
    records = [
        Record(f"sm80-m{m}n64w4s1", "predicted", predicted_ms=ms, resources=resources())
        for m, ms in ((64, 2.0), (128, 1.6))
    ]
    parts = {"matrix": 1.0, "shared_memory": 1.5}
    best = replace(records[1], parts=parts)
    return result([records[0], best], origin="predicted", default=records[0], best=best)


class Page(HTMLParser):
    """What a page consists of; fails where elements do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.tables, self.ids, self.links = [], set(), []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        self.tags.append(name)
        self.attributes.append(attributes)
        self.ids.add(attributes.get("id"))
        if name == "a":
            self.links.append(attributes["href"])
        if name not in VOID:
            self.open.append(name)
        if name == "table":
            self.tables.append([])
        elif name == "tr":
            self.tables[-1].append([])
        elif name in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, name, attributes):
        assert name in VOID

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def table(self, first):
        """The rows of the table whose first column has this name."""
        (found,) = [rows[1:] for rows in self.tables if rows[0][0] == first]
        return found

    @property
    def all_text(self):
        return " ".join(self.text)


def parsed(*results):
    return Page(report.page(list(results)))
