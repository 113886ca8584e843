"""Products of Jacobians at any length: closed forms, NumPy in float64, and the ends of the range."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import cell_example, linear_step, users_jit
from slices import covering

import bptt_jax as bptt

jacobian_product, product_log_norms = users_jit(bptt.jacobian_product), users_jit(bptt.product_log_norms)


def repeated(matrix, count, dtype=jnp.float32):
    return jnp.asarray(np.broadcast_to(np.asarray(matrix), (count, *np.shape(matrix))), dtype)


def value(scaled):
    return np.asarray(scaled.mantissa) * np.exp(np.asarray(scaled.log_scale))


def test_against_float64(dtype):
    """Random, far from normal: only the right order gives this."""
    factors = np.random.default_rng(0).standard_normal((60, 4, 4)) * np.logspace(-1, 1, 4)
    expected, norms = np.eye(4), []
    for factor in factors[::-1]:
        expected = expected @ factor
        norms.append(np.log(np.linalg.norm(expected, 2)))
    got = product_log_norms(jnp.asarray(factors, dtype))
    eps = 60 * jnp.finfo(dtype).eps
    assert got.dtype == dtype
    np.testing.assert_allclose(got, norms[::-1], rtol=eps, atol=eps)
    whole = jacobian_product(jnp.asarray(factors, dtype))
    assert 0.5 <= np.max(np.abs(whole.mantissa)) < 1
    scale = np.exp(np.float64(whole.log_scale) - norms[-1])
    expected = expected / np.linalg.norm(expected, 2)
    np.testing.assert_allclose(np.asarray(whole.mantissa, np.float64) * scale, expected, atol=20 * eps)


def test_later_steps_stand_on_the_left():
    first, second = np.asarray([[1.0, 2.0], [0.0, 1.0]]), np.asarray([[1.0, 0.0], [3.0, 1.0]])
    got = jacobian_product(np.stack([first, second]))
    np.testing.assert_allclose(value(got), second @ first, rtol=1e-6)


@pytest.mark.parametrize(("factor", "expected"), [(0.5, -2772.5887), (2.0, 2772.5887), (-2.0, 2772.5887)])
def test_four_thousand_powers_of_two(factor, expected):
    jacobians = repeated(factor * np.eye(2), 4000)
    got = product_log_norms(jacobians)
    np.testing.assert_allclose(got[0], expected, rtol=1e-6)
    np.testing.assert_allclose(got, np.arange(4000, 0, -1) * np.log(abs(factor)), rtol=1e-6)
    whole = jacobian_product(jacobians)
    np.testing.assert_allclose(whole.log_scale + np.log(whole.mantissa[0, 0]), expected, rtol=1e-6)


def test_scalar_of_the_oracles():
    """0.9^5000 is 1e-229."""
    np.testing.assert_allclose(product_log_norms(repeated([[0.9]], 5000))[0], -526.8, atol=0.01)


@pytest.mark.parametrize("d", [(0.9, -0.5), (1.1, 1.0), (1e-30, -1e-31), (1e30, 1e20)])
def test_diagonal(d):
    got = product_log_norms(repeated(np.diag(d), 100))
    np.testing.assert_allclose(got, np.arange(100, 0, -1) * np.log(np.max(np.abs(d))), rtol=1e-6)


def test_cat_map():
    """Symmetric, of determinant 1: the norm of its powers grows by the golden ratio's square."""
    a = np.asarray([[2.0, 1.0], [1.0, 1.0]])
    got = product_log_norms(repeated(a, 300))
    np.testing.assert_allclose(got, np.arange(300, 0, -1) * 0.9624236501192069, rtol=1e-6)


def test_orthogonal_matrices_keep_the_norm():
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((1000, 5, 5)))
    # Each is orthogonal to 1e-7, which 1000 of them multiply at worst.
    np.testing.assert_allclose(product_log_norms(jnp.asarray(q, jnp.float32)), 0, atol=1e-4)


