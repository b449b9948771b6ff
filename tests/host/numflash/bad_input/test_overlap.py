"""Results may not share an element with an input; inputs may be views of one buffer."""

import pytest

import numflash
from tests.support.bad_calls import FORWARD, A, broadcast, refused

# Overlap


def packed(machine, n: int):
    """n arrays of one shape, interleaved in one buffer."""
    whole = machine.array(A((2, 9, n, 4, 16)))
    return [whole[:, :, i] for i in range(n)]


def test_out_may_interleave_with_the_inputs(machine):
    q, k, v, out = packed(machine, 4)
    for _ in range(2):
        assert numflash.attention(q, k, v, out=out) is out
    assert len(machine.launched) == 2


@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_out_must_not_be_an_input(machine, name, warm):
    q, k, v, out = packed(machine, 4)
    if warm:
        numflash.attention(q, k, v, out=out)
    arrays = {"q": q, "k": k, "v": v}
    refused(
        machine,
        numflash.attention,
        {**arrays, "out": arrays[name]},
        ValueError,
        [f"out must not overlap {name}"],
    )


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", "qkv")
def test_out_must_not_share_a_single_element_with_an_input(machine, name, warm):
    whole = machine.array(A((100, 16)))
    arrays = {n: machine.array(A((20, 16))) for n in "qkv"}
    arrays[name] = whole[:20]
    apart, touching = whole[20:40], whole[19:39]
    if warm:
        numflash.attention(**arrays, out=apart)
    refused(
        machine,
        numflash.attention,
        {**arrays, "out": touching},
        ValueError,
        [f"out must not overlap {name}"],
    )
    numflash.attention(**arrays, out=apart)
    assert len(machine.launched) == 1


def test_out_must_not_share_columns_with_an_input(machine):
    rows = machine.array(A((9, 64)))
    q, k = rows[:, :16], rows[:, 16:32]
    v, out = rows[:, 32:40], rows[:, 40:48]
    numflash.attention(q, k, v, out=out)
    overlapping = {"q": q, "k": k, "v": v, "out": rows[:, 39:47]}
    refused(machine, numflash.attention, overlapping, ValueError, ["out must not overlap v"])


def test_out_must_not_be_the_slopes(machine):
    whole = machine.array(A((9, 4, 16), "float32"))
    arrays = {"q": whole, "k": machine.array(A((9, 4, 16), "float32"))}
    arrays |= {"v": arrays["k"], "alibi_slopes": whole[0, :, 0], "out": whole}
    arrays["q"] = arrays["k"]
    refused(machine, numflash.attention, arrays, ValueError, ["out must not overlap alibi_slopes"])


def test_out_must_have_room_for_each_element(machine):
    out = machine.array(A((2, 9, 1, 24)))
    spread = broadcast(out, (2, 9, 4, 24))
    words = ["out must not be a broadcast view", "(216, 24, 0, 1)"]
    refused(machine, numflash.attention, {**FORWARD, "out": spread}, ValueError, words)


def test_an_input_may_be_a_broadcast_view(machine):
    k = broadcast(machine.array(A((2, 1, 1, 16))), (2, 11, 2, 16))
    machine.call(numflash.attention, **{**FORWARD, "k": k})
    assert machine.launched
