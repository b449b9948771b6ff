"""Small kernels where a test asks for none: the simulator runs all threads, the idle ones too.

The kernels that are shipped have blocks of 128 threads and more, and tiles of 64 rows and more.
What a test of a call is about small ones show as well. Tests of what runs by itself take the
fixture `shipped_kernels`.
"""

from dataclasses import replace

from numflash.calls import array_gradients, quantization, sequences
from numflash.configs import (
    ClearSumsConfig,
    CombineConfig,
    PrepareConfig,
    RoundSumsConfig,
    ScheduleConfig,
    parse_config,
    quantize_config,
)
from numflash.selection import rules

_ARRAYS = ("backward-rows", "backward-columns", "backward-tiles", "backward-scatter")
_TILED = ("forward", "backward-dq", "backward-dkdv", *_ARRAYS)
# By implementation and family. Before those of tensor cores comes the GPU's generation.
SMALL = {
    "wgmma": {"forward": ("sm90-m64n32w4s2-overlap",)},
    "wgmma-fp8": {"forward": ("fp8-sm90-m64n64w4s2",)},
    "mma": {
        "forward": ("{}-m16n16w1s2", "{}-m16n16w1s1"),
        "backward-dq": ("{}-m16n16w1s2", "{}-m16n16w1s1"),
        "backward-dkdv": ("{}-m16n16w1s2", "{}-m16n16w1s1"),
        **dict.fromkeys(_ARRAYS, ("{}-m16n16w1s1",)),
    },
    "mma-fp8": {"forward": ("fp8-{}-m16n64w1s1",)},
    "portable": {**dict.fromkeys(_TILED, ("m8n8w2",)), "delta": ("w2",), "combine": ("w2",)},
}
_CHAINS = 4
_TOKENS = 32


def prefer_small_kernels(monkeypatch) -> None:
    """Let each implementation prefer its small configs, by the rules for all."""
    rows = [replace(row, candidates=_small_first(row)) for row in rules.IMPLEMENTATIONS]
    monkeypatch.setattr(rules, "IMPLEMENTATIONS", tuple(rows))
    # Few sums of splits, so that not most of them are empty.
    monkeypatch.setattr(CombineConfig, "num_chains", _CHAINS)
    monkeypatch.setattr(array_gradients, "ClearSumsConfig", lambda: ClearSumsConfig(2))
    monkeypatch.setattr(array_gradients, "RoundSumsConfig", lambda: RoundSumsConfig(2))
    monkeypatch.setattr(quantization, "quantize_config", _quantize_few)
    monkeypatch.setattr(sequences, "ScheduleConfig", lambda **more: ScheduleConfig(1, **more))
    monkeypatch.setattr(sequences, "PrepareConfig", lambda **more: PrepareConfig(1, **more))


def _small_first(row):
    def candidates(family, traits, limits):
        generation = row.generation(limits)
        small = (text.format(generation) for text in SMALL.get(row.name, {}).get(family, ()))
        known = (parse_config(family, text) for text in small)
        return (*known, *row.candidates(family, traits, limits))

    return candidates


def _quantize_few(generation, head_dim, block=None, **options):
    """As `quantize_config`, with few tokens a block where any number will do."""
    return quantize_config(generation, head_dim, block or _TOKENS, **options)
