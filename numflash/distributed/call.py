"""A call over several ranks: checked, agreed on, and bound to the method that computes it."""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import repeat
from numbers import Integral
from typing import Any, NamedTuple, NoReturn

from numflash.api.block_masks import own
from numflash.calls.ready import remembered
from numflash.distributed import gather, heads, positions, ring, whole
from numflash.distributed.agreement import (
    FUNCTIONS,
    NoKeyError,
    Shard,
    agree,
    key_of_item,
    recalled,
)
from numflash.distributed.arrays import Arrays
from numflash.distributed.communicators import Communicator
from numflash.distributed.communicators.alone import Alone
from numflash.distributed.communicators.grid import Grid
from numflash.distributed.layouts import Layout
from numflash.distributed.local_calls import BY_POSITION, LocalCalls, is_given
from numflash.distributed.memory import best_method
from numflash.distributed.pairs import Band
from numflash.distributed.problem import Method, Problem, sizes_of
from numflash.distributed.sizes import expect_heads
from numflash.distributed.wire import (
    WHY_NOT_AUTO,
    WHY_NOT_FP8,
    expect_layout_for,
    expect_method_of_codes,
    expect_precision,
    recipe_of,
)
from numflash.problem.options import (
    ARRAY_OPTIONS,
    OPTIONS,
    AttentionOptions,
    GradientOptions,
    expect_one_of,
    kind_of,
)
from numflash.runtime.arrays import library_of
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.views import ArrayView
from numflash.selection.choice import split_configs
from numflash.selection.store import generation

_MODULES = {"gather": gather, "ring": ring, "heads": heads}
METHODS = ("auto", *_MODULES)
ACROSS = ("gather", "ring")
_OF_LAYOUT = ("causal_align", "shift", "origin")
_LENGTHS = "the layout says how long documents are, and who holds which tokens of them"
_REFUSED = {
    **dict.fromkeys(("seqlens_q", "seqlens_k", "starts_q", "starts_k"), _LENGTHS),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), _LENGTHS),
    "fp8": WHY_NOT_FP8,
    "max_rel_error": f'it is for precision="auto": {WHY_NOT_AUTO}',
    "batch_invariant": "each rank has calls of its own, in other batches than one GPU",
}
_ELSEWHERE = ("layout", "schedule", "page_table", "appended", "cached", "num_splits", "out_dtype")
_TAKEN = tuple(x.name for x in OPTIONS if x.name not in (*_REFUSED, *_OF_LAYOUT, *_ELSEWHERE))
_PLAIN = frozenset((*_TAKEN, "out_dtype"))
"""Options that need no look before `problem.describe` checks them."""


class Checked(NamedTuple):
    """A call that is checked.

    Attributes:
        names: of its methods: that of all ranks; or "heads", and that across groups.
        config: that forwards run, if the caller names none; None if each call has its own.
        wrt: of a backward, what it returns gradients of.
    """

    names: tuple[str, ...]
    config: str | None
    wrt: tuple[str, ...] = ()


class Ready(NamedTuple):
    """A call that is checked and agreed on, and what equal calls have in common.

    Attributes:
        method: the module that computes it.
        wrt: of a backward, what it returns gradients of.
        of_backward: what only the backward of its method takes.
    """

    method: Method
    wrt: tuple[str, ...]
    of_backward: dict[str, str]
    common: Problem
    varying: tuple[str, ...]

    def problem(self, options: dict[str, Any]) -> Problem:
        """The problem of this rank, with the options of a call."""
        if not self.varying:
            return self.common
        return self.common.with_options({name: options[name] for name in self.varying})


