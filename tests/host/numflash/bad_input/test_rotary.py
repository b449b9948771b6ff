"""Wrong calls of `apply_rotary` and `rotary_tables` are refused, and nothing is launched."""

import numpy as np
import pytest

import numflash
from tests.support.bad_calls import A, broadcast, cases, needs_gpu_mode, refused

X, TABLE = A((2, 9, 4, 16)), A((12, 8), "float32")
RIGHT = {"x": X, "cos": TABLE, "sin": TABLE}
PACKED = {"x": A((9, 4, 16)), "cos": TABLE, "sin": TABLE, "cu_seqlens": A((4,), "int32")}
NAN, INF = float("nan"), float("inf")

BAD = {
    # Types and dtypes
    "x-list": ({"x": [[1.0]]}, TypeError, "x must be", "list"),
    "cos-none": ({"cos": None}, TypeError, "cos must be", "NoneType"),
    "sin-list": ({"sin": [[1.0]]}, TypeError, "sin must be", "list"),
    "x-float64": ({"x": A(X.shape, "float64")}, TypeError, "x must have one of", "float64"),
    "x-int32": ({"x": A(X.shape, "int32")}, TypeError, "x must have one of", "int32"),
    "cos-float64": (
        {"cos": A((12, 8), "float64")},
        TypeError,
        "cos must be float32 or float16, got float64",
    ),
    "cos-of-another-dtype": (
        {"cos": A((12, 8), "bfloat16")},
        TypeError,
        "cos must be float32 or float16, got bfloat16",
    ),
    "cos-narrower-than-x": (
        {"x": A(X.shape, "float32"), "cos": A((12, 8)), "sin": A((12, 8))},
        TypeError,
        "cos must be float32, got float16",
    ),
    "sin-dtype": ({"sin": A((12, 8))}, TypeError, "sin must be float32, got float16"),
    "interleaved-1": ({"interleaved": 1}, TypeError, "interleaved must be True or False", "1"),
    "conjugate-none": ({"conjugate": None}, TypeError, "conjugate must be True or False", "None"),
    "layout-name": ({"layout": "sbhd"}, ValueError, "layout must be one of bshd", "'sbhd'"),
    "layout-list": ({"layout": ["bshd"]}, TypeError, "layout must be a string"),
    "stream-string": ({"stream": "main"}, TypeError, "stream must be a CUDA stream", "'main'"),
    # Rotary dims
    "rotary-dim-18": (
        {"cos": A((12, 9), "float32"), "sin": A((12, 9), "float32")},
        ValueError,
        "cos must have rotary_dim / 2 columns, 1 to 8 for head_dim 16 of x, got 9",
    ),
    "rotary-dim-0": (
        {"cos": A((12, 0), "float32"), "sin": A((12, 0), "float32")},
        ValueError,
        "1 to 8 for head_dim 16 of x, got 0",
    ),
    "rotary-dim-of-odd": (
        {"x": A((2, 9, 4, 15))},
        ValueError,
        "1 to 7 for head_dim 15 of x, got 8",
    ),
    "cos-rank-1": ({"cos": A((12,), "float32")}, ValueError, "cos must have shape", "got (12,)"),
    "cos-rank-3": ({"cos": A((2, 12, 8), "float32")}, ValueError, "got (2, 12, 8)"),
    "sin-columns": (
        {"sin": A((12, 7), "float32")},
        ValueError,
        "sin must have shape (12, 8), got (12, 7)",
    ),
    "sin-rows": ({"sin": A((11, 8), "float32")}, ValueError, "sin must have shape (12, 8)"),
    # x
    "rank-1": ({"x": A((16,))}, ValueError, "x must have 2 dimensions", "got 1"),
    "rank-5": ({"x": A((1, 2, 3, 4, 16))}, ValueError, "x must have 2 dimensions", "got 5"),
    "head-dim-0": ({"x": A((2, 9, 4, 0))}, ValueError, "head_dim of x must be at least 1"),
    "head-dim-258": (
        {"x": A((2, 9, 4, 258))},
        numflash.UnsupportedError,
        "head_dim of x must be at most 256, got 258",
    ),
    # Positions
    "tables-too-short": (
        {"offsets": 4},
        ValueError,
        "offsets must be at least 0 and the 9 tokens of x fit into the 12 positions",
        "got 4",
    ),
    "tables-shorter-than-x": (
        {"x": A((1, 13, 4, 16))},
        ValueError,
        "the 13 tokens of x fit into the 12 positions",
    ),
    "offset-negative": ({"offsets": -1}, ValueError, "offsets must be at least 0", "got -1"),
    "offset-bool": ({"offsets": True}, TypeError, "offsets must be an integer or an int32 array"),
    "offset-float": ({"offsets": 1.5}, TypeError, "offsets must be", "float"),
    "offset-list": ({"offsets": [0, 1]}, TypeError, "offsets must be", "list"),
    "offsets-int64": (
        {"offsets": A((2,), "int64")},
        TypeError,
        "offsets must be int32, got int64",
    ),
    "offsets-rank": ({"offsets": A((2, 1), "int32")}, ValueError, "offsets must have one dimen"),
    "offsets-length": (
        {"offsets": A((3,), "int32")},
        ValueError,
        "offsets must have an element for each of the 2 sequences, got 3",
    ),
    "offsets-spread": (
        {"offsets": A((4,), "int32", np.s_[::2])},
        ValueError,
        "offsets must be contiguous",
    ),
    "cu-seqlens-of-4-dimensions": (
        {"cu_seqlens": A((3,), "int32")},
        ValueError,
        "x must be packed, (tokens, heads, head_dim), with cu_seqlens, got 4 dimensions",
    ),
    # Where to write
    "out-list": ({"out": [0.0]}, TypeError, "out must be", "list"),
    "out-dtype": ({"out": A(X.shape, "float32")}, TypeError, "out must be float16, got float32"),
    "out-shape": ({"out": A((2, 9, 4, 8))}, ValueError, "out must have shape (2, 9, 4, 16)"),
    "out-spread": (
        {"out": A((2, 9, 4, 32), index=np.s_[..., ::2])},
        ValueError,
        "out must have a contiguous last axis",
    ),
    "unknown-option": ({"inplace": True}, TypeError, "inplace"),
}

