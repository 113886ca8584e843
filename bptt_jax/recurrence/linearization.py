"""A step linearised along a whole trajectory, so that the backward pass recomputes nothing."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxpr_as_fun

from bptt_jax.step import Array, Params, PyTree, State, Step, differentiable_part

# Numbers of state in one contraction on CPU: arrays of that size, in float32, stay in the caches.
_CHUNK_NUMBERS = 1 << 16
# Up to so many parameters for each number of the state, adding up their gradients step by step costs little.
_FEW_PARAMS = 16


class Linearization(NamedTuple):
    """The differentials of all steps.

    Attributes:
      states: h_1 .. h_T.
      residuals: what the differentials need and what changes from step to step, leaves ``[T, ...]``.
      transpose_state: ``(residuals of one step, dL/dh_t) -> (dh_t/dh_{t-1})^T dL/dh_t``.
      transpose_params: ``(residuals of K steps, dL/dh [K, ...]) -> sum of (dh_t/dparams)^T dL/dh_t`` over K,
        formed by contractions over many steps instead of K accumulations.
      push_params: ``(residuals of one step, dparams) -> (dh_t/dparams) dparams``.
    """

    states: State
    residuals: PyTree
    transpose_state: Callable[[PyTree, State], State]
    transpose_params: Callable[[PyTree, State], Params]
    push_params: Callable[[PyTree, Params], State]


def linearize(step: Step, params: Params, state0: State, xs: PyTree, steps: int) -> Linearization:
    """Unrolls `step` and keeps the differential of every step.

    Parameters that are not floating (integers, flags) are constants: they have None in every gradient.
    """
    differentiable, merge = differentiable_part(params)
    trees: dict[str, Any] = {}

    def step_and_residuals(params: Params, h: State, x: PyTree) -> tuple[list[Any], list[Any]]:
        new, differential = jax.linearize(lambda p, h: step(merge(p), h, x), params, h)
        residuals, trees["differential"] = jax.tree.flatten(differential)
        new_leaves, trees["state"] = jax.tree.flatten(new)
        return new_leaves, residuals

    x0 = jax.tree.map(lambda a: a[0], xs)
    jaxpr, outputs = jax.make_jaxpr(step_and_residuals, return_shape=True)(differentiable, state0, x0)
    n_state = len(outputs[0])
    n_params = len(jax.tree.leaves(differentiable))
    n_inputs = len(jaxpr.jaxpr.invars)
    varies = _depends(jaxpr.jaxpr, [False] * n_params + [True] * (n_inputs - n_params))[n_state:]

    def evaluate(h: State, x: PyTree) -> tuple[State, list[Any]]:
        out = jaxpr_as_fun(jaxpr)(*jax.tree.leaves((differentiable, h, x)))
        return jax.tree.unflatten(trees["state"], out[:n_state]), out[n_state:]

    # Residuals that no step changes (the weights themselves, mostly) are not stacked T times.
    fixed = [r for r, v in zip(evaluate(state0, x0)[1], varies, strict=True) if not v]

    def body(h_tm1: State, x: PyTree) -> tuple[State, tuple[State, list[Any]]]:
        h, residuals = evaluate(h_tm1, x)
        return h, (h, [r for r, v in zip(residuals, varies, strict=True) if v])

    _, (states, stacked) = jax.lax.scan(body, state0, xs, length=steps)

    def differential(residuals: list[Any]) -> Callable[[Params, State], State]:
        changing, same = iter(residuals), iter(fixed)
        return jax.tree.unflatten(trees["differential"], [next(changing) if v else next(same) for v in varies])

    no_params = jax.tree.map(jnp.zeros_like, differentiable)
    no_state = jax.tree.map(jnp.zeros_like, state0)

    def transpose_state(residuals: PyTree, cotangent: State) -> State:
        return jax.linear_transpose(lambda dh: differential(residuals)(no_params, dh), state0)(cotangent)[0]

    def contract(residuals: PyTree, cotangents: State) -> Params:
        count = jax.tree.leaves(cotangents)[0].shape[0]

        def push(dp: Params) -> State:
            return jax.vmap(lambda r: differential(r)(dp, no_state), axis_size=count)(residuals)

        return jax.linear_transpose(push, differentiable)(cotangents)[0]

    def contract_by_steps(residuals: PyTree, cotangents: State) -> Params:
        def body(total: Params, one: tuple[PyTree, State]) -> tuple[Params, None]:
            gradient = jax.linear_transpose(partial(push_params, one[0]), differentiable)(one[1])[0]
            return jax.tree.map(jnp.add, total, gradient), None

        return jax.lax.scan(body, jax.tree.map(jnp.zeros_like, differentiable), (residuals, cotangents))[0]

    def contract_by_chunks(residuals: PyTree, cotangents: State) -> Params:
        """For CPU: one contraction over all steps of a batch transposes arrays that fit no cache (up to 2x)."""
        leaves = jax.tree.leaves(cotangents)
        count = leaves[0].shape[0]
        numbers = sum(a.size for a in leaves) // count
        if sum(p.size for p in jax.tree.leaves(differentiable)) <= _FEW_PARAMS * numbers:
            return contract_by_steps(residuals, cotangents)
        chunk = max(1, _CHUNK_NUMBERS // numbers)
        if chunk >= count:
            return contract(residuals, cotangents)
        rest = count % chunk
        tail = jax.tree.map(lambda a: a[count - rest :], (residuals, cotangents))
        start = contract(*tail) if rest else jax.tree.map(jnp.zeros_like, differentiable)

        def body(total: Params, part: tuple[PyTree, State]) -> tuple[Params, None]:
            return jax.tree.map(jnp.add, total, contract(*part)), None

        def cut(a: Array) -> Array:
            return a[: count - rest].reshape(count // chunk, chunk, *a.shape[1:])

        return jax.lax.scan(body, start, jax.tree.map(cut, (residuals, cotangents)))[0]

    def transpose_params(residuals: PyTree, cotangents: State) -> Params:
        return jax.lax.platform_dependent(residuals, cotangents, cpu=contract_by_chunks, default=contract)

    def push_params(residuals: PyTree, dp: Params) -> State:
        return differential(residuals)(dp, no_state)

    return Linearization(states, stacked, transpose_state, transpose_params, push_params)


def _depends(jaxpr: Any, inputs: list[bool]) -> list[bool]:
    """For every output of `jaxpr`, whether it depends on an input that is marked True."""
    marked = {v for v, mark in zip(jaxpr.invars, inputs, strict=True) if mark}

    def is_marked(v: Any) -> bool:
        return not isinstance(v, Literal) and v in marked

    for eqn in jaxpr.eqns:
        marks = [is_marked(v) for v in eqn.invars]
        if eqn.primitive.name in ("jit", "pjit"):  # a jitted step is looked into, or its weights would be stacked
            out = _depends(eqn.params["jaxpr"].jaxpr, marks)
        else:
            out = [any(marks)] * len(eqn.outvars)
        marked.update(v for v, mark in zip(eqn.outvars, out, strict=True) if mark)
    return [is_marked(v) for v in jaxpr.outvars]
