"""`numflash-explain`: the page of a call on a GPU that need not be here, or the course.

numflash-explain --gpu H200 --shape 2,4096,16,128 --dtype bfloat16 --causal --to page.html
numflash-explain --gpu A100 --shape 1,1,32,128 --seqlen-k 65536 --json
numflash-explain --course --to course.html
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import numflash
from numflash.api.explain import Question
from numflash.api.inspect import Parser
from numflash.configs import DTYPES
from numflash.runtime import gpus
from numflash.runtime.commands import command
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.files import require_replaceable

from . import course, write_page
from .asked import COMPILES, ask
from .course.text import as_text
from .page import as_data
from .unread import unread


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = Parser(
        prog="numflash-explain",
        description="What a call of numflash does on a GPU that need not be here: a page, or a "
        "course in ten lessons.",
    )
    call = parser.add_argument_group("the call")
    call.add_argument("--gpu", metavar="NAME", help='as in H200, "RTX 4090" or sm_80')
    call.add_argument("--list-gpus", action="store_true", help="the GPUs known by name")
    call.add_argument(
        "--shape",
        type=_shape,
        metavar="B,S,H,D",
        help="batch, queries, heads and columns of a head, as in 2,4096,16,128",
    )
    call.add_argument("--seqlen-k", type=_count, metavar="N", help="keys; default: as queries")
    call.add_argument("--kv-heads", type=_count, metavar="N", help="heads of K and V; default: H")
    call.add_argument("--head-dim-v", type=_count, metavar="N", help="columns of V; default: D")
    call.add_argument("--dtype", choices=DTYPES, default="float16", help="default: float16")
    call.add_argument("--causal", action="store_true", help="a query sees no later keys")
    call.add_argument(
        "--window", type=int, nargs=2, metavar=("L", "R"), help="keys before and after a query"
    )
    call.add_argument("--softcap", type=float, metavar="X", help="scores are X tanh(score / X)")
    call.add_argument("--precision", choices=("tf32", "fp8", "auto"))
    call.add_argument("--config", metavar="STR", help="of the forward, as numflash-inspect has it")
    course = parser.add_argument_group("the course")
    course.add_argument(
        "--course",
        nargs="*",
        metavar="LESSON",
        help="ten lessons, computed by the kernels in the simulator; or those of these numbers",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--to", type=Path, metavar="FILE", help="the page to write, in HTML")
    output.add_argument("--json", action="store_true", help="print the page's numbers as JSON")
    output.add_argument(
        "--compile",
        choices=COMPILES,
        default="forward",
        help="kernels that may be compiled; others that are not in the cache are described by "
        "formula (default: forward)",
    )
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Run `numflash-explain`; the exit status: 1 where no kernel runs the call."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.list_gpus:
        print("\n".join(gpus.names()))
        return 0
    if args.to is not None:
        try:
            require_replaceable(args.to)
        except OSError as error:
            parser.error(f"--to {args.to}: {error.strerror or error}")
    if args.course is not None and (args.json or args.gpu is not None or args.shape is not None):
        parser.error(
            "--course is of no call: it goes with --to, not with --gpu, --shape and --json"
        )
    if args.course is None and (args.gpu is None or args.shape is None):
        parser.error("--gpu and --shape say what to explain, or --course; see --help")
    try:
        return _explain(args) if args.course is None else _course(args)
    except RuntimeError as error:
        return _failed(error)
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def _explain(args: argparse.Namespace) -> int:
    """Print, or write, the answer."""
    arrays, options = _arrays(args), _options(args)
    try:
        answer = numflash.explain(*arrays.values(), gpu=args.gpu, data=False, **options)
    except UnsupportedError as error:
        refused = Question(arrays, options, args.gpu, False, args.to, refusal=error)
        _write(args, lambda: write_page(refused))
        return _failed(error)
    question = Question(arrays, options, args.gpu, False, args.to, answer)
    _write(args, lambda: write_page(question, args.compile))
    if args.json:
        print(json.dumps(as_data(ask(question, args.compile)), indent=1))
    elif args.to is not None:
        print(args.to)
    else:
        print(answer)
    return 0


def _write(args: argparse.Namespace, write: Callable[[], None]) -> None:
    """Write the page, if one was asked for; end with 1 where it cannot be written."""
    if args.to is None:
        return
    try:
        write()
    except OSError as error:
        sys.exit(_failed(f"{args.to}: {error.strerror or error}"))


def _failed(reason: object) -> int:
    """Say why nothing came of it; the exit status."""
    print(f"numflash-explain: error: {reason}", file=sys.stderr)
    return 1


def _course(args: argparse.Namespace) -> int:
    """Compute lessons, and write or print them; 1 where one of their checks does not hold.

    Raises:
        ValueError: there is no such lesson.
    """
    lessons = course.run(course.numbers_of(args.course))
    if args.to is not None:
        _write(args, lambda: course.write(args.to, lessons))
        print(args.to)
    else:
        print("\n\n".join(map(as_text, lessons)))
    return 0 if all(check.holds for each in lessons for check in each.checks) else 1


def _arrays(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """q, k and v of the shapes that were asked for; nobody reads or writes their elements."""
    batch, seqlen_q, heads, head_dim = args.shape
    seqlen_k = seqlen_q if args.seqlen_k is None else args.seqlen_k
    kv_heads = heads if args.kv_heads is None else args.kv_heads
    head_dim_v = head_dim if args.head_dim_v is None else args.head_dim_v
    shapes = {
        "q": (batch, seqlen_q, heads, head_dim),
        "k": (batch, seqlen_k, kv_heads, head_dim),
        "v": (batch, seqlen_k, kv_heads, head_dim_v),
    }
    return {name: unread(shape, args.dtype) for name, shape in shapes.items()}


def _options(args: argparse.Namespace) -> dict[str, object]:
    """The options of `numflash.attention` that were given."""
    given = {
        "causal": args.causal or None,
        "window_size": None if args.window is None else tuple(args.window),
        "softcap": args.softcap,
        "precision": args.precision,
        "config": args.config,
    }
    return {name: value for name, value in given.items() if value is not None}


def _shape(text: str) -> tuple[int, ...]:
    """Four sizes. Raises ArgumentTypeError."""
    parts = text.split(",")
    if len(parts) != 4:
        raise argparse.ArgumentTypeError(
            f"must be batch,queries,heads,head_dim, as in 2,4096,16,128, got {text!r}"
        )
    return tuple(map(_count, parts))


def _count(text: str) -> int:
    """A size, at least 0. Raises ArgumentTypeError."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be a number from 0 up, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
