"""What `numflash.jax` refuses, when a call is traced: before anything runs."""

import os
import re
import subprocess
import sys

import pytest

jax = pytest.importorskip("jax", reason='needs JAX: pip install "numflash[jax]"')

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import numflash  # noqa: E402
from numflash.frontends.jax import ffi  # noqa: E402
from numflash.frontends.jax.calls import TARGET  # noqa: E402
from numflash.jax import attention, dot_product_attention  # noqa: E402
from tests.support.jax_cases import qkv  # noqa: E402

Q, K, V = qkv(1, 16, 2, 1, 8)
BAD = {
    "integers": (
        lambda: attention(*(x.astype(jnp.int32) for x in (Q, K, V))),
        TypeError,
        "dtypes float16, bfloat16, float32, got int32",
    ),
    "dtypes": (
        lambda: attention(Q, K.astype("bfloat16"), V),
        TypeError,
        "k must have the dtype of q, float32, got bfloat16",
    ),
    "no array": (
        lambda: attention(Q, [1.0], V),
        TypeError,
        "k must be an array of JAX's or NumPy's, got list",
    ),
    "axes": (
        lambda: attention(Q, K[0], V),
        ValueError,
        "k must have as many dimensions as q, 4, got 3",
    ),
    "heads": (lambda: attention(K, Q, Q), ValueError, "heads of q must be a positive multiple"),
    "head_dim": (
        lambda: attention(*[jnp.zeros((1, 16, 1, 300))] * 3),
        numflash.UnsupportedError,
        "at most 256, got 300",
    ),
    "option": (
        lambda: attention(Q, K, V, is_causal=True),
        TypeError,
        "does not take: is_causal; it takes",
    ),
    "stream": (lambda: attention(Q, K, V, stream=0), TypeError, "does not take: stream"),
    "causal": (
        lambda: attention(Q, K, V, causal=1),
        TypeError,
        "causal must be True or False, got 1",
    ),
    "return_lse": (
        lambda: attention(Q, K, V, return_lse=1),
        TypeError,
        "return_lse must be True or False, got 1",
    ),
    "window": (
        lambda: attention(Q, K, V, window_size=(-2, 0)),
        ValueError,
        "window_size must be a pair",
    ),
    "bias": (lambda: attention(Q, K, V, bias=jnp.zeros((3, 1, 1))), ValueError, "bias"),
    "mask": (
        lambda: dot_product_attention(Q, K, V, mask=jnp.zeros((16, 16))),
        TypeError,
        "mask must be boolean, got float32",
    ),
    "value": (
        lambda: dot_product_attention(Q, K, V[..., :4]),
        ValueError,
        "value must have the shape of key, (1, 16, 1, 8), got (1, 16, 1, 4)",
    ),
    "two axes": (
        lambda: dot_product_attention(Q[0, 0], K, V),
        ValueError,
        "query must have three or four axes",
    ),
    "implementation": (
        lambda: dot_product_attention(Q, K, V, implementation="flash"),
        ValueError,
        "must be one of numflash, xla, cudnn, got 'flash'",
    ),
    "local window": (
        lambda: dot_product_attention(Q, K, V, local_window_size=-1),
        ValueError,
        "must be (left, right), 0 or more, got -1",
    ),
    "local window's type": (
        lambda: dot_product_attention(Q, K, V, local_window_size="3"),
        TypeError,
        "local_window_size must be a number or two",
    ),
    "lengths": (
        lambda: dot_product_attention(Q, K, V, key_value_seq_lengths=jnp.array([3.0])),
        TypeError,
        "key_value_seq_lengths must be int32, got float32",
    ),
    "query's lengths": (
        lambda: dot_product_attention(Q, K, V, query_seq_lengths=jnp.ones(3, "int32")),
        ValueError,
        "query_seq_lengths must",
    ),
    "scale": (
        lambda: dot_product_attention(Q, K, V, scale="1"),
        TypeError,
        "scale must be a real number, got",
    ),
    "is_causal": (
        lambda: dot_product_attention(Q, K, V, is_causal=1),
        TypeError,
        "is_causal must be True or False, got 1",
    ),
    "heads of query": (
        lambda: dot_product_attention(K, Q, Q),
        ValueError,
        "heads of query must be a positive multiple",
    ),
    "no array of query": (
        lambda: dot_product_attention([1.0], Q, Q),
        TypeError,
        "query must be an array of JAX's or NumPy's, got list",
    ),
    "a key as a seed": (
        lambda: attention(Q, K, V, dropout_p=0.5, seed=jax.random.key(0)),
        TypeError,
        "seed",
    ),
    "no seed": (lambda: attention(Q, K, V, dropout_p=0.5), ValueError, "dropout_p needs a seed"),
    "an if": (
        lambda: attention(Q, K, V, mask_mod=lambda b, h, i, j: [i] if i else j),
        TypeError,
        "mask_mod",
    ),
}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_a_wrong_call_is_refused_when_it_is_traced(launched, name, jitted):
    call, kind, words = BAD[name]
    with pytest.raises(kind, match=re.escape(words)):
        (jax.jit(call) if jitted else call)()
    assert launched == []


