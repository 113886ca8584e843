"""Padding and new beginnings: how a `Sequence` is made, what it refuses, and that nothing in its padding matters.

That every function gives of it what it gives of the pieces alone is in `test_contract.py`.
"""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error, users_jit

import bptt_jax as bptt
from bptt_jax import checks
from bptt_jax.step import bind, check_step

W, H, XS = jnp.asarray([[0.5, -0.3], [0.8, 0.1]]), jnp.asarray([0.2, -0.4]), jnp.arange(10.0).reshape(5, 2) / 7
SPOILT = [jnp.nan, jnp.inf, -jnp.inf, 1e38]


def step(w, h, x):
    return jnp.tanh(w @ h * x + x**2)


def loss(states):
    return jnp.sum(jnp.sin(states))


def mask(pattern):
    return np.asarray([c == "#" for c in pattern])


def at(steps, *indices):
    return np.isin(np.arange(steps), indices)


# --- Made


def test_a_bare_sequence_is_its_inputs():
    assert bind(step, W, H, bptt.Sequence(XS)).is_plain
    np.testing.assert_array_equal(bptt.unroll(step, W, H, bptt.Sequence(XS)), bptt.unroll(step, W, H, XS))


@pytest.mark.parametrize(
    "sequence",
    [
        bptt.Sequence(length=5),
        bptt.Sequence(mask=np.ones(5, bool)),
        bptt.Sequence(resets=np.zeros(5, bool)),
        bptt.Sequence(XS, length=5),
    ],
)
def test_any_of_its_fields_tells_its_length(sequence):
    assert bind(step, W, H, sequence).length == 5
    assert bind(step, W, H, sequence, 5).length == 5


