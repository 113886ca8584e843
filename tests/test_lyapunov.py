"""Exponents against exact values, identities and a plain QR recursion in NumPy."""

import math
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import cell_example, linear_step
from slices import covering

import bptt_jax as bptt
from bptt_jax.analysis.averages import BatchSums, squared_error
from bptt_jax.analysis.lyapunov import living_rates
from bptt_jax.linalg.lq import orthonormal
from bptt_jax.linalg.scattered import scattered, scattered_before


def plain_qr(jacobians: np.ndarray, num: int) -> np.ndarray:
    """Growth ``[T, num]`` with a QR at every step, from the frame that the package starts with."""
    size = jacobians.shape[-1]
    frame = np.linalg.qr(np.asarray(scattered((size, num), jnp.float32), np.float64))[0]
    growth = []
    for jacobian in np.asarray(jacobians, np.float64):
        frame, r = np.linalg.qr(jacobian @ frame)
        growth.append(np.log(np.abs(np.diagonal(r))))
    return np.array(growth)


def linear(matrix, h, x):
    return matrix @ h


def scaled(rates, h, x):
    return rates * h


def driven(p, h, x):
    return x * h


@pytest.mark.parametrize("name", covering(["rnn", "gru", "lstm"], "gru", "lstm"))
def test_they_are_those_of_a_qr_at_every_step(x64, name) -> None:
    e = cell_example(name, jnp.float64, steps=150)
    spectrum = bptt.lyapunov_exponents(e.step, e.params, e.state0, e.xs, warmup=10)
    jacobians = np.asarray(bptt.jacobians(e.step, e.params, e.state0, e.xs))
    growth = plain_qr(jacobians, jacobians.shape[-1])[10:]
    order = np.argsort(-growth.mean(axis=0))
    np.testing.assert_allclose(spectrum.exponents, growth.mean(axis=0)[order], rtol=1e-6)
    np.testing.assert_allclose(spectrum.running[-1], spectrum.exponents, rtol=1e-9)
    # Any full QR recursion: the sum is the mean of log |det J|.
    volume = np.linalg.slogdet(jacobians)[1][10:].mean()
    assert float(jnp.sum(spectrum.exponents)) == pytest.approx(volume, rel=1e-9)
    few = bptt.lyapunov_exponents(e.step, e.params, e.state0, e.xs, warmup=10, num=2)
    np.testing.assert_allclose(few.exponents, np.sort(plain_qr(jacobians, 2)[10:].mean(axis=0))[::-1], rtol=1e-6)
    # Batches of 7 steps, as far as they go, counted from the end; and what neighbours share.
    means = growth[:, order][140 % 7 :].reshape(-1, 7, growth.shape[1]).mean(axis=1)
    around = means - means.mean(axis=0)
    shared = np.maximum([2 * a[1:] @ a[:-1] for a in around.T], 0)
    assert 0 < np.count_nonzero(shared) < len(shared)
    square = (np.square(around).sum(axis=0) + shared) / (len(means) - 1) / len(means)
    np.testing.assert_allclose(spectrum.standard_errors, np.sqrt(square), rtol=1e-5)


@pytest.mark.parametrize("segments", [1, 5])
@pytest.mark.parametrize(
    ("matrix", "exponents"),
    [
        (np.diag([0.5, -2.0, 0.9, 1.1]), np.log([2.0, 1.1, 0.9, 0.5])),
        ([[2.0, 1.0], [1.0, 1.0]], [0.9624236501192069, -0.9624236501192069]),  # Arnold's cat
        ([[0.6, -0.8], [0.8, 0.6]], [0.0, 0.0]),
        ([[0.9]], [math.log(0.9)]),
        (np.diag([3.0, 0.0]), [math.log(3), -np.inf]),
        (np.zeros((2, 2)), [-np.inf, -np.inf]),
    ],
)
def test_linear_maps(matrix, exponents, segments) -> None:
    matrix = jnp.asarray(matrix, float)
    zero = jnp.zeros(len(matrix))
    spectrum = bptt.lyapunov_exponents(linear, matrix, zero, length=400, warmup=300, segments=segments)
    np.testing.assert_allclose(spectrum.exponents, exponents, atol=2e-6)
    np.testing.assert_allclose(spectrum.standard_errors, 0, atol=1e-5)
    assert spectrum.converged.all()
    assert int(spectrum.first_nonfinite) == -1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("isometry", [np.eye(8), np.linalg.qr(scattered_before((8, 8)))[0]], ids=["eye", "turn"])
def test_rounding_is_no_growth(x64, isometry, dtype) -> None:
    """Exponents of isometries are all zero. What they are off is the same at every step, and has no scatter."""
    arguments = linear, jnp.asarray(isometry, dtype), jnp.ones(8, dtype)
    found = bptt.lyapunov_exponents(*arguments, length=400, warmup=100)
    assert np.all(np.abs(found.exponents) <= found.standard_errors)
    assert np.max(found.standard_errors) <= 10 * jnp.finfo(dtype).eps
    assert found.kaplan_yorke_dimension == 8
    living, errors = living_rates(found)
    assert np.all(np.abs(living) <= errors)
    assert int(bptt.covariant_vectors(*arguments, length=400).unstable) == 0
    shrinking = linear, jnp.asarray(0.99, dtype) * arguments[1], arguments[2]
    assert bptt.lyapunov_exponents(*shrinking, length=400).kaplan_yorke_dimension == 0


def test_growth_is_in_the_order_of_the_exponents() -> None:
    """Three steps of a frame that no warm-up has turned: its first direction is not yet the fastest."""
    rates = jnp.linspace(0.5, 2.0, 4)
    spectrum = bptt.lyapunov_exponents(scaled, rates, jnp.zeros(4), length=3)
    unsorted = plain_qr(np.stack([np.diag(rates)] * 3), 4)
    order = np.argsort(-unsorted.mean(axis=0))
    assert (order != np.arange(4)).any()
    np.testing.assert_allclose(spectrum.running[-1], unsorted.mean(axis=0)[order], rtol=1e-4)
    np.testing.assert_allclose(spectrum.running[-1], spectrum.exponents, rtol=1e-5)


def test_a_contraction_beyond_all_floats() -> None:
    spectrum = bptt.lyapunov_exponents(linear, 0.9 * jnp.eye(1), jnp.ones(1), length=5000)
    assert 5000 * float(spectrum.exponents[0]) == pytest.approx(-526.8, abs=0.1)
    grown = bptt.lyapunov_exponents(linear, jnp.diag(jnp.array([1e15, 1e-15])), jnp.zeros(2), length=100, warmup=20)
    assert float(grown.exponents[0]) == pytest.approx(15 * math.log(10), rel=1e-6)
    assert float(grown.exponents[1]) == -np.inf  # thirty decades below, as the docstring says


