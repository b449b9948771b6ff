"""The offline model of one block: latencies that are hidden, walks again and again, and waves."""

from dataclasses import replace

import numpy as np
import pytest

from numflash.configs import parse_config
from tests.host.tuner.test_model import A100, config_of, problem_class
from tuner import model
from tuner.model import counts, dispatch, grid, prediction
from tuner.model.machine_code import Counts, Loop
from tuner.space import machines


def latency_clocks(text, problem, machine=A100):
    """Of the critical path, in clocks."""
    found = model.estimate(machine, problem, config_of(machine, problem.family, text))
    return found.parts["latency"] * machine.clock_mhz * 1e3


def test_copies_that_run_further_ahead_are_hidden(monkeypatch):
    problem, turing = problem_class(q=1, k=16384, heads=8), machines.find("T4")
    clocks = {s: latency_clocks(f"m16n16w1s{s}", problem) for s in (1, 2, 3)}
    assert clocks[2] < 0.8 * clocks[1]
    assert clocks[3] <= clocks[2]
    before = {m: latency_clocks("m16n64w1s1", problem, m) for m in (A100, turing)}
    monkeypatch.setattr(prediction, "L2_LATENCY", prediction.L2_LATENCY + 100)
    monkeypatch.setattr(prediction, "MEMORY_LATENCY", prediction.MEMORY_LATENCY + 100)
    after = {m: latency_clocks("m16n64w1s1", problem, m) for m in (A100, turing)}
    # Turing waits twice for each of 256 tiles, and both before the first.
    assert after[turing] - before[turing] == pytest.approx(2 * 256 * 100 + 200)
    assert after[A100] - before[A100] < 2 * 256 * 100


def test_products_that_wait_for_each_other_bound_a_single_warp(monkeypatch):
    problem, text = problem_class(q=16, k=4096, heads=1), "m16n16w1s3"
    assert model.estimate(A100, problem, parse_config("forward", f"sm80-{text}")).bound_by == (
        "latency"
    )
    monkeypatch.setattr(prediction, "MATRIX_LATENCY", 1000)
    slow = latency_clocks(text, problem)
    monkeypatch.setattr(prediction, "MATRIX_LATENCY", 2000)
    # Of each of 256 tiles 8 steps of depth for S and one for O.
    assert latency_clocks(text, problem) - slow == pytest.approx(256 * 9 * 1000)


def test_a_block_that_walks_again_begins_again(monkeypatch):
    problem = problem_class("backward", "float16-d64-dv64-vec", q=512, k=512, heads=8)
    before = [latency_clocks(f"m32n64w4s1{x}", problem) for x in ("", "x2")]
    monkeypatch.setattr(prediction, "BLOCK_LATENCY", prediction.BLOCK_LATENCY + 1000)
    after = [latency_clocks(f"m32n64w4s1{x}", problem) for x in ("", "x2")]
    # 512 keys are 8 row blocks.
    assert [t - b for t, b in zip(after, before, strict=True)] == pytest.approx([8000, 4000])


def test_each_walk_of_a_block_loads_and_stores_its_keys():
    parts = []
    for k in (8192, 16384):
        problem = problem_class("backward", "float16-d64-dv64-vec", q=16, k=k, heads=512)
        parts.append(
            model.estimate(A100, problem, config_of(A100, "backward", "m32n64w4s1")).parts
        )
    for kind in ("issue", "L2", "shared memory"):
        assert parts[1][kind] == pytest.approx(2 * parts[0][kind], rel=1e-3)


def test_a_last_wave_with_fewer_blocks_is_shorter():
    walks = grid.Walks(np.array([10]), 0.0)
    laid = grid.Grid(walks, 2 * 108 + 1, 1, 1)
    assert dispatch.closed_form(laid, 108, 2, lambda tiles, together: tiles * together) == 20 + 10


def test_keys_beyond_the_l2_are_read_again_by_every_wave():
    problem = problem_class(traits="float16-d64-dv64-vec", q=32768, k=32768, heads=8)
    config = parse_config("forward", "sm80-m128n64w4s1")
    laid, least = grid.lay(problem, config), grid.io_bytes(problem)
    head_bytes = 32768 * 128 * 2
    # 256 row blocks in waves of 64.
    small = grid.memory_bytes(problem, config, laid, slots=64, l2=head_bytes // 2)
    assert small == least + 3 * 8 * head_bytes
    assert grid.memory_bytes(problem, config, laid, slots=64, l2=2 * head_bytes) == least
    # Interleaved heads share the L2.
    interleaved = replace(config, heads_in_flight=4)
    assert grid.memory_bytes(problem, interleaved, laid, slots=64, l2=2 * head_bytes) > least


def test_inner_loops_turn_as_often_as_the_formula_asks_for():
    config = parse_config("forward", "sm80-m128n64w4s1")
    traits = problem_class().traits
    work = counts.by_formula(config, traits)
    product = Loop(Counts(issued=40, matrix=32, shared=10), Counts(), ())
    copy = Loop(Counts(issued=6, global_bytes=2048), Counts(), ())
    around_copy = Loop(Counts(issued=3), Counts(), (copy,))
    walk = Loop(Counts(issued=100, matrix=128), Counts(alu=5), (around_copy, product))
    found = counts.complete(work, walk, Counts(issued=1000))
    # 128 of 256 products are missing, and all of 8192 bytes.
    assert found.tile == Counts(
        issued=100 + 4 * 40 + 4 * 6, matrix=256, shared=40, global_bytes=8192
    )
    assert found.rare == Counts(alu=5)
    assert 0 < found.once.issued < 1000
