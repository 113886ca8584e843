"""How far does the gradient of every cell of the atlas reach at its initialisation, and what does a step of it cost?

Measures what `bptt-jax atlas` measures, on the same text: every cell at the width of `rnn` and at its number of
parameters. What is done is kept in atlas.part.json, so that the same command goes on where it was stopped. With --cells
those alone are measured, and the results of all others stay.

    python benchmarks/atlas.py --learn

trains cells instead, by the recipe of long_range_trials.py and as small as there, to keep the first of T symbols
through T-1 distractors: the longest T that most seeds learn within one budget of updates is the learned lag, which goes
into the results that are there. Trials are kept one by one, in atlas.learn.part; those of long_range.json are not made
again.
"""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import long_range_trials as trials
import matplotlib
import numpy as np
from measure import RESULTS, Claim, parser, print_claims, save, write

import bptt_jax as bptt
from bptt_jax.cells import ATLAS
from bptt_jax.cells.measurement import CellMeasurement
from bptt_jax.cli import atlas as job
from bptt_jax.cli.report import provenance
from bptt_jax.experiments.atlas import BASES, Measured, Settings, chosen, measure, parsed

matplotlib.use("Agg")

FULL: dict[str, Any] = {"hidden": 64, "length": 200, "batch": 8, "seeds": 4}
QUICK = FULL | {"hidden": 16, "length": 50, "batch": 2, "seeds": 2}
QUICK_CELLS = ["rnn", "lru"]
TASK = "first symbol"
LEARN: dict[str, Any] = trials.FULL | {"tasks": {TASK: [10, 20, 40, 80, 160, 320]}, "bursts": []}
LEARN_QUICK = LEARN | {"hidden": 8, "seeds": 1, "updates": 60, "tasks": {TASK: [5]}}
MINUTES = 15.0  # for all cells, on two cores

Cells = dict[str, dict[str, CellMeasurement]]


def there(out: Path) -> dict[str, Any]:
    """The file of results, empty where there is none."""
    file = out / "atlas.json"
    return json.loads(file.read_text()) if file.exists() else {}


def measured_before(content: dict[str, Any], s: dict[str, Any]) -> Cells:
    """What the file has, if by the same settings."""
    if {k: content.get("settings", {}).get(k) for k in s} != s:
        return {}
    cells: Cells = {}
    for row in content["results"]["rows"]:
        cells.setdefault(row["name"], {})[row["basis"]] = parsed(row)
    return {name: of for name, of in cells.items() if name in ATLAS and len(of) == len(BASES)}


