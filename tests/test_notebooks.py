"""The notebooks run, on small settings, and are committed with what they show."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
# By name, the small setting that stands for the first cell, and libraries that are not among the tests' own.
NOTEBOOKS: dict[str, tuple[str, list[str]]] = {
    "agent_memory": ("updates = 2", []),
    "characters": ("updates, longest = 1, 4", []),
    "decision": ("updates, starts = 2, 8", []),
    "depth_as_time": ("updates = 2", []),
    "double_pendulum": ("steps, values, updates = 100, 4, 2", []),
    "flipflop": ("updates = 2", []),
    "irregular_times": ("observations, sequences = 20, 2", ["diffrax"]),
    "pytorch_checkpoint": ("steps, sequences = 40, 2", []),
    "spiking": ("updates = 2", ["spyx"]),
    "unrolled_optimisation": ("updates, rates, meta_updates = 20, 8, 2", []),
}
CLOSING = "## What the numbers changed"


def cells(name: str) -> list[dict]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def assigned(source: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


def test_all_are_listed_here_and_on_the_site() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NOTEBOOKS)
    settings = ast.parse((FOLDER.parent / "docs" / "conf.py").read_text(encoding="utf-8"))
    (listed,) = (
        node.value for node in settings.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NOTEBOOKS"
    )  # fmt: skip
    assert set(ast.literal_eval(listed)) == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_asks_and_answers(name: str) -> None:
    texts = ["".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "markdown"]
    assert re.fullmatch(r"# .+\?", texts[0].splitlines()[0])
    headings = [line for text in texts for line in text.splitlines() if line.startswith("## ")]
    assert headings[-1] == CLOSING
    first = next(cell for cell in cells(name) if cell["cell_type"] == "code")
    assert assigned("".join(first["source"])) == assigned(NOTEBOOKS[name][0])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_was_run_from_top_to_bottom_and_has_pictures(name: str) -> None:
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    told = "".join("".join(output["text"]) for output in outputs if output.get("name") == "stderr")
    assert all(re.match(r"\d+ of \d+ updates: ", line) for line in told.splitlines())  # progress
    assert any("image/png" in output.get("data", {}) for output in outputs)
    words = [output.get("text", output.get("data", {}).get("text/plain", "")) for output in outputs]
    assert not re.search(r"(^|[\s'\"(])/[a-z]+/\w", "\n".join("".join(w) for w in words))  # a path of some machine
    assert max(len("".join(cell["source"]).splitlines()) for cell in code) <= 45


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, libraries = NOTEBOOKS[name]
    for library in ["nbclient", "ipykernel", *libraries]:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed: python -m pip install -e '.[notebooks]'")
    import nbclient
    import nbformat

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = f"import warnings\nwarnings.simplefilter('error')\n{small}"
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
