"""The page of a call: one file, no scripts, nothing fetched; light, dark, print and phone.

`OF_CALL` and `OF_KERNEL` list the sections. Each is two modules of one name: `facts` finds the
numbers, `sections` draws them. `--json` prints the same facts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from numflash.runtime.errors import UnsupportedError, in_one_line

from ..drawing.document import document
from ..drawing.figures import arranged
from ..drawing.markup import Markup, joined, tag
from ..drawing.tables import folded
from .asked import Asked, Kernel, NotShownError
from .facts import call as call_facts
from .numbers import as_json
from .sections import call as call_section


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        name: its anchor, and of its modules in `facts` and `sections`.
        title: as it stands there.
    """

    name: str
    title: str

    @property
    def facts(self) -> ModuleType:
        """The module that finds the numbers."""
        return import_module(f".facts.{self.name}", __package__)

    @property
    def drawing(self) -> ModuleType:
        """The module that draws them."""
        return import_module(f".sections.{self.name}", __package__)


CALL = Section("call", "1 The call")
OF_KERNEL = (
    Section("mask", "2 The mask over tiles"),
    Section("schedule", "3 Blocks over the machine"),
    Section("timeline", "4 One SM, clock by clock"),
    Section("resources", "5 Where the time goes"),
)
"""Sections of each kernel whose blocks walk over tiles: find(asked, kernel), figures(facts)."""
OF_CALL = (
    Section("bytes", "6 Bytes and memory"),
    Section("numerics", "7 Numerics"),
    Section("fp8", "8 FP8"),
)
"""Sections of the whole call: find(asked), figures(facts)."""


def facts_of(asked: Asked) -> dict[str, object]:
    """All facts of a page by section, of kernels by name; of what is absent the reason."""
    found = {"call": call_facts.find(asked)}
    of_kernels = {
        name: {each.name: _found(each, asked, kernel) for each in OF_KERNEL}
        for name, kernel in asked.kernels.items()
        if kernel.is_tiled
    }
    return found | {"kernels": of_kernels} | {each.name: _found(each, asked) for each in OF_CALL}


def as_data(asked: Asked) -> object:
    """The facts as what JSON can hold."""
    return as_json(facts_of(asked))


def page_of_kernel(asked: Asked, name: str) -> str:
    """The page of one kernel of a call as HTML: what the config of a class does."""
    kernel = asked.kernels[name]
    facts = {each.name: _found(each, asked, kernel) for each in OF_KERNEL}
    call = call_facts.find(asked)
    return document(
        f"numflash.explain: {kernel.problem}",
        tag("h1", str(kernel.problem)),
        tag("p", _subtitle(call), class_="muted"),
        call_section.facts_of(call, kernel.name),
        *_drawn(OF_KERNEL, facts),
    )


def page(asked: Asked) -> str:
    """The page as HTML."""
    facts = facts_of(asked)
    forward, *others = facts["kernels"]
    body = [
        tag("h1", "numflash.explain"),
        tag("p", _subtitle(facts["call"]), class_="muted"),
        call_section.facts_of(facts["call"], forward),
        _section(CALL.name, CALL.title, call_section.kernels(facts["call"])),
        *_drawn(OF_KERNEL, facts["kernels"][forward]),
        *_drawn(OF_CALL, facts),
    ]
    for name in others:
        inside = _drawn(OF_KERNEL, facts["kernels"][name], prefix=f"{name}-")
        body.append(tag("details", tag("summary", f"The kernel {name}"), *inside, id=name))
    return document("numflash.explain", *body)


def refusal(error: UnsupportedError) -> str:
    """The page of a call that no kernel runs."""
    said = tag("p", in_one_line(error), class_="failed")
    heading = tag("h1", "numflash.explain"), tag("h2", "No kernel runs this call")
    return document("numflash.explain", *heading, said)


def _found(section: Section, asked: Asked, *kernel: Kernel) -> object:
    """The facts of a section, or why it is absent."""
    try:
        return section.facts.find(asked, *kernel)
    except NotShownError as reason:
        return str(reason)


def _drawn(listed: tuple[Section, ...], facts: Mapping, prefix: str = "") -> Iterator[Markup]:
    for each in listed:
        known = facts[each.name]
        if isinstance(known, str):
            contents = tag("p", f"{known[0].upper()}{known[1:]}.", class_="muted")
        else:
            contents = arranged(each.drawing.figures(known))
            if getattr(known, "what_if", False):
                contents = folded("What if this call were computed on 8-bit floats", contents)
        yield _section(prefix + each.name, each.title, contents)


def _section(anchor: str, title: str, contents: Markup) -> Markup:
    return tag("section", tag("h2", title), contents, id=anchor)


def _subtitle(call) -> Markup:
    measured = any(kernel.measured is not None for kernel in call.kernels)
    what = "Times marked as measured are of this GPU; all others are" if measured else "Times are"
    return joined([f"One call, from its numbers to its clocks. {what} the offline model's."])
