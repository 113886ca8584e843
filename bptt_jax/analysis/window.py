"""How long a window must be, from how the gradient decays with the lag."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bptt_jax import devices
from bptt_jax.checks import check_leaves, check_number, check_positive, check_positive_int, type_name
from bptt_jax.linalg.precision import wide
from bptt_jax.results import Result, counted, field
from bptt_jax.step import Array


class AdaptiveWindow(Result):
    """Bounds on the bias of truncation, for every window, and the shortest window that is good enough.

    Attributes:
      window: the shortest whose bound is at most `tolerance`; -1 if none of up to K steps is.
      windows: ``[K]``: 1 .. K steps.
      bias: ``[K]``, bound on ``||truncated - full|| / ||full||``; infinite where the gradient does not decay, or where
        what may be missing is as large as what was measured, or that is not finite; NaN where there is no gradient,
        or its norm was not to be had (log -inf).
      rate: of the decay, nats per step, negative where it decays: log of the paper's beta; -inf if nothing is left,
        NaN if what was measured is not finite.
      tolerance: as given.
    """

    window: Int[Array, ""] = field(dims=())
    windows: Int[Array, " K"] = field(dims=("windows",))
    bias: Float[Array, " K"] = field(dims=("windows",))
    rate: Float[Array, ""] = field(dims=())
    tolerance: Float[Array, ""] = field(dims=())

    def _headline(self) -> str:
        window, longest, rate = int(self.window), int(self.windows[-1]), float(self.rate)
        if np.isnan(self.bias).all():
            return "there is no gradient to truncate, or it underflows"
        if np.isnan(rate):
            return "the gradient is not finite"
        steps = counted(longest, "step")
        if not rate < 0:
            return f"the gradient does not decay over {steps}: no window bounds the bias"
        ends = f"the gradient ends within {steps}"
        decays = f"the gradient decays by {-rate:.3g} nats per step" if rate > -np.inf else ends
        if window < 0:
            least = float(np.min(self.bias))
            if least == np.inf:
                return f"{decays}: no window of up to {steps} bounds the bias"
            return f"{decays}: with {steps} the bias is at most {least:.2g}, above {float(self.tolerance):.2g}"
        return f"{decays}: with {counted(window, 'step')} the bias is at most {float(self.bias[window - 1]):.2g}"


def adaptive_window(
    log_norms: Float[Array, " K"] | np.ndarray,
    gradient_log_norm: Float[Array, ""] | float,
    *,
    tolerance: float | Float[Array, ""] = 0.1,
    k1: int | None = None,
) -> AdaptiveWindow:
    """How far truncated backpropagation through time must go back for its relative bias to stay below a bound.

    Adaptive truncation (Aicher, Foti, Fox 2019, arXiv:1905.07473, theorem 1 and section 4.2): of the gradient of one
    step's loss, the part ``g_k`` that comes through k steps decays geometrically from some lag on,
    ``||g_k|| <= c beta^k``, so that what a window leaves out is bounded by what was measured beyond it and by the rest
    of the geometric series, ``c beta^K / (1 - beta)``; the norm of the full gradient is at least that of the measured
    one less this rest. Here ``g_k`` is the part of the parameters' gradient itself, so that no bound on the immediate
    derivatives is needed. beta is fitted by least squares to ``log ||g_k||`` over the later half of the lags, and c is
    the least with which the series is above all of them.

    Args:
      log_norms: natural logs of ``||g_k||``, k = 0 .. K - 1: of `temporal_contributions` with a loss that reads the
        last state alone, in the reverse order, or of `gradient_by_lag` with one that reads no states before step K.
        Of a batch as one loss, or means over sequences.
      gradient_log_norm: natural log of ``||g_0 + .. + g_{K-1}||``: `Adjoints.params_log_norm` of the same loss.
      tolerance: the relative bias that is allowed, above 0.
      k1: steps between two backward passes, as for `bptt_jax.estimators.tbptt`: a loss goes back ``k2 - j`` steps if j
        more come before the pass, and the bias is the mean over j = 0 .. k1 - 1. None: disjoint windows, k1 = k2; 1:
        every loss goes back the whole window.

    Returns:
      `AdaptiveWindow`: of windows k2 = 1 .. K.

    Raises:
      TypeError, ValueError: an argument is out of its range; fewer than two lags.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> problem = step, 0.5, jnp.zeros(1), jnp.ones((40, 1)), lambda states: states[-1, 0]
      >>> by_step = bptt.temporal_contributions(*problem).log_norms
      >>> found = bptt.analysis.adaptive_window(by_step[::-1], bptt.adjoints(*problem).params_log_norm, k1=1)
      >>> int(found.window), bool(jnp.isclose(found.bias[3], 0.5**4, rtol=0.01))
      (4, True)
    """
    _check_log_norms(log_norms)
    gradient = check_number("gradient_log_norm", gradient_log_norm, "a number", lambda _: True)
    tolerance = check_positive("tolerance", tolerance)
    if k1 is not None:
        k1 = min(check_positive_int("k1", k1), len(log_norms))
    return _adaptive_window(log_norms, gradient, tolerance, k1=k1)


def _check_log_norms(log_norms: Any) -> None:
    check_leaves("log_norms", log_norms)
    if not isinstance(log_norms, (jax.Array, np.ndarray)) or not jnp.issubdtype(log_norms.dtype, jnp.floating):
        got = getattr(log_norms, "dtype", type_name(log_norms))
        raise TypeError(f"log_norms: expected a floating array [K], got {got}")
    if log_norms.ndim != 1 or len(log_norms) < 2:
        raise ValueError(f"log_norms: expected shape [K] of at least two lags, got {list(log_norms.shape)}")


@devices.compiled
def _adaptive_window(log_norms: Array, gradient: Any, tolerance: Any, *, k1: int | None) -> AdaptiveWindow:
    norms = wide(log_norms)
    gradient, tolerance = jnp.asarray(gradient, norms.dtype), jnp.asarray(tolerance, norms.dtype)
    count, lags = len(norms), jnp.arange(len(norms)).astype(norms.dtype)
    # A part that is less than the largest by the whole range of the dtype is none beside it.
    top = jnp.max(norms)
    top = jnp.where(top == -jnp.inf, 0, top)
    logs = norms - top
    rate, rest = _series(logs[count // 2 :], lags[count // 2 :], count)
    beyond = jnp.cumsum(jnp.exp(logs)[::-1])[::-1] + rest  # of lags k and more, k = 0 .. K - 1
    missing = jnp.append(beyond[1:], rest)  # of windows 1 .. K whose losses all go back that far
    if k1 is None or k1 == count:
        mean = jnp.cumsum(missing) / (lags + 1)
    else:
        total = jax.lax.reduce_window(missing, np.zeros((), norms.dtype), jax.lax.add, (k1,), (1,), [(k1 - 1, 0)])
        mean = total / jnp.minimum(lags + 1, k1)
    whole = jnp.exp(gradient - top) - rest
    bias = jnp.where(whole > 0, mean / jnp.where(whole > 0, whole, 1), jnp.inf)
    known = jnp.all(norms < jnp.inf) & (gradient < jnp.inf)
    rate, bias = jnp.where(known, rate, jnp.nan), jnp.where(known, bias, jnp.inf)
    bias = jnp.where(gradient == -jnp.inf, jnp.nan, bias)
    good = bias <= tolerance
    window = jnp.where(jnp.any(good), 1 + jnp.argmax(good), -1).astype(jnp.int32)
    return AdaptiveWindow(window, 1 + jnp.arange(count, dtype=jnp.int32), bias, rate, tolerance)


def _series(logs: Array, lags: Array, count: int) -> tuple[Array, Array]:
    """The rate of a geometric series above these, and its sum from lag `count` on."""
    there = logs > -jnp.inf
    known, many = jnp.where(there, logs, 0), jnp.sum(there).astype(logs.dtype)
    centre = jnp.sum(lags, where=there) / jnp.maximum(many, 1)
    across = jnp.where(there, lags - centre, 0)
    spread = jnp.sum(across**2)
    slope = jnp.sum(across * known) / jnp.where(spread > 0, spread, 1)
    # From a single lag no slope is known; where the last are zero, the signal has ended.
    rate = jnp.where(many > 1, slope, jnp.where(many > 0, 0, -jnp.inf))
    rate = jnp.where(there[-1], rate, -jnp.inf)
    decays = (rate < 0) & (rate > -jnp.inf)
    safe = jnp.where(decays, rate, -1)
    height = jnp.max(jnp.where(there, known - safe * lags, -jnp.inf))
    rest = jnp.exp(height + safe * count) / -jnp.expm1(safe)
    return rate, jnp.where(decays, rest, jnp.where(rate == -jnp.inf, 0, jnp.inf))
