"""JAX's handler for CUDA, called with frames made of XLA's structs, with the driver stubbed."""

import ctypes
import json
import math
import re
import threading

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason='needs JAX: pip install "numflash[jax]"')

from numflash.frontends.jax import calls, ffi  # noqa: E402
from numflash.frontends.jax.calls import planned  # noqa: E402
from numflash.jax import attention  # noqa: E402
from numflash.runtime.mode import SIMULATED  # noqa: E402
from tests.support import fake_gpu, jax_devices  # noqa: E402
from tests.support.fake_gpu import DV, HKV, SK, SQ, B, D, H  # noqa: E402
from tests.support.jax_devices import HANDLER, Calling  # noqa: E402
from tests.support.xla_calls import Xla  # noqa: E402

pytestmark = pytest.mark.skipif(SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM unset")

QKV = {"q": (B, SQ, H, D), "k": (B, SK, HKV, D), "v": (B, SK, HKV, DV)}
SQUARE = dict.fromkeys("qkv", (B, SQ, H, D))
STREAM = 0x7A00


@pytest.fixture
def forget(monkeypatch):
    """Nothing is ready, and device 0 is the only one."""
    monkeypatch.setattr(calls, "_ready", {})
    monkeypatch.setattr(calls, "devices_of_process", lambda: (0,))
    planned.cache_clear()
    yield
    planned.cache_clear()


@pytest.fixture
def machine(gpu, forget):
    """A fake Turing, on which XLA runs."""
    return gpu


def test_a_forward_is_launched_on_xlas_stream_and_memory(machine):
    made, xla = Calling(machine, QKV, causal=True), Xla()
    machine.driver.calls.clear()
    assert made.run(xla, stream=STREAM) is None
    (run,) = machine.driver.launches
    assert (run.family, run.stream, made.workspace) == ("forward", STREAM, 0)
    assert {name: run.arguments[name] for name in made.at} == made.at
    # Nothing is allocated, copied or waited for.
    assert [name for name, *_ in machine.driver.calls] == ["cuLaunchKernel"]
    assert machine.cupy.allocations == machine.torch.allocations == []
    assert [(dtype, shape) for _, dtype, shape in made.results] == [
        ("float16", (B, SQ, H, DV)),
        ("float32", (B, H, SQ)),
    ]


def test_a_backward_has_its_workspaces_in_the_last_result(machine):
    made = Calling(machine, QKV, wrt=("q", "k", "v"))
    assert made.run(Xla(), stream=STREAM) is None
    _delta, dkdv, dq = machine.driver.launches
    assert [run.family for run in machine.driver.launches] == [
        "delta",
        "backward-dkdv",
        "backward-dq",
    ]
    assert {run.stream for run in machine.driver.launches} == {STREAM}
    assert (dq.arguments["dq"], dkdv.arguments["dk"]) == (made.at["dq"], made.at["dk"])
    assert dkdv.arguments["dv"] == made.at["dv"]
    found = {
        value
        for run in machine.driver.launches
        for name, value in run.arguments.items()
        if made.at["workspace"] <= value < made.at["workspace"] + made.workspace
    }
    per_row = 4 * B * H * SQ
    assert len(found) >= 2 and all(x % 256 == 0 for x in found)
    ends = *sorted(found)[1:], made.at["workspace"] + made.workspace
    assert all(end - begin >= per_row for begin, end in zip(sorted(found), ends, strict=True))


def test_the_parts_of_split_keys_lie_in_the_workspace(machine):
    made = Calling(machine, {"q": (1, 1, 1, 64), "k": (1, 4096, 1, 64), "v": (1, 4096, 1, 64)})
    assert made.run(Xla()) is None
    forward, combine = machine.driver.launches
    assert (forward.family, combine.family) == ("forward", "combine")
    begin, end = made.at["workspace"], made.at["workspace"] + made.workspace
    assert begin <= forward.arguments["out"] < end and begin <= forward.arguments["lse"] < end
    assert combine.arguments["out"] == made.at["out"]
    assert combine.arguments["lse"] == made.at["lse"]


def test_lengths_fill_and_list_in_the_calls_own_memory(machine):
    lengths = {"seqlens_q": ("int32", (B,)), "seqlens_k": ("int32", (B,))}
    made = Calling(machine, QKV, arrays=lengths)
    assert made.run(Xla(), stream=STREAM) is None
    assert [run.family for run in machine.driver.launches] == ["schedule", "forward"]
    filled = {
        each.pointer: (each.count * each.itemsize, each.stream) for each in machine.driver.sets
    }
    assert filled == {
        made.at["out"]: (2 * B * SQ * H * DV, STREAM),
        made.at["lse"]: (4 * B * H * SQ, STREAM),
    }
    lists = machine.driver.launches[0].arguments["lists"]
    assert made.at["workspace"] <= lists < made.at["workspace"] + made.workspace
    assert made.at["seqlens_q"] in machine.driver.launches[0].arguments.values()


def test_numbers_of_options_reach_the_kernel(machine):
    slopes = {"alibi_slopes": ("float32", (H,))}
    made = Calling(machine, QKV, arrays=slopes, softmax_scale=0.25, dropout_p=0.5, seed=2**40 + 3)
    assert made.run(Xla()) is None
    (run,) = machine.driver.launches
    given = run.arguments
    assert given["scores.softmax_scale"] == 0.25
    assert given["scores.features.alibi.slopes"] == made.at["alibi_slopes"]
    assert given["scores.features.dropout.scale"] == 2


def _unescaped(found: re.Match) -> str:
    """As MLIR writes a character of a string."""
    return found[1] if found[1] == "\\" else chr(int(found[1], 16))


def test_what_jax_lowers_for_cuda_is_what_the_handler_knows(machine):
    """From the public function to the text in XLA's program, for a platform that is not here."""

    def loss(q, k, v):
        return attention(q, k, v, causal=True).astype("float32").sum()

    shapes = [jax.ShapeDtypeStruct(shape, "float16") for shape in QKV.values()]
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    program = step.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    texts = re.findall(r'@numflash\(.*?call = "(.*?)"\}', program)
    texts = [re.sub(r"\\(\\|[0-9A-F]{2})", _unescaped, each) for each in texts]
    forward, backward = map(json.loads, texts)
    assert (forward["wrt"], backward["wrt"]) == (None, ["q", "k", "v"])
    assert f"tensor<{backward['workspace']}xui8>" in program and backward["workspace"]
    assert {(text.encode(), 0) for text in texts} <= {*calls._ready}
    assert machine.driver.launches == []
    q, lse = machine.memory.take(2**20), machine.memory.take(2**20)
    arguments = [(q, dtype, shape) for dtype, shape in forward["arrays"]]
    results = [(q, "float16", (B, SQ, H, DV)), (lse, "float32", (B, H, SQ))]
    assert Xla().call(HANDLER, texts[0], arguments, results) is None
    assert machine.driver.launches[-1].arguments["lse"] == lse


def test_tensor_maps_are_those_of_xlas_addresses(hopper, forget):
    made, xla = Calling(hopper, dict.fromkeys("qkv", (B, 256, H, 64)), causal=True), Xla()
    assert made.run(xla) is None
    (run,) = hopper.driver.launches
    assert run.config.startswith("sm90")
    for name in ("q", "k", "v", "out"):
        assert run.arguments[f"{name}_map"].pointer == made.at[name]
    assert made.run(xla) is None and len(hopper.driver.launches) == 2


def test_other_addresses_are_bound_again_and_few_are_kept(machine):
    made, xla = Calling(machine, QKV), Xla()
    text = made.text.encode()
    for n in range(calls._MAX_ADDRESSES + 3):
        made.arguments[0] = (0x10000 * (n + 1), *made.arguments[0][1:])
        assert made.run(xla) is None
        assert machine.driver.launches[-1].arguments["q"] == 0x10000 * (n + 1)
    assert len(calls._ready[text, 0]._launches) <= calls._MAX_ADDRESSES


def test_initialising_loads_the_kernels_and_launches_nothing(machine):
    made = Calling(machine, QKV)
    # As in another process than the one that compiled the program.
    calls._ready.clear()
    assert made.run(Xla(), stage=ffi.INITIALIZE) is None
    driver = machine.driver
    assert driver.launches == [] and len(driver.loaded) == 1
    loads = driver.calls.count(("cuFuncLoad", driver.kernels[0]))
    assert made.run(Xla()) is None
    assert driver.loaded_lazily == []
    assert driver.calls.count(("cuFuncLoad", driver.kernels[0])) == loads


def test_each_device_has_its_own_kernels(machine):
    made, xla = Calling(machine, QKV), Xla()
    for device in (1, 0, 1):
        assert made.run(xla, device=device) is None
    assert len(calls._ready) == 2 and machine.driver.loaded_lazily == []
    assert [x for x in machine.driver.calls if x[0] == "cuCtxPushCurrent"] == [
        ("cuCtxPushCurrent", 0xC1)
    ] * 3


def test_an_xla_that_cannot_tell_the_device_is_asked_for_no_device(machine, monkeypatch):
    attribute = type("CUpointer_attribute", (), {"CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL": 9})
    asked = []

    def of_pointer(self, kind, pointer):
        asked.append((kind, pointer))
        return fake_gpu.OK, 1

    monkeypatch.setattr(fake_gpu.Driver, "CUpointer_attribute", attribute, raising=False)
    monkeypatch.setattr(fake_gpu.Driver, "cuPointerGetAttribute", of_pointer, raising=False)
    made = Calling(machine, QKV)
    assert made.run(Xla(table_bytes=88)) is None
    assert asked == [(9, made.at["out"])]
    assert [device for _, device in calls._ready] == [0, 1]


def test_threads_do_not_mix_their_addresses(machine):
    """As XLA has it with several devices: a thread each, at once."""
    xla = Xla()
    made = [Calling(machine, QKV) for _ in range(4)]
    errors = []

    def work(number):
        for _ in range(50):
            errors.append(made[number].run(xla, stream=number + 1, device=0))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {*errors} == {None} and len(machine.driver.launches) == 200
    for run in machine.driver.launches:
        at = made[run.stream - 1].at
        assert {name: run.arguments[name] for name in at} == at


@pytest.mark.parametrize(
    "change, code, words",
    [
        ({"text": "{"}, 3, "JSONDecodeError"),
        ({"text": json.dumps({"names": []})}, 13, "KeyError"),
        ({"misaligned": 4}, 3, "aligned to 16 bytes"),
        ({"fails": "S"}, 13, "XLA reports: no S"),
        ({"fails": "D"}, 13, "XLA reports: no D"),
        ({"launch": 2}, 13, "CUDA_ERROR_OUT_OF_MEMORY"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_what_goes_wrong_is_an_error_of_xlas(machine, change, code, words):
    made, xla = Calling(machine, QKV), Xla()
    made.text = change.get("text", made.text)
    pointer, *spec = made.arguments[0]
    made.arguments[0] = pointer + change.get("misaligned", 0), *spec
    xla.fails = {*change.get("fails", "")}
    machine.driver.launch_status = fake_gpu.Status(change.get("launch", 0))
    error = made.run(xla)
    assert error.code == code and words in error.message and error.message.startswith("numflash: ")
    # Its own error objects are given back.
    assert xla.destroyed == [ord(x) for x in xla.fails]


def test_a_program_for_a_smaller_workspace_is_refused(machine):
    made = Calling(machine, QKV, wrt=("q",))
    made.text = made.text.replace(f'"workspace":{made.workspace}', '"workspace":256')
    error = made.run(Xla())
    assert "256 bytes" in error.message and str(made.workspace) in error.message
    assert machine.driver.launches == []


def test_a_short_frame_is_refused(machine):
    made, xla = Calling(machine, QKV), Xla()
    frame, _kept = xla.frame(made.text, made.arguments, made.results)
    frame.struct_size = 160
    assert HANDLER(ctypes.addressof(frame)) == 1
    assert "168 bytes, got 160" in xla.reported[0].message


def test_an_infinite_fill_has_its_bits(machine):
    made = Calling(machine, QKV, arrays={"seqlens_q": ("int32", (B,))})
    assert made.run(Xla()) is None
    words = [each.value for each in machine.driver.sets if each.itemsize == 4]
    assert words == [int(np.float32(-math.inf).view(np.uint32))]


ROOM = 4
PROMISED_US = 15


def test_the_handler_costs_little_host_time(machine):
    """`python -m tests.support.jax_devices` measures it; here it must not be far off."""
    found = jax_devices.costs(machine, rounds=50)
    assert found.pop("the handler, forward") < ROOM * PROMISED_US
    assert found.pop("the handler, backward") < ROOM * PROMISED_US
