"""The output of the tuner's progress bar, on a terminal of given width and into a log."""

import io
import re

import pytest

from tuner.records import FAILURES, Record
from tuner.search.progress import Progress
from tuner.search.results import format_ms

SGR = re.compile(r"\x1b\[\d*m")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True

    def drawn(self):
        """Each state of the bar, without colours."""
        text = SGR.sub("", self.getvalue())
        return [state.rstrip("\n") for state in text.split("\r\x1b[K")[1:]]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")


def measured(milliseconds, config="m64n32w4"):
    return Record(config, "measured", samples_ms=(milliseconds,))


def run(stream, clock, records, seconds=1.0, **options):
    with Progress(options.pop("total", 10), "forward", stream, clock, **options) as progress:
        for record in records:
            clock.now += seconds
            progress.update(record)
    return progress


def test_shows_done_fastest_counts_and_times():
    terminal, clock = Terminal(), Clock()
    run(
        terminal,
        clock,
        [
            measured(2.0),
            measured(1.5, "m32n32w4"),
            measured(3.0),
            Record("m8n8w1", "spilled", "12 bytes"),
            Record("m8n8w2", "wrong_result", "dq off"),
        ],
        seconds=2.0,
    )
    last = terminal.drawn()[-2]
    assert "forward" in last and "5/10" in last
    assert "fastest 1.500 ms m32n32w4" in last
    assert "3 measured" in last and "1 spilled" in last and "1 wrong result" in last
    assert "0:10, 0:10 left" in last
    assert last.count("━") == last.count("─") == 12
    assert terminal.getvalue().endswith("\n")


def test_a_predicted_time_is_called_so_and_never_beats_a_measured_one():
    terminal, clock = Terminal(), Clock()
    predicted = Record("m16n16w4", "predicted", predicted_ms=0.5)
    run(terminal, clock, [predicted, measured(2.0, "m64n64w4"), predicted])
    states = terminal.drawn()
    assert "fastest predicted 0.5000 ms m16n16w4" in states[1]
    assert "fastest 2.000 ms m64n64w4" in states[-1]


def test_the_last_line_shows_the_best_which_need_not_be_the_fastest():
    terminal = Terminal()
    with Progress(2, "forward", terminal, Clock()) as progress:
        progress.update(measured(1.5))
        progress.update(measured(1.6, "m32n32w4"))
        progress.name_best(measured(1.61, "m32n32w4"))
    *earlier, last = terminal.drawn()
    assert "best 1.610 ms m32n32w4" in last and "fastest" not in last
    assert all("best" not in state for state in earlier)


def test_a_quiet_run_shows_nothing():
    terminal = Terminal()
    run(terminal, Clock(), [measured(1.0)], quiet=True)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("outcome", FAILURES)
def test_no_failure_is_the_fastest(outcome):
    terminal = Terminal()
    failed = measured(0.1, "m8n8w1").failed(outcome, "it failed")
    run(terminal, Clock(), [failed])
    assert "fastest" not in terminal.getvalue()
    assert f"1 {outcome.replace('_', ' ')}" in terminal.drawn()[-1]


