import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax.experiments.influence_balancing import influence_balancing

STEPS = 600


def _first(states):
    return states[-1, 0]


def _gradient(task, loss):
    return float(bptt.adjoints(task.step, task.params, task.state0, None, loss, length=STEPS).params_grad)


def test_published_system(x64) -> None:
    task = influence_balancing(0.7)
    a = 0.5 * np.eye(23) + 0.5 * np.eye(23, k=1)
    forcing = np.array([1.0] * 10 + [-1.0] * 13)
    s = np.random.default_rng(0).standard_normal(23)
    np.testing.assert_allclose(task.step(task.params, jnp.asarray(s), None), a @ s + 0.7 * forcing, rtol=1e-14)
    np.testing.assert_allclose(task.state0, np.linalg.solve(np.eye(23) - a, 0.7 * forcing), rtol=1e-12)
    np.testing.assert_allclose(task.step(task.params, task.state0, None), task.state0, rtol=1e-14)


def test_exact_gradient_and_optimum(x64) -> None:
    task = influence_balancing(0.7)
    assert task.gradient == -6
    assert task.optimum == pytest.approx(-1 / 6)
    assert _gradient(task, _first) == pytest.approx(-6, rel=1e-9)
    # (s_0 - 1) ds_0/dtheta with s_0 = -6 theta
    assert _gradient(task, task.loss) == pytest.approx((-6 * 0.7 - 1) * -6, rel=1e-9)
    done = influence_balancing(task.optimum)
    assert float(done.loss(done.state0[None])) == pytest.approx(0, abs=1e-20)
    assert _gradient(done, done.loss) == pytest.approx(0, abs=1e-9)


def test_short_sight_has_the_wrong_sign(x64) -> None:
    """A change of theta since k steps moves s_0 by what truncation to k steps believes: the published values."""
    task = influence_balancing(1.0)

    def run(theta):
        return bptt.unroll(task.step, theta, task.state0, None, length=50)[:, 0]

    _, seen = jax.jvp(run, (task.params,), (jnp.ones(()),))
    for steps, published in {1: 1, 10: 10, 20: 16.476, 30: 9.870, 40: 0.566, 41: -0.219, 50: -4.753}.items():
        assert float(seen[steps - 1]) == pytest.approx(published, abs=6e-4)


def test_start_criterion_and_descent() -> None:
    task = influence_balancing()
    assert float(task.params) == 0
    np.testing.assert_array_equal(task.state0, 0)
    assert float(task.loss(task.state0[None])) == task.baseline == 0.5

    @jax.jit
    def update(theta):
        here = influence_balancing(theta)
        return (
            theta
            - 0.02 * bptt.adjoints(here.step, here.params, here.state0, None, here.loss, length=150).params_grad
        )

    theta = task.params
    for _ in range(30):
        theta = update(theta)
    assert task.step is influence_balancing(theta).step
    assert bool(task.solved(theta))
    assert not bool(task.solved(task.optimum * 1.02))
    assert not bool(task.solved(jnp.nan))


def test_other_sizes_and_vmap(x64) -> None:
    task = influence_balancing(0.3, size=5, positive=4)
    assert _gradient(task, _first) == pytest.approx(task.gradient) == pytest.approx(6)
    gradients = jax.vmap(jax.grad(lambda theta: influence_balancing(theta, size=5, positive=4).state0[0]))
    np.testing.assert_allclose(gradients(jnp.arange(3.0)), 6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 0}, ValueError, "size: expected at least 1, got 0"),
        ({"size": 4, "positive": 2}, ValueError, "positive: expected at most size = 4 and not half of it, got 2"),
        ({"size": 4, "positive": 5}, ValueError, "positive: expected at most size = 4 and not half of it, got 5"),
        ({"positive": 1.5}, TypeError, "positive: expected an integer"),
        ({"theta": jnp.ones(2)}, ValueError, r"theta: expected a finite number, got"),
    ],
)
def test_bad_arguments(options, error, message) -> None:
    with pytest.raises(error, match=message):
        influence_balancing(**options)
