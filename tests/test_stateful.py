"""Stateful training: against loops written out in plain JAX, stopped and resumed, in windows that are chosen."""

from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from slices import covering

import bptt_jax as bptt
from bptt_jax.experiments import streams, tasks
from bptt_jax.experiments.loop import init_state, make_update, train
from bptt_jax.experiments.network import LossArgs, network, truncated
from bptt_jax.experiments.tasks import Batch, Task, characters, delayed_copy

SENTENCE = "the quick brown fox jumps over the lazy dog; "
STREAMS = {
    "delayed_copy": delayed_copy(3, values=4),
    "episodes": delayed_copy(3, values=4, episode=6),
    "characters": characters(SENTENCE * 3, length=9),
    "with keys": tasks.with_keys(delayed_copy(3, values=4, episode=6)),
}
every_stream = pytest.mark.parametrize("name", STREAMS)
OPTIMIZER = optax.sgd(0.3, momentum=0.9)
BATCH, WINDOW = 3, 5


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly():
    """What is claimed here holds however the compiler works."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def small() -> Task:
    """Judged on a few sequences that are never solved, so that little has to be computed."""
    task = delayed_copy(2, values=2, episode=6)
    return task._replace(whole=task.sample(jax.random.key(9), 2), threshold=0.0)


NET = network(bptt.rnn(3), small())
carry_on = jax.jit(NET.carry_on)
stream_of_net = jax.jit(NET.task.stream, static_argnums=2)
PARAMS = jax.jit(NET.init)(jax.random.key(0))
begun = jax.jit(partial(init_state, NET, OPTIMIZER), static_argnames="batch")


def numbers(tree) -> list[np.ndarray]:
    """Its leaves, keys as the integers that they are."""
    return [
        np.asarray(jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a)
        for a in jax.tree.leaves(tree)
    ]


def assert_equal(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(numbers(got), numbers(want), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_close(got, want) -> None:
    for a, b in zip(numbers(got), numbers(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- Streams.


@every_stream
def test_a_stream_is_the_same_in_whatever_windows_it_is_read(name) -> None:
    stream, key = jax.jit(STREAMS[name].stream, static_argnums=2), jax.random.key(4)
    whole = stream(key, 0, 60)
    for start, length in ((0, 1), (1, 16), (17, 43)):
        part = stream(key, start, length)
        assert_equal(part, jax.tree.map(lambda a, s=slice(start, start + length): a[s], whole))
    other = stream(jax.random.key(5), 0, 60)
    assert not np.array_equal(other.targets, whole.targets)


@pytest.mark.parametrize("episode", [None, 5])
def test_delayed_copy_wants_what_was_shown(episode) -> None:
    stream = delayed_copy(3, values=4, episode=episode).stream
    inputs, targets = stream(jax.random.key(0), 0, 400)
    resets = np.zeros(400, bool) if episode is None else np.asarray(inputs.resets)
    codes = np.argmax(np.asarray(inputs if episode is None else inputs.xs), axis=1)
    since, expected = 0, []
    for t in range(400):
        since = 0 if resets[t] else since
        expected.append(codes[t - 3] if since >= 3 else -1)
        since += 1
    np.testing.assert_array_equal(targets, expected)
    assert set(codes) == set(range(4))
    if episode is not None:
        assert 50 < resets.sum() < 110  # of 400 steps, a fifth


def test_what_asks_for_nothing_does_not_count() -> None:
    task = delayed_copy(2, values=3)
    outputs = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    targets = jnp.asarray([-1, -1, 2, 0], jnp.int32)
    chances = jax.nn.softmax(outputs)
    expected = -np.mean([np.log(chances[2, 2]), np.log(chances[3, 0])])
    np.testing.assert_allclose(task.loss(outputs, targets, None), expected, rtol=1e-6)
    padded = task.loss(outputs, targets, jnp.asarray([True, True, True, False]))
    np.testing.assert_allclose(padded, -np.log(chances[2, 2]), rtol=1e-6)
    wrong = np.mean([np.argmax(outputs[2]) != 2, np.argmax(outputs[3]) != 0])
    assert task.error(outputs, targets, None) == pytest.approx(wrong)
    assert task.loss(outputs, jnp.full(4, -1), None) == 0
    assert task.error(outputs.at[3].set(jnp.nan), targets, None) >= 0.5


def test_a_text_is_read_over_and_over_and_begins_anew() -> None:
    task = characters(SENTENCE * 3, length=9)
    inputs, targets = task.stream(jax.random.key(1), 0, 300)
    vocabulary = sorted(set(SENTENCE))
    read = "".join(vocabulary[i] for i in np.argmax(inputs.xs, axis=1))
    text = (SENTENCE * 3)[: 9 * len(SENTENCE) * 3 // 10]
    first = int(np.argmax(inputs.resets))
    assert (read[first:] + vocabulary[int(targets[-1])]).startswith(text[:-1] + text[:-1])
    assert np.flatnonzero(inputs.resets).tolist() == list(range(first, 300, len(text) - 1))
    assert "".join(vocabulary[i] for i in targets[first:][: len(text) - 1]) == text[1:]


# --- Updates.


@jax.jit
@partial(jax.value_and_grad, has_aux=True)
def of_window(params, h, window):
    total, after = 0.0, []
    for h_b, (inputs, targets) in zip(h, window, strict=True):
        h_b, each = jax.lax.stop_gradient(h_b), []
        for t in range(WINDOW):
            h_b = jnp.where(inputs.resets[t], jnp.zeros(3), h_b)
            h_b = jnp.tanh(params.cell.recurrent @ h_b + params.cell.input @ inputs.xs[t] + params.cell.bias)
            logits = params.readout.weights @ h_b + params.readout.bias
            cross = jax.nn.logsumexp(logits) - logits[jnp.maximum(targets[t], 0)]
            each.append((cross, targets[t] >= 0))
        asked = jnp.stack([a for _, a in each]).astype(float)
        total += jnp.sum(jnp.stack([c for c, _ in each]) * asked) / jnp.maximum(jnp.sum(asked), 1)
        after.append(h_b)
    return total / BATCH, after


def by_hand(update_count: int, seed: int):
    """TBPTT with a carried state, in plain JAX: one stream after the other, one step after the other."""
    state = begun(seed)
    params, opt_state, h = state.params, state.opt_state, [jnp.zeros(3)] * BATCH
    root = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 4), 0)
    losses = []
    resets = 0
    for k in range(update_count):
        window = [stream_of_net(jax.random.fold_in(root, b), k * WINDOW, WINDOW) for b in range(BATCH)]
        resets += sum(int(w.inputs.resets[1:].sum()) for w in window)
        (loss, h), gradient = of_window(params, h, window)
        updates, opt_state = OPTIMIZER.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss)
    assert resets > 5
    return params, opt_state, jnp.stack(h), np.stack(losses)


def test_updates_are_those_of_a_loop_that_carries_the_state() -> None:
    """Two seeds side by side, in chunks; resets within windows."""
    seen = []
    done = train(NET, OPTIMIZER, updates=7, batch=BATCH, seeds=(5, 8), chunk=3, window=WINDOW, on_chunk=seen.append)
    for i, seed in enumerate((5, 8)):
        params, opt_state, h, losses = by_hand(7, seed)
        of_seed = jax.tree.map(lambda a, i=i: a[i], done.states)
        assert_close((of_seed.params, of_seed.opt_state), (params, opt_state))
        assert_close(of_seed.carried.states, h)
        assert_close(np.concatenate([m.loss for m in seen])[:, i], losses)
    np.testing.assert_array_equal(done.states.carried.position, 7 * WINDOW)
    assert [r["window"] for r in done.records] == [WINDOW] * 3
    assert done.records[0]["bias_bound"] is done.records[0]["lag_rate"] is None


def test_a_window_as_long_as_the_stream_is_full_bptt() -> None:
    params = PARAMS
    inputs, targets = stream_of_net(jax.random.key(1), 0, 12)
    # As one sequence, with resets to the initial state, from which it starts.
    expected = jax.jit(jax.grad(NET.loss))(params, inputs, targets)
    of_window = jax.jit(jax.grad(NET.carry_on, has_aux=True))
    gradient, state = of_window(params, NET.cell.initial_state(), inputs, targets)
    assert_close(gradient, expected)
    half = partial(jax.tree.map, lambda a: a[:6])
    rest = partial(jax.tree.map, lambda a: a[6:])
    _, middle = carry_on(params, NET.cell.initial_state(), half(inputs), half(targets))
    _, end = carry_on(params, middle, rest(inputs), rest(targets))
    assert_close(end, state)


def test_a_reset_begins_from_the_initial_state_not_from_the_carried_one() -> None:
    params, far = PARAMS, jnp.full(3, 0.9)
    inputs = bptt.Sequence(jnp.ones((4, 2)), resets=jnp.asarray([False, False, True, False]))
    _, end = carry_on(params, far, inputs, jnp.zeros(4, jnp.int32))
    _, alone = carry_on(params, jnp.zeros(3), inputs.xs[2:], jnp.zeros(2, jnp.int32))
    assert_close(end, alone)
    own = bptt.Sequence(inputs.xs, resets=inputs.resets, reset_state=far)
    _, end = carry_on(params, jnp.zeros(3), own, jnp.zeros(4, jnp.int32))
    _, alone = carry_on(params, far, inputs.xs[2:], jnp.zeros(2, jnp.int32))
    assert_close(end, alone)


def test_a_reset_in_the_padding_at_the_end_is_handed_on() -> None:
    params, mask = PARAMS, jnp.asarray([True, True, False, False])
    inputs = bptt.Sequence(jnp.ones((4, 2)), mask=mask, resets=jnp.asarray([False, False, True, False]))
    _, end = carry_on(params, jnp.full(3, 0.9), inputs, jnp.zeros(4, jnp.int32))
    np.testing.assert_array_equal(end, NET.cell.initial_state())


def test_padding_holds_the_state_and_asks_for_nothing() -> None:
    params, state = PARAMS, jnp.full(3, 0.2)
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)), jnp.float32).at[3:].set(jnp.nan)
    targets = jnp.asarray([0, 1, 1, 0, 1])
    padded = bptt.Sequence(xs, mask=jnp.asarray([True] * 3 + [False] * 2))
    of_window = jax.jit(jax.value_and_grad(NET.carry_on, has_aux=True))
    got = of_window(params, state, padded, targets)
    want = of_window(params, state, xs[:3], targets[:3])
    assert_close(got, want)


def test_nothing_grows_with_the_stream() -> None:
    update = jax.jit(make_update(NET, OPTIMIZER, batch=BATCH, window=WINDOW))
    state = begun(0, batch=BATCH)
    held = []
    for _ in range(40):
        state, _ = update(state)
        held.append(sum(a.nbytes for a in jax.live_arrays()))
    assert held[2] == held[-1]
    assert int(state.carried.position) == 40 * WINDOW
    assert update._cache_size() == 1


# --- Windows that are chosen.


class Leak:
    """h' = decay h + w x, of two units: lag k has decay^k of the gradient by w."""

    @staticmethod
    def step(params, h, x):
        return jax.lax.stop_gradient(params["decay"]) * h + params["w"] * x

    cell = bptt.Cell(
        lambda key, size: {"decay": jnp.full(2, 0.5), "w": jnp.ones(2)}, lambda: jnp.zeros(2), step.__func__
    )


