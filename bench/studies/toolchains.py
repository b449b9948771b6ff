"""`python -m bench toolchains`: what versions of CUDA's compilers make of Hopper's forward.

What is good about a kernel must not be the luck of one assembler. Each toolchain is installed by
pip into a virtual environment of its own, which is deleted afterwards, with the versions of Numba
that are installed here, and compiles what dispatch chooses for each head_dim. No GPU is needed;
pip needs a package index, and a toolchain some 300 MB of disk and a minute.

The table says of each kernel what `numflash-inspect` does, and how many exponentials still overlap
with products where the guard that keeps the wait in its place (`softmax_before_wait`) is left out.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from bench.tables import tables

TOOLCHAINS = ("12.8", "12.9", "13.0", "13.2", "13.4", "13")
"""CUDA versions; one without a minor version means the newest in the index."""
HEAD_DIMS = (64, 128, 192, 256)
COLUMNS = (
    "toolchain",
    "nvvm",
    "nvjitlink",
    "head_dim",
    "config",
    "registers",
    "spill bytes",
    "warnings",
    "HGMMA",
    "issued",
    "overlap",
    "without guard",
)
_ROOT = Path(__file__).parents[2]
_ALWAYS = ("ml_dtypes", "greenlet", "nvidia-cuda-nvdisasm")
_SAME_AS_HERE = ("numpy", "numba", "llvmlite", "numba-cuda")
_VERSION = re.compile(r"(12|13)(\.\d+)?")
_INSTALL_SECONDS, _COMPILE_SECONDS = 900, 900


def add_command(commands) -> None:
    """Add `toolchains` to the commands of `python -m bench`."""
    parser = commands.add_parser("toolchains", help=__doc__.splitlines()[0])
    parser.add_argument(
        "versions", nargs="*", metavar="CUDA", help=f"default: {' '.join(TOOLCHAINS)}"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("float16", "bfloat16"))
    parser.add_argument("--head-dim", type=int, nargs="+", choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table; 0 if every toolchain made of every kernel what it was designed to be."""
    rows = []
    for version in arguments.versions or TOOLCHAINS:
        print(f"CUDA {version} ...", file=sys.stderr, flush=True)
        rows += compile_with(version, arguments.dtype, arguments.head_dim)
    print(tables.markdown(COLUMNS, ([row.get(name, "-") for name in COLUMNS] for row in rows)))
    reasons = [f"CUDA {row['toolchain']}: {row['reason']}" for row in rows if "reason" in row]
    print(
        "\n".join(reasons or ["every toolchain made of every kernel what it was designed to be"])
    )
    return 1 if reasons else 0


def requirements(version: str) -> list[str]:
    """The packages that pip installs for a version of CUDA. Raises ValueError if it is none."""
    found = _VERSION.fullmatch(version)
    if found is None:
        raise ValueError(f"CUDA must look like 13.0 or 13, got {version!r}")
    compilers = {
        # cuda-bindings 12.9 are the first that Numba takes. It loads NVRTC, and uses it for C++.
        "12": ("nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink-cu12", "nvidia-cuda-nvrtc-cu12"),
        "13": ("nvidia-nvvm", "nvidia-nvjitlink", "nvidia-cuda-nvrtc"),
    }
    bindings = f"cuda-bindings=={found[1]}.*"
    pinned = [f"{name}=={version}.*" for name in compilers[found[1]]]
    same = [f"{name}=={metadata.version(name)}" for name in _SAME_AS_HERE]
    return [*same, *_ALWAYS, bindings, *pinned]


def compile_with(version: str, dtype: str, head_dims: tuple[int, ...]) -> list[dict]:
    """The rows of one toolchain; of one that cannot be installed or fails, the reason."""
    try:
        wanted = requirements(version)
    except ValueError as error:
        return [{"toolchain": version, "reason": str(error)}]
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "venv", "bin", "python")
        environment = {
            **{
                name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"
            },
            "PYTHONPATH": str(_ROOT),
            "NUMFLASH_CACHE_DIR": str(Path(folder, "cache")),
            "NUMFLASH_TUNED": "0",
        }
        install = [python, "-m", "pip", "install", "--quiet", "--no-compile", *wanted]
        work = [python, "-m", "bench.studies.toolchains", dtype, *map(str, head_dims)]
        try:
            _call([sys.executable, "-m", "venv", python.parent.parent], _INSTALL_SECONDS)
            _call(install, _INSTALL_SECONDS)
            output = _call(work, _COMPILE_SECONDS, environment)
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            return [{"toolchain": version, "reason": " ".join(str(error).split())}]
    return [{"toolchain": version, **json.loads(line)} for line in output.splitlines()]


