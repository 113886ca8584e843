"""The user's own step: what a factory may return, and the file that ``bptt-jax new-step`` writes."""

import importlib
import importlib.resources
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bptt_jax.checks import check_key, describe_shapes, takes, type_name
from bptt_jax.cli.report import BadArgument, one_line
from bptt_jax.step import Array, Loss, Params, PyTree, Sequence, State, Step


class OwnStep(NamedTuple):
    """What a factory returns: these names in a mapping or a NamedTuple, or the first three or four in a tuple.

    Attributes:
      step, params, state0: as for `bptt_jax.unroll`.
      readout: ``readout(state) -> logits``, one for each character of the text; None: drawn at random.
      xs: sequences of the user's own instead of a text: leaves ``[B, T, ...]``, or a `Sequence` of them.
      loss: on them, of one sequence: ``loss(states)``, or ``loss(states, args)``.
      args: of the loss, leaves ``[B, ...]``: targets, say.
      key: random; then ``x`` is ``(x, key)`` with a key for every step.
    """

    step: Step
    params: Params
    state0: State
    readout: Callable[[State], Array] | None = None
    xs: PyTree = None
    loss: Loss | None = None
    args: PyTree = None
    key: Array | None = None


def load(spec: str, input_size: int) -> OwnStep:
    """What ``--step`` names.

    Args:
      spec: ``FILE_OR_MODULE:FACTORY``.
      input_size: given to a factory that takes an argument: characters of the text, or numbers of their embedding.

    Raises:
      BadArgument: there is no such factory, it raises, or returns something else than the contract says.
    """
    place, colon, name = spec.rpartition(":")
    if not (place and colon and name):
        raise BadArgument(f"--step: expected FILE_OR_MODULE:FACTORY, got {spec!r}")
    factory = getattr(_module(place), name, None)
    if not callable(factory):
        raise BadArgument(f"--step: {place} has no function {name}")
    try:
        made = factory(input_size) if _takes_argument(factory) else factory()
    except (Exception, SystemExit) as error:
        raise BadArgument(f"--step: {name} raised {one_line(error)}") from error
    return _checked(made, name)


def with_keys(xs: PyTree, key: Array) -> PyTree:
    """The inputs ``[B, T, ...]`` of a batch, each with a key of its own."""
    bare = xs.xs if isinstance(xs, Sequence) else xs
    batch, steps = jax.tree.leaves(xs)[0].shape[:2]
    keyed = bare, jax.random.split(key, (batch, steps))
    return replace(xs, xs=keyed) if isinstance(xs, Sequence) else keyed


def write_example(path: Path) -> None:
    """A file with a step, commented and working.

    Raises:
      BadArgument: it is no file of Python's, is there already, or cannot be written.
    """
    if path.suffix != ".py":
        raise BadArgument(f"FILE: expected a name that ends in .py, got {path}")
    text = importlib.resources.files("bptt_jax.cli").joinpath("new_step.txt").read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text.replace("FILE.py", path.name))
    except FileExistsError:
        raise BadArgument(f"FILE: {path} is there already, and is left as it is") from None
    except OSError as error:
        raise BadArgument(f"FILE: {path}: {error.strerror}") from None


def _checked(made: Any, name: str) -> OwnStep:
    if isinstance(made, tuple) and not hasattr(made, "_fields") and len(made) in (3, 4):
        return OwnStep(*made)
    given = made._asdict() if hasattr(made, "_asdict") else made
    names = OwnStep._fields
    if not (isinstance(given, Mapping) and set(names[:3]) <= set(given)):
        got = f"a tuple of {len(made)}" if isinstance(made, tuple) else type_name(made)
        got = f"only {', '.join(map(str, given))}" if isinstance(given, Mapping) else got
        raise BadArgument(
            f"--step: {name} must return (step, params, state0), or these and others of {', '.join(names[3:])} by "
            f"name, got {got}"
        )
    if wrong := [str(k) for k in given if k not in names]:
        raise BadArgument(f"--step: {name} returns {', '.join(wrong)}: expected {', '.join(names)} alone")
    own = OwnStep(**given)
    for option, function, words in (("loss", own.loss, "loss(states)"), ("readout", own.readout, "readout(state)")):
        if function is not None and not callable(function):
            raise BadArgument(f"--step: {name}: {option}: expected a function {words}, got {type_name(function)}")
    if own.xs is None:
        for option in ("loss", "args"):
            if getattr(own, option) is not None:
                raise BadArgument(f"--step: {name} returns {option}, and no xs: expected them beside each other")
    else:
        own = own._replace(**_checked_data(own, name))
    if own.key is not None:
        try:
            key = check_key("key", own.key)
        except (TypeError, ValueError) as error:
            raise BadArgument(f"--step: {name}: {error}") from None
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        own = own._replace(key=key if typed else jax.random.wrap_key_data(jnp.asarray(key)))
    return own


def _checked_data(own: OwnStep, name: str) -> dict[str, PyTree]:
    if own.readout is not None:
        raise BadArgument(f"--step: {name} returns a readout, which is of text, and xs: expected one of them")
    if own.loss is not None and not takes(own.loss, 1 if own.args is None else 2):
        words = "loss(states), since no args are returned" if own.args is None else "loss(states, args)"
        raise BadArgument(f"--step: {name}: loss: expected a function {words}")
    try:
        xs, args = jax.tree.map(jnp.asarray, (own.xs, own.args))
    except (TypeError, ValueError) as error:
        raise BadArgument(f"--step: {name}: xs, args: expected arrays, got {one_line(error)}") from None
    leaves = jax.tree.leaves(xs)
    if not leaves or any(a.ndim < 2 or a.shape[:2] != leaves[0].shape[:2] or 0 in a.shape[:2] for a in leaves):
        got = describe_shapes(jax.tree.leaves(own.xs) if isinstance(own.xs, Sequence) else own.xs)
        raise BadArgument(f"--step: {name}: xs: expected a batch of sequences, leaves [B, T, ...], got {got}")
    batch = leaves[0].shape[0]
    if any(a.ndim == 0 or a.shape[0] != batch for a in jax.tree.leaves(args)):
        raise BadArgument(
            f"--step: {name}: args: expected leaves [B, ...] with B = {batch} as in xs, got {describe_shapes(args)}"
        )
    return {"xs": xs, "args": args}


def _module(place: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            sys.path.append(os.getcwd())
            return importlib.import_module(place)
        if not Path(place).is_file():
            raise BadArgument(f"--step: {place}: no such file")
        # Its folder comes last, and its name is one that nothing else has: it takes no library's place.
        sys.path.append(str(Path(place).resolve().parent))
        spec = importlib.util.spec_from_file_location(_module_name(Path(place)), place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look themselves up there
        spec.loader.exec_module(module)
        return module
    except BadArgument:
        raise
    except (Exception, SystemExit) as error:
        raise BadArgument(f"--step: importing {place} raised {one_line(error)}") from error


def _module_name(path: Path) -> str:
    """The file's own name where an import of that name finds this file, as its neighbours may wish to; else another."""
    importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec(path.stem) if path.stem.isidentifier() else None
    except ValueError:  # of a module that was made otherwise, such as __main__
        spec = None
    if spec is not None and spec.origin is not None and Path(spec.origin).exists() and path.samefile(spec.origin):
        return path.stem
    return f"--step {path.stem.replace('.', '_')}"


def _takes_argument(factory: Callable[..., Any]) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in kinds for p in inspect.signature(factory).parameters.values())
