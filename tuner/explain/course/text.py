"""Lessons for a terminal: all but the figures."""

import textwrap

from .lesson import Check, Lesson, Step

_WIDTH = 96


def as_text(lesson: Lesson) -> str:
    """A lesson: question, steps, slips and checks."""
    lines = [f"{lesson.number}  {lesson.title}", "", *_wrapped(lesson.question), ""]
    for step in lesson.steps:
        lines += [*_step(step), ""]
    for slip in lesson.slips:
        lines += [*_wrapped(f"Often noted: {slip.says} But: {slip.holds}"), ""]
    return "\n".join([*lines, *map(_check, lesson.checks)])


def _step(step: Step) -> list[str]:
    lines = [f"  {step.title}", *_wrapped(step.text)]
    if step.table is not None:
        rows = [step.table.head, *step.table.rows]
        widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
        lines += [
            "    " + "  ".join(str(c).rjust(w) for c, w in zip(row, widths, strict=True))
            for row in rows
        ]
    return lines + [f"    {line}" for line in step.code.splitlines()]


def _check(check: Check) -> str:
    return f"  {'holds' if check.holds else 'FAILS'}: {check.claim} ({check.seen})"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="    ", subsequent_indent="    ")
