"""What a bad argument gets: every fault that can be known before anything is compiled, named with what came.

A static fault raises TypeError or ValueError; of a traced value, `equinox.error_if` raises when it runs.
"""

import inspect
import os
import warnings
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import CodeType, MethodType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

LARGEST = 2**31 - 1  # sizes and steps are counted in 32 bits
# Operations on D x D matrices above which they are refused: hours on two cores, at the 10 GFLOP/s of LAPACK there.
_MOST_OPERATIONS = 5e13
# In D^3: of a product of matrices, of singular values, of eigenvalues (Golub and Van Loan, 8.6.4 and 7.5.6).
PRODUCT, SINGULAR, EIGEN = 2, 8 / 3, 10
_REPEATED = 3  # functions of one code from which on it is no longer taken for chance
_MANY = 8  # shapes of the sequences of one step from which on they are taken to be of any length


class RecompilationWarning(UserWarning):
    """A function is made anew for every call, or shapes keep changing, so that everything is compiled anew."""


class _Seen(NamedTuple):
    latest: Callable[[], Any]  # a weak reference
    times: int


_seen: dict[CodeType, _Seen] = {}


class _Run(NamedTuple):
    step: Callable[[], Any]  # a weak reference
    shapes: set[Hashable]


_run: dict[CodeType, _Run] = {}


def notice_new_function(name: str, function: Callable[..., Any], remedy: str) -> None:
    """Warns, once for each piece of code, of a function that is made anew for every call.

    What JAX has compiled is looked up by the function itself. Within a function that is being traced nothing is
    looked up, so a new one does no harm there.
    """
    code = _code(function)
    if code is None or _is_traced():
        return
    seen = _seen.get(code, _Seen(lambda: None, 0))
    if seen.times >= _REPEATED or seen.latest() == function:  # as JAX looks it up: methods of one object are equal
        return
    _seen[code] = _Seen(_reference(function), seen.times + 1)
    if seen.times + 1 == _REPEATED:
        warnings.warn(
            f"{name}: {_place(code)} is made anew at every call, "
            f"so everything is compiled anew each time; define it once, outside the loop that calls; {remedy}",
            RecompilationWarning,
            stacklevel=4,
        )


def notice_new_shape(step: Callable[..., Any], shape: Hashable) -> None:
    """Warns, once for each step, when it has been run on sequences of many shapes.

    Nothing is compiled for the shapes that are met within a function that is being traced.
    """
    code = _code(step)
    if code is None:
        return
    run = _run.get(code, _Run(lambda: None, set()))
    if run.step() != step:
        run = _Run(_reference(step), set())
    if shape in run.shapes or len(run.shapes) >= _MANY or _is_traced():  # the last is dear
        return
    run.shapes.add(shape)
    _run[code] = run
    if len(run.shapes) == _MANY:
        warnings.warn(
            f"xs: {_place(code)} has been run on sequences of "
            f"{_MANY} shapes, and everything is compiled anew for each; pad them to a few lengths "
            "(bptt_jax.Sequence.pad_to)",
            RecompilationWarning,
            stacklevel=4,
        )


def _is_traced() -> bool:
    """Whether a function is being traced, so that nothing is looked up or compiled here."""
    return isinstance(jax.device_put(0.0), jax.core.Tracer)


def _place(code: CodeType) -> str:
    return f"{code.co_name} ({code.co_filename}, line {code.co_firstlineno})"


def _reference(function: Callable[..., Any]) -> Callable[[], Any]:
    """A weak one, but where there can be none: to a method of a NamedTuple, say."""
    try:
        return weakref.WeakMethod(function) if isinstance(function, MethodType) else weakref.ref(function)
    except TypeError:
        return lambda: function


def _code(function: Any) -> CodeType | None:
    """That of the function itself, where it is jitted, partially applied or otherwise wrapped."""
    while function is not None and not hasattr(function, "__code__"):
        function = getattr(function, "func", None) or getattr(function, "__wrapped__", None)
    return None if function is None else function.__code__


def call_user_function(name: str, arguments: str, function: Callable[..., Any], *given: Any) -> Any:
    """``function(*given)``, a function of the user's that came as `name`.

    Raises:
      TypeError, ValueError: a leaf of the result is no array of numbers. What the function itself raises passes
        through, with a note that says with which `arguments` it was called.
    """
    try:
        value = function(*given)
    except Exception as error:
        add_notes(error, name, arguments)
        raise
    check_leaves(f"the result of {name}", value)
    return value


