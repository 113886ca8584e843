"""Singular vectors of long products: known ones, identities, and NumPy where the product can be formed."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slices import covering

from bptt_jax.linalg import product_singular_vectors

RNG = np.random.default_rng(0)
found_by = jax.jit(product_singular_vectors, static_argnames="num")


SIZE, STEPS = 4, 60  # one program for most


def telescope(spread=9.0, steps=STEPS):
    """Factors of which every one takes the singular vectors of the product to its own: all of it is known."""
    turns = np.linalg.qr(RNG.standard_normal((steps + 1, SIZE, SIZE)))[0]
    gains = np.exp(np.linspace(0.3, 0.3 - spread, SIZE) + 0.1 * RNG.standard_normal((steps, 1)))
    jacobians = np.einsum("tij,tj,tkj->tik", turns[1:], gains, turns[:-1])
    return jacobians, np.log(gains).sum(axis=0), turns[0].T, turns[-1].T


def check(found, logs, right, left, eps):
    num = len(found.log_values)
    np.testing.assert_allclose(found.log_values, logs[:num], atol=20 * eps * (STEPS + np.max(np.abs(logs))))
    aligned = np.sum(np.asarray(found.right) * right[:num], axis=1)
    np.testing.assert_allclose(np.abs(aligned), 1, atol=100 * eps)
    np.testing.assert_allclose(
        np.sum(np.asarray(found.left) * left[:num], axis=1), np.sign(aligned), atol=100 * eps
    )
    for rows in (found.right, found.left):
        np.testing.assert_allclose(rows @ rows.T, np.eye(num), atol=100 * eps)
    assert np.all(np.max(found.right, axis=1) >= -np.min(found.right, axis=1) * (1 - eps**0.5))
    assert np.max(found.errors) < 1e3 * eps


@pytest.mark.parametrize(
    ("num", "dtype"),
    covering(product([None, 1], ["float32", "float64"]), (None, "float32"), (1, "float64")),
    indirect=["dtype"],
)
def test_all_of_them_however_far_below_the_first(num, dtype):
    """The last is smaller than the first by 1e230, which no floating number beside it holds."""
    jacobians, *known = telescope()
    check(found_by(jnp.asarray(jacobians, dtype), num=num), *known, float(jnp.finfo(dtype).eps))


def test_as_numpy_of_a_product_that_can_be_formed(x64):
    jacobians = np.eye(SIZE) + 0.1 * RNG.standard_normal((STEPS, SIZE, SIZE))
    found = found_by(jacobians)
    product = np.linalg.multi_dot(jacobians[::-1])
    np.testing.assert_allclose(found.log_values, np.log(np.linalg.svd(product, compute_uv=False)), atol=1e-9)
    gains = np.exp(found.log_values)[:, None]
    np.testing.assert_allclose(found.right @ product.T, gains * found.left, atol=1e-12 * gains[0, 0])
    np.testing.assert_allclose(found.left @ product, gains * found.right, atol=1e-12 * gains[0, 0])


def test_the_sum_is_the_determinant_and_the_transpose_exchanges_the_vectors(x64):
    jacobians = RNG.standard_normal((STEPS, SIZE, SIZE))
    found, turned = found_by(jacobians), found_by(jacobians[::-1].mT)
    np.testing.assert_allclose(np.sum(found.log_values), np.sum(np.linalg.slogdet(jacobians)[1]), rtol=1e-12)
    np.testing.assert_allclose(found.log_values, turned.log_values, rtol=1e-12)
    np.testing.assert_allclose(np.abs(np.sum(found.left * turned.right, axis=1)), 1, atol=1e-10)


def test_equal_ones(x64):
    """Of a product of rotations all are 1; a shear's are reciprocal, and here two stand between."""
    turns = np.linalg.qr(RNG.standard_normal((STEPS, SIZE, SIZE)))[0]
    np.testing.assert_allclose(found_by(turns).log_values, 0, atol=1e-12)
    shear = np.eye(SIZE) + np.eye(SIZE, k=3)
    sinh = np.arcsinh(STEPS / 2)
    found = found_by(np.broadcast_to(shear, turns.shape))
    np.testing.assert_allclose(found.log_values, [sinh, 0, 0, -sinh], atol=1e-12)


