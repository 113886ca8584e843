"""What cells take, what they share, and how each starts; what they compute is in test_cell_oracles.py."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import I, N, cell_example

import bptt_jax as bptt
from bptt_jax.cells.weights import times

NAMES = ["rnn", "gru", "lstm"]


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


@pytest.mark.parametrize(
    ("activation", "expected"),
    [(jax.nn.relu, lambda a: np.maximum(a, 0)), (jax.nn.identity, lambda a: a), (jnp.sin, np.sin)],
)
def test_activations(activation, expected):
    _, params, h, xs, _ = cell_example("rnn", jnp.float32)
    got = bptt.rnn(N, activation=activation).step(params, h, xs[0])
    before = np.asarray(params.recurrent) @ h + np.asarray(params.input) @ np.asarray(xs[0]) + params.bias
    np.testing.assert_allclose(got, expected(before), rtol=1e-5)


def test_noise_of_a_leaky_network():
    """Its variance in the input of phi is 2 noise^2 / alpha, so that in continuous time it depends on no step:
    (1 - a) h + a noise sqrt(2 / a) n has the stationary variance 2 noise^2 / (2 - a)."""
    linear = bptt.cells.leaky_rnn(200, alpha=0.1, noise=0.3, activation=jax.nn.identity, gain=0.0)
    params = linear.init(jax.random.key(0), 1)
    keys = jax.random.split(jax.random.key(1), 400)
    states = jax.jit(lambda keys: bptt.unroll(linear.step, params, jnp.zeros(200), (jnp.zeros((400, 1)), keys)))(
        keys
    )
    # 200 units, each of which forgets in some 10 steps: 4000 independent numbers, 2 % of the variance.
    np.testing.assert_allclose(np.var(states[100:]), 2 * 0.3**2 / 1.9, rtol=0.1)
    again = linear.step(params, jnp.ones(200), (jnp.zeros(1), keys[0]))
    np.testing.assert_array_equal(again, linear.step(params, jnp.ones(200), (jnp.zeros(1), keys[0])))
    old = jax.random.key_data(keys[0])  # keys of the older kind are arrays of integers
    np.testing.assert_array_equal(again, linear.step(params, jnp.ones(200), (jnp.zeros(1), old)))
    np.testing.assert_allclose(linear.step(params, jnp.ones(200), jnp.zeros(1)), 0.9, rtol=1e-6)


def test_a_leaky_network_without_a_leak_is_an_rnn():
    leaky, rnn = bptt.cells.leaky_rnn(N, alpha=1.0, gain=0.5), bptt.rnn(N, gain=0.5)
    params = leaky.init(jax.random.key(0), I)
    np.testing.assert_array_equal(params.recurrent, rnn.init(jax.random.key(0), I).recurrent)
    h, x = jnp.linspace(0, 1, N), jnp.ones(I)
    np.testing.assert_allclose(leaky.step(params, h, x), rnn.step(params, h, x), rtol=1e-6)
    jac = bptt.jacobians(bptt.cells.leaky_rnn(N, alpha=0.25).step, params, h, x[None])[0]
    np.testing.assert_allclose(
        jac, 0.75 * np.eye(N) + 0.25 * bptt.jacobians(rnn.step, params, h, x[None])[0], rtol=1e-5
    )


def test_a_leak_may_be_traced():
    params, h, x = bptt.rnn(N).init(jax.random.key(0), I), jnp.ones(N), jnp.ones(I)

    @jax.jit
    def step(alpha, noise):
        cell = bptt.cells.leaky_rnn(N, alpha=alpha, noise=noise)
        return cell.step(params, h, (x, jax.random.key(3)))

    np.testing.assert_allclose(
        step(0.4, 0.1),
        bptt.cells.leaky_rnn(N, alpha=0.4, noise=0.1).step(params, h, (x, jax.random.key(3))),
        rtol=1e-6,
    )
    for alpha, noise in ((0.0, 0.1), (1.5, 0.1), (0.4, -1.0), (jnp.nan, 0.0)):
        with pytest.raises(Exception, match=r"(alpha|noise): expected"):
            jax.block_until_ready(step(alpha, noise))


def test_cells_share_their_step():
    """What was compiled for one is found again for another: sizes and initialisers are data."""
    assert bptt.cells.leaky_rnn(3).step is bptt.cells.leaky_rnn(5, alpha=0.2, gain=2).step
    assert bptt.cells.leaky_rnn(3).step is not bptt.cells.leaky_rnn(3, alpha=0.5).step
    assert bptt.rnn(3).step is bptt.rnn(5, gain=2).step
    assert bptt.rnn(3).step is not bptt.rnn(3, activation=jax.nn.relu).step
    assert bptt.gru(3).step is bptt.gru(4).step
    assert bptt.lstm(3).step is bptt.lstm(4, forget_bias=2).step


@pytest.fixture(scope="module")
def big_rnn():
    """Two draws with N = 400 at gain 1.5."""
    cell = bptt.rnn(400, gain=1.5)
    return jax.jit(jax.vmap(lambda key: cell.init(key, 100)))(jax.random.split(jax.random.key(0), 2))


def test_options_reach_another_process_with_the_cell():
    init, spikes = bptt.cells.initializers, bptt.cells.surrogates
    for cell in (
        bptt.rnn(N, activation=jax.nn.relu, recurrent_init=init.identity(0.5)),
        bptt.rnn(N, activation=jnp.tanh),
        bptt.gru(N, bias_init=init.chrono(30), dtype=jnp.bfloat16),
        bptt.cells.lif(N, spike=spikes.arctan(3.0)),
    ):
        again = pickle.loads(pickle.dumps(cell))
        assert again.step is cell.step
        drawn = [c.init(jax.random.key(0), I) for c in (cell, again)]
        chex.assert_trees_all_equal(*drawn)
    rotating = bptt.cells.orthogonal(N, activation=jax.nn.relu).step
    assert pickle.loads(pickle.dumps(rotating)) == rotating
    layers = bptt.stack(
        bptt.rnn(N, activation=jax.nn.relu).step, bptt.cells.lru(N).step, output=[jax.nn.relu, jnp.real]
    )
    again = pickle.loads(pickle.dumps(layers))
    params = bptt.rnn(N).init(jax.random.key(0), I), bptt.cells.lru(N).init(jax.random.key(1), N)
    state = jnp.ones(N), jnp.ones(N, jnp.complex64)
    chex.assert_trees_all_equal(layers(params, state, jnp.ones(I)), again(params, state, jnp.ones(I)))


def test_what_was_put_together_otherwise_is_not_pickled_as_the_call():
    cell = bptt.lstm(N)._replace(step=bptt.gru(N).step)
    with pytest.raises(AttributeError, match="init"):  # which stands in a function
        pickle.dumps(cell)
    plain = bptt.Cell(*bptt.lstm(N))
    assert type(pickle.loads(pickle.dumps(plain._replace(init=len, initial_state=len)))) is bptt.Cell


def test_gain_and_the_circular_law(big_rnn):
    """The disc's radius g and the largest singular value 2 g, to 2 % at N = 400."""
    np.testing.assert_allclose(bptt.linalg.spectral_norm(big_rnn.recurrent), 3.0, rtol=0.02)
    radii = np.abs(np.asarray(bptt.eigenvalues(big_rnn.recurrent[0])))
    # The disc is filled evenly: a share p of the eigenvalues lies within sqrt(p) of its radius.
    for share in (0.5, 0.9, 0.99):
        np.testing.assert_allclose(np.quantile(radii, share), 1.5 * np.sqrt(share), rtol=0.02)
    # The outermost one of 400 lies some 4 % outside in the mean (Rider 2003, J. Phys. A 36: 3401), +- 2 %.
    np.testing.assert_allclose(radii[0], 1.5 * 1.04, rtol=0.06)


