"""Cells against implementations that are not this package's, with the same weights: states and gradients.

An oracle is somebody else's library, or the paper's equations in NumPy. Those of a family stand in a module of its
name, as ``ORACLES``: of every cell a list, the first of which is the NumPy one.
"""

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bptt_jax as bptt
from bptt_jax.step import differentiable_part

N, I, T = 4, 3, 5
FAMILIES = (
    "simple",
    "isometries",
    "oscillators",
    "gated",
    "gru_variants",
    "additive",
    "searched",
    "linear",
    "linear_attention",
    "state_space",
    "lstm_variants",
    "delta",
    "spiking",
    "xlstm",
    "bistable",
    "highway",
)


class Oracle(NamedTuple):
    """One other implementation of a cell.

    Attributes:
      peer: the distribution that has it; "NumPy" for equations restated.
      kind: what `run` computes with.
      run: ``run(params, state0, xs) -> states``, leaves ``[T, ...]``, all pytrees like the cell's; of a kind "numpy"
        one step, ``run(params, state, x) -> state``.
      make: makes the cell that is compared, ``make(hidden_size, dtype=dtype)``; by default the atlas's.
      note: where the peer is wrong or differs from the paper.
      tolerance: of the differences.
      prepare: what is done to the random parameters first, where the peer cannot have all of them.
      seed: of the random numbers.
    """

    peer: str
    kind: Literal["numpy", "torch", "jax"]
    run: Callable[[Any, Any, Any], Any]
    make: Callable[..., bptt.Cell] | None = None
    note: str = ""
    tolerance: float = 1e-10
    prepare: Callable[[Any], Any] = lambda params: params
    seed: int = 0

    @property
    def version(self) -> str:
        """Of the distribution; empty if it is not installed."""
        try:
            return metadata.version(self.peer)
        except metadata.PackageNotFoundError:
            return ""


restated = partial(Oracle, "NumPy", "numpy")


