"""The picture that README.md opens with: one SM of an H200, clock by clock, by formula.

python -m numflash_tuner.explain.picture docs/one_sm.svg
"""

import sys
from pathlib import Path

import numflash
from numflash.api.explain import Question
from numflash.runtime.files import replace_file

from ..drawing.document import standalone
from .asked import ask
from .facts import timeline as timeline_facts
from .sections import timeline as timeline_section
from .unread import unread

_GPU, _SHAPE, _OPTIONS = "H200", (2, 4096, 16, 128), {"causal": True}


def picture() -> str:
    """The picture as SVG, the same wherever it is drawn."""
    arrays = {name: unread(_SHAPE, "bfloat16") for name in "qkv"}
    answer = numflash.explain(*arrays.values(), gpu=_GPU, data=False, **_OPTIONS)
    asked = ask(Question(arrays, _OPTIONS, _GPU, False, None, answer), "none")
    facts = timeline_facts.find(asked, asked.forward)
    (figure,) = timeline_section.figures(facts)
    return standalone(figure.svg)


if __name__ == "__main__":
    replace_file(Path(sys.argv[1]), picture())
