"""Moves and conversions."""

from numflash.executor.one_lane.making import Makers
from numflash.executor.text import TYPE_BYTES, UnknownError, Vector
from numflash.executor.types import DTYPES, HALVES, PAIRS, name_of

MAKERS = Makers()


@MAKERS.of("mov", 2)
def _mov(making):
    type_, (target, source) = making.types[-1], making.operands
    if type_ == "pred":
        return making.put(making.source(1), "pred")
    size = TYPE_BYTES[type_]
    bits = f"b{8 * size}"
    if isinstance(target, Vector):
        count = len(target.items)
        part = f"b{8 * size // count}"
        parts = f"view(a.{name_of(DTYPES[part])}).reshape(32,{count})"
        lines = [f"t=ascontiguous({making.source(1, bits)}).{parts}"]
        for i, item in enumerate(target.items):
            lines += making.put(f"t[:,{i}].copy()", part, item)
        return lines
    if isinstance(source, Vector):
        part = f"b{8 * size // len(source.items)}"
        parts = ",".join(making.sources.value(item, part) for item in source.items)
        return making.put(
            f"np.stack(({parts}),1).view(a.{name_of(DTYPES[bits])}).reshape(32)", bits
        )
    return making.put(making.source(1, bits), bits)


@MAKERS.of("cvt", (2, 3), "rn rna rzi rni rmi rpi ftz sat satfinite")
def _cvt(making):
    to, of = making.types
    ways = set(making.modifiers)
    packs = of == "f32" and to in (*PAIRS, "e4m3x2", "e5m2x2")
    making.check_operands(3 if packs else 2)
    if of == "f32" and to in PAIRS and ways == {"rn"}:
        high, low = making.source(1, of), making.source(2, of)
        dtype = f"a.{name_of(PAIRS[to])}"
        return making.put(f"a.paired(np.stack(({low},{high}),1).reshape(64),{dtype})", "b32")
    if of == "f32" and to in ("e4m3x2", "e5m2x2") and ways == {"rn", "satfinite"}:
        high, low = making.source(1, of), making.source(2, of)
        return making.put(f"a.encoded({to[:4]!r},{high},{low})", "b16")
    if of in ("e4m3x2", "e5m2x2") and to == "f16x2" and ways == {"rn"}:
        return making.put(f"a.decoded({of[:4]!r},{making.source(1, of)})", "b32")
    if to == "tf32":
        if of != "f32" or ways != {"rna"}:
            raise UnknownError(making.opcode)
        return making.put(f"a.tf32_away({making.source(1, of)})", "b32")
    if {to, of} & {"f16x2", "bf16x2", "e4m3x2", "e5m2x2"} or "satfinite" in ways or "rna" in ways:
        raise UnknownError(f"the executor does not know {making.opcode}")
    return making.put(_converted(making, to, of), to)


def _converted(making, to: str, of: str) -> str:
    """A conversion between scalars."""
    x, dtype = making.source(1, of), DTYPES[to]
    name = f"a.{name_of(dtype)}"
    floats = ("f16", "bf16", "f32", "f64")
    rounding = making.first_of(("rzi", "rni", "rmi", "rpi"))
    if of in floats and to not in floats:
        if rounding is None or making.has("sat"):
            raise UnknownError(making.opcode)
        return f"a.to_integer({x},{name},{rounding!r})"
    if of not in floats:
        if making.has("sat") and to not in floats:
            return f"a.clamped({x},{name})"
        if to in HALVES:
            raise UnknownError(making.opcode)
        return f"{x}.astype({name})"
    if rounding:
        x = f"a.ROUNDINGS[{rounding!r}]({x})"
    value = f"a.half({x},{name})" if to in HALVES else f"{x}.astype({name})"
    if to == "f32":
        value = f"a.number({value})"
        if making.has("ftz"):
            value = f"a.flushed({value})"
    elif making.has("ftz"):
        raise UnknownError(making.opcode)
    return f"a.saturated({value})" if making.has("sat") else value


@MAKERS.of("cvta", 2, "to global shared shared::cta shared::cluster const param local")
def _cvta(making):
    space = making.modifiers[-1].split("::")[0]
    to_space = making.has("to")
    value = making.source(1)
    sign = "-" if to_space else "+"
    return making.put(f"({value}{sign}w.WINDOWS[{space!r}])", making.types[-1])
