"""The ring: results and gradients against float64, and the same bits whenever messages come."""

from dataclasses import dataclass, field
from functools import cache

import ml_dtypes
import numpy as np
import pytest

from numflash import reference
from numflash.api.comparison import compare
from numflash.distributed import ring, steps
from numflash.distributed.arrays import Arrays
from numflash.distributed.communicators.local import local
from numflash.distributed.layouts import Layout
from numflash.distributed.local_calls import LocalCalls
from numflash.distributed.pairs import Band
from numflash.distributed.problem import Problem, sizes_of
from numflash.distributed.sizes import sent_in_backwards
from tests.support.covering import ALL, some
from tests.support.ranks import late, on_ranks

ELEMENTS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
SINKS, SLOPES = np.array([0.5, -1], np.float32), np.array([0.5, 0.0625], np.float32)


@dataclass(frozen=True)
class Case:
    """A problem over ranks.

    Attributes:
        layout: who holds what.
        window: (left, right), -1 for no limit.
        heads: of queries, and of keys and values.
        dims: of q and k, and of v.
        options: of `attention`, more.
        travels: in which backwards.
    """

    layout: Layout
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    heads: tuple[int, int] = (2, 1)
    dims: tuple[int, int] = (16, 16)
    dtype: str = "float16"
    batch: int = 1
    options: dict = field(default_factory=dict)
    travels: tuple[str, ...] = ("keys",)

    @property
    def wrt(self) -> tuple[str, ...]:
        return ("q", "k", "v", *(x for x in ("sinks", "alibi_slopes") if x in self.options))

    @property
    def mask(self) -> dict:
        return {"causal": self.causal, "window_size": self.window}

    def arrays(self) -> dict[str, np.ndarray]:
        """q, k, v, dout and dlse, whole."""
        rng, (heads, heads_kv), (dim, dim_v) = np.random.default_rng(7), self.heads, self.dims
        rows = self.batch, self.layout.seqlen
        shapes = {"q": (heads, dim), "k": (heads_kv, dim), "v": (heads_kv, dim_v)}
        shapes["dout"] = heads, dim_v
        found = {
            name: rng.standard_normal((*rows, *shape)).astype(ELEMENTS[self.dtype])
            for name, shape in shapes.items()
        }
        dlse = rng.standard_normal((self.batch, heads, self.layout.seqlen))
        return found | {"dlse": dlse.astype(np.float32)}


CASES = {
    "one rank": Case(Layout.zigzag(9, 1), travels=("queries",)),
    "causal": Case(Layout.zigzag(18, 4), travels=("keys", "queries")),
    "full": Case(Layout.contiguous(17, 3), False, travels=("queries",)),
    "window": Case(Layout.contiguous(32, 4), window=(5, 0)),
    "both ways": Case(
        Layout.zigzag(22, 2), False, (6, 3), heads=(2, 2), travels=("keys", "queries")
    ),
    "documents": Case(Layout.zigzag_documents([9, 2, 6], 2), travels=("keys", "queries")),
    "stream": Case(Layout.contiguous([7, 2, 10], 2), window=(4, 0), travels=("queries",)),
    "few tokens": Case(Layout.zigzag(5, 4), dtype="float32"),
    "one head": Case(Layout.zigzag(16, 2), heads=(3, 1), dims=(16, 32), dtype="bfloat16"),
    "entries": Case(Layout.zigzag(12, 3), dims=(32, 16), batch=2, travels=("queries",)),
    "slopes": Case(
        Layout.zigzag(16, 2), options={"alibi_slopes": SLOPES}, travels=("keys", "queries")
    ),
    "softcap": Case(Layout.contiguous(18, 3), options={"softcap": 2.0}, dtype="bfloat16"),
    "sinks": Case(Layout.zigzag(13, 3), options={"sinks": SINKS}, travels=("keys", "queries")),
    "dropout": Case(
        Layout.zigzag(64, 2, multiple=16),
        heads=(1, 1),
        options={"dropout_p": 0.25, "seed": 11},
        travels=("keys",),
    ),
    "dropout of queries": Case(
        Layout.contiguous(48, 3, multiple=16),
        False,
        heads=(1, 1),
        options={"dropout_p": 0.5, "seed": 5},
        travels=("queries",),
    ),
    "own segments": Case(
        Layout.of_segments([14], [[(0, 9, 5)], [], [(0, 2, 7), (0, 0, 2)]]),
        dtype="float32",
        travels=("auto",),
    ),
}


