"""The floors of the package: a module imports from lower ones only, and nothing hides inside a function."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import bptt_jax

ROOT = Path(bptt_jax.__file__).parent
FLOORS = {
    "checks": 0,
    "leaves": 0,
    "devices": 0,
    "interrupts": 0,
    "files": 1,
    "results": 1,
    "slips": 1,
    "timeline": 1,
    "step": 2,
    "linalg": 2,
    "recurrence": 3,
    "cells": 4,
    "analysis": 4,
    "remedies": 5,
    "parallel": 5,
    "estimators": 5,
    "experiments": 6,
    "plots": 6,
    "pages": 7,
    "cli": 8,
    "__main__": 9,
}
LAZY = {
    "equinox",
    "flax",
    "haiku",
    "h5py",
    "matplotlib",
    "rich",
    "safetensors",
    "shtab",
    "sklearn",
    "pydoc_data",
    "orbax",
    "tensorstore",
    "xarray",
    "fcntl",
    "scipy",
    "threadpoolctl",
    "torch",
}  # dear to import, or not everywhere there
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in ROOT.rglob("*.py")
    if path.name != "__init__.py"
}


def imports(tree: ast.AST) -> set[str]:
    """Full names of the modules that `tree` imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inside if name.removeprefix("bptt_jax.") in MODULES}
            found |= modules or {node.module}
    return found


def own(tree: ast.AST) -> set[str]:
    return {name.removeprefix("bptt_jax.") for name in imports(tree) if name.startswith("bptt_jax.")}


def floor(module: str) -> int:
    return FLOORS[module.split(".")[0]]


def test_imports_go_down():
    wrong = [(m, n) for m, tree in MODULES.items() for n in own(tree) if floor(n) > floor(m)]
    assert wrong == []
    across = [(m, n) for m, tree in MODULES.items() for n in own(tree) if floor(n) == floor(m)]
    assert [(m, n) for m, n in across if m.split(".")[0] != n.split(".")[0]] == []  # on one floor: within a wing


def test_no_circles():
    graph = {module: own(tree) for module, tree in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(MODULES)  # raises CycleError


def test_matrices_come_as_arguments():
    """`linalg` takes arrays, never steps; the words are found without JAX."""
    assert not any(name == "step" for module, tree in MODULES.items() if floor(module) == 2 for name in own(tree))
    assert imports(MODULES["analysis.verdict"]).isdisjoint({"jax", "jax.numpy"})


def test_the_map_shows_every_module_on_its_floor():
    """CONTRIBUTING.md; a cell of the first column is empty where the floor is that of the line above."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown, level = {}, 0
    for number, module in re.findall(r"^\| (\d?) ?\| `([\w.]+)` \|", text, re.MULTILINE):
        level = int(number or level)
        shown[module] = level
    assert shown == {module: floor(module) for module in MODULES}


def test_no_import_dodges_a_circle():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inner = {
        (module, name)
        for module, tree in MODULES.items()
        for function in ast.walk(tree)
        if isinstance(function, functions)
        for name in imports(function)
    }
    assert {(m, n) for m, n in inner if n.split(".")[0] not in LAZY} <= {
        ("cli.jobs", "bptt_jax.cli.page"),
        ("cli.jobs", "bptt_jax.plots.atlas"),
        ("cli.jobs", "bptt_jax.plots.dynamics"),
        ("cli.jobs", "bptt_jax.plots.flow"),
        ("cli.jobs", "bptt_jax.plots.training"),
    }
