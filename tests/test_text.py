import builtins

import jax
import numpy as np
import pytest

from bptt_jax.experiments.text import corpus, english_text, read_text, windows


def test_english_text_is_english_and_long() -> None:
    text = english_text()
    assert len(text) > 400_000
    assert text.lower().count(" the ") > 2000


def test_english_text_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == "pydoc_data":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FileNotFoundError, match=r"pydoc_data\.topics.*text of your own"):
        english_text()


def test_corpus_round_trip_beyond_the_basic_plane() -> None:
    text = "naïve 𝄞 größer\n"
    found = corpus(text)
    assert list(found.vocabulary) == sorted(set(text))
    assert "".join(found.vocabulary[i] for i in found.codes) == text
    assert found.codes.dtype == np.int32


def test_corpus_empty() -> None:
    with pytest.raises(ValueError, match="text: expected at least one character"):
        corpus("")


def test_read_text_says_where_it_is_not_utf8(tmp_path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"abc\xe9def")
    with pytest.raises(ValueError, match="byte 3"):
        read_text(path)
    path.write_text("größer", encoding="utf-8")
    assert read_text(path) == "größer"


def test_read_text_takes_what_begins_it_and_ends_its_lines_for_no_characters(tmp_path) -> None:
    path = tmp_path / "of_windows.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\xef\xbb\xbf")
    assert read_text(path) == "one\ntwo\nthree\n\ufeff"  # the second is a character


def test_windows_are_pieces_of_the_text_and_targets_follow() -> None:
    codes = np.arange(100, dtype=np.int32)
    inputs, targets = windows(jax.random.key(0), codes, batch=50, length=7)
    assert inputs.shape == targets.shape == (50, 7)
    np.testing.assert_array_equal(np.diff(inputs, axis=1), 1)
    np.testing.assert_array_equal(targets, inputs + 1)
    assert len(np.unique(inputs[:, 0])) > 20


def test_windows_reach_the_very_end_and_no_further() -> None:
    codes = np.arange(8, dtype=np.int32)
    _, targets = windows(jax.random.key(0), codes, batch=4, length=7)
    np.testing.assert_array_equal(targets, np.tile(np.arange(1, 8), (4, 1)))
    _, targets = windows(jax.random.key(0), codes, batch=40, length=6)
    assert set(np.unique(targets[:, -1])) == {6, 7}
    with pytest.raises(ValueError, match="more than 8 characters for windows of 8, got 8"):
        windows(jax.random.key(0), codes, batch=4, length=8)
