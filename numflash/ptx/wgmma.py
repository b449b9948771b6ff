"""Asynchronous matrix products of a warpgroup. PTX ISA 9.7.15.

Every product is d += a b with a of 64 x k, b of k x n and d of 64 x n; k is 16 for 16-bit
elements, 32 for e4m3 and 8 for tf32, which are float32 whose low 13 bits are ignored. b lies in
shared memory, a there too or in registers. Thread t of the warpgroup, with w = t // 32 and
l = t % 32, holds

    d[i]     (16 w + l // 4 + 8 (i // 2 % 2), 8 (i // 4) + 2 (l % 4) + i % 2)
    a[i]     (16 w + l // 4 + 8 (i % 2), 2 (l % 4) + h + 8 (i // 2))     h = 0, 1: 16-bit elements
    a[i]     (16 w + l // 4 + 8 (i % 2), 4 (l % 4) + h + 16 (i // 2))    h = 0 to 3: e4m3
    a[i]     (16 w + l // 4 + 8 (i % 2), l % 4 + 4 (i // 2))             tf32

which for each warp are the layouts of `tensor_cores`, product beside product.

A tile in shared memory is named by a descriptor of 64 bits:

    bits  0-13   address / 16
    bits 16-29   leading byte offset / 16
    bits 32-45   stride byte offset / 16
    bits 49-51   base offset: 0 where the pattern of the swizzle begins at a multiple of 1024 bytes
    bits 62-63   swizzle: 0 none, 1 of 128 bytes, 2 of 64, 3 of 32

With the swizzle of 128 bytes a tile is made of slabs of 128-byte rows, of which the 16-byte chunk
c of row r lies at c ^ (r % 8). K-major operands have the k elements of a row side by side, and the
stride offset leads to the next eight rows; MN-major ones have rows side by side, 64 to a slab, the
stride offset leads to the next eight k, and the leading offset to the next slab. With swizzles of
64 and 32 bytes rows are as long, and c lies at c ^ (r // 2 % 4) and c ^ (r // 4 % 2). Without one
a tile is made of blocks of eight chunks, one behind the other: eight rows of a chunk if K-major,
where the stride offset leads to the next eight rows and the leading one to the next chunk of k,
else eight k, where the leading offset leads to the next eight k and the stride one to the next
eight rows. Source of both: PTX ISA 9.7.15.5.1, and the layouts in `mma_traits_sm90_gmma.hpp` of
CUTLASS.

Between issue and wait the accumulators and the operands belong to the hardware. Instructions hold
the threads of a warp together (`.sync`), and all four warps must execute the same (`.aligned`);
nothing says that they do so at the same time, or that products are over for all of them at once.
"""

from functools import cache

from numflash.ptx.instruction import instruction
from numflash.ptx.operands import Accumulator, LaterRead
from numflash.ptx.scalars import f32, u32, u64
from numflash.runtime.mode import SIMULATED

if SIMULATED:
    from numflash.simulator import warpgroup

_TYPES = {
    "float16": ("f16", 16),
    "bfloat16": ("bf16", 16),
    "e4m3": ("e4m3", 32),
    "tf32": ("tf32", 8),
}
_OF_16_BITS = ("float16", "bfloat16")


@instruction("wgmma.fence.sync.aligned;", sm=90, newest=90, collective="warpgroup")
def wgmma_fence():
    """Order earlier writes to registers before the products that follow. PTX ISA 9.7.15.7.1."""
    warpgroup.fence()


@instruction("wgmma.commit_group.sync.aligned;", sm=90, newest=90, collective="warpgroup")
def wgmma_commit_group():
    """Make a group of the products issued since the last one. PTX ISA 9.7.15.7.2."""
    warpgroup.commit()


