"""The contract that everything else stands on: a recurrent step is a pure function.

``h_k = step(params, h_{k-1}, x_k)`` sees one sequence at one instant; batches are ``jax.vmap`` outside. The
state is any pytree of floating (or complex) arrays, the input any pytree, ``None`` for an autonomous step.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Params: TypeAlias = Any
State: TypeAlias = Any
Input: TypeAlias = Any
Step: TypeAlias = Callable[[Params, State, Input], State]
Loss: TypeAlias = Callable[[State], Array]

_LARGEST = 2**31 - 1  # sizes and steps are counted in 32 bits


class Cell(NamedTuple):
    """A recurrent cell: three pure functions.

    Attributes:
      init: ``init(key, input_size) -> params``.
      initial_state: ``initial_state() -> h_0``, zeros.
      step: ``step(params, h, x) -> h``, one instant of one sequence.
    """

    init: Callable[[Array, int], Params]
    initial_state: Callable[[], State]
    step: Step


def ravel_state(state: State) -> tuple[Array, Callable[[Array], State]]:
    """The state as one real vector of length D, and the way back.

    The order is `jax.flatten_util.ravel_pytree`'s; a complex leaf counts as its real part followed by its
    imaginary part.

    Args:
      state: pytree of arrays.

    Returns:
      ``(vector [D], unravel)`` with ``unravel(vector)`` equal to ``state``.

    Raises:
      TypeError, ValueError: a leaf is no array of numbers.

    Example:
      >>> vector, unravel = bptt.ravel_state({"h": jnp.zeros(2), "c": jnp.ones(1)})
      >>> vector
      Array([1., 0., 0.], dtype=float32)
      >>> unravel(vector)["h"].shape
      (2,)
    """
    check_leaves("state", state, keys=False)
    leaves, treedef = jax.tree.flatten(state)
    is_complex = [jnp.iscomplexobj(leaf) for leaf in leaves]
    vector, unravel_parts = ravel_pytree(
        [(leaf.real, leaf.imag) if c else leaf for leaf, c in zip(leaves, is_complex, strict=True)]
    )

    def unravel(vector: Array) -> State:
        parts = unravel_parts(vector)
        return jax.tree.unflatten(
            treedef, [jax.lax.complex(*p) if c else p for p, c in zip(parts, is_complex, strict=True)]
        )

    return vector, unravel


def full_precision() -> AbstractContextManager[Any]:
    """For what is traced within. GPUs and TPUs multiply float32 in reduced precision by default, with three digits;
    a precision that a step names by itself stays."""
    return jax.default_matmul_precision("highest")


def prepend(state0: State, states: State) -> State:
    """The states that each step started from: h_0 .. h_{T-1}, leaves ``[T, ...]``."""
    return jax.tree.map(lambda h0, h: jnp.concatenate([h0[None], h[:-1]]), state0, states)


def _is_differentiable(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def differentiable_part(params: Params) -> tuple[Params, Callable[[Params], Params]]:
    """The parameters with None at what is not floating, and the way back: ``merge(part)`` is like `params`."""
    leaves, treedef = jax.tree.flatten(params)
    moves = [_is_differentiable(leaf) for leaf in leaves]

    def merge(part: Params) -> Params:
        varied = iter(jax.tree.leaves(part))
        return jax.tree.unflatten(
            treedef, [next(varied) if m else leaf for m, leaf in zip(moves, leaves, strict=True)]
        )

    return jax.tree.unflatten(treedef, [leaf if m else None for m, leaf in zip(moves, leaves, strict=True)]), merge


def check_arguments(
    step: Step, params: Params, state0: State, xs: PyTree, length: int | None, loss: Loss | None = None
) -> int:
    """Checks all that can be checked without calling the step; returns the number of steps T.

    Raises:
      TypeError: `step` or `loss` is no hashable callable; a leaf is no array; the state holds integers.
      ValueError: the state is empty; T is missing, zero, or not the same in all of `xs`.
    """
    check_function("step", step, "step(params, state, x) -> state")
    if loss is not None:
        check_function("loss", loss, "loss(states) -> scalar")
    for name, tree in (("params", params), ("state0", state0), ("xs", xs)):
        check_leaves(name, tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state0):
        if not _is_differentiable(leaf):
            raise TypeError(
                f"{_at('state0', path)}: expected floating numbers, got {jnp.result_type(leaf)}; "
                "a state is differentiated, so counters and flags belong into xs"
            )
    if sum(np.size(leaf) for leaf in jax.tree.leaves(state0)) == 0:
        raise ValueError("state0: expected at least one number, got an empty state")
    return _check_length(xs, length)


def check_step(step: Step, params: Params, state0: State, xs: PyTree) -> State:
    """Calls the step on abstract values; returns `state0` without weak types.

    Raises:
      TypeError, ValueError: the step returns another structure, shape or dtype than it was given, or changes its
        arguments. What the step itself raises passes through, with a note that says on which shapes.
    """
    state0 = jax.tree.map(lambda h: jax.lax.convert_element_type(h, jnp.result_type(h)), state0)
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a)[1:], jnp.result_type(a)), xs)

    def called(params: Params, state: State, x: Input) -> State:
        before = jax.tree.leaves((params, state, x))
        on = f"(params, state, x) on state {_describe(state0)} and x {_describe(x)}"
        new = result_of("step", on, step, params, state, x)
        after = jax.tree.leaves((params, state, x))
        if len(after) != len(before) or any(a is not b for a, b in zip(after, before, strict=True)):
            raise ValueError("step: expected a pure function, got one that writes into its arguments; copy them")
        return new

    new = jax.eval_shape(called, params, state0, x)
    expected: Any = jax.tree.structure(state0)
    if expected != jax.tree.structure(new):
        raise ValueError(
            f"step: must return a state of the structure of state0, {expected}, got {jax.tree.structure(new)}"
        )
    old_leaves = jax.tree_util.tree_leaves_with_path(state0)
    for (path, old), out in zip(old_leaves, jax.tree.leaves(new), strict=True):
        if old.shape != out.shape:
            raise ValueError(
                f"step: must keep the shape of {_at('state', path)}, {list(old.shape)}, got {list(out.shape)}"
            )
        if old.dtype != out.dtype:
            raise TypeError(
                f"step: must keep the dtype of {_at('state', path)}, {old.dtype}, got {out.dtype}; "
                "cast state0 or the parameters so that they agree"
            )
    return state0


def check_loss(loss: Loss, states: State) -> None:
    """Raises TypeError or ValueError unless ``loss(states)`` is one real floating number.

    What the loss itself raises passes through, with a note that says on which shapes.
    """

    def called(states: State) -> Array:
        return result_of("loss", f"(states) on states {_describe(states)}", loss, states)

    check_scalar("loss", jax.eval_shape(called, states))


def result_of(name: str, arguments: str, function: Callable[..., Any], *given: Any) -> Any:
    """``function(*given)``, a function of the user's that came as `name`.

    Raises:
      TypeError, ValueError: a leaf of the result is no array of numbers. What the function itself raises passes
        through, with a note that says with which `arguments` it was called.
    """
    try:
        value = function(*given)
    except Exception as error:
        error.add_note(f"raised by {name}{arguments}")
        raise
    check_leaves(f"the result of {name}", value)
    return value


def check_scalar(name: str, value: Any) -> None:
    """Raises TypeError or ValueError unless `value`, of the function `name`, is one real floating number."""
    if not jax.tree_util.all_leaves([value]):
        raise TypeError(f"{name}: must return one number, got {jax.tree.structure(value)}")
    if jnp.shape(value) != ():
        raise ValueError(
            f"{name}: must return a scalar, got shape {list(jnp.shape(value))}; reduce it to one number"
        )
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(f"{name}: must return a real floating number, got {jnp.result_type(value)}")


def check_positive_int(name: str, value: Any) -> int:
    """Returns `value` if it is a Python (or NumPy) integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer known before compilation, got {_type(value)}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    if value > _LARGEST:
        raise ValueError(f"{name}: expected at most {_LARGEST}, got {value}")
    return int(value)


