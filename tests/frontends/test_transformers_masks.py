"""Masks of transformers as options of a call: the same keys as the library's dense mask."""

import pytest

transformers = pytest.importorskip(
    "transformers", reason='needs transformers: pip install "numflash[transformers]"'
)

import torch  # noqa: E402
from transformers import masking_utils as library  # noqa: E402

from numflash.frontends.torch.attention import attention  # noqa: E402
from numflash.frontends.transformers import masks  # noqa: E402
from numflash.frontends.transformers.masks import Mask, mask  # noqa: E402
from numflash.problem.block_masks import ListedBlocks  # noqa: E402

LENGTH = 19
_GENERATOR = torch.Generator().manual_seed(0)
HOLES = torch.rand(2, LENGTH, generator=_GENERATOR) > 0.3
LONG = torch.rand(2, 42, generator=_GENERATOR) > 0.3
LEFT = torch.arange(LENGTH) >= torch.tensor([[0], [6]])
RIGHT = torch.arange(LENGTH) < torch.tensor([[LENGTH], [11]])
IMAGES = torch.tensor([[-1] * 4 + [0] * 5 + [-1] * 3 + [1] * 7, [0] * 3 + [-1] * 10 + [1] * 6])
POSITIONS = torch.tensor([[*range(7), *range(12)], [*range(3), *range(9), *range(7)]])
SEQUENCES = library.find_packed_sequence_indices(POSITIONS)
OFFSET = torch.tensor(LENGTH - 5)  # of a static cache that is full after five queries
ONE = torch.tensor([2])


def packed(inner):
    moved = library.remap_positions_for_packed_sequence(inner, POSITIONS)
    return library.and_masks(moved, library.packed_sequence_mask_function(SEQUENCES))


def with_branch(b, h, q, k):
    return k % 2 == 0 if q > 5 else k < 4


causal, both_ways = library.causal_mask_function, library.bidirectional_mask_function
sliding, sliding_both = (
    library.sliding_window_causal_mask_function,
    library.sliding_window_bidirectional_mask_function,
)
chunked = library.chunked_causal_mask_function(4, torch.tensor([0, 6]))
images = library.or_masks(causal, library.blockwise_overlay(IMAGES))
# Name -> (mask function, further arguments, options of the mask). An "aux" is a function's.
BAND = {"causal"}
CASES = {
    "causal": (causal, {}, BAND),
    "causal, right": (causal, {"attention_mask": RIGHT}, BAND | {"mask"}),
    "causal, left": (causal, {"attention_mask": LEFT}, BAND | {"mask"}),
    "causal, holes": (causal, {"attention_mask": HOLES}, BAND | {"mask"}),
    "both ways": (both_ways, {}, set()),
    "both ways, holes": (both_ways, {"attention_mask": HOLES}, {"mask"}),
    "window": (sliding(5), {}, BAND | {"window_size"}),
    "window, holes": (sliding(5), {"attention_mask": HOLES}, BAND | {"window_size", "mask"}),
    "window of all": (sliding(LENGTH), {}, BAND),
    "window of nothing": (sliding(0), {}, {"mask_mod", "aux"}),
    "window both ways": (
        sliding_both(3),
        {"attention_mask": LEFT},
        BAND | {"window_size", "causal_align", "shift", "mask"},
    ),
    "chunks": (chunked, {}, BAND | {"mask_mod", "aux"}),
    "chunks, left": (chunked, {"attention_mask": LEFT}, BAND | {"mask_mod", "aux", "mask"}),
    "images": (images, {}, {"mask_mod", "aux"}),
    "images in a window": (
        library.or_masks(sliding(5), library.blockwise_overlay(IMAGES)),
        {"attention_mask": HOLES},
        {"mask_mod", "aux", "mask"},
    ),
    "packed": (packed(causal), {}, {"mask_mod", "aux"}),
    "packed, window": (packed(sliding(3)), {}, {"mask_mod", "aux"}),
    "one token": (causal, {"q_length": 1, "q_offset": LENGTH - 1}, set()),
    "tokens of a prompt": (causal, {"q_length": 5, "q_offset": LENGTH - 5}, BAND),
    "tokens and keys to come": (causal, {"q_length": 5, "q_offset": 4}, BAND | {"seqlens_k"}),
    "an empty static cache": (causal, {"q_length": 5}, BAND | {"causal_align"}),
    "a static cache": (causal, {"q_length": 5, "q_offset": OFFSET - 3}, BAND | {"seqlens_k"}),
    "a static cache, holes": (
        causal,
        {"q_length": 1, "q_offset": OFFSET, "attention_mask": HOLES[:, :15]},
        BAND | {"seqlens_k", "mask"},
    ),
    "a window in a static cache": (
        sliding(4),
        {"q_length": 3, "q_offset": OFFSET - 3},
        BAND | {"seqlens_k", "window_size"},
    ),
    "a full window": (
        sliding(LENGTH - 1),
        {"q_length": 2, "q_offset": 40, "kv_offset": 23, "attention_mask": LONG},
        BAND | {"window_size", "mask"},
    ),
    "chunks in a static cache": (
        chunked,
        {"q_length": 2, "q_offset": OFFSET - 3},
        BAND | {"seqlens_k", "mask_mod", "aux"},
    ),
    "a user's function": (
        library.or_masks(
            causal,
            lambda b, h, q, k: torch.logical_or(k < 2, torch.where(q > k, q % 2 == 0, False)),
        ),
        {"use_vmap": True},
        {"mask_mod", "aux"},
    ),
    "a user's number on the device": (
        library.and_masks(causal, lambda b, h, q, k: k >= ONE[0] * 2),
        {},
        BAND | {"mask_mod", "aux"},
    ),
}
# The library cannot compute these itself.
OURS = {
    "a user's if": (with_branch, lambda q, k: torch.where(q > 5, k % 2 == 0, k < 4)),
    "a tensor of one element": (
        lambda b, h, q, k: torch.le(ONE, k) & torch.le(ONE, q),
        lambda q, k: (k >= 2) & (q >= 2),
    ),
}


