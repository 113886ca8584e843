"""The examples of the README and of the guides are run as they stand."""

import re
import shlex
from pathlib import Path

import jax
import pytest
from slices import covering

import bptt_jax
from bptt_jax.cli.parser import parser

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted(ROOT.glob("docs/*.md")))


def examples(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


EXAMPLES = {f"{page.stem} {n}": code for page in PAGES for n, code in enumerate(examples(page), 1)}


OFTEN = [name for name in EXAMPLES if name.startswith("README") or name.endswith(" 1")]


@pytest.mark.parametrize("name", covering(EXAMPLES, *OFTEN))
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = EXAMPLES[name]
    for library in ("torch", "keras"):
        if re.search(rf"^import .*\b{library}\b", code, re.MULTILINE):
            pytest.importorskip(library)
    keras = re.search(r"^import .*\bkeras\b", code, re.MULTILINE)
    mixed = keras or re.search("MultiSteps|adam", code)  # which reckon with a count
    with (
        jax.numpy_dtype_promotion("standard" if mixed else "strict"),
        jax.numpy_rank_promotion("allow" if keras else "raise"),
    ):
        exec(compile(code, f"example {name}", "exec"), {})
    printed = capsys.readouterr().out
    for promised in re.findall(r"print\(.*\)  # (.*)", code):
        assert promised in printed


def test_first_example_is_ten_lines() -> None:
    assert len([line for line in EXAMPLES["README 1"].splitlines() if line.strip()]) <= 10


def test_every_page_has_examples() -> None:
    assert {name.split()[0] for name in EXAMPLES} == {page.stem for page in PAGES} - {"benchmarks", "changelog"}


def test_commands_are_there_each_in_one_block() -> None:
    text = README.read_text(encoding="utf-8")
    for title, command in (
        ("Run", "python -m pip install '.[plot]' && bptt-jax diagnose"),
        ("Test", "python -m pip install -e '.[test]' && python -m pytest"),
    ):
        section = text.split(f"## {title}\n")[1].split("\n## ")[0]
        assert re.findall(r"```\w*\n(.*?)\n```", section, re.DOTALL) == [command]


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)


def test_the_front_page_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 180


COMMANDS = sorted(
    {
        line.strip()
        for page in (
            *PAGES,
            *(Path(bptt_jax.__file__).parent / "cli" / name for name in ("parser.py", "new_step.txt")),
        )
        for line in re.findall(
            r"(?:^ *|`|&& )(bptt-jax (?:\w|--)[^`\n]*)", page.read_text(encoding="utf-8"), re.MULTILINE
        )
    }
)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_that_are_shown_are_understood(line: str) -> None:
    """As far as the parser: nothing is run."""
    words = shlex.split(line.replace("TASK", "adding").replace("FOLDER", "."))[1:]
    if words[-1] in ("--help", "--version"):
        return
    if words in (["train"], ["new-step"], ["completion"]) or "bash|zsh|fish" in line:
        return  # spoken of, without what it wants
    words += ["."] * (words[-1] in ("--checkpoint", "--weights"))
    arguments = parser().parse_args(words)
    assert arguments.command == words[0]
