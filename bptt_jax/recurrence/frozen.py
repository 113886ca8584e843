"""The differential of a step in which all that moves with the state is held, so that weights alone vary.

Pascanu's regulariser wants of ``J = diag(phi'(W h + U x)) W`` the derivative by the W on the right, not by that in
phi'. The definition that tells them apart does not depend on how a step is written: while a tangent goes through
it, every value that depends differentiably on the state is a constant; all others, made of parameters and inputs,
are not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal as JaxprLiteral

from bptt_jax import devices
from bptt_jax.recurrence.programs import called, depends
from bptt_jax.step import Array, Input, Params, State, Step, differentiable_part, is_differentiable


class _Dual(NamedTuple):
    """A value and its tangent, None where it does not depend on the state; if it does the value is a constant."""

    value: Any
    tangent: Array | None = None


def frozen_push(step: Step, params: Params, state: State, x: Input) -> Callable[[State], State]:
    """The differential of a step at a state, tangents to tangents, both with None at what is no floating number.

    Differentiated with respect to `params` it is what the module says; its values are those of `jax.jvp`, of a
    `jax.custom_vjp` those of the transpose of its backward pass.

    Raises:
      TypeError: when it is called: the step uses a transformation within which weights and states cannot be told
        apart.
    """
    part, merge = differentiable_part(state)
    leaves, treedef = jax.tree.flatten(part)

    def moved(params: Params, leaves: list[Array], x: Input) -> list[Array]:
        new = step(params, merge(jax.tree.unflatten(treedef, leaves)), x)
        return jax.tree.leaves(differentiable_part(new)[0])

    jaxpr = jax.make_jaxpr(moved)(params, leaves, x)

    def push(tangent: State) -> State:
        moving = map(_Dual, jax.lax.stop_gradient(leaves), jax.tree.leaves(tangent))
        given = [*map(_Dual, jax.tree.leaves(params)), *moving, *map(_Dual, jax.tree.leaves(x))]
        new = [_instantiated(dual).tangent for dual in _evaluate(jaxpr, given)]
        return jax.tree.unflatten(treedef, new)

    return push


def multiplies_state(step: Step, params: Params, state: State, x: Input) -> list[bool]:
    """For every leaf of the parameters, whether the state is multiplied by it, itself and not a function of it.

    Biases and input weights are not, and neither is a logarithm or an angle of what the state is multiplied by.

    Raises:
      TypeError: as `frozen_push`.
    """
    leaves, treedef = jax.tree.flatten(params)

    def multiplies(i: int) -> bool:
        def pushed(leaf: Array) -> State:
            given = jax.tree.unflatten(treedef, [*leaves[:i], leaf, *leaves[i + 1 :]])
            return frozen_push(step, given, state, x)(differentiable_part(state)[0])

        def first(leaf: Array, d: Array) -> State:
            return jax.jvp(pushed, (leaf,), (d,))[1]

        def second(leaf: Array, d: Array) -> State:
            return jax.jvp(lambda leaf: first(leaf, d), (leaf,), (d,))[1]

        # What is symbolically zero does not depend on the direction.
        varies, bends = (
            any(depends(jax.make_jaxpr(f)(leaves[i], leaves[i]), [False, True])) for f in (first, second)
        )
        return varies and not bends

    return [is_differentiable(leaf) and multiplies(i) for i, leaf in enumerate(leaves)]


def _evaluate(jaxpr: Any, given: list[_Dual]) -> list[_Dual]:
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    known = dict(zip(inner.constvars, map(_Dual, getattr(jaxpr, "consts", ())), strict=True))
    known |= dict(zip(inner.invars, given, strict=True))

    def read(variable: Any) -> _Dual:
        return _Dual(variable.val) if isinstance(variable, JaxprLiteral) else known[variable]

    for eqn in inner.eqns:
        inputs = [read(v) for v in eqn.invars]
        program = called(eqn)
        if program is not None:
            outputs = _evaluate(program, inputs)
        elif all(dual.tangent is None for dual in inputs):
            outputs = [_Dual(value) for value in _bind(eqn, [dual.value for dual in inputs])]
        else:
            outputs = _RULES.get(eqn.primitive.name, _differentiate)(eqn, inputs)
        known |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in inner.outvars]


def _bind(eqn: Any, values: list[Any]) -> list[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # in JAX 0.8 they come apart
    found = eqn.primitive.bind(*functions, *values, **params)
    return list(found) if eqn.primitive.multiple_results else [found]


def _differentiate(eqn: Any, inputs: list[_Dual]) -> list[_Dual]:
    name = eqn.primitive.name
    inner = any(hasattr(value, "eqns") or hasattr(value, "jaxpr") for value in eqn.params.values())
    if inner and not name.startswith(("custom_", "reduce", "scatter", "select_and")):
        raise TypeError(
            f"step: weights and states cannot be told apart within a {name}; write the step without, or penalise "
            "the exponents: bptt_jax.remedies.flossing_penalty"
        )
    places = [i for i, dual in enumerate(inputs) if dual.tangent is not None]
    tangents = tuple(inputs[i].tangent for i in places)

    def apply(*moving: Array) -> tuple[list[Array], list[Any]]:
        values = [dual.value for dual in inputs]
        for i, value in zip(places, moving, strict=True):
            values[i] = value
        found = _bind(eqn, values)
        return [a for a in found if is_differentiable(a)], found

    at = tuple(inputs[i].value for i in places)
    if name.startswith("custom_vjp"):
        new, pull, found = jax.vjp(apply, *at, has_aux=True)
        pushed = jax.linear_transpose(pull, new)(tangents)[0]
    else:
        _, pushed, found = jax.jvp(apply, at, tangents, has_aux=True)
    moving = iter(pushed)
    return [
        _Dual(jax.lax.stop_gradient(value), next(moving)) if is_differentiable(value) else _Dual(value)
        for value in found
    ]


def _branch(eqn: Any, inputs: list[_Dual]) -> list[_Dual]:
    index, *operands = inputs
    branches = eqn.params["branches"]
    moves = [any(each) for each in zip(*(_moves(b, operands) for b in branches), strict=True)]
    functions = [lambda operands, b=b: _all_instantiated(_evaluate(b, operands), moves) for b in branches]
    return devices.switch(index.value, functions, operands)


def _loop(eqn: Any, inputs: list[_Dual]) -> list[_Dual]:
    body, program = eqn.params["jaxpr"], getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])

    def same_rank(outside: list[Any], within: list[Any]) -> int:
        return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, within, strict=True))

    n_carry = same_rank(eqn.outvars, program.outvars)
    n_consts = same_rank(eqn.invars, program.invars) - n_carry
    consts, carry, xs = inputs[:n_consts], inputs[n_consts : n_consts + n_carry], inputs[n_consts + n_carry :]
    one = jax.tree.map(lambda a: a[0], xs)
    moves, settled = [False] * len(program.outvars), False
    while not settled:  # what a round passes on may move in the next
        found = _moves(body, [*consts, *carry, *one])
        carried = [m or dual.tangent is not None for m, dual in zip(found, carry, strict=False)]
        settled, moves = moves[:n_carry] == carried, carried + found[n_carry:]
        carry = _all_instantiated(carry, carried)

    def step(carry: list[_Dual], x: list[_Dual]) -> tuple[list[_Dual], list[_Dual]]:
        found = _all_instantiated(_evaluate(body, [*consts, *carry, *x]), moves)
        return found[:n_carry], found[n_carry:]

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, stacked = devices.scan(step, carry, xs, **options)
    return [*carry, *stacked]


def _moves(jaxpr: Any, given: list[_Dual]) -> list[bool]:
    """Which of the outputs depend on the state."""
    found: list[bool] = []

    def probe(given: list[_Dual]) -> None:
        found[:] = [dual.tangent is not None for dual in _evaluate(jaxpr, given)]

    jax.eval_shape(probe, given)
    return found


def _all_instantiated(duals: list[_Dual], moves: list[bool]) -> list[_Dual]:
    """With a tangent, which may be zero, where `moves`."""
    return [_instantiated(dual) if m else dual for dual, m in zip(duals, moves, strict=True)]


def _instantiated(dual: _Dual) -> _Dual:
    if dual.tangent is not None:
        return dual
    return _Dual(jax.lax.stop_gradient(dual.value), jnp.zeros_like(dual.value))


_RULES = {"cond": _branch, "scan": _loop}