def test_jordan_block_grows_before_it_decays():
    a, steps = 0.9, 400
    got = np.asarray(product_log_norms(repeated([[a, 1], [0, a]], steps)))[::-1]
    n = np.arange(1, steps + 1)
    powers = a ** n[:, None, None] * np.stack(
        [[np.ones(steps), n / a], [np.zeros(steps), np.ones(steps)]]
    ).transpose(2, 0, 1)
    np.testing.assert_allclose(got, np.log(np.linalg.norm(powers, 2, axis=(1, 2))), atol=1e-4)
    assert got[8] > np.log(3) > 0 > got[-1]


def test_zero_is_minus_infinity_and_never_nan():
    nilpotent = repeated([[0, 1], [0, 0]], 5)
    got = product_log_norms(nilpotent)
    np.testing.assert_array_equal(got, [-np.inf] * 4 + [0])
    whole = jacobian_product(nilpotent)
    assert whole.log_scale == -np.inf
    assert not np.any(whole.mantissa)


def test_lstm_that_has_closed_every_gate():
    """All of the state is forgotten: sigmoid(-200) is 0 in float32, and so is the product."""
    step, params, state0, xs, _ = cell_example("lstm", jnp.float32)
    closed = jax.tree.map(jnp.zeros_like, params)._replace(bias=jnp.full_like(params.bias, -200))
    assert np.all(product_log_norms(bptt.jacobians(step, closed, state0, xs)) == -np.inf)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_spoils_what_lies_before_it(bad):
    jacobians = np.stack([np.eye(2)] * 6).astype(np.float32)
    jacobians[2, 0, 1] = bad
    got = product_log_norms(jacobians)
    assert np.all(np.isnan(got[:3]))
    np.testing.assert_array_equal(got[3:], 0)


def test_subspace_of_unequal_rates():
    """Of a block of rates 0.5 and 2 only the larger one is seen, in whichever coordinates."""
    v = np.asarray([[1.0, 1.0], [0.0, 1.0]])
    a = v @ np.diag([0.5, 2.0]) @ np.linalg.inv(v)
    got = product_log_norms(repeated(a, 1000))
    np.testing.assert_allclose(got[0] - got[1], np.log(2), atol=1e-4)


def test_complex_half_and_integer_matrices():
    i = repeated([[2j]], 3, jnp.complex64)
    np.testing.assert_allclose(product_log_norms(i), np.log([8, 4, 2]), rtol=1e-6)
    np.testing.assert_allclose(value(jacobian_product(i)), [[-8j]], rtol=1e-6)
    for dtype in (jnp.bfloat16, jnp.int32):
        got = product_log_norms(repeated([[2]], 3, dtype))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, np.log([8, 4, 2]), rtol=1e-6)


def test_iid_gaussian_matrices():
    """The largest exponent of N = 10, entries N(0, 1/N), within three standard errors.

    Each step adds half the logarithm of a chi-square variable of 10 degrees: variance psi'(5) / 4 = 0.0553.
    """
    steps, n = 20_000, 10
    factors = np.random.default_rng(0).standard_normal((steps, n, n)).astype(np.float32) / np.float32(np.sqrt(n))
    whole = jacobian_product(factors)
    rate = (float(whole.log_scale) + np.log(np.linalg.norm(whole.mantissa, 2))) / steps
    assert abs(rate - -0.05166) < 3 * np.sqrt(0.0553 / steps)


