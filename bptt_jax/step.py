"""The contract that everything else stands on: a recurrent step is a pure function.

``h_k = step(params, h_{k-1}, x_k)`` sees one sequence at one instant; batches are ``jax.vmap`` outside. The
state is any pytree of floating (or complex) arrays, the input any pytree, ``None`` for an autonomous step.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bptt_jax.checks import (
    at_path,
    call_user_function,
    check_function,
    check_leaves,
    check_positive_int,
    check_scalar,
    describe_shapes,
)

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Params: TypeAlias = Any
State: TypeAlias = Any
Input: TypeAlias = Any
Step: TypeAlias = Callable[[Params, State, Input], State]
Loss: TypeAlias = Callable[[State], Array]


class Cell(NamedTuple):
    """A recurrent cell: three pure functions.

    Attributes:
      init: ``init(key, input_size) -> params``.
      initial_state: ``initial_state() -> h_0``, zeros.
      step: ``step(params, h, x) -> h``, one instant of one sequence.
    """

    init: Callable[[Array, int], Params]
    initial_state: Callable[[], State]
    step: Step


def ravel_state(state: State) -> tuple[Array, Callable[[Array], State]]:
    """The state as one real vector of length D, and the way back.

    The order is `jax.flatten_util.ravel_pytree`'s; a complex leaf counts as its real part followed by its
    imaginary part.

    Args:
      state: pytree of arrays.

    Returns:
      ``(vector [D], unravel)`` with ``unravel(vector)`` equal to ``state``.

    Raises:
      TypeError, ValueError: a leaf is no array of numbers.

    Example:
      >>> vector, unravel = bptt.ravel_state({"h": jnp.zeros(2), "c": jnp.ones(1)})
      >>> vector
      Array([1., 0., 0.], dtype=float32)
      >>> unravel(vector)["h"].shape
      (2,)
    """
    check_leaves("state", state, keys=False)
    leaves, treedef = jax.tree.flatten(state)
    is_complex = [jnp.iscomplexobj(leaf) for leaf in leaves]
    vector, unravel_parts = ravel_pytree(
        [(leaf.real, leaf.imag) if c else leaf for leaf, c in zip(leaves, is_complex, strict=True)]
    )

    def unravel(vector: Array) -> State:
        parts = unravel_parts(vector)
        return jax.tree.unflatten(
            treedef, [jax.lax.complex(*p) if c else p for p, c in zip(parts, is_complex, strict=True)]
        )

    return vector, unravel


def full_precision() -> AbstractContextManager[Any]:
    """For what is traced within. GPUs and TPUs multiply float32 in reduced precision by default, with three digits;
    a precision that a step names by itself stays."""
    return jax.default_matmul_precision("highest")


def prepend(state0: State, states: State) -> State:
    """The states that each step started from: h_0 .. h_{T-1}, leaves ``[T, ...]``."""
    return jax.tree.map(lambda h0, h: jnp.concatenate([h0[None], h[:-1]]), state0, states)


def _is_differentiable(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def differentiable_part(params: Params) -> tuple[Params, Callable[[Params], Params]]:
    """The parameters with None at what is not floating, and the way back: ``merge(part)`` is like `params`."""
    leaves, treedef = jax.tree.flatten(params)
    moves = [_is_differentiable(leaf) for leaf in leaves]

    def merge(part: Params) -> Params:
        varied = iter(jax.tree.leaves(part))
        return jax.tree.unflatten(
            treedef, [next(varied) if m else leaf for m, leaf in zip(moves, leaves, strict=True)]
        )

    return jax.tree.unflatten(treedef, [leaf if m else None for m, leaf in zip(moves, leaves, strict=True)]), merge


def check_arguments(
    step: Step, params: Params, state0: State, xs: PyTree, length: int | None, loss: Loss | None = None
) -> int:
    """Checks all that can be checked without calling the step; returns the number of steps T.

    Raises:
      TypeError: `step` or `loss` is no hashable callable; a leaf is no array; the state holds integers.
      ValueError: the state is empty; T is missing, zero, or not the same in all of `xs`.
    """
    check_function("step", step, "step(params, state, x) -> state")
    if loss is not None:
        check_function("loss", loss, "loss(states) -> scalar")
    for name, tree in (("params", params), ("state0", state0), ("xs", xs)):
        check_leaves(name, tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state0):
        if not _is_differentiable(leaf):
            raise TypeError(
                f"{at_path('state0', path)}: expected floating numbers, got {jnp.result_type(leaf)}; "
                "a state is differentiated, so counters and flags belong into xs"
            )
    if sum(np.size(leaf) for leaf in jax.tree.leaves(state0)) == 0:
        raise ValueError("state0: expected at least one number, got an empty state")
    return _check_length(xs, length)


def check_step(step: Step, params: Params, state0: State, xs: PyTree) -> State:
    """Calls the step on abstract values; returns `state0` without weak types.

    Raises:
      TypeError, ValueError: the step returns another structure, shape or dtype than it was given, or changes its
        arguments. What the step itself raises passes through, with a note that says on which shapes.
    """
    state0 = jax.tree.map(lambda h: jax.lax.convert_element_type(h, jnp.result_type(h)), state0)
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a)[1:], jnp.result_type(a)), xs)

    def called(params: Params, state: State, x: Input) -> State:
        before = jax.tree.leaves((params, state, x))
        on = f"(params, state, x) on state {describe_shapes(state0)} and x {describe_shapes(x)}"
        new = call_user_function("step", on, step, params, state, x)
        after = jax.tree.leaves((params, state, x))
        if len(after) != len(before) or any(a is not b for a, b in zip(after, before, strict=True)):
            raise ValueError("step: expected a pure function, got one that writes into its arguments; copy them")
        return new

    new = jax.eval_shape(called, params, state0, x)
    expected: Any = jax.tree.structure(state0)
    if expected != jax.tree.structure(new):
        raise ValueError(
            f"step: must return a state of the structure of state0, {expected}, got {jax.tree.structure(new)}"
        )
    old_leaves = jax.tree_util.tree_leaves_with_path(state0)
    for (path, old), out in zip(old_leaves, jax.tree.leaves(new), strict=True):
        if old.shape != out.shape:
            raise ValueError(
                f"step: must keep the shape of {at_path('state', path)}, {list(old.shape)}, got {list(out.shape)}"
            )
        if old.dtype != out.dtype:
            raise TypeError(
                f"step: must keep the dtype of {at_path('state', path)}, {old.dtype}, got {out.dtype}; "
                "cast state0 or the parameters so that they agree"
            )
    return state0


def check_loss(loss: Loss, states: State) -> None:
    """Raises TypeError or ValueError unless ``loss(states)`` is one real floating number.

    What the loss itself raises passes through, with a note that says on which shapes.
    """

    def called(states: State) -> Array:
        return call_user_function("loss", f"(states) on states {describe_shapes(states)}", loss, states)

    check_scalar("loss", jax.eval_shape(called, states))


def _check_length(xs: PyTree, length: int | None) -> int:
    if length is not None:
        length = check_positive_int("length", length)
    leaves = jax.tree_util.tree_leaves_with_path(xs)
    if not leaves:
        if length is None:
            raise ValueError("length: expected the number of steps, since xs is None, got None")
        return length
    for path, leaf in leaves:
        if np.ndim(leaf) == 0:
            raise ValueError(f"{at_path('xs', path)}: expected time as the first axis, got a scalar")
    lengths = {at_path("xs", path): np.shape(leaf)[0] for path, leaf in leaves}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"xs: expected one number of steps in all leaves, got {lengths}")
    steps = next(iter(lengths.values()))
    if steps == 0:
        raise ValueError("xs: expected at least one step, got a first axis of 0")
    if length is not None and length != steps:
        raise ValueError(f"length: expected {steps}, the first axis of xs, got {length}")
    return steps
