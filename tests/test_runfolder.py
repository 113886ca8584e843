"""A run stopped anywhere, by anything, ends as one that was not: bit for bit, log and all."""

import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from slices import covering

import bptt_jax as bptt
from bptt_jax.experiments import runfolder
from bptt_jax.experiments.loop import init_state, train
from bptt_jax.experiments.network import network
from bptt_jax.experiments.runfolder import (
    RunFolder,
    RunFolderError,
    holds_run,
    read_prognosis,
    read_settings,
    read_state,
    write_prognosis,
)
from bptt_jax.experiments.tasks import Batch, adding, delayed_copy

UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of what orbax has not finished


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly(tmp_path_factory):
    """Every run is compiled anew, but for this cache."""
    changed = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in changed}
    for name, value in changed.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


class State(NamedTuple):
    updates: jax.Array
    weights: dict[str, jax.Array]


def state_at(update: int) -> State:
    return State(jnp.int32(update), {"a": jnp.arange(3.0) / 7 + update, "b": jnp.full((2, 2), update, jnp.int32)})


EXAMPLE = state_at(0)


def assert_equal(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def keep(folder: Path, *updates: int, settings=None) -> None:
    with RunFolder(folder, settings or {}) as store:
        for update in updates:
            store.keep(update, state_at(update), [{"updates": update, "loss": 1 / update}])


def restore(folder: Path, example=EXAMPLE):
    with RunFolder(folder, {}) as store:
        return store.restore(example)


def log_of(folder: Path) -> list[int]:
    return [json.loads(line)["updates"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_new_folder_gives_back_the_example(tmp_path) -> None:
    state, records = restore(tmp_path / "run")
    assert state is EXAMPLE
    assert records == []


def test_the_last_state_and_the_log_come_back(tmp_path) -> None:
    keep(tmp_path, 5, 10, 15)
    state, records = restore(tmp_path)
    assert_equal(state, state_at(15))
    assert records == [{"updates": u, "loss": 1 / u} for u in (5, 10, 15)]
    assert_equal(read_state(tmp_path, EXAMPLE), state_at(15))
    assert len(list((tmp_path / "checkpoints").iterdir())) <= 2  # the disk does not fill up


def test_other_settings_are_refused_and_named(tmp_path) -> None:
    here = {"batch": 20, "rate": 0.1, "seeds": (0, 1), "arguments": {"hidden": 64, "text": None}}
    keep(tmp_path, 5, settings=here)
    keep(tmp_path, 10, settings=here)  # the same
    assert read_settings(tmp_path) == json.loads(json.dumps(here))
    for change, message in [
        ({"batch": 30}, r"other settings \(batch: 20 there, 30 here\)"),
        ({"seeds": [0, 2]}, r"\(seeds: \[0, 1\] there, \[0, 2\] here\)"),
        ({"arguments": {"hidden": 65, "text": None}}, r"\(arguments.hidden: 64 there, 65 here\)"),
        ({"rate": 0.2, "batch": 1}, r"\(batch: 20 there, 1 here; rate: 0.1 there, 0.2 here\)"),
        ({"more": 1}, r"\(more: nothing there, 1 here\)"),
        ({"rate": math.nan}, r"\(rate: 0.1 there, 'nan' here\)"),
    ]:
        with pytest.raises(ValueError, match=message), RunFolder(tmp_path, here | change):
            pass
    assert_equal(read_state(tmp_path, EXAMPLE), state_at(10))


def test_whether_a_run_is_there(tmp_path) -> None:
    """Asked for some of its settings, before anything is computed; nothing is left behind."""
    assert not holds_run(tmp_path / "none", {"batch": 20})
    assert not (tmp_path / "none").exists()
    keep(tmp_path, 5, settings={"batch": 20, "arguments": {"hidden": 64}, "rate": 0.1})
    assert holds_run(tmp_path, {"arguments": {"hidden": 64}})
    for wrong, message in (
        ({"arguments": {"hidden": 65}}, r"\(arguments.hidden: 64 there, 65 here\)"),
        ({"more": 1}, r"\(more: nothing there, 1 here\)"),
    ):
        with pytest.raises(RunFolderError, match=message):
            holds_run(tmp_path, wrong)


def test_a_prognosis_is_kept_beside_the_run(tmp_path) -> None:
    assert read_prognosis(tmp_path) is None
    write_prognosis(tmp_path, {"statement": "long", "updates": 3, "lag": math.inf})
    assert read_prognosis(tmp_path) == {"statement": "long", "updates": 3, "lag": "inf"}
    write_prognosis(tmp_path, None)
    assert not list(tmp_path.iterdir())
    for damaged in ("[]", '{"statement": 1, "updates": 2}', "{", "[" * 10_000):
        (tmp_path / "prognosis.json").write_text(damaged)
        with pytest.raises(RunFolderError, match="prognosis"):
            read_prognosis(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "prognosis.json").symlink_to(tmp_path / "prognosis.json")
    with pytest.raises(RunFolderError, match="leads out of the folder"):
        read_prognosis(tmp_path / "run")


def test_a_group_of_settings_hides_no_other(tmp_path) -> None:
    with RunFolder(tmp_path, {"batch": 20, "arguments": {"batch": "x"}}):
        pass
    here = {"batch": 30, "arguments": {"batch": "x"}}
    with pytest.raises(ValueError, match="batch"), RunFolder(tmp_path, here):
        pass


def test_train_refuses_a_run_of_others(tmp_path) -> None:
    net = small()
    train(net, optax.sgd(0.1), updates=1, batch=2, chunk=1, folder=tmp_path, settings={"rate": 0.1})
    for change, message in [
        ({"batch": 3}, "batch: 2 there, 3 here"),
        ({"chunk": 2}, "chunk: 1 there, 2 here"),
        ({"seeds": (1,)}, r"seeds: \[0\] there, \[1\] here"),
        ({"settings": {"rate": 0.2}}, "rate: 0.1 there, 0.2 here"),
    ]:
        options = {"updates": 2, "batch": 2, "chunk": 1, "settings": {"rate": 0.1}, **change}
        with pytest.raises(ValueError, match=message):
            train(net, optax.sgd(0.1), folder=tmp_path, **options)
    assert log_of(tmp_path) == [1]


def test_another_networks_state_is_refused_and_named(tmp_path) -> None:
    keep(tmp_path, 5)
    wrong = {
        "shape": EXAMPLE._replace(weights={**EXAMPLE.weights, "a": jnp.zeros(4)}),
        "dtype": EXAMPLE._replace(weights={**EXAMPLE.weights, "a": jnp.zeros(3, jnp.int32)}),
        "missing": EXAMPLE._replace(weights={"b": EXAMPLE.weights["b"]}),
        "more": EXAMPLE._replace(weights={**EXAMPLE.weights, "c": jnp.zeros(3)}),
    }
    for kind, example in wrong.items():
        name = "'c'" if kind == "more" else "'a'"
        with pytest.raises(ValueError, match=f"checkpoint 5: its state is not of this network.*{name}"):
            restore(tmp_path, example)
        with pytest.raises(ValueError, match="checkpoint 5"):
            read_state(tmp_path, example)
    assert_equal(restore(tmp_path)[0], state_at(5))


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(ValueError, match="no training run is there"):
        read_settings(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint is there yet"):
        read_state(tmp_path, EXAMPLE)
    assert list(tmp_path.iterdir()) == []  # who looks on leaves nothing behind
    with RunFolder(tmp_path, {}):
        pass
    with pytest.raises(ValueError, match="no checkpoint is there yet"):
        read_state(tmp_path, EXAMPLE)


@pytest.mark.parametrize(
    "tail",
    [
        '{"updates": 15, "lo',
        '{"updates": 15, "loss": 0.1}\n',
        '{"updates": 11, "event": "jump"}\n{"updates": 15, "loss": 0.1}\n{"upd',
    ],
)
def test_lines_beyond_the_checkpoint_are_dropped(tmp_path, tail) -> None:
    keep(tmp_path, 5, 10)
    whole = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(whole + tail)
    state, records = restore(tmp_path)
    assert_equal(state, state_at(10))
    assert [r["updates"] for r in records] == [5, 10]
    assert (tmp_path / "log.jsonl").read_text() == whole
    keep(tmp_path, 15)
    assert log_of(tmp_path) == [5, 10, 15]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "checkpoints", "log.jsonl", "settings.json"]


def test_lines_of_a_run_without_a_checkpoint_are_dropped(tmp_path) -> None:
    with RunFolder(tmp_path, {}):
        pass
    (tmp_path / "log.jsonl").write_text('{"updates": 5}\n')
    assert restore(tmp_path) == (EXAMPLE, [])
    assert log_of(tmp_path) == []


def test_a_line_cut_off_at_its_very_end_is_not_written_on(tmp_path) -> None:
    keep(tmp_path, 5, 10)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text().rstrip("\n"))
    with RunFolder(tmp_path, {}) as store:
        store.restore(EXAMPLE)
        store.keep(15, state_at(15), [{"updates": 15}])
    assert log_of(tmp_path) == [5, 10, 15]


def test_a_half_written_checkpoint_is_never_read(tmp_path) -> None:
    keep(tmp_path, 5, 10)
    place = tmp_path / "checkpoints"
    half = place / f"15{UNFINISHED}-1700000000"
    shutil.copytree(place / "10", half)
    assert_equal(read_state(tmp_path, EXAMPLE), state_at(10))
    assert half.exists()  # who looks on tidies nothing up
    assert_equal(restore(tmp_path)[0], state_at(10))
    shutil.rmtree(half, ignore_errors=True)
    shutil.rmtree(place / "5" / "default")  # killed while the older one was being deleted
    assert_equal(restore(tmp_path)[0], state_at(10))
    keep(tmp_path, 15, 20)
    assert_equal(restore(tmp_path)[0], state_at(20))


# --- Whole runs.


def small():
    def sample(key, batch):
        inputs = jax.random.uniform(key, (batch, 4, 2))
        return Batch(inputs, jnp.sum(inputs[:, :, 0], axis=1))

    return network(
        bptt.rnn(2), adding(4)._replace(sample=sample, whole=sample(jax.random.key(9), 8), threshold=0.0)
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Makes a run of `updates` in a new or given folder; "whole" is one of 12 that nothing interrupts."""
    net, optimizer = small(), bptt.with_clipping(optax.sgd(0.1, momentum=0.9), 1.0)

    def run(folder, updates=12, on_record=None):
        probes = {"bias": lambda params, data: params.readout.bias[0]}
        return train(
            net,
            optimizer,
            updates=updates,
            batch=2,
            seeds=(0, 1),
            chunk=3,
            probes=probes,
            folder=folder,
            on_record=on_record,
        )

    folder = tmp_path_factory.mktemp("whole")
    return run, folder, run(folder)


def assert_same_run(folder, done, runs) -> None:
    _, whole, want = runs
    assert_equal(done.states, want.states)
    assert done.records == want.records
    assert (folder / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert_equal(read_state(folder, want.states), want.states)


def test_the_log_holds_the_records(runs) -> None:
    _, folder, done = runs
    assert [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] == done.records
    assert read_settings(folder) == {"task": "adding", "length": 4, "batch": 2, "seeds": [0, 1], "chunk": 3}


@pytest.mark.parametrize("at", covering([3, 9], 9))
def test_an_exception_from_report_loses_nothing(runs, tmp_path, at) -> None:
    def report(record):
        if record["updates"] == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs[0](tmp_path, on_record=report)
    assert log_of(tmp_path)[-1] == at
    told = []
    done = runs[0](tmp_path, on_record=told.append)
    assert [r["updates"] for r in told] == list(range(at + 3, 13, 3))
    assert_same_run(tmp_path, done, runs)


@pytest.mark.exhaustive
def test_more_updates_later(runs, tmp_path) -> None:
    first = runs[0](tmp_path, updates=6)
    assert int(first.states.updates[0]) == 6
    again = runs[0](tmp_path, updates=6)  # nothing is left to do
    assert_equal(again.states, first.states)
    assert again.records == first.records
    assert_same_run(tmp_path, runs[0](tmp_path), runs)
    assert_same_run(tmp_path, runs[0](tmp_path), runs)


def test_chunks_stay_where_they_were_after_a_stop_between_them(runs, tmp_path) -> None:
    runs[0](tmp_path, updates=4)
    assert [r["updates"] for r in runs[0](tmp_path).records] == [3, 4, 6, 9, 12]


@pytest.mark.exhaustive
def test_events_are_the_same_across_stops(tmp_path) -> None:
    """What led to an event of the first update after a stop stands in the checkpoint; NaN comes back as NaN."""
    net, explosive = small(), optax.sgd(3.0)
    whole = train(net, explosive, updates=18, batch=2, chunk=3, folder=tmp_path / "whole")
    assert whole.events
    for updates in range(6, 19, 6):
        done = train(net, explosive, updates=updates, batch=2, chunk=3, folder=tmp_path / "stopped")
    assert done.records == whole.records
    assert_equal(done.states, whole.states)


@pytest.mark.parametrize("window", covering([3, "auto"], "auto"))
def test_a_run_stopped_in_mid_stream(window, tmp_path) -> None:
    """States, position and the window to come stand in the checkpoint."""
    task = delayed_copy(2, values=2, episode=6)
    net = network(bptt.rnn(2), task._replace(whole=task.sample(jax.random.key(9), 2), threshold=0.0))
    settings = {"batch": 3, "seeds": (0, 1), "chunk": 1, "window": window}

    def run(updates, name):
        return train(net, optax.sgd(0.3, momentum=0.9), updates=updates, folder=tmp_path / name, **settings)

    whole = run(3, "whole")
    run(1, "stopped")
    again = run(3, "stopped")
    assert_equal(again.states, whole.states)
    assert again.records == whole.records
    assert (tmp_path / "stopped/log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()
    assert_equal(read_state(tmp_path / "stopped", whole.states), whole.states)
    assert float(jnp.abs(whole.states.carried.states).min()) > 0
    with pytest.raises(ValueError, match=f"window: {window!r} there, 4 here"):
        train(net, optax.sgd(0.3), updates=4, folder=tmp_path / "whole", **settings | {"window": 4})


# --- Killed.

SCRIPT = """\
import sys
from pathlib import Path

import jax
import optax

jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

import bptt_jax as bptt
from bptt_jax.experiments import runfolder
from bptt_jax.experiments.loop import train
from bptt_jax.experiments.network import network
from bptt_jax.experiments.tasks import adding, delayed_copy

window = int(sys.argv[3]) or None
net = network(bptt.gru(4), delayed_copy(2, episode=9) if window else adding(10))
optimizer = bptt.with_clipping(optax.sgd(0.1), 1.0)
train(net, optimizer, updates=int(sys.argv[4]), batch=2, seeds=(0, 1), chunk=5, window=window, folder=Path(sys.argv[1]))
"""


def unfinished(folder: Path) -> list[Path]:
    return list((folder / "checkpoints").glob(f"*{UNFINISHED}*"))


def last_checkpoint(folder: Path) -> int:
    names = [p.name for p in (folder / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def wait(process: subprocess.Popen, until, limit: float) -> None:
    """Until something is so, the process has ended, or the time is over."""
    end = time.monotonic() + limit
    while not until() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.0005)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("times", "window", "updates"), covering([(1, 0, 60), (20, 0, 250), (8, 7, 250)], (1, 0, 60))
)
def test_killed_at_any_moment_it_ends_as_if_it_had_never_been(times, window, updates, tmp_path) -> None:
    """Between updates of fresh sequences, and in mid-stream."""
    (tmp_path / "run.py").write_text(SCRIPT)
    environment = os.environ | {
        "OPENBLAS_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(Path(bptt.__file__).parents[1]),
    }

    def command(folder):
        numbers = str(window), str(updates)
        return [sys.executable, str(tmp_path / "run.py"), str(folder), str(tmp_path / "cache"), *numbers]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), env=environment, check=True, timeout=120)
    assert last_checkpoint(whole) == updates

    moments = random.Random(0)
    kills, in_writing, looked = 0, 0, 0
    net = network(bptt.gru(4), delayed_copy(2, episode=9) if window else adding(10))
    optimizer = bptt.with_clipping(optax.sgd(0.1), 1.0)
    init = partial(init_state, net, optimizer, batch=2 if window else None)
    example = jax.vmap(init)(jnp.arange(2, dtype=jnp.int32))
    for attempt in range(times):
        process = subprocess.Popen(command(killed), env=environment, stderr=subprocess.DEVNULL)
        try:
            before = last_checkpoint(killed)
            if attempt % 5 == 4:  # anywhere, the start included
                wait(process, lambda b=before: last_checkpoint(killed) > b + 10, moments.uniform(0.2, 2.5))
            else:
                skip = before + 5 * moments.randrange(3)
                wait(process, lambda s=skip: last_checkpoint(killed) > s, 60)
                if attempt % 5 < 3:
                    wait(process, lambda: unfinished(killed), 60)
                    wait(process, lambda: False, moments.uniform(0, 0.02))
                else:
                    wait(process, lambda: False, moments.uniform(0, 0.2))
        finally:
            process.kill()
            assert process.wait(timeout=30) == -signal.SIGKILL
        assert last_checkpoint(killed) < updates
        kills += 1
        in_writing += bool(unfinished(killed))
        if last_checkpoint(killed) and attempt % 4 == 0:
            assert read_state(killed, example).updates.tolist() == 2 * [last_checkpoint(killed)]
            looked += 1
    assert kills == times
    assert in_writing >= times // 4
    assert looked

    subprocess.run(command(killed), env=environment, check=True, timeout=120)
    assert (killed / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert len((killed / "log.jsonl").read_text().splitlines()) >= updates // 5
    assert_equal(read_state(killed, example), read_state(whole, example))
    assert read_state(killed, example).updates.tolist() == [updates, updates]
    assert unfinished(killed) == []
    print(f"{kills} kills, {in_writing} of them while a checkpoint was written: nothing lost")


def test_a_checkpoint_that_goes_while_it_is_read(tmp_path, monkeypatch) -> None:
    """A run that is going on keeps its last two."""
    keep(tmp_path, 5)
    read_through = runfolder._read_through

    def later(place: Path, most: int) -> None:
        if place.name == "5":
            keep(tmp_path, 10, 15)
            shutil.rmtree(place, ignore_errors=True)
        read_through(place, most)

    monkeypatch.setattr(runfolder, "_read_through", later)
    assert_equal(read_state(tmp_path, EXAMPLE), state_at(15))


def test_half_a_folder_is_refused(tmp_path) -> None:
    keep(tmp_path, 5, 10)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")
    with pytest.raises(RunFolderError, match=r"log.jsonl: does not reach as far as checkpoint 10"):
        restore(tmp_path)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(RunFolderError, match=r"has checkpoints, but no settings.json"):
        restore(tmp_path)


def test_only_one_process_trains_in_a_folder(tmp_path) -> None:
    keep(tmp_path, 5)
    with RunFolder(tmp_path, {}), pytest.raises(RunFolderError, match="another process is training there"):
        restore(tmp_path)
    assert_equal(restore(tmp_path)[0], state_at(5))


def test_a_reserved_folder_is_for_one_run(tmp_path) -> None:
    for _ in range(2):
        with runfolder.reserved(tmp_path):
            with (
                pytest.raises(RunFolderError, match="another process is training there"),
                runfolder.reserved(tmp_path),
            ):
                pass
            with RunFolder(tmp_path, {}), pytest.raises(RunFolderError, match="another process is training there"):
                RunFolder(tmp_path, {})
    with RunFolder(tmp_path, {}):
        pass


def test_two_that_begin_a_folder_at_the_same_moment(tmp_path, monkeypatch) -> None:
    """The second tries while the first is writing its settings: then it is told, and nothing of the first is lost."""
    write_json, told = runfolder.write_json, []

    def while_it_writes(path, content) -> None:
        monkeypatch.setattr(runfolder, "write_json", write_json)
        for settings in ({"rate": 1}, {"rate": 2}):
            with pytest.raises(RunFolderError, match="another process is training there") as refused:
                RunFolder(tmp_path, settings)
            told.append(refused)
        write_json(path, content)

    monkeypatch.setattr(runfolder, "write_json", while_it_writes)
    with RunFolder(tmp_path, {"rate": 1}) as store:
        store.keep(5, state_at(5), [{"updates": 5}])
    assert len(told) == 2
    assert read_settings(tmp_path) == {"rate": 1}
    assert_equal(read_state(tmp_path, EXAMPLE), state_at(5))


def test_one_that_was_begun_while_another_looked(tmp_path, monkeypatch) -> None:
    """It finds the settings of the other, which has ended by then, and does not replace them."""
    locked = runfolder._locked

    def after_the_other(folder):
        monkeypatch.setattr(runfolder, "_locked", locked)
        keep(tmp_path, 5, settings={"rate": 1})
        return locked(folder)

    monkeypatch.setattr(runfolder, "_locked", after_the_other)
    with pytest.raises(RunFolderError, match=r"other settings \(rate: 1 there, 2 here\)"):
        RunFolder(tmp_path, {"rate": 2})
    keep(tmp_path, 10, settings={"rate": 1})
    assert_equal(read_state(tmp_path, EXAMPLE), state_at(10))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_forked_process_does_not_keep_the_lock(tmp_path) -> None:
    with RunFolder(tmp_path, {}):
        copies = [os.dup(int(fd)) for fd in os.listdir("/proc/self/fd") if _leads_to(fd, tmp_path / ".lock")]
    assert copies
    keep(tmp_path, 5)
    for copy in copies:
        os.close(copy)


def _leads_to(fd: str, path: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == str(path)
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, number) -> None:
    import fcntl

    def flock(handle, how) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(RuntimeWarning, match="its file system has no locks"):
        keep(tmp_path, 5)
    assert_equal(read_state(tmp_path, EXAMPLE), state_at(5))


@pytest.mark.parametrize("told", ["RESOURCE_EXHAUSTED: Error writing [os_error_code='28']", "of\nanother kind"])
def test_what_goes_wrong_inside_orbax_is_told_in_one_line(tmp_path, monkeypatch, told) -> None:
    keep(tmp_path, 5)
    store = RunFolder(tmp_path, {})

    def save(update, args) -> None:
        raise ValueError(told)

    monkeypatch.setattr(store._manager, "save", save)
    with (
        pytest.raises(OSError, match=r"checkpoints/10.*of another kind|No space left.*checkpoints/10") as error,
        store,
    ):
        store.keep(10, state_at(10), [{"updates": 10}])
    assert "\n" not in str(error.value)
    assert_equal(restore(tmp_path)[0], state_at(5))


def test_no_room_is_seen_before_anything_is_written(tmp_path, monkeypatch) -> None:
    keep(tmp_path, 5)
    before = (tmp_path / "log.jsonl").read_bytes()
    large = EXAMPLE._replace(weights=np.broadcast_to(np.float32(0), (1 << 50,)))  # four petabytes
    with pytest.raises(OSError, match=re.escape(str(tmp_path))), RunFolder(tmp_path, {}) as store:
        store.keep(10, large, [{"updates": 10}])
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert_equal(restore(tmp_path)[0], state_at(5))


def test_settings_that_nest_without_end_are_refused(tmp_path) -> None:
    settings: dict = {}
    settings["itself"] = [settings]
    with pytest.raises(ValueError, match="at most 50 lists and groups within each other"):
        RunFolder(tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()
