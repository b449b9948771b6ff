"""From LTO-IR to machine code: nvJitLink, and what its log says.

The way through LTO-IR is essential: nvJitLink compiles PTX as relocatable code, which spills
registers and ignores `setmaxnreg`. The log yields registers, spills and warnings.
"""

import re
from contextlib import contextmanager

from numflash.runtime.errors import UnsupportedError

INSTALL_HINT = 'Install the CUDA packages with pip install "numflash[cu13]" (or [cu12]).'


@contextmanager
def compiler_libraries():
    """Raises UnsupportedError where a library of the CUDA toolkit is not found."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ not in ("DynamicLibNotFoundError", "NvvmSupportError"):
            raise
        reason = " ".join(str(error).split())
        raise UnsupportedError(
            f"the compiler cannot be loaded: {reason}. {INSTALL_HINT}"
        ) from error


def link(ltoir: bytes, arch: str) -> tuple[bytes, str]:
    """The machine code and the assembler's log. Raises RuntimeError with it if it refuses."""
    with _linked(ltoir, arch, "-verbose") as (nvjitlink, handle):
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
        code = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, code)
    return bytes(code), _text(log)


def link_ptx(ltoir: bytes, arch: str) -> str:
    """The PTX that `link` assembles. Raises RuntimeError with the log if it is refused."""
    with _linked(ltoir, arch, "-ptx") as (nvjitlink, handle):
        code = bytearray(nvjitlink.get_linked_ptx_size(handle))
        nvjitlink.get_linked_ptx(handle, code)
    return _text(code)


@contextmanager
def _linked(ltoir: bytes, arch: str, option: str):
    """(nvJitLink, the handle of a finished link)."""
    try:
        from cuda.bindings import nvjitlink
    except ImportError as error:
        raise UnsupportedError(f"nvJitLink cannot be imported: {error}. {INSTALL_HINT}") from error
    options = [f"-arch={arch}", "-lto", option, "-fma=0"]
    with compiler_libraries():
        handle = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(handle, nvjitlink.InputType.LTOIR, ltoir, len(ltoir), "kernel")
        try:
            nvjitlink.complete(handle)
        except nvjitlink.nvJitLinkError as error:
            log = bytearray(nvjitlink.get_error_log_size(handle))
            nvjitlink.get_error_log(handle, log)
            raise RuntimeError(f"{error} for {arch}: {_text(log)}") from error
        yield nvjitlink, handle
    finally:
        nvjitlink.destroy(handle)


def _text(log: bytearray) -> str:
    return log.decode(errors="replace").replace("\0", "").strip()


def resources(log: str) -> dict:
    """Entry, registers, spills and warnings from the assembler's log."""

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        if found is None:
            raise RuntimeError(f"the linker's log does not say {pattern!r}:\n{log}")
        return int(found[1])

    entry = re.search(r"Compiling entry function '([^']+)'", log)
    if entry is None:
        raise RuntimeError(f"the linker's log names no kernel:\n{log}")
    return {
        "entry": entry[1],
        "registers": number(r"Used (\d+) registers"),
        "spill_store_bytes": number(r"(\d+) bytes spill stores"),
        "spill_load_bytes": number(r"(\d+) bytes spill loads"),
        "stack_bytes": number(r"(\d+) bytes stack frame"),
        "warnings": tuple(
            line.strip()
            for line in log.splitlines()
            if re.search(r"\bC75\d\d\b|warning|Potential Performance Loss", line, re.IGNORECASE)
        ),
    }
