"""The loop against updates written out by hand, and its log against trajectories known beforehand."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from slices import covering

import bptt_jax as bptt
from bptt_jax.experiments.loop import (
    evaluate,
    init_state,
    make_update,
    train,
)
from bptt_jax.experiments.network import network
from bptt_jax.experiments.records import Metrics, describe, flaw
from bptt_jax.experiments.tasks import Batch, Task, adding, memorization

SEEDS, UPDATES = (3, 8), 39


def _sums(key, batch):
    inputs = jax.random.uniform(key, (batch, 6, 2))
    return Batch(inputs, jnp.sum(inputs[:, ::3, 0], axis=1))


# As `adding` with fixed markers, so that little has to be compiled, and validated on eight sequences.
SUMS = adding(6)._replace(name="sums", sample=_sums, whole=_sums(jax.random.key(9), 8), threshold=0.0)
NET = network(bptt.rnn(3), SUMS)
OPTIMIZER = optax.sgd(0.05, momentum=0.9)


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly():
    """What is claimed here holds however the compiler works."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(a) for a in jax.tree.leaves(tree)]


def of_seed(tree, i):
    return jax.tree.map(lambda a: a[i], tree)


def assert_equal(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(leaves(got), leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_close(got, want, rtol=1e-5) -> None:
    for a, b in zip(leaves(got), leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


def mean_square(params, data):
    """The loss of an rnn on a sum, written out."""
    losses = []
    for inputs, target in zip(*data, strict=True):
        h = jnp.zeros(3)
        for x in inputs:
            h = jnp.tanh(params.cell.recurrent @ h + params.cell.input @ x + params.cell.bias)
        losses.append(jnp.square(params.readout.weights[0] @ h + params.readout.bias[0] - target))
    return sum(losses) / len(losses)


# --- One update, many, and seeds.


@pytest.mark.parametrize("penalised", [False, True])
def test_one_update_is_a_plain_optax_update(penalised) -> None:
    rng = np.random.default_rng(0)
    data = Batch(jnp.asarray(rng.normal(size=(2, 6, 2)), jnp.float32), jnp.asarray([0.3, 1.2], jnp.float32))
    net = NET._replace(task=NET.task._replace(sample=lambda key, batch: data))

    def penalty(params, seen):
        return 0.5 * jnp.sum(jnp.square(params.cell.recurrent)) * jnp.mean(seen.targets)

    def objective(params):
        loss = mean_square(params, data)
        return loss + (penalty(params, data) if penalised else 0.0), loss

    state = init_state(net, OPTIMIZER, 5)
    assert int(state.updates) == 0
    assert_close(state.params, NET.init(jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 0), 0)))
    gradient, loss = jax.jit(jax.grad(objective, has_aux=True))(state.params)
    norm = np.linalg.norm(np.concatenate([a.ravel() for a in leaves(gradient)]))
    updates, opt_state = OPTIMIZER.update(gradient, OPTIMIZER.init(state.params), state.params)
    got, metrics = jax.jit(make_update(net, OPTIMIZER, batch=2, penalty=penalty if penalised else None))(state)
    assert_close(got.params, optax.apply_updates(state.params, updates))
    assert_close(got.opt_state, opt_state)
    assert int(got.updates) == 1
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)  # without the penalty
    np.testing.assert_allclose(metrics.gradient_log_norm, np.log(norm), rtol=1e-5)


def omega(net, weight, version="paper"):
    return lambda params, data: weight * bptt.remedies.omega_penalty(net.omega_terms(params, data), version=version)


def bias_of(params, data):
    return params.readout.bias[0]


def first_target(params, data):
    return data.targets[0]


@pytest.fixture(scope="module")
def by_hand():
    """For each seed: the states before every update and after the last, and metrics, from a Python loop."""
    update = jax.jit(make_update(NET, OPTIMIZER, batch=4))
    runs = []
    for seed in SEEDS:
        states, metrics = [init_state(NET, OPTIMIZER, seed)], []
        for _ in range(UPDATES):
            state, m = update(states[-1])
            states.append(state)
            metrics.append(m)
        runs.append((states, jax.tree.map(lambda *a: np.stack(a), *metrics)))
    return runs


@pytest.fixture(scope="module")
def trained():
    """By chunk: the training and all that `on_chunk` and `on_record` were given."""

    def run(chunk, seeds=SEEDS):
        seen, told = [], []
        done = train(
            NET,
            OPTIMIZER,
            updates=UPDATES,
            batch=4,
            seeds=seeds,
            chunk=chunk,
            probes={"bias": bias_of, "target": first_target},
            on_chunk=seen.append,
            on_record=told.append,
        )
        return done, seen, told

    return {"13": run(13), "7": run(7), "alone": run(13, SEEDS[1:])}