def sizes(more: dict) -> dict:
    return {"batch_size": 2, "q_length": LENGTH, "kv_length": LENGTH} | more


def shown(found: Mask) -> torch.Tensor:
    """(batch, 1, queries, keys): which keys have a weight, as kernels find it."""
    batch, _, queries, keys = found.shape
    q, k = torch.zeros(batch, queries, 1, 8), torch.zeros(batch, keys, 1, 8)
    v = torch.eye(keys)[None, :, None].expand(batch, -1, -1, -1)
    return attention(q, k, v, **found.of_call()).transpose(1, 2) > 0


@pytest.mark.parametrize("name", CASES)
def test_the_same_keys_as_the_library_and_no_array_of_queries_and_keys(name, launched):
    function, more, options = CASES[name]
    given = sizes(more) | {"mask_function": function}
    found = mask(**given)
    assert isinstance(found, Mask) and set(found.of_call()) == options
    for each in (*found.of_call().values(), *found.of_call().get("aux", ())):
        # Padding is said by keys; what functions read is the library's own.
        assert not isinstance(each, torch.Tensor) or each.numel() <= 2 * LENGTH
    wanted = library.sdpa_mask(**given, allow_is_causal_skip=False)
    assert torch.equal(shown(found), wanted.expand(2, 1, *wanted.shape[-2:]))
    assert set(launched.take()) <= {"forward", "prepare", "schedule"}


@pytest.mark.parametrize("name", OURS)
def test_what_only_symbols_can(name):
    function, wanted = OURS[name]
    found = mask(**sizes({"mask_function": function}))
    q, k = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    assert torch.equal(shown(found), wanted(q, k).expand(2, 1, -1, -1))


def test_what_cannot_be_traced_is_dense_and_said_once(caplog):
    def unlike(b, h, q, k):
        return (k.unsqueeze(-1) == torch.arange(3)).any(-1) | (q > k)

    masks._said.clear()
    with caplog.at_level("WARNING", "numflash.transformers"):
        for _ in range(2):
            found = mask(**sizes({"mask_function": unlike}))
    wanted = library.sdpa_mask(**sizes({"mask_function": unlike}), allow_is_causal_skip=False)
    assert isinstance(found, torch.Tensor) and torch.equal(found, wanted)
    assert [r for r in caplog.records if "unlike" in r.message and "slower" in r.message]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("offset", [int, torch.tensor], ids=["number", "tensor"])
def test_other_offsets_ask_for_the_same_kernel(offset):
    """As of one decoded token after the other: only arrays of the same shapes may change."""
    for function in (causal, sliding(4), chunked):
        said = []
        for step in range(4):
            found = mask(
                batch_size=2,
                q_length=1,
                kv_length=LENGTH,
                q_offset=offset(9 + step),
                mask_function=function,
                attention_mask=torch.ones(2, 10 + step, dtype=torch.bool),
            )
            options = dict(found.of_call())
            aux = [
                type(x) if isinstance(x, int) else (x.shape, x.dtype)
                for x in options.pop("aux", ())
            ]
            arrays = {
                name: (x.shape, x.stride(), x.data_ptr() % 16)
                for name, x in options.items()
                if isinstance(x, torch.Tensor)
            }
            said.append((options | arrays, aux))
        assert all(each == said[0] for each in said)


