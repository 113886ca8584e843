"""Many sequences at once: where the batch is in what is given, and one sequence of it."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from bptt_jax.checks import at_path, check_leaves
from bptt_jax.step import Array, Params, PyTree, State

# As `in_axes` of `jax.vmap`: a tree of integers and None, or one of them for a whole subtree.
Axes: TypeAlias = Any
Batch: TypeAlias = tuple[State, PyTree, PyTree]  # state0, xs, args
FlatAxes: TypeAlias = tuple[tuple[int | None, ...], ...]  # for every leaf of the batch, hashable
_NAMES = ("state0", "xs", "args")


def check_axes(in_axes: Any) -> tuple[Axes, Axes, Axes]:
    """Those of `(state0, xs, args)`.

    Raises:
      TypeError: they are no tuple of three trees of integers and None.
    """
    if not (isinstance(in_axes, tuple) and len(in_axes) == 3):
        raise TypeError(f"in_axes: expected a tuple of three, for (state0, xs, args), got {in_axes!r}")
    for axis in jax.tree.leaves(in_axes):
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"in_axes: expected integers and None, got {axis!r}")
    return in_axes


def batch_size(params: Params, batch: Batch, in_axes: tuple[Axes, Axes, Axes]) -> int:
    """How many sequences the batch has; 1 where all is shared.

    Raises:
      TypeError, ValueError: a leaf is no array, or has no such axis; the sizes differ, or are 0; the axes are no
        prefix of a tree.
    """
    check_leaves("params", params)
    sizes = {}
    for name, tree, axes in zip(_NAMES, batch, in_axes, strict=True):
        check_leaves(name, tree)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        for (path, leaf), axis in zip(leaves, leaf_axes(name, axes, tree), strict=True):
            shape = list(np.shape(leaf))
            if axis is None:
                continue
            if not -len(shape) <= axis < len(shape):
                raise ValueError(f"{at_path(name, path)}: expected the batch as axis {axis}, got shape {shape}")
            sizes[at_path(name, path)] = shape[axis]
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise ValueError(f"batch: expected one number of sequences, at least 1, in all leaves, got {sizes}")
    return next(iter(sizes.values()), 1)


def item(batch: Batch, in_axes: tuple[Axes, Axes, Axes], i: Array) -> Batch:
    """State, inputs and arguments of the i-th sequence."""

    def of(axis: int | None, part: PyTree) -> PyTree:
        if axis is None:
            return part
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(jnp.asarray(a), i, axis, keepdims=False), part)

    def one(name: str, axes: Axes, tree: PyTree) -> PyTree:
        parts, structure = _parts(name, axes, tree)
        return jax.tree.unflatten(structure, [of(axis, part) for axis, part in parts])

    state0, xs, args = map(one, _NAMES, in_axes, batch)
    return state0, xs, args


def leaf_axes(name: str, axes: Axes, tree: PyTree) -> list[int | None]:
    """For every leaf of the tree its axis."""
    return [axis for axis, part in _parts(name, axes, tree)[0] for _ in jax.tree.leaves(part)]


def flat_axes(batch: Batch, in_axes: tuple[Axes, Axes, Axes]) -> FlatAxes:
    """Those of all leaves, which a program can be compiled for."""
    return tuple(tuple(leaf_axes(*each)) for each in zip(_NAMES, in_axes, batch, strict=True))


def of_leaves(batch: Batch, axes: FlatAxes) -> tuple[Axes, Axes, Axes]:
    """The way back."""
    trees = [jax.tree.unflatten(jax.tree.structure(tree), of) for tree, of in zip(batch, axes, strict=True)]
    return trees[0], trees[1], trees[2]


def _parts(name: str, axes: Axes, tree: PyTree) -> tuple[list[tuple[int | None, PyTree]], Any]:
    """The parts of the tree, each with its axis, and the structure that puts parts together."""
    structure: Any
    leaves, structure = jax.tree.flatten(axes, is_leaf=lambda node: node is None)
    try:
        return list(zip(leaves, structure.flatten_up_to(tree), strict=True)), structure
    except ValueError as error:
        raise ValueError(
            f"in_axes: expected for {name} a prefix of its structure, {jax.tree.structure(tree)}, got {axes}"
        ) from error
