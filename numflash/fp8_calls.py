"""FP8 calls made ready: q, k and v quantised, or taken as they come, and the forward on them.

Each of q, k and v may be an array of 16 bits, which is quantised by the recipe; an `Fp8Array`; or
codes of the caller's own with a scale per head, as flash-attn has them. A `Source` makes codes and
scales of any of them, and says how they lie.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from numflash.arrays import ArrayLibrary
from numflash.calls import Forward
from numflash.configs import FP8_STEP, EstimateConfig, MmaConfig, Traits
from numflash.dispatch import Choice, Geometry
from numflash.errors import UnsupportedError
from numflash.fp8 import TOKEN_STEP, Fp8Array, Fp8Recipe
from numflash.launch import Launcher, limits_of_device
from numflash.problem import AttentionProblem, Tensor, as_tensor, expect_like
from numflash.quantization import CODE_DTYPES, Quantization, Relayout
from numflash.selection import forward_choice
from numflash.views import ArrayView, Operand, contiguous_strides

_DTYPES = ("float16", "bfloat16")
# Shifts a token's number to 0: one scale for all.
_ALL_TOKENS = 30
# A block's offset into the scales is kept in 32 bits or found from this many.
_ALIGNMENT = 16


@dataclass(frozen=True)
class Described:
    """What is to know of an `Fp8Array` besides its arrays."""

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


class Source:
    """Codes and scales of one of q, k and v.

    Attributes:
        view: the array as if it had 16 bits: what is attended to.
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

    def _share(self, recipe: Fp8Recipe) -> None:
        self.rotation = recipe.seed if recipe.hadamard else None
        shifts = {"token": 0, "block": recipe.block.bit_length() - 1}
        self.tokens_shift = shifts.get(recipe.granularity, _ALL_TOKENS)

    def scalars(self) -> dict[str, int]:
        """Strides and shifts, by the kernel's parameter names."""
        name, strides = self.name, self.data.strides
        axes = ("batch", "head", "column") if name == "v" else ("batch", "row", "head")
        scalars = {f"{name}_{axis}": step for axis, step in zip(axes, strides, strict=False)}
        batch, head, _ = self.descale_strides
        return scalars | {
            f"{name}_descale_batch": batch,
            f"{name}_descale_head": head,
            f"{name}_descale_shift": self.tokens_shift,
        }


