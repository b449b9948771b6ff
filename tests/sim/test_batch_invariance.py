"""batch_invariant=True: a query's result has the same bits alone and in any batch.

Keys are split at each multiple of a few, so that few are enough; one test has as many as really.
"""

import numpy as np
import pytest

import numflash
from numflash.runtime.sums import MODELS, SUMS
from numflash.selection import geometry
from tests.support.covering import some, thorough
from tests.support.page_cases import called
from tests.support.sequence_cases import cumulative, ints

OF_Q, OF_K = (3, 1, 18, 2), (70, 270, 140, 5)
HEADS, HEADS_KV, HEAD_DIM = 2, 1, 16
SPLIT = 128
INVARIANT = {"causal": True, "batch_invariant": True}
SINKS = np.array([0.5, -1.0], np.float32)
OPTIONS = {
    "causal": {},
    "a window": {"window_size": (60, 0)},
    "sinks": {"sinks": SINKS, "softcap": 3.0},
    "sinks, a window": {"sinks": SINKS, "window_size": (90, 0)},
    "results of float32": {"out_dtype": "float32"},
}


@pytest.fixture(autouse=True)
def ampere(on, monkeypatch):
    """Keys are split at each multiple of SPLIT."""
    on("sm_80")
    monkeypatch.setattr(geometry, "INVARIANT_KEYS", SPLIT)


class Batch:
    """Sequences one after another, in an order."""

    def __init__(self, order=(0, 1, 2, 3), dtype=np.float16, spoilt=()):
        self.parts = []
        for number in order:
            rng = np.random.default_rng(number)
            q = rng.standard_normal((OF_Q[number], HEADS, HEAD_DIM)).astype(dtype)
            k, v = rng.standard_normal((2, OF_K[number], HEADS_KV, HEAD_DIM)).astype(dtype)
            if number in spoilt:
                k[:], v[:] = np.nan, np.inf
            self.parts.append((number, q, k, v))

    def results(self, **options) -> dict[int, tuple[bytes, bytes]]:
        """Bits of out and lse by sequence."""
        _, *arrays = zip(*self.parts, strict=True)
        lengths = [cumulative([len(x) for x in side]) for side in arrays[:2]]
        arrays = [np.concatenate(x) for x in arrays]
        out, lse = numflash.attention_varlen(
            *arrays, *lengths, return_lse=True, **INVARIANT | options
        )
        ends = lengths[0]
        return {
            number: bits_of(out[ends[i] : ends[i + 1]], lse[:, ends[i] : ends[i + 1]])
            for i, (number, *_) in enumerate(self.parts)
        }


def bits_of(out, lse):
    """Bits of results, a tuple for each query."""
    return [
        (row.tobytes(), np.ascontiguousarray(of_row).tobytes())
        for row, of_row in zip(out, lse.T, strict=True)
    ]


def alone(q, k, v, **options):
    """Bits of queries that are the only sequence."""
    ends = ints(0, len(q)), ints(0, len(k))
    out, lse = numflash.attention_varlen(q, k, v, *ends, return_lse=True, **INVARIANT | options)
    return bits_of(out, lse)


def decoded(q, k, v, rows, **options):
    """Bits of each of these queries, as the only query that stands at the last key there is."""
    before = len(k) - len(q)
    return [
        alone(q[i : i + 1], k[: before + i + 1], v[: before + i + 1], **options)[0] for i in rows
    ]


@pytest.mark.parametrize("name", some(OPTIONS, "sinks, a window"))
def test_a_query_alone_is_a_query_in_a_batch(name):
    options, batch = OPTIONS[name], Batch()
    together = batch.results(**options)
    for number, q, k, v in batch.parts:
        rows = sorted({0, len(q) - 1})
        assert decoded(q, k, v, rows, **options) == [together[number][i] for i in rows], number


@thorough
@pytest.mark.parametrize("model", MODELS)
def test_with_any_sums_of_tensor_cores(model, monkeypatch):
    monkeypatch.setattr(SUMS, "model", model)
    batch = Batch((2, 0))
    together = batch.results()
    for number, q, k, v in batch.parts:
        rows = [len(q) - 1]
        assert decoded(q, k, v, rows) == [together[number][i] for i in rows], number


