"""Everything that waits for a GPU, in parts with limits of their own, the most valuable first.

    python benchmarks/gpu_day.py                       all
    python benchmarks/gpu_day.py checks routes         these
    python benchmarks/gpu_day.py --rehearse --out DIR  all of it in small, on a CPU too: does it work?

Each part is a process of its own. What it prints goes to DIR/PART.log too; results are on disk case by case
(DIR/NAME.part.json until DIR/NAME.json is whole). A case that fails is named with the reason, a part that fails or runs
out of time does not stop the others, and the exit status is then 1. What needs a library that is not installed is left
out and named.

On a card that is had for half an hour, in jobs of ten minutes, from the root of a checkout that is not installed and
with no network, these three, in this order:

    PYTHONPATH=. PYTHONUNBUFFERED=1 python3 benchmarks/gpu_day.py checks steps --out DIR
    PYTHONPATH=. PYTHONUNBUFFERED=1 python3 benchmarks/gpu_day.py time spectra --out DIR
    PYTHONPATH=. PYTHONUNBUFFERED=1 python3 benchmarks/gpu_day.py memory jacobians --out DIR

Each ends within nine and a half minutes, all of them within 27; what is in DIR goes to benchmarks/results/gpu. Where
the routes for spectra are to be set anew, for another card say, also this:

    PYTHONPATH=. PYTHONUNBUFFERED=1 python3 benchmarks/gpu_day.py routes --out DIR

Most of the time is the compiler's, which tries several kernels for every product of matrices. JAX takes three quarters
of the card's memory in every part but `memory`; PyTorch has what is left. No variable of JAX or XLA is to be set.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from measure import RESULTS, run_within


class Part(NamedTuple):
    """`scripts` of this folder with arguments, one after the other within `minutes`."""

    scripts: tuple[tuple[str, ...], ...]
    minutes: float


PARTS = {
    "checks": Part((("gpu_checks",),), 2.5),
    "steps": Part((("training_step",),), 7.0),
    "time": Part((("unroll_speed",), ("lyapunov_cost",), ("deer", "--times")), 7.0),
    "spectra": Part((("spectra_speed",),), 2.5),
    "memory": Part((("device_memory",),), 3.0),
    "jacobians": Part((("jacobian_speed",),), 5.0),
    "routes": Part((("spectra_routes",),), 7.0),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    p.add_argument("--rehearse", action="store_true", help="small sizes, on a CPU too")
    p.add_argument("--out", type=Path, default=RESULTS / "gpu", metavar="DIR", help="%(default)s")
    a = p.parse_args()
    if unknown := [name for name in a.names if name not in PARTS]:
        p.error(f"no such part: {', '.join(unknown)}")
    if not a.rehearse:
        about = (
            "import jax; d = jax.devices()[0]; print(d.device_kind, jax.__version__); assert d.platform == 'gpu'"
        )
        if subprocess.run(
            [sys.executable, "-c", about]
        ).returncode:  # a process of its own: it would hold the memory
            p.error("JAX sees no GPU; --rehearse runs without one")
    a.out.mkdir(parents=True, exist_ok=True)
    told: dict[str, str] = {}
    names = a.names or list(PARTS)
    for name in names:
        part, log = PARTS[name], a.out / f"{name}.log"
        log.unlink(missing_ok=True)
        left = 600.0 if a.rehearse else 60 * part.minutes  # a rehearsal is not judged by its speed
        for script, *options in part.scripts:
            print(f"\n== {name}: {script}, {left:.0f} s left", flush=True)
            command = [sys.executable, str(Path(__file__).with_name(f"{script}.py")), *options, "--out", str(a.out)]
            status, took = run_within([*command, *(["--quick"] if a.rehearse else [])], log, max(left, 1.0))
            left -= took
            ended = {None: "out of time", 0: "done"}.get(status, f"exit status {status}")
            told[f"{name}: {script}"] = f"{ended}, {took:.0f} s"
            (a.out / f"gpu_day.{'-'.join(names)}.json").write_text(json.dumps(told, indent=1))
    print("\n" + "\n".join(f"{what}: {ended}" for what, ended in told.items()))
    raise SystemExit(0 if all(ended.startswith("done") for ended in told.values()) else 1)


if __name__ == "__main__":
    main()
