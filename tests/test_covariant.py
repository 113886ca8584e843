"""Covariant Lyapunov vectors: covariance, eigenvectors, the direction of a flow, Oseledets' subspaces."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import linear_step
from scipy.linalg import null_space, subspace_angles
from slices import covering

import bptt_jax as bptt

D, T = 4, 400
CAT = np.asarray([[2.0, 1.0], [1.0, 1.0]])
WINDOW = {"warmup": 100, "cooldown": 100}


def coupled(p, h, x):
    """Logistic maps, each coupled to its neighbours; chaotic, with D positive exponents, and no two alike."""
    g = p * h * (1 - h)
    return 0.9 * g + 0.05 * (jnp.roll(g, 1) + jnp.roll(g, -1))


def folded(p, h, x):
    """Henon's map, beside two numbers that follow it: one direction is unstable."""
    a, b = h["plane"]
    new = jnp.stack([1 - 1.4 * a**2 + b, 0.3 * a])
    return {"plane": new, "beside": p * h["beside"] + jnp.stack([0.1 * a, 0.2 * jnp.sin(a)])}


def with_states(vectors, state):
    return vectors, bptt.ravel_state(state)[0]


def jacobian_at(step, params, like):
    unravel = bptt.ravel_state(like)[1]
    return lambda v: jax.jacfwd(lambda v: bptt.ravel_state(step(params, unravel(v), None))[0])(v)


HENON = {"plane": np.full(2, 0.1), "beside": np.full(2, 0.2)}
LOGISTIC = np.asarray([0.1, 0.23, 0.37, 0.51])
PACE = np.asarray([0.8, 0.55])
RUNS = {"coupled": (coupled, np.asarray([3.99, 3.9, 3.8, 3.7]), LOGISTIC), "folded": (folded, PACE, HENON)}


