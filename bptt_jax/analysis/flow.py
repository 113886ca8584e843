"""`gradient_flow`: all that one sequence tells about its gradient, in one streaming pass, with a verdict."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Complex, Float, Int

from bptt_jax.analysis import matrix_free, verdict
from bptt_jax.analysis.backward import TemporalContributions, contributions
from bptt_jax.analysis.error_signal import ErrorSignal, propagate_error_signal
from bptt_jax.analysis.float_range import float_range
from bptt_jax.analysis.growth import polynomial_order
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.checks import check_positive_int, check_share
from bptt_jax.leaves import dotted
from bptt_jax.linalg import logscale
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.linalg.products import identity, log_spectral_norm
from bptt_jax.linalg.spectra import eigenvalues, singular_values
from bptt_jax.recurrence.jacobians import jacobian_at, jacobians_at
from bptt_jax.recurrence.linearization import Linearization, Mode
from bptt_jax.results import Result, field
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
    choose,
    full_precision,
    ravel_state,
    state_size,
)
from bptt_jax.timeline import real_steps_first

Levels: TypeAlias = tuple[Array | np.ndarray, Array | np.ndarray]

# Numbers in one chunk of Jacobians: 2 MB in float32, of which some ten copies live at a time.
_CHUNK_NUMBERS = 1 << 19
# Operations of the dense path above which it is refused: hours on two cores, at the 10 GFLOP/s of LAPACK there.
_MOST_OPERATIONS = 5e13
# In D^3: of a product of matrices, of singular values, of eigenvalues (Golub and Van Loan, 8.6.4 and 7.5.6).
_PRODUCT, _SINGULAR, _EIGEN = 2, 8 / 3, 10


# Of the logarithms of singular values: what is less is rounding, or a part of the whole that does not matter.
_STRETCH = 0.01


class SignalFlow(Result):
    """The error signal, state by state.

    Attributes:
      adjoint_log_norms: ``[T]``, log of ``||dL/dh_t||`` (total derivatives), t = 1 .. T; NaN in padding.
      log_gains: ``[T]``, entry t is log of ``||(dh_s/dt)^T e|| / ||e||``, t = 0 .. T-1: what arrives at h_t of the
        error signal ``e = dl/dh_s`` of the last step s that the loss reads in this segment, followed alone. At a
        reset h_t is the state that the step starts from. NaN where there is no signal: for t >= s, and in padding.
      lags: ``[T]``, real steps from s back to t; 0 where there is no signal.
      weight: of the growth rate, where those of several sequences are pooled: the sum of the squared lags about their
        mean.
    """

    adjoint_log_norms: Float[Array, " T"] = field(dims=("time",))
    log_gains: Float[Array, " T"] = field(dims=("time",))
    lags: Int[Array, " T"] = field(dims=("time",))
    weight: Float[Array, ""] = field(dims=())


class LeafFlow(Result):
    """What arrives of the error signal in each of the L leaves of the state that hold floating numbers, in their order.
    Layers of `bptt_jax.stack`, c and h of an LSTM are seen apart.

    Attributes:
      log_norms: ``[T, L]``, as `SignalFlow.log_gains` of this leaf alone, relative to the norm of the whole signal at
        its start: -inf where nothing arrives in it. `GradientFlow.leaf_log_norms` has them like the state.
      growth_rate: ``[L]``, as in `GradientFlow`, from the first lag at which anything arrives in the leaf.
      growth_rate_error: ``[L]``, its standard error.
      horizon: ``[L]``, as in `GradientFlow`.
      horizon_extrapolated: ``[L]``, likewise.
      names: paths of the leaves.
      structure: of the state.
    """

    log_norms: Float[Array, "T L"] = field(dims=("time", "leaf"))
    growth_rate: Float[Array, " L"] = field(dims=("leaf",))
    growth_rate_error: Float[Array, " L"] = field(dims=("leaf",))
    horizon: Float[Array, " L"] = field(dims=("leaf",))
    horizon_extrapolated: Bool[Array, " L"] = field(dims=("leaf",))
    names: tuple[str, ...] = field(static=True)
    structure: Any = field(static=True)

    def _headline(self) -> str:
        columns = (self.growth_rate, self.growth_rate_error, self.horizon, self.horizon_extrapolated)
        rows = zip(self.names, *(np.asarray(c).tolist() for c in columns), strict=True)
        return "; ".join(
            f"{name} {verdict.with_error(rate, error)}, {verdict.horizon_words(steps, math.nan, beyond)}"
            for name, rate, error, steps, beyond in rows
        )


class ProductNorms(Result):
    """Products of Jacobians to the end of each segment: the most that any signal can grow.

    Attributes:
      log_norms: ``[T]``, entry t is log of ``||dh_e/dh_t||_2``, t = 0 .. T-1, with e the end of the segment that step
        t -> t + 1 belongs to; at its first step, h_t is the state that it starts from. Nothing passes a reset. NaN
        in padding.
      block_log_norms: ``[T, L]``, likewise of the diagonal block of ``dh_e/dh_t`` of each leaf of the state (see
        `LeafFlow`), by all paths, those through other leaves too. None where there is one leaf, and with `num`.
    """

    log_norms: Float[Array, " T"] = field(dims=("time",))
    block_log_norms: Float[Array, "T L"] | None = field(dims=("time", "leaf"))


class Spectra(Result):
    """Of single Jacobians dh_t/dh_{t-1}, in order of time; of real steps.

    Attributes:
      singular_values: ``[K, D]``, descending; with `num` the first so many.
      eigenvalues: ``[K, D]``, complex, by descending modulus, as many.
      steps: ``[K]``, the t of each: 1 .. T, or every `stride`-th real step counted back from the last. With padding
        there are fewer: -1 for those that are missing, at the end, whose values are NaN.
      complete: whether all D values are there.
    """

    singular_values: Float[Array, "K D"] = field(dims=("step", "unit"))
    eigenvalues: Complex[Array, "K D"] = field(dims=("step", "unit"))
    steps: Int[Array, " K"] = field(dims=("step",))
    complete: bool = field(static=True)


class Numerics(Result):
    """What is finite, and what floating numbers make of it.

    The last fields say what a backward pass without log scale, such as that of `jax.grad`, can give in the dtypes of
    the states and parameters. Lags are real steps from the last state that the loss reads in a segment back; each
    field is -1 where there is no such lag. All is judged by single entries.

    Attributes:
      finite: whether the loss, the adjoints and the parameters' gradient are, in numbers of unlimited range, and no
        state is NaN. Infinite states that spoil none of these (log-domain cells hold log 0) are no fault.
      in_range: whether all entries of the adjoints and the parameters' gradient are numbers of their dtypes, so that
        `jax.grad` gives them.
      first_nonfinite_state: index k of the first state (h_{k+1}) that is NaN or infinite, -1 if none.
      first_nonfinite_adjoint: index k of the first adjoint, going backwards, that is; -1 if none.
      params_grad_log_norm: log of ``||dL/dparams||``, also where its entries leave the range of their dtype.
      overflow_lag: the least lag at which an entry of the adjoint exceeds the largest number of its dtype, and is
        infinite or NaN in a plain backward pass.
      coarse_lag: from which on every entry of the adjoints is so small that at most half of the digits of its dtype
        are left: below ``2^5`` times the smallest number of float16. Where all below the normal numbers is taken for
        zero, as by CPUs of all dtypes but float16, below these: no digits are left then.
      lost_lag: from which on every entry is less than half of the smallest number of its dtype (of the smallest normal
        one, there): whatever a plain backward pass has, zero or what rounding left over, is wrong by 100 % or more.
      loss_scale_log2: k, by 2^k of which the loss is to be multiplied that no adjoint of more than `threshold` of the
        largest is below the normal numbers, as far as nothing overflows by it; 0 if that holds as it is.
      dtype: of the states; of several the one with the smallest range.
    """

    finite: Bool[Array, ""] = field(dims=())
    in_range: Bool[Array, ""] = field(dims=())
    first_nonfinite_state: Int[Array, ""] = field(dims=())
    first_nonfinite_adjoint: Int[Array, ""] = field(dims=())
    params_grad_log_norm: Float[Array, ""] = field(dims=())
    overflow_lag: Int[Array, ""] = field(dims=())
    coarse_lag: Int[Array, ""] = field(dims=())
    lost_lag: Int[Array, ""] = field(dims=())
    loss_scale_log2: Int[Array, ""] = field(dims=())
    dtype: str = field(static=True)


class GradientFlow(Result):
    """What backpropagation through time does to the gradient of one sequence; a pytree of arrays.

    Under ``jax.vmap`` every field has the batch as its first axis, and `verdict`, `summary` and `advice` speak of the
    whole batch; of several axes, they summarise the last and give an array or a list over the others. Logarithms are
    natural; a rate is in nats per step, positive where the signal grows on its way back. A segment is a stretch
    between resets: the whole sequence, where there are none; "the longest" is the one in which the signal has the
    longest way back.

    Attributes:
      loss: L, a scalar.
      growth_rate: nats per step backwards: the slope of ``signal.log_gains`` against the lag, by least squares,
        common to all segments; where the signal becomes exactly zero the line ends. NaN if there are fewer than two
        steps to measure.
      growth_rate_error: its standard error, from the scatter of the single steps and their correlation in time.
      horizon: steps until the signal of the longest segment has fallen to `threshold` for good. If the start of the
        segment cuts it off before, it is extrapolated by `growth_rate`, and inf if that does not fall.
      horizon_error: of an extrapolated horizon, from the rate's; 0 of a measured one.
      horizon_extrapolated: whether the horizon lies beyond what was measured.
      cut_lag: lag at which the signal of the longest segment becomes exactly zero; -1 if never. At the very start of
        a segment (log-domain cells that begin at -inf) that counts as nothing; before, the step itself erases what
        was, as a reset that was not declared does.
      end_gain: log of what arrives at the start of the longest segment.
      peak_gain: the largest, over t, of ``log ||dL/dh_t|| - log sum_k ||dl/dh_k||`` over k >= t in the segment: above
        0 only if the recurrence has amplified something.
      reach: lags of the longest segment.
      threshold: that was given.
      signal: the error signal, state by state.
      leaves: likewise leaf by leaf.
      contributions: what each step adds to the parameters' gradient.
      products: norms of products of Jacobians; None with ``spectra=False``.
      spectra: of single Jacobians; None with ``spectra=False``.
      numerics: what is finite.
      aux: what the loss returned beside it; None without ``has_aux=True``.
      mode: how the step was differentiated: "reverse" if it has no forward mode; see `bptt_jax.jacobians`.
    """

    loss: Float[Array, ""] = field(dims=())
    growth_rate: Float[Array, ""] = field(dims=())
    growth_rate_error: Float[Array, ""] = field(dims=())
    horizon: Float[Array, ""] = field(dims=())
    horizon_error: Float[Array, ""] = field(dims=())
    horizon_extrapolated: Bool[Array, ""] = field(dims=())
    cut_lag: Int[Array, ""] = field(dims=())
    end_gain: Float[Array, ""] = field(dims=())
    peak_gain: Float[Array, ""] = field(dims=())
    reach: Int[Array, ""] = field(dims=())
    threshold: Float[Array, ""] = field(dims=())
    signal: SignalFlow
    leaves: LeafFlow
    contributions: TemporalContributions
    products: ProductNorms | None
    spectra: Spectra | None
    numerics: Numerics
    aux: PyTree
    mode: Mode = field(static=True)

    @property
    def leaf_log_norms(self) -> State:
        """What arrives of the error signal in each leaf: like the state, leaves ``[T]``; see `LeafFlow`."""
        columns = np.moveaxis(np.asarray(self.leaves.log_norms), -1, 0)
        return jax.tree.unflatten(self.leaves.structure, [*columns])

    @property
    def verdicts(self) -> np.ndarray:
        """One for each sequence, an array of the batch's shape; see `verdict`."""
        columns = (self.end_gain, self.peak_gain, self.threshold, self.numerics.finite)
        with np.errstate(invalid="ignore"):  # NaN where nothing was measured
            judged = np.vectorize(verdict.judge, otypes=[object])(*map(np.asarray, columns))
        return np.asarray(judged, object)

    @property
    def verdict(self) -> Any:
        """ "vanishing", "exploding", "steady", "non-finite" or "unmeasured"; of a batch, the most frequent, of several
        axes an array of those along the last.

        Judged by what was measured, never by eigenvalues: "exploding" if an adjoint has grown to more than
        ``1 / threshold`` of what came in (`peak_gain`), "vanishing" if less than `threshold` of the error signal
        arrives at the start of the longest segment (`end_gain`). "unmeasured" if there is nothing to tell memory
        by: the loss reads no state, or its signal has fewer than two steps to go. To judge by another threshold:
        ``dataclasses.replace(flow, threshold=...)``.
        """
        verdicts = self.verdicts
        if verdicts.ndim < 2:
            return verdict.overall(verdicts.ravel().tolist())
        found = [verdict.overall(row) for row in verdicts.reshape(-1, verdicts.shape[-1]).tolist()]
        return np.asarray(found, object).reshape(verdicts.shape[:-1])

    @property
    def statement(self) -> str:
        """What was found, in one line; of a batch of several axes, a line for each entry of all but the last."""
        return "\n".join(np.ravel(self._of_each(_said)).tolist())

    def pooled(self) -> "PooledFlow":
        """Rate, error and horizon of a batch as of one measurement, along its last axis; see `PooledFlow`.

        Raises:
          ValueError: this is no batch.
        """
        if self.loss.ndim == 0:
            raise ValueError("pooled: expected a batch, as by jax.vmap, got the flow of one sequence")
        return _pooled(self)

    def summary(self) -> Any:
        """Plain numbers: mean, standard deviation and quartiles over the sequences, and the verdicts' counts; of a
        batch of several axes a list (of lists) of them."""
        return self._of_each(_summary)

    @property
    def clip_threshold(self) -> Any:
        """A threshold for clipping the global norm, from the distribution of norms over the sequences; of a batch of
        several axes a list (of lists).

        The 10th percentile of the gradient norms (AutoClip, Seetharaman et al. 2020, arXiv:2007.14469), but at
        most ten times the median norm that the gradient has before any Jacobian amplified it: ten is the upper
        end of the range that Pascanu et al. 2013 found to work, and where all sequences explode the percentile is
        itself the explosion. NaN where there is no finite gradient above zero to go by.
        """
        return self._of_each(_clip_threshold)

    def advice(self, *, gated: bool | None = None) -> Any:
        """What to try, a list of sentences, in order, with numbers from the measurement; empty if the flow is steady
        or unmeasured. Of a batch of several axes a list (of lists) of lists.

        Args:
          gated: whether the step has a forget or update gate, as lstm and gru; None, if unknown, gives the advice
            for both.
        """
        return self._of_each(lambda flow: verdict.advise(_findings(flow, gated)))

    def _of_each(self, function: Callable[["GradientFlow"], Any]) -> Any:
        """Of this, if it is one sequence or a batch of one axis; else a list of what it gives along the first axis."""
        if self.loss.ndim < 2:
            return function(self)
        here = jax.tree.map(np.asarray, self)
        return [jax.tree.map(lambda a, i=i: a[i], here)._of_each(function) for i in range(self.loss.shape[0])]

    def _headline(self) -> str:
        return self.statement.replace("\n", "; ")


