"""`calibrate`: the value of one number at which signals neither grow nor fade, or do so at a wanted rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bptt_jax import devices
from bptt_jax.analysis.averages import root
from bptt_jax.analysis.error_signal import propagate_error_signal
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.analysis.lyapunov import measure_exponents
from bptt_jax.checks import (
    add_notes,
    at_path,
    check_bool,
    check_finite,
    check_function,
    check_leaves,
    check_number,
    notice_new_function,
)
from bptt_jax.results import Result, counted, field
from bptt_jax.step import (
    Array,
    Cell,
    Loss,
    Params,
    PyTree,
    State,
    Step,
    bind,
    check_step,
    full_precision,
    is_differentiable,
)

Make: TypeAlias = Callable[..., tuple[Step, Params]]

# The method of interpolation, truncation and projection, with its authors' constants (Oliveira and Takahashi 2020, ACM
# Trans. Math. Softw. 47: 5): never more trials than bisection and one, mostly as few as the secants need.
_K1, _K2, _N0 = 0.2, 2.0, 1
_BISECTIONS = 20  # to a millionth of the bracket
_ENOUGH = 0.1  # of its standard error: how near the target a trial is to be
_APART = 4.0  # standard errors by which the two trials for the slope are to differ from the target
_WIDE = 10.0  # ratio of the ends of a bracket from which on it is divided by ratios
_MOST = 2 + _BISECTIONS + _N0 + 2


class CalibrationTrials(Result):
    """What was measured on the way, in the order of the values; N trials.

    Attributes:
      values: ``[N]``, ascending; NaN, at the end, where none was needed.
      rates: ``[N]``, nats per step, the mean over the draws.
      errors: ``[N]``, its standard error.
      each: ``[N, M]``, of every draw.
    """

    values: Float[Array, " N"] = field(dims=("trial",))
    rates: Float[Array, " N"] = field(dims=("trial",))
    errors: Float[Array, " N"] = field(dims=("trial",))
    each: Float[Array, "N M"] = field(dims=("trial", "draw"))

    def made(self) -> tuple[np.ndarray, ...]:
        """Values, rates and errors of the trials that were needed, in double precision."""
        known = ~np.isnan(np.asarray(self.values))
        values, rates, errors = (np.asarray(a, np.float64)[known] for a in (self.values, self.rates, self.errors))
        return values, rates, errors


class Calibration(Result):
    """The value at which the rate meets the target.

    Attributes:
      value: of the family's number; NaN if a rate on the way was NaN, of a trajectory that is not finite, say, or,
        under `jax.jit`, if the rates at both ends are on the same side of the target.
      error: its standard error, that of the rate there divided by `slope`; at least half of the bracket that is left
        where no rate came near the target, as at a jump, which `statement` names.
      slope: by which the rate changes with the value there, nats per step for 1.
      target: that was given.
      measured: all that was measured, a curve.
    """

    value: Float[Array, ""] = field(dims=())
    error: Float[Array, ""] = field(dims=())
    slope: Float[Array, ""] = field(dims=())
    target: Float[Array, ""] = field(dims=())
    measured: CalibrationTrials

    _views: ClassVar = {"statement": None}

    @property
    def statement(self) -> str:
        """What was found, in one line: "2.19 +- 0.03 would be steady"; of a batch, how many were found."""
        if np.ndim(self.value):
            found = int(np.sum(~np.isnan(np.asarray(self.value))))
            return f"{found} of {counted(np.size(self.value), 'value')} found"
        value, error, target = (float(a) for a in (self.value, self.error, self.target))
        meets = "would be steady" if target == 0 else f"has the rate {target:.3g} nats per step"
        if not math.isnan(value):
            jump = self._jump()
            if jump is not None:
                return (
                    f"at {_rounded(value, error)} the rate jumps from {jump[0]:.3g} to {jump[1]:.3g} nats per step"
                )
            return f"{_rounded(value, error)} {meets}"
        return f"no value found: {_ends(self)}"

    def _jump(self) -> tuple[float, float] | None:
        """The rates on both sides of the value, where nothing lies between them."""
        values, rates, errors = self.measured.made()
        above = int(np.searchsorted(values, float(self.value)))
        if not 0 < above < len(values):
            return None
        sides, apart = rates[above - 1 : above + 1], values[above] - values[above - 1]
        noise = np.max(np.nan_to_num(errors[above - 1 : above + 1]))
        narrow = apart <= 1e-5 * (values[-1] - values[0])
        jumps = abs(sides[1] - sides[0]) > max(_APART * noise, 0.1 * (np.max(rates) - np.min(rates)))
        return (float(sides[0]), float(sides[1])) if narrow and jumps else None

    def _headline(self) -> str:
        return self.statement

    def _figure(self) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.0, 2.2), layout="constrained")
        draw_calibration(figure.subplots(), self)
        return figure


def calibrate(
    make: Make,
    state0: State,
    xs: PyTree = None,
    loss: Loss | None = None,
    *,
    low: float,
    high: float,
    target: float = 0.0,
    keys: PyTree = None,
    batched: bool = False,
    args: PyTree = None,
    has_aux: bool = False,
    length: int | None = None,
    warmup: int = 0,
) -> Calibration:
    """The value of one number (a gain, a bias, a leak, a step size) at which the measured rate meets the target.

    With a loss the rate is the growth rate of the error signal, as `bptt_jax.gradient_flow` has it; without one, the
    largest Lyapunov exponent, as `bptt_jax.lyapunov_exponents` has it. What is brought to the target is its mean over M
    draws of recurrence and sequence, the same draws at every value, so that the rates at two values differ by what the
    value does. The root is found between `low` and `high` by the ITP method (Oliveira and Takahashi 2020, ACM Trans.
    Math. Softw. 47: 5), over logarithms where both are positive and a factor of 10 apart; it ends where the rate is
    within a tenth of its standard error of the target, mostly after some five trials. Two more, on both sides, give
    the slope. One program is compiled, whatever the values.

    The standard error is that of the mean rate, from the scatter of the draws, divided by the slope: of an ensemble
    (random networks and inputs) that of the critical value of the ensemble. Of a single draw it is the error of the
    rate within the sequence: of this recurrence's own critical value.

    Args:
      make: ``make(value) -> (step, params)``, or, with `keys`, ``make(value, key) -> (step, params)``. It is traced, so
        the value is an array ``[]``; the step may close over it. Define it once, outside the loop that calls.
        In a mesh with Explicit axes it closes over no array of the mesh: these come by `keys`.
      state0: h_0, of every draw.
      xs, length: as for `bptt_jax.unroll`; with `batched`, leaves ``[M, T, ...]``.
      loss, args, has_aux: as for `bptt_jax.adjoints`; the same for every draw. None: the largest exponent is meant.
      low, high: ends of the bracket; the rates there must be on different sides of the target.
      target: nats per step.
      keys: leaves ``[M, ...]``, random keys say, of each of which `make` is given one. None: all draws have one
        recurrence.
      batched: whether xs has a draw's sequence for each draw; otherwise all have the same, and the error tells nothing
        of other sequences.
      warmup: without a loss, steps that only prepare the state and the direction; as for `bptt_jax.lyapunov_exponents`.

    Returns:
      A `Calibration`, without derivatives. Its value is NaN where a rate is, of a trajectory that is not finite, and
      under `jax.jit` and `jax.vmap` where there is none; trials that were not needed are NaN there.

    Raises:
      TypeError, ValueError: an argument breaks the contract; outside of `jax.jit`, the rates at both ends are on the
        same side of the target, with what was measured there.

    Example:
      >>> leaky = lambda w, h, x: 0.8 * h + 0.2 * jnp.tanh(w @ h)
      >>> make = lambda gain, key: (leaky, gain * jax.random.normal(key, (40, 40)) / jnp.sqrt(40))
      >>> keys = jax.random.split(jax.random.key(0), 5)
      >>> h0 = jnp.full(40, 1e-3)
      >>> found = bptt.calibrate(make, h0, length=80, low=0.5, high=2.0, target=-0.05, warmup=20, keys=keys)
      >>> bool(0.6 < found.value < 0.9), bool(found.error < 0.1)
      (True, True)
    """
    make = check_function("make", make, "make(value) -> (step, params)")
    notice_new_function("make", make, "what changes from call to call goes into keys=, for make(value, key)")
    check_leaves("state0", state0)
    bound = None if loss is None else bind_loss(loss, args, has_aux)
    if loss is None and (args is not None or has_aux):
        raise ValueError("args, has_aux: expected a loss beside them, got None")
    low, high, target = _check_numbers(low, high, target, warmup)
    if loss is not None and warmup != 0:
        raise ValueError(f"warmup: expected 0 with a loss, whose signal goes back to the start, got {warmup}")
    check_bool("batched", batched)
    if batched:
        check_leaves("xs", xs)
    else:
        steps = bind(_stay, None, state0, xs, length).length
        _check_warmup(warmup, steps)
    of_draw = _OfDraw(keys, xs if batched else None)
    draws = _draws(of_draw)
    shared = _Shared(state0, None if batched else xs, bound)
    with full_precision():
        found = _calibrate(
            (low, high, target),
            of_draw,
            shared,
            make=make,
            length=length,
            warmup=int(warmup),
            keyed=keys is not None,
            draws=draws,
        )
    return found if isinstance(found.value, jax.core.Tracer) else _told(found)


def calibrate_cell(
    make: Callable[[Array], Cell],
    xs: PyTree,
    loss: Loss | None = None,
    *,
    low: float,
    high: float,
    target: float = 0.0,
    keys: PyTree = None,
    batched: bool = False,
    args: PyTree = None,
    has_aux: bool = False,
    warmup: int = 0,
) -> Calibration:
    """`bptt_jax.calibrate` of a family of cells, whose weights are drawn and whose state begins as they have it.

    Args:
      make: ``make(value) -> Cell``, as ``lambda gain: bptt.rnn(64, gain=gain)``.
      xs: with an array ``[T, I]`` (batched, ``[M, T, I]``) as its first leaf, which tells the cell its input size.
      keys: ``[M]``, a random key for each draw of the weights; by default ``jax.random.split(jax.random.key(0), 20)``,
        or, if `batched`, as many as there are sequences.
      loss, low, high, target, batched, args, has_aux, warmup: as for `bptt_jax.calibrate`.

    Returns:
      A `Calibration`.

    Raises:
      TypeError, ValueError: as `bptt_jax.calibrate`; `make` returns no cell.

    Example:
      >>> xs = jax.random.normal(jax.random.key(1), (8, 60, 3))
      >>> last = lambda states: jnp.sum(states.c[-1])
      >>> found = bptt.analysis.calibrate_cell(
      ...     lambda bias: bptt.lstm(8, forget_bias=bias), xs, last, low=-2.0, high=6.0, target=-0.1, batched=True
      ... )
      >>> bool(1 < found.value < 4)
      True
    """
    make = check_function("make", make, "make(value) -> Cell")
    notice_new_function("make", make, "what changes from call to call goes into keys=")
    check_leaves("xs", xs)
    low, high, target = _check_numbers(low, high, target, warmup)
    first = next((leaf for leaf in jax.tree.leaves(xs) if is_differentiable(leaf)), None)
    axes = 3 if batched is True else 2
    if first is None or np.ndim(first) != axes:
        got = "none" if first is None else list(np.shape(first))
        raise ValueError(f"xs: expected an array of shape {['T, I', 'M, T, I'][axes - 2]} as its first, got {got}")
    _check_warmup(warmup, np.shape(first)[-2])
    family = _OfCell(make, np.shape(first)[-1], None)
    if keys is None:
        draws = np.shape(first)[0] if batched is True else 20
        family, keys = replace(family, draws=draws), np.arange(draws, dtype=np.int32)
    return calibrate(
        family,
        family.cell(low).initial_state(),
        xs,
        loss,
        low=low,
        high=high,
        target=target,
        keys=keys,
        batched=batched,
        args=args,
        has_aux=has_aux,
        warmup=warmup,
    )


def draw_calibration(axes: Any, found: Calibration) -> None:
    """The rates that were measured, with bars of two standard errors, and the value found, on matplotlib's axes."""
    values, rates, errors = found.measured.made()
    axes.axhline(float(found.target), color="0.75", linewidth=0.8, zorder=0)
    value, error = float(found.value), float(np.nan_to_num(found.error))
    if not math.isnan(value):
        axes.axvspan(value - 2 * error, value + 2 * error, color="#c8102e", alpha=0.15, linewidth=0)
        axes.axvline(value, color="#c8102e", linewidth=0.8)
    shown = np.isfinite(rates)
    axes.errorbar(
        values[shown], rates[shown], 2 * np.nan_to_num(errors[shown]), fmt="o-", markersize=3, color="black",
        linewidth=0.8, ecolor="0.5", capsize=2,
    )  # fmt: skip
    if len(values) and values[0] > 0 and values[-1] >= _WIDE * values[0]:
        axes.set_xscale("log")
    axes.set(xlabel="value", ylabel="nats per step")


