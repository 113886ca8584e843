"""The influence of every weight matrix on the state as a random Kronecker product."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from bptt_jax import devices
from bptt_jax.checks import check_key
from bptt_jax.estimators.online import Differential, Numbers, OnlineCarry, go_forward
from bptt_jax.estimators.rank_one import balance
from bptt_jax.linalg.precision import matmul
from bptt_jax.linalg.scattered import scattered
from bptt_jax.step import Array, Loss, Params, PyTree, State, Step


def kf_rtrl(
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
    """Kronecker-factored real-time recurrent learning (Mujika, Meier, Steger 2018, arXiv:1805.10842, algorithm 1).

    A weight matrix ``W [K, n]`` that is multiplied by one vector a, ``W a``, has an immediate influence
    ``F = a (x) B``, B ``[D, K]`` what ``W a`` does to the state. Of `rtrl`'s influence ``M_t = J_t M_{t-1} + F_t`` on
    W there are two factors, ``u [n]`` and ``A [D, K]``, with the mean of ``u (x) A`` equal to M. With random signs
    c_1, c_2, independent from step to step::

        u' = c_1 p_1 u + c_2 p_2 a          p_1 = sqrt(|J A| / |u|)
        A' = c_1 / p_1 J A + c_2 / p_2 B    p_2 = sqrt(|B| / |a|)

    No bias, and less variance than `bptt_jax.estimators.uoro`, for a sum is mixed of two products and not of D + 1.

    It is for any step. F is asked of the step's derivative: `a` is that one vector which its rows are multiples of,
    and where they are not multiples of one (a matrix that is used twice in a step, complex weights), what is left of
    them is a third product, ``nu (x) R nu`` with random signs nu ``[n]``, without bias and with the variance that has.
    The axis of length n is that along which the step's program multiplies the array by something, else the last one.
    Every array has factors of its own, where the paper has one u for the recurrent weights, those of the input and
    the bias together; arrays of one axis cost no more when carried exactly, and are.

    Args:
      step, params, state0, xs, loss, args, length: as for `bptt_jax.adjoints`.
      key: of the signs; as for `bptt_jax.estimators.uoro`.
      carry, has_carry: as for `bptt_jax.estimators.rtrl`; parts that go on with the same key give what the whole
        gives, to the same signs.

    Returns:
      Like `params`; None at parameters that are not floating. With the K of all arrays summed up time O(D^2 K + D P)
      a step, in D pulls of the step one after the other, and memory O(D K) beside the states: D times less than
      `rtrl`, where n is about D. Of a step without a backward pass, F is there as a whole.

    Raises:
      TypeError, ValueError: an argument breaks the contract, `carry` is of another estimator or
        recurrence.

    Example:
      >>> step = lambda w, h, x: jnp.tanh(w @ h + x)
      >>> problem = step, 0.5 * jnp.eye(2), jnp.zeros(2), jnp.ones((9, 2)), jnp.sum
      >>> keys = jax.random.split(jax.random.key(0), 4000)
      >>> mean = jnp.mean(jax.vmap(lambda key: bptt.estimators.kf_rtrl(*problem, key=key))(keys), axis=0)
      >>> bool(jnp.allclose(mean, bptt.estimators.rtrl(*problem), rtol=0.05))
      True
    """
    return go_forward(
        _Kronecker(),
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


class _Factors(NamedTuple):
    """``u [n]`` and ``A [D, K]`` of one array of parameters; where n is 1, u is 1 and A the influence itself."""

    u: Array
    a: Array


class _Matrix(NamedTuple):
    """How the numbers of an array in the vector of parameters are a matrix ``[K, n]``.

    Attributes:
      begin, size: where they stand.
      shape: of the array; the first axis of complex ones is that of real and imaginary part.
      axis: of length n.
    """

    begin: int
    size: int
    shape: tuple[int, ...]
    axis: int

    @property
    def columns(self) -> int:
        return self.shape[self.axis] if self.shape else 1

    def of(self, vector: Array) -> Array:
        """``[K, n]``, from the vector of all parameters."""
        part = vector[self.begin : self.begin + self.size].reshape(self.shape)
        part = part if not self.shape else jnp.moveaxis(part, self.axis, -1)
        return part.reshape(-1, self.columns)

    def back(self, matrix: Array) -> Array:
        """``[K n]``, in the order of the vector."""
        if not self.shape:
            return matrix.ravel()
        order = [n for k, n in enumerate(self.shape) if k != self.axis]
        return jnp.moveaxis(matrix.reshape(*order, self.columns), -1, self.axis).ravel()


def _matrices(of: Numbers) -> Iterator[_Matrix]:
    begin = 0
    for leaf, axis in zip(of.params, of.meets, strict=True):
        real = not jnp.iscomplexobj(leaf)
        shape = leaf.shape if real else (2, *leaf.shape)
        if leaf.ndim < 2:
            shape, at = (*shape, 1), len(shape)
        else:
            at = axis % leaf.ndim + len(shape) - leaf.ndim
        size = int(np.prod(shape))
        yield _Matrix(begin, size, shape, at)
        begin += size


@dataclass(frozen=True)
class _Kronecker:
    def begin(self, of: Numbers) -> list[_Factors]:
        dtype = of.single
        return [
            _Factors(
                (jnp.ones if m.columns == 1 else jnp.zeros)(m.columns, dtype),
                jnp.zeros((of.size, m.size // m.columns), dtype),
            )
            for m in _matrices(of)
        ]

    def advance(self, of: Numbers, at: Differential, factors: list[_Factors], key: Any) -> list[_Factors]:
        if not factors:
            return factors
        matrices, dtype = list(_matrices(of)), factors[0].a.dtype
        axes = devices.axes_of(factors)
        keys = jax.random.split(key, 2 * len(matrices))
        signs = devices.vary([jax.random.rademacher(k, (3,), dtype) for k in keys[: len(matrices)]], axes)
        noise = devices.vary(
            [
                jax.random.rademacher(k, (m.columns,), dtype)
                for k, m in zip(keys[len(matrices) :], matrices, strict=True)
            ],
            axes,
        )
        some = at.pull(devices.vary(scattered((of.size,), of.dtype), axes)).astype(dtype)
        directions = [_unit(_one_row(m.of(some))) for m in matrices]

        def split(j: Array, f: Array) -> tuple[Array, list[tuple[Array, ...]]]:
            found: list[tuple[Array, ...]] = []
            for m, direction, nu in zip(matrices, directions, noise, strict=True):
                row = m.of(f.astype(dtype))
                if m.columns == 1:
                    found.append((row[:, 0],))
                    continue
                along = matmul(row, direction)
                rest = row - jnp.outer(along, direction)
                found.append((along, matmul(rest, nu), jnp.sum(rest**2), jnp.sum(row**2)))
            return j.astype(dtype), found

        j, rows = at.rows(split)
        after = []
        for m, own, direction, nu, c, parts in zip(matrices, factors, directions, noise, signs, rows, strict=True):
            moved = matmul(j, own.a)
            if m.columns == 1:
                after.append(_Factors(own.u, moved + parts[0]))
                continue
            along, random, rest, whole = parts
            # What is left of rows that are multiples of one vector is their rounding.
            rounding = float(100 * jnp.finfo(of.dtype).eps) ** 2
            random = jnp.where(jnp.sum(rest) <= rounding * jnp.sum(whole), 0, random)
            after.append(_mixed(c, [(own.u, moved), (direction, along), (nu, random)]))
        return after

    def product(self, of: Numbers, factors: list[_Factors], signal: Array) -> Array:
        parts = []
        for m, own in zip(_matrices(of), factors, strict=True):
            # What is not read may be infinite, and zero times that is NaN.
            read = jnp.where(signal[:, None] == 0, 0, own.a)
            u = jnp.where(jnp.all(signal == 0), 0, own.u)
            parts.append(m.back(jnp.outer(matmul(signal.astype(read.dtype), read), u)))
        return jnp.concatenate([*parts, jnp.zeros(0, of.single)])


def _mixed(signs: Array, products: list[tuple[Array, Array]]) -> _Factors:
    """One product with the mean of the sum of them."""
    u, a = jnp.zeros_like(products[0][0]), jnp.zeros_like(products[0][1])
    for sign, (left, right) in zip(signs, products, strict=True):
        p, there = balance(right, left)
        u += jnp.where(there, sign * p * left, 0)
        a += jnp.where(there, sign / p * right, 0)
    return _Factors(u, a)


def _one_row(matrix: Array) -> Array:
    return matmul(scattered((matrix.shape[0],), matrix.dtype), matrix)


def _unit(vector: Array) -> Array:
    size = jnp.linalg.norm(vector)
    return vector / jnp.where(size == 0, 1, size)