def steady(length: int) -> Task:
    """Ones, and the sum of the outputs as the loss: every step adds the same."""

    def sample(key, batch):
        return Batch(jnp.ones((batch, length, 2)), jnp.zeros((batch, length)))

    def stream(key, start, length):
        return Batch(jnp.ones((length, 2)), jnp.zeros(length))

    def loss(outputs, target, mask):
        return jnp.mean(outputs)

    return Task("steady", length, 2, 1, "all", sample, loss, loss, 1.0, "loss", -1e9, sample(None, 1), stream)


def decaying(decay: float, longest: int):
    net = network(Leak.cell, steady(longest))
    state = jax.jit(partial(init_state, net, OPTIMIZER, batch=2))(0)
    params = state.params._replace(cell={"decay": jnp.full(2, decay), "w": jnp.ones(2)})
    return net, state._replace(params=params)


def measured(decay: float, longest: int, bias: float):
    net, state = decaying(decay, longest)
    ahead = streams.read(net.task, jax.random.key(0), state.carried.position, 2, longest)
    return jax.jit(partial(streams.measured_window, net, bias=bias))(state, ahead)


@cache
def of_decay(decay, longest):
    """Contributions by lag to the gradient, and its log norm."""
    step = lambda w, h, x: decay * h + w * x  # noqa: E731
    problem = step, jnp.ones(1), jnp.zeros(1), jnp.ones((longest, 1)), lambda states: states[-1, 0]
    return bptt.temporal_contributions(*problem).log_norms[::-1], bptt.adjoints(*problem).params_log_norm


