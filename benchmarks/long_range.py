"""How long a lag will a network learn, told from a short pilot of its training?

`long_range_trials.py` has trained recurrences on three tasks, each up to the longest T that it learns. Here what can be
known early is put beside that: horizons and growth rates of the error signal before and after the first 60 updates at
T = 160, losses after them, and the loss after a pilot of 540 updates at T = 10, which are a fiftieth of the steps of
all updates at T = 160. `bptt_jax.experiments.prognosis.prognose` is fitted to the recurrences that are not set aside,
and judged on the others, once. Rank correlations are Spearman's, over all pairs of recurrence and task, with 90 %
intervals from resampling recurrences.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import long_range_trials as trials
import matplotlib
import numpy as np
from measure import parser, print_table, save, write
from scipy.stats import rankdata

import bptt_jax as bptt
from bptt_jax.experiments.network import Network
from bptt_jax.experiments.prognosis import LONGEST, PILOT_LENGTH, PILOT_SHARE, SOLVED, UNSOLVED, predicted, reach
from bptt_jax.files import write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEQUENCES, RESAMPLES = 8, 2000
FIRST = {  # the figures of the predictor before this one, with half of the recurrences of the fit set aside
    "rank_correlation": 0.3035,
    "rank_correlation_set_aside": 0.3148,
    "rank_correlation_set_aside_interval": [0.0665, 0.4979],
}


def measured(folder: trials.Folder, name: str, cell: bptt.Cell, task: str, length: int) -> dict[str, Any]:
    """What the bursts at `length` and at the shortest length leave, by seed; kept beside the trials."""
    file = folder.path / name / f"{task} measured.json"
    if not file.exists():
        burst, short = (
            _burst(folder, name, task, length),
            folder.of(name, task, min(folder.settings["tasks"][task])),
        )
        before, after = _saved(burst)
        sets = {"before": before, "after": after, "further": 2 * after - before, "after short": _saved(short)[1]}
        net = trials.network_of(cell, task, length)
        found = _reaches(net, jnp.stack([a for of in sets.values() for a in of]))
        shape = len(sets), folder.settings["seeds"]
        arrays = (np.asarray(a, np.float64).reshape(shape).tolist() for a in found)
        record: dict[str, Any] = {
            kind: dict(zip(sets, of, strict=True))
            for kind, of in zip(("horizon", "rate", "end"), arrays, strict=True)
        }
        trivial = net.task.baseline
        record["loss"] = (np.asarray(json.loads(burst.read_text())["losses"][0]) / trivial).tolist()
        record["loss short"] = (np.asarray(json.loads(short.read_text())["losses"][0]) / trivial).tolist()
        write_json(file, record)
        print("measured", name, task, flush=True)
    return dict(json.loads(file.read_text()))


def _burst(folder: trials.Folder, name: str, task: str, length: int) -> Path:
    whole = folder.of(name, task, length)
    return whole if whole.exists() else folder.of(name, task, length, burst=True)


def _saved(record: Path) -> tuple[Any, Any]:
    with np.load(record.with_suffix(".npz")) as kept:
        return kept["before"], kept["after"]


_PROGRAMS: dict[Any, Any] = {}


def _reaches(net: Network, flat: Any) -> Any:
    key = net.cell.step, net.task.name, net.task.length
    if key not in _PROGRAMS:
        merge = trials.unflattened(net)
        data = net.task.sample(jax.random.key(0), SEQUENCES)
        _PROGRAMS[key] = jax.jit(lambda flat: jax.lax.map(lambda p: reach(net, data, merge(p)), flat))
    return _PROGRAMS[key](flat)


def row_of(
    folder: trials.Folder, name: str, cell: bptt.Cell, task: str, s: dict[str, Any]
) -> dict[str, Any] | None:
    """Of a pair whose trials are all there."""
    files = [folder.of(name, task, length) for length in s["tasks"][task]]
    tried = [json.loads(f.read_text()) for f in files if f.exists()]
    if not tried or (len(tried) < len(files) and max(tried[-1]["solved_at"]) >= 0):
        return None
    length = s["bursts"][0]
    if not _burst(folder, name, task, length).exists():
        return None
    row = {"name": name, "family": trials.family(name), "task": task, "set_aside": name in s["set_aside"]}
    learned = trials.longest_learned(tried)
    row |= {"learned": learned, "longest": learned == max(s["tasks"][task])}
    row |= {"solved_at": {t["T"]: t["solved_at"] for t in tried}, "pilot": pilot(folder, name, task, s)}
    return row | measured(folder, name, cell, task, length)


def pilot(folder: trials.Folder, name: str, task: str, s: dict[str, Any]) -> list[float]:
    """Of each seed the loss after `PILOT_SHARE` of the updates at the shortest length, relative to the trivial, or
    when all seeds had succeeded before."""
    record = json.loads(folder.of(name, task, min(s["tasks"][task])).read_text())
    return (np.asarray(record["losses"][: pilot_updates(s) // s["burst"]][-1]) / record["trivial_loss"]).tolist()


def pilot_updates(s: dict[str, Any]) -> int:
    """Losses are known after every burst's number."""
    return int(max(1, round(PILOT_SHARE * s["updates"]) // s["burst"]) * s["burst"])


def log_median(horizons: list[float]) -> float:
    return float(np.median(np.log(np.clip(np.asarray(horizons, float), 1, LONGEST))))


def median(values: list[Any]) -> float:
    return float(np.median(np.nan_to_num(np.asarray(values, float), nan=-np.inf)))


def candidates(row: dict[str, Any]) -> dict[str, float]:
    """What was tried; the larger, the longer a lag is to be expected."""
    horizon = {k: log_median(of) for k, of in row["horizon"].items()}
    rate = {k: median(of) for k, of in row["rate"].items()}
    return {
        "horizon before training": horizon["before"],
        "horizon after the burst": horizon["after"],
        "horizon after a burst at T = 10": horizon["after short"],
        "horizon, as much further along the burst's update": horizon["further"],
        "growth rate before training": rate["before"],
        "growth rate after the burst": rate["after"],
        "change of the growth rate by the burst": rate["after"] - rate["before"],
        "velocity of the growth rate along the burst's update": rate["further"] - rate["after"],
        "loss after the burst, relative to the trivial": -median(row["loss"]),
        "loss after a burst at T = 10": -median(row["loss short"]),
        "loss after the pilot": -features(row)[2],
        "prognose": prediction(row)[0],
    }


def prediction(row: dict[str, Any]) -> tuple[float, float, float]:
    """Lag, low and high, geometric means over the seeds."""
    seeds = jnp.asarray([row["horizon"]["before"], row["pilot"]], jnp.float32)
    lag, low, high = (float(np.exp(np.mean(np.log(a)))) for a in jax.vmap(predicted)(*seeds))
    return lag, low, high


def features(row: dict[str, Any]) -> list[float]:
    """What the logarithm of the prediction is linear in, means over the seeds."""
    reached = np.clip(np.asarray(row["horizon"]["before"], float), 1, LONGEST)
    left = np.clip(np.nan_to_num(np.asarray(row["pilot"], float), nan=UNSOLVED), SOLVED, UNSOLVED)
    return [1.0, float(np.mean(np.log(reached))), float(np.mean(np.log(left)))]


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's; ties get their mean rank. NaN where all are tied."""
    if min(len(set(x)), len(set(y))) < 2:
        return math.nan
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def judged(rows: list[dict[str, Any]], values: list[float]) -> dict[str, Any]:
    """The rank correlation of values with what was learned, and its 90 % interval, for which recurrences are drawn with
    replacement: tasks of one recurrence are no independent pairs."""
    learned = [r["learned"] for r in rows]
    of = {n: [i for i, r in enumerate(rows) if r["name"] == n] for n in dict.fromkeys(r["name"] for r in rows)}
    rng, found = np.random.default_rng(0), []
    for _ in range(RESAMPLES if of else 0):
        drawn = [i for k in rng.integers(len(of), size=len(of)) for i in list(of.values())[k]]
        found.append(rank_correlation([values[i] for i in drawn], [learned[i] for i in drawn]))
    known = [c for c in found if not math.isnan(c)]
    low, high = np.quantile(known, [0.05, 0.95]).tolist() if known else (math.nan, math.nan)
    return {"value": rank_correlation(values, learned), "low": low, "high": high, "pairs": len(rows)}


def target(row: dict[str, Any]) -> float:
    """Nothing learned at the shortest length stands for half of it."""
    return float(np.log(max(row["learned"], min(int(n) for n in row["solved_at"]) / 2)))


def fit(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The constants of `bptt_jax.experiments.prognosis`: by least squares, and of the residuals, each recurrence
    left out of its own fit, the size that four of five do not exceed; and the rank correlation of what is so
    predicted."""

    def solve(of: list[dict[str, Any]]) -> np.ndarray:
        return np.linalg.lstsq(np.array([features(r) for r in of]), np.array([target(r) for r in of]), rcond=None)[
            0
        ]

    expected: dict[tuple[str, str], float] = {}
    for name in dict.fromkeys(r["name"] for r in rows):
        out = [r for r in rows if r["name"] == name]
        found = np.array([features(r) for r in out]) @ solve([r for r in rows if r["name"] != name])
        expected |= {(name, r["task"]): float(e) for r, e in zip(out, found, strict=True)}
    left_out = [expected[r["name"], r["task"]] for r in rows]
    residuals = np.abs(np.array([target(r) for r in rows]) - left_out)
    return {
        "coefficients": solve(rows).tolist(),
        "half_width": float(np.quantile(residuals, 0.8)),
        "left_out": judged(rows, left_out),
    }


def figure(rows: list[dict[str, Any]], s: dict[str, Any]) -> Any:
    """Predicted against learned, the half that the fit has seen and the half that was set aside."""
    fig, axes = plt.subplots(1, 2, figsize=(12, 5.2), sharex=True, sharey=True, layout="constrained")
    looks = dict(zip(s["tasks"], ("o", "s", "^"), strict=False))
    rng = np.random.default_rng(1)
    for ax, aside in zip(axes, (False, True), strict=True):
        for row in (r for r in rows if r["set_aside"] == aside):
            lag, low, high = prediction(row)
            y = np.exp(target(row) + rng.uniform(-0.13, 0.13))  # so that equal ones are seen
            ax.plot([low, high], [y, y], color="0.8", lw=0.8, zorder=1)
            ax.plot(lag, y, looks[row["task"]], color="0.15", mfc="0.15" if row["longest"] else "none", ms=5)
            if row["task"] == next(iter(looks)):
                ax.annotate(row["name"], (lag, y), xytext=(4, 3), textcoords="offset points", fontsize="xx-small")
        ends = np.array([4.0, 250.0])
        ax.plot(ends, ends, "k--", lw=0.8)
        ax.set(xscale="log", yscale="log", title="set aside" if aside else "used for the fit")
        ax.set_xlabel("lag that is predicted, and its range")
    for task, look in looks.items():
        axes[0].plot([], [], look, color="0.15", mfc="none", label=task)
    axes[0].plot([], [], "o", color="0.15", label="filled: the longest T that was tried")
    axes[0].plot([], [], "k--", lw=0.8, label="predicted = learned")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    axes[0].set_ylabel("longest T learned (jittered; 5: not even 10)")
    fig.suptitle(f"{s['hidden']} units, {s['updates']} updates of {s['batch']} sequences, {s['seeds']} seeds")
    return fig


def cost(folder: trials.Folder, rows: list[dict[str, Any]], s: dict[str, Any]) -> dict[str, Any]:
    """Shares of the training at the burst's length: of its steps those of the pilot, and of their time the pilot's, the
    median and the quartiles of all pairs where both were timed."""
    length, shares = s["bursts"][0], []
    for row in rows:
        short, long = (
            json.loads(file.read_text())["seconds_of_updates"] if file.exists() else None
            for file in (folder.of(row["name"], row["task"], T) for T in (min(s["tasks"][row["task"]]), length))
        )
        if short is not None and long is not None:
            shares.append(pilot_updates(s) * short / (s["updates"] * long))
    return {
        "steps": PILOT_SHARE * PILOT_LENGTH / length,
        "time": float(np.median(shares)) if shares else None,
        "time_quartiles": np.quantile(shares, [0.25, 0.75]).tolist() if shares else None,
        "pairs": len(shares),
    }


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--longer", action="store_true", help="of the longer trials")
    p.add_argument("--judge", action="store_true", help="train nothing: judge by the trials that are there")
    a = p.parse_args()
    s = trials.settings(quick=a.quick, longer=a.longer)
    path = a.out / "long_range.part"
    folder = trials.Folder(path, s) if a.judge else trials.run_all(path, s)
    rows = rows_of(folder, s)
    halves = {
        "all": rows,
        "fitted": [r for r in rows if not r["set_aside"]],
        "set_aside": [r for r in rows if r["set_aside"]],
    }
    values = {half: [candidates(r) for r in of] for half, of in halves.items()}
    predictors = {
        name: {half: judged(of, [v[name] for v in values[half]]) for half, of in halves.items()}
        for name in values["all"][0]
    }
    by_task = {task: {half: _of_task(task, of, values[half]) for half, of in halves.items()} for task in s["tasks"]}
    seen, aside = halves["fitted"], halves["set_aside"]
    for row in rows:
        lag, low, high = prediction(row)
        row |= {"predicted": lag, "predicted_low": low, "predicted_high": high}
    print_table(
        f"Rank correlation with the longest T learned: {len(rows)} pairs of recurrence and task, of which "
        f"{len(aside)} set aside; 90 % intervals",
        ("predictor", "all", "used for the fit", "set aside"),
        [(name, *(_words(of[k]) for k in ("all", "fitted", "set_aside"))) for name, of in predictors.items()],
    )
    learners = {half: [r for r in of if r["learned"]] for half, of in halves.items()}
    within = [r["predicted_low"] <= np.exp(target(r)) <= r["predicted_high"] for r in aside]
    results = {
        **_with_interval("rank_correlation", predictors["prognose"]["all"]),
        **_with_interval("rank_correlation_set_aside", predictors["prognose"]["set_aside"]),
        "first_predictor": FIRST,
        "predictors": predictors,
        "by_task": by_task,
        "of_pairs_that_learn": {half: judged(of, [prediction(r)[0] for r in of]) for half, of in learners.items()},
        "within_range_set_aside": float(np.mean(within)),
        "cost": cost(folder, rows, s),
        "fit": fit(seen),
        "rows": rows,
    }
    print(f"fit: {results['fit']}; of those set aside {np.mean(within):.0%} lie in the range")
    write(a.out / "long_range.png", lambda path: figure(rows, s).savefig(path, dpi=130))
    save(a.out, "long_range", s | {"xla_flags": xla_flags(folder, rows)}, results)


def rows_of(folder: trials.Folder, s: dict[str, Any]) -> list[dict[str, Any]]:
    """All pairs; of the recurrences set aside those up to the first that is not complete, in drawn order."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for name, cell in trials.chosen(s).items():
        rows = [row_of(folder, name, cell, task, s) for task in s["tasks"]]
        if None in rows:
            break
        by_name[name] = [r for r in rows if r is not None]
    return [row for task in range(len(s["tasks"])) for row in (rows[task] for rows in by_name.values())]


def xla_flags(folder: trials.Folder, rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """XLA_FLAGS under which the trials were run, of those that are used for the fit and of those set aside."""
    found: dict[str, set[str]] = {"fitted": set(), "set_aside": set()}
    for row in rows:
        record = json.loads(folder.of(row["name"], row["task"], int(min(row["solved_at"]))).read_text())
        found["set_aside" if row["set_aside"] else "fitted"].add(record.get("xla_flags", "not recorded"))
    return {half: sorted(of) for half, of in found.items()}


def _of_task(task: str, rows: list[dict[str, Any]], values: list[dict[str, Any]]) -> dict[str, Any] | None:
    pairs = [(r, v["prognose"]) for r, v in zip(rows, values, strict=True) if r["task"] == task]
    return judged([r for r, _ in pairs], [v for _, v in pairs]) if len(pairs) > 2 else None


def _with_interval(name: str, of: dict[str, Any]) -> dict[str, Any]:
    return {name: of["value"], f"{name}_interval": [of["low"], of["high"]]}


def _words(of: dict[str, Any]) -> str:
    return f"{of['value']:.2f} ({of['low']:.2f} to {of['high']:.2f})"


if __name__ == "__main__":
    main()
