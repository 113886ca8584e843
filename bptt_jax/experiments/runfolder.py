"""The folder of a training run: its settings, its log, its checkpoints; whole at every moment."""

import errno
import json
import math
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from reprlib import Repr
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np

from bptt_jax.files import atomic_path, read_file, write_json
from bptt_jax.leaves import to_jsonable

Tree = TypeVar("Tree")
_KEPT = 2
_SETTINGS, _LOG, _CHECKPOINTS, _LOCK = "settings.json", "log.jsonl", "checkpoints", ".lock"
_PROGNOSIS = "prognosis.json"
_reserved: set[Path] = set()
_DEEPEST = 50  # lists and groups within each other, in settings and log
_MOST_SETTINGS, _MOST_LOG = 1 << 24, 1 << 32  # bytes
_FILES = 100  # more than a checkpoint consists of
_HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)  # the last where locks are those of a file server
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


class RunFolderError(ValueError):
    """The folder holds a run of other settings or shapes, half a run, one that is going on, or none."""


class RunFolder:
    """``settings.json``, ``log.jsonl`` (a record a line) and ``checkpoints/`` (orbax, by number of updates).

    Of each chunk the log's lines are written before its checkpoint, and orbax gives a checkpoint its name only
    when it is complete. So whenever the process ends, the last whole checkpoint and the lines up to it are one
    consistent state; `restore` takes these and drops what came after.

    One process at a time: ``.lock``, an empty file that stays, is locked by `flock` from before the folder is begun,
    or is `reserved`, until it is closed, and the lock goes with the process, however that ends. On NFS the server keeps
    the lock, for all its hosts. A file system without locks is warned of, and on a system without `flock` (Windows)
    nothing keeps two processes apart.

    Beside them may stand ``prognosis.json``, what was foretold when the run began.

    What is read must lie in the folder: of a link that leads out of it nothing is read.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        """Opens the folder, or begins it.

        Raises:
          RunFolderError: the folder holds a run of other settings, or another process has it open.
          TypeError: the settings are not in JSON types.
          ValueError: they nest too deep.
          OSError: the folder cannot be written.
          ImportError: orbax-checkpoint is missing.
        """
        folder = Path(folder)
        _check_depth(dict(settings))
        try:
            json.dumps(dict(settings))
        except TypeError as error:
            raise TypeError(f"settings: expected JSON types, got: {error}") from None
        here = to_jsonable(dict(settings))
        _check_name(folder)
        _begun(folder, here)  # what is refused is left as it was, without even a lock
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            opened.enter_context(_lock_taken_over(folder) or _locked(folder))
            if not _begun(folder, here):  # once more, now that no other process can begin it
                write_json(folder / _SETTINGS, here)
            self._manager = opened.enter_context(_manager(folder, write=True))
            self._writer = opened.enter_context(ThreadPoolExecutor(1))
            self._opened = opened.pop_all()
        self._log = _within(folder, _LOG)
        self._writing: Future[Any] | None = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()
        if kind is None and self._writing is not None:
            self._writing.result()

    def restore(self, example: Tree) -> tuple[Tree, list[dict[str, Any]]]:
        """The last state, or `example` if there is none, and the log up to it; later lines are dropped.

        Raises:
          RunFolderError: the state is not of `example`'s structure, shapes or dtypes, or it or the log is damaged.
        """
        update = self._manager.latest_step()
        try:
            there = read_file(self._log, most=_MOST_LOG).decode("utf-8", errors="replace")
        except FileNotFoundError:
            there = ""
        except OSError as error:
            raise RunFolderError(f"{self._log}: cannot be read: {error.strerror}") from None
        records = [] if update is None else _until(there.splitlines(), update)
        if update is not None and not (records and records[-1]["updates"] == update):
            raise RunFolderError(f"{self._log}: does not reach as far as checkpoint {update}")
        kept = _lines(records)
        if kept != there:
            with atomic_path(self._log) as temporary:
                temporary.write_text(kept, encoding="utf-8")
        return example if update is None else _restored(self._manager, update, example), records

    def keep(self, update: int, state: Any, records: list[dict[str, Any]]) -> None:
        """Appends the records to the log, then has a checkpoint written while the caller goes on.

        Raises:
          OSError: what went wrong with the checkpoint before this one; that of the last is raised on exit.
        """
        if self._writing is not None:
            self._writing.result()
        _check_room(self._log.parent, _most(_shapes(state)))
        with self._log.open("a", encoding="utf-8") as log:
            log.write(_lines(records))
        self._writing = self._writer.submit(_save, self._manager, update, state)


def last_checkpoint(folder: Path) -> int | None:
    """Of which update the last whole checkpoint of a folder is; None if there is none, or no folder."""
    try:
        names = [path.name for path in (folder / _CHECKPOINTS).iterdir()]
    except OSError:
        return None
    return max((int(name) for name in names if name.isdecimal()), default=None)


def holds_run(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a folder holds a run; nothing is computed, and nothing written.

    Args:
      folder: of the run.
      settings: in JSON types, some of the run's or all.

    Raises:
      RunFolderError: it holds a run in which they differ, or half of one.
    """
    _check_name(folder)
    return _begun(folder, to_jsonable(dict(settings)), all_of_them=False)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run that a folder holds.

    Raises:
      RunFolderError: it holds none, or they are damaged.
    """
    try:
        settings = _read_json(folder, _SETTINGS)
    except (FileNotFoundError, NotADirectoryError):
        raise RunFolderError(f"{folder}: no training run is there") from None
    if not isinstance(settings, dict):
        raise RunFolderError(f"{folder / _SETTINGS}: expected the settings of a run, got {_SHORT.repr(settings)}")
    return settings


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder in which this one is about to begin a run, or to go on with one.

    Raises:
      RunFolderError: another process is there.
    """
    with _locked(folder):
        _reserved.add(folder.absolute())
        try:
            yield
        finally:
            _reserved.discard(folder.absolute())


