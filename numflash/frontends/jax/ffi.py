"""XLA's C interface for foreign functions: structs, call frames, errors and versions.

The structs are those of `xla/ffi/api/c_api.h`, which comes with jaxlib. XLA only appends to them,
so that a struct may be longer than here, never shorter. A handler is a Python function behind a C
pointer: XLA calls it on any of its threads, on several at once, and it must not call JAX.
"""

import ctypes
import re
from collections.abc import Callable
from ctypes import (
    POINTER,
    Structure,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

import jax


class ExtensionBase(Structure):
    """XLA_FFI_Extension_Base, a list."""

    _fields_ = (("struct_size", c_size_t), ("type", c_int), ("next", c_void_p))


_HEAD = (("struct_size", c_size_t), ("extension_start", c_void_p))


class ApiVersion(Structure):
    """XLA_FFI_Api_Version."""

    _fields_ = (*_HEAD, ("major_version", c_int), ("minor_version", c_int))


class Metadata(Structure):
    """XLA_FFI_Metadata, as far as a handler fills it in."""

    _fields_ = (("struct_size", c_size_t), ("api_version", ApiVersion), ("traits", c_uint32))


class MetadataExtension(Structure):
    """XLA_FFI_Metadata_Extension."""

    _fields_ = (("extension_base", ExtensionBase), ("metadata", POINTER(Metadata)))


class Buffer(Structure):
    """XLA_FFI_Buffer: an array, dense and row-major."""

    _fields_ = (
        *_HEAD,
        ("dtype", c_int),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    )


class Args(Structure):
    """XLA_FFI_Args; XLA_FFI_Rets is the same."""

    _fields_ = (*_HEAD, ("size", c_int64), ("types", c_void_p), ("args", c_void_p))


class Attrs(Structure):
    """XLA_FFI_Attrs, sorted by name."""

    _fields_ = (
        *_HEAD,
        ("size", c_int64),
        ("types", c_void_p),
        ("names", c_void_p),
        ("attrs", c_void_p),
    )


class ByteSpan(Structure):
    """XLA_FFI_ByteSpan: a string."""

    _fields_ = (("ptr", c_void_p), ("len", c_size_t))


class CallFrame(Structure):
    """XLA_FFI_CallFrame, as far as handlers read it."""

    _fields_ = (
        *_HEAD,
        ("api", c_void_p),
        ("ctx", c_void_p),
        ("stage", c_int),
        ("args", Args),
        ("rets", Args),
        ("attrs", Attrs),
    )


class ErrorCreate(Structure):
    """XLA_FFI_Error_Create_Args."""

    _fields_ = (*_HEAD, ("message", c_char_p), ("errc", c_int))


class ErrorGetMessage(Structure):
    """XLA_FFI_Error_GetMessage_Args."""

    _fields_ = (*_HEAD, ("error", c_void_p), ("message", c_char_p))


class ErrorDestroy(Structure):
    """XLA_FFI_Error_Destroy_Args."""

    _fields_ = (*_HEAD, ("error", c_void_p))


class StreamGet(Structure):
    """XLA_FFI_Stream_Get_Args."""

    _fields_ = (*_HEAD, ("ctx", c_void_p), ("stream", c_void_p))


class DeviceOrdinalGet(Structure):
    """XLA_FFI_DeviceOrdinal_Get_Args."""

    _fields_ = (*_HEAD, ("ctx", c_void_p), ("device_ordinal", c_int32))


FUNCTIONS = (
    *("Error_Create", "Error_GetMessage", "Error_Destroy", "Handler_Register", "Stream_Get"),
    *("Type_Register", "ExecutionContext_Get", "State_Set", "State_Get"),
    *("DeviceMemory_Allocate", "DeviceMemory_Free", "ThreadPool_Schedule"),
    *("ThreadPool_NumThreads", "Future_Create", "Future_SetAvailable", "Future_SetError"),
    *("RunId_Get", "DeviceOrdinal_Get"),
)
"""Of XLA_FFI_Api, in order."""


class ApiTable(Structure):
    """XLA_FFI_Api."""

    _fields_ = (
        *_HEAD,
        ("api_version", ApiVersion),
        ("internal_api", c_void_p),
        *((name, c_void_p) for name in FUNCTIONS),
    )


EXECUTE, INITIALIZE = 3, 2
"""Of XLA_FFI_ExecutionStage."""
COMMAND_BUFFER_COMPATIBLE = 1
"""The trait of handlers that always launch the same kernels, which a CUDA graph may hold."""
_METADATA = 1
_STRING = 4
_INVALID_ARGUMENT, _INTERNAL = 3, 13
HANDLER = ctypes.CFUNCTYPE(c_void_p, c_void_p)

# A frame is read as words, which costs less than its fields by name: its fields begin at them.
_WORD = ctypes.sizeof(c_uint64)


def _word(struct: type, *path: str) -> int:
    """The number of the word at which a field of a struct within structs begins."""
    offset = 0
    for name in path:
        field = getattr(struct, name)
        offset, struct = offset + field.offset, dict(struct._fields_)[name]
    return offset // _WORD


_FRAME_BYTES = CallFrame.attrs.offset + Attrs.attrs.offset + _WORD
_FRAME = c_uint64 * (_FRAME_BYTES // _WORD)
_SIZE, _EXTENSION, _API, _CONTEXT, _STAGE = (
    _word(CallFrame, name) for name in ("struct_size", "extension_start", "api", "ctx", "stage")
)
_NUM_ARGS, _ARGS = _word(CallFrame, "args", "size"), _word(CallFrame, "args", "args")
_NUM_RETS, _RETS = _word(CallFrame, "rets", "size"), _word(CallFrame, "rets", "args")
_NUM_ATTRS, _ATTRS = _word(CallFrame, "attrs", "size"), _word(CallFrame, "attrs", "attrs")
_ATTR_TYPES = _word(CallFrame, "attrs", "types")
_DATA = Buffer.data.offset
_ARRAYS = [c_uint64 * n for n in range(64)]
_INT_MASK = 2**32 - 1


class Frame:
    """A call of XLA's. What a handler does not ask for is not read.

    Attributes:
        api: what XLA offers.
        context: of this execution, for `api`.
        stage: EXECUTE or INITIALIZE.
    """

    __slots__ = ("_words", "api", "context", "stage")

    def __init__(self, api: "Api", words: list[int]):
        """The words of an XLA_FFI_CallFrame. Raises XlaError for fewer than handlers read."""
        if words[_SIZE] < _FRAME_BYTES:
            raise XlaError(
                f"a call frame of XLA's must have {_FRAME_BYTES} bytes, got {words[_SIZE]}"
            )
        self.api, self._words = api, words
        self.context, self.stage = words[_CONTEXT], words[_STAGE] & _INT_MASK

    @property
    def text(self) -> bytes:
        """The string that is the call's only attribute. Raises XlaError for another one."""
        words = self._words
        if words[_NUM_ATTRS] != 1 or c_int.from_address(words[_ATTR_TYPES]).value != _STRING:
            raise XlaError("a call of numflash has one attribute, a string")
        span = ByteSpan.from_address(c_uint64.from_address(words[_ATTRS]).value)
        return ctypes.string_at(span.ptr, span.len)

    @property
    def arguments(self) -> list[int]:
        """Where the data of the arguments lie; 0 of one without elements."""
        return _data(self._words[_NUM_ARGS], self._words[_ARGS])

    @property
    def results(self) -> list[int]:
        """Where the results lie."""
        return _data(self._words[_NUM_RETS], self._words[_RETS])


class XlaError(RuntimeError):
    """What a function of XLA's reports."""


class Api:
    """The functions of an XLA_FFI_Api that handlers call."""

    def __init__(self, address: int):
        """Read the table at an address. Raises XlaError for one that is too short."""
        head = ApiTable.from_address(address)
        self._size, version = head.struct_size, head.api_version
        self.version = version.major_version, version.minor_version
        self._address = address
        self._create = self._function("Error_Create", ErrorCreate)
        self._message = self._function("Error_GetMessage", ErrorGetMessage)
        self._destroy = self._function("Error_Destroy", ErrorDestroy)
        self._stream = self._function("Stream_Get", StreamGet)
        self._ordinal = None
        if self._size >= ApiTable.DeviceOrdinal_Get.offset + _WORD:
            self._ordinal = self._function("DeviceOrdinal_Get", DeviceOrdinalGet)

    def _function(self, name: str, arguments: type) -> Callable:
        offset = getattr(ApiTable, name).offset
        if self._size < offset + _WORD:
            raise XlaError(f"XLA's table of functions has {self._size} bytes, and no {name}")
        address = c_uint64.from_address(self._address + offset).value
        return ctypes.CFUNCTYPE(c_void_p, POINTER(arguments))(address)

    def stream(self, context: int) -> int:
        """The address of the CUDA stream of an execution. Raises XlaError."""
        asked = StreamGet(_STREAM_BYTES, None, context, None)
        if error := self._stream(asked):
            raise self._error(error)
        return asked.stream or 0

    def device(self, context: int) -> int | None:
        """The ordinal of the device of an execution; None if XLA is too old to tell.

        Raises XlaError.
        """
        if self._ordinal is None:
            return None
        asked = DeviceOrdinalGet(_ORDINAL_BYTES, None, context, 0)
        if error := self._ordinal(asked):
            raise self._error(error)
        return asked.device_ordinal

    def report(self, error: BaseException) -> int:
        """An error object of XLA's, which a handler returns."""
        is_callers = isinstance(error, TypeError | ValueError)
        message = f"numflash: {type(error).__name__}: {error}".encode()
        code = _INVALID_ARGUMENT if is_callers else _INTERNAL
        return self._create(ErrorCreate(_size_to(ErrorCreate, "errc"), None, message, code))

    def _error(self, error: int) -> XlaError:
        """The exception of an error object, which is destroyed."""
        asked = ErrorGetMessage(_size_to(ErrorGetMessage, "message"), None, error, None)
        self._message(asked)
        text = (asked.message or b"").decode(errors="replace")
        self._destroy(ErrorDestroy(_size_to(ErrorDestroy, "error"), None, error))
        return XlaError(f"XLA reports: {text}")


def _size_to(struct: type, last: str) -> int:
    """`struct_size` as XLA counts it: up to the end of the last field, without padding."""
    field = getattr(struct, last)
    return field.offset + field.size


_STREAM_BYTES = _size_to(StreamGet, "stream")
_ORDINAL_BYTES = _size_to(DeviceOrdinalGet, "device_ordinal")

_apis: dict[int, Api] = {}


def _api_at(address: int) -> Api:
    api = _apis.get(address)
    if api is None:
        api = _apis[address] = Api(address)
    return api


def handler(work: Callable[[Frame], None], traits: int = 0) -> Callable[[int], int | None]:
    """A C function that XLA may call, for as long as the object lives.

    Args:
        work: takes a call. What it raises becomes an error of XLA's.
        traits: of XLA_FFI_Handler_TraitsBits.
    """

    def call(address):
        api = None
        try:
            words = _FRAME.from_address(address)[:]
            if words[_EXTENSION] and _answered(words[_EXTENSION], traits):
                return None
            api = _apis.get(words[_API]) or _api_at(words[_API])
            work(Frame(api, words))
        except BaseException as error:  # ctypes would print it, and XLA read what is no error
            return (api or _api_at(CallFrame.from_address(address).api)).report(error)
        return None

    return HANDLER(call)


def _data(size: int, buffers: int) -> list[int]:
    kind = _ARRAYS[size] if size < len(_ARRAYS) else c_uint64 * size
    read = c_uint64.from_address
    # All addresses at once, which is quicker than one by one.
    return [read(each + _DATA).value for each in kind.from_address(buffers)[:]]


def _answered(extension: int, traits: int) -> bool:
    """Whether a frame only asks what a handler is, which is filled in."""
    while extension:
        base = ExtensionBase.from_address(extension)
        if base.type == _METADATA:
            metadata = MetadataExtension.from_address(extension).metadata.contents
            if metadata.struct_size < _size_to(Metadata, "traits"):
                return True  # nothing to fill in: XLA then finds no version, and says so
            metadata.api_version.major_version, metadata.api_version.minor_version = VERSION
            metadata.traits = traits
            return True
        extension = base.next
    return False


def version_of(header: str) -> tuple[int, int]:
    """(major, minor) of the interface that the text of `c_api.h` declares.

    Raises:
        ImportError: another major version than 0, or none.
    """
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    if found.get("MAJOR") != "0" or "MINOR" not in found:
        raise ImportError(
            f"numflash.jax knows version 0 of XLA's foreign function interface, and jaxlib has "
            f"{found or 'none'}: it needs another jax or numflash"
        )
    return int(found["MAJOR"]), int(found["MINOR"])


HEADER = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
VERSION = version_of(HEADER.read_text() if HEADER.exists() else "")
"""(major, minor) of XLA's interface in this installation."""

# Handlers that are registered: XLA keeps their addresses for ever.
_registered: list = []


def register(name: str, platform: str, stages: dict[str, Callable]) -> None:
    """Have XLA call handlers for a name on a platform, "cpu" or "CUDA".

    Args:
        name: of the target.
        platform: "cpu" or "CUDA".
        stages: "execute", and perhaps "initialize" -> what `handler` makes.
    """
    _registered.append(stages)
    capsules = {
        stage: jax.ffi.pycapsule(ctypes.cast(each, c_void_p).value)
        for stage, each in stages.items()
    }
    target = capsules if len(capsules) > 1 else capsules["execute"]
    jax.ffi.register_ffi_target(name, target, platform=platform)
