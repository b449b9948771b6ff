"""Calculations with numbers: `add`, `fma`, `ex2` and their like."""

from numflash.executor.one_lane.making import Makers, Making
from numflash.executor.text import UnknownError
from numflash.executor.types import DTYPES, HALVES, PAIRS, name_of

_WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}

MAKERS = Makers()


def _elementwise(making: Making, formula: str, n: int, float_formula: str | None = None):
    """{0}, {1}, ... are the sources; floats may have a formula of their own."""
    type_ = making.types[-1]
    formula = (float_formula or formula) if type_ in ("f32", "f64", *HALVES, *PAIRS) else formula
    if type_ in PAIRS:
        dtype = f"a.{name_of(PAIRS[type_])}"
        sources = [f"a.halves({making.source(i + 1, 'b32')},{dtype})" for i in range(n)]
        return making.put(f"a.paired({formula.format(*sources)},{dtype})", "b32")
    sources = [making.source(i + 1) for i in range(n)]
    if type_ in HALVES:
        sources = [f"{source}.astype(a.f4)" for source in sources]
        return making.put(f"a.half({formula.format(*sources)},a.{name_of(DTYPES[type_])})", type_)
    if type_ == "f32" and making.has("ftz") and not formula.startswith("a.exp2"):
        # 2 to the power of a subnormal is 1, and that of 0.
        sources = [f"a.flushed({source})" for source in sources]
    value = formula.format(*sources)
    if type_ == "f32":
        if not value.startswith(("a.maximum", "a.minimum", "a.fused", "a.exp2")):
            value = f"a.number({value})"
        if making.has("ftz"):
            value = f"a.flushed({value})"
        if making.has("sat"):
            value = f"a.saturated({value})"
    elif making.has("ftz") or making.has("sat"):
        raise UnknownError(making.opcode)
    return making.put(value, type_)


@MAKERS.of("add", 3, "rn ftz sat")
def _add(making):
    return _elementwise(making, "({}+{})", 2)


@MAKERS.of("sub", 3, "rn ftz sat")
def _sub(making):
    return _elementwise(making, "({}-{})", 2)


@MAKERS.of("min", 3, "ftz")
def _min(making):
    return _elementwise(making, "np.minimum({},{})", 2, "a.minimum({},{})")


@MAKERS.of("max", (3, 4), "ftz")
def _max(making):
    if len(making.operands) == 4:
        return _elementwise(making, "", 3, "a.maximum(a.maximum({},{}),{})")
    return _elementwise(making, "np.maximum({},{})", 2, "a.maximum({},{})")


@MAKERS.of("mul", 3, "rn ftz sat lo hi wide")
def _mul(making):
    if making.has("wide"):
        wide = _WIDE[making.types[-1]]
        cast = f".astype(a.{name_of(DTYPES[wide])})"
        return making.put(f"({making.source(1)}{cast}*{making.source(2)}{cast})", wide)
    return _elementwise(making, "a.high_product({},{})" if making.has("hi") else "({}*{})", 2)


@MAKERS.of("mad", 4, "rn ftz sat lo hi wide")
def _mad(making):
    type_ = making.types[-1]
    if type_ in ("f32", "f64"):
        return _fma(making)
    if making.has("wide"):
        wide = _WIDE[type_]
        cast = f".astype(a.{name_of(DTYPES[wide])})"
        product = f"{making.source(1)}{cast}*{making.source(2)}{cast}"
        return making.put(f"({product}+{making.source(3, wide)})", wide)
    product = "a.high_product({},{})" if making.has("hi") else "{}*{}"
    return _elementwise(making, f"({product}+{{}})", 3)


@MAKERS.of("fma", 4, "rn ftz sat")
def _fma(making):
    if making.types[-1] != "f32":
        raise UnknownError(f"{making.opcode}: the executor fuses float32 only")
    return _elementwise(making, "a.fused({},{},{})", 3)


@MAKERS.of("div", 3, "rn full approx ftz")
def _div(making):
    return _elementwise(making, "a.quotient({},{})", 2, "({}/{})")


@MAKERS.of("rem", 3)
def _rem(making):
    return _elementwise(making, "a.remainder({},{})", 2)


@MAKERS.of("neg", 2, "ftz")
def _neg(making):
    return _elementwise(making, "(-{})", 1)


@MAKERS.of("abs", 2, "ftz")
def _abs(making):
    return _elementwise(making, "np.abs({})", 1)


_FUNCTIONS = {
    "ex2": "a.exp2({})",
    "lg2": "np.log2({})",
    "rcp": "(1/{})",
    "sqrt": "np.sqrt({})",
    "rsqrt": "(1/np.sqrt({}))",
    "sin": "np.sin({})",
    "cos": "np.cos({})",
    "tanh": "a.tanh({})",
}


@MAKERS.of(" ".join(_FUNCTIONS), 2, "rn approx ftz")
def _function(making):
    if making.types[-1] != "f32":
        raise UnknownError(f"{making.opcode}: the executor knows it of float32 only")
    return _elementwise(making, _FUNCTIONS[making.opcode.split(".")[0]], 1)


@MAKERS.of("copysign", 3)
def _copysign(making):
    return making.put(f"np.copysign({making.source(2)},{making.source(1)})", making.types[-1])
