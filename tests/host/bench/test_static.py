"""Without a GPU the commands print what can be said without one."""

import time

import pytest

from bench import __main__ as bench
from bench.measuring import measure
from bench.records import record
from bench.studies import static
from bench.tables import tables
from numflash.runtime.errors import UnsupportedError


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(record, "_gpu", lambda *_: None)


class _Report:
    registers, spill_store_bytes, spill_load_bytes, smem_bytes, blocks_per_sm = 128, 0, 4, 4096, 3
    instructions = {"HMMA": 64, "MUFU.EX2": 8}


@pytest.fixture
def compiled(monkeypatch):
    """What `inspect_kernel` was asked for, instead of compiling."""
    from numflash.machine_code import report

    asked = []

    def inspect_kernel(config, traits, limits):
        asked.append((config, traits, limits.arch))
        if limits.arch == "sm_75":
            raise report.UnsupportedError("not on Turing")
        return _Report()

    monkeypatch.setattr(report, "inspect_kernel", inspect_kernel)
    return asked


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_without_a_gpu_the_static_figures_are_printed(direction, no_gpu, compiled, capsys):
    assert bench.main([direction]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("There is no NVIDIA GPU here")
    # 3 head dims, 6 architectures: 2 families in 2 dtypes, or one, also on 8-bit floats.
    rows = {"forward": 3 * 18, "backward": 4 * 18}[direction]
    if direction == "forward":
        assert lines.pop() == tables.FP8_NOTE
    assert len(lines) == 2 + rows
    assert len(compiled) == rows
    assert {arch for *_, arch in compiled} == set(static.ARCHS)
    assert sum("not on Turing" in line for line in lines) == rows // 6
    assert all("  64 " in line for line in lines[2:] if "sm_80 " in line)
    on_8_bits = [(config, arch) for config, traits, arch in compiled if traits.fp8]
    assert len(on_8_bits) == sum(" fp8 " in line for line in lines)
    assert len(on_8_bits) == (18 if direction == "forward" else 0)
    for config, arch in on_8_bits:
        assert config.multiplies_codes is (arch in ("sm_89", "sm_90a", "sm_120"))


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("--traffic", "Counted from the tile schedule"),
        ("--memory", "numflash MiB"),
        ("--ablate", "online softmax in one pass"),
        ("--block-sizes", "sm_80"),
        ("--quantize", "sm89-t128w"),
    ],
)
def test_every_mode_without_a_gpu(mode, expected, no_gpu, compiled, capsys):
    assert bench.main(["forward", mode, "--quick"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("There is no NVIDIA GPU here")
    assert expected in output
    assert "TFLOP/s" not in output


def test_a_kernel_that_an_architecture_has_not_is_a_row_with_its_reason(monkeypatch):
    def choose(*arguments, **options):
        raise UnsupportedError("no forward kernel runs it")

    monkeypatch.setattr(static, "choose", choose)
    found = list(static.rows("forward", (64,), ("float16",), ("sm_89",)))
    assert [row["dtype"] for row in found] == ["float16", "fp8"]
    lines = []
    deadline = time.monotonic() + 9
    static.print_rows(iter(found), static.COLUMNS, deadline, lambda x, **_: lines.append(x))
    assert all(line.endswith("no forward kernel runs it") for line in lines[1:])


def test_static_figures_keep_the_time_limit(no_gpu, compiled, capsys):
    assert bench.main(["forward", "--time-limit", "0"]) == 0
    assert "out of time" in capsys.readouterr().out
    assert len(compiled) == 1


def test_an_unknown_peer_is_refused(no_gpu, capsys):
    assert bench.main(["forward", "--peers", "nobody"]) == 2
    assert "got 'nobody'" in capsys.readouterr().out


def test_the_modules_that_measure_need_no_gpu_library():
    # They are imported on machines that have none.
    assert {"torch", "cupy", "triton"}.isdisjoint(vars(measure))
