"""The emitted functions of programs, run by a tiny kernel, against NumPy."""

import ml_dtypes
import numpy as np

from numflash.functions.nodes import LEAF, apply, const, load, number
from numflash.functions.program import Array, Number, Program
from tests.support.program_kernel import SHAPE, run

S, B, H, I, J = (LEAF[name] for name in "sbhij")
RNG = np.random.default_rng(0)
PLACES = np.ogrid[tuple(slice(n) for n in SHAPE)]


def test_softcap_bias_table_and_documents():
    batch, heads, rows, columns = SHAPE
    cap = number(0, "f")
    biased = apply("add", S, load(1, "f", [B, const(0), I, J]))
    bent = apply("mul", cap, apply("tanh", apply("div", biased, cap)))
    table = load(3, "f", [H, apply("mod", apply("sub", J, I), const(7))])
    program = Program(
        (Number("f32"), Array("float16", 4), Array("int32", 1), Array("bfloat16", 2, True)),
        apply("add", bent, table),
        apply("and", apply("le", J, I), apply("eq", load(2, "i", [I]), load(2, "i", [J]))),
    )
    bias = RNG.standard_normal((batch, 1, rows, columns)).astype(np.float16)
    documents = RNG.integers(0, 3, max(rows, columns)).astype(np.int32)
    learned = RNG.standard_normal((heads, 7)).astype(ml_dtypes.bfloat16)
    x = (RNG.standard_normal(SHAPE) * 2).astype(np.float32)
    scores, slopes, kept = run(program, (5.0, bias, documents, learned), x)
    _, h, i, j = PLACES
    inner = np.tanh((x + bias.astype("f8")) / 5)
    expected = 5 * inner + learned.astype("f8")[h, (j - i) % 7]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(slopes, 1 - inner**2, rtol=1e-5, atol=1e-5)
    expected = (j <= i) & (documents[i] == documents[j])
    np.testing.assert_array_equal(kept, np.broadcast_to(expected, SHAPE))
