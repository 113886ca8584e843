"""The cases of the contract, and what is right in each: a step of the registry, a dtype, a kind of sequence.

Two ways to what is right: a Python loop over the steps that are real, in double precision, differentiated by
`jax.grad` and `jax.jacrev`, in which the package has no part; and the function itself on the pieces alone, cut at
the resets and without padding. What stands in the padding is NaN, or an index and a key that belong nowhere.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from registry import REGISTRY, Entry, Problem

import bptt_jax as bptt

PIECE = 5  # steps of a piece that is run alone, and of a plain sequence: they share what is compiled
TOLERANCE = {"float32": 1e-4, "float64": 1e-9, "float16": 3e-2, "bfloat16": 3e-1}


class Plan(NamedTuple):
    """Padding, resets, and which states the loss reads.

    Attributes:
      real: "#" is a real step, "." padding.
      resets: indices.
      reads: states with a weight in the loss; None: all.
      own_reset_state: a `reset_state` of its own, instead of `state0`.
    """

    real: str
    resets: tuple[int, ...] = ()
    reads: tuple[int, ...] | None = None
    own_reset_state: bool = False

    @property
    def steps(self) -> int:
        return len(self.real)

    @property
    def mask(self) -> np.ndarray:
        return np.asarray([c == "#" for c in self.real])

    @property
    def flags(self) -> np.ndarray:
        return np.isin(np.arange(self.steps), self.resets)

    @property
    def pieces(self) -> list[tuple[bool, list[int]]]:
        """Of each, whether it begins with a reset, and the steps that are real."""
        pieces: list[tuple[bool, list[int]]] = [(False, [])]
        pending = False
        for k, real in enumerate(self.mask):
            pending |= bool(self.flags[k])
            if real:
                if pending:
                    pieces.append((True, []))
                pending = False
                pieces[-1][1].append(k)
        return [piece for piece in pieces if piece[1]]

    @property
    def weights(self) -> np.ndarray:
        drawn = np.random.default_rng(self.steps).uniform(0.5, 1.5, self.steps).astype(np.float32)
        return drawn if self.reads is None else np.where(np.isin(np.arange(self.steps), self.reads), drawn, 0)

    def folded(self, steps: list[int]) -> np.ndarray:
        """The weights of a piece alone: what reads the state in padding, reads it where it arose."""
        after = np.flatnonzero(self.mask)
        owner = np.searchsorted(after, np.arange(self.steps), side="right") - 1
        return np.asarray([self.weights[(owner >= 0) & (after[owner] == k)].sum() for k in steps], np.float32)


# The pieces of the first plan of each kind are `PIECE` steps long: these are run alone.
PLANS = {
    "plain": (Plan("#####"), Plan("#####", reads=(4,)), Plan("#####", reads=(2,))),
    "mask": (Plan("#####...", reads=(7,)), Plan(".##.#.##")),
    "resets": (Plan("##########", (5,)), Plan("##########", (0, 5, 9), reads=(9,)), Plan("##########")),
    "both": (
        Plan("#####..#####.", (6,), None, True),
        Plan(".#.###.#####.", (0, 4, 6, 7, 12), (3, 6, 12), True),
        Plan("..#####......", (1,), None, True),
    ),
}


class Truth(NamedTuple):
    """Of one plan, in double precision; trees of floating leaves, leaves in time ``[T, ...]``.

    Attributes:
      immediate: ``[T, D]``, derivatives of the loss by the real numbers of each state.
    """

    name: str
    plan: Plan
    states: Any
    starts: list[Any]
    immediate: np.ndarray
    loss: Any
    aux: Any
    adjoints: Any
    params_grad: Any
    contributions: np.ndarray
    state0_grad: Any
    reset_state_grad: Any
    xs_grad: Any
    args_grad: Any

    @property
    def jacobians(self) -> np.ndarray:
        """``[T, D, D]``, of the bare steps, by real numbers; in padding the identity."""
        return _jacobians(self.name, self.plan)[0]

    @property
    def params_jacobians(self) -> np.ndarray:
        """``[T, D, P]``; in padding zero."""
        return _jacobians(self.name, self.plan)[1]


class Case(NamedTuple):
    """One cell of the table, but for the function."""

    name: str
    dtype: str
    kind: str

    @property
    def entry(self) -> Entry:
        return REGISTRY[self.name]

    @property
    def problem(self) -> Problem:
        return _problem(self.name, self.dtype)

    @property
    def plans(self) -> tuple[Plan, ...]:
        return PLANS[self.kind]

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype] if self.entry.tolerance is None else self.entry.tolerance

    def truth(self, plan: Plan) -> Truth:
        return truth_of(self.name, plan)

    def arguments(self, plan: Plan) -> tuple[Any, ...]:
        """``step, params, state0, xs``."""
        problem, kind = self.problem, self.kind
        xs = first_steps(problem.xs, plan.steps)
        if kind == "plain":
            return (*problem[:3], bptt.Sequence(length=plan.steps) if xs is None else xs)
        sequence = bptt.Sequence(
            xs if kind == "resets" else spoilt(xs, plan.mask),
            mask=None if kind == "resets" else jnp.asarray(plan.mask),
            resets=None if kind == "mask" else jnp.asarray(plan.flags),
            reset_state=problem.reset_state if plan.own_reset_state else None,
        )
        return (*problem[:3], sequence)

    def alone(self, plan: Plan) -> Iterator[tuple[list[int], tuple[Any, ...], Any]]:
        """The steps of each piece, its arguments and those of its loss."""
        problem = self.problem
        for reset, steps in plan.pieces:
            start = problem.reset_state if reset and plan.own_reset_state else problem.state0
            xs = on_device(at_steps(problem.xs, steps))
            arguments = problem.step, problem.params, start, bptt.Sequence(length=PIECE) if xs is None else xs
            yield steps, arguments, loss_args(plan.folded(steps), self.dtype)


class Comparison(NamedTuple):
    """`got` against `expected`; of logarithms the difference counts, not the ratio; `slack` times the tolerance."""

    what: str
    got: Any
    expected: Any
    logarithms: bool = False
    slack: float = 1.0


# --- The loss


def loss(states: Any, args: Any) -> tuple[Any, Any]:
    """``sum_t weights_t l(h_t)``, and beside it how large the states are. What is infinite at the start of a
    computation in the log domain, and held in padding, is not read."""
    weights, readout = args["weights"], args["readout"]

    def at_each_step(a: Any) -> Any:
        a = jnp.where(jnp.isfinite(a), a, jnp.zeros_like(a)).reshape(a.shape[0], -1)
        re, im = (part.astype(weights.dtype) for part in (a.real, a.imag))
        return jnp.sum(readout * (re + 0.5 * im) + 0.5 * (jnp.square(re) + jnp.square(im)), axis=1)

    read = sum(at_each_step(a) for a in jax.tree.leaves(states) if jnp.issubdtype(a.dtype, jnp.inexact))
    return weights @ read, {"read": read, "label": args["label"]}


def loss_args(weights: np.ndarray, dtype: str) -> Any:
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    return {
        "weights": jnp.asarray(weights, wide),
        "readout": jnp.asarray(0.75, wide),
        "label": jnp.asarray(3, jnp.int32),
    }


def _immediate(state: Any, weight: float, args: Any) -> np.ndarray:
    """The derivatives of `loss` by the real numbers of one state, as `real_vector` has them."""
    readout, parts = float(args["readout"]), []
    for leaf in jax.tree.leaves(floats(state)[0]):
        a = np.asarray(leaf)
        halves = ((1.0, a.real), (0.5, a.imag)) if np.iscomplexobj(a) else ((1.0, a.astype(np.float64)),)
        parts += [np.where(np.isfinite(a), weight * (share * readout + half), 0).ravel() for share, half in halves]
    return np.concatenate(parts or [np.zeros(0)])


# --- What is right


@lru_cache(maxsize=4)
def _problem(name: str, dtype: str) -> Problem:
    with jax.enable_x64(dtype == "float64"):
        return REGISTRY[name].problem(dtype)


def first_steps(xs: Any, steps: int) -> Any:
    return on_device(jax.tree.map(lambda a: by_numpy(a)[:steps], xs))


def spoilt(xs: Any, real: np.ndarray) -> Any:
    """With NaN in the padding; of integers far too large ones, of keys another."""

    def spoil(a: Any) -> Any:
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jnp.where(real, a, jax.random.key(99))
        nothing = np.nan if jnp.issubdtype(a.dtype, jnp.inexact) else 2**30
        return jnp.asarray(np.where(real.reshape(-1, *[1] * (a.ndim - 1)), a, np.asarray(nothing, a.dtype)))

    return jax.tree.map(spoil, xs)


def by_numpy(a: Any) -> Any:
    """But for keys: what a reference indexes, stacks and adds need not be compiled."""
    return a if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else np.asarray(a)


def on_device(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def floats(tree: Any) -> tuple[Any, Any]:
    """The floating leaves, and the others; each with None in place of the other."""
    return eqx.partition(jax.tree.map(jnp.asarray, tree), eqx.is_inexact_array)


def vector_of(tree: Any) -> Any:
    """The floating numbers, leaf by leaf, of a complex leaf the real parts and then the imaginary ones."""
    leaves = jax.tree.leaves(floats(tree)[0])
    parts = [part for a in leaves for part in ((a.real, a.imag) if jnp.iscomplexobj(a) else (a,))]
    return jnp.concatenate([jnp.ravel(part).astype(float) for part in parts] or [jnp.zeros(0)])


def size_of(tree: Any) -> int:
    """Of `vector_of`, for which nothing need be compiled."""
    return sum(a.size * (1 + jnp.iscomplexobj(a)) for a in jax.tree.leaves(floats(tree)[0]))


def like_vector(tree: Any, vector: Any) -> Any:
    """A tree with the floating numbers of `vector`, and what else `tree` has."""
    part, rest = floats(tree)
    leaves, treedef = jax.tree.flatten(part)
    new, at = [], 0
    for a in leaves:
        numbers = vector[at : at + a.size * (1 + jnp.iscomplexobj(a))]
        at += numbers.size
        halves = numbers.reshape(-1, *a.shape)
        new.append(jax.lax.complex(*halves) if jnp.iscomplexobj(a) else halves[0].astype(a.dtype))
    return eqx.combine(jax.tree.unflatten(treedef, new), rest)


def real_vector(cotangent: Any) -> np.ndarray:
    """Derivatives by the real numbers: JAX's cotangent of x + iy is dL/dx - i dL/dy."""
    leaves = [np.asarray(a) for a in jax.tree.leaves(cotangent)]
    parts = [part for a in leaves for part in ((a.real, -a.imag) if np.iscomplexobj(a) else (a,))]
    return np.concatenate([np.ravel(part).astype(np.float64) for part in parts] or [np.zeros(0)])


