"""`recommend_gain`: the factor on the recurrent weights that lets the error signal arrive, found by measuring it."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bptt_jax import devices
from bptt_jax.analysis import verdict
from bptt_jax.analysis.flow import Levels, check_levels, measure_flow
from bptt_jax.analysis.flow_results import GradientFlow
from bptt_jax.analysis.growth import polynomial_order
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.checks import call_user_function, check_function, describe_shapes
from bptt_jax.leaves import dotted
from bptt_jax.recurrence.frozen import multiplies_state
from bptt_jax.results import Result, counted, field
from bptt_jax.step import (
    Array,
    Loss,
    Params,
    PyTree,
    Recurrence,
    State,
    Step,
    bind,
    check_step,
    full_precision,
)

Scale: TypeAlias = Callable[[Params, Array], Params]

# Factors are tried up and down to 16, by half octaves, and then halfway between the last two.
_STRIDE = math.log(2) / 2
_WALK = 8
_HALVINGS = 9


class GainTrials(Result):
    """The error signal with the recurrent weights times each of N factors, as `GradientFlow` has it.

    Attributes:
      factors: ``[N]``, in the order in which they were tried; the first is 1.
      growth_rate: ``[N]``, nats per step backwards.
      growth_rate_error: ``[N]``, its standard error.
      horizon: ``[N]``, steps.
      horizon_error: ``[N]``, of an extrapolated one.
      end_gain: ``[N]``, log of what arrives at the start.
      peak_gain: ``[N]``, log of the most that the recurrence has amplified.
    """

    factors: Float[Array, " N"] = field(dims=("trial",))
    growth_rate: Float[Array, " N"] = field(dims=("trial",))
    growth_rate_error: Float[Array, " N"] = field(dims=("trial",))
    horizon: Float[Array, " N"] = field(dims=("trial",))
    horizon_error: Float[Array, " N"] = field(dims=("trial",))
    end_gain: Float[Array, " N"] = field(dims=("trial",))
    peak_gain: Float[Array, " N"] = field(dims=("trial",))


class RecommendedGain(Result):
    """What was measured of factors on the recurrent weights; a pytree of arrays.

    Attributes:
      nearest: the factor nearest to 1 that was found to make the flow steady: 1 if it is so already, NaN if none was
        found, or nothing is measured.
      chosen: index of it among the trials; 0 where there is none.
      trials: all that were measured.
      spread: ``sqrt(D)`` times the standard deviation of the weights as they are, the gain of a random network, if
        they are one square matrix; else NaN.
      length: lags of the longest segment.
      threshold: that was given.
      log_gains: ``[T]``, of the signal as it is; see `SignalFlow`.
      lags: ``[T]``, of these.
      names: of the leaves of the parameters that are multiplied; empty with `scale`.
    """

    nearest: Float[Array, ""] = field(dims=())
    chosen: Int[Array, ""] = field(dims=())
    trials: GainTrials
    spread: Float[Array, ""] = field(dims=())
    length: Int[Array, ""] = field(dims=())
    threshold: Float[Array, ""] = field(dims=())
    log_gains: Float[Array, " T"] = field(dims=("time",))
    lags: Int[Array, " T"] = field(dims=("time",))
    names: tuple[str, ...] = field(static=True)

    _views: ClassVar = {"factor": ()}

    @property
    def factor(self) -> np.ndarray:
        """``[]``, what to multiply the recurrent weights with: `nearest`, but NaN where the signal grows as a power of
        the lag, as of a body that moves freely: a factor would make something else of it."""
        nearest = np.asarray(self.nearest, np.float64)
        orders = polynomial_order(self.lags, self.log_gains)
        return np.where(np.isnan(orders) | (nearest == 1), nearest, np.nan)

    @property
    def gain(self) -> np.ndarray:
        """``[]``, of a random network with these weights: `factor` times `spread`."""
        return self.factor * np.asarray(self.spread, np.float64)

    @property
    def statement(self) -> str:
        """What was found, in one line; of a batch, of the sequence whose factor is the median."""
        if self.nearest.ndim == 0:
            return self._said()
        flat = jax.tree.map(lambda a: np.asarray(a).reshape(-1, *np.shape(a)[self.nearest.ndim :]), self)
        order = np.argsort(flat.factor, kind="stable")  # NaN comes last
        one: RecommendedGain = jax.tree.map(lambda a: a[order[(len(order) - 1) // 2]], flat)
        known = flat.factor[~np.isnan(flat.factor)]
        spread = f" ({known.min():.3g} to {known.max():.3g})" if len(known) else ""
        return f"{counted(len(order), 'sequence')}, {len(known)} with a factor{spread}; the median: {one._said()}"

    def _said(self) -> str:
        factor, gain, length = float(self.factor), float(self.gain), int(self.length)
        if factor == 1:
            return f"steady as it is over {counted(length, 'step')}: no factor is wanted"
        rates, errors = np.asarray(self.trials.growth_rate), np.asarray(self.trials.growth_rate_error)
        none, tried = "no factor on the recurrent weights is recommended", np.asarray(self.trials.factors)
        if not math.isnan(float(self.nearest)) and math.isnan(factor):
            return f"{none}: the signal grows as a power of the lag, as of what moves freely"
        if math.isnan(factor) and np.all(tried == 1):
            return f"{none}: there is no signal to go by, or something is not finite"
        if math.isnan(factor):
            return (
                f"{none}: of those tried, {np.min(tried):.3g} to {np.max(tried):.3g}, none makes the flow steady over "
                f"{counted(length, 'step')}"
            )
        at = int(self.chosen)
        named = f" ({', '.join(self.names)})" if self.names else ""
        as_gain = "" if math.isnan(gain) else f", a gain of {gain:.3g},"
        horizon, error = (float(np.asarray(a)[at]) for a in (self.trials.horizon, self.trials.horizon_error))
        return (
            f"recurrent weights{named} times {factor:.4g}{as_gain} were measured: "
            f"{verdict.with_error(float(rates[at]), float(errors[at]))} instead of {float(rates[0]):.3g}, "
            f"{verdict.horizon_words(horizon, error, extrapolated=True)}, over {counted(length, 'step')}"
        )

    def _headline(self) -> str:
        return self.statement


def recommend_gain(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    args: PyTree = None,
    has_aux: bool = False,
    length: int | None = None,
    scale: Scale | None = None,
    threshold: float | Float[Array, ""] = 1e-3,
    share: float | Float[Array, ""] = 1e-3,
) -> RecommendedGain:
    """Which factor on the recurrent weights makes a vanishing or exploding flow steady, if any does.

    Of ``h = W h`` a factor f adds log f to the growth rate. Of a leaky or a saturating network it does not, and of
    one with gates it may do nothing: so the flow is measured again with the weights times f, for 18 values of f, up
    from 1 where the signal vanishes and down where it explodes, until it is steady, and then back to the smallest
    change that is enough. One program; the cost is that of 18 `bptt_jax.gradient_flow` with ``spectra=False``.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      loss, args, has_aux, threshold, share: as for `bptt_jax.gradient_flow`.
      scale: ``scale(params, factor) -> params``. By default every leaf of the parameters is multiplied by which the
        step multiplies the state (not a function of the leaf: of `bptt_jax.cells.lru`, whose eigenvalues are given
        by their logarithms, there is none), matrices only where there are any: neither biases nor input weights,
        of layers those between them too.

    Returns:
      A `RecommendedGain`. For a batch, ``jax.vmap`` over the sequences.

    Raises:
      TypeError, ValueError: an argument breaks the contract; no leaf of the parameters multiplies the state, and
        `scale` is None.

    Example:
      >>> w = 0.5 * jax.random.normal(jax.random.key(0), (32, 32)) / jnp.sqrt(32)
      >>> xs = jax.random.normal(jax.random.key(1), (100, 32)) / 8
      >>> leaky = lambda w, h, x: 0.8 * h + 0.2 * jnp.tanh(w @ h + x)
      >>> last = lambda states: jnp.sum(states[-1])
      >>> found = bptt.analysis.recommend_gain(leaky, w, jnp.zeros(32), xs, last)
      >>> [bptt.gradient_flow(leaky, f * w, jnp.zeros(32), xs, last).verdict for f in (1, float(found.factor))]
      ['vanishing', 'steady']
    """
    recurrence, bound = bind(step, params, state0, xs, length), bind_loss(loss, args, has_aux)
    levels = check_levels(threshold, share)
    if scale is not None:
        scale = check_function("scale", scale, "scale(params, factor) -> params")
    with full_precision():
        return _recommend_gain(recurrence, levels, bound, scale=scale)


class _Search(NamedTuple):
    """Logarithms of factors.

    Attributes:
      direction: 1 if the signal is to be made larger, -1 if smaller, 0 if there is nothing to do.
      short: the last that is not enough.
      enough: the nearest that is, or with which the states overflow; NaN before it is found.
      chosen: trial of it.
      steady: whether the flow is steady with it.
    """

    direction: Array
    short: Array
    enough: Array
    chosen: Array
    steady: Array


@devices.compiled
def _recommend_gain(
    recurrence: Recurrence, levels: Levels, loss: BoundLoss, *, scale: Scale | None
) -> RecommendedGain:
    recurrence = check_step(recurrence)
    params = jax.tree.map(jnp.asarray, recurrence.params)
    marks = _recurrent(recurrence) if scale is None else []
    paths = [dotted(path) or "params" for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    threshold = jnp.asarray(levels[0])
    level = jnp.log(threshold)

    def scaled(factor: Array) -> Params:
        if scale is not None:
            return _checked_scale(call_user_function("scale", "(params, factor)", scale, params, factor), params)
        leaves, structure = jax.tree.flatten(params)
        return jax.tree.unflatten(
            structure, [a * factor.astype(a.dtype) if m else a for a, m in zip(leaves, marks, strict=True)]
        )

    def measured(log_factor: Array) -> tuple[GradientFlow, Array]:
        factor = jnp.exp(log_factor)
        digits = jnp.where(factor < 1, 1000, 100)  # what is said is what was measured
        factor = jnp.round(factor * digits) / digits
        changed = replace(recurrence, params=scaled(factor))
        return measure_flow(changed, levels, loss, spectra=False)[0], factor

    def body(search: _Search, trial: Array) -> tuple[_Search, tuple[GainTrials, Array, Array, Array]]:
        beyond = search.short + search.direction * _STRIDE
        at = jnp.where(jnp.isnan(search.enough), beyond, (search.short + search.enough) / 2)
        flow, factor = measured(at)
        finite = flow.numerics.finite
        edge = level.astype(flow.end_gain.dtype)
        arrives, bounded = flow.end_gain >= edge, flow.peak_gain <= -edge
        steady = finite & arrives & bounded
        first = trial == 0
        wanted = jnp.where(bounded, jnp.where(flow.end_gain < edge, 1, 0), -1)
        wanted = jnp.where(finite, wanted, 0).astype(at.dtype)
        direction = jnp.where(first, wanted, search.direction)
        # States that overflow with a factor above 1 say that it is too large, not that more is wanted.
        far = jnp.where(direction > 0, ~finite | arrives, finite & bounded)
        enough = far & ~first & (direction != 0)
        lost = ~first & ~enough & jnp.isnan(search.enough) & (trial >= _WALK)
        new = _Search(
            jnp.where(lost, 0, direction),
            jnp.where(enough | first | (direction == 0), search.short, at),
            jnp.where(enough, at, search.enough),
            jnp.where(enough, trial, search.chosen),
            jnp.where(enough | first, steady, search.steady),
        )
        trials = GainTrials(
            factor,
            flow.growth_rate,
            flow.growth_rate_error,
            flow.horizon,
            flow.horizon_error,
            flow.end_gain,
            flow.peak_gain,
        )
        return new, (trials, flow.signal.log_gains, flow.signal.lags, flow.reach)

    zero = jnp.zeros_like(level)
    start = _Search(zero, zero, jnp.full_like(level, jnp.nan), jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    count = 1 + _WALK + _HALVINGS
    search, (trials, gains, lags, reach) = devices.scan(body, start, jnp.arange(count, dtype=jnp.int32))
    return RecommendedGain(
        nearest=jnp.where(search.steady, trials.factors[search.chosen], jnp.nan),
        chosen=search.chosen,
        trials=trials,
        spread=_spread([a for a, m in zip(jax.tree.leaves(params), marks, strict=False) if m]),
        length=reach[0],
        threshold=threshold,
        log_gains=gains[0],
        lags=lags[0],
        names=tuple(name for name, m in zip(paths, marks, strict=False) if m),
    )


def _spread(weights: list[Array]) -> Array:
    """Of a random matrix its gain; NaN where there is not one square matrix, or it leaves the range of its dtype."""
    if len(weights) != 1 or weights[0].ndim != 2 or len(set(weights[0].shape)) > 1:
        return jnp.full((), jnp.nan)
    gain = jnp.std(weights[0]) * math.sqrt(len(weights[0]))
    return jnp.where(gain < jnp.inf, gain, jnp.nan)


def _checked_scale(new: Params, params: Params) -> Params:
    expected, got = (jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a)), tree) for tree in (params, new))
    if expected != got:
        raise ValueError(
            f"scale: must return params as it was given, {describe_shapes(params)}, got {describe_shapes(new)}"
        )
    return new


def _recurrent(recurrence: Recurrence) -> list[bool]:
    """Which leaves of the parameters are multiplied.

    Raises:
      ValueError: there are none.
    """
    start = recurrence.begin(recurrence.state0, jax.tree.map(lambda a: a[0], recurrence.instants))
    x = jax.tree.map(lambda a: a[0], recurrence.instants.x)
    marks = multiplies_state(recurrence.step, recurrence.params, start, x)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(recurrence.params)]
    matrices = [m and len(shape) > 1 for m, shape in zip(marks, shapes, strict=True)]
    if not any(marks):
        raise ValueError(
            "scale: expected scale(params, factor) -> params, since the step multiplies the state by no leaf of "
            "params itself, got None"
        )
    return matrices if any(matrices) else marks
