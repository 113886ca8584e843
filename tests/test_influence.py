"""The influence map against products of Jacobians, one pair at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import cell_example

import bptt_jax as bptt


@pytest.mark.parametrize(("name", "steps", "intervals"), [("lstm", 11, 4), ("gru", 7, 50), ("rnn", 3, 1)])
def test_every_pair_is_the_norm_of_its_product(x64, name, steps, intervals) -> None:
    e = cell_example(name, jnp.float64, steps=steps)
    got = bptt.influence_map(e.step, e.params, e.state0, e.xs, intervals=intervals)
    times = np.asarray(got.times)
    assert (times[0], times[-1], len(times)) == (0, steps, min(intervals, steps) + 1)
    assert np.ptp(np.diff(times)) <= 1
    jacobians = np.asarray(bptt.jacobians(e.step, e.params, e.state0, e.xs))
    for i, t in enumerate(times):
        for k, s in enumerate(times):
            if s > t:
                assert got.log_norms[i, k] == -np.inf
                continue
            product = np.eye(jacobians.shape[-1])
            for jacobian in jacobians[s:t]:
                product = jacobian @ product
            assert float(got.log_norms[i, k]) == pytest.approx(math.log(np.linalg.norm(product, 2)), abs=1e-9)


def test_beyond_the_range_and_after_a_zero() -> None:
    rates = jnp.concatenate([jnp.full(3000, 0.5), jnp.zeros(1), jnp.full(999, 2.0)])[:, None]
    got = bptt.influence_map(lambda p, h, x: x * h, None, jnp.ones(1), rates, intervals=4)
    exact = np.full((5, 5), -np.inf)
    np.fill_diagonal(exact, 0.0)
    for i, k in ((1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (3, 2)):
        exact[i, k] = 1000 * (i - k) * math.log(0.5)
    np.testing.assert_allclose(got.log_norms, exact, rtol=1e-5)


def test_jit_vmap_and_bad_arguments() -> None:
    e = cell_example("gru", jnp.float32, steps=6)
    batch = jnp.stack([e.xs, 2 * e.xs])

    def one(xs):
        return bptt.influence_map(e.step, e.params, e.state0, xs, intervals=3)

    both = jax.jit(jax.vmap(one))(batch)
    np.testing.assert_allclose(both.log_norms[1], one(batch[1]).log_norms, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="intervals: expected at least 1, got 0"):
        bptt.influence_map(e.step, e.params, e.state0, e.xs, intervals=0)
