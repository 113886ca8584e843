"""Faults of the world: each must end in one clear line, with nothing lost that was there before."""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

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
    "nested 100,000 deep": b'{"arguments": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested 900 deep": b'{"a":' * 900 + b"3" + b"}" * 900,
    "without end": b'{"arguments": ' * 50_000,
    "a number of 10,000 digits": b'{"arguments": {"task": ' + b"9" * 10_000 + b"}}",
}
CHANGED_SETTINGS = [
    ("hidden", "abc"),
    ("hidden", 10**9),
    ("cell", "transformer"),
    ("task", "nothing"),
    ("length", -3),
]
CHANGED_SETTINGS += [("optimizer", 7), ("length", 10**30), ("seeds", 10**9), ("seeds", -1), ("seeds", True)]
CHANGED_SETTINGS += [("cell", []), ("gain", "/dev/zero"), ("text", "a\0b"), ("gain", {"a": 1}), ("float64", "no")]
DAMAGED_LOGS = {
    "empty": lambda log: b"",
    "first line lost": lambda log: log[20:],
    "not UTF-8": lambda log: b"\xff\xfe" + log,
    "zeros": lambda log: bytes(len(log)),
    "lists": lambda log: b"[1]\n" * 3,
    "without updates": lambda log: b'{"loss": 1}\n' * 3,
    "updates of another kind": lambda log: b'{"updates": "two"}\n' * 3,
    "nested 100,000 deep": lambda log: b'{"updates": 1, "loss": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
}
FILES = (0, 100, 700, 4096, 100_000)  # sizes at which a write is refused
FILE_SYSTEMS = ("4k", "8k", "12k", "64k", "400k", "size=8M,nr_inodes=9")
# Parts of a run that its maker could have linked to something of yours.
LEADS_OUT = "leads out of the folder"
NO_FILE = "neither a file nor a folder of its own"
OUT = [("checkpoints", LEADS_OUT), ("settings.json", LEADS_OUT)]
OUT += [("checkpoints/2" + below, NO_FILE) for below in ("", "/_CHECKPOINT_METADATA", "/default", "/default/d")]
OUT += [(f"checkpoints/2/default/{below}", NO_FILE) for below in ("manifest.ocdbt", "_METADATA", "_sharding")]
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
    rare: bool = False  # one of many of its kind, each of which takes seconds

    @property
    def id(self) -> str:
        return f"{self.kind}: {self.name}"


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files below that end."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size < 1 << 30]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def command(*arguments: Any) -> tuple[int, str]:
    """Status and stderr of the command, in this process; Python keeps nothing beside the steps that it imports."""
    with (
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        contextlib.redirect_stdout(io.StringIO()),
        patch.object(sys, "dont_write_bytecode", True),
    ):
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


def _text(content: bytes | Callable[[Path], Any], message: str) -> Callable[[Path], None]:
    def survive(folder: Path) -> None:
        text = folder / "novel.txt"
        if callable(content):
            content(text)
        else:
            text.write_bytes(content)
        for job in (DIAGNOSE, ["train", "characters", "--length", "4"]):
            refused([*job, "--text", text, "--out", folder / "out"], folder, message)
            shutil.rmtree(folder / "out", ignore_errors=True)

    return survive


def _endless(path: Path) -> None:
    """A file of a terabyte that takes no room."""
    with path.open("wb") as file:
        file.truncate(1 << 40)


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        before = os.getcwd()
        os.chdir(path.parent)  # a socket's name has to be short
        try:
            s.bind(path.name)
        finally:
            os.chdir(before)


def _mine(name: str, content: str, message: str) -> Callable[[Path], None]:
    """As a step of one's own."""

    def survive(folder: Path) -> None:
        (folder / name).write_text(content)
        modules, path = dict(sys.modules), list(sys.path)
        try:
            refused([*DIAGNOSE, "--step", f"{folder / name}:make", "--out", folder / "out"], folder, message)
            replaced = {name for name, module in modules.items() if sys.modules.get(name) is not module}
            assert not replaced, replaced
        finally:
            sys.path[:] = path
            sys.modules.clear()
            sys.modules.update(modules)

    return survive