def summed(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *a: np.sum([np.asarray(b) for b in a], axis=0), *trees)


def walk(step: Any, plan: Plan, params: list[Any], start: Any, reset: Any, xs: list[Any], added: list[Any]) -> Any:
    """All states, and what every step starts from (None in padding), of a Python loop; `added` is added to each
    state."""
    h, pending, states, starts = start, False, [], []
    for k, real in enumerate(plan.mask):
        pending |= bool(plan.flags[k])
        if real:
            h, pending = (reset if pending else h), False
            starts.append(h)
            h = step(params[k], h, xs[k])
        else:
            starts.append(None)
        part, rest = floats(h)
        h = eqx.combine(_plus(part, added[k]), rest)
        states.append(h)
    return states, starts


@jax.jit
def _plus(tree: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, tree, other)


@jax.jit
def _loss_of(states: list[Any], args: Any) -> Any:
    return loss(jax.tree.map(lambda *a: jnp.stack(a), *states), args)


def at_step(tree: Any, k: int) -> Any:
    return jax.tree.map(lambda a: by_numpy(a)[k], tree)


def stacked(trees: list[Any]) -> Any:
    def stack(*a: Any) -> Any:
        whole = [by_numpy(b) for b in a]
        return np.stack(whole) if isinstance(whole[0], np.ndarray) else jnp.stack(whole)

    return jax.tree.map(stack, *trees)


