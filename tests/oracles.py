"""Steps that use every liberty of the contract, and slow, plain ways to what the package computes."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bptt_jax as bptt

N, I, T = 3, 2, 7


def _defaults() -> dict[str, Any]:
    options = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:  # another backend, or another version, has other options
        return {}
    return options


# Identities hold however the compiler works, and conftest.py has it work little. What floating numbers do at the
# ends of their range is tested as users run it, with the compiler's defaults.
users_jit = partial(jax.jit, compiler_options=_defaults())


class Example(NamedTuple):
    step: bptt.Step
    params: Any
    state0: Any
    xs: Any
    length: int | None = None


def cell_params(name: str, dtype: Any, n: int = N, inputs: int = I, seed: int = 0) -> Any:
    """Weights of a cell, large enough that every gate moves, drawn without compiling anything."""
    rng = np.random.default_rng(seed)
    gates = {"rnn": 1, "leaky_rnn": 1, "gru": 3, "lstm": 4}[name]
    shapes = [(gates * n, n), (gates * n, inputs), (gates * n,), (n,)]
    rnn = bptt.cells.RNNParams
    make = {"rnn": rnn, "leaky_rnn": rnn, "gru": bptt.cells.GRUParams, "lstm": bptt.cells.LSTMParams}[name]
    return make(*(jnp.asarray(0.7 * rng.standard_normal(shape), dtype) for shape in shapes[: len(make._fields)]))


def cell_example(name: str, dtype: Any, n: int = N, steps: int = T) -> Example:
    rng = np.random.default_rng(1)
    cell = getattr(bptt.cells, name)(n, dtype=dtype)
    state0 = jax.tree.map(lambda a: jnp.asarray(0.5 * rng.standard_normal(a.shape), dtype), cell.initial_state())
    return Example(
        cell.step, cell_params(name, dtype, n), state0, jnp.asarray(rng.standard_normal((steps, I)), dtype)
    )


@jax.jit
def tokens_step(params: Any, state: Any, token: jax.Array) -> Any:
    """Jitted, a dict for a state, integers as inputs, and a permutation among the parameters."""
    fast = jnp.tanh(params["w"] @ state["fast"][params["order"]] + params["table"][token] + jnp.sum(state["slow"]))
    return {"fast": fast, "slow": 0.9 * state["slow"] + 0.1 * jnp.outer(fast[:2], fast[1:2])}


def tokens_example(dtype: Any) -> Example:
    rng = np.random.default_rng(2)
    params = {
        "w": jnp.asarray(rng.standard_normal((3, 3)), dtype),
        "table": jnp.asarray(rng.standard_normal((5, 3)), dtype),
        "order": jnp.asarray([2, 0, 1]),
    }
    state0 = {"fast": jnp.asarray(rng.standard_normal(3), dtype), "slow": jnp.full((2, 1), 0.1, dtype)}
    return Example(tokens_step, params, state0, jnp.asarray([0, 3, 3, 1, 4, 0, 2]))


def complex_step(params: Any, state: Any, x: None) -> Any:
    """Autonomous, holomorphic in neither state nor parameters."""
    z, r = state
    turned = params["a"] * z + jnp.conj(params["b"] * z)
    bounded = jax.lax.complex(jnp.tanh(turned.real), jnp.tanh(turned.imag * r))
    return bounded, 0.5 * r + jnp.sum(turned.imag, keepdims=True)


def complex_example(dtype: Any) -> Example:
    rng = np.random.default_rng(3)

    def draw(n: int) -> jax.Array:
        return jnp.asarray(
            rng.standard_normal(n) + 1j * rng.standard_normal(n), jnp.result_type(1j * np.zeros(1, dtype))
        )

    return Example(complex_step, {"a": draw(2), "b": draw(2)}, (draw(2), jnp.ones(1, dtype)), None, T)


EXAMPLES: dict[str, Callable[[Any], Example]] = {
    "rnn": lambda dtype: cell_example("rnn", dtype),
    "gru": lambda dtype: cell_example("gru", dtype),
    "lstm": lambda dtype: cell_example("lstm", dtype),
    "tokens": tokens_example,
    "complex": complex_example,
}


def linear_step(a: jax.Array, h: jax.Array, x: Any) -> jax.Array:
    """``h = A h (+ x)``: every product of Jacobians is a power of A."""
    return a @ h if x is None else a @ h + x


def weighted_loss(weights: jax.Array) -> Callable[[Any], jax.Array]:
    """``sum_t weights_t l(h_t)``: with a one-hot vector, a loss on one step."""

    def loss(states: Any) -> jax.Array:
        def at_each_step(a: jax.Array) -> jax.Array:
            a = a.reshape(a.shape[0], -1)
            re, im = a.real, a.imag
            return jnp.sum(re + 0.5 * im + 0.5 * (jnp.square(re) + jnp.square(im)), axis=1)

        return weights @ sum(at_each_step(a) for a in jax.tree.leaves(states))

    return loss


def losses(steps: int, dtype: Any) -> dict[str, jax.Array]:
    """Weights of a loss on the last state, on all, and on one in the middle."""
    eye = np.eye(steps)
    weights = {"last": eye[-1], "all": np.ones(steps), "middle": eye[steps // 2]}
    return {name: jnp.asarray(w, dtype) for name, w in weights.items()}


def perturbation_gradients(example: Example, loss: Callable[[Any], jax.Array]) -> tuple[Any, Any, Any]:
    """(dL/dparams, dL/dh_0, dL/dh_1 .. dL/dh_T) by `jax.grad`, with zeros added to each h_t."""
    step, params, state0, xs, length = example

    def total(params: Any, state0: Any, zeros: Any) -> jax.Array:
        def body(h: Any, inputs: Any) -> Any:
            x, zero = inputs
            h = jax.tree.map(jnp.add, step(params, h, x), zero)
            return h, h

        return loss(jax.lax.scan(body, state0, (xs, zeros), length)[1])

    steps = length or len(jax.tree.leaves(xs)[0])
    zeros = jax.tree.map(lambda a: jnp.zeros((steps, *a.shape), a.dtype), state0)
    return jax.grad(total, argnums=(0, 1, 2), allow_int=True)(params, state0, zeros)


def relative_error(got: Any, expected: Any) -> float:
    """Of two pytrees, in the Euclidean norm over all leaves."""

    def vector(tree: Any) -> np.ndarray:
        return np.concatenate([np.ravel(np.asarray(a, np.complex128)) for a in jax.tree.leaves(tree)])

    a, b = vector(got), vector(expected)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def floating(tree: Any) -> Any:
    """The gradient of `jax.grad(allow_int=True)` with None where there is none (float0)."""
    return jax.tree.map(lambda a: None if a.dtype == jax.dtypes.float0 else a, tree)
