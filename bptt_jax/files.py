"""Files: written to a temporary name, then moved, so whole or not there; read if they are files, and end."""

import errno
import io
import json
import os
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bptt_jax.leaves import to_jsonable

_INFLATED = 1 << 32  # bytes that a compressed archive may take


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, moved onto it at the end, and removed if anything goes wrong."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes files that only their owner may read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(to_jsonable(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_file(path: Path, *, most: int) -> bytes:
    """What a regular file holds. Never waits for another process, and never reads without end.

    Raises:
      OSError: it cannot be read; it is a folder, a pipe or a device, or holds more than `most` bytes.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        size, parts = status.st_size, []
        while size <= most and (part := file.read(1 << 20)):
            parts.append(part)
            size = max(size, sum(map(len, parts)))
    if size > most:
        raise OSError(errno.EFBIG, f"more than {most} bytes", str(path))
    return b"".join(parts)


def open_archive(content: bytes) -> zipfile.ZipFile:
    """A zip archive that does not inflate without end: no member gives more bytes than it declares.

    Raises:
      ValueError: it takes more memory than weights or data do, for its size.
      zipfile.BadZipFile: it is none.
    """
    archive = zipfile.ZipFile(io.BytesIO(content))
    size = sum(member.file_size for member in archive.infolist())
    if size > max(_INFLATED, 2 * len(content)):
        raise ValueError(f"{len(content)} bytes inflate to {size}")
    return archive


def read_npz(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of an archive of NumPy's, by name.

    Raises:
      ValueError, and whatever NumPy raises of a damaged one.
    """
    open_archive(content).close()
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name} is no array")
    return arrays
