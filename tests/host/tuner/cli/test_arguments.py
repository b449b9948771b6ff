"""Arguments of the tuner's command line: every wrong one is answered in one line."""

import re
import sys
from concurrent.futures import Future

import numpy as np
import pytest

pytest.importorskip("optuna")
from numflash.calls.arguments import request_of
from numflash.problem.classes import ProblemClass
from numflash.problem.options import AttentionOptions
from numflash.runtime.arrays import library_of
from numflash.runtime.mode import SIMULATED
from tests.host.tuner.test_session import InstantPool
from tests.support.tuning_entries import CLASS, OFFLINE, SMALL
from tuner import caches, cli
from tuner.search.pool import NoCompilerError
from tuner.space import machines
from tuner.space import target as targets


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--trials", "0"), "--trials must be positive, got 0"),
        (("--trials", "many"), "--trials: invalid int value: 'many'"),
        (("--time-budget", "-1"), "--time-budget must be positive, got -1.0"),
        (("--time-budget", "nan"), "--time-budget must be positive, got nan"),
        (("--target", "0"), "--target must be positive, got 0.0"),
        (("--jobs", "0"), "--jobs must be positive, got 0"),
        (("--sampler", "best"), "--sampler: invalid choice: 'best'"),
        (("--seed", "-1"), "Seed must be between 0 and"),
        (
            ("--sram-budget", "48Q"),
            "--sram-budget must be a number of bytes, as in 48K, got '48Q'",
        ),
        (("--sram-budget", "K"), "--sram-budget must be a number of bytes, as in 48K, got 'K'"),
        (("--sram-budget", ""), "--sram-budget must be a number of bytes, as in 48K, got ''"),
        (("--sram-budget", "0"), "the shared-memory budget must be positive, got 0"),
        (("--min-occupancy", "1.5"), "the occupancy must be between 0 and 1, got 1.5"),
        (("--min-occupancy", "nan"), "the occupancy must be between 0 and 1, got nan"),
        (("--mask", "diagonal"), "--mask must be full, causal or windowN"),
        (("--mask", "window"), "--mask must be full, causal or windowN"),
        (("--mask", "window0"), "--mask must be full, causal or windowN"),
        (("--mask", "window-5"), "--mask must be full, causal or windowN"),
        (("--heads", "8", "--heads-kv", "3"), "--heads-kv must divide --heads, 8, got 3"),
        (("--heads-kv", "0"), "--heads-kv must divide --heads, 16, got 0"),
        (("--heads", "0"), "--heads must be positive, got 0"),
        (("--batch", "-2"), "--batch must be positive, got -2"),
        (("--seqlen", "4096", "0"), "--seqlen must be positive, got 0"),
        (("--seqlen-q", "-1"), "--seqlen-q must be positive, got -1"),
        (("--head-dim", "0"), "--head-dim must be 1 to 256, got 0"),
        (("--head-dim-v", "257"), "--head-dim-v must be 1 to 256, got 257"),
        (("--dtype", "float8"), "--dtype: invalid choice: 'float8'"),
        (("--pass", "sideways"), "--pass: invalid choice: 'sideways'"),
        (("--pass",), "--pass: expected at least one argument"),
        (("--precision", "tf16"), "--precision: invalid choice: 'tf16'"),
        (("--page-size", "0"), "--page-size must be positive, got 0"),
        (("--page-size", "16", "--pass", "backward"), "--page-size goes with --pass forward"),
        (("--page-size", "16", "--varlen"), "--page-size goes without --varlen"),
        (("--frobnicate",), "unrecognized arguments: --frobnicate"),
        (("nonsense",), "unrecognized arguments: nonsense. Subcommands, which come first, are"),
        (("--quiet", "show"), "did you mean numflash-tune show? Subcommands, which come first,"),
        (("--precision", "fp8", "--dtype", "float32"), "got --dtype float32"),
        (("--precision", "fp8", "--pass", "backward"), "no gradients on 8-bit floats"),
        (("--precision", "fp8", "--varlen"), "--varlen goes with 16 and 32 bits, not with"),
        (("--precision", "fp8", "--page-size", "16"), "--page-size goes with 16 and 32 bits"),
        (("--precision", "fp8", "--dropout"), "--dropout goes with 16 and 32 bits, not with"),
        (("--key-scales",), "--key-scales goes with --precision fp8"),
        (("--precision", "tf32"), "tf32 goes with --dtype float32, got --dtype float16 bfloat16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_arguments_are_named(refused, argv, words):
    assert words in refused(*OFFLINE, *argv)


def test_a_mistyped_subcommand_is_answered_with_those_there_are(refused):
    for typed, meant in (("shw", "show"), ("vaildate", "validate"), ("Merge", "merge")):
        said = refused(typed)
        assert f"{typed}; did you mean numflash-tune {meant}? Subcommands" in said
        assert all(command in said for command in caches.COMMANDS)


@pytest.mark.parametrize(
    ("device", "head_dim", "words"),
    [
        ("T4", 64, "on its FMA units, not as tf32 (sm75 (tensor cores): Turing's"),
        ("sm_80", 256, "of shared memory per block, sm_80 has 166912); what runs there is"),
    ],
)
def test_tf32_that_a_gpu_does_not_multiply_is_refused(refused, device, head_dim, words):
    options = ("--dtype", "float32", "--precision", "tf32", "--head-dim", head_dim)
    said = refused("--device", device, "--offline", *options, "--trials", 1)
    assert words in said and "forward float32" in said and "without --precision tf32" in said


def test_tf32_is_tuned_where_it_is_multiplied(run):
    options = (*SMALL, "--precision", "tf32", "--trials", 1, "--quiet")
    status, out, _ = run(*OFFLINE, *options)
    assert status == 0 and "-tf32 full" in out and " sm80-m" in out


def test_an_unknown_device_names_the_nearest(refused):
    said = refused("--device", "RTX 409", "--offline")
    assert "'RTX 409'" in said and "did you mean NVIDIA GeForce RTX 4090" in said


@pytest.mark.parametrize("device", ["sm_99", "", "sm_70", "-1x"])
def test_what_is_no_device_is_quoted(refused, device):
    assert repr(device) in refused(f"--device={device}", "--offline")


@pytest.mark.parametrize("device", [(), ("--device", "0"), ("--device", "5", "--offline")])
@pytest.mark.skipif(not SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM=1")
def test_without_a_gpu_it_says_what_can_be_done(refused, device):
    said = refused(*device)
    assert "no GPU in the simulator" in said
    assert said.endswith(
        '. To tune for a GPU that is not here: --device "NVIDIA A100" --offline\n'
    )


@pytest.mark.parametrize(
    ("here", "words"),
    [([], "it has no GPU"), (["Tesla T4", "NVIDIA L4"], "its GPUs are Tesla T4, NVIDIA L4")],
)
def test_a_gpu_that_is_not_here_cannot_be_measured(refused, monkeypatch, here, words):
    monkeypatch.setattr(targets, "_local_names", lambda: here)
    said = refused("--device", "A100")
    assert f"NVIDIA A100-SXM4-80GB cannot be measured on this machine: {words}" in said
    assert "use --offline" in said


@pytest.mark.parametrize(
    ("argv", "constraint"),
    [
        (("--sram-budget", "64"), "--sram-budget"),
        (("--dtype", "float16", "--min-occupancy", "1", "--head-dim", "256"), "--min-occupancy"),
    ],
)
def test_impossible_budgets_name_the_constraint_that_empties_the_space(refused, argv, constraint):
    said = refused(*OFFLINE, *SMALL, *argv, status=1)
    assert "is possible on sm_80" in said and re.search(rf"{constraint} [1-9]\d*", said)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://me:secret@127.0.0.1:1/x", "postgresql://me:***@127.0.0.1:1/x"),
        ("nonsense://x", "the driver for nonsense://x is missing"),
        ("/dev/null/trials", "the journal /dev/null/trials cannot be written"),
    ],
)
def test_a_storage_that_does_not_answer_is_named(refused, url, words):
    if url.startswith("postgresql"):
        pytest.importorskip("psycopg")
    said = refused(*OFFLINE, *SMALL, "--quiet", "--storage", url, status=1)
    assert words in said and "secret" not in said