def test_rnn_starts_with_the_stated_variances(big_rnn):
    # 160,000 and 40,000 numbers in each draw: a relative error of the standard deviation below 1 %.
    np.testing.assert_allclose(np.std(big_rnn.recurrent), 1.5 / np.sqrt(400), rtol=0.01)
    np.testing.assert_allclose(np.std(big_rnn.input), 1 / np.sqrt(100), rtol=0.01)
    assert not np.any(big_rnn.bias)


def test_gates_start_orthogonal_each_and_apart():
    n = 16
    params = bptt.lstm(n, forget_bias=1.5).init(jax.random.key(0), 2)
    gates = np.asarray(params.recurrent).reshape(4, n, n)
    np.testing.assert_allclose(gates @ gates.swapaxes(1, 2), np.broadcast_to(np.eye(n), (4, n, n)), atol=1e-5)
    assert min(np.abs(gates[i] - gates[j]).max() for i in range(4) for j in range(i)) > 0.1
    np.testing.assert_array_equal(params.bias, np.repeat([0, 1.5, 0, 0], n))
    assert params.input.shape == (4 * n, 2)
    gru = jax.eval_shape(lambda key: bptt.gru(n).init(key, 2), jax.random.key(0))
    assert [a.shape for a in gru] == [(3 * n, n), (3 * n, 2), (3 * n,), (n,)]


