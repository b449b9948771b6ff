"""Kernels inside files of other compilers: wheels, libraries, objects, fat binaries and cubins.

A cubin is an ELF file of NVIDIA's machine; nvcc puts several, for one GPU each, into a fat binary
of a library. A wheel is a zip archive of libraries. Python reads all of that, and takes only the
kernels whose names match: a library may hold thousands.

Cubins may lie there as they are, or compressed: by LZ4, which is decoded here, or by zstd, as nvcc
does it since CUDA 12.9, which needs Python 3.14 or the package zstandard. PTX is left out: it is
no machine code. Neither format is documented whole; the fields that are read here are those that
NVIDIA's own tools agree with (`cuobjdump -res-usage`).
"""

import mmap
import re
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj

from numflash.runtime.errors import UnsupportedError

_ELF, _CUDA_MACHINE = b"\x7fELF", 190
_SECTION, _SYMBOL = struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IBBHQQ")
_SYMBOLS, _FUNCTION, _IS_ENTRY = 2, 2, 0x10
# Of .nv.info: entries whose value is that many bytes behind them; the attributes that are read.
_WITH_BYTES, _REGISTERS, _STACK = 4, 0x2F, 0x11
_NEW_VERSION = 8
_FAT = b"\x50\xed\x55\xba"
_FAT_HEADER, _FAT_VERSION = struct.Struct("<4sHHQ"), 1
# kind, version, bytes of the header, of the content with padding, of the content compressed, ...,
# GPU, ..., flags, ..., bytes of the content decompressed.
_ENTRY = struct.Struct("<HHIQII4xI8xQ8xQ")
_KIND_CUBIN, _LZ4, _ZSTD = 2, 0x2000, 0x8000
NO_ZSTD = "zstd is decoded by Python 3.14 or by the package zstandard: pip install zstandard"
"""Why a cubin that nvcc has compressed cannot be read."""


@dataclass(frozen=True)
class ForeignKernel:
    """A kernel of another compiler.

    Attributes:
        name: as the linker knows it, mangled.
        arch: the GPU, as in "sm_90"; files do not say all of its suffix.
        registers, stack_bytes: per thread, when it starts.
        symbol: its number in the table of symbols of `code`.
        code: the cubin.
        file: in which it lies: a path, or "MEMBER of PATH".
    """

    name: str
    arch: str
    registers: int
    stack_bytes: int
    symbol: int
    code: bytes
    file: str

    def __str__(self) -> str:
        return f"{self.arch}/{self.name}"


def kernels_in(path: Path, matching: str = "") -> list[ForeignKernel]:
    """The kernels of a wheel, library, cubin or folder, each name once for each GPU.

    Args:
        path: a folder stands for all files below it. Files in a folder may hold other kernels of
            the same name: compilers at run time do not always say the shape in it.
        matching: a regular expression that is searched for in "sm_90/NAME".

    Raises:
        ValueError: there is no cubin, or no kernel of these names, or a cubin is damaged.
        UnsupportedError: a cubin is compressed by zstd and there is no decoder.
        OSError: a file cannot be read.
    """
    pattern, found, cubins, apart = re.compile(matching), {}, 0, path.is_dir()
    for name, content in _contents(path):
        for code in _cubins(content, name):
            cubins += 1
            for kernel in _kernels_of(code, name):
                if pattern.search(str(kernel)):
                    found.setdefault((str(kernel), name if apart else ""), kernel)
    if not cubins:
        raise ValueError(f"{path} holds no cubin, the machine code that nvcc and others make")
    if not found:
        raise ValueError(f"{path} holds {cubins} cubins, and no kernel that matches {matching!r}")
    return list(found.values())


def _contents(path: Path) -> Iterator[tuple[str, mmap.mmap]]:
    """Files that may hold cubins, and their names for messages."""
    if path.is_dir():
        for each in sorted(path.rglob("*")):
            if each.is_file():
                yield from _contents(each)
        return
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file, _mapped(file) as content:
            yield str(path), content
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as source, tempfile.TemporaryFile() as file:
                copyfileobj(source, file)
                file.flush()
                with _mapped(file) as content:
                    yield f"{member.filename} of {path}", content


