"""The folder of a training run: its settings, its log, its checkpoints; whole at every moment."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np

from bptt_jax.files import plain, write_json, written

Tree = TypeVar("Tree")
_KEPT = 2


class RunFolder:
    """``settings.json``, ``log.jsonl`` (a record a line) and ``checkpoints/`` (orbax, by number of updates).

    Of each chunk the log's lines are written before its checkpoint, and orbax gives a checkpoint its name only
    when it is complete. So whenever the process ends, the last whole checkpoint and the lines up to it are one
    consistent state; `restore` takes these and drops what came after.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None = None):
        """Opens the folder, or begins it with these settings; None takes those that are there.

        Raises:
          ValueError: the folder holds a run of other settings, or with None, no run.
          ImportError: orbax-checkpoint is missing.
        """
        try:
            import orbax.checkpoint as orbax
        except ImportError as error:
            raise ImportError("checkpoints need orbax: python -m pip install 'bptt_jax[train]'") from error
        folder = Path(folder)
        path = folder / "settings.json"
        if settings is None:
            if not path.is_file():
                raise ValueError(f"{folder}: no training run is there")
            self.settings = json.loads(path.read_text(encoding="utf-8"))
        else:
            self.settings = json.loads(json.dumps(plain(dict(settings))))
            if path.exists():
                _compare(folder, json.loads(path.read_text(encoding="utf-8")), self.settings)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(path, self.settings)
        self._log = folder / "log.jsonl"
        self._orbax = orbax
        options = orbax.CheckpointManagerOptions(max_to_keep=_KEPT, cleanup_tmp_directories=True)
        self._manager = orbax.CheckpointManager(
            (folder / "checkpoints").absolute(), options=options, item_handlers=orbax.StandardCheckpointHandler()
        )

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._manager.close()  # waits for what is being written

    def restore(self, example: Tree) -> tuple[Tree, list[dict[str, Any]]]:
        """The last state, or `example` if there is none, and the log up to it; later lines are dropped.

        Raises:
          ValueError: the state is not of `example`'s structure, shapes or dtypes.
        """
        update = self._manager.latest_step()
        lines = self._log.read_text(encoding="utf-8").splitlines() if self._log.exists() else []
        records = [] if update is None else _until(lines, update)
        if len(records) < len(lines):
            with written(self._log) as temporary:
                temporary.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        if update is None:
            return example, records
        named = _named(example)
        saved = self._manager.item_metadata(update)
        there = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in saved.items()}
        here = {name: (leaf.shape, leaf.dtype) for name, leaf in named.items()}
        if there != here:
            wrong = sorted(n for n in there.keys() | here.keys() if there.get(n) != here.get(n))
            raise ValueError(f"checkpoint {update}: its state is not of this network and optimiser: {wrong[0]}")
        abstract = jax.tree.map(self._orbax.utils.to_shape_dtype_struct, named)
        restored = self._manager.restore(update, args=self._orbax.args.StandardRestore(abstract))
        return jax.tree.unflatten(jax.tree.structure(example), [restored[name] for name in named]), records

    def keep(self, update: int, state: Any, records: list[dict[str, Any]]) -> None:
        """Appends the records to the log, then writes a checkpoint, which goes on in the background."""
        with self._log.open("a", encoding="utf-8") as log:
            log.write("".join(json.dumps(record) + "\n" for record in records))
        self._manager.save(update, args=self._orbax.args.StandardSave(_named(state)))


def _named(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _until(lines: list[str], update: int) -> list[dict[str, Any]]:
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # cut off while it was written
            break
        if record["updates"] > update:
            break
        records.append(record)
    return records


def _compare(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    missing = "nothing"
    differ = [k for k in sorted(there.keys() | here.keys()) if there.get(k, missing) != here.get(k, missing)]
    if differ:
        what = "; ".join(f"{k}: {there.get(k, missing)!r} there, {here.get(k, missing)!r} here" for k in differ)
        raise ValueError(f"{folder}: holds a run of other settings ({what})")
