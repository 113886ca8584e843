"""A mantissa times a power of two: exact where it says so, and right at the ends of the range."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracles import users_jit

from bptt_jax.linalg import logscale
from bptt_jax.linalg.logscale import LogScaled

DTYPES = ["float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize("name", DTYPES)
def test_shift_is_exact(name, x64):
    """Bit for bit `numpy.ldexp`'s, wherever the result is a normal number; 0 or inf beyond the range."""
    info = ml_dtypes.finfo(name)
    shift = users_jit(jax.vmap(logscale.shift))
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, 500).astype(name)
    for start in (0, int(info.minexp) // 2, int(info.maxexp) // 2):  # x itself near 1, small, and large
        x_start = np.ldexp(x.astype(np.float64), start).astype(name)
        k = rng.integers(int(info.minexp) - 5 - start, int(info.maxexp) + 5 - start, 500).astype(np.int32)
        expected = np.ldexp(x_start.astype(np.longdouble), k)
        got = np.asarray(shift(x_start, k)).astype(np.float64)
        size = np.abs(expected)
        normal = (size >= float(info.smallest_normal)) & (size <= float(info.max))
        assert normal.sum() > 200
        np.testing.assert_array_equal(got[normal], expected[normal].astype(np.float64))
        assert np.all(np.isinf(got[size > float(info.max)]))
        # Whether a subnormal number is kept or flushed to zero is the hardware's choice.
        assert np.all(np.abs(got[size < float(info.smallest_normal)]) <= float(info.smallest_normal))


@pytest.mark.parametrize("name", DTYPES)
def test_powers_of_two_are_exact(name, x64):
    info = ml_dtypes.finfo(name)
    k = np.arange(int(info.minexp), int(info.maxexp), dtype=np.int32)
    got = users_jit(lambda k: logscale._power_of_two(k, jnp.dtype(name)))(k)
    np.testing.assert_array_equal(np.asarray(got, np.float64), np.ldexp(1.0, k))


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_exponents_are_those_of_frexp(name, x64):
    """From the smallest subnormal number to the largest; nothing has a place of its own, nor what is not finite."""
    info = np.finfo(name)
    rng = np.random.default_rng(0)
    sizes = np.exp2(rng.integers(info.minexp - info.nmant, info.maxexp, 400).astype(name))
    edges = [info.smallest_subnormal, info.tiny / 2, info.tiny, info.max, 0.5, 1.0, 2.0]
    numbers = np.append(rng.uniform(0.5, 1, 400).astype(name) * sizes, np.asarray(edges, name))
    numbers = numbers[numbers > 0]
    found = jax.jit(jax.vmap(logscale.exponent_of))(jnp.asarray(numbers))
    np.testing.assert_array_equal(found, np.frexp(numbers)[1])
    others = jnp.asarray([0.0, np.inf, np.nan], name)
    np.testing.assert_array_equal(jax.vmap(logscale.exponent_of)(others), [logscale.ZERO_EXPONENT, 0, 0])


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (70,), (3, 1), (2, 3, 40)])
def test_exponent_of_an_array_is_that_of_its_largest_entry(name, shape, x64):
    rng = np.random.default_rng(0)
    a = np.asarray(rng.standard_normal(shape) * np.exp2(rng.integers(-12, 12, shape)), name)
    expected = np.frexp(np.max(np.abs(a).astype(np.float64)))[1] if a.size else logscale.ZERO_EXPONENT
    assert logscale.exponent(jnp.asarray(a)) == expected
    if a.size:
        a[(-1,) * a.ndim] = np.nan
        assert logscale.exponent(jnp.asarray(a)) == 0


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_shift_down_ends_in_zero(name, x64):
    info = np.finfo(name)
    shifts = jnp.asarray([0, -1, info.minexp, info.minexp - 1, 2 * info.minexp, logscale.ZERO_EXPONENT])
    found = jax.vmap(logscale.shift_down, (None, 0))(jnp.asarray(1.5, name), shifts)
    np.testing.assert_array_equal(found, [1.5, 0.75, 1.5 * info.tiny, 0, 0, 0])