def add_notes(error: Exception, name: str, arguments: str) -> None:
    """To what a function of the user's has raised: which one, on what, and what is not there while it is traced."""
    error.add_note(f"raised by {name}{arguments}")
    if isinstance(error, jax.errors.TracerArrayConversionError):
        error.add_note(f"{name} is traced: use jax.numpy in it, not numpy")
    elif isinstance(error, jax.errors.ConcretizationTypeError):
        error.add_note(f"{name} is traced: no number in it is known to float() or `if` yet; jnp.where chooses")


def check_scalar(name: str, value: Any) -> None:
    """Raises TypeError or ValueError unless `value`, of the function `name`, is one real floating number."""
    if not jax.tree_util.all_leaves([value]):
        raise TypeError(f"{name}: must return one number, got {jax.tree.structure(value)}")
    if jnp.shape(value) != ():
        raise ValueError(
            f"{name}: must return a scalar, got shape {list(jnp.shape(value))}; reduce it to one number by jnp.sum, say"
        )
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(f"{name}: must return a real floating number, got {jnp.result_type(value)}")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type_name(value)}")


def check_positive_int(name: str, value: Any) -> int:
    """Returns `value` if it is a Python (or NumPy) integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer known before compilation, got {type_name(value)}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    if value > LARGEST:
        raise ValueError(f"{name}: expected at most {LARGEST}, got {value}")
    return int(value)


def raise_if(value: Array, wrong: Array, message: str) -> Array:
    """The value, which must be put to use; RuntimeError when it runs and is `wrong`."""
    import equinox as eqx  # costs 0.25 s, more than the rest of this package: only where it is used

    # Not of the value itself, whose type within a `jax.shard_map` Equinox does not keep.
    return value + eqx.error_if(jnp.zeros((), value.dtype), wrong, message)


@jax.custom_vjp
def differentiated_by_rule(value: Any, by: Any) -> Any:
    """`value`, in the function of a `jax.custom_jvp`; refused where that itself is differentiated, by `by`.

    What is in a `jax.lax.scan` or `map` loses its rule as soon as that is linearised (JAX 0.10), and a second
    derivative is then that of the computation: wrong, without a word.
    """
    return value


def _refused(value: Any, by: Any) -> Any:
    raise TypeError(
        "second derivatives: of what is in a loop (jax.lax.scan, map) JAX forgets the rule once jax.grad or jax.vjp "
        "has linearised it; take the inner derivative forward (jax.jvp, jax.jacfwd), or jax.vmap in place of the loop"
    )


differentiated_by_rule.defvjp(_refused, lambda _, cotangent: (cotangent, None))


def check_number(name: str, value: Any, expected: str, holds: Callable[[Any], Any]) -> Any:
    """Returns `value` if it is one real number for which `holds`.

    Of a traced one, or where `holds` compares it with one, that is checked when it runs, as part of what is
    returned: it must be put to use.
    """
    message = f"{name}: expected {expected}"
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number, np.ndarray, jax.Array)):
        raise TypeError(f"{message}, got {type_name(value)}")
    if jnp.shape(value) != ():
        raise ValueError(f"{message}, got {describe_shapes(value)}")
    if jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
        raise ValueError(f"{message}, got {value}")
    held = holds(value)
    if isinstance(held, jax.core.Tracer):  # under optax.inject_hyperparams, say
        return raise_if(jnp.asarray(value), ~held, message)
    if not held:
        raise ValueError(f"{message}, got {value}")
    return value


def check_positive(name: str, value: Any) -> Any:
    """Returns `value` if it is one number above 0."""
    return check_number(name, value, "a number above 0", lambda v: v > 0)


def check_positive_finite(name: str, value: Any) -> Any:
    """Returns `value` if it is one finite number above 0."""
    return check_number(name, value, "a finite number above 0", lambda v: (v > 0) & (v < float("inf")))


def check_nonnegative_finite(name: str, value: Any) -> Any:
    """Returns `value` if it is one finite number of at least 0."""
    return check_number(name, value, "a finite number of at least 0", lambda v: (v >= 0) & (v < float("inf")))


def check_finite(name: str, value: Any) -> Any:
    """Returns `value` if it is one finite number."""
    return check_number(name, value, "a finite number", lambda v: abs(v) < float("inf"))


def check_share(name: str, value: Any) -> Any:
    """Returns `value` if it is one number between 0 and 1."""
    return check_number(name, value, "a number between 0 and 1", lambda v: (v > 0) & (v < 1))


class CostError(ValueError):
    """What would take hours; `why`, and after it the ways around it that the function's arguments offer."""

    def __init__(self, name: str, why: str, ways: str) -> None:
        super().__init__(name, why, ways)
        self.why = why

    def __str__(self) -> str:
        name, why, ways = self.args
        return f"{name}: {why}; {ways}"