# --- Places that cannot be written.


def _place(name: str, message: str) -> Callable[[Path], None]:
    def survive(folder: Path) -> None:
        (folder / "file").write_text("precious")
        out = name if name.startswith("/") else folder / name
        for job in (DIAGNOSE, [*TRAIN, "--updates", "1"]):
            refused([*job, "--out", out], folder, message)

    return survive


def _named(name: str) -> Callable[[Path], None]:
    """A folder whose name no terminal can show: told in one line, and diagnosed in all the same."""

    def survive(folder: Path) -> None:
        out = folder / os.fsdecode(name.encode("utf-8", "surrogateescape"))
        if (not name.isprintable() and name.isascii()) or "\u202e" in name:
            out.write_text("precious")
            refused([*DIAGNOSE, "--out", out], folder, ": File exists")
            out.unlink()
        else:
            refused([*TRAIN, "--updates", "1", "--out", out], folder, "expected a name in UTF-8")
        status, errors = command(*DIAGNOSE, "--out", out)
        assert status == 0, errors
        assert sorted(p.name for p in out.iterdir()) == ["flow.json", "flow.png"]

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


def _begin_beyond(size: int) -> Callable[[Path], None]:
    """Wherever a run ends for want of room, what was there is there, and it goes on when there is room."""

    def survive(folder: Path) -> None:
        job = [*TRAIN, "--updates", "2", "--out", folder / "run"]
        with largest_file(size):
            said_clearly(*command(*job), 1, "could not write")
        went_on(folder / "run")

    return survive


def went_on(run: Path) -> None:
    assert not list(run.rglob("*tmp*"))
    assert command(*TRAIN, "--updates", "2", "--out", run)[0] == 0
    assert json.loads((run / "train.json").read_text())["seeds"][0]["updates"] == 2


def _train_in(size: str) -> Callable[[Path], None]:
    """A file system that is full in earnest, where one may be mounted, and grows later."""

    def survive(folder: Path) -> None:
        if not tmpfs(folder, size):
            return _begin_beyond(100)(folder)
        try:
            (folder / "precious").write_text("x" * 100)
            said_clearly(*command(*TRAIN, "--updates", "2", "--out", folder / "run"), 1, "No space left on device")
            assert tmpfs(folder, "remount,size=8M,nr_inodes=10000")
            assert (folder / "precious").read_text() == "x" * 100
            went_on(folder / "run")
        finally:
            subprocess.run(["umount", str(folder)], check=True, timeout=30)

    return survive


def tmpfs(folder: Path, size: str) -> bool:
    """Whether a file system of that size could be mounted there."""
    if shutil.which("mount") is None:
        return False
    options = size if "=" in size else f"size={size}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
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


def _settings(content: bytes | Callable[[Path], Any]) -> Callable[[Path], None]:
    def survive(folder: Path) -> None:
        run = trained(folder / "run")
        (run / "settings.json").unlink()
        if callable(content):
            content(run / "settings.json")
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


def _foreign_text(folder: Path) -> None:
    """A run whose settings name a file: nothing of it is read, for it is no pipe that anyone writes to."""
    run = trained(folder / "run")
    settings = json.loads((run / "settings.json").read_text())
    os.mkfifo(folder / "secret")
    settings["arguments"] |= {"task": "characters", "text": str(folder / "secret")}
    (run / "settings.json").write_text(json.dumps(settings))
    look = ["diagnose", "--checkpoint", run, "--out", folder]
    refused(look, run, "the run read a text of its own, which must be given: --text")
    (folder / "another").write_text("abc" * 100)
    refused([*look, "--text", folder / "another"], run, "its text was another one")


def _checkpoints(change: Callable[[Path], Any], message: str) -> Callable[[Path], None]:
    def survive(folder: Path) -> None:
        run = trained(folder / "run")
        change(run / "checkpoints")
        refused(["diagnose", "--checkpoint", run, "--out", folder], run, message)

    return survive