def scanned(step: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Of ``step(state, x) -> state`` the states after every x, from a first one, ``(state, xs) -> states``."""

    def body(state: Any, x: Any) -> Any:
        return (new := step(state, x), new)

    return lambda state, xs: jax.lax.scan(body, state, xs)[1]


def sigmoid(a: Any) -> Any:
    return 1 / (1 + np.exp(-a))


def imported(name: str) -> Any:
    """A peer's module that warns when it is imported, where there is no GPU, say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """What PyTorch code would round to single precision stays in double."""
    import torch

    method, dtype = torch.Tensor.float, torch.float32
    torch.Tensor.float, torch.float32 = torch.Tensor.double, torch.float64
    try:
        yield
    finally:
        torch.Tensor.float, torch.float32 = method, dtype


def in_order(p: Any) -> dict[str, Any]:
    """Our weights by PyTorch's names, where the gates are in the same order."""
    return {"weight_hh": p.recurrent, "weight_ih": p.input, "bias_ih": p.bias}


def exchanged(p: Any) -> dict[str, Any]:
    """The same of two gates that torchrecurrent has the other way round."""
    return {"weight_hh": p.recurrent.roll(N, 0), "weight_ih": p.input.roll(N, 0), "bias_ih": p.bias.roll(N)}


def gates(p: Any) -> list[tuple[Any, Any, Any]]:
    """Weights and bias, gate by gate."""
    count = len(p.bias) // p.recurrent.shape[1]
    return list(zip(*(np.split(a, count) for a in (p.recurrent, p.input, p.bias)), strict=True))


def of_keras(cell: Any, weights: list[Any], state: Any, xs: Any) -> list[Any]:
    """The states of a cell of Keras's on its JAX backend, which knows single precision alone."""

    def step(state: list[Any], x: Any) -> list[Any]:
        rest = [v.value for v in cell.non_trainable_variables]
        return cell.stateless_call(weights, rest, x, state)[0][1]

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        weights, state, xs = jax.tree.map(lambda a: a.astype(jnp.float32), (weights, list(state), xs))
        cell.build(xs.shape)
        states = scanned(step)([a[None] for a in state], xs[:, None])
    return [a[:, 0].astype(jnp.float64) for a in states]


def of_torch(peer: str, run: Callable[[Any, Any, Any], Any], **options: Any) -> Oracle:
    return Oracle(peer, "torch", run, **options)


def of_torchrecurrent(
    cell: str,
    weights: Callable[[Any], dict[str, Any]],
    given: Callable[[], dict[str, Any]] = dict,
    **options: Any,
) -> Oracle:
    """One of its cells.

    Args:
      cell: its class.
      weights: of our parameters, its own by their names; those that are not named are zero.
      given: further arguments of the class.
      options: of the `Oracle`.
    """

    def run(params: Any, state: Any, xs: Any) -> Any:
        import torch
        import torchrecurrent

        module = getattr(torchrecurrent, cell)(I, N, dtype=torch.float64, **given())
        zeros = {name: torch.zeros_like(leaf) for name, leaf in module.state_dict().items()}
        named = {name: leaf.reshape(zeros[name].shape) for name, leaf in weights(params).items()}
        leaves, treedef = jax.tree.flatten(state)
        states = []
        for x in xs:
            held = leaves[0] if len(leaves) == 1 else tuple(leaves)
            leaves = jax.tree.leaves(torch.func.functional_call(module, zeros | named, (x, held)))
            states.append(leaves)
        return jax.tree.unflatten(treedef, [torch.stack(leaf) for leaf in zip(*states, strict=True)])

    return of_torch("torchrecurrent", run, **options)


def of_jax(peer: str, run: Callable[[Any, Any, Any], Any], **options: Any) -> Oracle:
    return Oracle(peer, "jax", run, **options)


class Difference(NamedTuple):
    """Largest differences, relative to the largest number of the leaf, or to 1 where that is larger; `jacobian` is
    of dh_1/dh_0, and of PyTorch alone."""

    states: float
    gradients: float
    jacobian: float | None = None


class Problem(NamedTuple):
    cell: bptt.Cell
    params: Any
    state0: Any
    xs: Any
    cotangents: Any


def all_oracles() -> dict[str, list[Oracle]]:
    """By cell."""
    found: dict[str, list[Oracle]] = {}
    for family in FAMILIES:
        found |= importlib.import_module(f"{__name__}.{family}").ORACLES
    return found


def problem(name: str, oracle: Oracle) -> Problem:
    """In double precision, which has to be switched on; every parameter moved from where it is initialised."""
    rng = np.random.default_rng(oracle.seed)

    def moved(scale: float, a: Any) -> Any:
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            return a
        by = rng.standard_normal(a.shape) + (1j * rng.standard_normal(a.shape) if is_complex(a) else 0)
        return jnp.asarray(np.asarray(a) + scale * by)

    cell = (oracle.make or bptt.cells.ATLAS[name].make)(N, dtype=jnp.float64)
    params = oracle.prepare(jax.tree.map(partial(moved, 0.2), cell.init(jax.random.key(oracle.seed), I)))
    state0 = jax.tree.map(partial(moved, 0.5), cell.initial_state())
    xs = jnp.asarray(rng.standard_normal((T, I)))
    states = jax.eval_shape(partial(bptt.unroll, cell.step), params, state0, xs)
    floating = differentiable_part(states)[0]
    return Problem(cell, params, state0, xs, jax.tree.map(lambda a: rng.standard_normal(a.shape), floating))


def compare(name: str, oracle: Oracle) -> Difference:
    """The cell of that name with an oracle of it."""
    given = problem(name, oracle)
    arguments = given.params, given.state0, given.xs
    ours, gradients = _ours(given.cell.step, given.cotangents, arguments)
    if oracle.kind == "numpy":
        return of_numpy(oracle.run, given, ours, gradients)
    if oracle.kind == "jax":
        theirs, expected = jax.jit(partial(with_gradients, oracle.run, given.cotangents))(arguments)
        return Difference(distance(ours, theirs), distance(gradients, expected))
    return with_torch(oracle.run, given, ours, gradients)


@partial(jax.jit, static_argnums=0)
def _ours(step: Any, cotangents: Any, arguments: Any) -> tuple[Any, Any]:
    """Compiled once for all oracles of a cell."""
    return with_gradients(partial(bptt.unroll, step), cotangents, arguments)


def along(states: Any, cotangents: Any) -> Any:
    """The sum of real parts of the states, each times its cotangent, and of imaginary parts times half of it."""
    parts = differentiable_part(states)[0]
    total: Any = 0.0
    for a, c in zip(jax.tree.leaves(parts), jax.tree.leaves(cotangents), strict=True):
        total = total + (a.real * c).sum() + ((a.imag * (0.5 * c)).sum() if is_complex(a) else 0.0)
    return total


def is_complex(a: Any) -> bool:
    return "complex" in str(a.dtype)


def with_gradients(run: Callable[..., Any], cotangents: Any, arguments: Any) -> tuple[Any, Any]:
    part, merge = differentiable_part(arguments)

    def value(part: Any) -> Any:
        states = run(*merge(part))
        return along(states, cotangents), states

    gradients, states = jax.grad(value, has_aux=True)(part)
    return states, gradients


def distance(ours: Any, theirs: Any) -> float:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(of_arrays(np.asarray(a), np.asarray(b)) for a, b in pairs)


def of_arrays(a: Any, b: Any) -> float:
    assert a.shape == b.shape
    return float(np.max(np.abs(a - b)) / max(1.0, np.max(np.abs(b)))) if np.all(np.isfinite(b)) else np.inf


# Central differences of order 8: with steps of 1e-3, what is left is rounding, some 1e-12.
STEP, STENCIL = 1e-3, ((1, 4 / 5), (2, -1 / 5), (3, 4 / 105), (4, -1 / 280))


def of_numpy(step: Callable[..., Any], given: Problem, ours: Any, gradients: Any) -> Difference:
    """Gradients along a random direction of every leaf of parameters, initial state and inputs."""
    rng = np.random.default_rng(3)
    leaves, treedef = jax.tree.flatten(jax.tree.map(np.asarray, (given.params, given.state0, given.xs)))

    def run(leaves: Any) -> Any:
        params, state, xs = jax.tree.unflatten(treedef, leaves)
        states = []
        for x in xs:
            state = step(params, state, x)
            states.append(state)
        return jax.tree.map(lambda *each: np.stack(each), *states)

    slopes, expected = [], []
    slots = [k for k, leaf in enumerate(leaves) if np.issubdtype(leaf.dtype, np.inexact)]
    for k, gradient in zip(slots, jax.tree.leaves(gradients), strict=True):
        for turn in (1, 1j) if is_complex(leaves[k]) else (1,):
            direction = turn * rng.standard_normal(leaves[k].shape)

            def value(by: float, k: int = k, direction: Any = direction) -> float:
                moved = [*leaves[:k], leaves[k] + by * direction, *leaves[k + 1 :]]
                return float(along(run(moved), given.cotangents))

            expected.append(sum(c * (value(n * STEP) - value(-n * STEP)) for n, c in STENCIL) / STEP)
            slopes.append(np.sum(np.asarray(gradient) * direction).real)  # JAX's of complex numbers is conjugate
    return Difference(distance(ours, run(leaves)), of_arrays(np.array(slopes), np.array(expected)))


def with_torch(run: Callable[..., Any], given: Problem, ours: Any, gradients: Any) -> Difference:
    import torch

    def tensor(a: Any) -> Any:
        array = np.array(a)
        return torch.tensor(array, requires_grad=bool(np.issubdtype(array.dtype, np.inexact)))

    params, state0, xs = jax.tree.map(tensor, (given.params, given.state0, given.xs))
    moving = [leaf for leaf in jax.tree.leaves((params, state0, xs)) if leaf.requires_grad]
    states = run(params, state0, xs)
    floating = [a for a in jax.tree.leaves(states) if a.is_floating_point() or a.is_complex()]
    total: Any = 0.0
    for a, c in zip(floating, jax.tree.leaves(given.cotangents), strict=True):
        total = (
            total + (torch.view_as_real(a) * torch.tensor(np.stack([c, 0.5 * c], -1))).sum()
            if a.is_complex()
            else total + (a * torch.tensor(c)).sum()
        )
    found = torch.autograd.grad(total, moving, allow_unused=True, materialize_grads=True)
    expected = [g.conj().resolve_conj().numpy() for g in found]
    detached = jax.tree.map(lambda a: a.detach().numpy(), states)
    jacobian = None
    if not any(a.is_complex() for a in floating):
        start = [leaf for leaf in jax.tree.leaves(state0) if leaf.requires_grad]
        first = [a for a in jax.tree.leaves(run(params, state0, xs[:1])) if a.is_floating_point()]
        rows = [
            torch.cat(
                [
                    g.ravel()
                    for g in torch.autograd.grad(
                        entry, start, retain_graph=True, allow_unused=True, materialize_grads=True
                    )
                ]
            )
            for a in first
            for entry in a.ravel()
        ]
        mine = bptt.jacobians(given.cell.step, given.params, given.state0, given.xs[:1])[0]
        jacobian = of_arrays(np.asarray(mine), torch.stack(rows).numpy())
    return Difference(distance(ours, detached), distance(gradients, expected), jacobian)
