"""From a kernel's Python source to machine code: LTO-IR by Numba and NVVM, a cubin by nvJitLink.

    Python --numba-cuda--> LLVM IR --NVVM--> LTO-IR --nvJitLink -lto--> cubin

No GPU and no driver are needed. `linker` has the second step.

A cubin is cached in memory and on disk under everything that decides its bytes: kernel source,
config, traits, architecture and compiler versions. Options that Numba's own settings could decide
are given explicitly, so that a debugger's environment makes the same cubin. With a warm cache
Numba is not even imported.
"""

import gc
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib import metadata
from types import SimpleNamespace
from typing import Any

from numflash.configs import Config, Traits
from numflash.machine_code import cubins, linker
from numflash.machine_code.linker import INSTALL_HINT, compiler_libraries
from numflash.machine_code.sources import kernel_hash
from numflash.runtime.devices import Architecture, blocks_per_sm
from numflash.runtime.errors import UnsupportedError

_log = logging.getLogger("numflash")
_lock = threading.Lock()
_cubins: dict[str, "Cubin"] = {}

# Distributions whose version changes the machine code.
_COMPILERS = (
    "numba",
    "llvmlite",
    "numba-cuda",
    "nvidia-nvvm",
    "nvidia-cuda-nvcc-cu12",
    "nvidia-nvjitlink",
    "nvidia-nvjitlink-cu12",
)
_LINKERS = ("nvidia-nvjitlink", "nvidia-nvjitlink-cu12")
# Local memory of a thread, CUDA C++ Programming Guide, "Compute Capabilities".
_LOCAL_BYTES = 512 * 1024
# The assembler gives registers to threads in multiples of it.
_REGISTER_STEP = 8
# Settings that Numba takes from NUMBA_* variables, a `.numba_config.yaml` or `numba.config` alone,
# although they change machine code or break the compiler. Others are arguments of a call.
_NUMBA_SETTINGS = {"FORCE_CUDA_CC": None, "CUDA_ENABLE_NRT": False, "DEBUG_JIT": 0}


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel.

    Attributes:
        entry: the kernel's symbol.
        parameters: (path, letter) in order, as in ("q.row", "q"); letters are those of
            `struct`, "P" for a pointer and "T" for a tensor map.
        num_threads, smem_bytes: how it is launched.
        registers: per thread.
        spill_store_bytes, spill_load_bytes, stack_bytes: per thread; 0 if all is in registers.
        warnings: of the assembler.
        min_blocks: blocks per SM that were promised to the assembler; None if it chose.
        compile_ms: time from Python source to machine code.
        code: the ELF image.
    """

    entry: str
    parameters: tuple[tuple[str, str], ...]
    num_threads: int
    smem_bytes: int
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    warnings: tuple[str, ...]
    min_blocks: int | None
    compile_ms: float
    code: bytes


def get_cubin(config: Config, traits: Traits, limits: Architecture) -> Cubin:
    """The machine code of a kernel, from memory, from disk, or compiled now.

    Raises:
        UnsupportedError: the compiler packages are missing.
    """
    config = getattr(config, "compiled", config)
    key = content_key("", config, traits, limits)
    cubin = _cubins.get(key)
    if cubin is None:
        with _lock:
            cubin = (
                _cubins.get(key)
                or _from_disk(key, limits)
                or _compile_logged(key, config, traits, limits)
            )
            _cubins[key] = cubin
    return cubin


def known_cubin(config: Config, traits: Traits, limits: Architecture) -> Cubin | None:
    """As `get_cubin`, from memory or disk; None if it would have to be compiled."""
    config = getattr(config, "compiled", config)
    key = content_key("", config, traits, limits)
    cubin = _cubins.get(key)
    if cubin is None and (cubin := _from_disk(key, limits)) is not None:
        cubin = _cubins.setdefault(key, cubin)
    return cubin


def content_key(kind: str, config: Config, traits: Traits, limits: Architecture) -> str:
    """Everything that decides a kernel's code; `kind` is empty for a cubin."""
    parts = [config.family, str(config), str(traits), limits.arch, kernel_hash(config)]
    parts.append(_toolchain())
    return "|".join([kind, *parts] if kind else parts)