@dataclass
class RankedCall:
    """What a caller asks for, besides operands."""

    function: str
    layout: Any
    comm: Any
    method: Any
    wire: Any
    max_workspace: Any
    options: dict[str, Any]
    asked: GradientOptions | None = None
    travels: str = "auto"
    comms: tuple[Communicator, ...] = field(init=False)

    def __post_init__(self):
        self.comms = _comms(self.comm)
        if self.options.get("block_mask") is not None:
            self.options["block_mask"] = own(self.options["block_mask"])

    def agreed(self, operands: dict[str, Any]) -> Ready:
        """The call checked, once all ranks ask for the same. Raises as `attention`."""
        key = self._key(operands)
        ready = recalled(self.comms, key)
        if ready is None:
            call = f"numflash.distributed.{self.function}"
            items = self._items(operands)
            ready = agree(self.comms, call, items, lambda: self._ready(operands, key), key)
        return ready

    def _items(self, operands: dict[str, Any]) -> dict[str, Any]:
        """What the ranks must share."""
        items = {
            name: Shard(x, _axis_of_tokens(name, x)) for name, x in operands.items()
        } | self.options
        items |= {"layout": self.layout, "method": self.method, "wire": self.wire}
        items["max_workspace"] = self.max_workspace
        if self.asked is not None:
            items |= {"wrt": self.asked.wrt, "grad_dtype": self.asked.grad_dtype}
            items["travels"] = self.travels
        return items

    def _key(self, operands: dict[str, Any]) -> tuple | None:
        """Of all that the checks, and what the ranks must share, depend on.

        None: nobody can tell whether all is as it was before.
        """
        asked, parts = self.asked, [RankedCall, generation(), self.function, self.layout]
        try:
            for name, array in operands.items():
                parts += name, _glance(array)
            for name, value in self.options.items():
                of_array = _glance if name in _VARYING else _no_key
                parts += name, key_of_item(name, value, of_array)
            if asked is not None:
                parts += asked.grad_dtype, self.travels, key_of_item("wrt", asked.wrt, _no_key)
            for name in ("method", "wire", "max_workspace"):
                parts.append(key_of_item(name, getattr(self, name), _no_key))
        except (NoKeyError, TypeError):
            return None
        return tuple(parts)

    def _ready(self, operands: dict[str, Any], key: tuple | None) -> Ready:
        """Raises as `attention`."""
        checked = self._checked(operands, key)
        varying = tuple(name for name in _VARYING if self.options.get(name) is not None)
        q = with_batch({"q": operands["q"]})["q"]
        of_backward = {"travels": self.travels} if checked.names == ("ring",) else {}
        common = self._problem(checked, q, varying)
        return Ready(_MODULES[checked.names[0]], checked.wrt, of_backward, common, varying)

    def _problem(self, checked: Checked, q, varying: tuple[str, ...]) -> Problem:
        """The problem of this rank, without the options that vary."""
        arrays, without = Arrays.of(q, "q"), (*_NOT_OF_CALLS, *varying)
        given = {name: x for name, x in self.options.items() if name not in without}
        if given.get("precision") == "fp8":
            # A scale for each query: how they are spread over ranks then does not matter.
            recipe = recipe_of(self.wire, q.shape[3])
            given["fp8"] = replace(recipe, granularity="token")
        if checked.config is not None:
            given["config"] = checked.config
        calls = LocalCalls(given, arrays, len(self.layout.lengths))
        band = Band.of(self.options["causal"], self.options["window_size"])
        comm, of_all = self.comms[0], (self.max_workspace, self.wire)
        if checked.names[0] != "heads":
            return Problem(self.layout, comm, band, calls, arrays, *of_all)
        across = self.comms[1] if len(self.comms) > 1 else _alone()
        problem = Problem(self._across(checked.names), across, band, calls, arrays)
        # Quantised once: across groups, where there are several.
        within_wire, across_wire = (self.wire, None) if len(self.comms) == 1 else (None, self.wire)
        return heads.RegroupedProblem(
            layout=self.layout,
            comm=Grid(comm, across),
            band=band,
            calls=calls,
            arrays=arrays,
            max_workspace=self.max_workspace,
            wire=within_wire,
            within=comm,
            across=replace(problem, max_workspace=self.max_workspace, wire=across_wire),
            method=_MODULES[checked.names[1]],
            more={"travels": self.travels} if checked.names[1] == "ring" else {},
        )

    def _checked(self, operands: dict[str, Any], key: tuple | None) -> Checked:
        """The checks of this rank alone, remembered. Raises as `attention`."""
        options = self._options()
        arrays = {**operands, **options.arrays()}
        if key is None:
            return self._check(operands, arrays, options)
        key += tuple((comm.rank, comm.size) for comm in self.comms)
        return remembered(key, lambda: self._check(operands, arrays, options))

    def _options(self) -> AttentionOptions:
        """Raises TypeError, ValueError, UnsupportedError."""
        for name, value in self.options.items():
            if name in _PLAIN:
                continue
            if name in _OF_LAYOUT and is_given(name, value):
                raise ValueError(
                    f"{self.function} over several ranks has no {name}: positions are those that "
                    f"the layout says, got {value!r}"
                )
            if name in _REFUSED and is_given(name, value):
                raise UnsupportedError(
                    f"{self.function} over several ranks takes no {name}: {_REFUSED[name]}"
                )
            if name not in _OF_LAYOUT and name not in _REFUSED:
                raise TypeError(
                    f"{self.function} over several ranks got the unknown option {name}; it takes "
                    f"{', '.join(_TAKEN)}"
                )
        precision, backward = self.options.get("precision"), self.asked is not None
        expect_precision(f"{self.function} over several ranks", precision, self.wire, backward)
        return AttentionOptions.of(self.function, self.options)

    def _check(
        self, operands: dict[str, Any], arrays: dict[str, Any], options: AttentionOptions
    ) -> Checked:
        """The checks of this rank alone. Raises as `attention`."""
        if not isinstance(self.layout, Layout):
            raise TypeError(
                f"layout must be a numflash.distributed.Layout, got {kind_of(self.layout)}"
            )
        names = _methods(self.method, len(self.comms))
        ranks, rank = 1, 0
        for comm in reversed(self.comms):
            ranks, rank = ranks * comm.size, rank * comm.size + comm.rank
        if self.layout.ranks != ranks:
            raise ValueError(
                f"layout must have as many ranks as comm, {ranks}, got {self.layout.ranks}"
            )
        _expect_workspace(self.max_workspace)
        expect_layout_for(self.wire, self.layout)
        if options.precision == "fp8":
            options = options._replace(fp8=recipe_of(self.wire, operands["q"].shape[-1]))
        expect_one_of("travels", self.travels, ("auto", "keys", "queries"))
        views = self._views(operands, arrays, rank)
        forced, of_backward = split_configs(options.config)
        config, wrt = None, ()
        if self.asked is None:
            whole.expect_forward(views, self.layout, options)
        else:
            options = options.of_backward(of_backward or None)
            wrt = whole.gradients_of_whole(views, self.layout, options, self.asked)
        names = self._names(names, views, options)
        if options.precision == "fp8" and len(self.comms) == 1:
            expect_method_of_codes(self.method)
        layout, documents = self._across(names), len(self.layout.lengths)
        positions.expect_documents(options, documents, views["q"].shape[0])
        positions.expect_random_bits(options, layout, names[-1])
        positions.expect_blocks(options, layout, names[-1])
        if self.asked is None and names[-1] == "gather" and not forced:
            config = whole.pinned_config(views, self.layout, options._replace(config=None))
        return Checked(names, config, wrt)

    def _views(
        self, operands: dict[str, Any], arrays: dict[str, Any], rank: int
    ) -> dict[str, ArrayView]:
        """Of all arrays, those of operands with a batch axis. Raises TypeError, ValueError."""
        library, views = Arrays.of(operands["q"], "q"), {}
        for name, array in arrays.items():
            view = library_of(array, name).view(array, name)
            if name in operands:
                if Arrays.of(array, name) != library:
                    raise TypeError(f"{name} must be of the library and on the device of q")
                view = _as_batch(name, view, operands["q"])
                _expect_tokens(name, view, self.layout.tokens(rank), rank)
            views[name] = view
        return views

    def _names(
        self, names: tuple[str, ...], views: dict[str, ArrayView], options: AttentionOptions
    ) -> tuple[str, ...]:
        """The methods that compute it. Raises ValueError."""
        q, k, v = (views[name] for name in ("q", "k", "v"))
        if names[0] == "heads":
            expect_heads(self.comms[0].size, q.shape[2], k.shape[2])
            return names if len(names) == 2 else (*names, "gather")
        if names != ("auto",):
            return names
        if options.block_mask is not None:
            return ("gather",)
        return (
            best_method(
                self.layout,
                Band.of(options.causal, options.window_size),
                sizes_of(q, k, v, q.dtype, self.wire)._replace(
                    in_codes=options.precision == "fp8"
                ),
                by_position=any(is_given(name, getattr(options, name)) for name in BY_POSITION),
                max_workspace=self.max_workspace,
                backward=self.asked is not None,
            ),
        )

    def _across(self, names: tuple[str, ...]) -> Layout:
        """The layout of the method across groups."""
        return _merged(self.layout, self.comms[0].size) if names[0] == "heads" else self.layout


