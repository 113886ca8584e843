"""What all estimators share that go forward in time: the scan, the step's differential, what they hand on."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int, PRNGKeyArray

from bptt_jax import devices
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.checks import check_bool, describe_shapes, type_name
from bptt_jax.linalg.precision import at_least_single, matmul
from bptt_jax.recurrence.linearization import differentiation_mode, mode_and_live
from bptt_jax.recurrence.programs import multiplied_axes
from bptt_jax.recurrence.unroll import states_of
from bptt_jax.results import Result, counted, field
from bptt_jax.step import (
    Array,
    Input,
    Instant,
    Loss,
    Params,
    PyTree,
    Recurrence,
    State,
    Step,
    bind,
    check_step,
    choose,
    differentiable_part,
    is_differentiable,
    ravel_state,
    state_size,
)


class OnlineCarry(Result):
    """What an estimator that goes forward in time carries from one call to the next.

    Attributes:
      state: the last one.
      influence: what it keeps of the influence of the parameters on that state, in its own form.
      steps: real ones so far, from which random numbers are drawn.
      pending: whether a reset stands in the padding behind it, which takes place before the next real step; None if
        there can be none.
    """

    state: State
    influence: PyTree
    steps: Int[Array, ""] = field(dims=())
    pending: Bool[Array, ""] | None = field(dims=(), default=None)

    def _headline(self) -> str:
        return f"{counted(int(self.steps), 'step')} so far"


class Numbers(NamedTuple):
    """Whose influence on what: all numbers of the parameters and of the state, a complex one as two, in their order.

    Attributes:
      params: the leaves that move.
      state: likewise.
      size: D.
      params_size: P.
      dtype: of the state's vector.
      meets: of each leaf of the parameters, the axis along which it meets what it is multiplied by, as far as that
        is known; else the last.
    """

    params: list[Array]
    state: list[Array]
    size: int
    params_size: int
    dtype: Any
    meets: list[int]

    @property
    def single(self) -> Any:
        """The dtype, or single precision if that is wider."""
        return at_least_single(self.dtype)


class Differential(NamedTuple):
    """Of one step, by J = dh_t/dh_{t-1} ``[D, D]`` and F = dh_t/dparams ``[D, P]`` with h_{t-1} held.

    Attributes:
      push: ``v [D] -> J v``.
      pull: ``u [D] -> F^T u``.
      jacobians: ``() -> (J, F)``.
      rows: ``function(row of J, row of F)`` of one row after the other, its results stacked; F is never whole where
        the step has a backward pass.
    """

    push: Callable[[Array], Array]
    pull: Callable[[Array], Array]
    jacobians: Callable[[], tuple[Array, Array]]
    rows: Callable[[Callable[[Array, Array], PyTree]], PyTree]


class Rule(Protocol):
    """How an estimator carries the influence; static, so hashable, and equal to none of another class: what tuples are
    of no fields, and JAX would take the program of the one for the other's."""

    def begin(self, of: Numbers) -> PyTree:
        """Of the parameters on a state that does not depend on them: zeros, also after a reset."""

    def advance(self, of: Numbers, at: Differential, influence: PyTree, key: Any) -> PyTree:
        """From one step to the next; the key is that of this step, None where nothing is random."""

    def product(self, of: Numbers, influence: PyTree, signal: Array) -> Array:
        """``signal [D]`` times the influence: ``[P]``."""


def go_forward(
    rule: Rule,
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    key: PRNGKeyArray | None,
    args: PyTree,
    length: int | None,
    carry: OnlineCarry | None,
    has_carry: bool,
) -> Params:
    """What the public functions do; `key` is None where nothing is random."""
    recurrence, bound = bind(step, params, state0, xs, length), bind_loss(loss, args)
    check_bool("has_carry", has_carry)
    if carry is not None:
        _check_carry(rule, recurrence, carry)
    found, carry = _gradient_forward(recurrence, bound, carry, key, rule=rule, has_carry=has_carry)
    return (found, carry) if has_carry else found


def _check_carry(rule: Rule, recurrence: Recurrence, carry: Any) -> None:
    if not isinstance(carry, OnlineCarry):
        raise TypeError(f"carry: expected what has_carry=True returned, got {type_name(carry)}")

    def begun(recurrence: Recurrence) -> OnlineCarry:
        recurrence = check_step(recurrence)
        pending = None if carry.pending is None else jnp.asarray(False)
        return OnlineCarry(recurrence.state0, rule.begin(_numbers(recurrence)), jnp.zeros((), jnp.int32), pending)

    expected = jax.eval_shape(begun, recurrence)
    flat: list[Any] = [jax.tree.flatten(tree) for tree in (carry, expected)]
    kinds = [[(a.shape, a.dtype) for a in leaves] for leaves, _ in flat]
    if flat[0][1] != flat[1][1] or kinds[0] != kinds[1]:
        wanted, got = (describe_shapes((tree.state, tree.influence)) for tree in (expected, carry))
        raise ValueError(f"carry: expected that of the same estimator, step and parameters, {wanted}, got {got}")


