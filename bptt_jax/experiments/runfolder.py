"""The folder of a training run: its settings, its log, its checkpoints; whole at every moment."""

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

import jax
import numpy as np

from bptt_jax.files import atomic_path, write_json
from bptt_jax.leaves import to_jsonable

Tree = TypeVar("Tree")
_KEPT = 2
_SETTINGS = "settings.json"


class RunFolderError(ValueError):
    """The folder holds a run of other settings or shapes, half a run, one that is going on, or none."""


class RunFolder:
    """``settings.json``, ``log.jsonl`` (a record a line) and ``checkpoints/`` (orbax, by number of updates).

    Of each chunk the log's lines are written before its checkpoint, and orbax gives a checkpoint its name only
    when it is complete. So whenever the process ends, the last whole checkpoint and the lines up to it are one
    consistent state; `restore` takes these and drops what came after.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        """Opens the folder, or begins it.

        Raises:
          RunFolderError: the folder holds a run of other settings.
          TypeError: the settings are not in JSON types.
          ImportError: orbax-checkpoint is missing.
        """
        folder = Path(folder)
        try:
            json.dumps(dict(settings))
        except TypeError as error:
            raise TypeError(f"settings: expected JSON types, got: {error}") from None
        here = to_jsonable(dict(settings))
        if (folder / _SETTINGS).exists():
            _compare(folder, read_settings(folder), here)
        elif (folder / "checkpoints").exists():
            raise RunFolderError(f"{folder}: has checkpoints, but no {_SETTINGS} to say whose")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / _SETTINGS, here)
        self._lock = _locked(folder)
        self._manager = _manager(folder, write=True)
        self._log = folder / "log.jsonl"
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[Any] | None = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writer.shutdown()
        self._manager.close()
        self._lock.close()
        if kind is None and self._writing is not None:
            self._writing.result()

    def restore(self, example: Tree) -> tuple[Tree, list[dict[str, Any]]]:
        """The last state, or `example` if there is none, and the log up to it; later lines are dropped.

        Raises:
          RunFolderError: the state is not of `example`'s structure, shapes or dtypes, or it or the log is damaged.
        """
        update = self._manager.latest_step()
        there = self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""
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
          OSError, ...: what went wrong with the checkpoint before this one; that of the last is raised on exit.
        """
        if self._writing is not None:
            self._writing.result()
        with self._log.open("a", encoding="utf-8") as log:
            log.write(_lines(records))
        import orbax.checkpoint as orbax

        state = orbax.args.StandardSave(_named(state))
        self._writing = self._writer.submit(self._manager.save, update, args=state)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run that a folder holds.

    Raises:
      RunFolderError: it holds none, or they are damaged.
    """
    try:
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunFolderError(f"{folder}: no training run is there") from None
    except (OSError, ValueError) as error:  # neither JSON nor UTF-8 raise anything else
        raise RunFolderError(f"{folder / _SETTINGS}: cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise RunFolderError(f"{folder / _SETTINGS}: expected the settings of a run, got {settings!r:.40}")
    return settings


def read_state(folder: Path, example: Tree) -> Tree:
    """The state of the last whole checkpoint; a run that is going on is not disturbed.

    Raises:
      RunFolderError: there is none, it is damaged, or it is not of `example`'s structure, shapes or dtypes.
      ImportError: orbax-checkpoint is missing.
    """
    manager = _manager(folder, write=False)
    try:
        update = manager.latest_step()
        if update is None:
            raise RunFolderError(f"{folder}: no checkpoint is there yet")
        return _restored(manager, update, example)
    finally:
        manager.close()


def _locked(folder: Path) -> IO[str]:
    """A file whose lock goes with the process, however that ends.

    Raises:
      RunFolderError: another process holds it.
    """
    handle = (folder / _SETTINGS).open(encoding="utf-8")
    try:
        import fcntl
    except ImportError:  # not there on every system
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise RunFolderError(f"{folder}: another process is training there") from None
    return handle


def _manager(folder: Path, *, write: bool) -> Any:
    try:
        import orbax.checkpoint as orbax
    except ImportError as error:
        raise ImportError("checkpoints need orbax: python -m pip install 'bptt_jax[train]'") from error
    place = (folder / "checkpoints").absolute()
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
    return orbax.CheckpointManager(place, options=options, item_handlers=orbax.StandardCheckpointHandler())


def _restored(manager: Any, update: int, example: Tree) -> Tree:
    import orbax.checkpoint as orbax

    named = _named(example)
    try:
        _read_through(Path(manager.directory) / str(update) / "default")
        found = manager.item_metadata(update).items()
        there = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in found}
    except Exception as error:  # of many kinds, whatever a damaged file makes of orbax
        raise _damaged(manager, update, error) from error
    here = {name: (leaf.shape, leaf.dtype) for name, leaf in named.items()}
    if there != here:
        wrong = sorted(n for n in there.keys() | here.keys() if there.get(n) != here.get(n))
        raise RunFolderError(f"checkpoint {update}: its state is not of this network and optimiser: {wrong[0]}")
    abstract = jax.tree.map(orbax.utils.to_shape_dtype_struct, named)
    try:
        restored = manager.restore(update, args=orbax.args.StandardRestore(abstract))
    except Exception as error:
        raise _damaged(manager, update, error) from error
    return jax.tree.unflatten(jax.tree.structure(example), [restored[name] for name in named])


def _read_through(place: Path) -> None:
    """Raises ValueError if any part of a checkpoint cannot be read.

    Orbax would find that out too, but it reads all arrays at once, and those that fail after the first print their
    tracebacks when they like.
    """
    import tensorstore

    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{place}/"}).result()
    keys = store.list().result()
    if not keys:  # which is how a database looks whose manifest is gone
        raise ValueError(f"{place}: no arrays")
    for key in keys:
        store.read(key).result()
    for path in place.glob("array_metadatas/*"):
        json.loads(path.read_text(encoding="utf-8"))


def _damaged(manager: Any, update: int, error: Exception) -> RunFolderError:
    place = Path(manager.directory) / str(update)
    others = [step for step in manager.all_steps() if step != update]
    further = f"; with it moved away the run goes on from update {max(others)}" if others else ""
    return RunFolderError(f"{place}: damaged ({type(error).__name__}){further}")


def _named(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _until(lines: list[str], update: int) -> list[dict[str, Any]]:
    records = []
    for line in lines:
        try:
            record = json.loads(line)
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
            return repr(settings[name]) if name in settings else "nothing"

        what = "; ".join(f"{k}: {show(there, k)} there, {show(here, k)} here" for k in differ)
        raise RunFolderError(f"{folder}: holds a run of other settings ({what})")


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """With a group's settings by name, ``group.name``, so that a message can say which of them differs."""
    single = {k: v for k, v in settings.items() if not isinstance(v, dict)}
    grouped = {k: v for k, v in settings.items() if isinstance(v, dict)}
    return single | {f"{k}.{name}": v for k, group in grouped.items() for name, v in group.items()}
