"""Frames of directions: their factors, and the derivatives of these."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import linear_step

import bptt_jax as bptt
from bptt_jax.linalg.lq import orthonormal

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 90, 100), (2, 2, 5, 5), (8, 40)])
def test_factors_are_what_they_should_be(kind, shape, x64):
    a = jnp.asarray(RNG.standard_normal(shape), kind)
    l, q = jax.jit(orthonormal)(a)
    tolerance = {"atol": 200 * np.finfo(kind).eps}
    np.testing.assert_allclose(l @ q, a, **tolerance)
    np.testing.assert_array_equal(np.triu(l, 1), 0)
    gram = q @ q.mT
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(shape[-2]), gram.shape), **tolerance)


@pytest.mark.parametrize(("rows", "columns"), [(5, 8), (6, 6), (30, 33)])
def test_derivative_of_the_orthonormalisation(rows, columns, x64):
    a, w, v = jnp.asarray(RNG.standard_normal((3, rows, columns)))

    def some(lq, a):
        l, q = lq(a)
        return jnp.sum(w * q) + jnp.sum(v[:, :rows] * l)

    def of_jax(a):
        q, r = jnp.linalg.qr(a.T)
        return r.T, q.T

    got, expected = (jax.jit(jax.grad(partial(some, lq)))(a) for lq in (orthonormal, of_jax))
    np.testing.assert_allclose(got, expected, atol=1e-9)


def test_the_pace_of_the_first_steps_is_not_trusted():
    """Of a rotation no direction ever outgrows another: each stretch may be longer than the one before by one step,
    until the first of 20 batches ends."""
    turn = jnp.asarray(np.linalg.qr(RNG.standard_normal((6, 6)))[0], jnp.float32)
    found = bptt.lyapunov_exponents(linear_step, turn, jnp.ones(6), length=20 * 40)
    ends = np.flatnonzero(found.orthonormalised[:40]) + 1
    np.testing.assert_array_equal(np.diff(ends, prepend=0), [1, 2, 3, 4, 5, 6, 7, 8, 4])
