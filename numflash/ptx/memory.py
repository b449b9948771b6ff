"""Loads and stores; vectors of 8 or 16 bytes move in one instruction. And a sum in memory.

The address must be a multiple of the size. PTX ISA 9.7.9.8 (ld), 9.7.9.12 (st), 9.7.13.6 (red).
"""

from numflash.ptx.instruction import instruction
from numflash.ptx.operands import Global, Regs, Shared
from numflash.ptx.scalars import f32, i32, i64, u8, u16, u32, u64
from numflash.runtime.mode import SIMULATED

if SIMULATED:
    from numflash.simulator.engine import current_thread, note_store


@instruction("ld.global.v4.u32 <frag>, [<source>];", sm=75)
def ld_global_v4_u32(frag: Regs(u32, 4, "w"), source: Global(u32, "offset"), offset: i64):
    """frag = the 16 bytes at element `offset` of `source`, whatever its element type."""
    frag[:] = source.block(offset, 16).view(u32)


@instruction("ld.global.v4.f32 <frag>, [<source>];", sm=75)
def ld_global_v4_f32(frag: Regs(f32, 4, "w"), source: Global(f32, "offset"), offset: i64):
    """frag = source[offset : offset + 4]."""
    frag[:] = source.block(offset, 16).view(f32)


@instruction(
    "{ .reg .pred both, first; .reg .b64 address; mov.b64 address, <source>; "
    "setp.gt.s32 both, <left>, 1; setp.eq.s32 first, <left>, 1; mov.b16 <ret>, 0; "
    "@both ld.global.nc.b16 <ret>, [address]; @first ld.global.nc.u8 <ret>, [address]; }",
    sm=75,
    constant=True,
)
def ld_global_pair_b16(source: Global(u16, "offset"), offset: i64, left: i32) -> u16:
    """Elements `offset` and `offset` + 1, of a byte each; the first alone where `left` is 1.

    And 0 where it is less. Nothing writes there while the kernel runs. PTX ISA 9.7.9.9.
    """
    return _pair(source, offset, left, u16)


@instruction(
    "{ .reg .pred both, first; .reg .b64 address; mov.b64 address, <source>; "
    "setp.gt.s32 both, <left>, 1; setp.eq.s32 first, <left>, 1; mov.b32 <ret>, 0; "
    "@both ld.global.nc.b32 <ret>, [address]; @first ld.global.nc.u16 <ret>, [address]; }",
    sm=75,
    constant=True,
)
def ld_global_pair_b32(source: Global(u32, "offset"), offset: i64, left: i32) -> u32:
    """As `ld_global_pair_b16`, of elements of 2 bytes."""
    return _pair(source, offset, left, u32)


@instruction(
    "{ .reg .pred both, first; .reg .b64 address; mov.b64 address, <source>; "
    "setp.gt.s32 both, <left>, 1; setp.eq.s32 first, <left>, 1; mov.b64 <ret>, 0; "
    "@both ld.global.nc.b64 <ret>, [address]; @first ld.global.nc.u32 <ret>, [address]; }",
    sm=75,
    constant=True,
)
def ld_global_pair_b64(source: Global(u64, "offset"), offset: i64, left: i32) -> u64:
    """As `ld_global_pair_b16`, of elements of 4 bytes."""
    return _pair(source, offset, left, u64)


