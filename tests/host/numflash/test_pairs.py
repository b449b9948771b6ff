"""Which arrays are read two neighbours at once: those whose pairs are aligned for sure."""

from dataclasses import replace

import pytest

from numflash.functions.arrays import Array
from numflash.functions.emission import source_of
from numflash.functions.program import Program
from numflash.problem.options import AttentionOptions
from numflash.problem.programs import Extent, program_of
from numflash.runtime.views import ArrayView, fresh

EXTENT = Extent(2, 3, 6, 10, -1)


def view(strides, shape=EXTENT[:4], dtype="float16", pointer=0):
    return ArrayView(pointer, shape, strides, dtype, -1)


def of_keys(score, batch, head, q_idx, kv_idx, table):
    return score + table[head, kv_idx]


def text(extent=EXTENT, score_mod=of_keys, **views):
    """The program of a call with these arrays."""
    given = {name: each for name, each in views.items() if name != "aux0"}
    if "aux0" in views:
        given |= {"score_mod": score_mod, "aux": (views["aux0"],)}
    return program_of(views, AttentionOptions(**given), extent)[0]


PAIRED = {
    "contiguous": view((180, 60, 10, 1)),
    "rows with room behind them": view((300, 96, 12, 1)),
    "one row for all": view((0, 0, 0, 1)),
    "of keys alone": view((10, 7, 3, 1), (2, 1, 1, 10)),
    "backwards along the queries": view((180, 60, -10, 1)),
    "an axis of 1 with an odd stride": view((180, 61, 10, 1), (2, 1, 6, 10)),
    "a later address": view((180, 60, 10, 1), pointer=4096 + 16),
}
NARROW = {
    "rows with an odd stride": view((198, 66, 11, 1)),
    "heads with an odd stride": view((300, 61, 10, 1)),
    "batch entries with an odd stride": view((181, 60, 10, 1)),
    "keys two apart": view((360, 120, 20, 2)),
    "keys of stride 0": view((18, 6, 1, 0)),
    "backwards along the keys": view((180, 60, 10, -1)),
    "transposed": view((180, 60, 1, 6)),
    "an address of 2 bytes": view((180, 60, 10, 1), pointer=4096 + 2),
    "an address of 8 bytes": view((180, 60, 10, 1), pointer=4096 + 8),
}


@pytest.mark.parametrize("name", PAIRED)
def test_aligned_pairs_are_read_at_once(name):
    found = text(bias=PAIRED[name])
    assert found.startswith("1;float16[4p];"), found
    assert "score_of_pair" in source_of(Program.parse(found))


@pytest.mark.parametrize("name", NARROW)
def test_others_are_not_and_nothing_changes_for_them(name):
    found = text(bias=NARROW[name])
    assert "p]" not in found.split(";")[1]
    source = source_of(Program.parse(found))
    assert "pair" not in source


def test_pairs_of_every_dtype():
    for dtype in ("float16", "bfloat16", "float32"):
        assert f"{dtype}[4p]" in text(bias=view((180, 60, 10, 1), dtype=dtype))
    assert "bool[4p]" in text(mask=view((180, 60, 10, 1), dtype="bool"))
    for dtype in ("int32", "uint8"):
        assert f"{dtype}[2p]" in text(aux0=fresh((3, 10), dtype, -1))
    # 16 bytes, of which 8 are of use.
    assert "int64[2u]" in text(aux0=fresh((3, 10), "int64", -1))


@pytest.mark.parametrize(("column", "kind"), [(0, "p"), (4, "p"), (3, "u")])
def test_parts_that_begin_at_an_odd_key_read_one_by_one(column, kind):
    bias = fresh((2, 3, 6, 14), "float16", -1)
    assert f"float16[4{kind}]" in text(EXTENT._replace(origin=(0, column, 0)), bias=bias)


def test_only_arrays_that_are_read_by_key_are_marked():
    bias = view((180, 60, 10, 1))
    assert text(bias=bias, mask=view((180, 60, 11, 1), dtype="bool")).startswith(
        "1;float16[4p],bool[4u];"
    )
    table = fresh((3, 10), "float32", -1)

    def distance(score, batch, head, q_idx, kv_idx, table):
        return score + table[head, abs(q_idx - kv_idx)]

    assert "float32[2u]" in text(aux0=table, score_mod=distance)


def test_the_mark_is_of_neighbours_of_a_known_size():
    with pytest.raises(ValueError, match="float16 cannot be read by pairs"):
        Array("float16", 2, False, True)
    with pytest.raises(ValueError, match="int64 cannot be read by pairs"):
        Array("int64", 2, True, True)
    program = Program.parse("1;float16[1p];score=add(aux0[j],s)")
    assert program.text == "1;float16[1p];score=add(aux0[j],s)"
    assert program.with_pairs(()).text == "1;float16[1u];score=add(aux0[j],s)"
    assert replace(program.aux[0], paired=False).unit


def test_a_read_that_depends_on_the_score_or_the_key_elsewhere_is_none_of_a_pair():
    def diagonal(score, batch, head, q_idx, kv_idx, table):
        return score + table[kv_idx % 2, kv_idx]

    assert "float32[2u]" in text(aux0=fresh((2, 10), "float32", -1), score_mod=diagonal)


def test_the_parts_of_a_program_that_read_pairs_have_a_function_of_them():
    bias, mask = view((180, 60, 10, 1)), view((180, 60, 10, 1), dtype="bool")
    both = source_of(Program.parse(text(bias=bias, mask=mask)))
    assert "score_of_pair" in both and "keep_of_pair" in both
    alone = source_of(Program.parse(text(mask=mask)))
    assert "score_of_pair" not in alone and "keep_of_pair" in alone
    # What is read one by one beside pairs is inside of its array at both keys.
    other = source_of(Program.parse(text(bias=bias, aux0=fresh((3, 10), "int64", -1))))
    assert "i64(j)" in other and "i64(j_right)" in other and "i64(key)" in other
