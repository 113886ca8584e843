"""Digits, underflow and loss scales by lag, on problems whose answer is known; and against plain `jax.grad`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slices import covering

from bptt_jax.analysis.precision import gradient_precision
from bptt_jax.recurrence.tensorfloat32 import with_tensorfloat32


def halving(b, h, x):
    """The part of lag k is ``0.5^k``, read at the end."""
    return 0.5 * h + b


def doubling(b, h, x):
    return 2 * h + b


def last(states, size=None):
    return states[-1] if size is None else size * states[-1]


def at_origin(step, loss=last, **options):
    return gradient_precision(step, jnp.zeros(()), jnp.zeros(()), None, loss, **options)


def test_float16_ends_at_6e_8(x64) -> None:
    """Normal down to 2^-14, something down to 2^-24; twice 2^14 is below its largest number, twice 2^15 is not."""
    found = at_origin(halving, dtype="float16", length=40)
    np.testing.assert_allclose(found.log_norms, np.arange(40) * np.log(0.5), rtol=1e-6)
    np.testing.assert_array_equal(found.relative_errors, np.where(np.arange(40) < 25, 0, 1))
    np.testing.assert_array_equal(found.underflows, np.arange(40) > 14)
    assert [float(a) for a in (found.half_lag, found.underflow_lag, found.lost_lag)] == [25, 15, 25]
    np.testing.assert_array_equal(found.loss_scales_log2, np.maximum(np.arange(40) - 14, 0))
    assert [int(a) for a in (found.highest_log2, found.loss_scale_log2, found.mended_lag)] == [14, 14, 29]
    assert "half gone at lag 25, underflow at 15, which a loss scale of 2^14 mends up to 28" in repr(found)


def test_no_loss_scale_mends_what_its_adjoints_leave_no_room_for(x64) -> None:
    """h_0 decays to nothing beneath an error signal that is still large: only early steps add to the gradient."""
    problem = lambda w, h, x: w * h, jnp.full((), 0.5), jnp.ones(()), None, last
    found = gradient_precision(*problem, dtype="bfloat16", length=300)
    assert float(found.underflow_lag) == float(found.mended_lag) == 0
    assert "underflow at 0, which no loss scale mends" in repr(found)


def test_the_loss_scale_mends_what_it_says(x64) -> None:
    before = at_origin(halving, dtype="float16", length=40)
    scaled = at_origin(halving, args=jnp.asarray(2.0 ** int(before.loss_scale_log2)), dtype="float16", length=40)
    assert float(scaled.underflow_lag) == float(before.mended_lag)
    assert int(scaled.highest_log2) == 0


def test_overflow(x64) -> None:
    """2^16 is beyond float16."""
    found = at_origin(doubling, dtype=jnp.float16, length=20)
    np.testing.assert_array_equal(found.relative_errors, np.where(np.arange(20) < 16, 0, np.inf))
    assert float(found.half_lag) == 16
    assert int(found.highest_log2) == -5
    assert float(found.underflow_lag) == np.inf
    np.testing.assert_array_equal(at_origin(doubling, dtype=jnp.bfloat16, length=20).relative_errors, 0)


def matrix_step(b, h, x):
    w = jnp.full((1, 1), 1 + 2.0**-11, h.dtype)
    return jax.lax.cond(h[0] < 9, lambda h: jax.jit(jnp.matmul)(w, h), lambda h: h, h) + b


def test_tensorfloat32_rounds_factors_to_ten_bits(x64) -> None:
    """1 + 2^-11 is 1 to it, so that what is (1 + 2^-11)^k stays 1; float32 has it exactly."""
    given = matrix_step, jnp.zeros(1), jnp.zeros(1), None, lambda states: states[-1, 0]
    found = gradient_precision(*given, dtype="tensorfloat32", length=80)
    np.testing.assert_allclose(found.relative_errors, 1 - (1 + 2.0**-11) ** -np.arange(80.0), atol=1e-7)
    assert found.dtype == "tensorfloat32"
    assert float(found.half_lag) == int(np.argmax(found.relative_errors > 2.0**-5))  # its epsilon is 2^-10
    assert np.all(gradient_precision(*given, dtype="float32", length=80).relative_errors < 1e-5)


def test_products_within_loops_and_derivatives_are_rounded() -> None:
    """Within scan, cond, jit, checkpoint and derivatives of one's own; other operations are not."""

    @jax.custom_jvp
    def product(a, b):
        return a @ b

    product.defjvp(lambda at, along: (product(*at), along[0] @ at[1] + at[0] @ along[1]))

    def function(w):
        h = jax.lax.scan(lambda h, _: (jax.checkpoint(product)(w, h), None), jnp.eye(2), None, length=2)[0]
        return jax.lax.cond(w[0, 0] > 0, lambda h: h @ w, lambda h: h, h) + 2.0**-12

    w = (1 + 2.0**-11) * jnp.eye(2)
    np.testing.assert_array_equal(with_tensorfloat32(function)(w), np.eye(2) + 2.0**-12)
    assert np.all(np.diag(function(w)) > 1 + 2.0**-10)
    slope = with_tensorfloat32(jax.grad(lambda w: jnp.trace(function(w))))(w)
    np.testing.assert_array_equal(slope, 3 * np.eye(2))
    turned = with_tensorfloat32(lambda w: w @ w)(w.astype(jnp.complex64) * (1 + 1j) / 1)
    np.testing.assert_array_equal(turned, 2j * np.eye(2))

    def other_products(a):
        filtered = jax.lax.conv_general_dilated(a[None], a[None], (1,), "VALID")
        return filtered.ravel(), jax.lax.ragged_dot(a, a[None], jnp.asarray([1], jnp.int32)).ravel()

    one = w[:1, :1]
    np.testing.assert_array_equal(with_tensorfloat32(other_products)(one), np.ones((2, 1)))
    assert np.all(np.asarray(other_products(one)) > 1 + 2.0**-11)


