"""explain_dispatch: of GPUs that are not here, and never against the kernel that it chose."""

import sys
import types
from dataclasses import replace

import numpy as np
import pytest

import numflash
from numflash.calls import launch, ready
from numflash.calls.arguments import request_of
from numflash.machine_code import compiler
from numflash.machine_code.compiler import versions
from numflash.machine_code.sources import family_hash
from numflash.problem.classes import ProblemClass
from numflash.problem.options import AttentionOptions
from numflash.runtime import driver, gpus
from numflash.runtime.arrays import metadata
from numflash.runtime.devices import ARCHITECTURES, architecture
from numflash.runtime.errors import UnsupportedError
from numflash.runtime.views import contiguous_strides, numpy_dtype
from numflash.selection import store, tuned
from numflash.selection.entries import DeviceKey, Entry
from numflash.selection.rules import choose_forward
from tuner.space import machines

H200 = DeviceKey("NVIDIA H200", "sm_90a", 132)


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch, tmp_path):
    """No driver, no compiler, an empty config cache."""

    def missing(*_):
        raise AssertionError("a GPU that is not here was asked, or compiled for")

    monkeypatch.setattr(driver, "open_driver", missing)
    monkeypatch.setattr(launch, "get_cubin", missing)
    monkeypatch.setattr(compiler, "get_cubin", missing)
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path))
    for name, empty in (("_found", {}), ("_advice", {}), ("_tables", []), ("_state", [])):
        monkeypatch.setattr(tuned, name, empty)
    monkeypatch.setattr(ready, "_ready", {})


@pytest.fixture
def shipped(monkeypatch):
    """Tuned configs, those that numflash ships among them."""
    monkeypatch.setenv("NUMFLASH_TUNED", "1")


@pytest.fixture
def remembered(monkeypatch):
    """Makes this machine's config cache; nothing is shipped."""
    monkeypatch.setenv("NUMFLASH_TUNED", "1")
    monkeypatch.setattr(store, "read_shipped", dict)

    def add(problem: str, config: str, device=H200, origin="measured"):
        found = Entry(
            problem=ProblemClass.parse(problem),
            config=config,
            time_ms=1.0,
            spread=None,
            origin=origin,
            date="2026-11-21T00:00:00Z",
            kernels=family_hash(problem.split()[0]),
            compilers=versions(),
            default_config=config,
            default_ms=2.0,
        )
        store.add(device, [found])

    return add


def array(*shape, dtype=np.float16):
    """A contiguous array of which only the metadata matters: it has memory for one element."""
    strides = [step * np.dtype(dtype).itemsize for step in contiguous_strides(shape)]
    return np.lib.stride_tricks.as_strided(np.empty(1, dtype), shape, strides)


# GPUs that are not here


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_answers(arch):
    q = array(2, 500, 4, 64)
    explanation = numflash.explain_dispatch(q, q, q, causal=True, arch=arch)
    assert explanation.gpu.limits is ARCHITECTURES[arch]
    assert explanation.gpu.is_architecture
    wgmma = explanation.forward.config.implementation == "sm90"
    assert wgmma is (arch == "sm_90a")
    assert str(explanation).startswith(f"on {arch}, as if it had the ")
    assert explanation.gpu.sizes_of in str(explanation).splitlines()[0]


@pytest.mark.parametrize("text", ["NVIDIA H200", "h200", " nvidia h200 ", "H200 SXM"])
def test_a_gpu_is_known_by_its_name(text):
    q = array(1, 1, 32, 128)
    k = array(1, 65536, 4, 128)
    explanation = numflash.explain_dispatch(q, k, k, arch=text)
    assert str(explanation).startswith("on NVIDIA H200: sm_90a, 132 SMs and 50 MB of L2\n")
    assert explanation.geometry.num_splits > 1 and explanation.combine is not None


def test_splits_follow_the_number_of_sms():
    q, k = array(1, 1, 8, 64), array(1, 65536, 8, 64)
    few, many = (numflash.explain_dispatch(q, k, k, arch=x).geometry for x in ("l4", "l40s"))
    assert few.num_splits < many.num_splits


def test_the_answer_is_that_of_the_rules():
    q = array(2, 4096, 8, 128)
    asked = numflash.explain_dispatch(q, q, q, arch="t4")
    request = request_of({name: metadata(q, name) for name in "qkv"}, AttentionOptions())
    by_rule = choose_forward(request.problem, request.traits, architecture("sm_75"), 40)
    assert asked.forward == by_rule


@pytest.mark.parametrize("precision", ["fp8", "auto"])
def test_nothing_is_compiled_for_8_bits(precision):
    q = array(2, 500, 4, 64)
    explanation = numflash.explain_dispatch(q, q, q, precision=precision, arch="rtx 4090")
    assert explanation.forward.traits.fp8 and explanation.backward == {}
    assert (explanation.in_16_bits is None) is (precision == "fp8")
    assert str(explanation).startswith("on NVIDIA GeForce RTX 4090: sm_89, 128 SMs")


