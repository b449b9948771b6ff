"""The arrays of a call, and the launch of one kernel on them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numflash
from numflash.calls.backward import Backward
from numflash.calls.forward import Forward
from numflash.calls.fp8_forward import Fp8Forward
from numflash.configs.features import rows_of
from numflash.problem.options import ARRAY_OPTIONS, AttentionOptions
from numflash.reference.varlen import has_lengths
from numflash.runtime.arrays import library_of

from . import representative
from .gpu import Device
from .representative import Call

_AFTER = {"forward": "combine", "backward": "reduce-dq"}
"""The kernel that joins the parts that a family's kernel may write, and is timed with it."""


class RefusedError(Exception):
    """A config is given up: `args` are the outcome of its record and the reason."""


def make_arrays(device: Device, family: str, call: Call, seed: int) -> dict[str, Any]:
    """q, k and v of a call, with `dout` for a backward, and the arrays among its options."""
    arrays = {}
    names = ("q", "k", "v") if family in representative.FORWARD else ("q", "k", "v", "dout")
    for i, name in enumerate(names):
        shape = call.shapes[name]
        if not call.is_aligned:
            # No row of an odd number of elements follows another at a multiple of 16 bytes.
            shape = (*shape[:-1], shape[-1] + 1 + shape[-1] % 2)
        array = device.empty(shape, call.dtype)
        array = array if call.is_aligned else array[..., -call.shapes[name][-1] :]
        device.fill_normal(array, seed + i)
        if call.is_packed:
            array = array[0]
        elif call.page_size and name in ("k", "v"):
            array = array.reshape(-1, call.page_size, *array.shape[2:])
        arrays[name] = array
    for row in rows_of(call.features):
        if row.is_array:
            arrays[row.option] = device.upload(row.example(call.num_heads_q))
    return arrays | {name: device.upload(x) for name, x in call.of_sequences().items()}


def options_of(call: Call, arrays: dict[str, Any]) -> dict[str, Any]:
    """The options of a call, arrays included."""
    given = {name: arrays[name] for name in ARRAY_OPTIONS if name in arrays}
    return {**call.options, **given}


def forward_results(call: Call, arrays: dict[str, Any]) -> dict[str, Any]:
    """`out` and `lse` of a call, which a backward reads."""
    options, run = options_of(call, arrays), numflash.attention
    if call.is_packed:
        run = numflash.attention_varlen
        options = {name: x for name, x in options.items() if name != "layout"}
    out, lse = run(*(arrays[name] for name in "qkv"), return_lse=True, **options)
    return {"out": out, "lse": lse}


def bind(family: str, config: str, call: Call, arrays: dict[str, Any]) -> Callable[[], Any]:
    """A function that launches a family's kernel on these arrays, after the kernels it needs.

    A forward that splits the keys, and a backward that splits dQ, includes the kernel that puts
    the parts together. On 8-bit floats only the kernel that reads codes is launched, not those
    that make them.
    """
    options = options_of(call, arrays)
    configs = forced(family, config, *(arrays[name] for name in "qkv"), options)
    library = library_of(arrays["q"], "q")
    views = {name: library.view(array, name) for name, array in arrays.items()}
    asked = AttentionOptions(**options, config=configs)
    operands = {name: library.operand(array) for name, array in arrays.items()} | asked.numbers()
    kind = Forward if family in representative.FORWARD else Backward
    kind = Fp8Forward if call.is_fp8 else kind
    ready = kind(views, asked)
    *_, launches = ready.bind(operands, library)
    stream = library.stream(ready.device)
    for launch in launches.values():
        launch(stream)
    timed = [launches[family]]
    if _AFTER.get(family) in launches:
        timed.append(launches[_AFTER[family]])
    return lambda: [launch(stream) for launch in timed]


def forced(family: str, config: str, q, k, v, options: dict) -> dict[str, Any]:
    """The configs that have a call run this one: `combine` needs a forward that splits the keys.

    Raises:
        RefusedError: no forward of this call splits its keys.
    """
    if family != "combine":
        return {family: config}
    forward = numflash.explain_dispatch(q, k, v, **options).forward
    never = has_lengths(options) and forward.implementation.needs_maps
    if never or not forward.has_geometry:
        raise RefusedError("invalid", f"the forward {forward.config} does not split its keys")
    parts = max(2, forward.config.num_splits)
    return {"forward": replace(forward.config, num_splits=parts), family: config}
