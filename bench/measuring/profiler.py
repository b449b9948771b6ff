"""Bytes of device memory as the hardware counts them, where there is Nsight Compute (`ncu`).

The counted process runs one call of numflash: `python -m bench.measuring.profiler POINT`, with the
point as JSON. Whether counters may be read is up to the machine; where not, ncu's own words are
the reason.
"""

import csv
import io
import json
import shutil
import subprocess
import sys

from bench.points.points import Point
from bench.records.checks import ROOT, child_environment

_METRICS = {"dram__bytes_read.sum": "read_bytes", "dram__bytes_write.sum": "written_bytes"}


def find() -> str | None:
    """The path of ncu; None if there is none."""
    return shutil.which("ncu")


def count(point: Point, seconds: float) -> dict[str, float]:
    """Bytes that a call of numflash reads from and writes to device memory, from a cold L2.

    Raises:
        RuntimeError: it cannot be counted here, with the reason.
    """
    program = find()
    if program is None:
        raise RuntimeError("there is no profiler (ncu) here")
    command = [
        program,
        "--csv",
        "--print-units=base",
        "--profile-from-start=off",
        "--clock-control=none",
        f"--metrics={','.join(_METRICS)}",
        *(sys.executable, "-m", "bench.measuring.profiler", json.dumps(point.as_dict())),
    ]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=child_environment(), capture_output=True, text=True,
            timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"ncu took longer than {seconds:.0f} s") from error
    totals = parse(done.stdout)
    if done.returncode or not totals:
        raise RuntimeError(" ".join((done.stdout + done.stderr)[-400:].split()))
    return totals


def parse(output: str) -> dict[str, float]:
    """The sum over all kernels of ncu's CSV; empty if there is none in the output."""
    lines = output.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith('"ID"')]
    totals: dict[str, float] = {}
    if starts:
        for row in csv.DictReader(io.StringIO("\n".join(lines[starts[0] :]))):
            name = _METRICS.get(row.get("Metric Name", ""))
            if name is not None:
                value = float(row["Metric Value"].replace(",", ""))
                totals[name] = totals.get(name, 0.0) + value
    return totals


def _call(point: Point) -> None:
    """Run numflash once to compile, and once to be counted."""
    from bench.measuring.device import open_device
    from bench.peers import methods as peers

    device = open_device(0)
    names = {"q": point.q_shape, "k": point.kv_shape, "v": point.kv_shape}
    inputs = {
        n: device.normal(shape, point.dtype, i) for i, (n, shape) in enumerate(names.items())
    }
    if point.direction == "backward":
        import numflash

        arrays = (inputs[n] for n in "qkv")
        out, lse = numflash.attention(*arrays, causal=point.causal, return_lse=True)
        inputs |= {"out": out, "lse": lse, "dout": device.normal(point.q_shape, point.dtype, 3)}
    method = peers.find(peers.OURS).prepare(point, inputs)
    method.call()
    device.synchronize()
    profiler = device.xp.cuda.profiler
    profiler.start()
    method.call()
    device.synchronize()
    profiler.stop()


if __name__ == "__main__":
    _call(Point.from_dict(json.loads(sys.argv[1])))
