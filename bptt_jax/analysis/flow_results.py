"""What `gradient_flow` returns, and what it says of itself: on the host, in NumPy."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Int, PyTree

from bptt_jax.analysis import verdict
from bptt_jax.analysis.averages import least_error
from bptt_jax.analysis.backward import TemporalContributions, not_seen
from bptt_jax.analysis.calibration import Calibration
from bptt_jax.analysis.growth import polynomial_order
from bptt_jax.recurrence.linearization import Mode
from bptt_jax.results import Result, field
from bptt_jax.step import State

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
      piece: ``[T]``, of each real step t -> t + 1 the number of resets up to it; -1 in padding.
      weight: of the growth rate, where those of several sequences are pooled: the sum of the squared lags about their
        mean.
    """

    adjoint_log_norms: Float[Array, " T"] = field(dims=("time",))
    log_gains: Float[Array, " T"] = field(dims=("time",))
    lags: Int[Array, " T"] = field(dims=("time",))
    piece: Int[Array, " T"] = field(dims=("time",))
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
      params_grad_log_norm: log of ``||dL/dparams||``, also where its entries leave the range of their dtype; -inf where
        it is zero, or lost beside the largest adjoint (`bptt_jax.adjoints`), which `statement` then says.
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
      growth_rate_error: its standard error, from the scatter of the single steps and their correlation in time; at
        least 8 roundings (1e-6 in single precision, 2e-15 in double).
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
        by: the loss depends on no state, or its signal has fewer than two steps to go. To judge by another threshold:
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
        """Plain numbers: mean, standard deviation and quartiles over the sequences in which they were measured, and the
        verdicts' counts; of a batch of several axes a list (of lists) of them."""
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

    def advice(self, *, gated: bool | None = None, calibrated: Mapping[str, Calibration] | None = None) -> Any:
        """What to try, a list of sentences, in order, with numbers from the measurement; empty if the flow is steady
        or unmeasured. Of a batch of several axes a list (of lists) of lists.

        Args:
          gated: whether the step has a forget or update gate, as lstm and gru; None, if unknown, gives the advice
            for both.
          calibrated: what `bptt_jax.calibrate` has found, by the name of the number, as ``{"gain": found}``: the advice
            then has its value, "gain 2.19 +- 0.03 would be steady".

        Raises:
          TypeError: `calibrated` is no mapping of names to `Calibration`.
        """
        found = [] if calibrated is None else _in_words(calibrated)
        return self._of_each(lambda flow: verdict.advise(_findings(_typical(flow), gated, found)))

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
      growth_rate_error: its standard error, from the scatter of the sequences' rates, and at least 8 roundings; that of
        a single one its own.
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
        scatter = np.maximum(scatter, least_error(np.asarray(flow.growth_rate).dtype))
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


def _typical(flow: GradientFlow) -> GradientFlow:
    """Of a batch whose gradients vanish the sequences that do: the horizons and lengths of others would not fit."""
    if flow.loss.ndim == 0 or flow.verdict != "vanishing":
        return flow
    vanishing = flow.verdicts == "vanishing"
    return jax.tree.map(lambda a: np.asarray(a)[vanishing], flow)


def _said(flow: GradientFlow) -> str:
    return verdict.state(_findings(flow, None))


def _summary(flow: GradientFlow) -> dict[str, Any]:
    """Of one sequence, or of a batch of one axis."""
    verdicts = flow.verdicts.ravel().tolist()
    names = ("loss", "growth_rate", "growth_rate_error", "horizon", "end_gain", "peak_gain")
    bad = np.asarray([v == "non-finite" for v in verdicts])

    def measured(name: str) -> np.ndarray:
        values = _flat(getattr(flow, name))
        return values[~np.isnan(values) | bad]

    found = {
        "verdict": flow.verdict,
        "verdicts": {v: verdicts.count(v) for v in verdict.SEVERITY if v in verdicts},
        "statement": _said(flow),
        **{name: verdict.describe(measured(name)) for name in names},
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


def _in_words(calibrated: Mapping[str, Calibration]) -> list[str]:
    if not isinstance(calibrated, Mapping) or not all(isinstance(c, Calibration) for c in calibrated.values()):
        raise TypeError(
            f"calibrated: expected names and what calibrate found, as {{'gain': found}}, got {calibrated!r}"
        )
    return [f"{name}{': ' if math.isnan(np.mean(c.value)) else ' '}{c.statement}" for name, c in calibrated.items()]


def _findings(flow: GradientFlow, gated: bool | None, calibrated: Sequence[str] = ()) -> verdict.Findings:
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
        hardly_read=hardly_read(flow),
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
        calibrated=list(calibrated),
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
        unseen=_unseen(flow),
    )


def _unseen(flow: GradientFlow) -> str:
    """Of gradients that came out as zero, though parts of them are not; empty if there is none."""
    whole = _flat(flow.numerics.params_grad_log_norm)
    parts = np.asarray(flow.contributions.log_norms, np.float64).reshape(len(whole), -1)
    parts = parts[(whole == -np.inf) & (np.max(parts, axis=1) > -np.inf)]
    if not len(parts):
        return ""
    said = not_seen("of step", parts[np.argmax(np.max(parts, axis=1))], 1)
    return said if len(whole) == 1 else f"in {len(parts)} of {len(whole)} sequences {said}"


def hardly_read(flow: GradientFlow) -> int:
    """States of the longest segment after that where its signal begins, if these are most of it and all is finite; else
    0. Of a batch of one axis the median, if that is so in most sequences that have a signal."""
    if flow.verdict == "non-finite":
        return 0
    lags, pieces = (np.atleast_2d(np.asarray(a)) for a in (flow.signal.lags, flow.signal.piece))
    reach = np.max(lags, axis=1)
    own = np.take_along_axis(pieces, np.argmax(lags, axis=1)[:, None], axis=1)
    later = np.sum(pieces == own, axis=1) - reach
    most = np.sort(later[(reach > 0) & (later > reach)])
    return int(most[(len(most) - 1) // 2]) if 2 * len(most) > np.sum(reach > 0) else 0


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
