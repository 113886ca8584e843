"""Lyapunov exponents of a recurrence: the rates at which small differences grow, for ever, along its trajectory."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from bptt_jax import devices
from bptt_jax.analysis.averages import (
    MOST_BATCHES,
    AnyArray,
    Batches,
    BatchSums,
    batches,
    count_within,
    least_error,
    measured_pieces,
    own_library,
    pieces,
    root,
    squared_error,
    sum_batches,
)
from bptt_jax.analysis.frames import (
    Frames,
    FrameTrajectory,
    begin_frames,
    check_frame,
    orthonormal_frame,
    propagate_frames,
    random_frame,
)
from bptt_jax.checks import check_positive, check_positive_int
from bptt_jax.linalg.precision import at_least_single
from bptt_jax.results import Result, counted, field
from bptt_jax.step import (
    Array,
    Instant,
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

_FEW = 4  # exponents up to which orthonormalising after every step costs little
_UNSETTLED = 0.01  # of a standard error: changes between two passes that are no matter
_BY_CHANCE = 0.01  # share of the orthonormalisations
_DRIFT = 3.0  # standard errors by which two halves may differ
_SAME = 1e-6  # nats per step by which they may differ at any error
_NEUTRAL = 2.0  # standard errors within which an exponent may be zero


class LyapunovSpectrum(Result):
    """Lyapunov exponents, natural logarithms per step, descending.

    Under `jax.vmap` every field has the sequences as its first axis; `pooled` makes one spectrum of them.

    Attributes:
      exponents: ``[num]``, nats per step, the mean of `growth` over the measured steps; -inf for directions that a
        step maps to zero; NaN where the trajectory is not finite, or no step is left after the warm-up.
      standard_errors: ``[num]``, from the means of 20 to 39 batches of consecutive steps, none of which reaches
        over a reset, and the covariance of neighbours: honest where a batch is as long as the trajectory remembers.
        8 roundings at least (1e-6 nats per step in single precision, 2e-15 in double), divided by `dt` as the rates
        are: the growth of a step is not known better. NaN from fewer than two steps; 0 for -inf.
      growth: ``[T, num]``, what each step has added to the logarithm; 0 where nothing is measured. The growth of
        steps between two orthonormalisations stands at the later one.
      orthonormalised: ``[T]``, whether that was done after the step, so that the sum of `growth` up to it is exact.
      piece: ``[T]``, of each measured step the number of resets up to it; -1 in warm-ups and in padding.
      batches: the growth in each of the batches that the standard errors come from; of a pooled spectrum in each
        sequence.
      size: D, of the state; exponents beyond `num` are unknown.
      first_nonfinite: the first step k (which makes h_{k+1}) whose state or Jacobian is not finite; -1 if none.
      dt: how long a step takes in the unit of all rates here; 1 where no ``dt=`` was given.
      unit: its name: "step", or "unit of time" where ``dt=`` was given.
    """

    exponents: Float[Array, " num"] = field(dims=("exponent",))
    standard_errors: Float[Array, " num"] = field(dims=("exponent",))
    growth: Float[Array, "T num"] = field(dims=("time", "exponent"))
    orthonormalised: Bool[Array, " T"] = field(dims=("time",))
    piece: Int[Array, " T"] = field(dims=("time",))
    batches: BatchSums
    size: Int[Array, ""] = field(dims=())
    first_nonfinite: Int[Array, ""] = field(dims=())
    dt: Float[Array, ""] = field(dims=())
    unit: str = field(static=True, default="step")

    _views: ClassVar = {
        **dict.fromkeys(("converged", "living_exponents"), ("exponent",)),
        **dict.fromkeys(("kaplan_yorke_dimension", "kaplan_yorke_error", "entropy_rate", "entropy_rate_error"), ()),
    }

    @property
    def running(self) -> np.ndarray:
        """``[T, num]``: the estimate from the steps up to the last orthonormalisation; NaN before the first."""
        growth = np.asarray(self.growth, np.float64)
        measured = np.asarray(self.piece) >= 0
        known = np.asarray(self.orthonormalised) & measured
        latest = np.maximum.accumulate(np.where(known, np.cumsum(measured, axis=-1), 0), axis=-1)
        with np.errstate(invalid="ignore"):
            return np.cumsum(growth, axis=-2) / np.where(latest == 0, np.nan, latest)[..., None]

    def finite_time(self, window: int) -> np.ndarray:
        """``[windows, num]``: the rates within consecutive windows of so many measured steps.

        They start with each piece; what is left at its end belongs to none. Of a batch ``[..., windows, num]``,
        NaN where a sequence has fewer of them.

        Raises:
          ValueError: no piece is that long, or the growth at the windows' edges is not known exactly, since no
            orthonormalisation took place there: ask for it by ``lyapunov_exponents(..., window=)``.
        """
        return finite_time_rates(self.growth, self.piece, self.orthonormalised, window)

    @property
    def converged(self) -> np.ndarray:
        """``[num]``: whether the two halves of the steps agree within 3 standard errors of their difference.

        The errors come from each half alone: what has drifted in between is not taken for noise.

        It cannot see what has not happened yet. An orbit that sticks for longer than the run, near an island of a map
        without friction or in the quiet phase of intermittency, looks stationary, with a small error and the wrong
        value. Where such stays have no typical length, the errors are too small at any length of the run. Several
        starts tell: rates that differ by far more than their errors, which `pooled` takes from the scatter.
        """
        return self._of_each(_converged)

    @property
    def kaplan_yorke_dimension(self) -> Any:
        """``j + (sum of the first j exponents) / |exponent j + 1|``, with the largest j whose sum is not negative.

        Of Kaplan and Yorke 1979, the attractor's. For j an exponent within two standard errors of zero counts as
        zero. 0 if all exponents are negative, D if their sum is not; NaN if it takes more exponents than were
        computed. A number; of a batch ``[...]``.
        """
        return self._of_each(lambda one: _dimension(one)[0])

    @property
    def kaplan_yorke_error(self) -> Any:
        """Standard error of `kaplan_yorke_dimension`, to first order; j is taken for known.

        Not of the exponents' own errors, which go up and down together: in each batch the growth of all is summed, in
        the proportions of the dimension's slopes, and the error is the scatter of these sums.
        """
        return self._of_each(lambda one: _error_along(one, _dimension(one)[1], self.exponents.dtype))

    @property
    def entropy_rate(self) -> Any:
        """Sum of the positive exponents, nats per step: by Pesin's formula the Kolmogorov-Sinai entropy.

        A lower bound where exponents beyond `num` are positive too. A number; of a batch ``[...]``.
        """
        return self._of_each(lambda one: np.sum(np.maximum(one.exponents, 0)))

    @property
    def entropy_rate_error(self) -> Any:
        """Standard error of `entropy_rate`, with that of exponents within two standard errors of zero.

        From the scatter over the batches of the growth of all these directions together.
        """
        return self._of_each(lambda one: _error_along(one, _positive(one), self.exponents.dtype))

    @property
    def living_exponents(self) -> Float[Array, " num"]:
        """``[num]``: the rates while directions live: means over the stretches between two orthonormalisations in
        which none is mapped to zero, as if the steps that do so were resets. -inf if there is no such stretch.
        """
        return living_rates(self)[0]

    @property
    def statement(self) -> str:
        """One line: the largest exponent, of a batch that of `pooled`, and what to doubt.

        Of a batch of several axes a line for each of the leading ones.
        """
        lead = np.shape(self.exponents)[:-1]
        if len(lead) > 1:
            parts = [(i, jax.tree.map(lambda a, i=i: a[i], self)) for i in np.ndindex(*lead[:-1])]
            return "\n".join(f"[{', '.join(map(str, i))}]: {part.statement}" for i, part in parts)
        bad = np.ravel(np.asarray(self.first_nonfinite))
        if np.any(bad >= 0):
            some = f" in {np.sum(bad >= 0)} of {counted(len(bad), 'sequence')}" if lead else ""
            return f"not finite from step {np.min(bad[bad >= 0])} on{some}"
        if np.all(np.asarray(self.piece) < 0):
            return "no step is left after the warm-up"
        if lead:
            return as_one(self).statement
        largest = float(self.exponents[0])
        line = f"largest exponent {largest:.4g} +- {float(self.standard_errors[0]):.2g} nats per {self.unit}"
        erased = np.flatnonzero(np.any(np.asarray(self.growth) == -np.inf, axis=-1))
        if len(erased):
            dead = int(np.sum(np.asarray(self.exponents) == -np.inf))
            line += f"; {dead} of {len(self.exponents)} are -inf"
            if len(erased) < np.sum(np.asarray(self.piece) >= 0) // 2:  # no property of the step, then
                more = f" and {len(erased) - 1} more" if len(erased) > 1 else ""
                line += f", erased by step {erased[0]}{more}: resets are to be declared"
        drifting = int(np.sum(~self.converged))
        if drifting:
            line += (
                f"; not converged: the halves disagree for {drifting} of {counted(self.converged.size, 'exponent')}"
            )
        return line

    def pooled(self) -> "LyapunovSpectrum":
        """One spectrum from a batch, of several axes along the last one: means over all steps, standard errors from
        the scatter of the sequences.

        Raises:
          ValueError: this is no batch, or one of a single sequence.
        """
        if jnp.ndim(self.exponents) < 2 or jnp.shape(self.exponents)[-2] < 2:
            raise ValueError("pooled: expected a batch of at least two spectra, as by jax.vmap")
        pool = _pooled
        for _ in range(jnp.ndim(self.exponents) - 2):
            pool = jax.vmap(pool)
        return pool(self)

    def _of_each(self, function: Callable[["LyapunovSpectrum"], Any]) -> Any:
        """Of one spectrum, or of each of a batch, its numbers of NumPy in double precision."""
        here = jax.tree.map(lambda a: np.asarray(a, np.float64 if a.dtype.kind == "f" else a.dtype), self)
        lead = np.shape(self.exponents)[:-1]
        found = [function(jax.tree.map(lambda a, i=i: a[i], here)) for i in np.ndindex(*lead)]
        return np.asarray(found).reshape((*lead, *np.shape(found[0])))[()]

    def _headline(self) -> str:
        return self.statement

    def _figure(self) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.0, 2.2), layout="constrained")
        draw_exponents(figure.subplots(), self)
        return figure


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
    window: int | None = None,
    initial_frame: Float[Array, "D num"] | None = None,
    dt: float | Float[Array, ""] | None = None,
) -> LyapunovSpectrum:
    """The largest exponents, by QR of the tangent map (Benettin et al. 1980; Engelken et al., arXiv:2006.02427).

    A frame of `num` orthonormal directions is carried along by Jacobian-vector products and orthonormalised again
    by Householder's QR: of up to four directions after every step; of more after 64 steps at the latest, and the
    sooner the faster they grow apart, so that most of the digits remain. Products of matrices, the step's too, are
    in full precision on every device. The frame starts at random, always the same; it needs a warm-up as much as
    the state does.

    A direction that a measured step maps exactly to zero has the exponent -inf. One that is shrunk, relative to the
    largest, by the precision (5e-7 in float32) counts as mapped to zero if that happens more than once and at more
    than 1 % of the orthonormalisations: once it may be chance. What is lost is drawn anew, so that what a step
    erases during the warm-up does not matter afterwards.

    Of a `bptt_jax.Sequence` it gives what it gives of the pieces between resets run alone, together: each begins
    with the frame drawn anew and has a warm-up of its own, pieces that are not longer do not count, and means are
    over all measured steps. Padding counts for nothing. Where the step itself erases the state at a declared reset,
    that one step is not measured.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`. A step that has no forward mode (`jax.custom_vjp`)
        is pushed by the transpose of its backward pass: what backpropagation multiplies.
      num: how many exponents; D, all, by default. Cost and memory grow with it, not with D^2.
      warmup: real steps at the beginning, and after every reset, that only prepare state and frame.
      segments: into how many stretches of time the steps after the warm-up are cut, whose frames are then carried
        side by side, as one batch. Each begins with the frame in which the one before has ended, so they are
        carried again until, by the pace at which changes shrink, no exponent is off by more than a hundredth of
        its standard error, and what frames are rounded by (7e-5 nats per step in single precision, 4e-10 in double):
        three or four times where a stretch is longer than a frame remembers, at most `segments` times, after which
        all is as in one piece. The states alone are unrolled step by step before; in chaos other roundings lead to
        another orbit, after some 16 divided by the largest exponent steps in single precision and 36 in double, and
        then exponents differ as those of two orbits do, by parts of their standard errors. For parallel hardware
        and small D, where one frame at a time leaves it idle.
      window: orthonormalise after every `window` measured steps too, so that `LyapunovSpectrum.finite_time` knows
        windows of so many steps, and of multiples. Not needed for up to four exponents.
      initial_frame: ``[D, num]``, directions that the frame begins with instead of random ones, in every piece;
        columns, orthonormalised in their order, over the real numbers of the state as `bptt_jax.ravel_state` has them.
        With those in which another run has ended, say, no warm-up of the frame is needed. `num` is theirs.
      dt: how long a step takes: rates are then in nats per unit of time. By default in nats per step.

    Returns:
      `LyapunovSpectrum`. It can be jitted, vmapped over sequences, and differentiated with respect to `params`,
      `state0` and `xs`; with several segments in forward mode only.

    Raises:
      TypeError, ValueError: an argument breaks the contract; `num` exceeds D, no step is left after the warm-up, or
        there are more segments than steps after it; the step has a backward pass alone that cannot be turned round,
        and D exceeds 1024.
      RuntimeError: the columns of `initial_frame` are not finite, or depend on each other.

    Example:
      >>> step = lambda w, h, x: w * h
      >>> w = jnp.array([0.5, 2.0])
      >>> found = bptt.lyapunov_exponents(step, w, jnp.zeros(2), length=100, warmup=20)
      >>> found.exponents
      Array([ 0.693, -0.693], dtype=float32)
    """
    recurrence = bind(step, params, state0, xs, length)
    steps, size = recurrence.length, recurrence.size
    num = check_num(num, size, initial_frame)
    dt = None if dt is None else check_positive("dt", dt)
    if isinstance(warmup, bool) or not isinstance(warmup, (int, np.integer)):
        raise TypeError(f"warmup: expected an integer, got {type(warmup).__name__}")
    if not 0 <= warmup < steps:
        raise ValueError(
            f"warmup: expected fewer than the {counted(steps, 'step')}, and none below 0, got {warmup}"
        )
    segments = check_positive_int("segments", segments)
    if segments > steps - warmup:
        raise ValueError(
            f"segments: expected at most the {counted(steps - warmup, 'step')} after the warm-up, got {segments}"
        )
    window = None if window is None else check_positive_int("window", window)
    length = -(-(steps - warmup) // segments)
    later = -(-(steps - warmup) // length) - 1
    cut = None if later == 0 else (later, length)
    return _exponents(recurrence, initial_frame, dt, warmup=int(warmup), num=num, cut=cut, window=window)


def check_num(num: int | None, size: int, initial_frame: Any) -> int:
    """How many directions are followed: as many as asked for or given, or D."""
    num = None if num is None else check_positive_int("num", num)
    if num is not None and num > size:
        raise ValueError(f"num: expected at most D = {counted(size, 'exponent')}, got {num}")
    return check_frame(initial_frame, num, size)


@devices.compiled
def _exponents(
    recurrence: Recurrence,
    initial_frame: Array | None,
    dt: Array | None,
    *,
    warmup: int,
    num: int,
    cut: tuple[int, int] | None,
    window: int | None,
) -> LyapunovSpectrum:
    found = measure_exponents(check_step(recurrence), warmup, num, cut, window, initial_frame)
    return found if dt is None else per_unit_of_time(found, dt)


def per_unit_of_time(spectrum: LyapunovSpectrum, dt: Array) -> LyapunovSpectrum:
    """With rates per unit of time, of which a step takes `dt`."""
    dt = jnp.asarray(dt, spectrum.growth.dtype)
    rates = {k: getattr(spectrum, k) / dt for k in ("exponents", "standard_errors", "growth")}
    sums = dataclasses.replace(spectrum.batches, values=spectrum.batches.values / dt)
    return dataclasses.replace(spectrum, batches=sums, dt=dt, unit="unit of time", **rates)


def measure_exponents(
    recurrence: Recurrence,
    warmup: int | Int[AnyArray, " T"],
    num: int,
    cut: tuple[int, int] | None = None,
    window: int | None = None,
    initial_frame: Float[Array, "D num"] | None = None,
) -> LyapunovSpectrum:
    """The spectrum of a checked recurrence, to be traced.

    Args:
      recurrence, num, window, initial_frame: as for `lyapunov_exponents`.
      warmup: for all steps, or for the piece of each, ``[T]``.
      cut: how many segments at the end, and of how many steps each, are worked on side by side after the others.
    """
    instants, steps = recurrence.instants, recurrence.length
    start = ravel_state(recurrence.state0)[0]
    fresh, first_frame = frames_to_begin_with(start, num, initial_frame)
    all_pieces = pieces(recurrence)
    age, piece = count_within(all_pieces)[0], measured_pieces(all_pieces, warmup)
    of = batches(piece, MOST_BATCHES if instants.reset is None else steps)
    later, length = cut or (0, 1)
    first = steps - later * length
    # At the ends of the warm-up, of every batch and segment, so that each has its own growth and all of it; and
    # before padding, in which other frames may be orthonormalised beside.
    real = all_pieces >= 0
    forced = np.isin(np.arange(1, steps + 1), range(first, steps, length)) | of.ends
    forced = forced | (real & ((age == warmup) | own_library(real).append(~real[1:], True)))
    if window is not None:
        forced = forced | ((piece >= 0) & (count_within(piece)[0] % window == 0))
    timing = instants, jnp.asarray(forced), jnp.asarray(real & (age < warmup))
    always = num <= _FEW or window == 1
    propagate = partial(propagate_frames, recurrence, first=first_frame, fresh=fresh, always=always)

    head = jax.tree.map(lambda a: a[:first, None], timing)
    states = jax.tree.map(lambda a: a[None], recurrence.state0)
    begun = propagate(states, begin_frames(first_frame, 1), instants=head[0], forced=head[1], mending=head[2])
    parts = [begun]
    if later:
        tail = jax.tree.map(lambda a: a[first:].reshape(later, length, *a.shape[1:]), timing)
        weights = of._replace(number=of.number[first:], linked=of.linked[first:]), jnp.asarray(piece[first:] >= 0)
        parts.append(_side_by_side(recurrence, propagate, begun, tail, weights))
    growth, zero, orthonormalised, finite = (
        jnp.concatenate([_in_order(getattr(p, k)) for p in parts])
        for k in ("growth", "zero", "orthonormalised", "finite")
    )
    if instants.reset is not None:
        # A reset that the step carries out itself, too, erases what it starts from: it is no decay.
        erases = recurrence.resets & jnp.any(growth == -jnp.inf, axis=1)
        piece = jnp.where(erases, -1, jnp.asarray(piece))
    return spectrum_of(growth, zero, orthonormalised, finite, piece, of, start.size)[0]


def frames_to_begin_with(
    start: Float[Array, " D"], num: int, initial_frame: Float[Array, "D num"] | None
) -> tuple[Float[Array, "num D"], Float[Array, "num D"]]:
    """Of which new directions are drawn, and with which every piece begins."""
    dtype = at_least_single(start.dtype)
    fresh = random_frame(num, start.size, dtype)
    return fresh, fresh if initial_frame is None else orthonormal_frame(initial_frame, dtype)


def spectrum_of(
    growth: Array, zero: Array, orthonormalised: Array, finite: Array, piece: AnyArray, of: Batches, size: int
) -> tuple[LyapunovSpectrum, Int[Array, " num"]]:
    """What has been measured at every step, as for `LyapunovSpectrum`, in its order; and this order."""
    measured = piece >= 0
    growth = jnp.where(measured[:, None], growth, 0)
    # A random matrix may come that near to a singular one by chance, once; a rank that is missing is missing often.
    times = jnp.sum(orthonormalised & measured, dtype=growth.dtype)
    by_chance = jnp.minimum(jnp.maximum(_BY_CHANCE * times, 1), times - 1)
    zero = zero & measured[:, None]
    dead = jnp.sum(zero, axis=0, dtype=growth.dtype) > by_chance
    growth = jnp.where(zero & dead[None], -jnp.inf, growth)
    growth = jnp.where((measured & ~finite)[:, None], jnp.nan, growth)
    steps = own_library(measured).sum(measured, dtype=growth.dtype)
    exponents = jnp.sum(growth, axis=0) / jnp.where(steps == 0, jnp.nan, steps)
    first = jnp.min(jnp.where(finite, len(finite), jnp.arange(len(finite), dtype=jnp.int32)))
    exponents = jnp.where(first == len(finite), exponents, jnp.nan)
    order = jnp.argsort(-exponents, stable=True)
    growth, exponents = growth[:, order], exponents[order]
    sums = sum_batches(jnp.where((exponents == -jnp.inf)[None], 0, growth), measured, of)
    one = jnp.ones((), growth.dtype)
    spectrum = LyapunovSpectrum(
        exponents=exponents,
        standard_errors=_standard_errors(exponents, sums, one),
        growth=growth,
        orthonormalised=orthonormalised,
        piece=jnp.asarray(piece),
        batches=sums,
        size=jnp.asarray(size, jnp.int32),
        first_nonfinite=jnp.where(first == len(finite), -1, first),
        dt=one,
    )
    return spectrum, order


def _standard_errors(exponents: Float[Array, " num"], of: BatchSums, dt: Array) -> Float[Array, " num"]:
    return _at_least_rounding(exponents, squared_error(of), dt)


def _at_least_rounding(rates: Array, square: Array, dt: Array) -> Array:
    """Their standard errors, from the squares; 0 of -inf. What is rounded is the growth of a step, dt times a rate."""
    return jnp.where(rates == -jnp.inf, 0, jnp.maximum(root(square), least_error(rates.dtype) / dt))


def as_one(spectrum: LyapunovSpectrum) -> LyapunovSpectrum:
    """Of a batch of one axis `LyapunovSpectrum.pooled`; of one sequence, a batch too, its own."""
    lead = jnp.shape(spectrum.exponents)[:-1]
    if lead == (1,):
        return jax.tree.map(lambda a: a[0], spectrum)
    return spectrum.pooled() if lead else spectrum


def count_unstable(spectrum: LyapunovSpectrum) -> Int[Array, ""]:
    """How many exponents are positive: up to the last that is so by more than its error tells."""
    bound = _NEUTRAL * jnp.nan_to_num(spectrum.standard_errors)
    numbers = jnp.arange(1, len(bound) + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(spectrum.exponents > bound, numbers, 0), initial=0)


def _neutral(spectrum: LyapunovSpectrum) -> np.ndarray:
    """``[num]``: how far from zero an exponent may be that is zero."""
    return _NEUTRAL * np.nan_to_num(np.asarray(spectrum.standard_errors))


def _dimension(spectrum: LyapunovSpectrum) -> tuple[float, np.ndarray]:
    """Kaplan's and Yorke's, of one spectrum of NumPy's arrays, and its slopes ``[num]`` along the exponents."""
    exponents, num = np.asarray(spectrum.exponents), len(spectrum.exponents)
    slopes = np.zeros(num)
    if np.isnan(exponents).any():
        return math.nan, np.full(num, math.nan)
    clear = np.where(np.abs(exponents) <= _neutral(spectrum), np.maximum(exponents, 0), exponents)
    j = int(np.sum(np.logical_and.accumulate(np.cumsum(clear) >= 0)))
    if j == num:
        known = j == int(spectrum.size)
        return float(j) if known else math.nan, slopes if known else np.full(num, math.nan)
    if j == 0:
        return 0.0, slopes
    total, shrinks = np.sum(exponents[:j]), -exponents[j]
    slopes[:j], slopes[j] = 1 / shrinks, total / shrinks**2
    return float(j + total / shrinks), slopes


def _positive(spectrum: LyapunovSpectrum) -> np.ndarray:
    return (np.asarray(spectrum.exponents) > -_neutral(spectrum)).astype(float)


def _error_along(spectrum: LyapunovSpectrum, slopes: np.ndarray, dtype: Any) -> float:
    """The standard error of a sum of exponents, found in this dtype, in these proportions; of one alone its own."""
    if np.isnan(slopes).any() or np.isnan(spectrum.exponents).any():
        return math.nan
    combined = dataclasses.replace(spectrum.batches, values=spectrum.batches.values @ slopes[:, None])
    least = least_error(dtype) / spectrum.dt * np.linalg.norm(slopes)
    return float(np.maximum(np.sqrt(squared_error(combined)[0]), least))


@devices.compiled
def _pooled(batch: LyapunovSpectrum) -> LyapunovSpectrum:
    measured = batch.piece >= 0
    counts = jnp.sum(measured, axis=1, dtype=batch.growth.dtype)
    total = jnp.sum(counts)
    sums = jnp.where((counts > 0)[:, None], batch.exponents * counts[:, None], 0)
    exponents = jnp.sum(sums, axis=0) / jnp.where(total == 0, jnp.nan, total)
    order = jnp.argsort(-exponents, stable=True)
    exponents, sums = exponents[order], sums[:, order]
    weight = jnp.sum(measured, axis=0, dtype=counts.dtype)
    growth = jnp.sum(batch.growth, axis=0) / jnp.where(weight == 0, 1, weight)[:, None]
    alone = BatchSums(jnp.where((exponents == -jnp.inf)[None], 0, sums), counts, jnp.zeros(len(counts), bool))
    bad = batch.first_nonfinite
    unknown = jnp.iinfo(bad.dtype).max
    earliest = jnp.min(jnp.where(bad >= 0, bad, unknown))
    return LyapunovSpectrum(
        exponents=exponents,
        standard_errors=_standard_errors(exponents, alone, batch.dt[0]),
        growth=growth[:, order],
        orthonormalised=jnp.all(batch.orthonormalised | ~measured, axis=0),
        piece=jnp.max(batch.piece, axis=0),
        batches=alone,
        size=batch.size[0],
        first_nonfinite=jnp.where(earliest == unknown, -1, earliest),
        dt=batch.dt[0],
        unit=batch.unit,
    )


@devices.compiled
def living_rates(spectrum: LyapunovSpectrum) -> tuple[Float[Array, "... num"], Float[Array, "... num"]]:
    """`LyapunovSpectrum.living_exponents`, of a batch too, and their standard errors; both have derivatives."""

    def of_one(spectrum: LyapunovSpectrum) -> tuple[Array, Array]:
        growth, measured = spectrum.growth, spectrum.piece >= 0
        upto = jnp.cumsum(measured, dtype=jnp.int32)
        known = spectrum.orthonormalised & measured
        latest = jax.lax.cummax(jnp.where(known, upto, 0))
        before = jnp.concatenate([jnp.zeros_like(latest[:1]), latest[:-1]])
        lives = known[:, None] & (growth != -jnp.inf)
        growth = jnp.where(lives, growth, 0)
        steps = jnp.where(lives, (upto - before)[:, None], 0).astype(growth.dtype)
        total = jnp.sum(steps, axis=0)
        rates = jnp.where(total == 0, -jnp.inf, jnp.sum(growth, axis=0) / jnp.where(total == 0, 1, total))
        unknown = (spectrum.first_nonfinite >= 0) | ~jnp.any(measured)
        of = batches(spectrum.piece, len(measured))
        square = jax.vmap(lambda g, n: squared_error(sum_batches(g[:, None], n, of))[0], 1)(growth, steps)
        return jnp.where(unknown, jnp.nan, rates), _at_least_rounding(rates, square, spectrum.dt)

    for _ in range(jnp.ndim(spectrum.exponents) - 1):
        of_one = jax.vmap(of_one)
    return of_one(spectrum)


def _converged(spectrum: LyapunovSpectrum) -> np.ndarray:
    """``[num]``, of one spectrum of NumPy's arrays."""
    growth, piece = np.asarray(spectrum.growth), np.asarray(spectrum.piece)
    dead = np.any(growth == -np.inf, axis=0)
    sums = sum_batches(np.where(dead[None], 0, growth), piece >= 0, batches(piece, len(piece)))
    which = np.flatnonzero(sums.steps > 0)
    half = len(which) // 2
    if half < 2:
        return np.zeros(len(dead), bool)
    parts = [jax.tree.map(lambda a, k=k: a[k], sums) for k in (which[:half], which[-half:])]
    first, second = (np.sum(part.values, axis=0) / np.sum(part.steps) for part in parts)
    error = np.sqrt(sum(squared_error(part) for part in parts))
    return (np.abs(first - second) <= _DRIFT * error + _SAME / spectrum.dt) | dead


def finite_time_rates(growth: AnyArray, piece: AnyArray, known: AnyArray, window: int) -> np.ndarray:
    """``[..., windows, num]``: means of ``growth [..., T, num]`` over windows of each piece, at whose edges it is
    `known`; where it is not, or no piece is that long, ValueError is raised."""
    window = check_positive_int("window", window)
    *lead, steps, num = np.shape(growth)
    pieces = np.asarray(piece).reshape(-1, steps)
    rows = zip(
        np.asarray(growth, np.float64).reshape(-1, steps, num),
        pieces,
        np.asarray(known).reshape(-1, steps),
        strict=True,
    )
    found = [_windows(*row, window) for row in rows]
    most = max(len(f) for f in found)
    if most == 0:
        longest = max(np.unique(e[e >= 0], return_counts=True)[1].max(initial=0) for e in pieces)
        raise ValueError(f"window: expected at most {counted(longest, 'step')}, got {window}")
    padded = [np.concatenate([f, np.full((most - len(f), num), np.nan)]) for f in found]
    return np.stack(padded).reshape(*lead, most, num)


def _windows(growth: np.ndarray, piece: np.ndarray, known: np.ndarray, window: int) -> np.ndarray:
    """``[windows, num]`` of one sequence."""
    found = [np.empty((0, growth.shape[-1]))]
    for number in np.unique(piece[piece >= 0]):
        own = piece == number
        count = np.sum(own) // window
        if count and not np.all(known[own][window - 1 : count * window : window]):
            raise ValueError(
                f"window: the growth within windows of {counted(window, 'step')} is not known exactly, for the frame "
                f"was not orthonormalised at their edges; lyapunov_exponents(..., window={window}) sees to that"
            )
        found.append(growth[own][: count * window].reshape(count, window, growth.shape[-1]).mean(axis=1))
    return np.concatenate(found)


def _side_by_side(
    recurrence: Recurrence, propagate: Any, begun: FrameTrajectory, timing: Any, weights: tuple[Batches, Array]
) -> FrameTrajectory:
    """The segments that follow on `begun`, leaves of `timing` ``[segments, steps, ...]``, as in one unbroken run.

    Each needs the frame in which the one before ends. A first guess is put right from pass to pass: one more
    segment at least each time, and nearly all at once where a segment is longer than a frame remembers.

    `weights`: their batches, and which steps are measured.
    """
    count, length = timing[1].shape
    eps = float(jnp.finfo(begun.growth.dtype).eps)
    of, measured = weights
    total = jnp.maximum(jnp.sum(measured, dtype=begun.growth.dtype), 1)

    def to_next(state: State, segment: Instant) -> tuple[State, State]:
        with full_precision():  # as in `propagate`, so that the pieces fit
            end, _ = devices.scan(lambda h, at: (recurrence.advance(h, at), None), state, segment, length=length)
        return end, end

    instants = timing[0]
    but_last = jax.tree.map(lambda a: a[:-1], instants)
    _, ends = devices.scan(to_next, jax.tree.map(lambda a: a[0], begun.states), but_last, length=count - 1)
    starts = _joined(begun.states, ends)
    instants, forced, mending = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), timing)

    def run(frames: Frames) -> FrameTrajectory:
        return propagate(starts, frames, instants=instants, forced=forced, mending=mending)

    def again(carry: tuple[FrameTrajectory, Array, Array, Array]) -> tuple[FrameTrajectory, Array, Array, Array]:
        before, passes, last, _ = carry
        after = run(_joined(begun.frames, jax.tree.map(lambda a: a[:-1], before.frames)))
        old, new = (jnp.where(measured[:, None], _in_order(found.growth), 0) for found in (before, after))
        living = jnp.where(jnp.any(new == -jnp.inf, axis=0)[None], 0, new)
        error = root(squared_error(sum_batches(living, measured, of)))
        # Where the shortest direction has lost two fifths of the digits, its rounding is eps to the other three.
        allowed = _UNSETTLED * jnp.where(jnp.isnan(error), 0, error) + eps**0.6
        # Without signs, that no cancelling looks like rest; where growth is -inf, so is the exponent.
        moved = jnp.sum(jnp.where(new == old, 0, jnp.abs(new - old)), axis=0) / total
        change = jnp.max(jnp.where(jnp.any(new == -jnp.inf, axis=0), 0, moved / allowed))
        # Changes that shrink by the factor change / last sum up to change / (1 - factor), which is to be below 1.
        return after, passes + 1, change, change * last > last - change

    guess = run(jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape[1:])), begun.frames))
    start = guess, jnp.ones((), jnp.int32), jnp.zeros((), guess.growth.dtype), jnp.ones((), bool)
    return devices.while_loop(lambda carry: carry[3] & (carry[1] < count), again, start)[0]


def _joined(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)


def _in_order(a: Array) -> Array:
    """``[steps, segments, ...] -> [segments * steps, ...]``."""
    return jnp.swapaxes(a, 0, 1).reshape(-1, *a.shape[2:])


def draw_exponents(axes: Any, spectrum: LyapunovSpectrum) -> None:
    """The exponents of one spectrum, with bars of two standard errors, on matplotlib's axes."""
    values = np.asarray(spectrum.exponents, np.float64)
    errors = np.nan_to_num(np.asarray(spectrum.standard_errors, np.float64))
    if values.ndim != 1:
        raise ValueError(f"spectrum: expected one, got a batch of shape {list(values.shape[:-1])}; see pooled()")
    index = 1 + np.arange(len(values))
    shown = np.isfinite(values)
    axes.axhline(0, color="0.75", linewidth=0.8, zorder=0)
    few = len(values) <= 40
    axes.errorbar(
        index[shown], values[shown], _NEUTRAL * errors[shown], fmt="o" if few else ".", markersize=4 if few else 2,
        color="black", ecolor="0.5", elinewidth=1.0, capsize=2 if few else 0,
    )  # fmt: skip
    dead = index[values == -math.inf]
    if len(dead):
        where = axes.get_xaxis_transform()
        axes.plot(dead, np.zeros(len(dead)), "v", color="#c8102e", markersize=5, clip_on=False, transform=where)
        axes.annotate("-inf", (dead[-1], 0), (0, 5), ha="right", color="#c8102e", fontsize="small", xycoords=where,
                      textcoords="offset points")  # fmt: skip
    axes.set(xlabel="exponent", ylabel=f"nats per {spectrum.unit}", xlim=(0.5, len(values) + 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True)
