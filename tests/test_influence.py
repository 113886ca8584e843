"""The influence map against products of Jacobians, one pair at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import cell_example

import bptt_jax as bptt


@pytest.mark.parametrize(("name", "steps", "intervals"), [("lstm", 11, 4), ("gru", 7, 50), ("rnn", 3, 1)])
def test_every_pair_is_the_norm_of_its_product(x64, name, steps, intervals) -> None:
    e = cell_example(name, jnp.float64, steps=steps)
    got = bptt.influence_map(e.step, e.params, e.state0, e.xs, intervals=intervals)
    times = np.asarray(got.times)
    assert (times[0], times[-1], len(times)) == (0, steps, min(intervals, steps) + 1)
    assert np.ptp(np.diff(times)) <= 1
    jacobians = np.asarray(bptt.jacobians(e.step, e.params, e.state0, e.xs))
    for i, t in enumerate(times):
        for k, s in enumerate(times):
            if s > t:
                assert got.log_norms[i, k] == -np.inf
                continue
            product = np.eye(jacobians.shape[-1])
            for jacobian in jacobians[s:t]:
                product = jacobian @ product
            assert float(got.log_norms[i, k]) == pytest.approx(math.log(np.linalg.norm(product, 2)), abs=1e-9)


def test_beyond_the_range_and_after_a_zero() -> None:
    rates = jnp.concatenate([jnp.full(3000, 0.5), jnp.zeros(1), jnp.full(999, 2.0)])[:, None]
    got = bptt.influence_map(lambda p, h, x: x * h, None, jnp.ones(1), rates, intervals=4)
    exact = np.full((5, 5), -np.inf)
    np.fill_diagonal(exact, 0.0)
    for i, k in ((1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (3, 2)):
        exact[i, k] = 1000 * (i - k) * math.log(0.5)
    np.testing.assert_allclose(got.log_norms, exact, rtol=1e-5)


def test_matrices_that_take_hours_are_refused():
    with pytest.raises(
        ValueError, match=r"intervals: of a state of D = 16384 numbers.* would take 1\.0e\+14 operat"
    ):
        bptt.influence_map(lambda w, h, x: w * h, 0.5, jnp.ones(16384), length=2)


def test_jit_vmap_and_bad_arguments() -> None:
    e = cell_example("gru", jnp.float32, steps=6)
    batch = jnp.stack([e.xs, 2 * e.xs])

    def one(xs):
        return bptt.influence_map(e.step, e.params, e.state0, xs, intervals=3)

    both = jax.jit(jax.vmap(one))(batch)
    np.testing.assert_allclose(both.log_norms[1], one(batch[1]).log_norms, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="intervals: expected at least 1, got 0"):
        bptt.influence_map(e.step, e.params, e.state0, e.xs, intervals=0)


def pieces_of(real, resets):
    """The real steps of each piece."""
    pieces, pending = [[]], False
    for k, is_real in enumerate(real):
        pending |= bool(resets[k])
        if is_real:
            if pending and pieces[-1]:
                pieces.append([])
            pending = False
            pieces[-1].append(k)
    return pieces


def test_padding_and_resets_are_the_pieces_alone(x64) -> None:
    """All pairs: within a piece what it gives alone, -inf from one to the other, times in real steps."""
    e = cell_example("gru", jnp.float64, steps=9)
    real = np.asarray([0, 1, 1, 0, 1, 1, 1, 1, 0], bool)
    resets = np.asarray([1, 0, 0, 1, 0, 0, 1, 0, 1], bool)
    xs = jnp.where(jnp.asarray(real)[:, None], e.xs, jnp.nan)
    zeros = jnp.zeros_like(e.state0)
    sequence = bptt.Sequence(xs, mask=jnp.asarray(real), resets=jnp.asarray(resets), reset_state=zeros)
    got = jax.jit(lambda s: bptt.influence_map(e.step, e.params, e.state0, s))(sequence)
    np.testing.assert_array_equal(np.unique(got.times), np.arange(7))
    _, first = np.unique(got.times, return_index=True)
    norms = np.asarray(got.log_norms)[np.ix_(first, first)]
    begins = 0
    for piece in pieces_of(real, resets):
        alone = bptt.influence_map(e.step, e.params, zeros, e.xs[np.asarray(piece)])
        ends = begins + len(piece)
        within = np.tri(len(piece) + 1, k=-1, dtype=bool)
        block = norms[begins : ends + 1, begins : ends + 1]
        np.testing.assert_allclose(block[within], np.asarray(alone.log_norms)[within], rtol=1e-9)
        assert np.all(norms[ends + 1 :, :ends] == -np.inf)
        begins = ends
    np.testing.assert_array_equal(np.diag(norms), 0)
    # As many columns as there are times twice: the states that the padding shares.
    np.testing.assert_array_equal(got.log_norms[got.times[:, None] == got.times[None, :]], 0)


def test_a_padded_sequence_has_the_grid_of_the_bare_one(x64) -> None:
    e = cell_example("rnn", jnp.float64, steps=12)
    padded = bptt.Sequence(e.xs, mask=jnp.arange(12) < 7)
    got = bptt.influence_map(e.step, e.params, e.state0, padded, intervals=3)
    alone = bptt.influence_map(e.step, e.params, e.state0, e.xs[:7], intervals=3)
    np.testing.assert_array_equal(got.times, alone.times)
    np.testing.assert_allclose(got.log_norms, alone.log_norms, rtol=1e-9)


def test_a_trajectory_that_is_not_finite() -> None:
    """A linear step of which the Jacobian does not show it: NaN on all ways over it, but not past a reset."""
    xs = jnp.ones((6, 1)).at[2].set(jnp.inf)
    resets = jnp.arange(6) == 4
    step = lambda w, h, x: w * h + x  # noqa: E731
    got = np.asarray(bptt.influence_map(step, 1.0, jnp.ones(1), bptt.Sequence(xs, resets=resets)).log_norms)
    for t in range(7):
        for s in range(t):
            if s < 4 < t:
                assert got[t, s] == -np.inf
            elif s < 4:
                assert np.isnan(got[t, s]) == (t >= 3)
            else:
                assert got[t, s] == 0
    assert np.all(np.diag(got) == 0)


def loop_step(w, h, x):
    return jax.lax.while_loop(lambda c: c[0] < x, lambda c: (c[0] + 1, jnp.tanh(w @ c[1])), (0, h))[1]


def test_steps_with_one_direction_alone() -> None:
    """Forward mode alone, and a surrogate gradient: products of Jacobians by hand."""

    @jax.custom_vjp
    def spike(v):
        return (v > 0).astype(v.dtype)

    spike.defvjp(lambda v: (spike(v), v), lambda v, g: (g / (1 + 10 * jnp.abs(v)) ** 2,))
    weights = jnp.asarray([[0.9, -0.4], [0.3, 0.8]])
    for step, xs in ((loop_step, jnp.asarray([1, 2, 1])), (lambda w, h, x: spike(w @ h + x), jnp.ones((3, 2)))):
        arguments = step, weights, jnp.asarray([0.3, -0.2]), xs
        got = bptt.influence_map(*arguments)
        jacobians = np.asarray(bptt.jacobians(*arguments))
        for t in range(4):
            for s in range(t):
                product = np.linalg.multi_dot([np.eye(2), *jacobians[s:t][::-1]])
                np.testing.assert_allclose(got.log_norms[t, s], np.log(np.linalg.norm(product, 2)), rtol=1e-4)
