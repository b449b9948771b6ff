"""`numflash-inspect` and `numflash-info`: what they print, and how they refuse."""

import json
import os
import subprocess
import sys

import pytest

from numflash.api import info, inspect
from numflash.api.inspect import main
from numflash.configs import DeltaConfig, ForwardConfig, Traits
from numflash.machine_code import sass
from numflash.machine_code.report import Report, inspect_kernel
from numflash.runtime.devices import ARCHITECTURES, architecture, blocks_per_sm
from numflash.selection.rules import choose
from tests.support.covering import some, thorough

KEYS = {
    "kernel",
    "arch",
    "config",
    "traits",
    "registers",
    "spill_store_bytes",
    "spill_load_bytes",
    "stack_bytes",
    "smem_bytes",
    "threads",
    "blocks_per_sm",
    "limited_by",
    "instructions",
    "warnings",
    "compile_ms",
    "setmaxnreg",
    "main_loop",
}
TRAITS = Traits("float16", 64, 64)
FORWARD = ["forward", "--arch", "sm_80", "--dtype", "float16", "--head-dim", "64"]
PORTABLE = ["forward", "--arch", "sm_80", "--dtype", "float32", "--head-dim", "64"]
DELTA = ["delta", "--arch", "sm_80"]
HOPPER = ["forward", "--arch", "sm_90a", "--dtype", "bfloat16", "--head-dim", "128"]
SMALL = ["forward", "--arch", "sm_80", "--head-dim", "32", "--config", "sm80-m16n16w1s1"]


