"""Steps that are linear in the state, unit by unit."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bptt_jax.checks import check_function, check_leaves
from bptt_jax.step import Input, Params, State


@dataclass(frozen=True)
class DiagonalStep:
    """A step ``h_t = a_t * h_{t-1} + b_t``, elementwise, whose coefficients do not depend on the state.

    It is a `Step` like any other, and `unroll_linear` evaluates it in parallel. Two of the same function are equal
    and share what JAX has compiled, so define it once, at the top of a module; it can be used as a decorator.

    Attributes:
      coefficients: pure function ``(params, x) -> (a, b)``, each of the structure of the state, with leaves of its
        shape or broadcast to it.

    Raises:
      TypeError: `coefficients` is no function.
    """

    coefficients: Callable[[Params, Input], tuple[State, State]]

    def __post_init__(self) -> None:
        check_function("coefficients", self.coefficients, "coefficients(params, x) -> (a, b)")

    def __reduce__(self) -> Any:
        return pickled_by_name(self)

    def __call__(self, params: Params, state: State, x: Input) -> State:
        a, b = self.at(params, state, x)
        return jax.tree.map(lambda h, a, b: a * h + b, state, a, b)

    def at(self, params: Params, state: State, x: Input) -> tuple[State, State]:
        """The coefficients, of which the leaves may still want to be broadcast to those of the state.

        Raises:
          TypeError, ValueError: they are not two of the state's structure, or do not go into its shapes.
        """
        found = self.coefficients(params, x)
        check_coefficients(found, self.like(state))
        return found

    def like(self, state: State) -> dict[str, State]:
        """By the names of the coefficients what their leaves are like when they have been broadcast."""
        return {"a": state, "b": state}


def check_coefficients(found: Any, like: dict[str, State]) -> None:
    """Checks a step's coefficients, by name what each is like.

    Raises:
      TypeError, ValueError: they are not as many, of the same structure, with leaves that broadcast to the shapes.
    """
    # An array of so many rows would come apart unnoticed.
    if not (isinstance(found, tuple) and len(found) == len(like)):
        many = {2: "a pair", 4: "four"}[len(like)]
        raise TypeError(f"coefficients: expected {many} ({', '.join(like)}), got {type(found).__name__}")
    for (name, state), tree in zip(like.items(), found, strict=True):
        check_leaves(f"coefficients, {name}", tree)
        expected: Any = jax.tree.structure(state)
        if expected != jax.tree.structure(tree):
            got = jax.tree.structure(tree)
            raise ValueError(f"coefficients: expected {name} of the state's structure, {expected}, got {got}")
        for h, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(tree), strict=True):
            shape, got = jnp.shape(h), jnp.shape(leaf)
            if len(got) > len(shape) or any(m not in (1, n) for m, n in zip(got[::-1], shape[::-1], strict=False)):
                of = "the state's shape" if name in "ab" and len(like) == 2 else "shape"
                raise ValueError(f"coefficients: expected {name} of {of}, {list(shape)}, got {list(got)}")


def pickled_by_name(step: Any) -> Any:
    """For ``__reduce__``: a step whose decorated function bears its name is found by that name."""
    function = step.coefficients
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if module in sys.modules and getattr(sys.modules[module], name or "", None) is step:
        return _named, (module, name)
    return type(step), (function,)


def _named(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)
