"""`numflash.check`: attention on the caller's arrays, compared with float64 (`api.comparison`)."""

from dataclasses import dataclass, replace

import numpy as np

from numflash import reference
from numflash.api import attention as api
from numflash.api.block_masks import own
from numflash.api.comparison import (
    EPSILON,
    OF_ARRAYS,
    CheckReport,
    compare,
    compare_each,
    gradients_by_name,
    measure,
    remainder_of_codes,
)
from numflash.api.explain import explain_dispatch
from numflash.api.varlen import attention_varlen, attention_varlen_backward
from numflash.calls.fp8_options import has_fp8, refuse_backward
from numflash.calls.ready import bind_forward
from numflash.problem.fp8 import Fp8Array, Fp8Recipe
from numflash.problem.options import (
    ARRAY_OPTIONS,
    OPTIONS,
    PACKED,
    AttentionOptions,
    GradientOptions,
    with_layout,
)
from numflash.reference.arrays import heads_first
from numflash.reference.varlen import has_lengths
from numflash.runtime.arrays import library_of, stream_address, to_numpy
from numflash.selection.choice import split_configs

_OF_FORWARD = ("out", *(option.name for option in OPTIONS if not option.in_backward))


def check(q, k, v, *, dout=None, **options) -> CheckReport:
    """Run attention on these arrays and compare it with float64.

    Args:
        q, k, v: as for `numflash.attention`.
        dout: gradient of the output; with it the gradients are checked as well.
        options: the options of `numflash.attention`, and those of `numflash.attention_backward`:
            dlse, delta, wrt and grad_dtype. `config` may be a dictionary that also names configs
            for the backward, by family. With cu_seqlens_q and cu_seqlens_k those of
            `numflash.attention_varlen`. With page_table, int32 (batch, pages of a sequence), k and
            v are the pages of a cache, and seqlens_k says how many keys there are.

    On 8-bit floats the exact result is that of the arrays before they are quantised; of an
    `Fp8Array`, and of codes with scales, that of the numbers they stand for.

    Returns:
        The errors of out and lse, and with dout of the gradients.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention`.

    The comparison runs in NumPy on the host and holds the whole score matrix.

    Example:
        >>> import numpy as np, numflash
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16)).astype("float16")
        >>> report = numflash.check(q, k, v, dout=v, causal=True)
        >>> all(error.error <= error.budget for error in report.errors)
        True
    """
    stream = options.pop("stream", None)
    if stream is not None:
        # Results are copied to the host on the current stream, which this one becomes.
        first = q.data if isinstance(q, Fp8Array) else q
        library = library_of(first, "q")
        device = library.view(first, "q").device
        with library.ordered_on(stream_address(stream), device):
            return check(q, k, v, dout=dout, **options)
    for name in ("return_lse", "return_decision"):
        options.pop(name, None)
    given = {"q": q, "k": k, "v": v}
    descales = {name: options.get(f"{name}_descale") for name in given}
    is_fp8 = options.get("precision") in ("fp8", "auto") or any(
        x is not None for x in descales.values()
    )
    if is_fp8 or has_fp8(q, k, v):
        if dout is not None:
            refuse_backward(q, k, v, options.get("precision") or "fp8")
        return _check_fp8(given, descales, options)
    of_backward = {name: options.pop(name) for name in GradientOptions._fields if name in options}
    forward_configs, backward_configs = split_configs(options.pop("config", None))
    forward, backward, of_call = api.attention, api.attention_backward, options
    if with_layout(options).get("layout") == PACKED:
        options = with_layout(options)
        forward, backward = attention_varlen, attention_varlen_backward
        of_call = {name: option for name, option in options.items() if name != "layout"}
    elif options.get("page_table") is not None:
        if dout is not None:
            raise ValueError("a cache in pages has no gradients: check it without dout")
        forward = _of_pages
    out, lse = forward(q, k, v, return_lse=True, config=forward_configs, **of_call)
    got = {"out": out, "lse": lse}
    if dout is not None:
        backward_options = {n: o for n, o in of_call.items() if n not in _OF_FORWARD}
        gradients = backward(
            dout, q, k, v, out, lse, config=backward_configs, **backward_options, **of_backward
        )
        got |= zip(gradients_by_name(options | of_backward), gradients, strict=True)

    host = {name: to_numpy(array) for name, array in given.items()}
    host_options = _on_host(options, q, k)
    precision = host_options.pop("precision", None) or library_of(q, "q").view(q, "q").dtype
    # The gradient of an array that scores read has the array's dtype.
    dtypes = {
        name: library_of(array, name).view(array, name).dtype
        for name, array in got.items()
        if OF_ARRAYS.fullmatch(name)
    }
    table = host_options.pop("page_table", None)
    if table is not None:
        host |= {name: _gathered(host[name], table) for name in "kv"}
    compared = compare_each if has_lengths(options) else compare
    return compared(
        {name: to_numpy(array) for name, array in got.items()},
        *host.values(),
        precision=precision,
        dtypes=dtypes,
        dout=None if dout is None else to_numpy(dout),
        **host_options,
        # delta is computed, whatever the caller has.
        **_on_host({n: x for n, x in of_backward.items() if n != "delta"}, q, k),
    )


def _of_pages(q, k, v, *, return_lse: bool, config, **options) -> tuple:
    """(out, lse) of a call whose k and v are the pages of a cache."""
    asked = AttentionOptions.of("check", {**options, "config": config})
    bound = bind_forward(q, k, v, None, asked, None)
    return bound.launch(bound.stream)[:2]


