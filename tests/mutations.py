"""Does a test notice if the code is broken? Small faults, planted one by one, and the test that ought to see each.

    python tests/mutations.py
    python tests/mutations.py 3 17

Each fault is planted in a copy of the project. Those that their test does not notice are listed at the end, and so are
tests that fail without a fault too; the exit status is then 1. A fault whose place is no longer found in the code, or
whose test is not there, ends the run at once.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from planted import ROOT, faults, lost, read

PATIENCE = 300  # seconds; what hangs has been noticed


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("numbers", nargs="*", type=int, help="of the faults to plant (all of them)")
    numbers = p.parse_args().numbers or range(1, 1 + len(faults()))
    if missing := lost():
        sys.exit("\n".join(missing))
    wrong, noticing = [], set()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("bptt_jax", "tests", "benchmarks"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for number in numbers:
            file, old, new, test = faults()[number - 1]
            begin, source = time.perf_counter(), read(copy / file)
            (copy / file).write_text(source.replace(old, new), encoding="utf-8")
            failed = first_failure(copy, *shlex.split(test))
            (copy / file).write_text(source, encoding="utf-8")
            what = f"{number} {file}: {' '.join(old.split()):.90}"
            print(f"{failed or 'SURVIVED'} ({time.perf_counter() - begin:.0f} s): {what}", flush=True)
            if not failed:
                wrong.append(f"survived: {what}")
            elif "::" in failed:
                noticing.add(failed.removeprefix("tests/"))
        while noticing and (failed := first_failure(copy, *sorted(noticing))):
            wrong.append(f"fails without a fault too: {failed}")
            noticing.discard(failed.removeprefix("tests/"))
    print(f"{len(numbers)} faults planted, {len(wrong)} gone wrong", *wrong, sep="\n")
    return 1 if wrong else 0


def first_failure(copy: Path, *tests: str) -> str:
    """The test that fails first, or how pytest ended without one; empty if all pass."""
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "JAX_COMPILATION_CACHE_DIR": str(copy / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=copy / "tests", env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return f"no end of {' '.join(tests)}"
    if done.returncode in (4, 5):
        sys.exit(f"no such test in the suite: {' '.join(tests)}\n{done.stdout}{done.stderr}")
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            return line.split(" ", 1)[1].split(" - ")[0]
    return f"status {done.returncode} of {' '.join(tests)}" if done.returncode else ""


if __name__ == "__main__":
    sys.exit(main())
