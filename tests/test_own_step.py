"""What a factory of the user's may return, and the file that ``bptt-jax new-step`` writes."""

import json
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bptt_jax.cli import diagnose, own_step
from bptt_jax.cli.main import main
from bptt_jax.cli.report import BadArgument

FACTORIES = """
from typing import Any, NamedTuple
import jax, jax.numpy as jnp, numpy as np
import bptt_jax as bptt

def step(w, h, x):
    return w * h + jax.tree.leaves(x)[0].sum()

ALL = {"step": step, "params": jnp.float32(0.9), "state0": jnp.zeros(3), "xs": np.ones((5, 7, 2), np.float32)}

class Named(NamedTuple):
    step: Any
    params: Any
    state0: Any
    xs: Any
    loss: Any
    key: Any

def named():
    return Named(*ALL.values(), lambda states: states[-1].sum(), jax.random.PRNGKey(0))
def padded():
    return ALL | {"xs": bptt.Sequence(ALL["xs"], mask=np.ones((5, 7), bool)), "key": jax.random.key(0)}
def keyed_text(size):
    return {k: ALL[k] for k in ("step", "params", "state0")} | {"key": jax.random.key(0)}
def with_args():
    return ALL | {"loss": lambda states, target: (states[-1, 0] - target) ** 2, "args": np.arange(5.0)}
def without_loss():
    return ALL
def bare():
    return ALL | {"params": None, "state0": (), "nonsense": 1}
def two():
    return step, None
def only():
    return {"step": step, "xs": ALL["xs"]}
def unknown():
    return ALL | {"targets": 1}
def loss_alone():
    return {k: v for k, v in ALL.items() if k != "xs"} | {"loss": lambda states: 0.0}
def unbatched():
    return ALL | {"xs": np.ones(7), "loss": lambda states: 0.0}
def two_lengths():
    return ALL | {"xs": (np.ones((5, 7)), np.ones((5, 8))), "loss": lambda states: 0.0}
def words():
    return ALL | {"xs": np.array([["a", "b"]])}
def few_args():
    return with_args() | {"args": np.ones(4)}
def shared_args():
    return with_args() | {"args": 1.0}
def loss_without_args():
    return with_args() | {"args": None}
def args_without_loss():
    return ALL | {"loss": lambda states: 0.0, "args": np.ones(5)}
def loss_is_a_number():
    return ALL | {"loss": 1.0}
def readout_and_xs():
    return ALL | {"readout": lambda h: h}
def seed():
    return ALL | {"key": 0}
def keys():
    return ALL | {"key": jax.random.split(jax.random.key(0), 2)}
"""


@pytest.fixture
def factories(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "factories_of_mine.py").write_text(FACTORIES)
    return str(tmp_path / "factories_of_mine.py")


def settings(step: str, **options) -> diagnose.Settings:
    none = dict.fromkeys(("checkpoint", "text", "embed", "alpha", "length", "loss"))
    others = {"cells": (), "gain": (1.0,), "hidden": 4, "batch": 3, "float64": False, "seed": 0}
    return diagnose.Settings(**none | others | {"step": step} | options)


def test_data_and_losses_by_name(factories) -> None:
    for name, targets in (("with_args", np.arange(3.0)), ("named", np.zeros(3))):
        data, (recurrence,) = diagnose.prepare(settings(f"{factories}:{name}"))
        assert (data.batch, recurrence.name, data.vocabulary) == (3, name, None)
        np.testing.assert_array_equal(data.targets, targets)
        assert data.found == (f"{name}: 3 of its 5 sequences of 7 steps, its own loss",)
        states = jnp.full((7, 3), 2.0)
        assert recurrence.loss((), states, targets[1]) == {"with_args": 1.0, "named": 6.0}[name]
    xs, keys = data.inputs  # of named, whose key is of the older kind
    assert (xs.shape, keys.shape, len(np.unique(jax.random.key_data(keys), axis=None))) == ((3, 7, 2), (3, 7), 42)
    assert jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    data, _ = diagnose.prepare(settings(f"{factories}:padded"))
    assert (data.inputs.xs[0].shape, data.inputs.xs[1].shape, data.inputs.mask.shape) == ((3, 7, 2), (3, 7), (3, 7))