def test_few_of_a_matrix_whose_values_crowd(x64):
    matrix = RNG.standard_normal((1, 60, 60))
    found = found_by(matrix, num=3)
    np.testing.assert_allclose(found.log_values, np.log(np.linalg.svd(matrix[0])[1][:3]), rtol=1e-9)
    assert np.max(found.errors) < 1e-6


def test_any_scale_zero_and_what_is_not_finite():
    jacobians = telescope()[0].astype(np.float32)
    plain = found_by(jacobians)
    for power in (-90, 90):
        scaled = found_by(jacobians * np.float32(2.0**power))
        np.testing.assert_allclose(scaled.log_values, plain.log_values + STEPS * power * np.log(2), rtol=1e-6)
        np.testing.assert_array_equal(scaled.right, plain.right)
    diagonal = np.float32([0.9, 0.0, 0.5, 0.0])
    dead = found_by(np.broadcast_to(np.diag(diagonal), jacobians.shape))
    np.testing.assert_allclose(np.exp(dead.log_values / STEPS), [0.9, 0.5, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(np.abs(dead.right[:2]), np.eye(4)[[0, 2]], atol=1e-6)
    assert np.all(found_by(0 * jacobians).log_values == -np.inf)
    spoilt = jacobians.copy()
    spoilt[7, 1, 2] = np.nan
    for leaf in jax.tree.leaves(found_by(spoilt)):
        assert np.isnan(leaf).all()


def test_padding_and_resets(x64):
    mask, resets = np.ones(STEPS, bool), np.zeros(STEPS, bool)
    mask[[0, 3, 59]] = False
    resets[[0, 59]] = True
    jacobians, *known = telescope(steps=STEPS - 3)
    padded = np.full((STEPS, SIZE, SIZE), np.nan)
    padded[mask] = jacobians
    check(found_by(padded, mask=mask, resets=resets), *known, 1e-15)
    resets[5] = True
    erased = found_by(padded, mask=mask, resets=resets)
    assert np.all(erased.log_values == -np.inf)
    assert np.isnan(erased.right).all()


@pytest.mark.parametrize("num", covering([1, 2, 3], 2))  # of the last, differences are all rounding
def test_derivatives_of_the_logarithms(num, x64):
    """Where no floating number holds the product: d log s_k = sum over the steps of left'^T dJ right' / gain'."""
    jacobians = jnp.asarray(telescope(20.0)[0])
    along = jnp.asarray(1e-3 * RNG.standard_normal(jacobians.shape))
    run = jax.jit(partial(product_singular_vectors, num=num))
    moved = jax.jvp(lambda e: run(jacobians + e * along).log_values, (0.0,), (1.0,))[1]
    for k, slope in enumerate(moved):  # those far below the first move by millions of times as much
        e = 1e-5 / max(1.0, abs(float(slope)))
        ahead, back = (run(jacobians + d * along).log_values[k] for d in (e, -e))
        np.testing.assert_allclose(slope, (ahead - back) / (2 * e), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("jacobians", "options", "says"),
    [
        (np.ones((3, 2, 2), np.complex64), {}, "jacobians: expected real matrices, got complex64"),
        (np.ones((3, 2, 2)), {"num": 3}, "num: expected at most D = 2 singular values, got 3"),
        (np.ones((3, 2, 3)), {}, "jacobians: expected square matrices"),
    ],
)
def test_bad_arguments(jacobians, options, says):
    with pytest.raises((TypeError, ValueError), match=says):
        product_singular_vectors(jacobians, **options)