@contextmanager
def _mapped(file) -> Iterator[mmap.mmap | bytes]:
    """A file's bytes, in memory only where they are read."""
    if file.seek(0, 2) == 0:
        yield b""
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def _cubins(content: mmap.mmap | bytes, name: str) -> Iterator[bytes]:
    """The cubin that a file is, or those of its fat binaries, decompressed."""
    if content[:4] == _ELF and content[18:20] == struct.pack("<H", _CUDA_MACHINE):
        yield content[:]
        return
    start = 0
    while (start := content.find(_FAT, start)) >= 0:
        try:
            _, version, header, size = _FAT_HEADER.unpack_from(content, start)
        except struct.error:
            return
        at, end = start + header, start + header + size
        if version != _FAT_VERSION or header < _FAT_HEADER.size or end > len(content):
            # These four bytes are part of something else.
            start += len(_FAT)
            continue
        while at < end:
            try:
                fields = _ENTRY.unpack_from(content, at)
            except struct.error as error:
                raise ValueError(f"{name}: a fat binary is cut short: {error}") from error
            kind, _, header, padded, packed, _, _, flags, whole = fields
            if kind == _KIND_CUBIN:
                yield _decompressed(
                    content[at + header : at + header + padded], packed, whole, flags, name
                )
            if header < _ENTRY.size:
                raise ValueError(f"{name}: a part of a fat binary has a header of {header} bytes")
            at += header + padded
        start = end


def _decompressed(data: bytes, packed: int, whole: int, flags: int, name: str) -> bytes:
    if flags & _ZSTD:
        code = _zstd_decoder()(data[:packed])
    elif flags & _LZ4:
        code = lz4_decompressed(data[:packed])
    else:
        return data
    if len(code) != whole:
        raise ValueError(f"{name}: a cubin of {whole} bytes was decompressed to {len(code)}")
    return code


def _zstd_decoder():
    try:
        from compression import zstd
    except ImportError:
        try:
            import zstandard
        except ImportError:
            raise UnsupportedError(f"cubins are compressed by zstd; {NO_ZSTD}") from None
        return zstandard.ZstdDecompressor().decompress
    return zstd.decompress


def lz4_decompressed(data: bytes) -> bytes:
    """A block of LZ4, without a frame around it.

    Source: LZ4 block format description, github.com/lz4/lz4.

    Raises:
        ValueError: it is cut short, or refers to what is before its start.
    """
    out, at, end = bytearray(), 0, len(data)

    def length(nibble: int) -> int:
        """15 goes on in bytes, up to one that is not 255."""
        nonlocal at
        more = nibble == 15
        while more:
            nibble, more, at = nibble + data[at], data[at] == 255, at + 1
        return nibble

    try:
        while at < end:
            token, at = data[at], at + 1
            literals = length(token >> 4)
            if at + literals > end:
                raise ValueError("a block of LZ4 is cut short")
            out += data[at : at + literals]
            at += literals
            if at == end:
                break
            back, at = data[at] | data[at + 1] << 8, at + 2
            count, first = length(token & 15) + 4, len(out) - back
            if back == 0 or first < 0:
                raise ValueError(f"a block of LZ4 refers to {back} bytes back from {len(out)}")
            # What repeats may begin before it has been written whole.
            piece = out[first : first + count]
            out += (piece * (count // len(piece) + 1))[:count]
    except IndexError:
        raise ValueError("a block of LZ4 is cut short") from None
    return bytes(out)


def _kernels_of(code: bytes, name: str) -> Iterator[ForeignKernel]:
    """The kernels of a cubin; functions that only kernels call are none."""
    try:
        yield from _read_cubin(code, name)
    except (struct.error, IndexError, ValueError) as error:
        raise ValueError(f"{name}: a cubin cannot be read: {error}") from error


def _read_cubin(code: bytes, file: str) -> list[ForeignKernel]:
    (start,) = struct.unpack_from("<Q", code, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", code, 0x3A)
    sections = [_SECTION.unpack_from(code, start + i * size) for i in range(count)]

    def text(table: int, offset: int) -> str:
        first = sections[table][4] + offset
        return code[first : code.index(b"\0", first)].decode()

    attributes: dict[int, dict[int, int]] = {}
    for section in sections:
        if text(names_at, section[0]) == ".nv.info":
            _read_attributes(code[section[4] : section[4] + section[5]], attributes)
    (flags,) = struct.unpack_from("<I", code, 0x30)
    arch = f"sm_{flags >> 8 & 0xFF if code[8] >= _NEW_VERSION else flags & 0xFF}"
    found = []
    for section in sections:
        if section[1] != _SYMBOLS:
            continue
        for number in range(section[5] // _SYMBOL.size):
            symbol = _SYMBOL.unpack_from(code, section[4] + number * _SYMBOL.size)
            if symbol[1] & 15 == _FUNCTION and symbol[2] & _IS_ENTRY:
                of_it = attributes.get(number, {})
                numbers = of_it.get(_REGISTERS, 0), of_it.get(_STACK, 0)
                name = text(section[6], symbol[0])
                found.append(ForeignKernel(name, arch, *numbers, number, code, file))
    return found


def _read_attributes(info: bytes, found: dict[int, dict[int, int]]) -> None:
    """{symbol: {attribute: number}} of a section .nv.info."""
    at = 0
    while at + 4 <= len(info):
        kind, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if kind == _WITH_BYTES:
            if attribute in (_REGISTERS, _STACK):
                symbol, number = struct.unpack_from("<II", info, at)
                found.setdefault(symbol, {})[attribute] = number
            at += size