def test_what_is_refused_there_is_refused():
    q = array(2, 500, 4, 64)
    with pytest.raises(UnsupportedError, match="config sm90-m64n64w4s1 cannot run this forward"):
        numflash.explain_dispatch(q, q, q, config="sm90-m64n64w4s1", arch="sm_80")
    with pytest.raises(TypeError, match="k must be"):
        numflash.explain_dispatch(q, [1.0], q, arch="sm_80")


@pytest.mark.parametrize("arch", ["sm_80", None])
def test_options_that_no_call_has_are_refused_by_name(arch, monkeypatch):
    monkeypatch.setattr(numflash.api.explain, "library_of", lambda array, name: None)
    q = array(2, 500, 4, 64)
    for name in ("foo", "out", "described"):
        with pytest.raises(TypeError, match=f"explain_dispatch got unknown options: {name}; it t"):
            numflash.explain_dispatch(q, q, q, arch=arch, **{name: 1})
    with pytest.raises(ValueError, match='max_rel_error goes with precision="auto"'):
        numflash.explain_dispatch(q, q, q, arch=arch, max_rel_error=0.1)


def test_a_tensor_on_any_device_will_do(monkeypatch):
    """torch.empty(..., device="meta") has no memory at all; nothing records a gradient."""

    class Tensor:
        shape, dtype, requires_grad, is_cuda = (2, 500, 4, 64), "torch.bfloat16", True, False

        def stride(self):
            return (128000, 256, 64, 1)

        def data_ptr(self):
            return 0

        def detach(self):
            return self

    torch = types.ModuleType("torch")
    torch.Tensor, torch.is_grad_enabled = Tensor, lambda: True
    monkeypatch.setitem(sys.modules, "torch", torch)
    explanation = numflash.explain_dispatch(Tensor(), Tensor(), Tensor(), arch="sm_90")
    assert str(explanation.forward.traits) == "bfloat16-d64-dv64-vec"


@pytest.mark.parametrize(
    "arch, error, words",
    [
        ("H2OO", ValueError, ["arch must be", "'H2OO'", "did you mean NVIDIA H200?"]),
        ("", ValueError, ["arch must be", "''"]),
        ("sm_12", ValueError, ["architecture must be one of sm_75", "'sm_12'"]),
        (90, TypeError, ["arch must be", "90 (int)"]),
    ],
)
def test_what_is_no_gpu_is_refused(arch, error, words):
    q = array(2, 500, 4, 64)
    with pytest.raises(error) as raised:
        numflash.explain_dispatch(q, q, q, arch=arch)
    for word in words:
        assert word in str(raised.value)


def test_the_table_is_that_of_the_tuner():
    """numflash does not import the tuner, whose table has more to each GPU."""
    assert gpus.names() == machines.names()
    for name in gpus.names():
        ours, theirs = gpus.find(name), machines.find(name)
        assert (ours.name, ours.limits.arch) == (theirs.name, theirs.arch)
        assert (ours.num_sms, ours.l2_bytes) == (theirs.num_sms, theirs.l2_bytes)
    spellings = {key: machine.name for key, machine in machines._by_key().items()}
    assert {key: gpu.name for key, gpu in gpus._by_key().items()} == spellings
    assert gpus._table()["representatives"] == machines._table()["representatives"]


# Tuned configs


def assert_not_against_itself(explanation):
    """No kernel that runs is listed as one that does not."""
    chosen = [explanation.forward, explanation.combine, *explanation.backward.values()]
    for choice in filter(None, chosen):
        names = {str(choice.config), choice.config.implementation}
        plain = str(tuned.without_geometry(choice.config))
        for what, why in choice.passed_over:
            # The default may be the same kernel, launched in another way.
            assert what not in names and (what != plain or "the default" in why), str(choice)


def explain(problem: ProblemClass, arch: str):
    """The explanation for a problem of a class."""
    dtype = numpy_dtype(problem.traits.dtype)
    heads = min(problem.batch_heads, 8 * problem.group_size)
    batch = problem.batch_heads // heads
    q = array(batch, problem.seqlen_q, heads, problem.traits.head_dim, dtype=dtype)
    kv_heads = heads // problem.group_size
    k = array(batch, problem.seqlen_k, kv_heads, problem.traits.head_dim, dtype=dtype)
    v = array(batch, problem.seqlen_k, kv_heads, problem.traits.head_dim_v, dtype=dtype)
    options = {"causal": problem.mask == "causal"}
    if problem.mask.startswith("window"):
        options["window_size"] = (problem.window - 1, 0)
    if problem.traits.tf32:
        options["precision"] = "tf32"
    return numflash.explain_dispatch(q, k, v, arch=arch, **options)


def test_no_shipped_config_is_explained_against_itself(shipped):
    tables, seen = store.read_shipped(), 0
    for device, entries in tables.items():
        for problem in {entry.problem for entry in entries}:
            explanation = explain(problem, device.name)
            seen += "tuned" in str(explanation)
            assert_not_against_itself(explanation)
    assert seen or not tables