@pytest.mark.parametrize(("name", "exponent"), [("gru", -math.log(2)), ("lstm", -math.log(2))])
def test_cells_without_weights(name, exponent) -> None:
    cell = bptt.gru(3) if name == "gru" else bptt.lstm(3, forget_bias=0.0)
    params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0), 2))
    spectrum = bptt.lyapunov_exponents(cell.step, params, cell.initial_state(), jnp.zeros((60, 2)), warmup=20)
    np.testing.assert_allclose(spectrum.exponents[:3], exponent, rtol=1e-6)
    np.testing.assert_array_equal(spectrum.exponents[3:], -np.inf)  # an lstm's h: nothing of it is kept
    np.testing.assert_array_equal(spectrum.standard_errors[3:], 0)
    assert spectrum.kaplan_yorke_dimension == 0


def test_logistic_map() -> None:
    spectrum = bptt.lyapunov_exponents(lambda p, h, x: 4 * h * (1 - h), None, jnp.array([0.2345]), length=20_000)
    assert float(spectrum.exponents[0]) == pytest.approx(math.log(2), abs=3 * float(spectrum.standard_errors[0]))
    assert 1e-4 < float(spectrum.standard_errors[0]) < 3e-3
    assert spectrum.entropy_rate == pytest.approx(math.log(2), abs=0.01)
    assert "largest exponent 0.69" in spectrum.statement
    assert "not converged" not in spectrum.statement


def test_products_of_gaussian_matrices() -> None:
    """Newman 1986: lambda_i = (ln(2/N) + psi((N - i + 1)/2)) / 2."""
    n = 10
    matrices = jax.random.normal(jax.random.key(1), (20_000, n, n)) / math.sqrt(n)
    spectrum = bptt.lyapunov_exponents(lambda p, h, x: x @ h, None, jnp.zeros(n), matrices, warmup=50)
    exact = [-0.05166, -0.11028, -0.17666, -0.25314, -0.34333, -0.45314, -0.59333, -0.78647, -1.09333, -1.78647]
    deviations = (np.asarray(spectrum.exponents) - exact) / np.asarray(spectrum.standard_errors)
    assert np.max(np.abs(deviations)) < 3.5
    assert np.max(spectrum.standard_errors) < 0.02


@pytest.mark.parametrize(
    ("gain", "size", "theory", "tolerance"),
    [(1.5, 800, 0.06522, 0.02), (2.0, 400, 0.15472, 0.015), (3.0, 400, 0.31025, 0.015), (5.0, 400, 0.53243, 0.02)],
)
def test_mean_field_of_a_random_network(gain, size, theory, tolerance) -> None:
    """q = g^2 E tanh^2(sqrt(q) z), lambda = ln(g^2 E sech^4(sqrt(q) z)) / 2 (Sompolinsky et al. 1988)."""
    weights = gain * jax.random.normal(jax.random.key(3), (size, size)) / math.sqrt(size)
    state0 = jax.random.normal(jax.random.key(4), (size,))
    spectrum = bptt.lyapunov_exponents(random_network, weights, state0, length=2000, num=1, warmup=500)
    assert float(spectrum.exponents[0]) == pytest.approx(theory, abs=tolerance)


def test_a_random_network_that_dies() -> None:
    """For g < 1 exactly the logarithm of the spectral radius of the very matrix, which tends to ln g."""
    n = 200
    weights = 0.8 * jax.random.normal(jax.random.key(3), (n, n)) / math.sqrt(n)
    state0 = jax.random.normal(jax.random.key(4), (n,))
    spectrum = bptt.lyapunov_exponents(random_network, weights, state0, length=2000, num=1, warmup=1000)
    radius = np.max(np.abs(np.linalg.eigvals(np.asarray(weights, np.float64))))
    assert float(spectrum.exponents[0]) == pytest.approx(math.log(radius), abs=2e-3)
    assert float(spectrum.exponents[0]) == pytest.approx(math.log(0.8), abs=0.08)


def random_network(w, h, x):
    return w @ jnp.tanh(h)


def test_lorenz(x64) -> None:
    """Runge-Kutta steps of the flow: 0.9056, 0, -14.572 per unit of time; their sum is the divergence."""
    dt = 0.01

    def flow(h):
        return jnp.stack([10 * (h[1] - h[0]), h[0] * (28 - h[2]) - h[1], h[0] * h[1] - 8 / 3 * h[2]])

    def step(p, h, x):
        k1 = flow(h)
        k2 = flow(h + dt / 2 * k1)
        k3 = flow(h + dt / 2 * k2)
        return h + dt / 6 * (k1 + 2 * k2 + 2 * k3 + flow(h + dt * k3))

    spectrum = bptt.lyapunov_exponents(step, None, jnp.ones(3), length=105_000, warmup=5000)
    rates = np.asarray(spectrum.exponents) / dt
    np.testing.assert_allclose(rates, [0.9056, 0, -14.572], rtol=0.02, atol=0.01)
    assert rates.sum() == pytest.approx(-41 / 3, rel=1e-4)
    assert spectrum.kaplan_yorke_dimension == pytest.approx(2.062, abs=0.002)


@pytest.mark.parametrize("case", ["gaussian", "autoregressive"])
def test_standard_errors_hold_the_truth_as_often_as_they_say(case) -> None:
    """Two of them, of 50 runs: some 95 %. The autoregressive rate, -0.1 + x_t, remembers 39 steps."""
    n, steps = 3, {"gaussian": 600, "autoregressive": 2000}[case]

    def run(key):
        noise = jax.random.normal(key, (steps + 50, n, n))
        if case == "gaussian":
            return bptt.lyapunov_exponents(multiply, None, jnp.zeros(n), noise / math.sqrt(n), warmup=50)
        rates = jax.lax.scan(
            lambda x, e: (0.95 * x + math.sqrt(1 - 0.95**2) * e,) * 2, jnp.zeros(()), noise[:, 0, 0]
        )[1]
        return bptt.lyapunov_exponents(lambda p, h, x: jnp.exp(x - 0.1) * h, None, jnp.zeros(1), rates, warmup=50)

    spectra = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(8), 50))
    # Newman's formula, psi(3/2), psi(1), psi(1/2).
    digamma = np.array([0.03648997, -0.57721566, -1.96351003])
    truth = (math.log(2 / n) + digamma) / 2 if case == "gaussian" else np.array([-0.1])
    errors = np.asarray(spectra.standard_errors)
    held = np.mean(np.abs(np.asarray(spectra.exponents) - truth) <= 2 * errors, axis=0)
    assert np.all(held >= 0.85)
    # Not by being large.
    assert np.all(errors.mean(axis=0) < 1.4 * np.std(spectra.exponents, axis=0, ddof=1))


