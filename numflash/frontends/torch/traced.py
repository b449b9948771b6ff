"""Calls where something traces: `torch.compile`, fake tensors, `make_fx`, export, `torch.func`.

A graph outlives the call. It holds one operator, whose options are tensors and a text. The text is
made once, while the graph is traced: by numflash, which calls functions of users with its own
symbols. Dynamo takes what `_text` returns for a constant, and traces the rest of this module; it
guards the numbers that a function sees in its closure and its globals.

Importing this module does not import Dynamo, which takes as long as PyTorch itself. What Dynamo is
to know of a function stands at the function, or is told when it traces.
"""

import types
from collections.abc import Callable

import torch
from torch import Tensor

from numflash.frontends.encoding import BY_THEMSELVES, FUNCTIONS, encode, names_of
from numflash.frontends.torch import mapped, operators
from numflash.functions.written import WrittenFunction
from numflash.problem.block_masks import Blocks, ListedBlocks
from numflash.problem.options import AttentionOptions
from numflash.runtime.errors import UnsupportedError

# Private names of PyTorch: where one is missing all calls go through the operator.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_transforms = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_is_compiling = torch.compiler.is_compiling
_is_jit_tracing = torch._C._is_tracing
_PLAIN = (Tensor, torch.nn.Parameter)
_FUNCTIONS = tuple(FUNCTIONS)
_LISTS = ("entries", "counts", "entries_of_keys", "counts_of_keys")


def constant(function: Callable) -> Callable:
    """A decorator: Dynamo calls the function while it traces, and takes the result as it is.

    As `torch._dynamo.assume_constant_result`.
    """
    function._dynamo_marked_constant = True
    return function


def under_transforms() -> bool:
    """Whether a transform of `torch.func` is active."""
    return _transforms()


def is_traced(q, k, v) -> bool:
    """Whether a call belongs into a graph, or its tensors stand for others."""
    return (
        _is_compiling()
        or _dispatch_modes()
        or _transforms()
        or _is_jit_tracing()
        or not (type(q) is type(k) is type(v) is Tensor or _are_plain(q, k, v))
        or getattr(q, "is_meta", False)
    )


def _are_plain(*operands) -> bool:
    """Whether none is of a class that stands for tensors, as fakes and distributed ones."""
    return all(type(x) in _PLAIN or not isinstance(x, Tensor) for x in operands)


def call(function: str, q, k, v, options: dict) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call by the operator.

    Args:
        function: that was called, for messages.
        q, k, v: of the call.
        options: that the caller gave, by name.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise UnsupportedError(f"{name} must be a tensor where PyTorch traces, got {type(x)}")
    tensors, text = tensors_and_text(function, options)
    if _transforms():
        if _is_compiling():
            _allow_mapped()
        return _mapped(q, k, v, text, *tensors)
    return operators.ATTENTION(q, k, v, tensors, text)


def tensors_and_text(function: str, options: dict) -> tuple[list[Tensor], str]:
    """The options of a call, as an operator takes them.

    Args:
        function: that was called, for messages.
        options: that the caller gave, by name.
    """
    arrays, said = _apart(options)
    mask = options.get("block_mask")
    blocks, of_blocks, functions = None, (), [options.get(name) for name in _FUNCTIONS]
    aux = _aux(options.get("aux"), "aux", arrays)
    if mask is not None:
        blocks, of_blocks = _blocks(mask, arrays), _aux(mask.aux, "block_aux", arrays)
        functions.append(mask.mask_mod)
    constants = tuple([_function(each) for each in functions])
    more = options.get("fp8"), options.get("config"), tuple([_sees(x, 0) for x in functions])
    text = _text(function, said, blocks, aux, of_blocks, constants, *more)
    if text == "":
        # A function looked at the sizes of tensors of aux: they are constants of the graph.
        aux = _with_sizes(aux, "aux", arrays)
        of_blocks = _with_sizes(of_blocks, "block_aux", arrays)
        text = _text(function, said, blocks, aux, of_blocks, constants, *more)
    names = _names(text).split()
    for name in names:
        if name not in arrays:
            raise TypeError(f"{name} must be a tensor")
    return [arrays[name] for name in names], text


@constant
def _allow_mapped() -> None:
    """Tell Dynamo, which is tracing, that a graph may hold `_mapped` as it is."""
    torch._dynamo.allow_in_graph(_mapped)


def _mapped(q, k, v, text: str, *tensors):
    return mapped.Attention.apply(q, k, v, text, *tensors)


def _apart(options: dict) -> tuple[dict[str, Tensor], tuple]:
    """Tensors by name, and of the other options (name, whether a tensor, value)."""
    arrays, said = {}, []
    for name, x in options.items():
        if name in BY_THEMSELVES or x is None:
            continue
        if isinstance(x, Tensor):
            arrays[name] = x
            said.append((name, True, None))
        else:
            said.append((name, False, _fixed(x)))
    return arrays, tuple(said)


def _fixed(x):
    """A value as a constant of the graph, which is guarded."""
    if isinstance(x, (tuple, list)):
        return tuple([_fixed(each) for each in x])
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return as_constant(x)
    return x