def test_float64_is_refused():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        q = jnp.zeros((1, 16, 1, 8), jnp.float64)
        with pytest.raises(TypeError, match="got float64"):
            attention(q, q, q)


@pytest.mark.parametrize("option", ["softmax_scale", "causal", "softcap"])
def test_a_traced_number_is_refused(option):
    with pytest.raises(TypeError, match=f"{option} must be known when the call is traced"):
        jax.jit(lambda x: attention(Q, K, V, **{option: x}))(1.0)


@pytest.mark.parametrize("option", ["scale", "is_causal"])
def test_a_traced_number_is_refused_by_its_own_name(option):
    with pytest.raises(TypeError, match=f"^{option} must be known when the call is traced"):
        jax.jit(lambda x: dot_product_attention(Q, K, V, **{option: x}))(1.0)


def test_a_traced_number_within_a_pair_is_refused_and_an_arrays_number_is_taken():
    with pytest.raises(TypeError, match="window_size must be known when the call is traced"):
        jax.jit(lambda x: attention(Q, K, V, window_size=(x, 0)))(1)
    narrow = attention(Q, K, V, window_size=(np.int64(2), jnp.int32(0)))
    assert (narrow == attention(Q, K, V, window_size=(2, 0))).all()
    with pytest.raises(TypeError, match="softmax_scale must be a real number"):
        attention(Q, K, V, softmax_scale=jnp.ones(2))


def test_mixed_devices_are_refused():
    there = jax.device_put(K, jax.devices()[1])
    with pytest.raises(ValueError, match="incompatible devices"):
        attention(jax.device_put(Q, jax.devices()[0]), there, there)


def test_a_tracer_in_numflash_itself_is_told_of_this_front_end():
    with pytest.raises(TypeError, match=r"numflash\.jax"):
        jax.jit(lambda q: numflash.attention(q, q, q))(Q)


def test_an_error_at_run_time_is_xlas():
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(Q.shape, Q.dtype))
    with pytest.raises(Exception, match="numflash: JSONDecodeError"):
        jax.block_until_ready(call(Q, call="{"))
    with pytest.raises(Exception, match="one attribute, a string"):
        jax.block_until_ready(call(Q, call=np.int64(3)))
    with pytest.raises(Exception, match="one attribute, a string"):
        jax.block_until_ready(call(Q))


def run_python(program: str, **environment) -> str:
    """The last line that a program of its own prints."""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def test_without_the_simulator_and_without_a_gpu_it_says_what_is_missing():
    said = run_python(
        "import jax, numflash.jax\n"
        "x = jax.numpy.zeros((1, 16, 1, 8))\n"
        "try: numflash.jax.attention(x, x, x)\n"
        "except numflash.UnsupportedError as error: print(error)",
        NUMBA_ENABLE_CUDASIM="0",
        JAX_PLATFORMS="cpu",
    )
    assert "needs a CUDA device that JAX sees" in said and "NUMBA_ENABLE_CUDASIM=1" in said


@pytest.mark.parametrize(
    "before, words",
    [
        (
            "import sys; sys.modules['jax'] = None",
            'numflash.jax needs JAX: pip install "numflash[jax]"',
        ),
        (
            "import jax; jax.__version_info__ = (0, 4, 38); jax.__version__ = '0.4.38'",
            "numflash.jax needs jax 0.5.0 or newer, got 0.4.38",
        ),
    ],
)
def test_a_jax_that_is_missing_or_too_old_is_named_at_import(before, words):
    program = f"{before}\ntry: import numflash.jax\nexcept ImportError as error: print(error)"
    assert run_python(program) == words


def test_another_interface_of_xlas_is_named_at_import():
    assert ffi.version_of("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 7") == (0, 7)
    for header in ("", "#define XLA_FFI_API_MAJOR 1\n#define XLA_FFI_API_MINOR 0"):
        with pytest.raises(ImportError, match="needs another jax or numflash"):
            ffi.version_of(header)


@pytest.mark.parametrize("held", [True, False], ids=["held", "dropped"])
def test_a_process_that_ends_while_xla_computes(held):
    """XLA's threads are in the simulator then; without waiting the process hangs, or crashes."""
    said = run_python(
        "import jax, numflash.jax\n"
        "x = jax.random.normal(jax.random.key(0), (1, 32, 2, 16))\n"
        "step = jax.jit(jax.grad(lambda x: numflash.jax.attention(x, x, x).sum()))\n"
        f"x = step(step(x))\nprint('begun')\n{'' if held else 'del x'}"
    )
    assert said == "begun"


def test_importing_it_starts_no_backend():
    said = run_python(
        "import numflash.jax, jax._src.xla_bridge as bridge\n"
        "print(bridge.backends_are_initialized())"
    )
    assert said == "False"
