"""The arguments of kernels: records, their leaves, and what each kernel takes."""

import subprocess
import sys

import numpy as np
import pytest

from numflash.configs import Traits, parse_config
from numflash.configs.features import FEATURES, NO_FEATURES, Alibi, Features, Softcap
from numflash.kernels.arguments import (
    Descales,
    Scores,
    Tensor,
    assembled,
    fields,
    leaves,
    value_at,
)
from numflash.kernels.factories import make_kernel
from numflash.runtime.views import Pointer

F32, I64 = np.float32, np.int64
TRAITS = Traits("float16", 64, 64)
FP8 = Traits("float16", 64, 64, fp8=True)
# One config of each kernel.
KERNELS = [
    ("forward", "m16n16w4", TRAITS),
    ("backward-dkdv", "m16n16w4", TRAITS),
    ("backward-dq", "m16n16w4", TRAITS),
    ("delta", "w8", TRAITS),
    ("array-sums", "w8", TRAITS),
    ("combine", "w4", TRAITS),
    ("forward", "sm80-m64n64w4s1", TRAITS),
    ("backward-dkdv", "sm80-m64n64w4s1", TRAITS),
    ("backward-dq", "sm80-m64n64w4s1", TRAITS),
    ("backward", "sm80-m32n64w4s1x2", TRAITS),
    ("reduce-dq", "sm80-m32n64w4s1x2", TRAITS),
    ("forward", "sm90-m64n64w4s2", TRAITS),
    ("forward", "fp8-sm89-m64n64w4s1", FP8),
    ("forward", "fp8-sm90-m64n64w4s2", FP8),
    ("quantize", "sm80-t128w8", TRAITS),
    ("quantize", "sm80-t128w8-measure", TRAITS),
    ("quantize", "sm80-t128w4-codes", TRAITS),
    ("amax", "w8", TRAITS),
    ("estimate", "w1", TRAITS),
    ("dequantize", "sm80-w4", TRAITS),
    ("rotary", "w4h4", TRAITS),
    ("merge-onto", "w8", TRAITS),
]


def kernel_of(family, text, traits):
    if family == "reduce-dq":
        return make_kernel(parse_config("backward", text).reduction(), traits)
    return make_kernel(parse_config(family, text), traits)


@pytest.mark.parametrize("about", KERNELS, ids=lambda about: f"{about[0]}-{about[1]}")
def test_no_kernel_has_over_12_parameters_and_each_leaf_has_a_name_of_its_own(about):
    kernel = kernel_of(*about)
    assert len(kernel.parameters) <= 12
    assert len(kernel.leaves) == sum(len(leaves({"": t})) for t in kernel.parameters.values())
    assert not any(fields(leaf) for leaf in kernel.leaves.values())


def test_a_record_falls_apart_into_its_leaves_in_order():
    assert leaves({"q": Tensor[F32], "n": np.int32}) == {
        "q.data": Pointer(F32),
        "q.batch": I64,
        "q.row": I64,
        "q.head": I64,
        "n": np.int32,
    }
    assert list(leaves({"scores": Scores}))[2:6] == [
        "scores.shift",
        "scores.features.softcap.cap",
        "scores.features.alibi.slopes",
        "scores.features.alibi.batch",
    ]


def test_leaves_are_put_together_to_the_same_records():
    asked = NO_FEATURES._replace(softcap=Softcap(4.0), alibi=Alibi("slopes", 5, 6))
    records = zip(FEATURES, asked, strict=True)
    features = Features(*(row.absent if record is None else record for row, record in records))
    scores = Scores(1.0, 2.0, 3, features)
    paths = leaves({"scores": Scores})
    values = [value_at({"scores": scores}, path) for path in paths]
    assert values[:7] == [1.0, 2.0, 3, 4.0, "slopes", 5, 6]
    again = assembled(Scores, iter(values))
    assert again == scores and type(again.features.alibi) is Alibi
    tensor = assembled(Tensor[F32], iter(range(4)))
    assert tensor == Tensor(0, 1, 2, 3) and type(tensor) is Tensor


def test_a_pointer_that_is_not_among_the_arguments_is_the_operand_of_its_name():
    assert value_at({}, "lse") == "lse"
    assert value_at({"lse": "part_lses"}, "lse") == "part_lses"
    assert value_at({"in_fp8": None}, "in_fp8") is None


def test_nested_records_keep_their_own_types():
    inner = fields(Descales)
    assert [fields(inner[name])["data"] for name in "qkv"] == [Pointer(F32)] * 3
    assert fields(np.int32) is None and fields(Pointer(F32)) is None


def test_records_are_made_without_numba():
    modules = "numflash.calls.forward, numflash.calls.fp8_forward"
    code = f"import sys, {modules}; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
