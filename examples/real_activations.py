"""The main job on real input: attention forward and backward on a sentence encoder's activations.

Reads q, k, v of one layer of all-MiniLM-L6-v2 on two English passages (see data/README.md), runs
numflash on the GPU, or in the simulator where there is none, and compares output and gradients
with float64. Prints one line a problem. Exit status: 0, 1 if an error exceeds its budget, 2 if
there is neither a GPU nor the simulator.
"""

import platform
import sys
import time
from pathlib import Path

import gpu
import ml_dtypes
import numpy as np

import numflash
from numflash.api.comparison import compare
from numflash.runtime.arrays import to_numpy
from numflash.runtime.commands import command

DATA = Path(__file__).parent / "data" / "minilm_layer.npz"
# name, dtype, heads to take in the simulator, options
PROBLEMS = (
    ("encoder layer", np.float16, 4, {}),
    ("encoder layer", ml_dtypes.bfloat16, 2, {}),
    ("encoder layer", np.float32, 2, {}),
    ("causal", np.float32, 2, {"causal": True}),
    ("window of 16", np.float16, 2, {"window_size": (8, 8)}),
)


def run(q, k, v, dout, options: dict):
    """Forward and backward on host arrays; (results by name, kernel, seconds)."""
    if numflash.simulating():
        synchronize = int
    else:
        import cupy

        q, k, v, dout = map(cupy.asarray, (q, k, v, dout))
        synchronize = cupy.cuda.Device().synchronize
    kernel = numflash.plan(q, k, v, **options).kernel
    if not numflash.simulating():
        # The first call compiles; the second is timed.
        out, lse = numflash.attention(q, k, v, return_lse=True, **options)
        numflash.attention_backward(dout, q, k, v, out, lse, **options)
        synchronize()
    start = time.perf_counter()
    out, lse = numflash.attention(q, k, v, return_lse=True, **options)
    gradients = numflash.attention_backward(dout, q, k, v, out, lse, **options)
    synchronize()
    seconds = time.perf_counter() - start
    results = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True))
    return {name: to_numpy(array) for name, array in results.items()}, kernel, seconds


def device_name() -> str:
    """The GPU, or the simulator and the CPU it runs on."""
    if numflash.simulating():
        return f"the simulator, on {platform.machine()} without a GPU"
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()


@command
def main() -> int:
    """Run every problem; the exit status."""
    if (why := gpu.why_not()) is not None:
        print(why, file=sys.stderr)
        return 2
    data = np.load(DATA)
    print("One layer of all-MiniLM-L6-v2 on two passages, forward and backward,")
    print(f"on {device_name()}:")
    for text in data["texts"]:
        print(f'  "{text[:68]}..."')
    header = f"{'problem':15}{'shape (b, s, h, d)':20}{'dtype':10}{'forward kernel':26}"
    print(f"\n{header}{'error':>9}{'budget':>9}{'time':>10}")
    passed = True
    for name, dtype, heads, options in PROBLEMS:
        entries = len(data["q"])
        if numflash.simulating():
            entries = 1
        else:
            heads = data["q"].shape[2]
        q, k, v = (data[x][:entries, :, :heads].astype(dtype) for x in "qkv")
        dout = np.random.default_rng(0).standard_normal(q.shape).astype(dtype)
        results, kernel, seconds = run(q, k, v, dout, options)
        precision = np.dtype(dtype).name
        report = compare(results, q, k, v, precision=precision, dout=dout, **options)
        passed &= report.passed
        worst = max(report.errors, key=lambda e: e.error / e.budget)
        duration = f"{seconds:.1f} s" if seconds > 0.1 else f"{seconds * 1e6:.0f} us"
        config = " ".join(kernel.split()[:2])
        print(
            f"{name:15}{q.shape!s:20}{precision:10}{config:26}"
            f"{worst.error:9.1e}{worst.budget:9.1e}{duration:>10}"
            f"  {'ok' if report.passed else 'TOO LARGE'}",
            flush=True,
        )
        if not options and dtype == np.float16:
            # The encoder's own result, stored with the data.
            stored = np.abs(results["out"].astype(np.float64) - data["out"][:entries, :, :heads])
            passed &= bool(stored.max() <= report.errors[0].budget)
    print(
        "\nError: the largest one of output, log-sum-exp and the three gradients, relative to its"
    )
    print("budget: twice what a naive implementation in the same precision makes.")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
