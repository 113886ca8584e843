"""What was meant by a step that does not work, and what to write instead; looked for when one has failed."""

import re
from collections.abc import Callable
from itertools import permutations
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax.checks import describe_shapes, shapes, signature_of, takes, type_name

PyTree: TypeAlias = Any
Step: TypeAlias = Callable[[PyTree, PyTree, PyTree], PyTree]


def of_stacked_gates(old: tuple[int, ...], new: tuple[int, ...]) -> str:
    """Weights of several gates in a step that has none."""
    if len(old) != 1 or len(new) != 1:
        return ""
    cell = {3 * old[0]: "gru", 4 * old[0]: "lstm"}.get(new[0])
    return (
        "" if cell is None else f"; weights [{new[0] // old[0]}H, H] are for the step of bptt_jax.{cell}({old[0]})"
    )


def of_pairs(new: PyTree, state0: PyTree) -> str:
    """A step that returns something beside the new state; empty if it does not."""
    if not (isinstance(new, tuple) and len(new) == 2):
        return ""
    first, second = (shapes(entry) == shapes(state0) for entry in new)
    alone = "step: must return the new state alone, not (carry, y) as for lax.scan; got a pair"
    swapped = "or, of one called as (params, x, state) -> (output, state), step(params, x, state)[1]"
    if first and second:
        return (
            f"{alone}, both entries like state0; return step(params, state, x)[0] if that is the state, {swapped}"
        )
    if first:
        return (
            f"{alone} whose first entry is like state0; return the state alone, step(params, state, x)[0]: an output "
            "is a function of the states, for the loss"
        )
    if second:
        return f"{alone} whose second entry is like state0; return step(params, state, x)[1], {swapped}"
    return ""


def remedy(error: Exception, step: Step, params: PyTree, state0: PyTree, xs: PyTree) -> str:
    """How a step that did not work would work; empty if that is not known, or if the step has said it itself, as this
    package's own do of coefficients or of an adapter's cell; of a key they know only that it is not one."""
    if re.match(r"(?!step\b|key\b)[\w\[\]'.]+: expected ", str(error)):
        return ""
    if _entry(step, (params, state0, _less(xs, 1)), state0) is not None:
        return ""
    ways = (
        _of_makers, _of_batches, _of_instants, _of_lists, _of_arity, _of_swapped, _of_cells, _of_transposed, _of_sizes,
        _of_no_inputs,
    )  # fmt: skip
    return next((said for way in ways if (said := way(step, params, state0, xs))), "")


def takes_whole(step: Step, params: PyTree, state: PyTree, x: PyTree) -> bool:
    """Whether a step takes all of them as they are, with no axis in front."""
    return _entry(step, (params, state, x), state) == ""


def _less(tree: PyTree, axes: int, least: int = 0) -> PyTree | None:
    """Shapes with so many of the first axes left out; None where fewer than `least` would be left of one of
    floats, which a step may take as numbers by broadcasting: keys and tokens are single ones."""
    for leaf in jax.tree.leaves(tree):
        if leaf.ndim < axes + (least if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0):
            return None
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[axes:], leaf.dtype), tree)


def _of_makers(step: Step, params: PyTree, state0: PyTree, xs: PyTree) -> str:
    """`bptt_jax.gru` for the step of a cell."""
    if getattr(getattr(step, "__annotations__", {}).get("return"), "__name__", "") != "Cell":
        return ""
    name = getattr(step, "__name__", "cell")
    return f"step: expected the step of a cell, got {name}, which makes cells; give {name}(hidden_size).step"


def _of_batches(step: Step, params: PyTree, state0: PyTree, xs: PyTree) -> str:
    """Axes for a batch, or for layers as PyTorch's states have."""
    for of_state, of_x in ((0, 1), (1, 1), (2, 1), (1, 0), (2, 0)):
        h, x = _less(state0, of_state, min(of_state, 1)), _less(xs, 1 + of_x, of_x)
        if h is None or x is None or (of_x and not jax.tree.leaves(x)) or _entry(step, (params, h, x), h) is None:
            continue
        fewer = "two axes" if of_state == 2 else "one axis"
        states, inputs = describe_shapes(state0), describe_shapes(xs)
        if not of_state:
            return (
                f"xs: expected one sequence [T, ...], got {inputs}, of which step takes one axis less: a batch; "
                "jax.vmap over its first axis, jax.vmap(lambda xs: f(step, params, state0, xs, ...))(xs), or where "
                "time comes first, as in PyTorch, over its second, jax.vmap(..., in_axes=1)"
            )
        if of_x:
            layer = "[0]" if of_state == 2 else ""
            return (
                f"state0, xs: expected one sequence [T, ...] and its state, got {states} and {inputs}: a batch; "
                f"jax.vmap over both, jax.vmap(lambda h, xs: f(step, params, h, xs, ...))(state0{layer}, xs), with "
                "in_axes=(0, 1) where time comes first, as in PyTorch"
            )
        index = "[0, 0]" if of_state == 2 else "[0]"
        give = (
            f"state0{index}" if jax.tree_util.all_leaves([state0]) else f"jax.tree.map(lambda a: a{index}, state0)"
        )
        expected = "state0: expected the state of one sequence"
        return f"{expected}, got {states}, of which step takes {fewer} less; give {give}"
    return ""


