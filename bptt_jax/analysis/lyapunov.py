"""Lyapunov exponents of a recurrence: the rates at which small differences grow, for ever, along its trajectory."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax.analysis.host_lapack import host_qr
from bptt_jax.analysis.products import matmul
from bptt_jax.step import (
    Array,
    Params,
    PyTree,
    State,
    Step,
    check_arguments,
    check_positive_int,
    check_step,
    ravel_state,
)

_BATCHES = 20
_LONGEST = 64  # steps between two orthonormalisations, at most
_FORGETS = 0.03  # of a faster pace, at every orthonormalisation after the first few
_BY_CHANCE = 0.01  # share of the orthonormalisations
_LARGE = 8192  # numbers from which on LAPACK may divide a matrix among threads, which block each other
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
        """j + (sum of the first j exponents) / |exponent j + 1|, with the largest j whose sum is not negative.

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
) -> LyapunovSpectrum:
    """The largest exponents, by QR of the tangent map (Benettin et al. 1980; Engelken et al., arXiv:2006.02427).

    A frame of `num` orthonormal directions is carried along by Jacobian-vector products and orthonormalised again
    by Householder's QR: after 64 steps at the latest, and the sooner the faster its directions grow apart, so that
    most of the digits remain. A direction that is shrunk, relative to the largest, by the precision (5e-7 in
    float32) counts as mapped to zero, -inf, if that happens more than once and at more than 1 % of the
    orthonormalisations. The frame starts at random, always the same; it needs a warm-up as much as the state does.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      num: how many exponents; D, all, by default. Cost and memory grow with it, not with D^2.
      warmup: steps at the beginning that only prepare state and frame.

    Returns:
      `LyapunovSpectrum`; NaN where the trajectory is not finite. It can be jitted, vmapped over sequences, and
      differentiated with respect to `params`, `state0` and `xs`.

    Raises:
      TypeError, ValueError: an argument breaks the contract; `num` exceeds D, or no step is left after the warm-up.
    """
    steps = check_arguments(step, params, state0, xs, length)
    size = sum(np.size(leaf) * (2 if jnp.iscomplexobj(leaf) else 1) for leaf in jax.tree.leaves(state0))
    num = size if num is None else check_positive_int("num", num)
    if num > size:
        raise ValueError(f"num: expected at most D = {size} exponents, got {num}")
    if isinstance(warmup, bool) or not isinstance(warmup, (int, np.integer)):
        raise TypeError(f"warmup: expected an integer, got {type(warmup).__name__}")
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup: expected fewer than the {steps} steps, and none below 0, got {warmup}")
    return _exponents(step, params, state0, xs, steps, num, int(warmup))


