"""Bits: logic, shifts, and what moves or counts them."""

from numflash.executor.one_lane.making import Makers

MAKERS = Makers()


@MAKERS.of("and or xor", 3)
def _logic(making):
    symbol = {"and": "&", "or": "|", "xor": "^"}[making.opcode.split(".")[0]]
    return making.put(f"({making.source(1)}{symbol}{making.source(2)})", making.types[-1])


@MAKERS.of("not", 2)
def _not(making):
    return making.put(f"(~{making.source(1)})", making.types[-1])


@MAKERS.of("shl", 3)
def _shl(making):
    return making.put(
        f"a.shifted_left({making.source(1)},{making.source(2, 'u32')})", making.types[-1]
    )


@MAKERS.of("shr", 3)
def _shr(making):
    value = f"a.shifted_right({making.source(1)},{making.source(2, 'u32')})"
    return making.put(value, making.types[-1])


@MAKERS.of("shf", 4, "l r wrap clamp")
def _shf(making):
    sources = ",".join(making.source(i) for i in (1, 2, 3))
    return making.put(f"a.funnel({sources},{making.has('l')},{making.has('wrap')})", "b32")


@MAKERS.of("lop3", 5)
def _lop3(making):
    sources = ",".join(making.source(i, "b32") for i in (1, 2, 3))
    return making.put(f"a.looked_up({sources},{making.operands[4].integer()})", "b32")


@MAKERS.of("prmt", 4)
def _prmt(making):
    sources = ",".join(making.source(i, "b32") for i in (1, 2, 3))
    return making.put(f"a.permuted({sources})", "b32")


@MAKERS.of("bfe", 4)
def _bfe(making):
    counts = ",".join(making.source(i, "u32") for i in (2, 3))
    return making.put(f"a.extracted({making.source(1)},{counts})", making.types[-1])


@MAKERS.of("bfi", 5)
def _bfi(making):
    counts = ",".join(making.source(i, "u32") for i in (3, 4))
    value = f"a.inserted({making.source(1)},{making.source(2)},{counts})"
    return making.put(value, making.types[-1])


@MAKERS.of("popc", 2)
def _popc(making):
    return making.put(f"np.bitwise_count({making.source(1)}).astype(a.u4)", "u32")


@MAKERS.of("clz", 2)
def _clz(making):
    return making.put(f"a.leading_zeros({making.source(1)})", "u32")


@MAKERS.of("brev", 2)
def _brev(making):
    return making.put(f"a.reversed_bits({making.source(1)})", making.types[-1])
