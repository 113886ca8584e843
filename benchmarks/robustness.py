"""What was tried to break the toolkit, how often, and what did it find?

Bad inputs and faults of the world (`bad_days.py`), kills of a training run and what it then goes on with, further
cases of the tests, random steps, sequences and scales against NumPy (`tests/fuzz.py`), and faults planted in the
code, each of which a test ought to notice (`tests/mutations.py`): one after the other, each in a process of its own.
What each has counted stands in one table at the end. Some 50 minutes on one core.

    python benchmarks/robustness.py
    python benchmarks/robustness.py kills fuzz

The exit status is 1 if one of them found something.
"""

import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from measure import parser, print_table, run_within, save

BENCHMARKS = Path(__file__).parent
TESTS = BENCHMARKS.parent / "tests"
HOURS = 3  # for one part; what takes longer hangs


class Part(NamedTuple):
    """Arguments for Python, what is added to them for a first look, and how the line begins that tells the counts."""

    command: tuple[str, ...]
    quick: tuple[str, ...]
    told: str


KILLED = f"{TESTS}/test_runfolder.py::test_killed_at_any_moment_it_ends_as_if_it_had_never_been"
PARTS = {
    "inputs": Part((f"{BENCHMARKS}/bad_days.py",), ("--quick",), r"\d+ distinct bad inputs"),
    "kills": Part(("-m", "pytest", "-n", "0", "-s", "-m", "", KILLED), ("-m", "not exhaustive"), r"\.?\d+ kills"),
    "cases": Part(("-m", "pytest", "-m", "exhaustive", str(TESTS)), ("-k", "test_monitor"), r"(=+ )?\d+ passed"),
    "fuzz": Part((f"{TESTS}/fuzz.py", "--cases", "2000"), ("--cases", "20"), r"\d+ cases of"),
    "mutations": Part((f"{TESTS}/mutations.py",), ("1", "100", "200"), r"\d+ faults planted"),
}


def main() -> int:
    p = parser(__doc__)
    p.add_argument("names", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    a = p.parse_args()
    if unknown := [name for name in a.names if name not in PARTS]:
        p.error(f"no such part: {', '.join(unknown)}")
    results, rows = {}, []
    for name in a.names or PARTS:
        part = PARTS[name]
        command = [sys.executable, *part.command, *(part.quick if a.quick else ())]
        command += ["--out", str(a.out)] if name == "inputs" else []
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            status, took = run_within(command, log, 3600 * HOURS)
            told = [line.lstrip(".") for line in log.read_text().splitlines() if re.match(part.told, line)]
        counts = "; ".join(told) or "no count"
        ended = {None: "no end", 0: "nothing"}.get(status, f"exit status {status}") if told else "no count"
        results[name] = {"counts": counts, "found": ended, "seconds": round(took)}
        rows.append((name, counts, ended))
        save(a.out, "robustness", {"quick": a.quick}, results)
    print_table("Tried, and found", ("part", "counts", "found wrong"), rows)
    return 0 if all(r["found"] == "nothing" for r in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
