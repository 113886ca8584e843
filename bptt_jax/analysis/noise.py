"""Signal and noise of a batch's gradient, by lag: from how far back can be learned at this batch size."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bptt_jax import devices
from bptt_jax.analysis.backward import backward
from bptt_jax.analysis.batches import Axes, Batch, FlatAxes, batch_size, check_axes, flat_axes, item, of_leaves
from bptt_jax.analysis.lags import check_longest, hoisted, inner, way_back
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.checks import check_function, check_positive_int
from bptt_jax.linalg import logscale
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.linalg.precision import wide
from bptt_jax.results import Result, field
from bptt_jax.step import Array, Loss, Params, PyTree, Recurrence, State, Step, bind


class GradientNoise(Result):
    """Signal and noise of a batch's mean gradient, by lag: of the parts ``g_k`` of `gradient_by_lag`.

    Attributes:
      lags: ``[K]``: 0 .. K - 1 real steps.
      log_norms: ``[K]``, natural logarithm of the norm of the sequences' mean part, its noise included; -inf where
        nothing comes from there.
      log_spreads: ``[K]``, of the root of the trace of the covariance of one sequence's part.
      signal_to_noise: ``[K]``, ``|E g_k|^2 / (tr cov g_k / B)`` at the batch size B, in power. The signal is
        estimated without bias, so the ratio is negative by chance where there is none; NaN where nothing comes from
        there.
      errors: ``[K]``, their standard errors, by the jackknife over sequences; NaN with only two.
      whole: of the whole gradient, whatever K is; NaN where it is zero, or lost beside the largest adjoint
        (`bptt_jax.adjoints`).
      whole_error: its standard error.
      batch_size: B.
      horizon: the lag at which `signal_to_noise` falls below 1, having been above; 0 if it never is, inf if it stays
        above up to the longest lag measured; NaN where a part is not finite.
    """

    lags: Int[Array, " K"] = field(dims=("lags",))
    log_norms: Float[Array, " K"] = field(dims=("lags",))
    log_spreads: Float[Array, " K"] = field(dims=("lags",))
    signal_to_noise: Float[Array, " K"] = field(dims=("lags",))
    errors: Float[Array, " K"] = field(dims=("lags",))
    whole: Float[Array, ""] = field(dims=())
    whole_error: Float[Array, ""] = field(dims=())
    batch_size: Int[Array, ""] = field(dims=())
    horizon: Float[Array, ""] = field(dims=())

    _views: ClassVar = {"batch_needed": ("lags",), "noise_scale": ()}

    @property
    def batch_needed(self) -> Float[Array, " K"]:
        """Sequences at which signal and noise of each lag's part are alike, ``tr cov g_k / |E g_k|^2``: that many in
        a batch, or ``batch_needed / batch_size`` updates averaged at unchanged parameters. inf where no signal is
        seen, NaN where `signal_to_noise` is."""
        return _over(self.batch_size[..., None], self.signal_to_noise)

    @property
    def noise_scale(self) -> Float[Array, ""]:
        """The same of the whole gradient: the simple noise scale of McCandlish et al. 2018, eq. 2.9."""
        return _over(self.batch_size, self.whole)

    def _headline(self) -> str:
        horizon, most, size = float(self.horizon), len(self.lags) - 1, int(self.batch_size)
        if math.isnan(horizon):
            return f"of the {size} sequences' gradients not all are finite"
        if math.isinf(horizon):
            return f"a batch of {size} tells every part up to a lag of {most} from noise"
        nothing = np.maximum(self.log_norms, self.log_spreads) == -np.inf
        if nothing.all():
            return f"nothing of the gradient comes from a lag of up to {most}"
        if horizon == 0:
            return f"a batch of {size} tells no part from noise"
        if nothing[int(horizon)]:
            seen = f"a batch of {size} tells parts up to a lag of {horizon - 1:.0f} from noise"
            return f"{seen}, and nothing comes from a lag of {horizon:.0f}"
        need = float(np.asarray(self.batch_needed)[int(horizon)])
        more = f"; the part from there needs {need:.3g}" if math.isfinite(need) else ""
        return f"at a batch of {size} noise prevails from a lag of {horizon:.0f} on{more}"


def gradient_noise(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    args: PyTree = None,
    in_axes: tuple[Axes, Axes, Axes] = (None, 0, 0),
    longest: int | None = None,
    batch: int | None = None,
    length: int | None = None,
) -> GradientNoise:
    """The signal-to-noise ratio of the gradient's part from every lag.

    A long lag may be out of reach though its error signal arrives: what differs from sequence to sequence drowns what
    they have in common. Of the sequences given, mean and covariance of every part are estimated; a batch of B of them
    has the mean's power as its signal and a B-th of the covariance's trace as its noise. Where the two are alike lies
    the noise scale of McCandlish et al. 2018 (arXiv:1812.06162, eq. 2.9 and appendix A.1), here of each lag by itself.

    Args:
      step, params: as for `bptt_jax.adjoints`.
      state0, xs, args: as for `bptt_jax.adjoints`, of a batch: where `in_axes` says so, with another axis.
      loss: of one sequence. The batch's is the mean.
      in_axes: where the batch is in ``(state0, xs, args)``, as for `jax.vmap`: by default in front of every leaf of
        `xs` and `args`, and nowhere in a `state0` that all sequences start from. Without inputs, ``(0, None, 0)``.
      longest: K, how many lags, at most; T by default.
      batch: B, the batch size that is asked about; as many as are given by default. More sequences make the
        estimates better.
      length: T, needed where nothing in `xs` tells it.

    Returns:
      `GradientNoise`. Cost O(T K) products with transposed Jacobians for each sequence, memory that of the backward
      passes of all sequences and a few gradients of the parameters for each.

    Raises:
      TypeError, ValueError: an argument breaks the contract, there is only one sequence, or the step has no backward
        pass.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> xs = 1 + jax.random.normal(jax.random.key(0), (64, 8))
      >>> found = bptt.analysis.gradient_noise(step, 0.5, jnp.zeros(()), xs, lambda states: states[-1], batch=4)
      >>> found.signal_to_noise.shape, float(found.horizon) >= 2
      ((8,), True)
    """
    step = check_function("step", step, "step(params, state, x) -> state")
    in_axes, given = check_axes(in_axes), (state0, xs, args)
    count = batch_size(params, given, in_axes)
    if count < 2:
        raise ValueError(f"batch: expected at least 2 sequences, whose gradients differ, got {count}")
    size = count if batch is None else check_positive_int("batch", batch)
    bound = bind_loss(loss, args)
    longest = None if longest is None else check_positive_int("longest", longest)
    return _gradient_noise(
        params,
        given,
        step=step,
        loss=bound.function,
        axes=flat_axes(given, in_axes),
        count=count,
        batch=size,
        longest=longest,
        length=length,
    )


def noise_of(
    one: Callable[[Array], tuple[Recurrence, BoundLoss]], count: int, batch: int, longest: int | None
) -> GradientNoise:
    """Of a batch, to be traced; ``one(i)`` is recurrence and loss of the i-th of `count` sequences."""

    kept: dict[str, Any] = {}

    def sequence(i: Array) -> tuple[LogScaled, list[Any], LogScaled]:
        # Parts of all sequences meet at every lag.
        done = backward(*one(i))
        signals, go = way_back(done.along, done.loss.states)
        constants, kept["go"] = hoisted(go, signals)
        kept["longest"] = check_longest(longest, done.along.recurrence.length)
        return signals, constants, done.params_grad.normalized()

    signals, constants, whole_parts = jax.vmap(sequence)(jnp.arange(count))

    def body(signals: LogScaled, _: None) -> tuple[LogScaled, _Compared]:
        parts, signals = jax.vmap(kept["go"])(constants, signals)
        return signals, _compared(parts)

    _, found = devices.scan(body, signals, None, length=kept["longest"])
    whole = _compared(whole_parts)

    def log_root(squares: Array) -> Array:
        none = squares == 0
        return logscale.to_log(jnp.where(none, 1, squares), found.exponent, half=True, zero=none)

    squares, spreads = jnp.mean(found.along_mean, axis=1), jnp.sum(found.off, axis=1) / (count - 1)
    ratios, errors = jax.vmap(lambda one: _ratio(one, batch))(found)
    whole_ratio, whole_error = _ratio(whole, batch)
    lags = jnp.arange(len(ratios))
    # From where it is seen first to where it is no longer.
    seen = ratios >= 1
    ends = ~seen & (jnp.cumsum(seen) > 0)
    end = jnp.where(jnp.any(ends), jnp.argmax(ends).astype(ratios.dtype), jnp.inf)
    log_norms = log_root(squares)
    finite = jnp.all(log_norms < jnp.inf)
    return GradientNoise(
        lags=lags,
        log_norms=log_norms,
        log_spreads=log_root(spreads),
        signal_to_noise=ratios,
        errors=errors,
        whole=whole_ratio,
        whole_error=whole_error,
        batch_size=jnp.asarray(batch),
        horizon=jnp.where(finite, jnp.where(jnp.any(seen), end, 0), jnp.nan),
    )


class _Compared(NamedTuple):
    """How the parts of S sequences lie to their mean.

    Attributes:
      exponent: squares are in units of ``4^exponent``.
      along_mean: ``[S]``, inner products with the mean.
      off: ``[S]``, squares of the distances from it.
    """

    exponent: Array
    along_mean: Float[Array, " S"]
    off: Float[Array, " S"]


def _compared(parts: LogScaled) -> _Compared:
    """Of parts with leaves ``[S, ...]``."""
    top = jnp.max(parts.exponent)
    alike = jax.tree.map(wide, parts.over(jnp.broadcast_to(top, parts.exponent.shape)))
    mean = jax.tree.map(lambda a: jnp.mean(a, axis=0), alike)

    def one(part: Params) -> tuple[Array, Array]:
        off = LogScaled(jax.tree.map(jnp.subtract, part, mean), top)
        return inner(LogScaled(part, top), LogScaled(mean, top)).mantissa, inner(off, off).mantissa

    return _Compared(top, *jax.vmap(one, axis_size=len(parts.exponent))(alike))


def _ratio(parts: _Compared, batch: int) -> tuple[Array, Array]:
    """Signal to noise, and its standard error by the jackknife."""
    _, along_mean, off = parts
    count = len(off)
    square, total = jnp.mean(along_mean), jnp.sum(off)

    def ratio(square: Array, total: Array, count: int) -> Array:
        variance = total / (count - 1)
        none = variance == 0
        found = batch * (square / jnp.where(none, 1, variance) - 1 / count)
        return jnp.where(none, jnp.where(square == 0, jnp.nan, jnp.inf), found)

    if count < 3:
        return ratio(square, total, count), jnp.full((), jnp.nan, square.dtype)
    others = count - 1
    # Mean and sum of squares of the others, each left out in turn.
    squares = square - 2 * (along_mean - square) / others + off / others**2
    without = jax.vmap(lambda s, c: ratio(s, total - count / others * c, others))(squares, off)
    return ratio(square, total, count), jnp.sqrt(others / count * jnp.sum(jnp.square(without - jnp.mean(without))))


def _over(batch: Array, ratio: Array) -> Array:
    # The ratio of no signal is at most 0 by chance; that of a NaN stays one.
    return jnp.where(ratio <= 0, jnp.inf, batch.astype(ratio.dtype) / jnp.where(ratio <= 0, 1, ratio))


@devices.compiled
def _gradient_noise(
    params: Params,
    given: Batch,
    *,
    step: Step,
    loss: Loss,
    axes: FlatAxes,
    count: int,
    batch: int,
    longest: int | None,
    length: int | None,
) -> GradientNoise:
    def one(i: Array) -> tuple[Recurrence, BoundLoss]:
        state0, xs, args = item(given, of_leaves(given, axes), i)
        return bind(step, params, state0, xs, length), bind_loss(loss, args)

    return noise_of(one, count, batch, longest)
