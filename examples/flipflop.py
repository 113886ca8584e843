"""A network learns to hold three bits, and is asked how: eight stable points, and saddles between them.

    python examples/flipflop.py flipflop

The task and the method are those of Sussillo and Barak 2013 (Neural Comput. 25: 626). Writes the run with its
checkpoint, from which it goes on, the points as `flipflop.json`, and `flipflop.png`: trajectories and points in the
first two principal components of the states.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bptt_jax as bptt
from bptt_jax.experiments.loop import train
from bptt_jax.experiments.network import apply_readout, network
from bptt_jax.experiments.tasks import flipflop, with_keys

cell = bptt.cells.leaky_rnn(64, alpha=0.2, noise=0.05)
task = with_keys(flipflop(100, shortest=50))  # trials of 50 to 100 steps, and a key for the noise of every step
net = network(cell, task)


def main(folder: Path, updates: int = 2000, every: int = 100) -> None:
    optimizer = bptt.with_clipping(optax.adam(3e-3), 1.0)
    done = train(net, optimizer, updates=updates, chunk=every, folder=folder / "run")
    params = jax.tree.map(lambda a: a[0], done.states.params)  # of the first seed

    trials = task.sample(jax.random.key(1), 64).inputs
    unroll = jax.jit(jax.vmap(lambda xs: bptt.unroll(cell.step, params.cell, cell.initial_state(), xs)))
    trajectories = unroll(trials)
    states = trajectories[np.asarray(trials.mask)]  # those of real steps, [K, 64]

    # Without a pulse, and without noise: the input comes alone. With noise added to the states, so that searches
    # begin on both sides of what separates the stable points.
    starts = bptt.analysis.sample_starts(states, 512, key=jax.random.key(2), noise=0.3)
    found = bptt.fixed_points(cell.step, params.cell, starts, jnp.zeros(task.input_size)).distinct()
    outputs = jax.vmap(lambda h: apply_readout(params.readout, h))(found.points)

    rows = [
        {"kind": kind, "unstable": int(unstable), "outputs": bits, "slowest": slowest}
        for kind, unstable, bits, slowest in zip(
            found.kinds.tolist(),
            found.unstable,
            np.round(outputs, 3).tolist(),
            np.asarray(jnp.abs(found.eigenvalues[:, 0]), float).tolist(),
            strict=True,
        )
    ]
    (folder / "flipflop.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    figure = bptt.plots.plot_fixed_points(found, trajectories)
    figure.savefig(folder / "flipflop.png", dpi=120)
    for (kind, unstable), count in Counter((row["kind"], row["unstable"]) for row in rows).items():
        print(f"{count} {kind}, {unstable} unstable directions")


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "flipflop")
    target.mkdir(parents=True, exist_ok=True)
    main(target)
