"""What all benchmarks share: how is a time, an error and a peak of memory taken, and where does it go?

Medians of interleaved repeats: the candidates take turns, so that a disturbance of the machine hits all of them.
Compilation is timed apart from running, and every result is waited for. Times depend on the machine; ratios
within one run are what to compare. Products of float32 are in full precision for all: on a GPU that is not what a
user who has set nothing trains with, for whom all candidates would be faster.
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax.files import atomic_path, write_json

RESULTS = Path(__file__).parent / "results"

# By default GPUs multiply float32 in reduced precision, each library in its own: answers could not be compared.
jax.config.update("jax_default_matmul_precision", "float32")


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with what every benchmark has: --quick and --out."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="smaller sizes, for a first look (under a minute)")
    p.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the results (%(default)s)")
    return p


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """The executable of ``jit(function)`` for these arguments, and the seconds that making it took."""
    start = time.perf_counter()
    executable = jax.jit(function).lower(*args).compile()
    return executable, time.perf_counter() - start


def relative_error(got: Any, expected: Any) -> float:
    """Largest deviation over all leaves, relative to the largest entry of each leaf."""

    def of_leaf(a: Any, b: Any) -> float:
        a = a.cpu() if hasattr(a, "cpu") else a  # PyTorch's may lie on a GPU
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), np.finfo(np.float64).tiny))

    return max(jax.tree.leaves(jax.tree.map(of_leaf, got, expected)))


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in a fresh process, so that its peak of memory is its own.

    By a fork server: a directly spawned process would inherit the high-water mark of its parent.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def run_within(command: list[str], log: Path, seconds: float) -> tuple[int | None, float]:
    """Exit status, None where the time ran out, and the seconds taken; what is printed is shown and goes to `log`."""
    start = time.perf_counter()
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that its own children end with it
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        ) as process,
    ):
        over = threading.Event()

        def end() -> None:
            over.set()
            os.killpg(process.pid, signal.SIGKILL)

        limit = threading.Timer(seconds, end)
        limit.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
                file.flush()
            status = process.wait()
        finally:
            limit.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return None if over.is_set() else status, time.perf_counter() - start


def peak_above_now(run: Callable[[], Any]) -> int:
    """Bytes by which the peak resident memory of this process exceeds what it holds before the call."""
    peak = PeakFromNow()
    jax.block_until_ready(run())
    return peak.bytes


class PeakFromNow:
    """Of the resident memory of this process, from when it is made. Where a peak cannot be forgotten (not Linux), an
    earlier one that was higher counts."""

    def __init__(self) -> None:
        self._before = _resident()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    @property
    def bytes(self) -> int:
        """By which the peak exceeds what was held at the beginning."""
        return max(0, _peak() - self._before)


def _peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux: the peak so far, which makes the difference a lower bound
        return _peak()


def environment() -> dict[str, Any]:
    """What a number depends on: device and versions."""
    device = next(iter(jnp.zeros(()).devices()))  # the default one may have been chosen
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "numpy": np.__version__,
        "x64": jnp.zeros(()).dtype == jnp.float64,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Lets `writer` write to a temporary name and moves the file: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        writer(temporary)
    print(f"wrote {path}")


class Claim(NamedTuple):
    """One figure that can be held against an aim; what `run_all.py` gathers.

    Attributes:
      job: what is done.
      case: cell, sizes.
      against: the peer, or what the figure is a measure of.
      value: a ratio or a size.
      aim: at least that much of it, or, if `at_most`, no more.
      limit: which physical limit ours stands against, and what share of it is reached, as `limits.named` has it.
    """

    job: str
    case: str
    against: str
    value: float
    aim: float
    at_most: bool = False
    limit: str = ""

    @property
    def margin(self) -> float:
        """How many times better than the aim; below 1 it is missed."""
        if self.at_most:
            return self.aim / self.value if self.value else math.inf
        return self.value / self.aim


def print_claims(claims: Sequence[Claim]) -> None:
    """How many of each kind reach their aim, and which do not."""
    kinds = dict.fromkeys((c.job, c.against, c.aim, c.at_most) for c in claims)
    for job, against, aim, at_most in kinds:
        of = [c for c in claims if (c.job, c.against, c.aim, c.at_most) == (job, against, aim, at_most)]
        missed = [f"{c.case} ({c.value:.3g})" for c in of if c.margin < 1]
        limit = f"at {'most' if at_most else 'least'} {aim:g}"
        listed = f"; not {', '.join(missed)}" if missed else ""
        print(f"{job}, {against}, {limit}: {len(of) - len(missed)} of {len(of)}{listed}")


def save(out: Path, name: str, settings: dict[str, Any], results: Any, claims: Sequence[Claim] = ()) -> None:
    """Writes ``<out>/<name>.json``: settings, environment, results, and what they come to."""
    content = {"settings": settings, "environment": environment(), "results": results}
    content |= {"claims": [claim._asdict() for claim in claims]} if claims else {}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", content)
    print(f"wrote {out / name}.json")


class Rows(list[Any]):
    """What a benchmark has measured so far, on disk after every case: one that is stopped leaves what it has.

    Attributes:
      failed: for each case that could not be measured the reason.
    """

    def __init__(self, out: Path, name: str, settings: dict[str, Any]) -> None:
        super().__init__()
        self.failed: dict[str, str] = {}
        self._where = out, f"{name}.part", settings

    def measure(self, run: Callable[..., Any], *case: Any) -> None:
        """Adds ``run(*case)`` and shows it; what fails is named, and the cases after it are measured all the same."""
        try:
            row = run(*case)
        except (Exception, SystemExit) as error:
            row = None
            self.failed[" ".join(map(str, case))] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        if row is not None:
            self.append(row)
        print(row if row is not None else f"failed: {list(self.failed.items())[-1]}", flush=True)
        out, name, settings = self._where
        out.mkdir(parents=True, exist_ok=True)
        write_json(
            out / f"{name}.json", {"settings": settings, "environment": environment(), "results": self.results}
        )

    @property
    def results(self) -> dict[str, Any]:
        return {"rows": list(self), "failed": self.failed}

    def end(self) -> None:
        """Once the whole is saved. Raises SystemExit: status 1, if a case failed."""
        out, name, _ = self._where
        (out / f"{name}.json").unlink(missing_ok=True)
        if self.failed:
            raise SystemExit("\n".join(["failed:", *(f"  {case}: {why}" for case, why in self.failed.items())]))


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A Markdown table; floats with three digits after the point or three significant ones."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"
        return "-" if value is None else str(value)

    cells = [list(head), *([text(v) for v in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
    print(f"\n{title}\n\n" + "\n".join(lines) + "\n", flush=True)


def print_rows(title: str, rows: Sequence[Mapping[str, Any]], *precise: str) -> None:
    """`print_table` of dictionaries with the same keys; numbers under `precise` ones with five digits after the
    point. Columns that are "" in the first row are left out."""
    if not rows:
        return
    keys = [k for k in rows[0] if rows[0][k] != ""]
    cells = [[f"{r[k]:.5f}" if k in precise and r[k] is not None else r[k] for k in keys] for r in rows]
    print_table(title, keys, cells)
