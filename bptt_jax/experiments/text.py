"""Real text, character by character."""

import codecs
import io
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax.checks import check_key, check_leaves, check_positive_int
from bptt_jax.files import read_file
from bptt_jax.results import counted
from bptt_jax.step import Array

_MOST = 1 << 30  # bytes of a text
_OTHERS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


class Corpus(NamedTuple):
    """A text as integers.

    Attributes:
      vocabulary: its distinct characters, sorted; character i has code i.
      codes: ``[n]`` int32.
    """

    vocabulary: str
    codes: np.ndarray


def english_text() -> str:
    """The topics of Python's own ``help()``, some 450 kB of English technical prose that CPython carries.

    Raises:
      FileNotFoundError: this Python came without them.
    """
    try:
        from pydoc_data import topics
    except ImportError:
        raise FileNotFoundError(
            "this Python carries no help texts (pydoc_data.topics), the default corpus: give a text of your own"
        ) from None
    return "\n".join(topics.topics[name] for name in sorted(topics.topics))


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file of at most 1 GiB, without a byte order mark; every line ends in a line feed.

    Raises:
      OSError: it cannot be read, or is no regular file.
      ValueError: it is not UTF-8; the message says at which byte.
    """
    content = read_file(Path(path), most=_MOST)
    mark = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        text = content[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        other = next((f", as {name} begins" for name, marks in _OTHERS.items() if content.startswith(marks)), "")
        raise ValueError(
            f"{path}: expected UTF-8 text, got byte {mark + error.start} that is not: {error.reason}{other}"
        ) from None
    return io.StringIO(text, newline=None).getvalue()


def corpus(text: str) -> Corpus:
    """Numbers the characters of `text`.

    Raises:
      TypeError: the text is no string.
      ValueError: the text is empty, or holds half a surrogate pair, which is no character.
    """
    if not isinstance(text, str):
        raise TypeError(f"text: expected a string, got {type(text).__name__}")
    if not text:
        raise ValueError("text: expected at least one character, got an empty text")
    try:
        encoded = text.encode("utf-32-le")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: expected characters, got at {error.start} one that is not: {error.reason}"
        ) from None
    characters, codes = np.unique(np.frombuffer(encoded, np.uint32), return_inverse=True)
    return Corpus("".join(map(chr, characters)), codes.astype(np.int32))


def windows(key: Array, codes: Array | np.ndarray, batch: int, length: int) -> tuple[Array, Array]:
    """Random windows of a text, to predict the next character at every position.

    Args:
      key: random key.
      codes: ``[n]`` integers.
      batch: B, of windows.
      length: T, of steps.

    Returns:
      ``(inputs [B, T], targets [B, T])``, the targets one character later.

    Raises:
      TypeError, ValueError: an argument is out of its range; the text has fewer than T + 1 characters.
    """
    batch, length = check_positive_int("batch", batch), check_positive_int("length", length)
    check_key("key", key)
    check_leaves("codes", codes)
    if not isinstance(codes, (jax.Array, np.ndarray)):
        raise TypeError(f"codes: expected integers [n], got {type(codes).__name__}")
    if codes.ndim != 1 or not jnp.issubdtype(codes.dtype, jnp.integer):
        raise TypeError(f"codes: expected integers [n], got {codes.dtype}{list(codes.shape)}")
    if len(codes) <= length:
        few = counted(length, "character")
        raise ValueError(f"text: expected more than {few} for windows of {length}, got {len(codes)}")
    starts = jax.random.randint(key, (batch,), 0, len(codes) - length)
    cut = jnp.asarray(codes)[starts[:, None] + jnp.arange(length + 1)[None]]
    return cut[:, :-1], cut[:, 1:]
