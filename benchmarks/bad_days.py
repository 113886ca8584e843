"""What becomes of bad inputs and bad days?

Every public function and both commands with every kind of bad argument that `tests/spoilers.py` knows: each must be
refused in one clear message before anything is compiled, or answered rightly. Then faults of the world
(`tests/faults.py`): full disks, unwritable folders, damaged files, signals; each must end in one clear line, with
nothing lost. The kills of a training run are a test of their own, in `tests/test_runfolder.py`.

Quick: every third of them, without the inputs whose right answer takes a program of its own and without faults in
their own processes.
The exit status is 1 if anything is wrong.
"""

import faulthandler
import importlib
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
from measure import parser, print_table, save

TESTS = Path(__file__).parents[1] / "tests"
PATIENCE = 120  # seconds for one input or fault; one that hangs ends the program with a traceback
EACH = ("refused", "answered", "wrong")


def main() -> int:
    a = parser(__doc__).parse_args()
    sys.path.insert(0, str(TESTS))
    bad_inputs, faults = importlib.import_module("bad_inputs"), importlib.import_module("faults")
    jax.config.update("jax_disable_most_optimizations", True)  # nothing here is timed

    inputs: dict[str, Counter[str]] = {}
    wrong: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for function, name, outcome, why in judged(bad_inputs, Path(folder), a.quick):
            inputs.setdefault(function, Counter())[outcome] += 1
            if outcome == "wrong":
                wrong[name] = why
    survived: dict[str, Counter[str]] = {}
    days_tried = [f for f in faults.faults() if not f.own_process][::3] if a.quick else faults.faults()
    for fault in days_tried:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        with tempfile.TemporaryDirectory() as folder:
            try:
                fault.survive(Path(folder))
            except Exception as error:
                wrong[fault.id] = f"{type(error).__name__}: {error}"
        survived.setdefault(fault.kind, Counter())["wrong" if fault.id in wrong else "survived"] += 1
    faulthandler.cancel_dump_traceback_later()

    total = sum(inputs.values(), Counter())
    rows = [(name, n.total(), *(n[k] for k in EACH)) for name, n in inputs.items()]
    print_table(
        "Bad inputs", ("function", "tried", "refused", "answered rightly", "wrong"), [*rows, all_of(total, EACH)]
    )
    days = sum(survived.values(), Counter())
    rows = [(kind, n.total(), n["survived"], n["wrong"]) for kind, n in survived.items()]
    print_table("Faults", ("kind", "tried", "survived", "wrong"), [*rows, all_of(days, ("survived", "wrong"))])
    for name, why in wrong.items():
        print(f"wrong: {name}: {why:.300}")
    print(
        f"{total.total()} distinct bad inputs: {total['refused']} refused clearly, {total['answered']} answered "
        f"rightly, {total['wrong']} wrong; {days.total()} faults: {days['survived']} survived"
    )
    results: dict[str, Any] = {"inputs": inputs, "faults": survived, "wrong": wrong}
    save(a.out, "bad_days", {"quick": a.quick}, results)
    return 1 if wrong else 0


def judged(bad_inputs: Any, folder: Path, quick: bool) -> Iterator[tuple[str, str, str, str]]:
    """Function, bad input, outcome and why, of all bad inputs."""
    cases = bad_inputs.cases()
    cases = [c for c in cases if not c.spoiler.compiles][::3] if quick else cases
    for function, own in groupby(cases, key=lambda case: case.target.name):
        found, refused = {}, []
        for case in own:
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            with bad_inputs.judging():
                found[case.id] = outcome, _ = bad_inputs.judge(case)
            refused += [case] if outcome == "refused" else []
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        with bad_inputs.judging():
            late = bad_inputs.refused_late(refused)
        found |= dict.fromkeys(late, ("wrong", "in a new process something is compiled before it is refused"))
        for name, (outcome, why) in found.items():
            yield function, name, outcome, why
    for arguments in bad_inputs.commands():
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        outcome, why = bad_inputs.judge_command(arguments, folder)
        name = " ".join(["bptt-jax", *arguments[:1]])
        yield name, " ".join(["bptt-jax", *arguments]), outcome, why


def all_of(counts: Counter[str], names: tuple[str, ...]) -> tuple[Any, ...]:
    return ("all", counts.total(), *(counts[name] for name in names))


if __name__ == "__main__":
    sys.exit(main())
