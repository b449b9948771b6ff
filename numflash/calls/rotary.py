"""Rotations of rows made ready: checked, and the kernel bound to everything but addresses."""

from collections.abc import Callable
from typing import Any

from numflash.calls.launch import Launcher
from numflash.configs import RotaryConfig, Traits, padded_head_dim
from numflash.kernels.arguments import Tensor
from numflash.kernels.sequences.arguments import AngleTable, Positions, RotarySizes
from numflash.problem.problem import num_blocks
from numflash.problem.rotary import RotaryProblem, describe_rotary
from numflash.runtime.arrays import ArrayLibrary, copy_rows
from numflash.runtime.views import Apart, ArrayView, Operand


class Rotation:
    """A call of `apply_rotary` made ready.

    Attributes:
        device: of the arrays.
    """

    def __init__(
        self,
        views: dict[str, ArrayView],
        interleaved: bool,
        conjugate: bool,
        layout: str,
        offset: int,
    ):
        """Check and compile.

        Args:
            views: of the call's arrays, by name, see `describe_rotary`.
            interleaved, conjugate, layout: as for `apply_rotary`.
            offset: of all sequences, in this call.

        Raises:
            TypeError, ValueError, UnsupportedError: as `apply_rotary`.
        """
        self._problem = describe_rotary(views, interleaved, conjugate, layout)
        self.device, self._names = views["x"].device, (*views, "offset")
        self._apart = Apart(views) if "out" in views else None
        # Only an `out` that is laid out as x can be x itself.
        self._may_be_x = "out" in views and _places(views["out"]) == _places(views["x"])
        self._is_in_place({name: view.pointer for name, view in views.items()}, offset)
        self._launcher = self._make_launcher(self._problem, interleaved, conjugate)
        if self._launcher is not None:
            self._launcher.build()

    def _make_launcher(
        self, problem: RotaryProblem, interleaved: bool, conjugate: bool
    ) -> Launcher | None:
        x, dtype = problem.x, problem.x.view.dtype
        _, seqlen, heads, head_dim = x.shape
        if not problem.num_tokens * heads:
            return None
        padded = padded_head_dim(head_dim)
        traits = Traits(dtype, padded, padded, vectorized=problem.vectorized)
        is_narrow = problem.cos.dtype == dtype != "float32"
        config = RotaryConfig(interleaved=interleaved, narrow=is_narrow)
        groups = -(-heads // config.num_heads)
        blocks = num_blocks("x", problem.num_tokens, groups, config.tokens(traits))
        arguments = {
            "x": Tensor("x", *x.strides[:3]),
            "out": Tensor("out", *problem.out.strides[:3]),
            "cos": AngleTable("cos", problem.cos.strides[0]),
            "sin": AngleTable("sin", problem.sin.strides[0]),
            "positions": Positions(
                "cu_seqlens" if problem.is_packed else None,
                "offsets" if problem.has_offsets else None,
                "offset",
                problem.entries,
                int(problem.is_packed),
                int(problem.has_offsets),
            ),
            "sizes": RotarySizes(
                problem.num_tokens, seqlen, heads, problem.half, problem.cos.shape[0], "copied"
            ),
            "sign": -1.0 if conjugate else 1.0,
        }
        return Launcher(config, traits, self.device, blocks, arguments)

    def bind(
        self, *operands_and_library: Operand | int | ArrayLibrary
    ) -> tuple[Any, dict[str, Callable[[int], None]]]:
        """Allocate; (out, None if it is the caller's, and functions that launch).

        Args:
            operands_and_library: the arrays in the order of the views, the offset of all
                sequences, and the array library.
        """
        *given, library = operands_and_library
        operands = dict(zip(self._names, given, strict=True))
        problem, made = self._problem, None
        pointers = {name: operands[name].pointer for name in self._names[:-1]}
        is_in_place = self._is_in_place(pointers, operands["offset"])
        operands["copied"] = 0 if is_in_place else problem.x.shape[3]
        if self._apart is None:
            made = library.empty(problem.x.view.shape, problem.x.view.dtype, self.device)
            operands["out"] = library.operand(made)
        if self._launcher is None:
            return made, {}
        operands |= {name: copy_rows(operands[name]) for name in problem.copied}
        return made, {"rotary": self._launcher.bind(operands)}

    def _is_in_place(self, pointers: dict[str, int], offset: int) -> bool:
        """Whether out is x. Raises ValueError for wrong offsets, and an out on other inputs."""
        self._problem.expect_offset(offset)
        if self._apart is None:
            return False
        is_x = self._may_be_x and pointers["out"] == pointers["x"]
        self._apart.expect(pointers, but=("x",) if is_x else ())
        return is_x


def _places(view: ArrayView) -> tuple:
    """What says, with an address, where the elements of an array lie."""
    return tuple(view.shape), tuple(view.strides)