@pytest.mark.parametrize(
    ("decay", "k1"), covering(product([0.5, 0.9], [None, 1, 3]), (0.5, None), (0.9, 1), (0.5, 3))
)
def test_the_bound_holds_and_is_tight_where_the_decay_is_known(decay, k1) -> None:
    longest, steps = 30, 400
    found = bptt.analysis.adaptive_window(*of_decay(decay, longest), tolerance=0.2, k1=k1)
    assert float(found.rate) == pytest.approx(np.log(decay), rel=1e-4)
    # Truth: the gradient of the mean loss over a long stretch, cut by TBPTT, where the beginning is far.
    missing = np.array([sum(decay**k for k in range(n, steps)) for n in range(longest + 1)])
    for k2 in (1, 4, 9, longest):
        rounds = k2 if k1 is None else min(k1, k2)
        true = np.mean([missing[k2 - j] for j in range(rounds)]) / missing[0]
        assert true <= 1.0001 * float(found.bias[k2 - 1])
        assert float(found.bias[k2 - 1]) <= 1.15 * true
    good = np.flatnonzero(np.asarray(found.bias) <= 0.2)
    assert int(found.window) == (good[0] + 1 if good.size else -1)
    assert float(found.tolerance) == pytest.approx(0.2)


def test_the_bound_is_that_of_tbptt_itself() -> None:
    """Of disjoint windows, a long linear stream: the gradient that `estimators.tbptt` gives."""
    decay, k, steps = 0.8, 4, 240
    step = lambda w, h, x: decay * h + w * x  # noqa: E731
    arguments = step, jnp.ones(1), jnp.full(1, 1 / (1 - decay)), jnp.ones((steps, 1)), jnp.mean
    cut = float(bptt.estimators.tbptt(*arguments, k1=k, k2=k)[0])
    full = 1 / (1 - decay)  # where every loss has an endless past
    lags = jnp.log(decay) * jnp.arange(60.0)
    found = bptt.analysis.adaptive_window(lags, jnp.log(full))
    assert 1 - cut / full == pytest.approx(float(found.bias[k - 1]), rel=1e-3)


