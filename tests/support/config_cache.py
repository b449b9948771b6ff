"""Entries of a config cache, and files with them; the cache is a fixture."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from numflash.problem.classes import ProblemClass
from numflash.selection import store
from numflash.selection.entries import Row, format_table
from numflash.selection.store import DeviceKey, Entry

FORWARD = ProblemClass.parse("forward float16-d64-dv64-vec causal q4096 k4096 bh64 g1")
BACKWARD = ProblemClass.parse("backward-dq float16-d64-dv64-vec full q1024 k1024 bh64 g1")
H200 = DeviceKey("NVIDIA H200", "sm_90a", 132)
A100 = DeviceKey("NVIDIA A100-SXM4-80GB", "sm_80", 108)
ENTRY = Entry(
    problem=FORWARD,
    config="sm80-m128n64w4s1",
    time_ms=1.25,
    spread=0.01,
    origin="measured",
    date="2026-11-21T09:14:04Z",
    kernels="0123abcd",
    compilers={"numba": "0.68.1", "nvvm": "13.0"},
    default_config="m64n32w4",
    default_ms=2.5,
)
OTHER = replace(ENTRY, problem=BACKWARD, config="m64n32w4", time_ms=3.0, spread=None)
PREDICTED = replace(ENTRY, origin="predicted", time_ms=0.5)
LATER = {"date": "2026-11-22T00:00:00+00:00"}
OF_THE_FUTURE = {"date": "2099-01-01T00:00:00Z"}


def content(*raw, device=H200, schema=1) -> dict:
    """The content of a file with these raw entries."""
    key = {"name": device.name, "arch": device.arch, "num_sms": device.num_sms}
    return {"schema": schema, "devices": [{"device": key, "entries": list(raw)}]}


def put(data, device=H200) -> Path:
    """Write the file of a device."""
    path = store.path_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return path


def names() -> list[str]:
    """The files of the cache but its lock."""
    return sorted(path.name for path in store.config_dir().iterdir() if path.name != ".lock")


GOOD = format_table({H200: [Row.of(ENTRY)]}).encode()
NO_TABLE = {
    "empty": b"",
    "half": GOOD[: len(GOOD) // 2],
    "binary": bytes(range(256)) * 9,
    "zeros": b"\0" * 4096,
    "list": b"[]",
    "number": b"1",
    "huge number": b"9" * 5000,
    "deep": b"[" * 100_000,
    "no schema": b"{}",
    "schema of text": b'{"schema": "1", "devices": []}',
    "schema of truth": b'{"schema": true, "devices": []}',
    "huge schema": b'{"schema": ' + b"9" * 5000 + b', "devices": []}',
    "no devices": b'{"schema": 1}',
    "devices by name": b'{"schema": 1, "devices": {"NVIDIA H200": []}}',
    "device of text": b'{"schema": 1, "devices": ["NVIDIA H200"]}',
    "no device": b'{"schema": 1, "devices": [{"entries": []}]}',
    "device without SMs": b'{"schema": 1, "devices": [{"device": {"name": "A", "arch": "sm_80"}, '
    b'"entries": []}]}',
    "entries by name": json.dumps({**content(), "devices": [{**content()["devices"][0],
                                  "entries": {}}]}).encode(),
}  # fmt: skip

each_no_table = pytest.mark.parametrize("data", NO_TABLE.values(), ids=NO_TABLE.keys())
