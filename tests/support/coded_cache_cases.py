"""Calls on caches of e4m3 codes: those of `cache_cases`, with factors for sequences and heads."""

import numpy as np

import numflash
from numflash import reference
from numflash.api.comparison import Error, measure
from numflash.configs.formats import FORMATS
from tests.support.cache_cases import EPSILON, CacheCase

E4M3 = FORMATS["e4m3"]
CASES = [
    CacheCase("sm80", "entries", "one", "none", "causal", False, (4, 2, 64, 32)),
    CacheCase("sm80", "spare entries", "several", "pairs", "causal", True, (4, 2, 32, 32)),
    CacheCase("sm80", "batch_idx", "fewer new", "halves", "causal", False, (4, 1, 32, 64)),
    CacheCase("sm80", 1, "several", "part, narrow", "causal window", False),
    CacheCase("sm80", 3, "one", "none", "alibi", True, (4, 4, 16, 48)),
    CacheCase("sm80", 64, "several", "none", "window", False),
    CacheCase("sm80", 16, "none new", "none", "softcap", False, (4, 2, 20, 12)),
    CacheCase("sm80", 5, "several", "halves", "sinks", False, (4, 2, 20, 12)),
    CacheCase("sm80-stages", 8, "several", "pairs", "causal", True, (4, 2, 96, 32)),
    CacheCase("sm80-stages", "entries", "one", "halves", "softcap", False, (4, 4, 24, 16)),
    CacheCase("sm80-stages", 256, "several", "part, narrow", "sinks", False),
    CacheCase("sm80-splits", "entries", "fewer new", "none", "full", False),
    CacheCase("sm80-splits", 3, "one", "none", "causal", False, (4, 1, 64, 32)),
    CacheCase("sm80-splits", 16, "several", "pairs", "alibi", True),
    CacheCase("sm75", "batch_idx", "several", "pairs", "causal", False),
    CacheCase("sm75", 5, "one", "halves", "score_mod", False, (4, 2, 20, 12)),
    CacheCase("sm90", "entries", "several", "none", "causal", False),
    CacheCase("sm90", 64, "one", "halves", "scale", False),
]


def coded_arguments(case: CacheCase, rng) -> tuple[list, dict]:
    """As `CacheCase.arguments`; what no sequence has is a NaN's code."""
    (q, *caches, k, v), options = case.arguments(rng)
    shape = len(q), caches[0].shape[2]
    options["k_descale"], options["v_descale"] = rng.uniform(0.01, 0.05, (2, *shape)).astype("f4")
    codes = [E4M3.encode(cache.astype(np.float32) * 32) for cache in caches]
    return [q, *codes, k, v], options


def numbers_of(codes, descale, options: dict) -> np.ndarray:
    """The numbers of a cache in float64; NaN where no sequence of the call is."""
    table = options.get("page_table")
    if table is None:
        table = options.get("cache_batch_idx", np.arange(len(descale)))[:, None]
    numbers, values = np.full(codes.shape, np.nan), E4M3.decode(codes).astype(np.float64)
    for pages, factors in zip(table, descale.astype(np.float64), strict=True):
        own = pages[(pages >= 0) & (pages < len(codes))]
        numbers[own] = values[own] * factors[:, None]
    return numbers


def errors_of(case: CacheCase, rng) -> list[Error]:
    """Run a case, check the codes of new rows; the errors of out and lse, given those codes."""
    (q, *caches, k, v), options = coded_arguments(case, rng)
    given, own = [cache.copy() for cache in caches], dict(options)
    got = numflash.attention_with_kvcache(
        q, *caches, k, v, return_lse=True, check_lengths=True, **options
    )
    descales = [own.pop(f"{name}_descale") for name in "kv"]
    del own["config"]
    before = [numbers_of(*each, own) for each in zip(given, descales, strict=True)]
    *_, k_wanted, v_wanted = reference.attention_with_kvcache(
        q, *before, *(x if x is None else x.astype(np.float64) for x in (k, v)), **own
    )
    rows = zip(caches, given, before, (k_wanted, v_wanted), descales, strict=True)
    for cache, old, numbers, wanted, descale in rows:
        changed = (wanted != numbers) & ~np.isnan(wanted)
        np.testing.assert_array_equal(cache[~changed], old[~changed])
        scaled = wanted / numbers_of(np.full_like(cache, 0x38), descale, own)
        one, other = E4M3.decode(cache)[changed], E4M3.decode(E4M3.encode(scaled[changed]))
        # Next to the middle of two codes, the other's.
        np.testing.assert_allclose(one, other, rtol=0.126, atol=2.0**-9)
        assert not one.size or (one == other).mean() > 0.98
    new = 0 if k is None else k.shape[1]
    q, own = _rotated(q, own), own | {"cache_seqlens": own["cache_seqlens"] + np.int32(new)}
    after = [numbers_of(*each, own) for each in zip(caches, descales, strict=True)]
    wanted = reference.attention_with_kvcache(q, *after, **own)
    naive = reference.attention_with_kvcache(q, *after, precision=q.dtype.name, **own)
    epsilon = EPSILON[q.dtype.name]
    pairs = zip(("out", "lse"), got, wanted, naive, strict=False)
    return [
        measure(name, each, exact, rounded, epsilon, 2.0**-22 * (name == "lse") + 1e-6)
        for name, each, exact, rounded in pairs
    ]


def _rotated(q, options: dict):
    """q as attention has it; takes rotary out of the options."""
    names = ("rotary_cos", "rotary_sin", "rotary_interleaved")
    cos, sin, interleaved = (options.pop(name, None) for name in names)
    if cos is None:
        return q
    turn = {"interleaved": interleaved, "offsets": options["cache_seqlens"]}
    if options.get("causal") or "window_size" in options:
        return reference.apply_rotary(q, cos, sin, **turn).astype(q.dtype)
    one = q.reshape(len(q), 1, -1, q.shape[3])
    return reference.apply_rotary(one, cos, sin, **turn).astype(q.dtype).reshape(q.shape)
