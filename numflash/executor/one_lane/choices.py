"""Predicates, and choices by them."""

from numflash.executor.one_lane.making import Makers
from numflash.executor.text import TYPE_BYTES, Pair, UnknownError
from numflash.executor.types import DTYPES, HALVES

MAKERS = Makers()
_COMPARISONS = {
    **{"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="},
    **{"lo": "<", "ls": "<=", "hi": ">", "hs": ">="},
}
_UNORDERED = {name + "u": symbol for name, symbol in list(_COMPARISONS.items())[:6]}
_BOOLEAN = {"and": "&", "or": "|", "xor": "^"}


@MAKERS.of("setp", (3, 4), " ".join([*_COMPARISONS, *_UNORDERED, *_BOOLEAN, "num", "nan", "ftz"]))
def _setp(making):
    type_ = making.types[-1]
    x, y = making.source(1), making.source(2)
    if type_ in HALVES:
        x, y = f"{x}.astype(a.f4)", f"{y}.astype(a.f4)"
    if making.has("ftz"):
        x, y = f"a.flushed({x})", f"a.flushed({y})"
    comparison = making.modifiers[0]
    nan = f"(np.isnan({x})|np.isnan({y}))"
    if comparison in _UNORDERED:
        value = f"(({x}{_UNORDERED[comparison]}{y})|{nan})"
    elif comparison in ("num", "nan"):
        value = nan if comparison == "nan" else f"(~{nan})"
    else:
        value = f"({x}{_COMPARISONS[comparison]}{y})"
        if comparison == "ne" and DTYPES[type_].kind not in "iu":
            value = f"({value}&~{nan})"
    combined = making.first_of(_BOOLEAN)
    making.check_operands(4 if combined else 3)
    target = making.operands[0]
    if isinstance(target, Pair):
        if combined:
            raise UnknownError(f"{making.opcode} with two results")
        puts = making.put("t", "pred", target.first) + making.put("(~t)", "pred", target.second)
        return [f"t={value}", *puts]
    if combined:
        value = f"({value}{_BOOLEAN[combined]}{making.source(3, 'pred')})"
    return making.put(value, "pred")


@MAKERS.of("selp", 4)
def _selp(making):
    bits = f"b{8 * TYPE_BYTES[making.types[-1]]}"
    x, y = making.source(1, bits), making.source(2, bits)
    return making.put(f"where({making.source(3, 'pred')},{x},{y})", bits)
