"""Files that are whole or not there, and JSON of numbers that JSON has not."""

import json
import os

import pytest

from bptt_jax import files


def test_written_removes_its_temporary_file_and_keeps_the_old_one(tmp_path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")

    def fail() -> None:
        with files.atomic_path(target) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert target.read_text() == "old"
    with files.atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.stat(target).st_mode & 0o400


def test_json_keeps_what_is_not_finite(tmp_path) -> None:
    path = tmp_path / "numbers.json"
    content = {"a": (1.5, float("inf"), -float("inf")), "b": {"c": [float("nan")]}, "d": "text", "e": None, "f": 3}
    files.write_json(path, content)
    read = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))
    assert [float(v) for v in read["a"]] == [1.5, float("inf"), -float("inf")]
    assert read["b"]["c"] == ["nan"]
    assert (read["d"], read["e"], read["f"]) == ("text", None, 3)
