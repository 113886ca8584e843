"""How far is a time from what the machine could do, and which of its limits is it?

The machine is measured in the same run: a large product of matrices in float32, a sum over more numbers than its
caches hold, and a loop whose rounds do next to nothing. A program's operations and rounds are counted from its jaxpr,
as in `launches.py`. Its bytes are the least that must come from memory: arguments, results, and what loops take and
leave step by step, each read or written once, as if all else, the weights too, stayed in the caches. A share is the
time that one of these would need alone, over the time taken; the largest names the limit. Operations that are no
products count for nothing, so that 1 is out of reach.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from launches import cost_of, is_jaxpr, size
from measure import compiled

from bptt_jax.experiments.timing import interleaved


class Machine(NamedTuple):
    """Operations and bytes per second, and seconds for a round of a loop."""

    flops: float
    bytes: float
    round: float


def measured(quick: bool = False) -> Machine:
    """Of the default device: the best of what takes turns for some seconds."""
    width, numbers, rounds = (256, 10**6, 100) if quick else (2048, 1 << 26, 20_000)

    def loop(h: jax.Array) -> Any:
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ h), h), h, length=rounds)

    square, stream = jnp.ones((width, width)), jnp.ones(numbers)
    jobs: dict[str, tuple[Callable[..., Any], jax.Array]] = {
        "product": (lambda a: a @ a, square),
        "stream": (lambda x: x + 1, stream),
        "loop": (loop, jnp.ones((4, 4))),
    }
    runs = {name: partial(compiled(job, given)[0], given) for name, (job, given) in jobs.items()}
    best = {name: min(t) for name, t in interleaved(runs, 5, 0.0 if quick else 3.0).items()}
    return Machine(2 * width**3 / best["product"], 2 * stream.nbytes / best["stream"], best["loop"] / rounds)


def shares(function: Callable[..., Any], *given: Any, taken: float, machine: Machine) -> dict[str, float]:
    """Of `taken` seconds for ``function(*given)``: under "flops", "bytes" and "launches"."""
    jaxpr = jax.make_jaxpr(function)(*given).jaxpr
    cost = cost_of(jaxpr)
    moved = sum(map(size, [*jaxpr.invars, *jaxpr.outvars])) + _along_loops(jaxpr)
    return {
        "flops": cost.flops / machine.flops / taken,
        "bytes": moved / machine.bytes / taken,
        "launches": cost.rounds * machine.round / taken,
    }


def named(found: Mapping[str, float]) -> str:
    """The largest, in words: ``"flops 0.61"``."""
    kind = max(found, key=lambda kind: found[kind])
    return f"{kind} {found[kind]:.2g}"


def _along_loops(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        given = equation.params
        if equation.primitive.name == "scan":
            body = getattr(given["jaxpr"], "jaxpr", given["jaxpr"])
            pairs = [
                *zip(equation.invars, body.invars, strict=True),
                *zip(equation.outvars, body.outvars, strict=True),
            ]
            total += sum(size(outside) for outside, inside in pairs if outside.aval.shape != inside.aval.shape)
        elif equation.primitive.name == "while":
            total += _along_loops(given["body_jaxpr"].jaxpr)
        else:
            within = [j for j in jax.tree.leaves(list(given.values()), is_leaf=is_jaxpr) if is_jaxpr(j)]
            total += sum(_along_loops(getattr(j, "jaxpr", j)) for j in within[:1])
    return total