def multiply(p, h, x):
    return x @ h


@pytest.mark.parametrize("library", [np, jnp])
@pytest.mark.parametrize(
    ("values", "linked", "passed_on"),
    [([1, 2, 3, 4], True, 0.75 - 0.25 + 0.75), ([4, 1, 4, 1], True, 0), ([1, 2, 3, 4], False, 0)],
)
def test_what_a_batch_passes_on_makes_the_error_larger(library, values, linked, passed_on) -> None:
    """Four batches of one step: the squares about their mean, and twice the products of neighbours, by hand."""
    column = library.asarray(values, "float32")[:, None]
    of = BatchSums(column, library.ones(4, "float32"), library.asarray([False, linked, linked, linked]))
    squares = np.sum((np.asarray(values) - np.mean(values)) ** 2)
    np.testing.assert_allclose(squared_error(of), [(squares + 2 * passed_on) / 4 / 3], rtol=1e-6)


def test_no_direction_is_lost_by_chance() -> None:
    """Directions of Gaussian products grow apart unevenly; none of them dies, and once is no habit."""
    matrices = jax.random.normal(jax.random.key(5), (60, 500, 10, 10)) / math.sqrt(10)
    exponents = jax.jit(
        lambda many: jax.lax.map(
            lambda xs: bptt.lyapunov_exponents(multiply, None, jnp.zeros(10), xs).exponents, many
        )
    )(matrices)
    assert np.isfinite(exponents).all()
    rates = jnp.ones((60, 2)).at[30, 1].set(1e-7)
    once = bptt.lyapunov_exponents(driven, None, jnp.ones(2), rates)
    np.testing.assert_allclose(once.exponents, [0, math.log(1e-7) / 60], atol=2e-3)  # the frame turns
    missing = bptt.lyapunov_exponents(driven, None, jnp.ones(2), rates.at[::7, 1].set(1e-7))
    assert float(missing.exponents[1]) == -np.inf


def test_a_quiet_beginning_and_a_violent_end() -> None:
    """What the first steps say of the pace must not let the frame leave the range of its floats later."""
    for rate in (1e4, 1e-4):
        rates = jnp.concatenate([jnp.ones(200), jnp.full(100, rate)])
        spectrum = bptt.lyapunov_exponents(driven, None, jnp.zeros(5), rates)
        np.testing.assert_allclose(spectrum.exponents, math.log(rate) / 3, rtol=1e-5)


@pytest.mark.parametrize("rates", covering([[0.9], [2.0, 0.5], [3.0, 0.2]], [2.0, 0.5], [3.0, 0.2]))
def test_a_hundred_thousand_steps(rates) -> None:
    """The log norm of the product, within a thousandth."""
    steps = 100_000
    xs = np.resize(np.asarray(rates, np.float32), steps)
    spectrum = bptt.lyapunov_exponents(driven, None, jnp.ones(2), jnp.asarray(xs))
    expected = np.sum(np.log(np.asarray(xs, np.float64)))
    np.testing.assert_allclose(steps * np.asarray(spectrum.exponents), expected, rtol=1e-3, atol=1e-2)


