"""The monitor inside a Flax NNX training loop, one line of JSON for each probe: ``pip install flax``."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import bptt_jax as bptt
from bptt_jax.experiments.tasks import adding

task = adding(30)
sample = jax.jit(task.sample, static_argnums=1)


class Adder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.cell = nnx.GRUCell(2, 32, rngs=rngs)
        self.readout = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, xs):  # [B, T, 2]
        h0 = jnp.zeros((xs.shape[0], 32))

        def body(h, x):
            return self.cell(h, x)[0], None

        return self.readout(jax.lax.scan(body, h0, xs.swapaxes(0, 1))[0])[:, 0]


@nnx.jit
def update(model, optimizer, batch):
    def mean_loss(model):
        return jnp.mean(jnp.square(model(batch[0]) - batch[1]))

    value, gradient = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, gradient)
    return value


def main(folder: Path, updates: int = 1000, every: int = 100) -> None:
    model = Adder(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    graph, _, rest = nnx.split(model, nnx.Param, ...)

    # The module as pure functions of its parameters, one sequence at a time.
    def step(params, h, x):
        return nnx.merge(graph, params, rest).cell(h, x)[0]

    def loss(states, args):
        return jnp.square(nnx.merge(graph, args["params"], rest).readout(states[-1])[0] - args["target"])

    monitor = bptt.Monitor(step, loss, every=every, in_axes=(None, 0, {"params": None, "target": 0}))
    with (folder / "monitor.jsonl").open("w") as lines:
        for i in range(updates):
            batch = sample(jax.random.key(i), 20)
            params = nnx.state(model, nnx.Param)
            record = monitor(i, params, jnp.zeros(32), batch.inputs, {"params": params, "target": batch.targets})
            if record is not None:
                lines.write(json.dumps(record.to_dict()) + "\n")
            update(model, optimizer, batch)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
