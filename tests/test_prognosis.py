"""The prognosis: a horizon and losses that are known in closed form, its formula, and what it says."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax.experiments.network import network
from bptt_jax.experiments.prognosis import predicted, prognose
from bptt_jax.experiments.tasks import adding

LENGTH = 40


def decaying(rate: float) -> bptt.Cell:
    """Units that forget at one rate, so that the horizon is ``log(1000) / -log(rate)``."""
    step = _decay
    return bptt.Cell(lambda key, size: {"rate": jnp.full(3, rate), "input": jnp.ones((3, size))}, _zeros, step)


def _zeros():
    return jnp.zeros(3)


def _decay(params, h, x):
    return params["rate"] * h + params["input"] @ x


NET, PILOT = (network(decaying(0.5), adding(length)) for length in (LENGTH, 10))


def params_of(rate, output=None):
    """Parameters of units that forget at this rate; the output is what it is told, whatever the state."""
    params = NET.init(jax.random.key(0))
    params = params._replace(cell=params.cell | {"rate": jnp.full(3, rate)})
    if output is None:
        return params
    readout = jax.tree.map(jnp.zeros_like, params.readout)
    return params._replace(readout=readout._replace(bias=jnp.full(1, output)))


def test_horizon_and_rate_are_those_before() -> None:
    found = prognose(NET, PILOT, params_of(0.6), params_of(0.5))
    np.testing.assert_allclose(found.horizon, math.floor(math.log(1000) / -math.log(0.6)) + 1)
    np.testing.assert_allclose(found.growth_rate, np.log(0.6), rtol=1e-5)
    assert found.length == LENGTH


def test_loss_is_that_after() -> None:
    """Of a constant output: the variance of a sum of two numbers, 1/6, and the square of what it is off by."""
    for output, expected in ((1.0, 1.0), (2.0, 7.0)):
        found = prognose(NET, PILOT, params_of(0.5), params_of(0.5, output))
        np.testing.assert_allclose(found.loss, expected, rtol=0.2)  # 500 sequences


def test_the_pilot_decides_where_the_loss_is_measured() -> None:
    """Of numbers that are twice as large, the variance of the sum is four times as large."""
    task = adding(10)
    doubled = task._replace(sample=lambda key, batch: jax.tree.map(lambda a: 2 * a, task.sample(key, batch)))
    found = prognose(NET, PILOT._replace(task=doubled), params_of(0.5), params_of(0.5, 2.0))
    np.testing.assert_allclose(found.loss, 4.0, rtol=0.2)


def test_constants_are_those_that_were_fitted() -> None:
    """Linear in logarithms, of the horizon up to a thousand and of the loss from a tenth to twenty."""
    results = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "long_range.json").read_text())
    (intercept, of_horizon, of_loss), half_width = (
        results["results"]["fit"][k] for k in ("coefficients", "half_width")
    )
    for horizon, loss, counted in ((10, 1, (10, 1)), (3000, 0.01, (1000, 0.1)), (math.inf, math.nan, (1000, 20))):
        lag, low, high = predicted(jnp.asarray(horizon, float), jnp.asarray(loss, float))
        expected = intercept + np.dot([of_horizon, of_loss], np.log(counted))
        np.testing.assert_allclose(
            np.log([lag, high, low]), expected + half_width * np.array([0, 1, -1]), atol=2e-3
        )
    found = prognose(NET, PILOT, params_of(0.5), params_of(0.5, 1.0))
    np.testing.assert_allclose([found.lag, found.low, found.high], predicted(found.horizon, found.loss), rtol=1e-6)


def test_what_is_measured_on_is_the_callers() -> None:
    net = network(bptt.rnn(4, gain=0.9), adding(12))
    params, key = net.init(jax.random.key(1)), jax.random.key(5)
    found, other = (prognose(net, net, params, params, sequences=3, key=k) for k in (key, jax.random.key(6)))
    inputs, targets = net.task.sample(jax.random.split(key)[0], 3)
    horizons = []
    for xs, target in zip(inputs, targets, strict=True):
        args, h0 = net.loss_args(params, xs, target), net.cell.initial_state()
        flow = bptt.gradient_flow(net.cell.step, params.cell, h0, xs, net.loss_of_states, args=args, spectra=False)
        horizons.append(float(flow.horizon))
    np.testing.assert_allclose(found.horizon, np.median(horizons), rtol=1e-5)
    assert found.loss != other.loss


def test_seeds_side_by_side_are_each_alone() -> None:
    rates = (0.5, 0.7)
    many = jax.tree.map(lambda *a: jnp.stack(a), *map(params_of, rates))
    found = jax.vmap(lambda a, b: prognose(NET, PILOT, a, b))(many, many)
    alone = [prognose(NET, PILOT, params_of(r), params_of(r)) for r in rates]
    np.testing.assert_allclose(found.lag, [a.lag for a in alone], rtol=1e-5)
    assert found.statement.startswith(f"lag {LENGTH}: ")


def test_verdict_is_where_the_length_lies() -> None:
    found = prognose(NET, PILOT, params_of(0.5), params_of(0.5))
    low, high = (5.0, 20.0), (10.0, 40.0)  # of two seeds
    for length, verdict in ((9, "likely"), (11, "open"), (19, "open"), (21, "unlikely")):
        judged = replace(found, low=jnp.asarray(low), high=jnp.asarray(high), length=length)
        assert judged.verdict == verdict
        assert f"lag {length}: {verdict}" in judged.statement
    assert repr(found).startswith("Prognosis: lag 40: ")


def test_what_cannot_be_measured_is_open() -> None:
    found = prognose(NET, PILOT, params_of(math.nan), params_of(0.5))
    assert math.isnan(found.horizon)
    assert found.verdict == "open"
    assert "nan" in found.statement
    lost = prognose(NET, PILOT, params_of(0.5), params_of(0.5, math.nan))
    worst = prognose(NET, PILOT, params_of(0.5), params_of(0.5, 100.0))
    assert lost.lag == worst.lag


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"network": None}, TypeError, "network: expected a Network"),
        ({"pilot": None}, TypeError, "pilot: expected a Network"),
        ({"pilot": "network"}, ValueError, "before: expected parameters of the pilot"),
        ({"sequences": 0}, ValueError, "sequences: expected"),
        ({"key": 3}, TypeError, "key"),
        ({"before": "params"}, ValueError, "before: expected parameters of the network"),
        ({"after": "cell"}, ValueError, "after: expected parameters of the network"),
    ],
)
def test_bad_arguments(given, error, said) -> None:
    good = {"network": NET, "pilot": PILOT, "before": params_of(0.5), "after": params_of(0.5)}
    others = {"params": network(bptt.rnn(2), adding(4)).init(jax.random.key(0)), "cell": good["after"].cell}
    others |= {"network": network(bptt.rnn(2), adding(4))}
    given = {k: others.get(v, v) if isinstance(v, str) else v for k, v in given.items()}
    with pytest.raises(error, match=said):
        prognose(**(good | given))
