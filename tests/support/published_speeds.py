"""Published speeds of attention, and what the offline model says of the same kernels.

FlashAttention-2's and -3's kernels have the structure of `kernels.mma` and `kernels.wgmma`, so
that a config of ours stands for each. What they do otherwise is put into the comparison:

- FlashAttention-2 starts the blocks of a head from the first rows to the last, which with a causal
  mask are the short ones first; ours start the longest first.
- Without a mask FlashAttention-3 runs pairs of blocks from head_dim 128 on, which fetch K and V
  once for both; ours fetch them twice. It stands for that to give the L2 twice the bandwidth.

Sources: arXiv 2407.08608, Figures 5 and 6 and Table 2, section 3.1 (H100 at 1830 MHz; 16,384
tokens, heads x head_dim = 2048); FlashAttention-2's paper (A100); gpu-mode/ring-attention issue 10
(RTX A5000); PyTorch's article on Flash-Decoding (A100); vLLM's flash-attention pull request 63
(H100), and flash-attention's 1236 (H100 PCIe) and issue 1572 (H100).
"""

import heapq
from dataclasses import dataclass, replace
from functools import cache
from unittest import mock

from numflash.configs import mma_rules, parse_config
from numflash.problem.classes import ProblemClass
from tests.support import published_fp8, published_gradients
from tuner import model
from tuner.model import errors, prediction
from tuner.space import machines
from tuner.space.configs import Space

SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
# TFLOP/s by (head_dim, mask), of an H100.
FLASH_ATTENTION_2 = {
    (64, "full"): (282, 306, 318, 321, 322, 324),
    (64, "causal"): (180, 229, 262, 284, 295, 299),
    (128, "full"): (309, 350, 362, 368, 370, 370),
    (128, "causal"): (191, 260, 298, 319, 333, 335),
    (256, "full"): (275, 313, 321, 323, 324, 326),
    (256, "causal"): (208, 251, 278, 293, 297, 298),
}
FLASH_ATTENTION_3 = {
    (64, "full"): (333, 392, 460, 476, 496, 497),
    (64, "causal"): (197, 265, 371, 420, 460, 473),
    (128, "full"): (467, 565, 625, 638, 646, 648),
    (128, "causal"): (292, 423, 521, 579, 602, 616),
    (256, "full"): (482, 639, 707, 736, 746, 756),
    (256, "causal"): (286, 427, 537, 612, 628, 642),
}
# Of gradients, without a mask, by head_dim.
FLASH_ATTENTION_2_BACKWARD = {
    64: (198, 238, 264, 279, 287, 291),
    128: (214, 260, 291, 310, 318, 322),
}
_MMA_CONFIGS = {64: "sm80-m128n128w4s1", 128: "sm80-m128n64w4s1", 256: "sm80-m64n64w4s1"}
_WGMMA_CONFIGS = {
    (64, "full"): "sm90-m192n128w12s2-overlap-pingpong-persistent",
    (64, "causal"): "sm90-m192n128w12s2-overlap-pingpong-persistent",
    (128, "full"): "sm90-m128n176w8s2-overlap-pingpong-persistent",
    (128, "causal"): "sm90-m128n128w8s2-overlap-pingpong-persistent",
    (256, "full"): "sm90-m128n80w8s2-overlap-persistent",
    (256, "causal"): "sm90-m128n80w8s2-overlap-persistent",
}
# Table 2 and section 3.1: head_dim 128, seqlen 8192, without a mask.
_ABLATION = {
    "sm90-m128n176w8s2-persistent": 570,
    "sm90-m128n176w8s2-pingpong-persistent": 630,
    "sm90-m128n176w8s2-overlap-pingpong-persistent": 650,
}
_A5000 = machines.of_device("NVIDIA RTX A5000", "sm_86", 64, 1695, 768, 6 * 2**20)
# (GPU, batch, seqlen_k, heads, key-value heads, microseconds, fitted) of a query a sequence,
# head_dim 128.
_DECODING = [
    ("A100", 256, 256, 16, 2, 63.4, False),
    ("A100", 128, 512, 16, 2, 67.7, False),
    ("A100", 64, 1024, 16, 2, 77.7, False),
    ("A100", 32, 2048, 16, 2, 58.5, False),
    ("A100", 16, 4096, 16, 2, 57.0, False),
    ("A100", 8, 8192, 16, 2, 56.4, False),
    ("A100", 4, 16384, 16, 2, 58.2, False),
    ("A100", 2, 32768, 16, 2, 60.3, False),
    ("A100", 1, 65536, 16, 2, 64.4, True),
    ("A100", 1, 131072, 16, 2, 106.6, True),
    ("H100", 1, 1024, 20, 4, 14.8, True),
    ("H100", 1, 2048, 20, 4, 15.6, False),
    ("H100", 1, 4096, 20, 4, 16.5, False),
    ("H100", 1, 8192, 20, 4, 19.1, False),
    ("H100", 1, 16384, 20, 4, 26.3, False),
    ("H100 PCIe", 4, 16384, 16, 1, 26.9, False),
    # Pages of 8 keys, which ours do not have.
    ("H100", 16, 4000, 32, 32, 567.0, False),
]


