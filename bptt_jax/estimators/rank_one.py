"""The influence of the parameters on the state as one random product of two vectors."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from bptt_jax import devices
from bptt_jax.checks import check_key
from bptt_jax.estimators.online import Differential, Numbers, OnlineCarry, go_forward
from bptt_jax.step import Array, Loss, Params, PyTree, State, Step


def uoro(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    key: PRNGKeyArray,
    args: PyTree = None,
    length: int | None = None,
    carry: OnlineCarry | None = None,
    has_carry: bool = False,
) -> Params:
    """Unbiased online recurrent optimization (Tallec, Ollivier 2017, arXiv:1702.05043, algorithm 1).

    Of `rtrl`'s influence ``M_t = J_t M_{t-1} + F_t`` there are two vectors, ``s [D]`` and ``theta [P]``, with the
    mean of ``s theta^T`` equal to M. With random signs nu ``[D]``, independent from step to step::

        s' = rho_0 J s + rho_1 nu             rho_0 = sqrt(|theta| / |J s|)
        theta' = theta / rho_0 + F^T nu / rho_1    rho_1 = sqrt(|F^T nu| / |nu|)

    The factors rho, the paper's, make the variance least. What is added to the gradient is
    ``(dl/dh_t . s') theta'``: no bias, and a variance that grows with the number of units and with how long the
    influence lives. Both vectors hold in padding and are zero after a reset, so that in the mean a sequence gives
    what its pieces give alone.

    Args:
      step, params, state0, xs, loss, args, length: as for `bptt_jax.adjoints`.
      key: of the signs; that of step t, counted from the beginning of the stream by real steps, is
        ``fold_in(key, t)``.
      carry, has_carry: as for `bptt_jax.estimators.rtrl`; parts that go on with the same key give what the whole
        gives, to the same signs.

    Returns:
      Like `params`; None at parameters that are not floating. Time of a forward and a backward pass through the step,
      memory O(D + P) beside the states. Of a step that has a backward pass alone (`jax.custom_vjp`) it is pulled D
      times, of one without, pushed P times.

    Raises:
      TypeError, ValueError: an argument breaks the contract, `carry` is of another estimator or
        recurrence.

    Example:
      >>> step = lambda w, h, x: jnp.tanh(w @ h + x)
      >>> problem = step, 0.5 * jnp.eye(2), jnp.zeros(2), jnp.ones((9, 2)), jnp.sum
      >>> keys = jax.random.split(jax.random.key(0), 4000)
      >>> mean = jnp.mean(jax.vmap(lambda key: bptt.estimators.uoro(*problem, key=key))(keys), axis=0)
      >>> bool(jnp.allclose(mean, bptt.estimators.rtrl(*problem), rtol=0.05))
      True
    """
    return go_forward(
        _RankOne(),
        step,
        params,
        state0,
        xs,
        loss,
        key=check_key("key", key),
        args=args,
        length=length,
        carry=carry,
        has_carry=has_carry,
    )


class _Pair(NamedTuple):
    """``s [D]`` and ``theta [P]``; in single precision at least, since they are kept of one length, not small."""

    on_state: Array
    of_params: Array


@dataclass(frozen=True)
class _RankOne:
    def begin(self, of: Numbers) -> _Pair:
        dtype = of.single
        return _Pair(jnp.zeros(of.size, dtype), jnp.zeros(of.params_size, dtype))

    def advance(self, of: Numbers, at: Differential, pair: _Pair, key: Any) -> _Pair:
        dtype = pair.on_state.dtype
        signs = jax.random.rademacher(key, (of.size,), dtype)
        signs = devices.vary(signs, devices.axes_of(pair.on_state))
        size = jnp.linalg.norm(pair.on_state)
        # A step in half precision gets a vector of length one.
        unit = pair.on_state / jnp.where(size == 0, 1, size)
        pushed = size * at.push(unit.astype(of.dtype)).astype(dtype)
        pulled = at.pull(signs.astype(of.dtype)).astype(dtype)
        rho_0, old = balance(pair.of_params, pushed)
        rho_1, new = balance(pulled, signs)
        return _Pair(
            jnp.where(old, rho_0 * pushed, 0) + jnp.where(new, rho_1 * signs, 0),
            jnp.where(old, pair.of_params / rho_0, 0) + jnp.where(new, pulled / rho_1, 0),
        )

    def product(self, of: Numbers, pair: _Pair, signal: Array) -> Array:
        # What is not read may be infinite.
        read = jnp.where(signal == 0, 0, pair.on_state)
        return jnp.where(jnp.all(signal == 0), 0, (signal.astype(read.dtype) @ read) * pair.of_params)


def balance(a: Array, b: Array) -> tuple[Array, Array]:
    """``sqrt(|a| / |b|)``, and whether neither is zero; where one is, the product is nothing but noise without it."""
    sizes = jnp.linalg.norm(a), jnp.linalg.norm(b)
    both = (sizes[0] != 0) & (sizes[1] != 0)
    return jnp.where(both, jnp.sqrt(sizes[0] / jnp.where(both, sizes[1], 1)), 1), both
