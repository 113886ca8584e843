"""bptt-jax diagnose --weights: what is found in files of other libraries, on which data, and what is refused."""

import io
import json
import os
import pickle
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_command import SETTINGS
from test_keras_weights import keras, lenient, needs_keras  # noqa: F401  (a fixture)
from test_torch_weights import N, needs_torch, saved, torch

import bptt_jax as bptt
from bptt_jax.cli import diagnose, weights
from bptt_jax.cli.main import main
from bptt_jax.cli.report import BadArgument

T, B = 6, 3
RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((B, T, 3)).astype(np.float32)
MASK = np.arange(T) < np.asarray([[T], [2], [4]])
READOUT = {"out.weight": RNG.standard_normal((2, N)).astype(np.float32), "out.bias": np.ones(2, np.float32)}


def settings(file: Path, data: Path | None = None, **options: Any) -> diagnose.Settings:
    given = {"weights": str(file), "data": None if data is None else str(data), "cells": (), "gain": ()}
    return replace(SETTINGS, **{"hidden": None, "loss": None} | given | options)


def npz(folder: Path, name: str, **arrays: Any) -> Path:
    np.savez(folder / name, **arrays)
    return folder / name


def losses(data: diagnose.Data, found: diagnose.Recurrence) -> np.ndarray:
    """Of every sequence."""
    values = []
    for b in range(data.batch):
        xs, targets = jax.tree.map(lambda a, b=b: a[b], (data.inputs, data.targets))
        states = bptt.unroll(found.step, found.params, found.state0, xs)
        values.append(found.loss(found.readout_weights, states, targets))
    return np.asarray(values)


