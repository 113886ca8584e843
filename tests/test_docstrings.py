"""What the public names say of themselves: each has a docstring, its examples are run, and the site shows it."""

import doctest
import importlib
import pkgutil
import re
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from surface import PUBLIC

import bptt_jax as bptt

NAMESPACE = {"jax": jax, "jnp": jnp, "optax": optax, "bptt": bptt}  # what the site says that examples begin with


def examples() -> list[doctest.DocTest]:
    """The docstrings of the package that hold examples."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(module.name) for module in pkgutil.walk_packages(bptt.__path__, "bptt_jax.")]
    return [test for m in modules for test in finder.find(m, extraglobs=NAMESPACE) if test.examples]


EXAMPLES = examples()


@pytest.mark.parametrize("test", EXAMPLES, ids=lambda test: test.name.removeprefix("bptt_jax."))
def test_example(test: doctest.DocTest) -> None:
    report: list[str] = []
    with np.printoptions(precision=3, suppress=True):
        assert doctest.DocTestRunner().run(test, out=report.append).failed == 0, "".join(report)


def test_the_main_functions_have_examples() -> None:
    shown = {test.name.split(".")[-1] for test in EXAMPLES}
    functions = {of.__name__ for of in PUBLIC.values() if isinstance(of, types.FunctionType)}
    assert functions - shown - set(bptt.cells.ATLAS) <= {
        "omega_terms",  # shown with `omega_penalty`
        "clip_records",
        "skip_records",
        "from_nnx",  # shown in the README, where their libraries are installed
        "from_linen",
        "from_haiku",
        "from_keras",  # shown in the guides, likewise
        "from_torchrecurrent",
        "plot_gradient_flow",  # shown in the guides
        "plot_norms",  # panels of it
        "plot_singular_values",
        "plot_eigenvalues",
        "plot_leaves",
        "plot_influence_map",
        "plot_audit",
        "plot_training",
        "plot_atlas",  # of what takes minutes to measure
    }


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - {"Step", "cells.ATLAS"}))  # an alias of typing, a mapping
def test_docstring(name: str) -> None:
    of = PUBLIC[name]
    assert written(of)
    if isinstance(of, type):
        own = {k: v for k, v in vars(of).items() if not k.startswith("_") and isinstance(v, MEMBERS)}
        assert [k for k, member in own.items() if not written(member)] == []


MEMBERS = (types.FunctionType, property, classmethod)


def written(of: Any) -> bool:
    """Whether it has a docstring of its own, and not the one that is made for every NamedTuple."""
    made = f"{of.__name__}({', '.join(of._fields)})" if hasattr(of, "_fields") else None
    return bool(of.__doc__) and of.__doc__ != made


def test_names_that_messages_and_docstrings_give_are_there() -> None:
    """In full, so that whoever reads one can type it."""

    def is_there(name: str) -> bool:
        found: Any = bptt
        for part in name.split(".")[1:]:
            found = getattr(found, part, None)
        return found is not None

    missing = []
    for path in Path(bptt.__path__[0]).rglob("*.py"):
        text = re.sub(r"^ *(from|import) .*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        missing += [
            (path.name, name) for name in re.findall(r"\bbptt(?:_jax)?(?:\.\w+)+", text) if not is_there(name)
        ]
    assert missing == []


def test_the_site_shows_every_public_name() -> None:
    page = (Path(__file__).parents[1] / "docs" / "api.rst").read_text(encoding="utf-8")
    shown = set(re.findall(r"^\.\. auto(?!module)\w+:: (?:bptt_jax\.)?([\w.]+)$", page, re.MULTILINE))
    of_modules = re.findall(r"^\.\. automodule:: bptt_jax\.([\w.]+)\n   :members: (.+)$", page, re.MULTILINE)
    shown |= {f"{module}.{name}" for module, names in of_modules for name in names.split(", ")}
    assert sorted(set(PUBLIC) - shown) == []
