"""Parts of attention over different keys, made ready to be merged."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from numflash.calls.launch import Launcher
from numflash.configs import DTYPES, MergeOntoConfig, Traits, padded_head_dim
from numflash.configs.features import ABSENT
from numflash.kernels import arguments as records
from numflash.kernels.arguments import Shape, SplitTiles
from numflash.problem.options import LAYOUTS, expect_one_of
from numflash.problem.problem import (
    Tensor,
    as_tensor,
    expect_contiguous_rows,
    expect_head_dim,
    expect_like,
    expect_writeable,
    num_blocks,
)
from numflash.runtime.arrays import ArrayLibrary
from numflash.runtime.driver import limits_of_device
from numflash.runtime.views import Apart, ArrayView, Operand, fresh
from numflash.selection.rules import choose

_ALIGNMENT = 16
"""Bytes: the kernel reads four numbers at once."""


def parts_of(view: ArrayView) -> list[ArrayView]:
    """The views of what stands along the first axis of an array."""
    step = view.strides[0] * view.itemsize
    return [
        replace(
            view, pointer=view.pointer + i * step, shape=view.shape[1:], strides=view.strides[1:]
        )
        for i in range(view.shape[0])
    ]


class Merge:
    """A merge into new arrays made ready: its kernel bound to everything but addresses.

    Attributes:
        device: of the kernel.
    """

    def __init__(
        self,
        outs: list[ArrayView],
        lses: list[ArrayView],
        layout: str,
        dtype: str | None,
        stacked: tuple[ArrayView, ArrayView] | None = None,
    ):
        """Check and compile.

        Args:
            outs: one for each part.
            lses: likewise.
            layout, dtype: as for `merge_partials`.
            stacked: the arrays of all outs and of all lses, if the call has them.

        Raises:
            TypeError, ValueError, UnsupportedError: as `merge_partials`.
        """
        expect_one_of("layout", layout, LAYOUTS)
        first, self.layout = outs[0], layout
        if first.dtype not in DTYPES:
            raise TypeError(
                f"outs must have one of the dtypes {', '.join(DTYPES)}, got {first.dtype}"
            )
        dtype = first.dtype if dtype is None else dtype
        expect_one_of("dtype", dtype, DTYPES)
        self.device, self.dtype, self.out_shape = first.device, dtype, tuple(first.shape)
        tensor = as_tensor("each of outs", fresh(first.shape, dtype, self.device), layout)
        batch, seqlen, heads, head_dim_v = tensor.shape
        expect_head_dim("head_dim of outs", head_dim_v)
        self.lse_shape = (batch, heads, seqlen)[4 - len(first.shape) :]
        for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
            expect_like(f"outs[{i}]", out, self.out_shape, first.dtype, self.device)
            expect_like(f"lses[{i}]", lse, self.lse_shape, "float32", self.device)
        self._tensor, self._row = tensor, padded_head_dim(head_dim_v)
        self._parts_shape = (len(outs), batch, seqlen, heads, self._row)
        self._lses_shape = (len(outs), *self.lse_shape)
        self._are_stacked = stacked is not None
        self._lie_ready = self._are_stacked and self._lies_ready(*stacked)
        self._launcher = self._make_launcher(tensor, len(outs))
        if self._launcher is not None:
            self._launcher.build()

    def _make_launcher(self, tensor: Tensor, num_parts: int) -> Launcher | None:
        batch, seqlen, heads, head_dim_v = tensor.shape
        if not batch * seqlen * heads:
            return None
        traits = Traits(self.dtype, self._row, self._row, vectorized=tensor.is_vectorizable)
        config = choose("combine", traits, limits_of_device(self.device)).config
        blocks = num_blocks("the merge", seqlen, heads * batch, config.block_rows)
        arguments = {
            "out": records.Tensor("out", *tensor.strides[:3]),
            "shape": Shape(seqlen, 0, heads, 1, 0, head_dim_v, batch),
            "num_splits": num_parts,
            "tiles": SplitTiles(1, 1),
            "features": ABSENT,
        }
        return Launcher(config, traits, self.device, blocks, arguments)

    def _lies_ready(self, outs: ArrayView, lses: ArrayView) -> bool:
        """Whether the kernel can read the parts where they are."""
        in_order = self.layout == "bshd" and self.out_shape[-1] == self._row
        return in_order and outs.dtype == "float32" and outs.is_contiguous and lses.is_contiguous

    def bind(
        self, *operands_and_library: Operand | ArrayLibrary
    ) -> tuple[Any, Any, dict[str, Callable[[int], None]]]:
        """Copy the parts next to each other and allocate; (out, lse, functions that launch).

        Args:
            operands_and_library: the parts of out, those of lse, or the arrays of all of either;
                and the array library.
        """
        *operands, library = operands_and_library
        if self._lie_ready and all(each.pointer % _ALIGNMENT == 0 for each in operands):
            parts, part_lses = operands
        else:
            parts, part_lses = map(library.operand, self._copied(operands, library))
        out = library.empty(self.out_shape, self.dtype, self.device)
        lse = library.empty(self.lse_shape, "float32", self.device)
        if self._launcher is None:
            return out, lse, {}
        results = {"out": library.operand(out), "lse": library.operand(lse)}
        launch = self._launcher.bind({"parts": parts, "part_lses": part_lses, **results})
        return out, lse, {"combine": launch}

    def _copied(self, operands: list[Operand], library: ArrayLibrary) -> tuple[Any, Any]:
        """The parts of out and of lse, next to each other."""
        arrays = [each.array for each in operands]
        if not self._are_stacked:
            n = len(arrays) // 2
            arrays = [arrays[:n], arrays[n:]]
        parts = library.empty(self._parts_shape, "float32", self.device)
        part_lses = library.empty(self._lses_shape, "float32", self.device)
        for i, (out, lse) in enumerate(zip(*arrays, strict=True)):
            self._as_given(parts[i])[...] = out
            part_lses[i][...] = lse
        return parts, part_lses

    def _as_given(self, part):
        """A (batch, seqlen, heads, padded head_dim_v) array with the axes that users' have."""
        part, axes = part[..., : self.out_shape[-1]], len(self.out_shape)
        if axes == 4:
            return part.swapaxes(1, 2) if self.layout == "bhsd" else part
        if axes == 3:
            return part[0].swapaxes(0, 1) if self.layout == "bhsd" else part[0]
        return part[0, :, 0]