def write_prognosis(folder: Path, prognosis: Mapping[str, Any] | None) -> None:
    """What is foretold of a run that is about to begin in a `reserved` folder: ``prognosis.json``, or none."""
    if prognosis is None:
        (folder / _PROGNOSIS).unlink(missing_ok=True)  # of another run that never began
    else:
        write_json(folder / _PROGNOSIS, dict(prognosis))


def read_prognosis(folder: Path) -> dict[str, Any] | None:
    """What was foretold when the run of a folder began: its ``statement``, the pilot's ``updates``, and numbers; None
    if nothing was.

    Raises:
      RunFolderError: it is damaged.
    """
    try:
        prognosis = _read_json(folder, _PROGNOSIS)
    except FileNotFoundError:
        return None
    if not isinstance(prognosis, dict) or [type(prognosis.get(k)) for k in ("statement", "updates")] != [str, int]:
        raise RunFolderError(f"{folder / _PROGNOSIS}: expected a prognosis, got {_SHORT.repr(prognosis)}")
    return prognosis


def read_state(folder: Path, example: Tree) -> Tree:
    """The state of the last whole checkpoint; a run that is going on is not disturbed.

    Args:
      folder: of the run. Nothing is read outside of it.
      example: a pytree of arrays, or of `jax.ShapeDtypeStruct`.

    Raises:
      RunFolderError: there is none, it is damaged, or it is not of `example`'s structure, shapes or dtypes.
      ImportError: orbax-checkpoint is missing.
    """
    for last in (False, False, True):
        with _manager(folder, write=False) as manager:
            update = manager.latest_step()
            if update is None:
                raise RunFolderError(f"{folder}: no checkpoint is there yet")
            try:
                return _restored(manager, update, example)
            except RunFolderError:
                # Else the run that is going on has put newer ones in its place.
                if last or (Path(manager.directory) / str(update)).exists():
                    raise
    raise AssertionError("the last of them returns or raises")


def _within(folder: Path, name: str) -> Path:
    """The path of a part of the folder.

    Raises:
      RunFolderError: it is a link that leads out of the folder.
    """
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise RunFolderError(f"{path}: leads out of the folder")
    return path


