"""Eigenvectors and singular vectors: what they satisfy, at any scale, and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax.linalg import singular_vectors

RNG = np.random.default_rng(0)
REAL = RNG.standard_normal((4, 5, 5))
COMPLEX = REAL + 1j * RNG.standard_normal((4, 5, 5))
PARTS = ("values", "right", "left")


def parts(found):
    return tuple(np.asarray(getattr(found, name)) for name in PARTS)


def largest_component(rows):
    return np.take_along_axis(rows, np.argmax(np.abs(rows), axis=-1)[..., None], axis=-1)


@pytest.mark.parametrize("matrices", [REAL, COMPLEX], ids=["real", "complex"])
def test_both_equations_and_biorthogonality(matrices, dtype):
    kind = np.result_type(dtype, np.complex64 if np.iscomplexobj(matrices) else dtype)
    given = jnp.asarray(matrices, kind)
    values, right, left = parts(bptt.eigensystem(given))
    tolerance = {"atol": 200 * np.finfo(dtype).eps}
    np.testing.assert_allclose(matrices @ right, right * values[:, None], **tolerance)
    np.testing.assert_allclose(left @ matrices, values[..., None] * left, **tolerance)
    np.testing.assert_allclose(left @ right, np.broadcast_to(np.eye(5), right.shape), **tolerance)
    np.testing.assert_allclose(values, bptt.eigenvalues(given), **tolerance)
    np.testing.assert_allclose(np.linalg.norm(right, axis=1), 1, **tolerance)
    peaks = largest_component(right.mT)
    np.testing.assert_allclose(peaks.imag, 0, **tolerance)
    assert np.all(peaks.real > 0)


def test_pairs_are_conjugate_to_the_last_bit(dtype):
    values, right, left = parts(bptt.eigensystem(jnp.asarray(REAL, dtype)))
    assert np.any(values.imag > 0)
    for value, columns, rows in zip(values, right.mT, left, strict=True):
        first = np.flatnonzero(value.imag > 0)
        assert len(first) == np.sum(value.imag < 0)
        for a in (value, columns, rows):
            np.testing.assert_array_equal(a[first + 1], a[first].conj())
            np.testing.assert_array_equal(a[value.imag == 0].imag, 0)


@pytest.mark.parametrize("function", [bptt.eigensystem, singular_vectors], ids=["eigensystem", "singular_vectors"])
def test_any_scale_and_bad_neighbours(function, dtype):
    """s A has s times the values and the same vectors; a NaN in one matrix is none in the others."""
    given = jnp.asarray(REAL, dtype)
    values, right, left = parts(function(given))
    exponent = {"float32": 100, "float64": 900}[str(jnp.dtype(dtype))]
    for scale in (2.0**-exponent, 2.0**exponent):
        scaled = parts(function(given * jnp.asarray(scale, dtype)))
        np.testing.assert_array_equal(scaled[0], values * np.asarray(scale, dtype))
        np.testing.assert_array_equal(scaled[1], right)
        np.testing.assert_array_equal(scaled[2], left)
    spoilt = parts(function(given.at[1, 2, 3].set(jnp.inf)))
    for a, b in zip(spoilt, (values, right, left), strict=True):
        assert np.isnan(a[1]).all()
        np.testing.assert_array_equal(a[[0, 2, 3]], b[[0, 2, 3]])


def test_condition_numbers():
    """Of [[a, c], [0, b]] both are sqrt(1 + c^2 / (a - b)^2); those of a normal matrix are 1."""
    found = bptt.eigensystem(
        jnp.array([[[0.9, 3.0], [0.0, 0.5]], [[0.9, 0.3], [0.3, 0.5]], [[0.0, -1.0], [1.0, 0.0]]])
    )
    np.testing.assert_allclose(found.condition_numbers[0], np.sqrt(1 + (3 / 0.4) ** 2), rtol=1e-5)
    np.testing.assert_allclose(found.condition_numbers[1:], 1, rtol=1e-5)


def test_repeated_and_defective():
    """The identity's vectors are as good as any; a Jordan block has one, and says so."""
    identity, jordan = jnp.eye(3), jnp.array([[0.5, 1.0], [0.0, 0.5]])
    np.testing.assert_allclose(bptt.eigensystem(identity).left, np.eye(3), atol=1e-6)
    worst = np.max(bptt.eigensystem(jordan).condition_numbers)
    assert not worst < 1e5


