"""What one leaf of a pytree says of itself: in a few words, in NumPy's types, in JSON's; how a text is shown."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_MOST = 1 << 24  # numbers of an array whose range is looked for: a larger one stays on its device


def readable(leaf: Any) -> bool:
    """Whether its numbers can be had on this host; a text has none."""
    if isinstance(leaf, jax.core.Tracer):
        return False
    if isinstance(leaf, jax.Array):
        return not leaf.is_deleted() and (leaf.is_fully_addressable or leaf.is_fully_replicated)
    return isinstance(leaf, (np.ndarray, np.generic, bool, int, float, complex, str))


def along_leading(which: jax.Array | np.ndarray, like: jax.Array | np.ndarray) -> Any:
    """``which`` with as many axes as ``like``, whose first axes it has, so that it chooses along these."""
    return which.reshape(*which.shape, *[1] * (like.ndim - which.ndim))


def numbers(leaf: Any) -> np.ndarray:
    """In types that NumPy itself knows."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    a = np.asarray(leaf)
    if a.dtype.kind in "biufc":
        return a
    if a.dtype == jax.dtypes.float0:  # the derivative with respect to an integer
        return np.full(a.shape, np.nan)
    return a.astype(np.float32 if jnp.issubdtype(a.dtype, np.floating) else np.int32)  # bfloat16, int4 and the like


def describe(leaf: Any) -> str:
    """Its number, or dtype, shape and range; never waits for what is traced, deleted or on other hosts."""
    if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
        return f"{leaf:.4g}" if isinstance(leaf, (float, complex)) else repr(leaf)
    dtype = "float0" if leaf.dtype == jax.dtypes.float0 else str(leaf.dtype)
    kind = f"{dtype}[{', '.join(map(str, leaf.shape))}]"
    if isinstance(leaf, jax.core.Tracer):
        return f"{kind} traced"
    if not readable(leaf):
        return kind + (" deleted" * leaf.is_deleted() or " on other hosts" if isinstance(leaf, jax.Array) else "")
    if math.prod(leaf.shape) > _MOST or dtype == "float0" or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return kind
    a = numbers(leaf)
    return f"{kind} {_range(a)}" if a.ndim else _number(a, 4)


def _number(a: Any, digits: int) -> str:
    return f"{a:.{digits}g}" if np.asarray(a).dtype.kind in "fc" else str(a)


def _range(a: np.ndarray) -> str:
    if a.dtype.kind == "b":
        return f"{np.sum(a)} of {a.size} true"
    known, of = (np.abs(a), "modulus ") if a.dtype.kind == "c" else (a, "")
    finite = known[np.isfinite(known)]
    counts = {"NaN": np.isnan(known), "inf": known == np.inf, "-inf": known == -np.inf}
    parts = [f"{np.sum(found)} {word}" for word, found in counts.items() if np.any(found)]
    if finite.size:
        low, high = (_number(v, 3) for v in (np.min(finite), np.max(finite)))
        parts.insert(0, f"{of}{low} throughout" if low == high else f"{of}from {low} to {high}")
    return ", ".join(parts)


def to_jsonable(value: Any) -> Any:
    """A pytree in JSON's types; see `bptt_jax.results.Result.to_dict`."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    # What there are many of first: a list of JAX's takes 20 times as long.
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) in (list, tuple):
        return [to_jsonable(child) for child in value]
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, dict):
        return {str(k): to_jsonable(v) for k, v in value.items()}
    if isinstance(value, (jax.Array, np.ndarray, np.generic, float, complex)):
        return _plain_numbers(numbers(value))
    children = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda node: node is not value)[0]
    if children and not children[0][0]:
        return str(value)
    numbered = (jax.tree_util.SequenceKey, jax.tree_util.FlattenedIndexKey)
    if all(isinstance(path[0], numbered) for path, _ in children):
        return [to_jsonable(child) for _, child in children]
    return {dotted(path): to_jsonable(child) for path, child in children}


def _plain_numbers(a: np.ndarray) -> Any:
    if a.dtype.kind == "c":
        return {"re": _plain_numbers(a.real), "im": _plain_numbers(a.imag)}
    finite = np.isfinite(a)
    if not np.all(finite):
        a, words = a.astype(object), [str(float(v)) for v in a[~finite]]
        a[~finite] = words
    return a.tolist()


def dotted(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def visible(text: str) -> str:
    """`text` in one line, where what cannot be seen is escaped as in Python: control characters, halves of surrogate
    pairs, and what turns the direction of writing."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