@pytest.mark.parametrize("run", ["13", "7"])
def test_scanned_training_of_seeds_is_a_python_loop_for_each(run, trained, by_hand) -> None:
    done, seen, _ = trained[run]
    metrics = jax.tree.map(lambda *a: np.concatenate(a), *seen)
    for i, (states, want) in enumerate(by_hand):
        assert int(done.states.updates[i]) == UPDATES
        assert_close(of_seed(done.states.params, i), states[-1].params)
        assert_close(of_seed(done.states.opt_state, i), states[-1].opt_state)
        assert_close(jax.tree.map(lambda a, i=i: a[:, i], metrics), want)
        recent = of_seed(done.states.recent, i)
        assert_close(jax.tree.map(lambda a: a[-UPDATES:], recent), want)
        assert np.isnan(recent.loss[:-UPDATES]).all()
    assert len(np.unique(metrics.loss)) == 2 * UPDATES  # fresh sequences for each update of each seed
    assert not np.allclose(leaves(of_seed(done.states.params, 0))[0], leaves(of_seed(done.states.params, 1))[0])


def test_the_chunk_does_not_matter_nor_do_other_seeds(trained) -> None:
    assert_close(trained["7"][0].states, trained["13"][0].states)
    assert_close(of_seed(trained["alone"][0].states, 0), of_seed(trained["13"][0].states, 1))


def test_on_chunk_gets_all_metrics_and_on_record_every_record(trained) -> None:
    for run, sizes in (("13", [13] * 3), ("7", [7] * 5 + [4]), ("alone", [13] * 3)):
        done, seen, told = trained[run]
        seeds = len(done.states.seed)
        assert all(isinstance(m, Metrics) for m in seen)
        assert [m.loss.shape for m in seen] == [(n, seeds) for n in sizes]
        assert [m.gradient_log_norm.shape for m in seen] == [(n, seeds) for n in sizes]
        assert told == done.records
        assert done.events == []
        assert [r["updates"] for r in done.records] == np.cumsum(sizes).tolist()


def assert_missed(record) -> None:
    """Each of its entries, if it were not there, or were something else."""
    seeds = len(record.get("seeds", ()))
    assert flaw(record, seeds) == ""
    for name in set(record) - {"event"}:
        assert flaw({k: v for k, v in record.items() if k != name}, seeds) == f"it has no {name}"
        for other in ("x", [{}], [[]], True):
            assert flaw(record | {name: other}, seeds) == f"its {name} is of another kind"


def test_records_of_chunks(trained, by_hand) -> None:
    done, seen, _ = trained["7"]
    for record, metrics in zip(done.records, seen, strict=True):
        for i, (states, _) in enumerate(by_hand):
            loss, norms = (np.asarray(m[:, i], np.float64) for m in metrics)
            assert record["loss"][i] == pytest.approx(loss.mean())
            assert record["gradient_log_norm"][i] in np.sort(norms)[(len(norms) - 1) // 2 : len(norms) // 2 + 1]
            assert record["gradient_log_norm_max"][i] == norms.max()
            state = states[record["updates"]]
            assert record["probes"]["bias"][i] == pytest.approx(float(state.params.readout.bias[0]), rel=1e-4)
            assert 0 < record["probes"]["target"][i] < 2
        assert record["clipped"] is record["skipped"] is None  # nothing keeps a record
        assert record["solved_at"] == [None, None]
        assert_missed(record)
    assert len({t for r in done.records for t in r["probes"]["target"]}) == 2 * len(done.records)


def test_probes_see_the_next_updates_batch() -> None:
    """Where the loss is that of the batch alone, a probe of it after a chunk is the next chunk's first loss."""
    net = hand_made(loss=lambda out, target: 0 * out + target, sample=uniform_targets)
    seen = []
    done = train(
        net,
        optax.sgd(1.0),
        updates=4,
        batch=3,
        chunk=2,
        probes={"next": lambda p, data: jnp.mean(data.targets)},
        on_chunk=seen.append,
    )
    assert done.records[0]["probes"]["next"] == [pytest.approx(float(seen[1].loss[0, 0]))]
    assert done.records[0]["probes"]["next"] != done.records[1]["probes"]["next"]


def test_double_precision_stays_double(x64) -> None:
    net = network(bptt.rnn(2), SUMS._replace(whole=_sums(jax.random.key(9), 8)))
    done = train(net, OPTIMIZER, updates=2, batch=2, chunk=1)
    assert {a.dtype for a in jax.tree.leaves((done.states.params, done.states.opt_state))} == {jnp.dtype("float64")}
    assert done.states.recent.loss.dtype == jnp.float64
    assert done.states.seed.dtype == done.states.updates.dtype == jnp.int32


# --- Trajectories known beforehand: the output is the readout's bias alone, and a script moves it.


def one_sequence(key, batch):
    return Batch(jnp.zeros((batch, 2, 1)), jnp.zeros(batch))


def uniform_targets(key, batch):
    return Batch(jnp.zeros((batch, 2, 1)), jax.random.uniform(key, (batch,)))


def half_square(out, target):
    """NaN where the output is above 900, and its gradient the output all the same."""
    return jnp.where(out > 900, jnp.nan, 0.0) + out * out / 2


def hand_made(*, loss=half_square, error=lambda out, target: out, sample=one_sequence, **changes):
    """A network whose state is always 0, whose one weight tells seeds apart, and that outputs its bias."""
    task = Task(
        "hand-made",
        2,
        1,
        1,
        "last",
        sample,
        lambda outputs, target, mask: loss(outputs[-1, 0], target),
        lambda outputs, target, mask: error(outputs[-1, 0], target),
        baseline=math.inf,  # no jumps
        threshold=-math.inf,
        whole=one_sequence(None, 1),
    )._replace(**changes)
    cell = bptt.Cell(lambda key, n: jax.random.uniform(key, (1,)), lambda: jnp.zeros(1), lambda p, h, x: h)
    return network(cell, task)


@pytest.fixture(scope="module")
def divide() -> float:
    """Above it lies the one weight of the first seed, 0, or of the second, 1; `scripted` takes sides by it."""
    weights = [float(init_state(hand_made(), optax.sgd(1.0), s).params.cell[0]) for s in (0, 1)]
    return sum(weights) / 2


@pytest.fixture
def scripted(divide):
    """An optimiser that moves the bias of seed 0 by first[k] at update k + 1, of seed 1 by second[k]."""
    high = float(init_state(hand_made(), optax.sgd(1.0), 0).params.cell[0]) > divide

    def make(first, second):
        moves = np.stack([first, second] if high else [second, first]).astype(np.float32)

        def update(gradient, count, params):
            del gradient
            move = jnp.where(params.cell > divide, jnp.asarray(moves[0])[count], jnp.asarray(moves[1])[count])
            still = jax.tree.map(jnp.zeros_like, params)
            return still._replace(readout=still.readout._replace(bias=move)), count + 1

        return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)

    return make