def _glance(array) -> tuple:
    """A key of an array's metadata. Raises NoKeyError, TypeError: it is none."""
    key = library_of(array, "array").glance(array)[1]
    if key is None:
        raise NoKeyError
    return type(array), key


def _no_key(array) -> NoReturn:
    """For an array in the place of a number: its metadata does not say which one."""
    raise NoKeyError


_NOT_OF_CALLS = ("causal", "window_size", "out_dtype", *_OF_LAYOUT)
_VARYING = (*ARRAY_OPTIONS, *FUNCTIONS, "aux", "block_mask")
"""Options of which equal calls may have others."""


_VERBS = ("rank", "size", "agreed", "exchange", "all_gather", "agree")


def _is_communicator(comm) -> bool:
    return all(map(hasattr, repeat(comm), _VERBS))


def _comms(comm) -> tuple[Communicator, ...]:
    """One communicator, or those within and across groups. Raises TypeError."""
    found = tuple(comm) if isinstance(comm, tuple | list) else (comm,)
    if len(found) not in (1, 2) or not all(map(_is_communicator, found)):
        raise TypeError(
            "comm must be a communicator, as numflash.distributed.local, of_torch and of_cupy "
            f"make them, or a pair of them, got {comm!r}"
        )
    return found


def _methods(method, comms: int) -> tuple[str, ...]:
    """The names of a method. Raises TypeError, ValueError."""
    if isinstance(method, tuple | list):
        if len(method) != 2 or method[0] != "heads" or method[1] not in ACROSS:
            raise ValueError(
                f'a pair of methods must be ("heads", "gather") or ("heads", "ring"), got {method}'
            )
        names = tuple(method)
    else:
        expect_one_of("method", method, METHODS)
        names = (method,)
    if len(names) != comms:
        raise ValueError(
            'comm must be a pair of communicators with method=("heads", "gather") or ("heads", '
            f'"ring"), and one with others, got {comms} and method={method!r}'
        )
    return names


