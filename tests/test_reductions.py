import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bptt_jax.linalg import reductions

SHAPES = [(), (0,), (1,), (33,), (1792,), (1031,), (192, 64), (37, 41), (2, 3, 100)]


@pytest.mark.parametrize("shape", SHAPES)
def test_total_is_the_sum_of_all(shape, x64):
    a = np.random.default_rng(0).standard_normal(shape)
    np.testing.assert_allclose(reductions.total(jnp.asarray(a)), math.fsum(a.ravel()), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(jax.grad(reductions.total)(jnp.asarray(a)), np.ones(shape))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_largest_of_numbers_that_are_not_negative(shape, dtype):
    a = np.random.default_rng(1).random(shape).astype(dtype)
    found = jax.jit(reductions.largest)(a)
    assert found.dtype == dtype
    assert found == (a.max() if a.size else 0)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape])
def test_the_largest_is_nan_wherever_one_is(shape):
    for place in {0, math.prod(shape) // 2, math.prod(shape) - 1}:
        a = np.ones(shape, np.float32)
        a.flat[place] = np.nan
        assert np.isnan(jax.jit(reductions.largest)(a))


@pytest.mark.parametrize("length", [521, 1031, 3001, 4124])
def test_the_largest_of_each_of_a_batch_is_nan_where_one_is(length):
    a = np.ones((8, 5, length), np.float32)
    a[:, 1, -1] = np.nan
    found = jax.jit(jax.vmap(jax.vmap(reductions.largest)))(a)
    np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(np.arange(5) == 1, (8, 5)))


def test_axes_are_cut_where_they_can_be():
    for length, longest in ((32, 32), (64, 32), (7 * 64, 32), (31 * 16, 31), (509, 509), (2 * 251, 251)):
        for function in (reductions.total, reductions.largest):
            jaxpr = jax.make_jaxpr(function)(jnp.zeros(length))
            reduced = [e for e in jaxpr.eqns if e.primitive.name in ("reduce_sum", "reduce_max")]
            assert max(n for e in reduced for v in e.invars for n in v.aval.shape) == longest