def test_a_storage_that_fails_in_the_middle_is_one_line(refused, monkeypatch):
    from optuna.exceptions import StorageInternalError

    from tuner.search import studies

    def fail(self, trial, record):
        raise StorageInternalError("the connection\nis lost")

    monkeypatch.setattr(studies.Ledger, "finish", fail)
    assert "the connection is lost" in refused(*OFFLINE, *SMALL, "--quiet", status=1)


def test_where_no_compiler_can_be_started_it_is_one_line(refused, monkeypatch):
    def submit(self, config, traits):
        future = Future()
        future.set_exception(NoCompilerError("no compiler process can be started: no memory"))
        return future

    monkeypatch.setattr(InstantPool, "submit", submit)
    said = refused(*OFFLINE, *SMALL, "--quiet", status=1)
    assert said.endswith("error: no compiler process can be started: no memory\n")


def test_a_class_that_fails_does_not_end_the_others(run, monkeypatch):
    monkeypatch.setattr(InstantPool, "spill_bytes", 4)
    status, out, err = run(*OFFLINE, *SMALL, "--seqlen", 512, 1024, "--trials", 2, "--quiet")
    assert (status, out) == (1, "")
    assert [line.partition(" worked: ")[0] for line in err.splitlines()] == [
        f"numflash-tune: no config of {CLASS.replace('4096', size)}" for size in ("512", "1024")
    ]


