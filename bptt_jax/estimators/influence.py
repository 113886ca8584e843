"""Real-time recurrent learning, and what is left of it where most influences are dropped."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from bptt_jax import devices
from bptt_jax.checks import check_positive_int
from bptt_jax.estimators.online import Differential, Numbers, OnlineCarry, go_forward
from bptt_jax.linalg.precision import matmul
from bptt_jax.step import Array, Loss, Params, PyTree, State, Step, units


def rtrl(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    key: PRNGKeyArray | None = None,
    args: PyTree = None,
    length: int | None = None,
    carry: OnlineCarry | None = None,
    has_carry: bool = False,
) -> Params:
    """The full gradient, forward in time: real-time recurrent learning (Williams, Zipser 1989).

    Carries the influence ``M_t = dh_t/dparams = J_t M_{t-1} + F_t``, F_t the immediate one, and adds
    ``(dl/dh_t)^T M_t``: exact, without bias or variance, and no backward pass through time. The influence holds in
    padding and is zero after a reset. States that the loss does not read do no harm, be they not finite; nor does a
    leaf that it never depends on, but with ``has_carry=True``: then the influence is of all leaves, for the loss of a
    later part may read them, and where one overflows the gradient is NaN.

    A stream in parts: with ``has_carry=True`` the last state and its influence come back, and the next part goes on
    from them; parts together give what the whole gives, if the loss is a sum over steps.

    Args:
      step, params, state0, xs, loss, args, length: as for `bptt_jax.adjoints`.
      key: not looked at; there is nothing random.
      carry: what the part before returned; its state stands in place of `state0`, to which resets still lead where
        the sequence does not say another state.
      has_carry: whether to return ``(params_grad, carry)``.

    Returns:
      dL/dparams, equal to `adjoints`' ``params_grad``; None at parameters that are not floating. With P parameters
      time O(D^2 P) a step, memory O(D P) beside the states, however long the sequence.

    Raises:
      TypeError, ValueError: an argument breaks the contract; `carry` is of another estimator or recurrence.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> problem = step, 0.5, jnp.zeros(1), jnp.ones((4, 1)), jnp.sum
      >>> float(bptt.estimators.rtrl(*problem))
      5.75
      >>> first, carry = bptt.estimators.rtrl(step, 0.5, jnp.zeros(1), jnp.ones((2, 1)), jnp.sum, has_carry=True)
      >>> float(first + bptt.estimators.rtrl(step, 0.5, jnp.zeros(1), jnp.ones((2, 1)), jnp.sum, carry=carry))
      5.75
    """
    return go_forward(
        _Whole(),
        step,
        params,
        state0,
        xs,
        loss,
        key=None,
        args=args,
        length=length,
        carry=carry,
        has_carry=has_carry,
    )


def snap(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    n: int = 1,
    key: PRNGKeyArray | None = None,
    args: PyTree = None,
    length: int | None = None,
    carry: OnlineCarry | None = None,
    has_carry: bool = False,
) -> Params:
    """SnAp-n: of the influence, what can arise within n steps (Menick et al. 2020, arXiv:2006.07232, section 3).

    As `rtrl`, but of ``M_t = J_t M_{t-1} + F_t`` only the entries (unit, parameter) are kept that a parameter can
    reach within n steps: for n = 1 those where the immediate F is not zero, for n = 2 also those that a J takes these
    to. There is no variance; what is lost is what travels through n or more units. From n = D on nothing is, and for
    cells whose parameters touch one unit each, n = 1 keeps the diagonal of J alone. A complex number is one, as a unit
    and as a parameter.

    Which entries are zero is seen, not deduced, so that any step has its pattern: an entry of J or F counts from the
    first step on at which it was not zero, until a reset. What has always been zero has carried nothing.

    Args:
      step, params, state0, xs, loss, args, length: as for `bptt_jax.adjoints`.
      n: steps within which a parameter reaches the units that are kept.
      key: not looked at; there is nothing random.
      carry, has_carry: as for `rtrl`.

    Returns:
      Like `params`; None at parameters that are not floating. Time and memory are those of `rtrl`, of dense arrays
      with zeros in them, and O(n D^2 P) for the pattern; the paper's are those of the entries that are kept.

    Raises:
      TypeError, ValueError: an argument breaks the contract; `carry` is of another estimator or recurrence.

    Example:
      >>> step = lambda w, h, x: w @ h + x
      >>> w = jnp.array([[0.0, 0.5], [0.5, 0.0]])
      >>> problem = step, w, jnp.zeros(2), jnp.ones((4, 2)), lambda states: states[-1, 0]
      >>> [float(bptt.estimators.snap(*problem, n=n)[0, 0]) for n in (1, 2)]
      [1.75, 2.0]
    """
    return go_forward(
        _Within(check_positive_int("n", n)),
        step,
        params,
        state0,
        xs,
        loss,
        key=None,
        args=args,
        length=length,
        carry=carry,
        has_carry=has_carry,
    )


def rflo(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    key: PRNGKeyArray | None = None,
    args: PyTree = None,
    length: int | None = None,
    carry: OnlineCarry | None = None,
    has_carry: bool = False,
) -> Params:
    """Local influence: every unit's own memory alone, as in RFLO (Murray 2019) and e-prop (Bellec et al. 2020).

    As `rtrl`, with ``M_t = D_t M_{t-1} + F_t``, where D_t has of J_t what a unit does to itself: the eligibility
    traces. Where the state has several arrays of one shape (a cell and a hidden state, a voltage and an adaptation),
    the numbers at one place of them are one unit, and D_t has their block; so have real and imaginary part. There is
    no variance; all that passes from unit to unit is lost.

    In RFLO a unit's own memory is its leak alone, ``1 - 1/tau``, and in e-prop its internal dynamics alone: what it
    does to itself by its recurrent weight belongs to D here, since of any step only J can be asked. In both the error
    comes to the units through random weights; here it is dl/dh_t itself (e-prop's "symmetric").

    Args:
      step, params, state0, xs, loss, args, length: as for `bptt_jax.adjoints`.
      key: not looked at; there is nothing random.
      carry, has_carry: as for `rtrl`.

    Returns:
      Like `params`; None at parameters that are not floating. With dense arrays time O(D^2 P) a step and memory
      O(D P) as for `rtrl`; where a parameter touches one unit, both can be O(P).

    Raises:
      TypeError, ValueError: an argument breaks the contract; `carry` is of another estimator or recurrence.

    Example:
      >>> step = lambda w, h, x: 0.5 * h + w @ h + x
      >>> w = jnp.array([[0.0, 0.5], [0.5, 0.0]])
      >>> problem = step, w, jnp.zeros(2), jnp.ones((4, 2)), lambda states: states[-1, 0]
      >>> float(bptt.estimators.rflo(*problem)[0, 0]), float(bptt.estimators.rtrl(*problem)[0, 0])
      (4.25, 4.5)
    """
    return go_forward(
        _Local(),
        step,
        params,
        state0,
        xs,
        loss,
        key=None,
        args=args,
        length=length,
        carry=carry,
        has_carry=has_carry,
    )


def _in_single(of: Numbers, at: Differential) -> tuple[Array, Array]:
    """J and F; the influence is a sum over steps, which in half precision would not grow any more."""
    j, f = at.jacobians()
    return j.astype(of.single), f.astype(of.single)


def _read(influence: Array, signal: Array) -> Array:
    # What is not read may be infinite, and zero times that is NaN.
    return matmul(signal.astype(influence.dtype), jnp.where(signal[:, None] == 0, 0, influence))


@dataclass(frozen=True)
class _Whole:
    def begin(self, of: Numbers) -> Array:
        return jnp.zeros((of.size, of.params_size), of.single)

    def advance(self, of: Numbers, at: Differential, influence: Array, key: Any) -> Array:
        j, f = _in_single(of, at)
        return matmul(j, influence) + f

    def product(self, of: Numbers, influence: Array, signal: Array) -> Array:
        return _read(influence, signal)


@dataclass(frozen=True)
class _Local:
    def begin(self, of: Numbers) -> Array:
        return jnp.zeros((of.size, of.params_size), of.single)

    def advance(self, of: Numbers, at: Differential, influence: Array, key: Any) -> Array:
        j, f = _in_single(of, at)
        return matmul(jnp.where(_one_unit(of), j, 0), influence) + f

    def product(self, of: Numbers, influence: Array, signal: Array) -> Array:
        return _read(influence, signal)


class _Seen(NamedTuple):
    """Influence ``[D, P]``, and where J ``[D, D]`` and F ``[D, P]`` have not been zero."""

    influence: Array
    by_state: Array
    by_params: Array


@dataclass(frozen=True)
class _Within:
    n: int

    def begin(self, of: Numbers) -> _Seen:
        wide = of.size, of.params_size
        return _Seen(jnp.zeros(wide, of.single), jnp.zeros((of.size, of.size), bool), jnp.zeros(wide, bool))

    def advance(self, of: Numbers, at: Differential, seen: _Seen, key: Any) -> _Seen:
        j, f = _in_single(of, at)
        in_state, in_params = _other_parts(of.state), _other_parts(of.params)
        by_state = seen.by_state | _of_either_part(j != 0, in_state, in_state)
        by_params = seen.by_params | _of_either_part(f != 0, in_state, in_params)

        def further(_: Array, reached: Array) -> Array:
            return by_params | (matmul(by_state.astype(jnp.float32), reached.astype(jnp.float32)) > 0)

        kept = devices.fori_loop(1, min(self.n, of.size), further, by_params)
        return _Seen(jnp.where(kept, matmul(j, seen.influence) + f, 0), by_state, by_params)

    def product(self, of: Numbers, seen: _Seen, signal: Array) -> Array:
        return _read(seen.influence, signal)


def _other_parts(leaves: list[Array]) -> np.ndarray:
    """For every number of a vector the index of the other part of a complex one; of a real one its own."""
    others, begin = [np.empty(0, int)], 0
    for leaf in leaves:
        index = begin + np.arange(leaf.size * (1 + jnp.iscomplexobj(leaf)))
        others.append(np.roll(index, leaf.size))
        begin += len(index)
    return np.concatenate(others)


def _of_either_part(which: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    which = which | which[rows]
    return which | which[:, columns]


def _one_unit(of: Numbers) -> np.ndarray:
    """``[D, D]``: whether two numbers of the state stand at one place of arrays of one shape."""
    owners, count = np.empty(of.size, int), 0
    for places in units(of.state):
        owners[places] = count + np.arange(len(places))[:, None]
        count += len(places)
    return np.equal.outer(owners, owners)