class _OfDraw(NamedTuple):
    """What each draw has of its own, leaves ``[M, ...]``; None where all have the same."""

    keys: PyTree
    xs: PyTree


class _Shared(NamedTuple):
    """What all draws have."""

    state0: State
    xs: PyTree
    loss: BoundLoss | None


class _Search(NamedTuple):
    """The search so far, along u from 0 (low) to 1 (high).

    Attributes:
      trials: how many; the first two are at the ends.
      low, high, below, above: the bracket, and the rates there less the target.
      size: how much the rates at both ends differ.
      at, error: the root, once there is one, and the standard error of the rate.
      slopes: how many of the two trials for the slope are done.
      apart: how far from the root they are.
      side: the rate at the first of them.
      slope: per unit of u, in the end.
      found, over: whether there is a root, and whether all is done.
      u, rates, errors: ``[N]``, and each, ``[N, M]``: what was measured.
    """

    trials: Array
    low: Array
    high: Array
    below: Array
    above: Array
    size: Array
    at: Array
    error: Array
    slopes: Array
    apart: Array
    side: Array
    slope: Array
    found: Array
    over: Array
    u: Array
    rates: Array
    errors: Array
    each: Array


@devices.compiled
def _calibrate(
    numbers: tuple[Any, Any, Any],
    of_draw: _OfDraw,
    shared: _Shared,
    *,
    make: Make,
    length: int | None,
    warmup: int,
    keyed: bool,
    draws: int | None,
) -> Calibration:
    low, high, target = (jnp.asarray(a, float) for a in numbers)
    dtype = target.dtype
    by_ratio = (low > 0) & (high >= _WIDE * low)
    bottom, top = (jnp.where(by_ratio, jnp.log(jnp.where(by_ratio, a, 1)), a) for a in (low, high))

    def value_at(u: Array) -> Array:
        along = bottom + u * (top - bottom)
        return jnp.clip(jnp.where(by_ratio, jnp.exp(jnp.where(by_ratio, along, 0)), along), low, high)

    def rate(value: Array, of_draw: _OfDraw) -> tuple[Array, Array]:
        step, params = _made(make, value, (of_draw.keys,) if keyed else ())
        xs = shared.xs if of_draw.xs is None else of_draw.xs
        recurrence = check_step(bind(step, params, shared.state0, xs, length))
        if shared.loss is None:
            _check_warmup(warmup, recurrence.length)
            spectrum = measure_exponents(recurrence, warmup, 1)
            found = spectrum.exponents[0], spectrum.standard_errors[0]
        else:
            level = jnp.asarray(1e-3, float)
            growth = propagate_error_signal(recurrence, shared.loss, threshold=level, share=level).growth
            found = growth.rate, growth.rate_error
        return found[0].astype(dtype), found[1].astype(dtype)

    def measured(u: Array) -> tuple[Array, Array, Array]:
        """The mean rate, its standard error, and the rates ``[M]`` of all draws."""
        value = value_at(u)
        if draws is None:
            one, error = rate(value, of_draw)
            return one, error, one[None]
        each, errors = jax.vmap(rate, (None, 0))(value, of_draw)
        mean = jnp.mean(each)
        if draws == 1:
            return mean, errors[0], each
        square = jnp.sum(jnp.square(each - mean)) / (draws * (draws - 1))
        return mean, root(square), each

    def body(s: _Search) -> _Search:
        side = jnp.where(s.slopes == 0, s.at - s.apart, s.at + s.apart)
        inside = jnp.where(s.found, jnp.clip(side, 0, 1), _next(s))
        u = jnp.where(s.trials == 0, 0, jnp.where(s.trials == 1, 1, inside)).astype(dtype)
        mean, error, each = measured(u)
        f = mean - target
        s = s._replace(
            trials=s.trials + 1,
            u=s.u.at[s.trials].set(u),
            rates=s.rates.at[s.trials].set(mean),
            errors=s.errors.at[s.trials].set(error),
            each=s.each.at[s.trials].set(each),
        )
        begun, ended = _bracketed(s, f), _ended(s, f, u)
        new = jax.tree.map(lambda a, b: jnp.where(s.found, a, b), ended, _narrowed(s, f, u, error, target))
        return jax.tree.map(lambda a, b: jnp.where(s.trials <= 2, a, b), begun, new)

    zero, none, no = jnp.zeros((), dtype), jnp.full(_MOST, jnp.nan, dtype), jnp.zeros((), bool)
    count = jnp.zeros((), jnp.int32)
    start = _Search(
        count, zero, zero + 1, zero, zero, zero, zero + jnp.nan, zero + jnp.nan, count, zero, zero, zero + jnp.nan,
        no, no, none, none, none, jnp.full((_MOST, draws or 1), jnp.nan, dtype),
    )  # fmt: skip
    s = devices.while_loop(lambda s: ~s.over & (s.trials < _MOST), body, start)
    value = value_at(s.at)
    slope = s.slope / jnp.where(by_ratio, value * (top - bottom), high - low)
    order = jnp.argsort(s.u)  # NaN comes last
    trials = CalibrationTrials(value_at(s.u)[order], s.rates[order], s.errors[order], s.each[order])
    flat = slope == 0
    error = jnp.where(flat & (s.error > 0), jnp.inf, s.error / jnp.where(flat, 1, jnp.abs(slope)))
    # No better than what the root lies within, where the rate has not come near the target: it may jump there.
    within = (value_at(s.high) - value_at(s.low)) / 2
    error = jnp.where(s.high - s.low <= 0.5**_BISECTIONS, jnp.maximum(error, within), error)
    return Calibration(value=value, error=error, slope=slope, target=target, measured=trials)


