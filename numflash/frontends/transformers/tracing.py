"""A mask function of transformers as an expression of places, and what it reads.

    mask_function(batch, head, q_idx, kv_idx) -> whether the query sees the key

It is index arithmetic on numbers and tensors that it closes over. Called once with symbols it
gives a node (`numflash.functions`); a tensor that it indexes by a symbol is an array of `aux`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from numflash.functions.nodes import LEAF, Node, apply, load, number, order, to
from numflash.functions.paths import Path, TraceError, along_all_paths
from numflash.functions.program import Array, Number, Program
from numflash.functions.symbols import Symbol, Trace, argument, called, node_of
from numflash.functions.trace import describe


class TracedMask(NamedTuple):
    """A mask function as an expression.

    Attributes:
        keep: whether a query sees a key, a node of type "b".
        aux: the tensors and numbers that it reads, by the values of its nodes.
        kinds: what they are, for a `Program`.
        offset: the place in `aux` of a query's offset that is a tensor; None if that is a number.
    """

    keep: Node
    aux: tuple[Tensor | int, ...]
    kinds: tuple[Array | Number, ...]
    offset: int | None

    def numbers(self) -> dict[int, int]:
        """The numbers among `aux`, by their places."""
        return {k: x for k, x in enumerate(self.aux) if not isinstance(x, Tensor)}

    def program_of(self, part: Node) -> tuple[str, tuple[Tensor | int, ...]]:
        """The text of the program that keeps what a part of `keep` does, and its own aux."""
        used = sorted({node.value for node in order((part,)) if node.op in ("load", "number")})
        place = {k: n for n, k in enumerate(used)}
        moved: dict[Node, Node] = {}
        for node in order((part,)):
            operands = [moved[each] for each in node.args]
            if node.op == "load":
                moved[node] = load(place[node.value], node.type, operands)
            elif node.op == "number":
                moved[node] = number(place[node.value], node.type)
            else:
                moved[node] = apply(node.op, *operands) if operands else node
        program = Program(tuple(self.kinds[k] for k in used), keep=moved[part])
        return program.text, tuple(self.aux[k] for k in used)


def traced_mask(
    mask_function: Callable,
    q_offset: Tensor | int,
    kv_offset: Tensor | int,
    device: torch.device | str,
) -> TracedMask:
    """The expression of a mask function; `device` is where its tensors are read.

    Offsets are added to the numbers of queries and keys. They are numbers or arrays of `aux`, and
    no constants: another offset gives the same expression.

    Raises:
        TypeError, and what the function raises: it does what symbols cannot record.
    """
    reads = _Reads(device)
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.reshape(())
    shift = reads.place(q_offset), reads.place(kv_offset)

    def once(path: Path) -> Node:
        trace = reads.trace = Trace(path)
        batch, head, query, key = (trace.symbol(LEAF[letter]) for letter in "bhij")
        query, key = (
            x if k is None else x + reads.symbol(k)
            for x, k in zip((query, key), shift, strict=True)
        )
        with reads:
            result = mask_function(batch, head, query, key)
        return to(node_of(result), "b")

    keep = along_all_paths(once, f"mask function {mask_function!r}")
    offset = shift[0] if isinstance(q_offset, Tensor) else None
    return TracedMask(keep, tuple(reads.aux), tuple(reads.kinds), offset)


class _View(NamedTuple):
    """The metadata of a tensor, as `describe` takes it."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Reads(TorchFunctionMode):
    """Records which tensors symbols index, or meet as numbers.

    Attributes:
        aux: these tensors, and numbers.
        kinds: what they are.
        trace: the one whose symbols are made.
    """

    trace: Trace

    def __init__(self, device: torch.device | str):
        super().__init__()
        self.aux: list[Tensor | int] = []
        self.kinds: list[Array | Number] = []
        self._device = device
        self._seen: list[tuple[Tensor, int]] = []

    def place(self, x: Tensor | int) -> int | None:
        """The place in `aux` of a tensor or a number; None of the number 0."""
        if not isinstance(x, Tensor):
            return self._add(int(x), x) if x else None
        for tensor, k in self._seen:
            if tensor is x:
                return k
        # A counter of a cache moves on before attention runs.
        given = x.detach().clone() if x.numel() == 1 else x.detach()
        given = given.to(self._device)
        dtype = str(given.dtype).removeprefix("torch.")
        k = self._add(given, _View(dtype, tuple(given.shape), given.stride()))
        self._seen.append((x, k))
        return k

    def _add(self, x: Tensor | int, described: Any) -> int:
        self.kinds.append(describe(described, f"aux{len(self.aux)}"))
        self.aux.append(x)
        return len(self.aux) - 1

    def symbol(self, k: int) -> Any:
        """What a function gets for a place in `aux`: a symbol, or an array of them."""
        x = self.aux[k]
        shape = tuple(x.shape) if isinstance(x, Tensor) else ()
        return argument(self.trace, f"aux{k}", k, self.kinds[k], shape)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        if name == "__getitem__" and isinstance(args[0], Tensor):
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(index, Symbol) for index in indices):
                return self.symbol(self.place(args[0]))[indices]
        if name == "item" and isinstance(args[0], Tensor):
            return self._number(args[0])  # of `node_of`: the number is read on the device
        if any(isinstance(x, Symbol) for x in (*args, *kwargs.values())):
            args = tuple(self._number(x) if isinstance(x, Tensor) else x for x in args)
            return called(name, args, kwargs)
        return func(*args, **kwargs)

    def _number(self, tensor: Tensor) -> Symbol:
        if tensor.numel() != 1:
            raise TraceError(f"a tensor of shape {tuple(tensor.shape)} is no number")
        found = self.symbol(self.place(tensor))
        return found[(0,) * tensor.ndim] if tensor.ndim else found