def test_it_crosses_jit_and_vmap_as_a_pytree():
    sequence = bptt.Sequence(XS, mask=mask("###.."), resets=at(5, 1), reset_state=jnp.ones(2))
    assert len(jax.tree.leaves(sequence)) == 4
    got = jax.jit(lambda s: bptt.unroll(step, W, H, s))(sequence)
    np.testing.assert_allclose(got, bptt.unroll(step, W, H, sequence), rtol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_batches(shared):
    """Each sequence with a mask and resets of its own, and with a reset state of its own or one for all."""
    xs, masks = jnp.stack([XS, XS + 1]), np.stack([mask("###.."), mask(".####")])
    resets, reset_states = np.stack([at(5, 1), at(5, 4)]), jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    axes = bptt.Sequence(0, mask=0, resets=0, reset_state=None if shared else 0)
    batch = bptt.Sequence(xs, mask=masks, resets=resets, reset_state=reset_states[0] if shared else reset_states)
    got = jax.vmap(lambda s: bptt.unroll(step, W, H, s), in_axes=(axes,))(batch)
    for b in range(2):
        reset_state = reset_states[0 if shared else b]
        one = bptt.Sequence(xs[b], mask=masks[b], resets=resets[b], reset_state=reset_state)
        np.testing.assert_allclose(got[b], bptt.unroll(step, W, H, one), rtol=1e-6)


def test_python_numbers_as_reset_state():
    sequence = bptt.Sequence(jnp.ones(4), resets=at(4, 2), reset_state=3)
    got = bptt.unroll(lambda w, h, x: w * h + x, 0.5, 0.0, sequence)
    np.testing.assert_array_equal(got, [1, 1.5, 2.5, 2.25])


# (sequence, exception, message), in which … stands for anything.
BAD = [
    (
        bptt.Sequence(XS, mask=np.ones(5)),
        TypeError,
        "mask: expected booleans [T], got float64; compare",
    ),
    (bptt.Sequence(XS, resets=np.ones(5, int)), TypeError, "resets: expected booleans [T], got int64; compare"),
    (bptt.Sequence(XS, mask=True), TypeError, "mask: expected an array of booleans [T], got bool"),
    (bptt.Sequence(XS, mask=[True] * 5), TypeError, "mask: expected an array of booleans [T], got list"),
    (bptt.Sequence(XS, mask="#####"), TypeError, "mask: expected an array of numbers, got str"),
    (
        bptt.Sequence(XS, mask=np.ones((2, 5), bool)),
        ValueError,
        "mask: expected shape [T], got [2, 5]; for a batch, jax.vmap over its first axis",
    ),
    (
        bptt.Sequence(XS, mask=np.ones(4, bool), resets=np.ones(6, bool)),
        ValueError,
        "xs: expected one number of steps in all leaves, got {'xs': 5, 'mask': 4, 'resets': 6}",
    ),
    (bptt.Sequence(), ValueError, "length: expected the number of steps, since xs is None, got None"),
    (bptt.Sequence(XS, length=4), ValueError, "length: expected 5, the first axis of xs, got 4"),
    (bptt.Sequence(length=0), ValueError, "length: expected at least 1, got 0"),
    (bptt.Sequence(length=2.5), TypeError, "length: expected an integer known before compilation, got float"),
    (bptt.Sequence(mask=np.ones(0, bool)), ValueError, "xs: expected at least one step, got a first axis of 0"),
    (bptt.Sequence(XS, reset_state=H), ValueError, "reset_state: expected resets [T] beside it, got None"),
    (
        bptt.Sequence(XS, resets=np.ones(5, bool), reset_state=(H,)),
        ValueError,
        "reset_state: expected the structure of state0…got",
    ),
    (
        bptt.Sequence(XS, resets=np.ones(5, bool), reset_state=jnp.ones(3)),
        ValueError,
        "reset_state: expected the shape of state0, [2], got [3]",
    ),
    (
        bptt.Sequence(XS, resets=np.ones(5, bool), reset_state="h"),
        TypeError,
        "reset_state: expected an array of numbers, got str",
    ),
]


@pytest.mark.parametrize(("sequence", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_sequence(sequence, error, message, compilations):
    with pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in message.split("…"))):
        bptt.unroll(step, W, H, sequence)
    assert compilations == []


def test_two_lengths_that_differ():
    with pytest.raises(ValueError, match="length: expected 5, that of the Sequence, got 4"):
        bptt.unroll(step, W, H, bptt.Sequence(length=5), length=4)


# --- Padding


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_padded_to_a_length_it_is_what_it_was(kind, compilations):
    short = bptt.Sequence(kind(XS), mask=mask(".####"), resets=at(5, 3), reset_state=H + 1)
    long = short.pad_to(8)
    assert type(long.xs) is type(kind(XS))
    assert long.mask.tolist() == mask(".####...").tolist()
    assert long.resets.tolist() == at(8, 3).tolist()
    got, alone = (bptt.unroll(step, W, H, s) for s in (long, short))
    np.testing.assert_array_equal(got[:5], alone)
    np.testing.assert_array_equal(got[5:], jnp.tile(alone[-1:], (3, 1)))


def test_padding_of_a_batch_of_keys_and_of_an_autonomous_step(compilations):
    keys, numbers = jax.random.split(jax.random.key(0), (2, 3)), np.ones((2, 3), np.float32)
    batch = bptt.Sequence({"key": keys, "number": numbers}).pad_to(4, axis=1)
    assert batch.xs["key"].shape == (2, 4)
    assert isinstance(batch.xs["number"], np.ndarray)
    assert batch.mask.tolist() == 2 * [[True, True, True, False]]
    alone = bptt.Sequence(length=3).pad_to(3)
    assert (alone.length, alone.mask.tolist()) == (3, [True, True, True])
    del compilations[:]
    bptt.Sequence(numbers, mask=numbers > 0).pad_to(9, axis=1)
    assert compilations == []


@pytest.mark.parametrize(
    ("sequence", "length", "axis"),
    [
        (bptt.Sequence(np.ones((5, 2))), 4, 0),
        (bptt.Sequence(np.ones((5, 2)), mask=np.ones(4, bool)), 9, 0),
        (bptt.Sequence(np.ones(5)), 9, 1),
        (bptt.Sequence(np.ones((0, 2))), 9, 0),
        (bptt.Sequence(), 9, 0),
    ],
)
def test_a_length_that_cannot_be_padded_to(sequence, length, axis):
    with pytest.raises(ValueError, match=r"length: expected one of at least .*, got \d"):
        sequence.pad_to(length, axis=axis)


@pytest.mark.parametrize(
    ("axis", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError), ("time", TypeError)]
)
def test_an_axis_to_pad_along_is_counted_from_the_front(axis, error):
    with pytest.raises(error, match=r"^axis: "):
        bptt.Sequence(np.ones((2, 3))).pad_to(5, axis=axis)


