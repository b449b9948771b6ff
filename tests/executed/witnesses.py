"""What witnesses share: they run other compilers' kernels, and note what was executed.

A witness is a test with `@witness(...)`. Where it passes, it vouches for the instructions that
its kernels executed; where it fails under a wrong meaning of one of them, that meaning is noticed.
Both go into the record: `evidence`.
"""

import hashlib
import importlib.util
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, wraps
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

import numflash
from numflash.executor import bodies
from numflash.executor.program import program_of
from numflash.executor.text import Register, Special, Symbol, Vector
from numflash.ptx import INSTRUCTIONS
from numflash.runtime.switches import is_on
from numflash.simulator import DeadlockError, SimulationError, warpgroup
from tests.executed import evidence

_KEPT = Path(__file__).parents[2] / "build" / "test-cache" / "witnesses"
# What passed in this run: see `evidence.enter`. And what the running test has executed.
_WITNESSES: dict[str, dict] = {}
_NOTICED: dict[str, dict] = {}
_EXECUTED: set[str] = set()
# Changes of the text that a wrong meaning stands for: pattern -> replacement.
_CHANGES: dict[str, str] = {}
# Opcodes, as `bodies.plain` gives them, whose instruction the templates do not say: a template of
# several statements, results that ours leave out, and what only the executor knows.
_BY_HEART = {
    r"bar\.sync": "bar_sync",
    r"elect\.sync": "elect_sync",
    r"mbarrier\.try_wait\.parity\..*": "mbarrier_wait_parity",
    r"mbarrier\.arrive(\.release\.c\w+)?\.shared\.b64": "mbarrier_arrive",
    r"mbarrier\.arrive\.expect_tx(\.release\.c\w+)?\.shared\.b64": "mbarrier_arrive_expect_tx",
    r"setmaxnreg\.dec\..*": "setmaxnreg_dec",
    r"setmaxnreg\.inc\..*": "setmaxnreg_inc",
    # Ours has another table; the executor looks all of them up.
    r"lop3\.b32": "lop3_select_b32",
}
_SPECIAL = {"%tid.x": "mov_tid_x", "%ctaid.x": "mov_ctaid_x", "%nctaid.x": "mov_nctaid_x"}
_SAME = {"mul.f32": "mul.rn.f32", "mul.f16x2": "mul.rn.f16x2"}


def need(**packages: str) -> None:
    """Skip a module where witnesses are not asked for, or a package of theirs is missing.

    The packages are {name of the import: what to install}.
    """
    if not is_on("NUMFLASH_TEST_PEERS"):
        pytest.skip("set NUMFLASH_TEST_PEERS=1 to run witnesses", allow_module_level=True)
    for name, wheel in packages.items():
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is missing: pip install {wheel}", allow_module_level=True)


def recorder(module: str, wrong: dict | None = None):
    """The fixture that enters what the witnesses of a module have shown; `wrong` is its table."""

    @pytest.fixture(scope="module", autouse=True)
    def record():
        yield
        evidence.enter(module.rpartition(".")[2], _WITNESSES, _NOTICED, wrong)

    return record


def witness(compiler: str, package: str, *instructions: str):
    """A test that, where it passes, vouches for `instructions` and those that it executed."""

    def decorate(test):
        @wraps(test)
        def observed(*args, **named):
            _EXECUTED.clear()
            test(*args, **named)
            entry = _WITNESSES.setdefault(
                test.__name__,
                {
                    "compiler": f"{compiler} {version(package)}",
                    "module": test.__module__.rpartition(".")[2],
                    "instructions": [],
                },
            )
            entry["instructions"] = sorted({*entry["instructions"], *_EXECUTED, *instructions})

        return observed

    return decorate


def answer(worker: Path, package: str, **request) -> dict:
    """What a program of kernels answers, in a process of its own; kept from run to run.

    The process is needed: a compiler would not work in the simulator's. `package` is the
    compiler's, whose version decides what it makes.
    """
    asked = pickle.dumps(request)
    key = hashlib.sha256(b"\0".join([worker.read_bytes(), asked, version(package).encode()]))
    kept = _KEPT / f"{worker.stem}-{key.hexdigest()[:24]}.pickle"
    if not kept.exists():
        process = subprocess.run([sys.executable, str(worker)], input=asked, capture_output=True)
        assert process.returncode == 0, process.stderr.decode()[-2000:]
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_bytes(process.stdout)
        partial.replace(kept)
    return pickle.loads(kept.read_bytes())


def run(ptx: str, entry, grid, block, arguments, shared_bytes: int) -> set[str]:
    """Run a kernel; the opcodes that were executed."""
    for meant, wrong in _CHANGES.items():
        ptx = re.sub(meant, wrong, ptx)
    profile = numflash.run_ptx(
        ptx, entry, grid, block, arguments, shared_bytes=shared_bytes, profile=True
    )
    for piece in program_of(ptx, entry, shared_bytes).pieces:
        for statement in piece:
            if profile.by_line[statement.line]:
                _EXECUTED.update(names(statement))
    return set(profile.by_opcode)