def _from_disk(key: str, limits: Architecture) -> Cubin | None:
    """The cubin stored under a key; None if no kernel for this GPU can have its header."""
    stored = cubins.read(key)
    if stored is None:
        return None
    header, code = stored
    try:
        header["parameters"] = tuple((name, letter) for name, letter in header["parameters"])
        header["warnings"] = tuple(header["warnings"])
        cubin = Cubin(**header, code=code)
        return cubin if _is_plausible(cubin, limits) else None
    except (KeyError, TypeError, ValueError):
        return None


def _is_plausible(cubin: Cubin, limits: Architecture) -> bool:
    """Whether a header's entries for the launch have their types and are within the limits."""
    numbers = (
        (cubin.num_threads, 1, 1024),
        (cubin.smem_bytes, 0, limits.max_smem_per_block),
        (cubin.registers, 1, 255),
        (cubin.spill_store_bytes, 0, _LOCAL_BYTES),
        (cubin.spill_load_bytes, 0, _LOCAL_BYTES),
        (cubin.stack_bytes, 0, _LOCAL_BYTES),
        (1 if cubin.min_blocks is None else cubin.min_blocks, 1, limits.max_blocks_per_sm),
    )
    texts = [cubin.entry, *cubin.warnings, *(name for name, _ in cubin.parameters)]
    return (
        all(type(number) is int and low <= number <= high for number, low, high in numbers)
        and all(isinstance(text, str) for text in texts)
        and all(letter in ("f", "i", "q", "P", "T") for _, letter in cubin.parameters)
        and type(cubin.compile_ms) is float
        and cubin.compile_ms >= 0
        and cubin.code.startswith(b"\x7fELF")
        and bool(cubin.entry)
        and cubin.entry.encode() in cubin.code
    )


def _compile_logged(key: str, config: Config, traits: Traits, limits: Architecture) -> Cubin:
    what = f"{config.family} {config} {traits} for {limits.arch}"
    _log.info("compiling %s ...", what)
    cubin = compile_cubin(config, traits, limits)
    _log.info("compiled %s in %.1f s", what, cubin.compile_ms / 1e3)
    header = {name: value for name, value in asdict(cubin).items() if name != "code"}
    cubins.write(key, header, cubin.code)
    return cubin


def warn_of_spills(what: str, cubin: Cubin) -> None:
    """Say once if CUDA 12's compilers have left a kernel's registers in memory.

    Configs are chosen by the code of CUDA 13's compilers. Some drivers only have CUDA 12's, which
    spill registers for Blackwell with some of the same configs.
    """
    n_bytes = max(cubin.stack_bytes, cubin.spill_store_bytes, cubin.spill_load_bytes)
    if n_bytes and (_version("cuda-bindings") or "").startswith("12."):
        _warn_once(
            f"{what}: CUDA 12's compilers keep {n_bytes} bytes a thread in memory instead of "
            'registers, which is slow; with a driver for CUDA 13, pip install "numflash[cu13]"'
        )


@cache
def _warn_once(text: str) -> None:
    _log.warning("%s", text)


def compile_cubin(config: Config, traits: Traits, limits: Architecture) -> Cubin:
    """Compile a kernel of numflash, whatever the caches hold. Raises UnsupportedError."""
    min_blocks = getattr(config, "min_blocks_per_sm", None)
    return compile_kernel(lambda: _make(config, traits), limits, min_blocks)


def compile_kernel(
    make: Callable[[], Any], limits: Architecture, min_blocks: int | None = None
) -> Cubin:
    """Compile the `Kernel` that `make` returns, also one that is not numflash's own.

    Args:
        make: makes the kernel.
        limits: the GPU to compile for.
        min_blocks: blocks per SM for which registers must suffice; None lets the compiler decide.

    Raises:
        UnsupportedError: the compiler packages are missing.
    """
    start = time.perf_counter()
    cubin = _compile(make, limits, min_blocks)
    if min_blocks is None and _spilled(cubin):
        # The assembler spills a little where that lets one more block fit on an SM. Often shared
        # memory, of which it knows nothing, has no room for that block. Told how many blocks are
        # enough, it takes the registers.
        for enough in _numbers_of_blocks(cubin, limits):
            roomy = _compile(make, limits, min_blocks=enough)
            cubin = min(cubin, roomy, key=_spilled)
            if not _spilled(cubin):
                break
    return replace(cubin, compile_ms=(time.perf_counter() - start) * 1e3)


