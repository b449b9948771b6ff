"""Ranks that ask for the same, for different things, and those that refuse a call."""

import threading
from dataclasses import dataclass

import numpy as np
import pytest

from numflash.distributed import agreement
from numflash.distributed.agreement import Shard, agree
from numflash.distributed.communicators.alone import Alone
from numflash.distributed.communicators.local import local
from numflash.distributed.layouts import Layout
from numflash.runtime.errors import UnsupportedError


class Counted:
    """A communicator that counts its rounds of agreement."""

    def __init__(self, comm):
        self.comm, self.rounds = comm, 0
        self.rank, self.size, self.agreed = comm.rank, comm.size, comm.agreed

    def agree(self, text):
        """One more round."""
        self.rounds += 1
        return self.comm.agree(text)


def on_ranks(size, work, comms=None):
    """(what `work` returned or raised) of each rank."""
    comms = local(size, timeout=20.0) if comms is None else comms
    found = [None] * size

    def run(rank):
        try:
            found[rank] = work(comms[rank])
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert None not in found
    return found


def errors_of(size, items_of, check=lambda rank: "ready"):
    """What each rank raises for its items."""
    found = on_ranks(
        size, lambda comm: agree(comm, "attention", items_of(comm.rank), lambda: check(comm.rank))
    )
    assert all(isinstance(error, Exception) for error in found), found
    return found


def items(**more):
    """Those of a call of 3 ranks."""
    q, k = np.zeros((2, 5, 4, 16), "float16"), np.zeros((2, 5, 2, 16), "float16")
    layout = Layout.zigzag(15, 3)
    return {"q": Shard(q, 1), "k": Shard(k, 1), "layout": layout, "causal": True, **more}


def test_ranks_that_agree_get_what_their_checks_found():
    found = on_ranks(3, lambda comm: agree(comm, "attention", items(), lambda: comm.rank + 10))
    assert found == [10, 11, 12]


def test_the_tokens_of_a_rank_are_its_own():
    def work(comm):
        q = np.zeros((1, comm.rank, 2, 16), "float32")
        return agree(comm, "attention", {"q": Shard(q, 1)}, lambda: "ready")

    assert on_ranks(3, work) == ["ready"] * 3