@pytest.mark.parametrize("e", [-(2**28) - 5, -(2**29) + 1, 2**28])
def test_exponents_of_any_size_are_kept(e):
    """All but that of zero itself, the smallest."""
    number = LogScaled(jnp.float32(0.5), jnp.int32(e))
    assert number.normalized().exponent == e
    assert (number + LogScaled(jnp.float32(0.25), jnp.int32(e))).normalized().exponent == e


def test_shift_of_a_complex_number_scales_each_part():
    z = np.asarray([3 + 4j, complex(np.inf, 1), complex(0, 1e-30)], np.complex64)
    got = users_jit(logscale.shift)(z, jnp.int32(3))
    np.testing.assert_array_equal(got, [24 + 32j, complex(np.inf, 8), 8 * z[2]])


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (1.0, 0.0),
        (1e-30, np.log(1e-30)),
        (1e30, np.log(1e30)),
        (1e38, np.log(1e38)),
        (3e38, np.log(3e38)),
        (0.0, -np.inf),
        (np.nan, np.nan),
        (np.inf, np.inf),
        (-np.inf, np.inf),
    ],
)
def test_log_norm_of_one_number(x, expected):
    np.testing.assert_allclose(users_jit(logscale.log_norm)(jnp.float32(x)), expected, rtol=1e-6, atol=1e-7)


def test_log_norm_of_a_subnormal_number():
    """Its logarithm, or zero's where the hardware flushes it; never anything else."""
    got = users_jit(logscale.log_norm)(jnp.float32(1e-40))
    assert got == -np.inf or abs(got - np.log(1e-40)) < 1e-3


def test_log_norm_of_a_tree(x64):
    tree = {
        "half": jnp.asarray([300.0, 400.0], jnp.float16),
        "single": jnp.full(5, 1e30, jnp.float32),
        "complex": jnp.asarray([3e30 + 4e30j], jnp.complex64),
        "none": None,
        "empty": jnp.zeros((0, 2), jnp.float32),
    }
    got = users_jit(logscale.log_norm)(tree, jnp.int32(1000))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.log(np.sqrt(5 + 25) * 1e30) + 1000 * np.log(2), rtol=1e-6)
    mixed = {"d": jnp.ones(1, jnp.float64), "s": jnp.ones(1, jnp.float32)}
    assert jax.eval_shape(logscale.log_norm, mixed).dtype == jnp.float64


@pytest.mark.parametrize("x", [1.0, 0.75, 0.5, 1e-30, 1e38, -3.0])
def test_normalized(x):
    mantissa, e = users_jit(logscale.normalize)(jnp.asarray([x, 0.0, x / 3], jnp.float32), jnp.int32(7))
    assert 0.5 <= np.max(np.abs(mantissa)) < 1
    expected = np.asarray([x, 0, x / 3], np.float32).astype(np.float64) * 2.0**7
    np.testing.assert_array_equal(np.ldexp(np.asarray(mantissa, np.float64), e), expected)


def test_zero_keeps_its_exponent():
    zero, e = users_jit(logscale.normalize)(jnp.zeros(3), jnp.int32(5))
    assert e == logscale.ZERO_EXPONENT
    assert np.all(zero == 0)
    assert users_jit(logscale.log_norm)(zero, e) == -np.inf
    assert users_jit(logscale.exponent)({}) == logscale.ZERO_EXPONENT
    assert logscale.LogScaled.of({}).log_norm == -np.inf


