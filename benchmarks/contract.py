"""Does every function keep the contract on every kind of step?

The registry of steps (`tests/registry.py`) times every public function that takes a recurrence
(`tests/contract.py`), in single and double precision (some in half), plainly, with padding, with resets and with
both; against a Python loop under `jax.grad` and `jax.jacrev`, NumPy, and the function itself on pieces run alone.
A cell is ok, refused by name where it must be (a backward pass through a loop of unknown length), wrong, or raised
something else.

Each entry runs in a process of its own, `--jobs` at a time, so that what is compiled does not pile up: an hour on
two cores. Quick: the slice that the tests take.
The exit status is 1 if anything is wrong.

    python benchmarks/contract.py
    python benchmarks/contract.py --entries lstm "dead first step"
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from measure import parser, print_table, save, write

import bptt_jax as bptt

TESTS = Path(__file__).parents[1] / "tests"
PATIENCE = 3600  # seconds for the cells of one entry
OUTCOMES = ("ok", "refused", "wrong", "raised")
Cell = dict[str, str]  # check, entry, dtype, kind, outcome, why


def main() -> int:
    p = parser(__doc__)
    p.add_argument("--entries", nargs="+", metavar="NAME", help="of the registry (all of them)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time (%(default)s)")
    p.add_argument("--cells", type=Path, help="do this file's cells in this very process, and write them there")
    a = p.parse_args()
    sys.path.insert(0, str(TESTS))
    contract = importlib.import_module("contract")
    if a.cells is not None:
        judge_all(contract, a.cells)
        return 0

    begin = time.perf_counter()
    cells = contract.covering() if a.quick else list(contract.cells(a.entries))
    parts: dict[str, list[Cell]] = {}
    for check, case in cells:
        part = case.name
        parts.setdefault(part, []).append(
            {"check": check, "entry": case.name, "dtype": case.dtype, "kind": case.kind}
        )
    with ThreadPoolExecutor(a.jobs) as pool:
        judged = [cell for part in pool.map(in_process, parts.values()) for cell in part]
    return report(judged, list(contract.CHECKS), a, time.perf_counter() - begin)


def judge_all(contract: Any, path: Path) -> None:
    """Adds to every cell in the file what became of it, one after the other."""
    jax.config.update("jax_disable_most_optimizations", True)  # nothing here is timed
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", bptt.RecompilationWarning)
    cells = json.loads(path.read_text())
    for cell in (c for c in cells if "outcome" not in c):
        case = contract.Case(cell["entry"], cell["dtype"], cell["kind"])
        cell["outcome"], cell["why"] = contract.judge(cell["check"], case)
        path.write_text(json.dumps(cells))


def in_process(cells: list[Cell]) -> list[Cell]:
    """The cells with their outcomes; one in which the process dies or hangs has raised, and the next goes on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.json"
        while any("outcome" not in cell for cell in cells):
            path.write_text(json.dumps(cells))
            try:
                done = subprocess.run([sys.executable, __file__, "--cells", str(path)], timeout=PATIENCE)
                fate = f"the process ended with status {done.returncode}"
            except subprocess.TimeoutExpired:
                fate = f"the process was ended after {PATIENCE} s"
            cells = json.loads(path.read_text())
            for cell in [c for c in cells if "outcome" not in c][:1]:
                cell.update(outcome="raised", why=fate)
    counts = Counter(cell["outcome"] for cell in cells)
    lines = [f"{cells[0]['entry']}: {dict(counts)}", *map(line_of, filter(failed, cells))]
    print("\n".join(lines), flush=True)
    return cells


def failed(cell: Cell) -> bool:
    return cell["outcome"] not in ("ok", "refused")


def line_of(cell: Cell) -> str:
    return (
        f"{cell['outcome']}: {cell['check']}: {cell['entry']}, {cell['dtype']}, {cell['kind']}: {cell['why']:.300}"
    )


def report(cells: list[Cell], checks: list[str], a: Any, seconds: float) -> int:
    counts = Counter(cell["outcome"] for cell in cells)
    by_check = {check: Counter(c["outcome"] for c in cells if c["check"] == check) for check in checks}
    rows = [(check, n.total(), *(n[outcome] for outcome in OUTCOMES)) for check, n in by_check.items()]
    rows.append(("all", counts.total(), *(counts[outcome] for outcome in OUTCOMES)))
    print_table("The contract", ("function", "cells", *OUTCOMES), rows)
    failures = [cell for cell in cells if failed(cell)]
    print("\n".join(map(line_of, failures)))
    summary = (
        f"{counts.total()} cells: {counts['ok']} right, {counts['refused']} refused by name as they must be, "
        f"{len(failures)} failures"
    )
    print(f"{summary}; {seconds / 60:.0f} minutes with {a.jobs} processes")
    a.out.mkdir(parents=True, exist_ok=True)
    write(a.out / "contract.md", lambda path: path.write_text(markdown(cells, checks, summary)))
    settings = {"quick": a.quick, "entries": a.entries, "jobs": a.jobs}
    results = {"counts": counts, "by_check": by_check, "seconds": seconds, "failures": failures}
    save(a.out, "contract", settings, results)
    return 1 if failures else 0


def markdown(cells: list[Cell], checks: list[str], summary: str) -> str:
    """Entries by functions."""
    found: dict[str, dict[str, Counter[str]]] = {}
    for cell in cells:
        found.setdefault(cell["entry"], {}).setdefault(cell["check"], Counter())[cell["outcome"]] += 1

    def text(n: Counter[str] | None) -> str:
        if not n:
            return ""
        failures = n["wrong"] + n["raised"]
        if failures:
            return f"**{failures} of {n.total()} fail**"
        return "refused" if n["refused"] else str(n["ok"])

    lines = [
        f"{summary}. A number: so many cells (dtypes times plain, padded, reset and both), all of them right.",
        "",
        f"| step | {' | '.join(checks)} |",
        f"|---|{'---:|' * len(checks)}",
    ]
    lines += [f"| {e} | {' | '.join(text(row.get(check)) for check in checks)} |" for e, row in found.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