def outputs(state: dict[str, Any], b: int) -> np.ndarray:
    """Of the readout, at every real step of a sequence."""
    step, params, state0 = bptt.from_torch(state)
    h = np.asarray(weights.top(bptt.unroll(step, params, state0, INPUTS[b][MASK[b]])))
    return h @ READOUT["out.weight"].T + READOUT["out.bias"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = npz(tmp_path, "model.npz", **saved(3, layers=2, prefix="encoder.rnn."), **READOUT)
    data = npz(tmp_path, "own.npz", inputs=INPUTS, mask=MASK, targets=np.asarray([0, 1, 1]))
    assert main(["diagnose", "--weights", str(model), "--data", str(data), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "encoder.rnn. is gru, 2 layers, 3 inputs, 4 units, float32" in printed
    assert "3 sequences of 6 steps; cross-entropy at the last step, read out by out" in printed
    content = json.loads((tmp_path / "flow.json").read_text())
    assert list(content["recurrences"]) == ["encoder.rnn (gru)"]
    assert len(content["found"]) == 2
    expected = []
    for b, target in enumerate([0, 1, 1]):
        logits = outputs(saved(3, layers=2), b)[-1]
        expected.append(np.log(np.sum(np.exp(logits))) - logits[target])
    mean = content["recurrences"]["encoder.rnn (gru)"]["loss"]["mean"]
    assert mean == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("which", [None, "last"])
def test_losses_on_own_data(which: str | None, tmp_path: Path) -> None:
    """Over real steps alone, at the last real one, of targets at every step and at one."""
    model = npz(tmp_path, "model.npz", **saved(4), **READOUT)
    targets = RNG.standard_normal((B, T, 2)).astype(np.float32)
    data = npz(tmp_path, "own.npz", inputs=INPUTS, mask=MASK, targets=targets)
    made, (found,) = diagnose.prepare(settings(model, data, loss=which))
    expected = []
    for b in range(B):
        errors = np.mean((outputs(saved(4), b) - targets[b][MASK[b]]) ** 2, axis=1)
        expected.append(errors[-1] if which == "last" else errors.mean())
    np.testing.assert_allclose(losses(made, found), expected, rtol=2e-5)
    assert ("of all steps" in made.found[1]) == (which is None)


@pytest.mark.parametrize("kind", ["floats", "classes"])
def test_what_stands_in_the_padding_of_targets_does_not_matter(kind: str, tmp_path: Path) -> None:
    model = npz(tmp_path, "model.npz", **saved(4), **READOUT)
    usual: Any = RNG.standard_normal((B, T, 2)) if kind == "floats" else RNG.integers(2, size=(B, T))
    gradients = []
    for name, padding in (("zero", 0), ("odd", np.nan if kind == "floats" else -100)):
        targets = np.where(MASK.reshape(B, T, *[1] * (usual.ndim - 2)), usual, padding)
        data = npz(tmp_path, f"{name}.npz", inputs=INPUTS, mask=MASK, targets=targets)
        made, (found,) = diagnose.prepare(settings(model, data))
        xs, wanted = jax.tree.map(lambda a: a[1], (made.inputs, made.targets))
        loss = partial(found.loss, found.readout_weights)
        done = bptt.adjoints(found.step, found.params, found.state0, xs, loss, args=wanted)
        gradients.append((done.loss, done.params_grad))
    jax.tree.map(np.testing.assert_array_equal, *gradients)
    assert np.all(np.isfinite(gradients[1][0]))


def test_one_sequence_without_targets_and_resets(tmp_path: Path) -> None:
    model = npz(tmp_path, "model.npz", **saved(1))
    resets = np.arange(T) == 3
    data = npz(tmp_path, "own.npz", inputs=INPUTS[0], resets=resets)
    made, (found,) = diagnose.prepare(settings(model, data))
    assert "tanh is assumed" in made.found[0]
    assert "a random projection of the output at the last step" in made.found[1]
    later = npz(tmp_path, "later.npz", inputs=INPUTS[0][3:])
    again, (alone,) = diagnose.prepare(settings(model, later))
    np.testing.assert_allclose(losses(made, found), losses(again, alone), rtol=1e-6)


def test_a_projection_has_fewer_outputs_than_units() -> None:
    state = {"weight_ih_l0": np.ones((16, 3)), "weight_hh_l0": np.ones((16, 2)), "weight_hr_l0": np.ones((2, 4))}
    found = weights.recurrence(weights.Saved(state), "", float64=False)
    assert weights.describe(found) == "lstm with a projection, 3 inputs, 4 units, 2 outputs, float32"


def test_layers_of_two_dtypes() -> None:
    state = {k: a.astype(jnp.bfloat16) if "l1" in k else a for k, a in saved(3, layers=2).items()}
    found = weights.recurrence(weights.Saved(state), "", float64=False)
    assert weights.describe(found) == "gru, 2 layers, 3 inputs, 4 units, float32 and bfloat16"
    states = bptt.unroll(found.step, found.params, found.state0, INPUTS[0])
    whole = weights.recurrence(weights.Saved(saved(3, layers=2)), "", float64=False)
    expected = bptt.unroll(whole.step, whole.params, whole.state0, INPUTS[0])
    assert [str(a.dtype) for a in states] == ["float32", "bfloat16"]
    np.testing.assert_allclose(np.asarray(states[1], np.float32), expected[1], atol=0.02)


def test_one_layer_alone(tmp_path: Path) -> None:
    """Of a stack, and of bidirectional layers, of which only one at a time is a recurrence."""
    wide = npz(tmp_path, "wide.npz", inputs=RNG.standard_normal((B, T, N)).astype(np.float32))
    stack = saved(4, layers=2)
    upper = {name.replace("_l1", "_l0"): a for name, a in stack.items() if "_l1" in name}
    of_both = []
    for state, layer, said in ((stack, 1, "; layer 1 alone"), (upper, None, "4 units, float32")):
        made, (found,) = diagnose.prepare(settings(npz(tmp_path, "model.npz", **state), wide, layer=layer))
        assert made.found[0].endswith(said)
        of_both.append(losses(made, found))
    np.testing.assert_array_equal(*of_both)
    model = npz(tmp_path, "bidirectional.npz", **saved(4, layers=2, both=True))
    wider = npz(tmp_path, "wider.npz", inputs=RNG.standard_normal((B, T, 2 * N)).astype(np.float32))
    made, _ = diagnose.prepare(settings(model, wider, layer=1))
    assert "; layer 1 alone; of its two directions the one that runs forwards" in made.found[0]
    with pytest.raises(BadArgument, match="--layer: expected one of 0 to 1, since of bidirectional layers"):
        diagnose.prepare(settings(model, wider))
    with pytest.raises(BadArgument, match="--layer: expected one of 0 to 1, got 2"):
        diagnose.prepare(settings(model, wider, layer=2))


def test_layers_of_keras_by_their_names() -> None:
    """Folders are called by the class; what the user has called a layer is beside it."""
    arrays = {
        f"layers/{kind}/cell/vars/{k}": np.full((width, 16), 0.1 * n, np.float32)
        for n, kind in enumerate(("lstm", "lstm_1"))
        for k, width in enumerate((3, 4))
    }
    file = weights.Saved(arrays, {"layers/lstm": "lower", "layers/lstm_1": "upper"})
    found = weights.recurrence(file, "upper", float64=False)
    assert found.where == "layers/lstm_1/cell"
    assert weights.recurrence(file, "layers/lstm", float64=False).where == "layers/lstm/cell"
    np.testing.assert_array_equal(found.params.recurrent, np.float32(0.1))
    with pytest.raises(BadArgument, match=r"'layers/lstm/cell' \(lower\), 'layers/lstm_1/cell' \(upper\), got 'x'"):
        weights.recurrence(file, "x", float64=False)


def of_keras(folder: str, *settings: dict[str, Any], labels: dict[str, str], **beside: Any) -> weights.Saved:
    """An LSTM of 4 units and 3 inputs in a folder, in the layout of Keras 3."""
    arrays = {f"{folder}/vars/{k}": np.full(shape, 0.1) for k, shape in enumerate(((3, 16), (4, 16), (16,)))}
    return weights.Saved(
        arrays | beside, labels, {"class_name": "Functional", "config": {"layers": list(settings)}}
    )


def of_class(kind: str, **config: Any) -> dict[str, Any]:
    return {"class_name": kind, "config": config}


def test_keras_layers_that_are_no_lstm_that_runs_forwards() -> None:
    """What the settings say of the layer, or of what is around it, is not taken for what they do not say."""
    labels = {"layers/rnn": "outer", "layers/rnn/cell": "inner"}
    cell = of_class("LSTMCell", name="inner")
    backwards = of_class("RNN", name="outer", cell=cell, go_backwards=True)
    stack = of_class("StackedRNNCells", name="inner", cells=[of_class("LSTMCell", name="deep")])
    deep = {"layers/rnn": "outer", "layers/rnn/cell": "inner", "layers/rnn/cell/cells/lstm_cell": "deep"}
    within = of_class("RNN", name="outer", cell=stack, go_backwards=True)
    more = {"layers/rnn/cell/vars/3": np.ones(4)}
    for file, message in (
        (of_keras("layers/rnn/cell", backwards, labels=labels), "runs forwards, got go_backwards=True"),
        (of_keras("layers/rnn/cell/cells/lstm_cell", within, labels=deep), "runs forwards, got go_backwards=True"),
        (
            of_keras(
                "layers/rnn/cell", of_class("RNN", name="outer", cell=of_class("Own", name="inner")), labels=labels
            ),
            "layers/rnn/cell: expected SimpleRNN, GRU, LSTM or the cell of one, got Own",
        ),
        (of_keras("layers/rnn/cell", of_class("Own", name="outer"), labels=labels), "got Own"),
        (of_keras("layers/rnn/cell", labels=labels, **more), "alone, got layers/rnn/cell/vars/3 beside them"),
    ):
        with pytest.raises(BadArgument) as refused:
            weights.recurrence(file, "", float64=False)
        assert message in str(refused.value)
    plain = of_class("LSTM", name="outer")
    biased, unbiased = (
        of_keras("layers/rnn/cell", plain | {"config": plain["config"] | more}, labels=labels)
        for more in ({}, {"use_bias": False})
    )
    for file in (biased, unbiased):
        del file.arrays["layers/rnn/cell/vars/2"]
    with pytest.raises(BadArgument, match="expected a bias, since the settings have use_bias=True, got none"):
        weights.recurrence(biased, "", float64=False)
    assert not np.any(weights.recurrence(unbiased, "", float64=False).params.bias)
    forwards = of_keras("layers/rnn/cell", of_class("RNN", name="outer", cell=cell), labels=labels)
    assert weights.recurrence(forwards, "", float64=False).assumed == ""


def test_keras_layers_of_one_name_in_two_models() -> None:
    """Each has the settings of its own model; where that cannot be told, they are refused."""
    layer, activations = "layers/simple_rnn", ("relu", "tanh")
    kinds = [of_class("SimpleRNN", name="rnn", activation=activation, use_bias=False) for activation in activations]
    models = [of_class("Sequential", name=name, layers=[kind]) for name, kind in zip("ab", kinds, strict=True)]
    arrays, labels = {}, {}
    for folder, name in (("layers/sequential", "a"), ("layers/sequential_1", "b")):
        arrays |= {f"{folder}/{layer}/cell/vars/{k}": np.full((width, 4), 0.5) for k, width in enumerate((3, 4))}
        labels |= {folder: name, f"{folder}/{layer}": "rnn", f"{folder}/{layer}/cell": "simple_rnn_cell"}
    whole = weights.Saved(arrays, labels, of_class("Sequential", name="whole", layers=models))
    for name, activation in zip("ab", activations, strict=True):
        found = weights.recurrence(whole, name, float64=False)
        expected = np.full(4, dict(relu=1.5, tanh=np.tanh(1.5))[activation])
        np.testing.assert_allclose(
            found.step(found.params, found.state0, np.ones(3, np.float32)), expected, rtol=1e-6
        )
    flat = weights.Saved(arrays, labels, of_class("Sequential", name="whole", layers=kinds))
    with pytest.raises(BadArgument, match="expected settings of one layer, got 2 that differ"):
        weights.recurrence(flat, "a", float64=False)


def test_what_is_assumed_where_a_file_of_keras_has_no_settings() -> None:
    """Where a GRU without biases resets is not told by its shapes."""
    for shapes, more in (
        ([(3, 12), (4, 12)], True),
        ([(3, 12), (4, 12), (2, 12)], False),
        ([(3, 16), (4, 16)], False),
    ):
        arrays = {f"layers/a/cell/vars/{k}": np.ones(shape) for k, shape in enumerate(shapes)}
        said = weights.describe(weights.recurrence(weights.Saved(arrays), "", float64=False))
        assert (
            "Keras's defaults are assumed, since the file does not say: its activations, running forwards" in said
        )
        assert said.endswith(", the reset after the product") == more


def test_a_layer_with_an_activation_is_no_linear_readout() -> None:
    """It would be read out without it; a softmax is that of the cross-entropy."""
    arrays = {"layers/dense/vars/0": np.ones((4, 2)), "layers/dense/vars/1": np.ones(2)}
    for activation, taken in (("linear", True), ("softmax", True), ("tanh", False), ("sigmoid", False)):
        settings = of_class("Sequential", name="m", layers=[of_class("Dense", name="head", activation=activation)])
        saved_by_keras = weights.Saved(arrays, {"layers/dense": "head"}, settings)
        assert bool(weights.readouts(saved_by_keras, 4)) == taken


def test_on_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abracadabra " * 30)
    wide = saved(3) | {"weight_ih_l0": np.ones((3 * N, 6), np.float32)}
    for state, how, width in ((saved(3), "embedded at random", 3), (wide, "one-hot", 6)):
        data, (found,) = diagnose.prepare(
            settings(npz(tmp_path, "model.npz", **state), text=str(text), loss="last", batch=2)
        )
        assert how in data.found[1]
        assert data.inputs.shape == (2, 20, width)
        assert np.all(np.isfinite(losses(data, found)))


def test_double_precision(tmp_path: Path, x64: None) -> None:
    model = npz(tmp_path, "model.npz", **saved(4), **READOUT)
    data = npz(tmp_path, "own.npz", inputs=INPUTS, targets=np.zeros((B, 2)))
    made, (found,) = diagnose.prepare(settings(model, data, float64=True))
    dtypes = {a.dtype for a in jax.tree.leaves((found.params, found.state0, found.readout_weights, made.inputs))}
    assert dtypes == {np.dtype(np.float64)}


TWO = saved(3, prefix="a.") | saved(4, prefix="b.")
GOOD = {"inputs": INPUTS, "targets": np.zeros((B, 2))}


@pytest.mark.parametrize(
    ("state", "own", "options", "message"),
    [
        (TWO, GOOD, {}, "--prefix: expected that of one of 'a.', 'b.', got ''"),
        (TWO, GOOD, {"prefix": "c"}, "got 'c'"),
        ({"w": np.ones((2, 2))}, GOOD, {}, "--weights: expected a recurrent layer, as of PyTorch or Keras, got w"),
        ({"w": np.asarray([print], object)}, GOOD, {}, "cannot be read as .npz: ValueError: Object arrays"),
        (saved(3) | {"bias_ih_l0": np.ones(12, int)}, GOOD, {}, "bias_ih of layer 0: expected an array of floating"),
        (saved(3) | {"weight_ph_l0": np.ones((3, N))}, GOOD, {}, "got weight_ph_l0 beside them"),
        (saved(3) | {"bias_ih_l0": np.full(12, np.nan)}, GOOD, {"float64": True}, "infinities in params.bias of"),
        (saved(3), {"inputs": INPUTS[..., :2]}, {}, "--data: inputs: expected numbers [T, 3] or [B, T, 3]"),
        (saved(3), {"inputs": INPUTS.astype(str)}, {}, "--data: inputs: expected numbers"),
        (saved(3), {"xs": INPUTS}, {}, "expected arrays inputs and, if need be, mask, resets, targets, loss, got xs"),
        (saved(3), {"inputs": np.asarray([print], object)}, {}, "--data: "),
        (saved(3), {"inputs": INPUTS, "mask": np.ones((B, T))}, {}, "--data: mask: expected booleans [3, 6]"),
        (saved(3), {"inputs": INPUTS, "mask": np.outer([1, 0, 1], MASK[0]) > 0}, {}, "got none in that at 1"),
        (saved(3), {"inputs": INPUTS, "resets": MASK[:, 1:]}, {}, "--data: resets: expected booleans [3, 6]"),
        (saved(3), {"inputs": INPUTS, "loss": "mse"}, {}, "--data: targets: expected them beside a loss"),
        (saved(3), GOOD, {}, "--weights: expected a linear layer from 4 units to 2"),
        (saved(3) | READOUT, GOOD | {"loss": "hinge"}, {}, 'expected "mse", or of integer targets "cross-entropy"'),
        (saved(3) | READOUT, GOOD | {"loss": "cross-entropy"}, {}, "got 'cross-entropy' with float64"),
        (saved(3) | READOUT, GOOD | {"targets": np.zeros((B, 3))}, {}, "from 4 units to 3"),
        (saved(3) | READOUT, GOOD | {"targets": np.zeros((B, 5, 2))}, {}, "expected [B, O] or [B, T, O] with B = 3"),
        (saved(3) | READOUT, GOOD | {"targets": np.zeros((2, 2))}, {}, "expected numbers for each of 3 sequences"),
        (saved(3) | READOUT, GOOD | {"targets": np.asarray([0, 1, -1])}, {}, "expected classes from 0 on, got -1"),
        (saved(3) | READOUT, GOOD | {"targets": np.asarray([0, 1, 2])}, {}, "to at least 3"),
        (saved(3) | READOUT, GOOD, {"loss": "all"}, "--loss: expected last"),
        (saved(3) | READOUT, GOOD, {"readout": "head"}, "--readout: expected a linear layer"),
        (saved(3) | READOUT, {"inputs": INPUTS}, {"readout": "out"}, "--readout: expected targets in --data"),
        (saved(3) | READOUT | {"b.weight": READOUT["out.weight"]}, GOOD, {}, "--readout: expected a linear layer"),
    ],
)  # fmt: skip
def test_refusals(state: Any, own: Any, options: Any, message: str, tmp_path: Path) -> None:
    model, data = npz(tmp_path, "model.npz", **state), npz(tmp_path, "own.npz", **own)
    with pytest.raises(BadArgument) as refused:
        diagnose.prepare(settings(model, data, **options))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "a.npz", "--hidden", "3"], "the weights have settings of their own; drop --hidden"),
        (["--weights", "a.npz", "--readout", "out"], "drop --readout"),
        (["--weights", "a.npz", "--data", "b.npz", "--length", "3"], "drop --length"),
        (["--data", "b.npz"], "--data: expected --weights with it"),
        (["--weights", "a.txt"], "--weights: expected a file .safetensors, .npz"),
        (["--weights", "absent.npz"], "--weights: absent.npz: No such file or directory"),
    ],
)
def test_refused_options(arguments: list[str], message: str, capsys: Any, tmp_path: Path) -> None:
    assert main(["diagnose", *arguments, "--out", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- Files of other libraries.


def safetensors(content: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """As the format's specification has it: the length of a header in JSON, the header, the bytes."""
    header, data = {}, b""
    for name, (dtype, shape, part) in content.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_bfloat16_and_what_is_no_number_in_files(tmp_path: Path) -> None:
    """Two bytes of NumPy and HDF5 are read; of what is not read, a file says what it is only if it is needed."""
    half = {name: a.astype(jnp.bfloat16) for name, a in saved(4).items()}
    found = weights.recurrence(weights.read(str(npz(tmp_path, "half.npz", **half))), "", float64=False)
    assert weights.describe(found) == "lstm, 3 inputs, 4 units, bfloat16"
    np.testing.assert_array_equal(found.params.recurrent, half["weight_hh_l0"])
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "half.weights.h5", "w") as file:  # as Keras does
        for k, shape in enumerate(((3, 16), (4, 16), (16,))):
            data = np.full(shape, 0.1, jnp.bfloat16)
            file.create_dataset(f"layers/lstm/cell/vars/{k}", data=data).attrs["dtype"] = "bfloat16"
    of_h5 = weights.recurrence(weights.read(str(tmp_path / "half.weights.h5")), "", float64=False)
    np.testing.assert_array_equal(of_h5.params.recurrent, np.full((16, 4), 0.1, jnp.bfloat16))
    pytest.importorskip("safetensors")
    for name, needed in (("embedding", False), ("bias_ih_l0", True)):
        content = {k: ("F32", a.shape, a.tobytes()) for k, a in saved(3).items()}
        content[name] = "F8_E4M3", (12,), bytes(12)
        (tmp_path / "odd.safetensors").write_bytes(safetensors(content))
        read = weights.read(str(tmp_path / "odd.safetensors"))
        if needed:
            with pytest.raises(
                BadArgument, match=r"bias_ih of layer 0: expected an array of numbers, got .*F8_E4M3"
            ):
                weights.recurrence(read, "", float64=True)
        else:
            assert weights.recurrence(read, "", float64=False).kind == "gru"


def test_a_shard_is_read_with_the_others(tmp_path: Path) -> None:
    """Half of the layers, or all without their biases, would be another network."""
    state = saved(3, layers=2, prefix="rnn.")
    first = {name: a for name, a in state.items() if "weight" in name and "l0" in name}
    npz(tmp_path, "model-00001-of-00002.npz", **first)
    path = tmp_path / "model-00002-of-00002.npz"
    with pytest.raises(BadArgument, match=r"model-00002-of-00002\.npz: No such file"):
        weights.read(str(tmp_path / "model-00001-of-00002.npz"))
    npz(tmp_path, path.name, **{name: a for name, a in state.items() if name not in first})
    for part in tmp_path.iterdir():
        found = weights.recurrence(weights.read(str(part)), "", float64=False)
        for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(bptt.from_torch(state)[1]), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_shard_of_keras_is_read_with_those_of_its_index(tmp_path: Path) -> None:
    """Keras puts the bias of a layer into another one, if the first is full."""
    h5py = pytest.importorskip("h5py")
    shapes = ((3, 16), (4, 16), (16,))
    for shard, places in enumerate(((0, 1), (2,))):
        with h5py.File(tmp_path / f"model_0000{shard}.weights.h5", "w") as file:
            for k in places:
                file[f"layers/lstm/cell/vars/{k}"] = np.full(shapes[k], 0.1, np.float32)
            file["layers/lstm/cell/vars"].attrs["name"] = "lstm_cell"
    path = str(tmp_path / "model_00000.weights.h5")
    files = [f"model_0000{shard}.weights.h5" for shard in range(2)]
    (tmp_path / "model.weights.json").write_text(json.dumps({"weight_map": {"/layers/lstm/cell/vars": files}}))
    found = weights.recurrence(weights.read(path), "lstm_cell", float64=False)
    np.testing.assert_array_equal(found.params.bias, np.float32(0.1))
    (tmp_path / "model.weights.json").write_text("{")
    with pytest.raises(BadArgument, match=r"model\.weights\.json: cannot be read as \.json"):
        weights.read(path)


@needs_torch
def test_tensors_that_are_not_needed(tmp_path: Path) -> None:
    """In lists, too; and what NumPy has no array for is told only of the recurrence."""
    state = {name: torch.from_numpy(a) for name, a in saved(3).items()}
    for odd in (torch.eye(3).to_sparse(), torch.ones(5, 3).to(torch.float8_e4m3fn)):
        torch.save({"models": [state], "embedding": odd}, tmp_path / "model.pt")
        assert weights.recurrence(weights.read(str(tmp_path / "model.pt")), "", float64=True).where == "models.0."
        torch.save(state | {"bias_ih_l0": odd}, tmp_path / "model.pt")
        with pytest.raises(BadArgument, match="--weights: bias_ih of layer 0: expected a tensor of which NumPy"):
            weights.recurrence(weights.read(str(tmp_path / "model.pt")), "", float64=True)


class Hostile:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_pickle_is_read_from_npz(tmp_path: Path) -> None:
    written = tmp_path / "written"
    hostile = npz(tmp_path, "model.npz", weight_hh=np.asarray([Hostile(written)], object))
    with pytest.raises(BadArgument, match="Object arrays cannot be loaded"):
        weights.read(str(hostile))
    bare = io.BytesIO()
    np.save(bare, np.asarray([Hostile(written)], object), allow_pickle=True)
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Hostile(written)))
    with pytest.raises(BadArgument):
        weights.read(str(tmp_path / "bare.npz"))
    assert not written.exists()
    pickle.loads(pickle.dumps(Hostile(written)))  # it would have
    assert written.exists()


