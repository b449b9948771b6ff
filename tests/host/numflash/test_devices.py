"""Limits of GPUs, and the blocks that fit on an SM: examples worked out by hand.

The rules are those of NVIDIA's cuda_occupancy.h: a warp takes its registers in units of 256 from
one of four partitions of 16384; a block takes shared memory in units of 128 bytes (256 on Turing)
and, from sm_80 on, 1 KB more than it asked for.
"""

import pytest

from numflash.runtime.devices import (
    ARCHITECTURES,
    KB,
    MIN_COMPUTE_CAPABILITY,
    architecture,
    architecture_of,
    blocks_per_sm,
)


@pytest.mark.parametrize(
    ("arch", "num_threads", "registers", "smem_bytes", "expected"),
    [
        # 64 x 32 = 2048 registers a warp, 16384 // 2048 = 8 warps x 4 = 32 warps, of 4 a block
        ("sm_80", 128, 64, 0, (8, "registers")),
        # 168 x 32 = 5376, 16384 // 5376 = 3, 12 warps
        ("sm_90a", 128, 168, 0, (3, "registers")),
        # 169 x 32 = 5408, rounded up to 22 x 256 = 5632, 16384 // 5632 = 2, 8 warps
        ("sm_90a", 128, 169, 0, (2, "registers")),
        # 80 x 32 = 2560, 16384 // 2560 = 6, 24 warps of 5 a block; 65536 // 2560 would be 25
        ("sm_80", 160, 80, 0, (4, "registers")),
        # 72 x 32 = 2304, 16384 // 2304 = 7, 28 warps: a block of 32 warps cannot run
        ("sm_80", 1024, 72, 0, (0, "registers")),
        # 1024 // 256, although 64 warps would find registers
        ("sm_75", 256, 32, 0, (4, "threads")),
        ("sm_86", 512, 32, 0, (3, "threads")),
        # A part of a warp is a warp: 1536 // 128 = 12
        ("sm_89", 97, 16, 0, (12, "threads")),
        ("sm_75", 32, 16, 0, (16, "blocks")),
        ("sm_89", 32, 16, 0, (24, "blocks")),
        # (49 + 1) KB twice in 100 KB
        ("sm_86", 128, 32, 49 * KB, (2, "shared memory")),
        ("sm_86", 128, 32, 49 * KB + 4, (1, "shared memory")),
        ("sm_86", 128, 32, 99 * KB, (1, "shared memory")),
        ("sm_86", 128, 32, 99 * KB + 4, (0, "shared memory")),
        # Turing takes nothing for itself: 32 KB twice in 64 KB
        ("sm_75", 128, 32, 32 * KB, (2, "shared memory")),
        ("sm_75", 128, 32, 64 * KB, (1, "shared memory")),
        # 10900 is rounded up to 43 x 256 = 11008, of which 5 fit; of 10900 it were 6
        ("sm_75", 128, 32, 10900, (5, "shared memory")),
        # (10900 + 1024) is rounded up to 94 x 128 = 12032, 167936 // 12032 = 13
        ("sm_80", 32, 32, 10900, (13, "shared memory")),
    ],
)
def test_blocks_per_sm(arch, num_threads, registers, smem_bytes, expected):
    assert blocks_per_sm(ARCHITECTURES[arch], num_threads, registers, smem_bytes) == expected


@pytest.mark.parametrize("limits", ARCHITECTURES.values(), ids=list(ARCHITECTURES))
def test_limits_are_consistent(limits):
    assert limits.max_smem_per_block == limits.smem_per_sm - limits.reserved_smem_per_block
    assert limits.compute_capability >= MIN_COMPUTE_CAPABILITY
    assert limits.max_threads_per_sm % 32 == 0
    fullest = (1, "shared memory")
    assert blocks_per_sm(limits, 32, 16, limits.max_smem_per_block) == fullest
    assert architecture_of(limits.compute_capability) is limits
    assert architecture(limits.arch) is limits


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("sm_90", "sm_90a"),
        ("90", "sm_90a"),
        ("90a", "sm_90a"),
        ("80", "sm_80"),
        ("120f", "sm_120"),
    ],
)
def test_architecture_by_name(name, arch):
    assert architecture(name).arch == arch


@pytest.mark.parametrize("name", ["", "sm_", "sm_70", "hopper", "sm_900", "compute_90"])
def test_unknown_architecture(name):
    with pytest.raises(ValueError, match=r"one of sm_75, .*sm_120.*, got"):
        architecture(name)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((9, 0), "sm_90a"),
        ((8, 2), "sm_80"),  # unknown: the nearest older one with the same machine code
        ((10, 7), "sm_103"),
        ((12, 5), "sm_121"),
    ],
)
def test_architecture_of_device(capability, arch):
    assert architecture_of(capability).arch == arch


@pytest.mark.parametrize("capability", [(3, 5), (7, 0), (7, 2), (13, 0)])
def test_unsupported_device(capability):
    with pytest.raises(ValueError, match=f"sm_{capability[0]}{capability[1]} is not supported"):
        architecture_of(capability)
