"""Problem classes: what they keep of a problem, and what problems they tell apart."""

from dataclasses import replace

import pytest

from numflash.configs import FAMILIES, Traits
from numflash.problem.classes import ProblemClass, round_up
from numflash.problem.options import AttentionOptions
from numflash.problem.problem import describe
from numflash.runtime.views import ArrayView, contiguous_strides

TRAITS = Traits("float16", 64, 64)


def problem(seqlen_q, seqlen_k, *, batch=1, heads=4, heads_kv=4, head_dim=64, **options):
    """An AttentionProblem."""

    def view(seqlen, heads):
        shape = (batch, seqlen, heads, head_dim)
        return ArrayView(0, shape, contiguous_strides(shape), "float16", 0)

    q, k = view(seqlen_q, heads), view(seqlen_k, heads_kv)
    return describe({"q": q, "k": k, "v": k}, AttentionOptions(**options))[0]


def class_of(*args, **options):
    """The forward class of a problem."""
    return ProblemClass.of("forward", problem(*args, **options), TRAITS)


@pytest.mark.parametrize(
    "n, rounded", [(0, 1), (1, 1), (2, 2), (3, 4), (1024, 1024), (1025, 2048)]
)
def test_sizes_are_rounded_up_to_powers_of_two(n, rounded):
    assert round_up(n) == rounded


def test_sizes_beyond_the_largest_class_are_of_that():
    assert round_up(2**20) == round_up(2**25) == 2**17


@pytest.mark.parametrize(
    "sizes, options, mask",
    [
        ((512, 512), {}, "full"),
        ((512, 512), {"causal": True}, "causal"),
        ((1, 512), {"causal": True}, "full"),  # the last query sees all
        ((1, 512), {"causal": True, "causal_align": "top_left"}, "causal"),
        ((512, 512), {"window_size": (63, 64)}, "window128"),
        ((512, 512), {"window_size": (100, 0)}, "window128"),
        ((512, 512), {"window_size": (100, 100)}, "window256"),
        ((512, 512), {"causal": True, "window_size": (600, 600)}, "causal"),
        ((512, 512), {"window_size": (600, 600)}, "full"),
        ((512, 512), {"window_size": (-1, 5)}, "causal"),
        ((1, 512), {"window_size": (10, 0)}, "window16"),
    ],
)
def test_the_mask_is_what_is_hidden_not_how_it_was_asked_for(sizes, options, mask):
    assert class_of(*sizes, **options).mask == mask


def ragged(batch, seqlen_q, seqlen_k, *, page_size=None, heads=4, heads_kv=4, **options):
    """The forward class of packed sequences, or with `page_size` of a cache in pages.

    `seqlen_k` are the keys that pages have room for, and of packed sequences the mean.
    """

    def view(*shape, dtype="float16"):
        return ArrayView(0, shape, contiguous_strides(shape), dtype, 0)

    if page_size is None:
        ends = view(batch + 1, dtype="int32")
        views = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        views |= {
            "q": view(batch * seqlen_q, heads, 64),
            "k": view(batch * seqlen_k, heads_kv, 64),
        }
        options["layout"] = "thd"
    else:
        width = seqlen_k // page_size
        views = {"page_table": view(batch, width, dtype="int32")}
        views |= {"q": view(batch, seqlen_q, heads, 64), "seqlens_k": view(batch, dtype="int32")}
        views["k"] = view(3 * batch * width, page_size, heads_kv, 64)
    found = describe(views | {"v": views["k"]}, AttentionOptions(**options))[0]
    return ProblemClass.of("forward", found, found.traits(vectorized=True))


@pytest.mark.parametrize(
    "sizes, options, text",
    [
        ((7, 300, 300), {"causal": True}, "ragged causal q512 k512 bh32 g1"),
        ((64, 1, 4000), {"causal": True}, "ragged full q1 k4096 bh256 g1"),
        ((2, 1, 64), {"causal": True, "causal_align": "top_left"}, "ragged causal q1 k64 bh8 g1"),
        ((2, 1, 640), {"window_size": (100, 0)}, "ragged window128 q1 k1024 bh8 g1"),
        ((2, 640, 640), {"window_size": (100, 0)}, "ragged window128 q1024 k1024 bh8 g1"),
        ((3, 1, 4096), {"page_size": 16}, "ragged-paged full q1 k4096 bh16 g1 p16"),
        (
            (3, 4, 4096),
            {"page_size": 7, "causal": True},
            "ragged-paged causal q4 k4096 bh16 g1 p7",
        ),
        ((3, 1, 4096), {"page_size": 1, "heads_kv": 1}, "ragged-paged full q1 k4096 bh16 g4 p1"),
    ],
)
def test_sequences_with_lengths_of_their_own_have_classes_of_their_own(sizes, options, text):
    found = ragged(*sizes, **options)
    assert str(found) == f"forward float16-d64-dv64-vec-{text}"
    assert ProblemClass.parse(str(found)) == found


def test_only_kernels_that_read_pages_have_a_page_size():
    paged = ragged(2, 1, 64, page_size=16)
    with pytest.raises(ValueError, match=r"and only there, got 0 with .*-paged"):
        replace(paged, page_size=0)
    with pytest.raises(ValueError, match="only there, got 16 with float16-d64-dv64-vec"):
        replace(paged, traits=TRAITS)


def test_batch_and_heads_count_together_and_groups_are_kept():
    found = class_of(100, 3000, batch=3, heads=12, heads_kv=3)
    assert (found.seqlen_q, found.seqlen_k) == (128, 4096)
    assert (found.batch_heads, found.group_size) == (64, 4)


def test_empty_problems_have_a_class():
    assert class_of(0, 0).seqlen_q == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", ["full", "causal", "window256"])
def test_parse_is_the_inverse_of_str(family, mask):
    traits = replace(TRAITS, features=("softcap",), head_dim_v=96)
    original = ProblemClass(family, traits, mask, 1, 4096, 64, 8)
    assert ProblemClass.parse(str(original)) == original


@pytest.mark.parametrize(
    "text",
    [
        "",
        "forward",
        "sideways float16-d64-dv64-vec full q1 k1 bh1 g1",
        "forward float17-d64-dv64-vec full q1 k1 bh1 g1",
        "forward float16-d64-dv64-vec holes q1 k1 bh1 g1",
        "forward float16-d64-dv64-vec window0 q1 k1 bh1 g1",
        "forward float16-d64-dv64-vec full q01 k1 bh1 g1",
        "forward float16-d64-dv64-vec full q1 k1 bh1 g1 ",
        "forward float16-d65-dv64-vec full q1 k1 bh1 g1",
        "forward float16-d64-dv64-vec full q1 k1 bh1 g1 p16",
        "forward float16-d64-dv64-vec-ragged-paged full q1 k1 bh1 g1",
        "forward float16-d64-dv64-vec-ragged-paged full q1 k1 bh1 g1 p0",
        "forward float16-d64-dv64-vec-ragged-paged full q1 k1 bh1 g1 p016",
    ],
)
def test_what_is_no_class_is_refused(text):
    with pytest.raises(ValueError):
        ProblemClass.parse(text)