@thorough
def test_the_place_in_a_batch_and_neighbours_do_not_count():
    first = Batch().results()
    assert Batch((2, 3, 1, 0)).results() == first
    beside_nan = Batch((1, 2, 0), spoilt=(1,)).results()
    assert beside_nan[2] == first[2] and beside_nan[0] == first[0] and beside_nan[1] != first[1]


CONFIGS = "m16n16w1s1", "m32n16w2s2-packed", "m16n16w1s2-unpacked"


@thorough
@pytest.mark.parametrize("config", some(CONFIGS, "m32n16w2s2-packed"))
def test_the_other_numbers_of_a_config_do_not_count(config):
    assert Batch((1, 2)).results(config=f"sm80-{config}") == Batch((1, 2)).results()


@pytest.mark.parametrize(("page", "shift"), some([(1, 0), (7, 0), (64, 0), (5, 1)], (5, 1)))
def test_where_keys_lie_does_not_count(page, shift):
    """Pages of several sizes, also of arrays that are not aligned."""
    rng = np.random.default_rng(page)
    batch = Batch((2, 1))
    width = -(-max(len(k) for _, _, k, _ in batch.parts) // page)
    table = rng.permutation(2 * width).reshape(2, width).astype(np.int32)
    caches = []
    for which in (2, 3):
        flat = np.full(2 * width * page * HEADS_KV * HEAD_DIM + 8, np.nan, np.float16)
        cache = flat[shift : shift + flat.size - 8].reshape(-1, page, HEADS_KV, HEAD_DIM)
        for entry, part in enumerate(batch.parts):
            keys = np.arange(len(part[which]))
            cache[table[entry, keys // page], keys % page] = part[which]
        caches.append(cache)
    q = np.stack([part[1][-1:] for part in batch.parts])
    lengths = ints(*(len(part[2]) for part in batch.parts))
    options = INVARIANT | {"seqlens_k": lengths, "page_table": table, "cached": True}
    out, lse, _ = called(q, *caches, options)
    together = batch.results()
    for entry, (number, *_) in enumerate(batch.parts):
        assert bits_of(out[entry], lse[entry]) == together[number][-1:]


@thorough
def test_on_portable_kernels():
    batch = Batch((3, 0), np.float32)
    together = batch.results()
    for number, q, k, v in batch.parts:
        rows = range(len(q))
        assert decoded(q, k, v, rows) == [together[number][i] for i in rows], number


@thorough
def test_as_many_keys_as_are_split_really(monkeypatch):
    """A query at key 2047, the last without a second part, and one behind it."""
    monkeypatch.undo()
    rng = np.random.default_rng(9)
    q = rng.standard_normal((3, 1, HEAD_DIM)).astype(np.float16)
    k, v = rng.standard_normal((2, 2049, 1, HEAD_DIM)).astype(np.float16)
    assert alone(q, k, v) == decoded(q, k, v, range(3))


@thorough
def test_other_tiles_have_other_bits():
    """Without batch_invariant a config of other tiles is taken, and the bits are others."""
    q, k, v = Batch((2,)).parts[0][1:]
    options = {"batch_invariant": False}
    found = [alone(q, k, v, config=f"sm80-m16n{n}w1s1", **options) for n in (64, 16, 64)]
    assert found[0] == found[2] != found[1]


def test_forced_configs_of_other_sums_are_refused():
    q, k, v = Batch((3,)).parts[0][1:]
    for config, message in (
        ("sm80-m16n64w1s1", "batch_invariant: its tiles are of 64 keys.*tiles of 16"),
        ("m16n16w2", "batch_invariant: its instructions are not those of sm80-"),
    ):
        with pytest.raises(numflash.UnsupportedError, match=f"config {config}.*{message}"):
            alone(q, k, v, config=config)


def test_it_needs_sequences():
    x = np.zeros((1, 4, 1, 16), np.float16)
    with pytest.raises(ValueError, match="batch_invariant=True goes with sequences that have"):
        numflash.attention(x, x, x, batch_invariant=True)
