"""What the papers say of the cells that oscillate, or have several time scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt

I, N, T = 3, 8, 6


def moved(tree, seed):
    """Every floating number moved."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: (
            a + jnp.asarray(0.3 * rng.standard_normal(a.shape), a.dtype)
            if jnp.issubdtype(a.dtype, jnp.floating)
            else a
        ),
        tree,
    )


def example(cell):
    xs = jax.random.normal(jax.random.key(1), (T, I), jnp.float64)
    return cell.step, moved(cell.init(jax.random.key(0), I), 0), moved(cell.initial_state(), 1), xs


def test_unicornn_keeps_volumes(x64):
    """Unit by unit: the determinants of the 2 x 2 blocks are 1, and nothing passes from unit to unit."""
    jacobians = bptt.jacobians(*example(bptt.cells.unicornn(N, dtype=jnp.float64)))
    blocks = np.asarray(jacobians).reshape(T, 2, N, 2, N)
    own = blocks[:, :, range(N), :, range(N)]  # [N, T, 2, 2]
    np.testing.assert_allclose(np.linalg.det(own), 1, rtol=1e-13)
    assert np.count_nonzero(blocks) == np.count_nonzero(own)


def test_clockwork_waits(x64):
    """Of 4 modules of 2 units each: 0 steps always, 1 at even times, 2 at 0 and 4, 3 at 0. Where one waits, its row
    of the Jacobian is the identity's; where one steps, it hears no faster one."""
    jacobians = np.asarray(bptt.jacobians(*example(bptt.cells.clockwork(N, modules=4, dtype=jnp.float64))))
    for t, jacobian in enumerate(jacobians):
        for unit, row in enumerate(jacobian):
            module = unit // 2
            if t % 2**module:
                np.testing.assert_array_equal(row, np.eye(N)[unit])
            else:
                assert not np.any(row[: 2 * module])
                assert np.all(row[2 * module :])


def test_clockwork_begins_anew(x64):
    """A reset sets the clock back."""
    step, params, state, xs = example(bptt.cells.clockwork(N, dtype=jnp.float64))
    resets = jnp.arange(T) == 3
    whole = bptt.unroll(step, params, state, bptt.Sequence(xs, resets=resets))
    np.testing.assert_array_equal(whole.h[3:], bptt.unroll(step, params, state, xs[3:]).h)
    np.testing.assert_array_equal(whole.t, [1, 2, 3, 1, 2, 3])


@pytest.mark.parametrize("name", ["cornn", "unicornn", "lem"])
def test_a_traced_step_size(name):
    make = getattr(bptt.cells, name)
    cell = make(N, dtype=jnp.float32)
    params, state = moved(cell.init(jax.random.key(0), I), 0), moved(cell.initial_state(), 1)

    def end(dt):
        return make(N, dt=dt, dtype=jnp.float32).step(params, state, jnp.ones(I)).h

    np.testing.assert_allclose(jax.jit(end)(0.05), jax.jit(lambda: end(0.05))(), rtol=1e-5)
    assert np.all(np.isfinite(jax.jit(jax.jacobian(end))(0.05)))
    assert make(N, dt=0.05).step == make(2, dt=0.05).step != make(N, dt=0.06).step


def test_more_modules_than_periods():
    assert bptt.cells.clockwork(2, modules=31).step
    with pytest.raises(ValueError, match="modules: expected at most 31"):
        bptt.cells.clockwork(2, modules=32)


def test_initial_weights():
    """Within their bounds, and spread over them."""
    key, n = jax.random.key(0), 64
    cornn = bptt.cells.cornn(n).init(key, I)
    unicornn = bptt.cells.unicornn(n).init(key, I)
    lem = bptt.cells.lem(n).init(key, I)
    clockwork = bptt.cells.clockwork(n).init(key, I)
    for weights, low, high in (
        (cornn.recurrent, -1 / np.sqrt(2 * n), 1 / np.sqrt(2 * n)),
        (cornn.input, -1 / np.sqrt(I), 1 / np.sqrt(I)),
        (unicornn.recurrent, 0, 1),
        (unicornn.control, -0.1, 0.1),
        (unicornn.input, -np.sqrt(6 / 65 / I), np.sqrt(6 / 65 / I)),
        (lem.recurrent, -1 / np.sqrt(n), 1 / np.sqrt(n)),
        (lem.memory, -1 / np.sqrt(n), 1 / np.sqrt(n)),
    ):
        room = high - low
        assert low <= np.min(weights) < low + 0.1 * room
        assert high - 0.1 * room < np.max(weights) <= high
    np.testing.assert_allclose(np.std(clockwork.recurrent), 0.1, rtol=0.05)


def test_time_that_passes():
    """In cfc, beside the input, it multiplies the rate of the gate; alone, an input comes after 1."""
    cell = bptt.cells.cfc(N, backbone_units=4, dtype=jnp.float32)
    params, h, x = moved(cell.init(jax.random.key(0), I), 0), jnp.ones(N), jnp.ones(I)
    faster = jnp.repeat(jnp.asarray([1.0, 1.0, 2.5, 1.0]), N)
    given = params._replace(heads=faster[:, None] * params.heads, heads_bias=faster * params.heads_bias)
    np.testing.assert_array_equal(cell.step(params, h, (x, 1.0)), cell.step(params, h, x))
    np.testing.assert_allclose(cell.step(params, h, (x, 2.5)), cell.step(given, h, x), rtol=1e-5)


def test_tau_gru_hears_what_was(x64):
    """The Jacobian of h_t by h_{t-1-d} is there, by those between it is zero; the buffer shifts."""
    cell = bptt.cells.tau_gru(N, delay=3, dtype=jnp.float64)
    step, params, state, xs = example(cell)
    states = bptt.unroll(step, params, state, xs)
    np.testing.assert_array_equal(states.past[5], states.h[4:1:-1])
    blocks = np.asarray(bptt.jacobians(step, params, state, xs))[-1].reshape(4, N, 4, N)
    assert [bool(np.any(blocks[0, :, k])) for k in range(4)] == [True, False, False, True]
    for k in range(3):
        np.testing.assert_array_equal(blocks[k + 1].transpose(1, 0, 2)[k], np.eye(N))
