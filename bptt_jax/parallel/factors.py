"""By what a parallel evaluation carries differences from step to step: the Jacobians of K steps, or a part of them.

Beside these matrices come sizes, ``[K, D]``, to which the roundings of a step are relative: ``|J| |start|``, or as near
to it as the part tells.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bptt_jax import devices
from bptt_jax.linalg.affine import carried, held_scan
from bptt_jax.linalg.kalman import filtered_scan
from bptt_jax.linalg.scattered import signs
from bptt_jax.recurrence.jacobians import jacobians_at
from bptt_jax.recurrence.linearization import Mode
from bptt_jax.step import Instant, PyTree, Recurrence, State, full_precision, ravel_state, units


def added(
    recurrence: Recurrence,
    matrices: Array | list[Array],
    offsets: Float[Array, "K D"],
    most: Float[Array, ""],
    weight: Float[Array, ""] | None = None,
) -> Float[Array, "K D"]:
    """``A_t d_{t-1}`` of the affine recurrence ``d_t = G_t (A_t d_{t-1} + offsets_t)``, whichever of the three A is.

    Where d grows beyond `most` it is held there (`held_scan`).

    G is the identity, or with a `weight` the gain of a Kalman filter which is told, with so much confidence, that d is
    zero (ELK: Gonzalez et al. 2024, arXiv:2407.19115, section 4.2).
    """
    _, real, reset = recurrence.instants
    held = None if real is None else ~real

    def of(matrices: Array, offsets: Array) -> Array:
        if weight is None:
            return carried(matrices, held_scan(matrices, offsets, most, begins=reset), begins=reset)
        filtered = filtered_scan(matrices, offsets, weight, most, begins=reset, held=held)
        return carried(matrices, filtered, begins=reset)

    if not isinstance(matrices, list):
        return of(matrices, offsets)
    total = jnp.zeros_like(offsets)
    for places, blocks in zip(units(recurrence.state0), matrices, strict=True):
        there = offsets[:, places]
        if blocks.shape[-1] == 1:
            solved = of(blocks[..., 0, 0], there[..., 0])[..., None]
        else:
            solved = jax.vmap(of, 1, 1)(blocks, there)
        total = total.at[:, places].set(solved)
    return total


def full(
    recurrence: Recurrence, starts: State, instants: Instant, mode: Mode
) -> tuple[Float[Array, "K D D"], Float[Array, "K D"]]:
    """The Jacobians with respect to what K steps start from; in padding the identity."""
    factors = jacobians_at(recurrence.step, recurrence.params, starts, instants.x, mode)
    with full_precision():
        abs_jac_times_state = jnp.einsum("tij,tj->ti", jnp.abs(factors), _magnitudes(starts))
    if instants.real is not None:
        factors = jnp.where(instants.real[:, None, None], factors, jnp.eye(recurrence.size, dtype=factors.dtype))
    return factors, abs_jac_times_state


def diagonals(
    recurrence: Recurrence, starts: State, instants: Instant, mode: Mode
) -> tuple[Float[Array, "K D"], Float[Array, "K D"]]:
    """The diagonals of the Jacobians, a column or a row of each at a time; in padding ones."""
    vectors = _magnitudes(starts)

    def part(abs_jac_times_state: Array, i: Array) -> tuple[Array, Array]:
        directions = jnp.zeros_like(vectors).at[:, i].set(1)
        parts = _along(recurrence, starts, instants, mode, directions)
        if mode == "forward":  # the i-th columns
            abs_jac_times_state = abs_jac_times_state + jnp.abs(parts) * vectors[:, i, None]
        else:
            abs_jac_times_state = abs_jac_times_state.at[:, i].set(jnp.sum(jnp.abs(parts) * vectors, axis=1))
        return abs_jac_times_state, parts[:, i]

    abs_jac_times_state, found = devices.scan(part, jnp.zeros_like(vectors), jnp.arange(vectors.shape[1]))
    found = found.T if instants.real is None else jnp.where(instants.real[:, None], found.T, 1)
    return found, abs_jac_times_state


def blocks(
    recurrence: Recurrence, starts: State, instants: Instant, mode: Mode, count: Int[Array, ""]
) -> tuple[list[Float[Array, "K U L L"]], Float[Array, "K D"]]:
    """The blocks on the diagonal of each unit, estimated from one product with a Jacobian for each leaf; in padding the
    identity.

    The direction has a random sign in every unit of the leaf and zeros elsewhere. Times the unit's own sign the product
    is the block's column, and what other units add is as often positive as negative (Hutchinson 1990; Bekas,
    Kokiopoulou, Saad 2007). The signs are others at each `count`.
    """
    vectors = _magnitudes(starts)
    steps, size = vectors.shape
    sign = signs((steps, size), vectors.dtype, after=count * steps * size)
    found, most = [], jnp.zeros(steps, vectors.dtype)
    for places in units(recurrence.state0):
        own = sign[:, places[:, 0]]
        lines = []
        for leaf in places.T:
            directions = jnp.zeros_like(vectors).at[:, leaf].set(own)
            lines.append(own[..., None] * _along(recurrence, starts, instants, mode, directions)[:, places])
        matrices = jnp.stack(lines, axis=-1 if mode == "forward" else -2)
        grown = jnp.sum(jnp.abs(matrices) * vectors[:, places][:, :, None], axis=-1)
        most = jnp.maximum(most, jnp.max(grown, axis=(1, 2), initial=0))
        if instants.real is not None:
            matrices = jnp.where(
                instants.real[:, None, None, None], matrices, jnp.eye(places.shape[1], dtype=matrices.dtype)
            )
        found.append(matrices)
    most = jnp.maximum(most, jnp.max(vectors, axis=1))
    return found, jnp.broadcast_to(most[:, None], vectors.shape)


def _along(
    recurrence: Recurrence, starts: State, instants: Instant, mode: Mode, directions: Float[Array, "K D"]
) -> Float[Array, "K D"]:
    """``J_t d_t``, or ``J_t^T d_t`` where the step goes backwards alone."""

    def at(state: State, x: PyTree, direction: Array) -> Array:
        vector, unravel = ravel_state(state)

        def moved(v: Array) -> Array:
            return ravel_state(recurrence.step(recurrence.params, unravel(v), x))[0]

        if mode == "forward":
            return jax.jvp(moved, (vector,), (direction,))[1]
        return jax.vjp(moved, vector)[1](direction)[0]

    with full_precision():
        return jax.vmap(at)(starts, instants.x, directions)


def _magnitudes(starts: State) -> Float[Array, "K D"]:
    """0 of what is infinite: a computation in the log domain that begins with log 0 forgets it at once."""
    vectors = jnp.abs(jax.vmap(lambda h: ravel_state(h)[0])(starts))
    return jnp.where(vectors < jnp.inf, vectors, 0)
