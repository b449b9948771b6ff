"""Arrays to 8-bit floats and back, made ready: checked, and kernels bound to all but addresses.

A made-ready object holds the results of shapes, strides and options; `bind` allocates for one
array and returns functions that launch. `api.quantize` has the public functions.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from numflash.calls.launch import Launcher
from numflash.configs import (
    DTYPES,
    AmaxConfig,
    Config,
    DequantizeConfig,
    QuantizeConfig,
    Traits,
    padded_fp8_head_dim,
    quantize_config,
)
from numflash.configs.formats import FORMATS
from numflash.configs.fp8 import generation
from numflash.kernels import arguments as records
from numflash.kernels.quantize.arguments import Codes, Grouped, Signs, Sizes
from numflash.problem.fp8 import TOKEN_STEP, Fp8Array, Fp8Recipe
from numflash.problem.options import LAYOUTS, expect_one_of
from numflash.problem.problem import (
    Tensor,
    as_tensor,
    expect_contiguous_rows,
    expect_head_dim,
    expect_like,
    num_blocks,
)
from numflash.runtime.arrays import ArrayLibrary, copy_rows, library_of
from numflash.runtime.driver import limits_of_device
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.views import ArrayView, Operand, fresh

CODE_DTYPES = ("uint8", *(kind.dtype.name for kind in FORMATS.values()))
"""dtypes of arrays whose elements are codes."""
# Token numbers are 32-bit in kernels.
_MAX_SEQLEN = 2**30

Launches = dict[str, Callable[[int], None]]
"""By name, in order: functions that launch on a stream."""


class Quantization:
    """A quantisation made ready: its kernels bound to everything but addresses.

    Attributes:
        tensor: to be quantised.
        device: of the array.
        data_shape, descale_shape: of codes and scales, see `Fp8Array`.
        statistics_shape: (batch, heads, blocks of tokens, 2): the sum of x ** 2 over the block,
            rotated, and of (x - descale * code) ** 2; None without statistics.
        statistics_tokens: tokens of such a block.
    """

    def __init__(
        self,
        view: ArrayView,
        layout: str,
        recipe: Fp8Recipe,
        *,
        format: str = "e4m3",
        transposed: bool = False,
        rotated: bool | None = None,
        statistics: bool = False,
        name: str = "x",
    ):
        """Check, and choose kernels.

        Args:
            view: of the array.
            layout, recipe, format, transposed: as for `quantize_fp8`.
            rotated: whether rows are rotated; None if the recipe says so.
            statistics: whether sums of squares are wanted.
            name: what messages call the array.

        Raises:
            TypeError, ValueError, UnsupportedError: as `quantize_fp8`.
        """
        if view.dtype not in DTYPES:
            raise TypeError(
                f"{name} must have one of the dtypes {', '.join(DTYPES)}, got {view.dtype}"
            )
        if not isinstance(transposed, bool):
            raise TypeError(f"transposed must be True or False, got {transposed!r}")
        expect_one_of("format", format, FORMATS)
        self.tensor, self.is_copied = _tensor(view, layout, name)
        self.device, shape = view.device, self.tensor.shape
        batch, seqlen, heads, head_dim = shape
        padded = padded_fp8_head_dim(head_dim)
        self.data_shape = data_shape(shape, transposed)
        self.descale_shape = recipe.descale_shape(batch, heads, seqlen)
        self._peak = FORMATS[format].peak
        self._arguments = _arguments(self.tensor) | {
            "amax": Grouped(None, 0, 0, tokens=1),
            "signs": _signs(recipe.seed),
        }
        self._traits = Traits(view.dtype, padded, padded, vectorized=self.tensor.is_vectorizable)
        rotated = recipe.hadamard if rotated is None else rotated
        find = {"generation": generation(limits_of_device(self.device)), "head_dim": padded}
        options = {"transposed": transposed, "statistics": statistics, "format": format}
        options |= {"hadamard": rotated}
        self._reductions: dict[str, tuple[Launcher, int]] = {}
        self._measure = config = None
        if recipe.granularity == "token":
            config = quantize_config(**find, scale="token", **options)
        elif recipe.granularity == "block":
            config = quantize_config(**find, block=recipe.block, **options)
        if config is None:
            config = quantize_config(**find, scale="given", **options)
            self._prepare_maxima(quantize_config(**find, hadamard=rotated, measure=True), recipe)
        self.statistics_tokens = config.block_tokens
        self.statistics_shape = None
        if statistics:
            self.statistics_shape = batch, heads, -(-seqlen // config.block_tokens), 2
        self._quantize = None
        if 0 not in shape:
            stored = self.data_shape[3] if transposed else seqlen
            self._quantize = self._launcher(config, stored)

    def build(self) -> None:
        """Compile and load; `bind` does it where this was not done before."""
        reductions = (launcher for launcher, _ in self._reductions.values())
        for launcher in (self._measure, *reductions, self._quantize):
            if launcher is not None:
                launcher.build()

    def bind(self, operand: Operand, library: ArrayLibrary) -> tuple[Any, Any, Any, Launches]:
        """Allocate; (data, descale, statistics or None, functions that launch, in order)."""
        if self.is_copied:
            operand = copy_rows(operand)

        def allocate(shape, dtype="float32"):
            array = library.empty(shape, dtype, self.device)
            return array, library.operand(array)

        data, data_operand = allocate(self.data_shape, "uint8")
        descale, descale_operand = allocate(self.descale_shape)
        statistics = statistics_operand = amax = None
        if self.statistics_shape is not None:
            statistics, statistics_operand = allocate(self.statistics_shape)
        launches, maxima = {}, None
        if self._measure is not None:
            maxima = allocate(self._maxima_shape)[1]
            launches["measure"] = self._measure.bind({"x": operand, "maxima": maxima})
        for name, (launcher, size) in self._reductions.items():
            amax = allocate((size,))[1]
            is_last = name == "amax"
            operands = {
                "maxima": maxima,
                "amax": amax,
                "descale": descale_operand if is_last else allocate((size,))[1],
            }
            launches[name], maxima = launcher.bind(operands), amax
        if self._quantize is not None:
            operands = {"x": operand, "amax": amax, "data": data_operand}
            operands |= {"descale": descale_operand, "statistics": statistics_operand}
            launches["quantize"] = self._quantize.bind(operands)
        return data, descale, statistics, launches

    def _prepare_maxima(self, config: QuantizeConfig, recipe: Fp8Recipe) -> None:
        """The kernels that find maxima where a block does not own all that share a scale."""
        batch, seqlen, heads, _ = self.tensor.shape
        blocks = -(-seqlen // config.block_tokens)
        _, descale_heads, scales = self.descale_shape
        self._maxima_shape = (batch * heads * blocks,)
        if 0 not in self.tensor.shape:
            self._measure = self._launcher(config, seqlen)
        per_scale = max(1, blocks)
        if recipe.granularity == "block":
            per_scale = recipe.block // config.block_tokens
        if recipe.granularity == "tensor":
            self._add_reduction("amax-heads", batch * heads, blocks, per_scale)
            self._add_reduction("amax", 1, batch * heads, max(1, batch * heads))
            strides, tokens = (0, 0), _MAX_SEQLEN
        else:
            self._add_reduction("amax", batch * heads, blocks, per_scale)
            tokens = recipe.block if recipe.granularity == "block" else _MAX_SEQLEN
            strides = descale_heads * scales, scales
        self._arguments["amax"] = Grouped("amax", *strides, tokens)

    def _add_reduction(self, name: str, rows: int, per_row: int, per_group: int) -> None:
        groups = -(-per_row // per_group)
        if 0 in self.tensor.shape:
            # Scales of empty arrays are defined, too.
            groups, per_row = self.descale_shape[2] if name == "amax" else 0, 0
        if rows * groups:
            config = AmaxConfig(1 if per_group <= 64 else 8 if per_group <= 2048 else 32)
            arguments = {"per_row": per_row, "per_group": per_group, "groups": groups}
            arguments["peak"] = self._peak
            launcher = Launcher(config, self._traits, self.device, rows * groups, arguments)
            self._reductions[name] = launcher, rows * groups

    def _launcher(self, config: QuantizeConfig, tokens: int) -> Launcher:
        """A kernel whose blocks own tokens of a head."""
        return _over_tokens(config, self._traits, self.tensor, tokens, self._arguments)


class Relayout:
    """Codes that are already there, to be filled up and transposed: made ready.

    Attributes:
        device: of the array.
        data_shape: of the codes, see `Fp8Array`.
    """

    def __init__(self, view: ArrayView, layout: str, *, transposed: bool, name: str = "x"):
        """Check, and choose kernels.

        Args:
            view: of the codes, (batch, seqlen, heads, head_dim) of uint8 or an 8-bit float.
            layout: "bshd" or "bhsd", of the codes.
            transposed: whether tokens become innermost.
            name: what messages call the array.

        Raises:
            TypeError: another dtype.
            ValueError: a wrong number of dimensions.
            UnsupportedError: head_dim above 256, an old GPU.
        """
        if view.dtype not in CODE_DTYPES:
            raise TypeError(
                f"{name} must have one of the dtypes {', '.join(CODE_DTYPES)}, got {view.dtype}"
            )
        self.tensor, self.is_copied = _tensor(view, layout, name)
        self.device, shape = view.device, self.tensor.shape
        self.data_shape = data_shape(shape, transposed)
        self._launcher = None
        if 0 not in shape:
            padded = padded_fp8_head_dim(shape[3])
            aligned = _is_aligned(self.tensor)
            traits = Traits("float16", padded, padded, vectorized=aligned)
            which = generation(limits_of_device(self.device))
            config = quantize_config(which, padded, transposed=transposed, codes=True)
            tokens = self.data_shape[3] if transposed else shape[1]
            self._launcher = _over_tokens(
                config, traits, self.tensor, tokens, _arguments(self.tensor)
            )

    def build(self) -> None:
        """Compile and load; `bind` does it where this was not done before."""
        if self._launcher is not None:
            self._launcher.build()

    def bind(self, operand: Operand, library: ArrayLibrary) -> tuple[Any, Launches]:
        """Allocate; (codes laid out, functions that launch)."""
        if self.is_copied:
            operand = copy_rows(operand)
        data = library.empty(self.data_shape, "uint8", self.device)
        if self._launcher is None:
            return data, {}
        operands = {"x": operand, "data": library.operand(data)}
        return data, {"quantize": self._launcher.bind(operands)}


class Dequantization:
    """The way back from an `Fp8Array`, made ready.

    Attributes:
        device: of the array.
    """

    def __init__(self, x: Fp8Array, dtype: str):
        """Check, and choose the kernel. Raises as `dequantize_fp8`."""
        expect_one_of("dtype", dtype, DTYPES)
        expect_one_of("format", x.format, FORMATS)
        data = library_of(x.data, "x.data").view(x.data, "x.data")
        descale = library_of(x.descale, "x.descale").view(x.descale, "x.descale")
        self.device, self.dtype, self.shape = data.device, dtype, tuple(x.shape)
        out = fresh(self.shape, dtype, self.device)
        tensor, _ = _tensor(out, x.layout)
        batch, seqlen, heads, head_dim = tensor.shape
        expect_like("x.data", data, data_shape(tensor.shape, x.transposed), "uint8", self.device)
        shape = x.recipe.descale_shape(batch, heads, seqlen)
        expect_like("x.descale", descale, shape, "float32", self.device)
        expect_contiguous_rows("x.descale", descale)
        # (batch, row, head, column) strides of the codes.
        order = (0, 3, 1, 2) if x.transposed else (0, 1, 2, 3)
        row_strides = [data.strides[axis] for axis in order]
        scales = [0 if n == 1 else step for n, step in zip(shape, descale.strides, strict=True)]
        tokens = x.recipe.block if x.recipe.granularity == "block" else 1
        arguments = _arguments(tensor, "out") | {
            "data": Codes("data", *row_strides),
            "descale": Grouped("descale", *scales[:2], tokens if shape[2] > 1 else _MAX_SEQLEN),
            "signs": _signs(x.recipe.seed),
        }
        self._launcher = None
        if 0 not in tensor.shape:
            config = DequantizeConfig(
                generation(limits_of_device(self.device)),
                hadamard=x.recipe.hadamard,
                transposed=x.transposed,
                format=x.format,
            )
            padded = padded_fp8_head_dim(head_dim)
            traits = Traits(dtype, padded, padded, vectorized=tensor.is_vectorizable)
            self._launcher = _over_tokens(config, traits, tensor, seqlen, arguments)

    def bind(self, data: Operand, descale: Operand, library: ArrayLibrary) -> tuple[Any, Launches]:
        """Allocate; (the array, functions that launch)."""
        out = library.empty(self.shape, self.dtype, self.device)
        if self._launcher is None:
            return out, {}
        operands = {"data": data, "descale": descale, "out": library.operand(out)}
        return out, {"dequantize": self._launcher.bind(operands)}


def _tensor(view: ArrayView, layout: str, name: str = "x") -> tuple[Tensor, bool]:
    """The array with contiguous rows, and whether it must be copied for that."""
    expect_one_of("layout", layout, LAYOUTS)
    is_copied = not view.has_contiguous_rows
    if is_copied:
        view = fresh(view.shape, view.dtype, view.device)
    tensor = as_tensor(name, view, layout)
    expect_head_dim(f"head_dim of {name}", tensor.shape[3])
    if tensor.shape[1] >= _MAX_SEQLEN:
        raise UnsupportedError(
            f"seqlen of {name} must be below {_MAX_SEQLEN}, got {tensor.shape[1]}"
        )
    return tensor, is_copied


def data_shape(shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    """The shape of the codes of a (batch, seqlen, heads, head_dim) array."""
    batch, seqlen, heads, head_dim = shape
    padded = padded_fp8_head_dim(head_dim)
    if transposed:
        return batch, heads, padded, -(-seqlen // TOKEN_STEP) * TOKEN_STEP
    return batch, seqlen, heads, padded


def _is_aligned(tensor: Tensor) -> bool:
    """Whether every row of codes can be read 16 bytes at a time."""
    steps = [s for s, n in zip(tensor.strides[:3], tensor.shape[:3], strict=True) if n > 1]
    return not any(n % 16 for n in (tensor.view.pointer, tensor.shape[3], *steps))


def _arguments(tensor: Tensor, name: str = "x") -> dict[str, object]:
    """An array and its sizes, as kernels' arguments."""
    return {name: records.Tensor(name, *tensor.strides[:3]), "sizes": Sizes(*tensor.shape[1:])}


def _signs(seed: int) -> Signs:
    """The bits of `numflash.reference.hadamard_signs`."""
    words = np.random.PCG64(seed).random_raw(4).astype("<u8").view("<i4")
    return Signs(*map(int, words))


def _over_tokens(
    config: Config, traits: Traits, tensor: Tensor, tokens: int, arguments: dict
) -> Launcher:
    """A kernel whose blocks own tokens of a head."""
    batch, _, heads, _ = tensor.shape
    blocks = num_blocks("x", tokens, heads * batch, config.block_rows)
    return Launcher(config, traits, tensor.view.device, blocks, arguments)


__all__ = [
    "CODE_DTYPES",
    "Dequantization",
    "Quantization",
    "Relayout",
    "data_shape",
]