def test_many_lengths_are_noticed_once(monkeypatch):
    """Not those of a function that is traced, for which nothing is compiled, nor those of another step."""
    monkeypatch.setattr(checks, "_run", {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", bptt.RecompilationWarning)
        for length in range(1, 20):
            jax.eval_shape(lambda xs: bptt.unroll(step, W, H, xs), XS[:1].repeat(length, 0))
            bind(lambda w, h, x: h, W, H, XS[:1].repeat(length, 0))
        assert not caught
        for length in range(1, 20):
            for _ in range(2):
                bind(step, W, H, XS[:1].repeat(length, 0))
            assert len(caught) == (length >= 8)
    assert "test_sequence.py" in str(caught[0].message)
    assert "sequences of 8 shapes" in str(caught[0].message)


def test_the_state_is_held():
    got = bptt.unroll(step, W, H, bptt.Sequence(XS, mask=mask(".##.#")))
    alone = bptt.unroll(step, W, H, XS[np.asarray([1, 2, 4])])
    np.testing.assert_array_equal(got, jnp.stack([H, alone[0], alone[1], alone[1], alone[2]]))


def everything(sequence, w=W, h=H):
    """Values, first and second derivatives with respect to all that can be had; the inputs' in padding left out."""
    found = bptt.adjoints(step, w, h, sequence, loss, inputs=True)
    added = bptt.temporal_contributions(step, w, h, sequence, loss)

    def gradient(w, h):
        return jnp.sum(jnp.sin(bptt.adjoints(step, w, h, sequence, loss).params_grad))

    by_states = jax.grad(lambda w, h, s: loss(bptt.unroll(step, w, h, s)), (0, 1))(w, h, sequence)
    jacobians = bptt.jacobians(step, w, h, sequence)
    return found, added, jax.grad(gradient, (0, 1))(w, h), by_states, jacobians


def test_what_stands_in_the_padding_does_no_harm():
    """Forwards, backwards, and backwards again, as users have it compiled."""
    real = mask(".##.#")
    compute = users_jit(lambda xs: everything(bptt.Sequence(xs, mask=real)))
    expected = compute(jnp.where(real[:, None], XS, 0))
    for value in SPOILT:
        got = compute(jnp.where(real[:, None], XS, value))
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(expected[2:]))
    np.testing.assert_array_equal(expected[0].xs_grad[~real], 0)


def test_nothing_but_padding():
    """As a row that fills up a batch: the state stays, and every gradient is that of the state alone."""
    padding = bptt.Sequence(jnp.full_like(XS, jnp.nan), mask=np.zeros(5, bool))
    found, added, second, by_states, jacobians = everything(padding)
    np.testing.assert_array_equal(found.states, np.broadcast_to(H, (5, 2)))
    np.testing.assert_allclose(found.state0_grad, 5 * jnp.cos(H), rtol=1e-6)
    np.testing.assert_array_equal(added.log_norms, -np.inf)
    for zero in (found.params_grad, found.xs_grad, second, by_states[0]):
        jax.tree.map(lambda a: np.testing.assert_array_equal(a, 0), zero)
    np.testing.assert_array_equal(jacobians, np.broadcast_to(np.eye(2), (5, 2, 2)))


def test_a_step_that_has_no_finite_value_elsewhere():
    """In padding the step is carried out for nothing, from where the first real one starts: that place is safe."""

    def root(w, h, x):
        return jnp.sqrt(w * h - x)

    def last(states):
        return states[-1, 0]

    xs = jnp.asarray([[jnp.nan], [1.0], [0.2], [9.0]])  # the last state, 0.89, is less than the first input
    sequence = bptt.Sequence(xs, mask=mask(".##."), resets=at(4, 0), reset_state=jnp.asarray([2.0]))
    alone = bptt.adjoints(root, 1.0, jnp.asarray([2.0]), xs[1:3], last)
    for start in (1.5, -1.0):  # the latter is left by the reset
        found = bptt.adjoints(root, 1.0, jnp.asarray([start]), sequence, last)
        np.testing.assert_allclose(found.params_grad, alone.params_grad, rtol=1e-6)
        np.testing.assert_array_equal(found.state0_grad, 0)
        by_jax = jax.grad(lambda w, h: last(bptt.unroll(root, w, h, sequence)))(1.0, jnp.asarray([start]))
        np.testing.assert_allclose(by_jax, alone.params_grad, rtol=1e-6)


# --- Resets


@pytest.mark.parametrize(
    ("resets", "moved"),
    [((0,), (1,)), ((3,), (4,)), ((0, 3), (1, 4)), ((1, 3, 5), (1, 4)), ((5, 6), ()), ((2, 6), (2,))],
)
def test_a_reset_in_the_padding_comes_before_the_next_real_step(resets, moved):
    sequence = bptt.Sequence(mask=mask(".##.#.."), resets=at(7, *resets))
    recurrence = bind(lambda w, h, x: w @ h, W, H, sequence)
    np.testing.assert_array_equal(check_step(recurrence).resets, at(7, *moved))


def test_a_reset_before_the_first_step_stays():
    sequence = bptt.Sequence(mask=mask("##."), resets=at(3, 0))
    np.testing.assert_array_equal(check_step(bind(lambda w, h, x: w @ h, W, H, sequence)).resets, at(3, 0))


def test_gradient_of_the_reset_state():
    """In closed form: w h + x, reset to r before steps 3 and 5 of 6, the loss on all states."""
    w, r = 0.5, 2.0
    resets = at(6, 2, 4)
    given = bptt.Sequence(jnp.ones(6), resets=resets, reset_state=jnp.asarray(r))
    own = bptt.adjoints(lambda w, h, x: w * h + x, w, jnp.asarray(1.0), given, jnp.sum)
    assert own.state0_grad == w + w**2
    assert own.reset_state_grad == 2 * (w + w**2)
    assert own.params_grad == (1 + 2 * w + 1) + 2 * (r + 2 * w * r + 1)
    same = bptt.adjoints(lambda w, h, x: w * h + x, w, jnp.asarray(r), given, jnp.sum)
    start = bptt.Sequence(jnp.ones(6), resets=resets)
    shared = bptt.adjoints(lambda w, h, x: w * h + x, w, jnp.asarray(r), start, jnp.sum)
    assert shared.reset_state_grad is None
    assert shared.state0_grad == same.state0_grad + same.reset_state_grad
    assert shared.params_grad == same.params_grad


def test_a_reset_at_every_step_leaves_one_step():
    sequence = bptt.Sequence(XS, resets=np.ones(5, bool))
    np.testing.assert_allclose(bptt.unroll(step, W, H, sequence), jax.vmap(lambda x: step(W, H, x))(XS), rtol=1e-6)
    found = bptt.adjoints(step, W, H, sequence, lambda states: jnp.sum(states[-1]))
    np.testing.assert_array_equal(found.log_norms[:-1], -np.inf)


def test_nothing_passes_a_reset_not_even_nan():
    """The piece before is NaN, the later one is not."""
    xs = XS.at[0].set(jnp.nan)
    sequence = bptt.Sequence(xs, resets=at(5, 2))
    found = bptt.adjoints(step, W, H, sequence, lambda states: jnp.sum(states[3:]))
    alone = bptt.adjoints(step, W, H, xs[2:], lambda states: jnp.sum(states[1:]))
    assert np.all(np.isnan(found.states[:2]))
    np.testing.assert_allclose(found.states[2:], alone.states, rtol=1e-6)
    np.testing.assert_allclose(found.log_norms[2:], alone.log_norms, rtol=1e-6)
    assert found.log_norms[1] == -np.inf


def test_derivatives_of_derivatives_through_resets_and_padding(x64):
    """The gradient of a function of `adjoints`' gradient, against JAX's own of the pieces."""
    w, h, r, xs = (jnp.asarray(a, jnp.float64) for a in (W, H, H + 1, XS))
    real, resets = mask("##.##"), at(5, 2)
    spoilt = jnp.where(real[:, None], xs, jnp.nan)

    def ours(w, h, r):
        sequence = bptt.Sequence(spoilt, mask=real, resets=resets, reset_state=r)
        return jnp.sum(jnp.sin(bptt.adjoints(step, w, h, sequence, loss).params_grad))

    def plainly(w, h, r):
        def total(w):
            first, second = step(w, h, xs[0]), step(w, r, xs[3])
            states = [first, last := step(w, first, xs[1]), last, second, step(w, second, xs[4])]
            return loss(jnp.stack(states))

        return jnp.sum(jnp.sin(jax.grad(total)(w)))

    got, expected = (jax.jit(jax.grad(f, (0, 1, 2)))(w, h, r) for f in (ours, plainly))
    assert relative_error(got, expected) <= 1e-12