@pytest.mark.parametrize(("of", "whole"), [(np.nan, 0.0), (np.inf, 0.0), (-2.0, np.inf), (-2.0, np.nan)])
def test_of_what_is_not_finite_no_window_is_known(of, whole) -> None:
    found = bptt.analysis.adaptive_window(-jnp.arange(8.0).at[2].set(-of), whole)
    assert int(found.window) == -1
    assert np.isnan(found.rate)
    assert np.all(np.isposinf(found.bias))
    assert repr(found).startswith("AdaptiveWindow: the gradient is not finite")


def test_where_nothing_decays_there_is_no_window() -> None:
    flat = bptt.analysis.adaptive_window(jnp.zeros(8), jnp.log(8.0))
    assert int(flat.window) == -1
    assert np.isposinf(flat.bias).all()
    assert "does not decay over 8 steps: no window" in repr(flat)
    slow = bptt.analysis.adaptive_window(-0.2 * jnp.arange(8.0), jnp.log(4.4), k1=1)
    assert int(slow.window) == -1
    assert "with 8 steps the bias is at most 0.34, above 0.1" in repr(slow)
    slower = bptt.analysis.adaptive_window(-0.05 * jnp.arange(8.0), jnp.log(6.8), k1=1)
    assert np.isposinf(slower.bias).all()
    assert "decays by 0.05 nats per step: no window of up to 8 steps bounds the bias" in repr(slower)
    nothing = bptt.analysis.adaptive_window(jnp.full(4, -jnp.inf), -jnp.inf)
    assert int(nothing.window) == -1
    assert np.isnan(nothing.bias).all()
    assert "no gradient to truncate, or it underflows\n" in repr(nothing)


