import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bptt_jax.experiments.tasks import (
    Batch,
    Task,
    adding,
    characters,
    context_decision,
    copy_memory,
    delayed_copy,
    digits,
    flipflop,
    memorization,
    multiplication,
    random_permutation,
    temporal_order,
    with_keys,
)

MANY = 4000
SENTENCE = "the quick brown fox jumps over the lazy dog; " * 40

EVERY = {
    "adding": partial(adding, 21),
    "multiplication": partial(multiplication, 23),
    "temporal_order_2": partial(temporal_order, 39),
    "temporal_order_3": partial(temporal_order, 39, symbols=3),
    "random_permutation": partial(random_permutation, 12),
    "copy_memory": partial(copy_memory, 5),
    "delayed_copy": partial(delayed_copy, 3, values=4),
    "memorization_20_bits": partial(memorization, 3),
    "memorization_5_bits": partial(memorization, 4, values=2, positions=5),
    "characters": partial(characters, SENTENCE, length=9),
    "validation_characters": partial(characters, SENTENCE, length=9, split="validation"),
}
FURTHER = {
    "shortest_copy_memory": partial(copy_memory, 1),
    "letters": partial(characters, "".join(map(chr, range(100, 300))), length=4),
    "validation_letters": partial(characters, "".join(map(chr, range(100, 300))), length=4, split="validation"),
}
every_task = pytest.mark.parametrize("name", EVERY)


@cache
def _task(name: str) -> tuple[Task, Callable[..., Any], Callable[..., Any]]:
    """The task, its sampling and its (losses, errors) of a batch: compiled once for all tests."""
    task = (EVERY | FURTHER)[name]()

    def judge(outputs, targets):
        return jax.vmap(lambda o, t: (task.loss(o, t, None), task.error(o, t, None)))(outputs, targets)

    return task, jax.jit(task.sample, static_argnums=1), jax.jit(judge)


def _draw(name: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = _task(name)[1](jax.random.key(seed), MANY)
    return np.asarray(inputs), np.asarray(targets)


def _codes(inputs: np.ndarray) -> np.ndarray:
    """The symbols of one-hot inputs, after a check that they are one-hot."""
    np.testing.assert_array_equal(np.sort(inputs, axis=-1)[..., -1], 1)
    np.testing.assert_array_equal(inputs.sum(-1), 1)
    return inputs.argmax(-1)


def _is_uniform(drawn: np.ndarray, values: range) -> None:
    """Every value of the range occurs, no other does, and chi-square is within 5 standard deviations."""
    counts = Counter(drawn.ravel().tolist())
    assert set(counts) == set(values)
    expected, freedom = drawn.size / len(values), len(values) - 1
    chi2 = sum((counts[v] - expected) ** 2 / expected for v in values)
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom) + 5


@every_task
def test_shapes_and_types(name, dtype) -> None:
    task = EVERY[name]()
    batch = jax.eval_shape(lambda: task.sample(jax.random.key(0), 6))
    assert batch.inputs.shape == (6, task.length, task.input_size)
    assert batch.inputs.dtype == dtype
    assert batch.targets.shape == ((6,) if task.reads == "last" else (6, task.length))
    assert batch.targets.dtype == (dtype if task.output_size == 1 else jnp.int32)
    outputs = jax.ShapeDtypeStruct((task.length, task.output_size), dtype)
    target = jax.ShapeDtypeStruct(batch.targets.shape[1:], batch.targets.dtype)
    for function in (task.loss, task.error):
        value = jax.eval_shape(lambda o, t, f=function: f(o, t, None), outputs, target)
        assert (value.shape, value.dtype, value.weak_type) == ((), dtype, False)
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        task.sample(jax.random.key(0), 0)


@every_task
def test_a_key_determines_its_batch(name) -> None:
    inputs, targets = _draw(name)
    again, other = _draw(name), _draw(name, seed=1)
    np.testing.assert_array_equal(again[0], inputs)
    np.testing.assert_array_equal(again[1], targets)
    assert not np.array_equal(other[0], inputs)
    assert len({row.tobytes() for row in inputs}) > 30


@pytest.mark.parametrize("name", ["adding", "characters"])
def test_sampling_maps_over_keys(name) -> None:
    keys = jax.random.split(jax.random.key(3), 2)
    mapped = jax.jit(jax.vmap(lambda key: EVERY[name]().sample(key, MANY)))(keys)
    alone = _task(name)[1](keys[1], MANY)
    np.testing.assert_array_equal(mapped.inputs[1], alone.inputs)
    np.testing.assert_array_equal(mapped.targets[1], alone.targets)


