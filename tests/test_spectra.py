"""Singular values and eigenvalues by their defining identities, and by NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax.linalg.spectra import spectral_norm, spectral_radius

RNG = np.random.default_rng(0)
SQUARE = RNG.standard_normal((6, 5, 5))


def tolerance(dtype):
    """Backward stable algorithms: a modest multiple of eps times the norm (about 4)."""
    return 100 * jnp.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(5, 5), (6, 5, 5), (2, 3, 4, 3), (2, 2, 5), (1, 1)])
def test_singular_values(shape, dtype):
    a = RNG.standard_normal(shape)
    got = np.asarray(bptt.singular_values(jnp.asarray(a, dtype)))
    assert got.dtype == dtype
    assert got.shape == (*shape[:-2], min(shape[-2:]))
    np.testing.assert_allclose(got, np.linalg.svd(a, compute_uv=False), atol=tolerance(dtype))
    assert np.all(np.diff(got) <= 0)


def test_singular_values_of_a_given_factorisation(dtype):
    """A = U S V^T with U, V orthogonal and S chosen."""
    (u, _), (v, _) = (np.linalg.qr(RNG.standard_normal((5, 5))) for _ in range(2))
    s = np.asarray([3.0, 1.0, 1.0, 1e-3, 0.0])
    np.testing.assert_allclose(
        bptt.singular_values(jnp.asarray(u @ np.diag(s) @ v.T, dtype)), s, atol=tolerance(dtype)
    )
    np.testing.assert_allclose(bptt.singular_values(jnp.asarray(u, dtype)), 1, atol=tolerance(dtype))


def test_invariants(dtype):
    """Sum of squares is the Frobenius norm's; product of singular values and of eigenvalues is the determinant's;
    sum of eigenvalues is the trace; the squares are the eigenvalues of A^T A."""
    a = jnp.asarray(SQUARE, dtype)
    s, e = np.asarray(bptt.singular_values(a), np.float64), np.asarray(bptt.eigenvalues(a), np.complex128)
    rtol = 20 * tolerance(dtype)
    np.testing.assert_allclose((s**2).sum(-1), (SQUARE**2).sum((-2, -1)), rtol=rtol)
    np.testing.assert_allclose(s.prod(-1), np.abs(np.linalg.det(SQUARE)), rtol=rtol)
    np.testing.assert_allclose(e.prod(-1), np.linalg.det(SQUARE), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(e.sum(-1), np.trace(SQUARE, axis1=-2, axis2=-1), atol=rtol)
    gram = bptt.eigenvalues(jnp.asarray(SQUARE.swapaxes(-1, -2) @ SQUARE, dtype))
    np.testing.assert_allclose(gram.real, s**2, atol=rtol)
    np.testing.assert_allclose(gram.imag, 0, atol=rtol)


def test_eigenvalues_against_numpy(dtype):
    got = np.asarray(bptt.eigenvalues(jnp.asarray(SQUARE, dtype)))
    assert got.dtype == np.result_type(dtype, np.complex64)
    for values, matrix in zip(got, SQUARE, strict=True):
        expected = np.linalg.eigvals(matrix)
        # Each has its own partner: eigenvalues of a random matrix lie far apart.
        distance = np.abs(values[:, None] - expected)
        assert np.all(np.sort(distance.argmin(axis=1)) == np.arange(5))
        assert np.max(distance.min(axis=1)) < tolerance(dtype)


def test_eigenvalues_descend_and_pairs_stand_together():
    rotations = np.zeros((6, 6))
    for k, angle in enumerate((0.3, 1.0, 2.0)):  # all of modulus 1: the order among pairs is free
        c, s = np.cos(angle), np.sin(angle)
        rotations[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = [[c, -s], [s, c]]
    q, _ = np.linalg.qr(RNG.standard_normal((6, 6)))
    for matrix in (rotations, q @ rotations @ q.T, np.asarray(RNG.standard_normal((6, 6)))):
        got = np.asarray(bptt.eigenvalues(jnp.asarray(matrix, jnp.float32)))
        assert np.all(np.diff(np.abs(got)) <= 1e-6)
        first = np.flatnonzero(got.imag > 0)
        assert first.size == (got.imag < 0).sum()
        np.testing.assert_allclose(got[first + 1], got[first].conj(), atol=1e-6)


@pytest.mark.parametrize(
    ("matrix", "values"),
    [
        ([[2, 1], [1, 1]], [np.exp(0.9624236501192069), np.exp(-0.9624236501192069)]),  # Arnold's cat map
        ([[0.9, 1], [0, 0.9]], [0.9, 0.9]),  # a Jordan block
        (np.diag([0.1, -3.0, 2.0]), [-3, 2, 0.1]),
        (np.zeros((2, 2)), [0, 0]),
        ([[0, -2], [2, 0]], [2j, -2j]),
    ],
)
def test_eigenvalues_in_closed_form(matrix, values):
    # The eigenvalue of a Jordan block moves by the square root of a perturbation, 3e-4 in float32.
    np.testing.assert_allclose(bptt.eigenvalues(jnp.asarray(matrix, jnp.float32)), values, atol=5e-4, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_where_it_is(bad):
    spoilt = SQUARE.astype(np.float32)
    spoilt[2, 1, 3] = bad
    for function in (
        bptt.singular_values,
        bptt.eigenvalues,
        spectral_norm,
        spectral_radius,
        bptt.linalg.condition_number,
    ):
        got, clean = np.asarray(function(spoilt)), np.asarray(function(SQUARE.astype(np.float32)))
        assert np.all(np.isnan(got[2]))
        others = [0, 1, 3, 4, 5]
        np.testing.assert_array_equal(got[others], clean[others])


def test_norm_radius_condition_number():
    a = jnp.asarray(
        np.stack([np.diag([4.0, 2.0]), np.diag([1.0, 0.0]), np.zeros((2, 2)), [[0, 1], [0, 0]]]), jnp.float32
    )
    np.testing.assert_allclose(spectral_norm(a), [4, 1, 0, 1])
    np.testing.assert_allclose(spectral_radius(a), [4, 1, 0, 0])
    np.testing.assert_allclose(bptt.linalg.condition_number(a), [2, np.inf, np.inf, np.inf])
    np.testing.assert_allclose(
        bptt.linalg.condition_number(jnp.asarray(RNG.standard_normal((3, 4, 2)), jnp.float32)).shape, (3,)
    )


def test_norm_bounds_radius():
    assert np.all(spectral_radius(SQUARE) <= spectral_norm(SQUARE) * (1 + 1e-6))


def test_complex_half_integer_and_numpy_input(x64):
    i = np.asarray([[0, 1j], [2, 0]])
    np.testing.assert_allclose(bptt.singular_values(i), [2, 1], rtol=1e-14)
    np.testing.assert_allclose(np.abs(bptt.eigenvalues(i)), np.sqrt(2), rtol=1e-14)
    whole = np.asarray([[3, 0], [4, 5]])
    expected = np.sqrt([45, 5])
    for dtype in (jnp.bfloat16, jnp.float16, jnp.int32, jnp.int64, jnp.uint8):
        got = bptt.singular_values(jnp.asarray(whole, dtype))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        assert bptt.eigenvalues(jnp.asarray(whole, dtype)).dtype == jnp.complex64


def test_numpy_double_where_jax_has_single():
    """Without x64, NumPy's float64 is computed in single precision, without a warning."""
    assert bptt.singular_values(np.eye(2)).dtype == jnp.float32
    assert bptt.eigenvalues(np.eye(2) * 1j).dtype == jnp.complex64


