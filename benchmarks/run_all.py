"""Where is the toolkit ahead of what a user would take instead, and where not?

Runs every benchmark of speed, memory and scale, each in a process of its own, and gathers what they claim into one
JSON file, one table in Markdown and one figure. With names, only those are run, and what the others have left in
the folder is gathered too, if it was measured on the same device and processor with the same JAX. A benchmark that
fails is named, the others run all the same, and the exit status is 1.

    python benchmarks/run_all.py
    python benchmarks/run_all.py spectra_speed memory
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
from measure import Claim, environment, parser, write

from bptt_jax.files import write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SCRIPTS = (
    "training_step",
    "adjoint_cost",
    "jacobian_speed",
    "spectra_speed",
    "lyapunov_cost",
    "deer",
    "memory",
    "first_result",
    "compile_time",
    "growth",
    "atlas",
)


def run(name: str, quick: bool, out: Path) -> bool:
    script = Path(__file__).with_name(f"{name}.py")
    print(f"\n== {name}", flush=True)
    done = subprocess.run([sys.executable, str(script), *(["--quick"] if quick else []), "--out", str(out)])
    return done.returncode == 0


def claims_of(path: Path, about: dict[str, Any], just_run: bool) -> list[Claim]:
    """Of one result, if there is one and it was measured just now, or before on the same hardware."""
    content = json.loads(path.read_text()) if path.exists() else {}
    same = all(content.get("environment", {}).get(key) == about[key] for key in ("device", "processor", "jax"))
    return [Claim(**claim) for claim in content.get("claims", ())] if same or just_run else []


def markdown(claims: list[Claim], about: dict[str, Any], failed: list[str]) -> str:
    device = f"{about['device']} ({about['processor']}), {about['cpus']} cores"
    lines = [
        f"On {device}, jax {about['jax']}, NumPy {about['numpy']}. Ratios are of one run; margin: how many times "
        "better than the aim, in bold where it is missed; limit: what the machine's floating-point operations, its "
        "memory or the rounds of a loop would take alone, whichever is the longest, over the time of ours.",
        "",
        "| job | case | measured | value | aim | margin | limit |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for c in claims:
        margin = f"{c.margin:.2f}" if c.margin >= 1 else f"**{c.margin:.2f}**"
        aim = f"{'<=' if c.at_most else '>='} {c.aim:g}"
        lines.append(f"| {c.job} | {c.case} | {c.against} | {c.value:.3g} | {aim} | {margin} | {c.limit or '-'} |")
    reached = sum(c.margin >= 1 for c in claims)
    lines += ["", f"{reached} of {len(claims)} aims reached."]
    lines += [f"Failed: {', '.join(failed)}."] if failed else []
    return "\n".join(lines) + "\n"


def figure(claims: list[Claim]) -> Any:
    kinds = list(dict.fromkeys((c.job, c.against) for c in claims))
    fig, axis = plt.subplots(figsize=(9, 0.6 + 0.42 * len(kinds)), layout="constrained")
    for place, kind in enumerate(reversed(kinds)):
        margins = [c.margin for c in claims if (c.job, c.against) == kind]
        colours = ["C0" if m >= 1 else "C3" for m in margins]
        axis.scatter(margins, [place] * len(margins), s=18, c=colours, alpha=0.7, linewidths=0)
    axis.axvline(1, color="k", lw=0.8)
    axis.set_yticks(range(len(kinds)), [f"{job}: {against}" for job, against in reversed(kinds)], fontsize="small")
    axis.set(xscale="log", xlabel="times better than the aim (red: missed)")
    axis.grid(axis="x", alpha=0.25)
    return fig


def main() -> None:
    p = parser(__doc__)
    p.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCRIPTS)} (all)")
    a = p.parse_args()
    unknown = [name for name in a.names if name not in SCRIPTS]
    if unknown:
        p.error(f"no such benchmark: {', '.join(unknown)}")
    names = a.names or SCRIPTS
    failed = [name for name in names if not run(name, a.quick, a.out)]
    about = environment()
    claims = [
        claim
        for name in SCRIPTS
        if name not in failed
        for claim in claims_of(a.out / f"{name}.json", about, name in names)
    ]
    text = markdown(claims, about, failed)
    print("\n" + text)
    write(a.out / "summary.md", lambda path: path.write_text(text))
    if any(math.isfinite(c.margin) for c in claims):
        write(a.out / "summary.png", lambda path: figure(claims).savefig(path, dpi=130))
    summary = {
        "environment": about,
        "failed": failed,
        "claims": [c._asdict() | {"margin": c.margin} for c in claims],
    }
    write_json(a.out / "summary.json", summary)
    print(f"wrote {a.out / 'summary.json'}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
