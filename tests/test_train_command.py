"""``bptt-jax train`` and what `diagnose` says of its networks; mostly in this process."""

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from slices import covering

import bptt_jax as bptt
from bptt_jax.cli import diagnose, train
from bptt_jax.cli.main import main
from bptt_jax.cli.report import BadArgument
from bptt_jax.experiments import tasks
from bptt_jax.experiments.network import NetworkParams
from bptt_jax.experiments.runfolder import reserved

SMALL = [
    "train",
    "adding",
    "--optimizer",
    "sgd",
    "--length",
    "4",
    "--cell",
    "gru",
    "--hidden",
    "6",
    "--chunk",
    "20",
]
SETTINGS = train.Settings(
    task="adding", length=4, text=None, cell="lstm", hidden=6, activation=None, gain=None, alpha=None, noise=None,
    init=None, chrono=False, optimizer="sgd", rate=0.1, clip=1.0, clip_adjoints=None, omega=0.0, batch=5,
    seeds=2, chunk=20, truncate=None, stateful=False, bias=None, remat=False, float64=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[str, str, Path]:
    """A run of 60 updates, the last 20 of them by a second command."""
    out = tmp_path_factory.mktemp("run")
    printed = []
    for updates in ("40", "60"):
        options = ["--seeds", "2", "--updates", updates, "--out", str(out)]
        command = [sys.executable, "-m", "bptt_jax", *SMALL, *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        printed.append(done)
    return printed[0].stdout, printed[1].stderr, out


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_writes_what_it_says(finished) -> None:
    printed, _, out = finished
    assert f"wrote {out / 'train.png'} and {out / 'train.json'}" in printed
    assert (out / "train.png").read_bytes().startswith(b"\x89PNG")
    names = [".lock", "checkpoints", "log.jsonl", "settings.json", "train.json", "train.png"]
    assert sorted(p.name for p in out.iterdir()) == names
    content = json.loads((out / "train.json").read_text())
    assert content["trivial_loss"] == pytest.approx(1 / 6)
    assert content["settings"]["hidden"] == 6
    log = [r for r in lines(out) if "event" not in r]
    for seed, s in enumerate(content["seeds"]):
        assert s["updates"] == 60
        assert s["validation_loss"] == log[-1]["validation_loss"][seed]
        assert s["clipped"] == pytest.approx(np.mean([r["clipped"][seed] for r in log]))


def test_a_second_command_goes_on(finished) -> None:
    _, errors, out = finished
    assert [r["updates"] for r in lines(out) if "event" not in r] == [20, 40, 60]
    assert "60 of 60 updates: loss" in errors
    assert "20 of 60" not in errors


def test_a_finished_run_as_json(finished, capsys) -> None:
    _, _, out = finished
    before = sorted(p.name for p in out.iterdir())
    command = [*SMALL, "--seeds", "2", "--updates", "60", "--out", str(out)]
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    numbers = json.loads(printed.out, parse_constant=pytest.fail)
    assert numbers.pop("files") == [str(out / "train.png"), str(out / "train.json")]
    assert numbers == json.loads((out / "train.json").read_text())
    assert printed.err == ""
    assert sorted(p.name for p in out.iterdir()) == before


def test_interrupted_before_anything_is_kept(tmp_path, monkeypatch, capsys) -> None:
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    assert main([*SMALL, "--out", str(tmp_path / "new")]) == 130
    assert f"no checkpoint is in {tmp_path / 'new'} yet; the same command begins anew" in capsys.readouterr().err


def test_other_settings_are_refused(finished, capsys, monkeypatch) -> None:
    """Before any pilot."""
    _, _, out = finished
    monkeypatch.setattr(train, "foretell", pytest.fail)
    before = (out / "log.jsonl").read_bytes()
    assert main([*SMALL, "--seeds", "2", "--rate", "0.5", "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "holds a run of other settings (arguments.rate: 0.001 there, 0.5 here)" in message
    assert (out / "log.jsonl").read_bytes() == before


class Told(NamedTuple):
    """As `train.Foretold`."""

    statement: str

    def to_dict(self):
        return {"statement": self.statement, "updates": 3}


def test_what_was_foretold_is_kept_and_told_again(finished, tmp_path, capsys, monkeypatch) -> None:
    def stopped(*_):
        raise KeyboardInterrupt

    run, command = tmp_path / "run", [*SMALL, "--seeds", "2", "--updates", "60", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(train, "foretell", lambda *_: Told("lag 4: \x1b open"))
    with monkeypatch.context() as patch:
        patch.setattr(train, "run", stopped)
        assert main(command) == 130  # the pilot is over, and nothing is begun
    assert "a pilot of 3 updates says: lag 4: \\x1b open\n" in capsys.readouterr().err
    kept = json.loads((run / "prognosis.json").read_text())
    shutil.copytree(finished[2], run, dirs_exist_ok=True)
    monkeypatch.setattr(train, "foretell", pytest.fail)  # the run is there: no second pilot
    for options, shown in (([], True), (["--quiet"], False), (["--json"], True)):
        assert main([*command, *options]) == 0
        printed = capsys.readouterr()
        assert ("a pilot of 3 updates said: lag 4: \\x1b open\n" in printed.err) is shown
        assert ("foretold lag 4: \\x1b open\n" in printed.out) is (options == [])
    assert json.loads(printed.out)["prognosis"] == kept == Told("lag 4: \x1b open").to_dict()
    assert main([*command, "--rate", "0.5"]) == 2
    (run / "prognosis.json").write_text("{}")
    assert main(command) == 2
    assert "expected a prognosis, got {}" in capsys.readouterr().err


def test_a_second_process_is_refused_before_its_pilot(tmp_path, capsys, monkeypatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "prognosis.json").write_text("of the other")
    monkeypatch.setattr(train, "foretell", pytest.fail)
    with reserved(run):
        assert main([*SMALL, "--updates", "60", "--out", str(run)]) == 2
    assert "another process is training there" in capsys.readouterr().err
    assert (run / "prognosis.json").read_text() == "of the other"


def test_diagnose_sees_the_trained_network(finished, tmp_path, capsys, monkeypatch) -> None:
    _, _, out = finished
    asked_about, noise_of = [], diagnose.gradient_noise

    def watched(*arguments, **options):
        asked_about.append(options.get("batch"))
        return noise_of(*arguments, **options)

    monkeypatch.setattr(diagnose, "gradient_noise", watched)
    before = sorted(out.rglob("*"))
    assert main(["diagnose", "--checkpoint", str(out), "--batch", "3", "--html", "--out", str(tmp_path)]) == 0
    for words in (capsys.readouterr().out, (tmp_path / "flow.html").read_text()):
        assert words.count("(of 3 sequences)") == 4
    assert sorted(out.rglob("*")) == before
    assert asked_about == [20] * 4  # the run's, not as many sequences as are looked at
    content = json.loads((tmp_path / "flow.json").read_text())
    names = [f"gru, {what}, seed {i}" for i in (0, 1) for what in ("untrained", "60 updates")]
    assert list(content["recurrences"]) == names
    settings = train.read(out)
    job = train.prepare(settings)
    first, now = train.states(job, settings, out)
    data = jax.jit(job.network.task.sample, static_argnums=1)(jax.random.key(0), 3)

    @jax.jit
    @partial(jax.vmap, in_axes=(None, 0, 0))
    def loss_and_gradient(params, inputs, target):
        loss, gradient = jax.value_and_grad(job.network.loss)(params, inputs, target)
        return loss, gradient.cell

    for i in (0, 1):
        for name, states in (("untrained", first), ("60 updates", now)):
            params = jax.tree.map(lambda a, i=i: a[i], states.params)
            losses, each = loss_and_gradient(params, *data)
            measured = content["recurrences"][f"gru, {name}, seed {i}"]
            assert measured["loss"]["mean"] == pytest.approx(float(jnp.mean(losses)), rel=1e-5)
            each = np.concatenate([np.asarray(a, np.float64).reshape(3, -1) for a in jax.tree.leaves(each)], axis=1)
            noise, power = each.var(axis=0, ddof=1).sum(), np.square(each.mean(axis=0)).sum()
            found = content["noise"][f"gru, {name}, seed {i}"]
            assert (found["batch"], found["sequences"], found["longest"]) == (20, 3, 3)
            np.testing.assert_allclose(float(found["noise_scale"]), noise / max(power - noise / 3, 0), rtol=1e-3)
    np.testing.assert_array_equal(now.updates, 60)
    assert np.any(now.params.cell.recurrent != first.params.cell.recurrent)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> Path:
    """A run of a leaky network with noise from keys, on trials of different lengths; its gain is small: it forgets."""
    out = tmp_path_factory.mktemp("noisy")
    cell = ["--cell", "leaky_rnn", "--hidden", "4", "--alpha", "0.5", "--noise", "0.1", "--gain", "0.2"]
    few = ["--optimizer", "sgd", "--updates", "2", "--chunk", "2", "--batch", "2", "--length", "20"]
    assert main(["train", "flipflop", *cell, *few, "--out", str(out)]) == 0
    return out


def test_dynamics_of_a_trained_network_are_without_its_noise(noisy, tmp_path, capsys) -> None:
    few = ["--batch", "2", "--starts", "8", "--vectors", "2"]
    assert main(["dynamics", "--checkpoint", str(noisy), *few, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    (name,) = json.loads((tmp_path / "dynamics.json").read_text())["recurrences"]
    assert name == "leaky_rnn, 2 updates"
    assert "1 stable, from 8 of 8 starts" in printed.out
    assert "measuring leaky_rnn, 2 updates (1 of 1)" in printed.err


def test_a_noisy_leaky_network_on_trials_of_different_lengths(noisy) -> None:
    """Keys and masks come through training, checkpoint and diagnosis."""
    settings = train.read(noisy)
    job = train.prepare(settings)
    _, now = train.states(job, settings, noisy)
    params = jax.tree.map(lambda a: a[0], now.params)
    batch = job.network.task.sample(jax.random.key(0), 3)
    xs, keys = batch.inputs.xs
    assert (xs.shape, keys.shape, batch.inputs.mask.shape) == ((3, 20, 3), (3, 20), (3, 20))
    losses = jax.jit(jax.vmap(job.network.loss, (None, 0, 0)))
    expected = losses(params, *batch)
    assert np.all(np.isfinite(expected))
    assert not np.allclose(expected, losses(params, *batch._replace(inputs=replace(batch.inputs, xs=xs))))
    looked_at = diagnose.Settings(
        checkpoint=str(noisy), text=None, embed=None, cells=("leaky_rnn",), gain=(), alpha=0.5, hidden=4, length=20,
        batch=3, loss="flipflop", step=None, float64=False, seed=0,
    )  # fmt: skip
    data, (untrained, trained) = diagnose.prepare(looked_at)
    assert (untrained.gated, trained.name) == (False, "leaky_rnn, 2 updates")
    assert diagnose.title(looked_at, data) == "3 sequences of the task flipflop, T = 20"
    inputs, targets = data.part(1, 1)
    one = [jax.tree.map(lambda a: a[0], part) for part in (inputs, targets)]
    states = bptt.unroll(trained.step, trained.params, trained.state0, one[0])
    np.testing.assert_allclose(trained.loss(trained.readout_weights, states, one[1]), expected[1], rtol=1e-5)


def test_what_is_stateful_reaches_the_loop(tmp_path, monkeypatch) -> None:
    told = {}
    monkeypatch.setattr(train.loop, "train", lambda *given, **options: told.update(options))
    for options, expected in (
        ({"truncate": 7}, {"window": 7}),
        ({"truncate": "auto"}, {"window": "auto"}),
        ({"truncate": "auto", "bias": 0.2}, {"window": "auto", "bias": 0.2}),
        ({"stateful": False, "truncate": 7}, {}),
    ):
        settings = replace(SETTINGS, task="delayed-copy", **{"stateful": True} | options)
        told.clear()
        train.run(train.prepare(settings), settings, 1, tmp_path, print)
        assert {k: v for k, v in told.items() if k in ("window", "bias")} == expected


@pytest.mark.exhaustive
def test_a_stateful_run_its_log_and_its_checkpoint(tmp_path, capsys) -> None:
    small = [
        "--cell",
        "rnn",
        "--hidden",
        "3",
        "--optimizer",
        "sgd",
        "--length",
        "2",
        "--batch",
        "2",
        "--chunk",
        "1",
    ]
    auto = ["--stateful", "--truncate", "auto", "--bias", "0.8", "--updates", "2", "--out", str(tmp_path)]
    assert main(["train", "delayed-copy", *small, *auto]) == 0
    windows = [r["window"] for r in lines(tmp_path)]
    assert all(1 <= w <= 10 for w in windows)
    assert f"window {windows[-1]}" in capsys.readouterr().err
    arguments = json.loads((tmp_path / "settings.json").read_text())["arguments"]
    assert (arguments["truncate"], arguments["stateful"], arguments["bias"]) == ("auto", True, 0.8)
    settings = train.read(tmp_path)
    _, now = train.states(train.prepare(settings), settings, tmp_path)
    assert int(now.carried.position[0]) == sum(windows)
    looked_at = diagnose.Settings(
        checkpoint=str(tmp_path), text=None, embed=None, cells=("rnn",), gain=(), alpha=None, hidden=3, length=2,
        batch=2, loss="delayed-copy", step=None, float64=False, seed=0,
    )  # fmt: skip
    assert [r.name for r in diagnose.prepare(looked_at)[1]] == ["rnn, untrained", "rnn, 2 updates"]


def test_a_truncated_network_is_cut() -> None:
    job = train.prepare(replace(SETTINGS, truncate=2, cell="rnn"))
    params = job.network.init(jax.random.key(0))
    (inputs,), (target,) = job.network.task.sample(jax.random.key(1), 1)

    def read(h):
        return jnp.sum(job.network.unroll(params, (h, jnp.int32(0)), inputs)[0][-1])

    assert np.all(jax.grad(read)(jnp.ones(6)) == 0)
    bare = train.prepare(replace(SETTINGS, cell="rnn")).network
    np.testing.assert_allclose(job.network.loss(params, inputs, target), bare.loss(params, inputs, target))


def test_quantiles_are_of_what_is_not_padding() -> None:
    values = np.asarray([[1.0, np.nan, np.nan], [3.0, 2.0, np.nan]])
    np.testing.assert_array_equal(diagnose._quantiles(values, [0.0, 1.0], axis=0), [[1, 2, np.nan], [3, 2, np.nan]])


@pytest.mark.exhaustive
def test_clipped_adjoints_train_and_are_diagnosed_without(tmp_path) -> None:
    run = [*SMALL, "--clip-adjoints", "0.1", "--remat", "--updates", "20", "--out", str(tmp_path)]
    assert main(run) == 0
    assert main(["diagnose", "--checkpoint", str(tmp_path), "--batch", "2", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "flow.json").read_text())["recurrences"]
    assert set(content) == {"gru, untrained", "gru, 20 updates"}
    for numbers in content.values():  # Jacobians of a step that cannot be differentiated forwards would be none
        assert math.isfinite(numbers["spectral_norm"]["mean"])


def test_settings_reach_the_cell_and_the_optimizer() -> None:
    params = train.prepare(replace(SETTINGS, chrono=True, init="identity")).network.init(jax.random.key(0))
    forget, i = params.cell.bias.reshape(4, 6)[1], params.cell.bias.reshape(4, 6)[0]
    np.testing.assert_array_equal(forget, -i)
    assert np.all((np.exp(forget) >= 1) & (np.exp(forget) <= 3))
    np.testing.assert_array_equal(params.cell.recurrent, np.tile(np.eye(6), (4, 1)))
    janet = train.prepare(replace(SETTINGS, cell="janet", length=9, chrono=True)).network.init(jax.random.key(0))
    kept_for = np.exp(janet.cell.bias[:6])
    assert np.all((kept_for >= 1) & (kept_for <= 8))
    assert np.ptp(kept_for) > 2
    rnn = train.prepare(replace(SETTINGS, cell="rnn", activation="relu", gain=0.5, init="identity")).network
    weights = rnn.init(jax.random.key(0)).cell
    np.testing.assert_array_equal(weights.recurrent, 0.5 * np.eye(6))
    assert np.all(rnn.cell.step(weights, -jnp.ones(6), jnp.zeros(2)) == 0)
    assert train.prepare(replace(SETTINGS, clip=0.0)).penalty is None

    def first_update(**options):
        job = train.prepare(replace(SETTINGS, **options))
        params = {"w": jnp.full(4, 10.0)}
        updates, state = jax.jit(lambda p: job.optimizer.update(p, job.optimizer.init(p), p))(params)
        return float(optax.tree.norm(updates)), len(bptt.remedies.clip_records(state))

    assert first_update(clip=2.0) == (pytest.approx(0.2), 1)
    assert first_update(clip=0.0) == (pytest.approx(2.0), 0)
    with jax.numpy_dtype_promotion("standard"):  # optax's adam wants it
        assert first_update(clip=0.0, optimizer="adam")[0] == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_omega_is_the_codes_of_the_bare_step(x64, clip) -> None:
    job = train.prepare(replace(SETTINGS, cell="rnn", omega=4.0, clip_adjoints=clip))
    bare = train.prepare(replace(SETTINGS, cell="rnn")).network
    net, params = job.network, job.network.init(jax.random.key(0))
    data = net.task.sample(jax.random.key(1), 3)

    def terms(inputs, target):
        def loss(states):
            return bare.loss_of_states(states, bare.loss_args(params, inputs, target))

        return bptt.remedies.omega_terms(bare.cell.step, params.cell, bare.cell.initial_state(), inputs, loss)

    expected = 4 * bptt.remedies.omega_penalty(jax.vmap(terms)(*data), version="code")
    assert job.penalty is not None
    assert float(job.penalty(NetworkParams(*params), data)) == pytest.approx(float(expected))


@pytest.mark.parametrize("name", train.LENGTHS)
def test_every_task_is_there(name) -> None:
    task, validation = train.task_of(name, train.LENGTHS[name], "a b " * 300 + "c")
    assert isinstance(task, tasks.Task)
    assert name.replace("-", "_").startswith(task.name)
    if validation is not None:
        assert validation.baseline != task.baseline  # another split
    else:
        assert name not in ("characters", "digits")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "^--length: expected at least 2, got 1"),
        ({"task": "digits"}, "--length: the digits have 64 pixels"),
        ({"task": "characters", "text": "/nowhere.txt"}, "--text: /nowhere.txt: No such file"),
        ({"text": "novel.txt"}, "--text: the task adding reads none"),
        ({"gain": 2.0}, "--gain, --activation: they are of rnn and leaky_rnn, not of lstm"),
        ({"alpha": 0.5}, "--alpha, --noise: they are of leaky_rnn, not of lstm"),
        ({"cell": "rnn", "noise": 0.0}, "--alpha, --noise: they are of leaky_rnn, not of rnn"),
        ({"cell": "leaky_rnn", "chrono": True}, "--chrono: leaky_rnn has no gates"),
        ({"cell": "rnn", "chrono": True}, "--chrono: rnn has no gates"),
        (
            {"cell": "mamba", "chrono": True},
            "--chrono: mamba has no gates, or draws their biases in a way of its own",
        ),
        ({"cell": "janet", "length": 2, "chrono": True}, "^--length, with --chrono: expected at least 3, got 2"),
        (
            {"cell": "mamba", "init": "identity"},
            "--init: mamba draws its recurrent weights, if it has any, in a way",
        ),
        ({"cell": "indrnn", "init": "orthogonal"}, "--init: indrnn: .* at least a 2D shape"),
        ({"cell": "gla", "hidden": 3}, "^--hidden: expected a multiple of heads, 2, got 3"),
        ({"cell": "transformer"}, "--cell: expected rnn, "),
        ({"stateful": True}, "--stateful: expected --truncate K or --truncate auto with it, got neither"),
        ({"truncate": "auto"}, "--truncate auto: expected --stateful with it"),
        ({"truncate": 5, "bias": 0.1}, "--bias: expected --truncate auto with it, got 5"),
        ({"bias": 0.1}, "--bias: expected --truncate auto with it, got None"),
        (
            {"stateful": True, "truncate": 5},
            "--stateful: expected a task that is a stream, characters or delayed-copy, got adding",
        ),
        (
            {"task": "delayed-copy", "stateful": True, "truncate": 5, "omega": 1.0},
            "--omega: its terms are of sequences from the initial state; drop --stateful",
        ),
        ({"length": 2, "chrono": True}, "^--length, with --chrono: expected at least 3, got 2"),
        ({"hidden": 10**9}, "^--hidden: expected recurrent weights that a memory can hold, got 1000000000 units"),
    ],
)
def test_bad_settings(options, message) -> None:
    with pytest.raises(BadArgument, match=message):
        train.prepare(replace(SETTINGS, **options))


@pytest.mark.parametrize("name", ["lru", "slstm", "clockwork", "gated_deltanet"])
def test_cells_of_the_atlas(name) -> None:
    """Complex, of several leaves, with a counter, with matrices: with a loss, through the clip on its way back too."""
    job = train.prepare(replace(SETTINGS, cell=name, hidden=4, clip_adjoints=1.0))
    data = job.network.task.sample(jax.random.key(1), 1)
    inputs, target = jax.tree.map(lambda a: a[0], data)
    loss = jax.eval_shape(job.network.loss, job.network.init(jax.random.key(0)), inputs, target)
    assert loss.shape == ()


def test_which_cells_have_gates() -> None:
    for name, expected in {
        "rnn": False,
        "minimal_rnn": True,
        "gated_antisymmetric": True,
        "nas": True,
        "lru": None,
    }.items():
        assert train.has_gates(name) is expected


def test_what_no_memory_holds_is_told_in_one_line(tmp_path, capsys, monkeypatch) -> None:
    def run(*_) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: Error dispatching: Out of memory allocating 4 bytes.\nand more")

    monkeypatch.setattr(train, "run", run)
    assert main(["train", "adding", "--hidden", "2", "--updates", "1", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "bptt-jax train: Out of memory allocating 4 bytes.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "adding", "--rate", "0"], "expected a positive number"),
        (["train", "adding", "--hidden", "x"], "--hidden: expected an integer, got 'x'"),
        (["train", "adding", "--clip", "x"], "--clip: expected a number, got 'x'"),
        (["train", "nothing"], "invalid choice: 'nothing'"),
        (["train", "characters", "--truncate", "none"], "--truncate: expected an integer, got 'none'"),
        (["train", "adding", "--clip", "-1"], "expected a positive number"),
        (["diagnose", "--checkpoint", "{}"], "no training run is there"),
        (["diagnose", "--checkpoint", "{}", "--cells", "gru", "--loss", "all"], "drop --cells, --loss"),
    ],
)
def test_bad_arguments_one_line(arguments, message, tmp_path, capsys) -> None:
    try:
        status = main([a.format(tmp_path) for a in arguments])
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_interrupted_goes_on(tmp_path) -> None:
    command = [sys.executable, "-m", "bptt_jax", *SMALL, "--updates", "100000", "--rate", "1e-9"]
    with subprocess.Popen([*command, "--out", str(tmp_path)], stderr=subprocess.PIPE, text=True) as process:
        try:
            while not list((tmp_path / "checkpoints").glob("[0-9]*")):
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    kept = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert errors.splitlines()[-1] == (
        f"bptt-jax train: interrupted; {tmp_path} holds the checkpoint of update {kept} of 100000; the same command "
        "resumes from the last checkpoint"
    )
    assert "Traceback" not in errors
    done = lines(tmp_path)[-1]["updates"]
    assert main([*command[3:], "--updates", str(done), "--out", str(tmp_path)]) == 0
    assert lines(tmp_path)[-1]["updates"] == done


def test_a_pilot_tells_what_is_to_be_expected() -> None:
    settings = replace(SETTINGS, cell="gru", length=100)
    job, seen = train.prepare(settings), []
    foretold = train.foretell(job, settings, 1000, seen.append)
    assert [line["updates"] for line in seen][-1] == foretold.updates == 360
    assert foretold.found.lag.shape == (settings.seeds,)
    assert foretold.found.length == 100
    assert foretold.found.verdict == "unlikely"  # an untrained gru forgets in some twenty steps
    np.testing.assert_allclose(foretold.found.loss, np.multiply(seen[-1]["validation_loss"], 6), rtol=0.3)
    (with_chrono,) = foretold.remedies.values()  # gates that begin orthogonal reach no further
    assert with_chrono > 5 * foretold.found.horizon[0]
    assert foretold.statement == f"{foretold.found.statement}; it would begin at {with_chrono:.0f} with --chrono"
    assert json.loads(json.dumps(foretold.to_dict()))["updates"] == 360


@pytest.mark.parametrize(
    ("changed", "updates"),
    [({"length": 100}, 999), ({"length": 99}, 1000), ({"task": "flipflop", "length": 100}, 1000)],
)
def test_what_is_over_soon_or_has_no_one_lag_is_not_foretold(changed, updates) -> None:
    settings = replace(SETTINGS, **changed)
    assert train.foretell(train.prepare(settings), settings, updates, pytest.fail) is None


NOISY = {"task": "copy-memory", "cell": "leaky_rnn", "noise": 0.1, "seeds": 1}
REMEDIED = {"truncate": 20, "chrono": True, "omega": 1.0, "clip_adjoints": 1.0, "seeds": 1}


@pytest.mark.parametrize("changed", covering([NOISY, REMEDIED], REMEDIED), ids=str)
def test_the_pilot_is_of_the_same_network(changed, monkeypatch) -> None:
    """What a run is given is given to its pilot: for all of it the parameters fit."""
    monkeypatch.setattr(train, "PILOT_SHARE", 0.001)
    settings = replace(SETTINGS, length=100, **changed)
    foretold = train.foretell(train.prepare(settings), settings, 1000)
    assert foretold.updates == 1
    assert np.isfinite(foretold.found.lag).all()
    if settings.truncate:
        assert (foretold.found.horizon <= settings.truncate).all()
    if settings.chrono or settings.cell != "lstm":
        assert "--chrono" not in foretold.remedies
