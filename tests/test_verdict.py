"""From numbers to words, in NumPy alone."""

import ast
import inspect
import math
import re

import numpy as np
import pytest

from bptt_jax.analysis import verdict

EDGE = math.log(1e-3)
CASE = verdict.Findings(
    verdicts=["vanishing"],
    lengths=[200],
    hardly_read=0,
    threshold=1e-3,
    rate=-0.25,
    rate_error=0.01,
    horizon=27.4,
    horizon_error=0.0,
    extrapolated=False,
    cut_lag=-1,
    end_gain=-50.0,
    peak_gain=0.0,
    order=math.nan,
    kept=math.nan,
    conserves=False,
    gated=None,
    calibrated=[],
    clip_threshold=0.123,
    largest_gradient_log10=1.0,
    dtype="float32",
    range_log10=38.5,
    in_range=True,
    overflow_lag=-1,
    coarse_lag=-1,
    lost_lag=-1,
    loss_scale_log2=0,
    nonfinite_step=-1,
    nonfinite_adjoint_step=-1,
    nonfinite_contribution_step=-1,
    nonfinite_product_step=-1,
    nonfinite_losses=0,
    unseen="",
)


def case(kind, **changes):
    return CASE._replace(verdicts=[kind], **changes)


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
        (math.nan, -math.inf, True, "unmeasured"),
        (math.nan, 100.0, True, "exploding"),
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
        (["unmeasured"] * 9 + ["steady"], "steady"),
        (["unmeasured"], "unmeasured"),
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


def test_rates_and_horizons_in_words():
    assert verdict.with_error(-0.25, 0.01) == "-0.25 +- 0.01 nats per step"
    assert verdict.with_error(math.nan, math.nan) == "rate unknown"
    words = [verdict.horizon_words(h, math.nan, False) for h in (1.0, 1.5, math.inf, math.nan)]
    assert words == ["horizon 1 step", "horizon 2 steps", "no horizon in sight", "horizon unknown"]


@pytest.mark.parametrize("kind", ["steady", "unmeasured"])
def test_no_advice_where_nothing_is_wrong(kind):
    assert verdict.advise(case(kind, rate=-0.001, horizon=900.0)) == []


@pytest.mark.parametrize("gated", [None, False, True])
def test_advice_on_vanishing(gated):
    tries = " | ".join(verdict.advise(case("vanishing", gated=gated)))
    assert "falls to 0.001 in 28 steps of 200" in tries
    assert "truncating at 28 steps" in tries
    # A gate of share p keeps p^200 = 1e-3 of its cell: p = 0.96605, of which the logit is 3.35.
    assert "bias of 3.3" in tries
    assert ("its forget" in tries) == (gated is True)


def test_truncation_is_advised_only_where_it_saves_something():
    assert "truncating" not in " | ".join(verdict.advise(case("vanishing", horizon=187.0)))


def test_a_unit_that_integrates_is_told_its_leak():
    tries = " | ".join(verdict.advise(case("vanishing", kept=0.8, gated=False)))
    assert "keeps 0.8 of itself" in tries
    assert "0.966 or more" in tries
    assert "lstm" not in tries


def test_a_cut_is_no_decay():
    (line,) = verdict.advise(case("vanishing", cut_lag=11, end_gain=-math.inf))
    assert "exactly zero from 11 steps back on, of 200" in line
    assert "declared as a reset" in line


@pytest.mark.parametrize("gated", [None, False, True])
def test_advice_on_exploding(gated):
    growing = case("exploding", gated=gated, rate=0.25)
    tries = " | ".join(verdict.advise(growing._replace(largest_gradient_log10=25.0)))
    assert "clip the global norm at 0.12" in tries
    assert "reach 1e25" in tries
    assert "truncate at 27 steps" in tries  # ln(1000) / 0.25 = 27.6
    assert "stays below 1000" in tries
    small = " | ".join(verdict.advise(growing._replace(rate=0.01)))
    assert "1e25" not in small
    assert "overflow" not in small
    assert "truncate" not in small  # it would reach 690 steps


