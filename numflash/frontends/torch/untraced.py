"""numflash's own functions under `torch.compile`: not for graphs.

Dynamo would trace their launcher, and in the simulator all of NumPy in it, as if it were a model.
It is told to call them as they are, between two graphs; `fullgraph=True` says which function of
numflash.torch a graph takes.
"""

import sys
import types

import torch


def keep_untraced() -> None:
    """Tell Dynamo to trace no function that `numflash` exports, nor what these call."""
    package = sys.modules["numflash"]  # of which this is a part, and which exports the functions
    frames = torch._C._dynamo.eval_frame
    # Private: without them frames in functions are traced, as PyTorch does by itself.
    skip = getattr(frames, "set_code_exec_strategy", None)
    strategy = getattr(frames, "_FrameExecStrategy", None)
    action = getattr(frames, "_FrameAction", None)
    for name in package.__all__:
        function = getattr(package, name)
        if not isinstance(function, types.FunctionType):
            continue
        function._torchdynamo_disable = True
        function._torchdynamo_disable_msg = (
            f"numflash.{name} is for no graph of PyTorch's; functions of numflash.torch are"
        )
        if None not in (skip, strategy, action):
            skip(function.__code__, strategy(action.SKIP, action.SKIP))