BAD_PACKED = {
    "offset-beyond": ({"offsets": 13}, ValueError, "offsets must be at least 0", "12 positions"),
    "offset-negative": ({"offsets": -2}, ValueError, "offsets must be at least 0", "got -2"),
    "cu-seqlens-int64": (
        {"cu_seqlens": A((4,), "int64")},
        TypeError,
        "cu_seqlens must be int32, got int64",
    ),
    "cu-seqlens-list": ({"cu_seqlens": [0, 9]}, TypeError, "cu_seqlens must be", "list"),
    "cu-seqlens-rank": ({"cu_seqlens": A((2, 2), "int32")}, ValueError, "must have one dimension"),
    "cu-seqlens-empty": (
        {"cu_seqlens": A((0,), "int32")},
        ValueError,
        "cu_seqlens must have one element more than there are sequences, got 0",
    ),
    "offsets-length": (
        {"offsets": A((4,), "int32")},
        ValueError,
        "offsets must have an element for each of the 3 sequences, got 4",
    ),
}

BAD_DEVICES = {
    "device-cos": ({"cos": A((12, 8), "float32", device=1)}, ValueError, "cos", "of x, 0", "1"),
    "device-sin": ({"sin": A((12, 8), "float32", device=1)}, ValueError, "sin", "of x, 0", "1"),
    "device-offsets": (
        {"offsets": A((2,), "int32", device=1)},
        ValueError,
        "offsets must lie on the device of x, 0, got device 1",
    ),
    "device-out": (
        {"out": A(X.shape, device=1)},
        ValueError,
        "out must lie on the device of x, 0, got device 1",
    ),
    "host-offsets": ({"offsets": np.zeros(2, np.int32)}, TypeError, "offsets", "CUDA device"),
    "host-cos": ({"cos": np.zeros((12, 8), np.float32)}, TypeError, "cos", "CUDA device"),
}


