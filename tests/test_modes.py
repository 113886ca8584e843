"""Coordinates along eigenvectors: each goes its own way where the recurrence is linear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax.analysis import modal_coordinates

RNG = np.random.default_rng(0)
W = 0.5 * RNG.standard_normal((4, 4))
BIAS = RNG.standard_normal(4)


def step(params, h, x):
    """Two leaves, one of them complex, and a counter."""
    w, bias = params
    vector = w @ jnp.concatenate([h["a"], h["z"].real, h["z"].imag]) + bias
    return {"a": vector[:2], "n": h["n"] + 1, "z": jax.lax.complex(vector[2:3], vector[3:])}


def test_a_linear_recurrence_about_its_fixed_point(x64):
    point = np.linalg.solve(np.eye(4) - W, BIAS)
    start = {"a": jnp.ones(2), "n": jnp.zeros((), int), "z": jnp.ones(1, complex)}
    states = bptt.unroll(step, (W, BIAS), start, length=6)
    origin = bptt.ravel_state(start)[1](jnp.asarray(point))
    found = bptt.eigensystem(W)
    coordinates = np.asarray(modal_coordinates(states, found, origin=origin))
    np.testing.assert_allclose(coordinates[1:], np.asarray(found.values) * coordinates[:-1], atol=1e-12)
    vectors = np.concatenate([states["a"], states["z"].real, states["z"].imag], axis=1)
    np.testing.assert_allclose(coordinates @ np.asarray(found.right).T, vectors - point, atol=1e-12)
    np.testing.assert_allclose(modal_coordinates(states, found), vectors @ np.asarray(found.left).T, atol=1e-12)


def test_a_state_that_is_not_finite_spoils_no_other():
    states = np.ones((3, 4), np.float32)
    states[1, 2] = np.inf
    found = np.asarray(modal_coordinates(states, bptt.eigensystem(W.astype(np.float32))))
    assert np.isfinite(found[[0, 2]]).all()
    assert not np.isfinite(found[1]).any()


@pytest.mark.parametrize(
    ("states", "options", "says"),
    [
        (np.ones((3, 5)), {}, r"system: expected left \[5, 5\], one of D = 5, got \[4, 4\]"),
        (np.ones((3, 4)), {"origin": np.ones(3)}, r"origin: expected a leaf \[4\], as in the states, got \[3\]"),
        (np.ones((3, 4)), {"origin": {"h": np.ones(4)}}, "origin: expected a state of the structure"),
        ({"a": np.ones((3, 2)), "b": np.ones((2, 2))}, {}, r"states: expected leaves \[T, ...\] of one T"),
        (np.float32(1), {}, "states: expected leaves"),
        (np.ones((3, 4)), {"system": W}, "system: expected an Eigensystem"),
    ],
)
def test_bad_arguments(states, options, says):
    given = {"system": bptt.eigensystem(W.astype(np.float32))} | options
    with pytest.raises((TypeError, ValueError), match=says):
        modal_coordinates(states, **given)