def printed(capsys, *argv):
    """The output of a successful run."""
    assert main(list(argv)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refusal(capsys, *argv):
    """The one line that a refused command line prints."""
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def run(*argv, **environment):
    """A process of its own, with a Python program as its arguments."""
    return subprocess.run(
        [sys.executable, *argv],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("argv", "present", "absent"),
    [
        (FORWARD, ("HMMA", "LDGSTS", "FFMA"), ("HGMMA", "LDG")),
        (PORTABLE, ("FFMA", "LDG"), ("HGMMA", "HMMA", "LDGSTS")),
    ],
    ids=["tensor-cores", "portable"],
)
def test_json(capsys, argv, present, absent):
    report = json.loads(printed(capsys, *argv, "--json"))
    assert set(report) == KEYS
    traits = Traits.parse(report["traits"])
    assert traits == Traits(argv[4], 64, 64)
    limits = ARCHITECTURES["sm_80"]
    config = choose("forward", traits, limits).config
    assert report["kernel"] == "forward"
    assert report["arch"] == "sm_80"
    assert report["config"] == str(config)
    assert report["threads"] == config.num_threads
    assert report["smem_bytes"] == config.smem_bytes(traits)
    assert 32 < report["registers"] < 256
    assert report["spill_store_bytes"] == report["spill_load_bytes"] == report["stack_bytes"] == 0
    assert report["warnings"] == []
    assert report["compile_ms"] > 0
    assert (report["blocks_per_sm"], report["limited_by"]) == blocks_per_sm(
        limits, report["threads"], report["registers"], report["smem_bytes"]
    )
    instructions = report["instructions"]
    assert set(instructions) == {*sass.COUNTED, "F64"}
    for name in ("MUFU.EX2", "LDS", "SHFL", "BAR", *present):
        assert instructions[name] > 0, name
    for name in ("LDL", "STL", "F64", *absent):
        assert instructions[name] == 0, name
    # Lines that only products of warpgroups have.
    assert (report["setmaxnreg"], report["main_loop"]) == ({}, None)


@thorough
def test_json_of_hopper(capsys):
    report = json.loads(printed(capsys, *HOPPER, "--json"))
    assert set(report) == KEYS
    traits, limits = Traits("bfloat16", 128, 128), ARCHITECTURES["sm_90a"]
    config = choose("forward", traits, limits).config
    assert (report["config"], config.implementation) == (str(config), "sm90")
    assert report["warnings"] == [] and report["spill_store_bytes"] == 0
    for action, available in zip(("dec", "inc"), config.registers, strict=True):
        assert report["setmaxnreg"][action]["available"] == available
        assert 0 < report["setmaxnreg"][action]["named"] <= available
    loop = report["main_loop"]
    assert report["instructions"]["HGMMA"] == 2 * sum(loop["groups"]) > 0
    assert loop["waits"] == [1, 0]
    assert loop["overlapped_exponentials"] == loop["instructions"]["exponentials"] > 0
    assert set(loop["clocks"]) == {"tensor", "special", "half_rate", "issue"}
    # 64 rows, tile_n keys: 4 FLOP a row, key and column, 4096 a clock.
    assert loop["clocks"]["tensor"] == 64 * config.tile_n * 128 * 4 // 4096
    assert loop["clocks"]["special"] == 64 * config.tile_n // 16


def test_readable_report_of_hopper(capsys):
    text = printed(capsys, *HOPPER)
    assert text.startswith("forward sm90-") and " on sm_90a\n" in text
    rows = [line[2:17].strip() for line in text.splitlines()[1:]]
    for row in ("main loop", "overlap", "a turn takes", "a turn issues", "it skips"):
        assert row in rows
    assert "then 240 in warps that multiply" in text and "then 24 in warps that copy" in text
    assert "64 of 64 exponentials" in text and "exponentials 512 clocks (50%)" in text
    assert max(map(len, text.splitlines())) < 100


@thorough
def test_sass_of_a_forced_config_of_hopper(capsys):
    config = "sm90-m64n64w4s2"
    text = printed(capsys, *HOPPER, "--config", config, "--sass")
    assert sass.count_instructions(text)["HGMMA"] == 2 * (128 // 16 + 64 // 16)
    report = json.loads(printed(capsys, *HOPPER, "--config", config, "--json"))
    assert report["config"] == config and report["main_loop"]["overlapped_exponentials"] == 0


REPORT = Report(*[0] * len(KEYS))
FP8 = ["forward", "--precision", "fp8", "--head-dim", "128", "--json"]


FP8_CASES = [
    (["--arch", "sm_89"], ("QMMA",), ("HMMA",)),
    (["--arch", "120", "--key-scales", "--config", "fp8-sm89-m16n64w1s1"], ("QMMA",), ()),
    # There mma.sync has e4m3 multiplied as float16.
    (["--arch", "sm_90", "--config", "fp8-sm80-m64n64w4s1"], ("HMMA", "F2FP"), ("QMMA",)),
]


@thorough
@pytest.mark.parametrize(
    ("argv", "present", "absent"), some(FP8_CASES, FP8_CASES[1]), ids=lambda each: " ".join(each)
)
def test_fp8_json(capsys, argv, present, absent):
    report = json.loads(printed(capsys, *FP8, *argv))
    traits = Traits("float16", 128, 128, fp8=True, key_scales="--key-scales" in argv)
    assert report["traits"] == str(traits)
    limits = architecture(argv[1])
    config = choose("forward", traits, limits).config
    assert report["config"] == (argv[-1] if "--config" in argv else str(config))
    for name in present:
        assert report["instructions"][name] >= 32, name
    for name in ("F64", *absent):
        assert report["instructions"][name] == 0, name


@thorough
def test_fp8_json_of_hopper(capsys):
    report = json.loads(printed(capsys, *FP8, "--arch", "sm_90a"))
    counts, loop = report["instructions"], report["main_loop"]
    assert counts["QGMMA"] > 0 == counts["HGMMA"] == counts["HMMA"]
    assert report["warnings"] == [] and report["spill_store_bytes"] == report["stack_bytes"] == 0
    # 8-bit floats are multiplied at twice the rate.
    tile_n = 4 * loop["instructions"]["conversions"]
    assert loop["clocks"]["tensor"] == 64 * tile_n * 128 * 4 // 8192


@pytest.mark.parametrize(
    ("argv", "config", "traits"),
    [
        (["combine", "--precision", "fp8"], "w4", "float16-d64-dv64-vec"),
        (["quantize"], "sm89-t128w", "float16-d64-dv64-vec"),
        (["quantize", "--head-dim", "72", "--hadamard"], "-hadamard", "float16-d128-dv128-vec"),
        (["quantize", "--granularity", "token", "--transposed"], "-transposed-token", ""),
        (["quantize", "--granularity", "head"], "-given", ""),
        (["quantize", "--block", "1024", "--format", "e5m2"], "-given-e5m2", ""),
        (["quantize", "--config", "sm80-t32w1-measure"], "sm80-t32w1-measure", ""),
        (["dequantize", "--hadamard", "--dtype", "float32"], "sm89-w4-hadamard", "float32-d64"),
        (["amax", "--config", "w8"], "w8", ""),
        (["rotary", "--head-dim", "80"], "w4h4", "float16-d96-dv96-vec"),
        (["rotary", "--config", "w8h2-interleaved"], "w8h2-interleaved", "float16-d64"),
        (["merge-onto", "--head-dim", "100"], "w8", "float16-d128-dv128"),
    ],
    ids=lambda argument: " ".join(argument) if isinstance(argument, list) else "",
)
def test_kernels_around_fp8(argv, config, traits, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(inspect, "inspect_kernel", lambda *kernel: asked.append(kernel) or REPORT)
    assert main([*argv, "--arch", "sm_89", "--json"]) == 0
    ((found, found_traits, _),) = asked
    assert found.family == argv[0]
    assert config in str(found) and str(found_traits).startswith(traits)


@thorough
def test_quantize_is_compiled(capsys):
    argv = "quantize", "--arch", "sm_80", "--config", "sm80-t16w1-hadamard"
    report = json.loads(printed(capsys, *argv, "--json"))
    assert (report["kernel"], report["config"]) == ("quantize", "sm80-t16w1-hadamard")
    assert report["registers"] > 0 and report["instructions"]["SHFL"] > 0


@thorough
def test_readable_report(capsys):
    text = printed(capsys, *SMALL, "--causal", "--window", "-1", "0")
    assert text.startswith("forward sm80-m16n16w1s1 on sm_80\n")
    for row in ("registers", "spills", "shared memory", "blocks per SM", "limited by", "HMMA"):
        assert row in text
    assert max(map(len, text.splitlines())) < 100


def test_sass(capsys):
    text = printed(capsys, *SMALL, "--sass")
    assert sass.count_instructions(text)["HMMA"] > 0
    assert "EXIT" in sass.opcodes(text)


@thorough
def test_ptx(capsys):
    text = printed(capsys, *SMALL, "--ptx")
    for part in (".target sm_80", "mma.sync.aligned.m16n8k16", "cp.async.cg", ".maxntid 32"):
        assert part in text
    assert "ex2.approx.ftz.f32" in text and "ld.local" not in text


@pytest.mark.parametrize(
    ("argv", "config", "traits"),
    [
        (["--config", "w4"], "w4", "float16-d64-dv64-vec"),
        (["--dtype", "bfloat16", "--head-dim", "120"], "w8", "bfloat16-d128-dv128-vec"),
        (["--head-dim", "40", "--head-dim-v", "72"], "w8", "float16-d64-dv96-vec"),
        (["--head-dim", "42"], "w8", "float16-d64-dv64"),
        (["--head-dim", "44", "--dtype", "float32"], "w8", "float32-d64-dv64-vec"),
        (["--unaligned"], "w8", "float16-d64-dv64"),
        (["--softcap", "--alibi"], "w8", "float16-d64-dv64-softcap-alibi-vec"),
        # A kernel without products is the same whatever they are.
        (["--dtype", "float32", "--precision", "tf32"], "w8", "float32-d64-dv64-vec"),
    ],
    ids=lambda argument: " ".join(argument) if isinstance(argument, list) else argument,
)
def test_options(argv, config, traits, capsys):
    report = json.loads(printed(capsys, *DELTA, *argv, "--json"))
    assert (report["config"], report["traits"]) == (config, traits)


def test_architecture_without_its_suffix(capsys):
    report = json.loads(printed(capsys, "delta", "--arch", "90", "--json"))
    assert report["arch"] == "sm_90a"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: kernel"),
        (["sideways", "--arch", "sm_80"], "'sideways'"),
        (["forward"], "--arch"),
        (["forward", "--arch", "sm_70"], "'sm_70'"),
        ([*DELTA, "--dtype", "float64"], "'float64'"),
        ([*DELTA, "--head-dim", "0"], "--head-dim must be 1 to 256, got 0"),
        ([*DELTA, "--head-dim", "257"], "--head-dim must be 1 to 256, got 257"),
        ([*DELTA, "--head-dim-v", "300"], "--head-dim-v must be 1 to 256, got 300"),
        ([*DELTA, "--head-dim", "many"], "'many'"),
        ([*DELTA, "--config", "m64n32w4"], "must look like w8, got 'm64n32w4'"),
        (["forward", "--arch", "sm_80", "--config", "64x32"], "got '64x32'"),
        (["forward", "--arch", "sm_80", "--config", "m60n32w4"], "m60n32w4"),
        (["forward", "--arch", "sm_80", "--config", "sm80-m64n64w4"], "or sm80-m64n32w4s2"),
        ([*DELTA, "--config", "sm80-m64n64w4s1"], "must look like w8"),
        ([*FORWARD, "--arch", "sm_75", "--config", "sm80-m64n64w4s1"], "begin with sm_80"),
        ([*PORTABLE, "--config", "sm80-m64n64w4s1"], 'exactly unless precision="tf32"'),
        ([*FORWARD, "--config", "m512n512w32"], "bytes of shared memory"),
        ([*FORWARD, "--precision", "tf32"], "tf32 is a way to multiply float32, not float16"),
        ([*PORTABLE, "--precision", "fp8"], "results of 16 bits"),
        ([*DELTA, "--precision", "fp8"], "--precision fp8 is of the forward"),
        ([*DELTA, "--precision", "int8"], "'int8'"),
        ([*FORWARD, "--key-scales"], "--key-scales goes with --precision fp8"),
        ([*FORWARD, "--config", "fp8-sm80-m64n64w4s1"], "it computes on 8-bit floats"),
        ([*FP8, "--arch", "80", "--config", "sm80-m64n64w4s1"], "it has no 8-bit floats"),
        ([*FP8, "--arch", "80", "--config", "fp8-sm89-m64n64w4s1"], "begin with sm_89"),
        (["quantize", "--arch", "80", "--config", "sm89-t128w8"], "begin with sm_89"),
        (["quantize", "--arch", "80", "--config", "sm80-t256w8", "--head-dim", "256"], "can own"),
        (["quantize", "--arch", "80", "--block", "17"], "block must be a power of two"),
        (["dequantize", "--arch", "80", "--config", "sm80"], "must look like sm89-w4"),
        ([*FORWARD, "--config", "sm90-m64n64w4s2"], "sm_90a only"),
        ([*HOPPER, "--config", "sm90-m128n64w4s2"], "tile_m must be"),
        ([*DELTA, "--json", "--sass"], "not allowed with"),
        ([*DELTA, "--window", "1"], "--window"),
    ],
    ids=lambda argument: " ".join(argument) if isinstance(argument, list) else "",
)
def test_refusals(argv, message, capsys):
    assert message in refusal(capsys, *argv)


def test_help_says_that_masks_are_data(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "a mask is data" in " ".join(capsys.readouterr().out.split())


def test_it_refuses_the_simulator():
    done = run("-m", "numflash.api.inspect", *DELTA, NUMBA_ENABLE_CUDASIM="1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "unset it" in done.stderr


def test_without_a_disassembler():
    program = (
        "from numflash.api import inspect; from numflash.machine_code import sass\n"
        "sass.find_disassembler = lambda: None\n"
        f"raise SystemExit(inspect.main({[*DELTA, '--json']!r}))"
    )
    done = run("-c", program)
    assert done.returncode == 0
    assert "pip install nvidia-cuda-nvdisasm" in done.stderr
    assert done.stderr.count("\n") == 1
    report = json.loads(done.stdout)
    assert set(report) == KEYS
    assert (report["instructions"], report["main_loop"]) == ({}, None)
    assert report["registers"] > 0


def test_no_sass_without_a_disassembler(monkeypatch, capsys):
    monkeypatch.setattr(sass, "find_disassembler", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        main([*DELTA, "--sass"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


@thorough
def test_a_report_of_a_config_that_no_block_can_have():
    config = ForwardConfig.parse("m64n64w4")
    report = inspect_kernel(config, TRAITS, ARCHITECTURES["sm_75"])
    assert (report.blocks_per_sm, report.limited_by) == (0, "shared memory")
    assert "no block fits: shared memory" in report.faults


def test_a_report_without_faults():
    assert inspect_kernel(DeltaConfig(8), TRAITS, ARCHITECTURES["sm_80"]).faults == ()


def test_info_json(capsys):
    inspect_kernel(DeltaConfig(8), TRAITS, ARCHITECTURES["sm_80"])
    assert info.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    keys = {"simulator", "devices", "no_devices", "versions", "cache", "missing"}
    assert set(found) == keys
    assert bool(found["devices"]) == (found["no_devices"] is None)
    assert found["versions"]["numba"] is not None
    assert found["cache"]["kernels"] > 0
    assert found["cache"]["bytes"] > 1000
    assert found["cache"]["tuned_configs"] >= 0


def test_info_with_a_gpu(monkeypatch, capsys):
    device = {
        "name": "NVIDIA H200",
        "compute_capability": [9, 0],
        "arch": "sm_90a",
        "multiprocessors": 132,
        "memory_bytes": 139 * 2**30,
    }
    monkeypatch.setattr(info, "_ask_driver", lambda: (12080, [device], None))
    monkeypatch.setattr(info, "_version", lambda *names: None)
    assert info.main([]) == 0
    text = capsys.readouterr().out
    assert "0  NVIDIA H200, compute capability 9.0 (sm_90a), 132 SMs, 139.0 GiB" in text
    assert "12.8" in text
    assert 'pip install "numflash[cu12]"' in text


def test_info_with_nothing_installed():
    program = (
        "import sys\n"
        "for name in ('numba', 'cuda', 'cuda.bindings', 'cuda.pathfinder', 'cupy', 'torch'):\n"
        "    sys.modules[name] = None\n"
        "from importlib import metadata\n"
        "def missing(name):\n"
        "    raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = metadata.files = missing\n"
        "from numflash.api import info\n"
        "raise SystemExit(info.main([]))"
    )
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "numba and numba-cuda, which compile the kernels" in done.stdout
    assert "pip install nvidia-cuda-nvdisasm" in done.stdout


def test_info_of_the_simulator():
    done = run("-m", "numflash.api.info", NUMBA_ENABLE_CUDASIM="1")
    assert done.returncode == 0
    assert "kernels run in the simulator" in done.stdout
