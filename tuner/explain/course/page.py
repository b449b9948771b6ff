"""The page of the course: one file, no scripts, nothing fetched; light, dark, print and phone."""

from collections.abc import Sequence

from ...drawing.document import document
from ...drawing.figures import Table, drawn
from ...drawing.markup import Markup, joined, tag
from ...drawing.tables import row, table
from .lesson import ORIGINS, Check, Lesson, Slip, Step

TITLE = "FlashAttention in ten lessons"
_ABOUT = (
    "Each lesson asks a question that students ask, and lets the real kernels answer it: numflash "
    "runs them on a CPU, thread by thread. Under each answer stands what common notes say "
    "otherwise, and what the lesson checks. No number here is a measured time. Pieces of code run "
    "as they stand, without a GPU, where NUMBA_ENABLE_CUDASIM=1 is set before Python starts."
)


def of(lessons: Sequence[Lesson]) -> str:
    """The page of these lessons, as HTML."""
    listed = [
        tag("li", tag("a", lesson.title, href=f"#{_anchor(lesson)}"), value=lesson.number)
        for lesson in lessons
    ]
    return document(
        TITLE,
        tag("h1", TITLE),
        tag("p", _ABOUT, class_="prose muted"),
        tag("ol", *listed),
        *map(_section, lessons),
    )


def _anchor(lesson: Lesson) -> str:
    return f"lesson-{lesson.number}"


def _section(lesson: Lesson) -> Markup:
    beside = [figure for figure in lesson.figures if not figure.wide]
    wide = [figure for figure in lesson.figures if figure.wide]
    told = [*map(_step, lesson.steps)]
    told += [tag("h3", "Where notes err"), tag("dl", *map(_slip, lesson.slips), class_="slips")]
    held = sum(check.holds for check in lesson.checks)
    checked = tag("ul", *map(_check, lesson.checks), class_="checks")
    summary = f"Checked: {held} of {len(lesson.checks)} hold"
    told.append(tag("details", tag("summary", summary), checked))
    return tag(
        "section",
        tag("h2", f"{lesson.number}. {lesson.title}"),
        tag("p", _prose(lesson.question), class_="prose question"),
        *map(drawn, wide),
        tag(
            "div",
            tag("div", *told, class_="prose"),
            tag("div", *map(drawn, beside), class_="beside"),
            class_="lesson",
        ),
        id=_anchor(lesson),
    )


def _step(step: Step) -> Markup:
    origin = tag("span", ORIGINS[step.origin], class_="origin")
    parts = [tag("h3", step.title, " ", origin), tag("p", _prose(step.text))]
    if step.table is not None:
        parts.append(_table(step.table))
    if step.code:
        parts.append(tag("pre", tag("code", step.code), tabindex=0))
    return joined(parts)


def _table(found: Table) -> Markup:
    numbers = tuple(found.numbers)
    lines = [row(*cells, numbers=numbers) for cells in found.rows]
    parts = [table(found.head, lines, numbers)]
    if found.summary != Table.summary:
        parts.insert(0, tag("p", found.summary, class_="muted caption"))
    return joined(parts)


def _slip(slip: Slip) -> Markup:
    said = tag("dt", tag("b", "Noted: ", class_="failed"), _prose(slip.says))
    return joined([said, tag("dd", _prose(slip.holds))])


def _check(check: Check) -> Markup:
    sign, class_ = ("✓ holds", "good") if check.holds else ("✗ fails", "failed")
    seen = tag("span", f"({check.seen})", class_="muted")
    return tag("li", tag("b", sign, class_=class_), f": {check.claim} ", seen)


def _prose(text: str) -> Markup:
    """Text in which `backticks` mark code."""
    parts = text.split("`")
    return joined(tag("code", part) if i % 2 else part for i, part in enumerate(parts))