def _spilled(cubin: Cubin) -> int:
    return cubin.spill_store_bytes + cubin.spill_load_bytes


def _numbers_of_blocks(cubin: Cubin, limits: Architecture) -> list[int]:
    """Numbers of blocks per SM for which a kernel that spills may have more registers."""
    threads = cubin.num_threads
    fit, _ = blocks_per_sm(limits, threads, cubin.registers, cubin.smem_bytes)
    # Where registers limit the number, it leaves no more of them.
    left = limits.registers_per_sm // (max(1, fit) * threads) // _REGISTER_STEP * _REGISTER_STEP
    return [fit, 1] if fit > 1 and left > cubin.registers else [1]


def _compile(
    make: Callable[[], Any], limits: Architecture, min_blocks: int | None = None
) -> Cubin:
    """A kernel compiled once; `min_blocks` as for `_front_end`."""
    kernel, ltoir = _front_end(make, limits, "ltoir", min_blocks)
    code, log = linker.link(ltoir, limits.arch)
    return Cubin(
        parameters=tuple((path, letter_of(t)) for path, t in kernel.leaves.items()),
        num_threads=kernel.num_threads,
        smem_bytes=kernel.smem_bytes,
        min_blocks=min_blocks,
        compile_ms=0.0,
        code=code,
        **linker.resources(log),
    )


def compile_ptx(config: Config, traits: Traits, limits: Architecture) -> str:
    """The PTX of a kernel, for reading: the machine code is made from LTO-IR.

    Raises:
        UnsupportedError: the compiler packages are missing.
    """
    config = getattr(config, "compiled", config)
    # The number of promised blocks may follow from spills, which only the assembler knows.
    min_blocks = get_cubin(config, traits, limits).min_blocks
    return _front_end(lambda: _make(config, traits), limits, "ptx", min_blocks)[1]


def executable_ptx(config: Config, traits: Traits, limits: Architecture, route: str) -> str:
    """The PTX of a kernel, for `numflash.executor`: nothing is assembled.

    Args:
        config, traits, limits: as for `get_cubin`.
        route: "ptx" for the PTX of NVVM; "lto" for the PTX that nvJitLink makes of LTO-IR on the
            way to machine code.

    Raises:
        UnsupportedError: the compiler packages are missing.
    """
    output = {"ptx": "ptx", "lto": "ltoir"}[route]
    min_blocks = getattr(config, "min_blocks_per_sm", None)
    _, code = _front_end(lambda: _make(config, traits), limits, output, min_blocks)
    return code if route == "ptx" else linker.link_ptx(code, limits.arch)


def _make(config: Config, traits: Traits):
    """The kernel for a config. Imports Numba."""
    from numflash.kernels.factories import make_kernel

    return make_kernel(config, traits)


def _front_end(
    make: Callable[[], Any], limits: Architecture, output: str, min_blocks: int | None = None
):
    """The kernel object, and its code as LTO-IR or PTX.

    `min_blocks` per SM is promised to the assembler, which bounds the registers; None leaves it
    the choice.
    """
    with _numba_for(limits) as numba_cuda:
        from numflash.machine_code.clusters import clusters_of
        from numflash.ptx import CODE_OPTIONS

        kernel = make()
        threads = kernel.num_threads
        with clusters_of(kernel.cluster):
            codes, _ = numba_cuda.compile_all(
                kernel.function,
                _signature(kernel.parameters),
                cc=_compute_capability(limits.arch),
                device=False,
                abi="numba",
                output=output,
                launch_bounds=threads if min_blocks is None else (threads, min_blocks),
                **CODE_OPTIONS,
            )
    if len(codes) != 1:
        raise UnsupportedError(f"the {kernel.family} kernel compiled to {len(codes)} modules")
    return kernel, codes[0]


