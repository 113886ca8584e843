"""What does it cost to see dL/dh_t at every step, against `jax.value_and_grad` with the same outputs?

The same outputs, by what one would write oneself: zeros added to every h_t, whose gradient is dL/dh_t (without
the log scale: it underflows), states and loss as they come, the gradients of parameters and h_0, the logarithms
of the norms. Beside it, in one run and alternately, `bptt_jax.adjoints`, and the plain gradient of the parameters
alone. The loss reads all states. Three ways of batching: one sequence; the batch inside the step,
``jax.vmap(step, (None, 0, 0))``, with one gradient of all; and `jax.vmap` around everything, with a gradient for
every sequence. Answers are compared first.

And what does it keep? The bytes that the compiler plans beyond what is returned (states and adjoints), plain and
with ``remat=True``, for a sequence of 100,000 steps and 256 units.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from measure import Claim, parser, print_claims, print_rows, relative_error, save

import bptt_jax as bptt
from bptt_jax.experiments.timing import interleaved_medians

INPUT_SIZE = 32
FULL: dict[str, Any] = {
    "cells": ["rnn", "gru", "lstm"],
    "hidden": [32, 64, 128, 512],
    "length": 200,
    "batch": 32,
    "repeats": 7,
    "kept": {"length": 100_000, "hidden": 256},
}
QUICK = FULL | {
    "cells": ["rnn", "lstm"], "hidden": [64], "length": 50, "batch": 8, "kept": {"length": 1000, "hidden": 64}
}  # fmt: skip
AIM = 1.1
AIM_MB = 100


def loss(states: Any) -> jax.Array:
    return sum((jnp.mean(jnp.square(h)) for h in jax.tree.leaves(states)), jnp.zeros(()))


def candidates(step: bptt.Step) -> dict[str, Callable[..., Any]]:
    """Each ``(params, h0, xs) -> `` outputs; the last two have the same."""

    def scan(params: Any, h0: Any, xs: Any, added: Any = None) -> Any:
        def body(h: Any, inputs: Any) -> tuple[Any, Any]:
            x, zeros = inputs
            h = step(params, h, x)
            h = h if added is None else jax.tree.map(jnp.add, h, zeros)
            return h, h

        return jax.lax.scan(body, h0, (xs, added))[1]

    def plain(params: Any, h0: Any, xs: Any) -> Any:
        return jax.value_and_grad(lambda p: loss(scan(p, h0, xs)))(params)

    def adjoints(params: Any, h0: Any, xs: Any) -> Any:
        result = bptt.adjoints(step, params, h0, xs, loss)
        return result.loss, result.states, result.params_grad, result.state0_grad, result.adjoints, result.log_norms

    def same_outputs(params: Any, h0: Any, xs: Any) -> Any:
        nothing = jax.tree.map(lambda h: jnp.zeros((xs.shape[0], *h.shape)), h0)

        def value(params: Any, h0: Any, added: Any) -> tuple[Any, Any]:
            states = scan(params, h0, xs, added)
            return loss(states), states

        (found, states), gradients = jax.value_and_grad(value, (0, 1, 2), has_aux=True)(params, h0, nothing)
        squares = sum(jnp.sum(jnp.square(a).reshape(a.shape[0], -1), axis=1) for a in jax.tree.leaves(gradients[2]))
        return found, states, *gradients, 0.5 * jnp.log(squares)

    return {"plain": plain, "adjoints": adjoints, "same_outputs": same_outputs}


def measure(cell_name: str, hidden: int, batching: str, s: dict[str, Any]) -> dict[str, Any]:
    cell = getattr(bptt.cells, cell_name)(hidden)
    k_params, k_xs = jax.random.split(jax.random.key(0))
    params, h0 = cell.init(k_params, INPUT_SIZE), cell.initial_state()
    xs = jax.random.normal(k_xs, (s["length"], s["batch"], INPUT_SIZE))
    if batching == "one sequence":
        functions, xs = candidates(cell.step), xs[:, 0]
    elif batching == "batch in the step":
        functions = candidates(jax.vmap(cell.step, (None, 0, 0)))
        h0 = jax.tree.map(lambda h: jnp.zeros((s["batch"], *h.shape)), h0)
    else:
        functions = {k: jax.vmap(f, (None, None, 1)) for k, f in candidates(cell.step).items()}
    jitted = {k: jax.jit(f) for k, f in functions.items()}
    answers = {k: f(params, h0, xs) for k, f in jitted.items()}
    error = relative_error(answers["adjoints"], answers["same_outputs"])
    if error > 1e-4:
        raise SystemExit(f"{cell_name} {hidden} {batching}: {error}")
    times = interleaved_medians({k: partial(f, params, h0, xs) for k, f in jitted.items()}, s["repeats"])
    return {
        "cell": cell_name,
        "hidden": hidden,
        "batching": batching,
        "same_outputs_ms": 1e3 * times["same_outputs"],
        "adjoints_ratio": times["adjoints"] / times["same_outputs"],
        "plain_ratio": times["plain"] / times["same_outputs"],
        "error": error,
    }


def planned(cell_name: str, length: int, hidden: int) -> dict[str, Any]:
    cell = getattr(bptt.cells, cell_name)(hidden)
    shapes = jax.eval_shape(lambda: cell.init(jax.random.key(0), INPUT_SIZE))
    xs = jax.ShapeDtypeStruct((length, INPUT_SIZE), jnp.float32)

    def megabytes(remat: bool) -> dict[str, float]:
        def found(params: Any, xs: Any) -> Any:
            return bptt.adjoints(cell.step, params, cell.initial_state(), xs, loss, remat=remat)

        plan = jax.jit(found).lower(shapes, xs).compile().memory_analysis()
        assert plan is not None
        return {"temporary": plan.temp_size_in_bytes / 1e6, "returned": plan.output_size_in_bytes / 1e6}

    plain, remat = megabytes(False), megabytes(True)
    return {
        "cell": cell_name,
        "hidden": hidden,
        "length": length,
        "returned_MB": remat["returned"],
        "plain_MB": plain["temporary"],
        "remat_MB": remat["temporary"],
    }


def main() -> None:
    a = parser(__doc__).parse_args()
    s = QUICK if a.quick else FULL
    kinds = ("one sequence", "batch in the step", "vmap outside")
    rows = [measure(cell, n, kind, s) for kind in kinds for cell in s["cells"] for n in s["hidden"]]
    title = (
        f"T = {s['length']}, batch {s['batch']}, medians of {s['repeats']} repeats or more; over the same outputs"
    )
    print_rows(title, rows)
    claims = [
        Claim(
            "adjoints",
            f"{r['cell']} {r['hidden']}, {r['batching']}",
            "time over the same outputs by zeros",
            r["adjoints_ratio"],
            AIM,
            True,
        )
        for r in rows
    ]
    kept = [planned(cell, **s["kept"]) for cell in s["cells"]]
    print_rows(f"planned beyond what is returned; aim with remat: {AIM_MB} MB", kept)
    claims += [
        Claim(
            "memory of adjoints", f"{r['cell']} {r['hidden']}, T = {r['length']}", "MB", r["remat_MB"], AIM_MB, True
        )
        for r in kept
    ]
    print_claims(claims)
    save(a.out, "adjoint_cost", s | {"input_size": INPUT_SIZE}, {"rows": rows, "kept": kept}, claims)


if __name__ == "__main__":
    main()
