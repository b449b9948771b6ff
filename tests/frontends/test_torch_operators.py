"""Where something traces, a graph holds one operator: `torch.compile`, export, `make_fx`."""

import subprocess
import sys
from functools import partial

import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "numflash[torch]"')

from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

import numflash  # noqa: E402
import numflash.torch as nt  # noqa: E402
from numflash import UnsupportedError  # noqa: E402
from numflash.frontends.torch import operators, traced  # noqa: E402
from tests.support.covering import ALL  # noqa: E402

SHAPE = 1, 9, 2, 8
BACKWARD = ["delta", "backward-dkdv", "backward-dq"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def operands(n=3, shape=SHAPE, dtype=torch.float32, grad=True):
    return [torch.randn(shape, dtype=dtype).requires_grad_(grad) for _ in range(n)]


def text_of(**options):
    """The options' text, as graphs have it."""
    return traced.tensors_and_text("attention", options)[1]


def test_opcheck():
    """Schema, autograd registration, fakes, and a whole trace with static and dynamic shapes."""
    q, k, v = operands(shape=(1, 4, 1, 8))
    bias = torch.randn(1, 1, 4, 4, requires_grad=True)
    slopes = torch.tensor([0.5], requires_grad=True)
    text = text_of(bias=bias.detach(), alibi_slopes=slopes.detach(), causal=True)
    torch.library.opcheck(operators.ATTENTION, (q, k, v, [slopes, bias], text))
    out, lse = operators.ATTENTION(q, k, v, [slopes, bias], text)
    given = [x.detach() for x in (torch.randn_like(out), q, k, v, out, lse, torch.randn_like(lse))]
    arrays = [slopes.detach(), bias.detach()]
    torch.library.opcheck(operators.BACKWARD, (*given, arrays, text, "q v bias alibi_slopes"))


@pytest.mark.skipif(not ALL, reason="NUMFLASH_TEST_ALL=1 checks the other layout, too")
def test_opcheck_of_the_other_layout():
    q, k, v = operands(shape=(1, 2, 9, 8))
    text = text_of(layout="bhsd")
    torch.library.opcheck(operators.ATTENTION, (q, k, v, [], text))
    out, lse = operators.ATTENTION(q, k, v, [], text)
    given = [x.detach() for x in (torch.randn_like(out), q, k, v, out, lse, torch.randn_like(lse))]
    torch.library.opcheck(operators.BACKWARD, (*given, [], text, "q k v"))


class Block(torch.nn.Module):
    """Attention as models have it, with a residual."""

    def __init__(self, dim=16, heads=2, **options):
        super().__init__()
        self.heads, self.options = heads, options
        self.qkv, self.out = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in self.qkv(x).chunk(3, -1))
        return x + self.out(nt.attention(q, k, v, causal=True, **self.options).flatten(-2))


# Inductor writes and compiles C++, which takes a minute of the first test.
BACKENDS = ["aot_eager", *(["inductor"] if ALL else [])]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend, dynamic, launched):
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=dynamic)
    for tokens in (9, 7) if dynamic else (9,):
        x = torch.randn(1, tokens, 16)
        block.zero_grad()
        wanted = block(x)
        wanted.square().sum().backward()
        gradients = [p.grad for p in block.parameters()]
        block.zero_grad()
        launched.clear()
        found = compiled(x)
        found.square().sum().backward()
        assert launched.take() == ["forward", *BACKWARD]
        torch.testing.assert_close(found, wanted)
        for p, gradient in zip(block.parameters(), gradients, strict=True):
            torch.testing.assert_close(p.grad, gradient)


def compiled(call, **options):
    return torch.compile(call, fullgraph=True, backend="aot_eager", **options)