def _gathered(pages: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The rows of each sequence, (batch, rows, heads, head_dim); zeros where a page is missing."""
    is_there = (table >= 0) & (table < len(pages))
    rows = pages[np.where(is_there, table, 0)]
    rows = np.where(is_there[:, :, None, None, None], rows, rows.dtype.type(0))
    return rows.reshape(len(table), -1, *pages.shape[2:])


def _on_host(options: dict, q, k) -> dict:
    """The options that decide the result, with arrays in NumPy; a block mask as a mask."""
    options = {name: option for name, option in options.items() if name != "out"}
    arrays = *ARRAY_OPTIONS, "dlse"
    given = [name for name in arrays if options.get(name) is not None]
    options |= {name: to_numpy(options[name]) for name in given}
    if "aux" in options:
        given = options["aux"]
        options["aux"] = tuple(to_numpy(x) if hasattr(x, "shape") else x for x in given)
    blocks = options.pop("block_mask", None)
    if blocks is not None:
        layout, mask = options.get("layout", "bshd"), options.get("mask")
        kept = own(blocks).dense(_seqlen(q, layout), _seqlen(k, layout))
        options["mask"] = kept if mask is None else kept & mask
    return options


def _seqlen(x, layout: str) -> int:
    return x.shape[-2 if layout == "bhsd" or len(x.shape) == 2 else -3]


def _check_fp8(given: dict, descales: dict, options: dict) -> CheckReport:
    """A forward on 8-bit floats; everything is brought into (batch, heads, seqlen, head_dim)."""
    out, lse = api.attention(*given.values(), return_lse=True, **options)
    dtype = library_of(out, "out").view(out, "out").dtype
    asked = {name: option for name, option in options.items() if name != "out"}
    config = explain_dispatch(*given.values(), **asked).forward.config
    of_call = _on_host(options, given["q"], given["k"])
    for name in ("precision", "max_rel_error", "config", *(f"{name}_descale" for name in given)):
        of_call.pop(name, None)
    bhsd = of_call.pop("layout", "bshd") == "bhsd"
    recipe = _recipe(given, descales, of_call.pop("fp8", None))
    read = {name: _read(name, x, descales[name], recipe, bhsd) for name, x in given.items()}
    q, k, v = (each.numbers for each in read.values())
    if of_call.get("softmax_scale") is None:
        of_call["softmax_scale"] = q.shape[-1] ** -0.5
    exact = reference.attention(q, k, v, layout="bhsd", **of_call)
    specified = reference.attention_of_codes(
        *(each.codes for each in read.values()),
        *(each.descale for each in read.values()),
        blocks=tuple(each.block for each in read.values()),
        tile_n=config.tile_n,
        layout="bhsd",
        **of_call,
    )
    epsilon = EPSILON[dtype]
    got_lse = to_numpy(lse).reshape(exact[1].shape)
    return CheckReport(
        (
            measure(
                "out",
                heads_first(to_numpy(out), bhsd),
                exact[0],
                specified[0][..., : v.shape[-1]],
                epsilon,
                remainder_of_codes(*exact),
            ),
            measure("lse", got_lse, exact[1], specified[1], epsilon),
        )
    )


def _recipe(given: dict, descales: dict, recipe: Fp8Recipe | None) -> Fp8Recipe:
    """The recipe by which `attention` quantises arrays that are not in 8 bits yet."""
    arrays = [given[name].recipe for name in "qk" if isinstance(given[name], Fp8Array)]
    if any(x is not None for x in descales.values()):
        return replace(recipe or Fp8Recipe(), hadamard=False)
    if recipe is None and arrays:
        return replace(Fp8Recipe(), hadamard=arrays[0].hadamard, seed=arrays[0].seed)
    return recipe or Fp8Recipe()


@dataclass(frozen=True)
class _Read:
    """One of q, k and v, (batch, heads, seqlen, head_dim): codes, and the numbers to be exact on.

    The numbers are those of the array before it is quantised, or those that its codes stand for.
    """

    numbers: np.ndarray
    codes: np.ndarray
    descale: np.ndarray
    block: int


def _read(name: str, x, descale, recipe: Fp8Recipe, bhsd: bool) -> _Read:
    if not isinstance(x, Fp8Array) and descale is None:
        numbers, turned = heads_first(to_numpy(x), bhsd), recipe.hadamard and name != "v"
        codes, descale = reference.quantize_fp8(
            numbers, recipe.granularity, recipe.block, turned, recipe.seed, layout="bhsd"
        )
        return _Read(numbers, codes, descale, _tokens_per_scale(recipe))
    if isinstance(x, Fp8Array):
        recipe, descale, head_dim = x.recipe, to_numpy(x.descale), x.shape[-1]
        codes = to_numpy(x.data)
        if x.transposed:
            seqlen = x.shape[-2 if x.layout == "bhsd" or len(x.shape) == 2 else -3]
            codes = reference.tokens_outermost(codes, seqlen)
        codes = codes.swapaxes(1, 2)
    else:
        codes = heads_first(to_numpy(x).view(np.uint8), bhsd)
        recipe, descale = Fp8Recipe("head", hadamard=False), to_numpy(descale)[..., None]
        head_dim = codes.shape[-1]
        if descale.shape[1] != 1:
            # Query heads share the scale of their group.
            descale = np.repeat(descale, codes.shape[1] // descale.shape[1], axis=1)
    block = _tokens_per_scale(recipe)
    turned = recipe.hadamard, recipe.seed
    numbers = reference.dequantize_fp8(codes, descale, head_dim, block, *turned, layout="bhsd")
    return _Read(numbers, codes, descale, block)


def _tokens_per_scale(recipe: Fp8Recipe) -> int:
    return 1 if recipe.granularity == "token" else recipe.block
