"""Programs and their text: equal meanings, round trips, and texts that are refused."""

import random

import numpy as np
import pytest

from numflash import masks
from numflash import math as nm
from numflash.functions.arrays import Array, Number
from numflash.functions.nodes import (
    COMMUTE,
    FUNCTIONS,
    LEAF,
    MAX_NODES,
    SIGNATURES,
    apply,
    const,
    load,
    make,
    number,
    order,
)
from numflash.functions.program import Program
from numflash.functions.trace import trace
from tests.support.program_values import metadata, value
from tests.support.score_functions import SCORES

S = LEAF["s"]


def text(function, aux=()):
    return trace(function, aux=aux).program.text


def by(cap):
    return lambda s, b, h, q, k: cap * nm.tanh(s / cap)


EQUAL = {
    "the same closure": (by(20.0), by(20.0)),
    "renamed": (by(20.0), lambda x, p, r, u, w: 20.0 * nm.tanh(x / 20.0)),
    "commuted": (by(20.0), lambda s, b, h, q, k: nm.tanh(s / 20) * 20),
    "a division by a constant": (by(20.0), lambda s, b, h, q, k: 20 * nm.tanh(s * 0.05)),
    "another order of statements": (
        lambda s, b, h, q, k: (s * 2.0) + nm.exp(s),
        lambda s, b, h, q, k: nm.exp(s) + (s * 2.0),
    ),
    "what changes nothing": (lambda s, b, h, q, k: s, lambda s, b, h, q, k: (s + 0) * 1 / 1.0),
    "NumPy's functions": (by(20.0), lambda s, b, h, q, k: 20.0 * np.tanh(np.divide(s, 20))),
    "greater or equal": (
        lambda s, b, h, q, k: nm.where(q >= k, s, 0),
        lambda s, b, h, q, k: nm.where(k <= q, s, 0.0),
    ),
    "not, and the other side": (
        lambda s, b, h, q, k: nm.where(~(q >= k), 0.0, s),
        lambda s, b, h, q, k: nm.where(q < k, 0.0, s),
    ),
    "a square": (lambda s, b, h, q, k: s**2, lambda s, b, h, q, k: s * s),
}
DIFFERENT = {
    "another closure": (by(20.0), by(30.0)),
    "minus": (lambda s, b, h, q, k: s - q, lambda s, b, h, q, k: s - k),
    "not commuted": (lambda s, b, h, q, k: 1 / (s + 2), lambda s, b, h, q, k: (s + 2) / 1),
    "a whole number": (lambda s, b, h, q, k: s * (q // 2), lambda s, b, h, q, k: s * (q / 2)),
    "which is taken at a tie": (
        lambda s, b, h, q, k: nm.minimum(s, 2 * s),
        lambda s, b, h, q, k: nm.minimum(2 * s, s),
    ),
    "a NaN": (
        lambda s, b, h, q, k: nm.where(~(s < 0), s, 0.0),
        lambda s, b, h, q, k: nm.where(s >= 0, s, 0.0),
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_what_means_the_same_has_one_text(name):
    one, other = EQUAL[name]
    assert text(one) == text(other)


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_means_something_else_has_another_text(name):
    one, other = DIFFERENT[name]
    assert text(one) != text(other)


def test_the_texts_are_as_documented():
    assert trace().program.text == ""
    assert trace(lambda s, b, h, q, k: s, lambda b, h, q, k: True).program.text == ""
    assert trace(None, masks.causal).program.text == "1;;keep=le(j,i)"
    assert text(by(20.0)) == "1;;score=mul(tanh(mul(s,0.05)),20.0)"
    slopes = metadata(np.zeros(8, np.float32))
    assert text(masks.alibi, (slopes,)) == (
        "1;float32[1u];score=sub(s,mul(float(abs(sub(i,j))),aux0[h]))"
    )
    # Twice the same: a part of its own.
    squares = text(lambda s, b, h, q, k: nm.exp(s + 1) * (s + 1) - np.inf)
    assert squares.startswith("1;;t0=add(s,1.0);score=sub(mul(") and squares.endswith(",inf)")


@pytest.mark.parametrize("name", SCORES)
def test_a_text_can_be_read_again(name):
    function, aux = SCORES[name]
    program = trace(function, masks.causal, tuple(map(metadata, aux))).program
    again = Program.parse(program.text)
    assert again == program and again.text == program.text
    assert again.slope == program.slope and again.fields == program.fields


def random_program(seed: int, size: int = 30) -> Program:
    """A program of random operations on all kinds of leaves, simplified as they are made."""
    rng = random.Random(seed)
    aux = (
        Array("float16", 2),
        Array("int32", 1, True),
        Array("bool", 1),
        Number("f32"),
        Number("i32"),
        Array("uint8", 0),
    )
    nodes = [*LEAF.values(), const(2), const(0.5), const(3), number(3, "f"), number(4, "i")]
    nodes += [load(1, "i", [LEAF["j"]]), load(2, "b", [LEAF["i"]]), load(5, "i", [])]
    nodes += [load(0, "f", [LEAF["h"], LEAF["j"]])]
    while len(nodes) < size:
        op = rng.choice(sorted(SIGNATURES))
        count = len(next(iter(SIGNATURES[op])))
        if op in ("shl", "shr"):
            args = [rng.choice([n for n in nodes if n.type == "i"]), const(rng.randrange(4))]
        elif op in ("float", "int"):
            args = [rng.choice([n for n in nodes if n.type == ("i" if op == "float" else "f")])]
        else:
            args = [rng.choice(nodes[-18:]) for _ in range(count)]
        bits = op in ("and", "or", "xor", "not", "floordiv", "mod")
        if bits and any(a.type == "f" for a in args):
            continue
        try:
            nodes.append(apply(op, *args))
        except ValueError:  # a constant of more than 32 bits
            continue
    score = next(n for n in reversed(nodes) if n.type == "f")
    index = next((n for n in reversed(nodes) if n.type == "i" and n.args), LEAF["i"])
    score = apply("add", score, load(0, "f", [LEAF["h"], index]))
    keep = next((n for n in reversed(nodes) if n.type == "b" and "s" not in n.uses), None)
    return Program(aux, score, keep)


@pytest.mark.parametrize("seed", range(60))
def test_a_random_program_can_be_read_again(seed):
    program = random_program(seed)
    again = Program.parse(program.text)
    assert again.text == program.text and again == program


@pytest.mark.parametrize("seed", range(20))
def test_what_a_random_program_computes_survives_its_simplification(seed):
    """Against the same operations made as they are."""
    rng = np.random.default_rng(seed)
    choose = random.Random(seed)
    leaves = {name: rng.integers(0, 9, 50) for name in "bhij"} | {"s": rng.normal(0, 2, 50)}
    plain, simple = list(LEAF.values()), list(LEAF.values())
    for constant in (0, 1, -1, 2):
        for type in "fi":
            plain.append(const(constant, type))
            simple.append(const(constant, type))
    ops = [op for op in SIGNATURES if op not in ("shl", "shr", "pow", "floordiv", "mod")]
    ops = [op for op in ops if op not in FUNCTIONS or op in ("tanh", "floor")]
    for _ in range(60):
        op = choose.choice(ops)
        types = choose.choice(sorted(SIGNATURES[op]))
        places = []
        for wanted in types:
            fitting = [n for n, node in enumerate(plain) if node.type == wanted]
            places.append(choose.choice(fitting) if fitting else None)
        if None in places:
            continue
        try:
            made = apply(op, *(simple[n] for n in places))
        except ValueError:
            continue
        plain.append(make(op, *(plain[n] for n in places)))
        simple.append(made)
    for one, other in zip(plain, simple, strict=True):
        expected, got = (np.broadcast_to(value(x, leaves, ()), 50) for x in (one, other))
        small = np.isfinite(expected.astype("f8")) & (np.abs(expected.astype("f8")) < 2**31)
        np.testing.assert_allclose(
            got.astype("f8")[small], expected.astype("f8")[small], rtol=1e-6, atol=1e-6
        )


def test_operands_that_commute_are_sorted_by_their_meaning():
    nodes = [apply("mul", S, const(float(n))) for n in range(2, 9)]
    for op in COMMUTE & {"add", "mul", "eq"}:
        for a in nodes:
            for b in nodes:
                assert make(op, a, b) == make(op, b, a)
                assert (make("sub", a, b) == make("sub", b, a)) == (a == b)


@pytest.mark.parametrize(
    "wrong, part",
    [
        ("score=s", "must begin like"),
        ("2;;score=exp(s)", "must begin like"),
        ("1;", "must begin like"),
        ("1;;score=import_os()", "no operation"),
        ("1;;score=__import__('os')", "no expression"),
        ("1;;score=exp(s", "no expression"),
        ("1;;score=exp(s))", "no expression"),
        ("1;;score=exp(s,s)", "no operation"),
        ("1;;score=exp(i)", "no operation"),
        ("1;;score=exp (s)", "no expression"),
        ("1;;score=add(s,add)", "no operation"),
        ("1;;score=t0", "no operation"),
        ("1;;t1=exp(s);score=mul(t1,t1)", "no name of a part"),
        ("1;;x=exp(s)", "no name of a part"),
        ("1;;score=exp(s);score=exp(s)", "name and an expression"),
        ("1;;slope=1.0;slope=2.0", "name and an expression"),
        ("1;;score", "name and an expression"),
        ("1;;score=i", "type"),
        ("1;;keep=s", "type"),
        ("1;;keep=lt(s,0.0)", "depend on the score"),
        ("1;;score=aux0", "of 0"),
        ("1;f32;score=mul(aux1,s)", "of 1"),
        ("1;f32;score=mul(aux0[h],s)", "reads aux0"),
        ("1;float32[1];score=mul(aux0,s)", "reads aux0"),
        ("1;float32[1];score=mul(aux0[h,i],s)", "2 indices"),
        ("1;float32[1];score=mul(aux0[s],s)", "must be an integer"),
        ("1;float32[1];score=mul(aux0[-1],s)", "not be negative"),
        ("1;float64[1];score=mul(aux0[h],s)", "no kind"),
        ("1;float32[9];score=s", "up to 8 axes"),
        ("1;float32;score=s", "no kind"),
        ("1;;score=mul(s,99999999999)", "32 bits"),
        ("1;;score=mul(0.05,s)", "canonical"),
        ("1;;score=mul(s,0.050000001)", "canonical"),
        ("1;;t0=exp(s);score=t0", "canonical"),
        ("1;;score=" + "exp(" * 40 + "s" + ")" * 40, "no expression"),
        ("1;;score=s" + " " * 300_000, "characters"),
        ("\n1;;score=exp(s)", "must begin like"),
        ("1;;score=exp(s)\n", "no expression"),
    ],
)
def test_a_text_that_no_program_has_is_refused(wrong, part):
    with pytest.raises(ValueError, match="(?i)" + part):
        Program.parse(wrong)


def test_random_changes_of_a_text_are_read_as_themselves_or_refused():
    rng = random.Random(0)
    letters = "0123456789abcdefghijklmnopqrstuvwxyz_()[],;=.-+ "
    texts = [random_program(seed).text for seed in range(8)]
    read = 0
    for _ in range(2000):
        text = list(rng.choice(texts))
        for _ in range(rng.randrange(1, 3)):
            at = rng.randrange(len(text))
            text[at : at + rng.randrange(2)] = rng.choice(letters)
        changed = "".join(text)
        try:
            assert Program.parse(changed).text == changed
            read += 1
        except ValueError:
            continue
    assert 0 < read < 1900


def test_a_long_chain_is_written_in_parts():
    node = S
    for _ in range(400):
        node = apply("exp", apply("neg", node))
    program = Program((), node)
    assert "t50=" in program.text and Program.parse(program.text) == program
    assert len(list(order([program.slope]))) < 4 * MAX_NODES


def test_a_program_of_too_many_operations_is_refused():
    node = S
    for _ in range(MAX_NODES + 1):
        node = make("exp", node)
    with pytest.raises(ValueError, match="at most 2000 operations, got 2002"):
        Program((), node)


def test_the_fields_are_what_the_functions_read():
    bias = metadata(np.zeros((2, 1, 5, 5), np.float16))
    table = metadata(np.zeros((9, 4), np.float32)[:, ::2])

    def score(s, b, h, q, k, unused, table, factor, count):
        return s * factor + table[k // count, h]

    aux = (metadata(np.zeros(3, np.int32)), table, 0.5, 3)
    program = trace(score, aux=aux, bias=bias).program
    assert dict(program.fields) == {
        "a0": "pointer:float16",
        "a0_s0": "i64",
        "a0_s2": "i64",
        "a2": "pointer:float32",
        "a2_s0": "i64",
        "a2_s1": "i64",
        "a2_n0": "i32",
        "a3": "f32",
        "a4": "i32",
        "row": "i32",
        "column": "i32",
        "first_head": "i32",
    }
    assert program.uses == {"b", "h", "i", "j"}
    assert trace(None, masks.causal).program.uses == {"i", "j"}
    assert trace().program.fields == ()


@pytest.mark.parametrize(
    "arguments, error, part",
    [
        (("float64", 1), TypeError, "float16, bfloat16, float32, int32, int64, uint8, bool"),
        (("float32", 9), ValueError, "up to 8 axes"),
        (("float32", 0, True), ValueError, "no neighbours"),
    ],
)
def test_an_array_that_kernels_cannot_read_is_refused(arguments, error, part):
    with pytest.raises(error, match=part):
        Array(*arguments)


def test_numbers_are_of_two_kinds():
    with pytest.raises(TypeError, match="f32 or i32"):
        Number("f64")


def test_an_array_must_have_an_element_for_each_place():
    def score(s, b, h, q, k, table, flags):
        return s + table[h, k - q] + flags[b, 0, q, k]

    shapes = [(3, 9), (2, 1, 5, 9)]
    arrays = tuple(metadata(np.zeros(shape, np.float32)) for shape in shapes)
    program, names = trace(score, aux=arrays)
    counts = {"b": 2, "h": 3, "i": 5, "j": 9}
    program.check_shapes(names, shapes, counts)
    for place, axis, name, what in (
        ("b", 0, "aux1", "the batch entry"),
        ("h", 0, "aux0", "the query head"),
        ("i", 2, "aux1", "the query's number"),
        ("j", 3, "aux1", "the key's number"),
    ):
        more = counts | {place: counts[place] + 1}
        rule = f"axis {axis} of {name} is indexed by {what} and must have at least {more[place]} e"
        with pytest.raises(ValueError, match=rule):
            program.check_shapes(names, shapes, more)
        program.check_shapes(names, shapes, more | {"j": 0})  # nothing is read
    with pytest.raises(ValueError, match="axis 1 of aux0 is indexed by a computed number"):
        program.check_shapes(names, [(3, 0), (2, 1, 5, 9)], counts)


def test_a_program_and_the_keep_of_another():
    def leaky(s, b, h, q, k, x):
        return s * x[h] if s > 0 else s

    slopes, ids = metadata(np.zeros(3, np.float32)), metadata(np.zeros(9, np.int32))
    slope = trace(leaky, masks.causal, (slopes,), score_mod_grad=lambda *a: a[-1][a[2]]).program
    both = slope.also(trace(None, masks.document, (ids,)).program)
    assert (both.score, both.slope) == (slope.score, slope.slope)
    assert both.text.startswith("1;float32[1u],int32[1u];") and "aux1[" in both.text
    assert Program.parse(both.text) == both
