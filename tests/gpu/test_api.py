"""The public face where only a device shows it: streams, graphs, memory, other libraries."""

import numpy as np
import pytest

import numflash
from numflash.runtime.arrays import to_numpy
from numflash.runtime.views import numpy_dtype


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


def _inputs(cupy, shape=(2, 333, 4, 64), dtype="float16", count=3):
    rng = cupy.random.default_rng(0)
    dtype = numpy_dtype(dtype)
    return [rng.standard_normal(shape, dtype="float32").astype(dtype) for _ in range(count)]


def test_results_are_the_same_bits_every_time(cupy):
    q, k, v, dout = _inputs(cupy, count=4)
    first = numflash.attention(q, k, v, causal=True, return_lse=True)
    gradients = numflash.attention_backward(dout, q, k, v, *first, causal=True)
    for _ in range(5):
        again = numflash.attention(q, k, v, causal=True, return_lse=True)
        repeated = numflash.attention_backward(dout, q, k, v, *again, causal=True)
        for a, b in zip((*first, *gradients), (*again, *repeated), strict=True):
            assert bool((a.view("u1") == b.view("u1")).all())


def test_work_is_ordered_on_the_current_stream(cupy):
    q, k, v = _inputs(cupy)
    expected = numflash.attention(q, k, v)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        # Written late on the same stream: a launch on another one would read zeros.
        late = cupy.zeros_like(q)
        for _ in range(200):
            late = late * 1
        late += q
        out = numflash.attention(late, k, v)
    stream.synchronize()
    assert bool((out == expected).all())


def test_a_given_stream_is_used(cupy):
    q, k, v = _inputs(cupy)
    expected = numflash.attention(q, k, v)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    out = numflash.attention(q, k, v, stream=stream)
    stream.synchronize()
    assert bool((out == expected).all())


def test_calls_can_be_captured_in_a_graph(cupy):
    q, k, v = _inputs(cupy)
    plan = numflash.plan(q, k, v, causal=True)
    plan.launch()
    expected = plan.out.copy()
    plan.out.fill(0)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        plan.launch(stream)
        graph = stream.end_capture()
        graph.launch()
    stream.synchronize()
    assert bool((plan.out == expected).all())


def test_a_plan_can_be_captured_before_it_was_ever_launched(cupy):
    """Its kernel needs less than 48 KB, so that nothing but the plan has loaded it."""
    q, k, v = _inputs(cupy)
    expected = numflash.attention(q, k, v)
    plan = numflash.plan(q, k, v, config="m16n16w2")
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        plan.launch(stream)
        graph = stream.end_capture()
        graph.launch()
    stream.synchronize()
    assert float(abs(plan.out - expected).max()) < 1e-2


def test_memory_grows_with_seqlen_not_its_square(cupy):
    pool = cupy.get_default_memory_pool()

    def peak(seqlen):
        q, k, v, dout = _inputs(cupy, (1, seqlen, 1, 64), count=4)
        pool.free_all_blocks()
        before = pool.used_bytes()
        out, lse = numflash.attention(q, k, v, return_lse=True)
        gradients = numflash.attention_backward(dout, q, k, v, out, lse)
        used = pool.used_bytes() - before
        assert len(gradients) == 3
        return used

    assert peak(16384) < 6 * peak(4096)


def test_offsets_beyond_32_bits(cupy):
    # 2**31 elements lie between the two heads that are attended to.
    seqlen, heads, head_dim = 70_000, 512, 64
    try:
        whole = cupy.zeros((seqlen, heads, head_dim), "float16")
    except cupy.cuda.memory.OutOfMemoryError:
        pytest.skip("needs 4.6 GB of GPU memory")
    rng = cupy.random.default_rng(1)
    view = whole[-64:, -2:]
    view[...] = rng.standard_normal(view.shape, dtype="float32").astype("float16")
    assert whole.size > 2**31
    report = numflash.check(view, view, view, dout=view)
    assert report.passed, f"\n{report}"


def test_torch_tensors_in_and_out(cupy):
    torch = pytest.importorskip("torch")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        q, k, v, dout = (torch.randn(2, 130, 4, 64, device="cuda", dtype=dtype) for _ in range(4))
        out, lse = numflash.attention(q, k, v, causal=True, return_lse=True)
        assert isinstance(out, torch.Tensor) and out.dtype == dtype and lse.dtype == torch.float32
        gradients = numflash.attention_backward(dout, q, k, v, out, lse, causal=True)
        assert all(isinstance(g, torch.Tensor) for g in gradients)
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
        error = (out - expected.transpose(1, 2)).abs().max().item()
        assert error < {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}[dtype]


def test_numba_arrays_in_and_out(cupy):
    from numba import cuda

    q = cuda.to_device(np.random.default_rng(0).standard_normal((1, 65, 2, 32)).astype("float32"))
    out = numflash.attention(q, q, q)
    assert type(out).__module__.startswith("numba.")
    exact, _ = numflash.reference.attention(q.copy_to_host(), q.copy_to_host(), q.copy_to_host())
    assert np.abs(to_numpy(out) - exact).max() < 1e-5


def test_jax_arrays_in_and_out(cupy):
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU here")
    q = jax.random.normal(jax.random.PRNGKey(0), (1, 65, 2, 32))
    out = numflash.attention(q, q, q)
    assert isinstance(out, jax.Array)


def test_few_queries_are_split_over_the_machine(cupy):
    q = _inputs(cupy, (1, 1, 32, 128), count=1)[0]
    k, v = _inputs(cupy, (1, 8192, 8, 128), count=2)
    chosen = numflash.explain_dispatch(q, k, v)
    assert chosen.geometry.num_splits > 1 and chosen.geometry.pack == 4
    report = numflash.check(q, k, v)
    assert report.passed, f"\n{report}"


def test_memory_is_what_is_documented(cupy):
    pool = cupy.get_default_memory_pool()
    q, k, v = _inputs(cupy, (2, 1024, 4, 64))
    numflash.attention(q, k, v)
    pool.free_all_blocks()
    before = pool.used_bytes()
    out, lse = numflash.attention(q, k, v, return_lse=True)
    assert pool.used_bytes() - before == out.nbytes + lse.nbytes


def test_warmup_compiles_ahead(cupy, caplog):
    numflash.warmup("bfloat16", 96, backward=True)
    q, k, v = _inputs(cupy, (1, 50, 1, 96), "bfloat16")
    with caplog.at_level("INFO", "numflash"):
        numflash.attention(q, k, v)
    assert "compiling" not in caplog.text