@cache
def _templates() -> dict[str, list[bodies.Template]]:
    """Those of single statements, by opcode, with loads and stores typed by their bits."""
    found: dict[str, list] = {}
    for name, instruction in INSTRUCTIONS.items():
        template = bodies.read_template(instruction)
        if template is not None and name not in evidence.WITHOUT:
            found.setdefault(_untyped(template.opcode), []).append(template)
    return found


def _untyped(opcode: str) -> str:
    if opcode.startswith(("ld.", "st.")):
        return re.sub(r"[uf]32$", "b32", opcode)
    return _SAME.get(opcode, opcode)


def names(statement) -> set[str]:
    """Our instructions that a statement is; those of `wgmma` without how the sum begins."""
    opcode, operands = bodies.plain(statement.opcode, statement.operands)
    if opcode in ("mov.b32", "mov.u32"):
        return _moves(*operands)
    for pattern, name in _BY_HEART.items():
        if re.fullmatch(pattern, opcode):
            return {name}
    if opcode.startswith("wgmma.mma"):
        operands = (*operands[:3], bodies.Immediate("1"), *operands[4:])
    statement = replace(statement, operands=operands, opcode=opcode)
    made = bodies._made_for(statement) if opcode.startswith("wgmma") else []
    if made:
        return {_stem(made[0].instruction.name)}
    return {
        template.instruction.name
        for template in _templates().get(_untyped(opcode), [])
        if replace(template, opcode=opcode).bindings(statement) is not None
    }


def _stem(name: str) -> str:
    return re.sub("_more|_in_place|_of_1$", "", name)


def _moves(target, source) -> set[str]:
    if not isinstance(target, Register):
        return set()
    if isinstance(source, Special):
        return {_SPECIAL[source.name]} if source.name in _SPECIAL else set()
    if isinstance(source, Vector):
        return {"mov_b32_halves"}
    if isinstance(source, Symbol):
        return {"mov_shared_address"}
    return {"float_as_bits", "bits_as_float"} if isinstance(source, Register) else set()


# Wrong meanings: patches, made with a monkeypatch


def body(name: str, make: Callable):
    """An instruction has another body."""
    return lambda m: m.setitem(
        INSTRUCTIONS, name, replace(INSTRUCTIONS[name], body=make(INSTRUCTIONS[name].body))
    )


def function(owner, name: str, make: Callable):
    """A function is another one."""
    return lambda m: m.setattr(owner, name, make(getattr(owner, name)))


def text(meant: str, wrong: str):
    """The kernel's text is another one: the instruction means what another one does."""
    return lambda m: m.setitem(_CHANGES, meant, wrong)


def exchanged(opcode: str):
    """The first two registers of a vector are exchanged."""
    vector = r"(\{ *)(%\w+), (%\w+)"
    if opcode.startswith("ld"):
        return text(rf"({re.escape(opcode)}\s+){vector}", r"\1\2\4, \3")
    return text(rf"({re.escape(opcode)}\s+\[[^\]]*\], ){vector}", r"\1\2\4, \3")


def rows_exchanged(product: str):
    """A product of a warpgroup takes the rows of its a in the opposite order."""

    def patch(m):
        turned = []
        made_for, multiply = bodies._made_for, warpgroup.multiply

        def made(statement):
            return [
                replace(template, instruction=replace(template.instruction, body=wrong(template)))
                if _stem(template.instruction.name) == product
                else template
                for template in made_for(statement)
            ]

        def wrong(template):
            def turning(*given):
                turned.append(True)
                try:
                    template.instruction.body(*given)
                finally:
                    turned.pop()

            return turning

        def multiplied(accumulators, a, *rest):
            multiply(accumulators, replace(a, matrix=a.matrix[::-1]) if turned else a, *rest)

        m.setattr(bodies, "_made_for", made)
        m.setattr(warpgroup, "multiply", multiplied)

    return patch


def check_noticed(meaning: str, row: tuple, monkeypatch) -> None:
    """The witness of a row (instruction, patch, (witness, *arguments)) fails; note that."""
    instruction, make_wrong, (noticed, *given) = row
    make_wrong(monkeypatch)
    _forget()
    try:
        with pytest.raises((AssertionError, SimulationError, DeadlockError, IndexError)):
            noticed.__wrapped__(*given)
    finally:
        _forget()
    _NOTICED[meaning] = {"instruction": instruction, "witness": noticed.__name__}


def _forget():
    """Programs are made of bodies, and remembered."""
    program_of.cache_clear()
    bodies._table.cache_clear()


def float64_attention(q, k, v, causal: bool, dout=None):
    """(out, lse, gradients or None) of (heads, n, head_dim) arrays, in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    scores = q @ k.transpose(0, 2, 1) * scale
    if causal:
        scores = np.where(np.tri(scores.shape[1], dtype=bool), scores, -np.inf)
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    weights /= total
    out, lse = weights @ v, (largest + np.log(total))[..., 0]
    if dout is None:
        return out, lse, None
    dout = dout.astype(np.float64)
    dweights = dout @ v.transpose(0, 2, 1)
    dscores = weights * (dweights - (dout * out).sum(-1, keepdims=True))
    return (
        out,
        lse,
        (
            dscores @ k * scale,
            dscores.transpose(0, 2, 1) @ q * scale,
            weights.transpose(0, 2, 1) @ dout,
        ),
    )