def trained_before(s: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """By cell and T the trials of long_range.json, where they were made by these settings."""
    content = json.loads((RESULTS / "long_range.json").read_text())
    same = [k for k in s if k not in ("tasks", "bursts")]
    if any(content["settings"][k] != s[k] for k in same):
        return {}
    names = {"gru", *trials.FROM_THE_ATLAS, *trials.set_aside()}
    return {
        (row["name"], int(length)): {"T": int(length), "solved_at": solved_at}
        for row in content["results"]["rows"]
        if row["name"] in names and row["task"] == TASK
        for length, solved_at in row["solved_at"].items()
    }


def learned(names: Iterable[str], s: dict[str, Any], folder: Path) -> dict[str, int]:
    """The longest lags."""
    before, kept, found = trained_before(s), trials.Folder(folder, s), {}
    for name in names:
        cell = ATLAS[name].make(s["hidden"])

        def trial(length: int, name: str = name, cell: bptt.Cell = cell) -> dict[str, Any]:
            return before.get((name, length)) or kept.trial(name, cell, TASK, length)

        found[name] = trials.longest_learned(trials.climb(trial, s["tasks"][TASK]))
        print(f"{name}: {found[name]}", flush=True)
    return found


def with_learned(cells: Cells, lags: Mapping[str, float]) -> Cells:
    return {
        name: {k: replace(m, learned=np.asarray(lags[name], np.float64)) for k, m in of.items()}
        if name in lags
        else of
        for name, of in cells.items()
    }


def how_learned(s: dict[str, Any]) -> str:
    lengths = s["tasks"][TASK]
    return (
        f"- Lags were learned by {s['hidden']} units, whatever the table's width: of {lengths[0]} to {lengths[-1]} the "
        f"longest at which most of {s['seeds']} seeds keep the first of T symbols within {s['updates']} updates of "
        f"{s['batch']} sequences by Adam at {s['rate']}.\n"
    )


def of_whole(content: dict[str, Any]) -> tuple[float | None, list[Claim]]:
    """How long all cells took when they were measured in one go, and what was claimed of that."""
    return content["results"]["minutes"], [Claim(**c) for c in content.get("claims", [])]


def write_all(out: Path, s: dict[str, Any], measured: Measured, minutes: float | None, claims: list[Claim]) -> None:
    settings, _ = job.prepare(task=None, text=None, **{k: s[k] for k in FULL})
    table = job.markdown(settings, measured, provenance()) + (how_learned(s["learn"]) if s["learn"] else "")
    print(table)
    wide = [of["width"] for of in measured.cells.values()]
    figure = bptt.plots.plot_atlas(wide, title=f"{job.TITLES['width']}: {job.title(settings)}")
    write(out / "atlas.png", lambda path: figure.savefig(path, dpi=130))
    write(out / "atlas.md", lambda path: path.write_text(table, encoding="utf-8"))
    rows = [of[basis].to_dict() for basis in BASES for of in measured.cells.values()]
    save(out, "atlas", s, {"rows": rows, "failed": measured.failed, "minutes": minutes}, claims)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--learn", action="store_true", help="train them, beside what has been measured: an hour or so")
    p.add_argument("--cells", nargs="+", choices=tuple(ATLAS), metavar="CELL", help="by name; default: all")
    a = p.parse_args()
    s = QUICK if a.quick else FULL
    content = there(a.out)
    before = measured_before(content, s)
    of_learning = content["settings"]["learn"] if before else None
    names = chosen(cells=a.cells or (QUICK_CELLS if a.quick else ()))
    if a.learn:
        budget = LEARN_QUICK if a.quick else LEARN
        missing = [name for name in names if name not in before]
        if missing:
            p.error(
                f"{a.out / 'atlas.json'} has no measurement of {', '.join(missing)}: measure first, without --learn"
            )
        if of_learning != budget:
            before = with_learned(before, dict.fromkeys(before, np.nan))
        cells = with_learned(before, learned(names, budget, a.out / "atlas.learn.part"))
        failed = content["results"]["failed"]
        write_all(a.out, s | {"learn": budget}, Measured(cells, failed), *of_whole(content))
        return
    settings: Settings
    settings, task = job.prepare(task=None, text=None, **s)
    part = a.out / "atlas.part.json"
    a.out.mkdir(parents=True, exist_ok=True)
    begun = part.exists()
    start = time.perf_counter()

    def tell(name: str, done: int, total: int) -> None:
        print(f"{time.perf_counter() - start:7.1f} s: {name} ({done + 1} of {total})", flush=True)

    found = measure(settings, task, names, part, on_cell=tell)
    minutes = None if begun else (time.perf_counter() - start) / 60
    lags = {name: int(of["width"].learned) for name, of in before.items() if np.isfinite(of["width"].learned)}
    cells = with_learned(
        {name: (before | found.cells)[name] for name in ATLAS if name in before | found.cells}, lags
    )
    claims: list[Claim] = []
    if len(found.cells) < len(cells):
        minutes, claims = of_whole(content)
    elif minutes is not None and not found.failed:
        case = f"{len(names)} cells, hidden {s['hidden']}, length {s['length']}, {s['seeds']} seeds"
        aim = MINUTES * len(names) / len(ATLAS)
        claims.append(Claim("atlas", case, "minutes", minutes, aim, at_most=True))
        print_claims(claims)
    write_all(a.out, s | {"learn": of_learning}, Measured(cells, found.failed), minutes, claims)
    part.unlink()
    if found.failed:
        raise SystemExit("\n".join(["failed:", *(f"  {name}: {why}" for name, why in found.failed.items())]))


if __name__ == "__main__":
    main()
