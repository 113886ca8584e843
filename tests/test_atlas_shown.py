"""The atlas shown: the map, read back from its artists, and what the command writes."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import get_args

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

import bptt_jax as bptt
from bptt_jax.cells import ATLAS, CellMeasurement
from bptt_jax.cells.atlas import Family
from bptt_jax.cli import atlas as job
from bptt_jax.cli.main import main
from bptt_jax.experiments import atlas
from bptt_jax.plots.atlas import _FAMILIES, plot_atlas

FIELDS = "growth_rate growth_rate_error exponent exponent_error living log_condition forward_time memory learned"
FIELDS += " forward_seconds gradient_seconds memory_bytes horizon horizon_low horizon_high gradient_time"


def measurement(name="rnn", family="simple", *, horizon=20.0, cost=1.0, **others):
    numbers = dict.fromkeys(FIELDS.split(), 0.5) | {"gradient_time": cost, "learned": np.nan, "horizon": horizon}
    numbers |= {"horizon_low": horizon / 2, "horizon_high": 2 * horizon}
    sizes = {"hidden": 4, "parameters": 28, "size": 4, "followed": 4}
    rest = {"basis": "width", "parallel": "parallel", "leaf_names": ("h",), "leaf_shares": np.ones(1)}
    fields = sizes | rest | {k: np.float64(v) for k, v in numbers.items()} | others
    return CellMeasurement(name=name, family=family, **fields)


def crowd():
    """64 cells, most of them alike."""
    draw = np.random.default_rng(0)
    families = list(_FAMILIES)
    return [
        measurement(
            f"cell_number_{i}",
            families[i % len(families)],
            horizon=np.inf if i % 5 == 0 else float(np.exp(draw.normal(4, 0.7))),
            cost=float(np.exp(draw.normal(0.5, 0.4))),
        )
        for i in range(64)
    ]


def test_one_of_a_kind_is_no_plural() -> None:
    of = {"hidden": 1, "batch": 1, "seeds": 1, "length": 1}
    assert (
        job.title(atlas.Settings(task="text", **of))
        == "1 unit, 1 sequence of 1 character, 1 seed, at initialisation"
    )
    assert "1 sequence of 1 step of the task adding" in job.title(atlas.Settings(task="adding", **of))
    assert "2 units" in job.title(atlas.Settings(task="text", **of | {"hidden": 2}))
    assert "rnn of 1 unit: the gradient reaches 1 step back" in repr(measurement(hidden=1, horizon=1.0))


@pytest.fixture(scope="module")
def figure():
    return plot_atlas(crowd(), title="many")


def test_a_mark_for_each_cell_at_its_cost_and_horizon() -> None:
    of = [measurement("rnn", cost=1.0), measurement("lru", "linear", horizon=300.0, cost=0.5)]
    (ax,) = plot_atlas({m.name: m for m in of}).axes
    marks = [line for line in ax.lines if line.get_marker() in {marker for _, marker in _FAMILIES.values()}]
    np.testing.assert_allclose([line.get_xydata()[0] for line in marks], [[1.0, 20.0], [0.5, 300.0]])
    assert [line.get_label() for line in marks] == ["simple (1)", "linear (1)"]
    bars = [line.get_ydata().tolist() for line in ax.lines if len(line.get_xdata()) == 2 and line not in marks]
    assert [10.0, 40.0] in bars
    assert {text.get_text() for text in ax.texts} == {"rnn", "lru"}


def test_without_a_horizon_a_cell_lies_above_all_others(figure) -> None:
    (ax,) = figure.axes
    heights = np.concatenate([line.get_ydata() for line in ax.lines if line.get_label()[0] != "_"])
    reached = max(m.horizon for m in crowd() if np.isfinite(m.horizon))
    assert np.sum(heights > 2 * reached) == 13
    assert np.max(heights) < ax.get_ylim()[1]
    assert "does not shrink" in [text.get_text() for text in ax.texts]


def test_no_name_covers_another_or_a_mark(figure) -> None:
    (ax,) = figure.axes
    figure.draw_without_rendering()
    names = [text for text in ax.texts if text.get_text().startswith("cell_number")]
    assert len(names) == 64
    boxes = [text.get_window_extent() for text in names]
    outside = ax.get_window_extent()
    for i, box in enumerate(boxes):
        assert outside.x0 <= box.x0 < box.x1 <= outside.x1
        assert outside.y0 <= box.y0 < box.y1 <= outside.y1
        assert not any(box.overlaps(other) for other in boxes[:i])
    places = np.concatenate([line.get_xydata() for line in ax.lines if line.get_label()[0] != "_"])
    for x, y in ax.transData.transform(places):
        assert not any(box.contains(x, y) for box in boxes)


def test_the_same_places_every_time(figure) -> None:
    (first,), (second,) = figure.axes, plot_atlas(crowd(), title="many").axes
    assert [t.get_position() for t in first.texts] == [t.get_position() for t in second.texts]


def test_families_are_told_apart_in_grey(figure) -> None:
    (ax,) = figure.axes
    of = [line for line in ax.lines if line.get_label()[0] != "_"]
    assert set(_FAMILIES) == set(get_args(Family))
    assert (
        len({line.get_marker() for line in of}) == len({to_rgb(line.get_color()) for line in of}) == len(_FAMILIES)
    )


def test_into_given_axes_and_what_has_no_number_is_named() -> None:
    given, ax = plt.subplots()
    assert plot_atlas([measurement(), measurement("lstm", horizon=np.nan)], ax) is given
    assert "without a number: lstm" in [text.get_text() for text in ax.texts]
    plt.close(given)


@pytest.mark.parametrize(("results", "error"), [
    (None, TypeError), ("rnn", TypeError), ([1], TypeError), ([], ValueError),
])  # fmt: skip
def test_what_is_no_measurement_is_refused(results, error) -> None:
    with pytest.raises(error, match="results: expected"):
        bptt.plots.plot_atlas(results)


def test_a_map_on_which_no_cell_has_a_place() -> None:
    axes = plot_atlas([measurement(horizon=np.nan), measurement("lstm", "gated", cost=np.inf)]).axes[0]
    assert [t.get_text() for t in axes.texts] == ["without a number: rnn, lstm"]
    assert not axes.lines


@pytest.fixture
def bench(monkeypatch):
    """Cells are measured at once, but for those in the set, which fail."""
    failing = set()

    class Bench:
        def __init__(self, settings, task, reference):
            assert settings.length == task.length

        def measure(self, name, entry):
            if name in failing:
                raise RuntimeError("out of luck")
            of = measurement(name, entry.family, horizon=10.0 * len(name))
            return {basis: replace(of, basis=basis) for basis in atlas.BASES}

    monkeypatch.setattr(atlas, "_Bench", Bench)
    return failing


SMALL = ["--hidden", "4", "--length", "20", "--batch", "2", "--seeds", "2"]


def test_the_command_writes_table_map_and_page(bench, tmp_path, capsys) -> None:
    assert main(["atlas", "--cells", "rnn", "lstm", "--family", "linear", *SMALL, "--out", str(tmp_path)]) == 0
    linear = {name for name, entry in ATLAS.items() if entry.family == "linear"}
    there = json.loads((tmp_path / "atlas.json").read_text())
    assert set(there["cells"]) == {"rnn", "lstm"} | linear
    assert there["settings"]["hidden"] == 4
    table = (tmp_path / "atlas.md").read_text()
    longest = sorted(there["cells"], key=lambda name: (-len(name), name))
    for part in table.split("**At equal ")[1:]:
        assert re.findall(r"^\| (\w+) \| \w+ \| \d", part, re.MULTILINE) == longest
    assert (tmp_path / "atlas.png").read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr()
    assert f"measuring rnn (1 of {len(linear) + 2})" in told.err
    assert "wrote" in told.out
    page = (tmp_path / "atlas.html").read_text()
    assert "<script" not in page
    assert re.findall(r"(?:src|href)=\"(?!#|data:)|@import|url\((?!#)", page) == []
    rows = []

    class Rows(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag == "tr":
                rows.append([])

        def handle_data(self, data):
            if rows:
                rows[-1].append(data.strip())

    Rows().feed(page)
    assert sum(row[:1] == ["rnn"] for row in rows) == 2
    for name in job.MEANINGS:
        assert f"<dt>{name}</dt>" in page
    for color in set(re.findall(r"var\(--c([0-9a-f]{6})", page)):
        assert f"--c{color}:" in page, "no colour for the dark"


def test_a_cell_that_fails_is_named_and_measured_when_it_is_asked_for_again(bench, tmp_path, capsys) -> None:
    bench.add("rnn")
    command = ["atlas", "--cells", "rnn", "lstm", *SMALL, "--out", str(tmp_path)]
    assert main(command) == 1
    assert "rnn was not measured: RuntimeError: out of luck" in capsys.readouterr().err
    assert "out of luck" in (tmp_path / "atlas.html").read_text()
    assert main([*command, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (list(told["cells"]), list(told["not_measured"])) == (["lstm"], ["rnn"])
    assert told["files"] == [str(tmp_path / f"atlas.{kind}") for kind in ("json", "md", "png", "html")]
    bench.clear()
    assert main(command) == 0
    assert "measuring rnn (2 of 2)\n" in (told := capsys.readouterr().err)
    assert "lstm" not in told
    assert main([*command[:2], "rnn", *SMALL, "--hidden", "8", "--out", str(tmp_path)]) == 2
    assert "hidden: 4 there, 8 here" in capsys.readouterr().err


def test_interrupted_it_says_what_is_kept(bench, tmp_path, capsys, monkeypatch) -> None:
    whole = atlas._write

    def interrupted(*arguments):
        whole(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(atlas, "_write", interrupted)
    command = ["atlas", "--cells", "rnn", "lstm", *SMALL, "--out", str(tmp_path)]
    assert main(command) == 130
    assert "what is measured is kept, and the same command goes on from there" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "atlas.json").read_text())["cells"]) == ["rnn"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--text", "no-such-file"], "--text: no-such-file"),
        (["--text", "a", "--task", "adding"], "--text, --task: expected one of them"),
        (["--length", "1"], "--length: expected at least 2"),
        (["--task", "digits"], "--length: the digits have 64 pixels"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_measured(options, told, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(atlas, "_Bench", None)
    assert main(["atlas", *options, "--out", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bounds_are_marked_where_not_all_directions_were_followed() -> None:
    few = measurement(size=100, followed=4, living=np.float64(4), log_condition=np.float64(7))
    part = measurement(size=100, followed=4, living=np.float64(3), log_condition=np.float64(np.inf))
    whole = measurement(living=np.float64(4), log_condition=np.float64(7))
    at = [job.COLUMNS.index(name) for name in ("living", "log condition")]
    told = [tuple(row[i] for i in at) for row in job.rows([few, part, whole])]
    assert told == [("≥ 4 of 100", "≥ 7"), ("3 of 100", "inf"), ("4 of 4", "7")]


def test_what_could_not_be_told_is_unknown() -> None:
    of_one_seed = measurement(growth_rate=np.float64(-0.25), growth_rate_error=np.float64(np.nan))
    none = measurement(exponent=np.float64(np.nan), exponent_error=np.float64(np.nan))
    at = [job.COLUMNS.index(name) for name in ("growth rate", "exponent")]
    (rate, _), (_, exponent) = ([row[i] for i in at] for row in job.rows([of_one_seed, none]))
    assert (rate, exponent) == ("-0.2500", "unknown")
