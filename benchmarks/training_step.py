"""Is a training step of an unrolled cell as fast as with the library that a user would otherwise take?

The job: loss and gradient with respect to all weights of ``mean(h^2)`` over all hidden states of a batch, float32,
inputs batch first, h_0 = 0, no gradient of the inputs. Ours is `jax.value_and_grad` of `bptt_jax.unroll`, vmapped
with the states left as they are computed, time first (``out_axes=1``).
Each peer (`benchmarks/peers/`) has the same weights; losses and gradients are compared before times are, and a peer
whose cell has other equations is compared with, and timed against, those equations as a step of ours.

Beside it `bptt_jax.adjoints` of the same loss, which gives every dL/dh_t too: with the batch inside the step, over
ours; and with `jax.vmap` outside, where every sequence has a gradient of its own, over ours with `vmap` outside.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import limits
import peers
from measure import Claim, Rows, compiled, parser, print_claims, print_table, relative_error, save
from peers import scan_rnn

import bptt_jax as bptt
from bptt_jax.experiments.timing import interleaved_medians


class Size(NamedTuple):
    cell: str
    hidden: int
    inputs: int
    batch: int
    length: int


FULL: dict[str, Any] = {
    "sizes": [
        Size("rnn", 32, 16, 32, 300),
        Size("rnn", 128, 32, 32, 500),
        Size("rnn", 512, 128, 32, 100),
        Size("gru", 32, 16, 32, 300),
        Size("gru", 256, 64, 64, 200),
        Size("gru", 512, 128, 32, 100),
        Size("lstm", 32, 16, 32, 300),
        Size("lstm", 64, 16, 32, 300),
        Size("lstm", 128, 32, 32, 500),
        Size("lstm", 512, 128, 32, 100),
    ],
    "repeats": 21,
}
QUICK: dict[str, Any] = {"sizes": [Size("rnn", 32, 8, 16, 50), Size("lstm", 32, 8, 16, 50)], "repeats": 3}
LIBRARIES = {"flax": "flax_rnn", "haiku": "haiku_rnn", "keras": "keras_rnn", "equinox": "equinox_rnn"}
LIBRARIES["torch"] = "torch_rnn"
TORCH = ("torch", "torch, 1 thread")
JAX_PEERS = ("scan", "scan, inputs first", *(name for name in LIBRARIES if name != "torch"))
PEERS = (*JAX_PEERS, *TORCH)
ADJOINTS = ("adjoints, batch in the step", "adjoints, vmap outside")
TORCH_AIM = {"rnn": 1.0, "gru": 1.0, "lstm": 0.95}
ADJOINTS_AIM = 1.1
JAX_AIM = 1.0
MOST_NUMBERS = 1e7  # of a gradient for every sequence
DEVIATION = 1e-4


def hidden(states: Any) -> jax.Array:
    return states.h if isinstance(states, bptt.cells.LSTMState) else states


def loss(states: Any) -> jax.Array:
    return jnp.mean(jnp.square(hidden(states)))


def ours(step: bptt.Step, state0: Any, params: Any, xs: jax.Array) -> Any:
    def of(params: Any) -> jax.Array:
        return loss(jax.vmap(partial(bptt.unroll, step, params, state0), out_axes=1)(xs))

    return jax.value_and_grad(of)(params)


def adjoints_inside(step: bptt.Step, state0: Any, params: Any, xs: jax.Array) -> Any:
    batched = jax.vmap(step, (None, 0, 0))
    starts = jax.tree.map(lambda h: jnp.zeros((xs.shape[0], *h.shape)), state0)
    found = bptt.adjoints(batched, params, starts, jnp.swapaxes(xs, 0, 1), loss)
    return found.loss, found.params_grad, found.adjoints, found.log_norms


def adjoints_outside(step: bptt.Step, state0: Any, params: Any, xs: jax.Array) -> Any:
    found = jax.vmap(lambda x: bptt.adjoints(step, params, state0, x, loss))(xs)
    return found.loss, found.params_grad, found.adjoints, found.log_norms


def ours_outside(step: bptt.Step, state0: Any, params: Any, xs: jax.Array) -> Any:
    return jax.vmap(lambda x: jax.value_and_grad(lambda p: loss(bptt.unroll(step, p, state0, x)))(params))(xs)


def measure(size: Size, modules: dict[str, Any], repeats: int, machine: limits.Machine) -> dict[str, Any]:
    cell = getattr(bptt.cells, size.cell)(size.hidden)
    k_params, k_bias, k_xs = jax.random.split(jax.random.key(0), 3)
    params = cell.init(k_params, size.inputs)
    params = params._replace(bias=params.bias + 0.1 * jax.random.normal(k_bias, params.bias.shape))
    xs = jax.random.normal(k_xs, (size.batch, size.length, size.inputs))

    candidates: dict[str, Callable[[], Any]] = {}
    compile_seconds: dict[str, float | None] = {}
    deviations: dict[str, float] = {}

    def add(name: str, function: Callable[..., Any], step: bptt.Step) -> Any:
        run, compile_seconds[name] = compiled(partial(function, step, cell.initial_state()), params, xs)
        candidates[name] = partial(run, params, xs)
        return candidates[name]()

    answer = add("ours", ours, cell.step)
    made = {"scan": scan_rnn.training_step(size.cell, params, xs)}
    made["scan, inputs first"] = scan_rnn.training_step(size.cell, params, xs, inputs_first=True)
    made |= {name: module.training_step(size.cell, params, xs) for name, module in modules.items()}
    if "torch" in modules:
        made["torch, 1 thread"] = modules["torch"].training_step(size.cell, params, xs, threads=1)
    made = {name: peer for name, peer in made.items() if peer is not None}
    other = [name for name, peer in made.items() if peer.step is not None]
    inside, outside = ADJOINTS
    deviations[inside] = relative_error(add(inside, adjoints_inside, cell.step)[:2], answer)
    base = dict.fromkeys((*made, inside), "ours") | {name: f"ours, equations of {name}" for name in other}
    if size.batch * sum(p.size for p in params) <= MOST_NUMBERS:
        base[outside] = "ours, vmap outside"
        each = add(base[outside], ours_outside, cell.step)
        deviations[outside] = relative_error(add(outside, adjoints_outside, cell.step)[:2], each)
    for name, peer in made.items():
        value, gradients = peer.run()
        found = peer.as_ours(gradients)
        expected = answer if peer.step is None else add(base[name], ours, peer.step)
        shared = type(params)(*(None if g is None else e for g, e in zip(found, expected[1], strict=True)))
        deviations[name] = relative_error((float(value), found), (expected[0], shared))
        candidates[name], compile_seconds[name] = peer.run, peer.compile_seconds
    wrong = {n: e for n, e in deviations.items() if not e < (made[n].tolerance if n in made else DEVIATION)}
    if wrong:
        raise SystemExit(f"{size}: these deviate from ours: {wrong}")

    times = interleaved_medians(candidates, repeats)
    ratios = {name: times[name] / times[basis] for name, basis in base.items()}
    step = partial(ours, cell.step, cell.initial_state())
    return {
        "size": size._asdict(),
        "ms": {name: 1e3 * t for name, t in times.items()},
        "ratios": ratios,
        "limits": limits.shares(step, params, xs, taken=times["ours"], machine=machine),
        "other_equations": other,
        "deviations": deviations,
        "compile_seconds": compile_seconds,
    }


def claims_of(row: dict[str, Any]) -> list[Claim]:
    ratios, cell = row["ratios"], row["size"]["cell"]
    limit = limits.named(row["limits"])
    claim = partial(Claim, "training step", "{cell} {hidden}".format(**row["size"]), limit=limit)
    made = [
        claim("the fastest JAX peer's time over ours", min(ratios[n] for n in JAX_PEERS if n in ratios), JAX_AIM)
    ]
    if "torch" in ratios:
        made.append(claim("PyTorch's time over ours", min(ratios[n] for n in TORCH), TORCH_AIM[cell]))
    with_adjoints = max(ratios[n] for n in ADJOINTS if n in ratios)
    return [*made, claim("time with adjoints over without", with_adjoints, ADJOINTS_AIM, at_most=True)]


def main() -> None:
    a = parser(__doc__).parse_args()
    s = QUICK if a.quick else FULL
    modules, missing = peers.installed(LIBRARIES)
    machine = limits.measured(a.quick)
    rows = Rows(a.out, "training_step", s | {"machine": machine._asdict()})
    for size in s["sizes"]:
        rows.measure(partial(measure, modules=modules, repeats=s["repeats"], machine=machine), size)

    def text(row: dict[str, Any], name: str) -> str | None:
        library = name.split(",")[0]
        if library in missing:
            return f"no {missing[library]}"
        if name not in row["ratios"]:
            return None
        return f"{row['ratios'][name]:.2f}" + ("*" if name in row["other_equations"] else "")

    head = ("cell", "N", "inputs", "batch", "T", "ours, ms")
    print_table(
        "Time of the peer over ours (above 1: ours is faster). *: other equations, over ours with those; "
        "-: no such cell; 'no X': X is not installed",
        (*head, *PEERS),
        [(*row["size"].values(), row["ms"]["ours"], *(text(row, name) for name in PEERS)) for row in rows],
    )
    print_table(
        "Time of adjoints and gradient over that of the gradient alone; -: larger than it is measured",
        (*head, *ADJOINTS),
        [(*row["size"].values(), row["ms"]["ours"], *(text(row, name) for name in ADJOINTS)) for row in rows],
    )
    print_table(
        "What the machine would take alone for the operations, the bytes and the rounds, over the time of ours: "
        f"{machine.flops / 1e9:.0f} GFLOP/s, {machine.bytes / 1e9:.1f} GB/s, {1e6 * machine.round:.2g} us a round",
        (*head, *rows[0]["limits"]) if rows else head,
        [(*row["size"].values(), row["ms"]["ours"], *row["limits"].values()) for row in rows],
    )
    claims = [claim for row in rows for claim in claims_of(row)]
    print_claims(claims)
    save(a.out, "training_step", s | {"machine": machine._asdict()}, rows.results | {"missing": missing}, claims)
    rows.end()


if __name__ == "__main__":
    main()