@cache
def make_wgmma_wait_group(pending: int, registers: int):
    """The instruction that waits until at most `pending` groups are under way.

    It names an accumulator of `registers`, which is that of the last group waited for: its readers
    cannot move before the wait. PTX ISA 9.7.15.7.3.
    """

    def wgmma_wait_group(acc: Accumulator(f32, registers)):
        warpgroup.wait(acc, pending)

    wgmma_wait_group.__name__ = f"wgmma_wait_group_{pending}_of_{registers}"
    wgmma_wait_group.__doc__ = f"Wait until at most {pending} groups are under way."
    return instruction(
        f"wgmma.wait_group.sync.aligned {pending};",
        sm=90,
        newest=90,
        collective="warpgroup",
        volatile=True,
    )(wgmma_wait_group)


@cache
def make_wgmma(
    n: int,
    dtype: str,
    a: str,
    b_major: str = "k",
    accumulates: bool = True,
    in_place: bool = True,
    a_major: str = "k",
    sums: type = f32,
):
    """The product of a warpgroup: acc += a b, or acc = a b.

    Args:
        n: columns of b, a multiple of 8 from 8 to 256.
        dtype: of the operands: "float16", "bfloat16", "e4m3" or "tf32".
        a: where operand a is: "shared", named by a descriptor, or "registers".
        b_major: "k" or "mn"; e4m3 and tf32 have "k" only.
        accumulates: whether acc is added to.
        in_place: whether acc has the same registers before and after. Where acc is not added to,
            other registers are free until then; but the assembler may delay readers of the old
            acc.
        a_major: of an operand a in shared memory, as b_major.
        sums: elements of acc: f32, or u32, which are words of two float16 each. Register i of
            these holds d[2 i] and d[2 i + 1]; operands must be float16.

    PTX ISA 9.7.15.5.2.
    """
    name, k = _TYPES[dtype]
    by_k = (a_major, b_major) == ("k", "k")
    if n % 8 or not 8 <= n <= 256 or not (by_k or dtype in _OF_16_BITS):
        raise ValueError(
            f"there is no wgmma of {dtype} with n = {n}, a {a_major}-major and b {b_major}-major"
        )
    if a == "registers" and a_major != "k":
        raise ValueError(f"operand a in registers is K-major, got {a_major!r}")
    if sums is not f32 and (sums is not u32 or dtype != "float16"):
        raise ValueError(f"there is no wgmma of {dtype} with sums of {sums.__name__}")
    of_halves = sums is u32
    transposes = f", {int(b_major == 'mn')}" if dtype in _OF_16_BITS else ""
    if a == "shared" and transposes:
        transposes = f", {int(a_major == 'mn')}" + transposes
    template = (
        f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{'f16' if of_halves else 'f32'}.{name}.{name} "
        "<acc>, <a>, <b>, "
        f"{int(accumulates)}, 1, 1{transposes};"
    )
    if accumulates and not in_place:
        raise ValueError("wgmma adds to acc in place")
    accumulator = Accumulator(sums, n // 4 if of_halves else n // 2, "rw" if in_place else "w")

    def from_shared(acc: accumulator, a: u64, b: u64):
        operand = warpgroup.shared_a(a, a_major, dtype)
        warpgroup.multiply(acc, operand, b, b_major, n, dtype, accumulates, of_halves)

    def from_registers(acc: accumulator, a: LaterRead(u32, 4), b: u64):
        operand = warpgroup.register_a(a, dtype)
        warpgroup.multiply(acc, operand, b, b_major, n, dtype, accumulates, of_halves)

    function = {"shared": from_shared, "registers": from_registers}[a]
    sign = "+=" if accumulates else "="
    function.__name__ = f"wgmma_m64n{n}k{k}_{name}_a_{a}_b_{b_major}" + "_more" * accumulates
    function.__name__ += "_a_mn" * (a_major == "mn") + "_f16_sums" * of_halves
    function.__name__ += "_in_place" * (in_place and not accumulates)
    function.__doc__ = f"acc {sign} a b of {dtype}, n = {n}. PTX ISA 9.7.15.5.2."
    return instruction(template, sm=90, newest=90, collective="warpgroup", volatile=True)(function)
