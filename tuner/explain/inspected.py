"""The page of a kernel's machine code: what `numflash-inspect --html` writes."""

from numflash.api.pages import Inspection
from numflash.machine_code.compiler import get_cubin
from numflash.machine_code.report import NO_SIMULATOR
from numflash.machine_code.sass import disassemble
from numflash.problem.classes import ProblemClass
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.mode import SIMULATED
from numflash.selection.geometry import Geometry
from numflash.selection.rules import Choice

from ..drawing.document import document
from ..drawing.figures import Figure, Table, arranged
from ..drawing.markup import Markup, escaped, tag
from ..drawing.tables import row, table
from ..model.machine_code import analyse
from ..space import machines
from .asked import TILED, Kernel
from .facts.resources import share_of, turn_of
from .sections.resources import share_figure, turn_figure


def inspected(inspection: Inspection) -> str:
    """The page of an inspection, as HTML.

    Raises:
        UnsupportedError: this is the simulator.
    """
    kernel, report = _kernel(inspection), inspection.report
    limits = inspection.limits
    found: list[Figure] = []
    if kernel.config.family in TILED:
        turn = turn_of(machines.find(limits.arch), kernel)
        found += [] if turn is None else [turn_figure(turn, "")]
    found.append(share_figure(share_of(kernel, limits), ""))
    return document(
        f"numflash-inspect: {report.kernel} {report.config}",
        tag("h1", f"{report.kernel} {report.config}"),
        tag("p", f"Machine code of {report.arch} for {report.traits}.", class_="muted"),
        *(tag("p", fault, class_="failed") for fault in report.faults),
        tag("section", tag("h2", "Where the time goes"), arranged(found), id="resources"),
        tag("section", tag("h2", "Instructions"), _instructions(inspection), id="instructions"),
    )


def _instructions(inspection: Inspection) -> Markup:
    counts = {name: n for name, n in inspection.report.instructions.items() if n}
    if not counts:
        return tag("p", escaped("There is no disassembler, so nothing is counted."))
    found = Table(("instruction", "in the code"), list(counts.items()), (1,))
    return table(found.head, [row(*cells, numbers=(1,)) for cells in found.rows], (1,))


def _kernel(inspection: Inspection) -> Kernel:
    """The kernel of no call: only its code is known."""
    if SIMULATED:
        raise UnsupportedError(NO_SIMULATOR)
    config, traits = inspection.config, inspection.traits
    try:
        cubin = get_cubin(config, traits, inspection.limits)
        code = analyse(disassemble(cubin.code))
    except UnsupportedError:
        code = None
    choice = Choice(config.family, config, traits, "asked for", ())
    problem = ProblemClass(config.family, traits, "full", 0, 0, 0, 1)
    return Kernel(config.family, choice, problem, Geometry(), inspection.report, code, None)
