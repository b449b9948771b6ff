"""XLA's side of a foreign call: frames and a table of functions, in the structs of its header.

With them handlers are called as XLA calls them, without XLA.
"""

import ctypes
import itertools
import threading
from ctypes import addressof, c_int, c_int64, c_void_p
from typing import NamedTuple

from numflash.frontends.jax import ffi

_CODES = {"bfloat16": 16, "bool": 1, "float16": 10, "float32": 11, "int32": 4, "uint8": 6}
_BUFFER = 1
_STRING = 4


class Reported(NamedTuple):
    """An error object that a handler returned."""

    code: int
    message: str


# Tables are XLA's own, and live as long as the process.
_tables: list = []


class Xla:
    """A table of functions, and calls with it.

    Attributes:
        executions: context -> (stream, device).
        reported: errors that handlers made.
        destroyed: error objects of XLA's own that were destroyed.
        fails: of "S" and "D": asking for the stream or the device gives an error object.
    """

    def __init__(self, table_bytes: int | None = None, answers_in_c: bool = False):
        """A table of so many bytes; `answers_in_c` for measuring: no Python runs in its calls.

        Stream and device then are 0.
        """
        self.reported: list[Reported] = []
        self.destroyed: list[int] = []
        self.fails: set[str] = set()
        self.executions: dict[int, tuple[int, int]] = {}
        self._kept: list = []
        self._lock, self._contexts = threading.Lock(), itertools.count()
        self.table = ffi.ApiTable(
            struct_size=table_bytes or ctypes.sizeof(ffi.ApiTable),
            api_version=ffi.ApiVersion(24, None, *ffi.VERSION),
        )
        _tables.append(self)
        for name, arguments, function in (
            ("Error_Create", ffi.ErrorCreate, self._create),
            ("Error_GetMessage", ffi.ErrorGetMessage, self._message),
            ("Error_Destroy", ffi.ErrorDestroy, self._destroy),
            ("Stream_Get", ffi.StreamGet, self._stream),
            ("DeviceOrdinal_Get", ffi.DeviceOrdinalGet, self._ordinal),
        ):
            pointer = ctypes.CFUNCTYPE(c_void_p, ctypes.POINTER(arguments))(function)
            self._kept.append(pointer)
            setattr(self.table, name, ctypes.cast(pointer, c_void_p).value)
        if answers_in_c:
            # A function of C's that takes a pointer, does nothing and returns 0.
            nothing = ctypes.CDLL(None).pthread_mutexattr_destroy
            for name in ("Stream_Get", "DeviceOrdinal_Get"):
                setattr(self.table, name, ctypes.cast(nothing, c_void_p).value)

    def _create(self, asked):
        with self._lock:
            given = asked.contents
            self.reported.append(Reported(given.errc, given.message.decode()))
            return len(self.reported)

    def _message(self, asked):
        asked.contents.message = b"no " + bytes([asked.contents.error])
        return None

    def _destroy(self, asked):
        self.destroyed.append(asked.contents.error)
        return None

    def _stream(self, asked):
        if "S" in self.fails:
            return ord("S")
        asked.contents.stream = self.executions[asked.contents.ctx][0]
        return None

    def _ordinal(self, asked):
        if "D" in self.fails:
            return ord("D")
        asked.contents.device_ordinal = self.executions[asked.contents.ctx][1]
        return None

    def frame(
        self, text: str, arguments, results, *, stage=ffi.EXECUTE, stream=0x7000, device=0
    ) -> tuple[ffi.CallFrame, list]:
        """A call frame, and what must outlive it.

        Args:
            text: of the attribute "call".
            arguments, results: (address, dtype, shape) of each buffer.
            stage, stream, device: of the execution.
        """
        kept: list = []
        context = 0x100 + next(self._contexts)
        self.executions[context] = stream, device
        span, name = self._span(text.encode(), kept), self._span(b"call", kept)
        frame = ffi.CallFrame(
            struct_size=ffi._FRAME_BYTES,
            api=addressof(self.table),
            ctx=context,
            stage=stage,
            args=self._buffers(arguments, kept),
            rets=self._buffers(results, kept),
            attrs=ffi.Attrs(
                ctypes.sizeof(ffi.Attrs),
                None,
                1,
                self._array(c_int, [_STRING], kept),
                self._array(c_void_p, [name], kept),
                self._array(c_void_p, [span], kept),
            ),
        )
        # What lies between fields of a C struct is whatever was there before.
        ctypes.c_uint32.from_address(addressof(frame) + 36).value = 0xDEADBEEF
        return frame, kept

    def call(self, handler, *args, **how) -> Reported | None:
        """Call a handler; the error that it returned."""
        frame, kept = self.frame(*args, **how)
        error = handler(addressof(frame))
        del kept
        return self.reported[error - 1] if error else None

    def _buffers(self, buffers, kept: list) -> ffi.Args:
        addresses = []
        for pointer, dtype, shape in buffers:
            dims = (c_int64 * len(shape))(*shape)
            buffer = ffi.Buffer(48, None, _CODES[dtype], pointer or None, len(shape), dims)
            kept += buffer, dims
            addresses.append(addressof(buffer))
        return ffi.Args(
            ctypes.sizeof(ffi.Args),
            None,
            len(addresses),
            self._array(c_int, [_BUFFER] * len(addresses), kept),
            self._array(c_void_p, addresses, kept),
        )

    @staticmethod
    def _array(kind: type, values: list, kept: list) -> int:
        kept.append((kind * len(values))(*values))
        return addressof(kept[-1])

    @staticmethod
    def _span(text: bytes, kept: list) -> int:
        room = ctypes.create_string_buffer(text, len(text) + 1)
        span = ffi.ByteSpan(addressof(room), len(text))
        kept += room, span
        return addressof(span)
