"""Steps linear in the state: parallel against sequential, the cells against their papers, the analysis on both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error, weighted_loss
from slices import covering

import bptt_jax as bptt

N, I = 4, 3


@bptt.parallel.DiagonalStep
def leaky_step(params, x):
    """A user's own: one real and one complex leaf, inputs as a dict, factors that are broadcast or grow."""
    turn = jax.lax.complex(jnp.cos(x["angle"]), jnp.sin(x["angle"]))
    a = {"leak": jax.nn.sigmoid(params["leak"]), "wheel": params["wheel"] * turn}
    b = {"leak": jnp.tanh(x["drive"] @ params["w"]), "wheel": params["shift"] * turn**2}
    return a, b


def example(name, dtype, steps, inputs=I):
    """(step, params, state0, xs) with a start that is not 0."""
    rng = np.random.default_rng(0)

    def real(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    def complex_(*shape):
        return jax.lax.complex(real(*shape), real(*shape))

    if name == "lru":
        params = bptt.cells.LRUParams(real(N) - 2, real(N), 0.3 * real(N), real(N, inputs), real(N, inputs))
        return bptt.cells.lru(N, dtype=dtype).step, params, complex_(N), real(steps, inputs)
    if name == "min_gru":
        params = bptt.cells.MinGRUParams(real(2 * N, inputs), real(2 * N))
        return bptt.cells.min_gru(N, dtype=dtype).step, params, real(N), real(steps, inputs)
    params = {"leak": real(), "wheel": 0.5 * complex_(1, 3), "w": real(2, 2), "shift": complex_(3)[None]}
    return (
        leaky_step,
        params,
        {"leak": real(2), "wheel": complex_(2, 3)},
        {
            "angle": real(steps, 2, 1),
            "drive": real(steps, 2),
        },
    )


NAMES = ["lru", "min_gru", "leaky"]


def drawn(cell, inputs, seed=0):
    return jax.jit(cell.init, static_argnums=1)(jax.random.key(seed), inputs)


@pytest.mark.parametrize("name", covering(NAMES, "lru"))
def test_equal_to_unroll(name, x64):
    """Values, and gradients with respect to parameters, start and inputs, in float64."""
    step, params, state0, xs = example(name, jnp.float64, 1000)

    @jax.jit
    def both(params, state0, xs):
        steps = len(jax.tree.leaves(xs)[0])
        loss = weighted_loss(jnp.sin(1 + jnp.arange(steps, dtype=float)))

        def of(unroll):
            def value(*arguments):
                states = unroll(step, *arguments)
                return loss(states), states

            return jax.value_and_grad(value, (0, 1, 2), has_aux=True)(params, state0, xs)

        return of(bptt.unroll_linear), of(bptt.unroll)

    for steps in (1, 2, 3, 100, 1000):
        parallel, sequential = both(params, state0, jax.tree.map(lambda a, t=steps: a[:t], xs))
        assert jax.tree.structure(parallel) == jax.tree.structure(sequential)
        for a, b in zip(jax.tree.leaves(parallel), jax.tree.leaves(sequential), strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * np.max(np.abs(b)))


REAL = np.asarray([0, 1, 1, 0, 1, 1, 1, 0, 1, 0], bool)
RESETS = np.asarray([0, 0, 0, 1, 0, 0, 1, 0, 0, 1], bool)


@pytest.mark.parametrize("at_start", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_padding_and_resets(name, at_start, x64):
    """Values and all gradients as of `unroll`, with NaN in the padding; the first real step may be reset too."""
    step, params, state0, xs = example(name, jnp.float64, 10)
    again = jax.tree.map(lambda a: 0.3 * a[::-1], state0)
    resets = RESETS | (np.arange(10) == 0) if at_start else RESETS
    xs = jax.tree.map(lambda a: jnp.where(REAL.reshape(-1, *[1] * (a.ndim - 1)), a, jnp.nan), xs)
    loss = weighted_loss(jnp.sin(1 + jnp.arange(10, dtype=float)))

    @jax.jit
    def both(*arguments):
        def of(unroll):
            def value(params, state0, again, xs):
                sequence = bptt.Sequence(xs, mask=jnp.asarray(REAL), resets=jnp.asarray(resets), reset_state=again)
                states = unroll(step, params, state0, sequence)
                return loss(states), states

            return jax.value_and_grad(value, (0, 1, 2, 3), has_aux=True)(*arguments)

        return of(bptt.unroll_linear), of(bptt.unroll)

    parallel, sequential = both(params, state0, again, xs)
    for a, b in zip(jax.tree.leaves(parallel), jax.tree.leaves(sequential), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * np.max(np.abs(b)))


def test_a_reset_before_the_first_step_leaves_the_start():
    step = bptt.parallel.DiagonalStep(lambda params, x: (0.5, 1.0))
    sequence = bptt.Sequence(resets=jnp.arange(3) == 0, reset_state=jnp.asarray([4.0]))
    got = bptt.unroll_linear(step, None, jnp.asarray([7.0]), sequence)
    np.testing.assert_array_equal(got.ravel(), [3, 2.5, 2.25])


def test_overflow_ends_at_a_reset_and_integers_are_exact():
    step = bptt.parallel.DiagonalStep(lambda params, x: ({"h": x, "t": 3}, {"h": 1.0, "t": 2}))
    state0 = {"h": jnp.ones(2), "t": jnp.asarray(5, jnp.int32)}
    xs = jnp.full((60, 2), 1e30).at[40:].set(0.5)
    sequence = bptt.Sequence(xs, resets=jnp.arange(60) == 40)
    got, exact = (f(step, None, state0, sequence) for f in (bptt.unroll_linear, bptt.unroll))
    assert not np.isfinite(exact["h"][39]).any()
    np.testing.assert_allclose(got["h"][40:], exact["h"][40:], rtol=1e-6)
    np.testing.assert_array_equal(got["t"], exact["t"])  # which wraps around
    assert got["t"].dtype == jnp.int32


def test_autonomous_and_plain_numbers(x64):
    """Without inputs, and with coefficients that are no arrays: h -> h / 2 + 1."""
    step = bptt.parallel.DiagonalStep(lambda params, x: (0.5, params))
    h0 = jnp.asarray([3.0, -1.0])
    got = bptt.unroll_linear(step, 1.0, h0, length=4)
    np.testing.assert_allclose(got, 2 + (h0 - 2)[None] * 0.5 ** np.arange(1, 5)[:, None], rtol=1e-15)
    np.testing.assert_allclose(got, bptt.unroll(step, 1.0, h0, length=4), rtol=1e-15)


@pytest.mark.parametrize("name", ["lru", "min_gru"])
def test_single_precision_over_ten_thousand_steps(name):
    """Against NumPy in float64; a memory of up to 1000 steps for lru."""
    steps, n = 10_000, 16
    cell = bptt.cells.lru(n, r_min=0.9, r_max=0.999) if name == "lru" else bptt.cells.min_gru(n)
    params = drawn(cell, I)
    xs = np.random.default_rng(0).standard_normal((steps, I)).astype(np.float32)
    got = bptt.unroll_linear(cell.step, params, cell.initial_state(), xs)
    assert got.dtype == cell.initial_state().dtype
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    a, b = {"lru": numpy_lru, "min_gru": numpy_min_gru}[name](exact, xs.astype(np.float64))
    h, states = 0, np.zeros(b.shape, b.dtype)
    for t in range(steps):
        states[t] = h = a[t] * h + b[t]
    assert relative_error(got, states) < 1e-4


def numpy_lru(params, xs):
    """Coefficients [T, N] by the equations of Orvieto et al. 2023."""
    eigenvalues = np.exp(-np.exp(params.nu_log) + 1j * np.exp(params.theta_log))
    driven = np.exp(params.gamma_log) * (xs @ (params.input_re + 1j * params.input_im).T)
    return np.broadcast_to(eigenvalues, driven.shape), driven


def numpy_min_gru(params, xs):
    """Coefficients [T, N] by the equations of Feng et al. 2024."""
    n = len(params.bias) // 2
    z = 1 / (1 + np.exp(-(xs @ params.input[:n].T + params.bias[:n])))
    return 1 - z, z * (xs @ params.input[n:].T + params.bias[n:])


@pytest.mark.parametrize("name", ["lru", "min_gru"])
def test_one_step_in_numpy(name, x64):
    step, params, h, xs = example(name, jnp.float64, 1)
    a, b = {"lru": numpy_lru, "min_gru": numpy_min_gru}[name](jax.tree.map(np.asarray, params), np.asarray(xs))
    np.testing.assert_allclose(step(params, h, xs[0]), a[0] * h + b[0], rtol=1e-13)


def test_steps_are_shared():
    assert bptt.cells.lru(3).step is bptt.cells.lru(4, r_min=0.5).step
    assert bptt.cells.min_gru(3).step is bptt.cells.min_gru(4).step
    assert bptt.cells.lru(3).step != bptt.cells.min_gru(3).step
    again = bptt.parallel.DiagonalStep(leaky_step.coefficients)
    assert again == leaky_step
    assert hash(again) == hash(leaky_step)


def test_one_trace_for_one_shape():
    traces = []

    def coefficients(params, x):
        traces.append(None)
        return params, x

    for k in range(2):
        step = bptt.parallel.DiagonalStep(coefficients)  # equal to the one before
        bptt.unroll_linear(step, np.float32(0.5 + k), np.ones(1, np.float32), np.full((4, 1), k, np.float32))
        if k == 0:
            first = len(traces)
    assert len(traces) == first


def test_bad_arguments():
    step, params, state0, xs = example("min_gru", jnp.float32, 5)
    gru = bptt.gru(N).step
    with pytest.raises(
        TypeError, match=r"step: expected a bptt_jax.parallel.DiagonalStep, .* got function; .* bptt_jax.deer"
    ):
        bptt.unroll_linear(gru, params, state0, xs)
    with pytest.raises(TypeError, match=r"coefficients: expected a function .* got float"):
        bptt.parallel.DiagonalStep(0.5)
    with pytest.raises(ValueError, match="length: expected 5, the first axis of xs, got 4"):
        bptt.unroll_linear(step, params, state0, xs, length=4)
    with pytest.raises(ValueError, match=r"expected a of the state.s shape, \[1\], got \[4\]"):
        bptt.unroll_linear(step, params, state0[:1], xs)
    with pytest.raises(ValueError, match=r"state0: expected at least one floating number, got int32\[4\]"):
        bptt.unroll_linear(step, params, jnp.zeros(N, jnp.int32), xs)
    with pytest.raises(TypeError, match="coefficients: expected a hashable function"):
        bptt.unroll_linear(bptt.parallel.DiagonalStep(Unhashable()), params, state0, xs)
    for make in (bptt.cells.lru, bptt.cells.min_gru):
        with pytest.raises(ValueError, match="hidden_size: expected at least 1, got 0"):
            make(0)
        with pytest.raises(TypeError, match="input_size: expected an integer"):
            make(3).init(jax.random.key(0), 1.5)
    with pytest.raises(ValueError, match=r"r_max: expected a radius from r_min to 1, got 0\.8"):
        bptt.cells.lru(3, r_min=0.9, r_max=0.8)


class Unhashable:
    __hash__ = None

    def __call__(self, params, x):
        return params, x


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("name", ["lru", "min_gru"])
def test_dtypes(name, dtype, x64):
    if name == "lru" and dtype in ("bfloat16", "float16"):
        with pytest.raises(TypeError, match=f"dtype: expected float32 or float64, .* got {dtype}"):
            bptt.cells.lru(3, dtype=dtype)
        return
    cell = getattr(bptt.cells, name)(3, dtype=dtype)
    params = jax.eval_shape(lambda key: cell.init(key, 2), jax.random.key(0))
    assert all(a.dtype == dtype for a in params)
    xs = jax.ShapeDtypeStruct((4, 2), dtype)
    states = jax.eval_shape(lambda *a: bptt.unroll_linear(cell.step, *a), params, cell.initial_state(), xs)
    complex_ = {"float32": "complex64", "float64": "complex128"}
    assert states.dtype == cell.initial_state().dtype == (complex_[dtype] if name == "lru" else dtype)


def test_dtype_is_jaxs_by_default(dtype):
    assert bptt.cells.min_gru(3).initial_state().dtype == dtype
    assert bptt.cells.lru(3).initial_state().real.dtype == dtype


def test_lru_starts_as_in_the_paper():
    n, inputs = 2000, 20
    params = drawn(bptt.cells.lru(n, r_min=0.4, r_max=0.9, max_phase=0.3), inputs)
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    squares = np.exp(-2 * np.exp(exact.nu_log))
    np.testing.assert_allclose(np.exp(2 * exact.gamma_log), 1 - squares, rtol=1e-5)
    assert squares.min() >= 0.4**2 - 1e-6
    assert squares.max() <= 0.9**2 + 1e-6
    assert np.exp(exact.theta_log).max() <= 0.3 + 1e-6
    for part in (params.input_re, params.input_im):  # 40,000 numbers: 0.4 %
        np.testing.assert_allclose(np.std(part), 1 / np.sqrt(2 * inputs), rtol=0.02)
    assert abs(np.corrcoef(np.ravel(params.input_re), np.ravel(params.input_im))[0, 1]) < 0.03
    other = drawn(bptt.cells.lru(n), inputs, 1)
    assert not np.any(other.input_re == params.input_re)


def test_gamma_is_right_next_to_the_circle():
    """Where 1 - |lambda|^2 of single-precision numbers would keep two digits."""
    params = drawn(bptt.cells.lru(500, r_min=0.99999), 1)
    squares = np.exp(-2 * np.exp(np.asarray(params.nu_log, np.float64)))
    assert 1 - squares.max() < 1e-7  # of 500 draws over 2e-5
    np.testing.assert_allclose(np.exp(2 * np.asarray(params.gamma_log, np.float64)), 1 - squares, rtol=1e-4)


def test_gamma_keeps_the_variance():
    """White input of unit variance: E |h|^2 is that of B x for every unit, and 1 on average, at any memory.

    It is reached after a few memories of 1 / (1 - |lambda|^2) <= 50 steps. Of 8 x 4000 states at least 600 are
    independent, and |h|^2 is at most as scattered as a squared Gaussian: sqrt(2 / 600) = 6 % for a unit.
    """
    n, inputs, warmup = 64, 8, 500
    cell = bptt.cells.lru(n, r_min=0.3, r_max=0.99)
    params = drawn(cell, inputs)
    xs = jax.random.normal(jax.random.key(1), (8, warmup + 4000, inputs))
    states = jax.jit(jax.vmap(lambda x: bptt.unroll_linear(cell.step, params, cell.initial_state(), x)))(xs)
    power = np.mean(np.abs(np.asarray(states)[:, warmup:]) ** 2, axis=(0, 1))
    driven = np.sum(np.asarray(params.input_re) ** 2 + np.asarray(params.input_im) ** 2, axis=1)
    np.testing.assert_allclose(power / driven, 1, atol=0.25)
    np.testing.assert_allclose(np.mean(power / driven), 1, atol=0.02)
    # Over B: sqrt(1 / (I N)) = 4 %.
    np.testing.assert_allclose(np.mean(power), 1, atol=0.15)


def test_min_gru_starts_as_linear_layers():
    params = drawn(bptt.cells.min_gru(300), 100)
    assert params.input.shape == (600, 100)
    np.testing.assert_allclose(np.std(params.input), 0.1, rtol=0.02)  # 60,000 numbers
    np.testing.assert_array_equal(params.bias, np.zeros(600))
    assert not np.any(params.input[:300] == params.input[300:])
    seen = []

    def counting(key, shape, dtype):
        seen.append(shape)
        return jnp.arange(shape[0] * shape[1], dtype=dtype).reshape(shape)

    params = drawn(bptt.cells.min_gru(3, input_init=counting), 2)
    assert seen == [(2, 3)] * 2
    np.testing.assert_array_equal(params.input[3:], np.arange(6).reshape(2, 3).T)


def test_chrono_keeps_min_gru_for_uniform_times():
    longest, n = 100, 2000
    params = drawn(bptt.cells.min_gru(n, bias_init=bptt.cells.initializers.chrono(longest)), 1)
    np.testing.assert_array_equal(params.bias[n:], 0)
    jacobian = 1 - 1 / (1 + np.exp(-np.asarray(params.bias[:n], np.float64)))  # of an input of 0
    times = 1 / (1 - jacobian)
    assert times.min() >= 2 - 1e-5
    assert times.max() <= longest + 1e-3
    np.testing.assert_allclose(np.quantile(times, [0.25, 0.5, 0.75]), [26.5, 51, 75.5], atol=5)


MODULI, PHASES = np.asarray([0.5, 0.9, 0.2]), np.asarray([0.7, 3.0, 5.5])


def rotations(steps):
    """An lru of known eigenvalues."""
    params = bptt.cells.LRUParams(
        *(jnp.asarray(a) for a in (np.log(-np.log(MODULI)), np.log(PHASES), np.zeros(3))),
        *np.random.default_rng(0).standard_normal((2, 3, 2)),
    )
    xs = np.random.default_rng(1).standard_normal((steps, 2))
    return bptt.cells.lru(3).step, params, jnp.zeros(3, complex), xs


def test_jacobians_of_lru_rotate_and_shrink(x64):
    step, params, h0, xs = rotations(2)
    jacobians = np.asarray(bptt.jacobians(step, params, h0, xs))
    expected = np.zeros((6, 6))
    for k, (r, phi) in enumerate(zip(MODULI, PHASES, strict=True)):
        block = r * np.asarray([[np.cos(phi), -np.sin(phi)], [np.sin(phi), np.cos(phi)]])
        expected[np.ix_([k, k + 3], [k, k + 3])] = block
    np.testing.assert_allclose(jacobians, np.broadcast_to(expected, (2, 6, 6)), rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(bptt.singular_values(jacobians)[0], [0.9, 0.9, 0.5, 0.5, 0.2, 0.2], rtol=1e-13)
    got = np.asarray(bptt.eigenvalues(jacobians[0]))
    upper = (MODULI * np.exp(1j * PHASES))[[1, 0, 2]]
    pairs = np.stack([upper, upper.conj()], axis=1)
    np.testing.assert_allclose(np.sort_complex(got.reshape(3, 2)), np.sort_complex(pairs), rtol=1e-13)


def test_exponents_of_lru_are_the_log_moduli(x64):
    step, params, h0, xs = rotations(400)
    spectrum = jax.jit(lambda: bptt.lyapunov_exponents(step, params, h0, xs, warmup=200))()
    np.testing.assert_allclose(spectrum.exponents, np.log([0.9, 0.9, 0.5, 0.5, 0.2, 0.2]), rtol=1e-12)


def test_flow_and_adjoints_of_lru_in_closed_form(x64):
    """One unit read at the end: log ||dL/dh_t|| = (T - t) log |lambda| of it, down to 1e-600."""
    steps = 2000
    step, params, h0, xs = rotations(steps)

    def loss(states):
        return states[-1, 0].real

    back = steps - np.arange(steps)  # T - t for t = 0 .. T - 1
    flow, measured, parallel = jax.jit(
        lambda params: (
            bptt.gradient_flow(step, params, h0, xs, loss, stride=500),
            bptt.adjoints(step, params, h0, xs, loss),
            jax.grad(lambda p: loss(bptt.unroll_linear(step, p, h0, xs)))(params),
        )
    )(params)
    np.testing.assert_allclose(flow.products.log_norms, back * np.log(0.9), rtol=1e-12)
    np.testing.assert_allclose(flow.signal.log_gains, back * np.log(0.5), rtol=1e-12)
    np.testing.assert_allclose(flow.growth_rate, np.log(0.5), rtol=1e-12)
    np.testing.assert_allclose(flow.spectra.singular_values[:, 0], 0.9, rtol=1e-13)
    assert flow.verdict == "vanishing"
    np.testing.assert_allclose(measured.log_norms, (back - 1) * np.log(0.5), rtol=1e-12, atol=1e-12)
    # As a cotangent of JAX: dL/dx - i dL/dy = lambda^(T - t).
    expected = (0.5 * np.exp(0.7j)) ** (back[-20:] - 1)
    np.testing.assert_allclose(measured.adjoints[-20:, 0], expected, rtol=1e-12)
    np.testing.assert_array_equal(measured.adjoints[:, 1:], 0)
    assert relative_error(measured.params_grad, parallel) <= 1e-12


def test_jacobians_of_min_gru_are_what_is_kept(x64):
    step, params, h0, xs = example("min_gru", jnp.float64, 50)
    keep, _ = numpy_min_gru(jax.tree.map(np.asarray, params), np.asarray(xs))
    jacobians = bptt.jacobians(step, params, h0, xs)
    np.testing.assert_allclose(jacobians, keep[:, :, None] * np.eye(N), rtol=1e-12)
    products = np.cumsum(np.log(keep)[::-1], axis=0)[::-1]
    np.testing.assert_allclose(bptt.product_log_norms(jacobians), products.max(axis=1), rtol=1e-12)
    adjoints = bptt.adjoints(step, params, h0, xs, lambda states: jnp.sum(states[-1]))
    np.testing.assert_allclose(adjoints.adjoints[:-1], np.exp(products[1:]), rtol=1e-12)