def check_cost(name: str, what: str, size: int, cubes: float, ways: str) -> None:
    """Raises CostError where `what` would take hours: `cubes` times `size`^3 operations; `ways` are those around it.

    Decided before anything is compiled.
    """
    operations = cubes * float(size) ** 3
    if operations > _MOST_OPERATIONS:
        raise CostError(
            name,
            f"of a state of D = {size} numbers, {what} would take {operations:.1e} operations on matrices of "
            f"{4 * size**2 / 1e9:.1f} GB, more than {_MOST_OPERATIONS:.0e}",
            ways,
        )


def check_choice(name: str, value: Any, *choices: Any) -> Any:
    """Returns `value` if it is one of them."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        *others, last = map(repr, choices)
        raise ValueError(f"{name}: expected {', '.join(others)} or {last}, got {value!r}")
    return value


def is_key(array: Any) -> bool:
    """Whether it is one of JAX's typed random keys, or an array of them."""
    return jnp.issubdtype(jnp.result_type(array), jax.dtypes.prng_key)


def check_key(name: str, key: Any) -> Any:
    """Returns `key` if it is one random key, of either kind that JAX has."""
    if not isinstance(key, (jax.Array, np.ndarray)):
        raise TypeError(f"{name}: expected a random key, as jax.random.key(0) gives, got {type_name(key)}")
    single = key.shape == () if is_key(key) else key.dtype == jnp.uint32 and key.shape in ((2,), (4,))
    if not single:
        raise ValueError(f"{name}: expected one random key, as jax.random.key(0) gives, got {describe_shapes(key)}")
    return key


def check_shape(shape: Any) -> Any:
    """Returns `shape` if it is a sequence of integers of at least 1."""
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape: expected a tuple of integers, got {type_name(shape)}")
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
        raise TypeError(f"{name}: expected an array, got {type_name(matrices)}")
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


def check_flags(name: str, flags: Any, steps: int | None = None) -> None:
    """Raises TypeError or ValueError unless `flags` are booleans ``[T]``, with T = `steps` where that is known."""
    check_leaves(name, flags)
    if not hasattr(flags, "dtype"):
        raise TypeError(f"{name}: expected an array of booleans [T], got {type_name(flags)}")
    if flags.dtype != bool:
        way = "jnp.arange(T) < length" if name == "mask" and len(flags.shape) < 2 else f"{name} > 0"
        raise TypeError(f"{name}: expected booleans [T], got {flags.dtype}; compare, as in {way}")
    if len(flags.shape) != 1:
        raise ValueError(
            f"{name}: expected shape [T], got {list(flags.shape)}; for a batch, jax.vmap over its first axis"
        )
    if steps is not None and flags.shape[0] != steps:
        raise ValueError(f"{name}: expected one boolean for each step, T = {steps}, got {flags.shape[0]}")


def takes(function: Callable[..., Any], count: int) -> bool:
    """Whether `function` can be called with so many arguments by position; also where that is not known."""
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):  # of functions written in C
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def signature_of(function: Callable[..., Any]) -> str:
    """Its name and parameters, without types."""
    parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return f"{getattr(function, '__name__', type_name(function))}{inspect.Signature(bare)}"


@dataclass(frozen=True, eq=False)
class _Itself:
    """A function that has no hash, looked up as what it is."""

    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __hash__(self) -> int:
        return id(self.function)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Itself) and other.function is self.function