def _emptied(place: Path) -> None:
    shutil.rmtree(place)
    place.mkdir()


def _nested(path: Path) -> None:
    path.write_text('{"use_ocdbt": ' * 10_000)


def _a_file(place: Path) -> None:
    shutil.rmtree(place)
    place.write_text("precious")


def _leads_out(name: str) -> Callable[[Path], None]:
    """A part of a run is moved, and linked to."""

    def change(place: Path) -> None:
        part = next(place.parent.glob(name))
        shutil.move(part, place.parents[1] / "elsewhere")
        part.symlink_to(place.parents[1] / "elsewhere")

    return change


def _outside_database(place: Path) -> None:
    """Arrays in files that the checkpoint names, a whole one of which lies outside."""
    import tensorstore

    arrays = place / "2" / "default"
    metadata = json.loads((arrays / "_METADATA").read_text())
    outside = place.parents[1] / "outside"
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{outside}/"}}
    made = tensorstore.open(spec, create=True, dtype="float32", shape=[1, 2, 1]).result()
    made.write(7.0).result()
    name = next(n for n in metadata["tree_metadata"] if n.endswith("input',)") or "input" in n)
    entry = metadata["tree_metadata"].pop(name)
    entry["key_metadata"] = [{"key": str(outside), "key_type": 2}]
    metadata["tree_metadata"][f"('{outside}',)"] = entry
    metadata["use_ocdbt"] = False
    (arrays / "_METADATA").write_text(json.dumps(metadata))


