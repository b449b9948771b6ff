"""Configs that spill with the caller's functions give way to the next, once, and it is said."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import numflash
from numflash.configs import mma_rules, wgmma, wgmma_backward
from numflash.machine_code import compiler
from numflash.problem.options import AttentionOptions
from numflash.problem.problem import describe
from numflash.runtime.driver import machine_of
from numflash.runtime.gpus import find
from numflash.runtime.views import ArrayView, contiguous_strides
from numflash.selection import spills
from numflash.selection.choice import Purpose, select

H200 = machine_of(find("NVIDIA H200"))
SHAPE = 16, 4096, 16, 128


class Compiler:
    """A compiler that knows how much each config spills with a program, and counts its work."""

    def __init__(self, monkeypatch, spilled):
        self.spilled, self.compiled, self.known = spilled, [], {}
        monkeypatch.setattr(spills, "SIMULATED", False)
        monkeypatch.setattr(spills, "get_cubin", self.get)
        monkeypatch.setattr(spills, "known_cubin", self.look_up)

    def get(self, config, traits, limits):
        """As `get_cubin`."""
        key = getattr(config, "compiled", config), traits, limits.arch
        if key not in self.known:
            self.compiled.append(str(config))
            n = self.spilled(config)
            self.known[key] = SimpleNamespace(spill_store_bytes=n, spill_load_bytes=n // 2)
        return self.known[key]

    def look_up(self, config, traits, limits):
        """As `known_cubin`."""
        return self.known.get((getattr(config, "compiled", config), traits, limits.arch))


def ask(purpose=Purpose.CALL, machine=H200, bias=True, passes=("forward",), **changes):
    """The selection for a problem, with a bias unless told otherwise."""
    shapes = dict.fromkeys("qkv", SHAPE) | ({"bias": (SHAPE[2], 1, SHAPE[1])} if bias else {})
    views = {
        name: ArrayView(0, shape, contiguous_strides(shape), "float16", 0)
        for name, shape in shapes.items()
    }
    options = AttentionOptions(bias=views.get("bias"))
    problem = replace(describe(views, options)[0], **changes)
    return select(
        problem, problem.traits(vectorized=True), machine, passes=passes, purpose=purpose
    )


def test_a_config_that_spills_gives_way_to_the_next_once(monkeypatch):
    fake = Compiler(monkeypatch, lambda config: 48 if config.tile_n == 128 else 0)
    chosen = ask().forward
    assert str(chosen.config).startswith("sm90-m128n96w8")
    assert len(fake.compiled) == 2
    reason = dict(chosen.passed_over)["sm90-m128n128w8s2-overlap-pingpong-persistent"]
    assert reason == "spills 48 bytes a thread with these functions"
    assert ask().forward == chosen and len(fake.compiled) == 2


def test_a_question_compiles_nothing_and_knows_what_calls_have_seen(monkeypatch):
    fake = Compiler(monkeypatch, lambda config: 48 if config.tile_n == 128 else 0)
    assert str(ask(Purpose.QUESTION).forward.config).startswith("sm90-m128n128w8")
    assert fake.compiled == []
    chosen = ask().forward
    assert ask(Purpose.QUESTION).forward == chosen and len(fake.compiled) == 2


def test_nothing_is_compiled_without_a_program_nor_in_the_simulator(monkeypatch):
    fake = Compiler(monkeypatch, lambda config: 48)
    both = ("forward", "backward")
    plain = ask(bias=False, passes=both)
    assert plain.forward.config == wgmma.candidates(plain.forward.traits)[0]
    monkeypatch.setattr(spills, "SIMULATED", True)
    assert str(ask(passes=both).forward.config).startswith("sm90-m128n128w8")
    assert fake.compiled == []


def test_where_all_spill_the_one_that_spills_least_runs(monkeypatch):
    fake = Compiler(monkeypatch, lambda config: config.tile_m + config.tile_n)
    chosen = ask().forward
    assert str(chosen.config).startswith("sm90-m64n64w4") and len(fake.compiled) == 6
    assert "sm90-m64n64w4s2-overlap-persistent" not in dict(chosen.passed_over)


def test_one_kernel_for_all_gradients_gives_way_to_two_where_it_spills(monkeypatch):
    def families():
        return set(ask(passes=("backward",)).backward)

    compiled = set()
    Compiler(monkeypatch, lambda config: compiled.add(config.family) or 0)
    assert families() == {"backward"}
    # Of two kernels nothing is compiled.
    assert compiled == {"backward"}
    Compiler(monkeypatch, lambda config: 8 if config.family == "backward" else 0)
    assert families() == {"backward-dq", "backward-dkdv"}


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-80GB", "Tesla T4", "NVIDIA H200"])
def test_gradients_take_the_next_config_too(monkeypatch, name):
    machine = machine_of(find(name))
    # So few blocks that two kernels run.
    asked = {"machine": machine, "passes": ("backward",), "batch": 1}
    first = ask(Purpose.QUESTION, **asked).backward
    firsts = {str(choice.config) for choice in first.values()}
    Compiler(monkeypatch, lambda config: 8 if str(config) in firsts else 0)
    found = ask(**asked).backward
    for family, choice in found.items():
        assert str(choice.config) not in firsts
        if choice.implementation.needs_maps:
            shipped = wgmma_backward.candidates(family, choice.traits)
        else:
            shipped = mma_rules.candidates(family, choice.config.generation)
        assert choice.config in shipped
        said = dict(choice.passed_over)[str(first[family].config)]
        assert said == "spills 8 bytes a thread with these functions"


def test_split_keys_are_looked_at_as_they_are_compiled(monkeypatch):
    fake = Compiler(monkeypatch, lambda config: 0)
    chosen = ask(seqlen_q=1, batch=1, num_heads_q=1, num_heads_kv=1, seqlen_k=2**17).forward
    assert chosen.config.num_splits > 1 and fake.compiled == [str(chosen.config)]


def test_what_was_compiled_is_found_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_cubins", {})
    choice = ask(Purpose.QUESTION).forward
    kernel = choice.config, choice.traits, H200.limits
    assert compiler.known_cubin(*kernel) is None
    cubin = compiler.Cubin("k", (), 128, 0, 168, 48, 40, 48, (), None, 1.0, b"\x7fELF k")
    monkeypatch.setattr(compiler, "compile_cubin", lambda *_: cubin)
    assert compiler.get_cubin(*kernel) == cubin
    monkeypatch.setattr(compiler, "_cubins", {})
    monkeypatch.setattr(spills, "SIMULATED", False)
    assert compiler.known_cubin(*kernel) == cubin
    assert spills.spilled_bytes(*kernel, compiles=False) == 48
    x = np.lib.stride_tricks.as_strided(np.empty(1, "float16"), SHAPE, (0,) * 4)
    bias = np.empty((SHAPE[2], 1, SHAPE[1]), "float16")
    text = str(numflash.explain_dispatch(x, x, x, bias=bias, arch="NVIDIA H200"))
    assert f"not {choice.config}: spills 48 bytes a thread with these functions" in text
