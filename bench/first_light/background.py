"""Work beside the steps: instructions simulated, and compiled ahead, in other processes.

`python -m bench.first_light.background simulate PATH` writes the outputs of all cases of
instructions, which hardware must give too; it needs greenlet. A machine without that takes the
file that a rehearsal has left in `PREPARED`: its name is made of the sources, so that one of other
sources is not found. `... compile FOLDER ARCH SHARD OF` writes every OF-th case's machine code.
"""

import hashlib
import os
import pickle
import re
import sys
import time
from functools import cache
from pathlib import Path

from bench.records.checks import ROOT

PREPARED = ROOT / "build" / "first-light"
_SOURCES = (
    "numflash/ptx/**/*.py",
    "numflash/simulator/**/*.py",
    "tests/support/instruction_harness.py",
)
_CASES = ("tests/support/*_cases.py",)
# Less than a step may be silent.
_WAIT_SECONDS = 20


def expected_path() -> Path:
    """The file of the simulated outputs for the sources of today."""
    digest = hashlib.sha256()
    for pattern in (*_SOURCES, *_CASES):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return PREPARED / f"expected-{digest.hexdigest()[:16]}.npz"


def wait_for(path: Path) -> bool:
    """Whether the simulated outputs are there, or have come while they were being made."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while not (path.exists() or failed_path(path).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return path.exists()


@cache
def cases() -> dict:
    """The cases of instructions by their names."""
    from tests.support.instruction_cases import CASES

    return {str(case): case for found in CASES.values() for case in found}


def compiled(folder: str | None, name: str, arch: str):
    """The machine code of a case, compiled ahead or now."""
    if folder is not None and (path := _code_path(Path(folder), name)).exists():
        return pickle.loads(path.read_bytes())
    return _compile(cases()[name], arch)


def simulate(path: str) -> None:
    """Write the outputs of all cases, at once or not at all. In the simulator only."""
    import numpy as np

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    failed_path(target).unlink(missing_ok=True)
    try:
        from tests.support.instruction_harness import run_simulated

        outputs = {}
        for name, case in cases().items():
            for number, output in enumerate(run_simulated(case)):
                outputs[f"{name}/{number}"] = output
    except Exception as error:
        failed_path(target).write_text(repr(error))
        raise
    partial = target.with_suffix(f".{os.getpid()}.npz")
    np.savez_compressed(partial, **outputs)
    os.replace(partial, target)


def compile_shard(folder: str, arch: str, shard: str, of: str) -> None:
    """Write the machine code of every `of`-th case; one that does not compile is left out."""
    for name in list(cases())[int(shard) :: int(of)]:
        path = _code_path(Path(folder), name)
        try:
            partial = path.with_suffix(".partial")
            partial.write_bytes(pickle.dumps(_compile(cases()[name], arch)))
            os.replace(partial, path)
        except Exception as error:  # the step that needs it says so
            print(f"{name}: {error}", file=sys.stderr)


def _compile(case, arch: str):
    from numflash.kernels.kernel import Kernel
    from numflash.machine_code.compiler import compile_kernel
    from numflash.runtime.devices import architecture

    kernel = Kernel(case.instruction, case.kernel, case.block, case.smem_bytes)
    return compile_kernel(lambda: kernel, architecture(arch), case.min_blocks)


def failed_path(path: Path) -> Path:
    """The file which says that there will be no such file."""
    return path.with_suffix(".failed")


def _code_path(folder: Path, name: str) -> Path:
    return folder / (re.sub(r"\W", "_", name) + ".cubin")


if __name__ == "__main__":
    {"simulate": simulate, "compile": compile_shard}[sys.argv[1]](*sys.argv[2:])