def _bracketed(s: _Search, f: Array) -> _Search:
    """After a trial at one of the ends."""
    first = s.trials == 1
    below, above = jnp.where(first, f, s.below), jnp.where(first, s.above, f)
    nowhere = ~(jnp.sign(below) * jnp.sign(above) <= 0)  # NaN too
    return s._replace(
        below=below, above=above, size=jnp.abs(above - below), over=jnp.where(first, jnp.isnan(f), nowhere)
    )


def _next(s: _Search) -> Array:
    """Where the ITP method tries next."""
    width, half = s.high - s.low, (s.low + s.high) / 2
    differ = s.above - s.below
    secant = (s.low * s.above - s.high * s.below) / jnp.where(differ == 0, 1, differ)
    secant = jnp.where(jnp.isfinite(secant) & (differ != 0), secant, half)
    towards = jnp.sign(half - secant)
    shift = _K1 * width**_K2
    truncated = jnp.where(shift <= jnp.abs(half - secant), secant + towards * shift, half)
    left = (_BISECTIONS + _N0 - (s.trials - 2)).astype(width.dtype)
    most = jnp.maximum(0.5**_BISECTIONS * 2**left / 2 - width / 2, 0)
    tried = jnp.where(jnp.abs(truncated - half) <= most, truncated, half - towards * most)
    exact = jnp.where(s.below == 0, s.low, s.high)
    return jnp.where((s.below == 0) | (s.above == 0), exact, tried)