@dataclass(frozen=True)
class Point:
    """A published time and the predicted one, milliseconds.

    Attributes:
        name: what ran where.
        kind: as `model.errors.kind` names it.
        published, predicted: milliseconds.
        fitted: whether a constant of the model was chosen by it.
    """

    name: str
    kind: str
    published: float
    predicted: float
    fitted: bool

    @property
    def error(self) -> float:
        """By which part the longer of both times is longer."""
        return max(self.published / self.predicted, self.predicted / self.published) - 1


def problem_class(head_dim: int, mask: str, seqlen: int, family: str = "forward") -> ProblemClass:
    """Of the papers' grid."""
    heads = 16384 * 2048 // seqlen // head_dim
    traits = f"float16-d{head_dim}-dv{head_dim}-vec"
    return ProblemClass.parse(f"{family} {traits} {mask} q{seqlen} k{seqlen} bh{heads} g1")


def _published_ms(problem: ProblemClass, tflops: float) -> float:
    """The papers count half of the products where a mask is causal."""
    flops = 4 * problem.batch_heads * problem.seqlen_q**2 * problem.traits.head_dim
    return flops / (2 if problem.mask == "causal" else 1) / tflops / 1e9


def short_blocks_first(grid, num_sms, resident, clocks) -> float:
    """As `dispatch.closed_form`, of blocks started head by head, the shortest first."""
    free = [0.0] * (num_sms * resident)
    for tiles in sorted(grid.walks.tiles.tolist()) * grid.heads:
        heapq.heappush(free, heapq.heappop(free) + clocks(tiles, resident))
    return max(free)


def _estimate(machine, problem: ProblemClass, config: str) -> float:
    return model.estimate(machine, problem, parse_config(problem.family, config)).ms


def _of_flash_attention_2(machine, gpu, head_dim, mask, seqlen, tflops, fitted) -> Point:
    problem = problem_class(head_dim, mask, seqlen)
    with mock.patch.object(prediction, "closed_form", short_blocks_first):
        predicted = _estimate(machine, problem, _MMA_CONFIGS[head_dim])
    name = f"FlashAttention-2, {gpu}, {problem}"
    return Point(name, "sm80 forward", _published_ms(problem, tflops), predicted, fitted)


def forward_of_mma() -> list[Point]:
    """FlashAttention-2's forward."""
    h100, a100 = machines.find("H100"), machines.find("A100")
    points = []
    for (d, mask), speeds in FLASH_ATTENTION_2.items():
        for s, speed in zip(SEQLENS, speeds, strict=True):
            fitted = mask == "full" and s in (2048, 16384)
            points.append(_of_flash_attention_2(h100, "H100", d, mask, s, speed, fitted))
    for d, speed in ((64, 192), (128, 227)):
        points.append(_of_flash_attention_2(a100, "A100", d, "full", 16384, speed, True))
    for s, speed in ((512, 84.08), (2048, 81.31), (8192, 81.86)):
        points.append(_of_flash_attention_2(_A5000, "RTX A5000", 64, "full", s, speed, False))
    return points