def test_a_signal_that_ends_leaves_nothing_beyond() -> None:
    norms = jnp.asarray([0.0, -1.0, -2.0, -jnp.inf])
    found = bptt.analysis.adaptive_window(norms, 0.2, k1=1, tolerance=1e-6)
    whole = np.exp(0.2)
    missing = [np.exp(-1) + np.exp(-2), np.exp(-2), 0, 0]
    np.testing.assert_allclose(found.bias, np.asarray(missing) / whole, rtol=1e-6)
    assert (int(found.window), float(found.rate)) == (3, -np.inf)
    assert repr(found).startswith("AdaptiveWindow: the gradient ends within 4 steps: with 3 steps the bias")


def test_norms_that_float32_does_not_hold() -> None:
    norms = -200 - 0.5 * np.arange(400, dtype=np.float32)
    found = bptt.analysis.adaptive_window(norms, norms[0] - np.log1p(-np.exp(-0.5)), k1=1)
    near = bptt.analysis.adaptive_window(norms + 200, norms[0] + 200 - np.log1p(-np.exp(-0.5)), k1=1)
    assert int(found.window) == int(near.window) == 5
    np.testing.assert_allclose(found.bias, near.bias, rtol=1e-3)


def test_a_bump_in_the_tail_is_below_the_series() -> None:
    """The series is above every norm of the later half, so what it adds beyond is no less than the last ones say."""
    norms = np.log(0.7) * np.arange(20, dtype=np.float32)
    bumped = norms.copy()
    bumped[15] += 2
    plain, more = (
        bptt.analysis.adaptive_window(n.astype(np.float32), np.float32(1.2), k1=1) for n in (norms, bumped)
    )
    assert float(more.bias[-1]) > np.exp(1.9) * float(plain.bias[-1])
    rest = 0.7**20 / 0.3  # by which the full gradient may be less than the measured one
    assert float(plain.bias[-1]) == pytest.approx(rest / (np.exp(1.2) - rest), rel=2e-4)


@pytest.mark.parametrize("decay", [0.5, 0.8])
def test_the_window_is_measured_on_all_streams_together(decay) -> None:
    found = measured(decay, 40, 0.5)
    assert float(found.rate) == pytest.approx(np.log(decay), rel=1e-3)
    lags = decay ** np.arange(200)
    expected = [np.mean([lags[n:].sum() for n in range(1, k + 1)]) / lags.sum() for k in range(1, 41)]
    np.testing.assert_allclose(found.bias, expected, rtol=1e-2)


