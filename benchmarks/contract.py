"""Does every function keep the contract on every kind of step?

The registry of steps (`tests/registry.py`) times every public function that takes a recurrence
(`tests/contract.py`), in single and double precision (some in half), plainly, with padding, with resets and with
both; against a Python loop under `jax.grad` and `jax.jacrev`, NumPy, and the function itself on pieces run alone.
A cell is ok, refused by name where it must be (a backward pass through a loop of unknown length), wrong, or raised
something else.

Each entry runs in a process of its own, `--jobs` at a time, so that what is compiled does not pile up; what several
compile alike is compiled once, and kept for the next run too. Some two seconds a cell on one core, so that all of them
take a day: `--kinds both` is a quarter, with padding and resets at once, and `--kept` goes on from day to day. Quick:
the slice that the tests take. The exit status is 1 if anything is wrong.

    python benchmarks/contract.py
    python benchmarks/contract.py --entries lstm "dead first step" --checks adjoints
    python benchmarks/contract.py --kept cells.jsonl    # may be stopped, and goes on where it was
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
COMPILED = Path(tempfile.gettempdir()) / "bptt_jax_contract"
# The older emitters, quicker still, err by a third in `jax.vmap(jax.grad(...))` of a state that begins at -inf.
QUICKLY = "--xla_backend_optimization_level=0"
Cell = dict[str, str]  # check, entry, dtype, kind, outcome, why
Key = tuple[str, ...]


def main() -> int:
    p = parser(__doc__)
    for which in ("entries", "checks", "dtypes", "kinds"):
        p.add_argument(f"--{which}", nargs="+", metavar="NAME", help="only these (all of them)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time (%(default)s)")
    p.add_argument("--kept", type=Path, help="file of outcomes; the cells in it are not judged again")
    p.add_argument(
        "--report", action="store_true", help="judge nothing: the table of what is in the file of outcomes"
    )
    p.add_argument("--cells", type=Path, help="judge this file's cells in this very process")
    a = p.parse_args()
    sys.path.insert(0, str(TESTS))
    contract, checks = importlib.import_module("contract"), importlib.import_module("contract_checks").CHECKS
    if a.cells is not None:
        judge_all(contract, json.loads(a.cells.read_text()), a.kept)
        return 0

    begin = time.perf_counter()
    cells = [
        {"check": check, "entry": case.name, "dtype": case.dtype, "kind": case.kind}
        for check, case in (contract.covering() if a.quick else contract.cells())
        if wanted(a.entries, case.name)
        and wanted(a.checks, check)
        and wanted(a.dtypes, case.dtype)
        and wanted(a.kinds, case.kind)
    ]
    with tempfile.TemporaryDirectory() as folder:
        kept = a.kept or Path(folder) / "kept.jsonl"
        parts: dict[str, list[Cell]] = {}
        for cell in cells:
            parts.setdefault(cell["entry"], []).append(cell)
        if not a.report:
            with ThreadPoolExecutor(a.jobs) as pool:
                list(pool.map(lambda part: in_process(part, kept, Path(folder)), parts.values()))
        done = outcomes(kept)
        judged = [done[key(cell)] for cell in cells if key(cell) in done]
        missing = len(cells) - len(judged)
        return report(judged, missing, list(checks), a, time.perf_counter() - begin)


def wanted(names: list[str] | None, name: str) -> bool:
    return names is None or name in names


def judge_all(contract: Any, cells: list[Cell], kept: Path) -> None:
    """What becomes of every cell, one after the other."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_compilation_cache_dir", str(COMPILED))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", bptt.RecompilationWarning)
    for cell in cells:
        outcome, why = contract.judge(cell["check"], contract.Case(cell["entry"], cell["dtype"], cell["kind"]))
        keep(kept, cell | {"outcome": outcome, "why": why})


def keep(path: Path, cell: Cell) -> None:
    with path.open("a") as file:
        file.write(json.dumps(cell) + "\n")


def outcomes(path: Path) -> dict[Key, Cell]:
    """Of all cells in the file; the latest counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {key(cell): cell for cell in map(json.loads, lines)}


def key(cell: Cell) -> Key:
    return tuple(cell[name] for name in ("check", "entry", "dtype", "kind"))


def in_process(cells: list[Cell], kept: Path, folder: Path) -> None:
    """Judges those that have no outcome; where the process dies or hangs the cell has raised, and the next goes on."""
    environment = {"XLA_FLAGS": QUICKLY} | os.environ
    done_before = outcomes(kept)
    left = [cell for cell in cells if key(cell) not in done_before]
    path = folder / f"{cells[0]['entry']}.json"
    while left:
        path.write_text(json.dumps(left))
        command = [sys.executable, __file__, "--cells", str(path), "--kept", str(kept)]
        try:
            done = subprocess.run(command, timeout=PATIENCE, env=environment)
            fate = f"the process ended with status {done.returncode}"
        except subprocess.TimeoutExpired:
            fate = f"the process was ended after {PATIENCE} s"
        found = outcomes(kept)
        left = [cell for cell in left if key(cell) not in found]
        if left:
            keep(kept, left.pop(0) | {"outcome": "raised", "why": fate})
    found = outcomes(kept)
    judged = [found[key(cell)] for cell in cells]
    counts = Counter(cell["outcome"] for cell in judged)
    print("\n".join([f"{cells[0]['entry']}: {dict(counts)}", *map(line_of, filter(failed, judged))]), flush=True)


def failed(cell: Cell) -> bool:
    return cell["outcome"] not in ("ok", "refused")


def line_of(cell: Cell) -> str:
    return (
        f"{cell['outcome']}: {cell['check']}: {cell['entry']}, {cell['dtype']}, {cell['kind']}: "
        f"{' '.join(cell['why'].split()):.300}"
    )


def report(cells: list[Cell], missing: int, checks: list[str], a: Any, seconds: float) -> int:
    counts = Counter(cell["outcome"] for cell in cells)
    by_check = {check: Counter(c["outcome"] for c in cells if c["check"] == check) for check in checks}
    rows = [(check, n.total(), *(n[outcome] for outcome in OUTCOMES)) for check, n in by_check.items()]
    rows.append(("all", counts.total(), *(counts[outcome] for outcome in OUTCOMES)))
    print_table("The contract", ("function", "cells", *OUTCOMES), rows)
    failures = [cell for cell in cells if failed(cell)]
    print("\n".join(map(line_of, failures)))
    summary = (
        f"{counts.total()} cells: {counts['ok']} right, {counts['refused']} refused by name as they must be, "
        f"{len(failures)} failures{f'; {missing} not judged yet' if missing else ''}"
    )
    print(summary if a.report else f"{summary}; {seconds / 60:.0f} minutes with {a.jobs} processes")
    a.out.mkdir(parents=True, exist_ok=True)
    write(a.out / "contract.md", lambda path: path.write_text(markdown(cells, checks, summary)))
    settings = {name: getattr(a, name) for name in ("quick", "entries", "checks", "dtypes", "kinds", "jobs")}
    by_kind = Counter(f"{cell['dtype']}, {cell['kind']}" for cell in cells)
    results = {
        "counts": counts,
        "not_judged": missing,
        "by_check": by_check,
        "by_kind": by_kind,
        "failures": failures,
    }
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