def test_a_missing_package_says_how_to_get_it(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "tuner.search.search", None)
    assert 'pip install "numflash[tune]"' in refused(*OFFLINE)


def test_devices_are_listed(run):
    status, out, err = run("--list-devices")
    assert (status, err) == (0, "") and out.splitlines() == machines.names()


def test_help_names_the_subcommands(run):
    status, out, _ = run("--help")
    assert status == 0
    assert all(command in out for command in caches.COMMANDS)


def classes(*argv):
    """The classes that arguments mean."""
    return [str(found) for found in cli.problems_of(cli.make_parser().parse_args(argv))]


def test_classes_are_every_combination_once():
    found = classes("--dtype", "float16", "--seqlen", "1000", "1024", "--head-dim", "64")
    assert len(found) == len(set(found)) and len({text.split()[0] for text in found}) >= 4
    assert {tuple(text.split()[1:3]) for text in found} == {
        ("float16-d64-dv64-vec", "full"),
        ("float16-d64-dv64-vec", "causal"),
    }
    assert all(text.endswith("q1024 k1024 bh64 g1") for text in found)


def test_classes_on_8_bit_floats_are_forwards_with_padded_head_dims():
    given = "--precision", "fp8", "--mask", "full", "--head-dim", "96", "--dtype", "bfloat16"
    sizes = "full q4096 k4096 bh64 g1"
    assert classes(*given) == [f"forward bfloat16-d128-dv128-vec-fp8 {sizes}"]
    # What is quantised has any alignment; rows of the result have head_dim_v numbers.
    assert classes(*given, "--head-dim-v", "63", "--key-scales") == [
        f"forward bfloat16-d128-dv64-fp8-keyscales {sizes}"
    ]


@pytest.mark.parametrize(
    ("argv", "shape", "options"),
    [
        (("--batch", "3", "--heads", "12", "--heads-kv", "4"), (3, 4096, 4096, 12, 4), {}),
        # Beyond these sizes classes do not differ.
        (("--batch", "2000", "--heads", "16"), (2000, 4096, 4096, 16, 16), {}),
        (("--seqlen", "300000", "--seqlen-q", "7"), (4, 7, 300000, 16, 16), {}),
        (("--mask", "causal", "--seqlen", "77"), (4, 77, 77, 16, 16), {"causal": True}),
        (
            ("--mask", "window1000"),
            (4, 4096, 4096, 16, 16),
            {"causal": True, "window_size": (999, 0)},
        ),
    ],
)
@pytest.mark.skipif(not SIMULATED, reason="needs NUMBA_ENABLE_CUDASIM=1")
def test_a_class_is_the_one_that_its_problems_are_of(argv, shape, options):
    batch, seqlen_q, seqlen_k, heads, heads_kv = shape
    q = np.lib.stride_tricks.as_strided(
        np.zeros(64, np.float16), (batch, seqlen_q, heads, 64), (0, 0, 0, 2)
    )
    k = np.lib.stride_tricks.as_strided(q[0, 0, 0], (batch, seqlen_k, heads_kv, 64), (0, 0, 0, 2))
    views = {
        name: library_of(x, name).view(x, name) for name, x in zip("qkv", (q, k, k), strict=True)
    }
    request = request_of(views, AttentionOptions(**options))
    full = () if "--mask" in argv else ("--mask", "full")
    forward = ("--pass", "forward", "--dtype", "float16", "--head-dim", "64")
    asked = classes(*forward, *full, *argv)
    assert str(ProblemClass.of("forward", request.problem, request.traits)) in asked


def test_tf32_is_for_float32_only(refused):
    said = refused(*OFFLINE, "--precision", "tf32", "--dtype", "float32", "float16")
    assert "goes with --dtype float32, got --dtype float32 float16" in said
