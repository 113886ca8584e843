"""From measured numbers to words: on the host, in NumPy, from arrays and never from models."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np

Verdict: TypeAlias = Literal["vanishing", "exploding", "steady", "non-finite"]

SEVERITY: tuple[Verdict, ...] = ("steady", "vanishing", "exploding", "non-finite")


def judge(end_gain: float, peak_gain: float, fraction: float, finite: bool) -> Verdict:
    """One sequence's verdict.

    Args:
      end_gain: log of what is left at h_0 of the error signal of the last step that the loss reads.
      peak_gain: log of the largest adjoint relative to what an isometry would have carried.
      fraction: the threshold; see `bptt_jax.gradient_flow` for its reason.
      finite: whether all of the forward and backward pass is.
    """
    if not finite:
        return "non-finite"
    if peak_gain > -math.log(fraction):
        return "exploding"
    if end_gain < math.log(fraction):
        return "vanishing"
    return "steady"


def overall(verdicts: list[Verdict]) -> Verdict:
    """The most frequent verdict of a batch, the graver one of two equally frequent; one NaN spoils a batch."""
    if "non-finite" in verdicts:
        return "non-finite"
    count = Counter(verdicts)
    return max(count, key=lambda v: (count[v], SEVERITY.index(v)))


def describe(values: Any) -> dict[str, float]:
    """Mean, standard deviation, and the quartiles, which infinities (a horizon without end) leave meaningful."""
    values = np.asarray(values, np.float64).ravel()
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


def advise(verdict: Verdict, gated: bool | None, numbers: Mapping[str, float]) -> list[str]:
    """What to try, with numbers from the measurement.

    Args:
      verdict: of the sequence or batch.
      gated: whether the step has a forget or update gate; None if unknown.
      numbers: ``length``, ``fraction``, ``growth_rate``, ``horizon``, ``peak_gain``, ``clip_threshold`` and
        ``largest_gradient_log10``, ``nonfinite_step``, ``nonfinite_adjoint_step``, ``nonfinite_contribution_step``
        (the first of the batch, -1 for none) and ``nonfinite_losses``, their number; the others a typical value.
    """
    length, fraction = int(numbers["length"]), numbers["fraction"]
    rate, horizon = numbers["growth_rate"], numbers["horizon"]
    match verdict:
        case "steady":
            return []
        case "non-finite":
            if numbers["nonfinite_step"] >= 0:
                where = f"the state is first NaN or infinite at h_{int(numbers['nonfinite_step']) + 1}"
                return [f"{where}: bound the activation or lower the recurrent gain, and look at that input"]
            if numbers["nonfinite_adjoint_step"] >= 0:
                where = f"dL/dh_{int(numbers['nonfinite_adjoint_step']) + 1}"
                return [
                    f"the backward pass is first NaN or infinite at {where}: "
                    "look for a derivative that is infinite there (sqrt or norm at 0, log of 0)"
                ]
            if numbers["nonfinite_losses"] > 0:
                return ["the loss is NaN or infinite though all states are finite: look into the loss"]
            if numbers["nonfinite_contribution_step"] >= 0:
                t = int(numbers["nonfinite_contribution_step"]) + 1
                bounded = "x_1 or h_0" if t == 1 else f"x_{t}"
                return [
                    f"states and adjoints are finite, but what step {t} adds to the gradient is not: look for an "
                    f"infinity that the step bounds ({bounded}), or an infinite derivative with respect to a "
                    "parameter (sqrt or norm at 0)"
                ]
            return ["dh_1/dh_0 is NaN or infinite: look for a derivative that is infinite at h_0"]
        case "vanishing":
            tries = [f"the signal falls to {fraction:g} in {_steps(horizon)} of {length}: nothing older is learned"]
            if not gated and math.isfinite(rate) and rate < 0:
                tries.append(_rescale(rate))
            # A gate that keeps a share p of its cell at every step keeps p^T of it over T.
            bias = f"at a bias of {_logit(fraction ** (1 / length)):.1f} or more, to reach back {length} steps"
            tries.append(f"{'its' if gated else 'gru or lstm, with the'} forget (update) gate {bias}")
            if math.isfinite(horizon):
                tries.append(f"truncating at {math.ceil(horizon)} steps loses next to nothing")
            return tries
        case "exploding":
            threshold = numbers["clip_threshold"]
            tries = [f"clip the global norm at {threshold:.2g}"] if math.isfinite(threshold) else []
            if numbers["largest_gradient_log10"] > math.log10(float(np.finfo(np.float32).max)) / 2:
                tries.append(
                    f"gradient norms reach 1e{numbers['largest_gradient_log10']:.0f}: use a clip whose norm cannot "
                    "overflow (squares in float32 end at 1e19)"
                )
            if rate > 0 and not gated:
                tries.append(_rescale(rate))
            reach = max(1, math.floor(-math.log(fraction) / rate)) if rate > 0 else length
            if reach < length:
                tries.append(f"truncate at {reach} steps, within which the growth stays below {1 / fraction:g}")
            return tries


def _rescale(rate: float) -> str:
    return f"recurrent weights times {math.exp(-rate):.3g} and measure again, or orthogonal ones"


def _logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)


def _steps(horizon: float) -> str:
    return f"{math.ceil(horizon)} steps" if math.isfinite(horizon) else "more steps than measured"