@pytest.mark.parametrize("width", [1, 8, 20, 40, 60, 80, 100, 200])
def test_the_bar_never_reaches_the_last_column(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    terminal = Terminal()
    run(terminal, Clock(), [measured(1.0, "sm80-m128n64w4s2-packed")] * 9)
    assert max(len(state) for state in terminal.drawn()[:-1]) < max(width, 1)
    if width >= 40:
        assert all("fastest 1.000 ms" in state for state in terminal.drawn()[1:])
        assert "9/10" in terminal.drawn()[-2]


def test_wide_characters_count_twice(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    terminal = Terminal()
    with Progress(10, "幅" * 20, terminal, Clock()) as progress:
        progress.refresh()
    first = terminal.drawn()[0]
    assert "幅" * 20 in first and "━" not in first and "─" not in first


def test_at_most_ten_redraws_a_second():
    terminal, clock = Terminal(), Clock()
    run(terminal, clock, [measured(1.0)] * 1000, seconds=0.001, total=1000)
    assert 5 <= len(terminal.drawn()) <= 13


def test_colours_only_where_wanted(monkeypatch):
    plain, colored, clock = Terminal(), Terminal(), Clock()
    run(colored, clock, [measured(1.0)])
    monkeypatch.setenv("NO_COLOR", "1")
    run(plain, Clock(), [measured(1.0)])
    assert SGR.search(colored.getvalue())
    assert not SGR.search(plain.getvalue())
    assert plain.drawn() == colored.drawn()


def test_a_log_gets_a_line_every_ten_seconds_and_one_at_the_end():
    log, clock = io.StringIO(), Clock()
    run(log, clock, [measured(1.0)] * 35, total=35)
    lines = log.getvalue().splitlines()
    assert "\x1b" not in log.getvalue() and "\r" not in log.getvalue()
    assert [line.split()[1] for line in lines] == ["10/35", "20/35", "30/35", "35/35"]
    assert "0:10, 0:25 left" in lines[0]
    assert lines[-1].endswith("0:35")


def test_a_dumb_terminal_is_a_log(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    run(terminal, Clock(), [measured(1.0)])
    assert "\r" not in terminal.getvalue()


def test_time_left_is_the_shorter_of_trials_and_budget():
    clock = Clock()
    progress = Progress(100, "t", io.StringIO(), clock, time_budget=30.0)
    assert progress.seconds_left() == 30.0
    clock.now += 10
    progress.update(measured(1.0))
    assert progress.seconds_left() == 20.0
    for _ in range(89):
        progress.update(measured(1.0))
    assert progress.seconds_left() == pytest.approx(10 / 9)
    assert Progress(None, "t", io.StringIO(), clock).seconds_left() is None


def test_earlier_trials_count_as_done_but_not_for_the_pace():
    clock = Clock()
    earlier = [measured(2.0, "m64n64w4"), Record("x", "timeout", "60 s")]
    terminal = Terminal()
    with Progress(5, "t", terminal, clock, earlier=earlier) as progress:
        assert progress.done == 2 and progress.seconds_left() is None
        clock.now += 4
        progress.update(measured(3.0))
        assert progress.seconds_left() == 8.0
    assert "3/5  fastest 2.000 ms m64n64w4" in terminal.drawn()[-1]


def test_a_note_stands_above_the_bar():
    terminal = Terminal()
    with Progress(10, "forward", terminal, Clock()) as progress:
        progress.note("cannot write the cache\nsecond line")
    states = SGR.sub("", terminal.getvalue()).split("\r\x1b[K")
    assert states[2] == "cannot write the cache\nsecond line\n" + ""
    assert states[3].startswith("forward")


def test_names_cannot_steer_the_terminal(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    with Progress(1, "GPU\x1b[2J\r\x07", terminal, Clock()) as progress:
        progress.note("a\x1b[31mb")
    assert terminal.getvalue().count("\x1b") == terminal.getvalue().count("\r\x1b[K")
    assert "\x07" not in terminal.getvalue() and "a?[31mb" in terminal.getvalue()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_the_line_finished_and_is_passed_on(error):
    terminal = Terminal()
    with pytest.raises(error), Progress(10, "t", terminal, Clock()) as progress:
        progress.update(measured(1.0))
        raise error
    word = "interrupted" if error is KeyboardInterrupt else "stopped"
    assert terminal.drawn()[-1].endswith(word)
    assert terminal.getvalue().endswith("\n")


def test_a_broken_stream_does_not_stop_the_run():
    class Broken(Terminal):
        def write(self, text):
            raise BrokenPipeError

    assert run(Broken(), Clock(), [measured(1.0)] * 3).done == 3
    closed = io.StringIO()
    closed.close()
    assert run(closed, Clock(), [measured(1.0)] * 3).done == 3


def test_a_stream_without_unicode():
    class Ascii(Terminal):
        encoding = "ascii"

    terminal = Ascii()
    run(terminal, Clock(), [measured(1.0)] * 5, total=10)
    assert terminal.getvalue().isascii() and "############------------" in terminal.getvalue()


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (1.23456, "1.235"),
        (0.0123456, "0.01235"),
        (123.456, "123.5"),
        (12345.6, "12346"),
        (None, "-"),
        (float("inf"), "-"),
        (0.0, "0"),
    ],
)
def test_format_ms(milliseconds, text):
    assert format_ms(milliseconds) == text