def moves_to(biases) -> np.ndarray:
    """Moves so that the bias before update k + 1 is biases[k]; the first is 0."""
    assert biases[0] == 0
    return np.append(np.diff(np.asarray(biases, np.float64)), 0.0)


run_script = partial(train, batch=1, seeds=(0, 1))


def test_a_solved_seed_stops_and_stays_and_the_other_goes_on(scripted) -> None:
    optimizer = scripted(np.zeros(12), -np.ones(12))  # the second's error after u updates is -u
    done = run_script(hand_made(threshold=-3.5), optimizer, updates=12, chunk=3)
    np.testing.assert_array_equal(done.states.params.readout.bias[:, 0], [0, -6])
    np.testing.assert_array_equal(done.states.updates, [12, 6])
    np.testing.assert_array_equal(done.states.opt_state, [12, 6])
    np.testing.assert_array_equal(done.states.solved_at, [-1, 6])
    np.testing.assert_array_equal(done.states.running, [True, False])
    assert [r["solved_at"] for r in done.records] == [[None, None]] + 3 * [[None, 6]]
    assert [r["validation_error"] for r in done.records] == [[0, -3], [0, -6], [0, None], [0, None]]
    assert [r["updates"] for r in done.records] == [3, 6, 9, 12]
    for record in done.records[2:]:
        assert record["loss"] == [0, None]
        assert record["gradient_log_norm"] == ["-inf", None]
    assert done.events == []


def test_all_solved_ends_the_run(scripted) -> None:
    done = run_script(hand_made(threshold=-3.5), scripted(-np.ones(50), -2 * np.ones(50)), updates=50, chunk=3)
    assert repr(done).splitlines()[0].startswith("Training: 2 of 2 seeds solved it in 6 updates, after 3 to 6")
    assert len(repr(done).splitlines()) <= 10
    assert json.loads(json.dumps(done.to_dict()))["records"] == done.records
    assert [r["updates"] for r in done.records] == [3, 6]
    np.testing.assert_array_equal(done.states.solved_at, [6, 3])


@pytest.mark.parametrize("criterion", ["loss", "error"])
def test_what_is_nan_is_never_solved(scripted, criterion) -> None:
    """Any number at all is below the threshold; the first seed's loss and error are NaN after two updates."""
    net = hand_made(
        error=lambda out, target: jnp.where(out > 900, jnp.nan, 0.0), criterion=criterion, threshold=math.inf
    )
    done = run_script(net, scripted(moves_to([0, 0, 1000, 0, 0]), np.zeros(5)), updates=6, chunk=2)
    assert done.records[0]["validation_error"] == done.records[0]["validation_loss"] == ["nan", 0]
    np.testing.assert_array_equal(done.states.solved_at, [4, 2])


