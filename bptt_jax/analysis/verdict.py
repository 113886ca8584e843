"""From measured numbers to words: on the host, in NumPy, from arrays and never from models.

The words name no argument of a function: who reads them may have called another, or given a command.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from bptt_jax.results import counted

Verdict: TypeAlias = Literal["unmeasured", "steady", "vanishing", "exploding", "non-finite"]

SEVERITY: tuple[Verdict, ...] = ("unmeasured", "steady", "vanishing", "exploding", "non-finite")

_FACTOR = "bptt_jax.analysis.recommend_gain measures whether a factor on the recurrent weights does it, and which"
_CLIP_ADJOINTS = "bptt_jax.remedies.clip_adjoints"
_SCALED = "take it from bptt_jax.adjoints, whose scaled.params_grad.clipped is finite at any size"
_LARGEST_SCALE = 127  # binary digits of a loss scale, a number of float32 at least
_LEAKY = 0.5  # of itself that a unit keeps in a step, from which on it is taken for one that integrates


def judge(end_gain: float, peak_gain: float, threshold: float, finite: bool) -> Verdict:
    """One sequence's verdict.

    Args:
      end_gain: log of what is left of the error signal at the start of its longest segment; NaN if there is nothing
        to tell by.
      peak_gain: log of the largest adjoint relative to what an isometry would have carried.
      threshold: see `bptt_jax.gradient_flow` for its reason.
      finite: whether all of the forward and backward pass is.
    """
    if not finite:
        return "non-finite"
    if peak_gain > -math.log(threshold):
        return "exploding"
    if math.isnan(end_gain):
        return "unmeasured"
    return "vanishing" if end_gain < math.log(threshold) else "steady"


def overall(verdicts: list[Verdict]) -> Verdict:
    """The most frequent verdict of a batch, the graver one of two equally frequent; one NaN spoils a batch, and where
    nothing was measured does not count."""
    if "non-finite" in verdicts:
        return "non-finite"
    count: Counter[Verdict] = Counter(v for v in verdicts if v != "unmeasured")
    return max(count, key=lambda v: (count[v], SEVERITY.index(v)), default="unmeasured")


def describe(values: Any) -> dict[str, float]:
    """Mean, standard deviation, and the quartiles, which infinities (a horizon without end) leave meaningful; of
    nothing they are NaN."""
    values = np.asarray(values, np.float64).ravel()
    if not values.size:
        return dict.fromkeys(("mean", "std", "q25", "median", "q75"), math.nan)
    finite = bool(np.all(np.isfinite(values)))
    q = np.quantile(values, [0.25, 0.5, 0.75], method="inverted_cdf")
    with np.errstate(invalid="ignore"):
        return {
            "mean": float(values.mean()),
            "std": float(values.std()) if finite else math.nan,
            "q25": float(q[0]),
            "median": float(q[1]),
            "q75": float(q[2]),
        }


# Of a table of gradient flows: a name, and what `table_row` gives.
COLUMNS = (
    "cell", "loss", "spectral\nnorm", "spectral\nradius", "growth rate\nnats/step back", "horizon\nsteps", "verdict",
)  # fmt: skip


def table_row(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Cells under `COLUMNS` but the first, from what `GradientFlow.summary` gives, or its JSON."""
    means = (summary[k]["mean"] if k in summary else None for k in ("loss", "spectral_norm", "spectral_radius"))
    rate, verdicts, horizon = summary["growth_rate"], summary["verdicts"], float(summary["horizon"]["median"])
    total = sum(verdicts.values())
    measured = total - verdicts.get("unmeasured", 0)
    beyond = math.isfinite(horizon) and 2 * summary["horizon_extrapolated"] > measured
    steps = "unknown" if math.isnan(horizon) else f"{horizon:.0f}"
    mean, std = float(rate["mean"]), float(rate["std"])
    return (
        *map(_three_digits, means),
        plus_minus(mean, math.nan if measured == 1 else std),
        f"{steps}\n(extrapolated)" if beyond else steps,
        f"{summary['verdict']}\n({verdicts[summary['verdict']]} of {total})",
    )