def test_jacobians_of_a_linear_step():
    """The whole way: the step, its Jacobians, their product, against a matrix power."""
    a = np.asarray([[0.3, 0.8], [-0.5, 0.6]])
    jacobians = bptt.jacobians(linear_step, jnp.asarray(a, jnp.float32), jnp.ones(2), length=50)
    np.testing.assert_allclose(value(jacobian_product(jacobians)), np.linalg.matrix_power(a, 50), rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "length"),
    covering(product(["float32", "float64"], [1, 2, 7, 40]), ("float32", 7)),
    indirect=["dtype"],
)
def test_prefixes_and_suffixes_are_the_sequential_products(dtype, length):
    rng = np.random.default_rng(length)
    factors = jnp.asarray(rng.standard_normal((length, 3, 3)) * np.logspace(-1, 1, 3), dtype)
    prefixes, suffixes = bptt.linalg.prefix_products(factors), bptt.linalg.suffix_products(factors)
    # Identities in place of the others cost no rounding, and one compilation serves every length.
    present = np.stack([np.tri(length, dtype=bool), np.tri(length, dtype=bool).T])[..., None, None]
    parts = jnp.where(present, factors, jnp.eye(3, dtype=dtype))
    wanted = jax.jit(jax.vmap(jax.vmap(bptt.jacobian_product)))(parts)
    eps = length * float(jnp.finfo(dtype).eps)
    assert prefixes.mantissa.dtype == prefixes.log_scale.dtype == dtype
    for k, got in enumerate((prefixes, suffixes)):
        scale = np.exp(got.log_scale - wanted.log_scale[k])[:, None, None]
        np.testing.assert_allclose(got.mantissa * scale, wanted.mantissa[k], atol=50 * eps)
    np.testing.assert_allclose(
        suffixes.log_scale + np.log(np.linalg.norm(suffixes.mantissa, 2, axis=(1, 2))),
        product_log_norms(factors),
        rtol=20 * eps, atol=20 * eps,
    )  # fmt: skip


@pytest.mark.parametrize("rates", [(0.9, 0.5), (1.1, 1.05), (0.999, 1.001)])
def test_a_hundred_thousand_factors_in_single_precision(rates):
    """Contracting, expanding, mixed: rotated, so that every factor is dense. The norm is the diagonal one's."""
    count = 100_000
    powers = np.where(np.arange(count)[:, None] % 2 == 0, np.asarray(rates), np.asarray(rates) ** 0.5)
    turn = np.asarray([[0.8, -0.6], [0.6, 0.8]])
    factors = jnp.asarray(np.einsum("ij,tj,kj->tik", turn, powers, turn), jnp.float32)
    exact = np.log(np.asarray(powers, np.float64))[::-1].cumsum(axis=0)[::-1].max(axis=1)
    sequential = product_log_norms(factors)
    parallel = bptt.linalg.suffix_products(factors)
    norms = np.log(np.linalg.norm(np.asarray(parallel.mantissa), 2, axis=(1, 2))) + parallel.log_scale
    for got in (sequential, norms):
        np.testing.assert_allclose(got[::1000], exact[::1000], rtol=1e-3)


def test_prefixes_of_zero_stay_zero_and_differentiate():
    factors = jnp.stack([2 * jnp.eye(2), jnp.zeros((2, 2)), jnp.eye(2)])
    prefixes, suffixes = bptt.linalg.prefix_products(factors), bptt.linalg.suffix_products(factors)
    np.testing.assert_array_equal(np.isneginf(prefixes.log_scale), [False, True, True])
    np.testing.assert_array_equal(np.isneginf(suffixes.log_scale), [True, True, False])
    np.testing.assert_array_equal(prefixes.mantissa[1:], 0)

    def trace(a):
        last = jax.tree.map(lambda x: x[-1], bptt.linalg.prefix_products(a))
        return jnp.trace(last.mantissa) * jnp.exp(last.log_scale)

    matrices = jax.random.normal(jax.random.key(0), (3, 2, 2))
    plain = jax.grad(lambda a: jnp.trace(a[2] @ a[1] @ a[0]))(matrices)
    np.testing.assert_allclose(jax.grad(trace)(matrices), plain, rtol=1e-4, atol=1e-5)
    batch = jnp.stack([matrices, 2 * matrices])
    both = jax.vmap(bptt.linalg.suffix_products)(batch)
    np.testing.assert_allclose(both.log_scale[1], bptt.linalg.suffix_products(2 * matrices).log_scale)


T = 9
MASK = np.asarray([1, 0, 1, 1, 0, 1, 1, 0, 0], bool)
# Before the first step; in the padding, so before step 5; after the last real step, where nothing comes any more.
RESETS = np.asarray([1, 0, 0, 0, 1, 0, 0, 1, 0], bool)
PIECES = [[0, 2, 3], [5, 6]]
PIECE_OF = np.asarray([0, 0, 0, 0, 0, 1, 1, 1, 1])  # in padding that of the state which is held


def factors(dtype=jnp.float64):
    found = np.random.default_rng(5).standard_normal((T, 3, 3))
    return jnp.asarray(np.where(MASK[:, None, None], found, np.nan), dtype)


