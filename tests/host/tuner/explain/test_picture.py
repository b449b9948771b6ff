"""The picture of README.md is the one that the code draws."""

from pathlib import Path

import numflash
from tuner.explain.picture import picture

ROOT = Path(numflash.__file__).parent.parent


def test_picture_is_fresh():
    drawn = (ROOT / "docs" / "one_sm.svg").read_text(encoding="utf-8")
    assert drawn == picture(), "make pictures draws docs/one_sm.svg again"
    assert "](docs/one_sm.svg)" in (ROOT / "README.md").read_text(encoding="utf-8")
