"""numflash-explain: pages and JSON of calls on GPUs that are not here, and bad arguments."""

import json
import xml.etree.ElementTree as ET

import pytest

from tuner.explain import cli, course
from tuner.explain.course.lesson import Check, Lesson

CALL = ("--gpu", "H200", "--shape", "2,300,4,64", "--compile", "none")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No config and no kernel is known."""
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def run(capsys):
    """Runs the command line; (exit status, stdout, stderr)."""

    def run(*argv):
        try:
            status = cli.main([str(argument) for argument in argv])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


def test_page_is_whole(run, tmp_path):
    page = tmp_path / "page.html"
    status, out, err = run(*CALL, "--causal", "--dtype", "bfloat16", "--to", page)
    assert (status, out, err) == (0, f"{page}\n", "")
    root = ET.fromstring(page.read_text().removeprefix("<!DOCTYPE html>\n"))
    text = " ".join(root.itertext())
    assert "2 x 300 x 4 x 64" in text and "bfloat16, causal" in text
    assert not root.findall(".//script") and root.find(".//section[@id='call']") is not None


def test_json_names_origins(run):
    status, out, _ = run(*CALL, "--kv-heads", 2, "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["call"]["shape"]["num_heads_kv"] == {"value": 2, "origin": "chosen", "unit": ""}
    kernels = {kernel["name"]: kernel for kernel in facts["call"]["kernels"]}
    assert kernels["forward"]["predicted"]["origin"] == "model"
    assert {"forward", "backward-dq", "backward-dkdv"} <= set(kernels)


def test_without_a_page_the_kernels_are_printed(run):
    status, out, _ = run(*CALL)
    assert status == 0 and out.startswith("on NVIDIA H200") and "\nforward: sm90-" in out


def test_a_call_without_heads_has_a_page(run, tmp_path):
    page = tmp_path / "page.html"
    assert run(*CALL, "--shape", "0,300,4,64", "--to", page)[0] == 0
    assert "There are no heads, so there is nothing to draw" in page.read_text()


def test_arrays_take_no_memory(run):
    status, out, _ = run(*CALL, "--shape", "16,1048576,64,128")
    assert status == 0 and "forward: sm90-" in out


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--gpu and --shape say what to explain"),
        (["--gpu", "H200"], "--gpu and --shape say what to explain"),
        (["--gpu", "H2000", "--shape", "1,2,3,64"], "got 'H2000'; did you mean NVIDIA H200"),
        (["--gpu", "H200", "--shape", "1,2,64"], "must be batch,queries,heads,head_dim"),
        (["--gpu", "H200", "--shape", "1,2,x,64"], "must be a number from 0 up, got 'x'"),
        (["--gpu", "H200", "--shape", "1,2,-3,64"], "must be a number from 0 up, got '-3'"),
        (["--gpu", "H200", "--shape", "1,2,3,64", "--kv-heads", "2"], "multiple of the heads"),
        (["--gpu", "H200", "--shape", "1,2,3,64", "--config", "m1"], "m1"),
        (["--gpu", "H200", "--shape", "9999999,9999999,9,64"], "more than 2**40 elements"),
        (["--gpu", "H200", "--shape", "1,2,3,64", "--to", "/nowhere/p.html"], "--to /nowhere"),
        (["--gpu", "sm_87", "--shape", "1,2,3,64", "--json"], "there are none of 'sm_87'"),
        (["--course", "2", "--json"], "--course is of no call"),
        (["--course", "--gpu", "H200"], "--course is of no call"),
    ],
)
def test_bad_arguments(run, argv, message):
    status, out, err = run(*argv)
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("numflash-explain: error: ") and message in err


def test_a_call_that_no_kernel_runs(run, tmp_path):
    page = tmp_path / "page.html"
    status, out, err = run("--gpu", "H200", "--shape", "1,2,3,300", "--to", page)
    assert status == 1 and out == "" and "head_dim of q and k must be at most 256" in err
    assert "No kernel runs this call" in page.read_text()
    assert "head_dim of q and k must be at most 256, got 300" in page.read_text()


def test_gpus_are_listed(run):
    status, out, _ = run("--list-gpus")
    assert status == 0 and "NVIDIA H200" in out.splitlines()


class TestCourse:
    @pytest.fixture(autouse=True)
    def computed(self, monkeypatch):
        """Lessons of no kernel; the numbers of those that were asked for."""
        asked = []

        def run(numbers):
            asked.append(numbers)
            check = Check("It holds", numbers != [7], "1")
            return [Lesson(n, f"Lesson {n}", "Why?", (), (), (check,), ()) for n in numbers]

        monkeypatch.setattr(course, "run", run)
        return asked

    def test_lessons_are_printed(self, run, computed):
        status, out, err = run("--course", "3", "1")
        assert (status, err, computed) == (0, "", [[1, 3]])
        assert "1  Lesson 1\n" in out and "3  Lesson 3\n" in out and "holds: It holds" in out

    def test_a_check_that_fails_is_told(self, run):
        status, out, _ = run("--course", "7")
        assert status == 1 and "FAILS: It holds" in out

    def test_a_page(self, run, tmp_path):
        page = tmp_path / "course.html"
        assert run("--course", "--to", page) == (0, f"{page}\n", "")
        assert "Lesson 10" in page.read_text()

    def test_no_such_lesson(self, run):
        status, out, err = run("--course", "0", "11")
        assert status == 2 and out == "" and "there is no lesson 0, 11; there are" in err