CAUSAL = "forward float16-d128-dv128-vec causal q4096 k4096 bh32 g1"


def explain_causal(**options):
    """The forward of a problem of the class CAUSAL on an H200."""
    q = array(2, 4096, 16, 128)
    explanation = numflash.explain_dispatch(q, q, q, causal=True, arch="h200", **options)
    assert_not_against_itself(explanation)
    return explanation.forward


@pytest.mark.parametrize("origin", ["measured", "predicted"])
@pytest.mark.parametrize("of", [CAUSAL, CAUSAL.replace("q4096 k4096", "q2048 k2048")])
def test_a_tuned_config_that_is_the_default_is_not_passed_over(remembered, of, origin):
    default = explain_causal()
    remembered(of, str(tuned.without_geometry(default.config)), origin=origin)
    choice = explain_causal()
    assert choice.config == default.config and choice.rule.startswith("tuned on this device")
    assert "the default" not in str(choice) and choice.passed_over == default.passed_over


def test_the_default_is_passed_over_for_another(remembered):
    default = explain_causal()
    candidate = next(
        what for what, why in default.passed_over if what.startswith("sm90-") and "fits" in why
    )
    remembered(CAUSAL, candidate)
    choice = explain_causal()
    assert str(choice.config) == candidate
    assert choice.passed_over[0] == (
        str(default.config),
        f"the default ({default.rule}); what was tuned comes first",
    )


def test_another_generation_is_not_called_slower_where_it_runs(remembered):
    assert ("sm80", "wgmma is faster") in explain_causal().passed_over
    remembered(CAUSAL, "sm80-m128n64w4s1")
    choice = explain_causal()
    assert choice.config.implementation == "sm80"
    assert "wgmma is faster" not in str(choice) and "the default (" in str(choice)


def test_a_default_in_another_geometry_is_passed_over(remembered):
    """Splits and order are a tuned config's own: the default is launched in another way."""
    default = explain_causal()
    other = replace(default.config, heads_in_flight=4)
    remembered(CAUSAL, str(other))
    choice = explain_causal()
    assert choice.config == other
    assert choice.passed_over[0][0] == str(default.config)


def test_an_architecture_finds_what_was_tuned_for_it(remembered):
    remembered(CAUSAL, "sm80-m128n64w4s1", DeviceKey("sm_90", "sm_90a", 0), "predicted")
    q = array(2, 4096, 16, 128)
    choice = numflash.explain_dispatch(q, q, q, causal=True, arch="sm_90").forward
    assert choice.rule.startswith("tuned on this device for this class")


class TestPage:
    """numflash.explain hands what it was asked to the writer of pages."""

    @pytest.fixture
    def written(self, monkeypatch):
        found = []
        monkeypatch.setattr("numflash.api.explain.page_writer", lambda: found.append)
        return found

    def test_a_question_with_its_answer(self, written):
        x = np.zeros((1, 64, 2, 64), "float16")
        answer = numflash.explain(x, x, x, causal=True, gpu="H200", to="page.html")
        (question,) = written
        assert question.answer is answer and question.refusal is None
        assert question.arrays["k"] is x and question.options == {"causal": True}
        assert (question.gpu, question.data, question.to) == ("H200", True, "page.html")
        assert answer.problem.seqlen_q == 64 and answer.machine.num_sms == 132

    def test_a_refusal_is_written_and_raised(self, written):
        x = np.zeros((1, 64, 2, 300), "float16")
        with pytest.raises(UnsupportedError, match="at most 256") as caught:
            numflash.explain(x, x, x, gpu="H200", to="page.html")
        assert written[0].refusal is caught.value and written[0].answer is None

    def test_without_a_page_it_is_explain_dispatch(self):
        x = np.zeros((1, 64, 2, 64), "float16")
        assert numflash.explain(x, x, x, gpu="H200") == numflash.explain_dispatch(
            x, x, x, arch="H200"
        )

    @pytest.mark.parametrize(
        "options, error, message",
        [
            ({"gpu": "H2000"}, ValueError, "gpu must be an architecture"),
            ({"gpu": 90}, TypeError, "gpu must be an architecture"),
            ({"data": 1}, TypeError, "data must be True or False, got 1"),
            ({"to": 1}, TypeError, "to must be a path or None, got 1"),
            ({"casual": True}, TypeError, "explain got unknown options: casual; it takes gpu, to"),
        ],
    )
    def test_bad_options(self, written, options, error, message):
        x = np.zeros((1, 64, 2, 64), "float16")
        with pytest.raises(error, match=message):
            numflash.explain(x, x, x, **{"gpu": "H200", "to": "page.html", **options})
        assert written == []

    def test_a_page_needs_its_writer(self, monkeypatch):
        monkeypatch.setattr("numflash.api.pages.packages.entry_points", lambda group: [])
        x = np.zeros((1, 64, 2, 64), "float16")
        with pytest.raises(UnsupportedError, match="numflash_tuner, which is not installed"):
            numflash.explain(x, x, x, gpu="H200", to="page.html")
