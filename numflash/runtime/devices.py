"""Limits of GPUs by compute capability, and the number of blocks of a kernel that fit on an SM.

Sources: CUDA C++ Programming Guide, "Compute Capabilities", tables of technical specifications;
cuda/__device/arch_traits.h of CCCL 3; cuda_occupancy.h of CUDA 13.
"""

from dataclasses import dataclass

KB = 1024
REGISTER_UNIT = 256
_WARP = 32
# An SM consists of four partitions, each with its own registers and warps.
_PARTITIONS = 4


@dataclass(frozen=True)
class Architecture:
    """The limits of one compute capability.

    Attributes:
        arch: the compiler's name, as in "sm_90a".
        max_smem_per_block: dynamic shared memory a block can opt in to, bytes.
        smem_per_sm: shared memory of an SM, bytes.
        max_threads_per_sm, max_blocks_per_sm: the most that an SM holds at once.
        registers_per_sm: 32-bit registers of an SM.
        reserved_smem_per_block: shared memory the system takes for each block, bytes.
        smem_unit: shared memory is handed out to blocks in multiples of this, bytes.
    """

    arch: str
    max_smem_per_block: int
    smem_per_sm: int
    max_threads_per_sm: int
    max_blocks_per_sm: int
    registers_per_sm: int = 65536
    reserved_smem_per_block: int = KB
    smem_unit: int = 128

    @property
    def compute_capability(self) -> tuple[int, int]:
        """(major, minor)."""
        digits = self.arch.removeprefix("sm_").rstrip("af")
        return int(digits[:-1]), int(digits[-1])


ARCHITECTURES: dict[str, Architecture] = {
    a.arch: a
    for a in (
        Architecture(
            "sm_75", 64 * KB, 64 * KB, 1024, 16, reserved_smem_per_block=0, smem_unit=256
        ),
        Architecture("sm_80", 163 * KB, 164 * KB, 2048, 32),
        Architecture("sm_86", 99 * KB, 100 * KB, 1536, 16),
        Architecture("sm_87", 163 * KB, 164 * KB, 1536, 16),
        Architecture("sm_88", 99 * KB, 100 * KB, 1536, 16),
        Architecture("sm_89", 99 * KB, 100 * KB, 1536, 24),
        Architecture("sm_90a", 227 * KB, 228 * KB, 2048, 32),
        Architecture("sm_100", 227 * KB, 228 * KB, 2048, 32),
        Architecture("sm_103", 227 * KB, 228 * KB, 2048, 32),
        Architecture("sm_110", 227 * KB, 228 * KB, 1536, 24),
        Architecture("sm_120", 99 * KB, 100 * KB, 1536, 24),
        Architecture("sm_121", 99 * KB, 100 * KB, 1536, 24),
    )
}
"""Compiler's name -> limits, for every supported compute capability."""

MIN_COMPUTE_CAPABILITY = (7, 5)


def architecture_of(compute_capability: tuple[int, int]) -> Architecture:
    """The architecture of a device; the nearest older one of its major version if unknown.

    Raises:
        ValueError: older than sm_75, or of an unknown major version.
    """
    known = {a.compute_capability: a for a in ARCHITECTURES.values()}
    older = [
        cc for cc in known if cc[0] == compute_capability[0] and cc <= tuple(compute_capability)
    ]
    if not older:
        name = "sm_{}{}".format(*compute_capability)
        raise ValueError(
            f"compute capability {name} is not supported; numflash runs on "
            f"{', '.join(ARCHITECTURES)}"
        )
    return known[max(older)]


def architecture(name: str) -> Architecture:
    """The architecture with this name; "sm_90" and "90" mean "sm_90a". Raises ValueError."""
    plain = "sm_" + name.removeprefix("sm_")
    for candidate in (plain, plain + "a", plain.rstrip("af")):
        if candidate in ARCHITECTURES:
            return ARCHITECTURES[candidate]
    raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {name!r}")


def blocks_per_sm(
    limits: Architecture, num_threads: int, registers: int, smem_bytes: int
) -> tuple[int, str]:
    """Blocks of a kernel that fit on one SM at once, and the resource that limits them.

    Args:
        limits: the GPU.
        num_threads: threads per block.
        registers: registers per thread.
        smem_bytes: shared memory per block, static and dynamic.

    Returns:
        (blocks, "threads" | "blocks" | "registers" | "shared memory"); 0 blocks if it cannot run.
    """
    warps = -(-num_threads // _WARP)
    # Registers are handed out to warps, each of which lives in one partition.
    per_warp = _round_up(max(registers, 1) * _WARP, REGISTER_UNIT)
    warps_by_registers = limits.registers_per_sm // _PARTITIONS // per_warp * _PARTITIONS
    taken = _round_up(smem_bytes + limits.reserved_smem_per_block, limits.smem_unit)
    by_smem = limits.smem_per_sm // max(taken, limits.smem_unit)
    candidates = {
        "threads": limits.max_threads_per_sm // (warps * _WARP),
        "blocks": limits.max_blocks_per_sm,
        "registers": warps_by_registers // warps,
        "shared memory": by_smem if smem_bytes <= limits.max_smem_per_block else 0,
    }
    limited_by = min(candidates, key=candidates.get)
    return candidates[limited_by], limited_by


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