def forward_of_wgmma() -> list[Point]:
    """FlashAttention-3's forward."""
    h100 = machines.find("H100")
    pairs = replace(h100, l2_bytes_per_clock=2 * h100.l2_bytes_per_clock)
    cases = [
        (config, d, mask, s, speed)
        for (d, mask), config in _WGMMA_CONFIGS.items()
        for s, speed in zip(SEQLENS, FLASH_ATTENTION_3[d, mask], strict=True)
    ]
    cases += [(config, 128, "full", 8192, speed) for config, speed in _ABLATION.items()]
    points = []
    for config, d, mask, s, speed in cases:
        problem = problem_class(d, mask, s)
        in_pairs = mask == "full" and d >= 128
        fitted = config in _ABLATION and s == 8192
        fitted |= s == 16384 and (d, mask) in ((64, "full"), (256, "full"), (256, "causal"))
        predicted = _estimate(pairs if in_pairs else h100, problem, config)
        published = _published_ms(problem, speed)
        name = f"FlashAttention-3, H100, {config}, {problem}"
        points.append(Point(name, "sm90 forward", published, predicted, fitted))
    return points


def _preferred_of_mma(problem: ProblemClass, limits):
    """The config that would run by rule if there were no `wgmma`."""
    for config in mma_rules.candidates(problem.family, "sm80"):
        if mma_rules.misfit(config, problem.traits, limits, problem.seqlen_q, 8) is None:
            return config
    raise LookupError(f"no config of mma for {problem}")


def gradients() -> list[Point]:
    """FlashAttention-2's backward of five products; ours, in two kernels, have seven."""
    h100, points = machines.find("H100"), []
    for d, speeds in FLASH_ATTENTION_2_BACKWARD.items():
        for s, speed in zip(SEQLENS, speeds, strict=True):
            ms = {}
            for family in ("backward-dq", "backward-dkdv", "delta"):
                problem = problem_class(d, "full", s, family)
                config = Space(problem, h100).default
                if family != "delta":
                    config = _preferred_of_mma(problem, h100.limits)
                ms[family] = _estimate(h100, problem, str(config))
            predicted = (ms["backward-dq"] + ms["backward-dkdv"]) * 5 / 7 + ms["delta"]
            published = 2.5 * _published_ms(problem_class(d, "full", s), speed)
            name = f"FlashAttention-2, H100, gradients, head_dim {d}, {s} tokens"
            points.append(Point(name, "sm80 backward", published, predicted, False))
    return points


def gradients_of_wgmma() -> list[Point]:
    """Those of `published_gradients`, but for three of kernels that ours have no like of."""
    return [
        Point(
            f"{each.who}, {each.gpu}, gradients, {each.shape}",
            "sm90 backward",
            published_gradients.published_ms(each),
            published_gradients.predicted_ms(each),
            each.fits,
        )
        for each in published_gradients.PUBLISHED
        if each not in published_gradients.UNLIKE_OURS
    ]


def forward_on_8_bits() -> list[Point]:
    """Those of `published_fp8`."""
    found = []
    for each in published_fp8.PUBLISHED:
        problem = published_fp8.problem_of(each)
        found.append(
            Point(
                f"{each.who}, {each.gpu}, {problem}",
                errors.kind(problem, parse_config("forward", each.config)),
                published_fp8.published_ms(each),
                published_fp8.predicted_ms(each),
                False,
            )
        )
    return found


def decoding() -> list[Point]:
    """One query a sequence, keys split over the machine; ours by its default config."""
    points = []
    for gpu, batch, keys, heads, heads_kv, microseconds, fitted in _DECODING:
        machine, traits = machines.find(gpu), "float16-d128-dv128-vec"
        group = heads // heads_kv
        text = f"forward {traits} full q1 k{keys} bh{batch * heads} g{group}"
        problem = ProblemClass.parse(text)
        predicted = _estimate(machine, problem, str(Space(problem, machine).default))
        name = f"decoding, {gpu}, {problem}"
        points.append(Point(name, "sm80 few queries", microseconds / 1e3, predicted, fitted))
    return points


@cache
def points() -> list[Point]:
    """All of them."""
    return [
        *forward_of_mma(),
        *forward_of_wgmma(),
        *gradients(),
        *gradients_of_wgmma(),
        *decoding(),
        *forward_on_8_bits(),
    ]
