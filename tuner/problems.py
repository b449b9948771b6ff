"""The classes of problems that a command line asks the tuner for."""

import argparse
import itertools
from dataclasses import replace

from numflash.calls.fp8_forward import fp8_traits_of
from numflash.configs import MAX_HEAD_DIM, Traits
from numflash.configs.features import FEATURES
from numflash.problem.classes import ProblemClass
from numflash.problem.options import PACKED, AttentionOptions
from numflash.problem.problem import AttentionProblem, describe
from numflash.runtime.views import ArrayView, contiguous_strides
from numflash.selection.capture import read as read_capture

FAMILIES = {
    "forward": ("forward", "combine"),
    "backward": ("backward-dkdv", "backward-dq", "backward"),
}


def problems_of(args: argparse.Namespace) -> list[ProblemClass]:
    """The classes to tune. Raises ValueError, OSError."""
    passes = args.passes or list(FAMILIES)
    if args.page_size is not None:
        _expect_forward(args)
        passes = ["forward"]
    families = [family for name in passes for family in FAMILIES[name]]
    if args.from_capture is not None:
        try:
            found = read_capture(args.from_capture)
        except UnicodeDecodeError as error:
            raise ValueError(f"{args.from_capture} is no capture: {error}") from error
        chosen = [problem for problem in found if problem.family in families]
        if not chosen:
            raise ValueError(f"{args.from_capture} holds no class of {', '.join(passes)}")
        return chosen
    if args.precision == "fp8":
        families = ["forward"]
        _expect_fp8(args)
    elif args.key_scales:
        raise ValueError("--key-scales goes with --precision fp8")
    if args.precision == "tf32" and args.dtype != ["float32"]:
        given = " ".join(args.dtype)
        raise ValueError(f"--precision tf32 goes with --dtype float32, got --dtype {given}")
    problems = []
    for dtype, head_dim, seqlen, mask in itertools.product(
        args.dtype, args.head_dim, args.seqlen, args.mask
    ):
        problem = _problem(args, dtype, head_dim, seqlen, mask)
        # Rows are 16-byte aligned where head dims allow it.
        vector = 4 if dtype == "float32" else 8
        aligned = problem.head_dim % vector == 0 and problem.head_dim_v % vector == 0
        traits = problem.traits(vectorized=aligned)
        if args.precision == "fp8":
            aligned = problem.head_dim_v % vector == 0
            traits = replace(fp8_traits_of(problem, aligned), key_scales=args.key_scales)
        problems += [_class_of(family, problem, traits) for family in families]
    return list(dict.fromkeys(problems))


def _expect_forward(args: argparse.Namespace) -> None:
    """Check what goes with --page-size. Raises ValueError."""
    expect_positive("--page-size", args.page_size)
    if args.passes and args.passes != ["forward"]:
        raise ValueError("--page-size goes with --pass forward: a cache has no gradients")
    if args.varlen:
        raise ValueError(
            "--page-size goes without --varlen: sequences in pages have lengths anyway"
        )


def _expect_fp8(args: argparse.Namespace) -> None:
    """Check what goes with --precision fp8. Raises ValueError."""
    if "float32" in args.dtype:
        raise ValueError(
            "--precision fp8 goes with --dtype float16 and bfloat16, that of q, k and v before "
            f"they are quantised, got --dtype {' '.join(args.dtype)}"
        )
    if args.passes and args.passes != ["forward"]:
        raise ValueError(
            "--precision fp8 goes with --pass forward: there are no gradients on 8-bit floats"
        )
    others = [row.name for row in FEATURES if not row.in_8_bits and getattr(args, row.name)]
    others += [name for name in ("varlen", "page_size") if getattr(args, name)]
    if others:
        option = others[0].replace("_", "-")
        raise ValueError(f"--{option} goes with 16 and 32 bits, not with --precision fp8")


def _class_of(family: str, problem: AttentionProblem, traits: Traits) -> ProblemClass:
    """The class of a kernel of a problem; what combines parts reads no pages."""
    traits = replace(traits, paged=False) if family == "combine" else traits
    return ProblemClass.of(family, problem, traits)


def _problem(
    args: argparse.Namespace, dtype: str, head_dim: int, seqlen: int, mask: str
) -> AttentionProblem:
    """The problem of one combination of options. Raises TypeError, ValueError."""
    seqlen_q = seqlen if args.seqlen_q is None else args.seqlen_q
    heads_kv = args.heads if args.heads_kv is None else args.heads_kv
    head_dim_v = head_dim if args.head_dim_v is None else args.head_dim_v
    sizes = {"seqlen": seqlen, "seqlen-q": seqlen_q, "batch": args.batch, "heads": args.heads}
    for name, size in sizes.items():
        expect_positive(f"--{name}", size)
    if heads_kv < 1 or args.heads % heads_kv:
        raise ValueError(f"--heads-kv must divide --heads, {args.heads}, got {heads_kv}")
    for option, value in (("--head-dim", head_dim), ("--head-dim-v", head_dim_v)):
        if not 1 <= value <= MAX_HEAD_DIM:
            raise ValueError(f"{option} must be 1 to {MAX_HEAD_DIM}, got {value}")

    def view(*shape: int, dtype: str = dtype) -> ArrayView:
        return ArrayView(0, shape, contiguous_strides(shape), dtype, 0)

    of_q, of_k, more = (args.batch, seqlen_q), (args.batch, seqlen), {}
    # Of 8-bit floats only traits tell; the problem is that of 16 bits.
    precision = None if args.precision == "fp8" else args.precision
    options = AttentionOptions(precision=precision, **_mask_options(mask))
    if args.varlen:
        of_q, of_k = (args.batch * seqlen_q,), (args.batch * seqlen,)
        ends = view(args.batch + 1, dtype="int32")
        more = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        options = options._replace(layout=PACKED)
    elif args.page_size is not None:
        width = max(1, seqlen // args.page_size)
        of_k = args.batch * width, args.page_size
        more = {"page_table": view(args.batch, width, dtype="int32")}
        more |= {"seqlens_k": view(args.batch, dtype="int32")}
    views = {
        "q": view(*of_q, args.heads, head_dim),
        "k": view(*of_k, heads_kv, head_dim),
        "v": view(*of_k, heads_kv, head_dim_v),
        **more,
    }
    for row in FEATURES:
        value = row.example(args.heads)
        if getattr(args, row.name) and row.is_array:
            views[row.option] = view(*value.shape, dtype="float32")
        elif getattr(args, row.name):
            options = options._replace(**{row.option: value})
    return describe(views, options)[0]


def _mask_options(text: str) -> dict:
    """The options of `attention` for a mask, as in "causal" or "window1024"."""
    if text in ("full", "causal"):
        return {"causal": text == "causal"}
    width = text.removeprefix("window")
    if text.startswith("window") and width.isdecimal() and int(width) > 0:
        left = (int(width) - 1) // 2
        return {"window_size": (left, int(width) - 1 - left)}
    raise ValueError(f"--mask must be full, causal or windowN, as in window1024, got {text!r}")


def expect_positive(option: str, value):
    """The value of an option. Raises ValueError unless it is a positive number, or None."""
    if value is not None and not 0 < value < float("inf"):
        raise ValueError(f"{option} must be positive, got {value}")
    return value
