"""The offline model's errors, and the gain that a prediction must have before it counts.

Kernels of others with the same structure have published speeds. A test
(`tests/host/tuner/test_published.py`) holds the model against 202 of them, and keeps the errors
stated here from being too small. Each is the largest of its kind: the longer of the published and
the predicted time over the shorter, less 1.

| kind | held against | fitted | others, worst and median |
|---|---|---|---|
| sm80 forward | FlashAttention-2: H100, A100, RTX A5000; head_dim 64 to 256 | 8 | 33: 9 %, 2 % |
| sm90 forward | FlashAttention-3: H100; the same head dims | 7 | 32: 11 %, 3 % |
| sm80 backward | FlashAttention-2: H100; head_dim 64, 128; for each product | 0 | 12: 34 %, 23 % |
| sm90 backward | FlashAttention-3, ThunderKittens, cuDNN: H100, H200 | 6 | 46: 14 %, 5 % |
| sm80 few queries | decoding: A100, H100, H100 PCIe | 3 | 14: 43 %, 11 % |
| sm90 forward fp8 | FlashAttention-3, cuDNN: H100, H100 PCIe, H200 | 0 | 22: 25 %, 11 % |
| sm90 short forward fp8 | the same with fewer than 4,096 keys | 0 | 19: 74 %, 17 % |

Fitted were: of FlashAttention-2 without a mask 2,048 and 16,384 tokens on the H100 and 16,384 on
the A100; of FlashAttention-3 16,384 tokens at head_dim 64 and 256 without a mask and at 256 with a
causal one (off by 9 %), and its ablation at head_dim 128; of decoding the two longest sequences
on the A100 and the shortest on the H100. Their errors alone chose the constants. Everything else
was held out: all of FlashAttention-2 with a causal mask, all shorter sequences, the A5000, all
gradients. The form of the model (phases that follow each other, no time for what copies write) was
found with all of these in sight.

Hopper's gradients have one fitted constant, the share of shared memory's bandwidth. It was
chosen by FlashAttention-3 with 2,048 and 16,384 tokens and no mask and with 8,192 and a causal
one, and by ThunderKittens' longest sequence (off by up to 12 %); which points may choose was
written down before. The form is that of `hopper`, with the time of a turn assumed. Three speeds
at head_dim 256 are left out, since no kernel of ours adds dQ in the L2 there (pull requests 2888
and 2889: the model says 278, 453 and 511 TFLOP/s for 373, 471 and 747). Nothing is published of
gradients in two kernels on Hopper.

Gradients of `mma.sync` are faster than FlashAttention-2's in all 12 points, so the model
flatters them. Nothing is published of portable kernels, tf32, `combine`, `delta`, nor of other
architectures: predictions for those are taken to be as wrong as the worst that is known. So are
those for sequences with lengths of their own, whose real lengths nobody knows ahead.

Nothing was fitted to speeds on 8-bit floats. FlashAttention-3 with V transposed ahead, as ours is,
is 1 % to 9 % slower than predicted at all lengths (pull request 1075, an H100 PCIe), cuDNN on an
H200 2 % to 17 % faster. The kernel of FlashAttention-3's paper transposes V itself. From 4,224
tokens on it is within 11 % at head_dim 64 and 128, at 256 up to 25 % slower than predicted; with
fewer it is slower at every head_dim, at 512 by 24 % to 74 %. So short sequences are a kind of
their own. On other GPUs, and of products by `mma.sync`, nothing is published.
"""

from numflash.configs import Config
from numflash.problem.classes import ProblemClass
from numflash.selection.geometry import PACKED_SEQLEN

from ..space.machines import Machine

ERRORS = {
    "sm80 forward": 0.10,
    "sm90 forward": 0.12,
    "sm80 backward": 0.35,
    "sm90 backward": 0.15,
    "sm80 few queries": 0.43,
    "sm90 forward fp8": 0.26,
    "sm90 short forward fp8": 0.75,
}
"""The model's error by kind."""
UNKNOWN = max(error for kind, error in ERRORS.items() if not kind.endswith("fp8"))
"""The error of kernels and GPUs that it was not held against."""
UNKNOWN_ON_8_BITS = max(ERRORS.values())
"""Likewise of those on 8-bit floats."""
_SHORT = 4096
ARCHITECTURES = ("sm_80", "sm_86", "sm_90a")
"""The architectures of the GPUs that it was held against."""


def kind(problem: ProblemClass, config: Config) -> str:
    """The kind of kernels that share an error: "sm80 forward"; "few queries" for decoding.

    On 8-bit floats those with fewer than 4,096 keys are "short".
    """
    generation = getattr(config, "generation", "portable")
    family = problem.family
    if family == "forward" and problem.seqlen_q <= PACKED_SEQLEN:
        family = "few queries"
    if problem.traits.fp8:
        return f"{generation} {'short ' if problem.seqlen_k < _SHORT else ''}{family} fp8"
    return f"{generation} {'backward' if family.startswith('backward-') else family}"


def error(machine: Machine, problem: ProblemClass, config: Config) -> float:
    """The fraction by which a predicted time may be off, in either direction."""
    traits = problem.traits
    unknown = UNKNOWN_ON_8_BITS if traits.fp8 else UNKNOWN
    if machine.arch not in ARCHITECTURES or traits.tf32 or traits.ragged:
        return unknown
    return ERRORS.get(kind(problem, config), unknown)


def gain_needed(machine: Machine, problem: ProblemClass, config: Config, default: Config) -> float:
    """The fraction by which the default must be predicted slower than a config to give way.

    Configs of one kind err together, and their kind's error counts once; of two kinds one may be
    flattered and the other not, and both errors count.
    """
    own, others = (error(machine, problem, each) for each in (config, default))
    if kind(problem, config) == kind(problem, default):
        return own
    return (1 + own) * (1 + others) - 1
