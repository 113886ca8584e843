"""What the bar says, read from a stream that is no terminal."""

import math

from bptt_jax.experiments.progress import progress_bar


def record(updates: int, **other) -> dict:
    empty = {"clipped": None, "skipped": None, "solved_at": [None]}
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
    assert told[0] == "12 of 100 updates: loss 0.5, gradient norm 3"
    assert told[-1] == "seed 2, update 7: the loss is nan; gradient norms before: 2 40"


def test_medians_of_the_seeds_that_run(capsys) -> None:
    with progress_bar(10) as report:
        report(
            record(10, loss=[3.0, None, 1.0, 2.0], gradient_log_norm=[800.0, None, 900.0, "inf"])
            | {
                "clipped": [0.25, None, 0.5, 1.0],
                "skipped": [0.0, None, 0.0, 0.0],
                "solved_at": [None, 5, None, None],
            }
        )
    line = capsys.readouterr().err.strip()
    assert line == "10 of 10 updates: loss 2, log gradient norm 900, clipped 50%, skipped 0%, solved 1 of 4"


def test_no_number_is_no_trouble(capsys) -> None:
    with progress_bar(1) as report:
        report(record(1, loss=[None], gradient_log_norm=["nan"]))
    assert "loss nan, " in capsys.readouterr().err
