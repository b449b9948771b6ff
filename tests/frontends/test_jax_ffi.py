"""XLA's C interface: our structs are those of the header, and a handler says what it is."""

import ctypes
import re

import pytest

jax = pytest.importorskip("jax", reason='needs JAX: pip install "numflash[jax]"')

from numflash.frontends.jax import ffi  # noqa: E402
from tests.support.xla_calls import Xla  # noqa: E402

HEADER = ffi.HEADER.read_text()
STRUCTS = {
    "XLA_FFI_Extension_Base": ffi.ExtensionBase,
    "XLA_FFI_Api_Version": ffi.ApiVersion,
    "XLA_FFI_Metadata": ffi.Metadata,
    "XLA_FFI_Buffer": ffi.Buffer,
    "XLA_FFI_Args": ffi.Args,
    "XLA_FFI_Rets": ffi.Args,
    "XLA_FFI_Attrs": ffi.Attrs,
    "XLA_FFI_ByteSpan": ffi.ByteSpan,
    "XLA_FFI_CallFrame": ffi.CallFrame,
    "XLA_FFI_Error_Create_Args": ffi.ErrorCreate,
    "XLA_FFI_Error_GetMessage_Args": ffi.ErrorGetMessage,
    "XLA_FFI_Error_Destroy_Args": ffi.ErrorDestroy,
    "XLA_FFI_Stream_Get_Args": ffi.StreamGet,
    "XLA_FFI_DeviceOrdinal_Get_Args": ffi.DeviceOrdinalGet,
    "XLA_FFI_Api": ffi.ApiTable,
}
SIZES = {
    "size_t": 8,
    "int64_t": 8,
    "int32_t": 4,
    "uint32_t": 4,
    "int": 4,
    "XLA_FFI_Extension_Type": 4,
    "XLA_FFI_Error_Code": 4,
    "XLA_FFI_DataType": 4,
    "XLA_FFI_ExecutionStage": 4,
    "XLA_FFI_Handler_Traits": 4,
    "XLA_FFI_Api_Version": 24,
    "XLA_FFI_TypeId": 8,
    "XLA_FFI_Args": 40,
    "XLA_FFI_Rets": 40,
    "XLA_FFI_Attrs": 48,
}


def declared(name):
    """(name, bytes) of the fields of a struct of the header."""
    pattern = rf"struct {name} {{(.*?)\n}}"
    bodies = re.findall(pattern, HEADER, re.DOTALL)
    if not bodies and ffi.VERSION < (0, 3):
        pytest.skip(f"this jaxlib has no {name} yet")
    (body,) = bodies
    body = re.sub(r"//.*", "", body)
    found = []
    for line in filter(None, map(str.strip, body.split(";"))):
        if function := re.match(r"_XLA_FFI_API_STRUCT_FIELD\(XLA_FFI_(\w+)\)", line):
            found.append((function[1], 8))
        else:
            kind, pointer, field = re.match(r"(.*?)\s*(\**)\s*(\w+)$", line).groups()
            found.append((field, 8 if pointer or kind.endswith("*") else SIZES[kind.split()[-1]]))
    return found


@pytest.mark.parametrize("name", STRUCTS)
def test_a_struct_is_that_of_the_header(name):
    ours = STRUCTS[name]
    found = [(field, getattr(ours, field).size) for field, *_ in ours._fields_]
    # Args stand for Rets, too; what we do not read is left out at the end.
    found = [
        ("rets" if (name, field) == ("XLA_FFI_Rets", "args") else field, n) for field, n in found
    ]
    wanted = declared(name)
    if ffi.VERSION < (0, 3):
        # A jaxlib whose table ends sooner, and names a function that nobody calls otherwise.
        found = found[: len(wanted)]
        wanted = [(field.replace("TypeId_Register", "Type_Register"), n) for field, n in wanted]
    assert found == wanted[: len(found)]


def test_enumerators_are_those_of_the_header():
    for name, value in {
        "ExecutionStage_EXECUTE": ffi.EXECUTE,
        "ExecutionStage_INITIALIZE": ffi.INITIALIZE,
        "Extension_Metadata": ffi._METADATA,
        "AttrType_STRING": ffi._STRING,
        "Error_Code_INVALID_ARGUMENT": ffi._INVALID_ARGUMENT,
        "Error_Code_INTERNAL": ffi._INTERNAL,
    }.items():
        assert re.search(rf"XLA_FFI_{name} = (\d+)", HEADER)[1] == str(value)
    assert "COMMAND_BUFFER_COMPATIBLE = 1u << 0" in HEADER and ffi.COMMAND_BUFFER_COMPATIBLE == 1


def asked(handler, metadata_bytes=36, unknown_first=False):
    """The metadata that a handler fills in."""
    metadata = ffi.Metadata(metadata_bytes, ffi.ApiVersion(24, None, 9, 9), 9)
    extension = ffi.MetadataExtension(ffi.ExtensionBase(24, 1, None), ctypes.pointer(metadata))
    first = ffi.ExtensionBase(24, 77, ctypes.addressof(extension))
    start = ctypes.addressof(first if unknown_first else extension)
    frame = ffi.CallFrame(struct_size=168, extension_start=start)
    assert handler(ctypes.addressof(frame)) is None
    version = metadata.api_version
    return (version.major_version, version.minor_version), metadata.traits


@pytest.mark.parametrize("traits", [0, 1])
def test_a_handler_says_what_it_is(traits):
    handler = ffi.handler(lambda frame: 1 / 0, traits)
    assert asked(handler) == asked(handler, unknown_first=True) == (ffi.VERSION, traits)
    # Too short to be filled in.
    assert asked(handler, metadata_bytes=32) == ((9, 9), 9)


def test_an_unknown_extension_is_passed_over():
    calls = []
    handler, xla = ffi.handler(calls.append), Xla()
    frame, _kept = xla.frame("text", [], [])
    extension = ffi.ExtensionBase(24, 77, None)
    frame.extension_start = ctypes.addressof(extension)
    assert handler(ctypes.addressof(frame)) is None
    assert [(each.text, each.stage, each.arguments) for each in calls] == [(b"text", 3, [])]


@pytest.mark.parametrize(
    "error, code",
    [(TypeError("a"), 3), (ValueError("a"), 3), (RuntimeError("a"), 13), (SystemExit("a"), 13)],
    ids=lambda x: type(x).__name__,
)
def test_an_exception_is_an_error_of_xlas(error, code):
    def work(frame):
        raise error

    reported = Xla().call(ffi.handler(work), "", [], [])
    assert reported == (code, f"numflash: {type(error).__name__}: a")


def test_a_frame_is_read():
    seen, xla = [], Xla()

    def work(frame):
        seen.append((frame.text, frame.arguments, frame.results, frame.stage))
        seen.append((frame.api.stream(frame.context), frame.api.device(frame.context)))

    buffers = [(0x1000, "float32", (2, 3)), (0, "float16", (0, 4))]
    how = {"stage": ffi.INITIALIZE, "stream": 0xABC0, "device": 3}
    assert xla.call(ffi.handler(work), "tëxt", buffers, buffers[:1] * 70, **how) is None
    assert seen[0] == ("tëxt".encode(), [0x1000, 0], [0x1000] * 70, ffi.INITIALIZE)
    assert seen[1] == (0xABC0, 3)


def test_a_table_that_is_too_short_is_refused():
    table = ffi.ApiTable(struct_size=80)
    with pytest.raises(ffi.XlaError, match="80 bytes, and no Stream_Get"):
        ffi.Api(ctypes.addressof(table))
