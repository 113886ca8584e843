"""The prognosis: horizons that are known in closed form, its formula, and what it says."""

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
from bptt_jax.experiments.prognosis import prognose
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


NET = network(decaying(0.5), adding(LENGTH))


def params_of(rate):
    params = NET.init(jax.random.key(0))
    return params._replace(cell=params.cell | {"rate": jnp.full(3, rate)})


def test_horizons_and_rates_are_those_before_and_after_and_further_on() -> None:
    found = prognose(NET, params_of(0.5), params_of(0.6))
    steps = [math.floor(math.log(1000) / -math.log(rate)) + 1 for rate in (0.5, 0.6, 0.7)]
    np.testing.assert_allclose([found.horizon_before, found.horizon, found.horizon_further], steps)
    np.testing.assert_allclose([found.growth_rate_before, found.growth_rate], np.log([0.5, 0.6]), rtol=1e-5)
    assert found.length == LENGTH


def test_the_longer_horizon_counts_of_those_before_and_further_on() -> None:
    given_up, opened, kept = (
        prognose(NET, params_of(before), params_of(after)) for before, after in ((0.8, 0.5), (0.6, 0.7), (0.8, 0.8))
    )
    np.testing.assert_allclose([given_up.lag, opened.lag], kept.lag, rtol=1e-5)
    np.testing.assert_allclose(kept.high / kept.lag, kept.lag / kept.low, rtol=1e-5)


def test_constants_are_those_that_were_fitted() -> None:
    """Between the lags of two horizons lies the slope, and so on."""
    results = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "long_range.json").read_text())
    (intercept, slope), half_width = (results["results"]["fit"][k] for k in ("coefficients", "half_width"))
    found = prognose(NET, params_of(0.5), params_of(0.5))
    np.testing.assert_allclose(np.log(found.lag), intercept + slope * math.log(10), rtol=5e-3)
    np.testing.assert_allclose(np.log(found.high / found.lag), half_width, rtol=5e-3)


def test_what_is_measured_on_is_the_callers() -> None:
    net = network(bptt.rnn(4, gain=0.9), adding(12))
    params, key = net.init(jax.random.key(1)), jax.random.key(5)
    found = prognose(net, params, params, sequences=3, key=key)
    inputs, targets = net.task.sample(key, 3)
    horizons = []
    for xs, target in zip(inputs, targets, strict=True):
        args, h0 = net.loss_args(params, xs, target), net.cell.initial_state()
        flow = bptt.gradient_flow(net.cell.step, params.cell, h0, xs, net.loss_of_states, args=args, spectra=False)
        horizons.append(float(flow.horizon))
    np.testing.assert_allclose(found.horizon, np.median(horizons), rtol=1e-5)


def test_seeds_side_by_side_are_each_alone() -> None:
    rates = (0.5, 0.7)
    many = jax.tree.map(lambda *a: jnp.stack(a), *map(params_of, rates))
    found = jax.vmap(lambda a, b: prognose(NET, a, b))(many, many)
    alone = [prognose(NET, params_of(r), params_of(r)) for r in rates]
    np.testing.assert_allclose(found.lag, [a.lag for a in alone], rtol=1e-6)
    assert found.statement.startswith(f"lag {LENGTH}: ")


def test_verdict_is_where_the_length_lies() -> None:
    found = prognose(NET, params_of(0.5), params_of(0.5))
    low, high = 10.0, 20.0
    for length, verdict in ((9, "likely"), (10, "likely"), (11, "open"), (20, "open"), (21, "unlikely")):
        judged = replace(found, low=jnp.asarray(low), high=jnp.asarray(high), length=length)
        assert judged.verdict == verdict
        assert f"lag {length}: {verdict}" in judged.statement
    assert repr(found).startswith("Prognosis: lag 40: ")


def test_what_cannot_be_measured_is_open() -> None:
    found = prognose(NET, params_of(0.5), params_of(math.nan))
    assert math.isnan(found.horizon)
    assert found.verdict == "open"
    assert "nan" in found.statement


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"network": None}, TypeError, "network: expected a Network"),
        ({"sequences": 0}, ValueError, "sequences: expected"),
        ({"key": 3}, TypeError, "key"),
        ({"before": "params"}, ValueError, "before: expected parameters of the network"),
        ({"after": "cell"}, ValueError, "after: expected parameters of the network"),
    ],
)
def test_bad_arguments(given, error, said) -> None:
    good = {"network": NET, "before": params_of(0.5), "after": params_of(0.5)}
    others = {"params": network(bptt.rnn(2), adding(4)).init(jax.random.key(0)), "cell": good["after"].cell}
    given = {k: others.get(v, v) if isinstance(v, str) else v for k, v in given.items()}
    with pytest.raises(error, match=said):
        prognose(**(good | given))
