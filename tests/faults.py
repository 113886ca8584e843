"""Faults of the world: each must end in one clear line, with nothing lost that was there before."""

import contextlib
import functools
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import bptt_jax as bptt
from bptt_jax.cli.main import main
from bptt_jax.experiments.runfolder import RunFolder, RunFolderError, read_state

DIAGNOSE = ["diagnose", "--cells", "rnn", "--gain", "1", "--hidden", "2", "--length", "4", "--batch", "1"]
TRAIN = ["train", "adding", "--length", "4", "--cell", "rnn", "--hidden", "2", "--optimizer", "sgd", "--chunk", "1"]
# Settings that no run could have.
DAMAGED_SETTINGS = {
    "empty": b"",
    "half": b'{"arguments": {"task": "add',
    "not UTF-8": b'{"arguments": "\xff\xfe"}',
    "zeros": bytes(64),
    "a list": b"[1, 2]",
    "a number": b"3",
    "no arguments": b"{}",
    "arguments of another kind": b'{"arguments": [1, 2]}',
    "some missing": b'{"arguments": {"task": "adding"}}',
}
CHANGED_SETTINGS = [
    ("hidden", "abc"),
    ("hidden", 10**9),
    ("cell", "transformer"),
    ("task", "nothing"),
    ("length", -3),
]
CHANGED_SETTINGS += [("optimizer", 7)]
DAMAGED_LOGS = {
    "empty": lambda log: b"",
    "first line lost": lambda log: log[20:],
    "not UTF-8": lambda log: b"\xff\xfe" + log,
    "zeros": lambda log: bytes(len(log)),
    "lists": lambda log: b"[1]\n" * 3,
    "without updates": lambda log: b'{"loss": 1}\n' * 3,
    "updates of another kind": lambda log: b'{"updates": "two"}\n' * 3,
}
DAMAGED_FILES = {
    "empty": lambda content, _: b"",
    "half": lambda content, _: content[: len(content) // 2],
    "flipped": lambda content, draw: bytes(b ^ (draw.random() < 0.2) * 0x55 for b in content),
    "zeros": lambda content, _: bytes(len(content)),
}


class Fault(NamedTuple):
    """`survive` makes it happen, in an empty folder, and raises AssertionError unless it is survived."""

    kind: str
    name: str
    survive: Callable[[Path], None]
    own_process: bool = False

    @property
    def id(self) -> str:
        return f"{self.kind}: {self.name}"


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files below, but for what says how they were compiled."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def command(*arguments: Any) -> tuple[int, str]:
    """Status and stderr of the command, in this process."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, stderr.getvalue()


def said_clearly(status: int, errors: str, expected: int, message: str) -> None:
    """One line, beside those that tell of progress."""
    lines = [line for line in errors.splitlines() if not re.match(r"measuring |\d+ of \d+ updates", line)]
    assert len(lines) == 1, errors
    assert lines[0].startswith("bptt-jax "), errors
    assert message in lines[0], errors
    assert status == expected, (status, errors)


def refused(arguments: list[Any], kept: Path, message: str, status: int = 2) -> None:
    """By the command, which leaves what is in the folder `kept`."""
    before = contents(kept)
    said_clearly(*command(*arguments), status, message)
    assert contents(kept) == before


# --- Text.


def _text(content: bytes | None, message: str) -> Callable[[Path], None]:
    def survive(folder: Path) -> None:
        text = folder / "novel.txt"
        if content is None:
            text.mkdir()
        else:
            text.write_bytes(content)
        for job in (DIAGNOSE, ["train", "characters", "--length", "4"]):
            refused([*job, "--text", text, "--out", folder / "out"], folder, message)
            shutil.rmtree(folder / "out", ignore_errors=True)

    return survive


# --- Places that cannot be written.


def _place(name: str, message: str) -> Callable[[Path], None]:
    def survive(folder: Path) -> None:
        (folder / "file").write_text("precious")
        out = name if name.startswith("/") else folder / name
        for job in (DIAGNOSE, [*TRAIN, "--updates", "1"]):
            refused([*job, "--out", out], folder, message)

    return survive


# --- A full disk.


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to write more into any file."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, handler)


def _diagnose_beyond(size: int) -> Callable[[Path], None]:
    def survive(folder: Path) -> None:
        for name in ("flow.png", "flow.json"):
            (folder / name).write_text("of yesterday")
        with largest_file(size):
            refused([*DIAGNOSE, "--out", folder], folder, "could not write the results", status=1)

    return survive


def _train_on_a_full_disk(folder: Path) -> None:
    """A run that was whole stays so, and goes on when there is room."""
    run = trained(folder / "run")
    known = command("diagnose", "--checkpoint", run, "--batch", "1", "--out", folder)
    assert known[0] == 0, known
    longer = [*TRAIN, "--updates", "4", "--out", run]
    with largest_file(200):
        said_clearly(*command(*longer), 1, "could not write")
    assert command(*longer)[0] == 0
    assert json.loads((run / "train.json").read_text())["seeds"][0]["updates"] == 4


def tmpfs(folder: Path, size: str) -> bool:
    """Whether a file system of that size could be mounted there."""
    if shutil.which("mount") is None:
        return False
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(mount, capture_output=True, timeout=30).returncode == 0


def _tmpfs(folder: Path) -> None:
    """A file system that is full in earnest, where one may be mounted; else the limit of the kernel."""
    if not tmpfs(folder, "64k"):
        _diagnose_beyond(4096)(folder)
        return
    try:
        _diagnose_full(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=30)


def _diagnose_full(folder: Path) -> None:
    (folder / "flow.json").write_text("of yesterday")
    refused([*DIAGNOSE, "--out", folder], folder, "No space left on device", status=1)


# --- A damaged run.


@functools.cache
def _run() -> dict[str, bytes]:
    """The files of a run of two updates."""
    with tempfile.TemporaryDirectory() as folder:
        status, errors = command(*TRAIN, "--updates", "2", "--out", folder)
        assert status == 0, errors
        return contents(Path(folder))


def trained(folder: Path) -> Path:
    for name, content in _run().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _settings(content: bytes | None) -> Callable[[Path], None]:
    def survive(folder: Path) -> None:
        run = trained(folder / "run")
        (run / "settings.json").unlink()
        if content is None:
            (run / "settings.json").mkdir()
        else:
            (run / "settings.json").write_bytes(content)
        for job in (["diagnose", "--checkpoint", run], [*TRAIN, "--updates", "3", "--out", run]):
            refused([*job, *([] if job[0] == "train" else ["--out", folder])], run, str(run))

    return survive


def _setting(name: str, value: Any) -> Callable[[Path], None]:
    def survive(folder: Path) -> None:
        run = trained(folder / "run")
        settings = json.loads((run / "settings.json").read_text())
        settings["arguments"][name] = value
        (run / "settings.json").write_text(json.dumps(settings))
        refused(["diagnose", "--checkpoint", run, "--out", folder], run, "")

    return survive


def _checkpoints(change: Callable[[Path], Any], message: str) -> Callable[[Path], None]:
    def survive(folder: Path) -> None:
        run = trained(folder / "run")
        change(run / "checkpoints")
        refused(["diagnose", "--checkpoint", run, "--out", folder], run, message)

    return survive


def _emptied(place: Path) -> None:
    shutil.rmtree(place)
    place.mkdir()


def _a_file(place: Path) -> None:
    shutil.rmtree(place)
    place.write_text("precious")


def _without(name: str) -> Callable[[Path], None]:
    """Of the last checkpoint, a part."""
    return lambda place: next(place.glob(f"2/**/{name}")).unlink()


def _whole(update: int) -> Any:
    return {"weights": jnp.arange(40.0) + update, "count": jnp.int32(update)}


def same(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


@functools.cache
def _kept() -> dict[str, bytes]:
    """The files of a run folder with checkpoints 1 and 2."""
    with tempfile.TemporaryDirectory() as folder:
        with RunFolder(Path(folder), {}) as store:
            for update in (1, 2):
                store.keep(update, _whole(update), [{"updates": update}])
        return contents(Path(folder))


def checkpoint_files() -> list[str]:
    """Of the last checkpoint, by names that do not change: those that hold the data are numbered at random."""
    return sorted({re.sub(r"/[0-9a-f]{32}$", "/*", name) for name in _kept() if name.startswith("checkpoints/2/")})


def _file(name: str, damage: Callable[[bytes, random.Random], bytes]) -> Callable[[Path], None]:
    def survive(folder: Path) -> None:
        """Refused, or read as it was; and without it the checkpoint before is there."""
        for file, content in _kept().items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        for file in folder.glob(name):
            file.write_bytes(damage(file.read_bytes(), random.Random(0)))
        before = contents(folder)
        message = ""
        try:
            assert same(read_state(folder, _whole(0)), _whole(2))
        except RunFolderError as error:
            message = str(error)
        assert re.fullmatch("|.*checkpoints?[/ ]2: .*", message), message
        assert contents(folder) == before
        shutil.rmtree(folder / "checkpoints" / "2")
        assert same(read_state(folder, _whole(0)), _whole(1))

    return survive


def _without_key(log: bytes) -> bytes:
    """Whoever reads "clipped" finds it in no line."""
    return log.replace(b'"clipped"', b'"cropped"')


def _log(
    damage: Callable[[bytes], bytes], message: str = "log.jsonl: does not reach as far as checkpoint 2"
) -> Callable[[Path], None]:
    def survive(folder: Path) -> None:
        run = trained(folder / "run")
        (run / "log.jsonl").write_bytes(damage((run / "log.jsonl").read_bytes()))
        refused([*TRAIN, "--updates", "3", "--out", run], run, message)

    return survive


# --- Interrupted from outside.


def _signalled(job: list[str], number: signal.Signals, status: int, message: str) -> Callable[[Path], None]:
    def survive(folder: Path) -> None:
        (folder / "flow.json").write_text("of yesterday")
        run = [sys.executable, "-m", "bptt_jax", *job, "--out", str(folder)]
        environment = os.environ | {"PYTHONPATH": str(Path(bptt.__file__).parents[1]), "OPENBLAS_NUM_THREADS": "1"}
        with subprocess.Popen(
            run, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
        ) as p:
            try:
                assert p.stderr is not None
                if job[0] == "diagnose":
                    assert p.stderr.readline().startswith("measuring")
                else:
                    end = time.monotonic() + 120
                    while not list(folder.glob("checkpoints/[0-9]*")) and time.monotonic() < end:
                        assert p.poll() is None
                        time.sleep(0.01)
                p.send_signal(number)
                _, errors = p.communicate(timeout=120)
            finally:
                p.kill()
        if message:
            said_clearly(p.returncode, errors, status, message)
        assert p.returncode == status
        assert "Traceback" not in errors
        assert (folder / "flow.json").read_text() == "of yesterday"
        if job[0] == "train":  # all that was reached is there
            done = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["updates"]
            assert command(*job, "--updates", done, "--out", folder)[0] == 0

    return survive


LONG_TRAIN = [*TRAIN, "--updates", "1000000", "--rate", "1e-9"]
LONG_DIAGNOSE = [*DIAGNOSE, "--length", "200", "--batch", "1000", "--hidden", "32"]
RESUMES = "the same command resumes from the last checkpoint"


def faults() -> list[Fault]:
    """All of them."""
    return [
        Fault("text", "not UTF-8", _text(b"abc\xff\xfe", "expected UTF-8 text, got byte 3")),
        Fault("text", "UTF-16", _text("a novel".encode("utf-16"), "expected UTF-8 text, got byte 0")),
        Fault("text", "Latin-1", _text("caf\xe9 noir, again".encode("latin-1"), "expected UTF-8 text, got byte 3")),
        Fault("text", "cut within a character", _text("a long novel \u20ac".encode()[:-1], "expected UTF-8 text")),
        Fault("text", "empty", _text(b"", "expected at least one character")),
        Fault("text", "too short", _text(b"abc", "expected more than 4 characters")),
        Fault("text", "a folder", _text(None, "Is a directory")),
        Fault("unwritable", "a file", _place("file", "File exists")),
        Fault("unwritable", "below a file", _place("file/below", "Not a directory")),
        Fault("unwritable", "below /proc", _place("/proc/bptt-jax", "/proc/bptt-jax: ")),
        Fault("unwritable", "a device", _place("/dev/null/out", "Not a directory")),
        Fault("unwritable", "too long a name", _place("x" * 300, "File name too long")),
        Fault("disk full", "not a byte", _diagnose_beyond(0)),
        Fault("disk full", "half a figure", _diagnose_beyond(4096)),
        Fault("disk full", "a file system of 64 kB", _tmpfs),
        Fault("disk full", "while training", _train_on_a_full_disk),
        *(Fault("settings", name, _settings(content)) for name, content in DAMAGED_SETTINGS.items()),
        Fault("settings", "a folder", _settings(None)),
        *(Fault("settings", f"{k} = {v!r}", _setting(k, v)) for k, v in CHANGED_SETTINGS),
        Fault("checkpoint", "none", _checkpoints(shutil.rmtree, "no checkpoint is there yet")),
        Fault("checkpoint", "an empty folder", _checkpoints(_emptied, "no checkpoint is there yet")),
        Fault("checkpoint", "a file", _checkpoints(_a_file, "no checkpoint is there yet")),
        Fault("checkpoint", "without metadata", _checkpoints(_without("_METADATA"), "damaged")),
        Fault("checkpoint", "without a manifest", _checkpoints(_without("manifest.ocdbt"), "damaged")),
        *(
            Fault("checkpoint", f"{name.removeprefix('checkpoints/2/')} {how}", _file(name, damage))
            for name in checkpoint_files()
            for how, damage in DAMAGED_FILES.items()
        ),
        *(Fault("log", name, _log(damage)) for name, damage in DAMAGED_LOGS.items()),
        Fault("log", "a key missing", _log(_without_key, "line 1 of log.jsonl is damaged: it has no clipped")),
        Fault("interrupted", "SIGTERM in training", _signalled(LONG_TRAIN, signal.SIGTERM, 143, RESUMES), True),
        Fault(
            "interrupted",
            "SIGTERM in diagnosing",
            _signalled(LONG_DIAGNOSE, signal.SIGTERM, 143, "no file was written"),
            True,
        ),
        Fault("interrupted", "SIGKILL in diagnosing", _signalled(LONG_DIAGNOSE, signal.SIGKILL, -9, ""), True),
    ]
