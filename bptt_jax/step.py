"""The contract that everything else stands on: a recurrent step is a pure function.

A *step* is ``h_k = step(params, h_{k-1}, x_k)``: one sequence at one instant; batches are ``jax.vmap`` outside. A
*cell* is a step with an initialiser and an initial state. A *recurrence* is a step bound to its parameters, its
initial state and its sequence of inputs, checked once: what every analysis takes.

The state is any pytree. Its floating and complex leaves are differentiated and counted (D numbers, a complex one as
two); all others (counters, flags, random keys) pass through. The input is any pytree, None for an autonomous step.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Bool, Float, Int

from bptt_jax.checks import (
    at_path,
    call_user_function,
    check_flags,
    check_function,
    check_leaves,
    check_positive_int,
    describe_shapes,
    is_key,
    notice_new_shape,
)
from bptt_jax.devices import axes_of, is_manual, settled, vary
from bptt_jax.leaves import along_leading
from bptt_jax.slips import of_pairs, of_stacked_gates, remedy
from bptt_jax.timeline import reset_at_the_end, resets_at_real_steps

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Params: TypeAlias = Any
State: TypeAlias = Any
Input: TypeAlias = Any
Step: TypeAlias = Callable[[Params, State, Input], State]
Loss: TypeAlias = Callable[..., Any]


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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("xs", "mask", "resets", "reset_state"),
    meta_fields=("length",),
)
@dataclass(frozen=True, eq=False)
class Sequence:
    """Inputs with padding and resets; a pytree that can be passed wherever `xs` is.

    Every function returns for it what it returns for its pieces run separately. Under `jax.vmap` all leaves have the
    batch as their first axis; a `reset_state` that all share wants
    ``in_axes=(Sequence(0, resets=0, reset_state=None),)``.

    Attributes:
      xs: inputs, leaves ``[T, ...]``; None for an autonomous step.
      length: T, where no other field tells it.
      mask: ``[T]`` of booleans: False is padding. There the state is held and the step counts for nothing; what
        the padding contains, NaN included, does not matter. None: every step is real.
      resets: ``[T]`` of booleans: True is a new beginning: before that step the state becomes `reset_state`. A
        reset in the padding takes place before the next real step. None: there is none.
      reset_state: like the state; by default `state0`. The two differ where a stream carries its state from batch
        to batch while an episode begins from zeros.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> padded = bptt.Sequence(jnp.ones((4, 1)), mask=jnp.array([True, True, False, False]))
      >>> bptt.unroll(step, 0.5, jnp.zeros(1), padded).ravel()
      Array([1. , 1.5, 1.5, 1.5], dtype=float32)
      >>> episodes = bptt.Sequence(jnp.ones((4, 1)), resets=jnp.array([False, False, True, False]))
      >>> bptt.unroll(step, 0.5, jnp.zeros(1), episodes).ravel()
      Array([1. , 1.5, 1. , 1.5], dtype=float32)
    """

    xs: PyTree = None
    _: KW_ONLY
    length: int | None = None
    mask: Array | None = None
    resets: Array | None = None
    reset_state: State = None

    def pad_to(self, length: int, *, axis: int = 0) -> "Sequence":
        """The same with padding at the end.

        Everything is compiled once for each length: sequences of any length, padded to the next of a few lengths
        (powers of two, say), are few shapes. Targets and other arguments of a loss are padded alike by their owner.

        Args:
          length: T of the result.
          axis: of time, in all leaves of `xs`, in `mask` and in `resets`, from 0 on: 1 for a batch ``[B, T, ...]``.

        Returns:
          A sequence with a mask. NumPy arrays stay such: nothing is compiled.

        Raises:
          TypeError, ValueError: `length` is no integer, or less than the length at hand; that is not told by any
            field, or not the same in all; `axis` is no integer of at least 0.

        Example:
          >>> padded = bptt.Sequence(np.ones((5, 2))).pad_to(8)
          >>> padded.xs.shape, padded.mask.tolist()
          ((8, 2), [True, True, True, True, True, False, False, False])
        """
        check_positive_int("length", length)
        if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
            raise TypeError(f"axis: expected an integer, got {type(axis).__name__}")
        if axis < 0:
            raise ValueError(f"axis: expected one counted from the front, at least 0, got {axis}")
        arrays: list[Any] = [*jax.tree.leaves(self.xs), *(a for a in (self.mask, self.resets) if a is not None)]
        lengths: set[Any] = {np.shape(a)[axis] if np.ndim(a) > axis else 0 for a in arrays} | (
            {self.length} - {None}
        )
        steps = lengths.pop() if len(lengths) == 1 else 0
        if not 0 < steps <= length:
            found = f"axis {axis} of {describe_shapes((self.xs, self.mask, self.resets))}"
            raise ValueError(f"length: expected one of at least {steps or found}, got {length}")
        at = np.arange(length)

        def longer(a: Any) -> Any:
            a = a if hasattr(a, "shape") else np.asarray(a)
            return a[(slice(None),) * axis + (np.minimum(at, steps - 1),)]

        real = at < steps
        mask: Any = np.broadcast_to(real, (*next((np.shape(a)[:axis] for a in arrays), ()), length))
        return replace(
            self,
            xs=jax.tree.map(longer, self.xs),
            mask=mask if self.mask is None else longer(self.mask) & real,
            resets=None if self.resets is None else longer(self.resets) & real,
            length=None if self.length is None else length,
        )


class Instant(NamedTuple):
    """What one step is given beside the state; leaves ``[T, ...]`` for all of them.

    Attributes:
      x: the input; in padding that of the first real step, zero where there is none, so that what stands there can
        do no harm.
      real: False in padding; None if there is no padding.
      reset: whether the state is reset before; None if it never is.
    """

    x: Input
    real: Array | None
    reset: Array | None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "state0", "instants", "reset_state", "spare"),
    meta_fields=("step", "length", "resets_to_start", "checked"),
)
@dataclass(frozen=True, eq=False)
class Recurrence:
    """A step bound to its parameters, initial state and sequence: made by `bind`, and whole after `check_step`.

    Attributes:
      step: of one sequence at one instant.
      params: its parameters.
      state0: h_0.
      instants: `Instant` with leaves ``[T, ...]``.
      reset_state: what a reset makes of the state; None if there are no resets.
      spare: in padding the step is carried out for nothing, from this state, the first real step's, which can do no
        harm; None if there is no padding.
      length: T, padding included.
      resets_to_start: whether `reset_state` is `state0`.
      checked: whether `check_step` has been here.
    """

    step: Step
    params: Params
    state0: State
    instants: Instant
    reset_state: State
    spare: State
    length: int
    resets_to_start: bool
    checked: bool

    @property
    def size(self) -> int:
        """D: floating numbers of the state, a complex one counted as two."""
        return state_size(self.state0)

    @property
    def real(self) -> Bool[Array, " T"]:
        """False in padding."""
        real = self.instants.real
        return jnp.ones(self.length, bool) if real is None else real

    @property
    def resets(self) -> Bool[Array, " T"]:
        """Whether the state is reset before the step."""
        resets = self.instants.reset
        return jnp.zeros(self.length, bool) if resets is None else resets

    @property
    def is_plain(self) -> bool:
        """Whether there is neither padding nor a reset."""
        return self.instants.real is None and self.instants.reset is None

    @property
    def ends_anew(self) -> Bool[Array, ""] | None:
        """Whether a reset stands in the padding at the very end, which takes place before the next real step of what
        goes on from there; None if there can be none. Before `check_step`, which leaves it out: it leads into no
        step."""
        _, real, resets = self.instants
        return None if real is None or resets is None else reset_at_the_end(resets, real)

    def begin(self, state: State, at: Instant) -> State:
        """The state that the step starts from: after a reset, if there is one."""
        start = state if at.reset is None else choose(at.reset, self.reset_state, state)
        return start if at.real is None else choose(at.real, start, self.spare)

    def advance(self, state: State, at: Instant) -> State:
        """The next state: reset, step, or hold."""
        new = self.step(self.params, self.begin(state, at), at.x)
        return new if at.real is None else choose(at.real, new, state)

    def starts(self, states: State) -> State:
        """What each step starts from, leaves ``[T, ...]``, given h_1 .. h_T."""
        before = prepend(self.state0, states)
        return before if self.is_plain else jax.vmap(self.begin)(before, self.instants)

    def going_on(self, state: State, pending: Bool[Array, ""] | None) -> "Recurrence":
        """The same from a state that its stream has come to, with the reset that was `pending` there; resets lead
        where they did. Before `check_step`, and within what is compiled."""
        resets = self.instants.reset
        if pending is not None:
            first = pending & (jnp.arange(self.length) == 0)
            resets = first if resets is None else resets | first
        return replace(
            self,
            state0=state,
            instants=self.instants._replace(reset=resets),
            reset_state=self.state0 if resets is not None and self.reset_state is None else self.reset_state,
            resets_to_start=False,
        )

    def stretch(self, state: State, instants: Instant, length: int) -> "Recurrence":
        """A part of it: from a state of its own through `length` of its instants."""
        return replace(self, state0=state, instants=instants, length=length)


def bind(step: Step, params: Params, state0: State, xs: PyTree = None, length: int | None = None) -> Recurrence:
    """The recurrence of these arguments, all that can be checked without calling the step being checked.

    Raises:
      TypeError: `step` is no hashable callable; a leaf is no array; a mask or resets are no booleans.
      ValueError: the state holds no floating number; T is missing, zero, or not the same everywhere.
    """
    step = check_function("step", step, "step(params, state, x) -> state")
    sequence = xs if isinstance(xs, Sequence) else Sequence(xs)
    if any(isinstance(node, Sequence) for node in jax.tree.leaves(sequence.xs, is_leaf=_is_sequence)):
        raise TypeError(
            "xs: expected a Sequence in place of all inputs, got one within them; Sequence(xs, mask=...)"
        )
    for name, tree in (("params", params), ("state0", state0), ("xs", sequence.xs)):
        check_leaves(name, tree)
    if state_size(state0) == 0:
        got = describe_shapes(state0) if jax.tree.leaves(state0) else "an empty state"
        way = "; give them as floats, 0.0 for 0" if jax.tree.leaves(state0) else ""
        raise ValueError(f"state0: expected at least one floating number, got {got}{way}")
    steps = _check_length(sequence, length)
    notice_new_shape(step, steps)
    reset_state = sequence.reset_state
    if reset_state is not None:
        check_leaves("reset_state", reset_state)
        _check_like_state("reset_state", reset_state, state0)
        if sequence.resets is None:
            raise ValueError("reset_state: expected resets [T] beside it, got None")
    instants = Instant(sequence.xs, sequence.mask, sequence.resets)
    return Recurrence(step, params, state0, instants, reset_state, None, steps, reset_state is None, False)


def _is_sequence(node: Any) -> bool:
    return isinstance(node, Sequence)


def check_step(recurrence: Recurrence) -> Recurrence:
    """Calls the step on abstract values; returns the recurrence whole, to be traced. Once for each.

    Raises:
      TypeError, ValueError: the step returns another structure, shape or dtype than it was given, or changes its
        arguments. What the step itself raises passes through, with a note that says on which shapes.
    """
    if recurrence.checked:
        return recurrence
    recurrence = _whole(recurrence)
    params, state0, xs = recurrence.params, recurrence.state0, recurrence.instants.x

    def called(params: Params, state: State, xs: PyTree) -> State:
        x = jax.tree.map(lambda a: a[0], xs)
        before = jax.tree.leaves((params, state, x))
        on = f"(params, state, x) on state {describe_shapes(state0)} and x {describe_shapes(x)}"
        new = call_user_function("step", on, recurrence.step, params, state, x)
        after = jax.tree.leaves((params, state, x))
        if len(after) != len(before) or any(a is not b for a, b in zip(after, before, strict=True)):
            raise ValueError("step: expected a pure function, got one that writes into its arguments; copy them")
        return new

    try:
        new = jax.eval_shape(called, params, state0, xs)
        _check_new_state(new, state0)
    except Exception as error:
        if said := remedy(error, recurrence.step, params, state0, xs):
            raise ValueError(said) from error
        raise
    return _varying_alike(recurrence)


def ravel_state(state: State) -> tuple[Float[Array, " D"], Callable[[Float[Array, " D"]], State]]:
    """The state as one real vector of length D, and the way back.

    The order is `jax.flatten_util.ravel_pytree`'s; a complex leaf counts as its real part followed by its
    imaginary part. Leaves that are no floating numbers (counters, flags, random keys) are left out.

    Args:
      state: pytree of arrays.

    Returns:
      ``(vector [D], unravel)`` with ``unravel(vector)`` equal to ``state``; what was left out is put back.

    Raises:
      TypeError, ValueError: a leaf is no array of numbers and no random key.

    Example:
      >>> vector, unravel = bptt.ravel_state({"h": jnp.zeros(2), "c": jnp.ones(1), "steps": jnp.asarray(3)})
      >>> vector
      Array([1., 0., 0.], dtype=float32)
      >>> unravel(vector)["h"].shape
      (2,)
    """
    check_leaves("state", state)
    part, merge = differentiable_part(state)
    leaves, treedef = jax.tree.flatten(part)
    is_complex = [jnp.iscomplexobj(leaf) for leaf in leaves]
    with jax.numpy_dtype_promotion("standard"):  # leaves of several dtypes, in the one that holds them all
        vector, unravel_parts = ravel_pytree(
            [(leaf.real, leaf.imag) if c else leaf for leaf, c in zip(leaves, is_complex, strict=True)]
        )

    def unravel(vector: Array) -> State:
        parts = unravel_parts(vector)
        joined = [jax.lax.complex(*p) if c else p for p, c in zip(parts, is_complex, strict=True)]
        return merge(jax.tree.unflatten(treedef, joined))

    return vector, unravel


def full_precision() -> AbstractContextManager[Any]:
    """For what is traced within. GPUs and TPUs multiply float32 in reduced precision by default, with three digits;
    a precision that a step names by itself stays."""
    return jax.default_matmul_precision("highest")


def prepend(state0: State, states: State) -> State:
    """h_0 .. h_{T-1}, leaves ``[T, ...]``, given h_0 and h_1 .. h_T."""
    return jax.tree.map(lambda h0, h: jnp.concatenate([jnp.asarray(h0)[None], h[:-1]]), state0, states)


def choose(which: Array, a: PyTree, b: PyTree) -> PyTree:
    """`a` where `which`, a scalar, is True, else `b`."""
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), a, b)


def is_differentiable(leaf: Any) -> bool:
    """Whether a leaf holds floating or complex numbers."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def state_size(state: State) -> int:
    """D: floating numbers in a state, a complex one counted as two."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if is_differentiable(leaf)]
    return sum(int(np.prod(jnp.shape(leaf))) * (2 if jnp.iscomplexobj(leaf) else 1) for leaf in leaves)


def units(state: State) -> list[Int[np.ndarray, "U L"]]:
    """The places in the state's vector that belong to one unit, for all U units of the leaves of one shape; a complex
    number has two. A list, one for each shape.
    """
    places: dict[tuple[int, ...], list[np.ndarray]] = {}
    start = 0
    for leaf in jax.tree.leaves(differentiable_part(state)[0]):
        for _ in range(2 if jnp.iscomplexobj(leaf) else 1):
            places.setdefault(jnp.shape(leaf), []).append(start + np.arange(jnp.size(leaf)))
            start += jnp.size(leaf)
    return [np.stack(of_shape, axis=1) for of_shape in places.values()]


def differentiable_part(tree: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """The tree with None at what is not floating, and the way back: ``merge(part)`` is like `tree`."""
    leaves, treedef = jax.tree.flatten(tree)
    moves = [is_differentiable(leaf) for leaf in leaves]

    def merge(part: PyTree) -> PyTree:
        varied = iter(jax.tree.leaves(part))
        return jax.tree.unflatten(
            treedef, [next(varied) if m else leaf for m, leaf in zip(moves, leaves, strict=True)]
        )

    return jax.tree.unflatten(treedef, [leaf if m else None for m, leaf in zip(moves, leaves, strict=True)]), merge


def _whole(recurrence: Recurrence) -> Recurrence:
    """What is given in words made explicit: padding harmless, resets at real steps, states without weak types."""
    xs, real, resets = jax.tree.map(jnp.asarray, recurrence.instants)
    state0 = jax.tree.map(_strong, recurrence.state0)
    reset_state, spare = recurrence.reset_state, None
    if resets is not None:
        resets = resets if real is None else resets_at_real_steps(resets, real)
        reset_state = state0 if reset_state is None else jax.tree.map(_like, reset_state, state0)
    if real is not None:
        first, none = jnp.argmax(real), ~jnp.any(real)

        def harmless(a: Array) -> Array:
            b = a[first]
            if not is_key(a):
                b = jnp.where(none, jnp.zeros_like(b), b)  # nothing but padding
            return jnp.where(along_leading(real, a), a, b)

        xs = jax.tree.map(harmless, xs)
        spare = state0 if resets is None else choose(resets[first], reset_state, state0)
    return replace(
        recurrence,
        state0=state0,
        instants=Instant(xs, real, resets),
        reset_state=reset_state,
        spare=spare,
        checked=True,
    )


def _varying_alike(recurrence: Recurrence) -> Recurrence:
    """Of a type that varies over whatever axes of a mesh the states do.

    Parameters that are the same on all devices have the gradients of all added up by JAX, wherever they meet what is
    not: in every step, before the powers of two by which the devices' numbers differ are known.
    """
    if not is_manual():
        return recurrence
    first = jax.tree.map(lambda a: a[0], recurrence.instants)
    axes = axes_of(settled(lambda h: recurrence.advance(h, first), recurrence.state0))
    return vary(recurrence, axes)


def _strong(leaf: Any) -> Array:
    leaf = jnp.asarray(leaf)
    if is_key(leaf):
        return leaf
    return jax.lax.convert_element_type(leaf, leaf.dtype)


def _like(leaf: Any, h: Array) -> Array:
    leaf = _strong(leaf)
    return leaf if leaf.dtype == h.dtype else leaf.astype(h.dtype)


def _check_new_state(new: State, state0: State) -> None:
    expected: Any = jax.tree.structure(state0)
    if expected != jax.tree.structure(new):
        raise ValueError(
            of_pairs(new, state0)
            or f"step: must return a state of the structure of state0, {expected}, got {jax.tree.structure(new)}"
        )
    old_leaves = jax.tree_util.tree_leaves_with_path(state0)
    for (path, old), out in zip(old_leaves, jax.tree.leaves(new), strict=True):
        if old.shape != out.shape:
            raise ValueError(
                f"step: must keep the shape of {at_path('state', path)}, {list(old.shape)}, got {list(out.shape)}"
                f"{of_stacked_gates(old.shape, out.shape)}"
            )
        if old.dtype != out.dtype:
            raise TypeError(
                f"step: must keep the dtype of {at_path('state', path)}, {old.dtype}, got {out.dtype}; "
                "cast state0, the parameters or xs so that they agree"
            )


def _check_like_state(name: str, tree: PyTree, state0: State) -> None:
    expected: Any = jax.tree.structure(state0)
    if jax.tree.structure(tree) != expected:
        raise ValueError(f"{name}: expected the structure of state0, {expected}, got {jax.tree.structure(tree)}")
    for (path, h), leaf in zip(jax.tree_util.tree_leaves_with_path(state0), jax.tree.leaves(tree), strict=True):
        if jnp.shape(h) != jnp.shape(leaf):
            expected, got = list(jnp.shape(h)), list(jnp.shape(leaf))
            raise ValueError(f"{at_path(name, path)}: expected the shape of state0, {expected}, got {got}")


def _check_length(sequence: Sequence, length: int | None) -> int:
    if length is not None:
        length = check_positive_int("length", length)
    if sequence.length is not None:
        given = check_positive_int("length", sequence.length)
        if length is not None and length != given:
            raise ValueError(f"length: expected {given}, that of the Sequence, got {length}")
        length = given
    flags = {name: flag for name in ("mask", "resets") if (flag := getattr(sequence, name)) is not None}
    for name, flag in flags.items():
        check_flags(name, flag)
    leaves = [*jax.tree_util.tree_leaves_with_path(sequence.xs)]
    if not leaves and not flags:
        if length is None:
            raise ValueError("length: expected the number of steps, since xs is None, got None")
        return length
    for path, leaf in leaves:
        if np.ndim(leaf) == 0:
            got = "a scalar"
            if is_key(leaf):
                got = "one random key; give one for each step, jax.random.split(key, T)"
            elif isinstance(sequence.xs, (list, tuple)):
                got += "; give jnp.asarray(xs)"
            raise ValueError(f"{at_path('xs', path)}: expected time as the first axis, got {got}")
    lengths = {at_path("xs", path): np.shape(leaf)[0] for path, leaf in leaves}
    lengths |= {name: flag.shape[0] for name, flag in flags.items()}
    if len(set(lengths.values())) > 1:
        way = ""
        if isinstance(sequence.xs, list):
            way = (
                "; sequences of different lengths: pad each, Sequence(x).pad_to(longest), stack them, "
                "jax.tree.map(lambda *a: jnp.stack(a), *padded), and jax.vmap over the first axis"
            )
        raise ValueError(f"xs: expected one number of steps in all leaves, got {lengths}{way}")
    steps = next(iter(lengths.values()))
    if steps == 0:
        raise ValueError("xs: expected at least one step, got a first axis of 0")
    if length is not None and length != steps:
        raise ValueError(f"length: expected {steps}, the first axis of xs, got {length}")
    return steps