def as_constant(x):
    """A number, or a size that is a symbol, as a constant of the graph, which is guarded."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return guard_scalar(x)


def _function(function):
    """A function as a constant; one that is a text as this."""
    if isinstance(function, WrittenFunction):
        return (function.text, function.result)
    return function


def _sees(function, depth: int) -> tuple:
    """The numbers and words that a function sees outside of itself, and those that it calls."""
    if not isinstance(function, types.FunctionType) or depth > 4 or not _is_of_user(function):
        return ()
    try:
        cells, scope = function.__closure__, function.__globals__
    except AttributeError:
        return ()  # made inside of the graph: Dynamo knows its closure
    found = []
    if cells is not None:
        for cell in cells:
            found.append(_seen(cell.cell_contents, depth))
    # Dynamo would guard the number of all globals if it were to look for names among them.
    for name in _globals_of(function).split():
        found.append(_seen(scope[name], depth))
    return tuple(found)


@constant
def _is_of_user(function) -> bool:
    return (function.__module__ or "").partition(".")[0] not in ("numflash", "numpy", "torch")


@constant
def _globals_of(function) -> str:
    """The globals that a function names, without modules and classes."""
    kinds = bool, int, float, str, tuple, list, types.FunctionType
    scope, code = function.__globals__, function.__code__
    return " ".join(n for n in code.co_names if isinstance(scope.get(n), kinds))


def _seen(x, depth: int):
    if isinstance(x, (bool, int, float, str, tuple, list)):
        return _guarded(x)
    return _sees(x, depth + 1)


def _guarded(x):
    if isinstance(x, (tuple, list)):
        return tuple([_guarded(each) for each in x])
    if isinstance(x, (bool, str)):
        return x
    return as_constant(x) if isinstance(x, (int, float)) else None


def _aux(aux, name: str, arrays: dict[str, Tensor]) -> tuple:
    """Numbers as they are, and of tensors (dtype, rank, whether the last axis is contiguous)."""
    found = []
    for n, x in enumerate(aux or ()):
        if isinstance(x, Tensor):
            arrays[f"{name}{n}"] = x
            is_unit = x.dim() > 0 and (x.stride(-1) == 1 or x.shape[-1] == 1)
            found.append((str(x.dtype).removeprefix("torch."), x.dim(), bool(is_unit), None))
        else:
            found.append(_fixed(x))
    return tuple(found)


def _with_sizes(aux: tuple, name: str, arrays: dict[str, Tensor]) -> tuple:
    found = []
    for n, x in enumerate(aux):
        if isinstance(x, tuple):
            sizes = _fixed(tuple(arrays[f"{name}{n}"].shape))
            found.append((*x[:3], sizes))
        else:
            found.append(x)
    return tuple(found)


def _blocks(mask, arrays: dict[str, Tensor]) -> tuple:
    if not isinstance(mask, ListedBlocks):
        raise UnsupportedError(
            "block_mask must be a numflash.BlockMask where PyTorch traces: make it outside of "
            "what is compiled, by numflash.BlockMask.from_flex_attention"
        )
    for name in _LISTS:
        arrays["block_" + name] = getattr(mask, name)
    size, rows, columns, batch, heads = mask.blocks
    blocks = tuple(size), rows, columns, batch, heads
    return (
        _fixed(blocks),
        None if mask.seqlens is None else _fixed(mask.seqlens),
        mask.is_of_function,
    )


class _LookedAtSizesError(Exception):
    """A function asked for the size of a tensor, which the graph does not fix."""


def _looked(self, *_):
    raise _LookedAtSizesError


class _AnySize:
    """The size of an axis that may be of any size."""

    __hash__ = object.__hash__
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _looked
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = __abs__ = _looked
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __truediv__ = __rtruediv__ = _looked
    __int__ = __index__ = __float__ = __bool__ = __str__ = __repr__ = __array__ = _looked


class _NotOne(_AnySize):
    """Of the last axis of a tensor whose elements are apart: it is not 1."""

    __hash__ = object.__hash__

    def __eq__(self, other):
        return False if other == 1 else _looked(self)


_ANY, _NOT_ONE = _AnySize(), _NotOne()


class _Standing:
    """What stands for a tensor of the call, with the metadata that tracing looks at."""

    def __init__(self, dtype="", rank=0, is_unit=False, sizes=None):
        self.dtype = dtype
        self.shape = (
            sizes if sizes is not None else (_ANY,) * (rank - 1) + (_NOT_ONE,) * (rank > 0)
        )
        self.strides = (2,) * (rank - 1) + (1 if is_unit else 2,) * (rank > 0)


def _standing(aux: tuple) -> tuple:
    return tuple(_Standing(*x) if isinstance(x, tuple) else x for x in aux)


@constant
def _text(function, said, blocks, aux, of_blocks, functions, fp8, config, seen) -> str:
    """The options' text; "" if a function looked at sizes. `seen` is there to be guarded."""
    given = {name: _Standing() if is_tensor else x for name, is_tensor, x in said}
    given |= {"fp8": fp8, "config": config, "aux": _standing(aux)}
    functions = [WrittenFunction(*f) if isinstance(f, tuple) else f for f in functions]
    given |= zip(_FUNCTIONS, functions, strict=False)
    if blocks is not None:
        (size, *rest), seqlens, is_of_function = blocks
        lists = (_Standing() for _ in _LISTS)
        own = functions[-1], _standing(of_blocks), is_of_function
        given["block_mask"] = ListedBlocks(Blocks(tuple(size), *rest), seqlens, *lists, *own)
    try:
        return encode(AttentionOptions.of(function, given), lambda x, name: x).text
    except _LookedAtSizesError:
        return ""


@constant
def _names(text: str) -> str:
    return " ".join(names_of(text))


def gradients(dout, q, k, v, out, lse, dlse, options: AttentionOptions, wrt) -> list[Tensor]:
    """The gradients of a call in eager mode, by the operator."""
    tensors, text = tensors_and_text("attention", options._asdict())
    return operators.BACKWARD(dout, q, k, v, out, lse, dlse, tensors, text, " ".join(wrt))
