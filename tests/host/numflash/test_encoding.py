"""Options as a text and arrays, and back (`numflash.frontends.encoding`)."""

import json

import numpy as np
import pytest

from numflash.frontends.encoding import decode, encode, names_of
from numflash.functions.written import WrittenFunction
from numflash.problem.block_masks import Blocks, ListedBlocks
from numflash.problem.fp8 import Fp8Recipe
from numflash.problem.options import AttentionOptions
from numflash.runtime.arrays import metadata

GATE, PLACES, LISTS = np.ones(4, "f4"), np.arange(8, dtype="i4"), [np.zeros(1, "i4")] * 4
BLOCKS = Blocks((16, 32), 2, 1, 1, 1)


def gated(score, b, h, i, j, gate, factor):
    return score * gate[h] * factor


def before(b, h, i, j, places):
    return places[j] <= i


GIVEN = {
    "nothing": {},
    "words and numbers": {"causal": True, "window_size": (3, -1), "softcap": 2.0, "shift": -4},
    "arrays": {"bias": np.ones((2, 2), "f4"), "sinks": GATE, "seqlens_k": PLACES, "seed": 5},
    "a function": {"score_mod": gated, "aux": (GATE, 2.5)},
    "blocks": {"block_mask": ListedBlocks(BLOCKS, (20, 30), *LISTS, before, (PLACES,), True)},
    "8 bits": {"precision": "fp8", "fp8": Fp8Recipe()},
    "a config for each family": {"config": {"forward": "sm80-m64n64w4s1"}},
}


@pytest.mark.parametrize("case", GIVEN)
def test_options_come_back(case):
    given = AttentionOptions(**GIVEN[case])
    arrays, text = encode(given, metadata)
    assert names_of(text) == tuple(arrays)
    found = decode(text, arrays.values())
    assert {n: id(x) for n, x in found.arrays().items()} == {n: id(x) for n, x in arrays.items()}
    for name, value in GIVEN[case].items():
        if name in ("score_mod", "block_mask"):
            continue
        same = getattr(found, name)
        assert same is value if isinstance(value, np.ndarray) else same == value
    # What was a function is its text: encoded again it is the same.
    assert encode(found, metadata).text == text
    if case == "blocks":
        mask = found.block_mask
        assert (mask.blocks, mask.seqlens, mask.is_of_function) == (BLOCKS, (20, 30), True)
        assert isinstance(mask.mask_mod, WrittenFunction) and mask.aux[0] is PLACES


BAD = {
    "no JSON": "causal",
    "a list": "[]",
    "an option that is none": '{"arrays":[],"aux":[],"x":1}',
    "a value that no call has": '{"arrays":[],"aux":[],"causal":2}',
    "an array of aux that is not there": '{"arrays":[],"aux":[null]}',
    "blocks without lists": json.dumps(
        {
            "arrays": [],
            "aux": [],
            "block_mask": {
                "blocks": [[16, 16], 1, 1, 1, 1],
                "seqlens": None,
                "aux": [],
                "is_of_function": False,
            },
        }
    ),
    "a program that is none": '{"arrays":[],"aux":[],"program":"1;keep=__import__(os)"}',
}


@pytest.mark.parametrize("case", BAD)
def test_other_texts_are_refused(case):
    with pytest.raises(ValueError, match="a call's options cannot be"):
        decode(BAD[case], [])


def test_arrays_are_as_many_as_their_names():
    _, text = encode(AttentionOptions(bias=np.ones((2, 2), "f4")), metadata)
    with pytest.raises(ValueError):
        decode(text, [])
