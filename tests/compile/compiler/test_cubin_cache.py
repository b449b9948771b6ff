"""Cubins are compiled once and kept; a file that is of no use is compiled again."""

import logging
import math
import shutil
from dataclasses import asdict

import pytest

from numflash.configs import DeltaConfig, parse_config
from numflash.machine_code import compiler, cubins
from numflash.machine_code.compiler import get_cubin
from tests.support.compilations import (
    CHILD,
    CONFIG,
    ELF,
    LIMITS,
    TRAITS,
    finish,
    forget,
    key_of,
    start,
)
from tests.support.covering import thorough

# The numbers in a cubin's header.
NUMBERS = (
    *("num_threads", "smem_bytes", "registers", "min_blocks"),
    *("spill_store_bytes", "spill_load_bytes", "stack_bytes"),
)


@pytest.fixture
def compilations(monkeypatch, good):
    """Instead of compiling, note what would be compiled."""
    compiled = []

    def compile_cubin(config, traits, limits):
        compiled.append((config, traits, limits))
        return good

    monkeypatch.setattr(compiler, "compile_cubin", compile_cubin)
    return compiled


def test_it_is_compiled_once(cache_directory, compilations):
    first = get_cubin(CONFIG, TRAITS, LIMITS)
    assert get_cubin(CONFIG, TRAITS, LIMITS) is first
    forget()
    assert get_cubin(CONFIG, TRAITS, LIMITS) == first
    assert len(compilations) == 1
    assert len(list(cache_directory.iterdir())) == 1


def test_how_many_splits_is_no_matter_of_machine_code(cache_directory, compilations):
    for text in ("sm80-m16n16w1s1x2", "sm80-m16n16w1s1x7", "sm80-m16n16w1s1x64"):
        get_cubin(parse_config("forward", text), TRAITS, LIMITS)
    assert len(compilations) == 1
    # But parts are float32, whatever the result is.
    get_cubin(parse_config("forward", "sm80-m16n16w1s1"), TRAITS, LIMITS)
    assert len(compilations) == len(list(cache_directory.iterdir())) == 2


def test_a_warm_cache_needs_no_numba(cache_directory, good, compilations):
    get_cubin(CONFIG, TRAITS, LIMITS)
    loaded = finish(start(CHILD, cache_directory.parent))
    assert not loaded["numba"]
    assert loaded["seconds"] < 0.3
    assert bytes.fromhex(loaded["code"]) == good.code
    assert loaded["registers"] == good.registers


@thorough
def test_two_processes_compile_at_once(cache_directory, good):
    children = [start(CHILD, cache_directory.parent) for _ in range(2)]
    for child in [finish(child) for child in children]:
        assert bytes.fromhex(child["code"]).startswith(ELF)
        assert child["registers"] == good.registers
    (file,) = cache_directory.iterdir()
    assert file.suffix == ".cubin"
    assert compiler._from_disk(key_of(CONFIG, TRAITS, LIMITS), LIMITS).registers == good.registers


def cut_short(data):
    return data[: len(data) // 2]


def one_bit_flipped(data):
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


def one_bit_of_the_header_flipped(data):
    at = data.index(b'"registers"') + 14
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def empty(data):
    return b""


def magic_only(data):
    return data[: data.index(b"\n") + 1]


def foreign(data):
    return b"PK\x03\x04 not a cubin"


@pytest.mark.parametrize(
    "damage",
    [cut_short, one_bit_flipped, one_bit_of_the_header_flipped, empty, magic_only, foreign],
)
def test_a_damaged_file_is_compiled_again(damage, cache_directory, compilations, good):
    get_cubin(CONFIG, TRAITS, LIMITS)
    (file,) = cache_directory.iterdir()
    intact = file.read_bytes()
    file.write_bytes(damage(intact))
    forget()
    assert get_cubin(CONFIG, TRAITS, LIMITS) == good
    assert len(compilations) == 2
    assert file.read_bytes() == intact


@pytest.mark.parametrize(
    "header",
    [{}, {"registers": 1}, {"surprise": 1, "parameters": [], "warnings": []}, {"parameters": 3}],
)
def test_a_header_of_another_version_is_compiled_again(
    header, cache_directory, compilations, good
):
    cubins.write(key_of(CONFIG, TRAITS, LIMITS), header, good.code)
    assert get_cubin(CONFIG, TRAITS, LIMITS) == good
    assert len(compilations) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in NUMBERS for value in (-1, 10**9, 10**400, 1.5, True, "1", [])),
        ("num_threads", 0),
        ("num_threads", 1025),
        ("smem_bytes", LIMITS.max_smem_per_block + 1),
        ("registers", 256),
        ("min_blocks", 0),
        ("min_blocks", 33),
        ("entry", ""),
        ("entry", "no such symbol"),
        ("entry", "\ud800"),
        ("entry", None),
        ("parameters", [["x", "Z"]]),
        ("parameters", [["x", "PP"]]),
        ("parameters", [[1, "P"]]),
        ("parameters", [["x", {}]]),
        ("parameters", ["P"]),
        ("warnings", [3]),
        ("warnings", None),
        ("compile_ms", math.nan),
        ("compile_ms", "1"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_header_that_no_kernel_has_is_compiled_again(
    name, value, cache_directory, compilations, good
):
    key = key_of(CONFIG, TRAITS, LIMITS)
    header = {field: text for field, text in asdict(good).items() if field != "code"}
    cubins.write(key, {**header, name: value}, good.code)
    assert get_cubin(CONFIG, TRAITS, LIMITS) == good and len(compilations) == 1


def test_what_is_no_machine_code_is_compiled_again(cache_directory, compilations, good):
    key = key_of(CONFIG, TRAITS, LIMITS)
    header = {field: text for field, text in asdict(good).items() if field != "code"}
    cubins.write(key, header, b"#!/bin/sh " + good.code)
    assert get_cubin(CONFIG, TRAITS, LIMITS) == good and len(compilations) == 1


def test_a_file_under_another_kernels_name_is_not_taken(cache_directory, compilations):
    get_cubin(CONFIG, TRAITS, LIMITS)
    (file,) = cache_directory.iterdir()
    other = DeltaConfig(4)
    shutil.copy(file, cubins._path(key_of(other, TRAITS, LIMITS)))
    get_cubin(other, TRAITS, LIMITS)
    assert compilations[-1][0] == other


def test_a_cache_that_is_a_file(tmp_path, monkeypatch, compilations, good, caplog):
    occupied = tmp_path / "occupied"
    occupied.write_text("not a folder")
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(occupied))
    monkeypatch.setattr(compiler, "_cubins", {})
    with caplog.at_level(logging.INFO, logger="numflash"):
        assert get_cubin(CONFIG, TRAITS, LIMITS) == good
    assert "cannot write" in caplog.text
    assert occupied.read_text() == "not a folder"
    assert cubins.contents() == (0, 0)


@pytest.mark.parametrize("call", ["os.replace", "tempfile.mkstemp", "os.fdopen"])
def test_a_cache_that_cannot_be_written(call, cache_directory, compilations, good, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    module, _, function = call.partition(".")
    monkeypatch.setattr(getattr(cubins, module), function, refuse)
    assert get_cubin(CONFIG, TRAITS, LIMITS) == good
    assert list(cache_directory.iterdir()) == []


def test_a_cache_that_cannot_be_read(cache_directory, compilations, good):
    # A folder in the file's place: neither read nor replaced.
    cubins._path(key_of(CONFIG, TRAITS, LIMITS)).mkdir(parents=True)
    assert get_cubin(CONFIG, TRAITS, LIMITS) == good
