"""How many steps should a round of the compiled loop take?

Loss and gradient of a batch through `jax.lax.scan` of a cell's step, by its argument `unroll`: time over that of one
step a round, and what compilation takes. Loss and gradient are compared with those of one step a round first.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from measure import Rows, compiled, parser, print_rows, relative_error, save

import bptt_jax as bptt
from bptt_jax.experiments.timing import interleaved_medians

FULL: dict[str, Any] = {
    "cases": [("rnn", 128, 32, 32, 500), ("gru", 256, 64, 64, 200), ("lstm", 128, 32, 32, 500)],
    "rounds": (1, 2, 4, 8, 16, 32),
    "repeats": 5,
}
QUICK = FULL | {"cases": [("rnn", 16, 8, 8, 20)], "rounds": (1, 4), "repeats": 3}
DEVIATION = 1e-4


def measure(kind: str, hidden: int, inputs: int, batch: int, length: int, s: dict[str, Any]) -> dict[str, Any]:
    cell = getattr(bptt.cells, kind)(hidden)
    params, xs = cell.init(jax.random.key(0), inputs), jax.random.normal(jax.random.key(1), (length, batch, inputs))
    start = jax.tree.map(lambda h: jnp.zeros((batch, *h.shape)), cell.initial_state())
    step = jax.vmap(cell.step, (None, 0, 0))

    def loss(unroll: int, params: Any, xs: jax.Array) -> jax.Array:
        def body(h: Any, x: jax.Array) -> tuple[Any, Any]:
            h = step(params, h, x)
            return h, h

        return jnp.mean(jnp.square(jax.tree.leaves(jax.lax.scan(body, start, xs, unroll=unroll)[1])[0]))

    programs = {n: compiled(jax.value_and_grad(partial(loss, n)), params, xs) for n in s["rounds"]}
    answers = {n: run(params, xs) for n, (run, _) in programs.items()}
    off = {n: relative_error(answer, answers[1]) for n, answer in answers.items()}
    if max(off.values()) > DEVIATION:
        raise SystemExit(f"{kind} {hidden}: loss and gradient deviate by {off}")
    times = interleaved_medians(
        {str(n): partial(run, params, xs) for n, (run, _) in programs.items()}, s["repeats"]
    )
    about = {"cell": kind, "hidden": hidden, "inputs": inputs, "batch": batch, "T": length, "ms": 1e3 * times["1"]}
    ratios = {f"{n} a round": times[str(n)] / times["1"] for n in s["rounds"]}
    return about | ratios | {f"s to compile, {n}": seconds for n, (_, seconds) in programs.items()}


def main() -> None:
    a = parser(__doc__).parse_args()
    s = QUICK if a.quick else FULL
    rows = Rows(a.out, "unroll_speed", s)
    for case in s["cases"]:
        rows.measure(partial(measure, s=s), *case)
    print_rows("Time over that of one step a round", rows)
    save(a.out, "unroll_speed", s, rows.results)
    rows.end()


if __name__ == "__main__":
    main()
