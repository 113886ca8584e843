"""The project's own files agree with each other."""

import re
import tomllib
from pathlib import Path

import bptt_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def version(text: str) -> list[int]:
    """The numbers of a release, ``0.8`` and ``0.8.0`` alike."""
    numbers = [int(n) for n in text.split(".")]
    while numbers[-1] == 0:
        numbers.pop()
    return numbers


def test_the_oldest_versions_are_those_that_are_allowed() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["plot"], *extras["train"], *extras["adapters"]]
    lowest = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in wanted)  # nothing without a bound
    text = (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", text, re.MULTILINE))
    assert {name: version(pinned[name]) for name in lowest} == {name: version(v) for name, v in lowest.items()}


def test_one_version() -> None:
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited.strip("\"'") == bptt_jax.__version__


def test_the_versions_that_are_tested() -> None:
    """`.ci/newest` takes the newest Python of the classifiers; the README names the first and the last."""
    begin = "Programming Language :: Python :: 3."
    minors = sorted(int(line.removeprefix(begin)) for line in PROJECT["classifiers"] if line.startswith(begin))
    first, *_, last = minors
    assert minors == list(range(first, last + 1))
    assert PROJECT["requires-python"] == f">=3.{first}"
    (jax,) = (line.removeprefix("jax>=") for line in PROJECT["dependencies"] if line.startswith("jax>="))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"Python 3\.{first} to 3\.{last} and JAX {re.escape(jax)}\b", readme)