@partial(devices.compiled, checked=True)
def _gradient_forward(
    recurrence: Recurrence,
    loss: BoundLoss,
    carry: OnlineCarry | None,
    key: Array | None,
    *,
    rule: Rule,
    has_carry: bool,
) -> tuple[Params, OnlineCarry | None]:
    if carry is not None:
        recurrence = recurrence.going_on(carry.state, carry.pending)
        carry = replace(carry, pending=None)
    given, pending, recurrence = recurrence.params, recurrence.ends_anew, check_step(recurrence)
    # What the loss never depends on may overflow, and zero times infinity is NaN. The loss of a later part may read it.
    read = None if has_carry else loss.reads(recurrence.state0, recurrence.length)
    mode, live = mode_and_live(recurrence, read=read)
    backward = _goes_backward(recurrence)
    of = _numbers(recurrence)
    theta, unravel_params = ravel_state(differentiable_part(recurrence.params)[0])
    nothing = devices.vary(rule.begin(of), devices.axes_of(recurrence.state0))
    cotangents = loss.differentiate(states_of(recurrence)).states
    # The cotangent of x + iy is dL/dx - i dL/dy, while Jacobians act on (x, y).
    signals = jax.vmap(lambda d: ravel_state(jax.tree.map(jnp.conj, d))[0])(cotangents)
    if carry is None:
        carry = OnlineCarry(recurrence.state0, nothing, jnp.zeros((), jnp.int32))

    def body(
        carry: tuple[OnlineCarry, Array], at_t: tuple[Instant, Array]
    ) -> tuple[tuple[OnlineCarry, Array], None]:
        before, total = carry
        at, signal = at_t
        start = recurrence.begin(before.state, at)
        new, differential = _differentiate(recurrence, live, start, at.x, mode == "forward", backward)
        influence = before.influence if at.reset is None else choose(at.reset, nothing, before.influence)
        now = None if key is None else jax.random.fold_in(key, before.steps)
        after = OnlineCarry(new, rule.advance(of, differential, influence, now), before.steps + 1)
        if at.real is not None:
            after = choose(at.real, after, before)
        return (after, total + rule.product(of, after.influence, signal).astype(total.dtype)), None

    # In half precision a sum over many steps would not grow any more.
    start = carry, jnp.zeros_like(theta, at_least_single(theta.dtype))
    (carry, total), _ = devices.scan(body, start, (recurrence.instants, signals), length=recurrence.length)
    grad = jax.tree.map(jnp.conj, unravel_params(total.astype(theta.dtype)))
    grad = devices.summed_like(grad, differentiable_part(given)[0])
    return grad, replace(carry, pending=pending) if has_carry else None


def _goes_backward(recurrence: Recurrence) -> bool:
    """Whether the step has a backward pass."""
    try:
        differentiation_mode(recurrence, "reverse")
    except TypeError:
        return False
    return True


def _numbers(recurrence: Recurrence) -> Numbers:
    params, state = (jax.tree.leaves(differentiable_part(t)[0]) for t in (recurrence.params, recurrence.state0))
    dtype = ravel_state(recurrence.state0)[0].dtype
    first = jax.tree.map(lambda a: a[0], recurrence.instants)
    jaxpr = jax.make_jaxpr(recurrence.step)(recurrence.params, recurrence.state0, first.x)
    given = jax.tree.leaves(recurrence.params)
    axes = multiplied_axes(jaxpr, len(given))
    meets = [axes.get(k, -1) for k, leaf in enumerate(given) if is_differentiable(leaf)]
    return Numbers(params, state, state_size(state), state_size(params), dtype, meets)


def _differentiate(
    recurrence: Recurrence, live: list[bool], state: State, x: Input, forward: bool, backward: bool
) -> tuple[State, Differential]:
    """The next state, and the differential, zero for leaves that are not live; by pulls for all rows of a Jacobian,
    for there are fewer of them."""
    moving, merge = differentiable_part(recurrence.params)
    theta, unravel_params = ravel_state(moving)
    vector, unravel = ravel_state(state)
    dtype, axes = vector.dtype, devices.axes_of(recurrence.state0)

    def moved(theta: Array, vector: Array) -> tuple[Array, State]:
        new = recurrence.step(merge(unravel_params(theta)), unravel(vector), x)
        leaves, structure = jax.tree.flatten(differentiable_part(new)[0])
        leaves = [a if kept else jax.lax.stop_gradient(a) for a, kept in zip(leaves, live, strict=True)]
        return ravel_state(jax.tree.unflatten(structure, leaves))[0], new

    def unit(numbers: Array) -> Array:
        return devices.vary(jnp.eye(numbers.size, dtype=numbers.dtype), axes)

    if backward:
        _, pull_both, new = jax.vjp(moved, theta, vector, has_aux=True)

        def jacobians() -> tuple[Array, Array]:
            by_params, by_state = jax.vmap(pull_both)(unit(vector))
            return by_state, by_params.astype(dtype)

        def pull(u: Array) -> Array:
            return pull_both(u)[0]

        def rows(function: Callable[[Array, Array], PyTree]) -> PyTree:
            def body(_: None, u: Array) -> tuple[None, PyTree]:
                by_params, by_state = pull_both(u)
                return None, function(by_state, by_params.astype(dtype))

            return devices.scan(body, None, unit(vector))[1]
    else:
        _, push_both, new = jax.linearize(moved, theta, vector, has_aux=True)

        def jacobians() -> tuple[Array, Array]:
            by_params = jax.vmap(lambda v: push_both(v, jnp.zeros_like(vector)), out_axes=1)(unit(theta))
            by_state = jax.vmap(lambda v: push_both(jnp.zeros_like(theta), v), out_axes=1)(unit(vector))
            return by_state, by_params

        def pull(u: Array) -> Array:
            return matmul(u, jacobians()[1]).astype(theta.dtype)

        def rows(function: Callable[[Array, Array], PyTree]) -> PyTree:
            return jax.vmap(function)(*jacobians())

    def push(v: Array) -> Array:
        if not forward:
            return matmul(jacobians()[0], v)
        return jax.jvp(lambda vector: moved(theta, vector)[0], (vector,), (v,))[1]

    return new, Differential(push, pull, jacobians, rows)