def test_differentiable(x64) -> None:
    weights = jnp.asarray([[0.3, -1.2], [0.9, 0.4]])

    @jax.jit
    def largest(w):
        return bptt.lyapunov_exponents(
            lambda w, h, x: jnp.tanh(w @ h + x), w, jnp.ones(2), jnp.ones((30, 2)), warmup=5
        ).exponents[0]

    gradient = jax.jit(jax.grad(largest))(weights)
    for i, j in np.ndindex(2, 2):
        shift = jnp.zeros((2, 2)).at[i, j].set(1e-5)
        numeric = (largest(weights + shift) - largest(weights - shift)) / 2e-5
        assert float(gradient[i, j]) == pytest.approx(float(numeric), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("shape", [(3, 3), (2, 4)])
def test_the_derivative_of_orthonormal_rows(x64, shape) -> None:
    """Of A = L Q the product rule holds, L stays lower triangular, and the rows of Q stay orthonormal."""
    a, da = np.random.default_rng(0).standard_normal((2, *shape))
    (l, q), (dl, dq) = jax.jvp(orthonormal, (jnp.asarray(a),), (jnp.asarray(da),))
    np.testing.assert_allclose(dl @ q + l @ dq, da, atol=1e-13)
    np.testing.assert_allclose(np.triu(dl, 1), 0, atol=1e-13)
    np.testing.assert_allclose(dq @ q.T + q @ dq.T, 0, atol=1e-13)


@pytest.mark.exhaustive
def test_batches_pooled() -> None:
    matrices = jax.random.normal(jax.random.key(2), (6, 200, 3, 3))

    def one(xs):
        return bptt.lyapunov_exponents(lambda p, h, x: x @ h, None, jnp.zeros(3), xs, warmup=10)

    batch = jax.jit(jax.vmap(one))(matrices)
    for i in range(6):
        np.testing.assert_allclose(batch.exponents[i], one(matrices[i]).exponents, rtol=1e-4, atol=1e-5)
    pooled = batch.pooled()
    np.testing.assert_allclose(pooled.exponents, np.mean(batch.exponents, axis=0), rtol=1e-6)
    np.testing.assert_allclose(
        pooled.standard_errors, np.std(batch.exponents, axis=0, ddof=1) / math.sqrt(6), rtol=1e-5
    )
    windows = batch.finite_time(19)
    assert windows.shape == (6, 10, 3)
    np.testing.assert_allclose(windows.mean(axis=1), batch.exponents, rtol=1e-4)
    with pytest.raises(ValueError, match="pooled: expected a batch"):
        pooled.pooled()


def diagonal(rates: Any, steps: int = 60, **options: Any) -> bptt.analysis.LyapunovSpectrum:
    """Of ``h <- rates h``, by a frame that has turned to the axes."""
    rates = jnp.asarray(rates, float)
    return bptt.lyapunov_exponents(scaled, rates, jnp.zeros(len(rates)), length=steps, **options)


def noise(shape: tuple[int, ...]) -> bptt.analysis.LyapunovSpectrum:
    """A batch of scalar runs, of 300 random rates each."""

    def one(xs):
        return bptt.lyapunov_exponents(driven, None, jnp.zeros(1), xs)

    run = one
    for _ in shape:
        run = jax.vmap(run)
    return run(jnp.exp(-0.5 + jax.random.normal(jax.random.key(0), (*shape, 300, 1))))


def test_a_batch_speaks_of_all_its_sequences() -> None:
    batch = noise((16,))
    mean, scatter = np.mean(batch.exponents), np.std(batch.exponents, ddof=1) / 4
    assert batch.statement == batch.pooled().statement
    assert batch.statement.startswith(f"largest exponent {mean:.4g} +- {scatter:.2g} nats per step")
    assert np.shape(batch.kaplan_yorke_dimension) == np.shape(batch.entropy_rate) == (16,)


@pytest.mark.exhaustive
def test_a_batch_of_several_axes_is_pooled_along_the_last() -> None:
    batch = noise((2, 3))
    np.testing.assert_allclose(batch.pooled().exponents, np.mean(batch.exponents, axis=1), rtol=1e-5)
    first, second = (jax.tree.map(lambda a, i=i: a[i], batch).pooled() for i in (0, 1))
    np.testing.assert_allclose(
        batch.pooled().standard_errors, [first.standard_errors, second.standard_errors], rtol=1e-5
    )
    assert batch.statement == f"[0]: {first.statement}\n[1]: {second.statement}"


def test_sequences_of_different_lengths_are_weighed() -> None:
    """Pooled as their steps together; each with the error of a mean of as many."""
    lengths, rates = np.array([20, 50, 80]), np.array([0.5, 0.7, 0.9])
    masks = jnp.asarray(np.arange(80) < lengths[:, None])

    def one(rate, mask):
        sequence = bptt.Sequence(mask=mask)
        return bptt.lyapunov_exponents(scaled, rate, jnp.zeros(1), sequence)

    pooled = jax.vmap(one)(jnp.asarray(rates, jnp.float32), masks).pooled()
    mean = np.average(np.log(rates), weights=lengths)
    np.testing.assert_allclose(pooled.exponents, [mean], rtol=1e-5)
    around = lengths * (np.log(rates) - mean)
    np.testing.assert_allclose(
        pooled.standard_errors, [math.sqrt(3 / 2 * np.sum(around**2)) / lengths.sum()], rtol=1e-4
    )


@pytest.mark.parametrize(
    ("exponents", "num", "dimension", "entropy"),
    [
        ([0.9056, 0.0, -14.572], 3, 2 + 0.9056 / 14.572, 0.9056),  # Lorenz
        ([-0.1, -0.2], 2, 0, 0),
        ([0.3, -0.1], 2, 2, 0.3),
        ([0.3, -0.1, -0.4, -0.5, -0.6], 2, math.nan, 0.3),
        ([0.3, 0.1, -0.5], 3, 2.8, 0.4),
        ([0.5, -np.inf], 2, 1, 0.5),
        ([0.0, -0.4], 2, 1, 0),  # a limit cycle
    ],
)
def test_dimension_and_entropy(x64, exponents, num, dimension, entropy) -> None:
    spectrum = diagonal(np.exp(exponents), 900, num=num, warmup=800)
    np.testing.assert_allclose(spectrum.exponents, exponents[:num], atol=1e-9)
    assert float(spectrum.kaplan_yorke_dimension) == pytest.approx(dimension, nan_ok=True, abs=1e-6)
    assert float(spectrum.entropy_rate) == pytest.approx(entropy, abs=1e-9)


def test_dimension_and_entropy_have_errors(x64) -> None:
    """Of scalar recurrences side by side, which share their noise: as large as the scatter of many runs."""
    weights = np.array([1.0, 0.5, 2.0])
    rates = 0.5 - np.array([0.4, 0.49, 0.9])

    def one(key):
        xs = jnp.exp(rates[None] + 0.1 * jax.random.normal(key, (400, 1)) * weights[None])
        return bptt.lyapunov_exponents(driven, None, jnp.zeros(3), xs, warmup=100)

    batch = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 200))
    for name, error in (
        ("kaplan_yorke_dimension", batch.kaplan_yorke_error),
        ("entropy_rate", batch.entropy_rate_error),
    ):
        scatter = np.std(getattr(batch, name), ddof=1)
        assert np.mean(error) == pytest.approx(scatter, rel=0.2)
        pooled = batch.pooled()
        errors = {"kaplan_yorke_dimension": pooled.kaplan_yorke_error, "entropy_rate": pooled.entropy_rate_error}
        assert float(errors[name]) == pytest.approx(scatter / math.sqrt(200), rel=0.1)


def test_a_limit_cycle_has_its_dimension_with_an_error() -> None:
    """An exponent of 0.0001 +- 0.0002, or of as much below zero, may be zero: the dimension is about one."""
    for seed, sign in ((0, 1), (1, -1)):
        xs = jax.random.normal(jax.random.key(seed), (600, 1))
        xs = 0.004 * (xs - xs[100:].mean()) + sign * 1e-4
        rates = jnp.exp(jnp.concatenate([xs, jnp.full((600, 1), -0.2)], axis=1))
        found = bptt.lyapunov_exponents(driven, None, jnp.zeros(2), rates, warmup=100)
        error = float(found.standard_errors[0])
        assert float(found.exponents[0]) == pytest.approx(sign * 1e-4, abs=1e-6)
        assert 1e-4 < error < 3e-4
        assert float(found.kaplan_yorke_dimension) == pytest.approx(1 + sign * 1e-4 / 0.2, abs=1e-5)
        assert float(found.kaplan_yorke_error) == pytest.approx(error / 0.2, rel=1e-3)
        assert float(found.entropy_rate) == pytest.approx(max(sign, 0) * 1e-4, abs=1e-6)
        assert float(found.entropy_rate_error) == pytest.approx(error, rel=1e-3)