def test_options_that_are_tensors_functions_and_block_masks():
    q, k, v = operands(shape=(1, 16, 2, 8), grad=False)
    table, ends = torch.randn(2, 16), torch.tensor([0, 5, 16], dtype=torch.int32)
    mask = numflash.create_block_mask(
        lambda b, h, i, j: i >= j, 1, 1, 16, 16, block_size=16, like=q
    )
    cases = {
        "numbers": {"window_size": (4, None), "softcap": 3.0, "softmax_scale": 0.3, "shift": 1},
        "arrays": {"bias": torch.randn(16, 16), "sinks": torch.zeros(2), "mask": q[0, :, 0] > -9},
        "lengths": {"seqlens_k": torch.tensor([9], dtype=torch.int32)},
        "a seed": {"dropout_p": 0.5, "seed": 7},
        "a table": {"score_mod": lambda s, b, h, i, j, t, n: s + n * t[h, i], "aux": (table, 2)},
        "sizes": {
            "mask_mod": lambda b, h, i, j, t: t[h, (i + j) % t.shape[1]] > 0,
            "aux": (table,),
        },
        "branches": {"mask_mod": lambda b, h, i, j: True if i >= j else j < 3},
        "blocks": {"block_mask": mask},
        "kernels": {"config": {"forward": "m8n16w2"}, "layout": "bshd", "out_dtype": None},
    }
    cases["arrays"]["mask"] = torch.rand(16, 16) > 0.2
    for name, options in cases.items():
        torch._dynamo.reset()
        call = partial(nt.attention, **options)
        found = torch.compile(call, fullgraph=True, backend="eager")(q, k, v)
        wanted = nt.attention(q, k, v, **options)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, msg=name)

    def packed(q, k, v):
        return nt.attention_varlen(q[0], k[0], v[0], ends, ends, return_lse=True, causal=True)

    torch.testing.assert_close(compiled(packed)(q, k, v), packed(q, k, v), rtol=0, atol=0)


REACH = 2


def within(reach):
    return lambda b, h, i, j: abs(i - j) <= reach


def test_numbers_that_functions_see_are_guarded(monkeypatch):
    """Another number in a closure or a global is another graph, the same number is not."""
    q, k, v = operands(grad=False)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    call = torch.compile(
        lambda mask_mod: nt.attention(q, k, v, mask_mod=mask_mod), backend=backend, fullgraph=True
    )
    for reach, count in ((1, 1), (1, 1), (3, 2), (1, 2)):
        wanted = nt.attention(q, k, v, window_size=(reach, reach))
        torch.testing.assert_close(call(within(reach)), wanted, rtol=0, atol=0)
        assert len(graphs) == count
    for reach in (2, 5):
        monkeypatch.setitem(globals(), "REACH", reach)
        wanted = nt.attention(q, k, v, window_size=(reach, reach))
        found = call(lambda b, h, i, j: abs(i - j) <= REACH)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_function_made_inside_of_what_is_compiled():
    q, k, v = operands(grad=False)

    class Layer(torch.nn.Module):
        def __init__(self, reach):
            super().__init__()
            self.reach = reach

        def forward(self, q, k, v):
            reach = self.reach
            return nt.attention(q, k, v, mask_mod=lambda b, h, i, j: abs(i - j) <= reach)

    for reach in (1, 4):
        wanted = nt.attention(q, k, v, window_size=(reach, reach))
        torch.testing.assert_close(compiled(Layer(reach))(q, k, v), wanted, rtol=0, atol=0)


def nodes_of(graph):
    return [
        each.target
        for each in graph.nodes
        if each.target in (operators.ATTENTION, operators.BACKWARD)
    ]


STRICT = (False, True) if ALL else (True,)


