"""Sources of codes and scales of q, k and v.

Each may be an array of 16 bits, which is quantised by the recipe; an `Fp8Array`; or codes of the
caller's own with a scale per head, as flash-attn has them. A `Source` makes codes and scales of
any of them, and describes their layout.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from numflash.calls.quantization import CODE_DTYPES, Quantization, Relayout, data_shape
from numflash.configs import FP8_STEP
from numflash.kernels import arguments as records
from numflash.kernels.arguments import Descale, Transposed
from numflash.problem.fp8 import Fp8Array, Fp8Recipe
from numflash.problem.options import AttentionOptions
from numflash.problem.problem import Tensor, as_tensor, expect_like
from numflash.runtime.arrays import ArrayLibrary
from numflash.runtime.driver import limits_of_device
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.views import ArrayView, Operand, contiguous_strides, fresh

SIXTEEN_BITS = ("float16", "bfloat16")
"""Types of arrays that a call quantises, and of its results."""
# Shifts a token's number to 0: one scale for all.
_ALL_TOKENS = 30
_ALIGNMENT = 16


@dataclass(frozen=True)
class Described:
    """The description of an `Fp8Array`, without its arrays."""

    recipe: Fp8Recipe
    shape: tuple[int, ...]
    dtype: str
    layout: str
    format: str
    transposed: bool

    @classmethod
    def of(cls, x: Fp8Array) -> "Described":
        """Of an array."""
        return cls(x.recipe, tuple(x.shape), x.dtype, x.layout, x.format, x.transposed)


AllDescribed = tuple[tuple[str, Described], ...]
"""(name, `Described`) of each `Fp8Array` among q, k and v: part of a call's key."""


class Source:
    """Codes and scales of one of q, k and v.

    Attributes:
        view: the array as if it had 16 bits, which is attended to.
        rotation: the seed by which rows are rotated; None if they are not.
        tokens_shift: 2 ** this many tokens share a scale.
        data: the view of the codes.
        descale_shape: (batch, heads, n), an extent of 1 for all.
    """

    view: ArrayView
    rotation: int | None
    tokens_shift: int
    data: ArrayView
    descale_shape: tuple[int, int, int]
    descale_strides: tuple[int, int, int]

    def __init__(self, name: str):
        self.name = name

    def bind(
        self, operands: dict[str, Operand], library: ArrayLibrary
    ) -> dict[str, Callable[[int], None]]:
        """Put codes and scales into `operands`; functions that make them, by name."""
        raise NotImplementedError

    def build(self) -> None:
        """Compile and load what makes them."""

    def _share(self, recipe: Fp8Recipe) -> None:
        self.rotation = recipe.seed if recipe.hadamard else None
        shifts = {"token": 0, "block": recipe.block.bit_length() - 1}
        self.tokens_shift = shifts.get(recipe.granularity, _ALL_TOKENS)

    def codes(self) -> records.Tensor | Transposed:
        """The codes as a kernel's argument."""
        if self.name == "v":
            batch, head, row, _ = self.data.strides
            return Transposed("v", batch, row, head, length=self.data.shape[3])
        return records.Tensor(self.name, *self.data.strides[:3])

    def descale(self) -> Descale:
        """The scales as a kernel's argument."""
        batch, head, _ = self.descale_strides
        return Descale(f"{self.name}_descale", batch, head, self.tokens_shift)