@lru_cache(maxsize=1)
def _one_step(name: str) -> tuple[Any, Any]:
    """The step, and its Jacobians by state and parameters, both compiled."""
    entry = REGISTRY[name]
    step = entry.problem("float64").step
    differentiate = jax.jacrev if entry.pulls else jax.jacfwd

    def jacobians(params: Any, h: Any, x: Any) -> Any:
        def moved(h_vector: Any, params_vector: Any) -> Any:
            return vector_of(step(like_vector(params, params_vector), like_vector(h, h_vector), x))

        return differentiate(moved, (0, 1))(vector_of(h), vector_of(params))

    return jax.jit(step), jax.jit(jacobians)


@lru_cache(maxsize=16)
def truth_of(name: str, plan: Plan) -> Truth:
    with jax.enable_x64(True):
        return _truth(name, plan)


@lru_cache(maxsize=16)
def _jacobians(name: str, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Of all steps, for what asks for them: of a large state they take half a gigabyte."""
    problem, (_, jacobians_of) = _problem(name, "float64"), _one_step(name)
    starts = truth_of(name, plan).starts
    with jax.enable_x64(True):
        size, params_size = size_of(problem.state0), size_of(problem.params)
        held = np.eye(size), np.zeros((size, params_size))
        found = [
            held if h is None else jacobians_of(problem.params, h, at_step(problem.xs, k))
            for k, h in enumerate(starts)
        ]
    of_state, of_params = (np.stack([np.asarray(a) for a in part]) for part in zip(*found, strict=True))
    return of_state, of_params


def _truth(name: str, plan: Plan) -> Truth:
    problem, (step, _) = _problem(name, "float64"), _one_step(name)
    steps, args = plan.steps, loss_args(plan.weights, "float64")
    moving_params, params = floats(problem.params)
    moving_xs, xs = floats([at_step(problem.xs, k) for k in range(steps)])
    (start, rest), (reset, rest_of_reset) = floats(problem.state0), floats(problem.reset_state)
    moving_args, rest_of_args = floats(args)
    zeros = jax.tree.map(jnp.zeros_like, start)

    def run(given: Any) -> Any:
        begin = eqx.combine(given["start"], rest)
        return walk(
            step,
            plan,
            [eqx.combine(p, params) for p in given["params"]],
            begin,
            eqx.combine(given["reset"], rest_of_reset) if plan.own_reset_state else begin,
            eqx.combine(given["xs"], xs),
            given["added"],
        )

    def total(given: Any) -> Any:
        states, starts = run(given)
        value, aux = _loss_of(states, eqx.combine(given["args"], rest_of_args))
        return value, (aux, states, starts)

    given = {
        "params": [moving_params] * steps,
        "start": start,
        "reset": reset,
        "xs": moving_xs,
        "added": [zeros] * steps,
        "args": moving_args,
    }
    if REGISTRY[name].pulls:
        (value, (aux, states, starts)), grad = jax.value_and_grad(total, has_aux=True)(given)
    else:
        value, (aux, states, starts) = total(given)
        grad = jax.tree.map(lambda a: np.full_like(a, np.nan), given)
    contributions = np.stack([real_vector(jax.tree.map(np.conj, g)) for g in grad["params"]])
    return Truth(
        name=name,
        plan=plan,
        states=stacked(states),
        starts=starts,
        immediate=np.stack([_immediate(h, weight, args) for h, weight in zip(states, plan.weights, strict=True)]),
        loss=value,
        aux=aux,
        adjoints=stacked(grad["added"]),
        params_grad=summed(grad["params"]),
        contributions=contributions,
        state0_grad=grad["start"],
        reset_state_grad=grad["reset"] if plan.own_reset_state else None,
        xs_grad=stacked(grad["xs"]),
        args_grad=grad["args"],
    )


@lru_cache(maxsize=4)
def by_lag(name: str, plan: Plan) -> np.ndarray:
    """``[T, P]``, by real numbers: dl_t/dparams_s of every loss by parameters that each step has for itself, added up
    over t and s between which there are so many real steps. What is read in padding has come about before."""
    with jax.enable_x64(True):
        problem, (step, _) = _problem(name, "float64"), _one_step(name)
        args = loss_args(plan.weights, "float64")
        zeros = jax.tree.map(jnp.zeros_like, floats(problem.state0)[0])
        reset = problem.reset_state if plan.own_reset_state else problem.state0
        xs = [at_step(problem.xs, k) for k in range(plan.steps)]

        def losses(vectors: Any) -> Any:
            params = [like_vector(problem.params, v) for v in vectors]
            states = walk(step, plan, params, problem.state0, reset, xs, [zeros] * plan.steps)[0]
            return args["weights"] * _loss_of(states, args)[1]["read"]

        numbers = vector_of(problem.params)
        jacobian = np.stack(jax.jacrev(losses)([numbers] * plan.steps), axis=1)
    parts, passed = np.zeros((plan.steps, numbers.size)), np.cumsum(plan.mask)
    for t, s in np.ndindex(plan.steps, plan.steps):
        if s <= t:
            parts[passed[t] - passed[s]] += jacobian[t, s]
    return parts


def perturbed_loss(name: str, plan: Plan, perturbations: list[np.ndarray], until: int) -> float:
    """The loss, in double precision, of states to which the parameters of every step were moved; those from `until`
    on are as they are without."""
    with jax.enable_x64(True):
        problem, (step, _) = _problem(name, "float64"), _one_step(name)
        vector, nothing = vector_of(problem.params), jax.tree.map(jnp.zeros_like, floats(problem.state0)[0])
        reset = problem.reset_state if plan.own_reset_state else problem.state0
        xs = [at_step(problem.xs, k) for k in range(plan.steps)]

        def run(perturbations: list[np.ndarray]) -> list[Any]:
            moved = [like_vector(problem.params, vector + jnp.asarray(e)) for e in perturbations]
            return walk(step, plan, moved, problem.state0, reset, xs, [nothing] * plan.steps)[0]

        later = run([0 * e for e in perturbations])[until:] if until < plan.steps else []
        return float(_loss_of(run(perturbations)[:until] + later, loss_args(plan.weights, "float64"))[0])


# --- Comparing


def numbers(leaf: Any) -> np.ndarray:
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    a = np.asarray(leaf)
    return a.astype(np.complex128 if np.iscomplexobj(a) else np.float64)


def difference(comparison: Comparison, tolerance: float, smallest: float = 0.0) -> str:
    """What is wrong; empty if nothing. Numbers below the `smallest` need not be told from zero."""
    _, got, expected, logarithms, slack = comparison
    if jax.tree.structure(got) != jax.tree.structure(expected):
        return f"structure {jax.tree.structure(got)} for {jax.tree.structure(expected)}"
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(expected)]
    pairs = [(numbers(a), numbers(b)) for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True)]
    share = 0.3 if tolerance > 1e-2 else 1e-3  # of the whole, below which a leaf need not be known for itself
    whole = share * np.sqrt(sum(np.sum(np.abs(b[np.isfinite(b)]) ** 2) for _, b in pairs))
    for path, (a, b) in zip(paths, pairs, strict=True):
        if a.shape != b.shape:
            return f"{path} shape {a.shape} for {b.shape}"
        if not np.array_equal(a[~np.isfinite(b)], b[~np.isfinite(b)], equal_nan=True):
            return f"{path} {a} for {b}"
        a, b = a[np.isfinite(b)], b[np.isfinite(b)]
        if not a.size:
            continue
        scale = 1.0 if logarithms else max(np.linalg.norm(b), whole) or 1.0
        error = np.max(np.abs(a - b)) if logarithms else np.linalg.norm(a - b)
        if not error <= max((30 if logarithms else 1) * slack * tolerance * scale, smallest):
            return f"{path} off by {error / scale:.2g}: {a.ravel()[:6]} for {b.ravel()[:6]}"
    return ""


def same_dtypes(what: str, got: Any, like: Any) -> Comparison:
    """Their dtypes, as numbers."""

    def number(a: Any) -> int:
        return sum(map(ord, str(jnp.asarray(a).dtype)))

    return Comparison(f"dtypes of {what}", *(jax.tree.map(number, tree) for tree in (got, like)))


def log(a: Any) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(a, np.float64))


def log_norms(tree: Any) -> np.ndarray:
    """``[T]``."""
    return log(np.sqrt(sum(np.sum(np.abs(_rows(a)) ** 2, axis=1) for a in jax.tree.leaves(tree))))


def _rows(a: Any) -> np.ndarray:
    return np.asarray(a).reshape(np.shape(a)[0], -1)


def at_steps(tree: Any, steps: list[int]) -> Any:
    return jax.tree.map(lambda a: by_numpy(a)[np.asarray(steps)], tree)


class Check(NamedTuple):
    """What is asked of one public function.

    Attributes:
      run: all that is to be compared.
      refusal: what a refusal says, as a regular expression, where this entry must be refused; else None.
      applies: whether there is anything to ask.
    """

    run: Callable[[Case], Iterator[Comparison]]
    refusal: Callable[[Entry], str | None] = lambda entry: None
    applies: Callable[[Case], bool] = lambda case: True
