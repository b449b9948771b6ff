"""Machine code as text: NVIDIA's disassembler, and what it says counted by instruction.

`nvdisasm` comes from pip (`nvidia-cuda-nvdisasm`, which reads the cubins of every CUDA version) or
with a CUDA toolkit. It needs neither GPU nor driver.
"""

import os
import re
import shutil
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

from numflash.errors import UnsupportedError

INSTALL_HINT = "pip install nvidia-cuda-nvdisasm brings one"

COUNTED = (
    "HGMMA",
    "HMMA",
    "QMMA",
    "MUFU.EX2",
    "FFMA",
    "F2FP",
    "LDS",
    "LDG",
    "LDGSTS",
    "UTMALDG",
    "SHFL",
    "BAR",
    "LDL",
    "STL",
)
"""Opcodes that are counted one by one, whatever modifiers follow them.

QMMA multiplies 8-bit floats, HMMA what has 16 bits: a kernel on 8-bit floats that consists of HMMA
converts them first, by F2FP from sm_89 on.
"""

_DISTRIBUTION = "nvidia-cuda-nvdisasm"
# Arithmetic in float64, and conversions from and to it.
_F64_OPCODES = {"DFMA", "DADD", "DMUL", "DSETP", "DMNMX", "DMMA"}
_F64_MODIFIERS = {"F64", "RCP64H", "RSQ64H"}
# /*0230*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P(?:\d+|T)\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)",
    re.MULTILINE,
)


def find_disassembler() -> Path | None:
    """nvdisasm of the pip package, of PATH or of the CUDA toolkit; None if there is none."""
    try:
        files = metadata.files(_DISTRIBUTION) or ()
    except metadata.PackageNotFoundError:
        files = ()
    for file in files:
        if file.stem == "nvdisasm" and file.locate().is_file():
            return Path(file.locate())
    if on_path := shutil.which("nvdisasm"):
        return Path(on_path)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if toolkit := os.environ.get(variable):
            found = shutil.which("nvdisasm", path=os.path.join(toolkit, "bin"))
            if found is not None:
                return Path(found)
    return None


def disassemble(code: bytes) -> str:
    """The text of a cubin's kernels.

    Raises:
        UnsupportedError: there is no disassembler, or it does not know this GPU.
    """
    program = find_disassembler()
    if program is None:
        raise UnsupportedError(f"there is no disassembler; {INSTALL_HINT}")
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(code)
        try:
            done = subprocess.run([program, "-c", cubin], capture_output=True, text=True)
        except OSError as error:
            raise UnsupportedError(f"{program} cannot be run: {error}; {INSTALL_HINT}") from error
    if done.returncode:
        raise UnsupportedError(
            f"{program} cannot read this cubin: {' '.join(done.stderr.split())}; {INSTALL_HINT}"
        )
    return done.stdout


def opcodes(sass: str) -> list[str]:
    """The opcode of every instruction, in order, with its modifiers: "LDG.E.128"."""
    return _INSTRUCTION.findall(sass)


def count_instructions(sass: str) -> dict[str, int]:
    """How often each opcode of `COUNTED` occurs; "F64" counts everything in float64."""
    counts = dict.fromkeys((*COUNTED, "F64"), 0)
    for opcode in opcodes(sass):
        name, *modifiers = opcode.split(".")
        for counted in (name, ".".join([name, *modifiers[:1]])):
            if counted in COUNTED:
                counts[counted] += 1
                break
        if name in _F64_OPCODES or not _F64_MODIFIERS.isdisjoint(modifiers):
            counts["F64"] += 1
    return counts