def test_ten_thousand_more_decide() -> None:
    """One sequence in 2000 is wrong: a thousand often hold none, ten thousand hardly ever."""
    wrong = lambda out, target: jnp.asarray(target < 1 / 2000, float)  # noqa: E731
    net = hand_made(error=wrong, sample=uniform_targets, threshold=1e-6, whole=None)
    done = train(net, optax.sgd(0.0), updates=8, batch=1, chunk=1)
    errors = [r["validation_error"][0] for r in done.records]
    screened = [e for e in errors if round(e * 10_000, 3) % 10 == 0]
    confirmed = [e for e in errors if e not in screened]
    assert len(set(errors)) > 2  # fresh sequences each time
    assert screened
    assert confirmed  # none of the thousand was wrong, some of the ten thousand were
    assert all(e > 0 for e in errors)
    assert int(done.states.solved_at[0]) == -1


def test_validation_takes_the_given_task(scripted) -> None:
    net = hand_made()
    other = net.task._replace(error=lambda outputs, target, mask: outputs[-1, 0] - 100, threshold=-97.5)
    done = run_script(net, scripted(np.zeros(6), np.ones(6)), updates=6, chunk=3, validation=other)
    assert done.records[0]["validation_error"] == [-100, -97]
    np.testing.assert_array_equal(done.states.solved_at, [3, -1])


def expected_events(seed, biases, chunk):
    """By the words of `Training`, from the trajectory: of each chunk the first of each kind."""
    b = np.asarray(biases, np.float64)
    losses, norms = np.where(b > 900, np.nan, b * b / 2), [math.log(abs(x)) if x else -math.inf for x in b]
    found = []
    for start in range(0, len(b), chunk):
        kinds = {}
        for k in range(start, min(start + chunk, len(b))):
            before = losses[max(0, k - 100) : k]
            known = before[np.isfinite(before)]
            if not math.isfinite(losses[k]):
                kinds.setdefault("non-finite", k)
            elif known.size and losses[k] > 3 * known.max() and losses[k] > 1.0:
                kinds.setdefault("jump", k)
        for kind, k in kinds.items():
            was = slice(max(0, k - 10), k)
            found.append((kind, seed, k + 1, losses[k], losses[was], norms[was]))
    return sorted(found, key=lambda e: e[2])


def assert_events(got, want) -> None:
    assert [(e["event"], e["seed"], e["updates"]) for e in got] == [e[:3] for e in want]
    for event, (*_, loss, losses, norms) in zip(got, want, strict=True):
        np.testing.assert_array_equal(float(event["loss"]), loss)
        np.testing.assert_array_equal([float(a) for a in event["losses_before"]], losses)
        norms_before = [float(a) for a in event["gradient_log_norms_before"]]
        np.testing.assert_allclose(norms_before, norms, rtol=1e-6)


@pytest.mark.parametrize("chunk", [3, 8, 7, 24])
def test_events_name_the_update_and_what_led_to_it(scripted, chunk) -> None:
    """A jump at update 4, NaN at 9 and 10, a jump at 17: first, middle and last of chunks."""
    first = [0, 1, 1, 5, 3, 2, 1, 2, 1000, 1000, 1, 2, 3, 4, 5, 6, 11, 7, 6, 5, 4, 3, 2, 1]
    steady = [k / 4 for k in range(24)]  # from 0, up to the baseline, and never thrice what was
    net = hand_made(baseline=1.0)
    done = run_script(net, scripted(moves_to(first), moves_to(steady)), updates=24, chunk=chunk)
    want = expected_events(0, first, chunk)
    assert {(kind, update) for kind, _, update, *_ in want} >= {("jump", 4), ("non-finite", 9)}
    assert (("jump", 17) in {(kind, update) for kind, _, update, *_ in want}) == (chunk != 24)
    assert_events(done.events, want)
    lines = [describe(event) for event in done.events]
    for event, line in zip(done.events, lines, strict=True):
        assert line.startswith(f"seed 0, update {event['updates']}: ")
        assert "\n" not in line
        assert_missed(event)
    assert "the loss jumps to 12.5" in lines[0]
    assert "gradient norms before: 0 1 1" in lines[0]
    assert "the loss is nan" in lines[1]
    updates = [r["updates"] for r in done.records]
    assert updates == sorted(updates)


def test_a_jump_is_one_against_the_last_hundred_updates(scripted) -> None:
    """The same loss, 100 updates after a larger one and 101 after."""
    late, later = ([1.0] * 5 + [4.0] + [1.0] * n + [4.0] + [1.0] * (115 - n - 7) for n in (99, 100))
    late[0] = later[0] = 0.0
    done = run_script(hand_made(baseline=1.0), scripted(moves_to(late), moves_to(later)), updates=115, chunk=23)
    assert [(e["event"], e["seed"], e["updates"]) for e in done.events] == [
        ("jump", 0, 6),
        ("jump", 1, 6),
        ("jump", 1, 107),
    ]


