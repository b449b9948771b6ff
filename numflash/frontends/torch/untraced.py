"""numflash's own functions under `torch.compile`: not for graphs.

Dynamo would trace their launcher, and in the simulator all of NumPy in it, as if it were a model.
It is told to call them as they are, between two graphs; `fullgraph=True` says which function of
numflash.torch a graph takes.
"""

import sys
import types
from collections.abc import Callable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)
_ELSEWHERE = "functions of numflash.torch are"


def keep_untraced() -> None:
    """Tell Dynamo to trace no function that `numflash` exports, nor what these call."""
    package = sys.modules["numflash"]  # of which this is a part, and which exports the functions
    for name in package.__all__:
        function = getattr(package, name)
        if isinstance(function, types.FunctionType):
            _keep_untraced(function, f"numflash.{name} is for no graph of PyTorch's; {_ELSEWHERE}")


def untraced(function: Function) -> Function:
    """A decorator of a function of numflash.torch that is for no graph, as `keep_untraced`."""
    name = f"numflash.torch.{function.__name__}"
    _keep_untraced(
        function, f"{name} is for no graph of PyTorch's: it moves tensors between ranks"
    )
    return function


def _keep_untraced(function: Callable, message: str) -> None:
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = message
    frames = torch._C._dynamo.eval_frame
    # Private: without them frames in functions are traced, as PyTorch does by itself.
    skip = getattr(frames, "set_code_exec_strategy", None)
    strategy = getattr(frames, "_FrameExecStrategy", None)
    action = getattr(frames, "_FrameAction", None)
    if None not in (skip, strategy, action):
        skip(function.__code__, strategy(action.SKIP, action.SKIP))
