"""A recurrence linearised along its whole trajectory, so that the backward pass recomputes nothing."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from bptt_jax import devices
from bptt_jax.linalg.precision import wide
from bptt_jax.recurrence.preparation import chosen, merged, preparation
from bptt_jax.recurrence.programs import come_from, depends, divided, equations
from bptt_jax.step import (
    Array,
    Input,
    Instant,
    Params,
    PyTree,
    Recurrence,
    State,
    check_step,
    choose,
    differentiable_part,
)

Mode: TypeAlias = Literal["forward", "reverse"]

# Numbers of state in one contraction on CPU: arrays of that size, in float32, stay in the caches.
_CHUNK_NUMBERS = 1 << 16
# Up to so many parameters for each number of the state, adding up their gradients step by step costs little.
_FEW_PARAMS = 16
# In half precision a contraction may add up in it; so few terms lose little.
_CHUNK_IN_HALF = 16
_COLLECTIVES = ("psum", "pmax", "pmin", "ppermute", "all_gather", "all_to_all", "reduce_scatter")


class Linearization(NamedTuple):
    """The differentials of all steps, each about the state that the step starts from.

    Tangents and cotangents have the structure of what they belong to, with None at leaves that are no floating
    numbers. "Residuals" are what the differentials need and what changes from step to step. In padding the state is
    held: its differential with respect to the state is the identity, to all else zero.

    Attributes:
      recurrence: what was linearised, checked.
      states: h_1 .. h_T, leaves ``[T, ...]``.
      residuals: leaves ``[T, ...]``.
      mode: "reverse" if a step has no forward mode, so that its differentials are those of its backward pass.
      live: of each leaf of the state that holds floating numbers, whether it is read, or what comes from it later. What
        is pulled to the others is zero, and not made of their cotangents; pushes have None there.
      pull: ``(residuals of one step, dL/dh_t) -> (dh_t/dstart)^T dL/dh_t``; see `cut` for what a reset does.
      pull_params: ``(residuals of one step, dL/dh_t) -> (dh_t/dparams)^T dL/dh_t``.
      contract_made: ``(residuals of K steps, dL/dh [K, ...]) -> sum over K of (dh_t/dmade)^T dL/dh_t``, for what the
        step makes of the parameters alone; in single precision at least, for in half a sum over many steps would not
        grow any more. Formed by contractions over many steps instead of K accumulations, where that is possible.
      pull_both: ``(residuals of one step, dL/dh_t) -> ((dh_t/dmade)^T dL/dh_t, pull)``, which share their work; None
        where that is so much that adding up the gradients step by step costs more than it saves.
      no_made: zeros like what `pull_both` pulls to.
      pull_made: the sum of these over all steps ``-> (dh/dparams)^T dL/dh``.
      pull_inputs: ``(residuals of one step, dL/dh_t) -> (dh_t/dx_t)^T dL/dh_t``; None unless asked for.
      push: ``(residuals of one step, dstart) -> dh_t``.
    """

    recurrence: Recurrence
    states: State
    residuals: PyTree
    mode: Mode
    live: list[bool]
    pull: Callable[[PyTree, State], State]
    pull_params: Callable[[PyTree, State], Params]
    contract_made: Callable[[PyTree, State], list[Array]]
    pull_both: Callable[[PyTree, State], tuple[list[Array], State]] | None
    no_made: list[Array]
    pull_made: Callable[[list[Array]], Params]
    pull_inputs: Callable[[PyTree, State], Input] | None
    push: Callable[[PyTree, State], State]

    @property
    def starts(self) -> State:
        """What each step starts from, leaves ``[T, ...]``."""
        return self.recurrence.starts(self.states)

    @property
    def no_cotangents(self) -> State:
        """Zeros like the floating leaves of one state."""
        return jax.tree.map(jnp.zeros_like, differentiable_part(self.recurrence.state0)[0])


class _Residuals(NamedTuple):
    """Of one step; `real` and `reset` as in `Instant`."""

    changing: list[Any]
    real: Array | None
    reset: Array | None


def cut(residuals: PyTree, cotangent: PyTree) -> PyTree:
    """What goes on from the start of a step to the state before: nothing across a reset.

    Args:
      residuals: of one step, from a `Linearization`.
      cotangent: with respect to what the step starts from; any pytree.
    """
    if residuals.reset is None:
        return cotangent
    return jax.tree.map(lambda a: jnp.where(residuals.reset, jnp.zeros_like(a), a), cotangent)


def linearize(
    recurrence: Recurrence,
    *,
    mode: Mode | None = None,
    inputs: bool = False,
    read: Sequence[bool] | None = None,
) -> Linearization:
    """Unrolls a recurrence and keeps the differential of every step.

    Leaves of parameters, state and inputs that are no floating numbers are constants: None in every gradient.

    Args:
      recurrence: to be traced.
      mode: how the step is differentiated; None: forward if it can be, for then both directions are at hand.
      inputs: whether `pull_inputs` is wanted.
      read: of each leaf of the state that holds floating numbers, whether a loss reads it; None: all. Of the others
        those that no read one comes from, now or later, are left out: they may overflow, and a cotangent of zero times
        infinity is NaN, where to `jax.grad` there is no cotangent.

    Raises:
      TypeError: the step cannot be differentiated, or not by `mode`.
    """
    recurrence = check_step(recurrence)
    mode, live = mode_and_live(recurrence, mode, read)
    params = differentiable_part(recurrence.params)[0]
    parts = preparation(recurrence, live)
    made, back_from_made, constants = jax.vjp(parts.make, params, has_aux=True)
    prepared = parts.finish(made, constants)
    trees: dict[str, Any] = {}

    def read_part(tree: State) -> State:
        leaves, structure = jax.tree.flatten(tree)
        return jax.tree.unflatten(structure, [a if kept else None for a, kept in zip(leaves, live, strict=True)])

    def step_and_residuals(made: list[Array], h: State, at: Instant) -> tuple[list[Any], list[Any]]:
        start, merge_state = differentiable_part(recurrence.begin(h, at))
        x, merge_x = differentiable_part(at.x) if inputs else (None, lambda _: at.x)

        def moved(made: list[Array], start: State, x: Input) -> tuple[State, State]:
            new = prepared.step(made, merge_state(start), merge_x(x))
            return read_part(differentiable_part(new)[0]), new

        transform: Any = jax.linearize if mode == "forward" else jax.vjp
        _, differential, new = transform(moved, made, start, x, has_aux=True)
        residuals, trees["differential"] = jax.tree.flatten(differential)
        new_leaves, trees["state"] = jax.tree.flatten(new)
        return new_leaves, residuals

    first = jax.tree.map(lambda a: a[0], recurrence.instants)
    jaxpr, outputs = jax.make_jaxpr(step_and_residuals, return_shape=True)(made, recurrence.state0, first)
    n_state = len(outputs[0])
    moving = [False] * len(made) + [True] * (len(jaxpr.in_avals) - len(made))
    varies = depends(jaxpr, moving)[n_state:]
    # What the differentials need of the parameters alone, as the derivative of `lax.scan` has it.
    before, rest = map(jaxpr_as_fun, divided(jaxpr, moving))
    ready = before(*made)

    def evaluate(h: State, at: Instant) -> tuple[State, list[Any]]:
        out = rest(*ready, *jax.tree.leaves((h, at)))
        return jax.tree.unflatten(trees["state"], out[:n_state]), out[n_state:]

    # Residuals that no step changes (the weights themselves, mostly) are not stacked T times.
    fixed = chosen(evaluate(recurrence.state0, first)[1], varies)[1]

    def body(h_tm1: State, at: Instant) -> tuple[State, tuple[State, _Residuals]]:
        h, residuals = evaluate(h_tm1, at)
        if at.real is not None:
            h = choose(at.real, h, h_tm1)
        return h, (h, _Residuals(chosen(residuals, varies)[0], at.real, at.reset))

    _, (states, stacked) = devices.scan(body, recurrence.state0, recurrence.instants, length=recurrence.length)

    def differential(residuals: _Residuals) -> Callable[..., Any]:
        return jax.tree.unflatten(trees["differential"], merged(residuals.changing, fixed, varies))

    numbers = sum(h.size for h in jax.tree.leaves(differentiable_part(recurrence.state0)[0]))
    in_half = any(wide(a).dtype != a.dtype for a in made)
    few_params = sum(a.size for a in made) <= _FEW_PARAMS * numbers
    zeros = partial(jax.tree.map, jnp.zeros_like)
    state = zeros(differentiable_part(recurrence.state0)[0])
    x0 = zeros(differentiable_part(first.x)[0]) if inputs else None

    # The bare step, without regard to padding: pushes from all three, pulls to each.
    if mode == "forward":

        def push_from(residuals: _Residuals, dp: list[Array], dh: State, dx: Input) -> State:
            return differential(residuals)(dp, dh, dx)

        def pull_to(residuals: _Residuals, which: int, cotangent: State) -> PyTree:
            def push(tangent: PyTree) -> State:
                tangents = [zeros(made), state, x0]
                tangents[which] = tangent
                return differential(residuals)(*tangents)

            return jax.linear_transpose(push, (made, state, x0)[which])(read_part(cotangent))[0]

    else:

        def push_from(residuals: _Residuals, dp: list[Array], dh: State, dx: Input) -> State:
            return jax.linear_transpose(differential(residuals), read_part(state))((dp, dh, dx))[0]

        def pull_to(residuals: _Residuals, which: int, cotangent: State) -> PyTree:
            return differential(residuals)(read_part(cotangent))[which]

    def pull_both(residuals: _Residuals, cotangent: State) -> tuple[list[Array], State]:
        if mode == "forward":

            def push(dp: list[Array], dh: State) -> State:
                return differential(residuals)(dp, dh, x0)

            to_made, pulled = jax.linear_transpose(push, made, state)(read_part(cotangent))
        else:
            to_made, pulled, _ = differential(residuals)(read_part(cotangent))
        pulled = pulled if residuals.real is None else choose(residuals.real, pulled, cotangent)
        return _where_real(residuals, to_made), pulled

    def pull_made(pulled: list[Array]) -> Params:
        gradient = back_from_made([a.astype(b.dtype) for a, b in zip(pulled, made, strict=True)])[0]
        if recurrence.instants.real is None:
            return gradient
        some = jnp.any(recurrence.instants.real)  # zero times an infinite derivative again
        return jax.tree.map(lambda a: jnp.where(some, a, jnp.zeros_like(a)), gradient)

    def pull(residuals: _Residuals, cotangent: State) -> State:
        pulled = pull_to(residuals, 1, cotangent)
        return pulled if residuals.real is None else choose(residuals.real, pulled, cotangent)

    def push(residuals: _Residuals, tangent: State) -> State:
        pushed = push_from(residuals, zeros(made), tangent, x0)
        return pushed if residuals.real is None else choose(residuals.real, pushed, read_part(tangent))

    def pull_params(residuals: _Residuals, cotangent: State) -> Params:
        return _where_real(residuals, pull_made(pull_to(residuals, 0, cotangent)))

    def pull_inputs(residuals: _Residuals, cotangent: State) -> Input:
        return _where_real(residuals, pull_to(residuals, 2, cotangent))

    def contract(residuals: _Residuals, cotangents: State) -> list[Array]:
        count = jax.tree.leaves(cotangents)[0].shape[0]

        def push(dp: list[Array]) -> State:
            return jax.vmap(lambda r: push_from(r, dp, state, x0), axis_size=count)(residuals)

        return jax.tree.map(wide, jax.linear_transpose(push, made)(read_part(cotangents))[0])

    def contract_by_steps(residuals: _Residuals, cotangents: State) -> list[Array]:
        def body(total: list[Array], one: tuple[_Residuals, State]) -> tuple[list[Array], None]:
            return jax.tree.map(lambda a, b: a + wide(b), total, pull_to(one[0], 0, one[1])), None

        return devices.scan(body, jax.tree.map(wide, zeros(made)), (residuals, cotangents))[0]

    def contract_by_chunks(residuals: _Residuals, cotangents: State) -> list[Array]:
        """For CPU: one contraction over all steps of a batch transposes arrays that fit no cache (up to 2x)."""
        leaves = jax.tree.leaves(cotangents)
        count = leaves[0].shape[0]
        numbers = max(1, sum(a.size for a in leaves) // count)
        chunk = max(1, min(_CHUNK_NUMBERS // numbers, _CHUNK_IN_HALF if in_half else count))
        if chunk >= count:
            return contract(residuals, cotangents)
        rest = count % chunk
        tail = jax.tree.map(lambda a: a[count - rest :], (residuals, cotangents))
        start = contract(*tail) if rest else jax.tree.map(wide, zeros(made))

        def body(total: list[Array], part: tuple[_Residuals, State]) -> tuple[list[Array], None]:
            return jax.tree.map(jnp.add, total, contract(*part)), None

        def cut(a: Array) -> Array:
            return a[: count - rest].reshape(count // chunk, chunk, *a.shape[1:])

        return devices.scan(body, start, jax.tree.map(cut, (residuals, cotangents)))[0]

    def contract_made(residuals: _Residuals, cotangents: State) -> list[Array]:
        if residuals.real is not None:
            cotangents = jax.vmap(_where_real)(residuals, cotangents)
        # The differential of a `cond` cannot be transposed once it is batched; step by step it can.
        if mode == "reverse" or not _traces(contract, residuals, cotangents):
            return contract_by_steps(residuals, cotangents)
        on_cpu = contract_by_steps if few_params else contract_by_chunks
        elsewhere = contract_by_chunks if in_half else contract
        return jax.lax.platform_dependent(residuals, cotangents, cpu=on_cpu, default=elsewhere)

    return Linearization(
        recurrence,
        states,
        stacked,
        mode,
        live,
        pull,
        pull_params,
        contract_made,
        pull_both if few_params else None,
        zeros(made),
        pull_made,
        pull_inputs if inputs else None,
        push,
    )


def at_many_steps(pull: Callable[[PyTree, State], PyTree], residuals: PyTree, cotangents: State) -> PyTree:
    """``pull(residuals, cotangent)`` of each of K steps, ``[K, ...]``: together, or one after the other where the
    backward pass has a loop that may end sooner at one step than at another, as that of an adaptive solver."""
    one = jax.tree.map(lambda a: a[0], (residuals, cotangents))
    if "while" in _primitives(jax.make_jaxpr(pull)(*one)):  # Equinox's cannot be batched then
        return jax.lax.map(lambda inputs: pull(*inputs), (residuals, cotangents))
    return jax.vmap(pull)(residuals, cotangents)


def mode_and_live(
    recurrence: Recurrence, mode: Mode | None = None, read: Sequence[bool] | None = None
) -> tuple[Mode, list[bool]]:
    """`Linearization.mode` and `Linearization.live` of a checked recurrence; arguments, Raises: as for `linearize`.

    All leaves are live where the step has no program of tangents to tell.
    """
    mode, tangents = _differentiation(recurrence, mode)
    if read is None or tangents is None:
        return mode, [True] * len(jax.tree.leaves(differentiable_part(recurrence.state0)[0]))
    return mode, come_from(tangents, list(read))


def require_pulls(along: Linearization, what: str) -> None:
    """Raises TypeError, naming `what` needs them, where a step has no backward pass."""
    one = jax.tree.map(lambda a: a[0], along.residuals)
    fault = _fault(along.pull, one, along.no_cotangents) or _fault(along.pull_params, one, along.no_cotangents)
    if fault is not None:
        raise TypeError(
            f"step: {what} needs its backward pass, and it has none ({_short(fault)}); a while_loop of unknown "
            "length cannot be run backwards: use lax.scan, or lax.fori_loop with bounds that are known before "
            "compilation. jacobians and lyapunov_exponents go forward and work"
        ) from fault


def require_pushes(along: Linearization, what: str) -> None:
    """Raises TypeError, naming `what` needs them, where a step has pulls alone."""
    one = jax.tree.map(lambda a: a[0], along.residuals)
    fault = _fault(along.push, one, along.no_cotangents)
    if fault is not None:
        raise TypeError(
            f"step: {what} needs its forward mode, and it has none: its backward pass cannot be turned round "
            f"either ({_short(fault)}); write its derivative as a jax.custom_jvp"
        ) from fault


def differentiation_mode(recurrence: Recurrence, mode: Mode | None = None) -> Mode:
    """How the step of a checked recurrence is differentiated: as asked for, else forward if it can be.

    Raises:
      TypeError: the step cannot be differentiated so, or makes use of other sequences or devices (`jax.lax.psum`).
    """
    return _differentiation(recurrence, mode)[0]


def _differentiation(recurrence: Recurrence, mode: Mode | None) -> tuple[Mode, Any]:
    """`differentiation_mode`, which says what it raises, and the program of the tangent of the step's new state, given
    parameters, state and the tangents of both; None where there is none."""
    params, merge_params = differentiable_part(recurrence.params)
    first = jax.tree.map(lambda a: jnp.asarray(a)[0], recurrence.instants)
    start, merge_state = differentiable_part(recurrence.state0)

    def moved(params: Params, start: State) -> State:
        return differentiable_part(recurrence.step(merge_params(params), merge_state(start), first.x))[0]

    tangents: Any = None

    def pushed(params: Params, start: State, dp: Params, dh: State) -> State:
        return jax.jvp(moved, (params, start), (dp, dh))[1]

    def forward(params: Params, start: State) -> None:
        nonlocal tangents
        tangents = jax.make_jaxpr(pushed)(params, start, params, start)
        if "custom_lin" in _primitives(tangents):  # what stands there complains only when it is compiled
            raise TypeError("the derivative of a jax.custom_vjp goes backwards alone")

    def reverse(params: Params, start: State) -> Any:
        return jax.vjp(moved, params, start)[1](start)

    fault = None if mode == "reverse" else _fault(forward, params, start)
    _refuse_collectives(jax.make_jaxpr(moved)(params, start) if tangents is None else tangents)
    if mode is not None:
        fault = _fault(reverse, params, start) if mode == "reverse" else fault
        if fault is None:
            return mode, tangents
        raise TypeError(f'mode: this step cannot be differentiated by "{mode}": {_short(fault)}') from fault
    if fault is None:
        return "forward", tangents
    backwards = _fault(reverse, params, start)
    if backwards is None:
        return "reverse", tangents
    raise TypeError(
        f"step: it cannot be differentiated, neither forwards ({_short(fault)}) nor backwards ({_short(backwards)})"
    ) from backwards


def _refuse_collectives(program: Any) -> None:
    """Of a step. Its pulls would add up what other devices, or sequences, send back, each in a unit of its own."""
    if not any(type(effect).__name__ == "NamedAxisEffect" for effect in program.effects):
        return  # none but over axes within the step
    if met := {name for name in _primitives(program) if name.startswith(_COLLECTIVES)}:
        raise TypeError(
            f"step: expected one that sees nothing of other sequences or devices, got {', '.join(sorted(met))}; "
            "collectives belong into the loss; or write the batch into the step, jax.vmap(step, (None, 0, 0), "
            "axis_name=...), and leave the division of arrays to the compiler, without shard_map"
        )


def _fault(function: Callable[..., Any], *arguments: Any) -> Exception | None:
    """What it raises on abstract values."""
    try:
        jax.eval_shape(function, *arguments)
    except Exception as fault:  # of the user's own code and of JAX's, which raises some five types here
        return fault
    return None


def _traces(function: Callable[..., Any], *arguments: Any) -> bool:
    return _fault(function, *arguments) is None


def _primitives(jaxpr: Any) -> set[str]:
    """Names of all primitives, also in jaxprs within."""
    return {eqn.primitive.name for eqn in equations(jaxpr)}


def _short(fault: Exception) -> str:
    lines = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {lines[0][:200] if lines else ''}"


def _where_real(residuals: _Residuals, tree: PyTree) -> PyTree:
    real = residuals.real
    return tree if real is None else jax.tree.map(lambda a: jnp.where(real, a, jnp.zeros_like(a)), tree)
