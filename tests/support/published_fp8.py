"""Published speeds of the forward on 8-bit floats on Hopper, by which no constant was chosen.

The kernels have the structure of `kernels.wgmma.fp8_forward`. What they do otherwise:

- O is summed up by the tensor cores: no multiply-adds add a tile's share.
- FlashAttention-3's warpgroups take turns, and do not overlap softmax and products of their own.
  It runs pairs of blocks where there is no mask and the number of tiles of rows is even, and
  stands for that as in `published_speeds`.
- FlashAttention-3 as in its paper transposes V in the kernel, before the first product with it.
  What that costs is not modelled: with fewer than 4,096 tokens, of which the first tiles are a
  large part, it takes up to 1.74 times as long as predicted. The version of pull request 1075,
  whose V is transposed ahead as ours is, is within 10 % at each length.
- Of cuDNN, whose kernels nobody has described, it is assumed that it is otherwise as ours.

Sources: arXiv 2407.08608, Figure 7 (H100; its causal bars at head_dim 128, and most at 64, could
not be read); flash-attention's pull request 1075 (H100 PCIe); cudnn-frontend, results of cuDNN
9.19 on an H200.
"""

from dataclasses import replace
from typing import NamedTuple
from unittest import mock

from numflash.configs import parse_config
from numflash.problem.classes import ProblemClass
from tuner import model
from tuner.model import hopper
from tuner.space import machines


class Published(NamedTuple):
    """A published speed.

    Attributes:
        who: whose kernel.
        gpu: as `machines.find` knows it.
        shape: (head_dim, mask, seqlen, heads in all, query heads that share keys).
        config: of ours, which stands for it.
        tflops: the speed; a causal mask counts as half of the products.
    """

    who: str
    gpu: str
    shape: tuple[int, str, int, int, int]
    config: str
    tflops: float


# Figure 7 has multiples of 132 tokens, the SMs of an H100.
_BATCHES = {512: 32, 1024: 16, 2048: 8, 4224: 4, 8448: 2, 16896: 1}
_FLASH_ATTENTION_3 = {
    (64, "full"): (240, 396, 462, 568, 596, 613),
    (64, "causal"): (164, 244),
    (128, "full"): (348, 596, 733, 918, 974, 1008),
    (256, "full"): (510, 744, 931, 966, 1151, 1171),
    (256, "causal"): (329, 521, 703, 856, 960, 1024),
}
# The paper's has four stages at head_dim 64; ours at most three.
_CONFIGS = {
    64: "fp8-sm90-m192n128w12s3-pingpong-persistent",
    128: "fp8-sm90-m128n256w8s2-pingpong-persistent",
    256: "fp8-sm90-m128n128w8s2-pingpong-persistent",
}
_TRANSPOSED_AHEAD = (433, 538, 605, 619, 618)
_CUDNN = {
    "full": (870, 973, 1023, 1055, 1062),
    "causal": (698, 854, 964, 1010, 1042),
}
_AS_OURS = "fp8-sm90-m128n128w8s2-overlap-pingpong-persistent"


def _grid(head_dim: int, mask: str, seqlen: int) -> tuple[int, str, int, int, int]:
    return head_dim, mask, seqlen, 2048 // head_dim * _BATCHES[seqlen], 1


PUBLISHED = (
    *(
        Published("FlashAttention-3", "H100", _grid(d, mask, n), _CONFIGS[d], each)
        for (d, mask), speeds in _FLASH_ATTENTION_3.items()
        for n, each in zip(_BATCHES, speeds, strict=False)
    ),
    *(
        Published(
            "FlashAttention-3, V transposed ahead",
            "H100 PCIe",
            _grid(128, "full", n),
            _CONFIGS[128],
            each,
        )
        for n, each in zip(_BATCHES, _TRANSPOSED_AHEAD, strict=False)
    ),
    *(
        Published("cuDNN", "H200", (128, mask, 2048 << i, 64, 8), _AS_OURS, each)
        for mask, speeds in _CUDNN.items()
        for i, each in enumerate(speeds)
    ),
)


def problem_of(entry: Published) -> ProblemClass:
    """The class, with the sizes as they are."""
    head_dim, mask, seqlen, heads, group = entry.shape
    traits = f"float16-d{head_dim}-dv{head_dim}-vec-fp8"
    return ProblemClass.parse(f"forward {traits} {mask} q{seqlen} k{seqlen} bh{heads} g{group}")


def published_ms(entry: Published) -> float:
    """Milliseconds."""
    head_dim, mask, seqlen, heads, _ = entry.shape
    flops = 4 * heads * seqlen**2 * head_dim
    return flops / (2 if mask == "causal" else 1) / entry.tflops / 1e9


def predicted_ms(entry: Published) -> float:
    """Milliseconds of the same kernel by the model."""
    problem, machine = problem_of(entry), machines.find(entry.gpu)
    config = parse_config("forward", entry.config)
    row_tiles = -(-problem.seqlen_q // config.tile_m)
    if entry.who != "cuDNN" and problem.mask == "full" and row_tiles % 2 == 0:
        machine = replace(machine, l2_bytes_per_clock=2 * machine.l2_bytes_per_clock)
    with mock.patch.object(hopper, "added_to_o", lambda traits: 0):
        return model.estimate(machine, problem, config).ms