@cases(BAD)
def test_apply_rotary_refuses(machine, changes, error, words):
    refused(machine, numflash.apply_rotary, RIGHT | changes, error, words)


@cases(BAD)
def test_apply_rotary_refuses_also_when_a_right_call_is_ready(machine, changes, error, words):
    machine.call(numflash.apply_rotary, **RIGHT)
    assert len(machine.launched) == 1
    refused(machine, numflash.apply_rotary, RIGHT | changes, error, words)


@cases(BAD_PACKED)
def test_packed_calls_are_refused(machine, changes, error, words):
    machine.call(numflash.apply_rotary, **PACKED)
    assert len(machine.launched) == 1
    refused(machine, numflash.apply_rotary, PACKED | changes, error, words)


@needs_gpu_mode
@cases(BAD_DEVICES)
def test_arrays_elsewhere_are_refused(machine, changes, error, words):
    refused(machine, numflash.apply_rotary, RIGHT | changes, error, words)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_out_may_be_x_and_must_not_overlap_an_input_otherwise(machine, warm):
    whole = machine.array(A((3, 9, 4, 16), "float32"))
    table = machine.array(A((12, 8), "float32"))
    x, apart = whole[:2], machine.array(A((2, 9, 4, 16), "float32"))
    right = {"x": x, "cos": table, "sin": table}
    if warm:
        numflash.apply_rotary(**right, out=apart)
    assert numflash.apply_rotary(**right, out=x) is x
    launched = len(machine.launched)
    both = machine.array(A((2, 18, 4, 16), "float32"))
    overlapping = [
        ("x", right | {"out": whole[1:]}),
        # At the address of x, but every second token.
        ("x", right | {"x": both[:, :9], "out": both[:, ::2]}),
        ("cos", right | {"cos": apart[0, :, 0, :8], "out": apart}),
        ("sin", right | {"sin": apart[0, :, 0, :8], "out": apart}),
    ]
    for name, arrays in overlapping:
        arrays["cos"], arrays["sin"] = (arrays[n][:9] for n in ("cos", "sin"))
        refused(machine, numflash.apply_rotary, arrays, ValueError, [f"must not overlap {name}"])
    assert launched == (2 if warm else 1)


def test_out_must_have_room_for_each_element(machine):
    spread = broadcast(machine.array(A((2, 9, 1, 16))), X.shape)
    words = ["out must not be a broadcast view"]
    refused(machine, numflash.apply_rotary, RIGHT | {"out": spread}, ValueError, words)


def test_out_must_be_writeable(machine):
    if machine.gpu is not None:
        pytest.skip("arrays of a GPU are writeable")
    x = machine.array(X)
    x.flags.writeable = False
    words = ["out must be writeable, got a read-only array"]
    for arrays in ({"out": x}, {"x": x, "out": x}):
        refused(machine, numflash.apply_rotary, RIGHT | arrays, ValueError, words)
    machine.call(numflash.apply_rotary, **RIGHT | {"x": x})


