"""Loads and stores."""

from numflash.executor.one_lane.making import Makers
from numflash.executor.text import TYPE_BYTES, UnknownError, Vector
from numflash.executor.types import BITS, DTYPES, name_of

MAKERS = Makers()
_SPACES = "global shared shared::cta shared::cluster param local const generic"
WIDE_SCOPES = ("gpu", "sys")
"""The scopes that other blocks of a grid are in. The blocks of a cluster are followed as one."""
_HINTS = (
    "relaxed weak volatile acquire release cta gpu sys cluster nc ca cg cs lu cv wb wt "
    "L1::evict_first L1::evict_last L1::no_allocate L1::evict_normal L1::evict_unchanged "
    "L2::64B L2::128B L2::256B L2::cache_hint"
)


def _access(making) -> tuple[str, str, int]:
    """(memory space, type, elements) of a load or store."""
    space = (making.first_of(_SPACES.split()) or "generic").removesuffix("::cta")
    count = making.first_of(("v2", "v4", "v8"))
    making.check_operands(3 if making.has("L2::cache_hint") else 2)
    return space, making.types[-1], int(count[1]) if count else 1


@MAKERS.of("ld ldu", (2, 3), f"{_SPACES} {_HINTS} v2 v4 v8")
def _ld(making):
    space, type_, count = _access(making)
    dtype = DTYPES[type_]
    target, memory = making.operands[:2]
    address = making.sources.addresses(memory)
    load = "acquire" if _is_between_blocks(making, "acquire") else "load"
    call = f"w.{load}({space!r},{address},{dtype.itemsize},{count},{making.mask})"
    lines = [f"t={call}"]
    targets = target.items if isinstance(target, Vector) else (target,)
    if len(targets) != count:
        raise UnknownError(f"{making.opcode} of {len(targets)} registers")
    for i, item in enumerate(targets):
        value = f"t[{i}]" if dtype == BITS[dtype.itemsize] else f"t[{i}].view(a.{name_of(dtype)})"
        lines += making.put(value, type_, item)
    return lines


@MAKERS.of("st", (2, 3), f"{_SPACES} {_HINTS} v2 v4 v8")
def _st(making):
    space, type_, count = _access(making)
    size = TYPE_BYTES[type_]
    memory, source = making.operands[:2]
    sources = source.items if isinstance(source, Vector) else (source,)
    if len(sources) != count:
        raise UnknownError(f"{making.opcode} of {len(sources)} registers")
    values = ",".join(making.sources.value(item, f"b{8 * size}") for item in sources)
    address = making.sources.addresses(memory)
    store = "release" if _is_between_blocks(making, "release") else "store"
    return [f"w.{store}({space!r},{address},{size},({values},),{making.mask})"]


def _is_between_blocks(making, order: str) -> bool:
    """Whether a load or store has this order for other blocks, too."""
    return making.has(order) and bool(making.first_of(WIDE_SCOPES))