def _of_instants(step: Step, params: PyTree, state0: PyTree, xs: PyTree) -> str:
    """The input of one instant; one sequence where a batch was expected."""
    if not jax.tree.leaves(xs) or _are_tokens(xs) or not takes_whole(step, params, state0, xs):
        return ""
    give = "xs[None]" if jax.tree_util.all_leaves([xs]) else "jax.tree.map(lambda a: a[None], xs)"
    return (
        f"xs: expected time as the first axis, got {describe_shapes(xs)}, all of which step takes at one instant: an "
        f"axis is missing, that of time or, where a batch [B, T, ...] is expected, that of the batch; give {give}"
    )


def _of_lists(step: Step, params: PyTree, state0: PyTree, xs: PyTree) -> str:
    """Lists of numbers, each of which JAX takes for an array; a state in a list."""
    x = _less(xs, 1)
    if type(xs) in (list, tuple) and len(xs) > 1 and len({describe_shapes(entry) for entry in xs}) == 1:
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), xs[0])
        if takes_whole(step, params, state0, one):
            alone = jax.tree_util.all_leaves([one])
            stacked = "jnp.stack(xs)" if alone else "jax.tree.map(lambda *x: jnp.stack(x), *xs)"
            return (
                f"xs: expected arrays with time as the first axis, got a {type_name(xs)} of {len(xs)} inputs, one for "
                f"each step; give {stacked}"
            )
    arrays = {"params": _dense(params), "state0": _dense(state0)}
    if _entry(step, (arrays["params"], arrays["state0"], x), arrays["state0"]) is not None:
        counts = {"params": len(jax.tree.leaves(params)), "state0": len(jax.tree.leaves(state0))}
        name = next(n for n in arrays if len(jax.tree.leaves(arrays[n])) != counts[n])
        return (
            f"{name}: expected an array, got a list of {counts[name]} numbers, each of "
            f"which JAX takes for an array of its own; give jnp.asarray(...) of the list"
        )
    if (
        type(state0) in (list, tuple)
        and len(state0) == 1
        and _entry(step, (params, state0[0], x), state0[0]) is not None
    ):
        return f"state0: expected the state itself, got a {type_name(state0)} of it; give state0[0]"
    return ""


def _dense(tree: PyTree) -> PyTree:
    """Every list of numbers, or of such lists, as the array that NumPy would make of it."""
    if isinstance(tree, dict):
        return {name: _dense(entry) for name, entry in tree.items()}
    if type(tree) is not list:
        return tree
    entries = [_dense(entry) for entry in tree]
    numbers = all(
        isinstance(e, jax.ShapeDtypeStruct) or (jax.tree_util.all_leaves([e]) and np.ndim(e) == 0) for e in entries
    )
    if not entries or not numbers or len({np.shape(e) for e in entries}) > 1:
        return entries
    return jax.ShapeDtypeStruct((len(entries), *np.shape(entries[0])), jnp.result_type(*entries))


def _of_arity(step: Step, params: PyTree, state0: PyTree, xs: PyTree) -> str:
    """Steps that take their arguments in another order, or fewer of them."""
    given = {"params": params, "state": state0, "x": _less(xs, 1)}
    some = [name for name, tree in given.items() if jax.tree.leaves(tree)]
    fewer = [names for count in (2, 1) for names in permutations(some, count)]
    orders: list[tuple[str, ...]] = [*permutations(given), *fewer]
    for names in orders[1:]:
        entry = _entry(step, tuple(given[name] for name in names), state0) if takes(step, len(names)) else None
        if entry is not None:
            call = f"step({', '.join(names)}){entry}"
            return (
                "step: expected a function called as step(params, state, x), got one that works as "
                f"{call}; wrap it: lambda params, state, x: {call}"
            )
    if not takes(step, 3):
        return f"step: expected a function called as step(params, state, x), got {signature_of(step)}"
    return ""