def _pair(source, offset, left, type):
    if left < 1:
        return type(0)
    if left > 1:
        return source.block(offset, type(0).nbytes).view(type)[0]
    first = source.block(offset, type(0).nbytes // 2)
    return type(first.view({2: u8, 4: u16, 8: u32}[type(0).nbytes])[0])


@instruction("st.global.v4.f32 [<target>], <frag>;", sm=75)
def st_global_v4_f32(target: Global(f32, "offset"), offset: i64, frag: Regs(f32, 4, "r")):
    """target[offset : offset + 4] = frag."""
    target.block(offset, 16, access="store").view(f32)[:] = frag


@instruction("st.global.v2.u32 [<target>], <frag>;", sm=75)
def st_global_v2_u32(target: Global(u32, "offset"), offset: i64, frag: Regs(u32, 2, "r")):
    """The 8 bytes at element `offset` of `target` = frag, whatever its element type."""
    target.block(offset, 8, access="store").view(u32)[:] = frag


@instruction("st.global.v4.u32 [<target>], <frag>;", sm=75)
def st_global_v4_u32(target: Global(u32, "offset"), offset: i64, frag: Regs(u32, 4, "r")):
    """The 16 bytes at element `offset` of `target` = frag, whatever its element type."""
    target.block(offset, 16, access="store").view(u32)[:] = frag


@instruction("st.global.v2.f32 [<target>], <frag>;", sm=75)
def st_global_v2_f32(target: Global(f32, "offset"), offset: i64, frag: Regs(f32, 2, "r")):
    """target[offset : offset + 2] = frag."""
    target.block(offset, 8, access="store").view(f32)[:] = frag


@instruction("red.global.add.u64 [<target>], <x>;", sm=75)
def red_global_add_s64(target: Global(i64, "offset"), offset: i64, x: i64):
    """target[offset] += x, modulo 2 ** 64, whichever threads do so at once.

    Integers have no order: the sum is the same bits in every run.
    """
    held = target.block(offset, 8, access="none").view(u64)
    held += i64(x).view(u64)


@instruction("ld.shared.v4.f32 <frag>, [<source>];", sm=75)
def ld_shared_v4_f32(frag: Regs(f32, 4, "w"), source: Shared(f32, "offset"), offset: i64):
    """frag = the float32 whose bits are the words `offset` to `offset` + 3."""
    if offset & 3 or not 0 <= offset <= source.size - 4:
        _refuse(source, offset)
    frag[:] = source[offset : offset + 4].view(f32)


@instruction("st.shared.v4.f32 [<target>], <frag>;", sm=75)
def st_shared_v4_f32(target: Shared(f32, "offset"), offset: i64, frag: Regs(f32, 4, "r")):
    """Words `offset` to `offset` + 3 of target = the bits of frag."""
    if offset & 3 or not 0 <= offset <= target.size - 4:
        _refuse(target, offset)
    target[offset : offset + 4].view(f32)[:] = frag
    note_store(target, offset, 4)


@instruction("st.shared.f32 [<target>], <x>;", sm=75)
def st_shared_f32(target: Shared(f32, "offset"), offset: i64, x: f32):
    """Word `offset` of target = the bits of x; no negative indices, as Numba's arrays have."""
    if not 0 <= offset < target.size:
        raise IndexError(f"shared memory: float {offset} of {target.size}")
    target[offset : offset + 1].view(f32)[0] = x
    note_store(target, offset, 1)


@instruction("ld.shared.v2.f32 <frag>, [<source>];", sm=75)
def ld_shared_v2_f32(frag: Regs(f32, 2, "w"), source: Shared(f32, "offset"), offset: i64):
    """frag = the float32 whose bits are the words `offset` and `offset` + 1."""
    if offset & 1 or not 0 <= offset <= source.size - 2:
        _refuse(source, offset, 2)
    frag[:] = source[offset : offset + 2].view(f32)


@instruction("mov.u32 <ret>, <source>;", sm=75)
def mov_shared_address(source: Shared(u32, "offset"), offset: i64) -> u32:
    """The address of word `offset` in shared memory, in bytes. PTX ISA 9.7.9.6."""
    return u32(current_thread().block.shared.address(source, offset))


@instruction("ld.shared.v4.u32 <frag>, [<source>];", sm=75)
def ld_shared_v4_u32(frag: Regs(u32, 4, "w"), source: Shared(u32, "offset"), offset: i64):
    """frag = source[offset : offset + 4]."""
    if offset & 3 or not 0 <= offset <= source.size - 4:
        _refuse(source, offset)
    frag[:] = source[offset : offset + 4]


@instruction("ld.shared.u32 <ret>, [<source>];", sm=75)
def ld_shared_u32(source: Shared(u32, "offset"), offset: i64) -> u32:
    """source[offset]."""
    if not 0 <= offset < source.size:
        raise IndexError(f"shared memory: word {offset} of {source.size}")
    return source[offset]


@instruction("st.shared.v4.u32 [<target>], <frag>;", sm=75)
def st_shared_v4_u32(target: Shared(u32, "offset"), offset: i64, frag: Regs(u32, 4, "r")):
    """target[offset : offset + 4] = frag."""
    if offset & 3 or not 0 <= offset <= target.size - 4:
        _refuse(target, offset)
    target[offset : offset + 4] = frag
    note_store(target, offset, 4)


@instruction("st.shared.u32 [<target>], <x>;", sm=75)
def st_shared_u32(target: Shared(u32, "offset"), offset: i64, x: u32):
    """target[offset] = x."""
    if not 0 <= offset < target.size:
        raise IndexError(f"shared memory: word {offset} of {target.size}")
    target[offset] = x
    note_store(target, offset, 1)


def _refuse(array, offset, count=4):
    """Raise the error of a misaligned or wild access to `count` words of an aligned array."""
    if offset % count:
        raise ValueError(
            f"shared memory: a {4 * count}-byte access at word {offset} is misaligned"
        )
    raise IndexError(f"shared memory: words {offset} to {offset + count - 1} of {array.size}")