def test_the_length_of_a_static_cache_is_of_the_time_when_the_mask_was_made():
    length = torch.tensor(3)
    chunks = mask(**sizes({"q_length": 2, "q_offset": length, "mask_function": chunked}))
    found = mask(**sizes({"q_length": 2, "q_offset": length, "mask_function": causal}))
    length.add_(2)  # as `cache.update` does before attention runs
    assert found.options["seqlens_k"].tolist() == [5, 5]
    wanted = library.sdpa_mask(
        **sizes({"q_length": 2, "q_offset": 3, "mask_function": chunked}),
        allow_is_causal_skip=False,
    )
    assert torch.equal(shown(chunks), wanted)


def test_nothing_is_read_on_the_host():
    """Tensors on "meta" have no values that could be read."""
    number = torch.empty((), dtype=torch.long, device="meta")
    padding = torch.empty(2, LENGTH, dtype=torch.bool, device="meta")
    given = {"q_offset": number, "attention_mask": padding, "device": "meta"}

    def of_number(b, h, q, k):
        return (k >= number) & (number <= q)

    for function in (causal, sliding(4), chunked, library.and_masks(causal, of_number)):
        found = mask(**sizes({"mask_function": function, **given}))
        assert isinstance(found, Mask) and found.options["seqlens_k"].is_meta


@pytest.mark.parametrize("name", ["packed", "chunks", "images, and holes"])
def test_many_tokens_have_a_block_mask(name, launched, monkeypatch):
    monkeypatch.setattr(masks, "BLOCKS_FROM", 16)
    make = masks.create_block_mask
    monkeypatch.setattr(masks, "create_block_mask", lambda *a, **k: make(*a, 16, **k))
    function = {"packed": packed(causal), "chunks": chunked}.get(name, images)
    padding = HOLES if "holes" in name else None
    given = sizes({"mask_function": function, "attention_mask": padding})
    found = mask(**given)
    assert "block_mask" not in found.options and launched == []  # not before it is needed
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert set(found.of_call()) >= {"mask_mod", "aux"}
    assert isinstance(found.of_call()["block_mask"], ListedBlocks)
    assert "mask_mod" not in found.of_call()
    launched.clear()
    wanted = library.sdpa_mask(**given, allow_is_causal_skip=False)
    assert torch.equal(shown(found), wanted)
    assert torch.equal(shown(found.to("cpu")), wanted)
    assert launched.take() == ["forward"] * 2


def test_few_tokens_have_none():
    few = mask(**sizes({"mask_function": packed(causal)}))
    assert "block_mask" not in few.of_call() and masks.BLOCKS_FROM > 256


@pytest.mark.parametrize(
    "function, band",
    [
        (packed(causal), {"causal": True}),
        (packed(sliding(3)), {"causal": True, "window_size": (2, -1)}),
        (packed(both_ways), None),  # it asks that positions are not negative
        (causal, None),
        (images, None),
        (library.and_masks(packed(causal), lambda b, h, q, k: k % 2 == 0), None),
        (library.and_masks(packed(causal), lambda b, h, q, k: POSITIONS[b, k] > 1), None),
        (library.and_masks(packed(causal), lambda b, h, q, k: IMAGES[b, k] <= IMAGES[b, q]), None),
        (library.remap_positions_for_packed_sequence(causal, POSITIONS), None),
    ],
    ids=[
        "causal",
        "window",
        "both ways",
        "one",
        "images",
        "more",
        "more of positions",
        "two positions",
        "positions alone",
    ],
)
def test_packed_sequences_are_known(function, band):
    assert mask(**sizes({"mask_function": function})).packed == band
    padded = mask(**sizes({"mask_function": function, "attention_mask": HOLES}))
    assert padded.packed is None


def test_a_mask_is_taken_for_a_block_mask_of_four_axes():
    found = mask(**sizes({"mask_function": causal, "attention_mask": HOLES}))
    assert isinstance(found, torch.nn.attention.flex_attention.BlockMask)
    assert found.shape == (2, 1, LENGTH, LENGTH) and found.ndim == 4
    assert "causal" in repr(found) and str(found) == repr(found)
    moved = found.to("meta")
    assert moved.options["mask"].is_meta and moved.options["causal"] is True
    with pytest.raises(TypeError, match="has no elements"):
        found[:, :, 0]
