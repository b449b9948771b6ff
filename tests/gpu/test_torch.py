"""numflash.torch where only a device shows it: streams, CUDA graphs, devices, compiling."""

import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "numflash[torch]"')

import numflash.torch as nt  # noqa: E402

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a PyTorch that sees a GPU"
)
SHAPE = 2, 333, 4, 64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def operands(device="cuda", grad=True):
    made = (torch.randn(SHAPE, device=device, dtype=torch.bfloat16) for _ in range(3))
    return [x.requires_grad_(grad) for x in made]


def step(q, k, v, dout, **options):
    """The result and the gradients of a call."""
    out = nt.attention(q, k, v, causal=True, **options)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def alike(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_results_and_gradients_are_pytorchs():
    q, k, v = operands()
    found = step(q, k, v, torch.ones_like(q))
    heads_first = [x.detach().float().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
    wanted = [out, *torch.autograd.grad(out, heads_first, torch.ones_like(out))]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.float(), b.transpose(1, 2), rtol=0.05, atol=0.05)


def test_both_directions_run_on_the_current_stream():
    q, k, v = operands(grad=False)
    dout = torch.randn_like(q)
    wanted = step(*[x.clone().requires_grad_() for x in (q, k, v)], dout)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Written late on the same stream: a launch on another one would read zeros.
        late = torch.zeros_like(q)
        for _ in range(300):
            late = late * 1
        late = (late + q).requires_grad_()
        found = step(late, k.requires_grad_(), v.requires_grad_(), dout)
    stream.synchronize()
    assert alike(found, wanted)


def test_a_cuda_graph_replays_both_directions():
    sample, other = operands(), operands()
    dout = torch.randn_like(sample[0])
    wanted = step(*other, dout)
    graphed = torch.cuda.make_graphed_callables(
        lambda q, k, v: nt.attention(q, k, v, causal=True), tuple(sample)
    )
    out = graphed(*other)
    found = out.detach(), *torch.autograd.grad(out, other, dout)
    assert alike(found, wanted)


def test_dropout_in_a_cuda_graph_is_another_each_time():
    q, k, v = operands(grad=False)
    nt.attention(q, k, v, dropout_p=0.5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = nt.attention(q, k, v, dropout_p=0.5)
    found = []
    for seed in (1, None, 1):
        if seed is not None:
            torch.cuda.manual_seed(seed)
        graph.replay()
        found.append(out.clone())
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_is_as_eager(mode):
    torch._dynamo.reset()
    call = torch.compile(
        lambda q, k, v: nt.attention(q, k, v, causal=True), fullgraph=True, mode=mode
    )
    q, k, v = operands()
    dout = torch.randn_like(q)
    wanted = step(q, k, v, dout)
    for _ in range(3):  # warmed up, recorded, replayed
        torch.compiler.cudagraph_mark_step_begin()
        out = call(q, k, v)
        found = out.detach().clone(), *torch.autograd.grad(out, (q, k, v), dout)
        assert alike(found, wanted)


def test_checkpointing_draws_the_same_seed_again():
    q, k, v = operands()

    def block(q, k, v):
        return nt.attention(q, k, v, dropout_p=0.5)

    torch.manual_seed(1)
    wanted = torch.autograd.grad(block(q, k, v).sum(), (q, k, v))
    torch.manual_seed(1)
    out = torch.utils.checkpoint.checkpoint(block, q, k, v, use_reentrant=False)
    assert alike(torch.autograd.grad(out.sum(), (q, k, v)), wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    q, k, v = operands("cuda:0")
    there = [x.detach().to("cuda:1").requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)
    wanted = step(q, k, v, dout)
    with torch.cuda.device(0):
        found = step(*there, dout.to("cuda:1"))
        masked = nt.attention(*there, dropout_p=0.5)
        assert torch.cuda.current_device() == 0
    assert masked.device == found[0].device == torch.device("cuda:1")
    assert alike([x.to("cuda:0") for x in found], wanted)
    with pytest.raises(ValueError, match="device"):
        nt.attention(q, there[1], v)
