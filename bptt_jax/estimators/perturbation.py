"""Gradients from differences of the loss alone: evolution strategies, for steps that explode or have no derivative."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, PRNGKeyArray

from bptt_jax import devices
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.checks import (
    check_bool,
    check_key,
    check_leaves,
    check_positive_finite,
    check_positive_int,
    describe_shapes,
)
from bptt_jax.leaves import along_leading
from bptt_jax.linalg.precision import at_least_single
from bptt_jax.recurrence.unroll import states_of
from bptt_jax.step import (
    Array,
    Instant,
    Loss,
    Params,
    PyTree,
    Recurrence,
    State,
    Step,
    bind,
    check_step,
    differentiable_part,
    ravel_state,
)
from bptt_jax.timeline import numbers_in_piece


def es(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    key: PRNGKeyArray,
    sigma: float | Float[Array, ""] = 0.01,
    pairs: int = 16,
    args: PyTree = None,
    length: int | None = None,
) -> Params:
    """Evolution strategies with antithetic pairs (Salimans et al. 2017, arXiv:1703.03864; Nesterov, Spokoiny 2017).

    ``mean over pairs of (L(p + sigma e) - L(p - sigma e)) / (2 sigma) e`` with normal e: an unbiased estimate of the
    gradient of the smoothed loss ``E_e L(p + sigma e)``, which is finite and tame where that of the loss itself has
    exploded, and tends to it with sigma. One e holds for the whole sequence, across resets. Nothing is differentiated:
    neither step nor loss need have a derivative.

    The variance is about ``(P + 1) / pairs`` times the squared norm of the gradient, for P numbers in the parameters,
    as long as the loss is nearly linear within sigma; where it is not, about ``P / (2 sigma^2 pairs)`` times the loss's
    own variance within sigma, however long the sequence. Differences of the loss are taken in its dtype: a sigma at
    which they drown in rounding gives noise.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      loss, args: as for `bptt_jax.adjoints`; `args` are not perturbed.
      key: of the perturbations.
      sigma: their standard deviation in the units of the parameters, the same for every number, a complex one counted
        as two; not relative to anything. It must suit the smallest of them.
      pairs: how many are averaged over, at once.

    Returns:
      A pytree like `params`; None at parameters that are not floating. Cost: ``2 pairs`` forward passes; memory
      O(pairs (T D + P)).

    Raises:
      TypeError, ValueError: an argument breaks the contract.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> problem = step, 0.5, jnp.zeros(1), jnp.ones((4, 1)), lambda states: states[-1, 0]
      >>> estimate = bptt.estimators.es(*problem, key=jax.random.key(0), pairs=10_000)
      >>> abs(float(estimate) - 2.75) < 0.1
      True
    """
    recurrence, bound = bind(step, params, state0, xs, length), bind_loss(loss, args)
    pairs = check_positive_int("pairs", pairs)
    return _es(recurrence, bound, check_key("key", key), check_positive_finite("sigma", sigma), pairs=pairs)


class PESCarry(NamedTuple):
    """What `pes` carries from batch to batch.

    Attributes:
      state: of the unperturbed trajectory, the last one.
      perturbed: those of the others, leaves ``[pairs, 2, ...]``.
      accumulated: ``[pairs, P]``, the sum of the perturbations since the piece's beginning, in units of sigma.
      pending: whether a reset stands in the padding behind them, which takes place before the next real step; None if
        there can be none.
    """

    state: State
    perturbed: State
    accumulated: Float[Array, "pairs P"]
    pending: Bool[Array, ""] | None = None


def pes(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    key: PRNGKeyArray,
    window: int,
    sigma: float | Float[Array, ""] = 0.01,
    pairs: int = 16,
    args: PyTree = None,
    length: int | None = None,
    carry: PESCarry | None = None,
    has_carry: bool = False,
) -> Any:
    """Persistent evolution strategies (Vicol, Metz, Sohl-Dickstein 2021, arXiv:2112.13835, algorithm 2).

    Every window of the sequence has perturbations of its own, and the two trajectories of each antithetic pair go on
    from window to window. What a window adds to the loss is credited to all perturbations so far, those of this window
    and of those before, since it depends on them all: ``sum over windows w of term_w (e_1 + .. + e_w) / sigma``. So
    nothing is truncated, and an estimate can be had after each window of a long unroll (`carry`), where `es` would
    wait for its end.

    The loss here is one of all states, not a sum over windows: term w is ``L(perturbed up to the end of window w,
    unperturbed after) - L(perturbed up to the end of window w - 1, unperturbed after)``. These add up to the change
    of the loss, and depend on the perturbations up to w alone; so the estimate is unbiased, for any loss, for the
    gradient of the loss smoothed over independent perturbations of the windows. Of a loss that is a sum over steps
    they are the windows' losses. With a window of at least T it is `es` with the same key.

    Windows count real steps. After a reset counting begins anew and nothing is credited to what was before; a term is
    then a difference of losses where all other pieces are unperturbed: the sum of what the pieces give alone.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      loss, args: as for `bptt_jax.adjoints`; `args` are not perturbed.
      key: of the perturbations; a new one for each batch.
      window: steps between two draws, K.
      sigma, pairs: as for `es`.
      carry: what the part of a stream before returned: all trajectories go on where they were, and a new window begins.
        Its state stands in place of `state0`, to which resets still lead where the sequence does not say another
        state, and its number of pairs in place of `pairs`. Perturbations accumulated so far are those of earlier
        parameters, if these have changed since.
      has_carry: whether to return ``(params_grad, carry)``.

    Returns:
      A pytree like `params`, None at parameters that are not floating; with ``has_carry=True`` that and a `PESCarry`.
      Cost: ``2 pairs + 1`` forward passes and ``2 pairs T / K`` evaluations of the loss, one window after the other;
      memory O(pairs (T D + P)). The variance of a term grows with the number of windows before it, so that of the
      estimate with the length of a piece; it is least where windows are about as long as the memory.

    Raises:
      TypeError, ValueError: an argument breaks the contract, or `carry` is not that of such a recurrence.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> problem = step, 0.5, jnp.zeros(1), jnp.ones((4, 1)), lambda states: states[-1, 0]
      >>> estimate = bptt.estimators.pes(*problem, key=jax.random.key(0), window=2, pairs=10_000)
      >>> abs(float(estimate) - 2.75) < 0.1
      True
    """
    recurrence, bound = bind(step, params, state0, xs, length), bind_loss(loss, args)
    window, pairs = check_positive_int("window", window), check_positive_int("pairs", pairs)
    check_bool("has_carry", has_carry)
    if carry is not None:
        pairs = _check_carry(carry, recurrence)
    key, sigma = check_key("key", key), check_positive_finite("sigma", sigma)
    estimate, after = _pes(recurrence, bound, key, sigma, carry, window=window, pairs=pairs)
    return (estimate, after) if has_carry else estimate


class _Point:
    """The floating parameters as one vector, in at least single precision, from which perturbations lead away."""

    def __init__(self, params: Params) -> None:
        moving, self._merge = differentiable_part(params)
        self._theta, self._unravel = ravel_state(moving)
        self.dtype = at_least_single(self._theta.dtype)
        self.size = self._theta.size

    def draw(self, key: Array, window: Array | int) -> Array:
        return jax.random.normal(jax.random.fold_in(key, window), (self.size,), self.dtype)

    def moved(self, direction: Array) -> Params:
        moved = self._theta.astype(self.dtype) + direction
        return self._merge(self._unravel(moved.astype(self._theta.dtype)))

    def gradient(self, estimates: Array, given: Params) -> Params:
        """The mean of estimates ``[pairs, P]``; of a complex x + iy it is dL/dx - i dL/dy, as in `jax.grad`."""
        mean = self._unravel(jnp.mean(estimates, axis=0).astype(self._theta.dtype))
        return devices.summed_like(jax.tree.map(jnp.conj, mean), differentiable_part(given)[0])


@partial(devices.compiled, checked=True)
def _es(recurrence: Recurrence, loss: BoundLoss, key: Array, sigma: Array, *, pairs: int) -> Params:
    given, recurrence = recurrence.params, check_step(recurrence)
    point = _Point(recurrence.params)
    sigma = jnp.asarray(sigma, point.dtype)

    def estimate(key: Array) -> Array:
        noise = point.draw(key, 1)

        def value(direction: Array) -> Array:
            moved = replace(recurrence, params=point.moved(direction))
            return loss(states_of(moved))[0].astype(point.dtype)

        above, below = jax.vmap(value)(_both(sigma * noise))
        return (above - below) / (2 * sigma) * noise

    return point.gradient(jax.vmap(estimate)(jax.random.split(key, pairs)), given)


@partial(devices.compiled, checked=True)
def _pes(
    recurrence: Recurrence,
    loss: BoundLoss,
    key: PRNGKeyArray,
    sigma: Array,
    carry: PESCarry | None,
    *,
    window: int,
    pairs: int,
) -> tuple[Params, PESCarry]:
    if carry is not None:
        recurrence = recurrence.going_on(carry.state, carry.pending)
    given, pending, recurrence = recurrence.params, recurrence.ends_anew, check_step(recurrence)
    point, axes = _Point(recurrence.params), devices.axes_of(recurrence.state0)
    sigma = jnp.asarray(sigma, point.dtype)
    real, resets = recurrence.real, recurrence.resets
    begins = real & ((numbers_in_piece(real, resets) - 1) % window == 0)
    windows, pieces = jnp.cumsum(begins), jnp.cumsum(resets)  # in padding those of the real step before
    plain = states_of(recurrence)
    # Padding in front shows states of the part before, and belongs to its last window: the one numbered 0.
    earliest = 1 if carry is None else windows[0]
    if carry is None:
        states = jax.tree.map(lambda a: jnp.broadcast_to(a, (pairs, 2, *a.shape)), recurrence.state0)
        carry = PESCarry(recurrence.state0, states, jnp.zeros((pairs, point.size), point.dtype))
    carry, key = devices.vary((carry, key), axes)

    def estimate(key: Array, starts: State, before: Array) -> tuple[Array, State, Array]:
        def perturbed(start: State, sign: Array) -> tuple[State, State]:
            def body(
                moving: tuple[State, Array], at_t: tuple[Instant, Array, Array]
            ) -> tuple[tuple[State, Array], State]:
                (h, noise), (at, begins_t, window_t) = moving, at_t
                noise = devices.cond(begins_t, lambda: point.draw(key, window_t), lambda: noise)
                h = replace(recurrence, params=point.moved(sign * sigma * noise)).advance(h, at)
                return (h, noise), h

            (end, _), states = devices.scan(
                body, (start, jnp.zeros(point.size, point.dtype)), (recurrence.instants, begins, windows)
            )
            return end, states

        signs = _both(jnp.ones((), point.dtype))
        ends, trajectories = jax.vmap(perturbed)(starts, signs)

        def add(w: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            total, accumulated, difference = so_far
            first = jnp.argmax(windows == w)
            anew = resets[first]
            known = (pieces == pieces[first]) & (windows <= w)

            def value(states: State) -> Array:
                mixed = jax.tree.map(lambda a, b: _where(known, a, b), states, plain)
                return loss(mixed)[0].astype(point.dtype)

            above, below = jax.vmap(value)(trajectories)
            accumulated = jnp.where(anew, 0, accumulated) + jnp.where(w == 0, 0, point.draw(key, w))
            # The unperturbed loss, from which both sides start, is the same for both.
            term = (above - below) / 2 - jnp.where(anew, 0, difference)
            return total + term / sigma * accumulated, accumulated, (above - below) / 2

        nothing = jnp.zeros(point.size, point.dtype), before, jnp.zeros((), point.dtype)
        total, accumulated, _ = devices.fori_loop(earliest, windows[-1] + 1, add, nothing)
        return total, ends, accumulated

    estimates, ends, accumulated = jax.vmap(estimate)(
        jax.random.split(key, pairs), carry.perturbed, carry.accumulated
    )
    return point.gradient(estimates, given), PESCarry(
        jax.tree.map(lambda a: a[-1], plain), ends, accumulated, pending
    )


def _both(a: Array) -> Array:
    return jnp.stack([a, -a])


def _where(steps: Array, a: Array, b: Array) -> Array:
    return jnp.where(along_leading(steps, a), a, b)


def _check_carry(carry: Any, recurrence: Recurrence) -> int:
    """The number of its pairs.

    Raises:
      TypeError, ValueError: it is not what `pes` gave for such a recurrence.
    """
    if not isinstance(carry, PESCarry):
        raise TypeError(f"carry: expected a PESCarry, as pes gives with has_carry=True, got {type(carry).__name__}")
    check_leaves("carry", carry)
    size = ravel_state(differentiable_part(recurrence.params)[0])[0].size
    pairs = jnp.shape(carry.accumulated)[0] if jnp.ndim(carry.accumulated) else 0

    def many(*lead: int) -> PyTree:
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((*lead, *jnp.shape(a)), jnp.result_type(a)), recurrence.state0
        )

    pending = None if carry.pending is None else jax.ShapeDtypeStruct((), bool)
    expected = describe_shapes((many(), many(pairs, 2), pending))
    got = describe_shapes((carry.state, carry.perturbed, carry.pending))
    if jnp.shape(carry.accumulated) != (pairs, size) or not pairs or got != expected:
        raise ValueError(
            f"carry: expected state, perturbed and pending {expected} and accumulated [pairs, {size}], got {got} and "
            f"{list(jnp.shape(carry.accumulated))}"
        )
    return pairs
