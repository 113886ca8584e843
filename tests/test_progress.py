"""What the bar says, read from a stream that is no terminal."""

import io
import itertools
import math
import sys
import time

import pytest

from bptt_jax.experiments.progress import progress, progress_bar


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> None:
    """Each look at it is two seconds after the one before."""
    ticks = itertools.count(10, 2)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))


def record(updates: int, **other) -> dict:
    empty = {"clipped": None, "skipped": None, "solved_at": [None], "window": None, "bias_bound": None}
    return {"updates": updates, "loss": [0.5], "gradient_log_norm": [math.log(3)], **empty, **other}


def test_lines_for_tenths_and_for_events(capsys) -> None:
    with progress_bar(100) as report:
        for n in range(4, 101, 4):
            report(record(n))
        event = {"event": "non-finite", "seed": 2, "updates": 7, "loss": "nan"}
        report(event | {"losses_before": [1.0], "gradient_log_norms_before": [math.log(2), math.log(40)]})
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" of ")[0] for line in told[:-1]] == [
        "12",
        "20",
        "32",
        "40",
        "52",
        "60",
        "72",
        "80",
        "92",
        "100",
    ]
    # Of the first four updates nothing is known but when they were done; from then on four of them take two seconds.
    assert told[0] == "12 of 100 updates: loss 0.5, gradient norm 3, 2 updates/s, 44 s left"
    assert told[9] == "100 of 100 updates: loss 0.5, gradient norm 3, 2 updates/s"
    assert told[-1] == "seed 2, update 7: the loss is nan; gradient norms before: 2 40"


def test_medians_of_the_seeds_that_run(capsys) -> None:
    with progress_bar(10) as report:
        report(
            record(10, loss=[3.0, None, 1.0, 2.0], gradient_log_norm=[800.0, None, 900.0, "inf"])
            | {
                "clipped": [0.25, None, 0.5, 1.0],
                "skipped": [0.0, None, 0.0, 0.0],
                "window": 16,
                "bias_bound": [0.3, 0.2, 0.1, 0.4],
                "solved_at": [None, 5, None, None],
            }
        )
    line = capsys.readouterr().err.strip()
    assert (
        line == "10 of 10 updates: loss 2, log gradient norm 900, clipped 50%, skipped 0%, window 16, solved 1 of 4"
    )


def test_no_number_is_no_trouble(capsys) -> None:
    with progress_bar(1) as report:
        report(record(1, loss=[None], gradient_log_norm=["nan"]))
    assert "loss nan, " in capsys.readouterr().err


def test_time_that_is_left(capsys) -> None:
    with progress(1000, "cell") as shown:
        for done in (0, 1, 990):
            shown.show(done, "", str(done))
        shown.say("one of them has failed")
    told = capsys.readouterr().err.splitlines()
    assert told == ["0", "1, 2 s each, 33 min left", "990, 248 cells/s, 1 s left", "one of them has failed"]
    with progress(10000, "cell") as shown:
        shown.show(100, "", "100")
        shown.show(200, "", "200")
        shown.show(201, "", None)
        shown.show(202, "", "202")
    assert capsys.readouterr().err.splitlines()[-1] == "202, 17 cells/s, 10 min left"
    with progress(10000, "cell") as shown:
        shown.show(100, "", None)
        shown.show(101, "", "101")
    assert capsys.readouterr().err == "101, 2 s each, 5 h 30 min left\n"


def test_one_in_a_second(monkeypatch, capsys) -> None:
    ticks = itertools.count(0, 0.999)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    with progress(3, "update") as shown:
        shown.show(0, "", None)
        shown.show(1, "", "1")
    assert capsys.readouterr().err == "1, 1 update/s, 2 s left\n"


def test_a_terminal_has_a_bar_and_nothing_else_has_returns(monkeypatch, capsys) -> None:
    """Not even a notebook, which has no terminal but shows whatever is written."""
    with progress(4, "cell") as shown:
        shown.show(0, "measuring rnn", "measuring rnn (1 of 4)")
        shown.show(1, "measuring rnn")
    assert capsys.readouterr().err == "measuring rnn (1 of 4)\n"

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress(4, "cell") as shown:
        shown.show(0, "measuring rnn", "measuring rnn (1 of 4)")
        shown.show(1, "measuring gru", "measuring gru (2 of 4)")
        shown.say("a word")
    told = sys.stderr.getvalue()
    assert "a word\n" in told
    assert "measuring gru" in told
    assert "(2 of 4)" not in told


def test_quiet(capsys) -> None:
    with progress(4, "cell", quiet=True) as shown:
        shown.show(1, "measuring rnn", "measuring rnn")
        shown.say("a word")
    with progress_bar(4, quiet=True) as report:
        report(record(4))
    assert capsys.readouterr().err == ""