RANKS = 4 if ALL else 2
FEW = Case(Layout.zigzag(2 * RANKS, RANKS), heads=(1, 1), travels=("keys", "queries"))


class Counting:
    """A rank that counts the bytes that it sends."""

    def __init__(self, comm):
        self._comm, self.rank, self.size, self.sent = comm, comm.rank, comm.size, {}

    def exchange(self, sends, receives, what):
        kind = what.partition(", ")[2]
        self.sent[kind] = self.sent.get(kind, 0) + sum(array.nbytes for array, _ in sends)
        return self._comm.exchange(sends, receives, what)

    @staticmethod
    def of_all(comms) -> dict[str, int]:
        """What all ranks have sent."""
        kinds = set().union(*(comm.sent for comm in comms))
        return {kind: sum(comm.sent.get(kind, 0) for comm in comms) for kind in kinds}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What is allocated holds NaN until it is written."""
    empty = Arrays.empty

    def filled(self, shape, dtype):
        array = empty(self, shape, dtype)
        self.as_bytes(array)[...] = 0xFF
        return array

    monkeypatch.setattr(Arrays, "empty", filled)


def run(case: Case, comms, *, float32: bool = True, wrt=()) -> list[dict]:
    """On each rank: out and lse, and the gradients by (what travels, name)."""
    whole, layout = case.arrays(), case.layout

    def work(comm) -> dict:
        arrays, band = Arrays.of(whole["q"], "q"), Band.of(**case.mask)
        calls = LocalCalls(case.options, arrays)
        problem = Problem(layout, comm, band, calls, arrays)
        own = {
            name: layout.shard(x, comm.rank, axis=2 if name == "dlse" else 1)
            for name, x in whole.items()
        }
        kept = {name: x.tobytes() for name, x in own.items()}
        found = {}
        found["out"], found["lse"] = ring.forward(
            problem, own["q"], own["k"], own["v"], float32=float32
        )
        operands = own | {"out": found["out"], "lse": found["lse"]}
        for travels in case.travels:
            made = ring.backward(problem, operands, wrt=wrt or case.wrt, travels=travels)
            found |= {(travels, name): x for name, x in made.items()}
        assert {name: x.tobytes() for name, x in own.items()} == kept
        return found

    return on_ranks(layout.ranks, work, comms)


def whole_of(case: Case, found: list[dict], name) -> np.ndarray:
    """A result of all ranks, in global order; of what heads have the sum in rank order."""
    parts = [each[name] for each in found]
    if name[-1] in ("sinks", "alibi_slopes"):
        return sum(parts[1:], parts[0])
    axis = 2 if name == "lse" else 1
    shape = list(parts[0].shape)
    shape[axis] = case.layout.seqlen
    whole = np.full(shape, np.nan, parts[0].dtype)
    for rank, part in enumerate(parts):
        at = [slice(None)] * whole.ndim
        at[axis] = case.layout.indices(rank)
        whole[tuple(at)] = part
    return whole


def documents(layout: Layout) -> list[slice]:
    return [
        slice(start, start + length)
        for start, length in zip(layout.starts, layout.lengths, strict=True)
    ]


def expect_right(case: Case, found: list[dict]) -> None:
    """Each document by itself, against float64."""
    whole = case.arrays()
    for travels in case.travels:
        got = {name: whole_of(case, found, name) for name in ("out", "lse")}
        got |= {f"d{name}": whole_of(case, found, (travels, name)) for name in case.wrt}
        for x in got.values():
            assert x.dtype == np.float32
        for rows in documents(case.layout):
            lse = np.s_[:, :, rows]
            part = {
                name: x if name in ("dsinks", "dalibi_slopes") else x[:, rows]
                for name, x in got.items()
                if name != "lse"
            }
            q, k, v, dout = (whole[name][:, rows] for name in ("q", "k", "v", "dout"))
            report = compare(
                part | {"lse": got["lse"][lse]},
                *(q, k, v),
                precision=case.dtype,
                dout=dout,
                dlse=whole["dlse"][lse],
                wrt=case.wrt,
                **case.mask,
                **case.options,
            )
            assert report.passed, f"{travels} travel\n{report}"


@pytest.mark.parametrize(
    "name",
    some(CASES, "window", "documents", "one head", "sinks"),
)
def test_results_and_gradients_are_those_of_one_gpu(name):
    """Messages come late and in any order; nothing is read before."""
    case = CASES[name]
    expect_right(case, run(case, late(case.layout.ranks, seed=len(name))))


@cache
def counted() -> tuple[list[dict], dict[str, int]]:
    """What two tokens a rank give, and the bytes that all send, by what they are."""
    comms = [Counting(comm) for comm in local(RANKS)]
    found = run(FEW, comms)
    return found, Counting.of_all(comms)


def test_the_same_bits_whenever_messages_come():
    for first, other in zip(counted()[0], run(FEW, late(RANKS, seed=1)), strict=True):
        assert first.keys() == other.keys()
        for name, x in first.items():
            assert x.tobytes() == other[name].tobytes(), name


def test_the_bytes_are_those_of_the_formulas():
    """Keys and values go round twice: in the forward and in one of the backwards."""
    arrays, (found, sent) = FEW.arrays(), counted()
    sizes = sizes_of(*(arrays[name] for name in "qkv"), "float16", None)
    band = Band.of(**FEW.mask)
    fetched = sum(
        sizes.keys(end - begin)
        for plan in steps.ring(FEW.layout, band)
        for step in plan
        for _, (begin, end), _ in step.fetch.sends
    )
    wanted = sent_in_backwards(FEW.layout, band, False, sizes)
    assert sent["keys and values"] == 2 * fetched
    assert fetched + sent["gradients of keys and values"] == wanted["keys"]
    assert sent["queries"] + sent["gradients of queries"] == wanted["queries"]

    comms = [Counting(comm) for comm in local(RANKS)]
    only = run(FEW, comms, wrt=("v",))
    for each, whole in zip(only, found, strict=True):
        for travels in FEW.travels:
            assert set(each) == {"out", "lse", ("keys", "v"), ("queries", "v")}
            np.testing.assert_array_equal(each[travels, "v"], whole[travels, "v"])
    fewer = Counting.of_all(comms)
    assert 2 * fewer["gradients of keys and values"] == sent["gradients of keys and values"]
    assert "gradients of queries" not in fewer


def test_float16_loses_nothing_by_more_ranks():
    """Parts are float32: one rounding at the end, whatever the number of ranks."""
    errors = {}
    for ranks in (1, 4):
        case = Case(Layout.contiguous(32, ranks), False, heads=(1, 1), travels=())
        arrays = case.arrays()
        exact, _ = reference.attention(*(arrays[name] for name in "qkv"))
        out = whole_of(case, run(case, local(ranks), float32=False), "out")
        assert out.dtype == np.float16
        errors[ranks] = np.abs(out - exact).max() / np.abs(exact).max()
    assert errors[4] <= min(errors[1], 2e-3)


def test_something_else_does_not_travel():
    with pytest.raises(ValueError, match="travels must be one of"):
        run(Case(Layout.zigzag(4, 1), heads=(1, 1), travels=("values",)), local(1))
