"""Ranks that are threads: messages, and what a rank sees of the others' faults."""

import re
import threading
import time

import numpy as np
import pytest

from numflash.distributed.communicators import CommunicatorError
from numflash.distributed.communicators.local import local
from numflash.runtime.mode import SIMULATED
from tests.host.numflash.distributed.test_agreement import on_ranks


def message(*values):
    return np.array(values, "uint8")


def empty(size=1):
    return np.full(size, 255, "uint8")


def test_messages_go_round():
    def work(comm):
        into = empty(3)
        there, back = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        comm.exchange([(message(1, 2, comm.rank), there)], [(into, back)], "step 1")()
        return into.tolist()

    assert on_ranks(4, work) == [[1, 2, 3], [1, 2, 0], [1, 2, 1], [1, 2, 2]]


def test_messages_between_two_ranks_keep_their_order():
    def work(comm):
        into = [empty() for _ in range(4)]
        posted = []
        if comm.rank == 0:
            for n in range(4):
                posted.append(comm.exchange([(message(n), 1)], [], f"step {n}"))
        else:
            for n in range(0, 4, 2):
                receives = [(into[n], 0), (into[n + 1], 0)]
                posted.append(comm.exchange([], receives, f"step {n}"))
        for wait in reversed(posted):
            wait()
        return [x.tolist() for x in into]

    assert on_ranks(2, work)[1] == [[0], [1], [2], [3]]


def test_a_wait_needs_no_wait_of_the_other_rank():
    """Ranks that wait in another order do not wait for each other for ever."""
    comms = local(2, timeout=5.0)
    got = empty(), empty()
    there = comms[0].exchange([(message(7), 1)], [], "first")
    comms[1].exchange([], [(got[0], 0)], "first")
    comms[1].exchange([(message(8), 0)], [], "second")
    back = comms[0].exchange([], [(got[1], 1)], "second")
    back()
    there()
    assert (got[0][0], got[1][0]) == (7, 8)


def test_a_wait_that_is_called_again_returns():
    comms = local(1)
    into = empty()
    wait = comms[0].exchange([(message(5), 0)], [(into, 0)], "to itself")
    wait()
    wait()
    assert into[0] == 5


@pytest.mark.skipif(not SIMULATED, reason="NumPy's arrays are for the simulator")
def test_all_ranks_gather_all_arrays():
    def work(comm):
        array = np.arange(6, dtype="float32").reshape(2, 3)[:, ::2] + 10 * comm.rank
        whole = comm.all_gather(array, "step")
        return whole.dtype.name, whole.tolist()

    expected = [[[0 + n, 2 + n], [3 + n, 5 + n]] for n in (0, 10, 20)]
    assert on_ranks(3, work) == [("float32", expected)] * 3


