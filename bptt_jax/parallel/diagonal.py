"""Recurrences that are linear in the state, in parallel over time."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax import devices
from bptt_jax.leaves import along_leading
from bptt_jax.linalg.affine import affine_scan
from bptt_jax.linalg.rank_one import Factors, multiply, rank_one_scan
from bptt_jax.recurrence.delta import LinearStep
from bptt_jax.recurrence.diagonal import DiagonalStep
from bptt_jax.step import Array, Input, Instant, Params, PyTree, Recurrence, State, Step, bind, check_step


def unroll_linear(
    step: Step, params: Params, state0: State, xs: PyTree = None, *, length: int | None = None
) -> State:
    """All states of a `DiagonalStep` or a `DeltaStep`, as `bptt_jax.unroll` gives them, in parallel over time.

    A `DiagonalStep` by one associative scan for each leaf: O(log T) rounds and O(T D) work instead of T steps
    (Martin, Cundy 2018, arXiv:1709.04057). A `DeltaStep` of matrices ``[V, K]`` in chunks of about sqrt(T) steps, all
    of which go on at once, and then from chunk to chunk: some 2 sqrt(T) steps, and K times the work; a CPU, which has
    no use for that, forms the coefficients of all steps at once and then takes them in order, which pays where the
    matrices are small. The chunked form of flash-linear-attention (Yang et al. 2024, arXiv:2406.06484), which forms
    what is read of the matrices and not the matrices, is not what gives all of them. Derivatives, of any
    order, cost one such scan each. Memory is O(T D), for gradients too, and for chunks O(T K^2) more.

    Scan and chunks form products of the factors: where these grow they overflow, to infinity or NaN, even where a
    state near 0 would still have been finite.

    Args:
      step: a `DiagonalStep`, such as the steps of `bptt_jax.cells.lru` and `bptt_jax.cells.min_gru`, or a `DeltaStep`,
        as that of `bptt_jax.cells.deltanet`.
      params, state0, xs, length: as for `bptt_jax.unroll`.

    Returns:
      h_1 .. h_T, a pytree like `state0` with leaves ``[T, ...]``: ``states[k]`` is h_{k+1}, in padding the state
      that is held.

    Raises:
      TypeError, ValueError: `step` is neither, or an argument breaks the contract.

    Example:
      >>> @bptt.parallel.DiagonalStep
      ... def decay(rate, x):
      ...     return rate, x
      >>> bptt.unroll_linear(decay, 0.5, jnp.zeros(1), jnp.ones((3, 1)))
      Array([[1.  ],
             [1.5 ],
             [1.75]], dtype=float32)
    """
    if not isinstance(step, LinearStep):
        raise TypeError(
            "step: expected a bptt_jax.parallel.DiagonalStep, as lru and min_gru have, or a DeltaStep, as deltanet "
            f"has, got {type(step).__name__}; for steps that are not linear in the state there is bptt_jax.deer"
        )
    return _states(bind(step, params, state0, xs, length), step=step)


@partial(devices.compiled, checked=True)
def _states(recurrence: Recurrence, *, step: LinearStep) -> State:
    recurrence = check_step(recurrence)
    params, state0, instants = recurrence.params, recurrence.state0, recurrence.instants

    def at(x: Input) -> tuple[State, ...]:
        pairs = zip(step.like(state0).values(), step.at(params, state0, x), strict=True)
        return tuple(jax.tree.map(_in_full, like, coefficient) for like, coefficient in pairs)

    coefficients = jax.vmap(at, axis_size=recurrence.length)(instants.x)
    # Without resets there is no such state, and none is needed.
    reset_state = state0 if recurrence.reset_state is None else recurrence.reset_state
    scan = _diagonal if isinstance(step, DiagonalStep) else _delta
    return jax.tree.map(partial(scan, instants), state0, reset_state, *coefficients)


def _in_full(like: Array, coefficient: Array) -> Array:
    return jnp.broadcast_to(coefficient, like.shape).astype(like.dtype)


def _diagonal(instants: Instant, h0: Array, reset_state: Array, a: Array, b: Array) -> Array:
    """``[T, ...]``: the states of one leaf."""
    shape, flat = b.shape, (a.shape[0], h0.size)

    def act(factors: tuple[Array, ...], h: Array) -> Array:
        return factors[0] * h

    factors, b = _from_start(
        instants, act, h0.ravel(), reset_state.ravel(), (a.reshape(flat),), b.reshape(flat), held=(1,)
    )
    return affine_scan(factors[0], b, begins=instants.reset).reshape(shape)


def _delta(instants: Instant, h0: Array, reset_state: Array, a: Array, u: Array, w: Array, b: Array) -> Array:
    """The same of a leaf ``[..., V, K]``, whose matrices go their ways apart."""
    steps, each, (values, keys) = b.shape[0], math.prod(h0.shape[:-2]), h0.shape[-2:]

    def of_one(h0: Array, reset_state: Array, b: Array, *factors: Array) -> Array:
        factors, b = _from_start(instants, multiply, h0, reset_state, factors, b, held=(1, 0, 0))
        return rank_one_scan(Factors(*factors), b, begins=instants.reset)

    matrices = (h.reshape(each, values, keys) for h in (h0, reset_state))
    rows = (c.reshape(steps, each, keys) for c in (a, u, w))
    given = *matrices, b.reshape(steps, each, values, keys), *rows
    return jax.vmap(of_one, (0, 0, 1, 1, 1, 1), 1)(*given).reshape(b.shape)


def _from_start(
    instants: Instant,
    act: Callable[[Any, Array], Array],
    h0: Array,
    reset_state: Array,
    factors: tuple[Array, ...],
    b: Array,
    *,
    held: tuple[int, ...],
) -> tuple[tuple[Array, ...], Array]:
    """Factors and offsets of a recurrence that starts from 0: what a step starts from, or from anew, goes into b.

    `act` multiplies a state by factors, and those of `held` leave it as it is.
    """

    def where(which: Array, c: Array, other: Array | int) -> Array:
        return jnp.where(along_leading(which, c), c, other)

    if instants.reset is not None:
        b = where(~instants.reset, b, act(factors, reset_state[None]) + b)
    if instants.real is not None:
        factors = tuple(where(instants.real, c, h) for c, h in zip(factors, held, strict=True))
        b = where(instants.real, b, 0)
    start = act(tuple(c[0] for c in factors), h0)
    return factors, b.at[0].add(start if instants.reset is None else jnp.where(instants.reset[0], 0, start))
