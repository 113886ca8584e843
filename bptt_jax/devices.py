"""Loops, branches and compiled functions that keep JAX's account of what differs between devices.

Within a `jax.shard_map` the type of an array says over which axes of the mesh it varies, and the carry of a loop keeps
its type: zeros, which do not vary, become a sum that does, and JAX refuses. The loops here find out what the carry
becomes and begin with that. In a mesh with axes of type Explicit the type says how an array is divided, and JAX refuses
where it cannot tell that of a result; `compiled` leaves these axes to the compiler. Elsewhere all are `jax.lax`'s and
`jax.jit`.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, auto_axes, get_abstract_mesh

PyTree: TypeAlias = Any


def compiled(function: Callable[..., Any], most: int = 64, *, checked: bool = False) -> Callable[..., Any]:
    """`jax.jit`; arguments by position are traced, those by name static.

    `checked`: whether `jax.debug_nans` and `jax.debug_infs` look at what it returns, as at states and gradients. In
    results NaN and -inf are words: what there is none of, and the logarithm of zero.

    Once there are more programs than `most`, for as many shapes and functions, all are let go: each has memory and
    memory maps, and Linux allows a process 65,530 of these.
    """
    named = [p.name for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY]
    jitted: Any = jax.jit(function, static_argnames=named)

    @wraps(function)
    def bounded(*arrays: Any, **static: Any) -> Any:
        if jitted._cache_size() > most:
            jitted.clear_cache()
        config: Any = jax.config
        if checked or not (config.jax_debug_nans or config.jax_debug_infs):
            return jitted(*arrays, **static)
        with jax.debug_nans(False), jax.debug_infs(False):
            return jitted(*arrays, **static)

    return divided_by_compiler(bounded)


def divided_by_compiler(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, given arrays by position, in which JAX does not ask of every result how it is divided."""

    @wraps(function)
    def call(*arrays: Any, **static: Any) -> Any:
        axes = get_abstract_mesh().explicit_axes
        if not axes:
            return function(*arrays, **static)
        return auto_axes(partial(function, **static), axes=axes, out_sharding=PartitionSpec())(*arrays)

    return call


def is_manual() -> bool:
    """Whether this is traced for one device, within a `jax.shard_map`."""
    return bool(get_abstract_mesh().manual_axes)


def axes_of(tree: PyTree) -> frozenset[str]:
    """The axes of the mesh over which any leaf varies, by its type."""
    return frozenset().union(*_leaf_axes(tree))


def vary(tree: PyTree, axes: frozenset[str]) -> PyTree:
    """The same, of a type that varies at least over `axes`. Its transpose is the sum over those that are new."""
    return jax.tree.map(lambda leaf: _vary(leaf, axes), tree)


def summed_like(tree: PyTree, given: PyTree) -> PyTree:
    """Derivatives by what is the same on devices on which they differ: the sum over these, as `jax.grad` has it.

    `tree` is of the structure of `given`, what was differentiated by.
    """

    leaves, structure = jax.tree.flatten(tree)
    each = zip(leaves, new_axes(tree, given), strict=True)
    return jax.tree.unflatten(structure, [jax.lax.psum(leaf, tuple(axes)) if axes else leaf for leaf, axes in each])


def new_axes(tree: PyTree, given: PyTree) -> list[list[str]]:
    """For every leaf the axes over which it varies and that of `given` does not."""
    pairs = zip(_leaf_axes(tree), _leaf_axes(given), strict=True)
    return [sorted(axes - those_given) for axes, those_given in pairs]


def settled(advance: Callable[[PyTree], PyTree], carry: PyTree) -> PyTree:
    """The carry, every leaf varying over the axes over which it does after any number of rounds."""
    while True:
        wider = _vary_leaves(carry, _leaf_axes(jax.eval_shape(advance, carry)))
        if _leaf_axes(wider) == _leaf_axes(carry):
            return carry
        carry = wider


def scan(body: Callable[[Any, Any], tuple[Any, Any]], init: PyTree, xs: PyTree = None, **options: Any) -> Any:
    """`jax.lax.scan`."""
    if not is_manual():
        return jax.lax.scan(body, init, xs, **options)
    one = jax.tree.map(_first, xs)
    init = settled(lambda carry: body(carry, one)[0], init)

    def kept(carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        new, out = body(carry, x)
        return _vary_leaves(new, _leaf_axes(carry)), out

    return jax.lax.scan(kept, init, xs, **options)


def _first(a: Any) -> Any:
    """Of an array along its first axis, or, where there is none, something like it."""
    return a[0] if len(a) else vary(jnp.empty(a.shape[1:], a.dtype), axes_of(a))


def while_loop(more: Callable[[Any], Any], body: Callable[[Any], Any], init: PyTree) -> Any:
    """`jax.lax.while_loop`; within a `jax.shard_map` every device ends when its own condition says so."""
    if not is_manual():
        return jax.lax.while_loop(more, body, init)
    init = settled(lambda carry: vary(body(carry), axes_of(more(carry))), init)
    return jax.lax.while_loop(more, lambda carry: _vary_leaves(body(carry), _leaf_axes(carry)), init)


def fori_loop(lower: Any, upper: Any, body: Callable[[Any, Any], Any], init: PyTree) -> Any:
    """`jax.lax.fori_loop`."""
    if not is_manual():
        return jax.lax.fori_loop(lower, upper, body, init)
    init = settled(lambda carry: body(lower, carry), init)
    return jax.lax.fori_loop(lower, upper, lambda i, carry: _vary_leaves(body(i, carry), _leaf_axes(carry)), init)


def cond(which: Any, if_true: Callable[..., Any], if_false: Callable[..., Any], *operands: Any) -> Any:
    """`jax.lax.cond`."""
    operands = vary(operands, axes_of(which)) if is_manual() else operands
    return jax.lax.cond(which, *_alike(which, (if_true, if_false), operands), *operands)


def switch(index: Any, branches: Sequence[Callable[..., Any]], *operands: Any) -> Any:
    """`jax.lax.switch`."""
    operands = vary(operands, axes_of(index)) if is_manual() else operands
    return jax.lax.switch(index, _alike(index, branches, operands), *operands)


def _alike(
    which: Any, branches: Sequence[Callable[..., Any]], operands: tuple[Any, ...]
) -> Sequence[Callable[..., Any]]:
    """The branches, with results of the same types."""
    if not is_manual():
        return branches
    each = [_leaf_axes(jax.eval_shape(branch, *operands)) for branch in branches]
    axes = [axes_of(which).union(*those) for those in zip(*each, strict=True)]
    return [lambda *given, branch=branch: _vary_leaves(branch(*given), axes) for branch in branches]


def _leaf_axes(tree: PyTree) -> list[frozenset[str]]:
    return list(map(_axes, jax.tree.leaves(tree)))


def _axes(leaf: Any) -> frozenset[str]:
    kind: Any = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    # As JAX had it before 0.10, and as it has it since; None with check_vma=False.
    axes = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type and kind.manual_axis_type.varying
    return frozenset(axes or ())


def _vary_leaves(tree: PyTree, axes: list[frozenset[str]]) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, map(_vary, leaves, axes))


def _vary(leaf: Any, axes: frozenset[str]) -> Any:
    missing = tuple(sorted(axes - _axes(leaf)))
    if not missing:
        return leaf
    lax: Any = jax.lax
    if hasattr(lax, "pcast"):
        return lax.pcast(leaf, missing, to="varying")
    return lax.pvary(leaf, missing)  # JAX 0.8.0 and 0.8.1
