"""Unrolling a step through time with `jax.lax.scan`, plain or rematerialised."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax import devices
from bptt_jax.checks import check_positive_int
from bptt_jax.recurrence.preparation import preparation
from bptt_jax.step import (
    Instant,
    Params,
    PyTree,
    Recurrence,
    State,
    Step,
    bind,
    check_step,
    differentiable_part,
)


def unroll(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree = None,
    *,
    length: int | None = None,
    unroll: int | None = None,
    remat: bool | int = False,
) -> State:
    """All states of the recurrence ``h_k = step(params, h_{k-1}, x_k)``.

    What the step makes of its parameters alone (a matrix exponential, normalised weights) is made once for the
    sequence, and so is its derivative.

    Args:
      step: pure function ``(params, state, x) -> state``.
      params: pytree of arrays.
      state0: h_0, pytree of arrays, of which the floating ones are differentiated.
      xs: inputs, leaves ``[T, ...]``; None for an autonomous step, which then receives None. Or a
        `bptt_jax.Sequence`, with padding and resets.
      length: T, needed where `xs` is None.
      unroll: steps per iteration of the compiled loop (`jax.lax.scan`'s argument). None: 1, and 4 where JAX's
        default device is a GPU, on which a round costs about as much as a small step does.
      remat: rematerialise in the backward pass (Chen et al. 2016, arXiv:1604.06174): only the state at the
        start of each segment is kept, the rest is computed again. True takes segments of ceil(sqrt(T)) steps,
        an integer that many. Values and gradients are the same; the memory for the backward pass falls from
        O(T) to O(sqrt(T)) beyond the returned states, for one more forward pass.

    Returns:
      h_1 .. h_T, a pytree like `state0` with leaves ``[T, ...]``: ``states[k]`` is h_{k+1}, in padding the state
      that is held.

    Raises:
      TypeError, ValueError: an argument breaks the contract (see `bptt_jax.step`), before any compilation.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> bptt.unroll(step, 0.5, jnp.zeros(1), jnp.ones((3, 1)))
      Array([[1.  ],
             [1.5 ],
             [1.75]], dtype=float32)
    """
    recurrence = bind(step, params, state0, xs, length)
    segment = segment_length(remat, recurrence.length)
    return _states(recurrence, unroll=steps_of_a_round(unroll), segment=segment)


def final_state(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree = None,
    *,
    length: int | None = None,
    unroll: int | None = None,
    remat: bool | int = False,
) -> State:
    """Only h_T: arguments, errors and semantics of `unroll`, without the O(T) memory of its result.

    With ``remat=True`` the gradient of a function of h_T needs O(sqrt(T)) memory beyond the inputs (and a copy of
    these, unless the segments divide T).

    Example:
      >>> bptt.final_state(lambda w, h, x: w * h, 0.5, jnp.ones(1), length=3)  # x is None
      Array([0.125], dtype=float32)
    """
    recurrence = bind(step, params, state0, xs, length)
    segment = segment_length(remat, recurrence.length)
    return _last(recurrence, unroll=steps_of_a_round(unroll), segment=segment)


def steps_of_a_round(unroll: int | None = None) -> int:
    """As `unroll` takes its argument."""
    if unroll is not None:
        return check_positive_int("unroll", unroll)
    return 4 if jax.default_backend() == "gpu" else 1


def states_of(recurrence: Recurrence) -> State:
    """h_1 .. h_T of a checked recurrence, to be traced."""
    return _scan(recurrence, steps_of_a_round(), None, emit=lambda h: h)[1]


def segment_length(remat: bool | int, steps: int) -> int | None:
    """Steps between two states that are kept; None if all are."""
    if isinstance(remat, bool):
        return math.isqrt(steps - 1) + 1 if remat else None
    return min(check_positive_int("remat", remat), steps)


@partial(devices.compiled, checked=True)
def _states(recurrence: Recurrence, *, unroll: int, segment: int | None) -> State:
    return _scan(check_step(recurrence), unroll, segment, emit=lambda h: h)[1]


@partial(devices.compiled, checked=True)
def _last(recurrence: Recurrence, *, unroll: int, segment: int | None) -> State:
    return _scan(check_step(recurrence), unroll, segment, emit=lambda h: None)[0]


def _scan(
    recurrence: Recurrence, unroll: int, segment: int | None, emit: Callable[[State], PyTree]
) -> tuple[State, PyTree]:
    def run(h: State, instants: Instant, length: int) -> tuple[State, PyTree]:
        def body(h_tm1: State, at: Instant) -> tuple[State, PyTree]:
            h = recurrence.advance(h_tm1, at)
            return h, emit(h)

        return devices.scan(body, h, instants, length=length, unroll=unroll)

    config: Any = jax.config
    if not config.jax_disable_jit:  # then the step itself is called with numbers, for who looks into it
        parts = preparation(recurrence)
        recurrence = parts.finish(*parts.make(differentiable_part(recurrence.params)[0]))
    state0, instants, steps = recurrence.state0, recurrence.instants, recurrence.length
    if segment is None:
        return run(state0, instants, steps)
    count, rest = divmod(steps, segment)
    # Inside a scan the compiler cannot merge the recomputation with the first run, so no barrier is needed.
    run_again = partial(jax.checkpoint, prevent_cse=False)(run, static_argnums=2)
    whole = jax.tree.map(lambda a: a[: count * segment].reshape(count, segment, *a.shape[1:]), instants)
    h, states = devices.scan(lambda h, part: run_again(h, part, segment), state0, whole, length=count)
    states = jax.tree.map(lambda a: a.reshape(count * segment, *a.shape[2:]), states)
    if rest == 0:
        return h, states
    h, tail = jax.checkpoint(run, static_argnums=2)(h, jax.tree.map(lambda a: a[-rest:], instants), rest)
    return h, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), states, tail)