def _narrowed(s: _Search, f: Array, u: Array, error: Array, target: Array) -> _Search:
    """After a trial within the bracket, which may be the last of these."""
    lower = jnp.sign(f) == jnp.sign(s.below)
    s = s._replace(
        low=jnp.where(lower, u, s.low),
        below=jnp.where(lower, f, s.below),
        high=jnp.where(lower, s.high, u),
        above=jnp.where(lower, s.above, f),
    )
    noise = _ENOUGH * jnp.where(jnp.isnan(error), 0, error)
    width = s.high - s.low
    near = jnp.abs(f) <= noise
    # Of rates as rough as their error (chaos) some bracket is all noise: there is nothing more to find in it.
    found = near | (width <= 0.5**_BISECTIONS) | (width * s.size <= noise)
    share = s.below / jnp.where(s.above == s.below, 1, s.below - s.above)
    between = s.low + width * jnp.where(jnp.isfinite(share) & (s.above != s.below), share, 0.5)
    at = jnp.where(near, u, jnp.clip(between, s.low, s.high))
    return s._replace(
        found=found & ~jnp.isnan(f),
        at=jnp.where(found, at, s.at),
        error=jnp.where(found, error, s.error),
        apart=_apart(s, at, error, target),
        over=jnp.isnan(f),
    )