def log_norm(matrix):
    with np.errstate(divide="ignore"):
        return np.log(np.linalg.norm(matrix, 2))


def by_hand(first, last):
    """The product of the real steps from `first` to `last`, zero if a later piece begins among them."""
    if PIECE_OF[first] != PIECE_OF[last]:
        return np.zeros((3, 3))
    product = np.eye(3)
    for k in range(first, last + 1):
        product = np.asarray(factors())[k] @ product if MASK[k] else product
    return product


def test_padding_and_resets(x64):
    """Against products by hand, and what is NaN stands in the padding; at real steps the last piece alone."""
    options = {"mask": jnp.asarray(MASK), "resets": jnp.asarray(RESETS)}

    @jax.jit
    def measure(a):
        both = bptt.linalg.prefix_products(a, **options), bptt.linalg.suffix_products(a, **options)
        return bptt.jacobian_product(a, **options), *both, bptt.product_log_norms(a, **options)

    whole, prefixes, suffixes, norms = jax.tree.map(np.asarray, measure(factors()))
    np.testing.assert_allclose(whole.value, by_hand(0, T - 1))
    for t in range(T):
        np.testing.assert_allclose(prefixes.value[t], by_hand(0, t), rtol=1e-12)
        np.testing.assert_allclose(suffixes.value[t], by_hand(t, T - 1), rtol=1e-12)
        np.testing.assert_allclose(norms[t], log_norm(by_hand(t, T - 1)), rtol=1e-12, atol=1e-12)
    alone = factors()[np.asarray(PIECES[1])]
    np.testing.assert_allclose(norms[PIECES[1]], bptt.product_log_norms(alone), rtol=1e-12)
    last = suffixes.value[np.asarray(PIECES[1])]
    np.testing.assert_allclose(last, bptt.linalg.suffix_products(alone).value, rtol=1e-12)
    first = prefixes.value[np.asarray(PIECES[0])]
    alone = factors()[np.asarray(PIECES[0])]
    np.testing.assert_allclose(first, bptt.linalg.prefix_products(alone).value, rtol=1e-12)


def test_resets_without_padding_and_before_the_first_step():
    """Flags of a stream have one at its very beginning: alone it changes nothing."""
    a = repeated(2 * np.eye(2), 4)
    begins = jnp.asarray([True, False, False, False])
    np.testing.assert_array_equal(product_log_norms(a, resets=begins), product_log_norms(a))
    np.testing.assert_array_equal(jacobian_product(a, resets=begins).value, 16 * np.eye(2))
    np.testing.assert_array_equal(
        bptt.linalg.prefix_products(a, resets=begins).value, bptt.linalg.prefix_products(a).value
    )
    last = jnp.asarray([False, False, False, True])
    np.testing.assert_allclose(product_log_norms(a, resets=last) / np.log(2), [-np.inf] * 3 + [1], rtol=1e-6)
    padded = {"mask": np.arange(4) > 1, "resets": begins}
    np.testing.assert_array_equal(jacobian_product(a, **padded).value, 4 * np.eye(2))
    np.testing.assert_array_equal(
        bptt.linalg.prefix_products(a, **padded).value[2:], [2 * np.eye(2), 4 * np.eye(2)]
    )
    sequence = bptt.Sequence(**padded)
    found = bptt.analysis.product_singular_values(lambda w, h, x: w @ h, a[0], jnp.ones(2), sequence, num=2)
    np.testing.assert_allclose(found.log_values / np.log(2), [2, 2], rtol=1e-6)


@pytest.mark.parametrize("at", [1, 4])
def test_nothing_passes_a_reset_not_even_nan(at):
    """A reset before step 3, one matrix of NaN before it or after."""
    a = np.stack([2 * np.eye(2)] * 6).astype(np.float32)
    a[at] = np.nan
    resets = jnp.arange(6) == 3
    got = product_log_norms(a, resets=resets)
    np.testing.assert_array_equal(got[:3], -np.inf)
    np.testing.assert_array_equal(np.isnan(got[3:]), [at == 4, at == 4, False])
    suffixes, prefixes = (f(a, resets=resets) for f in (bptt.linalg.suffix_products, bptt.linalg.prefix_products))
    np.testing.assert_array_equal(suffixes.value[:3], 0)
    np.testing.assert_array_equal(prefixes.value[3:], 0)
    np.testing.assert_array_equal(np.isnan(prefixes.value[:3, 0, 0]), [False, at == 1, at == 1])
    np.testing.assert_array_equal(jacobian_product(a, resets=resets).value, 0)


