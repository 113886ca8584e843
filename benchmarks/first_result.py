"""How long until a newcomer sees something, and what is compiled for it?

Each in a process of its own: what ``import bptt_jax`` adds to ``import jax``, and `bptt-jax diagnose` with its
defaults, with nothing compiled before and once more with what the first run has kept. Then, within one process, how
many programs the first diagnosis compiles, and how many of them the same diagnosis compiles again.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import Claim, parser, print_claims, print_table, save

FULL: dict[str, Any] = {"repeats": 7, "arguments": []}
QUICK: dict[str, Any] = {"repeats": 3, "arguments": ["--hidden", "16", "--length", "50", "--batch", "4"]}
IMPORTS = """
import time
start = time.perf_counter()
import jax
middle = time.perf_counter()
import bptt_jax
print(middle - start, time.perf_counter() - middle)
"""
COMPILED = """
import sys
import jax
from bptt_jax.cli.main import main
seen = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: seen.append(seconds) if event.endswith("backend_compile_duration") else None
)
main(sys.argv[1:])
first = len(seen), sum(seen)
main(sys.argv[1:])
print("\\n", *first, len(seen) - first[0])
"""
AIMS = {"import": 0.15, "cold": 12.0, "warm": 5.0}


def python(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def main() -> None:
    a = parser(__doc__).parse_args()
    s = QUICK if a.quick else FULL
    imports = [[float(t) for t in python("-c", IMPORTS).split()] for _ in range(s["repeats"])]
    jax_seconds, added = (statistics.median(column) for column in zip(*imports, strict=True))
    results: dict[str, Any] = {"import_jax": jax_seconds, "import": added}
    with tempfile.TemporaryDirectory() as folder:
        out = ["diagnose", *s["arguments"], "--out", str(Path(folder) / "out")]
        for name in ("cold", "warm"):
            start = time.perf_counter()
            python("-m", "bptt_jax", *out, XDG_CACHE_HOME=str(Path(folder) / "cache"))
            results[name] = time.perf_counter() - start
        programs, seconds, again = python("-c", COMPILED, *out).split()[-3:]
    results |= {"programs": int(programs), "compile_seconds": float(seconds), "compiled_again": int(again)}
    print_table(
        "Seconds; of the import above that of jax",
        ("what", "seconds", "aim"),
        [(name, results[name], aim) for name, aim in AIMS.items()],
    )
    print(f"import jax: {jax_seconds:.2f} s; {programs} programs compiled in {float(seconds):.1f} s, {again} again")
    claims = [Claim("first result", name, "seconds", results[name], aim, True) for name, aim in AIMS.items()]
    print_claims(claims)
    save(a.out, "first_result", s, results, claims)


if __name__ == "__main__":
    main()
