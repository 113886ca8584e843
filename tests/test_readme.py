"""The examples of the README and of the guides are run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EXAMPLES = {
    f"{path.stem} {number}": code
    for path in (README, *sorted(ROOT.glob("docs/*.md")))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL), 1)
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = EXAMPLES[name]
    if re.search(r"^import .*\btorch\b", code, re.MULTILINE):
        pytest.importorskip("torch")
    exec(compile(code, f"example {name}", "exec"), {})
    printed = capsys.readouterr().out
    for promised in re.findall(r"print\(.*\)  # (.*)", code):
        assert promised in printed


def test_first_example_is_ten_lines() -> None:
    assert len([line for line in EXAMPLES["README 1"].splitlines() if line.strip()]) <= 10


def test_every_page_with_code_has_examples() -> None:
    pages = {name.split()[0] for name in EXAMPLES}
    assert pages == {"README"} | {path.stem for path in ROOT.glob("docs/*.md")} - {"index"}


def test_commands_are_there_each_in_one_block() -> None:
    text = README.read_text(encoding="utf-8")
    for title, command in (
        ("Run", "python -m pip install '.[plot]' && bptt-jax diagnose"),
        ("Test", "python -m pip install -e '.[test]' && python -m pytest"),
    ):
        section = text.split(f"## {title}\n")[1].split("\n## ")[0]
        assert re.findall(r"```\w*\n(.*?)\n```", section, re.DOTALL) == [command]
