"""What a step makes of its parameters alone is made once, and not at every instant; and so is its derivative."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import and_
from typing import Any, NamedTuple

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
        it looks at state and input, and what of that counts as constant.
      finish: ``(made, constants) -> recurrence``, whose parameters are what was made.
    """

    make: Callable[[Params], tuple[list[Array], list[Array]]]
    finish: Callable[[list[Array], list[Array]], Recurrence]


def preparation(recurrence: Recurrence, live: Sequence[bool] | None = None) -> Preparation:
    """Of a checked recurrence, to be traced.

    Constant is what holds no floating numbers. With `live`, so is what does not move with the parameters, or moves
    nothing live: of each leaf of the state that holds floating numbers, whether anything comes of it. No cotangent
    comes back from the others, as from what a step only compares with or counts, and zero times an infinite derivative
    is NaN.
    """
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
    made = jax.eval_shape(jaxpr_as_fun(before), *leaves)
    moves = [is_differentiable(a) for a in made]
    if live is not None:

        def made_moving(leaves: list[Array]) -> list[Array]:
            return chosen(jaxpr_as_fun(before)(*leaves), moves)[0]

        def new_floating(moving: list[Array], others: list[Array], h: State, x: Input) -> list[Array]:
            new = jaxpr_as_fun(rest)(*merged(moving, others, moves), *jax.tree.leaves((h, x)))
            return [a for a in new if is_differentiable(a)]

        moves = _narrowed(moves, _movements(made_moving, leaves)([True] * count))
        moving, others = chosen(made, moves)
        moved_by, places = _movements(new_floating, moving, others, *given[1:]), range(len(moving))
        reaches = [any(map(and_, moved_by([i == k for i in places]), live)) for k in places]
        moves = _narrowed(moves, reaches)

    def make(params: Params) -> tuple[list[Array], list[Array]]:
        return chosen(jaxpr_as_fun(before)(*jax.tree.leaves(params)), moves)

    def finish(made: list[Array], constants: list[Array]) -> Recurrence:
        def step(made: list[Array], h: State, x: Input) -> State:
            new = jaxpr_as_fun(rest)(*merged(made, constants, moves), *jax.tree.leaves((h, x)))
            return jax.tree.unflatten(state_structure, new)

        return replace(recurrence, step=step, params=made)

    return Preparation(make, finish)


def _movements(
    function: Callable[..., list[Array]], inputs: list[Array], *others: Any
) -> Callable[[list[bool]], list[bool]]:
    """Which results of ``function(inputs, *others)``, all floating numbers, move when the marked inputs do."""

    def tangents(inputs: list[Array], others: tuple[Any, ...], changes: list[Array]) -> list[Array]:
        return jax.jvp(lambda inputs: function(inputs, *others), (inputs,), (changes,))[1]

    program = jax.make_jaxpr(tangents)(inputs, others, inputs)
    fixed = len(program.in_avals) - len(inputs)
    return lambda marks: depends(program, [False] * fixed + marks)


def _narrowed(marks: list[bool], of_marked: list[bool]) -> list[bool]:
    each = iter(of_marked)
    return [mark and next(each) for mark in marks]


def chosen(values: list[Any], marks: list[bool]) -> tuple[list[Any], list[Any]]:
    """Those that are marked, and the others."""
    pairs = list(zip(values, marks, strict=True))
    return [a for a, mark in pairs if mark], [a for a, mark in pairs if not mark]


def merged(marked: list[Any], others: list[Any], marks: list[bool]) -> list[Any]:
    """What `chosen` took apart."""
    a, b = iter(marked), iter(others)
    return [next(a if mark else b) for mark in marks]