class _Quantized(Source):
    """An array of 16 bits."""

    def __init__(self, name: str, view: ArrayView, layout: str, recipe: Fp8Recipe, statistics):
        super().__init__(name)
        if view.dtype not in _DTYPES:
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
        )
        self.data = _fresh(self._ready.data_shape, view.device)
        self.statistics_tokens = self._ready.statistics_tokens
        self.descale_shape = self._ready.descale_shape
        self.descale_strides = _strides_of_scales(
            self.descale_shape, contiguous_strides(self.descale_shape)
        )

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
        self.data = _fresh(self._relayout.data_shape, data.device)

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
        padded = -(-head_dim // FP8_STEP) * FP8_STEP
        wanted = (batch, seqlen, heads, padded)
        if described.transposed:
            wanted = (batch, heads, padded, -(-seqlen // TOKEN_STEP) * TOKEN_STEP)
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
    views: dict[str, ArrayView], options: dict, statistics: bool = False
) -> dict[str, Source]:
    """What makes codes and scales of q, k and v.

    Args:
        views: of q, k, v, and of their scales, as "k_descale", where there are any.
        options: of the call; "described" holds a `Described` for each `Fp8Array`.
        statistics: whether sums of squares are wanted of those that are quantised.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention`.
    """
    described, recipe, layout = options["described"], options["fp8"], options["layout"]
    turns = {(d.recipe.hadamard, d.recipe.seed) for name, d in described.items() if name != "v"}
    if recipe is None:
        recipe = Fp8Recipe()
        if len(turns) == 1:
            # What is quantised now is rotated as what was quantised before.
            hadamard, seed = turns.pop()
            recipe = replace(recipe, hadamard=hadamard, seed=seed)
    elif not isinstance(recipe, Fp8Recipe):
        raise TypeError(f"fp8 must be an Fp8Recipe, got {recipe!r} ({type(recipe).__name__})")
    codes = {name for name in "qkv" if f"{name}_descale" in views and name not in described}
    if codes:
        result = views["out"].dtype if "out" in views else _result_dtype(views["q"].device)
        recipe = replace(recipe, hadamard=False)
    sources: dict[str, Source] = {}
    for name in "qkv":
        view, descale = views[name], views.get(f"{name}_descale")
        if name in described:
            sources[name] = _FromArray(name, view, descale, layout, described[name])
        elif name in codes or view.dtype in CODE_DTYPES:
            dtype = result if codes else _result_dtype(view.device)
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


def _result_dtype(device: int) -> str:
    """What results are of, where nothing says so."""
    has_bfloat16 = limits_of_device(device).compute_capability >= (8, 0)
    return "bfloat16" if has_bfloat16 else "float16"


def _fresh(shape: tuple[int, ...], device: int) -> ArrayView:
    return ArrayView(0, shape, contiguous_strides(shape), "uint8", device)


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


class Fp8Forward(Forward):
    """A forward problem on 8-bit floats with its kernels bound to everything but addresses."""

    def __init__(self, views: dict[str, ArrayView], options: dict, statistics: bool = False):
        self.sources = make_sources(views, options, statistics)
        like = {name: source.view for name, source in self.sources.items()}
        # The result is of q's type; k and v may have been quantised from others.
        dtype = like["q"].dtype if like["q"].dtype in _DTYPES else "bfloat16"
        like = {name: replace(view, dtype=dtype) for name, view in like.items()}
        rest = {name: views[name] for name in ("alibi_slopes",) if name in views}
        self._prepare(views, like | rest, options | {"precision": None})

    def bind(
        self, operands: dict[str, Operand], library: ArrayLibrary
    ) -> tuple[Any, Any, dict[str, Callable[[int], None]]]:
        """As `Forward.bind`; what quantises comes first."""
        out, lse = self._allocate(operands, library)
        codes, launches = dict(operands), {}
        for source in self.sources.values():
            launches |= source.bind(codes, library)
        return out, lse, launches | self._launches(codes, library)

    def _traits(self, problem: AttentionProblem, tensors: dict[str, Tensor]) -> Traits:
        columns = {
            name: -(-getattr(problem, name) // FP8_STEP) * FP8_STEP
            for name in ("head_dim", "head_dim_v")
        }
        plain = problem.traits(tensors["out"].is_vectorizable)
        return replace(plain, **columns, fp8=True)

    def _choose(
        self, problem: AttentionProblem, traits: Traits, config
    ) -> tuple[Choice, Geometry]:
        choice, geometry = forward_choice(problem, traits, self.device, config)
        tokens = min(2 ** self.sources[name].tokens_shift for name in "kv")
        if tokens % choice.config.tile_n:
            traits = replace(traits, key_scales=True)
            choice, geometry = forward_choice(problem, traits, self.device, config)
        return choice, geometry

    def _scalars(self, problem: AttentionProblem, tensors: dict[str, Tensor]) -> dict:
        scalars = super()._scalars(problem, {"out": tensors["out"]})
        for name, source in self.sources.items():
            scalars |= source.scalars()
            self._expect_heads(problem, name, source)
        q = self.sources["q"]
        per_head = q.descale_shape[1] in (1, problem.num_heads_q)
        return scalars | {
            "stored_seqlen_k": self.sources["v"].data.shape[3],
            "q_descale_group": 1 if per_head else problem.group_size,
            "q_descale_packed": scalars["q_descale_head"] if per_head else 0,
        }

    def _expect_heads(self, problem: AttentionProblem, name: str, source: Source) -> None:
        allowed = {1, problem.num_heads_kv}
        if name == "q" and source.rotation is not None:
            allowed = {1, problem.num_heads_q}
        elif name == "q":
            allowed |= {problem.num_heads_q}
        if source.descale_shape[1] not in allowed:
            raise ValueError(
                f"{name}_descale must have {problem.num_heads_kv} heads, as many as k, got "
                f"{source.descale_shape[1]}"
            )


class AutoForward(Fp8Forward):
    """A forward problem whose key-value heads are computed in 8 bits where that is exact enough.

    Nothing waits for the decision: it is made on the device, and both kernels run over all heads,
    each passing over those of the other.
    """

    def __init__(self, views: dict[str, ArrayView], options: dict):
        if options["described"] or any(f"{name}_descale" in views for name in "qkv"):
            raise TypeError('precision="auto" chooses between 8 and 16 bits: q, k and v need 16')
        super().__init__(views, options, statistics=True)
        self.in_16_bits = _Selected(views, options | {"precision": None})
        self.estimate = None
        if self.launchers and 0 not in self.decision_shape:
            self._add_estimate(options["max_rel_error"])

    def bind(self, operands, library):
        """As `Forward.bind`; the decision is put into `operands`, "in_fp8" and "estimate"."""
        out, lse = self._allocate(operands, library)
        for name, dtype in (("in_fp8", "int32"), ("estimate", "float32")):
            operands[name] = library.operand(
                library.empty(self.decision_shape, dtype, self.device)
            )
        codes, launches = dict(operands), {}
        for source in self.sources.values():
            launches |= source.bind(codes, library)
        if self.estimate is not None:
            launches["estimate"] = self.estimate.bind(codes)
        launches |= self._launches(codes, library)
        others = self.in_16_bits._launches(operands, library)
        return out, lse, launches | {f"{name} in 16 bits": x for name, x in others.items()}

    def _add_estimate(self, max_rel_error: float) -> None:
        config, problem = EstimateConfig(), self.problem
        q = self.sources["q"]
        scalars = {
            "seqlen_q": problem.seqlen_q,
            "seqlen_k": problem.seqlen_k,
            "group_size": problem.group_size,
            "rotated_dims": problem.head_dim if q.rotation is None else q.data.shape[3],
            "softmax_scale": problem.softmax_scale,
            "max_rel_error": max_rel_error,
        }
        for name, source in self.sources.items():
            scalars[f"{name}_tokens"] = source.statistics_tokens
        blocks = self.decision_shape[0] * self.decision_shape[1]
        traits = Traits(problem.dtype, FP8_STEP, FP8_STEP)
        self.estimate = Launcher(config, traits, self.device, blocks, scalars)

    def _traits(self, problem, tensors):
        return replace(super()._traits(problem, tensors), selected=True)

    def _choose(self, problem, traits, config):
        return _unsplit(*super()._choose(problem, traits, config))

    @property
    def decision_shape(self) -> tuple[int, int]:
        """(batch, key-value heads)."""
        return self.problem.batch, self.problem.num_heads_kv


class _Selected(Forward):
    """A forward in 16 bits of the heads that are not computed in 8."""

    def _traits(self, problem, tensors):
        return replace(super()._traits(problem, tensors), selected=True)

    def _choose(self, problem, traits, config):
        choice, geometry = super()._choose(problem, traits, None)
        if not isinstance(choice.config, MmaConfig):
            raise UnsupportedError(
                'precision="auto" needs tensor cores in 16 bits: '
                + "; ".join(f"{what}: {why}" for what, why in choice.passed_over[:1])
            )
        return _unsplit(choice, geometry)


def _unsplit(choice: Choice, geometry: Geometry) -> tuple[Choice, Geometry]:
    """Without splits over keys, whose parts would be put together for heads of either kind."""
    config = replace(choice.config, num_splits=1)
    return replace(choice, config=config), replace(geometry, num_splits=1)
