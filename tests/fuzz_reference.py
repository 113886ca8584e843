"""What is right in a case of the fuzzer: a loop over the real steps, in NumPy and extended precision.

Every number comes `RUNS` times (see `fuzz_steps`): the first is right, the others say how far it can be known.
"""

from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contract_cases import Plan
from fuzz_steps import LONG, RUNS, Arithmetic, Dual, Given, Structure

import bptt_jax as bptt


@dataclass(frozen=True)
class Case:
    """A structure with its numbers: arrays of NumPy, in the dtypes that the package is given."""

    structure: Structure
    params: dict[str, np.ndarray]
    state0: Any
    reset_state: Any
    xs: Any
    plan: Plan
    weights: np.ndarray
    readout: np.ndarray
    kind: str

    @property
    def sequence(self) -> bptt.Sequence:
        s = self.structure
        return bptt.Sequence(
            self.xs,
            length=s.steps,
            mask=self.plan.mask if s.mask else None,
            resets=self.plan.flags if s.resets else None,
            reset_state=self.reset_state if s.own_reset_state else None,
        )

    @property
    def args(self) -> dict[str, np.ndarray]:
        return {"weights": self.weights, "readout": self.readout, "label": np.int32(3)}


# How large the weights of what comes from the state are, and those of the loss; as powers of ten, of each dtype.
SIZES = {"float32": 30, "float64": 150}
KINDS = ("plain", "zero", "small weights", "large weights", "small loss", "large loss")