@pytest.mark.parametrize("how", ["parameters", "losses"])
def test_a_lost_seed_stops_and_the_other_does_not(scripted, how) -> None:
    """Its parameters go to infinity at update 6, or a hundred losses are NaN, from the fifth to the 104th."""
    moves, end = moves_to([0, 1, 1, 1] + 108 * [1000]), 104
    if how == "parameters":
        moves, end = np.where(np.arange(112) == 5, np.inf, np.where(np.arange(112) == 0, 1.0, 0.0)), 8
    done = run_script(hand_made(), scripted(moves, np.full(112, 1 / 64)), updates=112, chunk=4)
    assert f"0 of 2 seeds solved it in 112 updates, 1 lost; {len(done.events)} events" in repr(done)
    np.testing.assert_array_equal(done.states.updates, [end, 112])
    np.testing.assert_array_equal(done.states.running, [False, True])
    np.testing.assert_array_equal(
        done.states.params.readout.bias[:, 0], [np.inf if how != "losses" else 1000, 1.75]
    )
    kinds = [(e["event"], e["seed"], e["updates"]) for e in done.events]
    first, lost = kinds[0], kinds[-1]
    assert first == ("non-finite", 0, 7 if how == "parameters" else 5)
    assert lost == ("lost", 0, 7 if how == "parameters" else 101)
    assert {kind for kind, *_ in kinds[1:-1]} <= {"non-finite"}
    assert done.events[0]["losses_before"][-1] == 0.5
    assert describe(done.events[-1]).startswith(f"seed 0, update {lost[2]}: lost: ")
    stopped = [r["loss"][0] is None for r in done.records if "event" not in r]
    assert stopped == [False] * (end // 4) + [True] * ((112 - end) // 4)
    counted = [r["non_finite"][0] for r in done.records if "event" not in r and r["non_finite"][0] is not None]
    assert sum(counted) == (2 if how == "parameters" else 100)
    np.testing.assert_array_equal(done.states.solved_at, [-1, -1])


def test_all_lost_ends_the_run(scripted) -> None:
    done = run_script(hand_made(), scripted(np.full(50, np.inf), np.full(50, -np.inf)), updates=50, chunk=5)
    assert [r["updates"] for r in done.records if "event" not in r] == [5]
    assert {(e["event"], e["seed"]) for e in done.events} == {
        (kind, seed) for kind in ("non-finite", "lost") for seed in (0, 1)
    }


# --- Shares, evaluation, arguments, penalty.


def test_clipped_and_skipped_shares_are_counts() -> None:
    def sample(key, batch):
        data = _sums(key, batch)
        bad = data.targets > 1.4  # a sixth of them
        return Batch(jnp.where(bad[:, None, None], jnp.nan, data.inputs), data.targets)

    net = NET._replace(task=SUMS._replace(sample=sample))
    seen = []
    done = train(
        net,
        bptt.with_clipping(optax.sgd(0.01), 1.5),
        updates=36,
        batch=1,
        seeds=SEEDS,
        chunk=12,
        on_chunk=seen.append,
    )
    counts = []
    for record, metrics in zip((r for r in done.records if "event" not in r), seen, strict=True):
        norms = np.exp(np.asarray(metrics.gradient_log_norm, np.float64))
        counts.append((np.sum(np.isfinite(norms) & (norms > 1.5), axis=0), np.sum(~np.isfinite(norms), axis=0)))
        np.testing.assert_allclose(record["clipped"], counts[-1][0] / 12, rtol=1e-12)
        np.testing.assert_allclose(record["skipped"], counts[-1][1] / 12, rtol=1e-12)
    assert len({tuple(c[0]) for c in counts}) > 1  # of each chunk, not since the beginning
    assert 0 < np.sum([c[0] for c in counts]) < 72
    assert 0 < np.sum([c[1] for c in counts]) < 72
    assert all(np.isfinite(a).all() for a in leaves(done.states.params))


# --- Sequences of different lengths, and streams of episodes.


def ragged():
    """Sequences of 2, 5 and 3 steps with their targets, padded by NaN at their ends."""
    rng = np.random.default_rng(3)
    pieces = [jnp.asarray(rng.normal(size=(n, 2)), jnp.float32) for n in (2, 5, 3)]
    targets = jnp.asarray([0.3, 1.2, -0.4], jnp.float32)
    xs = jnp.stack([jnp.pad(a, ((0, 6 - len(a)), (0, 0)), constant_values=jnp.nan) for a in pieces])
    mask = jnp.arange(6)[None] < jnp.asarray([[2], [5], [3]])
    return (pieces, targets), Batch(bptt.Sequence(xs, mask=mask), targets)


def episodes():
    """The same as one stream that begins anew at each, with a gap before the last; read at their last steps."""
    (pieces, targets), _ = ragged()
    gap = jnp.full((1, 2), jnp.nan)
    xs, at = jnp.concatenate([*pieces[:2], gap, pieces[2]])[None], jnp.asarray([1, 6, 10])
    mask, resets = jnp.arange(11) != 7, jnp.isin(jnp.arange(11), jnp.asarray([2, 7]))  # the second in the gap
    wanted = jnp.full(11, jnp.nan).at[at].set(targets)[None]
    return Batch(bptt.Sequence(xs, mask=mask[None], resets=resets[None]), wanted)


def squares(outputs, target, mask):
    """Their mean where there is a target."""
    wanted = mask & ~jnp.isnan(target)
    return jnp.mean(jnp.square(outputs[:, 0] - jnp.where(wanted, target, 0.0)), where=wanted)


@pytest.mark.parametrize("form", covering(["padded", "stream"], "stream"))
def test_an_update_is_that_of_the_sequences_alone(form) -> None:
    alone, data = ragged()
    changes = {"sample": lambda key, batch: data, "whole": data, "length": 6}
    if form == "stream":
        data = episodes()
        changes |= {"sample": lambda key, batch: data, "whole": data, "length": 11, "reads": "all"}
        changes |= {"loss": squares, "error": squares}
    net = network(bptt.rnn(3), SUMS._replace(**changes))
    state = init_state(net, OPTIMIZER, 5)
    loss, gradient = jax.jit(jax.value_and_grad(lambda params: mean_square(params, alone)))(state.params)
    updates, _ = OPTIMIZER.update(gradient, OPTIMIZER.init(state.params), state.params)
    got, metrics = jax.jit(make_update(net, OPTIMIZER, batch=3))(state)
    assert_close(got.params, optax.apply_updates(state.params, updates))
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    assert bool(jnp.all(jnp.isfinite(metrics.gradient_log_norm)))
    np.testing.assert_allclose(evaluate(net, state.params, jax.random.key(0), 3)[0], loss, rtol=1e-5)
    single = network(bptt.rnn(3), SUMS)
    of_each = [single.omega_terms(state.params, Batch(x[None], t[None])) for x, t in zip(*alone, strict=True)]
    # The stream's loss is a third of the sum of the pieces', which does not show in a ratio.
    summed, count = (sum(float(jnp.sum(getattr(found, name))) for found in of_each) for name in ("terms", "valid"))
    assert count == 10
    found = net.omega_terms(state.params, data)
    rows = len(data.inputs.mask)
    np.testing.assert_allclose(bptt.remedies.omega_penalty(found, version="paper"), summed / rows, rtol=1e-4)
    np.testing.assert_allclose(bptt.remedies.omega_penalty(found, version="code"), summed / count, rtol=1e-4)
    done = train(net, OPTIMIZER, updates=1, batch=3, seeds=(5,))
    assert_close(of_seed(done.states.params, 0), got.params)
    assert float(done.records[0]["validation_loss"][0]) == pytest.approx(
        float(mean_square(got.params, alone)), rel=1e-4
    )


# --- What an optimiser may ask for.


def test_the_optimizer_is_given_value_gradient_and_function() -> None:
    """Of the loss with its penalty, at the parameters before the update, on the update's batch."""

    def update(updates, state, params=None, *, value, grad, value_fn, **others):
        again, gradient = jax.value_and_grad(value_fn)(params)
        return updates, (value, again, grad, gradient)

    def init(params):
        return jnp.zeros(()), jnp.zeros(()), params, params

    asking = optax.GradientTransformationExtraArgs(init, update)
    net = NET._replace(task=SUMS)
    state = init_state(net, asking, 0)
    data = SUMS.sample(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), 0), 4)
    penalty = lambda params, batch: 0.5 * jnp.sum(jnp.square(params.readout.weights))  # noqa: E731
    moved, metrics = jax.jit(make_update(net, asking, batch=4, penalty=penalty))(state)
    value, again, grad, gradient = moved.opt_state
    want = float(mean_square(state.params, data) + penalty(state.params, data))
    assert float(value) == pytest.approx(want, rel=1e-5)
    assert float(again) == pytest.approx(want, rel=1e-5)
    assert float(metrics.loss) < want
    assert_close(grad, gradient)