def test_dimension_and_entropy_are_not_known_better_than_the_exponents() -> None:
    """Rates that are the same at every step have no scatter, but are rounded."""
    rates = jnp.broadcast_to(jnp.array([2.0, 1.0, 0.25]), (300, 3))
    found = bptt.lyapunov_exponents(driven, None, jnp.zeros(3), rates, warmup=10, dt=0.1)
    least = 8 * jnp.finfo(jnp.float32).eps / 0.1
    np.testing.assert_allclose(found.standard_errors, least, rtol=1e-6)
    assert float(found.entropy_rate_error) == pytest.approx(
        math.sqrt(2) * least, rel=1e-6
    )  # the second may be above 0
    assert float(found.kaplan_yorke_dimension) == pytest.approx(2.5, rel=1e-6)
    slopes = np.array([1, 1, 0.5]) / (2 * math.log(2) / 0.1)  # of 2 + (l1 + l2) / |l3|
    assert float(found.kaplan_yorke_error) == pytest.approx(np.linalg.norm(slopes) * least, rel=1e-6)


def test_says_when_it_has_not_converged_or_is_not_finite() -> None:
    rates = jnp.concatenate([jnp.full(100, 2.0), jnp.full(100, 0.5)])[:, None]
    drifting = bptt.lyapunov_exponents(driven, None, jnp.ones(1), rates)
    assert not drifting.converged[0]
    assert "not converged: the halves disagree for 1 of 1" in drifting.statement
    blown = bptt.lyapunov_exponents(lambda p, h, x: h * h, None, jnp.full(1, 10.0), length=20, warmup=2)
    assert int(blown.first_nonfinite) >= 0
    assert blown.statement == f"not finite from step {int(blown.first_nonfinite)} on"
    assert np.isnan(float(blown.exponents[0]))
    hidden = bptt.lyapunov_exponents(
        lambda p, h, x: 0.5 * h + x, None, jnp.ones(1), jnp.zeros(20).at[7].set(jnp.nan)
    )
    np.testing.assert_allclose(hidden.growth[:7], np.log(0.5), rtol=1e-6)  # where the Jacobian does not show it
    assert np.isnan(hidden.growth[7:]).all()
    both = jax.vmap(lambda h: bptt.lyapunov_exponents(lambda p, h, x: h * h, None, h, length=20))(
        jnp.array([[0.5], [10.0]])
    )
    assert both.statement == f"not finite from step {int(blown.first_nonfinite)} on in 1 of 2 sequences"
    erased = bptt.lyapunov_exponents(driven, None, jnp.zeros(1), jnp.ones(60).at[7].set(0))
    assert "1 of 1 are -inf, erased by step 7: resets are to be declared" in erased.statement
    short = bptt.lyapunov_exponents(linear, jnp.eye(2), jnp.ones(2), length=1)
    assert np.isnan(short.standard_errors).all()
    assert not short.converged.any()
    assert not diagonal([0.5, 0.0], 3).converged.any()  # too few for two halves, also of what is -inf
    with pytest.raises(ValueError, match="window: expected at most 1 step, got 2"):
        short.finite_time(2)


