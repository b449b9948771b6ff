"""Times of the portable kernels against the same attention written with CuPy.

CUDA events around each call, inputs of normal random numbers, the L2 cache flushed before each
repeat, the two methods interleaved, median and quartiles reported. FLOPs are counted as the
FlashAttention papers do: 4 batch heads seqlen^2 head_dim, half of that if causal.
"""

import statistics
import time

_L2_FLUSH_BYTES = 256 * 2**20
_TOKENS = 16384
_HIDDEN = 2048


def cupy_attention(cupy, q, k, v, causal: bool):
    """Standard attention in CuPy: two matrix products and a softmax over the whole matrix."""
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = cupy.matmul(q, k.swapaxes(-1, -2)) * (q.shape[-1] ** -0.5)
    if causal:
        rows = cupy.arange(q.shape[2])
        scores = cupy.where(rows[:, None] >= rows[None, :], scores, -cupy.inf)
    scores = cupy.exp(scores - scores.max(-1, keepdims=True))
    return cupy.matmul(scores / scores.sum(-1, keepdims=True), v).transpose(0, 2, 1, 3)


def measure(deadline: float, on_result) -> list[dict]:
    """Time forward and backward on a grid of sizes until `deadline`; a list of results."""
    import cupy

    import numflash

    results = []
    cases = [
        ("float32", head_dim, seqlen, causal)
        for seqlen in (1024, 2048, 4096, 8192, 16384)
        for head_dim in (64, 128)
        for causal in (False, True)
    ]
    cases += [("float16", head_dim, 4096, False) for head_dim in (64, 128)]
    for dtype, head_dim, seqlen, causal in cases:
        if time.monotonic() > deadline:
            break
        shape = (_TOKENS // seqlen, seqlen, _HIDDEN // head_dim, head_dim)
        rng = cupy.random.default_rng(0)
        q, k, v, dout = (
            rng.standard_normal(shape, dtype="float32").astype(dtype) for _ in range(4)
        )
        out, lse = numflash.attention(q, k, v, causal=causal, return_lse=True)
        methods = {
            "numflash forward": lambda q=q, k=k, v=v, causal=causal: numflash.attention(
                q, k, v, causal=causal
            ),
            "cupy forward": lambda q=q, k=k, v=v, causal=causal: cupy_attention(
                cupy, q, k, v, causal
            ),
            "numflash backward": lambda a=(dout, q, k, v, out, lse), causal=causal: (
                numflash.attention_backward(*a, causal=causal)
            ),
        }
        flops = 4 * shape[0] * shape[2] * seqlen**2 * head_dim / (2 if causal else 1)
        for name, milliseconds in time_interleaved(cupy, methods).items():
            factor = 2.5 if "backward" in name else 1.0
            result = {
                "method": name,
                "dtype": dtype,
                "batch": shape[0],
                "seqlen": seqlen,
                "heads": shape[2],
                "head_dim": head_dim,
                "causal": causal,
                **milliseconds,
            }
            if "median_ms" in milliseconds:
                result["tflops"] = flops * factor / milliseconds["median_ms"] / 1e9
            results.append(result)
            on_result(result)
    results += _long_context(cupy, numflash, on_result) if time.monotonic() < deadline else []
    return results


def _long_context(cupy, numflash, on_result) -> list[dict]:
    """65,536 tokens and 16 heads, where the score matrix alone would take 275 GB."""
    rng = cupy.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 65536, 16, 64), dtype="float32") for _ in range(3))
    times = time_interleaved(
        cupy,
        {
            "numflash forward": lambda: numflash.attention(q, k, v, causal=True),
            "cupy forward": lambda: cupy_attention(cupy, q, k, v, True),
        },
        repeats=2,
    )
    size = {"dtype": "float32", "batch": 1, "seqlen": 65536, "heads": 16, "head_dim": 64}
    results = [{"method": name, **size, "causal": True, **t} for name, t in times.items()]
    for result in results:
        on_result(result)
    return results


def time_interleaved(cupy, methods: dict, repeats: int = 7) -> dict[str, dict]:
    """Median and quartiles in milliseconds of each method; an error's text where one fails."""
    flush = cupy.empty(_L2_FLUSH_BYTES, "u1")
    times: dict[str, list[float]] = {name: [] for name in methods}
    failed: dict[str, str] = {}
    for repeat in range(repeats + 1):
        for name, call in methods.items():
            if name in failed:
                continue
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            flush.fill(0)
            try:
                begin.record()
                call()
                end.record()
                end.synchronize()
            except cupy.cuda.memory.OutOfMemoryError:
                failed[name] = "out of memory"
                continue
            finally:
                cupy.get_default_memory_pool().free_all_blocks()
            if repeat:  # the first one warms up
                times[name].append(cupy.cuda.get_elapsed_time(begin, end))
    summary: dict[str, dict] = {name: {"error": reason} for name, reason in failed.items()}
    for name, samples in times.items():
        if name not in failed:
            low, median, high = statistics.quantiles(samples, n=4)
            summary[name] = {"median_ms": median, "quartiles_ms": [low, high]}
    return summary


def host_microseconds() -> dict[str, float]:
    """Median host time of a warm call and of a plan's launch, in microseconds."""
    import cupy

    import numflash

    q = cupy.zeros((1, 16, 1, 64), "float16")
    plan = numflash.plan(q, q, q)

    def median(call) -> float:
        samples = []
        for _ in range(500):
            start = time.perf_counter_ns()
            call()
            samples.append((time.perf_counter_ns() - start) / 1e3)
            if len(samples) % 50 == 0:
                cupy.cuda.Device().synchronize()
        return statistics.median(samples)

    return {
        "attention": median(lambda: numflash.attention(q, q, q)),
        "plan.launch": median(plan.launch),
    }