@lru_cache(maxsize=256)
def _merged(layout: Layout, size: int) -> Layout:
    return layout.merged(size)


@lru_cache(maxsize=1)
def _alone() -> Communicator:
    return Alone()


def _expect_workspace(value) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"max_workspace must be a number of bytes or None, got {value!r}")
    if value < 0:
        raise ValueError(f"max_workspace must be at least 0, got {value}")


def _axis_of_tokens(name: str, array) -> int:
    """Of an array of this rank, with or without a batch axis."""
    axes = len(getattr(array, "shape", ()))
    return axes - 1 if name in ("lse", "dlse") else max(0, axes - 3)


def _as_batch(name: str, view: ArrayView, q) -> ArrayView:
    """The view with a batch axis. Raises ValueError."""
    axes = len(q.shape)
    if axes not in (3, 4):
        raise ValueError(
            "q must have 3 dimensions (tokens, heads, head_dim) or 4 (batch, tokens, heads, "
            f"head_dim), got {axes}"
        )
    wanted = axes - 1 if name in ("lse", "dlse") else axes
    if len(view.shape) != wanted:
        raise ValueError(
            f"{name} must have {wanted} dimensions, as q has {axes}, got {len(view.shape)}"
        )
    if axes == 4:
        return view
    return replace(view, shape=(1, *view.shape), strides=(0, *view.strides))


def _expect_tokens(name: str, view: ArrayView, tokens: int, rank: int) -> None:
    axis = -1 if name in ("lse", "dlse") else 1
    if view.shape[axis] != tokens:
        raise ValueError(
            f"{name} must have the {tokens} tokens that the layout gives rank {rank}, got "
            f"{view.shape[axis]}"
        )


def with_batch(operands: dict[str, Any]) -> dict[str, Any]:
    """The operands with a batch axis."""
    if len(operands["q"].shape) == 4:
        return dict(operands)
    return {name: x[None] for name, x in operands.items()}


def sum_over_ranks(problem: Problem, share, name: str):
    """The gradient of what all ranks have, in float32 and in the order of ranks.

    Some elements at a time, for those of all ranks arrive.
    """
    whole = problem.arrays.contiguous(share).reshape(-1)
    for begin in range(0, whole.shape[0], _ELEMENTS_AT_ONCE):
        own, total = whole[begin : begin + _ELEMENTS_AT_ONCE], None
        for each in problem.comm.all_gather(own, f"gradients of {name}"):
            total = each if total is None else total + each
        own[...] = total
    return whole.reshape(tuple(share.shape))


_ELEMENTS_AT_ONCE = 2**22