class _Quantized(Source):
    """An array of 16 bits."""

    def __init__(self, name: str, view: ArrayView, layout: str, recipe: Fp8Recipe, statistics):
        super().__init__(name)
        if view.dtype not in SIXTEEN_BITS:
            raise TypeError(
                f'{name} must be float16 or bfloat16 for precision="fp8", got {view.dtype}'
            )
        is_v = name == "v"
        self.view = view
        self._share(replace(recipe, hadamard=recipe.hadamard and not is_v))
        self._ready = Quantization(
            view,
            layout,
            recipe,
            transposed=is_v,
            rotated=recipe.hadamard and not is_v,
            statistics=statistics,
            name=name,
        )
        self.data = fresh(self._ready.data_shape, "uint8", view.device)
        self.statistics_tokens = self._ready.statistics_tokens
        self.descale_shape = self._ready.descale_shape
        self.descale_strides = _strides_of_scales(
            self.descale_shape, contiguous_strides(self.descale_shape)
        )

    def build(self):
        """As `Source.build`."""
        self._ready.build()

    def bind(self, operands, library):
        """As `Source.bind`; with statistics also those."""
        data, descale, statistics, launches = self._ready.bind(operands[self.name], library)
        operands[self.name] = library.operand(data)
        operands[f"{self.name}_descale"] = library.operand(descale)
        if statistics is not None:
            operands[f"{self.name}_statistics"] = library.operand(statistics)
        return {f"{stage} {self.name}": launch for stage, launch in launches.items()}


class _Given(Source):
    """Codes that are there; those of V may still have to be transposed."""

    def __init__(self, name: str):
        super().__init__(name)
        self._relayout: Relayout | None = None

    def _lay_out(self, data: ArrayView, layout: str, what: str) -> None:
        """Take codes with head_dim innermost as they lie, if the kernels can; else copy them."""
        tensor = as_tensor(what, data, layout)
        if self.name != "v" and _can_be_read(tensor):
            self.data = replace(data, shape=tensor.shape, strides=tensor.strides)
            return
        self._relayout = Relayout(data, layout, transposed=self.name == "v", name=what)
        self.data = fresh(self._relayout.data_shape, "uint8", data.device)

    def build(self):
        """As `Source.build`."""
        if self._relayout is not None:
            self._relayout.build()

    def bind(self, operands, library):
        """As `Source.bind`."""
        if self._relayout is None:
            return {}
        data, launches = self._relayout.bind(operands[self.name], library)
        operands[self.name] = library.operand(data)
        return {f"lay out {self.name}": launch for launch in launches.values()}


class _FromArray(_Given):
    """An `Fp8Array`."""

    def __init__(
        self, name: str, data: ArrayView, descale: ArrayView, layout: str, described: Described
    ):
        super().__init__(name)
        if described.layout != layout:
            raise ValueError(
                f"{name} was quantised with layout {described.layout!r}, the call says {layout!r}"
            )
        _expect_e4m3(name, described.format)
        if described.transposed and name != "v":
            raise ValueError(f"{name} must have head_dim innermost; only v may be transposed")
        if name == "v" and described.recipe.hadamard:
            raise ValueError("v must not be rotated: quantize it with hadamard=False")
        shape = described.shape
        self.view = ArrayView(0, shape, contiguous_strides(shape), described.dtype, data.device)
        batch, seqlen, heads, head_dim = as_tensor(name, self.view, layout).shape
        self._share(described.recipe)
        wanted = data_shape((batch, seqlen, heads, head_dim), described.transposed)
        expect_like(f"{name}.data", data, wanted, "uint8", data.device)
        self.descale_shape = described.recipe.descale_shape(batch, heads, seqlen)
        expect_like(f"{name}.descale", descale, self.descale_shape, "float32", data.device)
        self.descale_strides = _strides_of_scales(self.descale_shape, descale.strides)
        if self.descale_strides[2] not in (0, 1):
            raise ValueError(
                f"{name}.descale must have a contiguous last axis, got strides {descale.strides}"
            )
        if described.transposed:
            if not _can_be_read(Tensor(name, data, data.shape, data.strides)):
                raise ValueError(
                    f"{name}.data must lie at multiples of {_ALIGNMENT} bytes, got strides "
                    f"{data.strides}"
                )
            self.data = data
        else:
            self._lay_out(data, "bshd", f"{name}.data")