def _call(command: list, seconds: float, environment: dict | None = None) -> str:
    done = subprocess.run(
        command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=seconds
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"{Path(command[0]).name} {command[2]} failed: {last}")
    return done.stdout


def rows(dtype: str, head_dims: list[int]) -> Iterator[dict]:
    """The figures of what is chosen for each head_dim, compiled by what is installed here."""
    from numflash.api.inspect import inspect_kernel
    from numflash.configs import Traits
    from numflash.runtime.devices import architecture
    from numflash.selection.rules import choose

    limits = architecture("sm_90a")
    for head_dim in head_dims:
        traits = Traits(dtype, head_dim, head_dim)
        config = choose("forward", traits, limits).config
        report = inspect_kernel(config, traits, limits)
        bare = None
        if config.overlap:
            bare = _without_guard(config, traits, limits)
        yield row(config, traits, report, bare)


def _without_guard(config, traits, limits):
    """The main loop of a kernel that lets the assembler move its waits."""
    from numflash.kernels.wgmma import forward
    from numflash.machine_code.compiler import compile_cubin
    from numflash.machine_code.main_loop import read_main_loop
    from numflash.machine_code.sass import disassemble
    from numflash.ptx import device_function

    @device_function
    def nothing(x, y):
        pass

    guard, forward.softmax_before_wait = forward.softmax_before_wait, nothing
    try:
        return read_main_loop(disassemble(compile_cubin(config, traits, limits).code))
    finally:
        forward.softmax_before_wait = guard


def row(config, traits, report, bare) -> dict:
    """One kernel's figures, and the "reason" why it is not as it was designed, if it is not.

    Args:
        config, traits: the kernel.
        report: of `numflash.api.inspect`.
        bare: the main loop without the guard; None if there is none to leave out.
    """
    loop = report.main_loop
    found = {
        "nvvm": _version("nvidia-nvvm", "nvidia-cuda-nvcc-cu12"),
        "nvjitlink": _version("nvidia-nvjitlink", "nvidia-nvjitlink-cu12"),
        "head_dim": traits.head_dim,
        "config": str(config),
        "registers": report.registers,
        "spill bytes": report.spill_store_bytes + report.spill_load_bytes,
        "warnings": ", ".join(re.findall(r"\bC75\d\d\b", " ".join(report.warnings))) or "none",
        "HGMMA": report.instructions.get("HGMMA", "-"),
    }
    faults = list(report.faults)
    if loop is None:
        return {**found, "reason": "; ".join([*faults, "it has no main loop that can be read"])}
    of_s, of_o = traits.head_dim // 16, config.tile_n // 16
    expected = (of_s, of_o) if config.overlap else (of_o, of_s)
    if loop.groups != expected:
        faults.append(f"head_dim {traits.head_dim}: products wait as {loop.groups}")
    if config.overlap and loop.overlapped_exponentials < loop.exponentials:
        faults.append(f"head_dim {traits.head_dim}: the softmax does not overlap")
    found |= {
        "issued": loop.issued,
        "overlap": _of(loop) if config.overlap else "-",
        "without guard": "-" if bare is None else _of(bare),
    }
    return {**found, "reason": "; ".join(faults)} if faults else found


def _of(loop) -> str:
    return f"{loop.overlapped_exponentials}/{loop.exponentials}"


def _version(*names: str) -> str:
    """The version of the first of these distributions that is installed."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "-"


if __name__ == "__main__":
    for kernel in rows(sys.argv[1], [int(text) for text in sys.argv[2:]]):
        print(json.dumps(kernel), flush=True)