def _of_swapped(step: Step, params: PyTree, state0: PyTree, xs: PyTree) -> str:
    """Arguments of the call in another order than step, params, state0, xs."""
    names, given = ("params", "state0", "xs"), (params, state0, xs)
    for order in list(permutations(range(3)))[1:]:
        p, h, inputs = (given[i] for i in order)
        x = _less(inputs, 1)
        if x is not None and jax.tree.leaves(h) and _entry(step, (p, h, x), h) is not None:
            got = ", ".join(names[i] for i in np.argsort(order))
            return f"params, state0, xs: expected in this order, got them in the order {got}"
    return ""


def _of_cells(step: Step, params: PyTree, state0: PyTree, xs: PyTree) -> str:
    """Parameters or states of another cell, told by the types that the step names."""
    types = list(getattr(step, "__annotations__", {}).values())[:2]
    for name, kind, tree in zip(("params", "state0"), types, (params, state0), strict=False):
        if hasattr(kind, "_fields") and not isinstance(tree, kind):
            fields = ", ".join(kind._fields)
            fits = type(tree) in (list, tuple) and len(tree) == len(kind._fields)
            way = (
                f"; give {kind.__name__}(*{name})"
                if fits
                else ", which are of another cell"
                if name == "params"
                else ""
            )
            return f"{name}: expected {kind.__name__}({fields}), got {type_name(tree)}{way}"
    return ""


def _of_transposed(step: Step, params: PyTree, state0: PyTree, xs: PyTree) -> str:
    """Time last."""
    leaves = jax.tree.leaves(xs)
    if not leaves or any(leaf.ndim != 2 or leaf.shape[0] == leaf.shape[1] for leaf in leaves):
        return ""
    x = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[:1], leaf.dtype), xs)
    if _entry(step, (params, state0, x), state0) is None:
        return ""
    return f"xs: expected time as the first axis, got {describe_shapes(xs)}, with x in its first axis; give xs.T"


def _of_sizes(step: Step, params: PyTree, state0: PyTree, xs: PyTree) -> str:
    """Inputs or a state of another size than a cell was made for."""
    weights, leaves = jnp.shape(getattr(params, "input", 0)), jax.tree.leaves(xs)
    if not type(params).__module__.startswith("bptt_jax.cells."):
        return ""
    if len(weights) == 2 and len(leaves) == 1 and leaves[0].shape[1:] != weights[1:]:
        expected = (
            f"xs: expected [T, {weights[1]}], since params.input is {list(weights)}, got {describe_shapes(xs)}"
        )
        return f"{expected}; of tokens, jax.nn.one_hot(xs, {weights[1]})" if _are_tokens(xs) else expected
    recurrent, state = jnp.shape(getattr(params, "recurrent", 0)), {leaf.shape for leaf in jax.tree.leaves(state0)}
    if len(recurrent) == 2 and len(state) == 1 and len(size := state.pop()) == 1 and size != recurrent[1:]:
        return (
            f"state0: expected {list(recurrent[1:])}, since params.recurrent is {list(recurrent)}, got "
            f"{describe_shapes(state0)}"
        )
    return ""


class _NoInput:
    """In place of x = None: an error that names it is about x, where None can stand in parameters as well."""


def _of_no_inputs(step: Step, params: PyTree, state0: PyTree, xs: PyTree) -> str:
    """None where the step uses its x."""
    if xs is not None:
        return ""
    try:
        jax.eval_shape(lambda params, state: step(params, state, _NoInput()), params, state0)
    except Exception as error:
        if _NoInput.__name__ in str(error):
            return "xs: expected inputs [T, ...], since the step uses its x, got None"
    return ""


def _are_tokens(xs: PyTree) -> bool:
    return all(leaf.ndim == 1 and jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(xs))


def _entry(step: Step, arguments: tuple[Any, ...], state0: PyTree) -> str | None:
    """Which entry of what the step returns is like a state: itself, "", or one of a pair; None if it fails."""
    try:
        new = jax.eval_shape(step, *arguments)
    except Exception:
        return None
    pair = {"[0]": new[0], "[1]": new[1]} if isinstance(new, tuple) and len(new) == 2 else {}
    return next((entry for entry, tree in ({"": new} | pair).items() if shapes(tree) == shapes(state0)), None)
