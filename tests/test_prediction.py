"""The prediction against what the parallel evaluation then does."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import linear_step

import bptt_jax as bptt


def prediction(exponent, error=0.0, steps=1000):
    return bptt.parallel.ParallelPrediction(*(np.asarray(a) for a in (exponent, error, steps, steps, 4)))


@pytest.mark.parametrize(
    ("exponent", "error", "steps", "verdict"),
    [
        (-0.1, 0.01, 1000, "parallel"),
        (-0.1, 0.06, 1000, "undecided"),
        (-0.0005, 0.0, 1000, "undecided"),  # half a nat over the sequence
        (0.0005, 0.0, 1000, "undecided"),
        (0.1, 0.01, 1000, "sequential"),
        (0.1, 0.0, 5, "undecided"),
        (-math.inf, 0.0, 10, "parallel"),
        (math.nan, math.nan, 10, "sequential"),
        (-1.0, math.nan, 10, "parallel"),
    ],
)
def test_verdict(exponent, error, steps, verdict) -> None:
    found = prediction(exponent, error, steps)
    assert found.verdict == verdict
    assert f"{steps} steps" in found.statement
    assert ("not finite" in found.statement) == math.isnan(exponent)


def test_of_a_batch_the_worst_decides() -> None:
    found = prediction([-1.0, 0.5, -0.2], [0.0, 0.0, 0.0], [1000, 1000, 1000])
    found = dataclasses.replace(found, size=np.asarray([4, 4, 4]))
    assert found.verdict == "sequential"
    assert found.statement.startswith("exponent 0.5 ")
    assert "1.3e+05 flops and 4.8e+04 numbers, so it cannot pay on fewer than 8 cores" in found.statement


def test_a_sequence_of_nothing_but_padding_decides_nothing() -> None:
    masks = jnp.arange(100)[None] < jnp.array([100, 0])[:, None]
    found = jax.vmap(
        lambda mask: bptt.predict_parallel(lambda w, h, x: w * h, 0.5, jnp.ones(1), bptt.Sequence(mask=mask))
    )(masks)
    assert found.verdict == "parallel"
    empty = jax.tree.map(lambda a: a[1], found)
    assert empty.verdict == "undecided"
    assert empty.statement == "no step to measure"


def test_it_is_the_largest_exponent() -> None:
    a = jnp.diag(jnp.asarray([0.5, -0.9]))
    found = bptt.predict_parallel(linear_step, a, jnp.ones(2), length=200)
    assert float(found.exponent) == pytest.approx(math.log(0.9), abs=1e-3)
    assert (int(found.length), int(found.size)) == (200, 2)
    assert found.verdict == "parallel"


@pytest.mark.parametrize(("gain", "verdict"), [(0.8, "parallel"), (2.0, "sequential")])
def test_it_predicts(x64, gain, verdict) -> None:
    size, steps = 40, 300
    weights = gain * jax.random.normal(jax.random.key(0), (size, size)) / math.sqrt(size)
    state0 = jax.random.uniform(jax.random.key(1), (size,), minval=-1, maxval=1)

    def step(w, s, x):
        return w @ jnp.tanh(s)

    assert bptt.predict_parallel(step, weights, state0, length=steps).verdict == verdict
    found = bptt.deer(step, weights, state0, length=steps, max_iterations=12)
    assert bool(found.converged) == (verdict == "parallel")