@needs_torch
def test_hostile_and_whole_models_of_torch(tmp_path: Path) -> None:
    written = tmp_path / "written"
    torch.save({"state_dict": saved(3), "extra": Hostile(written)}, tmp_path / "hostile.pt")
    torch.save(torch.nn.LSTM(2, 3), tmp_path / "module.pt")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Hostile(written)))
    for name in ("hostile.pt", "module.pt", "bare.pth"):
        with pytest.raises(BadArgument, match=r"holds more than weights.*save model.state_dict"):
            weights.read(str(tmp_path / name))
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(BadArgument, match=r"cannot be read as \.pt"):
        weights.read(str(tmp_path / "damaged.pt"))
    assert not written.exists()


@needs_torch
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_of_torch(suffix: str, dtype: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"encoder": torch.nn.LSTM(3, N, 2), "out": torch.nn.Linear(N, 2)})
    model = model.to(getattr(torch, dtype))
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save({"epoch": 3, "state_dict": model.state_dict()}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(model.state_dict(), path)
    found = weights.recurrence(weights.read(str(path)), "", float64=False)
    assert weights.describe(found) == f"lstm, 2 layers, 3 inputs, 4 units, {dtype}"
    _, params, _ = bptt.from_torch(model)
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    (read,) = weights.readouts(weights.read(str(path)), N).items()
    assert read[0].endswith("out")
    np.testing.assert_array_equal(read[1][0].astype(np.float32), model["out"].weight.detach().float().numpy())


@needs_torch
def test_both_directions_in_a_file(tmp_path: Path) -> None:
    module = torch.nn.GRU(3, N, bidirectional=True)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    found = weights.recurrence(weights.read(str(tmp_path / "model.pt")), "", float64=False)
    assert "of its two directions the one that runs forwards" in weights.describe(found)
    np.testing.assert_array_equal(found.params.recurrent, module.weight_hh_l0.detach().numpy())


@needs_keras
@pytest.mark.parametrize("suffix", [".keras", ".h5", ".weights.h5"])
def test_files_of_keras(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    keras.utils.set_random_seed(0)
    layers = keras.layers
    # The first is called as the cell inside of the LSTM, and comes second by the alphabet.
    cells = [layers.LSTMCell(5, name="lstm_cell"), layers.GRUCell(N, reset_after=False, name="first")]
    network = keras.Sequential(
        [
            keras.Input((T, 3)),
            layers.SimpleRNN(6, activation="relu", return_sequences=True),
            layers.Dropout(0.5),
            layers.LSTM(7, return_sequences=True),
            layers.Dense(2),
            layers.RNN(cells, name="stacked"),
            layers.Dense(1),
        ]
    )
    path = tmp_path / f"model{suffix}"
    (network.save_weights if suffix == ".weights.h5" else network.save)(path)
    saved_by_keras = weights.read(str(path))
    if suffix == ".weights.h5":  # which does not say what follows what, nor which activations
        found = weights.recurrence(saved_by_keras, "layers/lstm", float64=False)
        assert "its activations, running forwards" in weights.describe(found)
        expected = bptt.from_keras(network.layers[2])
    else:
        folders = weights._keras_places(saved_by_keras)
        assert len(folders) == 2
        (where,) = [folder for folder in folders if "stacked" in folder or "/cells/" in folder]
        found = weights.recurrence(saved_by_keras, where, float64=False)
        assert weights.describe(found) == "gru over lstm, 2 layers, 2 inputs, 5 and 4 units, float32"
        expected = bptt.from_keras(network.layers[4])
        (other,) = set(folders) - {where}
        lower = weights.recurrence(saved_by_keras, other, float64=False)
        steps = [bptt.from_keras(network.layers[k])[0] for k in (0, 2)]
        assert lower.step == weights.stacked([(step, None, None) for step in steps])[0]
        assert weights.describe(lower) == "lstm over rnn, 2 layers, 3 inputs, 6 and 7 units, float32"
        assert [w.shape for w, _ in weights.readouts(saved_by_keras, N).values()] == [(1, N)]
    assert found.step == expected[0]
    for a, b in zip(jax.tree.leaves(found[-2:]), jax.tree.leaves(expected[1:]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_links_of_hdf5_are_not_followed(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = np.ones((2, 2))
    with h5py.File(tmp_path / "model.h5", "w") as file:
        file["kernel"] = h5py.ExternalLink("other.h5", "secret")
    with pytest.raises(BadArgument, match="kernel is a link"):
        weights.read(str(tmp_path / "model.h5"))
    with h5py.File(tmp_path / "outside.h5", "w") as file:
        file.create_dataset("kernel", (2, 2), np.float32, external=[(str(tmp_path / "other.h5"), 0, 16)])
    with pytest.raises(BadArgument, match="kernel lies in another file"):
        weights.read(str(tmp_path / "outside.h5"))


def test_settings_of_keras_are_data_alone(tmp_path: Path) -> None:
    """A Lambda layer's code in an archive stays text."""
    h5py = pytest.importorskip("h5py")
    written, arrays = tmp_path / "written", io.BytesIO()
    with h5py.File(arrays, "w") as file:
        for k, a in enumerate((np.ones((3, 16)), np.ones((4, 16)), np.ones(16))):
            file[f"layers/lstm/cell/vars/{k}"] = a
    code = {"class_name": "__lambda__", "config": {"value": f"open({str(written)!r}, 'w')"}}
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Lambda", "config": {"function": code}}))
        archive.writestr("model.weights.h5", arrays.getvalue())
    found = weights.recurrence(weights.read(str(tmp_path / "model.keras")), "", float64=False)
    assert type(found.params) is bptt.cells.LSTMParams
    assert not written.exists()
    (tmp_path / "damaged.keras").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(BadArgument, match=r"cannot be read as \.keras"):
        weights.read(str(tmp_path / "damaged.keras"))


@pytest.mark.parametrize(
    "damage",
    [
        {"class_name": "StackedRNNCells", "config": {}},
        {"class_name": "Sequential", "config": {"layers": [3]}},
        {"class_name": "StackedRNNCells", "config": {"name": "a", "cells": None}},
    ],
)
def test_damaged_settings(damage: Any) -> None:
    folder = {f"layers/lstm/cell/vars/{k}": a for k, a in enumerate((np.ones((3, 16)), np.ones((4, 16))))}
    with pytest.raises(BadArgument, match="--weights: its settings are damaged"):
        weights.recurrence(weights.Saved(folder, {}, damage), "", float64=False)


@needs_torch
def test_their_own_loss(tmp_path: Path) -> None:
    """The loss of the command is PyTorch's, of packed batches."""
    torch.manual_seed(0)
    rnn, out = torch.nn.GRU(3, N), torch.nn.Linear(N, 2)
    torch.save(torch.nn.ModuleDict({"rnn": rnn, "out": out}).state_dict(), tmp_path / "model.pt")
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        torch.from_numpy(INPUTS), MASK.sum(axis=1), batch_first=True, enforce_sorted=False
    )
    targets = torch.tensor([0, 1, 0])
    with torch.no_grad():
        theirs = torch.nn.functional.cross_entropy(out(rnn(packed)[1][0]), targets, reduction="none")
    data = npz(tmp_path, "own.npz", inputs=INPUTS, mask=MASK, targets=targets.numpy())
    made, (found,) = diagnose.prepare(settings(tmp_path / "model.pt", data))
    np.testing.assert_allclose(losses(made, found), theirs.numpy(), rtol=1e-5)


def bomb(path: Path, member: str, start: bytes = b"") -> Path:
    """An archive of 5 MB that inflates to 5 GB, without a byte of that being made."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("config.json", "{}")
        archive.writestr(member, start)
        archive.infolist()[-1].file_size = 5 << 30
    return path


def test_what_inflates_without_end_is_refused(tmp_path: Path) -> None:
    for name, member in (("a.npz", "weight_hh_l0.npy"), ("a.keras", "model.weights.h5")):
        if name == "a.keras":
            pytest.importorskip("h5py")
        with pytest.raises(BadArgument, match=r"a\.(npz|keras): .*bytes inflate to 53687"):
            weights.read(str(bomb(tmp_path / name, member)))
    model = npz(tmp_path, "model.npz", **saved(1))
    with pytest.raises(BadArgument, match=r"--data: .*bytes inflate to 53687"):
        diagnose.prepare(settings(model, bomb(tmp_path / "data.npz", "inputs.npy")))


def test_hdf5_that_inflates_without_end_is_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "model.h5", "w") as file:
        file.create_dataset("kernel", (1 << 31,), np.float32, chunks=(1 << 20,))  # of which nothing is written
    with pytest.raises(BadArgument, match="bytes inflate to more than 4294967296"):
        weights.read(str(tmp_path / "model.h5"))


def test_what_is_no_array_is_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive:
        archive.writestr("readme.txt", "weights")
    with pytest.raises(BadArgument, match=r"readme\.txt is no array"):
        weights.read(str(tmp_path / "model.npz"))
    np.save(tmp_path / "array.npy", np.ones(2))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(BadArgument, match="File is not a zip file"):
        weights.read(str(tmp_path / "array.npz"))


def test_whole_models_with_a_number_are_no_shards(tmp_path: Path) -> None:
    for k in (1, 2):
        arrays = {f"weight_{what}_l0": np.full((2, 2), float(k), np.float32) for what in ("ih", "hh")}
        npz(tmp_path, f"fold-{k}-of-2.npz", **arrays)
        npz(tmp_path, f"model-0000{k}-of-00002.npz", **arrays)
    np.testing.assert_array_equal(weights.read(str(tmp_path / "fold-1-of-2.npz")).arrays["weight_hh_l0"], 1)
    with pytest.raises(BadArgument, match="expected another shard, got weight_hh_l0 once more"):
        weights.read(str(tmp_path / "model-00001-of-00002.npz"))


@pytest.mark.parametrize("files", ([["sub/x.h5"], "", [3], 3]))
def test_an_index_that_names_no_files(tmp_path: Path, files: object) -> None:
    (tmp_path / "model_00000.weights.h5").touch()
    (tmp_path / "model.weights.json").write_text(json.dumps({"weight_map": {"a": files}}))
    with pytest.raises(BadArgument, match=r"cannot be read as \.json"):
        weights.read(str(tmp_path / "model_00000.weights.h5"))
