"""Published speeds of gradients on Hopper, and which of them may choose the model's constants.

The two sets were written down, and committed, before anything was fitted: to fit
FlashAttention-3 at 2,048 and 16,384 tokens without a mask and at 8,192 with a causal one, and
ThunderKittens' longest sequence; everything else to test. Two that were to fit are left to test,
because they decide nothing: an order's cost hardly depends on the time of a turn, and at head_dim
256 the form of the kernel is not published.

What the kernels do otherwise than ours is put into the comparison:

- None of FlashAttention-3's work beside products is under products of the same warpgroup; so it is
  by disassembly, and assumed of ThunderKittens and FlashAttention-4. Of cuDNN, whose kernels
  nobody has described, it is assumed to be as ours.
- FlashAttention-3 zeroes its sums of dQ. With a causal mask its blocks come from 4 heads in turn.
- ThunderKittens zeroes and writes dQ, dK and dV in float32, and converts nothing.
- cuDNN's blocks are taken to have the keys of one query head.
- tritonbench adds the gradients to those of the call before (`get_grad_to_none` is None), in three
  kernels that it times too.
- At head_dim 256 FlashAttention-4's tile of scores is 64 x 48 or 64 x 80; how it lies on two
  warpgroups is assumed. These three are listed, and no error is claimed for them: no kernel of
  ours adds dQ in the L2 at head_dim 256.

Sources: arXiv 2407.08608, Figure 6 (H100 at 1830 MHz); ThunderKittens' figure of its attention
(H100); cudnn-frontend, results of cuDNN 9.19 on an H200; of flash-attention the pull requests
1893 (H100), 2207 (Hopper), 2888 and 2889 (H200), and issue 2878 (H200); tritonbench's pull
request 1267 (H100). All in TFLOP/s of five products, half of them with a causal mask; batch, heads
and lengths are those of the source, or of the papers' grid: 16,384 tokens, and heads x head_dim
are 2048.
"""

from typing import NamedTuple

from numflash.problem.classes import ProblemClass
from tuner import model
from tuner.model import hopper_backward
from tuner.model.hopper_backward import Form, Product, make_form, product
from tuner.model.prediction import LAUNCH_MS
from tuner.space import machines
from tuner.space.configs import Space


class Published(NamedTuple):
    """A published speed.

    Attributes:
        who: whose kernel, as `tests.support.published_speeds` models it.
        gpu: as `machines.find` knows it.
        shape: (head_dim, mask, seqlen, heads in all, query heads that share keys).
        tflops: the speed.
        fits: whether it may choose a constant.
    """

    who: str
    gpu: str
    shape: tuple[int, str, int, int, int]
    tflops: float
    fits: bool = False


def _grid(head_dim: int, mask: str, seqlen: int) -> tuple[int, str, int, int, int]:
    return head_dim, mask, seqlen, 16384 * 2048 // seqlen // head_dim, 1


_SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
_FLASH_ATTENTION_3 = {64: (272, 363, 422, 453, 472, 474), 128: (316, 424, 501, 542, 559, 561)}
_THUNDERKITTENS = {
    "full": ((768, 364), (1536, 493), (3072, 547), (6144, 568), (12288, 553)),
    "causal": ((768, 185), (1536, 330), (3072, 400), (6144, 468), (12288, 494)),
}
_CUDNN = {
    "full": ((2048, 504), (4096, 560), (8192, 594), (16384, 612), (32768, 572)),
    "causal": ((2048, 370), (4096, 474), (8192, 541), (16384, 579), (32768, 581)),
}
_IN_ORDER_OF_KEYS = (240.2, 297.9, 354.5, 394.4, 450.1, 506.9)
_SHIFTED = (259.4, 339.3, 419.0, 468.4, 503.2, 513.8)
_TRITONBENCH = ((1024, 709.66), (2048, 1631.26), (4096, 4643.46), (8192, 15308.16))
_CAUSAL = _grid(128, "causal", 8192)
# Share of the bandwidth that large copies reach, as `prediction.MEMORY_EFFICIENCY` says.
_OF_A_COPY = 0.9
_WIDE = _grid(256, "full", 16384)

