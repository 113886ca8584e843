"""From numbers to words, in NumPy alone."""

import math

import numpy as np
import pytest

from bptt_jax.analysis import verdict

EDGE = math.log(1e-3)
NUMBERS = {
    "length": 200,
    "fraction": 1e-3,
    "growth_rate": -0.25,
    "horizon": 27.4,
    "peak_gain": 0.0,
    "clip_threshold": 0.123,
    "largest_gradient_log10": 1.0,
    "nonfinite_step": -1,
    "nonfinite_adjoint_step": -1,
    "nonfinite_contribution_step": -1,
    "nonfinite_losses": 0,
}


@pytest.mark.parametrize(
    ("end", "peak", "finite", "expected"),
    [
        (0.0, 0.0, True, "steady"),
        (EDGE + 0.01, -EDGE - 0.01, True, "steady"),
        (EDGE - 0.01, 0.0, True, "vanishing"),
        (-math.inf, 0.0, True, "vanishing"),
        (0.0, -EDGE + 0.01, True, "exploding"),
        (-100.0, 100.0, True, "exploding"),  # it blew up on the way, whatever arrives at the end
        (0.0, 0.0, False, "non-finite"),
        (math.nan, math.nan, False, "non-finite"),
    ],
)
def test_judge(end, peak, finite, expected):
    assert verdict.judge(end, peak, 1e-3, finite) == expected


def test_the_threshold_is_the_callers():
    assert verdict.judge(math.log(0.05), 0.0, 0.1, True) == "vanishing"
    assert verdict.judge(math.log(0.05), 0.0, 0.01, True) == "steady"
    assert verdict.judge(0.0, math.log(20), 0.1, True) == "exploding"
    assert verdict.judge(0.0, math.log(20), 0.01, True) == "steady"


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["steady", "vanishing", "vanishing"], "vanishing"),
        (["steady", "exploding"], "exploding"),
        (["vanishing", "exploding"], "exploding"),
        (["steady", "vanishing"], "vanishing"),
        (["steady", "steady", "exploding"], "steady"),
        (["steady"] * 9 + ["non-finite"], "non-finite"),
    ],
)
def test_overall(verdicts, expected):
    assert verdict.overall(verdicts) == expected


def test_describe():
    assert verdict.describe([1.0, 2.0, 3.0, 4.0]) == {
        "mean": 2.5,
        "std": math.sqrt(1.25),
        "q25": 1.0,
        "median": 2.0,
        "q75": 3.0,
    }
    endless = verdict.describe(np.asarray([[5.0, np.inf], [7.0, 6.0]]))
    assert (endless["mean"], endless["median"], endless["q25"]) == (math.inf, 6.0, 5.0)
    assert math.isnan(endless["std"])
    assert all(math.isnan(v) for v in verdict.describe([1.0, np.nan]).values())


def test_steady_needs_no_advice():
    assert verdict.advise("steady", None, NUMBERS) == []


@pytest.mark.parametrize("gated", [None, False, True])
def test_advice_on_vanishing(gated):
    tries = " | ".join(verdict.advise("vanishing", gated, NUMBERS))
    assert "falls to 0.001 in 28 steps of 200" in tries
    assert "truncating at 28 steps" in tries
    assert ("weights times 1.28" in tries) == (not gated)  # e^0.25
    # A gate of share p keeps p^200 = 1e-3 of its cell: p = 0.96605, of which the logit is 3.35.
    assert "bias of 3.3" in tries
    endless = " | ".join(
        verdict.advise("vanishing", gated, NUMBERS | {"horizon": math.inf, "growth_rate": -math.inf})
    )
    assert "more steps than measured" in endless
    assert "weights times" not in endless


@pytest.mark.parametrize("gated", [None, False, True])
def test_advice_on_exploding(gated):
    tries = " | ".join(
        verdict.advise("exploding", gated, NUMBERS | {"growth_rate": 0.25, "largest_gradient_log10": 25.0})
    )
    assert "clip the global norm at 0.12" in tries
    assert "reach 1e25" in tries
    assert "truncate at 27 steps" in tries  # ln(1000) / 0.25 = 27.6
    assert "stays below 1000" in tries
    assert ("weights times 0.779" in tries) == (not gated)
    small = " | ".join(verdict.advise("exploding", gated, NUMBERS | {"growth_rate": 0.01}))
    assert "1e25" not in small
    assert "overflow" not in small
    assert "truncate" not in small  # it would reach 690 steps


def test_advice_on_what_is_not_finite():
    def advice(**numbers):
        (line,) = verdict.advise("non-finite", None, NUMBERS | numbers)
        return line

    assert "state is first NaN or infinite at h_8" in advice(nonfinite_step=7, nonfinite_adjoint_step=19)
    assert "backward pass is first NaN or infinite at dL/dh_20" in advice(nonfinite_adjoint_step=19)
    assert "look into the loss" in advice(nonfinite_losses=1, nonfinite_contribution_step=3)
    assert "(x_4)" in advice(nonfinite_contribution_step=3)
    assert "(x_1 or h_0)" in advice(nonfinite_contribution_step=0)
    assert "dh_1/dh_0" in advice()