@pytest.mark.parametrize("clipped", [False, True])
def test_reduce_on_plateau_reduces_on_a_plateau(clipped) -> None:
    """The loss does not move, so the scale is halved after every second update."""
    flat = hand_made(loss=lambda out, target: 0 * out + 1.0)
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=0.5, patience=2))
    optimizer = bptt.with_clipping(optimizer, 1.0) if clipped else optimizer
    with jax.numpy_dtype_promotion("standard"):  # Optax wants it
        done = train(flat, optimizer, updates=7, batch=1, seeds=(0, 1))
    scales = optax.tree.get(done.states.opt_state, "scale")
    np.testing.assert_allclose(scales, [0.5**3] * 2)


def test_a_line_search_trains() -> None:
    optimizer = optax.chain(optax.sgd(10.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=30))
    whole = SUMS.whole
    net = NET._replace(task=SUMS._replace(sample=lambda key, batch: whole))
    seen = []
    train(net, optimizer, updates=6, batch=8, on_chunk=seen.append)
    losses = np.asarray(seen[0].loss)[:, 0]
    assert np.all(np.diff(losses) < 0)


@pytest.mark.parametrize(("count", "sequences"), [(3, 7), (10, 7), (250, 251), (1000, 500)])
def test_evaluation_of_a_whole_task(count, sequences) -> None:
    rng = np.random.default_rng(sequences)
    whole = Batch(
        jnp.asarray(rng.uniform(size=(sequences, 6, 2)), jnp.float32),
        jnp.asarray(rng.uniform(0, 2, sequences), jnp.float32),
    )
    net = NET._replace(task=NET.task._replace(whole=whole))
    params = jax.tree.map(lambda a: a + 0.1, NET.init(jax.random.key(0)))
    w, u, b = (np.asarray(a, np.float64) for a in params.cell)
    h = np.zeros((sequences, 3))
    for x in np.moveaxis(np.asarray(whole.inputs, np.float64), 1, 0):
        h = np.tanh(h @ w.T + x @ u.T + b)
    squares = (h @ np.asarray(params.readout.weights[0]) + float(params.readout.bias[0]) - whole.targets) ** 2
    loss, error = jax.jit(partial(evaluate, net, count=count))(params, jax.random.key(1))
    np.testing.assert_allclose(loss, np.mean(squares), rtol=1e-5)
    assert float(error) == pytest.approx(np.mean(np.asarray(squares) > 0.04))
    assert 0 < float(error) < 1