def test_forget_bias_sets_the_carousel():
    """With weights of zero, dc_t/dc_{t-1} is sigmoid(b)."""
    cell = bptt.lstm(
        2, forget_bias=2.0, recurrent_init=jax.nn.initializers.zeros, input_init=jax.nn.initializers.zeros
    )
    params = cell.init(jax.random.key(0), 1)
    jacobian = bptt.jacobians(cell.step, params, cell.initial_state(), jnp.ones((1, 1)))[0]
    np.testing.assert_allclose(jacobian[2:, 2:], sigmoid(2.0) * np.eye(2), rtol=1e-6)


def test_initialisers_see_fan_in_first():
    """An initialiser is given (fan_in, fan_out), and what it returns is transposed."""
    seen = []

    def counting(key, shape, dtype):
        seen.append(shape)
        return jnp.arange(shape[0] * shape[1], dtype=dtype).reshape(shape)

    params = bptt.gru(3, recurrent_init=counting, input_init=counting).init(jax.random.key(0), 2)
    assert seen == [(3, 3)] * 3 + [(2, 3)] * 3
    np.testing.assert_array_equal(params.input[:3], np.arange(6).reshape(2, 3).T)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes(name, dtype, x64):
    cell = getattr(bptt.cells, name)(3, dtype=dtype)
    params = jax.eval_shape(lambda key: cell.init(key, 2), jax.random.key(0))
    assert all(a.dtype == dtype for a in jax.tree.leaves(params))
    state = jax.eval_shape(cell.step, params, cell.initial_state(), jax.ShapeDtypeStruct((2,), dtype))
    assert all(a.dtype == dtype for a in jax.tree.leaves((state, cell.initial_state())))


@pytest.mark.parametrize(("name", "setting"), [("rnn", "gain"), ("lstm", "forget_bias")])
def test_traced_settings(name, setting):
    """As a sweep by vmap has them: the weights of plain numbers, in the dtype asked for; checked when they run."""

    def drawn(value):
        return getattr(bptt.cells, name)(3, dtype=jnp.bfloat16, **{setting: value}).init(jax.random.key(0), 2)

    swept = jax.jit(jax.vmap(drawn))
    chex.assert_trees_all_close(jax.tree.map(lambda a: a[1], swept(jnp.asarray([0.5, 2.0]))), drawn(2.0))
    with pytest.raises(Exception, match=f"{setting}: expected a finite number"):
        jax.block_until_ready(swept(jnp.asarray([0.5, jnp.inf])))


def test_dtype_is_jaxs_by_default(dtype):
    assert bptt.rnn(3).initial_state().dtype == dtype


def test_half_precision_orthogonal_weights_can_be_drawn():
    """LAPACK factorises no half precision."""
    assert bptt.gru(3, dtype=jnp.bfloat16).init(jax.random.key(0), 2).recurrent.dtype == jnp.bfloat16


def test_keys_differ_and_repeat():
    cell = bptt.rnn(3)
    first, again, other = (cell.init(jax.random.key(k), 2) for k in (0, 0, 1))
    np.testing.assert_array_equal(first.recurrent, again.recurrent)
    assert np.any(first.recurrent != other.recurrent)


@pytest.mark.parametrize("n", [3, 200, 600])  # weights that are copied, transposed, and left where they lie
def test_derivatives_of_a_product_with_weights_have_derivatives(n):
    """Of the Jacobian by the weights, whichever way it was taken: what penalties on Jacobians and exponents need."""
    k_w, k_h, k_v = jax.random.split(jax.random.key(0), 3)
    w, h, v = jax.random.normal(k_w, (n, n)), jax.random.normal(k_h, (n,)), jax.random.normal(k_v, (n,))

    def penalties(product, w):
        def step(h):
            return jnp.tanh(product(w, h) / n)

        yield jax.jvp(step, (h,), (v,))[1]
        yield jax.linearize(step, h)[1](v)
        yield jax.vjp(step, h)[1](v)[0]
        if n == 3:
            yield from (jax.jacfwd(step)(h), jax.jacrev(step)(h))

    def gradients(product):
        return jax.jit(jax.grad(lambda w: sum(jnp.sum(a**2) for a in penalties(product, w))))(w)

    found, expected = gradients(times), gradients(jnp.matmul)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(expected))))
    assert jnp.max(jnp.abs(expected)) > 0
