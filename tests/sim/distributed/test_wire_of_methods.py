"""Gather and ring with keys and values that travel in 8 bits."""

import numpy as np
import pytest

from numflash import Fp8Recipe, UnsupportedError, reference
from numflash.distributed import Layout, attention, attention_backward
from numflash.distributed.communicators.local import local
from numflash.distributed.problem import sizes_of
from numflash.distributed.wire import wire_of
from tests.support.counting import counting
from tests.support.covering import some, thorough
from tests.support.ranks import on_ranks

SEQLEN, HEADS, HEADS_KV, DIM = 48, 2, 1, 16
BLOCKS = Fp8Recipe("block", 16, hadamard=False)
BUDGET = 5e-2
"""Of the root mean square of out: 2.6e-2 to 3.6e-2 were seen, the rounding of e4m3 alone."""
# Wire, and whether the codes that travel are multiplied.
CASES = some([("e4m3", None), ("e4m3", "fp8"), (BLOCKS, "fp8")], ("e4m3", "fp8"))


def operands(seqlen=SEQLEN, head_dim=DIM):
    rng = np.random.default_rng(0)
    shape = 1, seqlen, HEADS + 2 * HEADS_KV + HEADS, head_dim
    both = rng.standard_normal(shape).astype(np.float16)
    return tuple(np.ascontiguousarray(x) for x in np.split(both, [HEADS, 3, 4], axis=2))


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def whole(layout, arrays, comms=None, **options):
    """out and lse of all tokens, computed by the ranks of a layout."""
    options = {"causal": True, "return_lse": True} | options

    def work(comm):
        own = (layout.shard(x, comm.rank) for x in arrays)
        out, lse = attention(*own, layout=layout, comm=comm, **options)
        return layout.gather(out, comm), layout.gather(lse, comm, axis=2)

    return on_ranks(layout.ranks, work, comms)[0]


@thorough
@pytest.mark.parametrize(("wire", "precision"), CASES, ids=str)
def test_bits_of_gather_do_not_depend_on_the_ranks(wire, precision, on):
    on("sm_89" if precision else "sm_80")
    q, k, v, _ = operands()
    options = {"wire": wire, "method": "gather", "precision": precision}
    multiple = 1 if wire == "e4m3" else 16
    results = [
        whole(Layout.zigzag(SEQLEN, ranks, multiple=multiple), (q, k, v), **options)
        for ranks in (1, 3)
    ]
    out, lse = reference.attention(q, k, v, causal=True)
    assert 1e-2 < rms(results[0][0] - out) / rms(out) < BUDGET
    assert rms(results[0][1] - lse) < BUDGET
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("wire", "precision"), CASES, ids=str)
def test_a_ring_sees_what_the_owners_see(wire, precision, on):
    """Exact attention to the rounded keys and values, in the numbers of the kernels."""
    on("sm_89" if precision else "sm_80")
    q, k, v, _ = operands(64)
    options = {"wire": wire, "precision": precision, "window_size": (20, 0), "causal": False}
    out, lse = whole(Layout.zigzag(64, 2, multiple=16), (q, k, v), method="ring", **options)
    rounded = wire_of(wire, k, v).rounded(k, v)
    wanted = reference.attention(q, *rounded, window_size=(20, 0))
    # In 8 bits queries and weights are rounded, too.
    budget = BUDGET if precision else 1e-3
    assert rms(out - wanted[0]) / rms(wanted[0]) < budget and rms(lse - wanted[1]) < budget


@thorough
@pytest.mark.parametrize("method", some(["gather", "ring"], "gather"))
def test_codes_of_documents_are_multiplied(method, on):
    """In one call for each, as these kernels know one length."""
    on("sm_89")
    lengths = [20, 12]
    q, k, v, _ = operands(sum(lengths))
    layout = Layout.zigzag_documents(lengths, 2)
    found = whole(layout, (q, k, v), method=method, wire="e4m3", precision="fp8")
    rounded, begin = wire_of("e4m3", k, v).rounded(k, v), 0
    for length in lengths:
        own = slice(begin, begin + length)
        out, lse = reference.attention(*(x[:, own] for x in (q, *rounded)), causal=True)
        assert rms(found[0][:, own] - out) / rms(out) < BUDGET
        assert rms(found[1][:, :, own] - lse) < BUDGET
        begin += length