def _apart(s: _Search, at: Array, error: Array, target: Array) -> Array:
    """How far from the root the trials for the slope differ clearly from it, by the nearest that do so far."""
    f, away = s.rates - target, s.u - at
    clear = jnp.isfinite(f) & (jnp.abs(f) >= _APART * jnp.where(jnp.isnan(error), 0, error)) & (away != 0)
    steep = jnp.where(clear, jnp.abs(f) / jnp.where(clear, jnp.abs(away), 1), 0)
    nearest = jnp.argmin(jnp.where(clear, jnp.abs(away), jnp.inf))
    slope = jnp.where(jnp.any(clear), steep[nearest], s.size)
    apart = _APART * jnp.where(jnp.isnan(error), 0, error) / jnp.where(slope > 0, slope, 1)
    return jnp.clip(apart, 1e-3, 0.25).astype(at.dtype)


def _ended(s: _Search, f: Array, u: Array) -> _Search:
    """After a trial for the slope."""
    first = s.slopes == 0
    before = jnp.clip(s.at - s.apart, 0, 1)
    slope = (f - s.side) / jnp.where(first, 1, u - before)
    return s._replace(
        slopes=s.slopes + 1, side=jnp.where(first, f, s.side), slope=jnp.where(first, s.slope, slope), over=~first
    )