@pytest.fixture(scope="module")
def runs():
    """Vectors, states and Jacobians at the steps that are kept."""
    found = {}
    with jax.enable_x64(True):
        for name, (step, params, start) in RUNS.items():
            result = bptt.covariant_vectors(step, params, start, length=T, observe=with_states, **WINDOW)
            vectors, states = result.observed
            jacobians = jax.jit(jax.vmap(jacobian_at(step, params, start)))(states)
            found[name] = result, np.asarray(vectors), np.asarray(states), np.asarray(jacobians)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_covariance(runs, name):
    """What the Jacobian makes of a vector is the next one, longer by the factor that is told, and of the same sign."""
    result, vectors, _, jacobians = runs[name]
    kept = np.flatnonzero(result.kept)
    np.testing.assert_array_equal(kept, np.arange(100, T - 100))
    images = jacobians[kept[:-1]] @ vectors[kept[:-1]]
    images /= np.exp(np.asarray(result.growth))[kept[:-1], None]
    np.testing.assert_allclose(images, vectors[kept[1:]], atol=1e-10)
    np.testing.assert_allclose(np.linalg.norm(vectors[kept], axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize("name", RUNS)
def test_against_brute_force(runs, name, x64):
    """The i-th lies in the span of the first i directions of frames carried forwards from the past, and has nothing of
    the first i - 1 directions of frames carried by the transposes from the future: where both meet there is one line.
    """
    step, params, start = RUNS[name]
    vectors = np.asarray(bptt.covariant_vectors(step, params, start, length=T, **WINDOW).vectors)
    states = jnp.stack(
        [bptt.ravel_state(start)[0], *_vectors_of(bptt.unroll(step, params, start, length=T), start)]
    )
    jacobians = np.asarray(jax.jit(jax.vmap(jacobian_at(step, params, start)))(states[:-1]))
    random, at = np.random.default_rng(3), T // 2
    past, future = random.standard_normal((2, D, D))
    for k in range(at):
        past = np.linalg.qr(jacobians[k] @ past)[0]
    for k in range(T - 1, at - 1, -1):
        future = np.linalg.qr(jacobians[k].T @ future)[0]
    for i in range(D):
        line = past[:, : i + 1] @ null_space(future[:, :i].T @ past[:, : i + 1]) if i else past[:, :1]
        assert line.shape == (D, 1)
        np.testing.assert_allclose(np.abs(line[:, 0] @ vectors[at, :, i]), 1, rtol=1e-10)


def _vectors_of(states, like):
    return jax.vmap(lambda h: bptt.ravel_state(h)[0])(states)


@pytest.mark.parametrize("name", RUNS)
def test_exponents_are_those_of_lyapunov_exponents(runs, name, x64):
    result = runs[name][0]
    step, params, start = RUNS[name]
    expected = bptt.lyapunov_exponents(step, params, start, length=T, warmup=100)
    for field in (
        "exponents",
        "standard_errors",
        "kaplan_yorke_dimension",
        "kaplan_yorke_error",
        "entropy_rate_error",
    ):
        got = getattr(result.spectrum, field)
        np.testing.assert_allclose(got, getattr(expected, field), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(result.exponents, result.spectrum.exponents)
    along = np.nanmean(result.growth, axis=0)
    np.testing.assert_allclose(result.finite_time(20).mean(axis=0), along, rtol=1e-12)
    # Both sums of growth differ by what vectors and frames have at the two ends.
    np.testing.assert_allclose(along, np.mean(expected.growth[100 : T - 100], axis=0), atol=0.05)


@pytest.mark.parametrize(("name", "split"), [("coupled", 2), ("folded", 1)])
def test_angles_and_participation(runs, name, split):
    result, vectors, _, _ = runs[name]
    assert (
        int(result.unstable)
        == split
        == np.sum(np.asarray(result.exponents) > 2 * np.asarray(result.spectrum.standard_errors))
    )
    angles = np.asarray(result.angles)
    for k in (100, 150, 299):
        expected = np.min(subspace_angles(vectors[k][:, :split], vectors[k][:, split:]))
        np.testing.assert_allclose(angles[k], expected, rtol=1e-7)
    assert np.isnan(angles[[99, 300]]).all()
    np.testing.assert_allclose(result.participation, 1 / np.sum(vectors**4, axis=1), rtol=1e-12)


# --- Known vectors


@pytest.mark.parametrize("dtype", covering(["float32", "float64"], "float32"), indirect=True)
def test_of_a_symmetric_map_they_are_its_eigenvectors(dtype):
    found = bptt.covariant_vectors(
        lambda m, h, x: (m @ h) % 1.0, jnp.asarray(CAT, dtype), jnp.asarray([0.1, 0.2], dtype), length=60
    )
    golden = (1 + 5**0.5) / 2
    np.testing.assert_allclose(found.exponents, [2 * np.log(golden), -2 * np.log(golden)], rtol=1e-6)
    kept = np.asarray(found.kept)
    np.testing.assert_array_equal(kept, (np.arange(60) >= 6) & (np.arange(60) < 54))
    expected = np.asarray([[golden, 1], [1, golden]]) / np.hypot(golden, 1)
    tolerance = 2e-4 if dtype == jnp.float32 else 1e-10
    late = np.arange(60) > 12  # six steps of warm-up leave 1e-5
    for vectors in np.asarray(found.vectors)[kept & late]:
        np.testing.assert_allclose(np.abs(vectors), expected, atol=tolerance)
    np.testing.assert_allclose(found.angles[kept & late], np.pi / 2, atol=tolerance)
    np.testing.assert_allclose(found.participation[kept & late], 5 / 3, atol=5 * tolerance)
    assert int(found.unstable) == 1


def _scaled_differences(p, h, x):  # the state stays where it is
    return x * h - jax.lax.stop_gradient(x * h - h)


@pytest.mark.parametrize(
    ("rates", "scatter", "expected"),
    [((0.5, 0.01, -1), (0, 1, 0), 1), ((-0.5, 0.01, -1), (0, 1, 0), 0), ((0.1, 0.2, -1), (0, 10, 0), 2)],
)
def test_unstable_is_what_grows_by_more_than_its_error(rates, scatter, expected, x64):
    """And what grows faster than that."""
    noise = np.random.default_rng(0).standard_normal(40)
    noise = (noise - noise.mean()) / noise.std() / np.sqrt(40)  # whose mean has an error of 1/40
    growth = np.asarray(rates) + np.outer(noise, scatter)

    given = _scaled_differences, None, jnp.ones(3), np.exp(growth)
    found = bptt.covariant_vectors(*given, warmup=0, cooldown=0, initial_frame=jnp.eye(3))
    np.testing.assert_allclose(found.exponents, np.sort(rates)[::-1], atol=1e-12)
    assert int(found.unstable) == expected


def test_of_a_constant_jacobian_they_are_its_eigenvectors(x64):
    """Not symmetric, at a scale whose squares leave the range."""
    random = np.random.default_rng(0)
    basis, values = random.standard_normal((3, 3)), np.asarray([1.5, -0.9, 0.3])
    matrix = 1e200 * basis @ np.diag(values) @ np.linalg.inv(basis)

    def step(m, h, x):  # whose states stay where they are
        return m @ h - jax.lax.stop_gradient(m @ h)

    found = bptt.covariant_vectors(step, matrix, np.ones(3), length=120, warmup=50, cooldown=50, dt=0.5)
    expected = np.asarray(bptt.eigensystem(matrix).right)
    overlap = np.abs(np.sum(expected * np.asarray(found.vectors)[60], axis=0))
    np.testing.assert_allclose(overlap, 1, rtol=1e-9)
    np.testing.assert_allclose(found.growth[60], (np.log(np.abs(values)) + 200 * np.log(10)) / 0.5, rtol=1e-9)
    np.testing.assert_allclose(found.exponents, found.growth[60], rtol=1e-3)


def lorenz(h):
    x, y, z = h
    return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


def runge_kutta(dt, h, x):
    a = lorenz(h)
    b = lorenz(h + dt / 2 * a)
    c = lorenz(h + dt / 2 * b)
    return h + dt / 6 * (a + 2 * b + 2 * c + lorenz(h + dt * c))


@pytest.mark.exhaustive
def test_the_neutral_vector_of_a_flow_is_its_direction(x64):
    """Differences along the orbit neither grow nor shrink in the long run, and a step takes the flow along."""
    found = bptt.covariant_vectors(
        runge_kutta,
        0.01,
        np.ones(3),
        length=4000,
        warmup=1500,
        cooldown=1500,
        dt=0.01,
        unstable=1,
        observe=with_states,
    )
    vectors, states = (np.asarray(a)[1500:2500] for a in found.observed)
    flow = np.asarray(jax.vmap(lorenz)(states))
    flow = flow / np.linalg.norm(flow, axis=1, keepdims=True)
    np.testing.assert_allclose(np.abs(np.sum(flow * vectors[..., 1], axis=1)), 1, rtol=1e-6)
    assert abs(found.exponents[2] + 14.57) < 0.5
    assert np.nanmin(found.angles) > 1e-3
    assert "nats per unit of time" in repr(found)


# --- Sequences, steps that erase, what is not finite


def test_pieces_are_as_alone(x64):
    random = np.random.default_rng(1)
    w, xs = random.standard_normal((3, 3)), random.standard_normal((40, 3))

    def step(w, h, x):
        return jnp.tanh(w @ h + x)

    mask, resets = np.ones(40, bool), np.arange(40) == 20
    mask[[5, 6, 7, 25, 31, 39]] = False  # each piece has 17 steps: one program
    options = {"warmup": 3, "cooldown": 2, "unstable": 1}
    run = jax.jit(partial(bptt.covariant_vectors, step, **options))
    whole = run(w, np.zeros(3), bptt.Sequence(jnp.where(mask[:, None], xs, jnp.nan), mask=mask, resets=resets))
    for first, last in ((0, 20), (20, 40)):
        steps = np.arange(first, last)[mask[first:last]]
        alone = run(w, np.zeros(3), xs[steps])
        for name in ("vectors", "growth", "angles", "participation", "kept"):
            np.testing.assert_allclose(getattr(whole, name)[steps], getattr(alone, name), atol=1e-9)
    assert np.isnan(np.asarray(whole.vectors)[~np.asarray(whole.kept)]).all()
    assert np.asarray(whole.kept).sum() == mask.sum() - 10


def test_what_a_step_maps_to_zero(x64):
    """A direction that every step erases has the exponent -inf, and is the vector; what one step erases during the
    warm-up does not matter afterwards."""

    @jax.jit
    def run(w, xs):
        return bptt.covariant_vectors(lambda w, h, x: x * w * h, w, np.ones(3), xs, warmup=90, cooldown=40)

    xs = np.ones(160)
    found = run(jnp.asarray([0.5, 0.0, 0.9]), xs)
    np.testing.assert_allclose(np.abs(found.vectors[100]), np.eye(3)[:, [2, 0, 1]], atol=1e-7)
    np.testing.assert_allclose(np.exp(found.growth[100]), [0.9, 0.5, 0.0], rtol=1e-9)
    xs[20] = 0
    erased = run(jnp.asarray([0.5, 0.25, 0.9]), xs)
    np.testing.assert_allclose(np.abs(erased.vectors[100]), np.eye(3)[:, [2, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(erased.exponents, np.log([0.9, 0.5, 0.25]), rtol=1e-9)


def test_a_lost_direction_changes_places(x64):
    """One step erases the fastest direction; before it that one is erased, after it another has its place."""
    rows = np.asarray([[2.0, 1.0, 0.5]] * 160)
    rows[60, 0] = 0
    modes = np.asarray([[1.0, 0.4, -0.3], [0.0, 1.0, 0.6], [0.0, 0.0, 1.0]])  # columns
    modes /= np.linalg.norm(modes, axis=0)
    jacobians = np.asarray([modes @ np.diag(row) @ np.linalg.inv(modes) for row in rows])
    options = {"warmup": 0, "cooldown": 0, "initial_frame": np.eye(3)}
    found = bptt.covariant_vectors(lambda p, h, x: x @ h, None, np.ones(3), jacobians, **options)
    vectors, factors = np.asarray(found.vectors), np.exp(found.growth)
    for k in range(159):
        np.testing.assert_allclose(jacobians[k] @ vectors[k], vectors[k + 1] * factors[k], atol=1e-12)
    for k in range(15):  # far from where one is lost
        np.testing.assert_allclose(jacobians[k] @ vectors[k], vectors[k] * factors[k], atol=1e-12)
        np.testing.assert_allclose(np.sort(factors[k]), [0.5, 1, 2], atol=1e-12)
    assert np.min(factors[60]) < 1e-12 < np.min(factors[[59, 61]])


def test_what_is_not_finite_stays_in_its_piece():
    xs = np.ones((30, 2), np.float32)
    xs[20, 1] = np.nan
    sequence = bptt.Sequence(xs, resets=jnp.arange(30) == 10)
    found = bptt.covariant_vectors(
        lambda w, h, x: jnp.tanh(w @ h + x),
        jnp.asarray(CAT, jnp.float32),
        jnp.zeros(2),
        sequence,
        warmup=2,
        cooldown=2,
    )
    np.testing.assert_array_equal(found.kept, (np.arange(30) >= 2) & (np.arange(30) < 8))
    assert np.isfinite(found.vectors[2:8]).all()
    assert np.isnan(found.vectors[8:]).all()
    assert found.spectrum.first_nonfinite == 20
    assert np.isnan(found.exponents).all()


# --- The call


@pytest.mark.exhaustive
def test_memory_goes_with_the_root_of_the_length():
    def temporary(steps):
        def run(w):
            found = bptt.covariant_vectors(
                linear_step, w, jnp.zeros(16), length=steps, num=8, observe=lambda v, h: jnp.max(jnp.abs(v))
            )
            return found.observed, found.angles

        return jax.jit(run).lower(jnp.eye(16)).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(400), temporary(6400)
    assert (
        long - short < 6000 * 8 * 4 * 6
    )  # what has a number for each step and vector, growth and the like, remains
    assert long < 6400 * 8 * 16 * 4 / 2  # the vectors alone


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num": 3}, "num: expected at most D = 2"),
        ({"warmup": -1}, "warmup: expected 0 to 10, got -1"),
        ({"cooldown": 1.5}, "cooldown: expected an integer, got float"),
        ({"unstable": 3}, "unstable: expected 0 to 2, got 3"),
        ({"warmup": 5, "cooldown": 5}, "expected fewer together than the 10 steps, got 5 and 5"),
        ({"observe": 3}, "observe"),
        ({"dt": -1.0}, "dt: expected a number above 0"),
        ({"dt": np.full(10, 0.1)}, r"dt: expected a number above 0, got float\d+\[10\]"),
        ({"initial_frame": np.ones((3, 1))}, "initial_frame: expected shape"),
    ],
)
def test_bad_arguments(options, says):
    with pytest.raises((TypeError, ValueError), match=says):
        bptt.covariant_vectors(linear_step, jnp.eye(2), jnp.ones(2), length=10, **options)