@partial(jax.jit, static_argnames=("step", "steps", "num", "warmup"))
def _exponents(
    step: Step, params: Params, state0: State, xs: PyTree, steps: int, num: int, warmup: int
) -> LyapunovSpectrum:
    state0 = check_step(step, params, state0, xs)
    start, unravel = ravel_state(state0)
    frame = _qr(
        jax.random.normal(
            jax.random.key(0), (start.size, num), max(start.dtype, jnp.dtype(jnp.float32), key=lambda d: d.itemsize)
        )
    )[0]
    # Two fifths of the digits: how far directions grow apart varies, and the others must see them through. The pace
    # is the share that a step takes. Of the range, which they use up together, a quarter each way.
    limit = -0.4 * math.log(jnp.finfo(frame.dtype).eps)
    huge = float(jnp.finfo(start.dtype).max) ** 0.25
    # At the ends of the warm-up and of every batch, so that each has its own growth and all of it.
    edges = range(steps, warmup - 1, -_batch_length(steps - warmup))
    forced = np.isin(np.arange(1, steps + 1), [warmup, *edges])

    def body(carry: Any, inputs: Any) -> tuple[Any, tuple[Array, Array, Array]]:
        vector, frame, since, pace, done = carry
        x, now = inputs
        vector, push = jax.linearize(lambda v: ravel_state(step(params, unravel(v), x))[0], vector)
        frame = jax.vmap(push, in_axes=1, out_axes=1)(frame.astype(vector.dtype)).astype(frame.dtype)
        since = since + 1
        largest = jnp.max(jnp.abs(frame))
        within = (largest > 1 / huge) & (largest < huge)
        due = now | ~within | (since >= _LONGEST) | (pace * (since + 1).astype(pace.dtype) > 1)

        def orthonormalise(frame: Array) -> tuple[Array, Array, Array, Array, Array, Array]:
            frame, growth, zero = _orthonormalised(frame)
            apart = jax.lax.stop_gradient(jnp.max(growth) - jnp.min(growth))
            spent = apart / (limit * since.astype(pace.dtype))
            keeps = 1 - jnp.maximum(_FORGETS, 1 / (done + 2).astype(pace.dtype))
            faster = jnp.where(jnp.isfinite(spent), jnp.maximum(spent, keeps * pace), 1)  # NaN: at every step
            return frame, growth, zero, jnp.zeros_like(since), faster, done + 1

        def leave(frame: Array) -> tuple[Array, Array, Array, Array, Array, Array]:
            return frame, jnp.zeros(num, frame.dtype), jnp.zeros(num, bool), since, pace, done

        frame, growth, zero, since, pace, done = jax.lax.cond(due, orthonormalise, leave, frame)
        return (vector, frame, since, pace, done), (growth, zero, due)

    counters = jnp.zeros((), jnp.int32), jnp.ones((), frame.dtype), jnp.zeros((), jnp.int32)
    _, measured = jax.lax.scan(
        body, (start, frame, *counters), (jax.tree.map(jnp.asarray, xs), jnp.asarray(forced)), length=steps
    )
    growth, zero, due = (a[warmup:] for a in measured)
    # A random matrix may come that near to a singular one by chance, once; a rank that is missing is missing often.
    times = jnp.sum(due, dtype=float)
    by_chance = jnp.minimum(jnp.maximum(_BY_CHANCE * times, 1), times - 1)
    dead = jnp.sum(zero, axis=0, dtype=float) > by_chance
    growth = jnp.where(zero & dead[None], -jnp.inf, growth)
    exponents = jnp.mean(growth, axis=0)
    order = jnp.argsort(-exponents, stable=True)
    bad = jnp.any(jnp.isnan(growth) | (growth == jnp.inf), axis=1)
    return LyapunovSpectrum(
        exponents[order],
        _standard_errors(growth, exponents)[order],
        growth[:, order],
        jnp.asarray(start.size, jnp.int32),
        jnp.where(jnp.any(bad), jnp.argmax(bad), -1),
    )


def _orthonormalised(frame: Array) -> tuple[Array, Array, Array]:
    """An orthonormal frame of the same flag of subspaces; the log of each direction's length before, and whether
    that is no more than what rounding leaves of zero.
    """
    finite = jnp.all(jnp.isfinite(frame))
    q, r = _qr(jnp.where(finite, frame, 0))  # a bad frame never reaches LAPACK
    lengths = jnp.abs(jnp.diagonal(r))
    growth = jnp.where(lengths == 0, -jnp.inf, jnp.log(jnp.where(lengths == 0, 1, lengths)))
    zero = lengths <= 4 * float(jnp.finfo(r.dtype).eps) * jnp.max(lengths)
    return q, jnp.where(finite, growth, jnp.nan), zero & finite


def _qr(matrix: Array) -> tuple[Array, Array]:
    if matrix.size >= _LARGE:
        return _large_qr(matrix)
    q, r = jnp.linalg.qr(matrix)
    return q, r


@jax.custom_jvp
def _large_qr(matrix: Array) -> tuple[Array, Array]:
    return jax.lax.platform_dependent(matrix, cpu=host_qr, default=lambda a: tuple(jnp.linalg.qr(a)))


@_large_qr.defjvp
def _large_qr_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    # From dA = dQ R + Q dR with an antisymmetric Q^T dQ and an upper triangular dR.
    q, r = _large_qr(*primals)
    change = jax.lax.linalg.triangular_solve(r, tangents[0])  # dA R^-1
    inside = matmul(q.T, change)
    lower = jnp.tril(inside, -1)
    turn = lower - lower.T
    return (q, r), (change - matmul(q, inside - turn), matmul(inside - turn, r))


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