def test_a_gradient_that_overflows_is_told_from_a_norm_that_does():
    tries = " | ".join(verdict.advise(case("exploding", rate=2.0, largest_gradient_log10=311.0, in_range=False)))
    assert "1e311, which ends at 1e38" in tries
    assert "scaled.params_grad.clipped is finite" in tries
    assert "clip_adjoints" in tries
    assert "clip the global norm" not in tries
    assert "clip_by_global_norm" not in tries
    tries = " | ".join(verdict.advise(case("exploding", rate=2.0, largest_gradient_log10=30.0, in_range=False)))
    assert "adjoints leave float32 though the gradient does not" in tries
    beyond, within = (
        verdict.advise(
            case("exploding", rate=2.0, largest_gradient_log10=size, in_range=False, loss_scale_log2=-71)
        )[-1]
        for size in (45.0, 30.0)
    )
    assert "with the loss times 2^-71 it is kept, to be clipped there" in beyond
    assert "with the loss times 2^-71, and the gradient divided by it, it is kept" in within
    tries = " | ".join(verdict.advise(case("exploding", rate=2.0, largest_gradient_log10=30.0)))
    assert "whose squares overflow (from 1e19 on) though every entry is finite" in tries
    assert "clip_by_global_norm" in tries
    assert "clipped" not in tries


def test_polynomial_growth_is_no_matter_of_the_weights():
    tries = " | ".join(verdict.advise(case("exploding", rate=0.02, order=1.0)))
    assert "lag^1.0" in tries
    assert "truncate" not in tries
    assert "recommend_gain" not in tries
    assert "as lag^2.1" in verdict.state(case("exploding", rate=0.02, order=2.1))


def test_a_forward_jacobian_that_is_nan_where_the_gradient_is_not():
    (line,) = verdict.advise(case("steady", nonfinite_product_step=4))
    assert "dh_5/dh_4" in line
    assert line.endswith("the gradient is not touched")


def test_advice_on_what_is_not_finite():
    def advice(**numbers):
        (line,) = verdict.advise(case("non-finite", **numbers))
        return line

    assert "state is first NaN or infinite at h_8" in advice(nonfinite_step=7, nonfinite_adjoint_step=19)
    assert "a large negative number for log 0" in advice(nonfinite_step=0)
    for also in ({"nonfinite_adjoint_step": 2}, {"nonfinite_contribution_step": 0}, {"nonfinite_losses": 1}):
        assert "bound the activation" in advice(nonfinite_step=0, **also)
    assert "backward pass is first NaN or infinite at dL/dh_20" in advice(nonfinite_adjoint_step=19)
    assert "look into the loss" in advice(nonfinite_losses=1, nonfinite_contribution_step=3)
    assert "(x_4)" in advice(nonfinite_contribution_step=3)
    assert "(x_1 or h_0)" in advice(nonfinite_contribution_step=0)
    assert "dh_1/dh_0" in advice()


def test_statements():
    steady = case("steady", rate=-0.006, rate_error=0.007, horizon=1029.0, horizon_error=1100.0, extrapolated=True)
    assert "horizon 1.03e+03 +- 1.1e+03 steps, extrapolated; -0.006 +- 0.007 nats" in verdict.state(steady)
    assert "after 28 of 200 steps; -0.25 +- 0.01 nats" in verdict.state(case("vanishing"))
    assert "no horizon in sight" in verdict.state(steady._replace(horizon=math.inf))
    assert "it reads none, or is flat" in verdict.state(case("unmeasured", lengths=[0]))
    assert "less than two steps" in verdict.state(case("unmeasured", lengths=[1]))
    assert "1e+434-fold" in verdict.state(case("exploding", peak_gain=1000.0))


def test_one_step_is_no_steps():
    assert "1e+02-fold within 1 step; " in verdict.state(case("exploding", lengths=[1], peak_gain=math.log(100)))
    assert "exactly zero after 1 of 1 step" in verdict.state(case("vanishing", lengths=[1], cut_lag=1))
    assert "horizon 1 step, extrapolated" in verdict.state(
        case("steady", horizon=1.0, horizon_error=math.nan, extrapolated=True)
    )
    tries = "; ".join(verdict.advise(case("vanishing", horizon=0.4)))
    assert "falls to 0.001 in 1 step of 200" in tries
    assert "truncating at 1 step cuts off" in tries
    assert "from 1 step back on" in verdict.advise(case("vanishing", cut_lag=1))[0]
    assert any(
        "truncate at 1 step, " in line for line in verdict.advise(case("exploding", rate=5.0, peak_gain=9.0))
    )


