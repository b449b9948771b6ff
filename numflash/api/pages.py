"""Pages: what writes them is found through the entry point `numflash.explain`.

It is part of the tuner's package, which numflash never imports.
"""

from dataclasses import dataclass
from importlib import metadata as packages
from pathlib import Path

from numflash.configs import Config, Traits
from numflash.machine_code.report import Report
from numflash.runtime.devices import Architecture
from numflash.runtime.errors import UnsupportedError

PAGES = "numflash.explain"
"""The group of entry points that has the writer of pages."""


@dataclass(frozen=True)
class Inspection:
    """A kernel whose machine code a page shows.

    Attributes:
        config, traits: of the kernel.
        limits: of the architecture.
        report: its machine code in figures.
        to: the page to write.
    """

    config: Config
    traits: Traits
    limits: Architecture
    report: Report
    to: Path


def page_writer():
    """The function that writes the page of a `Question`, or of an `Inspection`.

    Raises:
        UnsupportedError: it is not installed.
    """
    found = list(packages.entry_points(group=PAGES))
    if not found:
        raise UnsupportedError(
            "pages are written by the package numflash_tuner, which is not installed beside "
            "numflash; install numflash with pip"
        )
    return found[0].load()