@contextmanager
def _numba_for(limits: Architecture):
    """Numba's CUDA target, made to compile device functions for `limits` without a driver."""
    try:
        from numba import cuda
        from numba.cuda import dispatcher
    except ImportError as error:
        raise UnsupportedError(f"Numba cannot be imported: {error}. {INSTALL_HINT}") from error
    if not hasattr(cuda, "compile_all"):
        raise UnsupportedError(f"Numba is installed without numba-cuda. {INSTALL_HINT}")
    from numflash.machine_code.grid_constants import grid_constants
    from numflash.machine_code.repeated_work import without_repeated_work

    # compile_all knows the architecture, but Numba asks the current device for that of the device
    # functions a kernel calls.
    ask_driver = dispatcher.get_current_device
    device = SimpleNamespace(compute_capability=_compute_capability(limits.arch))
    dispatcher.get_current_device = lambda: device
    # Nearly all of Numba's objects live until it is done: looking for garbage costs a tenth.
    collects = gc.isenabled()
    gc.disable()
    try:
        with (
            compiler_libraries(),
            _settings(),
            _without_contraction(),
            without_repeated_work(),
            grid_constants(),
        ):
            yield cuda
    finally:
        dispatcher.get_current_device = ask_driver
        if collects:
            gc.enable()


@contextmanager
def _settings() -> Iterator[None]:
    """Numba's settings that no argument overrides, as numflash needs them."""
    from numba import config

    # Numba reads a changed environment again, which would undo these settings.
    config.reload_config()
    own = {name: getattr(config, name) for name in _NUMBA_SETTINGS if hasattr(config, name)}
    for name in own:
        setattr(config, name, _NUMBA_SETTINGS[name])
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(config, name, value)


@contextmanager
def _without_contraction():
    """Have NVVM fuse no product with a sum, as nvJitLink, too; Numba has no argument for it.

    Kernels round as their source says, and the simulator with them: only `fma_rn_f32` fuses.
    """
    from numba.cuda.cudadrv import nvvm

    compile_ir = nvvm.compile_ir
    nvvm.compile_ir = partial(compile_ir, fma=False)
    try:
        yield
    finally:
        nvvm.compile_ir = compile_ir


def _compute_capability(arch: str) -> tuple:
    digits = arch.removeprefix("sm_")
    number = digits.rstrip("af")
    flavour = digits[len(number) :]
    return (int(number[:-1]), int(number[-1])) + ((flavour,) if flavour else ())


def _signature(parameters: dict[str, object]):
    """The Numba signature of a kernel with annotated parameters."""
    from numba import types
    from numba.np import numpy_support

    from numflash.kernels.arguments import fields, record_of
    from numflash.machine_code.grid_constants import TENSOR_MAP
    from numflash.ptx import TensorMap
    from numflash.runtime.views import Pointer

    def numba_type(annotation):
        if annotation is TensorMap:
            return TENSOR_MAP
        if isinstance(annotation, Pointer):
            return types.CPointer(numpy_support.from_dtype(annotation.element))
        inner = fields(annotation)
        if inner is not None:
            types_of_fields = [numba_type(field) for field in inner.values()]
            return types.BaseTuple.from_types(types_of_fields, record_of(annotation))
        return numpy_support.from_dtype(annotation)

    return types.void(*map(numba_type, parameters.values()))


def letter_of(annotation) -> str:
    """The `struct` letter of a parameter."""
    letters = {"float32": "f", "int32": "i", "int64": "q", "TensorMap": "T"}
    return letters.get(getattr(annotation, "__name__", ""), "P")


@cache
def _toolchain() -> str:
    """The compilers' versions, and what else they make code from."""
    # Numba compiles Python's bytecode; cuda-bindings decide which of two linkers is loaded.
    names = ("cuda-bindings", *_COMPILERS)
    found = {"python": sys.version_info[:2], **{name: _version(name) for name in names}}
    if not any(found[name] for name in _LINKERS):
        found["toolkit"] = _toolkit_version()
    return ";".join(f"{name}={version}" for name, version in found.items())


def _toolkit_version() -> str | None:
    """The version of a CUDA toolkit that pip has not installed; None if there is none."""
    try:
        from cuda.bindings import nvjitlink

        with compiler_libraries():
            return "{}.{}".format(*nvjitlink.version())
    except (ImportError, UnsupportedError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """The installed compiler packages and their versions."""
    found = {name: _version(name) for name in _COMPILERS}
    return {name: version for name, version in found.items() if version is not None}