def _read_json(folder: Path, name: str) -> Any:
    """A part of the folder.

    Raises:
      RunFolderError: it cannot be read.
      FileNotFoundError, NotADirectoryError: it is not there.
    """
    try:
        return _parsed(read_file(_within(folder, name), most=_MOST_SETTINGS).decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError, RunFolderError):
        raise
    except OSError as error:
        raise RunFolderError(f"{folder / name}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # neither JSON nor UTF-8 raise anything else
        raise RunFolderError(f"{folder / name}: cannot be read: {error}") from None


def _check_name(folder: Path) -> None:
    """Raises RunFolderError unless orbax, which wants UTF-8, can name the folder."""
    try:
        str(folder.absolute()).encode("utf-8")
    except UnicodeEncodeError:
        raise RunFolderError(f"{folder}: expected a name in UTF-8") from None


def _begun(folder: Path, here: dict[str, Any], *, all_of_them: bool = True) -> bool:
    """Whether the folder holds a run of these settings, and, if they are all of them, of no others.

    Raises:
      RunFolderError: it holds another, or half of one.
    """
    checkpoints = _within(folder, _CHECKPOINTS).exists()  # asked first: whoever begins a folder makes them last
    _within(folder, _LOG)
    if _within(folder, _SETTINGS).exists():
        there = read_settings(folder)
        _compare(folder, there if all_of_them else {k: v for k, v in there.items() if k in here}, here)
        return True
    if checkpoints:
        raise RunFolderError(f"{folder}: has checkpoints, but no {_SETTINGS} to say whose")
    return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock.

    Raises:
      RunFolderError: another process holds it.
    """
    # For writing, without which NFS gives no lock; a pipe is not waited for.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(folder / _LOCK, flags, 0o666), "rb", buffering=0) as handle:
        try:
            import fcntl
        except ImportError:  # not there on every system
            yield
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise RunFolderError(f"{folder}: another process is training there") from None
            told = f"{folder}: its file system has no locks ({error.strerror}): nothing keeps a second process out"
            warnings.warn(told, RuntimeWarning, stacklevel=4)
            yield
            return
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # a forked process may have the file open still


def _lock_taken_over(folder: Path) -> AbstractContextManager[None] | None:
    """Nothing to lock where the folder is reserved, for one run."""
    if folder.absolute() not in _reserved:
        return None
    _reserved.remove(folder.absolute())
    return nullcontext()


@contextmanager
def _manager(folder: Path, *, write: bool) -> Iterator[Any]:
    try:
        import orbax.checkpoint as orbax
    except ImportError as error:
        raise ImportError("checkpoints need orbax: python -m pip install 'bptt_jax[train]'") from error
    _check_name(folder)
    place = _within(folder, _CHECKPOINTS).absolute()
    for path, status in _files(place):  # for orbax opens what it finds, all that ends there and all that does not
        if not stat.S_ISREG(status.st_mode):
            raise RunFolderError(f"{path}: neither a file nor a folder of its own")
        if path.name == "_CHECKPOINT_METADATA" and status.st_size > _MOST_SETTINGS:
            raise RunFolderError(f"{path}: damaged, {status.st_size} bytes")
    if write:
        place.mkdir(parents=True, exist_ok=True)
        # Saved on a thread of our own: an interrupt of the main thread inside orbax leaves it in disorder, and its
        # own asynchronous saves can then hang for good.
        options = orbax.CheckpointManagerOptions(
            max_to_keep=_KEPT, cleanup_tmp_directories=True, enable_async_checkpointing=False
        )
    elif place.is_dir():
        options = orbax.CheckpointManagerOptions(create=False)  # looks on: neither deletes nor tidies up
    else:
        raise RunFolderError(f"{folder}: no checkpoint is there yet")
    manager = orbax.CheckpointManager(place, options=options, item_handlers=orbax.StandardCheckpointHandler())
    try:
        yield manager
    finally:
        manager.close()


def _check_room(folder: Path, size: int) -> None:
    """Raises OSError unless so many bytes can be written there.

    Orbax writes on many threads; where one of them fails, the others print their tracebacks, up to Python's end.
    """
    free = os.statvfs(folder) if hasattr(os, "statvfs") else None
    if free is not None and free.f_files and free.f_favail < _FILES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))  # for files, of any size
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # sees quotas too
            try:
                os.posix_fallocate(file.fileno(), 0, size)
                return
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise OSError(error.errno, error.strerror, str(folder)) from None
                # It cannot be reserved there; what is free still tells most.
        if shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _files(place: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All below, links not followed, that are no folders; another process may be writing and deleting there."""
    for folder, folders, files in os.walk(place):
        for name in [*folders, *files]:
            path = Path(folder) / name
            with suppress(FileNotFoundError):
                status = path.lstat()
                if not stat.S_ISDIR(status.st_mode):
                    yield path, status


def _save(manager: Any, update: int, state: Any) -> None:
    import orbax.checkpoint as orbax

    try:
        manager.save(update, args=orbax.args.StandardSave(_named(state)))
    except Exception as error:  # of many kinds, whatever a full disk makes of orbax
        raise _unwritten(Path(manager.directory) / str(update), error) from None


def _unwritten(place: Path, error: Exception) -> OSError:
    """In one line, and without what orbax left unfinished, of which Python would complain at its end."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(found[1]) if found else error.errno if isinstance(error, OSError) else None
    if number:
        return OSError(number, os.strerror(number), str(place))
    return OSError(f"{place}: {type(error).__name__}: {' '.join(str(error).split()):.200}")


def _restored(manager: Any, update: int, example: Tree) -> Tree:
    import orbax.checkpoint as orbax

    named = _named(example)
    here = _shapes(example)
    try:
        _read_through(Path(manager.directory) / str(update), _most(here))
        found = manager.item_metadata(update).items()
        there = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in found}
    except RunFolderError:
        raise
    except Exception as error:  # of many kinds, whatever a damaged file makes of orbax
        raise _damaged(manager, update, error) from error
    if there != here:
        wrong = sorted(n for n in there.keys() | here.keys() if there.get(n) != here.get(n))
        raise RunFolderError(f"checkpoint {update}: its state is not of this network and optimiser: {wrong[0]}")
    here_alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # not where the devices that wrote it were

    def wanted(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here_alone)

    abstract = jax.tree.map(wanted, named)
    try:
        restored = manager.restore(update, args=orbax.args.StandardRestore(abstract))
    except Exception as error:
        raise _damaged(manager, update, error) from error
    return jax.tree.unflatten(jax.tree.structure(example), [restored[name] for name in named])


def _shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in _named(tree).items()}


def _most(arrays: dict[str, tuple[tuple[int, ...], np.dtype]]) -> int:
    """Bytes that a checkpoint of them may take: orbax writes them twice, in blocks, with some words about each."""
    content = sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays.values())
    return (1 << 18) + (1 << 13) * len(arrays) + 3 * content


def _read_through(place: Path, most: int) -> None:
    """Raises an error if a checkpoint names files by itself, is too large, or a part of it cannot be read.

    Orbax would find the latter out too, but it reads all arrays at once, and those that fail after the first print
    their tracebacks when they like.
    """
    import tensorstore

    if sum(status.st_size for _, status in _files(place)) > most:
        raise RunFolderError(f"checkpoint {place.name}: its state is not of this network and optimiser: too large")
    arrays = place / "default"
    # Older orbax does not say so, and takes the database where there is one.
    if _parsed(read_file(arrays / "_METADATA", most=most).decode("utf-8")).get("use_ocdbt", True) is not True:
        raise ValueError(f"{place}: arrays in files whose names it chooses itself")
    base = {"driver": "file", "path": f"{arrays}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = store.list().result()
    if not keys:  # which is how a database looks whose manifest is gone
        raise ValueError(f"{place}: no arrays")
    for key in keys:
        store.read(key).result()
    for path in arrays.glob("array_metadatas/*"):
        _parsed(path.read_text(encoding="utf-8"))


def _damaged(manager: Any, update: int, error: Exception) -> RunFolderError:
    place = Path(manager.directory) / str(update)
    others = [step for step in manager.all_steps() if step != update]
    further = f"; with it moved away the run goes on from update {max(others)}" if others else ""
    return RunFolderError(f"{place}: damaged ({type(error).__name__}){further}")


def _parsed(text: str) -> Any:
    """JSON.

    Raises:
      ValueError: it is none, or nests too deep.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    """Raises ValueError if so many lists and groups lie within each other that recursion might not end."""
    level = [value]
    for _ in range(_DEEPEST):
        groups = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list, tuple))]
        level = [child for group in groups for child in group]
        if not level:
            return
    raise ValueError(f"expected at most {_DEEPEST} lists and groups within each other")


def _named(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _until(lines: list[str], update: int) -> list[dict[str, Any]]:
    records = []
    for line in lines:
        try:
            record = _parsed(line)
        except ValueError:  # cut off while it was written
            break
        if not isinstance(record, dict) or not isinstance(record.get("updates"), int) or record["updates"] > update:
            break
        records.append(record)
    return records


def _compare(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    there, here = _flat(there), _flat(here)
    differ = [
        k for k in sorted(there.keys() | here.keys()) if (k in there, there.get(k)) != (k in here, here.get(k))
    ]
    if differ:

        def show(settings: dict[str, Any], name: str) -> str:
            return _SHORT.repr(settings[name]) if name in settings else "nothing"

        what = "; ".join(f"{k}: {show(there, k)} there, {show(here, k)} here" for k in differ)
        raise RunFolderError(f"{folder}: holds a run of other settings ({what})")


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """With a group's settings by name, ``group.name``, so that a message can say which of them differs."""
    single = {k: v for k, v in settings.items() if not isinstance(v, dict)}
    grouped = {k: v for k, v in settings.items() if isinstance(v, dict)}
    return single | {f"{k}.{name}": v for k, group in grouped.items() for name, v in group.items()}
