"""How long a lag does each of many recurrences learn, on three tasks, within one budget of updates?

Every recurrence is trained by one recipe at growing lengths T, until there is one at which no seed succeeds. Success
is the same for all tasks, and was fixed before anything was trained: the loss on 500 fresh sequences is below a tenth
of the trivial loss. The longest T at which most seeds succeed is what the recurrence learns. The chrono
initialisations are told the longest length, so theirs is made for the test. Parameters at the initialisation and after
a burst of the first updates, and the burst's losses, are kept, so that whatever is to predict the outcome can be tried
without training again; each length of `bursts` is begun, for a burst, whatever is learned.

The recurrences of `fitted` are those that predictors are found on: they were trained first, and all that came of them
has been looked at. Those of `set_aside` were drawn afterwards by a seed, stratified by family, among the cells of the
atlas that had not been trained, and committed before they were trained and before any further predictor was tried; they
are judged once. Trials are kept one by one in a folder: the same command goes on where it was stopped. Recurrences are
trained one after the other, those set aside in the order in which they were drawn: where a run is ended early, those
whose trials are not all there, and all after them, are dropped.

Sequences, gradients, the optimiser and the evaluation are programs of their own, unlike in the package's loop: what
recurrences share of them is compiled once, and compilation would take most of the time.

    python benchmarks/long_range_trials.py            as in results/long_range.json, an hour on one core
    python benchmarks/long_range_trials.py --longer   5000 updates, T up to 640
"""

import itertools
import json
import os
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import parser

import bptt_jax as bptt
from bptt_jax.cells import ATLAS
from bptt_jax.experiments.network import Network, NetworkParams, network
from bptt_jax.experiments.tasks import Batch, Task, adding, memorization, random_permutation
from bptt_jax.files import atomic_path, write_json
from bptt_jax.step import ravel_state

FULL: dict[str, Any] = {
    "hidden": 16,
    "tasks": {
        "first symbol": [10, 20, 40, 80, 160],
        "adding": [10, 40, 160],
        "copy": [10, 40, 160],
    },
    "bursts": [160],
    "updates": 1500,
    "burst": 60,
    "batch": 16,
    "seeds": 3,
    "rate": 2e-3,
    "max_norm": 1.0,
    "share_of_trivial_loss": 0.1,
    "sequences": 500,
}
LONGER = FULL | {
    "hidden": 32,
    "batch": 20,
    "updates": 5000,
    "burst": 200,
    "tasks": {task: [5, 10, 20, 40, 80, 160, 320, 640] for task in FULL["tasks"]},
}
QUICK = FULL | {
    "hidden": 8,
    "tasks": {"first symbol": [5], "adding": [5]},
    "bursts": [5],
    "updates": 120,
    "seeds": 2,
    "recurrences": ["rnn, gain 0.5", "gru", "lru", "janet", "ran", "mut2"],
}
FROM_THE_ATLAS = (
    "indrnn",
    "scrn",
    "antisymmetric",
    "unitary",
    "cornn",
    "lem",
    "janet",
    "mgu",
    "nbrc",
    "star",
    "fastgrnn",
    "lru",
    "min_gru",
    "s5",
    "retnet",
    "mlstm",
)
# Of recurrences named after something else than a cell of the atlas.
_FAMILIES = {"rnn, orthogonal": "orthogonal", "irnn": "simple"}
SET_ASIDE_SEED, SET_ASIDE = 21, 16
_ANY = 10  # steps
_MULTIPLE = 4096


def fitted(hidden: int, longest: int) -> dict[str, bptt.Cell]:
    """Twelve, from gradients that die at once to gradients that last, and sixteen of the atlas."""
    orthogonal, init = jax.nn.initializers.orthogonal(), bptt.cells.initializers
    return {
        "rnn, gain 0.5": bptt.rnn(hidden, gain=0.5),
        "rnn, gain 0.8": bptt.rnn(hidden, gain=0.8),
        "rnn, gain 1": bptt.rnn(hidden),
        "rnn, gain 1.5": bptt.rnn(hidden, gain=1.5),
        "rnn, orthogonal": bptt.rnn(hidden, recurrent_init=orthogonal),
        "irnn": bptt.rnn(hidden, activation=jax.nn.relu, recurrent_init=init.identity()),
        "gru": bptt.gru(hidden),
        "gru, chrono": bptt.gru(hidden, bias_init=init.chrono(longest)),
        "lstm, bias 0": bptt.lstm(hidden, forget_bias=0.0),
        "lstm, bias 1": bptt.lstm(hidden),
        "lstm, bias 3": bptt.lstm(hidden, forget_bias=3.0),
        "lstm, chrono": bptt.lstm(hidden, bias_init=init.chrono(longest)),
    } | {name: ATLAS[name].make(hidden) for name in FROM_THE_ATLAS}