class _FromCodes(_Given):
    """Codes of the caller's own, with scales of shape (batch, heads)."""

    def __init__(self, name: str, data: ArrayView, descale: ArrayView | None, layout: str, dtype):
        super().__init__(name)
        if data.dtype not in CODE_DTYPES:
            raise TypeError(
                f"{name} must be codes of 8 bits where {name}_descale is given, got {data.dtype}"
            )
        if data.dtype == "float8_e5m2":
            _expect_e4m3(name, "e5m2")
        if descale is None:
            raise TypeError(f"{name} has 8 bits: give its scales as {name}_descale")
        self.view = replace(data, dtype=dtype, strides=contiguous_strides(data.shape))
        self.rotation, self.tokens_shift = None, _ALL_TOKENS
        batch, *_ = as_tensor(name, data, layout).shape
        if descale.dtype != "float32":
            raise TypeError(f"{name}_descale must be float32, got {descale.dtype}")
        if descale.device != data.device:
            raise ValueError(
                f"{name}_descale must lie on the device of {name}, {data.device}, got device "
                f"{descale.device}"
            )
        if len(descale.shape) != 2 or descale.shape[0] not in (1, batch):
            raise ValueError(
                f"{name}_descale must have shape (batch, heads of k) = ({batch}, ...), got "
                f"{tuple(descale.shape)}"
            )
        self.descale_shape = (*descale.shape, 1)
        self.descale_strides = _strides_of_scales(self.descale_shape, (*descale.strides, 0))
        self._lay_out(data, layout, name)


def make_sources(
    views: dict[str, ArrayView],
    options: AttentionOptions,
    described: dict[str, Described],
    statistics: bool = False,
) -> dict[str, Source]:
    """Makers of codes and scales of q, k and v.

    Args:
        views: of q, k, v, and of their scales, as "k_descale", where there are any.
        options: of the call.
        described: of each `Fp8Array`.
        statistics: whether sums of squares are wanted of those that are quantised.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention`.
    """
    options.check()
    recipe, layout = options.fp8, options.layout
    turns = {(d.recipe.hadamard, d.recipe.seed) for name, d in described.items() if name != "v"}
    if recipe is None:
        recipe = Fp8Recipe()
        if len(turns) == 1:
            # An array quantised now is rotated as those that were quantised before.
            hadamard, seed = turns.pop()
            recipe = replace(recipe, hadamard=hadamard, seed=seed)
    codes = {name for name in "qkv" if f"{name}_descale" in views and name not in described}
    if codes:
        result = views["out"].dtype if "out" in views else result_dtype(views["q"].device)
        recipe = replace(recipe, hadamard=False)
    sources: dict[str, Source] = {}
    for name in "qkv":
        view, descale = views[name], views.get(f"{name}_descale")
        if name in described:
            sources[name] = _FromArray(name, view, descale, layout, described[name])
        elif name in codes or view.dtype in CODE_DTYPES:
            dtype = result if codes else result_dtype(view.device)
            sources[name] = _FromCodes(name, view, descale, layout, dtype)
        else:
            sources[name] = _Quantized(name, view, layout, recipe, statistics)
    if sources["q"].rotation != sources["k"].rotation:
        turned = {name: _turn(sources[name].rotation) for name in "qk"}
        raise ValueError(
            "q and k must be rotated by the same signs, or scores change: q is "
            f"{turned['q']}, k is {turned['k']}"
        )
    return sources


def _turn(rotation: int | None) -> str:
    return "not rotated" if rotation is None else f"rotated with seed {rotation}"


def _expect_e4m3(name: str, format: str) -> None:
    if format != "e4m3":
        raise UnsupportedError(
            f"{name} is {format}; attention takes e4m3, whose steps are half as wide"
        )


def result_dtype(device: int) -> str:
    """The type of results, where nothing else decides it."""
    has_bfloat16 = limits_of_device(device).compute_capability >= (8, 0)
    return "bfloat16" if has_bfloat16 else "float16"


def _can_be_read(tensor: Tensor) -> bool:
    """Whether rows of codes are filled up to whole columns and lie at multiples of 16 bytes."""
    steps = [s for s, n in zip(tensor.strides[:3], tensor.shape[:3], strict=True) if n > 1]
    return (
        tensor.view.pointer % _ALIGNMENT == 0
        and tensor.strides[3] == 1
        and tensor.shape[3] % FP8_STEP == 0
        and all(step % _ALIGNMENT == 0 for step in steps)
    )


def _strides_of_scales(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(0 if n == 1 else step for n, step in zip(shape, strides, strict=True))