def test_the_words_name_no_argument_of_a_function():
    """The command prints them, and has others."""
    tree = ast.parse(inspect.getsource(verdict))
    texts = [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert len(texts) > 100
    assert [text for text in texts if re.search(r"\b[a-z_]+=", text)] == []


def test_it_is_told_where_a_loss_hardly_depends_on_most_of_a_sequence():
    said = "hardly depends on the 900 later states"
    for kind in ("steady", "vanishing", "exploding", "unmeasured"):
        assert said in verdict.state(case(kind, hardly_read=900))
        assert said in verdict.state(CASE._replace(verdicts=[kind] * 2, lengths=[100] * 2, hardly_read=900))
        assert "later states" not in verdict.state(case(kind, hardly_read=0))


def test_the_statement_of_a_batch_tells_lengths_where_verdicts_follow_them():
    batch = CASE._replace(verdicts=["steady"] * 2 + ["vanishing"] * 3, lengths=[12, 40, 50, 70, 90])
    line = verdict.state(batch)
    assert "5 sequences, 2 steady, 3 vanishing" in line
    assert "they differ in length: steady 12 to 40, vanishing 50 to 90 steps" in line
    assert "differ" not in verdict.state(batch._replace(lengths=[50] * 5))
    assert "they differ in length: 12 to 90 steps" in verdict.state(batch._replace(verdicts=["steady"] * 5))


@pytest.mark.parametrize("kind", ["vanishing", "exploding"])
def test_a_factor_is_to_be_measured(kind):
    """No sentence has one: what it does is not known from a rate."""
    wanted = "recommend_gain measures whether a factor"
    assert wanted in " | ".join(verdict.advise(case(kind, rate=0.1)))
    assert wanted not in " | ".join(verdict.advise(case(kind, rate=0.1, gated=True)))
    assert wanted not in " | ".join(verdict.advise(case("vanishing", cut_lag=11, end_gain=-math.inf)))


def test_motion_without_friction_is_not_made_another_system():
    tries = " | ".join(verdict.advise(case("exploding", rate=0.25, conserves=True)))
    assert "|det| = 1" in tries
    assert "recommend_gain" not in tries
    assert "truncate at 27 steps" in tries


def test_a_typical_length_is_the_lower_median():
    assert [CASE._replace(lengths=lengths).length for lengths in ([7], [300, 10, 20], [40, 10, 20, 30])] == [
        7,
        20,
        20,
    ]


HALF = {"dtype": "float16", "range_log10": 4.8}


def test_what_half_precision_makes_of_it_is_said_beside_the_truth():
    growing = case("exploding", rate=0.18, in_range=False, overflow_lag=61, loss_scale_log2=-12, **HALF)
    for told in (growing, growing._replace(verdicts=["exploding"] * 3, lengths=[80] * 3)):
        line = verdict.state(told)
        assert "float16 overflows at lag 61: the gradient of jax.grad is infinite or NaN" in line
        assert "nats per step" in line
    assert "loss times 2^-12" in " | ".join(verdict.advise(growing))
    beyond = " | ".join(verdict.advise(growing._replace(loss_scale_log2=-900)))
    assert "loss times" not in beyond
    fading = case("steady", rate=-0.1, horizon=66.0, lengths=[80], coarse_lag=12, lost_lag=33, loss_scale_log2=14)
    fading = fading._replace(**HALF)
    line = "float16 has lost half of the signal's digits from lag 12 on, and all from lag 33 on"
    assert verdict.state(fading).endswith(line)
    (advice,) = verdict.advise(fading)
    assert advice.startswith(line)
    assert "loss times 2^14" in advice


@pytest.mark.parametrize("changes", [{"horizon": 12.0}, {"lengths": [12]}, {"coarse_lag": -1}])
def test_what_is_lost_where_no_signal_is_left_is_no_matter(changes):
    fading = case("vanishing", lengths=[80], horizon=66.0, coarse_lag=12, lost_lag=33, loss_scale_log2=14)
    assert "float16" in verdict.state(fading._replace(**HALF))
    assert "float16" not in verdict.state(fading._replace(**HALF | changes))
    assert "loss times" not in " | ".join(verdict.advise(fading._replace(**HALF | changes)))