def plus_minus(value: float, error: float) -> str:
    """With its sign, and the error where there is one, which that of an infinite number is not."""
    if math.isnan(value):
        return "unknown"
    return f"{value:+.4f}" + (f" ± {error:.4f}" if math.isfinite(value) and not math.isnan(error) else "")


def _three_digits(value: Any) -> str:
    """After the point; of a large number all in all, so that a column stays as wide as it is. A dash for None."""
    if value is None:
        return "-"
    number = float(value)
    return f"{number:.3g}" if 1e5 <= abs(number) < float("inf") else f"{number:.3f}"


class Findings(NamedTuple):
    """What is put into words: of one sequence, or typical of a batch.

    Attributes:
      verdicts: of every sequence.
      lengths: lags of the longest segment of every sequence.
      hardly_read: states after those that the loss depends on, where that is most of a sequence; else 0.
      threshold: where a signal counts as gone.
      rate, rate_error: nats per step backwards.
      horizon, horizon_error, extrapolated: the median sequence's.
      cut_lag: the median lag at which the step itself erases the signal, among the sequences in which it does so
        within a segment; -1 if there is none.
      end_gain, peak_gain: logs, medians.
      order: power of the lag by which the signal grows, where it is a power and no exponential; else NaN.
      kept: mean eigenvalue of the Jacobians, the share of itself that a unit keeps in a step; NaN if unknown.
      conserves: whether the Jacobians stretch some directions and shrink others by as much, as in a system without
        friction; False if unknown.
      gated: whether the step has a forget or update gate; None if unknown.
      calibrated: what was measured to be steady, in sentences; empty if nothing was.
      clip_threshold: NaN if there is none to recommend.
      largest_gradient_log10: of what one step adds to the gradient.
      dtype: of the states.
      range_log10: of the largest number that it holds.
      in_range: whether the backward pass is in that range.
      overflow_lag, coarse_lag, lost_lag: the first of the batch, or -1; see `bptt_jax.analysis.flow_results.Numerics`.
      loss_scale_log2: of the batch, the one that is least likely to overflow.
      nonfinite_step, nonfinite_adjoint_step, nonfinite_contribution_step: the first of the batch, counted from 0, or
        -1; of the products the last.
      nonfinite_product_step: t such that dh_e/dh_t is the last product that is not finite, -1 if all are.
      nonfinite_losses: how many.
      unseen: what there is to say of gradients of the parameters that came out as zero, though parts are not; empty if
        there is none.
    """

    verdicts: list[Verdict]
    lengths: list[int]
    hardly_read: int
    threshold: float
    rate: float
    rate_error: float
    horizon: float
    horizon_error: float
    extrapolated: bool
    cut_lag: int
    end_gain: float
    peak_gain: float
    order: float
    kept: float
    conserves: bool
    gated: bool | None
    calibrated: list[str]
    clip_threshold: float
    largest_gradient_log10: float
    dtype: str
    range_log10: float
    in_range: bool
    overflow_lag: int
    coarse_lag: int
    lost_lag: int
    loss_scale_log2: int
    nonfinite_step: int
    nonfinite_adjoint_step: int
    nonfinite_contribution_step: int
    nonfinite_product_step: int
    nonfinite_losses: int
    unseen: str

    @property
    def verdict(self) -> Verdict:
        return overall(self.verdicts)

    @property
    def length(self) -> int:
        """Typical lags."""
        return sorted(self.lengths)[(len(self.lengths) - 1) // 2]


def with_error(rate: float, error: float) -> str:
    """A rate with its standard error."""
    if math.isnan(rate):
        return "rate unknown"
    return f"{rate:.3g} nats per step" if math.isnan(error) else f"{rate:.3g} +- {error:.2g} nats per step"


def horizon_words(horizon: float, error: float, extrapolated: bool) -> str:
    """A horizon, marked where it is extrapolated."""
    if math.isnan(horizon):
        return "horizon unknown"
    if math.isinf(horizon):
        return "no horizon in sight"
    if not extrapolated:
        return f"horizon {counted(math.ceil(horizon), 'step')}"
    reach = f"{horizon:.3g}{'' if math.isnan(error) else f' +- {error:.2g}'}"
    return f"horizon {counted(reach, 'step')}, extrapolated"


def state(f: Findings) -> str:
    """What was found, in one line."""
    said = _state_of_batch(f) if len(f.verdicts) > 1 else _state_of_one(f)
    unseen = "" if f.verdict == "non-finite" else f.unseen
    return "; ".join(filter(None, [said, hardly_read_words(f.hardly_read), _in_its_dtype(f), unseen]))


def hardly_read_words(states: int) -> str:
    """Of so many, where there are any: of a loss of squares, say, and states that decay."""
    return f"the loss hardly depends on the {states} later states" if states else ""


def _in_its_dtype(f: Findings) -> str:
    """What a backward pass without log scale gives, where that is not all of the truth."""
    if f.verdict in ("unmeasured", "non-finite"):
        return ""
    if not f.in_range:
        where = f"{f.dtype} overflows" + f" at lag {f.overflow_lag}" * (f.overflow_lag >= 0)
        return f"{where}: the gradient of jax.grad is infinite or NaN"
    # What is lost beyond the horizon is none of the signal.
    reach = f.length if math.isnan(f.horizon) else min(f.length, math.ceil(min(f.horizon, 1e9)))
    if not 0 <= f.coarse_lag < reach:
        return ""
    lost = f", and all from lag {f.lost_lag} on" if 0 <= f.lost_lag < reach else ""
    return f"{f.dtype} has lost half of the signal's digits from lag {f.coarse_lag} on{lost}"


def _state_of_one(f: Findings) -> str:
    rate = with_error(f.rate, f.rate_error)
    match f.verdict:
        case "unmeasured" if f.length == 0:
            return (
                "unmeasured: the loss has a derivative of exactly zero at every state that a step leads to: it reads "
                "none, or is flat there (a square of states that have decayed to zero, a target that is met)"
            )
        case "unmeasured":
            return "unmeasured: the error signal has less than two steps to go back"
        case "non-finite":
            return f"non-finite: {_what_is_not_finite(f)}"
        case "vanishing" if f.cut_lag >= 0:
            after = f"{f.cut_lag} of {counted(f.length, 'step')}"
            cut = f"the step itself makes the error signal exactly zero after {after}"
            return f"vanishing: {cut}; {rate} before" if f.cut_lag > 2 else f"vanishing: {cut}"
        case "vanishing":
            end = math.ceil(f.horizon)
            left = f"less than {f.threshold:g} of the signal is left after {end} of {counted(f.length, 'step')}"
            return f"vanishing: {left}; {rate}"
        case "exploding":
            how = rate if math.isnan(f.order) else f"as lag^{f.order:.1f}"
            return f"exploding: adjoints grow {_plain(f.peak_gain)}-fold within {counted(f.length, 'step')}; {how}"
    horizon = horizon_words(f.horizon, f.horizon_error, f.extrapolated)
    return (
        f"steady: {horizon}; {rate}; {_plain(f.end_gain)} of the signal is left after {counted(f.length, 'step')}"
    )


def _state_of_batch(f: Findings) -> str:
    counts = [f"{f.verdicts.count(v)} {v}" for v in SEVERITY if v in f.verdicts]
    parts = [f"{len(f.verdicts)} sequences, {', '.join(counts)}"]
    if f.verdict == "non-finite":
        return f"{parts[0]}: {_what_is_not_finite(f)}"
    if not math.isnan(f.order):
        parts.append(f"as lag^{f.order:.1f}")
    elif not math.isnan(f.rate):
        parts.append(with_error(f.rate, f.rate_error))
        parts.append(horizon_words(f.horizon, f.horizon_error, f.extrapolated))
    if min(f.lengths) < max(f.lengths):
        lengths = {v: [n for n, w in zip(f.lengths, f.verdicts, strict=True) if w == v] for v in SEVERITY}
        spans = [f"{v} {_span(found)}" for v, found in lengths.items() if found]
        said = ", ".join(spans) if len(spans) > 1 else _span(f.lengths)
        parts.append(f"they differ in length: {said} steps")
    return "; ".join(parts)


def _span(lengths: list[int]) -> str:
    low, high = min(lengths), max(lengths)
    return str(low) if low == high else f"{low} to {high}"


def _plain(log: float) -> str:
    """exp(log), which may be no float, with two digits."""
    if not math.isfinite(log):
        return "0" if log < 0 else str(log)
    if abs(log) < 600:
        return f"{math.exp(log):.2g}"
    return f"1e{round(log / math.log(10)):+d}"


def advise(f: Findings) -> list[str]:
    """What to try, with numbers from the measurement."""
    match f.verdict:
        case "non-finite":
            return [_what_is_not_finite(f)]
        case "vanishing":
            tries = _against_vanishing(f)
        case "exploding":
            tries = _against_explosion(f)
        case _:
            tries = []
    scale, largest = f.loss_scale_log2, max(_LARGEST_SCALE, f.range_log10 / math.log10(2))
    if (said := _in_its_dtype(f)) and 0 < abs(scale) < largest:
        kept = f"{said}: with the loss times 2^{scale}, and the gradient divided by it, it is kept"
        beyond = not f.in_range and f.largest_gradient_log10 >= f.range_log10  # would be infinite again
        tries.append(f"{said}: with the loss times 2^{scale} it is kept, to be clipped there" if beyond else kept)
    if f.nonfinite_product_step >= 0:
        tries.append(
            f"norms of products and spectra are NaN from dh_{f.nonfinite_product_step + 1}/dh_"
            f"{f.nonfinite_product_step} on, where the forward Jacobian is NaN though the backward pass is finite (a "
            "log-sum-exp of -inf is such a case): the gradient is not touched"
        )
    return tries


def _what_is_not_finite(f: Findings) -> str:
    if f.nonfinite_step >= 0:
        where = f"the state is first NaN or infinite at h_{f.nonfinite_step + 1}"
        if max(f.nonfinite_adjoint_step, f.nonfinite_contribution_step) < 0 and not f.nonfinite_losses:
            return (
                f"{where}, though the gradient is finite: in log domain, give a large negative number for log 0, -1e30 "
                "say, in state0 and parameters, and all is measured"
            )
        return f"{where}: bound the activation or lower the recurrent gain, and look at that input"
    if f.nonfinite_adjoint_step >= 0:
        return (
            f"the backward pass is first NaN or infinite at dL/dh_{f.nonfinite_adjoint_step + 1}: "
            "look for a derivative that is infinite there (sqrt or norm at 0, log of 0)"
        )
    if f.nonfinite_losses > 0:
        return "the loss is NaN or infinite though all states are finite: look into the loss"
    if f.nonfinite_contribution_step >= 0:
        t = f.nonfinite_contribution_step + 1
        bounded = "x_1 or h_0" if t == 1 else f"x_{t}"
        return (
            f"states and adjoints are finite, but what step {t} adds to the gradient is not: look for an "
            f"infinity that the step bounds ({bounded}), or an infinite derivative with respect to a "
            "parameter (sqrt or norm at 0)"
        )
    return "dh_1/dh_0 is NaN or infinite: look for a derivative that is infinite at h_0"


def _against_vanishing(f: Findings) -> list[str]:
    if f.cut_lag >= 0:
        return [
            f"the signal is exactly zero from {counted(f.cut_lag, 'step')} back on, of {f.length}: the step itself "
            "erases the state there (a unit that is off or saturated, or a new episode, which is to be declared as a "
            "reset)"
        ]
    length, end = f.length, math.ceil(f.horizon)
    tries = [f"the signal falls to {f.threshold:g} in {counted(end, 'step')} of {length}: nothing older is learned"]
    # A unit that keeps a share p of itself at every step keeps p^T of it over T.
    share = f.threshold ** (1 / length)
    if f.gated:
        tries.append(
            f"its forget (update) gate at a bias of {_logit(share):.1f} or more, to reach back "
            f"{counted(length, 'step')}"
        )
    elif f.kept >= _LEAKY:
        tries.append(
            f"a unit keeps {f.kept:.2g} of itself in a step: at {share:.3g} or more (a smaller leak, a smaller time "
            f"step, an update gate at a bias of {_logit(share):.1f}) it reaches back {counted(length, 'step')}"
        )
    else:
        tries.append(
            f"gru or lstm, with the forget (update) gate at a bias of {_logit(share):.1f} or more, to reach back "
            f"{counted(length, 'step')}"
        )
    tries += _what_is_steady(f)
    if 2 * end <= length:
        # Of the signal: where parameters act early alone, the gradient may come from there.
        tries.append(
            f"truncating at {counted(end, 'step')} cuts off less than {f.threshold:g} of the signal; "
            "bptt_jax.truncation_bias measures what the gradient loses by it"
        )
    return tries


def _against_explosion(f: Findings) -> list[str]:
    tries = []
    if not f.in_range and f.largest_gradient_log10 < f.range_log10:
        tries.append(
            f"adjoints leave {f.dtype} though the gradient does not: {_SCALED}; or clip dL/dh on its way back "
            f"({_CLIP_ADJOINTS}), or truncate"
        )
    elif not f.in_range:
        tries.append(
            f"the gradient itself leaves {f.dtype} (1e{f.largest_gradient_log10:.0f}, which ends at "
            f"1e{f.range_log10:.0f}), so no clip of what jax.grad gives can help: {_SCALED}; or clip dL/dh on its way "
            f"back ({_CLIP_ADJOINTS}), or truncate"
        )
    else:
        if math.isfinite(f.clip_threshold):
            tries.append(f"clip the global norm at {f.clip_threshold:.2g}")
        if f.largest_gradient_log10 > f.range_log10 / 2:
            tries.append(
                f"gradient norms reach 1e{f.largest_gradient_log10:.0f}, whose squares overflow (from "
                f"1e{f.range_log10 / 2:.0f} on) though every entry is finite: use bptt_jax.clip_by_global_norm, whose "
                "norm cannot overflow"
            )
    if not math.isnan(f.order):
        tries.append(
            f"the growth is polynomial, as lag^{f.order:.1f}, not exponential, as of what moves freely: no factor on "
            "weights is a remedy; scale the loss or the learning rate by it, or ask for less at a time (a shorter "
            "sequence)"
        )
        return tries
    if f.conserves:
        tries.append(
            "the Jacobians stretch some directions and shrink others by as much (|det| = 1), as of motion without "
            "friction: smaller weights would make it another system; start anew from known states within the "
            "sequence (multiple shooting), or truncate"
        )
    else:
        tries += _what_is_steady(f)
    reach = max(1, math.floor(-math.log(f.threshold) / f.rate)) if f.rate > 0 else f.length
    if reach < f.length:
        tries.append(
            f"truncate at {counted(reach, 'step')}, within which the growth stays below {1 / f.threshold:g}"
        )
    return tries


def _what_is_steady(f: Findings) -> list[str]:
    return f.calibrated or ([] if f.gated else [_FACTOR])


def _logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)
