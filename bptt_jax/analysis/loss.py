"""A loss of the whole trajectory, bound to what it is given beside the states."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.checks import (
    call_user_function,
    check_bool,
    check_function,
    check_leaves,
    check_scalar,
    describe_shapes,
    notice_new_function,
    signature_of,
    takes,
)
from bptt_jax.recurrence.programs import depends
from bptt_jax.step import Array, Loss, PyTree, State, differentiable_part


class LossGradient(NamedTuple):
    """Value and immediate derivatives of a loss.

    Attributes:
      value: L.
      aux: what the loss returned beside it; None without ``has_aux``.
      states: dl/dh_1 .. dl/dh_T, like the states, None at leaves that are no floating numbers.
      args: dL/dargs likewise; None without `args`.
    """

    value: Array
    aux: PyTree
    states: State
    args: PyTree


@partial(jax.tree_util.register_dataclass, data_fields=("args",), meta_fields=("function", "has_args", "has_aux"))
@dataclass(frozen=True, eq=False)
class BoundLoss:
    """``loss(states)``, or ``loss(states, args)`` where `args` are given; made by `bind_loss`."""

    function: Loss
    args: PyTree
    has_args: bool
    has_aux: bool

    def __call__(self, states: State) -> tuple[Array, PyTree]:
        """``(value, aux)``, checked.

        Raises:
          TypeError, ValueError: what the function returns is no real scalar (and something beside it).
        """
        return self._call(states, self.args)

    def reads(self, state0: State, steps: int) -> list[bool]:
        """Of each leaf of the states that holds floating numbers, whether its gradient may be other than zero."""
        part = differentiable_part(state0)[0]
        leaves, structure = jax.tree.flatten(part)

        def pushed(state0: State, tangents: list[Array]) -> Array:
            repeat = partial(jax.tree.map, lambda a: jnp.broadcast_to(a, (steps, *a.shape)))
            moving, merge = differentiable_part(repeat(state0))
            along = repeat(jax.tree.unflatten(structure, tangents))
            return jax.jvp(lambda part: self._call(merge(part), self.args)[0], (moving,), (along,))[1]

        program = jax.make_jaxpr(pushed)(state0, leaves)
        others, places = [False] * len(jax.tree.leaves(state0)), range(len(leaves))
        return [depends(program, others + [i == k for i in places])[0] for k in places]

    def differentiate(self, states: State) -> LossGradient:
        """Value and derivatives with respect to the floating leaves of the states and of `args`."""
        moving, merge = differentiable_part(states)
        moving_args, merge_args = differentiable_part(self.args)

        def value(part: State, args: PyTree) -> tuple[Array, PyTree]:
            return self._call(merge(part), merge_args(args))

        (found, aux), (immediate, args_grad) = jax.value_and_grad(value, (0, 1), has_aux=True)(moving, moving_args)
        # Of a loss that is linear in the states this is a constant, T * D zeros mostly, which the compiler would
        # spend half a minute on to evaluate ahead of time.
        return LossGradient(found, aux, jax.lax.optimization_barrier(immediate), args_grad)

    def _call(self, states: State, args: PyTree) -> tuple[Array, PyTree]:
        given = (states, args) if self.has_args else (states,)
        names = "(states, args)" if self.has_args else "(states)"
        found = call_user_function("loss", f"{names} on states {describe_shapes(states)}", self.function, *given)
        aux = None
        if self.has_aux:
            if not (isinstance(found, tuple) and len(found) == 2):
                raise TypeError(
                    f"loss: with has_aux=True it must return a pair (loss, aux), got {describe_shapes(found)}"
                )
            found, aux = found
        elif isinstance(found, tuple) and len(found) == 2:
            got = describe_shapes(found)
            raise TypeError(
                f"loss: must return one number, got {got}; a pair (loss, aux) wants has_aux=True, or where there is no "
                "such option the loss alone"
            )
        steps = jax.tree.leaves(states)[0].shape[0]
        if jax.tree_util.all_leaves([found]) and jnp.shape(found)[:1] == (steps,):
            raise ValueError(
                f"loss: must return a scalar, got shape {list(jnp.shape(found))}; it is given all states at once, "
                f"T = {steps}: reduce it to one number, as in jnp.mean(...), or take the last state, states[-1]"
            )
        check_scalar("loss", found)
        return jnp.asarray(found), aux


def bind_loss(loss: Loss, args: PyTree = None, has_aux: bool = False) -> BoundLoss:
    """The loss of these arguments, checked; warns once of a function that is made anew for every call.

    Raises:
      TypeError, ValueError: `loss` is no hashable function; a leaf of `args` is no array; `has_aux` is no bool.
    """
    loss = check_function("loss", loss, "loss(states) -> scalar")
    check_leaves("args", args)
    check_bool("has_aux", has_aux)
    _check_arity(loss, args is not None)
    notice_new_function("loss", loss, "what changes from call to call goes into args=, for loss(states, args)")
    return BoundLoss(loss, args, args is not None, has_aux)


def _check_arity(loss: Loss, has_args: bool) -> None:
    given = ("states", "args") if has_args else ("states",)
    if not takes(loss, len(given)):
        way = "leave args= away" if has_args else "give args="
        raise TypeError(
            f"loss: expected a function called as loss({', '.join(given)}), since args "
            f"{'are' if has_args else 'is not'} given, got {signature_of(loss)}; {way}"
        )
