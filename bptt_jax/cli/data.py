"""The user's own sequences, and the loss that is meant on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bptt_jax.cli.report import BadArgument, one_line
from bptt_jax.experiments.network import Readout
from bptt_jax.files import read_file, read_npz
from bptt_jax.leaves import along_leading
from bptt_jax.results import counted
from bptt_jax.step import Array, PyTree, Sequence, State

_MOST = 1 << 34  # bytes of a file
_NAMES = ("inputs", "mask", "resets", "targets", "loss")
_LOSSES = ("mse", "cross-entropy")


class OwnData(NamedTuple):
    """Sequences, the loss of one of them, and a sentence on both.

    Attributes:
      inputs: ``[B, T, I]``, or a `Sequence` of it.
      targets: with leaves ``[B, ...]``, as `loss` takes them of one sequence.
      loss: ``loss(readout, states, targets) -> scalar``.
      readout: its weights.
      said: what is measured, and what was assumed.
    """

    inputs: PyTree
    targets: PyTree
    loss: Callable[[PyTree, State, PyTree], Array]
    readout: Readout
    said: str


def own_data(
    name: str,
    *,
    batch: int,
    which: str | None,
    input_size: int,
    output: Callable[[State], Array],
    state0: State,
    readouts: dict[str, tuple[np.ndarray, np.ndarray]],
    readout: str | None,
    key: Array,
) -> OwnData:
    """What ``--data`` asks for.

    Args:
      name: of the file: ``inputs [T, I]`` or ``[B, T, I]``, `mask`, `resets`, `targets` and `loss`, all but the first
        optional.
      batch: sequences at most.
      which: "last" or "all"; by default what the shape of the targets says.
      input_size: I.
      output: reads the output ``[N]`` from a state.
      state0: of the recurrence.
      readouts: weights ``[O, N]`` and biases ``[O]`` that there are, by name, of which `readout` is one.
      key: of a readout at random, where there are no targets.

    Raises:
      BadArgument: the file cannot be read; shapes do not fit; there is no readout, or several and none is named.
    """
    arrays = _read(name)
    dtype, units = output(state0).dtype, output(state0).shape[0]
    inputs = arrays["inputs"]
    if inputs.ndim == 2:
        arrays = {k: a if k == "loss" else a[None] for k, a in arrays.items()}
        inputs = arrays["inputs"]
    if inputs.ndim != 3 or inputs.shape[2] != input_size or 0 in inputs.shape or inputs.dtype.kind not in "fiub":
        raise BadArgument(
            f"--data: inputs: expected numbers [T, {input_size}] or [B, T, {input_size}], as the weights have inputs, "
            f"got {inputs.dtype} {list(arrays['inputs'].shape)}"
        )
    total, steps = inputs.shape[:2]
    flags = {}
    for flag in ("mask", "resets"):
        if flag in arrays:
            if arrays[flag].shape != (total, steps) or arrays[flag].dtype != bool:
                got = f"{arrays[flag].dtype} {list(arrays[flag].shape)}"
                raise BadArgument(
                    f"--data: {flag}: expected booleans {[total, steps]}, as inputs has steps, got {got}"
                )
            flags[flag] = jnp.asarray(arrays[flag][:batch])
    if "mask" in flags and not np.all(real := np.any(flags["mask"], axis=1)):
        raise BadArgument(
            f"--data: mask: expected a step in every sequence, got none in that at {int(np.argmin(real))}"
        )
    count = min(batch, total)
    xs: Any = jnp.asarray(inputs[:batch]).astype(dtype)
    if flags:
        xs = jax.vmap(lambda x, f: Sequence(x, **f))(xs, flags)
    mask = flags.get("mask", jnp.ones((count, steps), bool))
    some = f"{count} of " if count < total else ""
    said = f"{name}: {some}{counted(total, 'sequence')} of {counted(steps, 'step')}"
    if "targets" not in arrays:
        if "loss" in arrays:
            raise BadArgument("--data: targets: expected them beside a loss, got none")
        if readout is not None:
            raise BadArgument("--readout: expected targets in --data, got none")
        weights = jax.random.normal(key, (1, units), dtype) / np.sqrt(units).astype(dtype)
        of = _loss(output, _projection, which or "last")
        where = "at the last step" if (which or "last") == "last" else "of all steps"
        said += f"; without targets, the loss is a random projection of the output {where}"
        return OwnData(xs, (jnp.zeros((count, steps)), mask), of, Readout(weights, jnp.zeros(1, dtype)), said)
    targets = arrays["targets"]
    if targets.shape[:1] != (total,) or targets.dtype.kind not in "fiub":
        got = f"{targets.dtype} {list(targets.shape)}"
        raise BadArgument(f"--data: targets: expected numbers for each of {counted(total, 'sequence')}, got {got}")
    kind = str(arrays["loss"]) if "loss" in arrays else ("cross-entropy" if targets.dtype.kind in "iu" else "mse")
    if kind not in _LOSSES or (kind == "cross-entropy" and targets.dtype.kind not in "iu"):
        raise BadArgument(
            f'--data: loss: expected "mse", or of integer targets "cross-entropy", got {kind!r} with {targets.dtype}'
        )
    classes = kind == "cross-entropy"
    every = targets.ndim > 1 and targets.shape[1] == steps
    if every and "mask" in flags:  # whatever stands in padding: NaN, or a class of -100
        targets = np.where(along_leading(arrays["mask"], targets), targets, targets.dtype.type(0))
    shape = targets.shape[2 if every else 1 :]
    if len(shape) > (0 if classes else 1):
        outputs = "" if classes else ", O"
        raise BadArgument(
            f"--data: targets: expected [B{outputs}] or [B, T{outputs}] with B = {total} and T = {steps}, got "
            f"{list(targets.shape)}"
        )
    if which == "all" and not every:
        raise BadArgument(f"--loss: expected last, since targets {list(targets.shape)} are of one step, got all")
    which = which or ("all" if every else "last")
    least = int(targets.max()) + 1 if classes else (shape[0] if shape else 1)
    if classes and targets.min() < 0:
        raise BadArgument(f"--data: targets: expected classes from 0 on, got {int(targets.min())}")
    called, (weights, bias) = _choose(readouts, readout, least, exactly=not classes, units=units)
    if not every:
        # Of the last real step: wherever it is, the states after it are equal to it.
        targets = np.repeat(targets[:, None], steps, axis=1)
    if not classes:
        targets = targets.reshape(total, steps, -1)
    wanted: Any = jnp.asarray(targets[:batch]) if classes else jnp.asarray(targets[:batch]).astype(dtype)
    of = _loss(output, _cross_entropy if classes else _mean_square, which)
    said += f"; {kind} {'at the last step' if which == 'last' else 'of all steps'}, read out by {called}"
    if "loss" not in arrays:
        said += f", since the targets are {targets.dtype}"
    return OwnData(xs, (wanted, mask), of, Readout(jnp.asarray(weights, dtype), jnp.asarray(bias, dtype)), said)


def _read(name: str) -> dict[str, np.ndarray]:
    try:
        content = read_file(Path(name), most=_MOST)
    except OSError as error:
        raise BadArgument(f"--data: {name}: {error.strerror}") from None
    try:
        arrays = read_npz(content)
    except Exception as error:  # whatever NumPy raises of a damaged file
        raise BadArgument(f"--data: {name}: cannot be read as .npz: {one_line(error)}") from None
    if "inputs" not in arrays or set(arrays) - set(_NAMES):
        raise BadArgument(
            f"--data: {name}: expected arrays inputs and, if need be, mask, resets, targets, loss, got "
            f"{', '.join(arrays) or 'none'}"
        )
    return arrays


def _choose(
    readouts: dict[str, tuple[np.ndarray, np.ndarray]],
    named: str | None,
    outputs: int,
    *,
    exactly: bool,
    units: int,
) -> tuple[str, tuple[np.ndarray, np.ndarray]]:
    least = "" if exactly else "at least "
    wanted = f"a linear layer from {counted(units, 'unit')} to {least}{outputs}"
    given = ", ".join(f"{k} to {len(w)}" for k, (w, _) in readouts.items()) or "none"
    fitting = {k: v for k, v in readouts.items() if (len(v[0]) == outputs if exactly else len(v[0]) >= outputs)}
    if named is not None:
        fitting = {k: v for k, v in fitting.items() if k == named}
    if len(fitting) != 1:
        option = "--weights" if named is None and not fitting else "--readout"
        raise BadArgument(f"{option}: expected {wanted}, for the loss on targets, got {named or given} of {given}")
    return next(iter(fitting.items()))


def _loss(
    output: Callable[[State], Array], each: Callable[[Array, Array], Array], which: str
) -> Callable[[PyTree, State, PyTree], Array]:
    """Of one sequence: at its last real step, or the mean over all real steps."""

    def loss(readout: Readout, states: State, targets: PyTree) -> Array:
        wanted, mask = targets

        def of_step(state: State, target: Array) -> Array:
            return each(readout.weights @ output(state) + readout.bias, target)

        if which == "last":
            last = jnp.max(jnp.where(mask, jnp.arange(len(mask)), 0))
            return of_step(jax.tree.map(lambda a: a[-1], states), wanted[last])
        losses = jax.vmap(of_step)(states, wanted)
        return jnp.sum(jnp.where(mask, losses, 0)) / jnp.maximum(jnp.sum(mask), 1).astype(losses.dtype)

    return loss


def _projection(outputs: Array, _: Array) -> Array:
    return outputs[0]


def _mean_square(outputs: Array, target: Array) -> Array:
    return jnp.mean(jnp.square(outputs - target))


def _cross_entropy(outputs: Array, target: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, target)