def set_aside() -> list[str]:
    """Cells that `fitted` has not, in an order drawn by the seed: of each family its share, by largest remainders."""
    seen = {"irnn", *(name.split(",")[0] for name in fitted(_ANY, _ANY))}
    families: dict[str, list[str]] = {}
    for name, entry in sorted(ATLAS.items()):
        if name not in seen:
            families.setdefault(entry.family, []).append(name)
    total = sum(map(len, families.values()))
    shares = {kind: SET_ASIDE * len(members) / total for kind, members in families.items()}
    counts = {kind: int(share) for kind, share in shares.items()}
    for kind in sorted(shares, key=lambda kind: counts[kind] - shares[kind])[: SET_ASIDE - sum(counts.values())]:
        counts[kind] += 1
    rng = np.random.default_rng(SET_ASIDE_SEED)
    drawn = [str(name) for kind in sorted(families) for name in rng.permutation(families[kind])[: counts[kind]]]
    return [drawn[i] for i in rng.permutation(len(drawn))]


def chosen(s: dict[str, Any]) -> dict[str, bptt.Cell]:
    longest = max(max(lengths) for lengths in s["tasks"].values())
    everything = fitted(s["hidden"], longest) | {name: ATLAS[name].make(s["hidden"]) for name in set_aside()}
    return {name: everything[name] for name in s.get("recurrences", everything)}


def family(name: str) -> str:
    return _FAMILIES.get(name) or ATLAS[name.split(",")[0]].family


@cache
def task_of(name: str, length: int) -> Task:
    """The symbols of "copy" are three bits, wanted `length` + 3 steps after they were shown."""
    makers: dict[str, Callable[[int], Task]] = {
        "first symbol": random_permutation,
        "adding": adding,
        "copy": partial(memorization, values=2, positions=3),
    }
    return makers[name](length)


class Programs(NamedTuple):
    """Compiled once for all recurrences that share a step, a task and a length."""

    sample: Callable[..., Batch]
    gradients: Callable[..., tuple[jax.Array, jax.Array]]
    losses: Callable[..., jax.Array]


_PROGRAMS: dict[Any, Any] = {}


def programs(net: Network) -> Programs:
    def sample(seeds: jax.Array, update: jax.Array, batch: int) -> Batch:
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), update))(seeds)
        return jax.vmap(lambda key: net.task.sample(key, batch))(keys)

    def mean_loss(params: NetworkParams, data: Batch) -> jax.Array:
        return jnp.mean(jax.vmap(partial(net.loss, params))(*data))

    unravel = unflattened(net)

    def gradients(flat: jax.Array, data: Batch) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(jax.value_and_grad(lambda p, data: mean_loss(unravel(p), data)))(flat, data)

    def losses(flat: jax.Array, data: Batch) -> jax.Array:
        return jax.vmap(lambda p: mean_loss(unravel(p), data))(flat)

    task = net.task.name, net.task.length
    sampler = _PROGRAMS.setdefault(task, jax.jit(sample, static_argnums=2))
    key = (net.cell.step, jax.tree.structure(net.cell.initial_state()), *task)
    if key not in _PROGRAMS:
        _PROGRAMS[key] = jax.jit(gradients), jax.jit(losses)
    return Programs(sampler, *_PROGRAMS[key])


def flattened(params: NetworkParams) -> jax.Array:
    """One real vector, filled up with zeros to a size that networks share: one program updates them all."""
    vector = ravel_state(params)[0]
    return jnp.pad(vector, (0, -len(vector) % _MULTIPLE))


def unflattened(net: Network) -> Callable[[jax.Array], NetworkParams]:
    """The way back."""
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    example, merge = ravel_state(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes))
    return lambda flat: merge(flat[: len(example)])


