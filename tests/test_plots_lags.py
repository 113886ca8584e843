"""The figures by lag show the numbers of the results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax import analysis, plots


def step(b, h, x):
    return 0.5 * h + b * x


def last(states):
    return states[-1]


def lines(figure):
    (ax,) = figure.axes
    return {line.get_label(): np.asarray(line.get_data()) for line in ax.get_lines()}


def test_parts() -> None:
    found = analysis.gradient_by_lag(step, 1.0, 0.0, jnp.ones(9), lambda states: states[5])
    drawn = lines(plots.plot_gradient_lags(found, title="parts"))
    expected = np.where(np.arange(9) < 6, -np.arange(9) * np.log10(2), np.nan)
    np.testing.assert_allclose(drawn["part from this lag"][1], expected, atol=1e-6)
    np.testing.assert_allclose(drawn["whole gradient"][1], np.log10(2 - 0.5**5), rtol=1e-5)
    nothing = analysis.gradient_by_lag(step, 1.0, 0.0, jnp.ones(9), lambda states: 0 * states[5])
    assert list(lines(plots.plot_gradient_lags(nothing))) == ["part from this lag"]
    first = jnp.zeros(200).at[0].set(1.0)
    lost = analysis.gradient_by_lag(step, 1.0, 0.0, first, last)
    drawn = lines(plots.plot_gradient_lags(lost))
    assert list(drawn) == ["part from this lag", "whole gradient: underflows or cancels"]
    assert drawn["part from this lag"][1][199] == pytest.approx(-199 * np.log10(2), rel=1e-6)
    wild = analysis.gradient_by_lag(step, 1.0, 0.0, first, lambda states: jnp.inf * states[-1])
    assert "whole gradient: not finite" in lines(plots.plot_gradient_lags(wild))


def test_noise() -> None:
    """Of a constant and of noise about zero: the first is seen, the second not."""
    xs = np.stack([[3, -3, 3, -3], [2, 2.2, 1.9, 2.1]], axis=1)
    found = analysis.gradient_noise(step, 1.0, 0.0, jnp.asarray(xs, jnp.float32), last)
    figure = plots.plot_gradient_noise(found)
    drawn = lines(figure)
    np.testing.assert_allclose(drawn["signal to noise"][1], [np.log10(found.signal_to_noise[0]), np.nan])
    np.testing.assert_array_equal(drawn["noise prevails"][0], 1)
    assert figure.axes[0].get_ylabel() == "signal to noise, batch of 4"


def test_digits(x64) -> None:
    def shrinking(b, h, x):
        return 0.7 * h + b

    given = shrinking, jnp.zeros(()), jnp.zeros(()), None, last
    half, single = (analysis.gradient_precision(*given, dtype=d, length=60) for d in ("float16", "float32"))
    figure = plots.plot_gradient_precision(half, single)
    drawn = lines(figure)
    shown = ~np.isnan(drawn["float16"][1])
    np.testing.assert_allclose(drawn["float16"][1][shown], np.asarray(half.digits)[shown])
    dots = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    assert [float(dot.get_xdata()[0]) for dot in dots] == [float(half.underflow_lag)]


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"by_lag: expected that of bptt_jax\.analysis\.gradient_by_lag, got str"):
        plots.plot_gradient_lags("no")
    found = jax.vmap(lambda b: analysis.gradient_by_lag(step, b, 0.0, jnp.ones(3), last))(jnp.ones(2))
    with pytest.raises(ValueError, match=r"by_lag: expected one, got a batch of shape \[2\]"):
        plots.plot_gradient_lags(found)
    with pytest.raises(ValueError, match="precisions: expected at least one"):
        bptt.plots.plot_gradient_precision()
