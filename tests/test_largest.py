"""The largest singular value of many matrices, found alone: LAPACK's in double precision, whatever the matrix is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax.linalg import spectra
from bptt_jax.linalg.largest import largest_singular_value
from bptt_jax.linalg.spectra import spectral_norm

RNG = np.random.default_rng(0)
COUNT, SIZE = 16, 33
GAUSS = RNG.standard_normal((COUNT, SIZE, SIZE))
ORTHOGONAL = np.linalg.qr(GAUSS)[0]
KINDS = {
    "random": GAUSS,
    "orthogonal": ORTHOGONAL,  # all values are the largest
    "product": np.linalg.matrix_power(GAUSS / 6, 20),  # one value far above all others
    "of rank one": GAUSS[:, :, :1] @ GAUSS[:, :1],
    "diagonal": GAUSS * np.eye(SIZE),  # squares beside the diagonal are zero
    "blocks": np.kron(np.eye(SIZE // 3), GAUSS[:, :3, :3]),
    "a Jordan block": np.broadcast_to(0.9 * np.eye(SIZE) + np.eye(SIZE, k=1), GAUSS.shape),
    "graded": GAUSS * np.logspace(0, -30, SIZE),
    "nearly two": ORTHOGONAL * np.r_[1, 1 - 1e-6, np.linspace(0, 0.9, SIZE - 2)] @ ORTHOGONAL[::-1],
    "wide": RNG.standard_normal((COUNT, SIZE, SIZE + 7)),
    "tall": RNG.standard_normal((COUNT, SIZE + 7, SIZE)),
    "complex": GAUSS + 1j * GAUSS[::-1],
    "of any scale": GAUSS * np.logspace(-30, 30, COUNT)[:, None, None],
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_largest(kind, dtype):
    a = KINDS[kind].astype(np.result_type(dtype, np.complex64) if kind == "complex" else dtype)
    got = np.asarray(spectral_norm(a))
    assert got.dtype == dtype
    exact = np.linalg.svd(a.astype(np.result_type(a.dtype, float)), compute_uv=False)[:, 0]
    np.testing.assert_allclose(got, exact, rtol=12 * jnp.finfo(dtype).eps)


def test_zero_and_what_is_not_finite_leave_the_others_alone(dtype):
    a = GAUSS.astype(dtype)
    a[0], a[1, 2, 3], a[2, 3, 4], a[3] = 0, np.nan, -np.inf, 0
    a[3, 5, 7] = np.finfo(dtype).tiny
    got = np.asarray(spectral_norm(a))
    assert got[0] == 0
    assert np.all(np.isnan(got[1:3]))
    assert got[3] == np.finfo(dtype).tiny
    np.testing.assert_allclose(got[4:], np.linalg.norm(GAUSS[4:], 2, (1, 2)), rtol=12 * jnp.finfo(dtype).eps)


def test_of_many_alone_of_few_and_small_ones_among_all():
    def routine(*shape):
        return spectra._routine("spectral norms", "cpu", shape)

    assert routine(16, 32, 40) is routine(4, 4, 512, 64) is largest_singular_value
    assert routine(15, 64, 64) is routine(1000, 31, 64) is spectra._routine("spectral norms", "gpu", (99, 64, 64))
    assert "sytrd" in jax.jit(spectral_norm).lower(jnp.ones((16, 32, 32))).as_text()
    mapped = jax.vmap(jax.vmap(spectral_norm))
    assert "sytrd" in jax.jit(mapped).lower(jnp.ones((4, 4, 32, 32))).as_text()  # mapped axes count
    assert "sytrd" not in jax.jit(spectral_norm).lower(jnp.ones((15, 32, 32))).as_text()


def test_derivatives(x64):
    """Of the largest of all: u v^T, and what follows of it by differences."""
    u, _, v = np.linalg.svd(GAUSS)
    slope = jax.grad(lambda a: jnp.sum(spectral_norm(a)))
    np.testing.assert_allclose(jax.jit(slope)(GAUSS), u[:, :, :1] * v[:, :1], atol=1e-12)
    np.testing.assert_allclose(jax.vmap(slope)(GAUSS[:, None]), (u[:, :, :1] * v[:, :1])[:, None], atol=1e-12)
    way, step = GAUSS[::-1].copy(), 1e-5
    _, curve = jax.jvp(slope, (GAUSS,), (way,))
    differences = (slope(GAUSS + step * way) - slope(GAUSS - step * way)) / (2 * step)
    np.testing.assert_allclose(curve, differences, atol=1e-5 * np.abs(differences).max())


def test_norms_of_products_are_those_of_the_matrices(dtype):
    jacobians = jnp.asarray(GAUSS / np.sqrt(SIZE), dtype)
    exact, product = [], np.eye(SIZE)
    for jacobian in np.asarray(jacobians, float)[::-1]:
        product = product @ jacobian
        exact.append(np.log(np.linalg.norm(product, 2)))
    np.testing.assert_allclose(bptt.product_log_norms(jacobians), exact[::-1], rtol=1e3 * jnp.finfo(dtype).eps)
