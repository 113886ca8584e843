"""What a step makes of its parameters alone is made once, and not at every instant; and so is its derivative."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
from jax.extend.core import jaxpr_as_fun

from bptt_jax.recurrence.programs import depends, divided, nesting, opened
from bptt_jax.step import Array, Input, Params, Recurrence, State, differentiable_part, is_differentiable


class Preparation(NamedTuple):
    """A step in two parts, for a loop over time.

    XLA takes what does not depend on time out of a loop, but in the backward pass the derivative is applied to another
    cotangent at every step: that of a matrix exponential, or of a transposed copy of the weights.

    Attributes:
      make: ``params -> (made, constants)``, of the floating part of the parameters: what the step makes of them before
        it looks at state and input, and what of that does not move with them.
      finish: ``(made, constants) -> recurrence``, whose parameters are what was made.
    """

    make: Callable[[Params], tuple[list[Array], list[Array]]]
    finish: Callable[[list[Array], list[Array]], Recurrence]


def preparation(recurrence: Recurrence) -> Preparation:
    """Of a checked recurrence, to be traced."""
    params, merge_params = differentiable_part(recurrence.params)
    leaves, structure = jax.tree.flatten(params)
    x = jax.tree.map(lambda a: a[0], recurrence.instants.x)

    def whole_step(leaves: list[Array], h: State, x: Input) -> State:
        return recurrence.step(merge_params(jax.tree.unflatten(structure, leaves)), h, x)

    given = leaves, recurrence.state0, x
    program, new = jax.make_jaxpr(whole_step, return_shape=True)(*given)
    for _ in range(nesting(program)):
        program = jax.make_jaxpr(jaxpr_as_fun(opened(program)))(*jax.tree.leaves(given))
    state_structure, count = jax.tree.structure(new), len(leaves)
    before, rest = divided(program, [False] * count + [True] * (len(program.in_avals) - count))
    floating = [is_differentiable(aval) for aval in before.out_avals]

    def tangents(leaves: list[Array], changes: list[Array]) -> list[Array]:
        return jax.jvp(lambda p: _chosen(jaxpr_as_fun(before)(*p), floating)[0], (leaves,), (changes,))[1]

    try:
        moving = iter(depends(jax.make_jaxpr(tangents)(leaves, leaves), [False] * count + [True] * count))
        moves = [f and next(moving) for f in floating]
    except Exception:  # of JAX, where what is made has no derivative (a callback): whoever asks for one is told
        moves = floating

    def make(params: Params) -> tuple[list[Array], list[Array]]:
        return _chosen(jaxpr_as_fun(before)(*jax.tree.leaves(params)), moves)

    def finish(made: list[Array], constants: list[Array]) -> Recurrence:
        def step(made: list[Array], h: State, x: Input) -> State:
            each, others = iter(made), iter(constants)
            kept = [next(each if m else others) for m in moves]
            return jax.tree.unflatten(state_structure, jaxpr_as_fun(rest)(*kept, *jax.tree.leaves((h, x))))

        return replace(recurrence, step=step, params=made)

    return Preparation(make, finish)


def _chosen(values: list[Array], marks: list[bool]) -> tuple[list[Array], list[Array]]:
    """Those that are marked, and the others."""
    pairs = list(zip(values, marks, strict=True))
    return [a for a, mark in pairs if mark], [a for a, mark in pairs if not mark]