def test_texts_are_compared_round_by_round():
    def work(comm):
        return [comm.agree(text) for text in ("a", str(comm.rank), "b", str(comm.rank // 2))]

    expected = [None, ["0", "1", "2"], None, ["0", "0", "1"]]
    assert on_ranks(3, work) == [expected] * 3


def raised(work):
    """The text of the CommunicatorError that `work` raises."""
    with pytest.raises(CommunicatorError) as error:
        work()
    return str(error.value)


BROKEN = "the communicator cannot be used any more after a fault"


def expect_broken(comms, why):
    """Each call on each rank says so."""
    for comm in comms:
        for call in (
            lambda comm=comm: comm.exchange([], [], "next"),
            lambda comm=comm: comm.agree("next"),
        ):
            text = raised(call)
            assert BROKEN in text and why in text


def test_a_rank_that_sends_nothing_is_named():
    comms = local(2, timeout=0.2)
    began = time.monotonic()
    text = raised(comms[1].exchange([], [(empty(12), 0)], "ring step 2 of 4"))
    assert text == "ring step 2 of 4: rank 0 has not sent 12 bytes to rank 1 within 0.2 s"
    assert 0.15 < time.monotonic() - began < 2
    expect_broken(comms, "on rank 1, ring step 2 of 4: rank 0 has not sent 12 bytes to rank 1")


def test_a_rank_that_takes_nothing_is_named():
    comms = local(3, timeout=0.1)
    text = raised(comms[1].exchange([(empty(7), 2)], [], "step"))
    assert text == "step: rank 2 has not taken 7 bytes of rank 1 within 0.1 s"
    expect_broken(comms, text)


def test_one_deadline_holds_for_all_messages_of_a_wait():
    """Each of them comes sooner than that after the one before."""
    comms = local(2, timeout=0.5)

    def send():
        for _ in range(4):
            time.sleep(0.3)
            comms[0].exchange([(empty(), 1)], [], "step")

    thread = threading.Thread(target=lambda: raised(send))
    thread.start()
    began = time.monotonic()
    text = raised(comms[1].exchange([], [(empty(), 0)] * 4, "step"))
    assert "rank 0 has not sent 1 bytes" in text and time.monotonic() - began < 1.0
    thread.join(5)


def test_ranks_that_do_not_come_to_an_agreement_are_named():
    comms = local(4, timeout=0.3)
    found = on_ranks(4, lambda comm: comm.rank in (1, 3) or comm.agree("text"), comms)
    assert found[1] is found[3] is True
    texts = {str(found[0]), str(found[2])}
    expected = "the agreement of ranks: ranks 1, 3 did not come within 0.3 s"
    assert expected in texts and all(expected in text for text in texts)
    expect_broken(comms, "ranks 1, 3 did not come")


def test_one_ranks_fault_ends_the_waiting_of_the_others():
    comms = local(3, timeout=30.0)
    waits = comms[0].exchange([], [(empty(), 1)], "step 5")
    errors = []

    def wait():
        try:
            waits()
        except CommunicatorError as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    comms[2].abandon("ValueError: no")
    thread.join(5)
    assert errors == [f"step 5: {BROKEN}: rank 2 left: ValueError: no"]
    expect_broken(comms, "rank 2 left")


@pytest.mark.parametrize("first", [0, 1])
def test_sizes_that_differ_are_named_on_both_ranks(first):
    comms = local(2, timeout=5.0)
    posts = [
        lambda: comms[0].exchange([(empty(64), 1)], [], "step 1"),
        lambda: comms[1].exchange([], [(empty(32), 0)], "step 2"),
    ]
    wait = posts[first]()
    expected = "step 2: rank 0 sends 64 bytes (in step 1) and rank 1 receives 32"
    assert raised(posts[1 - first]) == expected
    assert expected in raised(wait)
    expect_broken(comms, expected)


def test_an_error_of_a_copy_is_a_fault():
    comms = local(2, timeout=5.0)
    into = empty(4)
    into.flags.writeable = False
    wait = comms[1].exchange([], [(into, 0)], "step")
    assert "step: ValueError: " in raised(lambda: comms[0].exchange([(empty(4), 1)], [], "step"))
    assert BROKEN in raised(wait)


def test_what_has_arrived_before_a_fault_has_arrived():
    comms = local(2, timeout=5.0)
    into = empty()
    wait = comms[1].exchange([], [(into, 0)], "step")
    comms[0].exchange([(message(3), 1)], [], "step")()
    comms[0].abandon("it is over")
    wait()
    assert into[0] == 3


def test_no_such_rank():
    with pytest.raises(ValueError, match=re.escape("step: no rank 2 among 2")):
        local(2)[0].exchange([(empty(), 2)], [], "step")


@pytest.mark.parametrize(("arguments", "words"), [({"size": 0}, "size"), ({"timeout": 0}, "time")])
def test_wrong_arguments(arguments, words):
    with pytest.raises(ValueError, match=f"{words}.*must be"):
        local(**{"size": 2, **arguments})
