"""The field's tasks: pure functions of a random key, each with its trivial loss and its criterion of success.

Where a paper and its released code differ, the docstring says which is followed. "Pascanu et al. 2013" is
arXiv:1211.5063, its code github.com/pascanur/trainingRNNs at 5065c63. That code draws a new length for every
batch; here shapes are static, and sequences of different lengths are padded to one (`adding` has them).
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bptt_jax.checks import check_choice, check_key, check_positive_int
from bptt_jax.experiments.text import corpus, english_text, windows
from bptt_jax.results import counted
from bptt_jax.step import Array, PyTree, Sequence

OfOutputs: TypeAlias = Callable[[Array, PyTree, Array | None], Array]
Bound: TypeAlias = int | np.ndarray | Array
Split: TypeAlias = Literal["train", "validation"]

# Below this share of wrong sequences, of 10,000 fresh ones, a problem counts as solved (Pascanu et al. 2013). Their
# code is stricter than the paper: it stops at less than 0.0001 %, that is at none.
_SOLVED = 0.01


class Batch(NamedTuple):
    """Sequences and what is to be said about them.

    Attributes:
      inputs: ``[B, T, I]``, floating; or a `bptt_jax.Sequence` of it, with padding (``mask [B, T]``) or new
        beginnings (``resets [B, T]``).
      targets: of the tasks here ``[B]`` if the last output is read, ``[B, T]`` if all: numbers, or codes of classes
        (int32). Of one's own any pytree, leaves ``[B, ...]``.
    """

    inputs: PyTree
    targets: PyTree


class Task(NamedTuple):
    """A supervised task. Outputs are a readout's: logits of classes, or a number; unbatched, time first.

    Attributes:
      name: of the factory that made it.
      length: T, all steps of a sequence, padding included.
      input_size, output_size: I and O.
      reads: "last" if loss and error look at ``outputs[-1]`` alone (an ``[1, O]`` will do), or "all".
      sample: ``sample(key, batch) -> Batch``; `batch` is static, the rest can be jitted and vmapped.
      loss: ``loss(outputs [T, O], target, mask) -> scalar``, of one sequence: squared error, or the mean over the
        steps that are read of the cross-entropy in nats. `mask` ``[T]`` is that of the `Sequence`, False in
        padding, where outputs are those of the last real step; None where there is no padding.
      error: ``error(outputs [T, O], target, mask) -> scalar`` in [0, 1], what the criterion of success counts in
        one sequence. An output that is NaN is wrong.
      baseline: the expected loss of the best predictor that may know the time step but ignores the inputs.
      criterion: "error" or "loss": whose mean over fresh sequences decides.
      threshold: solved means below it.
      whole: all sequences, if there are finitely many.
      stream: what stateful training reads, of a task that reads "all" and goes on without an end:
        ``stream(key, start, length) -> Batch`` of one sequence, its steps from `start` (int32) on, leaves ``[T, ...]``.
        A key is a stream, each step of which is a function of the key and its number. The state begins anew at step 0,
        and where the inputs are a `Sequence` with ``resets [T]``.
    """

    name: str
    length: int
    input_size: int
    output_size: int
    reads: Literal["last", "all"]
    sample: Callable[[Array, int], Batch]
    loss: OfOutputs
    error: OfOutputs
    baseline: float
    criterion: Literal["error", "loss"] = "error"
    threshold: float = _SOLVED
    whole: Batch | None = None
    stream: Callable[[Array, Array, int], Batch] | None = None

    def solved(self, loss: Array | float, error: Array | float) -> Array:
        """Whether these means (over 10,000 fresh sequences, or `whole`) meet the criterion; never if NaN."""
        return jnp.asarray(loss if self.criterion == "loss" else error) < self.threshold


def adding(length: int, *, shortest: int | None = None) -> Task:
    """Two of T numbers are marked; their sum is wanted at the end.

    Hochreiter and Schmidhuber 1997 (experiment 4) in the form of Le et al. 2015 (arXiv:1504.00941): channel 0
    holds numbers uniform in [0, 1), channel 1 is 1 at two markers, the target is the sum. The markers are those of
    Arjovsky et al. 2016 (arXiv:1511.06464, and its code): one uniform in each half, [0, T/2) and [T/2, T).
    Not followed: the code of Pascanu et al. 2013, with markers in [0, T/10) and [T/10, T/2) and half the sum as
    target; and the original, with numbers in [-1, 1] and the target 1/2 + (x_1 + x_2)/4.

    The baseline is the sum's variance, 1/6 (0.167 in Arjovsky et al.; Le et al. print 0.1767 for the same
    predictor, the constant 1). A sequence is wrong if the squared error exceeds 0.04, as in the code of Pascanu et
    al., whose target is half as large; solved below 1 %.

    With `shortest` every sequence has a length of its own, uniform from there to T, as in the original, whose
    lengths are from T to 1.1 T; it is padded to T, and the markers are in the halves of what is real.

    Args:
      length: T, at least 2.
      shortest: at least 2 and at most `length`; None: all have T steps.
    """
    length = _check_length(length, 2)
    if shortest is None:
        halves = np.asarray([0, length // 2]), np.asarray([length // 2, length])

        def one(key: Array) -> Batch:
            inputs, marked = _marked(key, length, *halves)
            return Batch(inputs, marked[0] + marked[1])

        return _regression("adding", length, one, 1 / 6)
    least = _check_shortest(shortest, 2, length)

    def padded(key: Array) -> Batch:
        key_length, key_rest = jax.random.split(key)
        real = _integers(key_length, (), least, length + 1)
        half = real // 2
        inputs, marked = _marked(key_rest, length, jnp.stack([jnp.zeros_like(half), half]), jnp.stack([half, real]))
        return Batch(Sequence(inputs, mask=jnp.arange(length) < real), marked[0] + marked[1])

    return _regression("adding", length, padded, 1 / 6)


def multiplication(length: int) -> Task:
    """Two of T numbers are marked; their product is wanted at the end.

    Hochreiter and Schmidhuber 1997 (experiment 5) as in the code of Pascanu et al. 2013: numbers uniform in
    [0, 1), markers uniform in [0, T/10) and [T/10, T/2). Channels are as in `adding`, the code's swapped.
    The baseline is the product's variance, 1/9 - 1/16 = 7/144. A sequence is wrong if the squared error exceeds
    0.04; solved below 1 %.

    Args:
      length: T, at least 10.
    """
    length = _check_length(length, 10)
    tenth = length // 10
    low, high = np.asarray([0, tenth]), np.asarray([tenth, tenth + 4 * length // 10])

    def one(key: Array) -> Batch:
        inputs, marked = _marked(key, length, low, high)
        return Batch(inputs, marked[0] * marked[1])

    return _regression("multiplication", length, one, 7 / 144)


def temporal_order(length: int, *, symbols: Literal[2, 3] = 2) -> Task:
    """Among distractors {c, d, e, f}, two or three symbols of {A, B}: which, in which order?

    Hochreiter and Schmidhuber 1997 (experiment 6) as in the code of Pascanu et al. 2013: one of six channels is 1
    (A, B, c, d, e, f); the symbols stand at uniform places in [T/10, 2T/10) and [5T/10, 6T/10), or, if three, in
    [T/10, 2T/10), [3T/10, 4T/10) and [6T/10, 7T/10). (The description at the head of that code has the first in
    [1, T/10]; what it draws is followed.) The class is sum_i 2^i [symbol i is B]. Read at the last step. The
    baseline is `symbols` ln 2; solved below 1 % wrong.

    Args:
      length: T, at least 10.
      symbols: 2 or 3.
    """
    length = _check_length(length, 10)
    check_choice("symbols", check_positive_int("symbols", symbols), 2, 3)
    starts = np.asarray([tenths * length // 10 for tenths in {2: (1, 5), 3: (1, 3, 6)}[symbols]], np.int32)

    def one(key: Array) -> Batch:
        key_symbols, key_rest = jax.random.split(key)
        offsets, drawn = _integers(key_symbols, (2, symbols), 0, np.asarray([[length // 10], [2]]))
        codes = _integers(key_rest, (length,), 2, 6).at[starts + offsets].set(drawn)
        return Batch(_one_hot(codes, 6), jnp.sum(drawn << jnp.arange(symbols, dtype=jnp.int32), dtype=jnp.int32))

    return _classification("temporal_order", length, 6, 2**symbols, one, symbols * math.log(2))


def random_permutation(length: int) -> Task:
    """The first of T symbols, one of two, is wanted at the end; 98 others come between.

    Hochreiter and Schmidhuber 1997 (experiment 2) as in the code of Pascanu et al. 2013, which draws the
    distractors independently, hence no permutation: 100 symbols, the first of {0, 1}, the others uniform of
    {2, .., 99}. The code reads the last step alone, and so does this. The baseline is ln 2; solved below 1 % wrong.

    Args:
      length: T, of steps.
    """
    length = _check_length(length, 1)
    is_first = np.arange(length) == 0

    def one(key: Array) -> Batch:
        codes = _integers(key, (length,), np.where(is_first, 0, 2), np.where(is_first, 2, 100))
        return Batch(_one_hot(codes, 100), codes[0])

    return _classification("random_permutation", length, 100, 100, one, math.log(2))


def copy_memory(delay: int) -> Task:
    """Ten symbols are shown, and wanted again after a long blank.

    Arjovsky et al. 2016 (arXiv:1511.06464, paper and code): ten symbols uniform of eight, `delay` - 1 blanks, the
    marker, ten blanks; the output is blank for `delay` + 10 steps, then the ten symbols, from the step after the
    marker on. Symbols are numbered as in the paper: 0 .. 7, blank 8, marker 9 (blank 0, symbols 1 .. 8 in the
    code); the marker is no output, as in the code, so I = 10 and O = 9.

    The baseline is the published 10 ln 8 / (`delay` + 20), 0.0400 at 500. No threshold was published: that of
    `memorization` is used.

    Args:
      delay: the "T" of the paper; a sequence has `delay` + 20 steps.
    """
    delay = check_positive_int("delay", delay)
    return _recall("copy_memory", delay, values=8, positions=10, marker=delay + 9)


def memorization(delay: int, *, values: int = 5, positions: int = 10) -> Task:
    """Noiseless memorization: a pattern is shown, and wanted again after a long blank.

    Hochreiter and Schmidhuber 1997 and Martens and Sutskever 2011 as in the code of Pascanu et al. 2013:
    `positions` symbols uniform of `values`, `delay` blanks, the marker, blanks; the output is blank before the
    marker, and the pattern from the very step of the marker on: one step earlier than in `copy_memory`. Symbols
    are 0 .. values - 1, then blank, then marker, which is no output: I = values + 2, O = values + 1. "5 bits" are
    2 values at 5 positions, "20 bits" 5 values at 10, the code's default and this one's.

    The baseline is positions ln(values) / (delay + 2 positions). A sequence is wrong if any of its steps
    is; solved below 1 %.

    Args:
      delay: blanks before the marker; a sequence has `delay` + 2 `positions` steps.
      values: at least 2.
      positions: of the pattern.
    """
    delay, positions = check_positive_int("delay", delay), check_positive_int("positions", positions)
    if check_positive_int("values", values) < 2:
        raise ValueError(f"values: expected at least 2, got {values}")
    return _recall("memorization", delay, values, positions, marker=delay + positions)


def delayed_copy(delay: int, *, values: int = 6, episode: int | None = None) -> Task:
    """Every symbol is wanted again `delay` steps after it has been shown.

    The copying with a fixed lag on which Aicher et al. 2019 (arXiv:1905.07473) truncate, of symbols that are all drawn
    independently, uniform of `values`. The first `delay` steps ask for nothing, target -1. The loss is the mean
    cross-entropy of the steps that ask, the baseline ln(values), the error the share of them that is wrong; solved
    below 1 %. A sequence has five times `delay` steps.

    As a stream it goes on for 2^31 steps. With `episode` it begins anew, with a reset, at every step with probability 1
    / `episode`, and again the first `delay` steps ask for nothing.

    Args:
      delay: lag between symbol and copy.
      values: how many symbols there are, at least 2; I and O.
      episode: mean length of the stream's episodes. None: it is one.
    """
    delay, values = check_positive_int("delay", delay), check_positive_int("values", values)
    if values < 2:
        raise ValueError(f"values: expected at least 2, got {values}")
    if episode is not None:
        episode = check_positive_int("episode", episode)
    length = 5 * delay

    def part(key: Array, start: Array, length: int, episode: int | None) -> Batch:
        at = start - delay + jnp.arange(delay + length, dtype=jnp.int32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, at)
        codes = jax.vmap(lambda key: _integers(key, (), 0, values))(keys)
        begins = at <= 0
        if episode is not None:
            begins |= jax.vmap(lambda key: _integers(jax.random.fold_in(key, 0), (), 0, episode) == 0)(keys)
        order = jnp.arange(delay + length, dtype=jnp.int32)
        begun = jax.lax.cummax(jnp.where(begins, order, -1))[delay:]
        asks = (begun < 0) | (order[delay:] - begun >= delay)
        inputs: PyTree = _one_hot(codes[delay:], values)
        if episode is not None:
            inputs = Sequence(inputs, resets=begins[delay:])
        return Batch(inputs, jnp.where(asks, codes[:length], -1))

    def one(key: Array) -> Batch:
        return part(key, jnp.int32(0), length, None)

    return Task(
        "delayed_copy",
        length,
        values,
        values,
        "all",
        _batched(one),
        _cross_entropy_of_asked,
        _share_wrong_of_asked,
        baseline=math.log(values),
        stream=partial(part, episode=episode),
    )


def characters(text: str | None = None, *, length: int = 100, split: Split = "train") -> Task:
    """Real text: the next character, at every step of a random window.

    The first nine tenths of the text are for training, the rest for validation; the vocabulary is the whole text's.
    The baseline is the entropy of the split's characters. Of no published criterion: solved when the loss is below
    the entropy of the next character given the current one, in the split itself; nothing that forgets can be.

    As a stream, the split from a random place on, over and over; the state is reset where the text begins anew.

    Args:
      text: default `bptt_jax.experiments.text.english_text`.
      length: T, of steps.
      split: "train" or "validation".

    Raises:
      FileNotFoundError: no text is given and this Python carries none.
      ValueError: the split has no more than T characters.
    """
    length = _check_length(length, 1)
    check_choice("split", split, "train", "validation")
    if not (text is None or isinstance(text, str)):
        raise TypeError(f"text: expected a string or None, got {type(text).__name__}")
    vocabulary, codes = corpus(english_text() if text is None else text)
    cut = 9 * len(codes) // 10
    codes = codes[:cut] if split == "train" else codes[cut:]
    if len(codes) <= length:
        few = counted(length, "character")
        raise ValueError(f"text: expected more than {few} in the {split} split, got {len(codes)}")
    size, on_device = len(vocabulary), jnp.asarray(codes)
    pairs = codes[:-1].astype(np.int64) * size + codes[1:]

    def sample(key: Array, batch: int) -> Batch:
        inputs, targets = windows(key, on_device, batch, length)
        return Batch(_one_hot(inputs, size), targets)

    def stream(key: Array, start: Array, length: int) -> Batch:
        pairs = len(codes) - 1
        at = (_integers(key, (), 0, pairs) + start % pairs) % pairs
        at = (at + jnp.arange(length, dtype=jnp.int32) % pairs) % pairs
        return Batch(Sequence(_one_hot(on_device[at], size), resets=at == 0), on_device[at + 1])

    return Task(
        "characters",
        length,
        size,
        size,
        "all",
        sample,
        _mean_cross_entropy,
        _share_wrong,
        baseline=_entropy(codes[1:]),
        criterion="loss",
        threshold=_entropy(pairs) - _entropy(codes[:-1]),
        stream=stream,
    )


def digits(*, split: Split = "train") -> Task:
    """Real handwritten digits, 8 x 8 pixels one after the other; which digit is wanted at the end.

    The 1797 images that scikit-learn bundles (the test part of the UCI set "Optical Recognition of Handwritten
    Digits", Alpaydin and Kaynak), row by row, T = 64, grey 0 .. 16 as 0 .. 1: sequential MNIST (Le et al. 2015) at
    a size that needs no download. Every fifth image of each class is for validation; `sample` draws with
    replacement, `whole` holds the split. The baseline is the entropy of its classes, near ln 10. Of no published
    criterion: solved below 10 % wrong, where chance has 90 %.

    Args:
      split: "train" or "validation".

    Raises:
      ImportError: scikit-learn is missing.
    """
    check_choice("split", split, "train", "validation")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits needs scikit-learn: python -m pip install 'bptt_jax[train]'") from error
    images, classes = load_digits(return_X_y=True)
    rank_in_class = np.sum(np.tril(classes[:, None] == classes), axis=1) - 1
    chosen = (rank_in_class % 5 == 4) == (split == "validation")
    inputs = jnp.asarray(images[chosen, :, None] / 16, float)
    whole = Batch(inputs, jnp.asarray(classes[chosen], jnp.int32))

    def sample(key: Array, batch: int) -> Batch:
        drawn = _integers(check_key("key", key), (check_positive_int("batch", batch),), 0, len(whole.targets))
        return Batch(whole.inputs[drawn], whole.targets[drawn])

    return Task(
        "digits",
        64,
        1,
        10,
        "last",
        sample,
        _cross_entropy,
        _wrong,
        baseline=_entropy(classes[chosen]),
        threshold=0.1,
        whole=whole,
    )


def flipflop(length: int, *, shortest: int | None = None, bits: int = 3, width: int = 5) -> Task:
    """Bits that pulses switch: each output holds the sign of the latest pulse of its input.

    Sussillo and Barak 2013 (Neural Comput. 25: 626), with three bits, for networks in continuous time. Theirs come as
    a Poisson process; here one comes, or none (each with probability 1/2), in every window of three widths, at a
    random place, in each channel by itself; in the first window one comes in all, as in fixed-point-finder's
    example (Golub and Sussillo 2018), so that there is something to hold. A pulse lasts `width` steps, as long as
    the memory of a unit that leaks by 1 / `width`, and is +1 or -1.

    Targets are ``[T, bits]``: +1 or -1, and 0 where nothing is asked: before the first pulse, during a pulse and as
    long after it, in that channel. The loss is the mean squared error where something is. A sequence is wrong if
    there any output is off by more than 1/2; solved below 1 %. The baseline is 1, that of the constant 0.

    Args:
      length: T, at least three widths.
      shortest: least number of real steps, from three widths to T; sequences have lengths uniform from there to T,
        and are padded. None: all have T steps.
      bits: how many; I and O.
      width: of a pulse, in steps.
    """
    bits, width = check_positive_int("bits", bits), check_positive_int("width", width)
    window = 3 * width
    length = _check_length(length, window)
    least = _check_shortest(shortest, window, length)
    count = -(-length // window)
    at, phase = np.arange(length) // window, np.arange(length)[:, None] % window

    def one(key: Array) -> Batch:
        key_pulses, key_signs, key_places, key_length = jax.random.split(key, 4)
        pulses = _integers(key_pulses, (count, bits), 0, 2).at[0].set(1) == 1
        signs = 2 * _integers(key_signs, (count, bits), 0, 2) - 1
        onset = _integers(key_places, (count, bits), 0, width + 1)[at]
        order = jnp.arange(count, dtype=jnp.int32)[:, None]
        held = jnp.take_along_axis(signs, jax.lax.cummax(jnp.where(pulses, order, 0)), axis=0)
        before = jnp.concatenate([jnp.zeros_like(held[:1]), held[:-1]])
        begun = pulses[at] & (phase >= onset)
        unsettled = begun & (phase < onset + 2 * width)
        inputs = jnp.where(begun & (phase < onset + width), signs[at], 0)
        targets = jnp.where(unsettled, 0, jnp.where(begun, held[at], before[at]))
        inputs, targets = inputs.astype(float), targets.astype(float)
        return Batch(_padded(key_length, inputs, least), targets)

    return Task("flipflop", length, bits, bits, "all", _batched(one), _mean_of_asked, _any_far_off, baseline=1.0)


_STRENGTHS = np.asarray([0.2, 0.4, 0.8])
_ABOVE_IDEAL = 0.02


def context_decision(length: int, *, shortest: int | None = None) -> Task:
    """Which sign has the evidence that the context asks for?

    The task of Mante et al. 2013 (Nature 503: 78): two streams of noisy evidence, "motion" and "colour", and two cues,
    of which the one that is 1 throughout says which stream counts. Each stream is its strength, +-0.2, +-0.4 or +-0.8
    (theirs are in the ratio 1 : 4 : 16), plus noise of variance 1 at every step. The target is the sign of the strength
    of the one that counts, +1 or -1, read at the last real step. I = 4: motion, colour, and their cues.

    The loss is the squared error, the baseline 1, that of the constant 0. A sequence is wrong if the output has the
    wrong sign. The best that can be done is the sign of the sum of the evidence, wrong with probability
    ``Phi(-strength sqrt(T))``; solved below 2 % more than its mean.

    Args:
      length: T, of steps.
      shortest: least number of real steps; sequences have lengths uniform from there to T, and are padded. None: all
        have T steps.
    """
    length = _check_length(length, 1)
    least = _check_shortest(shortest, 1, length)
    lengths = np.arange(least, length + 1)
    evidence = _STRENGTHS[:, None] * np.sqrt(lengths)
    ideal = math.fsum(math.erfc(z / math.sqrt(2)) / 2 for z in evidence.flat) / evidence.size  # Phi(-z)

    def one(key: Array) -> Batch:
        key_strength, key_sign, key_noise, key_context, key_length = jax.random.split(key, 5)
        strength = jnp.asarray(_STRENGTHS, float)[_integers(key_strength, (2,), 0, len(_STRENGTHS))]
        sign = (2 * _integers(key_sign, (2,), 0, 2) - 1).astype(float)
        context = _integers(key_context, (), 0, 2)
        evidence = (sign * strength)[None] + jax.random.normal(key_noise, (length, 2))
        cues = jnp.broadcast_to(_one_hot(context, 2), (length, 2))
        inputs = jnp.concatenate([evidence, cues], axis=1)
        return Batch(_padded(key_length, inputs, least), sign[context])

    threshold = ideal + _ABOVE_IDEAL
    sample = _batched(one)
    return Task(
        "context_decision", length, 4, 1, "last", sample, _squared_error, _wrong_sign, 1.0, threshold=threshold
    )


def with_keys(task: Task) -> Task:
    """The task with a random key beside every input, ``(inputs, keys [B, T])``, for steps that draw noise.

    Of `bptt_jax.cells.leaky_rnn`, say. The keys of a finite task's `whole` are always the same.
    """
    if not isinstance(task, Task):
        raise TypeError(f"task: expected a Task, got {type(task).__name__}")

    def beside(inputs: PyTree, key: Array, batch: int) -> PyTree:
        keys = jax.random.split(key, (batch, task.length))
        if isinstance(inputs, Sequence):
            return replace(inputs, xs=(inputs.xs, keys))
        return inputs, keys

    def sample(key: Array, batch: int) -> Batch:
        key_task, key_noise = jax.random.split(check_key("key", key))
        inputs, targets = task.sample(key_task, batch)
        return Batch(beside(inputs, key_noise, batch), targets)

    def stream(key: Array, start: Array, length: int) -> Batch:
        assert task.stream is not None
        key_task, key_noise = jax.random.split(key)
        inputs, targets = task.stream(key_task, start, length)
        at = start + jnp.arange(length, dtype=jnp.int32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key_noise, at)
        if isinstance(inputs, Sequence):
            return Batch(replace(inputs, xs=(inputs.xs, keys)), targets)
        return Batch((inputs, keys), targets)

    whole = task.whole
    if whole is not None:
        count = len(jax.tree.leaves(whole.targets)[0])
        whole = Batch(beside(whole.inputs, jax.random.key(0), count), whole.targets)
    return task._replace(sample=sample, whole=whole, stream=None if task.stream is None else stream)


def _regression(name: str, length: int, one: Callable[[Array], Batch], variance: float) -> Task:
    return Task(name, length, 2, 1, "last", _batched(one), _squared_error, _far_off, variance)


def _classification(
    name: str, length: int, input_size: int, classes: int, one: Callable[[Array], Batch], baseline: float
) -> Task:
    return Task(name, length, input_size, classes, "last", _batched(one), _cross_entropy, _wrong, baseline)


def _recall(name: str, delay: int, values: int, positions: int, marker: int) -> Task:
    length = delay + 2 * positions
    blank = np.full(length, values, np.int32)
    cue = np.where(np.arange(length) == marker, values + 1, blank).astype(np.int32)

    def one(key: Array) -> Batch:
        pattern = _integers(key, (positions,), 0, values)
        codes = jnp.concatenate([pattern, cue[positions:]])
        return Batch(_one_hot(codes, values + 2), jnp.concatenate([blank[positions:], pattern]))

    plateau = positions * math.log(values) / length
    sample = _batched(one)
    return Task(name, length, values + 2, values + 1, "all", sample, _mean_cross_entropy, _any_wrong, plateau)


def _batched(one: Callable[[Array], Batch]) -> Callable[[Array, int], Batch]:
    def sample(key: Array, batch: int) -> Batch:
        return jax.vmap(one)(jax.random.split(check_key("key", key), check_positive_int("batch", batch)))

    return sample


def _marked(key: Array, length: int, low: Array | np.ndarray, high: Array | np.ndarray) -> tuple[Array, Array]:
    """Inputs ``[T, 2]`` and the marked numbers, one for each range from `low` to below `high`."""
    key_numbers, key_places = jax.random.split(key)
    numbers = jax.random.uniform(key_numbers, (length,))
    at = _integers(key_places, low.shape, low, high)
    return jnp.stack([numbers, jnp.zeros_like(numbers).at[at].set(1)], axis=-1), numbers[at]


def _padded(key: Array, inputs: Array, least: int) -> PyTree:
    """The inputs ``[T, I]``, padded from a random length of at least `least` on."""
    length = len(inputs)
    if least == length:
        return inputs
    return Sequence(inputs, mask=jnp.arange(length) < _integers(key, (), least, length + 1))


def _integers(key: Array, shape: tuple[int, ...], low: Bound, high: Bound) -> Array:
    """Uniform in [low, high), and the same whether 64-bit types are enabled or not."""
    return jax.random.randint(key, shape, low, high, jnp.int32)


def _one_hot(codes: Array, size: int) -> Array:
    return jax.nn.one_hot(codes, size, dtype=float)


def _squared_error(outputs: Array, target: Array, mask: Array | None) -> Array:
    return jnp.square(outputs[-1, 0] - target)


def _far_off(outputs: Array, target: Array, mask: Array | None) -> Array:
    # Negated so that NaN is far off.
    return jnp.asarray(~(_squared_error(outputs, target, mask) <= 0.04), float)


def _wrong_sign(outputs: Array, target: Array, mask: Array | None) -> Array:
    return jnp.asarray(~(outputs[-1, 0] * target > 0), float)


def _asked(targets: Array, mask: Array | None) -> Array:
    return (targets != 0) if mask is None else (targets != 0) & mask[:, None]


def _mean_of_asked(outputs: Array, targets: Array, mask: Array | None) -> Array:
    asked = _asked(targets, mask)  # nothing at all in a very short sequence
    return jnp.sum(jnp.square(outputs - targets), where=asked) / jnp.maximum(jnp.sum(asked, dtype=float), 1)


def _any_far_off(outputs: Array, targets: Array, mask: Array | None) -> Array:
    # Negated so that NaN is far off.
    return jnp.asarray(jnp.any(~(jnp.abs(outputs - targets) <= 0.5), where=_asked(targets, mask)), float)


def _cross_entropy(outputs: Array, target: Array, mask: Array | None) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs[-1], target)


def _wrong(outputs: Array, target: Array, mask: Array | None) -> Array:
    return jnp.asarray(_is_wrong(outputs[-1], target), float)


def _mean_cross_entropy(outputs: Array, targets: Array, mask: Array | None) -> Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, targets), where=mask)


def _share_wrong(outputs: Array, targets: Array, mask: Array | None) -> Array:
    return jnp.mean(_is_wrong(outputs, targets), dtype=float, where=mask)


def _cross_entropy_of_asked(outputs: Array, targets: Array, mask: Array | None) -> Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.maximum(targets, 0))
    return _mean_where(losses, targets >= 0, mask)


def _share_wrong_of_asked(outputs: Array, targets: Array, mask: Array | None) -> Array:
    return _mean_where(jnp.asarray(_is_wrong(outputs, targets), float), targets >= 0, mask)


def _mean_where(values: Array, asked: Array, mask: Array | None) -> Array:
    asked = asked if mask is None else asked & mask
    return jnp.sum(values, where=asked) / jnp.maximum(jnp.sum(asked, dtype=values.dtype), 1)


def _any_wrong(outputs: Array, targets: Array, mask: Array | None) -> Array:
    return jnp.asarray(jnp.any(_is_wrong(outputs, targets), where=mask), float)


def _is_wrong(logits: Array, target: Array) -> Array:
    # The largest of logits that hold a NaN would be some class, and right now and then.
    return (jnp.argmax(logits, axis=-1).astype(target.dtype) != target) | jnp.any(jnp.isnan(logits), axis=-1)


def _entropy(codes: np.ndarray) -> float:
    """In nats, of the empirical distribution."""
    shares = np.unique(codes, return_counts=True)[1] / len(codes)
    return float(-np.sum(shares * np.log(shares)))


def _check_shortest(shortest: int | None, least: int, length: int) -> int:
    """`shortest` within its range; T if it is None."""
    if shortest is None:
        return length
    if not least <= check_positive_int("shortest", shortest) <= length:
        raise ValueError(f"shortest: expected from {least} to length = {length}, got {shortest}")
    return int(shortest)


def _check_length(length: int, least: int) -> int:
    length = check_positive_int("length", length)
    if length < least:
        raise ValueError(f"length: expected at least {least}, got {length}")
    return length