def test_export_loads_in_another_process(tmp_path):
    block, x = Block(score_mod=lambda s, b, h, i, j: s - 0.25 * abs(i - j)), torch.randn(1, 9, 16)
    sizes = {"x": {1: torch.export.Dim("tokens", min=2, max=64)}}
    for strict in STRICT:
        program = torch.export.export(block, (x,), dynamic_shapes=sizes, strict=strict)
        assert nodes_of(program.graph) == [operators.ATTENTION]
        torch.export.save(program, tmp_path / f"{strict}.pt2")
    y = torch.randn(1, 7, 16)
    torch.save((y, block(y)), tmp_path / "case.pt")
    code = (
        "import sys, torch\n"
        "folder = sys.argv[1]\n"
        "try:\n"
        "    torch.export.load(folder + f'/{sys.argv[2]}.pt2')\n"
        "except Exception as error:\n"
        "    assert 'deserializing the saved file' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('a program of numflash was loaded without numflash')\n"
        "import numflash.torch\n"
        "y, wanted = torch.load(folder + '/case.pt')\n"
        "for strict in sys.argv[2:]:\n"
        "    found = torch.export.load(folder + f'/{strict}.pt2').module()(y)\n"
        "    torch.testing.assert_close(found, wanted)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), *map(str, STRICT)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    # PyTorch's words for a program that is loaded before numflash.torch is imported.
    assert "resolve torch.ops.numflash.attention.default to an operator" in done.stderr
    assert "Please import the custom op" in done.stderr


def test_importing_it_imports_no_compiler():
    """Dynamo comes when something is compiled."""
    code = (
        "import sys, torch, numflash.torch, numflash.flash_attn\n"
        "given = torch.randn(1, 2, 4, 8, requires_grad=True)\n"
        "numflash.torch.scaled_dot_product_attention(given, given, given).sum().backward()\n"
        "print([x for x in ('torch._dynamo', 'torch._inductor', 'sympy') if x in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_make_fx():
    operands_ = operands(grad=False)

    def step(q, k, v):
        return torch.autograd.grad(nt.attention(q, k, v).sum(), (q, k, v))

    given = [x.requires_grad_() for x in operands_]
    for mode in ("real", "symbolic") if ALL else ("symbolic",):
        graph = make_fx(step, tracing_mode=mode)(*given)
        assert nodes_of(graph.graph) == [operators.ATTENTION, operators.BACKWARD]
        torch.testing.assert_close(graph(*given), step(*given), rtol=0, atol=0)


def test_fake_tensors_are_as_the_real_ones():
    """Shapes, strides and dtypes of all results, in each layout and number of axes."""
    bias = torch.randn(1, 2, 9, 9, requires_grad=True)
    cases = [
        ((2, 9, 2, 8), {}),
        ((2, 2, 9, 8), {"layout": "bhsd", "bias": bias}),
        ((9, 2, 8), {"sinks": torch.zeros(2, requires_grad=True)}),
        ((2, 9, 8), {"layout": "bhsd"}),
        ((9, 8), {"alibi_slopes": torch.ones(1, requires_grad=True)}),
        ((2, 9, 2, 8), {"out_dtype": "float32"}),
    ]
    for shape, options in cases:
        real = [torch.randn(shape).half().requires_grad_() for _ in range(3)]
        real = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in real]
        learned = [x for x in options.values() if isinstance(x, torch.Tensor)]

        def results(q, k, v, options=options, learned=learned):
            out, lse = nt.attention(q, k, v, return_lse=True, **options)
            total = out.float().sum() + lse.sum()
            return out, lse, *torch.autograd.grad(total, (q, k, v, *learned))

        wanted = results(*real)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fakes = [mode.from_tensor(x) for x in real]
            options = {
                n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
                for n, x in options.items()
            }
            learned = [x for x in options.values() if isinstance(x, torch.Tensor)]
            found = results(*fakes, options=options, learned=learned)
        for one, other in zip(found, wanted, strict=True):
            assert (one.shape, one.stride(), one.dtype) == (
                other.shape,
                other.stride(),
                other.dtype,
            )
            assert isinstance(one, FakeTensor)


def test_errors_say_what_numflash_says():
    q, k, v = operands(grad=False)
    cases = [
        ("causal must be True or False", lambda q: nt.attention(q, k, v, causal=3)),
        ("unknown options: kausal", lambda q: nt.attention(q, k, v, kausal=True)),
        (
            "a Python `if`",
            lambda q: nt.attention(q, k, v, score_mod=lambda s, *_: s if s > 0 else -s),
        ),
        (
            "must be float16, bfloat16 or float32",
            lambda q: nt.attention(q.double(), q.double(), q.double()),
        ),
        ("same number of axes", lambda q: nt.attention(q, k, v[0])),
    ]
    for message, call in cases:
        torch._dynamo.reset()
        with pytest.raises(Exception, match=message):
            compiled(call)(q)


def test_what_cannot_be_in_a_graph():
    q, k, v = operands(grad=False)
    for name, given in (("out", torch.empty_like(q)), ("check_lengths", True)):
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            pytest.raises(UnsupportedError, match=name),
        ):
            nt.attention(q, k, v, **{name: given})
