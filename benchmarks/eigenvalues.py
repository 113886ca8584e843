"""How many Jacobians per second can be taken apart, stage by stage, and what do their spectra look like?

Many random input sequences are run through one recurrent cell; the Jacobian of every step of every sequence is
computed and its singular values and eigenvalues are taken, in chunks: the device never holds more than one chunk
of matrices (64 MiB), whatever the batch and the length. The answers on a few matrices are held against NumPy in
float64 before anything is timed. Spectra go to an .npz: `singular_values` and `eigenvalues` [batch, length, D],
and `settings` as JSON.

examples:
  python benchmarks/eigenvalues.py --device gpu --cell lstm --hidden 128 --batch 256
  python benchmarks/eigenvalues.py --cell rnn --gain 2 --float64
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from measure import compiled, parser, print_rows, save, write

import bptt_jax as bptt
from bptt_jax.experiments.timing import seconds
from bptt_jax.recurrence.jacobians import jacobians_at
from bptt_jax.step import prepend

CHUNK_BYTES = 1 << 26
INPUT_SIZE = 16
CHECKED = 16


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--cell", choices=("rnn", "gru", "lstm"), default="rnn", help="(%(default)s)")
    p.add_argument("--hidden", type=int, metavar="N", help="hidden size (128; 32 with --quick)")
    p.add_argument("--length", type=int, metavar="T", help="steps (100; 50 with --quick)")
    p.add_argument("--batch", type=int, metavar="B", help="sequences (32; 16 with --quick)")
    p.add_argument("--gain", type=float, metavar="G", help="of the recurrent weights, only with --cell rnn (1)")
    p.add_argument("--device", metavar="KIND", help="cpu, gpu, ... (what JAX prefers)")
    p.add_argument("--float64", action="store_true", help="double precision")
    p.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    a = p.parse_args()
    sizes = {"hidden": 32, "length": 50, "batch": 16} if a.quick else {"hidden": 128, "length": 100, "batch": 32}
    for name, size in sizes.items():
        if getattr(a, name) is None:
            setattr(a, name, size)
        if getattr(a, name) < 1:
            fail(f"--{name} must be at least 1, got {getattr(a, name)}")
    if a.gain is not None and a.cell != "rnn":
        fail(f"--gain is for --cell rnn only, got --cell {a.cell}")
    return a


def fail(message: str) -> NoReturn:
    print(f"eigenvalues.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check(matrices: jax.Array) -> None:
    """A few spectra against NumPy in float64, relative to the largest value of each matrix."""
    # Of the transposes, which have the same spectra: NumPy would repeat the same routine, rounding errors and all.
    exact = np.asarray(matrices, np.float64).swapaxes(1, 2)
    sv, expected_sv = np.asarray(bptt.singular_values(matrices)), np.linalg.svd(exact, compute_uv=False)
    ev, expected_ev = np.asarray(bptt.eigenvalues(matrices)), np.linalg.eigvals(exact)
    largest = expected_sv[:, :1]
    sv_error = np.max(np.abs(sv - expected_sv) / largest)
    distance = np.abs(ev[:, :, None] - expected_ev[:, None, :]) / largest[:, :, None]
    ev_error = max(distance.min(1).max(), distance.min(2).max())
    eps = jnp.finfo(matrices.dtype).eps
    # Rounding moves singular values by the order of eps, a (nearly) double eigenvalue by that of sqrt(eps).
    for name, error, limit in (("singular values", sv_error, 100 * eps), ("eigenvalues", ev_error, 10 * eps**0.5)):
        print(f"{name}: relative error {error:.1e} against NumPy in float64, on {len(exact)} matrices")
        if not error < limit:
            raise SystemExit(f"eigenvalues.py: {name} are wrong: {error:.1e}, at most {limit:.1e} expected")


def figure(sv: np.ndarray, ev: np.ndarray, title: str) -> Any:
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    points = ev.ravel()
    if points.size > 20_000:
        points = np.random.default_rng(0).choice(points, 20_000, replace=False)
    left.plot(points.real, points.imag, ".", color="0.35", ms=1.5, alpha=0.4, rasterized=True)
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 400))
    left.plot(circle.real, circle.imag, "k--", lw=1, label="unit circle")
    left.set(xlabel="Re λ", ylabel="Im λ", title="Eigenvalues of the Jacobians", aspect="equal")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, -0.28), frameon=False)
    steps = np.arange(1, sv.shape[1] + 1)
    low, q25, median, q75, high = np.quantile(sv, (0.05, 0.25, 0.5, 0.75, 0.95), axis=(0, 2))
    right.fill_between(steps, low, high, color="0.85", label="5 % to 95 %")
    right.fill_between(steps, q25, q75, color="0.65", label="25 % to 75 %")
    right.plot(steps, median, "k-", lw=1.2, label="median")
    right.plot(steps, sv.max((0, 2)), "k:", lw=1.5, label="largest")
    right.axhline(1, color="k", ls="--", lw=0.8)
    right.set(xlabel="time step t", ylabel="singular value of ∂h(t)/∂h(t-1)", yscale="log", title="Singular values")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False)
    fig.suptitle(title)
    return fig


def main() -> None:
    a = arguments()
    try:
        device = jax.devices(a.device)[0]
    except RuntimeError:
        fail(f"no {a.device} device here; JAX sees {', '.join(sorted({d.platform for d in jax.devices()}))}")
    jax.config.update("jax_default_device", device)
    jax.config.update("jax_enable_x64", a.float64)

    options = {"gain": 1.0 if a.gain is None else a.gain} if a.cell == "rnn" else {}
    cell = getattr(bptt.cells, a.cell)(a.hidden, **options)
    k_params, k_xs = jax.random.split(jax.random.key(a.seed))
    params, h0 = cell.init(k_params, INPUT_SIZE), cell.initial_state()
    xs = jax.random.normal(k_xs, (a.batch, a.length, INPUT_SIZE))
    size = bptt.ravel_state(h0)[0].size
    total = a.batch * a.length
    count = min(total, max(5, -(-total * size**2 * xs.dtype.itemsize // CHUNK_BYTES)))
    chunk = -(-total // count)
    settings = {k: getattr(a, k) for k in ("cell", "hidden", "length", "batch", "float64", "seed")} | options
    print(f"{settings}\n{total} Jacobians {size} x {size}, {chunk} at a time, on {device.device_kind}")

    unroll, unroll_compile = compiled(
        lambda p, xs: jax.vmap(lambda x: bptt.unroll(cell.step, p, h0, x))(xs), params, xs
    )
    states = unroll(params, xs)
    unroll_seconds = statistics.median(seconds(lambda: unroll(params, xs)) for _ in range(5))
    starts = jax.vmap(lambda h: prepend(h0, h))(states)
    starts, inputs = jax.tree.map(lambda leaf: leaf.reshape(total, *leaf.shape[2:]), (starts, xs))

    def at(i: int) -> tuple[Any, jax.Array]:
        """States and inputs of one chunk; the last repeats its last row, so that all have one shape."""
        rows = np.minimum(np.arange(i * chunk, (i + 1) * chunk), total - 1)
        return jax.tree.map(lambda leaf: leaf[rows], (starts, inputs))

    jacobians, jacobians_compile = compiled(
        lambda p, h, x: jacobians_at(cell.step, p, h, x, "forward"), params, *at(0)
    )
    matrices = jacobians(params, *at(0))
    check(matrices[:CHECKED])
    singular_values, sv_compile = compiled(bptt.singular_values, matrices)
    eigenvalues, ev_compile = compiled(bptt.eigenvalues, matrices)
    few = jnp.zeros_like(matrices)  # the first call of a library also sets it up: on zeros, which cost nothing
    jax.block_until_ready((singular_values(few), eigenvalues(few)))

    times: dict[str, list[float]] = {"Jacobians": [], "singular values": [], "eigenvalues": []}
    spectra: dict[str, list[np.ndarray]] = {"singular_values": [], "eigenvalues": []}

    def timed(stage: str, run: Callable[..., jax.Array], *args: Any) -> jax.Array:
        start = time.perf_counter()
        result = jax.block_until_ready(run(*args))
        times[stage].append(time.perf_counter() - start)
        return result

    for i in range(-(-total // chunk)):
        matrices = timed("Jacobians", jacobians, params, *at(i))
        spectra["singular_values"].append(np.asarray(timed("singular values", singular_values, matrices)))
        spectra["eigenvalues"].append(np.asarray(timed("eigenvalues", eigenvalues, matrices)))
        print(f"\r{min((i + 1) * chunk, total)} of {total}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    sv, ev = (np.concatenate(s)[:total].reshape(a.batch, a.length, size) for s in spectra.values())

    per_matrix = {"unroll": unroll_seconds / total} | {k: statistics.median(t) / chunk for k, t in times.items()}
    compile_seconds = (unroll_compile, jacobians_compile, sv_compile, ev_compile)
    rows = [
        {"stage": stage, "compile_s": c, "matrices_per_s": 1 / t, "share": t / sum(per_matrix.values())}
        for (stage, t), c in zip(per_matrix.items(), compile_seconds, strict=True)
    ]
    print_rows("Stages", rows)
    radius, norm = np.abs(ev[..., 0]), sv[..., 0]
    print(f"spectral radius {radius.mean():.3f} +- {radius.std():.3f}, norm {norm.mean():.3f} +- {norm.std():.3f}")

    write(
        a.out / "eigenvalues.npz",
        lambda path: np.savez(path, singular_values=sv, eigenvalues=ev, settings=json.dumps(settings)),
    )
    title = ", ".join(f"{k} = {v}" for k, v in settings.items() if k not in ("float64", "seed"))
    write(a.out / "eigenvalues.png", lambda path: figure(sv, ev, title).savefig(path, dpi=130))
    summary = {"spectral_radius_mean": float(radius.mean()), "spectral_norm_mean": float(norm.mean())}
    save(a.out, "eigenvalues", settings, {"stages": rows, **summary})


if __name__ == "__main__":
    main()