PUBLISHED = (
    *(
        Published("FlashAttention-3", "H100", _grid(d, "full", n), each, n in (2048, 16384))
        for d, speeds in _FLASH_ATTENTION_3.items()
        for n, each in zip(_SEQLENS, speeds, strict=True)
    ),
    *(
        Published("ThunderKittens", "H100", (128, mask, n, 256, 1), each, each == 553)
        for mask, speeds in _THUNDERKITTENS.items()
        for n, each in speeds
    ),
    *(
        Published("cuDNN", "H200", (128, mask, n, 64, 8), each)
        for mask, speeds in _CUDNN.items()
        for n, each in speeds
    ),
    Published("FlashAttention-3", "H100", _CAUSAL, 574.7, True),
    Published("FlashAttention-3, order of keys", "H100", _CAUSAL, 361.3),
    Published("FlashAttention-3, last keys first", "H100", _CAUSAL, 474.0),
    *(
        Published(f"FlashAttention-3, {order}", "H100", _grid(64, "full", n), each)
        for order, speeds in (("order of keys", _IN_ORDER_OF_KEYS), ("shifted", _SHIFTED))
        for n, each in zip(_SEQLENS, speeds, strict=True)
    ),
    *(
        Published(
            "FlashAttention-3, summed", "H100", (128, "causal", n, 192, 1), 0.122880 * n * n / us
        )
        for n, us in _TRITONBENCH
    ),
    Published("FlashAttention-4, 64 x 128", "H200", (128, "causal", 86000, 32, 1), 615),
    Published("FlashAttention-4, 64 x 48", "H200", _WIDE, 373),
    Published("FlashAttention-4, 64 x 80", "H200", _WIDE, 471),
    Published("FlashAttention-4, 64 x 80, no dQ added", "H200", _WIDE, 747),
)
UNLIKE_OURS = tuple(each for each in PUBLISHED if each.shape[0] == 256)
"""Kernels that no kernel of ours is like."""


def published_ms(entry: Published) -> float:
    """Milliseconds; a causal mask counts as half of the products."""
    head_dim, mask, seqlen, heads, _ = entry.shape
    flops = 10 * heads * seqlen**2 * head_dim / (2 if mask == "causal" else 1)
    return flops / entry.tflops / 1e9


def predicted_ms(entry: Published) -> float:
    """Milliseconds of the same kernel, of delta, and of what else is timed, by the model."""
    head_dim, mask, seqlen, heads, _ = entry.shape
    traits, machine = f"float16-d{head_dim}-dv{head_dim}-vec", machines.find(entry.gpu)
    sizes = f"{mask} q{seqlen} k{seqlen} bh{heads} g1"
    problem = ProblemClass.parse(f"backward {traits} {sizes}")
    delta = ProblemClass.parse(f"delta {traits} {sizes}")
    ms = hopper_backward.predict_form(machine, problem, _form(entry, problem)).ms
    ms += model.estimate(machine, delta, Space(delta, machine).default).ms
    elements, moved = heads * seqlen * head_dim, 4
    if entry.who == "ThunderKittens":
        ms -= hopper_backward.conversion_ms(machine, problem)
        # Three arrays are zeroed, of which two are longer by 2 bytes an element.
        moved = 3 * 4 + 2 * 2
    elif entry.who.endswith("summed"):
        ms += 3 * LAUNCH_MS
        moved += 3 * 3 * 2
    return ms + moved * elements / (machine.memory_gbps * _OF_A_COPY * 1e6)


def _form(entry: Published, problem: ProblemClass) -> Form:
    """Of the kernel of an entry."""
    (head_dim, mask, *_), (who, _, what) = entry.shape, entry.who.partition(", ")
    if head_dim == 256:
        return _wide(problem, int(what[5:7]), "no dQ added" not in what)
    order = {"order of keys": "first first", "last keys first": "last first"}.get(what)
    more = {"hidden": 0.5 if who == "cuDNN" else 0.0, "order": order}
    if head_dim == 64:
        sums = 2 * [product(1, 64, 128)]
        return _fused(problem, 128, sums, **more)
    if who == "FlashAttention-3" and mask == "full":
        # dQ transposed: rows of it are columns of K.
        return _fused(problem, 80, 2 * [product(1, 80, 128)], **more)
    sums = [product(1, 128, 128)] if who == "ThunderKittens" else 2 * [product(1, 64, 128)]
    return _fused(problem, 64, sums, in_flight=4, **more)


def _fused(problem: ProblemClass, tile_m: int, sums: list[Product], **more) -> Form:
    """128 keys on two warpgroups, all five products in one kernel."""
    d = problem.traits.head_dim
    scores, results = product(1, tile_m, d), product(1, d, tile_m, in_registers=True)
    products, added = [*4 * [scores], *4 * [results], *sums], 4 * tile_m * d
    stored = 2 * tile_m * 128 + 2 * added
    tiles = 128, tile_m
    more |= {"added": added, "outputs": d}
    return make_form(problem.traits, tiles, True, 2, products, stored, **more)


def _wide(problem: ProblemClass, tile_n: int, adds: bool) -> Form:
    """64 queries and `tile_n` keys on two warpgroups, all operands from shared memory."""
    products = 4 * [product(1, tile_n // 2, 256)] + 4 * [product(2, tile_n, 64)]
    products += 2 * [product(2, 64, tile_n)]
    added = 4 * 64 * 256
    # P and dS as they lie and transposed; with 48 keys there is room to collect dQ.
    stored = 4 * 2 * 64 * tile_n + (2 * added if tile_n == 48 else 0)
    more = {"added": added if adds else 0, "outputs": 256, "hidden": 0.0}
    return make_form(problem.traits, (tile_n, 64), True, 2, products, stored, **more)
