"""The README's examples are run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    code = EXAMPLES[number]
    exec(compile(code, f"README example {number + 1}", "exec"), {})
    printed = capsys.readouterr().out
    for promised in re.findall(r"print\(.*\)  # (.*)", code):
        assert promised in printed


def test_first_example_is_ten_lines() -> None:
    assert len([line for line in EXAMPLES[0].splitlines() if line.strip()]) <= 10
    assert len(EXAMPLES) >= 2


def test_commands_are_there_each_in_one_block() -> None:
    text = README.read_text(encoding="utf-8")
    for title, command in (
        ("Run", "python -m pip install '.[plot]' && bptt-jax diagnose"),
        ("Test", "python -m pip install -e '.[test]' && python -m pytest"),
    ):
        section = text.split(f"## {title}\n")[1].split("\n## ")[0]
        assert re.findall(r"```\w*\n(.*?)\n```", section, re.DOTALL) == [command]