def _check_numbers(low: Any, high: Any, target: Any, warmup: Any) -> tuple[Any, Any, Any]:
    """The first three, if they are finite and in order."""
    if isinstance(warmup, bool) or not isinstance(warmup, (int, np.integer)):
        raise TypeError(f"warmup: expected an integer, got {type(warmup).__name__}")
    low, high, target = check_finite("low", low), check_finite("high", high), check_finite("target", target)
    return check_number("low", low, f"a number below high = {high}", lambda v: v < high), high, target


def _check_warmup(warmup: int, steps: int) -> None:
    if not 0 <= warmup < steps:
        raise ValueError(
            f"warmup: expected fewer than the {counted(steps, 'step')}, and none below 0, got {warmup}"
        )


def _stay(params: Params, state: State, x: PyTree) -> State:
    return state


def _made(make: Make, value: Array, key: tuple[PyTree, ...]) -> tuple[Step, Params]:
    try:
        made = make(value, *key)
    except Exception as error:
        add_notes(error, "make", f"(value{', key' * len(key)})")
        raise
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0])):
        raise TypeError(f"make: must return (step, params), got {type(made).__name__}")
    return made


@dataclass(frozen=True)
class _OfCell:
    """A family of cells, as `calibrate` wants it; looked up by the function that makes them.

    Of `draws` that have no keys of their own, the key is their number: what splits a key is compiled with all else.
    """

    make: Callable[[Any], Cell]
    input_size: int
    draws: int | None

    def __call__(self, value: Array, key: Array) -> tuple[Step, Params]:
        cell = self.cell(value)
        if self.draws is not None:
            key = jax.random.split(jax.random.key(0), self.draws)[key]
        return cell.step, cell.init(key, self.input_size)

    def cell(self, value: Any) -> Cell:
        cell = self.make(value)
        if not isinstance(cell, Cell):
            raise TypeError(f"make: must return a Cell, got {type(cell).__name__}")
        return cell