def check_number(name: str, value: Any, expected: str, holds: Callable[[Any], Any]) -> Any:
    """Returns `value` if it is one real number for which `holds`; of a traced one that is checked when it runs."""
    message = f"{name}: expected {expected}"
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number, np.ndarray, jax.Array)):
        raise TypeError(f"{message}, got {_type(value)}")
    if jnp.shape(value) != () or jnp.iscomplexobj(value):
        raise ValueError(f"{message}, got {value}")
    if isinstance(value, jax.core.Tracer):  # under optax.inject_hyperparams, say
        import equinox as eqx  # costs 0.25 s, more than the rest of this package: only where it is used

        return eqx.error_if(value, ~holds(value), message)
    if not holds(value):
        raise ValueError(f"{message}, got {value}")
    return value


def check_positive(name: str, value: Any) -> Any:
    """Returns `value` if it is one number above 0."""
    return check_number(name, value, "a number above 0", lambda v: v > 0)


def check_finite(name: str, value: Any) -> Any:
    """Returns `value` if it is one finite number."""
    return check_number(name, value, "a finite number", lambda v: abs(v) < float("inf"))


def check_share(name: str, value: Any) -> Any:
    """Returns `value` if it is one number between 0 and 1."""
    return check_number(name, value, "a number between 0 and 1", lambda v: (v > 0) & (v < 1))


