"""`numflash-info`: the parts that numflash finds on this machine, and how to get those missing.

Everything is looked at, nothing is needed: a missing driver, compiler or library is reported.
"""

import argparse
import json
import platform
import sys
from importlib import metadata, util
from typing import Any

from numflash.machine_code import compiler, cubins
from numflash.machine_code.sass import find_disassembler
from numflash.runtime.cache_folder import cache_dir, refusal
from numflash.runtime.commands import command
from numflash.runtime.devices import architecture_of
from numflash.runtime.mode import SIMULATED
from numflash.runtime.version import __version__
from numflash.selection import store

# A package as it is shown, and the distributions that it comes in.
_PACKAGES = {
    "numpy": ("numpy",),
    "ml_dtypes": ("ml_dtypes",),
    "numba": ("numba",),
    "numba-cuda": ("numba-cuda",),
    "cuda-bindings": ("cuda-bindings",),
    "greenlet": ("greenlet",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "torch": ("torch",),
}
_COMPILER_LIBRARIES = ("nvvm", "nvrtc", "nvJitLink")
_CUDA_13 = 13000


def collect() -> dict[str, Any]:
    """Collect all that `numflash-info --json` prints.

    Returns:
        simulator: whether this process simulates.
        devices: name, compute_capability, arch (None if not supported), multiprocessors and
            memory_bytes of each.
        no_devices: why there are none; None if there are.
        versions: of numflash, Python, the newest CUDA that the driver can run, and each package;
            None where there is none.
        cache: directory, kernels, bytes, tuned configs, and why it is not used ("refused"; None
            if it is).
        missing: what, and the command that mends it.
    """
    driver_version, devices, no_devices = _ask_driver()
    num_kernels, num_bytes = cubins.contents()
    return {
        "simulator": SIMULATED,
        "devices": devices,
        "no_devices": no_devices,
        "versions": {
            "numflash": __version__,
            "python": platform.python_version(),
            "CUDA of the driver": None
            if driver_version is None
            else f"{driver_version // 1000}.{driver_version % 1000 // 10}",
            **{name: _version(*names) for name, names in _PACKAGES.items()},
            **compiler.versions(),
        },
        "cache": {
            "directory": str(cache_dir()),
            "kernels": num_kernels,
            "bytes": num_bytes,
            "tuned_configs": sum(map(len, store.read_all().values())),
            "refused": refusal(),
        },
        "missing": _missing(driver_version, no_devices),
    }


def _ask_driver() -> tuple[int | None, list[dict[str, Any]], str | None]:
    """The driver's CUDA version, the devices, and why there are none."""
    try:
        from cuda.bindings import driver
    except Exception as error:
        return None, [], f"cuda-bindings cannot be imported: {_line(error)}"

    def ask(name: str, *args):
        status, *values = getattr(driver, name)(*args)
        if status:
            raise RuntimeError(f"{name} reports {getattr(status, 'name', status)}")
        return values[0] if values else None

    try:
        version = int(ask("cuDriverGetVersion"))
    except Exception:
        return None, [], "NVIDIA's driver is not installed"
    devices = []
    try:
        ask("cuInit", 0)
        for ordinal in range(ask("cuDeviceGetCount")):
            devices.append(_describe_device(driver.CUdevice_attribute, ask, ordinal))
    except Exception as error:
        return version, devices, None if devices else _line(error)
    return version, devices, None if devices else "the driver sees no GPU"


def _describe_device(attributes, ask, ordinal: int) -> dict[str, Any]:
    device = ask("cuDeviceGet", ordinal)

    def attribute(name: str) -> int:
        name = f"CU_DEVICE_ATTRIBUTE_{name}"
        return int(ask("cuDeviceGetAttribute", getattr(attributes, name), device))

    capability = tuple(attribute(f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
    try:
        arch = architecture_of(capability).arch
    except ValueError:
        arch = None
    return {
        "name": ask("cuDeviceGetName", 256, device).split(b"\0")[0].decode(errors="replace"),
        "compute_capability": list(capability),
        "arch": arch,
        "multiprocessors": attribute("MULTIPROCESSOR_COUNT"),
        "memory_bytes": int(ask("cuDeviceTotalMem", device)),
    }


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _version(*distributions: str) -> str | None:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _missing(driver_version: int | None, no_devices: str | None) -> list[dict[str, str]]:
    """Missing parts, each with the command that installs it."""
    extra = "cu12" if driver_version is not None and driver_version < _CUDA_13 else "cu13"
    install = f'pip install "numflash[{extra}]"'
    install_compiler = install if no_devices is None else 'pip install "numflash[compile]"'
    missing = []

    def lack(what: str, mend: str):
        missing.append({"what": what, "mend": mend})

    if no_devices is not None and not SIMULATED:
        lack(
            f"a GPU that can be used ({no_devices})",
            "install NVIDIA's driver; or set NUMBA_ENABLE_CUDASIM=1 to run NumPy arrays in the "
            "simulator",
        )
    if util.find_spec("numba") is None or _version("numba-cuda") is None:
        lack("numba and numba-cuda, which compile the kernels", install_compiler)
    for library in _COMPILER_LIBRARIES:
        if not _can_load(library):
            lack(f"{library}, a library of CUDA's compiler", install_compiler)
    if find_disassembler() is None:
        lack(
            "nvdisasm, with which numflash-inspect counts instructions",
            "pip install nvidia-cuda-nvdisasm",
        )
    if no_devices is None and _version("cupy-cuda13x", "cupy-cuda12x", "cupy") is None:
        lack("CuPy, whose arrays numflash takes and allocates (PyTorch's work too)", install)
    return missing


def _can_load(library: str) -> bool:
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        load_nvidia_dynamic_lib(library)
    except Exception:
        return False
    return True


def describe(info: dict[str, Any]) -> str:
    """The collected facts as text for people."""
    lines = ["Devices"]
    for ordinal, device in enumerate(info["devices"]):
        capability = "{}.{}".format(*device["compute_capability"])
        lines.append(
            f"  {ordinal}  {device['name']}, compute capability {capability} "
            f"({device['arch'] or 'not supported'}), {device['multiprocessors']} SMs, "
            f"{device['memory_bytes'] / 2**30:.1f} GiB"
        )
    if not info["devices"]:
        lines.append(f"  none: {info['no_devices']}")
    if info["simulator"]:
        lines.append("  NUMBA_ENABLE_CUDASIM is set: kernels run in the simulator")
    lines.append("Versions")
    lines += [
        f"  {name:<24}{version or 'not installed'}" for name, version in info["versions"].items()
    ]
    cached = info["cache"]
    lines.append("Cache")
    size = f"{cached['bytes'] / 2**20:.1f} MiB"
    lines.append(
        f"  {cached['directory']}: {cached['kernels']} kernels, {size}; "
        f"{cached['tuned_configs']} tuned configs"
    )
    if cached["refused"]:
        lines.append(f"  {cached['refused']}")
    lines.append("Missing")
    for lack in info["missing"]:
        lines += [f"  {lack['what']}", f"      {lack['mend']}"]
    if not info["missing"]:
        lines.append("  nothing")
    return "\n".join(lines)


@command
def main(argv: list[str] | None = None) -> int:
    """Run `numflash-info`; the exit status."""
    parser = argparse.ArgumentParser(
        prog="numflash-info",
        description="Devices, versions, the kernel cache, and missing parts.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    info = collect()
    print(json.dumps(info, indent=2) if args.json else describe(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
