"""What does it cost to see dL/dh_t at every step, against the plain gradient of the same loss?

Plain is what everyone writes: `jax.value_and_grad` through `jax.lax.scan`. Against it, in one run and by turns:
`bptt_jax.adjoints`, which gives the gradient, every dL/dh_t and their norms in log scale; and the trick with zeros
added to every h_t, whose gradient is dL/dh_t too (without the log scale: it underflows). The loss reads all states.
Three ways of batching: one sequence; the batch inside the step, ``jax.vmap(step, (None, 0, 0))``, with one gradient
of all; and `jax.vmap` around everything, with a gradient for every sequence. Answers are compared first.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from measure import Claim, interleaved_medians, parser, print_claims, print_rows, relative_error, save

import bptt_jax as bptt

INPUT_SIZE = 32
FULL: dict[str, Any] = {
    "cells": ["rnn", "gru", "lstm"],
    "hidden": [32, 128, 256],
    "length": 200,
    "batch": 32,
    "repeats": 7,
}
QUICK = FULL | {"cells": ["rnn", "lstm"], "hidden": [64], "length": 50, "batch": 8}
AIM = 1.15


def loss(states: Any) -> jax.Array:
    return sum((jnp.mean(jnp.square(h)) for h in jax.tree.leaves(states)), jnp.zeros(()))


def candidates(step: bptt.Step) -> dict[str, Callable[..., Any]]:
    """Each ``(params, h0, xs) -> (loss, gradient[, adjoints])``."""

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
        return result.loss, result.params_grad, result.adjoints, result.log_norms

    def zeros(params: Any, h0: Any, xs: Any) -> Any:
        nothing = jax.tree.map(lambda h: jnp.zeros((xs.shape[0], *h.shape)), h0)
        value, gradients = jax.value_and_grad(lambda p, z: loss(scan(p, h0, xs, z)), (0, 1))(params, nothing)
        return value, *gradients

    return {"plain": plain, "adjoints": adjoints, "zeros": zeros}


def measure(cell_name: str, hidden: int, batching: str, s: dict[str, Any]) -> dict[str, Any]:
    cell = getattr(bptt, cell_name)(hidden)
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
    errors = {
        "gradient_error": relative_error(answers["adjoints"][:2], answers["plain"]),
        "adjoints_error": relative_error(answers["adjoints"][2], answers["zeros"][2]),
    }
    if max(errors.values()) > 1e-5:
        raise SystemExit(f"{cell_name} {hidden} {batching}: {errors}")
    times = interleaved_medians({k: partial(f, params, h0, xs) for k, f in jitted.items()}, s["repeats"])
    return {
        "cell": cell_name,
        "hidden": hidden,
        "batching": batching,
        "plain_ms": 1e3 * times["plain"],
        "adjoints_ratio": times["adjoints"] / times["plain"],
        "zeros_ratio": times["zeros"] / times["plain"],
        **errors,
    }


def main() -> None:
    a = parser(__doc__).parse_args()
    s = QUICK if a.quick else FULL
    kinds = ("one sequence", "batch in the step", "vmap outside")
    rows = [measure(cell, n, kind, s) for kind in kinds for cell in s["cells"] for n in s["hidden"]]
    title = (
        f"T = {s['length']}, batch {s['batch']}, medians of at least {s['repeats']} repeats; ratios are to plain"
    )
    print_rows(title, rows)
    claims = [
        Claim(
            "adjoints",
            f"{r['cell']} {r['hidden']}, {r['batching']}",
            "time over plain",
            r["adjoints_ratio"],
            AIM,
            True,
        )
        for r in rows
    ]
    print_claims(claims)
    save(a.out, "adjoint_cost", s | {"input_size": INPUT_SIZE}, {"rows": rows}, claims)


if __name__ == "__main__":
    main()
