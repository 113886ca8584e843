"""Leading singular values and eigenvalues of maps: against LAPACK in double precision, where the space ends too."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bptt_jax.linalg import krylov
from bptt_jax.linalg.logscale import LogScaled

D, NUM = 120, 4


def _rank(k):
    rng = np.random.default_rng(k)
    return rng.standard_normal((D, k)) @ rng.standard_normal((k, D))


def _cases():
    rng = np.random.default_rng(0)
    gaussian = rng.standard_normal((D, D)) / np.sqrt(D)
    spread = np.linalg.qr(rng.standard_normal((D, D)))[0]
    broken = gaussian.copy()
    broken[3, 5] = np.nan
    endless = gaussian.copy()
    endless[7, 2] = -np.inf
    return {
        "gaussian": gaussian,
        "outliers": gaussian + 3 * np.diag(np.arange(D) < 2),
        "identity": np.eye(D),
        "orthogonal": spread,
        "zero": np.zeros((D, D)),
        "rank one": _rank(1),
        "rank three": _rank(3),
        "nilpotent": np.diag(np.arange(D - 1) < 5, k=1).astype(float),  # ones above the diagonal, five
        "triple": spread @ np.diag(np.where(np.arange(D) < 3, 2.0, 0.5)) @ spread.T,
        "small": 1e-25 * gaussian,
        "large": 1e25 * gaussian,
        "nan": broken,
        "inf": endless,
    }


CASES = _cases()
FINITE = [name for name in CASES if name not in ("nan", "inf")]


def products(a):
    def product(matrix, v):
        return LogScaled.of(jnp.matmul(matrix, v, precision="highest"))

    return partial(product, a), partial(product, a.T)


def singular(a, num=NUM):
    return krylov.singular_triplets(*products(a), len(a), a.dtype, num)


def eigen(a, num=NUM):
    return krylov.eigenpairs(products(a)[0], len(a), a.dtype, num)


@pytest.fixture(scope="module", params=["float32", "float64"])
def found(request):
    """(eps, {name: (singular triplets, eigenpairs) in units}): all matrices at a time, compiled once."""
    with jax.enable_x64(request.param == "float64"):
        stack = jnp.asarray(np.stack(list(CASES.values())), request.param)
        s, e = jax.jit(jax.vmap(lambda a: (singular(a), eigen(a))))(stack)
        s, e = jax.tree.map(np.asarray, (s, e))
        return np.finfo(request.param).eps, {
            name: jax.tree.map(lambda a, k=k: a[k], (s, e)) for k, name in enumerate(CASES)
        }


def relative(name):
    """The matrix over its norm, and the norm."""
    norm = np.linalg.norm(CASES[name], 2) or 1.0
    return CASES[name] / norm, norm


def in_unit(found, name, norm):
    """Values and errors over the norm of the matrix."""
    return [np.ldexp(a.astype(np.complex128).real, found.exponent) / norm for a in (found.values, found.errors)]


@pytest.mark.parametrize("name", FINITE)
def test_singular_values(found, name):
    """Multiple ones as often as they are there, zeros where the rank ends."""
    eps, all_found = found
    a, norm = relative(name)
    values, errors = in_unit(all_found[name][0], name, norm)
    exact = np.linalg.svd(a, compute_uv=False)
    np.testing.assert_allclose(values, exact[:NUM], atol=max(200 * eps, 2e-6))
    for value, error in zip(values, errors, strict=True):
        assert np.min(np.abs(exact - value)) <= 1.01 * error  # what the estimate promises
    assert np.all(errors < 0.02)


@pytest.mark.parametrize("name", FINITE)
def test_singular_vectors(found, name):
    """``A v = s u`` to rounding, and ``A^T u = s v`` to the estimate."""
    eps, all_found = found
    a, norm = relative(name)
    triplets = all_found[name][0]
    values, errors = in_unit(triplets, name, norm)
    left, right = triplets.left.astype(float), triplets.right.astype(float)
    for basis in (left, right):
        np.testing.assert_allclose(basis @ basis.T, np.eye(NUM), atol=100 * eps)
    np.testing.assert_allclose(right @ a.T, values[:, None] * left, atol=100 * eps)
    residuals = np.linalg.norm(left @ a - values[:, None] * right, axis=1)
    assert np.all(residuals <= 1.01 * errors + 100 * eps)


@pytest.mark.parametrize("name", FINITE)
def test_eigenpairs(found, name):
    """Every pair has the residual that it is given, and none is made up where the space ends."""
    eps, all_found = found
    a, norm = relative(name)
    pairs = all_found[name][1]
    values = pairs.values.astype(complex) * 2.0 ** float(pairs.exponent) / norm
    errors = in_unit(pairs, name, norm)[1]
    x = pairs.vectors.astype(complex)
    assert np.all(np.diff(np.abs(values)) <= 10 * eps)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=100 * eps)
    residuals = np.linalg.norm(x @ a.T - values[:, None] * x, axis=1)
    assert np.all(residuals <= 1.01 * errors + 100 * eps)
    assert np.all(np.abs(values) <= 1 + 100 * eps)  # none beyond the norm


@pytest.mark.parametrize("name", ["gaussian", "outliers", "identity", "rank one", "rank three", "triple", "large"])
def test_leading_eigenvalues(found, name):
    _, all_found = found
    pairs = all_found[name][1]
    norm = relative(name)[1]
    exact = np.linalg.eigvals(CASES[name])
    exact = np.sort(np.abs(exact))[::-1][:NUM] / norm
    moduli = np.abs(pairs.values[:NUM].astype(complex)) * 2.0 ** float(pairs.exponent) / norm
    np.testing.assert_allclose(moduli, exact, atol=1e-4)


@pytest.mark.parametrize("name", ["nan", "inf"])
def test_what_is_not_finite_is_nan(found, name):
    triplets, pairs = found[1][name]
    for a in (triplets.values, triplets.errors, pairs.values, pairs.errors):
        assert np.all(np.isnan(a))


@pytest.mark.parametrize("size", [1, 9])
def test_all_of_a_small_matrix(size, x64):
    """Where the space is everything, all values are exact, in float64 to rounding."""
    a = np.random.default_rng(size).standard_normal((size, size))
    s, e = jax.jit(lambda a: (singular(a, size), eigen(a, size)))(a)
    np.testing.assert_allclose(
        np.ldexp(s.values, s.exponent), np.linalg.svd(a, compute_uv=False), rtol=1e-11, atol=1e-14
    )
    values = np.asarray(e.values) * 2.0 ** float(e.exponent)
    distances = np.abs(values[:, None] - np.linalg.eigvals(a)[None, :])
    assert np.max(np.min(distances, axis=0)) < 1e-12
    assert np.max(np.min(distances, axis=1)) < 1e-12


def test_soft_edge():
    """Of a random matrix, whose singular values crowd towards the largest: 1e-3 in float32."""
    a = np.random.default_rng(0).standard_normal((500, 500)) / np.sqrt(500)
    triplets = jax.jit(partial(singular, num=1))(jnp.asarray(a, jnp.float32))
    assert len(triplets.left) == 1
    np.testing.assert_allclose(
        np.ldexp(triplets.values, triplets.exponent), np.linalg.svd(a, compute_uv=False)[:1], rtol=1e-3
    )


def test_last_dimensions_of_a_space():
    """All directions are random ones here, and little of the last is orthogonal to all before."""
    triplets = jax.jit(partial(singular, num=20))(jnp.eye(20, dtype=jnp.float32))
    for basis in (triplets.left, triplets.right):
        np.testing.assert_allclose(np.asarray(basis) @ np.asarray(basis).T, np.eye(20), atol=1e-6)


def test_overflow_is_not_taken_for_the_end_of_the_space():
    """A transpose of 1e25 where the map has shown 1: squares overflow, and that is NaN, not zero."""
    size, dtype = 9, jnp.dtype(jnp.float32)
    triplets = jax.jit(
        lambda: krylov.singular_triplets(LogScaled.of, lambda u: LogScaled.of(1e25 * u), size, dtype, 1)
    )()
    assert np.isnan(triplets.values)


@pytest.mark.parametrize("batched", [(True, True), (True, False), (False, True)])
def test_a_row_is_put_into_the_rows_of_every_one_of_a_batch(batched):
    rng = np.random.default_rng(3)
    rows, row = rng.standard_normal((2, 3, 5, 4)), rng.standard_normal((2, 3, 4))
    rows, row = (a if yes else a[0, 0] for a, yes in zip((rows, row), batched, strict=True))

    axes = (*(0 if yes else None for yes in batched), None)
    put = jax.vmap(jax.vmap(krylov._put, axes), axes)
    expected = np.broadcast_to(rows, (2, 3, 5, 4)).copy()
    expected[:, :, 2] = row
    np.testing.assert_array_equal(put(jnp.asarray(rows), jnp.asarray(row), 2), expected.astype(np.float32))
    assert "scatter" not in str(jax.make_jaxpr(put)(rows, row, 2))