def test_a_key_beside_text(factories) -> None:
    data, _ = diagnose.prepare(settings(f"{factories}:keyed_text", length=9))
    assert (data.inputs[0].shape[:2], data.inputs[1].shape) == ((3, 9), (3, 9))
    resolved = diagnose.resolved(settings(f"{factories}:keyed_text"), data)
    assert (resolved.length, resolved.loss) == (9, "last")
    with pytest.raises(BadArgument, match="keyed_text returns a key of its own; drop --cells"):
        diagnose.prepare(settings(f"{factories}:keyed_text", cells=("gru",)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two", "two must return (step, params, state0), or these and others of readout, xs, loss, args, key by name"),
        ("two", "got a tuple of 2"),
        ("only", "by name, got only step, xs"),
        ("unknown", "unknown returns targets: expected step, params, state0, readout, xs, loss, args, key alone"),
        ("loss_alone", "loss_alone returns loss, and no xs"),
        ("unbatched", "unbatched: xs: expected a batch of sequences, leaves [B, T, ...], got float"),
        ("two_lengths", "two_lengths: xs: expected a batch of sequences"),
        ("words", "words: xs, args: expected arrays, got TypeError"),
        ("few_args", "few_args: args: expected leaves [B, ...] with B = 5 as in xs, got float"),
        ("shared_args", "shared_args: args: expected leaves [B, ...]"),
        ("loss_without_args", "loss: expected a function loss(states), since no args are returned"),
        ("args_without_loss", "loss: expected a function loss(states, args)"),
        ("loss_is_a_number", "loss: expected a function loss(states), got float"),
        ("readout_and_xs", "readout_and_xs returns a readout, which is of text, and xs: expected one of them"),
        ("seed", "seed: key: expected a random key"),
        ("keys", "keys: key: expected one random key"),
    ],
)  # fmt: skip
def test_what_is_no_contract(factories, name, message) -> None:
    with pytest.raises(BadArgument) as refused:
        own_step.load(f"{factories}:{name}", 5)
    assert message in str(refused.value)


def test_data_of_its_own_stand_alone(factories, tmp_path, capsys) -> None:
    command = ["diagnose", "--step", f"{factories}:with_args", "--out", str(tmp_path)]
    for options in (["--length", "5"], ["--loss", "all"], ["--cells", "gru"], ["--embed", "4"]):
        assert main([*command, *options]) == 2
        assert f"with_args returns xs of its own; drop {options[0]}" in capsys.readouterr().err
    assert main([*command[:2], f"{factories}:without_loss", *command[3:]]) == 2
    assert "without_loss: BadArgument: its factory returns xs, and no loss on them" in capsys.readouterr().err


@pytest.fixture
def written(tmp_path, monkeypatch, capsys) -> Path:
    """The file that new-step writes, made small."""
    monkeypatch.chdir(tmp_path)
    assert main(["new-step", "mine.py", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"files": ["mine.py"]}
    text = (tmp_path / "mine.py").read_text()
    small = text.replace("UNITS, TRIALS, STEPS = 32, 16, 100", "UNITS, TRIALS, STEPS = 6, 2, 20")
    assert small != text
    assert "bptt-jax diagnose --step mine.py:make\n" in text
    (tmp_path / "mine.py").write_text(small)
    return tmp_path / "mine.py"


def test_a_file_that_is_there_is_left_alone(written, capsys) -> None:
    before = written.read_text()
    for name, message in (
        ("mine.py", "FILE: mine.py is there already, and is left as it is"),
        ("mine.txt", "FILE: expected a name that ends in .py, got mine.txt"),
        ("nowhere/mine.py", "FILE: nowhere/mine.py: No such file or directory"),
    ):
        assert main(["new-step", name]) == 2
        assert capsys.readouterr().err == f"bptt-jax new-step: {message}\n"
    assert written.read_text() == before
    assert main(["new-step", "other.py"]) == 0
    assert capsys.readouterr().out == "try bptt-jax diagnose --step other.py:make\nwrote other.py\n"


def test_what_is_written_works(written, capsys) -> None:
    assert main(["diagnose", "--step", "mine.py:make", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    made = runpy.run_path(str(written))["make"]()
    keys = jax.random.split(made["key"], (2, 20))
    losses = []
    for i, length in enumerate((10, 20)):  # the trials without their padding, one after the other
        states = [made["state0"]]
        for x, key in zip(made["xs"].xs[i, :length], keys[i], strict=False):
            states.append(made["step"](made["params"], states[-1], (x, key)))
        losses.append(made["loss"](jnp.stack(states[1:]), jax.tree.map(lambda a, i=i: a[i], made["args"])))
    assert told["recurrences"]["make"]["loss"]["mean"] == pytest.approx(float(np.mean(losses)), rel=1e-4)
    assert told["found"] == ["make: 2 of its 2 sequences of 20 steps, its own loss"]


@pytest.mark.exhaustive
def test_what_is_written_works_for_dynamics_and_on_text(written, capsys) -> None:
    few = ["--batch", "2", "--starts", "8", "--vectors", "2"]
    assert main(["dynamics", "--step", "mine.py:make", *few, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["recurrences"]["make"]["search"]["converged"] == 8
    assert main(["dynamics", "--step", "mine.py:make_on_text", *few, "--length", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["source"]["length"] == 20
    text = ["--step", "mine.py:make_on_text", "--batch", "2", "--length", "20"]
    assert main(["diagnose", *text, "--cells", "gru", "--hidden", "4", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["recurrences"]) == ["gru", "make_on_text"]