@pytest.mark.parametrize(
    ("a", "e_a", "b"),
    [
        (0.75, 0, 0.5),
        (0.75, -400, 1e-30),  # a disappears
        (0.75, 400, 1e30),  # b disappears
        (0.6, -90, 1e-27),
        (0.6, 120, -1e38),
        (3e4, -60, 1e-20),  # a not normalized
        (0.0, 0, 0.3),
        (0.0, logscale.ZERO_EXPONENT, 1e-30),
        (0.7, -900, 0.0),
    ],
)
def test_add(a, e_a, b):
    mantissa, e = users_jit(logscale.add)(jnp.float32(a), jnp.int32(e_a), jnp.float32(b))
    expected = np.ldexp(np.float64(np.float32(a)), e_a) + np.float64(np.float32(b))
    # One rounding of the sum in float32.
    np.testing.assert_allclose(np.ldexp(np.float64(mantissa), int(e)), expected, rtol=1e-7)
    assert 0.25 <= abs(mantissa) <= 2  # of the size of the larger one


def test_add_far_below_any_float_and_of_nothing():
    add = users_jit(logscale.add)
    assert add(jnp.float32(0.7), jnp.int32(-200_000), jnp.float32(0)) == (np.float32(0.7), -200_000)
    assert add(jnp.float32(0), jnp.int32(logscale.ZERO_EXPONENT), jnp.float32(0)) == (0, logscale.ZERO_EXPONENT)


def test_add_of_what_is_not_finite():
    for bad in (jnp.float32(jnp.nan), jnp.float32(jnp.inf)):
        assert not np.isfinite(
            users_jit(logscale.log_norm)(*users_jit(logscale.add)(jnp.float32(0.5), jnp.int32(-10), bad))
        )


def test_log_of_squares_and_zero():
    got = users_jit(lambda x, e: logscale.to_log(x, e, half=True, zero=x == 7))(
        jnp.asarray([4.0, 7.0]), jnp.int32(3)
    )
    np.testing.assert_allclose(got, [np.log(2) + 3 * np.log(2), -np.inf], rtol=1e-6)


def test_exponents_are_constants_to_differentiation():
    """The gradient of a log norm is ``x / ||x||^2``, whatever the scale."""
    x = jnp.asarray([3e-30, 4e-30])
    np.testing.assert_allclose(users_jit(jax.grad(logscale.log_norm))(x), x / 5e-30 / 5e-30, rtol=1e-5)
    # At zero there is no gradient; it is 0 rather than NaN, which would spoil those of all other numbers.
    np.testing.assert_array_equal(users_jit(jax.grad(logscale.log_norm))(jnp.zeros(2)), 0)


@pytest.mark.parametrize("axes", [0, 1])
def test_products_of_matrices(axes, x64):
    """``@`` of two in log scale, of one with a plain array on either side, and with a vector: as NumPy's."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((*[4] * axes, 3, 3)) for _ in range(2))
    v = rng.standard_normal((*[4] * axes, 3))
    one, other, vector = (LogScaled.of(jnp.asarray(x), axes) for x in (a, b, v))
    far = LogScaled(one.mantissa, one.exponent - 5000)
    for product, expected in (
        (one @ other, a @ b),
        (one @ jnp.asarray(b), a @ b),
        (jnp.asarray(a) @ other, a @ b),
        (one @ vector, (a @ v[..., None])[..., 0]),
    ):
        np.testing.assert_allclose(product.value, expected, rtol=1e-13)
        size = np.max(np.abs(product.mantissa), axis=tuple(range(axes, product.mantissa.ndim)))
        assert np.all((size >= 0.5) & (size < 1))
    product = far @ other
    np.testing.assert_array_equal(product.value, 0)
    np.testing.assert_allclose(product.log_norm, (one @ other).log_norm - 5000 * np.log(2), rtol=1e-13)
    assert np.all((far @ jnp.zeros_like(b)).exponent == logscale.ZERO_EXPONENT)


def test_zero_where(x64):
    found = LogScaled.of({"a": jnp.asarray([[1.0, 2.0], [jnp.nan, 1.0], [3.0, 4.0]])}, axes=1)
    got = found.zero_where(jnp.asarray([False, True, True]))
    np.testing.assert_array_equal(got.value["a"], [[1, 2], [0, 0], [0, 0]])
    np.testing.assert_array_equal(got.log_norm[1:], -np.inf)
    np.testing.assert_array_equal(got.exponent == logscale.ZERO_EXPONENT, [False, True, True])
