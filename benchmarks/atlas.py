"""How far does the gradient of every cell of the atlas reach at its initialisation, and what does a step of it cost?

Measures what `bptt-jax atlas` measures, on the same text: every cell at the width of `rnn` and at its number of
parameters. With --learn each is trained besides, as in long_range_trials.py, to keep the first of T symbols through T-1
distractors, within one budget of updates; the longest T that most seeds learn is its learned lag. What is done is kept
in atlas.part.json, so that the same command goes on where it was stopped.
"""

import time
from functools import partial
from typing import Any

import long_range_trials as trials
import matplotlib
from measure import Claim, parser, print_claims, save, write

import bptt_jax as bptt
from bptt_jax.cells import ATLAS
from bptt_jax.cli import atlas as job
from bptt_jax.cli.report import provenance
from bptt_jax.experiments.atlas import BASES, chosen, measure

matplotlib.use("Agg")

FULL: dict[str, Any] = {"hidden": 64, "length": 200, "batch": 8, "seeds": 4}
QUICK = FULL | {"hidden": 16, "length": 50, "batch": 2, "seeds": 2}
QUICK_CELLS = ["rnn", "lru"]
LEARN: dict[str, Any] = trials.FULL | {"seeds": 2, "tasks": {"first symbol": [10, 20, 40, 80, 160, 320]}}
LEARN_QUICK = LEARN | {"seeds": 1, "updates": 60, "tasks": {"first symbol": [5]}}
MINUTES = 15.0  # for all cells, on two cores


def learned(name: str, hidden: int, s: dict[str, Any]) -> int:
    """The longest lag."""
    cell, ((task, lengths),) = ATLAS[name].make(hidden), s["tasks"].items()
    tried = trials.climb(lambda length: trials.trial(cell, task, length, s, s["updates"])[0], lengths)
    return trials.longest_learned(tried)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--learn", action="store_true", help="train them too, which takes hours")
    p.add_argument("--cells", nargs="+", choices=tuple(ATLAS), metavar="CELL", help="by name; default: all")
    a = p.parse_args()
    s = QUICK if a.quick else FULL
    names = chosen(cells=a.cells or (QUICK_CELLS if a.quick else ()))
    settings, task = job.prepare(task=None, text=None, **s)
    budget = (LEARN_QUICK if a.quick else LEARN) | {"hidden": None} if a.learn else None
    a.out.mkdir(parents=True, exist_ok=True)
    part = a.out / ("atlas.learn.part.json" if a.learn else "atlas.part.json")
    begun = part.exists()
    start = time.perf_counter()

    def tell(name: str, done: int, total: int) -> None:
        print(f"{time.perf_counter() - start:7.1f} s: {name} ({done + 1} of {total})", flush=True)

    learn = None if budget is None else partial(learned, s=budget)
    measured = measure(settings, task, names, part, on_cell=tell, learn=learn)
    minutes = (time.perf_counter() - start) / 60
    table = job.markdown(settings, measured, provenance())
    print(table)
    claims = []
    if not begun and not a.learn and not measured.failed:
        case = f"{len(names)} cells, hidden {s['hidden']}, length {s['length']}, {s['seeds']} seeds"
        aim = MINUTES * len(names) / len(ATLAS)
        claims.append(Claim("atlas", case, "minutes", minutes, aim, at_most=True))
        print_claims(claims)
    wide = [of["width"] for of in measured.cells.values()]
    figure = bptt.plots.plot_atlas(wide, title=f"{job.TITLES['width']}: {job.title(settings)}")
    write(a.out / "atlas.png", lambda path: figure.savefig(path, dpi=130))
    write(a.out / "atlas.md", lambda path: path.write_text(table, encoding="utf-8"))
    rows = [of[basis].to_dict() for basis in BASES for of in measured.cells.values()]
    results = {"rows": rows, "failed": measured.failed, "minutes": None if begun else minutes}
    save(a.out, "atlas", s | {"learn": budget}, results, claims)
    part.unlink()
    if measured.failed:
        raise SystemExit("\n".join(["failed:", *(f"  {name}: {why}" for name, why in measured.failed.items())]))


if __name__ == "__main__":
    main()