TABLES = {"seqlen": 4, "rotary_dim": 8}
BAD_TABLES = {
    "rotary-dim-odd": ({"rotary_dim": 7}, ValueError, "rotary_dim must be even", "got 7"),
    "rotary-dim-0": ({"rotary_dim": 0}, ValueError, "rotary_dim must be at least 1, got 0"),
    "rotary-dim-258": ({"rotary_dim": 258}, numflash.UnsupportedError, "at most 256, got 258"),
    "rotary-dim-float": ({"rotary_dim": 8.0}, TypeError, "rotary_dim must be an integer", "8.0"),
    "rotary-dim-bool": ({"rotary_dim": True}, TypeError, "rotary_dim must be an integer"),
    "seqlen-negative": ({"seqlen": -1}, ValueError, "seqlen must be 0 or more", "got -1"),
    "seqlen-float": ({"seqlen": 4.0}, TypeError, "seqlen must be an integer", "4.0 (float)"),
    "seqlen-far": ({"seqlen": 2**30}, ValueError, "seqlen must be", "1073741824"),
    "base-1": ({"base": 1}, ValueError, "base must be above 1, got 1"),
    "base-nan": ({"base": NAN}, ValueError, "base must be positive and finite, got nan"),
    "base-string": ({"base": "10000"}, TypeError, "base must be a real number", "'10000'"),
    "scaling-dict": ({"scaling": {"factor": 2.0}}, TypeError, "scaling must be None or one of"),
    "scaling-class": ({"scaling": numflash.YarnScaling}, TypeError, "scaling must be None or"),
    "scaling-number": ({"scaling": 2.0}, TypeError, "scaling must be None or one of", "2.0"),
    "dtype-name": ({"dtype": "float64"}, ValueError, "dtype must be one of", "'float64'"),
    "dtype-type": ({"dtype": np.float32}, TypeError, "dtype must be a string"),
    "like-list": ({"like": [1.0]}, TypeError, "like must be", "list"),
    "stream": ({"stream": "main"}, TypeError, "stream must be a CUDA stream", "'main'"),
}


@cases(BAD_TABLES)
def test_rotary_tables_refuses(machine, changes, error, words):
    arguments = TABLES | {"like": A((2, 3))} | changes
    refused(machine, numflash.rotary_tables, arguments, error, words)


BAD_SCALINGS = {
    "factor-half": ("Linear", {"factor": 0.5}, ValueError, "factor of LinearScaling", "0.5"),
    "factor-nan": ("Llama3", {"factor": NAN}, ValueError, "factor of Llama3Scaling", "nan"),
    "factor-inf": ("Yarn", {"factor": INF}, ValueError, "factor of YarnScaling", "finite"),
    "factor-string": ("Linear", {"factor": "2"}, TypeError, "factor of LinearScaling", "'2'"),
    "seqlen-0": ("Yarn", {"original_seqlen": 0}, ValueError, "original_seqlen of Yarn", "got 0"),
    "seqlen-float": ("Llama3", {"original_seqlen": 1.5}, TypeError, "must be an integer", "1.5"),
    "betas": ("Yarn", {"beta_fast": 1, "beta_slow": 2}, ValueError, "above beta_slow", "1 and 2"),
    "beta-0": ("Yarn", {"beta_slow": 0}, ValueError, "beta_slow of YarnScaling must be positive"),
    "mscale-alone": ("Yarn", {"mscale": 1.0}, ValueError, "go together", "1.0 and None"),
    "mscale-0": ("Yarn", {"mscale": 0, "mscale_all_dim": 1}, ValueError, "mscale of Yarn", "0"),
    "attention-factor": ("Yarn", {"attention_factor": -1.0}, ValueError, "attention_factor of"),
    "truncate": ("Yarn", {"truncate": 1}, TypeError, "truncate of YarnScaling must be True or"),
    "freq-factors": ("Llama3", {"low_freq_factor": 4.0}, ValueError, "above low_freq_factor"),
}


@pytest.mark.parametrize(
    "kind, changes, error, words",
    [(kind, changes, error, words) for kind, changes, error, *words in BAD_SCALINGS.values()],
    ids=BAD_SCALINGS,
)
def test_a_scaling_refuses(kind, changes, error, words):
    right = {"factor": 2.0} | ({} if kind == "Linear" else {"original_seqlen": 64})
    make = getattr(numflash, f"{kind}Scaling")
    make(**right)
    with pytest.raises(error) as caught:
        make(**right | changes)
    assert all(word in str(caught.value) for word in words), caught.value