@pytest.mark.parametrize("shape", [(5, 5), (6, 3), (3, 6)])
@pytest.mark.parametrize("kind", [np.float32, np.complex64])
def test_singular_vectors(shape, kind):
    matrix = RNG.standard_normal(shape) + (1j * RNG.standard_normal(shape) if kind == np.complex64 else 0)
    values, right, left = parts(singular_vectors(jnp.asarray(matrix, kind)))
    matrix = matrix.astype(kind)
    np.testing.assert_allclose(matrix @ right.T, left.T * values, atol=1e-5)
    np.testing.assert_allclose(matrix.conj().T @ left.T, right.T * values, atol=1e-5)
    np.testing.assert_allclose(right.conj() @ right.T, np.eye(min(shape)), atol=1e-5)
    np.testing.assert_allclose(left.conj() @ left.T, np.eye(min(shape)), atol=1e-5)
    peaks = largest_component(right)
    np.testing.assert_allclose(peaks.imag, 0, atol=1e-6)
    assert np.all(peaks.real > 0)
    few = parts(singular_vectors(jnp.asarray(matrix), num=2))
    for a, b in zip(few, (values, right, left), strict=True):
        np.testing.assert_allclose(a, b[:2], atol=1e-6)


@pytest.mark.parametrize("function", [bptt.eigensystem, singular_vectors], ids=["eigensystem", "singular_vectors"])
@pytest.mark.parametrize(
    "matrix", [REAL[0], COMPLEX[0], REAL[1][:, :3], COMPLEX[1][:3]], ids=["R", "C", "5x3", "3x5"]
)
def test_derivatives(function, matrix, x64):
    """First ones against differences, and these of the first ones; at a scale where a slip in it shows."""
    if function is bptt.eigensystem and matrix.shape != (5, 5):
        pytest.skip("square matrices have eigenvalues")
    scale = 1e-30
    matrix = scale * matrix
    a, b = (
        scale * (RNG.standard_normal(matrix.shape) * (1 + 1j if np.iscomplexobj(matrix) else 1)) for _ in range(2)
    )

    def of(m):
        found = function(m)
        return found.values / scale, found.right, found.left

    @jax.jit
    def pushed(m):
        return jax.jvp(of, (m,), (jnp.asarray(a),))[1]

    second = jax.jit(lambda m: jax.jvp(pushed, (m,), (jnp.asarray(b),))[1])
    for function_, slope, along in ((jax.jit(of), pushed, a), (pushed, second, b)):
        h = 1e-5
        ahead, back = (function_(jnp.asarray(matrix + s * h * along)) for s in (1, -1))
        for got, x, y in zip(slope(jnp.asarray(matrix)), ahead, back, strict=True):
            np.testing.assert_allclose(got, (x - y) / (2 * h), atol=1e-6 * (1 + np.max(np.abs(got))))


@pytest.mark.parametrize("function", [bptt.eigensystem, singular_vectors], ids=["eigensystem", "singular_vectors"])
def test_derivative_of_values_alone_at_equal_ones(function, x64):
    """The vectors' lack of one is not passed on to the values: their sum is the trace."""
    gradient = jax.grad(lambda m: jnp.sum(function(m).values.real))(jnp.eye(3))
    np.testing.assert_allclose(gradient, np.eye(3), atol=1e-12)


def test_num_is_checked():
    with pytest.raises(ValueError, match="num: expected at most 3 singular values, got 4"):
        singular_vectors(jnp.ones((3, 5)), num=4)
    assert singular_vectors(jnp.ones((3, 5)), num=3).left.shape == (3, 3)


def test_mapped_axes_join_the_stack(x64):
    both = jnp.asarray(REAL.reshape(2, 2, 5, 5))
    mapped = jax.vmap(jax.vmap(bptt.eigensystem))(both)
    for a, b in zip(parts(mapped), parts(bptt.eigensystem(both)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
