"""Lyapunov exponents of a recurrence: the rates at which small differences grow, for ever, along its trajectory."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax.analysis.frames import Carried, carry, orthonormal
from bptt_jax.checks import check_positive_int
from bptt_jax.recurrence.unroll import final_state
from bptt_jax.step import (
    Array,
    Params,
    PyTree,
    Recurrence,
    State,
    Step,
    bind,
    check_step,
    full_precision,
    ravel_state,
)

_BATCHES = 20
_UNSETTLED = 0.01  # of a standard error: changes between two passes that are no matter
_BY_CHANCE = 0.01  # share of the orthonormalisations
_DRIFT = 3.0  # standard errors by which two halves may differ


class LyapunovSpectrum(NamedTuple):
    """Lyapunov exponents, natural logarithms per step, descending; a pytree of arrays.

    Under ``jax.vmap`` every field has the sequences as its first axis; `pooled` makes one spectrum of them.

    Attributes:
      exponents: ``[num]``, nats per step; -inf for directions that a step maps to zero.
      standard_errors: ``[num]``, from the means of 20 to 39 batches of consecutive steps and the covariance of
        neighbours: honest where a batch is as long as the trajectory remembers. NaN from fewer than two steps; 0
        for -inf.
      growth: ``[T - warmup, num]``, what each step has added to the logarithm: its mean over the steps is
        `exponents`. The growth of steps between two orthonormalisations stands at the later one.
      size: D, of the state; exponents beyond `num` are unknown.
      first_nonfinite: index of the first step after the warm-up whose growth is NaN; -1 if none.
    """

    exponents: Array
    standard_errors: Array
    growth: Array
    size: Array
    first_nonfinite: Array

    @property
    def running(self) -> np.ndarray:
        """``[T - warmup, num]``: the estimate from the steps so far."""
        growth = np.asarray(self.growth, np.float64)
        return np.cumsum(growth, axis=-2) / np.arange(1, growth.shape[-2] + 1)[:, None]

    def finite_time(self, window: int) -> np.ndarray:
        """``[(T - warmup) // window, num]``: the rates within consecutive windows of so many steps."""
        window = check_positive_int("window", window)
        growth = np.asarray(self.growth, np.float64)
        count = growth.shape[-2] // window
        if count == 0:
            raise ValueError(f"window: expected at most {growth.shape[-2]} steps, got {window}")
        cut = growth[..., : count * window, :]
        return cut.reshape(*growth.shape[:-2], count, window, growth.shape[-1]).mean(axis=-2)

    @property
    def converged(self) -> np.ndarray:
        """``[num]``: whether the two halves of the steps agree within 3 standard errors of their difference.

        The errors come from each half alone: what has drifted in between is not taken for noise.
        """
        means = _batch_means(jnp.asarray(self.growth))
        half = means.shape[-2] // 2
        if half < 2:
            return np.zeros(means.shape[:-2] + means.shape[-1:], bool)
        first, second = means[..., :half, :], means[..., -half:, :]
        error = jnp.sqrt(_squared_error(first) + _squared_error(second))
        first, second = jnp.mean(first, axis=-2), jnp.mean(second, axis=-2)
        close = jnp.abs(first - second) <= _DRIFT * error + 1e-6
        return np.asarray(close | ((first == -jnp.inf) & (second == -jnp.inf)))

    @property
    def statement(self) -> str:
        """One line: the largest exponent, of a batch that of all sequences, and what to doubt."""
        if int(np.max(self.first_nonfinite)) >= 0:
            step = int(np.min(np.asarray(self.first_nonfinite)[np.asarray(self.first_nonfinite) >= 0]))
            return f"not finite from step {step} after the warm-up on"
        largest = np.argmax(self.exponents)
        error = np.ravel(self.standard_errors)[largest]
        line = f"largest exponent {np.ravel(self.exponents)[largest]:.4g} +- {error:.2g} nats per step"
        drifting = int(np.sum(~self.converged))
        if drifting:
            line += f"; not converged: the halves disagree for {drifting} of {self.converged.size} exponents"
        return line

    @property
    def kaplan_yorke_dimension(self) -> float:
        """``j + (sum of the first j exponents) / |exponent j + 1|``, with the largest j whose sum is not negative.

        Of Kaplan and Yorke 1979, the attractor's. 0 if all exponents are negative, D if their sum is not; NaN if it
        takes more exponents than were computed. Raises ValueError for a batch.
        """
        exponents = self._of_one("kaplan_yorke_dimension")
        sums = np.cumsum(exponents)
        j = int(np.sum(np.logical_and.accumulate(sums >= 0)))
        if np.isnan(exponents).any():
            return float("nan")
        if j == len(exponents):
            return float(j) if j == int(np.ravel(self.size)[0]) else float("nan")
        return 0.0 if j == 0 else j + float(sums[j - 1] / -exponents[j])

    @property
    def entropy_rate(self) -> float:
        """Sum of the positive exponents, nats per step: by Pesin's formula the Kolmogorov-Sinai entropy.

        A lower bound where exponents beyond `num` are positive too. Raises ValueError for a batch.
        """
        return float(np.sum(np.maximum(self._of_one("entropy_rate"), 0)))

    def _of_one(self, name: str) -> np.ndarray:
        exponents = np.asarray(self.exponents, np.float64)
        if exponents.ndim != 1:
            raise ValueError(f"{name}: expected one spectrum, got a batch of shape {exponents.shape}; see pooled()")
        return exponents

    def pooled(self) -> "LyapunovSpectrum":
        """One spectrum from a batch: means over the sequences, standard errors from their scatter."""
        if jnp.ndim(self.exponents) != 2 or len(self.exponents) < 2:
            raise ValueError("pooled: expected a batch of at least two spectra, as by jax.vmap")
        exponents = jnp.mean(self.exponents, axis=0)
        scatter = jnp.std(self.exponents, axis=0, ddof=1) / math.sqrt(len(self.exponents))
        return LyapunovSpectrum(
            exponents,
            jnp.where(exponents == -jnp.inf, 0, scatter),
            jnp.mean(self.growth, axis=0),
            self.size[0],
            jnp.max(self.first_nonfinite),
        )


def lyapunov_exponents(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree = None,
    *,
    length: int | None = None,
    num: int | None = None,
    warmup: int = 0,
    segments: int = 1,
) -> LyapunovSpectrum:
    """The largest exponents, by QR of the tangent map (Benettin et al. 1980; Engelken et al., arXiv:2006.02427).

    A frame of `num` orthonormal directions is carried along by Jacobian-vector products and orthonormalised again
    by Householder's QR: after 64 steps at the latest, and the sooner the faster its directions grow apart, so that
    most of the digits remain. A direction that is shrunk, relative to the largest, by the precision (5e-7 in
    float32) counts as mapped to zero, -inf, if that happens more than once and at more than 1 % of the
    orthonormalisations. Products of matrices, the step's too, are in full precision on every device. The frame
    starts at random, always the same; it needs a warm-up as much as the state does.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      num: how many exponents; D, all, by default. Cost and memory grow with it, not with D^2.
      warmup: steps at the beginning that only prepare state and frame.
      segments: into how many stretches of time the steps after the warm-up are cut, whose frames are then carried
        side by side, as one batch. Each begins with the frame in which the one before has ended, so they are
        carried again until, by the pace at which changes shrink, no exponent is off by more than a hundredth of
        its standard error: three or four times where a stretch is longer than a frame remembers, at most
        `segments` times, after which all is as in one piece. The states alone are unrolled step by step before.
        For parallel hardware and small D, where one frame at a time leaves it idle.

    Returns:
      `LyapunovSpectrum`; NaN where the trajectory is not finite. It can be jitted, vmapped over sequences, and
      differentiated with respect to `params`, `state0` and `xs`; with several segments in forward mode only.

    Raises:
      TypeError, ValueError: an argument breaks the contract; `num` exceeds D, no step is left after the warm-up, or
        there are more segments than steps after it.

    Example:
      >>> step = lambda w, h, x: w * h
      >>> w = jnp.array([0.5, 2.0])
      >>> found = bptt.lyapunov_exponents(step, w, jnp.zeros(2), length=100, warmup=20)
      >>> found.exponents
      Array([ 0.693, -0.693], dtype=float32)
    """
    recurrence = bind(step, params, state0, xs, length)
    steps, size = recurrence.length, recurrence.size
    num = size if num is None else check_positive_int("num", num)
    if num > size:
        raise ValueError(f"num: expected at most D = {size} exponents, got {num}")
    if isinstance(warmup, bool) or not isinstance(warmup, (int, np.integer)):
        raise TypeError(f"warmup: expected an integer, got {type(warmup).__name__}")
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup: expected fewer than the {steps} steps, and none below 0, got {warmup}")
    segments = check_positive_int("segments", segments)
    if segments > steps - warmup:
        raise ValueError(f"segments: expected at most the {steps - warmup} steps after the warm-up, got {segments}")
    return _exponents(recurrence, num, int(warmup), segments)


@partial(jax.jit, static_argnames=("num", "warmup", "segments"))
def _exponents(recurrence: Recurrence, num: int, warmup: int, segments: int) -> LyapunovSpectrum:
    recurrence = check_step(recurrence)
    step, params, xs, steps = recurrence.step, recurrence.params, recurrence.instants.x, recurrence.length
    start, unravel = ravel_state(recurrence.state0)
    kind = max(start.dtype, jnp.dtype(jnp.float32), key=lambda d: d.itemsize)
    _, frame = orthonormal(jax.random.normal(jax.random.key(0), (start.size, num), kind).T)
    length = -(-(steps - warmup) // segments)
    later = -(-(steps - warmup) // length) - 1
    first = steps - later * length
    # At the ends of the warm-up, of every segment and batch, so that each has its own growth and all of it.
    edges = [*range(steps, warmup - 1, -_batch_length(steps - warmup)), *range(first, steps, length)]
    forced = np.isin(np.arange(1, steps + 1), [warmup, *edges])
    head = jax.tree.map(lambda a: a[:first, None], xs)
    begun = carry(step, params, unravel, start[None], frame[None], head, forced[:first])
    parts = [begun._replace(**{k: getattr(begun, k)[warmup:] for k in ("growth", "zero", "due")})]
    if later:
        tail = jax.tree.map(lambda a: a[first:].reshape(later, length, *a.shape[1:]), xs)
        parts.append(_side_by_side(step, params, unravel, begun, tail, forced[first:].reshape(later, length)))
    growth, zero = (jnp.concatenate([_in_order(getattr(p, k)) for p in parts]) for k in ("growth", "zero"))
    # A random matrix may come that near to a singular one by chance, once; a rank that is missing is missing often.
    times = sum(jnp.sum(p.due, dtype=float) * p.growth.shape[1] for p in parts)
    by_chance = jnp.minimum(jnp.maximum(_BY_CHANCE * times, 1), times - 1)
    dead = jnp.sum(zero, axis=0, dtype=float) > by_chance
    growth = jnp.where(zero & dead[None], -jnp.inf, growth)
    exponents = jnp.mean(growth, axis=0)
    order = jnp.argsort(-exponents, stable=True)
    bad = jnp.any(~(growth < jnp.inf), axis=1)
    return LyapunovSpectrum(
        exponents[order],
        _standard_errors(growth, exponents)[order],
        growth[:, order],
        jnp.asarray(start.size, jnp.int32),
        jnp.where(jnp.any(bad), jnp.argmax(bad), -1),
    )


def _side_by_side(
    step: Step, params: Params, unravel: Callable[[Array], State], begun: Carried, xs: PyTree, forced: np.ndarray
) -> Carried:
    """The segments that follow on `begun`, `xs` and `forced` ``[segments, steps, ...]``, as in one unbroken run.

    Each needs the frame in which the one before ends. A first guess is put right from pass to pass: one more
    segment at least each time, and nearly all at once where a segment is longer than a frame remembers.
    """
    count, length = forced.shape
    eps = float(jnp.finfo(begun.frames.dtype).eps)

    def to_next(vector: Array, segment: PyTree) -> tuple[Array, Array]:
        with full_precision():  # as `carry`, so that the pieces fit
            end = ravel_state(final_state(step, params, unravel(vector), segment, length=length))[0]
        return end, end

    but_last = jax.tree.map(lambda a: a[:-1], xs)
    _, ends = jax.lax.scan(to_next, begun.vectors[0], but_last, length=count - 1)
    starts = jnp.concatenate([begun.vectors, ends])
    by_time = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), xs)

    def run(frames: Array) -> Carried:
        return carry(step, params, unravel, starts, frames, by_time, np.asarray(forced.any(axis=0)))

    def again(state: tuple[Carried, Array, Array, Array]) -> tuple[Carried, Array, Array, Array]:
        before, passes, last, _ = state
        after = run(jnp.concatenate([begun.frames, before.frames[:-1]]))
        old, new = (_in_order(found.growth) for found in (before, after))
        exponents = jnp.mean(new, axis=0)
        # Where the shortest direction has lost two fifths of the digits, its rounding is eps to the other three.
        allowed = _UNSETTLED * _standard_errors(new, exponents) + eps**0.6
        # Without signs, that no cancelling looks like rest; where growth is -inf, so is the exponent.
        moved = jnp.mean(jnp.where(new == old, 0, jnp.abs(new - old)), axis=0)
        change = jnp.max(jnp.where(exponents == -jnp.inf, 0, moved / allowed))
        # Changes that shrink by the factor change / last sum up to change / (1 - factor), which is to be below 1.
        return after, passes + 1, change, change * last > last - change

    guess = run(jnp.broadcast_to(begun.frames, (count, *begun.frames.shape[1:])))
    start = guess, jnp.ones((), jnp.int32), jnp.zeros((), guess.growth.dtype), jnp.ones((), bool)
    return jax.lax.while_loop(lambda state: state[3] & (state[1] < count), again, start)[0]


def _in_order(a: Array) -> Array:
    """``[steps, segments, num] -> [segments * steps, num]``."""
    return jnp.swapaxes(a, 0, 1).reshape(-1, a.shape[-1])


def _batch_length(steps: int) -> int:
    return max(1, steps // _BATCHES)


def _batch_means(growth: Array) -> Array:
    """``[..., T, num] -> [..., batches, num]``, of whole batches counted from the end."""
    length = _batch_length(growth.shape[-2])
    batches = growth.shape[-2] // length
    cut = growth[..., growth.shape[-2] - batches * length :, :]
    return cut.reshape(*growth.shape[:-2], batches, length, growth.shape[-1]).mean(axis=-2)


def _squared_error(means: Array) -> Array:
    """Of the mean over the batches ``[..., batches, num]``."""
    batches = means.shape[-2]
    around = means - jnp.mean(means, axis=-2, keepdims=True)
    # What a batch passes on to the next: at first order, and only where it makes the error larger.
    passed_on = jnp.maximum(jnp.sum(around[..., 1:, :] * around[..., :-1, :], axis=-2), 0)
    return (jnp.sum(jnp.square(around), axis=-2) + 2 * passed_on) / (batches * (batches - 1))


def _standard_errors(growth: Array, exponents: Array) -> Array:
    means = _batch_means(growth)
    if len(means) < 2:
        return jnp.full_like(exponents, jnp.nan)
    square = _squared_error(jnp.where((exponents == -jnp.inf)[None], 0, means))
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))