@pytest.mark.parametrize("dtype", covering(["float16", "bfloat16"], "float16"))
def test_errors_are_those_of_plain_gradients(dtype, x64) -> None:
    """`jax.grad` in the dtype, with parameters of their own for every step."""
    steps, rng = 24, np.random.default_rng(0)
    w = jnp.asarray(0.45 * rng.standard_normal((3, 3)), dtype)
    xs, start = jnp.asarray(rng.standard_normal((steps, 3)), dtype), jnp.full(3, 0.5, dtype)

    def step(w, h, x):
        return jnp.tanh(w @ h + x)

    def loss(states):
        return jnp.sum(states[-1])

    @partial(jax.jit, static_argnums=0)
    def parts(kind, w, xs):
        def run(ws):
            return jax.lax.scan(lambda h, at: (step(at[0], h, at[1]), None), start.astype(kind), (ws, xs))[0].sum()

        return jax.grad(run)(jnp.stack([w.astype(kind)] * steps))[::-1].astype(jnp.float64)

    low, exact = (parts(kind, w, xs.astype(kind)) for kind in (dtype, "float64"))
    norms = np.linalg.norm(exact, axis=(1, 2))
    errors = np.linalg.norm(low - exact, axis=(1, 2)) / norms
    found = gradient_precision(step, w, start, xs, loss, dtype=dtype)
    np.testing.assert_allclose(found.log_norms, np.log(norms), rtol=1e-5)
    np.testing.assert_allclose(np.log(found.relative_errors), np.log(errors), atol=1.0)
    np.testing.assert_allclose(found.digits, np.maximum(-np.log10(found.relative_errors), 0), rtol=1e-5)
    tiny = float(jnp.finfo(dtype).smallest_normal)
    np.testing.assert_array_equal(found.underflows, np.max(np.abs(low), axis=(1, 2)) < tiny)


def test_what_is_zero_is_not_lost(x64) -> None:
    found = at_origin(halving, lambda states: states[2], dtype="float16", length=5)
    assert np.all(np.isnan(found.relative_errors[3:]))
    assert float(found.lost_lag) == np.inf
    assert "half of the digits are left, no underflow" in repr(found)


def test_no_gradient_and_one_that_is_not_finite(x64) -> None:
    none = at_origin(halving, lambda states: 0 * states[-1], dtype="float16", length=5)
    assert "float16: there is no gradient" in repr(none)
    assert [int(none.highest_log2), int(none.loss_scale_log2)] == [15, 0]
    lost = at_origin(halving, lambda states: jnp.log(states[-1]) - jnp.log(states[-2]), dtype="float16", length=5)
    np.testing.assert_array_equal(lost.relative_errors, np.inf)
    assert float(lost.half_lag) == 0
    assert "half gone at lag 0" in repr(lost)


def test_refusals(x64) -> None:
    with pytest.raises(
        ValueError, match='dtype: expected bfloat16, float16, float32 or "tensorfloat32", got float64'
    ):
        at_origin(halving, dtype="float64", length=3)
    with pytest.raises(TypeError, match="dtype: expected a floating type"):
        at_origin(halving, dtype="int32", length=3)
    turning = lambda a, z, x: a * z, jnp.ones((), complex), jnp.ones((), complex), None, lambda z: z[-1].real
    with pytest.raises(TypeError, match="dtype: expected float32 or double for complex numbers, got float16"):
        gradient_precision(*turning, dtype="float16", length=3)
    np.testing.assert_array_equal(gradient_precision(*turning, dtype="float32", length=3).relative_errors, 0)
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64: expected double precision"):
        at_origin(halving, dtype="float16", length=3)