def test_of_streams_with_resets_and_padding_the_parts_are_those_of_each_alone() -> None:
    """From each stream's own contributions, by explicit Jacobians: their mean is what is bounded."""
    net, key, steps = NET, jax.random.key(2), 6
    state = begun(0, batch=BATCH)
    state = state._replace(carried=state.carried._replace(states=0.3 * jax.random.normal(key, (BATCH, 3))))
    inputs, targets = jax.jit(partial(streams.read, net.task, streams=BATCH, length=steps))(key, 40)
    resets = jnp.asarray(np.arange(steps)[None] == np.asarray([1, 4, -1])[:, None])
    mask = jnp.asarray(np.arange(steps)[None] != np.asarray([3, 4, 20])[:, None])
    ahead = Batch(bptt.Sequence(inputs.xs, resets=resets, mask=mask), jnp.ones_like(targets))
    found = jax.jit(partial(streams.measured_window, net, bias=0.5))(state, ahead)

    def of_one(h, x, resets, mask):
        """The parts of the gradient by recurrent weights that act at one step alone, ``[T, 3, 3]``."""

        def loss(each):
            state = h
            for t in range(steps):
                start = jnp.where(resets[t], jnp.zeros(3), state)
                cell = state_params._replace(**{name: a[t] for name, a in each.items()})
                state = jnp.where(mask[t], net.cell.step(cell, start, x[t]), state)
            return net.loss_of_states(state[None], LossArgs(state0.params.readout, jnp.ones(1, jnp.int32), None))

        state0, state_params = state_all, state_all.params.cell
        each = {name: jnp.stack([a] * steps) for name, a in state_params._asdict().items()}
        return jax.grad(loss)(each)

    state_all, moved = state, resets.at[1].set(jnp.arange(steps) == 5)  # out of the padding
    parts = jax.tree.map(
        lambda a: np.asarray(jnp.mean(a, axis=0)),
        jax.jit(jax.vmap(of_one))(state.carried.states, inputs.xs, moved, mask),
    )
    flat = np.concatenate([a.reshape(steps, -1) for a in jax.tree.leaves(parts)], axis=1)
    norms, whole = np.linalg.norm(flat, axis=1)[::-1], np.linalg.norm(flat.sum(axis=0))
    assert norms.min() > 0
    expected = bptt.analysis.adaptive_window(np.log(norms), np.log(whole), tolerance=0.5)
    np.testing.assert_allclose(found.bias, expected.bias, rtol=1e-4)
    assert float(found.rate) == pytest.approx(float(expected.rate), rel=1e-4)


def test_the_window_follows_the_decay() -> None:
    """An optimiser that sets the decay: from 0.5 to 1, where nothing decays, and back."""
    decays, longest = jnp.asarray([1.0, 0.5, 0.5]), 20

    def update(updates, state, params):
        moved = jax.tree.map(jnp.zeros_like, updates)
        cell = {**moved.cell, "decay": decays[state] - params.cell["decay"]}
        return moved._replace(cell=cell), state + 1

    script = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
    done = train(network(Leak.cell, steady(longest)), script, updates=3, batch=2, chunk=1, window="auto", bias=0.6)
    # Of windows of k steps at 0.5, (1 - 2^-k) / k is missing.
    enough = 1 + int(np.argmax([(1 - 0.5**k) / k <= 0.6 for k in range(1, longest)]))
    assert [r["window"] for r in done.records] == [enough, longest, enough]
    np.testing.assert_allclose([r["lag_rate"][0] for r in done.records], np.log(decays), atol=1e-3)
    bounds = [float(r["bias_bound"][0]) for r in done.records]
    np.testing.assert_allclose(bounds, [np.inf, 1 / longest, (1 - 0.5**enough) / enough], rtol=1e-3)
    np.testing.assert_array_equal(done.states.carried.position, 2 * enough + longest)


