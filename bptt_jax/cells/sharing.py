"""How do cells and steps travel, within a process and to another one?

Within one, equal settings have one step, so that cells which differ only in size or initialisation share what JAX has
compiled. To another, what is made of functions within functions goes as the call that makes it: pickle, and with it
multiprocessing, writes down no such functions.
"""

import importlib
from collections.abc import Callable, Mapping
from functools import lru_cache, update_wrapper, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax

from bptt_jax.step import Cell

_P = ParamSpec("_P")
_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Named(NamedTuple):
    """A function by where it is found: those of JAX are pickled by no name of theirs."""

    module: str
    name: str


class _Call(NamedTuple):
    """What makes it, with the arguments that were given."""

    make: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def pickled(self) -> tuple[Any, ...]:
        return _made_again, (self.make, *jax.tree.map(_referred, (self.args, dict(self.kwargs))))


def _referred(value: Any) -> Any:
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if callable(value) and isinstance(module, str) and isinstance(name, str):
        try:
            if getattr(importlib.import_module(module), name, None) is value:
                return _Named(module, name)
        except ImportError:
            pass
    return value


def _given(value: Any) -> Any:
    return getattr(importlib.import_module(value.module), value.name) if isinstance(value, _Named) else value


def _made_again(make: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    args, kwargs = jax.tree.map(_given, (args, kwargs), is_leaf=lambda value: isinstance(value, _Named))
    return make(*args, **kwargs)


class RecalledCell(Cell):
    """A `Cell` that is pickled as the call that made it; one that was put together otherwise as its three functions."""

    call: _Call | None = None

    def __reduce__(self) -> Any:
        return (Cell, tuple(self)) if self.call is None else self.call.pickled()


def pickled_as_call(make: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
    """For ``__reduce__``, of what ``make(*args)`` makes again."""
    return _Call(make, args, {}).pickled()


RecalledCell.__name__ = RecalledCell.__qualname__ = Cell.__name__  # which is what it is to all who read of it


class RecalledFunction:
    """A function that another one has made, pickled as the call that made it."""

    def __init__(self, function: Callable[..., Any], call: _Call) -> None:
        update_wrapper(self, function)
        self._function, self._call = function, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(self._function)

    def __reduce__(self) -> Any:
        return self._call.pickled()


def recalled(make: Callable[_P, Cell]) -> Callable[_P, Cell]:
    """The cells that `make`, a function of a module, makes can be pickled, if its arguments can."""

    @wraps(make)
    def making(*args: _P.args, **kwargs: _P.kwargs) -> Cell:
        cell = RecalledCell(*make(*args, **kwargs))
        cell.call = _Call(making, args, kwargs)
        return cell

    return making


def recalled_function(make: Callable[_P, _Function]) -> Callable[_P, _Function]:
    """Likewise the functions that it makes."""

    @wraps(make)
    def making(*args: _P.args, **kwargs: _P.kwargs) -> Any:
        return RecalledFunction(make(*args, **kwargs), _Call(making, args, kwargs))

    return making


def shared(make: Callable[..., _Function], *settings: Any) -> _Function:
    """The function ``make(*settings)``, the same for equal numbers, functions, words; of traced numbers, a new one."""
    if any(isinstance(a, jax.core.Tracer) for a in settings):
        return make(*settings)
    return _made(make, *(a if callable(a) or isinstance(a, str | int) else float(a) for a in settings))


@lru_cache
def _made(make: Callable[..., Any], *settings: Any) -> Any:
    return RecalledFunction(make(*settings), _Call(shared, (make, *settings), {}))