def draw_case(structure: Structure, rng: np.random.Generator) -> Case:
    s, work = structure, np.dtype(structure.dtype)
    kind = str(rng.choice(KINDS, p=[0.52, 0.12, 0.09, 0.09, 0.09, 0.09])) if not s.halves else "plain"
    size = 10.0 ** SIZES[s.dtype]
    gain = rng.choice([0.5, 1.0, 1.5]) * {"small weights": 1 / size, "large weights": size}.get(kind, 1.0)
    at_rest = kind in ("zero", "large weights")

    def normal(shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
        return np.asarray(scale * rng.standard_normal(shape), work)

    params = {}
    for name, shape in s.params.items():
        if name[0] == "z":
            re, im = normal(shape, 0.7), normal(shape, 0.7)
            params[name] = np.asarray(re + 1j * im, np.result_type(1j * re))
        elif name[0] == "w":
            params[name] = normal(shape, gain / np.sqrt(shape[1]))
        else:
            params[name] = np.zeros(shape, work) if kind == "large weights" else normal(shape)
    states = []
    for zero in (at_rest, kind == "large weights" or (at_rest and rng.random() < 0.5)):
        leaves = []
        for leaf_kind, shape in zip(s.kinds, s.shapes, strict=True):
            a = normal(shape, 0.0 if zero else 1.0)
            if leaf_kind == "complex":
                a = np.asarray(a + 1j * normal(shape, 0.0 if zero else 1.0), np.result_type(1j * a))
            leaves.append(a if leaf_kind in ("real", "complex") else a.astype(jnp.dtype(leaf_kind)))
        states.append(s.state(leaves, np.int32(rng.integers(5))))
    x = np.zeros((s.steps, 2), work) if kind == "large weights" else normal((s.steps, 2))
    xs = {"none": None, "array": x, "dict": {"u": x, "k": rng.integers(4, size=s.steps).astype(np.int32)}}[s.inputs]
    plan = Plan(
        _mask(s, rng),
        tuple(np.flatnonzero(_resets(s, rng))),
        own_reset_state=s.own_reset_state,
    )
    if s.mask:  # what stands there does no harm
        xs = jax.tree.map(lambda a: _spoilt(a, plan.mask), xs)
    weights = rng.uniform(0.5, 1.5, s.steps) * (rng.random(s.steps) < rng.choice([0.3, 1.0]))
    weights[-1] = max(weights[-1], 0.5)
    weights *= {"small loss": 1 / size, "large loss": size}.get(kind, 1.0)
    return Case(s, params, *states, xs, plan, weights.astype(work), np.asarray(0.75, work), kind)


def _mask(s: Structure, rng: np.random.Generator) -> str:
    real = np.ones(s.steps, bool)
    if s.mask:
        how = rng.integers(4)
        if how == 0:
            real[rng.integers(1, s.steps + 1) :] = False
        elif how < 3:
            real = rng.random(s.steps) < 0.7
            real[rng.integers(s.steps)] = True
    return "".join(".#"[int(r)] for r in real)


def _resets(s: Structure, rng: np.random.Generator) -> np.ndarray:
    flags = np.zeros(s.steps, bool)
    if s.resets:
        how = rng.integers(4)
        if how == 0:
            flags[0] = True
        elif how < 3:
            flags = rng.random(s.steps) < 0.3
    return flags


def _spoilt(a: np.ndarray, real: np.ndarray) -> np.ndarray:
    a = a.copy()
    a[~real] = np.nan if a.dtype.kind == "f" else 2**30
    return a


class Reference:
    """All that is right of a case.

    Attributes:
      known: how many states are: fewer than T where one leaves the range of its dtype.
      differentiable: whether no derivative within one step leaves it, nor the loss and its own derivatives.
    """

    def __init__(self, case: Case, rng: np.random.Generator) -> None:
        self.case, self.structure, self.plan = case, case.structure, case.plan
        self.arithmetic = Arithmetic(self.structure.dtype, self.structure.halves, rng)
        self.eps, self.tiny = self.arithmetic.eps, self.arithmetic.tiny
        self._walk()

    def _vector(self, state: Any) -> tuple[np.ndarray, int]:
        leaves = jax.tree.leaves(state)
        count = int(leaves.pop()) if self.structure.counter else 0
        return np.concatenate([_reals(a) for a in leaves]), count

    def _walk(self) -> None:
        case, s, plan = self.case, self.structure, self.plan
        names = sorted(s.params)
        params = {name: _reals(case.params[name]) for name in names}
        d, p = s.size, sum(len(params[name]) for name in names)
        u = 0 if s.inputs == "none" else 2
        total = d + p + u

        def seeded(values: np.ndarray, first: int) -> Dual:
            n = values.shape[-1]
            jac = np.zeros((RUNS, n, total), LONG)
            jac[:, np.arange(n), first + np.arange(n)] = 1
            return Dual(np.broadcast_to(values, (RUNS, n)).astype(LONG), jac)

        given, first = {}, d
        for name in names:
            given[name] = seeded(params[name], first)
            first += len(params[name])
        start, count = self._vector(case.state0)
        reset, reset_count = self._vector(case.reset_state if s.own_reset_state else case.state0)
        h, pending = np.broadcast_to(start, (RUNS, d)).astype(LONG), False
        self.states, self.counts = np.zeros((RUNS, s.steps, d), LONG), np.zeros(s.steps, int)
        self.jacobians = np.zeros((RUNS, s.steps, d, d), LONG) + np.eye(d)
        self.by_params = np.zeros((RUNS, s.steps, d, p), LONG)
        self.by_input = np.zeros((RUNS, s.steps, d, u), LONG)
        self.reset_at, self.known = np.zeros(s.steps, bool), s.steps
        x = None if u == 0 else case.xs if s.inputs == "array" else case.xs["u"]
        for k, real in enumerate(plan.mask):
            pending |= bool(plan.flags[k])
            if real:
                self.reset_at[k] = pending
                if pending:
                    h, count, pending = np.broadcast_to(reset, (RUNS, d)).astype(LONG), reset_count, False
                vector = seeded(h, 0)
                leaves, at = [], 0
                for size in s.sizes:
                    leaves.append(Dual(vector.value[:, at : at + size], vector.jac[:, at : at + size]))
                    at += size
                inputs = [] if x is None else [seeded(x[k].astype(LONG), d + p)]
                token = case.xs["k"][k] if s.inputs == "dict" else None
                at_step = Given(leaves, count, inputs, token, given, self.arithmetic)
                new = [part.numpy(at_step) for part in s.parts]
                new = [self._written(n, s.eps(kind)) for n, kind in zip(new, s.kinds, strict=True)]
                h = np.concatenate([n.value for n in new], axis=1)
                jac = np.concatenate([n.jac for n in new], axis=1)
                self.jacobians[:, k], self.by_params[:, k], self.by_input[:, k] = np.split(jac, [d, d + p], axis=2)
                count += 1
                if self.arithmetic.overflown:
                    self.known = k
                    break
            self.states[:, k], self.counts[k] = h, count
        top = self.arithmetic.largest
        in_range = [np.max(np.abs(a)) < top for a in (self.reads, self.loss, self.immediate, self.by_readout)]
        self.differentiable = self.known == s.steps and not self.arithmetic.wild and all(in_range)

    def _written(self, leaf: Dual, eps: float) -> Dual:
        """In the dtype of a leaf, from and to others."""
        return Dual(self.arithmetic.rounded(leaf.value, eps=eps), self.arithmetic.rounded(leaf.jac))

    # --- Values

    @cached_property
    def _imaginary(self) -> np.ndarray:
        """``[D]``: which real numbers of the state are imaginary parts."""
        kinds = zip(self.structure.kinds, self.structure.sizes, strict=True)
        return np.concatenate([np.arange(n) >= (n // 2 if kind == "complex" else n) for kind, n in kinds])

    @cached_property
    def loss(self) -> np.ndarray:
        read = self.reads
        weights = self.case.weights.astype(LONG)
        terms = weights * read
        return self.arithmetic.rounded(terms.sum(axis=1), np.abs(terms).sum(axis=1))

    @cached_property
    def reads(self) -> np.ndarray:
        """``[RUNS, T]``, what the loss reads of every state: the derivatives by its weights."""
        linear = np.where(self._imaginary, 0.5, 1.0).astype(LONG) * self.case.readout.astype(LONG)
        terms = linear * self.states + self.states**2 / 2
        return self.arithmetic.rounded(terms.sum(axis=2), np.abs(terms).sum(axis=2))

    @cached_property
    def by_readout(self) -> np.ndarray:
        terms = np.where(self._imaginary, 0.5, 1.0).astype(LONG) * self.states
        terms = self.case.weights.astype(LONG)[:, None] * terms
        return self.arithmetic.rounded(terms.sum(axis=(1, 2)), np.abs(terms).sum(axis=(1, 2)))

    @cached_property
    def immediate(self) -> np.ndarray:
        linear = np.where(self._imaginary, 0.5, 1.0).astype(LONG) * self.case.readout.astype(LONG)
        weights = self.case.weights.astype(LONG)[:, None]
        return self.arithmetic.rounded(
            weights * (linear + self.states), np.abs(weights) * (np.abs(linear) + np.abs(self.states))
        )

    # --- Backwards

    def _pulled(self, jac: np.ndarray, signal: np.ndarray) -> np.ndarray:
        """Of one step; what is small beside the signal is lost, for its mantissa has the range of the dtype alone."""
        by = np.swapaxes(jac, 1, 2)
        size = np.abs(by) @ np.abs(signal)[..., None]
        floor = np.max(np.abs(signal), axis=1, keepdims=True) * np.maximum(
            1, np.max(np.abs(jac), axis=(1, 2), initial=0)[:, None]
        )
        return self.arithmetic.rounded((by @ signal[..., None])[..., 0], size[..., 0], floor)

    @cached_property
    def _backward(self) -> dict[str, np.ndarray]:
        steps, d = self.structure.steps, self.structure.size
        arrives, at_reset = np.zeros((RUNS, d), LONG), np.zeros((RUNS, d), LONG)
        adjoints, by_params, by_input = [], [], []
        for k in reversed(range(steps)):
            total = arrives + self.immediate[:, k]
            size = np.abs(arrives) + np.abs(self.immediate[:, k])
            signal = self.arithmetic.rounded(total, size, np.max(size, axis=1, keepdims=True))
            adjoints.append(signal)
            if not self.plan.mask[k]:
                arrives = signal
                by_params.append(np.zeros((RUNS, self.by_params.shape[-1]), LONG))
                by_input.append(np.zeros((RUNS, self.by_input.shape[-1]), LONG))
                continue
            by_params.append(self._pulled(self.by_params[:, k], signal))
            by_input.append(self._pulled(self.by_input[:, k], signal))
            arrives = self._pulled(self.jacobians[:, k], signal)
            if self.reset_at[k]:
                at_reset, arrives = at_reset + arrives, np.zeros_like(arrives)
        return {
            "adjoints": np.stack(adjoints[::-1], axis=1),
            "contributions": np.stack(by_params[::-1], axis=1),
            "by_input": np.stack(by_input[::-1], axis=1),
            "state0": arrives,
            "reset": at_reset,
        }

    @property
    def adjoints(self) -> np.ndarray:
        return self._backward["adjoints"]

    @property
    def contributions(self) -> np.ndarray:
        return self._backward["contributions"]

    @property
    def xs_grad(self) -> np.ndarray:
        return self._backward["by_input"]

    @cached_property
    def params_grad(self) -> np.ndarray:
        terms = self.contributions
        # One power of two serves all adjoints here: what is small beside the largest in time is lost.
        floor = np.max(np.abs(self.adjoints), axis=(1, 2)) * np.maximum(
            1, np.max(np.abs(self.by_params), axis=(1, 2, 3), initial=0)
        )
        return self.arithmetic.rounded(terms.sum(axis=1), np.abs(terms).sum(axis=1), floor[:, None])

    @cached_property
    def by_lag(self) -> np.ndarray:
        """``[RUNS, T, P]``: what loss steps send to the parameters so many real steps before, across no reset."""
        at = self.real_steps
        owner = np.searchsorted(at, np.arange(self.structure.steps), side="right") - 1  # whose state stands there
        sent = np.stack([self.immediate[:, owner == i].sum(axis=1) for i in range(len(at))], axis=1)
        found = np.zeros((RUNS, self.structure.steps, self.by_params.shape[-1]), LONG)
        for lag in range(len(at)):
            terms = np.stack(
                [self._pulled(self.by_params[:, at[i]], sent[:, i]) for i in range(len(at) - lag)], axis=1
            )
            floor = np.max(np.abs(sent), axis=(1, 2)) * np.maximum(
                1, np.max(np.abs(self.by_params), axis=(1, 2, 3), initial=0)
            )
            found[:, lag] = self.arithmetic.rounded(terms.sum(axis=1), np.abs(terms).sum(axis=1), floor[:, None])
            back = [
                0 * sent[:, i] if self.reset_at[at[i]] else self._pulled(self.jacobians[:, at[i]], sent[:, i])
                for i in range(len(at))
            ]
            sent = np.stack([*back[1:], 0 * back[0]], axis=1)
        return found

    @property
    def state0_grad(self) -> np.ndarray:
        back = self._backward
        return back["state0"] if self.structure.own_reset_state else back["state0"] + back["reset"]

    @property
    def reset_state_grad(self) -> np.ndarray:
        return self._backward["reset"]

    # --- Products

    @cached_property
    def real_steps(self) -> np.ndarray:
        return np.flatnonzero(self.plan.mask)

    @cached_property
    def products(self) -> np.ndarray:
        """``[RUNS, n, n, D, D]`` of the n real steps: (t, s) is the product of the factors s .. t; zero across a
        reset and where t < s."""
        steps, d = self.real_steps, self.structure.size
        found = np.zeros((RUNS, len(steps), len(steps), d, d), LONG)
        for s in range(len(steps)):
            product, bound = np.broadcast_to(np.eye(d), (RUNS, d, d)).astype(LONG), np.ones((RUNS, 1, 1), LONG)
            for t in range(s, len(steps)):
                jac, passes = self.jacobians[:, steps[t]], t == s or not self.reset_at[steps[t]]
                # In whatever order they are multiplied, what is small beside the largest entries on the way is lost.
                bound = bound * np.maximum(np.max(np.abs(jac).sum(axis=2), axis=1), 1)[:, None, None]
                size = passes * (np.abs(jac) @ np.abs(product))
                product = self.arithmetic.rounded(passes * (jac @ product), size, bound)
                found[:, t, s] = product
        return found

    @cached_property
    def piece_ends(self) -> np.ndarray:
        """Of every real step, which one ends its piece."""
        begins = self.reset_at[self.real_steps]
        ends = [*(np.flatnonzero(begins) - 1), len(begins) - 1]
        return np.asarray([min(end for end in ends if end >= i) for i in range(len(begins))])

    def run(self, number: int, dtype: str) -> Any:
        """One of the runs as a case of the contract, in double precision, for its oracles."""
        truth = SimpleNamespace(
            jacobians=self.jacobians[number].astype(float),
            params_jacobians=self.by_params[number].astype(float),
            immediate=self.immediate[number].astype(float),
        )
        return SimpleNamespace(
            truth=lambda plan: truth,
            dtype=dtype,
            problem=SimpleNamespace(params=self.case.params, state0=self.case.state0),
        )


def _reals(a: Any) -> np.ndarray:
    a = np.asarray(a)
    parts = (a.real, a.imag) if a.dtype.kind == "c" else (a,)
    return np.concatenate([np.ravel(part).astype(LONG) for part in parts])


def norm(a: np.ndarray) -> np.ndarray:
    """Euclidean, over the last axis."""
    return np.sqrt(np.sum(np.square(a), axis=-1))


def singular_values(matrices: np.ndarray) -> np.ndarray:
    """Over the last two axes, by LAPACK in double precision."""
    scale = np.max(np.abs(matrices), axis=(-2, -1), initial=0)
    scale = np.where(scale == 0, 1, scale)
    found = np.linalg.svd((matrices / scale[..., None, None]).astype(float), compute_uv=False)
    return found.astype(LONG) * scale[..., None]