@cache
def optimizer(rate: float, max_norm: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
    clipped = bptt.with_clipping(optax.adam(rate), max_norm)

    def apply(gradient: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = clipped.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(jax.vmap(clipped.init)), jax.jit(jax.vmap(apply))


def network_of(cell: bptt.Cell, task: str, length: int) -> Network:
    return network(cell, task_of(task, length))


@cache
def initial(cell: bptt.Cell, task: str, seeds: int) -> jax.Array:
    """Of each seed the parameters, flattened; the same at all lengths."""
    init = network_of(cell, task, _ANY).init
    # Not compiled as one program: its operations are, and cells share them.
    drawn = [init(jax.random.fold_in(jax.random.key(seed), 2**31 - 1)) for seed in range(seeds)]
    return jnp.stack([flattened(params) for params in drawn])


def _seeds(count: int) -> jax.Array:
    return jnp.arange(count, dtype=jnp.int32)


def trial(
    cell: bptt.Cell, task: str, length: int, s: dict[str, Any], updates: int
) -> tuple[dict[str, Any], jax.Array, jax.Array]:
    """What came of it, and the parameters before and after the burst, flattened, ``[S, P]``."""
    start = time.process_time()
    net = network_of(cell, task, length)
    run, (begin, apply) = programs(net), optimizer(s["rate"], s["max_norm"])
    seeds = _seeds(s["seeds"])
    before = params = after = initial(cell, task, s["seeds"])
    state = begin(params)
    fresh = jax.tree.map(lambda a: a[0], run.sample(jnp.asarray([2**30], jnp.int32), jnp.int32(0), s["sequences"]))
    burst: list[Any] = []
    judged, solved_at = [], np.full(s["seeds"], -1)
    for n in range(1, updates + 1):
        losses, gradient = run.gradients(params, run.sample(seeds, jnp.int32(n), s["batch"]))
        params, state = apply(gradient, state, params)
        if n <= s["burst"]:
            burst.append(losses)
        if n % s["burst"]:
            continue
        now = np.asarray(run.losses(params, fresh))
        judged.append(now.tolist())
        passed = now < s["share_of_trivial_loss"] * net.task.baseline
        solved_at = np.where((solved_at < 0) & passed, n, solved_at)
        if n == s["burst"]:
            after, compiled = params, time.process_time()
        if (solved_at >= 0).all() or not np.isfinite(now).any():
            break
    record = {
        "T": length,
        "solved_at": solved_at.tolist(),
        "updates": n,
        "losses": judged,
        "trivial_loss": net.task.baseline,
        "burst_losses": np.asarray(jnp.stack(burst)).tolist(),
        "seconds_of_updates": (time.process_time() - compiled) / (n - s["burst"]) if n > s["burst"] else None,
        "seconds": time.process_time() - start,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    return record, before, after


def most(solved_at: list[int]) -> bool:
    return 2 * sum(n >= 0 for n in solved_at) > len(solved_at)


def longest_learned(tried: list[dict[str, Any]]) -> int:
    """The largest T at which most seeds succeeded; 0 if there is none."""
    return max((t["T"] for t in tried if most(t["solved_at"])), default=0)


def climb(learn: Callable[[int], dict[str, Any]], lengths: list[int]) -> list[dict[str, Any]]:
    """Shortest first, until one is learned by no seed."""
    tried: list[dict[str, Any]] = []
    for length in lengths:
        tried.append(learn(length))
        if max(tried[-1]["solved_at"]) < 0:
            break
    return tried


class Folder:
    """Trials on disk: ``<recurrence>/<task> <T>[ burst].json`` and the parameters beside it, ``.npz``."""

    def __init__(self, path: Path, s: dict[str, Any]) -> None:
        self.path, self.settings = path, s
        path.mkdir(parents=True, exist_ok=True)
        there = path / "settings.json"
        if there.exists() and json.loads(there.read_text()) != json.loads(json.dumps(s)):
            raise SystemExit(f"{path} holds trials of other settings")
        write_json(there, s)

    def of(self, name: str, task: str, length: int, *, burst: bool = False) -> Path:
        return self.path / name / f"{task} {length}{' burst' if burst else ''}.json"

    def trial(self, name: str, cell: bptt.Cell, task: str, length: int, *, burst: bool = False) -> dict[str, Any]:
        """The trial, made if it is not there."""
        file, s = self.of(name, task, length, burst=burst), self.settings
        if not file.exists():
            found, before, after = trial(cell, task, length, s, s["burst"] if burst else s["updates"])
            file.parent.mkdir(exist_ok=True)
            with atomic_path(file.with_suffix(".npz")) as path, path.open("wb") as out:
                np.savez(out, before=before, after=after)
            write_json(file, found)
            print(name, task, length, found["solved_at"], found["updates"], f"{found['seconds']:.1f} s", flush=True)
        return dict(json.loads(file.read_text()))


def settings(*, quick: bool, longer: bool) -> dict[str, Any]:
    s = QUICK if quick else LONGER if longer else FULL
    aside = [name for name in set_aside() if name in chosen(s)]
    return s | {"set_aside": aside, "set_aside_seed": SET_ASIDE_SEED}


def run_all(path: Path, s: dict[str, Any]) -> Folder:
    """All trials, or those that are not in the folder yet, of one recurrence after the other."""
    folder = Folder(path, s)
    for (name, cell), task in itertools.product(chosen(s).items(), s["tasks"]):
        tried = climb(partial(folder.trial, name, cell, task), s["tasks"][task])
        for length in set(s["bursts"]) - {t["T"] for t in tried}:
            folder.trial(name, cell, task, length, burst=True)
        print(f"{name}, {task}: {longest_learned(tried)}", flush=True)
    return folder


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--longer", action="store_true", help="5000 updates, T up to 640: some days on one core")
    a = p.parse_args()
    s = settings(quick=a.quick, longer=a.longer)
    print("set aside:", ", ".join(s["set_aside"]))
    run_all(a.out / "long_range.part", s)


if __name__ == "__main__":
    main()