@every_task
def test_loss_and_error_of_a_sequence(name) -> None:
    task, _, judge = _task(name)
    t = _draw(name)[1][:5]
    y = np.random.default_rng(0).standard_normal((5, task.length, task.output_size)).astype(np.float32)
    losses, errors = judge(y, t)
    for i in range(5):
        if task.output_size == 1:
            want = [(y[i, -1, 0] - t[i]) ** 2]
            wrong = abs(y[i, -1, 0] - t[i]) > 0.2
        else:
            rows = [(y[i, -1], t[i])] if task.reads == "last" else list(zip(y[i], t[i], strict=True))
            rows = [(row, k) for row, k in rows if k >= 0]  # the others ask for nothing
            want = [-math.log(math.exp(row[k]) / np.exp(row).sum()) for row, k in rows]
            missed = [row.argmax() != k for row, k in rows]
            wrong = np.mean(missed) if task.name in ("characters", "delayed_copy") else any(missed)
        assert float(losses[i]) == pytest.approx(np.mean(want), rel=1e-5)
        assert float(errors[i]) == pytest.approx(float(wrong))

    right = np.zeros_like(y)
    if task.output_size == 1:
        right[:, -1, 0] = t + np.asarray([0, 0.19, -0.19, 0.21, -0.21])
        np.testing.assert_array_equal(judge(right, t)[1], [0, 0, 0, 1, 1])
        right[:, -1, 0] = t
    else:
        right[:] = 50 * (t.reshape(5, -1)[..., None] == np.arange(task.output_size))
    losses, errors = judge(right, t)
    np.testing.assert_allclose(losses, 0, atol=1e-6)
    np.testing.assert_array_equal(errors, 0)
    right[:, -1, 0] = np.nan
    np.testing.assert_allclose(judge(right, t)[1], {"characters": 1 / 9, "delayed_copy": 1 / 12}.get(task.name, 1))
    # Only what is read counts.
    right[:, -1, 0], right[:, 0, 0] = y[:, -1, 0], np.nan
    reads_first = task.reads == "all" and task.name != "delayed_copy"
    assert np.all(np.isnan(judge(right, t)[0]) == reads_first)


@every_task
def test_solved(name) -> None:
    task = EVERY[name]()
    below, above = task.threshold * 0.99, task.threshold * 1.01
    if task.criterion == "loss":
        assert 0 < task.threshold < task.baseline
        assert bool(task.solved(below, 1.0))
        assert not bool(task.solved(above, 0.0))
        assert not bool(task.solved(math.nan, 0.0))
    else:
        assert task.threshold == 0.01
        assert bool(task.solved(9.0, below))
        assert not bool(task.solved(0.0, above))
        assert not bool(task.solved(0.0, math.nan))


@every_task
def test_baseline_is_the_best_predictor_that_ignores_the_inputs(name) -> None:
    """Made from some sequences, measured on others."""
    task, _, judge = _task(name)
    seen, fresh = _draw(name, seed=1)[1], _draw(name, seed=2)[1]
    if task.output_size == 1:
        outputs = np.full((1, 1), seen.mean(), np.float32)
    else:
        columns = seen.reshape(-1, 1) if task.name == "characters" else seen.reshape(MANY, -1)
        shares = np.mean(columns[..., None] == np.arange(task.output_size), axis=0)
        outputs = np.log(np.maximum(shares, 1e-30)).astype(np.float32)
    steps = task.length if task.reads == "all" else 1
    losses = np.asarray(judge(np.broadcast_to(outputs, (MANY, steps, task.output_size)), fresh)[0], np.float64)
    # Where every sequence costs the same, what is left is the error of the estimated shares.
    assert abs(losses.mean() - task.baseline) < 3 * losses.std() / math.sqrt(MANY) + 20 / MANY * task.baseline


