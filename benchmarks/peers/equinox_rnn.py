"""Recurrent networks with Equinox: a cell inside `jax.lax.scan`, `jax.vmap` outside. It has no simple RNN cell."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from measure import compiled

from peers import AT_ONCE, TrainingStep


def training_step(cell: str, params: Any, xs: jax.Array) -> TrainingStep | None:
    kind = {"gru": eqx.nn.GRUCell, "lstm": eqx.nn.LSTMCell}.get(cell)
    if kind is None:
        return None
    size = params.recurrent.shape[1]
    module = kind(xs.shape[-1], size, key=jax.random.key(0))

    def weights(module: Any) -> list[Any]:
        every = [module.weight_hh, module.weight_ih, module.bias]
        return [*every, module.bias_n] if cell == "gru" else every

    module = eqx.tree_at(weights, module, list(params))

    def loss(module: Any, xs: jax.Array) -> jax.Array:
        def states(xs: jax.Array) -> jax.Array:
            def body(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
                state = module(x, state)
                return state, state if cell == "gru" else state[0]

            zeros = jnp.zeros(size)
            return jax.lax.scan(body, zeros if cell == "gru" else (zeros, zeros), xs, unroll=AT_ONCE)[1]

        return jnp.mean(jnp.square(jax.vmap(states)(xs)))

    run, seconds = compiled(jax.value_and_grad(loss), module, xs)
    return TrainingStep(lambda: run(module, xs), lambda g: type(params)(*weights(g)), seconds)