@pytest.mark.parametrize(
    ("length", "count", "piece", "pieces"),
    [(2, 1000, 250, 4), (2, 1001, 250, 5), (2, 7, 7, 1), (400_000, 7, 2, 4), (2_000_000, 3, 1, 3)],
)
def test_evaluation_of_fresh_sequences_in_whole_pieces(length, count, piece, pieces) -> None:
    sizes = []

    def sample(key, batch):
        sizes.append(batch)
        return uniform_targets(key, batch)

    net = hand_made(
        loss=lambda out, t: out + t, error=lambda out, t: t * t, sample=sample, whole=None, length=length
    )
    params = net.init(jax.random.key(0))
    got = evaluate(net, params, jax.random.key(1), count)
    assert set(sizes) == {piece}
    targets = np.concatenate(
        [uniform_targets(k, piece).targets for k in jax.random.split(jax.random.key(1), pieces)]
    )
    np.testing.assert_allclose(got, [targets.mean(), np.square(targets).mean()], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"updates": 0}, ValueError, "updates: expected at least 1"),
        ({"updates": 2.0}, TypeError, "updates: expected an integer"),
        ({"batch": 0}, ValueError, "batch: expected at least 1"),
        ({"chunk": -1}, ValueError, "chunk: expected at least 1"),
        ({"seeds": ()}, ValueError, r"seeds: expected different integers .*, got \[\]"),
        ({"seeds": (1, 2, 1)}, ValueError, r"seeds: .*got \[1, 2, 1\]"),
        ({"seeds": (-1,)}, ValueError, "seeds: "),
        ({"seeds": (2**31,)}, ValueError, "seeds: "),
        (
            {"validation": memorization(2)},
            ValueError,
            "validation: expected a task whose input_size is 2, got 7",
        ),
        (
            {"validation": NET.task._replace(reads="all")},
            ValueError,
            "validation: expected a task whose reads is 'last', got 'all'",
        ),
        ({"seeds": (0.9,)}, TypeError, r"seeds: expected a sequence of integers, got \(0.9,\)"),
    ],
)
def test_bad_arguments_before_any_compilation(options, error, message, compilations, tmp_path) -> None:
    with pytest.raises(error, match=message):
        train(NET, OPTIMIZER, **{"updates": 3, "folder": tmp_path / "run", **options})
    assert compilations == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("version", ["paper", "code"])
def test_omega_penalty_by_hand(version) -> None:
    net = network(bptt.rnn(3), adding(5))
    params, data = net.init(jax.random.key(0)), net.task.sample(jax.random.key(1), 4)

    def by_hand(cell):
        def terms(inputs, target):
            def loss(states):
                return jnp.square(params.readout.weights[0] @ states[-1] + params.readout.bias[0] - target)

            return bptt.remedies.omega_terms(net.cell.step, cell, jnp.zeros(3), inputs, loss)

        return 0.7 * bptt.remedies.omega_penalty(jax.vmap(terms)(*data), version=version)

    penalty = omega(net, 0.7, version)
    got, gradient = jax.jit(jax.value_and_grad(penalty))(params, data)
    want, cell_gradient = jax.jit(jax.value_and_grad(by_hand))(params.cell)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert_close(gradient.cell, cell_gradient)
    assert np.abs(gradient.cell.recurrent).max() > 0.01
    for unmoved in leaves((gradient.readout, gradient.cell.input, gradient.cell.bias)):
        np.testing.assert_array_equal(unmoved, 0)  # the error signals are constants to it