def check_function(name: str, function: Any, signature: str) -> Any:
    """Returns `function`, or it with a hash, if it is a callable that can be looked up.

    What Equinox makes of a function (``eqx.filter_vmap(step)``) often has no hash, but is a pytree, and so by
    contract does not change.

    Raises:
      TypeError: it is no callable, or has no hash and is no pytree, or one that holds arrays.
    """
    if not callable(function):
        way = ""
        if callable(getattr(function, "step", None)):
            way = "; give its step, as in cell.step"
            if signature.endswith("-> Cell"):
                way = "; give what makes it, as in lambda gain: bptt_jax.rnn(32, gain=gain)"
        elif isinstance(function, tuple) and any(map(callable, function)):
            way = "; give its entry, as in step, params, state0 = ..."
        raise TypeError(f"{name}: expected a function {signature}, got {type_name(function)}{way}")
    try:
        hash(function)
    except TypeError:
        leaves = jax.tree.leaves(function)
        if not any(leaf is function or isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves):
            return _Itself(function)
        raise TypeError(
            f"{name}: expected a hashable function, since it is compiled once and looked up again, got "
            f"{type_name(function)}; wrap it in a function {signature}, an Equinox module in bptt_jax.from_equinox"
        ) from None
    return function


_process: int | None = None  # that has computed


def _check_process() -> None:
    """Raises RuntimeError in a process forked from one that has computed: a call there may wait for ever for XLA's
    threads, which a fork leaves behind."""
    global _process
    if _process is None:
        _process = os.getpid()
    elif _process != os.getpid():
        raise RuntimeError(
            'this process was forked from one that has computed with JAX, whose threads it lacks: begin it by "spawn" '
            'or "forkserver", as in multiprocessing.get_context("spawn")'
        )


def check_leaves(name: str, tree: Any, *, keys: bool = True) -> None:
    """Raises TypeError or ValueError unless all leaves are numbers or arrays of them, taken by JAX as they are.

    `keys`: or random keys, which inputs may be.
    """
    _check_process()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array):
            if not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted():
                raise ValueError(
                    f"{at_path(name, path)}: expected an array, got one whose buffer was deleted or donated"
                )
            if not (keys or jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool):
                raise TypeError(f"{at_path(name, path)}: expected an array of numbers, got {leaf.dtype}")
            continue
        numbers = isinstance(leaf, (np.ndarray, np.generic, bool, int, float, complex))
        numbers = numbers and not isinstance(leaf, np.ma.MaskedArray)  # its mask would be lost
        dtype = np.asarray(leaf).dtype if numbers else np.dtype(object)
        if dtype.kind in "OSUMmV" and not jnp.issubdtype(dtype, jnp.floating):
            way = "; equinox.partition(module, equinox.is_array) takes functions out" if callable(leaf) else ""
            if leaf is tree and callable(leaf):
                way = "; call it, as in cell.init(key, input_size) and cell.initial_state()"
            got = f"one of {dtype}" if type(leaf) is np.ndarray else type_name(leaf)
            raise TypeError(f"{at_path(name, path)}: expected an array of numbers, got {got}{way}")
        if dtype.char in "gG" or not dtype.isnative:  # JAX would refuse the former, and misread the latter
            expected = "numbers of at most 64 bits in this machine's byte order"
            raise TypeError(f"{at_path(name, path)}: expected {expected}, got {dtype.str}; cast them by astype")
        if dtype.kind in "iu" and jnp.result_type(leaf).itemsize < dtype.itemsize and np.size(leaf):
            limits = jnp.iinfo(jnp.result_type(leaf))
            if not limits.min <= np.min(leaf) <= np.max(leaf) <= limits.max:  # JAX would drop the upper bits
                expected = f"integers from {limits.min} to {limits.max}, since 64 bits are switched off in JAX"
                got = f"{np.min(leaf)} to {np.max(leaf)}"
                raise ValueError(f"{at_path(name, path)}: expected {expected}, got {got}")


def at_path(name: str, path: Any) -> str:
    return name + jax.tree_util.keystr(path)


def type_name(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def shapes(tree: Any) -> tuple[Any, list[tuple[int, ...]]]:
    """Structure, and shapes of the leaves: what two trees must share to be alike."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [jnp.shape(leaf) for leaf in leaves]


def describe_shapes(tree: Any) -> str:
    return str(jax.tree.map(lambda a: f"{jnp.result_type(a)}[{','.join(map(str, jnp.shape(a)))}]", tree)).replace(
        "'", ""
    )
