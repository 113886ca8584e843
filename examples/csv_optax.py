"""The monitor in an ordinary Optax loop, its scalars as rows of a CSV file and all of it as lines of JSON."""

import csv
import json
import sys
from pathlib import Path
from typing import TextIO

import jax
import jax.numpy as jnp
import optax

import bptt_jax as bptt
from bptt_jax.experiments.tasks import adding

cell, task = bptt.rnn(32), adding(30)
optimizer = optax.adam(3e-3)
sample = jax.jit(task.sample, static_argnums=1)


def step(params, h, x):
    return cell.step(params["cell"], h, x)


def loss(states, args):
    """Of one sequence; training and monitor share it."""
    return jnp.square(args["readout"] @ states[-1] - args["target"])


AXES = {"readout": None, "target": 0}  # of `args` in a batch


@jax.jit
def update(params, opt_state, h0, batch):
    def mean_loss(params):
        states = jax.vmap(lambda x: bptt.unroll(step, params, h0, x))(batch.inputs)
        args = {"readout": params["readout"], "target": batch.targets}
        return jnp.mean(jax.vmap(loss, (0, AXES))(states, args))

    value, gradient = jax.value_and_grad(mean_loss)(params)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


def main(folder: Path, updates: int = 1000, every: int = 100) -> None:
    params = {
        "cell": cell.init(jax.random.key(0), 2),
        "readout": jax.random.normal(jax.random.key(1), 32) / 32**0.5,
    }
    opt_state, h0 = optimizer.init(params), cell.initial_state()
    monitor = bptt.Monitor(step, loss, every=every, in_axes=(None, 0, AXES))
    with (folder / "monitor.csv").open("w", newline="") as table, (folder / "monitor.jsonl").open("w") as lines:
        writer = None
        for i in range(updates):
            batch = sample(jax.random.key(i), 20)
            args = {"readout": params["readout"], "target": batch.targets}
            record = monitor(i, params, h0, batch.inputs, args)
            if record is not None:
                writer = writer or begin(table, record)
                writer.writerow({"update": i, **record.scalars})
                lines.write(json.dumps(record.to_dict()) + "\n")
            params, opt_state, value = update(params, opt_state, h0, batch)
    print(f"loss {float(value):.4f}, {folder / 'monitor.csv'}")


def begin(table: TextIO, record: bptt.analysis.MonitorRecord) -> csv.DictWriter:
    """The names are the same in every record, so the first one makes the head."""
    writer = csv.DictWriter(table, ["update", *record.scalars])
    writer.writeheader()
    return writer


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
