"""Attention of several processes on PyTorch's tensors, over gloo, against float64.

The processes of `tests.support.torch_ranks` go through their cases once; tests read what they saw.
"""

import json
import os
import subprocess
import sys
import threading

import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "numflash[torch]"')
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

import numflash  # noqa: E402
import numflash.torch as nt  # noqa: E402
from numflash.distributed import Layout, local  # noqa: E402
from numflash.frontends.torch import context_parallel  # noqa: E402
from tests.support.ranks import on_ranks  # noqa: E402

LARGEST = 2e-6
"""Of the root mean square of an error, relative to that of what is expected, in float32."""


def seen_by(ranks, folder):
    """What each of so many processes saw, by case."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**os.environ, **one_thread, "GLOO_SOCKET_IFNAME": "lo"}
    given = str(ranks), str(folder)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.torch_ranks", str(rank), *given],
            env=environment | {"NUMBA_ENABLE_CUDASIM": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=900)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes saw."""
    return seen_by(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What four processes saw."""
    return seen_by(4, tmp_path_factory.mktemp("four"))


GRADIENTS = {"q", "k", "v"}
WHOLE = {"out", "lse", *GRADIENTS}
ERRORS = {
    "gather": WHOLE,
    "ring, keys": WHOLE,
    "ring, queries": WHOLE,
    "heads": WHOLE,
    "window": WHOLE,
    "documents": WHOLE,
    "arrays of heads": WHOLE | {"sinks", "alibi_slopes"},
    "dropout": WHOLE,
    "drawn dropout": {"out"},
    "decode": {"out", "lse"},
    "context": {"out", *GRADIENTS},
    "context in order": {"out", *GRADIENTS},
    "in place of torch's": {"in a block", "in the process"},
}
ERRORS_OF_FOUR = {
    "ring": WHOLE,
    "heads and gather": WHOLE,
    "context, heads and ring": {"out", *GRADIENTS},
}


def expect_small(seen, case, names):
    for each in seen:
        assert set(each[case]) == names
        assert max(each[case].values()) <= LARGEST, each[case]


@pytest.mark.parametrize("case", ERRORS)
def test_two_processes(two, case):
    expect_small(two, case, ERRORS[case])


@pytest.mark.parametrize("case", ERRORS_OF_FOUR)
def test_four_processes(four, case):
    expect_small(four, case, ERRORS_OF_FOUR[case])


def test_a_training_step_is_that_of_one_process(two):
    for each in two:
        errors = each["training"]
        assert {"loss", "embed.weight", "to_heads.bias"} <= set(errors) and len(errors) == 7
        assert max(errors.values()) <= LARGEST, errors


def test_torchs_own_ring_with_this_attention(two):
    if isinstance(gone := two[0]["torch's ring"], str):
        pytest.skip(f"this PyTorch has it elsewhere: {gone}")
    expect_small(two, "torch's ring", {"out", *GRADIENTS, "order"})


def test_ranks_that_ask_for_different_options_are_told_before_a_seed_is_drawn(two):
    for each in two:
        text = each["disagreement"]
        assert "dropout_p: rank 1 has 0.25 where rank 0 has none" in text
        assert "shape" not in text


REFUSED = {
    "mask": "UnsupportedError: .* takes no attn_mask",
    "bias": "UnsupportedError: .* takes no attn_mask",
    "other lengths": "UnsupportedError: .* query and key of the same tokens, got 8 and 4",
    "odd": "UnsupportedError: .* an even number of tokens on each rank, got 5",
    "torch's own": "UnsupportedError: .* this rank's tokens alone. query is torch.float64",
    "torch's error": "RuntimeError: Expected size",
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_context_refuses_what_it_would_get_wrong(two, case):
    for each in two:
        with pytest.raises(AssertionError, match=REFUSED[case]):
            raise AssertionError(each["refusals"][case])


def test_nothing_of_a_context_is_left_after_an_error(two):
    assert [each["refusals"]["left behind"] for each in two] == [[0, "None"]] * 2


def test_a_context_is_that_of_its_thread_and_the_innermost_holds(two):
    alone = {"another thread": True, "outside": True}
    assert [each["scopes"] for each in two] == [
        alone | {"inside": False, "inside again": False}
    ] * 2


class Nested(torch.autograd.Function):
    """A backward in a backward: PyTorch gives the innermost ones to another thread."""

    @staticmethod
    def forward(ctx, x, depth, seen):
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        ctx.seen.append((threading.get_ident(), context_parallel._innermost()))
        if ctx.depth:
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                Nested.apply(x, ctx.depth - 1, ctx.seen).backward()
        return dout, None, None


def test_a_backwards_other_threads_are_in_its_context():
    """As those that compute gradients on a GPU, where checkpoints compute results again."""
    (comm,), seen = local(1), []
    with context_parallel.ContextParallel((comm,), "zigzag", "auto", None, None) as context:
        Nested.apply(torch.ones(1, requires_grad=True), 70, seen).backward()
    assert len({thread for thread, _ in seen}) > 1
    assert {found for _, found in seen} == {context}
    Nested.apply(torch.ones(1, requires_grad=True), 70, seen := []).backward()
    assert {found for _, found in seen} == {None}


(ALONE,) = local(1)
LAYOUT = Layout.zigzag(16, 1)
Q = torch.zeros(1, 16, 2, 8)


def attend(*operands, **options):
    return nt.distributed_attention(*operands, layout=LAYOUT, comm=ALONE, **options)


def learned(*shape):
    return torch.zeros(*shape, requires_grad=True)


BAD = {
    "no tensor": (lambda: attend(Q, Q, [1.0]), TypeError, "v must be a tensor, got list"),
    "option": (lambda: attend(Q, Q, Q, is_causal=True), TypeError, "is_causal"),
    "layout": (
        lambda: nt.distributed_attention(Q, Q, Q, layout=Layout.zigzag(8, 1), comm=ALONE),
        ValueError,
        "8 tokens",
    ),
    "no communicator": (
        lambda: nt.distributed_attention(Q, Q, Q, layout=LAYOUT, comm=None, dropout_p=0.5),
        TypeError,
        "comm must be a communicator",
    ),
    "gradient of a scale": (
        lambda: attend(Q, Q, Q, softmax_scale=learned(1)),
        numflash.UnsupportedError,
        "softmax_scale requires a gradient and has none over several ranks",
    ),
    "meta": (lambda: attend(*[Q.to("meta")] * 3), numflash.UnsupportedError, "no part of a graph"),
    "forward mode": (
        lambda: torch.func.jvp(lambda x: attend(x, Q, Q), (Q,), (Q,)),
        numflash.UnsupportedError,
        "no part of a graph",
    ),
    "no mesh": (lambda: nt.context_parallel(None), TypeError, "mesh must be a DeviceMesh"),
    "order": (lambda: nt.context_parallel(None, order="random"), ValueError, "order must be one"),
    "three dimensions": (
        lambda: nt.context_parallel(Mesh(3)),
        ValueError,
        "mesh must have one dimension or two, got 3",
    ),
    "method of a mesh": (
        lambda: nt.context_parallel(Mesh(2), method="ring"),
        ValueError,
        "method must be a pair",
    ),
    "tokens": (
        lambda: context_parallel.ContextParallel((ALONE,), "zigzag", "auto", None, None).layout(3),
        ValueError,
        "seqlen must be a multiple of 2 for 1 ranks in zigzag order, got 3",
    ),
}


class Mesh:
    """What is asked of a DeviceMesh before its groups are."""

    def __init__(self, ndim):
        self.ndim = ndim
        self.size = self.get_group = None


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


def _of_bias_and_aux(attend, x, bias, table):
    """Gradients of a bias and of a table that score_mod reads, of a loss that `attend` gives."""
    leaves = [each.clone().requires_grad_() for each in (bias, table)]

    def score_mod(s, b, h, i, j, table):
        return s + table[h, i] * table[h, j]

    loss = attend(x, bias=leaves[0], score_mod=score_mod, aux=(leaves[1],), causal=True)
    return torch.autograd.grad(loss.sum(), leaves)


def test_shares_of_a_bias_and_of_aux_add_up_to_their_gradients():
    x, bias, table = torch.randn(1, 8, 2, 8), torch.randn(2, 8, 8), torch.randn(2, 8)
    expected = _of_bias_and_aux(lambda x, **more: nt.attention(x, x, x, **more), x, bias, table)
    layout = Layout.zigzag(8, 2)

    def work(comm):
        def attend(x, **more):
            return nt.distributed_attention(x, x, x, layout=layout, comm=comm, **more)

        return _of_bias_and_aux(attend, layout.shard(x, comm.rank), bias, table)

    for shares, x in zip(zip(*on_ranks(2, work), strict=True), expected, strict=True):
        torch.testing.assert_close(shares[0], shares[1], rtol=0, atol=0)
        torch.testing.assert_close(sum(shares), x)


def test_a_second_derivative_is_refused():
    x = torch.randn(1, 16, 1, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(attend(x, x, x).sum(), x, create_graph=True)
    with pytest.raises(numflash.UnsupportedError, match="first derivatives only"):
        dx.sum().backward()


def test_a_compiled_function_calls_it_between_two_graphs():
    q, k, v = torch.randn(3, 1, 16, 1, 8).unbind()
    step = torch.compile(lambda q: attend(q * 2, k, v) + 1, backend="eager")
    torch.testing.assert_close(step(q), nt.attention(q * 2, k, v) + 1)
    whole = torch.compile(lambda q: attend(q, k, v), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="for no graph of PyTorch's: it moves tensors"):
        whole(q)
