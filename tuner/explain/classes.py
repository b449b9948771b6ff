"""The pages of tuned classes: what the winner does with the call that stands for its class."""

from pathlib import Path

import numpy as np

import numflash
from numflash.api.explain import Question
from numflash.configs.features import rows_of
from numflash.problem.classes import ProblemClass
from numflash.runtime.files import replace_file

from ..measuring.representative import timed
from .asked import ask
from .page import page_of_kernel
from .unread import unread


def write_page_of_class(path: Path, problem: ProblemClass, gpu: str, config: str) -> None:
    """Write the page of a class on a GPU, with a config for its kernel.

    Args:
        path: the page.
        problem: the class; one whose kernel reads the caller's functions has no call of its own.
        gpu: name of the GPU, or an architecture.
        config: of the class's kernel.

    Raises:
        OSError: the page cannot be written.
        ValueError: the class has no call, or the offline model knows nothing of this GPU.
        UnsupportedError: no kernel runs it there.
    """
    if problem.traits.program or problem.traits.blocks:
        raise ValueError(f"the functions and blocks of {problem} are not known")
    call = timed(problem)
    shapes = {name: call.shapes[name] for name in "qkv"}
    if call.is_packed:
        shapes = {name: shape[1:] for name, shape in shapes.items()}
    arrays = {name: unread(shape, call.dtype) for name, shape in shapes.items()}
    options = dict(call.options) | call.of_sequences()
    for row in rows_of(call.features):
        if row.is_array:
            options[row.option] = np.asarray(row.example(call.num_heads_q), np.float32)
    options["config"] = {problem.family: config}
    answer = numflash.explain(*arrays.values(), gpu=gpu, data=False, **options)
    question = Question(arrays, options, gpu, False, path, answer)
    replace_file(path, page_of_kernel(ask(question, "all"), problem.family))
