"""FP8 calls made ready: what makes codes and scales of q, k and v, and the forward on them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from numflash.calls.forward import Forward, arguments_of, seen_by_bulk_copies, tensor_maps
from numflash.calls.fp8_sources import (
    SIXTEEN_BITS,
    AllDescribed,
    Source,
    make_sources,
    result_dtype,
)
from numflash.calls.launch import Launcher, Mapped
from numflash.configs import (
    FP8_STEP,
    EstimateConfig,
    MmaConfig,
    Sm90ForwardConfig,
    Traits,
    padded_fp8_head_dim,
)
from numflash.kernels.arguments import Descales, QueryDescale, Squares
from numflash.problem.options import ARRAY_OPTIONS, AttentionOptions
from numflash.problem.problem import AttentionProblem, Tensor
from numflash.problem.tensor_maps import TensorLayout
from numflash.runtime.arrays import ArrayLibrary
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.views import ArrayView, Operand
from numflash.selection.choice import forward_choice
from numflash.selection.geometry import Geometry
from numflash.selection.rules import Choice


class Fp8Forward(Forward):
    """A forward problem on 8-bit floats with its kernels bound to everything but addresses."""

    def __init__(
        self,
        views: dict[str, ArrayView],
        options: AttentionOptions,
        described: AllDescribed = (),
        statistics: bool = False,
    ):
        self.sources = make_sources(views, options, dict(described), statistics)
        like = {name: source.view for name, source in self.sources.items()}
        # The result is of q's type; k and v may have been quantised from others.
        dtype = like["q"].dtype
        if dtype not in SIXTEEN_BITS:
            dtype = result_dtype(like["q"].device)
        like = {name: replace(view, dtype=dtype) for name, view in like.items()}
        rest = {name: views[name] for name in ARRAY_OPTIONS if name in views}
        self._prepare(views, like | rest, options._replace(precision=None))

    def bind(
        self, operands: dict[str, Operand], library: ArrayLibrary
    ) -> tuple[Any, Any, dict[str, Callable[[int], None]]]:
        """As `Forward.bind`; what quantises comes first."""
        out, lse = self._allocate(operands, library)
        codes, launches = self._quantise(operands, library)
        return out, lse, launches | self._launches(codes, library)

    def _quantise(
        self, operands: dict[str, Operand], library: ArrayLibrary
    ) -> tuple[dict[str, Operand], dict[str, Callable[[int], None]]]:
        """The operands with codes and scales in the place of arrays; what makes them, by name."""
        codes, launches = dict(operands), {}
        for source in self.sources.values():
            launches |= source.bind(codes, library)
        return codes, launches

    def _traits(self, problem: AttentionProblem, tensors: dict[str, Tensor]) -> Traits:
        return replace(
            problem.traits(tensors["out"].is_vectorizable),
            head_dim=padded_fp8_head_dim(problem.head_dim),
            head_dim_v=padded_fp8_head_dim(problem.head_dim_v),
            fp8=True,
        )

    def _seen_by_bulk_copies(
        self, problem: AttentionProblem, tensors: dict[str, Tensor]
    ) -> AttentionProblem:
        return seen_by_bulk_copies(problem, self._codes(tensors), transposed_v=True)

    def _tensor_maps(
        self, tensors: dict[str, Tensor], config: Sm90ForwardConfig, geometry: Geometry
    ) -> dict[str, Mapped]:
        codes = self._codes(tensors)
        v = TensorLayout.of_transposed_values(codes["v"])
        return tensor_maps(codes, config, geometry) | {"v_map": Mapped("v", v)}

    def _codes(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the kernel reads and writes; V has tokens innermost."""
        codes = {"out": tensors["out"]}
        for name, source in self.sources.items():
            view = replace(source.data, dtype="uint8")
            codes[name] = Tensor(name, view, view.shape, view.strides)
        return codes

    def _choose(
        self, problem: AttentionProblem, traits: Traits, config
    ) -> tuple[Choice, Geometry]:
        choice, geometry = forward_choice(problem, traits, self.device, config)
        tokens = min(2 ** self.sources[name].tokens_shift for name in "kv")
        if tokens % choice.config.tile_n:
            traits = replace(traits, key_scales=True)
            choice, geometry = forward_choice(problem, traits, self.device, config)
        return choice, geometry

    def _arguments(self, problem: AttentionProblem, tensors: dict[str, Tensor]) -> dict:
        for name, source in self.sources.items():
            self._expect_heads(problem, name, source)
        q, k, v = (self.sources[name] for name in "qkv")
        per_head = q.descale_shape[1] in (1, problem.num_heads_q)
        scales = q.descale()
        of_q = QueryDescale(
            scales.data,
            scales.batch,
            scales.head,
            packed=scales.head if per_head else 0,
            group=1 if per_head else problem.group_size,
            shift=scales.shift,
        )
        return super()._arguments(problem, {"out": tensors["out"]}) | {
            **{name: source.codes() for name, source in self.sources.items()},
            "descales": Descales(of_q, k.descale(), v.descale()),
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

    def __init__(
        self,
        views: dict[str, ArrayView],
        options: AttentionOptions,
        described: AllDescribed = (),
    ):
        if described or any(f"{name}_descale" in views for name in "qkv"):
            raise TypeError('precision="auto" chooses between 8 and 16 bits: q, k and v need 16')
        super().__init__(views, options, statistics=True)
        self.in_16_bits = SelectedForward(views, options._replace(precision=None))
        self.estimate = None
        if self.launchers and 0 not in self.decision_shape:
            self._add_estimate(options.max_rel_error)

    def bind(self, operands, library):
        """As `Forward.bind`; the decision is put into `operands`, "in_fp8" and "estimate"."""
        out, lse = self._allocate(operands, library)
        for name, dtype in (("in_fp8", "int32"), ("estimate", "float32")):
            operands[name] = library.operand(
                library.empty(self.decision_shape, dtype, self.device)
            )
        codes, launches = self._quantise(operands, library)
        if self.estimate is not None:
            launches["estimate"] = self.estimate.bind(codes)
        launches |= self._launches(codes, library)
        others = self.in_16_bits._launches(operands, library)
        return out, lse, launches | {f"{name} in 16 bits": x for name, x in others.items()}

    def _add_estimate(self, max_rel_error: float) -> None:
        config, problem = EstimateConfig(), self.problem
        q = self.sources["q"]
        arguments = arguments_of(problem, {}) | {
            **{
                name: Squares(f"{name}_statistics", source.statistics_tokens)
                for name, source in self.sources.items()
            },
            "in_fp8": "in_fp8",
            "rotated_dims": problem.head_dim if q.rotation is None else q.data.shape[3],
            "max_rel_error": max_rel_error,
        }
        blocks = self.decision_shape[0] * self.decision_shape[1]
        traits = Traits(problem.dtype, FP8_STEP, FP8_STEP)
        self.estimate = Launcher(config, traits, self.device, blocks, arguments)

    def _traits(self, problem, tensors):
        return replace(super()._traits(problem, tensors), selected=True)

    def _arguments(self, problem, tensors):
        return super()._arguments(problem, tensors) | {"in_fp8": "in_fp8"}

    def _choose(self, problem, traits, config):
        return _unsplit(*super()._choose(problem, traits, config))

    @property
    def decision_shape(self) -> tuple[int, int]:
        """(batch, key-value heads)."""
        return self.problem.batch, self.problem.num_heads_kv


class SelectedForward(Forward):
    """A forward in 16 bits of the heads that are not computed in 8."""

    def _traits(self, problem, tensors):
        return replace(super()._traits(problem, tensors), selected=True)

    def _arguments(self, problem, tensors):
        return super()._arguments(problem, tensors) | {"in_fp8": "in_fp8"}

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