@thorough
@pytest.mark.parametrize(
    ("method", "travels"),
    some([("gather", "auto"), ("ring", "keys"), ("ring", "queries")], ("gather", "auto")),
)
def test_gradients_are_those_of_the_rounded_keys_and_values(method, travels, on):
    on("sm_80")
    seqlen = 24
    q, k, v, dout = operands(seqlen)
    layout = Layout.zigzag(seqlen, 2)
    options = {"layout": layout, "method": method, "wire": "e4m3", "causal": True}

    def work(comm):
        own = [layout.shard(x, comm.rank) for x in (dout, q, k, v)]
        out, lse = attention(*own[1:], comm=comm, return_lse=True, **options)
        more = {"travels": travels, "grad_dtype": "float32", **options}
        found = attention_backward(*own, out, lse, comm=comm, **more)
        return [layout.gather(x, comm) for x in found]

    found = on_ranks(2, work)[0]
    rounded = wire_of("e4m3", k, v).rounded(k, v)
    wanted = reference.attention_backward(dout, q, *rounded, causal=True)
    of_exact = reference.attention_backward(dout, q, k, v, causal=True)
    for got, exact, other in zip(found, wanted, of_exact, strict=True):
        assert rms(got - exact) < 2e-3 * rms(exact)
        assert rms(got - other) > 1e-2 * rms(other)


@thorough
@pytest.mark.parametrize("method", some(["gather", "ring"], "ring"))
def test_half_the_bytes_travel(method, on):
    on("sm_80")
    seqlen, ranks, dim = 8, 2, 128
    arrays = operands(seqlen, dim)[:3]
    layout, sent = Layout.contiguous(seqlen, ranks), {}
    for wire in (None, "e4m3"):
        comms = counting(ranks)

        def work(comm, wire=wire):
            own = [layout.shard(x, comm.rank) for x in arrays]
            attention(*own, layout=layout, comm=comm, method=method, wire=wire)

        on_ranks(ranks, work, comms)
        sent[wire] = comms[0].sent
        sizes = sizes_of(*arrays, "float16", wire)
        assert [comm.sent for comm in comms] == [sizes.keys(seqlen // ranks)] * ranks
    assert sent["e4m3"] / sent[None] == (dim + 4) / (2 * dim)  # 0.52


def test_across_groups_alone(on):
    """One group of two ranks, which change heads for tokens in 16 bits: the bits of gather."""
    on("sm_80")
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((3, 1, 16, 2, DIM)).astype(np.float16)
    layout = Layout.contiguous(16, 2)
    inner, outer = counting(2), [local(1)[0] for _ in range(2)]

    def work(comm):
        own = (layout.shard(x, comm.rank) for x in arrays)
        of_both = {"comm": (comm, outer[comm.rank]), "method": ("heads", "gather")}
        out = attention(*own, layout=layout, wire="e4m3", causal=True, **of_both)
        return layout.gather(out, comm)

    found = on_ranks(2, work, inner)[0]
    alone = whole(Layout.contiguous(16, 1), arrays, wire="e4m3", method="gather")
    np.testing.assert_array_equal(found, alone[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"wire": BLOCKS}, ValueError, r"begin at multiples of 16; .* Make the layout with mul"),
        ({"wire": "e5m2"}, ValueError, 'wire must be None, "e4m3" or an Fp8Recipe'),
        ({"precision": "fp8"}, UnsupportedError, 'wire="e4m3" quantises at the owner'),
        ({"precision": "auto", "wire": "e4m3"}, UnsupportedError, "no precision='auto'"),
        (
            {"precision": "fp8", "wire": "e4m3", "method": "heads"},
            UnsupportedError,
            'precision="fp8" over several ranks is for what gathers or sends round',
        ),
    ],
)
def test_what_does_not_go_together_is_refused_on_all_ranks(options, error, message, on):
    on("sm_89")
    arrays = operands(24)[:3]
    layout = Layout.zigzag(24, 2)

    def work(comm):
        own = [layout.shard(x, comm.rank) for x in arrays]
        with pytest.raises(error, match=message):
            attention(*own, layout=layout, comm=comm, **options)
        with pytest.raises(UnsupportedError, match="it takes gradients in 16 bits"):
            attention_backward(
                own[0], *own, own[0], None, layout=layout, comm=comm, wire="e4m3", precision="fp8"
            )

    on_ranks(2, work)
