"""The monitor's scalars and histograms in Weights & Biases, without a network: ``pip install wandb``.

``wandb sync FOLDER/wandb/offline-run-*`` uploads the run later.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import wandb

import bptt_jax as bptt
from bptt_jax.experiments.network import LossArgs, network
from bptt_jax.experiments.tasks import adding

net = network(bptt.lstm(16), adding(30))
optimizer = optax.adam(3e-3)
sample = jax.jit(net.task.sample, static_argnums=1)


@jax.jit
def update(params, opt_state, batch):
    def mean_loss(params):
        return jnp.mean(jax.vmap(net.loss, (None, 0, 0))(params, *batch))

    value, gradient = jax.value_and_grad(mean_loss)(params)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


def main(folder: Path, updates: int = 1000, every: int = 100) -> None:
    params, h0 = net.init(jax.random.key(0)), net.cell.initial_state()
    opt_state = optimizer.init(params)
    monitor = bptt.Monitor(
        lambda params, h, x: net.cell.step(params.cell, h, x),
        net.loss_of_states,
        in_axes=(None, 0, LossArgs(None, 0, 0)),
        every=every,
    )
    with wandb.init(project="bptt", mode="offline", dir=str(folder)) as run:
        for i in range(updates):
            batch = sample(jax.random.key(i), 20)
            record = monitor(i, params, h0, batch.inputs, net.loss_args(params, *batch))
            if record is not None:
                histograms = {name: wandb.Histogram(a) for name, a in record.histograms.items() if a.size}
                run.log({**record.scalars, **histograms}, step=i)
            params, opt_state, _ = update(params, opt_state, batch)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