@pytest.mark.parametrize("name", ["memorization_20_bits", "characters"])
def test_padding_does_not_count(name) -> None:
    """Neither outputs nor targets of the steps that are masked, at both ends and in between."""
    task, _, judge = _task(name)
    rng = np.random.default_rng(0)
    targets = _draw(name)[1][0]
    outputs = rng.standard_normal((task.length, task.output_size)).astype(np.float32)
    right = 50 * (targets[:, None] == np.arange(task.output_size))
    outputs += right if name == "memorization_20_bits" else np.where(np.arange(task.length)[:, None] < 3, right, 0)
    at = np.array([1, 2, 4, *range(6, task.length + 3)])
    padded, mask = np.full((task.length + 5, task.output_size), np.nan, np.float32), np.zeros(task.length + 5, bool)
    padded[at], mask[at] = outputs, True
    codes = np.full(task.length + 5, task.output_size + 7, np.int32)
    codes[at] = targets
    got = task.loss(padded, codes, mask), task.error(padded, codes, mask)
    np.testing.assert_allclose(got, [value[0] for value in judge(outputs[None], targets[None])], rtol=1e-6)


def test_adding_of_different_lengths() -> None:
    task = adding(21, shortest=8)
    batch = jax.jit(task.sample, static_argnums=1)(jax.random.key(0), MANY)
    mask = np.asarray(batch.inputs.mask)
    lengths = mask.sum(axis=1)
    assert all(row[:n].all() for row, n in zip(mask, lengths, strict=True))
    _is_uniform(lengths, range(8, 22))
    numbers, markers = (np.asarray(batch.inputs.xs)[..., i] for i in (0, 1))
    first, second = (np.argmax(a, axis=1) for a in (markers, np.cumsum(markers, axis=1) == 2))
    assert np.all(markers.sum(axis=1) == 2)
    assert np.all(first < lengths // 2)
    assert np.all((lengths // 2 <= second) & (second < lengths))
    _is_uniform(first[lengths == 20], range(10))
    _is_uniform(second[lengths == 15], range(7, 15))
    np.testing.assert_allclose(batch.targets, np.sum(numbers * markers, axis=1), rtol=1e-6)


def test_published_baselines() -> None:
    assert adding(100).baseline == pytest.approx(0.167, abs=5e-4)
    assert copy_memory(500).baseline == pytest.approx(0.0400, abs=5e-5)
    assert copy_memory(500).baseline == 10 * math.log(8) / 520
    assert multiplication(100).baseline == pytest.approx(
        np.mean(np.outer(*2 * [(np.arange(999) + 0.5) / 999]) ** 2) - 1 / 16, abs=1e-5
    )
    assert temporal_order(50, symbols=3).baseline == pytest.approx(math.log(8))


@pytest.mark.parametrize(
    ("name", "ranges"),
    [("adding", [range(10), range(10, 21)]), ("multiplication", [range(2), range(2, 11)])],
)
def test_marked_numbers(name, ranges) -> None:
    inputs, targets = _draw(name)
    numbers, markers = inputs[..., 0], inputs[..., 1]
    assert set(np.unique(markers)) == {0, 1}
    places = []
    for row, marks, target in zip(numbers, markers, targets, strict=True):
        first, second = (i for i, m in enumerate(marks) if m == 1)
        a, b = float(row[first]), float(row[second])
        assert float(target) == pytest.approx(a + b if name == "adding" else a * b, rel=1e-6)
        places.append((first, second))
    for drawn, allowed in zip(np.transpose(places), ranges, strict=True):
        _is_uniform(drawn, allowed)
    assert abs(np.corrcoef(np.transpose(places))[0, 1]) < 5 / math.sqrt(MANY)
    assert 0 <= numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    _is_uniform(np.floor(10 * numbers).astype(int), range(10))


@pytest.mark.parametrize(
    ("name", "ranges"),
    [
        ("temporal_order_2", [range(3, 6), range(19, 22)]),
        ("temporal_order_3", [range(3, 6), range(11, 14), range(23, 26)]),
    ],
)
def test_temporal_order(name, ranges) -> None:
    inputs, targets = _draw(name)
    codes = _codes(inputs)
    places = []
    for row, target in zip(codes.tolist(), targets.tolist(), strict=True):
        at = [i for i, c in enumerate(row) if c < 2]
        assert len(at) == len(ranges)
        assert f"{target:0{len(at)}b}"[::-1] == "".join(str(row[i]) for i in at)
        places.append(at)
    for drawn, allowed in zip(np.transpose(places), ranges, strict=True):
        _is_uniform(drawn, allowed)
    assert np.max(np.abs(np.triu(np.corrcoef(np.transpose(places)), 1))) < 5 / math.sqrt(MANY)
    _is_uniform(targets, range(2 ** len(ranges)))
    _is_uniform(codes[codes >= 2], range(2, 6))


def test_random_permutation() -> None:
    inputs, targets = _draw("random_permutation")
    codes = _codes(inputs)
    np.testing.assert_array_equal(codes[:, 0], targets)
    _is_uniform(targets, range(2))
    _is_uniform(codes[:, 1:], range(2, 100))


@pytest.mark.parametrize(("name", "delay"), [("copy_memory", 5), ("shortest_copy_memory", 1)])
def test_copy_memory(name, delay) -> None:
    inputs, targets = _draw(name)
    codes = _codes(inputs)
    assert codes.shape == targets.shape == (MANY, delay + 20)
    for row, target in zip(codes.tolist(), targets.tolist(), strict=True):
        shown = row[:10]
        assert row == shown + [8] * (delay - 1) + [9] + [8] * 10
        assert target == [8] * (delay + 10) + shown
        # What is wanted begins with the step after the marker.
        assert target.index(shown[0]) == row.index(9) + 1
    _is_uniform(codes[:, :10], range(8))


@pytest.mark.parametrize(
    ("name", "delay", "values", "positions"),
    [("memorization_20_bits", 3, 5, 10), ("memorization_5_bits", 4, 2, 5)],
)
def test_memorization(name, delay, values, positions) -> None:
    inputs, targets = _draw(name)
    codes, blank, marker = _codes(inputs), values, values + 1
    for row, target in zip(codes.tolist(), targets.tolist(), strict=True):
        shown = row[:positions]
        assert row == shown + [blank] * delay + [marker] + [blank] * (positions - 1)
        assert target == [blank] * (delay + positions) + shown
        # What is wanted begins with the marker itself.
        assert target.index(shown[0]) == row.index(marker)
    _is_uniform(codes[:, :positions], range(values))


@pytest.mark.parametrize("name", ["copy_memory", "memorization_20_bits", "memorization_5_bits"])
def test_memoryless_predictor_pays_the_plateau(name) -> None:
    """Blank for certain until it is time to recall, then uniform over the symbols."""
    task, _, judge = _task(name)
    blank, recall = task.output_size - 1, 5 if name == "memorization_5_bits" else 10
    logits = np.full((5, task.length, task.output_size), -200.0, np.float32)
    logits[:, :-recall, blank] = 0
    logits[:, -recall:, :blank] = 0
    np.testing.assert_allclose(judge(logits, _draw(name)[1][:5])[0], task.baseline, rtol=1e-5)


@pytest.mark.parametrize(("name", "kept"), [("letters", range(180)), ("validation_letters", range(180, 200))])
def test_characters_split_is_disjoint_and_covering(name, kept) -> None:
    """Every character of the text occurs once in it, so windows tell their place."""
    inputs, targets = _draw(name)
    read = _codes(inputs)
    np.testing.assert_array_equal(np.diff(read), 1)
    np.testing.assert_array_equal(targets, read + 1)
    assert set(read.ravel()) | set(targets.ravel()) == set(kept)


def test_characters_thresholds_by_counting() -> None:
    for split, kept in (("train", SENTENCE[: 9 * len(SENTENCE) // 10]), ("validation", SENTENCE[-180:])):
        task = characters(SENTENCE, length=9, split=split)
        pairs, firsts = Counter(itertools.pairwise(kept)), Counter(kept[:-1])
        conditional = -sum(n * math.log(n / firsts[a]) for (a, _), n in pairs.items()) / (len(kept) - 1)
        alone = Counter(kept[1:])
        entropy = -sum(n * math.log(n / (len(kept) - 1)) for n in alone.values()) / (len(kept) - 1)
        assert task.threshold == pytest.approx(conditional)
        assert task.baseline == pytest.approx(entropy)


def test_characters_default_text() -> None:
    train, validation = characters(), characters(split="validation")
    assert train.input_size == validation.input_size > 60
    assert 1.5 < train.threshold < train.baseline < 4
    batch = jax.eval_shape(lambda: train.sample(jax.random.key(0), 2))
    assert batch.inputs.shape == (2, 100, train.input_size)


def test_digits() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is an optional dependency")
    bundled = datasets.load_digits()
    rows = Counter(map(bytes, bundled.images.reshape(-1, 64).astype(np.uint8)))
    train, validation = digits(), digits(split="validation")
    parts = []
    for task in (train, validation):
        whole = task.whole
        assert whole is not None
        parts.append(np.round(16 * np.asarray(whole.inputs)[..., 0]).astype(np.uint8))
        assert 0 <= float(whole.inputs.min()) < float(whole.inputs.max()) <= 1
        shares = np.bincount(whole.targets, minlength=10) / len(whole.targets)
        np.testing.assert_allclose(shares, np.bincount(bundled.target) / 1797, atol=2e-3)
        assert task.baseline == pytest.approx(-sum(shares * np.log(shares)))
        assert task.baseline == pytest.approx(math.log(10), abs=1e-3)
        inputs, targets = (np.asarray(a) for a in jax.jit(task.sample, static_argnums=1)(jax.random.key(0), 50))
        assert inputs.shape == (50, 64, 1)
        own = Counter(zip(map(bytes, parts[-1]), whole.targets.tolist(), strict=True))
        drawn = zip(map(bytes, np.round(16 * inputs[..., 0]).astype(np.uint8)), targets.tolist(), strict=True)
        assert all(pair in own for pair in drawn)
        assert bool(task.solved(1.0, 0.09))
        assert not bool(task.solved(0.0, 0.11))
    # The bundled images are all different, so nothing in common means disjoint.
    assert len(rows) == 1797
    assert Counter(map(bytes, np.concatenate(parts))) == rows
    assert 0.18 < len(parts[1]) / 1797 < 0.22
    labels = {bytes(row): int(c) for row, c in zip(bundled.data.astype(np.uint8), bundled.target, strict=True)}
    assert [labels[bytes(row)] for row in parts[0]] == train.whole.targets.tolist()


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"^digits needs .*: python -m pip install 'bptt_jax\[train\]'$"):
        digits()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: adding(1), ValueError, "length: expected at least 2, got 1"),
        (lambda: adding(9, shortest=10), ValueError, "shortest: expected from 2 to length = 9, got 10"),
        (lambda: adding(9, shortest=1), ValueError, "shortest: expected from 2 to length = 9, got 1"),
        (lambda: adding(10.0), TypeError, "length: expected an integer .* got float"),
        (lambda: multiplication(9), ValueError, "length: expected at least 10, got 9"),
        (lambda: temporal_order(9), ValueError, "length: expected at least 10, got 9"),
        (lambda: temporal_order(20, symbols=4), ValueError, "symbols: expected 2 or 3, got 4"),
        (lambda: temporal_order(20, symbols=2.0), TypeError, "symbols: expected an integer"),
        (lambda: random_permutation(0), ValueError, "length: expected at least 1, got 0"),
        (lambda: copy_memory(0), ValueError, "delay: expected at least 1, got 0"),
        (lambda: memorization(-1), ValueError, "delay: expected at least 1, got -1"),
        (lambda: memorization(5, values=1), ValueError, "values: expected at least 2, got 1"),
        (lambda: memorization(5, positions=0), ValueError, "positions: expected at least 1, got 0"),
        (lambda: characters("abc", length=0), ValueError, "length: expected at least 1, got 0"),
        (
            lambda: characters("abc" * 9, split="test"),
            ValueError,
            "split: expected 'train' or 'validation', got 'te",
        ),
        (lambda: characters(b"abc"), TypeError, "text: expected a string or None, got bytes"),
        (lambda: characters(""), ValueError, "text: expected at least one character"),
        (
            lambda: characters("a" * 50, length=5, split="validation"),
            ValueError,
            "text: expected more than 5 characters in the validation split, got 5",
        ),
        (lambda: digits(split="all"), ValueError, "split: expected 'train' or 'validation', got 'all'"),
    ],
)
def test_bad_arguments(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()


# --- Of neuroscience


def numpy_flipflop(inputs, width):
    """Of one channel ``[T]``, step by step: what is to be held, and whether it is asked for."""
    held, since, targets = 0, None, []
    for t, x in enumerate(inputs):
        if x != 0 and (t == 0 or inputs[t - 1] == 0 or since >= width):  # pulses may follow on each other
            since = 0
        elif since is not None:
            since += 1
        held = x if x != 0 else held
        targets.append(held if since is None or since >= 2 * width else 0)
    return np.asarray(targets)


def test_flipflop_holds_the_latest_pulse() -> None:
    task = flipflop(70, bits=2, width=4)
    inputs, targets = map(np.asarray, jax.jit(task.sample, static_argnums=1)(jax.random.key(0), 200))
    assert (task.input_size, task.output_size, inputs.shape, targets.shape) == (2, 2, (200, 70, 2), (200, 70, 2))
    for sequence, target in zip(inputs[:20], targets[:20], strict=True):
        for channel in range(2):
            np.testing.assert_array_equal(target[:, channel], numpy_flipflop(sequence[:, channel], 4))
    _is_uniform(inputs[inputs != 0].astype(int), [-1, 1])
    first = np.abs(inputs[:, :12]).sum(axis=1)
    np.testing.assert_array_equal(first, 4)  # one pulse in all channels, four steps long
    later = np.abs(inputs[:, 12:60]).sum(axis=1) / 4 / 4  # of four windows
    assert abs(later.mean() - 0.5) < 0.05
    assert np.corrcoef(later.T)[0, 1] < 0.3


def test_flipflop_counts_what_is_asked() -> None:
    task = flipflop(30, width=5)
    targets = jnp.zeros((30, 3)).at[20:, 0].set(1.0).at[25:, 1].set(-1.0)
    right = targets + 0.4
    np.testing.assert_allclose(task.loss(right, targets, None), 0.16, rtol=1e-5)
    assert task.error(right, targets, None) == 0
    off = right.at[29, 0].set(0.4)
    assert task.error(off, targets, None) == 1
    assert task.error(off, targets, jnp.arange(30) < 29) == 0
    assert task.error(right.at[27, 1].set(jnp.nan), targets, None) == 1
    assert task.error(right.at[:20].set(9.0), targets, None) == 0
    np.testing.assert_allclose(task.loss(jnp.zeros((30, 3)), targets, None), task.baseline)
    assert task.loss(right, targets, jnp.arange(30) < 9) == 0  # nothing is asked


def test_context_decision_asks_for_one_of_two_streams() -> None:
    task = context_decision(40)
    inputs, targets = map(np.asarray, jax.jit(task.sample, static_argnums=1)(jax.random.key(0), MANY))
    cues = inputs[:, :, 2:]
    np.testing.assert_array_equal(cues, np.broadcast_to(cues[:, :1], cues.shape))
    which = _codes(cues[:, 0])
    _is_uniform(which, range(2))
    means = inputs[:, :, :2].mean(axis=1)
    asked, other = means[np.arange(MANY), which], means[np.arange(MANY), 1 - which]
    # The sign of the sum is the best there is, and is as often wrong as is said.
    wrong = np.mean(np.sign(asked) != targets)
    ideal = task.threshold - 0.02
    assert abs(wrong - ideal) < 4 * np.sqrt(ideal / MANY)
    assert abs(np.mean(np.sign(other) == targets) - 0.5) < 0.04
    assert abs(inputs[:, :, :2].std(axis=1).mean() - 1) < 0.02
    outputs = jnp.asarray([[5.0], [0.5]])
    assert [float(task.error(outputs, t, None)) for t in (1.0, -1.0)] == [0, 1]
    assert task.error(outputs * jnp.nan, 1.0, None) == 1
    np.testing.assert_allclose(task.loss(outputs, 1.0, None), 0.25)


@pytest.mark.parametrize(("make", "least"), [(flipflop, 15), (context_decision, 1)])
def test_trials_of_different_lengths(make, least) -> None:
    task = make(24, shortest=20)
    mask = np.asarray(task.sample(jax.random.key(0), 400).inputs.mask)
    _is_uniform(mask.sum(axis=1), range(20, 25))
    np.testing.assert_array_equal(mask, np.arange(24) < mask.sum(axis=1)[:, None])
    with pytest.raises(ValueError, match=f"shortest: expected from {least} to length = 24, got 25"):
        make(24, shortest=25)


def test_keys_beside_the_inputs() -> None:
    plain, padded = with_keys(adding(6)), with_keys(adding(6, shortest=4))
    (inputs, keys), _ = plain.sample(jax.random.key(0), 3)
    assert (inputs.shape, keys.shape) == ((3, 6, 2), (3, 6))
    assert len({tuple(k) for k in np.asarray(jax.random.key_data(keys)).reshape(18, -1).tolist()}) == 18
    sequence = padded.sample(jax.random.key(0), 3).inputs
    assert (sequence.xs[0].shape, sequence.xs[1].shape, sequence.mask.shape) == ((3, 6, 2), (3, 6), (3, 6))
    whole = Batch(jnp.ones((4, 6, 2)), jnp.ones(4))
    finite = with_keys(adding(6)._replace(whole=whole))
    assert finite.whole is not None
    assert finite.whole.inputs[1].shape == (4, 6)
    with pytest.raises(TypeError, match="task: expected a Task, got int"):
        with_keys(3)
