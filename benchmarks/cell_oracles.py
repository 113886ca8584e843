"""Do the cells compute what other implementations of them compute?

Every cell of the atlas with every oracle of it (`tests/cell_oracles`: the paper's equations in NumPy, and the
libraries that are installed), with the same random weights, states and inputs in double precision: the largest
difference of states, of gradients with respect to parameters, initial state and inputs, and, of PyTorch, of the
Jacobian dh_1/dh_0 by its autograd. Relative to the largest number of a leaf, or to 1 where that is larger.

    python benchmarks/cell_oracles.py
    python benchmarks/cell_oracles.py gru lstm

The exit status is 1 if one differs by more than its tolerance. What is not installed is left out, and named.
"""

import importlib
import sys
from pathlib import Path

import jax
from measure import parser, print_table, save, write

TESTS = Path(__file__).parents[1] / "tests"
HEADER = ("cell", "peer", "version", "states", "gradients", "Jacobian", "note")


def main() -> int:
    p = parser(__doc__)
    p.add_argument("names", nargs="*", metavar="CELL", help="only these (all)")
    a = p.parse_args()
    sys.path.insert(0, str(TESTS))
    cell_oracles = importlib.import_module("cell_oracles")
    oracles = cell_oracles.all_oracles()
    if unknown := [name for name in a.names if name not in oracles]:
        p.error(f"no such cell: {', '.join(unknown)}")
    rows, wrong, missing = [], [], set()
    with jax.enable_x64(True):
        for name in a.names or list(oracles)[: 2 if a.quick else None]:
            for oracle in oracles[name]:
                if oracle.peer != "NumPy" and not oracle.version:
                    missing.add(oracle.peer)
                    continue
                found = cell_oracles.compare(name, oracle)
                if not max(part for part in found if part is not None) < oracle.tolerance:
                    wrong.append(f"{name}, {oracle.peer}")
                figures = ["" if part is None else f"{part:.1e}" for part in found]
                rows.append((name, oracle.peer, oracle.version, *figures, oracle.note))
    print_table("Cells and oracles", HEADER, rows)
    cells, peers = {row[0] for row in rows}, {row[0] for row in rows if row[1] != "NumPy"}
    by_torch = {row[0] for row in rows if row[5]}
    summary = (
        f"{len(rows)} comparisons of {len(cells)} cells, {len(peers)} of them with another library, "
        f"{len(by_torch)} with Jacobians by PyTorch's autograd; {len(wrong)} wrong"
    )
    print(summary, *(f"wrong: {pair}" for pair in wrong), sep="\n")
    if missing:
        print(f"not installed: {', '.join(sorted(missing))}")
    a.out.mkdir(parents=True, exist_ok=True)
    lines = [f"{summary}.", "", f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    text = "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"
    write(a.out / "cell_oracles.md", lambda path: path.write_text(text))
    results = {
        "rows": [dict(zip(HEADER, row, strict=True)) for row in rows],
        "missing": sorted(missing),
        "wrong": wrong,
    }
    save(a.out, "cell_oracles", {"names": a.names, "quick": a.quick}, results)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
