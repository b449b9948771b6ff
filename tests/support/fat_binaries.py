"""Cubins, fat binaries and wheels written by hand, as much of them as readers look at."""

import io
import struct
import zipfile

LZ4, ZSTD = 0x2000, 0x8000
PTX, CUBIN = 1, 2
_SECTION, _SYMBOL = struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IBBHQQ")


def cubin(kernels: dict[str, tuple[int, int]], flags: int = 0x6005A04, version: int = 8) -> bytes:
    """An ELF file of kernels, {name: (registers, stack_bytes)}, and of a function that is none.

    `flags` and `version` say the GPU: the first of the second byte of `flags`, before version 8
    of the first.
    """
    names, symbols = b"\0", [_SYMBOL.pack(0, 0, 0, 0, 0, 0)]
    info = bytearray(struct.pack("<BBH", 3, 0x99, 7))
    for kind, given in ((0x10, kernels), (0, {"only_called": (9, 9)})):
        for name, (registers, stack) in given.items():
            number = len(symbols)
            symbols.append(_SYMBOL.pack(len(names), 0x12, kind, 4, 0, 0))
            names += name.encode() + b"\0"
            info += struct.pack("<BBHII", 4, 0x2F, 8, number, registers)
            info += struct.pack("<BBHII", 4, 0x11, 8, number, stack)
    titles = b"\0.nv.info\0.strtab\0.symtab\0"
    parts = [b"", titles, names, bytes(info), b"".join(symbols)]
    kinds = [(0, 0, 0), (0, 3, 0), (10, 3, 0), (1, 0x70000000, 4), (18, 2, 2)]
    body, sections = b"", []
    for part, (title, kind, link) in zip(parts, kinds, strict=True):
        place = 64 + len(body)
        sections.append(_SECTION.pack(title, kind, 0, 0, place, len(part), link, 0, 1, 0))
        body += part
    head = bytearray(64)
    head[:9] = b"\x7fELF\x02\x01\x01\x41" + bytes([version])
    struct.pack_into("<HHI", head, 16, 2, 190, 1)
    struct.pack_into("<Q", head, 0x28, 64 + len(body))
    struct.pack_into("<I", head, 0x30, flags)
    struct.pack_into("<HHH", head, 0x3A, _SECTION.size, len(sections), 1)
    return bytes(head) + body + b"".join(sections)


def fat_binary(*parts: tuple[int, bytes, int]) -> bytes:
    """(kind, content, flags) of each part as nvcc writes them; LZ4 is packed here."""
    body = b""
    for kind, content, flags in parts:
        packed = lz4_of_literals(content) if flags & LZ4 else content
        padded = packed + b"\0" * (-len(packed) % 8)
        sizes = (64, len(padded), len(packed) if flags else 0)
        head = struct.pack("<HHIQIIHHI", kind, 0x101, *sizes, 0, 0, 8, 90)
        body += head + struct.pack("<IIQQQ", 0, 0, flags, 0, len(content)) + padded
    return struct.pack("<4sHHQ", b"\x50\xed\x55\xba", 1, 16, len(body)) + body


def library(*fat_binaries: bytes) -> bytes:
    """A library of a host that holds fat binaries, and once only the bytes they begin with."""
    host = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 3, 62) + b"\x50\xed\x55\xba" * 3
    return host + b"".join(bytes(24) + each for each in fat_binaries)


def wheel(**members: bytes) -> bytes:
    """A zip archive; members' names have `.so` behind them."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("peer/__init__.py", "")
        for name, content in members.items():
            archive.writestr(f"peer/{name}.so", content)
    return out.getvalue()


def lz4_of_literals(data: bytes) -> bytes:
    """A block of LZ4 that repeats nothing."""
    if len(data) < 15:
        return bytes([len(data) << 4]) + data
    more = len(data) - 15
    return b"\xf0" + b"\xff" * (more // 255) + bytes([more % 255]) + data