def test_one_compilation_for_one_shape(compilations):
    jax.block_until_ready(bptt.singular_values(SQUARE[:2, :2, :2].astype(np.float32)))
    first = len(compilations)
    jax.block_until_ready(bptt.singular_values(2 * SQUARE[:2, :2, :2].astype(np.float32)))
    assert len(compilations) == first


@pytest.mark.parametrize("size", [4, 20, 40])  # LAPACK takes several ways
@pytest.mark.parametrize("kind", [np.float32, np.complex64])
def test_every_routine_is_homogeneous(size, kind):
    """f(s A) = s f(A), to the last bit, for powers of two; these of NumPy in double precision."""
    a = RNG.standard_normal((size, size)) + (1j * RNG.standard_normal((size, size)) if kind == np.complex64 else 0)
    a = a.astype(kind)
    powers = [-105, -43, 43, 100, 120]  # entries and results stay normal numbers of single precision
    scaled = np.stack([a, *(a * np.float32(2.0**k) for k in powers)])
    exact = np.sort(np.abs(np.linalg.eigvals(a.astype(np.complex128))))[::-1]
    for function in (
        bptt.singular_values,
        bptt.eigenvalues,
        bptt.linalg.spectral_norm,
        bptt.linalg.spectral_radius,
    ):
        one, *others = np.asarray(function(scaled))
        for k, other in zip(powers, others, strict=True):
            np.testing.assert_array_equal(other.astype(np.complex128) * 2.0**-k, one.astype(np.complex128))
    np.testing.assert_allclose(np.abs(np.asarray(bptt.eigenvalues(scaled))[0]), exact, rtol=1e-3)
    condition = np.asarray(bptt.linalg.condition_number(scaled))
    np.testing.assert_array_equal(condition, condition[0])


def test_double_precision_is_homogeneous(x64):
    a = RNG.standard_normal((30, 30))
    one, *others = np.asarray(bptt.eigenvalues(np.stack([a, *(a * 2.0**k for k in (-1000, -500, 500, 1000))])))
    for k, other in zip((-1000, -500, 500, 1000), others, strict=True):
        np.testing.assert_array_equal(other * 2.0**-k, one)
    np.testing.assert_allclose(np.sum(one), np.trace(a), rtol=1e-10)


@pytest.mark.parametrize("kind", [np.float64, np.complex128])
def test_second_derivatives_of_eigenvalues(kind, x64):
    """Of the sum of the squares, tr(A^2), along a direction: 2 tr(E^2); and of the largest modulus, by differences."""
    a, e = (SQUARE[k, :3, :3] + (1j * SQUARE[k, 2:, 2:] if kind == np.complex128 else 0) for k in (0, 1))

    def along(t):
        values = bptt.eigenvalues(a + t.astype(kind) * e)
        return jnp.stack([jnp.sum(values**2).real, jnp.abs(values[0])])

    second = jax.jit(jax.jacfwd(jax.jacrev(along)))(jnp.zeros(()))
    np.testing.assert_allclose(second[0], 2 * np.trace(e @ e).real, rtol=1e-9)
    after, now, before = (np.abs(np.linalg.eigvals(a + t * e)).max() for t in (1e-4, 0.0, -1e-4))
    np.testing.assert_allclose(second[1], (after - 2 * now + before) / 1e-8, rtol=1e-5, atol=1e-6)