DIFFERENCES = {
    "dtype": (
        {"q": Shard(np.zeros((2, 5, 4, 16), "float32"), 1)},
        "dtype of q: rank 1 has float32 where ranks 0 and 2 have float16",
    ),
    "shape": (
        {"q": Shard(np.zeros((2, 5, 8, 16), "float16"), 1)},
        "shape of q: rank 1 has (2, tokens, 8, 16) where ranks 0 and 2 have (2, tokens, 4, 16)",
    ),
    "option": ({"causal": False}, "causal: rank 1 has False where ranks 0 and 2 have True"),
    "one more": ({"softcap": 30}, "softcap: rank 1 has 30 where ranks 0 and 2 have none"),
    "one less": ({"causal": None}, "causal: rank 1 has none where ranks 0 and 2 have True"),
    "tuple": (
        {"window_size": (4, None)},
        "window_size: rank 1 has (4, None) where ranks 0 and 2 have none",
    ),
    "array": (
        {"sinks": np.zeros(4, "float32")},
        "dtype of sinks: rank 1 has float32 where ranks 0 and 2 have none; "
        "shape of sinks: rank 1 has (4,) where ranks 0 and 2 have none",
    ),
    "layout": (
        {"layout": Layout.contiguous(15, 3)},
        "segments of layout: rank 1 has (((0, 0, 5)), ((0, 5, 5)), ((0, 10, 5))) where ranks 0 "
        "and 2 have (((0, 0, 2), (0, 12, 3)), ((0, 2, 3), (0, 10, 2)), ((0, 5, 5)))",
    ),
    "seed": ({"seed": 4}, "seed: rank 1 has 4 where ranks 0 and 2 have none"),
    "mask": (
        {"mask_mod": lambda b, h, i, j: j + 1 <= i},
        "score_mod and mask_mod: rank 1 has 1;;keep=le(add(j,1),i) where ranks 0 and 2 have none",
    ),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_all_ranks_say_who_differs_in_what(what):
    more, words = DIFFERENCES[what]
    errors = errors_of(3, lambda rank: items(**(more if rank == 1 else {})))
    expected = f"all ranks must ask for the same: {words}"
    assert [(type(error), str(error)) for error in errors] == [(ValueError, expected)] * 3


def test_without_a_majority_rank_0_is_what_others_differ_from():
    errors = errors_of(2, lambda rank: {"causal": bool(rank)})
    assert str(errors[0]).endswith("causal: rank 1 has True where rank 0 has False")


def test_a_long_value_is_cut_but_still_tells_ranks_apart():
    lengths = list(range(400))
    errors = errors_of(2, lambda rank: {"lengths": tuple([*lengths, rank])})
    text = str(errors[0])
    assert len(text) < 1000 and text.count("SHA-256") == 2 and text == str(errors[1])


def test_two_ranks_that_call_other_functions_say_so():
    found = on_ranks(2, lambda comm: agree(comm, ("a", "b")[comm.rank], {}, lambda: None))
    assert str(found[0]).endswith("function: rank 1 has b where rank 0 has a")


@pytest.mark.parametrize("kind", [TypeError, ValueError, UnsupportedError])
def test_the_refusal_of_one_rank_is_raised_on_all(kind):
    def check(rank):
        if rank == 2:
            raise kind("k must be contiguous")

    errors = errors_of(3, lambda rank: items(), check)
    expected = kind, "rank 2 refuses the call: k must be contiguous"
    assert [(type(error), str(error)) for error in errors] == [expected] * 3


def test_a_refusal_comes_with_what_ranks_differ_in():
    def check(rank):
        if rank:
            raise ValueError(f"head_dim {rank}")

    errors = errors_of(3, lambda rank: {"causal": rank == 1}, check)
    expected = (
        "rank 1 refuses the call: head_dim 1 (rank 2 refuses, too); the ranks also differ: "
        "causal: rank 1 has True where ranks 0 and 2 have False"
    )
    assert list(map(str, errors)) == [expected] * 3


def test_a_refusal_of_what_is_no_array_is_raised_on_all():
    def check(rank):
        if rank == 0:
            raise TypeError("q must be an array")

    errors = errors_of(2, lambda rank: items(**({} if rank else {"q": Shard([1], 1)})), check)
    expected = TypeError, "rank 0 refuses the call: q must be an array"
    assert [(type(error), str(error)) for error in errors] == [expected] * 2


def test_a_function_that_cannot_be_traced_is_a_refusal():
    def broken(b, h, i, j):
        return "yes"

    errors = errors_of(2, lambda rank: {"mask_mod": broken if rank else None})
    assert {type(error) for error in errors} == {TypeError}
    assert all(str(error).startswith("rank 1 refuses the call: mask_mod") for error in errors)


def test_what_all_refuse_alike_is_raised_as_it_is():
    refusal = ValueError("head_dim must be even")

    def check(rank):
        raise refusal

    assert errors_of(3, lambda rank: items(), check) == [refusal] * 3


def test_an_error_of_another_kind_leaves_nobody_waiting():
    def check(rank):
        if rank == 1:
            raise MemoryError("no memory")

    errors = errors_of(3, lambda rank: items(), check)
    assert [type(error) for error in errors] == [RuntimeError, MemoryError, RuntimeError]
    assert str(errors[0]) == "rank 1 refuses the call: no memory"


def calls(size, asked):
    """The rounds of each rank for calls one after the other; `asked(rank)` are their items."""
    comms = [Counted(comm) for comm in local(size, timeout=20.0)]

    def work(comm):
        return [agree(comm, "attention", each, lambda: "ready") for each in asked(comm.rank)]

    found = on_ranks(size, work, comms)
    assert all(set(each) == {"ready"} for each in found), found
    return [comm.rounds for comm in comms]


def test_what_was_agreed_on_is_not_asked_again():
    assert calls(2, lambda rank: [items() for _ in range(5)]) == [1, 1]
    assert calls(2, lambda rank: [items(), items(causal=False), items()]) == [2, 2]


def test_numbers_that_change_from_call_to_call_do_not_count():
    aux = np.zeros(3, "float32")
    asked = [{"seed": n, "aux": (n, 0.5 * n, aux), "causal": True} for n in range(3)]
    assert calls(2, lambda rank: asked) == [1, 1]
    without_key = [{**each, "config": {"forward": "m64"}} for each in asked]
    assert calls(2, lambda rank: without_key) == [1, 1]
    assert calls(2, lambda rank: [{"causal": n} for n in range(3)]) == [3, 3]


def test_texts_are_written_for_a_new_kind_of_call_only(monkeypatch):
    written = []
    texts = agreement._texts
    monkeypatch.setattr(
        agreement, "_texts", lambda *x, **y: (written.append(1), texts(*x, **y))[1]
    )
    calls(2, lambda rank: [items() for _ in range(5)])
    assert len(written) == 4  # of each rank one to remember, and one to compare


def test_functions_that_mean_the_same_are_the_same_on_all_ranks():
    """Rank 1 has one function, rank 0 makes one each time, on another line."""

    def always(b, h, i, j):
        return j <= i

    others = [
        lambda b, h, i, j: j <= i,
        lambda batch, head, row, column: column <= row,
        lambda *x: x[2] >= x[3],
    ]
    asked = {0: others, 1: [always] * 3}
    assert calls(2, lambda rank: [{"mask_mod": each} for each in asked[rank]]) == [1, 1]


def test_a_switch_has_each_call_compared(monkeypatch):
    monkeypatch.setenv("NUMFLASH_DISTRIBUTED_CHECK", "1")
    assert calls(2, lambda rank: [items()] * 3) == [3, 3]

    def work(comm):
        agree(comm, "attention", {"seed": 1}, lambda: None)
        agree(comm, "attention", {"seed": comm.rank}, lambda: None)

    errors = on_ranks(2, work)
    assert str(errors[0]).endswith("seed: rank 1 has 1 where rank 0 has 0")


def test_a_wrong_switch_is_a_refusal(monkeypatch):
    monkeypatch.setenv("NUMFLASH_DISTRIBUTED_CHECK", "perhaps")
    errors = errors_of(2, lambda rank: items())
    assert all("NUMFLASH_DISTRIBUTED_CHECK must be 0 or 1" in str(error) for error in errors)


def test_a_rank_that_refuses_what_all_know_raises_alone():
    comms = [Counted(comm) for comm in local(2, timeout=20.0)]
    on_ranks(2, lambda comm: agree(comm, "attention", items(), lambda: "ready"), comms)

    def refuse():
        raise ValueError("requires a gradient")

    with pytest.raises(ValueError, match=r"^requires a gradient$"):
        agree(comms[0], "attention", items(), refuse)
    assert comms[0].rounds == 1


def test_a_refused_call_is_not_remembered():
    comms = [Counted(comm) for comm in local(2, timeout=20.0)]

    def refuse():
        raise ValueError("no")

    for rounds in (1, 2):
        on_ranks(2, lambda comm: agree(comm, "attention", items(), refuse), comms)
        assert [comm.rounds for comm in comms] == [rounds] * 2


def two_levels(inner, outer):
    """For each rank (the communicator of its neighbours, that of those with its number there)."""
    rows = [local(inner, timeout=20.0) for _ in range(outer)]
    columns = [local(outer, timeout=20.0) for _ in range(inner)]
    return [
        (Counted(rows[rank // inner][rank % inner]), Counted(columns[rank % inner][rank // inner]))
        for rank in range(inner * outer)
    ]


@pytest.mark.parametrize("odd", [(0,), (3,), (5,), (1, 3, 5), (4, 5)])
def test_groups_of_groups_agree_and_differ_as_one(odd):
    comms = two_levels(2, 3)

    def work(pair):
        rank = pair[1].rank * 2 + pair[0].rank
        for _ in range(2):
            agree(pair, "attention", {"causal": True}, lambda: None)
        rounds = pair[0].rounds, pair[1].rounds
        try:
            agree(pair, "attention", {"softcap": float(rank in odd)}, lambda: None)
        except ValueError as error:
            return rounds, str(error)

    found = on_ranks(6, work, comms)
    assert [rounds for rounds, _ in found] == [(1, 1)] * 6
    (text,) = {text for _, text in found}
    others = [rank for rank in range(6) if rank not in odd]
    sides = odd if len(odd) < len(others) else others if 0 in odd else odd
    listed = ", ".join(map(str, sides[:-1])) + " and " if len(sides) > 1 else ""
    assert f"softcap: rank{'s' if len(sides) > 1 else ''} {listed}{sides[-1]} ha" in text


def test_an_error_of_another_kind_is_that_of_its_rank_in_groups_of_groups():
    def work(pair):
        def check():
            if (pair[1].rank, pair[0].rank) == (1, 0):
                raise MemoryError("no memory")

        agree(pair, "attention", items(), check)

    errors = on_ranks(4, work, two_levels(2, 2))
    assert [type(error) for error in errors] == [RuntimeError] * 2 + [MemoryError, RuntimeError]
    assert str(errors[0]) == "rank 2 refuses the call: no memory"


def test_what_was_agreed_with_other_groups_is_asked_again():
    (inner,), first, second = local(1), local(2), local(2)
    rounds = []

    def work(rank):
        comm = Alone()
        for other in (first[rank], first[rank], second[rank]):
            counted = counted_by.setdefault((rank, id(other)), Counted(other))
            agree((comm, counted), "attention", items(), lambda: None)
        return True

    counted_by: dict = {}
    on_ranks(2, work, [0, 1])
    rounds = sorted(each.rounds for each in counted_by.values())
    assert rounds == [1, 1, 1, 1] and inner.size == 1


def test_a_rank_that_is_alone_only_checks():
    assert agree(Alone(), "attention", {"q": object()}, lambda: 3) == 3
    assert Alone().agree("text") is None
    Alone().exchange([], [], "nothing")()
    with pytest.raises(ValueError, match="step 1: a rank that is alone has nobody"):
        Alone().exchange([(np.zeros(1, "uint8"), 0)], [], "step 1")


@dataclass(frozen=True)
class Unhashable:
    """A dataclass that no dict takes as a key."""

    values: list


def test_items_without_a_quick_key_are_remembered_by_their_text():
    given = {"recipe": Unhashable([1, 2]), "config": {"forward": "m64"}, "scale": np.float32(0.5)}
    assert calls(2, lambda rank: [given] * 3) == [1, 1]


def test_the_oldest_agreement_is_forgotten_first(monkeypatch):
    monkeypatch.setattr("numflash.distributed.communicators._MOST_AGREED", 2)
    for numbers, rounds in (((0, 1, 2, 2, 1), 3), ((0, 1, 2, 0), 4)):
        asked = [{"n": n} for n in numbers]
        assert calls(2, lambda rank, asked=asked: asked) == [rounds, rounds]
