"""Spectra without Jacobians: against those of the Jacobians, in closed form, and small in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import EXAMPLES, T, linear_step, users_jit
from slices import covering

import bptt_jax as bptt
from bptt_jax.analysis import matrix_free
from bptt_jax.recurrence.linearization import linearize
from bptt_jax.step import bind

NUM = 2


def scaling_step(params, h, x):
    """A Jacobian that is diagonal, and another at every step."""
    return x * h


def log_norms(step, params, state0, xs=None, length=None):
    """``log ||dh_T/dh_t||`` for all t."""
    steps = length or len(jax.tree.leaves(xs)[0])
    return matrix_free.suffix_log_norms(linearize(bind(step, params, state0, xs, steps)))


@pytest.mark.parametrize("name", covering(["gru", "tokens", "complex"], "complex"))
def test_against_the_jacobians(name, x64, monkeypatch):
    """In batches of three steps and of one product, which changes nothing."""
    step, params, state0, xs, length = EXAMPLES[name](jnp.float64)
    size = bptt.ravel_state(state0)[0].size
    monkeypatch.setattr(matrix_free, "_BASIS_NUMBERS", 3 * size**2)

    @jax.jit
    def measure(params, state0, xs):
        arguments = step, params, state0, xs
        return (
            bptt.jacobians(*arguments, length=length),
            bptt.analysis.leading_singular_values(*arguments, num=NUM, length=length),
            bptt.analysis.leading_eigenvalues(*arguments, num=NUM, length=length),
            bptt.analysis.product_singular_values(*arguments, num=NUM, length=length),
            log_norms(*arguments, length=T),
        )

    jacobians, singular, eigen, product, norms = jax.tree.map(np.asarray, measure(params, state0, xs))
    np.testing.assert_allclose(singular.values, np.linalg.svd(jacobians, compute_uv=False)[:, :NUM], rtol=1e-12)
    moduli = np.sort(np.abs(np.linalg.eigvals(jacobians)), axis=1)[:, ::-1]
    np.testing.assert_allclose(np.abs(eigen.values), moduli[:, :NUM], rtol=1e-10, atol=1e-12)
    spread = np.abs(eigen.values[..., None] - np.linalg.eigvals(jacobians)[:, None, :])
    assert np.max(np.min(spread, axis=-1)) < 1e-10
    assert np.max(singular.errors) < 1e-12  # the space is everything
    assert np.max(eigen.errors) < 1e-12
    after = np.eye(size)
    for t in reversed(range(T)):
        after = after @ jacobians[t]
        np.testing.assert_allclose(norms[t], np.log(np.linalg.norm(after, 2)), rtol=1e-11)
    exact = np.linalg.svd(after, compute_uv=False)[:NUM]
    np.testing.assert_allclose(product.log_values[0], np.log(exact[0]), rtol=1e-11)
    assert np.max(product.errors) < 1e-6
    assert np.all(np.abs(np.exp(product.log_values) - exact) <= 10 * product.errors * exact)


def _pieces():
    c, s = np.cos(0.7), np.sin(0.7)
    return {
        "halves": (0.5 * np.eye(2), 4000 * np.log(0.5) * np.ones(2)),
        "doubles": (2 * np.eye(2), 4000 * np.log(2) * np.ones(2)),
        "orthogonal": (np.array([[c, -s], [s, c]]), np.zeros(2)),
        "zero": (np.zeros((2, 2)), np.full(2, -np.inf)),
        "nilpotent": (np.eye(2, k=1), np.full(2, -np.inf)),
        "rank one": (np.outer([0.5, 0.5], [1, 1]), [0, -np.inf]),
        # (a^T, T a^(T-1); 0, a^T): the norm grows T-fold against the eigenvalue.
        "Jordan": (0.9 * np.eye(2) + np.eye(2, k=1), [4000 * np.log(0.9) + np.log(4000 / 0.9), np.nan]),
    }


def test_products_beyond_the_range():
    """4000 equal factors in float32; a norm of exactly zero is minus infinity."""
    cases = _pieces()
    matrices = jnp.asarray(np.stack([a for a, _ in cases.values()]), jnp.float32)

    @users_jit
    @jax.vmap
    def measure(a):
        return bptt.analysis.product_singular_values(linear_step, a, jnp.zeros(2), num=2, length=4000)

    got = measure(matrices)
    for k, (name, (_, exact)) in enumerate(cases.items()):
        known = ~np.isnan(exact)
        np.testing.assert_allclose(
            got.log_values[k][known], np.asarray(exact)[known], rtol=2e-6, atol=5e-4, err_msg=name
        )
    # Of a Jordan block's product the second value is a^T / T, far below the rounding of the first.
    assert got.errors[-1, 1] > 1 or got.log_values[-1, 1] == -np.inf
    assert np.all(got.errors[:3] < 1e-3)


def test_every_product_has_its_own_scale_and_ends_with_its_segment():
    """First one direction wins by 2^120, then the other by 2^208, while both shrink beyond the range."""
    late = np.arange(60)[:, None] >= 30
    logs = np.where(late, np.log([1 / 64, 1.9]), np.log([4.0, 0.25])) - np.log(64)

    @users_jit
    def measure(xs, resets):
        return log_norms(scaling_step, None, jnp.ones(2), bptt.Sequence(xs, resets=resets))

    for reset in (60, 45):  # 60: there is none
        pieces = logs[:reset], logs[reset:]
        exact = np.concatenate([np.max(np.cumsum(piece[::-1], axis=0)[::-1], axis=1) for piece in pieces])
        got = measure(jnp.exp(jnp.asarray(logs)), jnp.arange(60) == reset)
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


def root_step(params, h, x):
    """Its Jacobian at x = 0 is 0 / 0, while the state stays finite."""
    return 0.5 * h + jnp.sqrt(x * h)


def test_nan_in_one_jacobian_stays_where_it_is():
    xs = jnp.ones((6, 2)).at[2, 1].set(0)
    singular, radius, product, norms = measure(root_step, None, xs)
    np.testing.assert_array_equal(np.isnan(singular), np.arange(6) == 2)
    np.testing.assert_array_equal(np.isnan(radius), np.arange(6) == 2)
    assert np.isnan(product)
    exact = bptt.product_log_norms(bptt.jacobians(root_step, None, jnp.full(2, 0.5), xs))
    np.testing.assert_array_equal(np.isnan(norms), np.arange(6) < 3)
    np.testing.assert_allclose(norms[3:], exact[3:], rtol=1e-5)


def relu_step(w, h, x):
    return jax.nn.relu(w @ h + x)


@pytest.mark.parametrize("step", covering([linear_step, relu_step], relu_step))
def test_a_trajectory_that_is_not_finite(step):
    """Also where its Jacobians do not show it: from there on, to the next reset."""
    xs = jnp.ones((6, 2)).at[2, 0].set(jnp.nan)
    weights = jnp.asarray([[0.8, -0.6], [0.6, 0.8]])
    assert np.isfinite(bptt.jacobians(step, weights, jnp.full(2, 0.5), xs)[:3]).all()
    singular, radius, product, norms = measure(step, weights, xs)
    np.testing.assert_array_equal(np.isnan(singular), np.arange(6) >= 2)
    np.testing.assert_array_equal(np.isnan(radius), np.arange(6) >= 2)
    np.testing.assert_array_equal([product, *norms], np.nan)
    resets = jnp.arange(6) == 4
    singular, radius, product, norms = measure(step, weights, bptt.Sequence(xs, resets=resets))
    np.testing.assert_array_equal(np.isnan(singular), [False, False, True, True, False, False])
    assert product == -np.inf
    np.testing.assert_array_equal(np.isnan(norms), [True] * 4 + [False] * 2)
    resets = jnp.arange(6) == 2  # what is spoilt later is of another segment
    *_, norms = measure(step, weights, bptt.Sequence(xs, resets=resets))
    np.testing.assert_array_equal(np.isnan(norms), [False] * 2 + [True] * 4)


def measure(step, params, xs):
    """The first values of every step, of the whole product, and the norms of all products to the end."""

    @jax.jit
    def of(params, xs):
        arguments = step, params, jnp.full(2, 0.5), xs
        return (
            bptt.analysis.leading_singular_values(*arguments, num=1).values[:, 0],
            jnp.abs(bptt.analysis.leading_eigenvalues(*arguments, num=1).values[:, 0]),
            bptt.analysis.product_singular_values(*arguments, num=1).log_values[0],
            log_norms(*arguments),
        )

    return of(params, xs)


def key_step(w, state, x):
    """A counter and a random key beside what is differentiated."""
    key, now = jax.random.split(state["key"])
    noise = jax.random.bits(now, x.shape, jnp.uint16).astype(x.dtype) / 2**16
    return {"h": jnp.tanh(w @ state["h"] + x + noise), "t": state["t"] + 1, "key": key}


@pytest.mark.parametrize("function", ["leading_singular_values", "product_singular_values", "leading_eigenvalues"])
def test_second_derivatives_are_refused(function):
    """They would be without the turning of the vectors: too small for most steps, and right for few."""

    def squared(w):
        found = getattr(bptt.analysis, function)(scale, w, jnp.ones(2), length=2, num=1)
        return jnp.sum(jnp.abs(jax.tree.leaves(found)[0]) ** 2)

    w = jnp.array([3.0, 2.0])
    for twice in (
        jax.jacfwd(jax.jacfwd(squared)),
        jax.jacfwd(jax.grad(jax.jit(squared))),
        jax.jacrev(jax.grad(jax.checkpoint(squared))),
    ):
        with pytest.raises(TypeError, match="second derivatives: leading"):
            twice(w)
    seen = jax.hessian(lambda w: jnp.sum(w**3) + squared(jax.lax.stop_gradient(w)))(w)
    np.testing.assert_allclose(seen, np.diag(6 * w), rtol=1e-6)


def scale(w, h, x):
    return w * h


def test_derivatives_of_eigenvalues_far_from_one(x64):
    """``w_i v_i^T`` with the left vectors w, rows of V^-1; each belongs to its own value at any scale."""
    vectors = np.random.default_rng(0).standard_normal((3, 3))
    left, values = np.linalg.inv(vectors), 1e12 * np.array([5.0, 3.0, 1.0])

    @jax.jit
    @jax.jacfwd
    def measure(a):
        return bptt.analysis.leading_eigenvalues(linear_step, a, jnp.ones(3), length=1, num=3).values[0].real

    exact = np.stack([np.outer(left[i], vectors[:, i]) for i in range(3)])
    np.testing.assert_allclose(measure(jnp.asarray(vectors * values @ left)), exact, atol=1e-9)


@pytest.mark.exhaustive
def test_padding_and_resets_are_the_pieces_alone(x64):
    """NaN in padding; elsewhere what the pieces give, of a state with a counter and a key."""
    real = np.asarray([1, 1, 0, 0, 1, 1, 0], bool)
    resets = np.asarray([1, 0, 0, 1, 0, 0, 1], bool)  # the second before step 4; nothing comes after the last
    rng = np.random.default_rng(0)
    weights, xs = jnp.asarray(rng.standard_normal((3, 3))), jnp.asarray(rng.standard_normal((7, 3)))
    state0 = {"h": jnp.asarray(rng.standard_normal(3)), "t": jnp.asarray(0), "key": jax.random.key(1)}

    @jax.jit
    def of(xs):
        arguments = key_step, weights, state0, xs
        singular = bptt.analysis.leading_singular_values(*arguments, num=2)
        moduli = jnp.abs(bptt.analysis.leading_eigenvalues(*arguments, num=2).values)
        return (
            singular.values,
            moduli,
            bptt.analysis.product_singular_values(*arguments, num=2),
            log_norms(*arguments),
        )

    spoilt = jnp.where(jnp.asarray(real)[:, None], xs, jnp.nan)
    singular, moduli, product, norms = of(bptt.Sequence(spoilt, mask=jnp.asarray(real), resets=jnp.asarray(resets)))
    np.testing.assert_array_equal(np.isnan(singular), ~real[:, None] & np.ones((1, 2), bool))
    np.testing.assert_array_equal(product.log_values, -np.inf)
    np.testing.assert_array_equal(product.errors, np.inf)
    for piece in (np.asarray([0, 1]), np.asarray([4, 5])):
        alone = of(xs[piece])
        np.testing.assert_allclose(singular[piece], alone[0], rtol=1e-12)
        np.testing.assert_allclose(moduli[piece], alone[1], rtol=1e-10)
        np.testing.assert_allclose(norms[piece], alone[3], rtol=1e-10)
    np.testing.assert_array_equal(np.isnan(norms), ~real)
    first = of(bptt.Sequence(xs[:2], resets=jnp.asarray([True, False])))[2]
    np.testing.assert_allclose(first.log_values, of(xs[:2])[2].log_values, rtol=1e-12)


@jax.custom_vjp
def spike(v):
    return (v > 0).astype(v.dtype)


spike.defvjp(lambda v: (spike(v), v), lambda v, g: (g / (1 + 10 * jnp.abs(v)) ** 2,))


def cond_step(w, h, x):
    return jax.lax.cond(x[0] > 0, lambda h: jnp.tanh(w @ h + x), lambda h: 0.9 * h, h)


def spiking_step(w, h, x):
    return 0.5 * h + spike(w @ h + x)


@pytest.mark.parametrize("step", covering([cond_step, spiking_step], spiking_step))
def test_steps_that_branch_and_derivatives_of_ones_own(step, x64):
    """Spectra of the Jacobians (of a surrogate gradient those of the backward pass), and their derivatives."""
    rng = np.random.default_rng(2)
    weights, xs, state0 = (jnp.asarray(rng.standard_normal(shape)) for shape in ((3, 3), (4, 3), (3,)))

    def found(w):
        arguments = step, w, state0, xs
        singular = bptt.analysis.leading_singular_values(*arguments, num=2).values
        moduli = jnp.abs(bptt.analysis.leading_eigenvalues(*arguments, num=2).values)
        return (
            singular,
            moduli,
            bptt.analysis.product_singular_values(*arguments, num=2).log_values,
            log_norms(*arguments),
        )

    def exact(w):
        jacobians = bptt.jacobians(step, w, state0, xs)
        product = bptt.jacobian_product(jacobians)
        logs = jnp.log(jnp.linalg.svd(product.mantissa, compute_uv=False)[:2]) + product.log_scale
        moduli = jnp.sort(jnp.abs(jnp.linalg.eigvals(jacobians)), axis=1)[:, :0:-1]
        return bptt.singular_values(jacobians)[:, :2], moduli, logs, bptt.product_log_norms(jacobians)

    for got, expected in zip(jax.jit(found)(weights), jax.jit(exact)(weights), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-10)
    slopes = [jax.jit(jax.jacrev(lambda w, f=f: [jnp.sum(a) for a in f(w)]))(weights) for f in (found, exact)]
    for got, expected in zip(*slopes, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)


def test_a_loop_of_unknown_length_has_eigenvalues_alone():
    def step(w, h, x):
        return jax.lax.while_loop(lambda c: c[0] < x, lambda c: (c[0] + 1, jnp.tanh(w @ c[1])), (0, h))[1]

    arguments = step, jnp.asarray([[0.9, -0.4], [0.3, 0.8]]), jnp.asarray([0.3, -0.2]), jnp.asarray([1, 2, 3])
    exact = np.linalg.eigvals(np.asarray(bptt.jacobians(*arguments)))
    got = bptt.analysis.leading_eigenvalues(*arguments, num=1).values[:, 0]
    np.testing.assert_allclose(np.abs(got), np.max(np.abs(exact), axis=1), rtol=1e-5)
    for function in (bptt.analysis.leading_singular_values, bptt.analysis.product_singular_values):
        with pytest.raises(TypeError, match=f"step: {function.__name__} needs its backward pass, and it has none"):
            function(*arguments, num=1)


def test_memory():
    """At D = 4096 one Jacobian is 67 MB; what each of the functions takes is less, the weights aside."""
    n, steps = 4096, 3
    step = bptt.rnn(n).step
    params = bptt.cells.RNNParams(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, n), (n, 2), (n,))))
    state0, xs = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n,), (steps, 2)))

    @jax.jit
    def measure(params, state0, xs):
        arguments = step, params, state0, xs
        return (
            bptt.analysis.leading_singular_values(*arguments, num=NUM),
            bptt.analysis.leading_eigenvalues(*arguments, num=NUM),
            bptt.analysis.product_singular_values(*arguments, num=NUM),
        )

    assert measure.lower(params, state0, xs).compile().memory_analysis().temp_size_in_bytes < 4 * n * n


def test_num_is_checked():
    for function in (
        bptt.analysis.leading_singular_values,
        bptt.analysis.leading_eigenvalues,
        bptt.analysis.product_singular_values,
    ):
        with pytest.raises(ValueError, match="num: expected at most 2, the numbers of the state, got 3"):
            function(linear_step, np.eye(2), np.ones(2), length=3, num=3)
        with pytest.raises(TypeError, match="num: expected an integer"):
            function(linear_step, np.eye(2), np.ones(2), length=3, num=1.0)


def test_half_precision_is_measured_in_single():
    """Its products are rounded to 8 bits; the spaces, and what comes out, are single."""
    a = np.array([[0.5, 0.25, 0], [-0.125, 1.0, 0.5], [0.25, 0, -0.75]])

    @jax.jit
    def measure(a):
        arguments = linear_step, a, jnp.ones(3, jnp.bfloat16)
        options = {"num": 3, "length": 2}
        return bptt.analysis.leading_singular_values(*arguments, **options), bptt.analysis.leading_eigenvalues(
            *arguments, **options
        )

    singular, eigen = measure(jnp.asarray(a, jnp.bfloat16))
    np.testing.assert_allclose(singular.values[0], np.linalg.svd(a, compute_uv=False), rtol=0.02)
    moduli = np.sort(np.abs(np.linalg.eigvals(a)))[::-1]
    np.testing.assert_allclose(np.abs(eigen.values[0]), moduli, rtol=0.02)
    assert (singular.errors.dtype, eigen.values.dtype) == (jnp.float32, jnp.complex64)