def check_choice(name: str, value: Any, first: Any, second: Any) -> Any:
    """Returns `value` if it is one of the two."""
    if not any(type(value) is type(choice) and value == choice for choice in (first, second)):
        raise ValueError(f"{name}: expected {first!r} or {second!r}, got {value!r}")
    return value


def check_key(name: str, key: Any) -> Any:
    """Returns `key` if it is one random key, of either kind that JAX has."""
    if not isinstance(key, (jax.Array, np.ndarray)):
        raise TypeError(f"{name}: expected a random key, as jax.random.key(0) gives, got {_type(key)}")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        single = key.shape == ()
    else:
        single = key.dtype == jnp.uint32 and key.shape in ((2,), (4,))
    if not single:
        raise ValueError(f"{name}: expected one random key, as jax.random.key(0) gives, got {_describe(key)}")
    return key


def check_shape(shape: Any) -> Any:
    """Returns `shape` if it is a sequence of integers of at least 1."""
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape: expected a tuple of integers, got {_type(shape)}")
    return [check_positive_int("shape", n) for n in shape]


def check_floating(name: str, dtype: Any) -> jnp.dtype:
    """The floating type that JAX makes of `dtype`; its own by default, double only if that is switched on."""
    try:
        found = jax.dtypes.canonicalize_dtype(float if dtype is None else dtype)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a floating type, got {dtype!r}") from None
    if not jnp.issubdtype(found, jnp.floating):
        raise TypeError(f"{name}: expected a floating type, got {found}")
    return found


def check_matrices(name: str, matrices: Any, *, square: bool, ndim: int | None = None) -> Array:
    """Returns `matrices` as a floating array of at least single precision, for LAPACK knows no other."""
    check_leaves(name, matrices)
    if not (hasattr(matrices, "ndim") and hasattr(matrices, "dtype")):
        raise TypeError(f"{name}: expected an array, got {_type(matrices)}")
    if matrices.ndim < 2 or (ndim is not None and matrices.ndim != ndim):
        expected = "[..., M, N]" if ndim is None else "[T, D, D]"
        raise ValueError(f"{name}: expected shape {expected}, got {list(matrices.shape)}")
    if square and matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"{name}: expected square matrices, got {list(matrices.shape)}")
    if 0 in matrices.shape:
        raise ValueError(f"{name}: expected no empty axis, got {list(matrices.shape)}")
    dtype = jnp.result_type(matrices)
    wide = jnp.issubdtype(dtype, jnp.complexfloating) or dtype == jnp.float64
    return jnp.asarray(matrices, dtype if wide else jnp.float32)