def test_omega_penalty_from_jacobians_and_adjoints() -> None:
    net = network(bptt.rnn(3), adding(5))
    params, data = net.init(jax.random.key(0)), net.task.sample(jax.random.key(1), 2)
    total = 0.0
    for inputs, target in zip(*data, strict=True):
        args = net.loss_args(params, inputs, target)
        jacobians = bptt.jacobians(net.cell.step, params.cell, jnp.zeros(3), inputs)
        found = bptt.adjoints(net.cell.step, params.cell, jnp.zeros(3), inputs, net.loss_of_states, args=args)
        deltas = found.adjoints
        for J, d in zip(np.asarray(jacobians, np.float64), np.asarray(deltas, np.float64), strict=True):
            total += (np.sum((J.T @ d) ** 2) / np.sum(d**2) - 1) ** 2
    got = jax.jit(omega(net, 3.0))(params, data)
    np.testing.assert_allclose(got, 3.0 * total / 2, rtol=1e-4)


def test_training_with_omega_moves_by_its_gradient() -> None:
    """One step of plain descent with it and without: they differ by its gradient, the recorded losses do not."""
    data = _sums(jax.random.key(4), 3)
    net = NET._replace(task=NET.task._replace(sample=lambda key, batch: data))
    penalty = omega(net, 2.0)
    state = init_state(net, optax.sgd(1.0), 1)
    plain, of_plain = jax.jit(make_update(net, optax.sgd(1.0), batch=3))(state)
    both, of_both = jax.jit(make_update(net, optax.sgd(1.0), batch=3, penalty=penalty))(state)
    np.testing.assert_allclose(of_plain.loss, of_both.loss, rtol=1e-6)
    gradient = jax.jit(jax.grad(penalty))(state.params, data)
    assert np.abs(gradient.cell.recurrent).max() > 0.01
    assert_close(jax.tree.map(jnp.subtract, plain.params, both.params), gradient, rtol=1e-4)


def test_gradients_of_complex_parameters_descend() -> None:
    """|w|^2 falls; without the conjugate it would turn round and round."""
    cell = bptt.Cell(
        lambda key, size: jnp.asarray(1 + 1j, jnp.complex64),
        lambda: jnp.zeros(1, jnp.complex64),
        lambda w, h, x: h + w,
    )
    task = SUMS._replace(loss=lambda outputs, target, mask: jnp.square(outputs[-1, 0]))
    net = network(cell, task, readout_init=jax.nn.initializers.ones)

    def updated(net):
        optimizer = optax.sgd(1e-3)
        update = make_update(net, optimizer, batch=2)
        return jax.jit(lambda seed: update(init_state(net, optimizer, seed))[0])(0)

    state = updated(net)
    assert 0 < float(state.params.cell.real) < 1
    turned = network(cell._replace(step=lambda w, h, x: h + 1j * w), task, readout_init=jax.nn.initializers.ones)
    state = updated(turned)
    assert -1 < -float(state.params.cell.imag) < 0  # the output is -Im w


def test_a_batch_that_is_skipped_now_and_then_loses_nothing() -> None:
    """A chunk of one bad batch is no reason to stop, and spoils no mean."""

    def sample(key, batch):
        data = _sums(key, batch)
        return Batch(jnp.where(data.targets[:, None, None] > 1.4, jnp.nan, data.inputs), data.targets)

    net = NET._replace(task=SUMS._replace(sample=sample))
    done = train(net, bptt.with_clipping(optax.sgd(0.01), 1.0), updates=12, batch=1, chunk=1)
    assert int(done.states.updates[0]) == 12
    chunks = [r for r in done.records if "event" not in r]
    bad = [r["non_finite"][0] for r in chunks]
    assert 0 < sum(bad) < 12
    assert bad == [round(r["skipped"][0]) for r in chunks]
    seen = []
    whole = train(
        net, bptt.with_clipping(optax.sgd(0.01), 1.0), updates=12, batch=1, chunk=12, on_chunk=seen.append
    )
    (record,) = [r for r in whole.records if "event" not in r]
    losses = np.asarray(seen[0].loss)[:, 0]
    assert record["non_finite"] == [sum(bad)]
    assert record["loss"][0] == pytest.approx(losses[np.isfinite(losses)].mean(), rel=1e-6)


def test_settings_of_other_names_than_those_of_the_run() -> None:
    with pytest.raises(ValueError, match=r"settings: expected other names than batch, chunk, .*, got chunk"):
        train(NET, OPTIMIZER, updates=3, settings={"chunk": 5})