class MergeOnto:
    """A merge of one part onto what is there made ready: its kernel bound to all but addresses.

    Attributes:
        device: of the kernel.
    """

    def __init__(self, views: dict[str, ArrayView], layout: str):
        """Check and compile.

        Args:
            views: of the arrays of `merge_onto`, by name.
            layout: as for `merge_onto`.

        Raises:
            TypeError, ValueError, UnsupportedError: as `merge_onto`.
        """
        expect_one_of("layout", layout, LAYOUTS)
        out, part, self.device = views["out"], views["part"], views["out"].device
        if part.dtype not in DTYPES:
            raise TypeError(
                f"part must have one of the dtypes {', '.join(DTYPES)}, got {part.dtype}"
            )
        tensors = {name: as_tensor(name, views[name], layout) for name in ("out", "part")}
        batch, seqlen, heads, head_dim_v = tensors["out"].shape
        expect_head_dim("head_dim of out", head_dim_v)
        shapes = {"out": out.shape, "lse": (batch, heads, seqlen)[4 - len(out.shape) :]}
        for name, view in views.items():
            dtype = part.dtype if name == "part" else "float32"
            shape = shapes["lse" if name.endswith("lse") else "out"]
            expect_like(name, view, tuple(shape), dtype, self.device, of="out")
        expect_contiguous_rows("part", part)
        for name in ("out", "lse"):
            expect_writeable(name, views[name])
        self._apart = Apart({"out": out, "part": part})
        self._names = tuple(views)
        self._launcher = self._make_launcher(tensors, views)
        if self._launcher is not None:
            self._launcher.build()

    def _make_launcher(
        self, tensors: dict[str, Tensor], views: dict[str, ArrayView]
    ) -> Launcher | None:
        batch, seqlen, heads, head_dim_v = tensors["out"].shape
        if not batch * seqlen * heads:
            return None
        vectorized = all(tensor.is_vectorizable for tensor in tensors.values())
        row = padded_head_dim(head_dim_v)
        config = MergeOntoConfig()
        traits = Traits(views["part"].dtype, row, row, vectorized=vectorized)
        blocks = num_blocks("the merge", seqlen, heads * batch, config.rows(traits))
        records_of = {name: tensor.strides[:3] for name, tensor in tensors.items()}
        for name in ("lse", "part_lse"):
            # (batch, head, row), without the axes that the caller's do not have.
            strides = (0, 0, 0, *views[name].strides)[-3:]
            records_of[name] = strides[0], strides[2], strides[1]
        arguments: dict[str, Any] = {
            name: records.Tensor(name, *strides) for name, strides in records_of.items()
        }
        arguments["shape"] = Shape(seqlen, 0, heads, 1, 0, head_dim_v, batch)
        return Launcher(config, traits, self.device, blocks, arguments)

    def bind(
        self, *operands_and_library: Operand | ArrayLibrary
    ) -> tuple[dict[str, Callable[[int], None]]]:
        """The function that launches; nothing is allocated.

        Args:
            operands_and_library: the arrays in the order of the views, and the array library.
        """
        *given, _ = operands_and_library
        operands = dict(zip(self._names, given, strict=True))
        self._apart.expect({name: operands[name].pointer for name in ("out", "part")})
        if self._launcher is None:
            return ({},)
        return ({"merge-onto": self._launcher.bind(operands)},)