def check_function(name: str, function: Any, signature: str) -> None:
    """Raises TypeError unless `function` is a hashable callable."""
    if not callable(function):
        raise TypeError(f"{name}: expected a function {signature}, got {_type(function)}")
    try:
        hash(function)
    except TypeError:
        raise TypeError(
            f"{name}: expected a hashable function, since it is compiled once and looked up again, got "
            f"{_type(function)}; wrap it in a function {signature}, an Equinox module in bptt_jax.from_equinox"
        ) from None


def check_leaves(name: str, tree: PyTree, *, keys: bool = True) -> None:
    """Raises TypeError or ValueError unless all leaves are numbers or arrays of them, taken by JAX as they are.

    `keys`: or random keys, which inputs may be.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array):
            if not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted():
                raise ValueError(
                    f"{_at(name, path)}: expected an array, got one whose buffer was deleted or donated"
                )
            if not (keys or jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool):
                raise TypeError(f"{_at(name, path)}: expected an array of numbers, got {leaf.dtype}")
            continue
        numbers = isinstance(leaf, (np.ndarray, np.generic, bool, int, float, complex))
        numbers = numbers and not isinstance(leaf, np.ma.MaskedArray)  # its mask would be lost
        dtype = np.asarray(leaf).dtype if numbers else np.dtype(object)
        if dtype.kind in "OSUMmV" and not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{_at(name, path)}: expected an array of numbers, got {_type(leaf)}")
        if dtype.char in "gG" or not dtype.isnative:  # JAX would refuse the former, and misread the latter
            expected = "numbers of at most 64 bits in this machine's byte order"
            raise TypeError(f"{_at(name, path)}: expected {expected}, got {dtype.str}; cast them by astype")
        if dtype.kind in "iu" and jnp.result_type(leaf).itemsize < dtype.itemsize and np.size(leaf):
            limits = jnp.iinfo(jnp.result_type(leaf))
            if not limits.min <= np.min(leaf) <= np.max(leaf) <= limits.max:  # JAX would drop the upper bits
                expected = f"integers from {limits.min} to {limits.max}, since 64 bits are switched off in JAX"
                raise ValueError(f"{_at(name, path)}: expected {expected}, got {np.min(leaf)} to {np.max(leaf)}")


def _check_length(xs: PyTree, length: int | None) -> int:
    if length is not None:
        length = check_positive_int("length", length)
    leaves = jax.tree_util.tree_leaves_with_path(xs)
    if not leaves:
        if length is None:
            raise ValueError("length: expected the number of steps, since xs is None, got None")
        return length
    for path, leaf in leaves:
        if np.ndim(leaf) == 0:
            raise ValueError(f"{_at('xs', path)}: expected time as the first axis, got a scalar")
    lengths = {_at("xs", path): np.shape(leaf)[0] for path, leaf in leaves}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"xs: expected one number of steps in all leaves, got {lengths}")
    steps = next(iter(lengths.values()))
    if steps == 0:
        raise ValueError("xs: expected at least one step, got a first axis of 0")
    if length is not None and length != steps:
        raise ValueError(f"length: expected {steps}, the first axis of xs, got {length}")
    return steps


def _at(name: str, path: Any) -> str:
    return name + jax.tree_util.keystr(path)


def _type(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _describe(tree: PyTree) -> str:
    return str(jax.tree.map(lambda a: f"{jnp.result_type(a)}[{','.join(map(str, jnp.shape(a)))}]", tree)).replace(
        "'", ""
    )