def test_seeds_side_by_side_take_the_longest_that_one_that_runs_wants() -> None:
    _, state = decaying(0.5, 40)
    both = jax.tree.map(lambda a: jnp.stack([a, a]), state)
    found = bptt.analysis.AdaptiveWindow(jnp.asarray([3, 17]), None, None, None, None)
    for running, expected in (([True, True], 32), ([True, False], 4), ([False, True], 32)):
        got = streams.with_window(both._replace(running=jnp.asarray(running)), found, 40)
        np.testing.assert_array_equal(got.carried.window, 2 * [expected])
    for window, expected in ((1, 1), (2, 2), (33, 40), (40, 40), (-1, 40)):
        found = bptt.analysis.AdaptiveWindow(jnp.asarray([window, 1]), None, None, None, None)
        np.testing.assert_array_equal(streams.with_window(both, found, 40).carried.window, 2 * [expected])


# --- Sequences with an end, truncated.


@pytest.mark.parametrize("form", covering(["plain", "pieces"], "pieces"))
def test_a_truncated_cell_has_the_gradient_of_tbptt(form) -> None:
    rng = np.random.default_rng(0)
    cell, task = bptt.lstm(2), delayed_copy(2, values=2)
    net = network(truncated(cell, 3), task)
    params = net.init(jax.random.key(0))
    steps = 9 if form == "plain" else 10  # three whole windows
    xs, targets = (
        jnp.asarray(rng.normal(size=(steps, 2)), jnp.float32),
        jnp.asarray(rng.integers(0, 2, steps), jnp.int32),
    )
    at = jnp.arange(steps)
    inputs = xs if form == "plain" else bptt.Sequence(xs, resets=at == 6, mask=at != 7)
    bare = network(cell, task)
    assert_close(net.loss(params, inputs, targets), bare.loss(params, inputs, targets))
    got = jax.jit(jax.grad(net.loss))(params, inputs, targets)
    problem = cell.step, params.cell, cell.initial_state(), inputs, bare.loss_of_states
    args = bare.loss_args(params, inputs, targets)
    assert_close(got.cell, bptt.estimators.tbptt(*problem, k1=3, k2=3, args=args))
    of_all = jax.jit(jax.grad(bare.loss))(params, inputs, targets)
    assert_close(got.readout, of_all.readout)
    assert not np.allclose(got.cell.recurrent, of_all.cell.recurrent, rtol=1e-3)
    whole = network(truncated(cell, steps), task)
    assert_close(jax.jit(jax.grad(whole.loss))(params, inputs, targets), of_all)


# --- Arguments.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, ValueError, "window: expected at least 1, got 0"),
        ({"window": 2.5}, TypeError, "window: expected an integer known before compilation, got float"),
        ({"window": "long"}, TypeError, "window: expected an integer known before compilation, got str"),
        ({"window": "auto", "bias": 0.0}, ValueError, "bias: expected a finite number above 0, got 0"),
        ({"window": 2, "settings": {"window": 3}}, ValueError, "settings: expected other names than .*window"),
    ],
)
def test_bad_arguments(options, error, message) -> None:
    with pytest.raises(error, match=message):
        train(NET, OPTIMIZER, updates=1, batch=2, **options)


def test_a_task_that_is_no_stream() -> None:
    net = network(bptt.rnn(2), tasks.adding(4))
    update = partial(make_update, net, OPTIMIZER, batch=1)
    for call in (partial(train, net, OPTIMIZER, updates=1), update):
        with pytest.raises(ValueError, match=r"window: expected None, or a task with a stream .* got adding"):
            call(window=2)


def test_a_state_of_the_other_kind() -> None:
    update = make_update(NET, OPTIMIZER, batch=2, window=2)
    with pytest.raises(
        ValueError, match=r"state: expected one of init_state\(..., batch=batch\), since window is 2"
    ):
        update(begun(0))
    with pytest.raises(ValueError, match="state: expected one without carried states, since window is None"):
        make_update(NET, OPTIMIZER, batch=2)(begun(0, batch=2))
