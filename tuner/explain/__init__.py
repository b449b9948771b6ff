"""`numflash.explain` and `numflash-explain`: a page that shows what a call does, and a course.

A page is made of facts (`facts`, numbers only) and figures (`sections`, drawings only). `asked`
finds out what is known of the kernels, `page` puts all together.
"""

from pathlib import Path

from numflash.api.explain import Question
from numflash.api.pages import Inspection
from numflash.runtime.files import replace_file


def write_page(question: Question | Inspection, compiles: str = "forward") -> None:
    """Write the page of a question, or of a kernel's machine code, to its file.

    Args:
        question: with an answer, or with the reason why there is none.
        compiles: which kernels may be compiled, one of `asked.COMPILES`.

    Raises:
        OSError: the file cannot be written.
        ValueError: the offline model knows nothing of this GPU.
    """
    # The command says what is wrong with its arguments before it imports the model.
    from .asked import ask
    from .inspected import inspected
    from .page import page, refusal

    if isinstance(question, Inspection):
        text = inspected(question)
    elif question.refusal is not None:
        text = refusal(question.refusal)
    else:
        text = page(ask(question, compiles))
    replace_file(Path(question.to), text)
