"""The field's tasks: pure functions of a random key, each with its trivial loss and its criterion of success.

Where a paper and its released code differ, the docstring says which is followed. "Pascanu et al. 2013" is
arXiv:1211.5063, its code github.com/pascanur/trainingRNNs at 5065c63. That code draws a new length for every
batch; here shapes are static, and sequences of different lengths are padded to one (`adding` has them).
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bptt_jax.checks import check_choice, check_key, check_positive_int
from bptt_jax.experiments.text import corpus, english_text, windows
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
    least = check_positive_int("shortest", shortest)
    if not 2 <= least <= length:
        raise ValueError(f"shortest: expected from 2 to length = {length}, got {shortest}")

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


def characters(text: str | None = None, *, length: int = 100, split: Split = "train") -> Task:
    """Real text: the next character, at every step of a random window.

    The first nine tenths of the text are for training, the rest for validation; the vocabulary is the whole text's.
    The baseline is the entropy of the split's characters. Of no published criterion: solved when the loss is below
    the entropy of the next character given the current one, in the split itself; nothing that forgets can be.

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
        raise ValueError(f"text: expected more than {length} characters in the {split} split, got {len(codes)}")
    size, on_device = len(vocabulary), jnp.asarray(codes)
    pairs = codes[:-1].astype(np.int64) * size + codes[1:]

    def sample(key: Array, batch: int) -> Batch:
        inputs, targets = windows(key, on_device, batch, length)
        return Batch(_one_hot(inputs, size), targets)

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


def _cross_entropy(outputs: Array, target: Array, mask: Array | None) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs[-1], target)


def _wrong(outputs: Array, target: Array, mask: Array | None) -> Array:
    return jnp.asarray(_is_wrong(outputs[-1], target), float)


def _mean_cross_entropy(outputs: Array, targets: Array, mask: Array | None) -> Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, targets), where=mask)


def _share_wrong(outputs: Array, targets: Array, mask: Array | None) -> Array:
    return jnp.mean(_is_wrong(outputs, targets), dtype=float, where=mask)


def _any_wrong(outputs: Array, targets: Array, mask: Array | None) -> Array:
    return jnp.asarray(jnp.any(_is_wrong(outputs, targets), where=mask), float)


def _is_wrong(logits: Array, target: Array) -> Array:
    # The largest of logits that hold a NaN would be some class, and right now and then.
    return (jnp.argmax(logits, axis=-1).astype(target.dtype) != target) | jnp.any(jnp.isnan(logits), axis=-1)


def _entropy(codes: np.ndarray) -> float:
    """In nats, of the empirical distribution."""
    shares = np.unique(codes, return_counts=True)[1] / len(codes)
    return float(-np.sum(shares * np.log(shares)))


def _check_length(length: int, least: int) -> int:
    length = check_positive_int("length", length)
    if length < least:
        raise ValueError(f"length: expected at least {least}, got {length}")
    return length
