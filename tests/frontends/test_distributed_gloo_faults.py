"""Two processes over gloo: messages, disagreement, and what a rank sees of the other's faults."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="needs torch")

from tests.support.gloo_ranks import SECONDS


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What ranks 0 and 1 saw, by case."""
    folder = tmp_path_factory.mktemp("gloo")
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.gloo_ranks", str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def values(seen, case):
    """What both ranks returned."""
    return [each[case].get("value", each[case]) for each in seen]


@pytest.mark.parametrize("kind", ["tensors", "NumPy", "read-only", "after all that"])
def test_bytes_arrive(seen, kind):
    assert values(seen, kind) == [[1, 2, 1], [1, 2, 0]]


def test_more_messages_than_a_group_takes_keep_their_order(seen):
    assert values(seen, "many messages") == [[1, [87, 88]], [255, [86, 87]]]


def test_empty_messages_are_not_posted(seen):
    assert values(seen, "one way") == [[0, 0], [7, 7]]


def test_arrays_of_all_ranks_are_gathered(seen):
    expected = ["torch.bfloat16", [[[1.5, 1.5]] * 2, [[2.5, 2.5]] * 2], [2, 0, 3]]
    assert values(seen, "gathered") == [expected] * 2


def test_texts_are_compared(seen):
    assert values(seen, "texts") == [[None, ["longer, ä", "longer, älonger, ä"]]] * 2


def test_ranks_that_agree_call_on(seen):
    assert values(seen, "agreed") == ["ok", "ok"]
    assert values(seen, "agreed again") == [["ok", 1]] * 2


@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        ("another dtype", "ValueError", "dtype of q: rank 1 has float32 where rank 0 has float16"),
        (
            "another shape",
            "ValueError",
            "shape of q: rank 1 has (2, tokens, 4, 32) where rank 0 has (2, tokens, 4, 16)",
        ),
        ("another option", "ValueError", "causal: rank 1 has False where rank 0 has True"),
        ("refused", "TypeError", "rank 1 refuses the call: k is no array"),
    ],
)
def test_ranks_that_differ_raise_the_same_at_once(seen, case, kind, text):
    for each in seen:
        assert each[case]["error"] == kind and each[case]["text"].endswith(text)
        assert each[case]["seconds"] < SECONDS
    assert seen[0][case]["text"] == seen[1][case]["text"]


def test_wrong_arguments_are_no_faults(seen):
    for each in seen:
        assert each["no such rank"]["error"] == "ValueError"
        assert each["no such rank"]["text"] == "step 2: no rank 2 among 2"
        assert each["no array"]["error"] == "TypeError"
        assert each["no array"]["text"].endswith("moves PyTorch's tensors, got builtins.list")


def expect_fault(found, *words):
    assert found["error"] == "CommunicatorError", found
    for word in words:
        assert word in found["text"]


def test_a_rank_that_never_comes_is_named_at_the_deadline(seen):
    found = seen[0]["never comes"]
    expect_fault(found, "ring step 2 of 4: 12 bytes ", "rank 1", "did not come through")
    assert SECONDS - 0.5 < found["seconds"] < 3 * SECONDS


def test_a_deadline_of_the_communicators_own(seen):
    found = seen[0]["never agrees"]
    expect_fault(found, "the agreement of ranks: 32 bytes from each rank", "within 0.5 s")
    assert 0.4 < found["seconds"] < SECONDS


def test_a_rank_that_comes_too_late_sees_a_fault(seen):
    expect_fault(seen[1]["comes too late"], "ring step 2 of 4: 12 bytes ", "rank 0")


def test_after_a_fault_each_call_on_each_rank_says_so(seen):
    for each in seen:
        again = (
            "the communicator cannot be used any more after a fault: ring step 2 of 4: 12 bytes"
        )
        expect_fault(each["after a fault"], f"ring step 3 of 4: {again}")
        expect_fault(each["agreement after a fault"], again)
        assert each["after a fault"]["seconds"] < 0.5


def test_a_rank_that_dies_is_named_before_the_deadline(seen):
    assert values(seen, "before the end") == [None, None]
    found = seen[0]["dies"]
    expect_fault(found, "ring step 2 of 4: 12 bytes ", "rank 1")
    assert found["seconds"] < SECONDS and "dies" not in seen[1]