def _draws(of_draw: _OfDraw) -> int | None:
    """M; None if nothing is of a draw's own."""
    leaves = [
        (at_path(name, path), leaf)
        for name, tree in (("keys", of_draw.keys), ("xs", of_draw.xs))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    for name, leaf in leaves:
        check_leaves(name, leaf)
        if np.ndim(leaf) == 0:
            raise ValueError(f"{name}: expected the draws as the first axis, got a scalar")
    counts = {name: np.shape(leaf)[0] for name, leaf in leaves}
    if len(set(counts.values())) > 1:
        raise ValueError(f"keys, xs: expected one number of draws in all leaves, got {counts}")
    if 0 in counts.values():
        raise ValueError(f"keys, xs: expected at least one draw, got {counts}")
    return next(iter(counts.values()), None)


def _told(found: Calibration) -> Calibration:
    """Without the trials that were not needed.

    Raises:
      ValueError: the rates at the ends are on the same side of the target.
    """
    count = int(np.sum(~np.isnan(np.asarray(found.measured.values))))
    found = replace(found, measured=jax.tree.map(lambda a: a[:count], found.measured))
    if math.isnan(float(found.value)) and not np.isnan(np.asarray(found.measured.rates)).any():
        raise ValueError(
            f"low, high: expected rates on both sides of the target, {float(found.target):g}, {_ends(found)}"
        )
    return found


def _ends(found: Calibration) -> str:
    """What was measured at the ends, or where that was NaN."""
    values, rates = np.asarray(found.measured.values, np.float64), np.asarray(found.measured.rates, np.float64)
    values, rates = values[~np.isnan(values)], rates[~np.isnan(values)]
    bad = np.isnan(rates)
    if bad.any():
        return (
            f"no rate at {values[bad][0]:.6g}: states are not finite, or the signal has less than two steps to go"
        )
    return f"got {rates[0]:.4g} at {values[0]:.6g} and {rates[-1]:.4g} at {values[-1]:.6g}"


def _rounded(value: float, error: float) -> str:
    """With as many digits as two of the error."""
    if not (0 < error < math.inf):
        return f"{value:.6g}"
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{places}f} +- {error:.{places}f}"