def relu_step(w, h, x):
    return jax.nn.relu(w @ h + x)


@pytest.mark.exhaustive
@pytest.mark.parametrize("step", [linear_step, relu_step])
def test_a_trajectory_that_is_not_finite_shows_where_the_jacobian_does_not(step):
    """The NaN enters at step 2; a reset before step 4 ends it."""
    xs = jnp.ones((6, 2)).at[2].set(jnp.nan)
    resets = jnp.arange(6) == 4
    arguments = step, jnp.eye(2), jnp.ones(2), bptt.Sequence(xs, resets=resets)
    jacobians, states = bptt.jacobians(*arguments), bptt.unroll(*arguments)
    assert np.isfinite(jacobians).all()
    assert not np.isfinite(states).all()
    got = product_log_norms(jacobians[:4], states=states[:4])
    np.testing.assert_array_equal(got, np.nan)
    np.testing.assert_array_equal(product_log_norms(jacobians[:2], states=states[:2]), 0)
    prefixes = bptt.linalg.prefix_products(jacobians, resets=resets, states=states).value[:, 0, 0]
    np.testing.assert_array_equal(prefixes, [1, 1, np.nan, np.nan, 0, 0])
    suffixes = bptt.linalg.suffix_products(jacobians, resets=resets, states=states).value[:, 0, 0]
    np.testing.assert_array_equal(suffixes, [0, 0, 0, 0, 1, 1])
    got = product_log_norms(jacobians, resets=resets, states=states)
    np.testing.assert_array_equal(got, [-np.inf] * 4 + [0, 0])
    # What is held in the padding is no step that leads to it.
    real = jnp.asarray([True, True, True, False, True, True])
    got = product_log_norms(jacobians, mask=real, resets=resets, states=states)
    np.testing.assert_array_equal(got, [-np.inf] * 4 + [0, 0])


def test_derivatives_in_one_piece_alone(x64):
    """Of a product within the last piece: zero for all factors before the reset, as by hand for the others."""
    a = jnp.asarray(np.random.default_rng(6).standard_normal((5, 2, 2)))
    resets = jnp.arange(5) == 2
    got = jax.grad(lambda a: bptt.linalg.suffix_products(a, resets=resets).value[2, 0, 1])(a)
    exact = jax.grad(lambda a: (a[4] @ a[3] @ a[2])[0, 1])(a)
    np.testing.assert_allclose(got, exact, rtol=1e-12, atol=1e-14)
    got = jax.grad(lambda a: bptt.product_log_norms(a, resets=resets)[2])(a)
    exact = jax.grad(lambda a: jnp.log(jnp.linalg.norm(a[4] @ a[3] @ a[2], 2)))(a)
    np.testing.assert_allclose(got, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"resets": np.zeros(3, bool)}, ValueError, "resets: expected one boolean for each step, T = 4, got 3"),
        ({"resets": np.zeros(4)}, TypeError, r"resets: expected booleans \[T\], got float64"),
        ({"mask": np.zeros((4, 1), bool)}, ValueError, r"mask: expected shape \[T\], got \[4, 1\]"),
        ({"mask": [True] * 4}, TypeError, r"mask: expected an array of booleans \[T\], got list"),
        ({"states": np.zeros((3, 2))}, ValueError, r"states: expected leaves \[4, ...\], as the jacobians"),
    ],
)
def test_bad_sequences(options, error, message):
    for function in (
        bptt.jacobian_product,
        bptt.product_log_norms,
        bptt.linalg.prefix_products,
        bptt.linalg.suffix_products,
    ):
        with pytest.raises(error, match=message):
            function(np.ones((4, 2, 2), np.float32), **options)
