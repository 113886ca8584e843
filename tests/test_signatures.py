"""Shapes in types: what a public function takes and gives says which axes it has."""

import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
import pytest
from surface import PUBLIC

FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value) or hasattr(value, "lower")}


def bare(annotation: Any) -> Iterator[Any]:
    """Arrays without axes in an annotation; functions that users write, and pytrees, are theirs."""
    if annotation is jax.Array:
        yield annotation
    if annotation != optax.OptState and typing.get_origin(annotation) is not Callable:
        for part in typing.get_args(annotation):
            yield from bare(part)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arrays_of_public_functions_have_axes(name: str) -> None:
    hints = inspect.get_annotations(inspect.unwrap(FUNCTIONS[name]))
    without = [argument for argument, annotation in hints.items() if list(bare(annotation))]
    assert without == []


def test_what_has_no_axes_is_found() -> None:
    def some(a: jax.Array, b: tuple[int, jax.Array | None], c: Callable[[jax.Array], int]) -> float:
        return 0.0

    found = {name: bool(list(bare(hint))) for name, hint in inspect.get_annotations(some).items()}
    assert found == {"a": True, "b": True, "c": False, "return": False}
    assert len(FUNCTIONS) > 60