class PooledFlow(Result):
    """What several sequences say together; ``[...]`` are the axes of the batch but the last. Sequences in which nothing
    was measured are left out.

    Attributes:
      growth_rate: ``[...]``, the slope common to all sequences, each weighted by its squared lags.
      growth_rate_error: its standard error, from the scatter of the sequences' rates; that of a single one its own.
      horizon: ``[...]``, the median.
      horizon_extrapolated: whether that one lies beyond what was measured.
      sequences: ``[...]``, how many were measured.
    """

    growth_rate: Float[np.ndarray, "..."] = field(dims=())
    growth_rate_error: Float[np.ndarray, "..."] = field(dims=())
    horizon: Float[np.ndarray, "..."] = field(dims=())
    horizon_extrapolated: Bool[np.ndarray, "..."] = field(dims=())
    sequences: Int[np.ndarray, "..."] = field(dims=())


def _flat(values: Any) -> np.ndarray:
    return np.ravel(np.asarray(values, np.float64))


def _median_index(values: np.ndarray) -> int:
    """Of the entry that is the lower median, NaN left out unless there is nothing else."""
    order = np.argsort(values, kind="stable")  # NaN comes last
    known = max(1, int(np.sum(~np.isnan(values))))
    return int(order[(known - 1) // 2])


def _pooled(flow: GradientFlow) -> PooledFlow:
    """Along the last axis."""
    names = ("growth_rate", "growth_rate_error", "horizon", "horizon_extrapolated")
    rates, errors, horizons, beyond = (np.asarray(getattr(flow, n), np.float64) for n in names)
    weights = np.asarray(flow.signal.weight, np.float64)
    known = np.isfinite(rates) & (weights > 0)
    weights = np.where(known, weights, 0)
    total = np.sum(weights, axis=-1)
    count = np.sum(known, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = np.sum(weights * np.where(known, rates, 0), axis=-1) / total
        around = weights * np.where(known, rates - rate[..., None], 0)
        scatter = np.sqrt(np.sum(around**2, axis=-1) * count / (count - 1)) / total
        own = np.sum(np.where(known, errors, 0), axis=-1) / count
    rows = horizons.reshape(-1, horizons.shape[-1])
    median = np.reshape([_median_index(row) for row in rows], horizons.shape[:-1])[..., None]
    return PooledFlow(
        growth_rate=rate,
        growth_rate_error=np.where(count > 1, scatter, own),
        horizon=np.take_along_axis(horizons, median, -1)[..., 0],
        horizon_extrapolated=np.take_along_axis(beyond, median, -1)[..., 0] > 0,
        sequences=count,
    )


def _said(flow: GradientFlow) -> str:
    return verdict.state(_findings(flow, None))


def _summary(flow: GradientFlow) -> dict[str, Any]:
    """Of one sequence, or of a batch of one axis."""
    verdicts = flow.verdicts.ravel().tolist()
    names = ("loss", "growth_rate", "growth_rate_error", "horizon", "end_gain", "peak_gain")
    found = {
        "verdict": flow.verdict,
        "verdicts": {v: verdicts.count(v) for v in verdict.SEVERITY if v in verdicts},
        "statement": _said(flow),
        **{name: verdict.describe(getattr(flow, name)) for name in names},
        "horizon_extrapolated": int(np.sum(flow.horizon_extrapolated)),
        "params_grad_log_norm": verdict.describe(flow.numerics.params_grad_log_norm),
        "clip_threshold": flow.clip_threshold,
        "mode": flow.mode,
    }
    if flow.spectra is not None:
        real = np.asarray(flow.spectra.steps) > 0
        found["spectral_norm"] = verdict.describe(np.asarray(flow.spectra.singular_values)[..., 0][real])
        found["spectral_radius"] = verdict.describe(np.abs(np.asarray(flow.spectra.eigenvalues))[..., 0][real])
    return found


def _clip_threshold(flow: GradientFlow) -> float:
    first = np.where(
        np.asarray(flow.signal.lags) == 1, np.asarray(flow.contributions.log_norms, np.float64), -np.inf
    )
    with np.errstate(over="ignore"):
        norms = np.exp(_flat(flow.numerics.params_grad_log_norm))
        plain = np.exp(np.max(first, axis=-1).ravel())
    limits = [np.quantile(norms[norms > 0], 0.1, method="inverted_cdf")] if np.any(norms > 0) else []
    plain = plain[(plain > 0) & np.isfinite(plain)]
    if len(plain):
        limits.append(10 * np.median(plain))
    return float(min(limits)) if limits and np.isfinite(min(limits)) else math.nan


def _findings(flow: GradientFlow, gated: bool | None) -> verdict.Findings:
    """Of one sequence, or what is typical of a batch of one axis."""
    pooled = _pooled(jax.tree.map(lambda a: np.asarray(a)[None], flow) if flow.loss.ndim == 0 else flow)
    numerics = flow.numerics
    horizons, ends, cuts = _flat(flow.horizon), _flat(flow.end_gain), _flat(flow.cut_lag)
    typical = _median_index(horizons)
    erased = cuts[(cuts >= 0) & (ends == -np.inf)]
    added = np.asarray(flow.contributions.log_norms, np.float64)
    spoilt = np.argwhere(~(added < np.inf))  # True for NaN too; -inf is the norm 0
    products: Any = [] if flow.products is None else np.argwhere(_nan_where_real(flow))

    scales = np.ravel(np.asarray(numerics.loss_scale_log2))

    def first(steps: Any) -> int:
        known = np.ravel(np.asarray(steps))
        return int(min(known[known >= 0], default=-1))

    def median(values: Any) -> float:
        flat = _flat(values)
        return float(flat[_median_index(flat)])

    return verdict.Findings(
        verdicts=flow.verdicts.ravel().tolist(),
        lengths=np.ravel(np.asarray(flow.reach)).tolist(),
        threshold=float(_flat(flow.threshold)[0]),
        rate=float(pooled.growth_rate),
        rate_error=float(pooled.growth_rate_error),
        horizon=float(horizons[typical]),
        horizon_error=float(_flat(flow.horizon_error)[typical]),
        extrapolated=bool(np.ravel(flow.horizon_extrapolated)[typical]),
        cut_lag=int(np.median(erased)) if len(erased) else -1,
        end_gain=median(flow.end_gain),
        peak_gain=median(flow.peak_gain),
        order=_order(flow),
        kept=_kept(flow),
        conserves=_conserves(flow),
        gated=gated,
        clip_threshold=_clip_threshold(flow),
        largest_gradient_log10=float(np.nanmax(added, initial=-np.inf)) / math.log(10),
        dtype=numerics.dtype,
        range_log10=math.log10(float(jnp.finfo(numerics.dtype).max)),
        in_range=bool(np.all(numerics.in_range)),
        overflow_lag=first(numerics.overflow_lag),
        coarse_lag=first(numerics.coarse_lag),
        lost_lag=first(numerics.lost_lag),
        loss_scale_log2=int(scales.min() if scales.min() < 0 else scales.max()),
        nonfinite_step=first(numerics.first_nonfinite_state),
        nonfinite_adjoint_step=first(numerics.first_nonfinite_adjoint),
        nonfinite_contribution_step=min((int(i[-1]) for i in spoilt), default=-1),
        nonfinite_product_step=max((int(i[-1]) for i in products), default=-1),
        nonfinite_losses=int(np.sum(~np.isfinite(np.asarray(flow.loss, np.float64)))),
    )


def _nan_where_real(flow: GradientFlow) -> np.ndarray:
    """Where the norm of a product is not finite, though a real step is there."""
    assert flow.products is not None
    padding = np.isnan(np.asarray(flow.signal.adjoint_log_norms, np.float64))
    return ~(np.asarray(flow.products.log_norms, np.float64) < np.inf) & ~padding


def _order(flow: GradientFlow) -> float:
    """The median power by which signals grow, if most do so as powers of the lag; else NaN."""
    orders = polynomial_order(flow.signal.lags, flow.signal.log_gains).ravel()
    known = orders[~np.isnan(orders)]
    return float(np.median(known)) if 2 * len(known) > len(orders) else math.nan


def _conserves(flow: GradientFlow) -> bool:
    """Whether the logarithms of the singular values add up to next to nothing, though they are not small."""
    if flow.spectra is None or not flow.spectra.complete:
        return False
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.asarray(flow.spectra.singular_values, np.float64))
    logs = logs[np.isfinite(logs).all(axis=-1)]
    if not len(logs):
        return False
    volume, stretch = np.abs(logs.sum(axis=-1)), np.abs(logs).sum(axis=-1)
    return bool(np.median(stretch) > _STRETCH and np.median(volume) < _STRETCH * np.median(stretch))


def _kept(flow: GradientFlow) -> float:
    """The mean eigenvalue of the Jacobians; NaN if they are not known in full."""
    if flow.spectra is None or not flow.spectra.complete:
        return math.nan
    values = np.real(np.asarray(flow.spectra.eigenvalues, np.complex128))
    with np.errstate(invalid="ignore"):
        return float(np.mean(values[np.isfinite(values)])) if np.any(np.isfinite(values)) else math.nan


def gradient_flow(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    args: PyTree = None,
    has_aux: bool = False,
    length: int | None = None,
    spectra: bool = True,
    stride: int = 1,
    num: int | None = None,
    threshold: float | Float[Array, ""] = 1e-3,
    share: float | Float[Array, ""] = 1e-3,
) -> GradientFlow:
    """Measures what backpropagation through time does to the gradient of one sequence.

    Streams: memory is O(T * D + chunk * D^2), never T Jacobians at once; with `num`, and with ``spectra=False``,
    O(T * D) and a constant, beside the parameters and their gradient. Products of matrices, the step's and the
    loss's too, are in full precision on every device.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      loss, args, has_aux: as for `bptt_jax.adjoints`.
      spectra: whether norms of products and spectra of Jacobians are wanted, by far the dearest part. Rate, horizon
        and verdict need no D x D matrix.
      stride: spectra of every stride-th real step's Jacobian only, counted back from the last. `Spectra` then has
        ``ceil(T / stride)`` rows. Eigenvalues are the dearest of all.
      num: of the spectra the first `num` values only, found without any D x D matrix as
        `bptt_jax.leading_singular_values` and `bptt_jax.leading_eigenvalues` do, within the errors that these
        give; the norms of the products by 32 steps of Golub-Kahan bidiagonalisation each, good to 1e-3 nats even
        of random matrices. These norms cost some 20 T^2 Jacobian-vector products and as many vector-Jacobian
        ones, where the dense way multiplies T matrices: it pays where D is in the thousands and T small against
        it. Below that, and wherever all values are wanted, leave it None.
      threshold: where a signal counts as gone, and its inverse where it counts as blown up. The gradient of B
        sequences carries sampling noise of the order of 1 / sqrt(B) of itself: what is left of 1e-3 lies below the
        noise of any batch smaller than a million sequences, so no optimiser can act on it; and a growth of 1e3
        turns the customary learning rates of 1e-3 and above into steps of the size of the parameters.
      share: the last state that the loss reads in a segment is the last whose immediate derivative exceeds this
        share of the largest there. A small penalty on later states does not count.

    Returns:
      A `GradientFlow`. For a batch, ``jax.vmap`` over the sequences.

    Raises:
      TypeError, ValueError: an argument breaks the contract; `threshold` or `share` is not between 0 and 1; the
        dense path would take more than 5e13 operations. NaN or infinity in the trajectory raises nothing: the
        verdict is "non-finite", and the fields or `advice` say where it began.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> flow = bptt.gradient_flow(step, 0.5, jnp.zeros(1), jnp.ones((20, 1)), lambda states: states[-1, 0])
      >>> flow.verdict, round(float(flow.growth_rate), 3)
      ('vanishing', -0.693)
      >>> flow.advice()[0]
      'the signal falls to 0.001 in 10 steps of 20: nothing older is learned'
    """
    recurrence, bound = bind(step, params, state0, xs, length), bind_loss(loss, args, has_aux)
    if not isinstance(spectra, bool):
        raise TypeError(f"spectra: expected True or False, got {type(spectra).__name__}")
    stride = check_positive_int("stride", stride)
    if num is not None:
        num = matrix_free.check_num(num, state0)
    elif spectra:
        _check_cost(recurrence, stride)
    levels = check_levels(threshold, share)
    with full_precision():
        return _gradient_flow(recurrence, levels, bound, spectra, stride, num)


def check_levels(threshold: float | Array, share: float | Array) -> Levels:
    """Returns both as arrays if they are numbers between 0 and 1."""
    return _check_level("threshold", threshold), _check_level("share", share)


def _check_level(name: str, value: float | Array) -> Array | np.ndarray:
    value = check_share(name, value)
    if isinstance(value, jax.core.Tracer):
        return jnp.asarray(value, float)
    return np.asarray(value, jnp.result_type(float))  # of NumPy: nothing is compiled for it


def _check_cost(recurrence: Recurrence, stride: int) -> None:
    """Raises ValueError where the dense path would take hours; decided before anything is traced."""
    size, steps = recurrence.size, recurrence.length
    rows = -(-steps // stride)
    operations = float(size) ** 3 * (steps * (_PRODUCT + _SINGULAR) + rows * (_SINGULAR + _EIGEN))
    if operations > _MOST_OPERATIONS:
        raise ValueError(
            f"spectra: of T = {steps} steps of a state of D = {size} numbers, norms of products and spectra would "
            f"take {operations:.1e} operations on matrices of {4 * size**2 / 1e9:.1f} GB, more than "
            f"{_MOST_OPERATIONS:.0e}; spectra=False measures rate, horizon and verdict without them, num= finds the "
            "first few values without any such matrix, stride= takes the spectra of fewer steps"
        )


@partial(jax.jit, static_argnames=("spectra", "stride", "num"))
def _gradient_flow(
    recurrence: Recurrence,
    levels: Levels,
    loss: BoundLoss,
    spectra: bool,
    stride: int,
    num: int | None,
) -> GradientFlow:
    return measure_flow(recurrence, levels, loss, spectra=spectra, stride=stride, num=num)[0]


def measure_flow(
    recurrence: Recurrence,
    levels: Levels,
    loss: BoundLoss,
    *,
    spectra: bool = True,
    stride: int = 1,
    num: int | None = None,
) -> tuple[GradientFlow, ErrorSignal]:
    """`gradient_flow` of checked arguments, to be traced, and the error signal that it comes from.

    Args:
      recurrence, loss: to be traced.
      levels: ``(threshold, share)``.
      spectra, stride, num: as for `gradient_flow`.
    """
    threshold, share = map(jnp.asarray, levels)
    recurrence = check_step(recurrence)
    signal = propagate_error_signal(recurrence, loss, threshold=threshold, share=share)
    done = signal.done
    along, params_grad = done.along, done.params_grad
    added = contributions(done, params_grad)
    norms = found = None
    if spectra:
        norms = _product_norms(along) if num is None else ProductNorms(matrix_free.suffix_log_norms(along), None)
        found = _spectra(along, stride, num, norms.log_norms)
    growth = signal.growth
    flow = GradientFlow(
        loss=done.loss.value,
        growth_rate=growth.rate,
        growth_rate_error=growth.rate_error,
        horizon=growth.horizon,
        horizon_error=growth.horizon_error,
        horizon_extrapolated=growth.extrapolated,
        cut_lag=growth.cut_lag,
        end_gain=growth.end_gain,
        peak_gain=signal.peak_gain,
        reach=signal.reach,
        threshold=threshold,
        signal=SignalFlow(signal.adjoint_log_norms, signal.gains, signal.lags, growth.weight),
        leaves=LeafFlow(
            log_norms=signal.leaf_gains,
            growth_rate=signal.leaf_growth.rate,
            growth_rate_error=signal.leaf_growth.rate_error,
            horizon=signal.leaf_growth.horizon,
            horizon_extrapolated=signal.leaf_growth.extrapolated,
            names=_leaf_names(along.no_cotangents),
            structure=jax.tree.structure(along.no_cotangents),
        ),
        contributions=added,
        products=norms,
        spectra=found,
        numerics=_numerics(signal, params_grad, threshold),
        aux=done.loss.aux,
        mode=along.mode,
    )
    return flow, signal


def _leaf_names(tree: PyTree) -> tuple[str, ...]:
    return tuple(dotted(path) or "state" for path, _ in jax.tree_util.tree_leaves_with_path(tree))


def _numerics(signal: ErrorSignal, params_grad: LogScaled, threshold: Array) -> Numerics:
    adjoints = signal.done.signal
    grad_log_norm = _log_norm_of_normalized(params_grad, signal.gains.dtype)
    found = float_range(adjoints, params_grad, signal.lags, threshold)
    kinds = [jnp.finfo(a.dtype) for a in jax.tree.leaves(adjoints.mantissa)]
    return Numerics(
        finite=signal.finite & (grad_log_norm < jnp.inf),  # False for NaN too; -inf is the norm 0
        in_range=found.in_range & (grad_log_norm < jnp.inf),
        first_nonfinite_state=signal.first_nonfinite_state,
        first_nonfinite_adjoint=signal.first_nonfinite_adjoint,
        params_grad_log_norm=grad_log_norm,
        overflow_lag=found.overflow_lag,
        coarse_lag=found.coarse_lag,
        lost_lag=found.lost_lag,
        loss_scale_log2=found.loss_scale_log2,
        dtype=str(min(kinds, key=lambda info: float(info.max)).dtype),
    )


def _log_norm_of_normalized(tree: LogScaled, dtype: jnp.dtype) -> Array:
    """As `LogScaled.log_norm`, which makes sure of the mantissa's size once more: a fifth of all compilation."""
    # As the shares of `bptt_jax.temporal_contributions` sum it, so that it is compiled once.
    total = sum(
        (jnp.sum(jnp.square(jnp.abs(g)), dtype=dtype) for g in jax.tree.leaves(tree.mantissa)), jnp.zeros((), dtype)
    )
    return logscale.to_log(jnp.where(total == 0, 1, total), tree.exponent, half=True, zero=total == 0)


def _product_norms(along: Linearization) -> ProductNorms:
    """Of dh_e/dh_t for all t, e the end of the segment."""
    recurrence = along.recurrence
    size, steps = recurrence.size, recurrence.length
    chunk = _chunk(size, steps)
    count = -(-steps // chunk)
    # Padding goes in front, where the backward recursion arrives last: what it adds is cut off again.
    padding = count * chunk - steps
    sizes = [state_size(leaf) for leaf in jax.tree.leaves(along.no_cotangents)]

    def in_chunks(tree: PyTree) -> PyTree:
        def cut(a: Array) -> Array:
            a = jnp.concatenate([jnp.repeat(a[:1], padding, axis=0), a])
            return a.reshape(count, chunk, *a.shape[1:])

        return jax.tree.map(cut, tree)

    def one_more(product: LogScaled, at: tuple[Array, Array | None]) -> tuple[LogScaled, LogScaled]:
        jacobian, reset = at
        product = product @ jacobian
        return (product if reset is None else choose(reset, empty, product)), product

    def body(product: LogScaled, at: tuple[State, Instant]) -> tuple[LogScaled, Array]:
        starts, instants = at
        matrices = jacobians_at(recurrence.step, recurrence.params, starts, instants.x, along.mode)
        if instants.real is not None:
            matrices = jnp.where(instants.real[:, None, None], matrices, empty.mantissa[None])
        product, found = jax.lax.scan(one_more, product, (matrices, instants.reset), reverse=True)
        norms = log_spectral_norm(found)[:, None]
        if len(sizes) > 1:
            blocks = _diagonal_blocks(_after(norms, found.mantissa), sizes)
            norms = jnp.concatenate([norms, log_spectral_norm(LogScaled(blocks, found.exponent[:, None]))], axis=1)
        return product, norms

    empty = identity(size, ravel_state(recurrence.state0)[0].dtype)
    _, norms = jax.lax.scan(body, empty, in_chunks((along.starts, recurrence.instants)), reverse=True)
    norms = norms.reshape(count * chunk, -1)[padding:]
    norms = jnp.where(recurrence.real[:, None], norms, jnp.nan)
    return ProductNorms(norms[:, 0], norms[:, 1:] if len(sizes) > 1 else None)


def _diagonal_blocks(matrices: Array, sizes: list[int]) -> Array:
    """``[K, D, D] -> [K, leaves, d, d]``, padded with zeros to the largest, which leaves their norm as it is."""
    largest, blocks, first = max(sizes), [], 0
    for size in sizes:
        block = matrices[:, first : first + size, first : first + size]
        blocks.append(jnp.pad(block, ((0, 0), (0, largest - size), (0, largest - size))))
        first += size
    return jnp.stack(blocks, axis=1)


def _spectra(along: Linearization, stride: int, num: int | None, after: Array) -> Spectra:
    """Of every stride-th real step, counted back from the last; begun when `after` is there."""
    recurrence = along.recurrence
    steps, real = recurrence.length, recurrence.instants.real
    if real is None:
        chosen = jnp.arange((steps - 1) % stride, steps, stride)
        missing = jnp.zeros(chosen.shape, bool)
    else:
        count = jnp.sum(real)
        order = (count - 1) % stride + stride * jnp.arange(-(-steps // stride))
        missing = order >= count
        chosen = real_steps_first(real)[jnp.where(missing, 0, order)]
    states, xs = jax.tree.map(lambda a: a[chosen], (_after(after, along.starts), recurrence.instants.x))
    sv, ev = spectra_at(recurrence.step, recurrence.params, states, xs, num, along.mode)
    return Spectra(
        jnp.where(missing[:, None], jnp.nan, sv),
        jnp.where(missing[:, None], jnp.nan, ev),
        jnp.where(missing, -1, 1 + chosen),
        sv.shape[1] == recurrence.size,
    )


def spectra_at(
    step: Step, params: Params, states: State, xs: PyTree, num: int | None, mode: Mode
) -> tuple[Float[Array, "K D"], Complex[Array, "K D"]]:
    """Singular values and eigenvalues, all or `num`, at each of K given states (leaves ``[K, ...]``) and inputs."""
    if num is not None:
        return (
            matrix_free.singular_values_at(step, params, states, xs, num, mode).values,
            matrix_free.eigenvalues_at(step, params, states, xs, num, mode).values,
        )

    def at(inputs: tuple[State, PyTree]) -> tuple[Array, Array]:
        jac = jacobian_at(step, params, *inputs, mode=mode)
        sv = singular_values(jac)
        return sv, eigenvalues(_after(sv, jac))

    size = state_size(jax.tree.map(lambda a: a[0], states))
    return jax.lax.map(at, (states, xs), batch_size=_chunk(size, jax.tree.leaves(states)[0].shape[0]))


def _after(value: Array, tree: PyTree) -> PyTree:
    """`tree`, but only once `value` is there: on CPU, two LAPACK loops at one time may block each other."""
    never = jnp.ravel(value)[0] > jnp.inf  # which the compiler does not know

    def later(a: Array) -> Array:
        # Of counters and keys too: what is chosen is never the other.
        return jnp.where(never, jnp.roll(a, 1, axis=0), a)

    return jax.tree.map(later, tree)


def _chunk(size: int, steps: int) -> int:
    return max(1, min(steps, _CHUNK_NUMBERS // size**2))
