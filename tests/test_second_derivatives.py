"""Second derivatives of what has rules of its own: right, or refused in a loop that has been linearised, for there JAX
forgets the rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt


def step(w, h, x):
    return jnp.tanh(w * h[::-1] + x)


def trajectory(w, x):
    return jnp.sum(bptt.deer(step, w, jnp.zeros(2), x).states ** 2)


def rest(w, x):
    return jnp.sum(bptt.analysis.fixed_points(step, w, jnp.zeros((1, 2)), x[0]).points ** 2)


def largest(w, x):
    return jnp.sum(bptt.singular_values(bptt.jacobians(step, w, jnp.zeros(2), x))[:, 0])


def leading(w, x):
    return jnp.sum(bptt.analysis.leading_eigenvalues(step, w, jnp.zeros(2), x, num=1).values.real)


@pytest.mark.parametrize("one", [trajectory, rest, largest, leading])
def test_within_a_loop_a_second_derivative_is_right_or_refused(x64, one):
    w, xs = jnp.asarray([0.5, 0.9]), jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 2)))
    direction = jnp.asarray([0.3, -0.7])

    def along(function, w):
        return jax.jvp(function, (w,), (direction,))[1]

    def mapped(w):
        return jnp.sum(jax.lax.map(lambda x: one(w, x), xs))

    slope = along(mapped, w)
    np.testing.assert_allclose(jax.grad(mapped)(w) @ direction, slope, rtol=1e-9)
    for outer in (jax.grad(lambda w: jax.grad(mapped)(w) @ direction), lambda w: along(jax.grad(mapped), w)):
        with pytest.raises(TypeError, match="second derivatives: "):
            outer(w)
    if one is leading:
        return

    def together(w):
        return sum(one(w, x) for x in xs)

    def differences(w, h=1e-4):
        return (along(together, w + h * direction) - along(together, w - h * direction)) / (2 * h)

    forward_first = along(lambda w: along(mapped, w), w)
    for found in (forward_first, jax.grad(lambda w: jax.grad(together)(w) @ direction)(w) @ direction):
        np.testing.assert_allclose(found, differences(w), rtol=1e-5)
