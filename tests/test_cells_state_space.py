"""How state-space models and linear attention begin, where their numerics turn, and that they are parallel in time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from slices import covering

import bptt_jax as bptt

N, I = 8, 3
KEY = jax.random.key(0)


def begun(name, n=N, inputs=I, **options):
    cell = getattr(bptt.cells, name)(n, **options)
    return jax.jit(lambda key: cell.init(key, inputs))(KEY)


def test_the_spectrum_of_s4d():
    for spectrum, expected in (
        ("lin", [0, np.pi, 2 * np.pi]),
        ("inv", [6 / np.pi * 5, 6 / np.pi * 1, 6 / np.pi * 0.2]),  # the paper's N is 6
    ):
        params = begun("s4d", state_size=3, spectrum=spectrum)
        np.testing.assert_allclose(params.im, np.tile(expected, (N, 1)), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(-np.exp(params.log_neg_re), -0.5, rtol=1e-6)


@pytest.mark.parametrize("name", covering(["s4d", "s5", "mamba", "mamba2"], "s5", "mamba2"))
def test_initial_steps_are_log_uniform(name):
    heads = {"heads": 2000} if name == "mamba2" else {}
    n = 100 if name == "s5" else 2000
    params = begun(name, n, 1, dt_min=0.01, dt_max=1.0, **heads)
    log_dt = np.log(np.logaddexp(0, params.dt_bias)) if "mamba" in name else np.asarray(params.log_dt)
    assert np.log(0.01) - 1e-4 < log_dt.min()
    assert log_dt.max() < 1e-4
    np.testing.assert_allclose(log_dt.mean(), np.log(0.1), atol=4 * np.log(100) / np.sqrt(12 * n))
    np.testing.assert_allclose(log_dt.std(), np.log(100) / np.sqrt(12), rtol=0.2)


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_short_steps_keep_their_digits(discretization):
    """What comes in is of the size of Delta, and is lost in a difference of numbers near 1."""
    cell = bptt.cells.s5(4, dt_min=1e-7, dt_max=1e-7, discretization=discretization)
    params = jax.jit(lambda key: cell.init(key, I))(KEY)
    _, b = cell.step.coefficients(params, jnp.ones(I))
    expected = 1e-7 * np.sum(np.float64(params.input_re) + 1j * np.float64(params.input_im), axis=1)
    np.testing.assert_allclose(b, expected, rtol=1e-5)


def test_s5_begins_as_hippo():
    """Half the eigenvalues of the normal part of HiPPO-LegS, entry by entry from its definition."""
    normal = np.zeros((2 * N, 2 * N))
    for i in range(2 * N):
        for j in range(2 * N):
            root = np.sqrt((2 * i + 1) * (2 * j + 1))
            hippo = -root if i > j else -(i + 1) if i == j else 0
            normal[i, j] = hippo + root / 2
    expected = np.linalg.eigvals(normal)
    params = begun("s5", inputs=400)
    found = np.asarray(params.re) + 1j * np.asarray(params.im)
    np.testing.assert_allclose(np.sort(found.imag), np.sort(expected.imag)[:N], rtol=1e-4)
    np.testing.assert_allclose(found.real, -0.5, rtol=1e-5)
    # Of B, of variance 1 / (2 N), the unitary V^* keeps the size, and half of it is in the half that is kept.
    size = np.mean(np.sum(np.square(params.input_re) + np.square(params.input_im), axis=0))
    np.testing.assert_allclose(size, 0.5, rtol=0.1)


def test_selective_models_begin_as_released():
    params = begun("mamba", state_size=5)
    np.testing.assert_allclose(np.exp(params.a_log), np.tile([1, 2, 3, 4, 5], (N, 1)), rtol=1e-6)
    a = np.exp(begun("mamba2", 2000, 1, heads=2000).a_log)
    assert 1 <= a.min() < 1.1
    assert 15.9 < a.max() <= 16
    np.testing.assert_allclose(a.mean(), 8.5, atol=0.4)


def test_the_memory_of_an_lmu_is_its_window():
    """Its coefficients are those of the last theta inputs in shifted Legendre polynomials."""
    cell = bptt.cells.lmu(2, order=8, theta=50.0)
    params = jax.jit(lambda key: cell.init(key, 1))(KEY)
    params = params._replace(encode_input=jnp.ones(1), encode_hidden=jnp.zeros(2))
    xs = np.sin(2 * np.pi * np.arange(300) / 60)
    m = bptt.unroll(cell.step, params, cell.initial_state(), jnp.asarray(xs[:, None], jnp.float32)).m
    for delay in (0, 10, 25, 50):
        weights = scipy.special.eval_legendre(np.arange(8), 2 * delay / 50 - 1)
        found = np.asarray(m)[100:] @ weights
        # An input that is held for a step is half a step old on average.
        expected = np.sin(2 * np.pi * (np.arange(100, 300) + 0.5 - delay) / 60)
        np.testing.assert_allclose(found, expected, atol=0.03)


def test_the_decays_of_retnet():
    cell = bptt.cells.retnet(8, heads=4, key_size=1)
    jac = bptt.jacobians(cell.step, cell.init(KEY, I), cell.initial_state(), jnp.ones((1, I)))[0]
    expected = np.repeat([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256], 2)
    np.testing.assert_allclose(jac, np.diag(expected), rtol=1e-6)


def test_gates_of_gla_are_slow():
    cell = bptt.cells.gla(4)
    params = cell.init(KEY, I)
    np.testing.assert_allclose(cell.step.coefficients(params, jnp.zeros(I))[0], 2 ** (-1 / 16), rtol=1e-6)
    a, _ = cell.step.coefficients(params._replace(gate_bias=jnp.full((2, 8), -800.0)), jnp.zeros(I))
    np.testing.assert_allclose(a, np.exp(-50), rtol=1e-4)  # where the sigmoid itself is 0


@pytest.mark.parametrize("name", covering(["mamba", "mamba2", "retnet", "gla"], "gla"))
def test_states_that_are_matrices_are_parallel_in_time(name):
    """With padding and resets; their Jacobians are diagonal, so the diagonal iteration is Newton's."""
    cell = getattr(bptt.cells, name)(2)
    params = begun(name, 2)
    resets, mask = np.isin(np.arange(9), [3, 5]), np.arange(9) < 8
    xs = bptt.Sequence(jax.random.normal(KEY, (9, I)), mask=mask, resets=resets)
    state0 = cell.initial_state() + 1
    expected = bptt.unroll(cell.step, params, state0, xs)
    found = bptt.deer(cell.step, params, state0, xs, jacobian="diagonal")
    assert int(found.iterations) <= 2
    for states in (bptt.unroll_linear(cell.step, params, state0, xs), found.states):
        np.testing.assert_allclose(states, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mamba2", "retnet", "gla"])
def test_heads_divide_the_hidden_size(name):
    with pytest.raises(ValueError, match="hidden_size: expected a multiple of heads, 3, got 4"):
        getattr(bptt.cells, name)(4, heads=3)


def test_steps_from_longest_to_shortest():
    """Those that are traced are checked when it runs."""
    begin = jax.jit(lambda lowest, highest: bptt.cells.s5(1, dt_min=lowest, dt_max=highest).init(KEY, 1).log_dt)
    np.testing.assert_allclose(begin(0.5, 0.5), np.log(0.5), rtol=1e-5)
    for lowest, highest in ((0.2, 0.1), (0.1, np.inf), (0.0, 0.1)):
        with pytest.raises(Exception, match=r"dt_(min|max): expected"):
            jax.block_until_ready(begin(lowest, highest))
    with pytest.raises(ValueError, match="dt_min: expected a number above 0, up to dt_max"):
        bptt.cells.s5(4, dt_min=0.2)


def test_s5_may_integrate():
    """Of an eigenvalue 0, and next to it, the input's factor is dt, with a slope: dt^2 / 2."""
    cell = bptt.cells.s5(1)
    one = jnp.ones((1, 1))
    nothing = jax.tree.map(jnp.zeros_like, cell.init(KEY, 1))._replace(input_re=one, log_dt=jnp.log(0.5 * one[0]))

    def step(params):
        return cell.step(params, cell.initial_state(), one[0]).real[0]

    value_and_slopes = jax.jit(jax.value_and_grad(step))
    for re in (0.0, -1e-25, -1e-3):
        value, slopes = value_and_slopes(nothing._replace(re=jnp.full(1, re)))
        np.testing.assert_allclose([value, slopes.re[0]], [0.5, 0.125], rtol=1e-3)
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in slopes)