def _outside_manifest(place: Path) -> None:
    """The database's own list of its files leads out."""
    import tensorstore

    context = tensorstore.Context()
    memory = tensorstore.KvStore.open({"driver": "memory", "path": "in/"}, context=context).result()
    spec = {"driver": "ocdbt", "base": {"driver": "memory", "path": "in/"}}
    spec |= {f"{kind}_data_prefix": "../../../../outside/" for kind in ("value", "btree_node", "version_tree_node")}
    tensorstore.KvStore.open(spec, context=context).result().write("a", bytes(5000)).result()
    whole = tensorstore.KvStore.open({"driver": "memory"}, context=context).result()
    for key in whole.list().result():
        path = place / "2" / "default" / key.decode().removeprefix("in/")
        path = Path(os.path.normpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(whole.read(key).result().value)
    assert memory.list().result()
    assert (place.parents[1] / "outside").is_dir()


def _in_checkpoint(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        path = place / "2" / name
        path.unlink(missing_ok=True)
        make(path)

    return change


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


def _log_is(make: Callable[[Path], Any], message: str) -> Callable[[Path], None]:
    def survive(folder: Path) -> None:
        run = trained(folder / "run")
        (run / "log.jsonl").unlink()
        make(run / "log.jsonl")
        refused([*TRAIN, "--updates", "3", "--out", run], run, message)

    return survive


def _without_key(log: bytes) -> bytes:
    """Whoever reads "clipped" finds it in no line."""
    return log.replace(b'"clipped"', b'"cropped"')


def _of_another_kind(log: bytes) -> bytes:
    """A list is a number."""
    return re.sub(rb'"loss": \[[^]]*\]', b'"loss": 3', log, count=1)


def _log(
    damage: Callable[[bytes], bytes], message: str = "log.jsonl: does not reach as far as checkpoint 2"
) -> Callable[[Path], None]:
    def survive(folder: Path) -> None:
        run = trained(folder / "run")
        (run / "log.jsonl").write_bytes(damage((run / "log.jsonl").read_bytes()))
        refused([*TRAIN, "--updates", "3", "--out", run], run, message)

    return survive


# --- Two at once.


def _begin(folders: list[Path], settings: dict[str, Any], barrier: Any, outcomes: Any) -> None:
    """Opens one folder after the other at the same moment as another process, and leaves it when both have tried."""
    for folder in folders:
        barrier.wait(60)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(RunFolder(folder, settings))
                outcomes.put("began")
            except RunFolderError as error:
                outcomes.put(str(error).removeprefix(f"{folder}: ").split(" (")[0])
            barrier.wait(60)


def together(folder: Path, pairs: int, other: dict[str, Any]) -> list[tuple[str, str]]:
    """What two processes were told that began so many folders at once, the second perhaps with other settings."""
    context = multiprocessing.get_context("spawn")
    folders = [folder / str(i) for i in range(pairs)]
    barrier, queues = context.Barrier(2), [context.Queue(), context.Queue()]
    processes = [
        context.Process(target=_begin, args=(folders, settings, barrier, queue), daemon=True)
        for settings, queue in zip([{"rate": 1}, other], queues, strict=True)
    ]
    for process in processes:
        process.start()
    told = [[queue.get(timeout=120) for _ in folders] for queue in queues]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for each in folders:
        assert sorted(p.name for p in each.iterdir()) == [".lock", "checkpoints", "settings.json"]
    return list(zip(*told, strict=True))


def _two_begin(other: dict[str, Any]) -> Callable[[Path], None]:
    def survive(folder: Path) -> None:
        refusals = {"another process is training there", "holds a run of other settings"}
        for i, told in enumerate(together(folder, 60, other)):
            assert sorted(t == "began" for t in told) == [False, True], (i, told)
            assert set(told) - {"began"} <= refusals
            settings = json.loads((folder / str(i) / "settings.json").read_text())
            assert settings == ({"rate": 1} if told[0] == "began" else other)

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
        Fault("text", "a folder", _text(Path.mkdir, "Is a directory")),
        Fault(
            "text",
            "UTF-32",
            _text("a novel".encode("utf-32"), "got byte 0 that is not: invalid start byte, as UTF-32"),
        ),
        Fault("text", "half a surrogate pair", _text(b"a novel \xed\xa0\x80", "expected UTF-8 text, got byte 8")),
        Fault("text", "a byte order mark alone", _text(b"\xef\xbb\xbf", "expected at least one character")),
        Fault("text", "damaged after a byte order mark", _text(b"\xef\xbb\xbfabc\xff", "got byte 6 that is not")),
        Fault("text", "a pipe", _text(os.mkfifo, "not a regular file")),
        Fault("text", "a device", _text(_link("/dev/zero"), "not a regular file")),
        Fault("text", "a terminal", _text(_link("/dev/ptmx"), "not a regular file")),
        Fault("text", "a socket", _text(_socket, "No such device or address")),
        Fault("text", "endless", _text(_endless, "more than 1073741824 bytes")),
        Fault("text", "a link to itself", _text(_link("novel.txt"), "Too many levels of symbolic links")),
        Fault("text", "a link to nothing", _text(_link("nowhere"), "No such file or directory")),
        Fault("step", "the name of a library", _mine("matplotlib.py", "make = 3", "has no function make")),
        Fault("step", "ends Python", _mine("mine.py", "raise SystemExit(0)", "raised SystemExit: 0")),
        Fault(
            "step", "asks to end Python", _mine("my.py", "def make(): raise SystemExit", "make raised SystemExit")
        ),
        Fault("unwritable", "a file", _place("file", "File exists")),
        Fault("unwritable", "below a file", _place("file/below", "Not a directory")),
        Fault("unwritable", "below /proc", _place("/proc/bptt-jax", "/proc/bptt-jax: ")),
        Fault("unwritable", "a device", _place("/dev/null/out", "Not a directory")),
        Fault("unwritable", "too long a name", _place("x" * 300, "File name too long")),
        Fault("name", "two lines", _named("a\nb")),
        Fault("name", "from right to left", _named("a\u202eb")),
        Fault("name", "not UTF-8", _named("a\udcff")),
        Fault("disk full", "not a byte", _diagnose_beyond(0)),
        Fault("disk full", "half a figure", _diagnose_beyond(4096)),
        Fault("disk full", "a file system of 64 kB", _tmpfs),
        Fault("disk full", "while training", _train_on_a_full_disk),
        *(
            Fault("disk full", f"{size} bytes a file, from the beginning", _begin_beyond(size), rare=True)
            for size in FILES
        ),
        *(Fault("disk full", f"training in {size}", _train_in(size), rare=size != "64k") for size in FILE_SYSTEMS),
        *(
            Fault("settings", name, _settings(content), rare=name in ("without end", "a number of 10,000 digits"))
            for name, content in DAMAGED_SETTINGS.items()
        ),
        Fault("settings", "a folder", _settings(Path.mkdir), rare=True),
        Fault("settings", "a pipe", _settings(os.mkfifo)),
        Fault("settings", "a device", _settings(_link("/dev/zero"))),
        Fault("settings", "endless", _settings(_endless)),
        Fault("settings", "a link to itself", _settings(_link("settings.json")), rare=True),
        Fault("settings", "a link that leads out", _settings(_link("/etc/hostname")), rare=True),
        *(Fault("settings", f"{k} = {v!r}", _setting(k, v)) for k, v in CHANGED_SETTINGS),
        Fault("foreign", "names a text", _foreign_text),
        *(
            Fault("foreign", f"{name} lies elsewhere", _checkpoints(_leads_out(name), message))
            for name, message in OUT
        ),
        Fault("foreign", "names the files of arrays", _checkpoints(_outside_database, "damaged")),
        Fault("foreign", "a database that leads out", _checkpoints(_outside_manifest, "damaged")),
        Fault("foreign", "a pipe", _checkpoints(_in_checkpoint("default/_METADATA", os.mkfifo), NO_FILE)),
        Fault("foreign", "a pipe beside", _checkpoints(_in_checkpoint("default/d/more", os.mkfifo), NO_FILE)),
        Fault(
            "foreign",
            "a device",
            _checkpoints(_in_checkpoint("_CHECKPOINT_METADATA", _link("/dev/zero")), NO_FILE),
        ),
        Fault(
            "foreign", "endless metadata", _checkpoints(_in_checkpoint("_CHECKPOINT_METADATA", _endless), "damaged")
        ),
        Fault("foreign", "endless", _checkpoints(_in_checkpoint("default/d/more", _endless), "too large")),
        Fault(
            "foreign", "metadata without end", _checkpoints(_in_checkpoint("default/_METADATA", _nested), "damaged")
        ),
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
        Fault("log", "a folder", _log_is(Path.mkdir, "log.jsonl: cannot be read: Is a directory"), rare=True),
        Fault("log", "a pipe", _log_is(os.mkfifo, "log.jsonl: cannot be read: not a regular file")),
        Fault("log", "endless", _log_is(_endless, "log.jsonl: cannot be read: more than"), rare=True),
        Fault(
            "log", "a link that leads out", _log_is(_link("/etc/hostname"), "log.jsonl: leads out of the folder")
        ),
        Fault(
            "log", "a link to itself", _log_is(_link("log.jsonl"), "Too many levels of symbolic links"), rare=True
        ),
        Fault(
            "log",
            "a value of another kind",
            _log(_of_another_kind, "line 1 of log.jsonl is damaged: its loss"),
        ),
        Fault("log", "a key missing", _log(_without_key, "line 1 of log.jsonl is damaged: it has no clipped")),
        Fault("two at once", "the same run, 60 times", _two_begin({"rate": 1}), True),
        Fault("two at once", "different runs, 60 times", _two_begin({"rate": 2}), True),
        Fault("interrupted", "SIGTERM in training", _signalled(LONG_TRAIN, signal.SIGTERM, 143, RESUMES), True),
        Fault(
            "interrupted",
            "SIGTERM in diagnosing",
            _signalled(LONG_DIAGNOSE, signal.SIGTERM, 143, "no file was written"),
            True,
        ),
        Fault("interrupted", "SIGKILL in diagnosing", _signalled(LONG_DIAGNOSE, signal.SIGKILL, -9, ""), True),
    ]