@pytest.mark.parametrize(("num", "resets"), covering(product([1, 2, 6], [False, True]), (2, True), (6, False)))
def test_windows_are_exact(x64, num, resets) -> None:
    """Against a QR at every step; of more than four exponents where it was asked for, and else refused."""
    e = cell_example("gru", jnp.float64, n=6, steps=120)
    begins = np.isin(np.arange(120), [50, 90])

    def spectrum(**options):
        xs = bptt.Sequence(e.xs, resets=jnp.asarray(begins)) if resets else e.xs
        return bptt.lyapunov_exponents(e.step, e.params, e.state0, xs, num=num, warmup=10, **options)

    found = spectrum(window=3)
    jacobians = bptt.jacobians(
        e.step, e.params, e.state0, bptt.Sequence(e.xs, resets=jnp.asarray(begins)) if resets else e.xs
    )
    pieces = np.split(np.asarray(jacobians), [50, 90] if resets else [])
    growth = [plain_qr(piece, num)[10:] for piece in pieces]
    order = np.argsort(-np.concatenate(growth).mean(axis=0), kind="stable")
    for window in (3, 6, 9):  # not the edges of batches, where orthonormalising takes place anyway
        expected = [g[: len(g) // window * window].reshape(-1, window, num).mean(axis=1)[:, order] for g in growth]
        np.testing.assert_allclose(found.finite_time(window), np.concatenate(expected), rtol=1e-6, atol=1e-9)
    known = np.asarray(found.orthonormalised) & (np.asarray(found.piece) >= 0)
    running = np.cumsum(np.concatenate(growth), axis=0) / np.arange(1, len(np.concatenate(growth)) + 1)[:, None]
    at = np.cumsum(np.asarray(found.piece) >= 0)[known] - 1
    np.testing.assert_allclose(found.running[known], running[at][:, order], rtol=1e-6, atol=1e-9)
    if num > 4:
        with pytest.raises(ValueError, match=r"windows of 7 steps is not known exactly.*window=7\) sees to that"):
            spectrum().finite_time(7)
    else:
        assert spectrum().finite_time(7).shape == (sum(len(g) // 7 for g in growth), num)


def test_windows_of_a_constant_rate() -> None:
    found = diagonal([0.99, 0.98], 2000, num=2, warmup=1500)
    for window in (1, 5, 7):
        rates = found.finite_time(window)
        assert rates.shape == (500 // window, 2)
        np.testing.assert_allclose(rates, np.broadcast_to(np.log([0.99, 0.98]), rates.shape), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num": 3}, ValueError, "num: expected at most D = 2 exponents, got 3"),
        ({"num": 0}, ValueError, "num: expected at least 1"),
        ({"warmup": 5}, ValueError, "warmup: expected fewer than the 5 steps"),
        ({"warmup": -1}, ValueError, "warmup: "),
        ({"warmup": 1.0}, TypeError, "warmup: expected an integer, got float"),
        ({"length": 0}, ValueError, "length"),
        ({"segments": 0}, ValueError, "segments: expected at least 1"),
        ({"window": 0}, ValueError, "window: expected at least 1"),
        (
            {"segments": 5, "warmup": 1},
            ValueError,
            "segments: expected at most the 4 steps after the warm-up, got 5",
        ),
    ],
)
def test_bad_arguments(options, error, message) -> None:
    with pytest.raises(error, match=message):
        bptt.lyapunov_exponents(linear, jnp.eye(2), jnp.ones(2), **{"length": 5, **options})


@pytest.mark.parametrize(
    ("dtype", "segments"),
    covering([("float64", 2), ("float64", 140), ("float32", 7)], ("float64", 2), ("float32", 7)),
    indirect=["dtype"],
)
def test_side_by_side_as_in_one_piece(dtype, segments) -> None:
    """Frames that begin with a guess come to be those of the unbroken run, whatever the stretches' length."""
    e, eps = cell_example("gru", dtype, steps=150), float(jnp.finfo(dtype).eps)

    def spectrum(segments: int) -> bptt.analysis.LyapunovSpectrum:
        return bptt.lyapunov_exponents(e.step, e.params, e.state0, e.xs, warmup=10, segments=segments)

    whole, cut = spectrum(1), spectrum(segments)
    assert cut.growth.shape == whole.growth.shape
    within = 0.01 * np.asarray(whole.standard_errors) + 2 * eps**0.6
    assert np.all(np.abs(np.asarray(cut.exponents - whole.exponents)) <= within)
    np.testing.assert_allclose(jnp.sum(cut.exponents), jnp.sum(whole.exponents), rtol=5e3 * eps)  # log |det J|


def test_what_converged_cannot_see_and_several_starts_do() -> None:
    """Pomeau and Manneville's map: next to its fixed point an orbit stays for longer than the run."""

    def step(p, h, x):
        return (h + h**1.5) % 1

    @jax.jit
    @jax.vmap
    def from_(start):
        return bptt.lyapunov_exponents(step, None, start[None], length=2000, warmup=200)

    found = from_(jnp.asarray([1e-9, 0.1234, 0.3, 0.77]))
    orbits, exponent = np.random.default_rng(0).random(500), []
    for _ in range(4000):
        exponent.append(np.mean(np.log1p(1.5 * np.sqrt(orbits))))
        orbits = (orbits + orbits**1.5) % 1
    truth = np.mean(exponent[1000:])
    values, errors = np.asarray(found.exponents)[:, 0], np.asarray(found.standard_errors)[:, 0]
    assert np.all(found.converged)
    assert abs(values[0] - truth) > 1e5 * errors[0]
    assert np.all(np.abs(values[1:] - truth) < 4 * errors[1:])
    pooled = found.pooled()
    assert abs(pooled.exponents[0] - truth) < 3 * pooled.standard_errors[0]


@pytest.mark.exhaustive
def test_side_by_side_where_frames_never_forget(x64) -> None:
    """Rotated by the golden angle, then stretched along the axes once at the end: as many passes as segments."""
    turn = 2.399963229728653
    rotation = jnp.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    stretched = jnp.diag(jnp.array([8.0, 0.5])) @ rotation
    matrices = jnp.concatenate([jnp.broadcast_to(rotation, (90, 2, 2)), jnp.broadcast_to(stretched, (10, 2, 2))])

    def spectrum(segments: int) -> bptt.analysis.LyapunovSpectrum:
        zero = jnp.zeros(2, jnp.float64)
        return bptt.lyapunov_exponents(lambda p, h, x: x @ h, None, zero, matrices, segments=segments)

    np.testing.assert_allclose(spectrum(10).exponents, spectrum(1).exponents, rtol=1e-12)


@pytest.mark.exhaustive
def test_side_by_side_without_inputs_and_forward_derivative(x64) -> None:
    matrix = jnp.array([[0.9, 0.5], [0.0, 0.4]])

    def largest(scale, segments):
        def step(p, h, x):
            return jnp.tanh(p * matrix @ h)

        ones = jnp.ones(2)
        return bptt.lyapunov_exponents(step, scale, ones, length=200, warmup=100, segments=segments).exponents[0]

    one, two = (jax.jvp(lambda s, n=n: largest(s, n), (jnp.float64(0.8),), (jnp.float64(1.0),)) for n in (1, 4))
    np.testing.assert_allclose(two, one, rtol=1e-8)
    assert float(two[0]) == pytest.approx(math.log(0.72), rel=1e-6)


@pytest.mark.exhaustive
def test_pieces_side_by_side(x64) -> None:
    """With padding and resets too: every step's growth as in one piece."""
    e = cell_example("gru", jnp.float64, steps=90)
    t = np.arange(90)
    sequence = bptt.Sequence(
        e.xs, mask=jnp.asarray((t % 7 != 3) & (t < 80)), resets=jnp.asarray(np.isin(t, [31, 45, 66]))
    )

    def spectrum(segments: int) -> bptt.analysis.LyapunovSpectrum:
        return bptt.lyapunov_exponents(e.step, e.params, e.state0, sequence, warmup=6, segments=segments)

    whole, cut = spectrum(1), spectrum(4)
    within = 0.01 * np.asarray(whole.standard_errors) + 1e-9
    assert np.all(np.abs(np.asarray(cut.exponents - whole.exponents)) <= within)
    for name in ("piece", "first_nonfinite", "size"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(whole, name))
    erased = jnp.ones(400).at[1].set(0)
    for rates, num in (((0.5, 0.9), 1), ((0.5, 0.9), 2), ((0.5, 1.3), 2)):
        found = bptt.lyapunov_exponents(
            lambda w, h, x: x * w * h, jnp.asarray(rates), jnp.ones(2), erased, num=num, warmup=50, segments=5
        )
        np.testing.assert_allclose(found.exponents, np.log(rates[::-1])[:num], rtol=1e-9)


@pytest.mark.parametrize("num", covering([1, 3, 8], 3))
def test_as_the_pieces_run_alone(x64, num) -> None:
    """Padded and reset, every step's growth is that of the pieces; each has a warm-up, and a frame, of its own."""
    e = cell_example("lstm", jnp.float64, n=4, steps=60)
    rng = np.random.default_rng(0)
    real, begins = rng.random(60) < 0.8, np.isin(np.arange(60), [20, 43])
    real[[19, 20, 42, 43, 59]] = True
    garbage = jnp.where(jnp.asarray(real)[:, None], e.xs, jnp.nan)
    restart = jax.tree.map(lambda a: 0.5 * a, e.state0)
    sequence = bptt.Sequence(garbage, mask=jnp.asarray(real), resets=jnp.asarray(begins), reset_state=restart)
    found = bptt.lyapunov_exponents(e.step, e.params, e.state0, sequence, num=num, warmup=4, window=1)
    piece = np.cumsum(begins)
    expected, total = np.zeros((60, num)), 0.0
    for k in range(3):
        own = np.flatnonzero(real & (piece == k))
        alone = bptt.lyapunov_exponents(
            e.step, e.params, e.state0 if k == 0 else restart, e.xs[own], num=num, warmup=4, window=1
        )
        expected[own] = alone.growth
        total += np.asarray(alone.exponents) * (len(own) - 4)
        np.testing.assert_array_equal(np.asarray(found.piece)[own], [-1] * 4 + [k] * (len(own) - 4))
    assert np.all(np.asarray(found.piece)[~real] == -1)
    np.testing.assert_allclose(np.sort(found.growth, axis=1), np.sort(expected, axis=1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.sum(found.exponents), np.sum(total) / (real.sum() - 12), rtol=1e-9)
    if num == 1:
        np.testing.assert_allclose(found.exponents, total / (real.sum() - 12), rtol=1e-9)
    # Batches of 1 step here, since 20 of them there are to be; neighbours only within a piece.
    measured = np.asarray(found.piece)
    rows = np.asarray(found.growth)[measured >= 0] - np.asarray(found.exponents)
    beside = np.diff(measured[measured >= 0]) == 0
    shared = np.sum(np.where(beside[:, None], rows[1:] * rows[:-1], 0), axis=0)
    count = len(rows)
    square = (np.sum(rows**2, axis=0) + 2 * np.maximum(shared, 0)) / (count * (count - 1))
    np.testing.assert_allclose(found.standard_errors, np.sqrt(square), rtol=1e-9)


def test_batches_do_not_reach_over_a_reset() -> None:
    """Pieces of 400 and 200 steps give batches of 30 from the end of each, and pieces of 10 are batches."""
    lengths = [400, 10, 200, 10]
    begins = np.isin(np.arange(620), np.cumsum(lengths)[:-1])
    rates = np.exp(np.random.default_rng(1).standard_normal(620))
    sequence = bptt.Sequence(jnp.asarray(rates, jnp.float32), resets=jnp.asarray(begins))
    found = bptt.lyapunov_exponents(driven, None, jnp.zeros(1), sequence)
    pieces = np.split(np.log(rates), np.cumsum(lengths)[:-1])
    batches, linked = [], []
    for piece in pieces:
        length = min(31, len(piece))  # 620 // 20
        own = piece[len(piece) % length :].reshape(-1, length)
        batches += list(own)
        linked += [False] + [True] * (len(own) - 1)
    sums, counts = (np.array([f(b) for b in batches]) for f in (np.sum, len))
    around = sums - counts * sums.sum() / counts.sum()
    shared = max(0, np.sum((around[1:] * around[:-1])[linked[1:]]))
    square = (np.sum(around**2) + 2 * shared) / counts.sum() ** 2 * len(sums) / (len(sums) - 1)
    np.testing.assert_allclose(found.standard_errors, [math.sqrt(square)], rtol=1e-4)


@jax.custom_vjp
def spike(v):
    return (v > 0).astype(v.dtype)


spike.defvjp(lambda v: (spike(v), v), lambda v, c: (c / jnp.square(1 + 10 * jnp.abs(v)),))


@jax.custom_vjp
def clipped_backwards(v):
    return v


clipped_backwards.defvjp(lambda v: (v, None), lambda _, c: (jnp.clip(c, -1, 1),))


def spiking(p, h, x):
    return p @ spike(h - 0.1) + 0.5 * h + x


def clipping(p, h, x):
    return jnp.tanh(p @ clipped_backwards(h) + x)


def looping(p, h, x):
    return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(0.7 * p @ c[1]) + 0.2 * x), (0, h))[
        1
    ]


def branching(p, h, x):
    return jax.lax.cond(x[0] > 0, lambda h: jnp.tanh(p @ h), lambda h: 0.9 * h + x, h)


@pytest.mark.parametrize("segments", covering([1, 3], 3))
@pytest.mark.parametrize("step", covering([spiking, clipping, looping, branching], clipping, branching))
def test_whatever_way_a_step_is_differentiated(x64, step, segments) -> None:
    """Its exponents are those of its Jacobians: of the backward pass where it has no other."""
    rng = np.random.default_rng(3)
    p, xs = jnp.asarray(rng.standard_normal((3, 3))), jnp.asarray(rng.standard_normal((60, 3)))
    found = bptt.lyapunov_exponents(step, p, jnp.ones(3), xs, warmup=5, segments=segments)
    growth = plain_qr(np.asarray(bptt.jacobians(step, p, jnp.ones(3), xs)), 3)[5:]
    np.testing.assert_allclose(np.sort(found.exponents), np.sort(growth.mean(axis=0)), rtol=1e-6)


def test_a_step_that_cannot_be_pushed() -> None:
    with pytest.raises(
        TypeError, match=r"step: lyapunov_exponents needs pushes.*jax.custom_jvp.*instead of D = 1100"
    ):
        bptt.lyapunov_exponents(lambda p, h, x: clipped_backwards(h), None, jnp.zeros(1100), length=5, num=1)


@pytest.mark.parametrize("segments", [1, 4])
def test_counters_and_keys_pass_through(x64, segments) -> None:
    """And turn what they turn: noise from a key in the state, a rate that depends on a counter."""

    def step(p, state, x):
        h, count, key = state
        key, own = jax.random.split(key)
        rate = jnp.where(count % 3 == 0, 0.5, 2.0) * jnp.exp(0.1 * jax.random.normal(own, (2,)))
        return rate * h, count + 1, key

    state0 = jnp.zeros(2), jnp.asarray(0), jax.random.key(7)
    found = bptt.lyapunov_exponents(step, None, state0, length=90, warmup=30, segments=segments)
    keys, key = [], jax.random.key(7)
    for _ in range(90):
        key, own = jax.random.split(key)
        keys.append(own)
    noise = np.stack([jax.random.normal(k, (2,)) for k in keys])
    logs = np.log(np.where(np.arange(90) % 3 == 0, 0.5, 2.0))[:, None] + 0.1 * noise
    # Both rates are about the same, so the frame has not turned: their sum is exact.
    assert float(jnp.sum(found.exponents)) == pytest.approx(logs[30:].sum() / 60, rel=1e-9)


def test_gradients_beside_dead_exponents(x64) -> None:
    """Of those that live as if the others were not there; of those that are -inf zero, never NaN."""
    rates = jnp.asarray([0.9, 0.5, 0.0])

    def exponents(w, num):
        return bptt.lyapunov_exponents(
            lambda w, h, x: w * h, w, jnp.ones(3), length=200, num=num, warmup=150
        ).exponents

    all_of_them = jax.jacrev(exponents)(rates, 3)
    np.testing.assert_allclose(all_of_them[:2], [[1 / 0.9, 0, 0], [0, 2, 0]], atol=1e-6)
    np.testing.assert_array_equal(all_of_them[2], 0)
    singular = jnp.asarray([[0.5, 0.5], [0.5, 0.5]])

    def largest(w):
        return bptt.lyapunov_exponents(linear, w, jnp.ones(2), length=30, warmup=5).exponents[0]

    np.testing.assert_allclose(jax.grad(largest)(singular), np.full((2, 2), 0.5), atol=1e-9)  # u v^T of ||W||


def test_what_lives_between_erasures(x64) -> None:
    """Rates as if the steps that erase were resets: of a direction by itself, and with their errors."""
    xs = np.exp(-0.3 + 0.2 * np.random.default_rng(2).standard_normal(300))
    xs[[70, 200]] = 0
    found = bptt.lyapunov_exponents(driven, None, jnp.zeros(1), jnp.asarray(xs))
    living = np.log(xs[xs > 0])
    assert float(found.exponents[0]) == -np.inf
    np.testing.assert_allclose(found.living_exponents, [living.mean()], rtol=1e-9)
    rates, errors = living_rates(found)
    np.testing.assert_allclose(rates, found.living_exponents, rtol=1e-12)
    assert 0.5 < float(errors[0]) / (living.std() / math.sqrt(298)) < 2
    blown = diagonal([np.nan])
    assert np.isnan(blown.living_exponents).all()
    assert diagonal([0.5, 0.0]).living_exponents[1] == -np.inf
    np.testing.assert_allclose(living_rates(jax.tree.map(lambda a: a[None], found))[0], [rates])


def test_a_spectrum_reads() -> None:
    found = diagonal([0.5, 0.9])
    assert len(repr(found).splitlines()) <= 10
    assert "largest exponent" in repr(found)
    data = found.to_xarray()
    assert data["exponents"].dims == ("exponent",)
    assert data["growth"].dims == ("time", "exponent")
    assert data["converged"].dims == ("exponent",)
    assert "<img" in found._repr_html_()


# --- Frames of one's own, and time in units of one's own


def test_an_initial_frame_needs_no_warm_up(x64):
    """Of a constant Jacobian: with its Schur vectors every step grows by the eigenvalues, from the first on, in every
    piece; and so do any columns that span the same flags."""
    w = jnp.array([[1.5, 0.7, 0.2], [0.0, 0.8, -0.4], [0.0, 0.0, 0.3]])
    mixed = jnp.eye(3)[:, :2] @ jnp.array([[1e150, 3e-150], [0.0, -2e-150]])
    sequence = bptt.Sequence(length=9, resets=jnp.arange(9) == 4)
    for frame in (jnp.eye(3)[:, :2], mixed):
        found = bptt.lyapunov_exponents(linear_step, w, jnp.ones(3), sequence, initial_frame=frame)
        np.testing.assert_allclose(found.growth, np.broadcast_to(np.log([1.5, 0.8]), (9, 2)), atol=1e-12)
    random = bptt.lyapunov_exponents(linear_step, w, jnp.ones(3), sequence, num=2)
    assert np.max(np.abs(random.growth[0] - np.log([1.5, 0.8]))) > 1e-2


@pytest.mark.parametrize(
    ("frame", "options", "says"),
    [
        (np.ones(2), {}, r"initial_frame: expected shape \[2, 1 to 2\], \[D, num\], got \[2\]"),
        (np.ones((3, 2)), {}, r"got \[3, 2\]"),
        (np.eye(2), {"num": 1}, r"expected shape \[2, 1\]"),
        (np.eye(2, dtype=np.complex64), {}, "expected real numbers, got complex64"),
        (np.ones((2, 2)), {}, "expected linearly independent columns"),
        (np.asarray([[np.nan], [1.0]]), {}, "expected finite numbers"),
    ],
)
def test_bad_initial_frames(frame, options, says):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=says):
        jax.block_until_ready(
            bptt.lyapunov_exponents(linear_step, jnp.eye(2), jnp.ones(2), length=3, initial_frame=frame, **options)
        )


@pytest.mark.parametrize("dt", [0.015625, 128.0])
def test_rates_per_unit_of_time_are_those_per_step_divided(dt, x64):
    """Of steps that all do the same, whose rates have no scatter, that erase a direction once, and that change a little
    in the middle; of each sequence and of all together."""

    def found(**options):
        def one(xs):
            given = lambda w, h, x: w * x * h, 0.5, jnp.ones(2), xs
            return bptt.lyapunov_exponents(*given, initial_frame=np.eye(2), **options)

        steady = np.ones((60, 2)) * [1, 0.5]
        erasing = steady * np.where(np.arange(60) == 40, 0, 1)[:, None] ** [0, 1]
        drifting = [steady * np.where(np.arange(60) < 30, 1, 1 + change)[:, None] for change in (1e-5, 1e-7)]
        return jax.vmap(one)(jnp.asarray([steady, steady, erasing, *drifting]))

    steps, time = found(), found(dt=dt)
    np.testing.assert_array_equal(steps.dt, 1)
    np.testing.assert_array_equal(time.dt, dt)
    np.testing.assert_array_equal(steps.converged, [[True] * 2] * 3 + [[False] * 2, [True] * 2])
    alike = jax.tree.map(lambda a: a[:2], steps), jax.tree.map(lambda a: a[:2], time)
    for a, b in ((steps, time), alike, (steps.pooled(), time.pooled()), tuple(each.pooled() for each in alike)):
        for name in ("exponents", "standard_errors", "living_exponents", "growth"):
            np.testing.assert_allclose(getattr(b, name), getattr(a, name) / dt, rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(living_rates(b)[1], living_rates(a)[1] / dt, rtol=1e-12)
        np.testing.assert_array_equal(b.converged, a.converged)


def test_rates_per_unit_of_time():
    def found(**options):
        return bptt.lyapunov_exponents(rotating, 0.9, jnp.ones(2), length=60, **options)

    def rotating(w, h, x):
        return jnp.array([[0.6, -0.8], [0.8, 0.6]]) @ jnp.sin(w * h)

    steps, time = found(), found(dt=0.25)
    for name in ("exponents", "standard_errors", "growth", "entropy_rate", "entropy_rate_error", "running"):
        np.testing.assert_allclose(getattr(time, name), 4 * getattr(steps, name), rtol=1e-5)
    assert time.kaplan_yorke_dimension == pytest.approx(steps.kaplan_yorke_dimension)
    assert "nats per step" in steps.statement
    assert "nats per unit of time" in time.statement
    with pytest.raises(ValueError, match="dt: expected a number above 0, got 0"):
        found(dt=0)
