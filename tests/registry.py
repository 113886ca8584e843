"""Steps as people really have them: one example of every kind that the contract admits.

Every entry makes the same numbers in every dtype (rounded to the coarsest that it is run in), so that double
precision is a truth for single. Steps are made once, at the top, so that entries share what JAX has compiled.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from surface import takes_half

import bptt_jax as bptt
from bptt_jax.recurrence.delta import LinearStep

LONGEST = 13  # inputs that an entry has


class Problem(NamedTuple):
    """A recurrence, and what a reset makes of its state; leaves of `xs` ``[LONGEST, ...]``, None if autonomous."""

    step: bptt.Step
    params: Any
    state0: Any
    reset_state: Any
    xs: Any


class Draw:
    """Random arrays of one dtype, the same numbers in every dtype."""

    def __init__(self, dtype: Any, coarsest: Any = jnp.float32) -> None:
        self.dtype, self._coarsest, self._rng = jnp.dtype(dtype), coarsest, np.random.default_rng(0)

    def exactly(self, a: Any) -> jax.Array:
        return jnp.asarray(np.asarray(a, np.float64).astype(self._coarsest).astype(np.float64), self.dtype)

    def __call__(self, *shape: int, scale: float = 1.0) -> jax.Array:
        return self.exactly(scale * self._rng.standard_normal(shape))

    def complex(self, *shape: int, scale: float = 1.0) -> jax.Array:
        return jax.lax.complex(self(*shape, scale=scale), self(*shape, scale=scale))

    def orthogonal(self, n: int) -> jax.Array:
        return self.exactly(np.linalg.qr(self._rng.standard_normal((n, n)))[0])

    def integers(self, below: int, *shape: int) -> jax.Array:
        return jnp.asarray(self._rng.integers(below, size=shape), jnp.int32)


class Entry(NamedTuple):
    """One kind of step, and what it allows.

    Attributes:
      make: the problem, from what it draws.
      pulls: it has a backward pass (no loop of unknown length).
      pushes: it has a forward mode (no `jax.custom_vjp`).
      dtype: the only one that it is run in; None: single and double precision.
      tolerance: instead of that of its dtype.
      large: too many numbers in the state for what needs many D x D matrices.
      linear: a `DiagonalStep` or a `DeltaStep`.
    """

    make: Callable[[Draw], Problem]
    pulls: bool = True
    pushes: bool = True
    dtype: str | None = None
    tolerance: float | None = None
    large: bool = False
    linear: bool = False

    @property
    def dtypes(self) -> tuple[str, ...]:
        return ("float32", "float64") if self.dtype is None else (self.dtype,)

    def problem(self, dtype: str) -> Problem:
        """In that dtype; double precision has to be switched on for it."""
        return self.make(Draw(dtype, self.dtype or jnp.float32))


N, I = 3, 2


def _of_vectors(step: bptt.Step, draw: Draw, params: Any) -> Problem:
    """A state ``[N]``, inputs ``[T, N]``."""
    return Problem(step, params, draw(N, scale=0.5), draw(N, scale=0.5), draw(LONGEST, N, scale=0.7))


# --- Cells


def tanh_step(p: Any, h: Any, x: Any) -> Any:
    return jnp.tanh(p["w"] @ h + p["u"] @ x + p["b"])


def tanh_params(draw: Draw) -> Any:
    return {"w": draw(N, N, scale=0.6), "u": draw(N, I), "b": draw(N, scale=0.3)}


def with_tanh_params(step: bptt.Step) -> Callable[[Draw], Problem]:
    def make(draw: Draw) -> Problem:
        params = tanh_params(draw)
        return Problem(step, params, draw(N, scale=0.5), draw(N, scale=0.5), draw(LONGEST, I))

    return make


def cell_params(name: str, draw: Draw, n: int, inputs: int) -> Any:
    gates = {"rnn": 1, "leaky_rnn": 1, "gru": 3, "lstm": 4}[name]
    rnn = bptt.cells.RNNParams
    make = {"rnn": rnn, "leaky_rnn": rnn, "gru": bptt.cells.GRUParams, "lstm": bptt.cells.LSTMParams}[name]
    shapes = [(gates * n, n), (gates * n, inputs), (gates * n,), (n,)]
    return make(*(draw(*shape, scale=0.7) for shape in shapes[: len(make._fields)]))


def cell(name: str, n: int = N) -> Callable[[Draw], Problem]:
    def make(draw: Draw) -> Problem:
        made = getattr(bptt.cells, name)(n, dtype=draw.dtype)
        params, zeros = cell_params(name, draw, n, I), made.initial_state()
        states = [jax.tree.map(lambda a: draw(*a.shape, scale=0.5), zeros) for _ in range(2)]
        return Problem(made.step, params, *states, draw(LONGEST, I))

    return make


noisy = bptt.cells.leaky_rnn(N, alpha=0.3, noise=0.2)


def noisy_leaky_rnn(draw: Draw) -> Problem:
    problem = cell("leaky_rnn")(draw)
    return problem._replace(step=noisy.step, xs=(problem.xs, jax.random.split(jax.random.key(2), LONGEST)))


two_layers_step = bptt.stack(bptt.lstm(2).step, bptt.rnn(2).step)


def two_layers(draw: Draw) -> Problem:
    params = cell_params("lstm", draw, 2, I), cell_params("rnn", draw, 2, 2)
    states = [(bptt.cells.LSTMState(draw(2), draw(2)), draw(2)) for _ in range(2)]
    return Problem(two_layers_step, params, *states, draw(LONGEST, I))


def lru(draw: Draw) -> Problem:
    moduli, phases = draw.exactly([-1.0, -2.0]), draw.exactly([0.3, -0.4])
    params = bptt.cells.LRUParams(moduli, phases, draw(2, scale=0.3), draw(2, I), draw(2, I))
    return Problem(bptt.cells.lru(2).step, params, draw.complex(2), draw.complex(2), draw(LONGEST, I))


def min_gru(draw: Draw) -> Problem:
    params = bptt.cells.MinGRUParams(draw(2 * N, I), draw(2 * N))
    return Problem(bptt.cells.min_gru(N).step, params, draw(N), draw(N), draw(LONGEST, I))


@bptt.parallel.DiagonalStep
def decay(p: Any, x: Any) -> Any:
    """Coefficients that want to be broadcast."""
    return {"fast": p["fast"], "slow": 0.9}, {"fast": x, "slow": p["in"] * x[0]}


def diagonal(draw: Draw) -> Problem:
    params = {"fast": draw.exactly([0.5, -0.8]), "in": draw(2, 2)}
    states = [{"fast": draw(2), "slow": draw(2, 2)} for _ in range(2)]
    return Problem(decay, params, *states, draw(LONGEST, 2))


def leaky_step(p: Any, h: Any, x: Any) -> Any:
    return 0.75 * h + 0.25 * tanh_step(p, h, x)


def relu_step(w: Any, h: Any, x: Any) -> Any:
    return jax.nn.relu(w @ h + x)


def relu_orthogonal(draw: Draw) -> Problem:
    return _of_vectors(relu_step, draw, draw.orthogonal(N))


# --- States


def complex_step(p: Any, state: Any, x: None) -> Any:
    """Autonomous, holomorphic in neither state nor parameters."""
    z, r = state
    turned = p["a"] * z + jnp.conj(p["b"] * z)
    bounded = jax.lax.complex(jnp.tanh(turned.real), jnp.tanh(turned.imag * r))
    return bounded, 0.5 * r + jnp.sum(turned.imag, keepdims=True)


def complex_state(draw: Draw) -> Problem:
    params = {"a": draw.complex(2, scale=0.7), "b": draw.complex(2, scale=0.7)}
    return Problem(complex_step, params, *[(draw.complex(2), draw(1)) for _ in range(2)], None)


@jax.jit
def tokens_step(p: Any, state: Any, token: Any) -> Any:
    """A dict for a state, integers as inputs, and a permutation among the parameters."""
    fast = jnp.tanh(p["w"] @ state["fast"][p["order"]] + p["table"][token] + jnp.sum(state["slow"]))
    return {"fast": fast, "slow": 0.9 * state["slow"] + 0.1 * jnp.outer(fast[:2], fast[1:2])}


def dict_state(draw: Draw) -> Problem:
    params = {"w": draw(3, 3), "table": draw(5, 3), "order": jnp.asarray([2, 0, 1], jnp.int32)}
    states = [{"fast": draw(3), "slow": draw(2, 1)} for _ in range(2)]
    return Problem(tokens_step, params, *states, draw.integers(5, LONGEST))


def matrix_step(p: Any, h: Any, x: Any) -> Any:
    return jnp.tanh(p["left"] @ h @ p["right"] + jnp.outer(x, x))


def matrix_state(draw: Draw) -> Problem:
    params = {"left": draw(2, 2), "right": draw(2, 2)}
    return Problem(matrix_step, params, draw(2, 2), draw(2, 2), draw(LONGEST, 2))


def batch_inside(draw: Draw) -> Problem:
    return Problem(batched_tanh_step, tanh_params(draw), draw(2, N), draw(2, N), draw(LONGEST, 2, I))


batched_tanh_step = jax.vmap(tanh_step, (None, 0, 0))


def noisy_step(w: Any, state: Any, x: Any) -> Any:
    """A counter that says where to write, a flag, and a random key that drives noise."""
    key, now = jax.random.split(state["key"])
    noise = jax.random.bits(now, x.shape, jnp.uint16).astype(x.dtype) / 2**16  # the same in every dtype
    h = jnp.tanh(w @ state["h"] + x + noise)
    turned = jnp.where(state["flag"], h[::-1], h)
    return {
        "h": turned.at[state["t"] % N].multiply(0.5),
        "t": state["t"] + 1,
        "flag": ~state["flag"],
        "key": key,
    }


def counter_and_key(draw: Draw) -> Problem:
    def state(t: int) -> Any:
        return {"h": draw(N), "t": jnp.asarray(t, jnp.int32), "flag": jnp.asarray(t > 0), "key": jax.random.key(t)}

    return Problem(noisy_step, draw(N, N, scale=0.5), state(0), state(5), draw(LONGEST, N))


def none_leaf_step(p: Any, state: Any, x: Any) -> Any:
    h, nothing = state
    return tanh_step(p, h, x), nothing


def none_leaf(draw: Draw) -> Problem:
    return Problem(none_leaf_step, tanh_params(draw), (draw(N), None), (draw(N), None), draw(LONGEST, I))


def number_step(p: Any, h: Any, x: Any) -> Any:
    return jnp.sin(p * h) + x


def one_number(draw: Draw) -> Problem:
    """Python's own numbers for parameter and state."""
    return Problem(number_step, 1.5, 0.25, -0.5, draw(LONGEST))


def zeros(draw: Draw) -> Problem:
    nothing = jnp.zeros(N, draw.dtype)
    return _of_vectors(relu_step, draw, draw(N, N, scale=0.5))._replace(
        step=zeros_step, state0=nothing, reset_state=nothing, xs=jnp.zeros((LONGEST, N), draw.dtype)
    )


def zeros_step(w: Any, h: Any, x: Any) -> Any:
    return jnp.tanh(w @ h + x)


def large_step(p: Any, h: Any, x: Any) -> Any:
    return jnp.tanh(p["here"] * h + p["beside"] * jnp.roll(h, 1) + x)


def thousands(draw: Draw) -> Problem:
    n = 1100
    params = {"here": draw(n, scale=0.5), "beside": draw(n, scale=0.5)}
    return Problem(large_step, params, draw(n, scale=0.5), draw(n, scale=0.5), draw(LONGEST))


def mixed_step(p: Any, state: Any, x: Any) -> Any:
    half = jnp.tanh(p @ state["wide"] + x).astype(jnp.float16)
    return {"half": half, "wide": 0.5 * state["wide"] + half.astype(p.dtype)}


def mixed_precision(draw: Draw) -> Problem:
    states = [{"half": draw(N).astype(jnp.float16), "wide": draw(N)} for _ in range(2)]
    return Problem(mixed_step, draw(N, N, scale=0.6), *states, draw(LONGEST, N))


# --- Control flow and JAX's transformations


def cond_step(p: Any, h: Any, x: Any) -> Any:
    return jax.lax.cond(x[0] > 0, lambda h: tanh_step(p, h, x), lambda h: 0.9 * h, h)


def switch_step(w: Any, h: Any, x: Any) -> Any:
    branches = (lambda h: jnp.tanh(w @ h), lambda h: 0.9 * h + w[0], lambda h: h * h[::-1])
    return jax.lax.switch(x["which"], branches, h) + x["add"]


def switch(draw: Draw) -> Problem:
    xs = {"which": draw.integers(3, LONGEST), "add": draw(LONGEST, N, scale=0.5)}
    return _of_vectors(switch_step, draw, draw(N, N, scale=0.6))._replace(xs=xs)


def while_step(w: Any, h: Any, x: Any) -> Any:
    """As many inner steps as the input says."""

    def more(carry: Any) -> Any:
        return carry[0] < x["times"]

    def inner(carry: Any) -> Any:
        return carry[0] + 1, jnp.tanh(w @ carry[1] + x["add"])

    return jax.lax.while_loop(more, inner, (jnp.zeros((), jnp.int32), h))[1]


def while_loop(draw: Draw) -> Problem:
    xs = {"times": 1 + draw.integers(3, LONGEST), "add": draw(LONGEST, N, scale=0.5)}
    return _of_vectors(while_step, draw, draw(N, N, scale=0.6))._replace(xs=xs)


def fori_step(p: Any, h: Any, x: Any) -> Any:
    return jax.lax.fori_loop(0, 3, lambda i, h: tanh_step(p, h, x), h)


def inner_scan_step(layers: Any, h: Any, x: Any) -> Any:
    return jax.lax.scan(lambda h, w: (jnp.tanh(w @ h + x), None), h, layers)[0]


def inner_scan(draw: Draw) -> Problem:
    return _of_vectors(inner_scan_step, draw, draw(3, N, N, scale=0.5))


@jax.jit
def jitted_step(p: Any, h: Any, x: Any) -> Any:
    """Within the call, half the weights are neither a parameter nor, in form, apart from state and input."""
    return jax.jit(tanh_step)({**p, "w": 0.5 * p["w"]}, h, x)


def stopped_step(p: Any, h: Any, x: Any) -> Any:
    return 0.5 * tanh_step(p, h, x) + 0.5 * jax.lax.stop_gradient(h)


def optimiser_step(a: Any, state: Any, x: Any) -> Any:
    """Gradient descent with momentum, unrolled: a gradient inside the step."""

    def objective(theta: Any) -> Any:
        return 0.5 * jnp.sum((a @ theta - x) ** 2) + 0.25 * jnp.sum(theta**4)

    v = 0.7 * state["v"] - 0.1 * jax.grad(objective)(state["theta"])
    return {"theta": state["theta"] + v, "v": v}


def optimiser(draw: Draw) -> Problem:
    states = [{"theta": draw(N, scale=0.5), "v": draw(N, scale=0.2)} for _ in range(2)]
    return Problem(optimiser_step, draw(N, N), *states, draw(LONGEST, N))


# --- Derivatives of one's own


@jax.custom_jvp
def soft_sign(v: Any) -> Any:
    return jnp.clip(v, -1, 1)


soft_sign.defjvps(lambda dv, out, v: dv / (1 + v**2))


def custom_jvp_step(w: Any, h: Any, x: Any) -> Any:
    return soft_sign(w @ h + x)


@jax.custom_vjp
def spike(v: Any) -> Any:
    return (v > 0).astype(v.dtype)


spike.defvjp(lambda v: (spike(v), v), lambda v, g: (g / (1 + 10 * jnp.abs(v)) ** 2,))


def spiking_step(p: Any, state: Any, x: Any) -> Any:
    """Leaky integrate and fire with the surrogate of Zenke and Ganguli 2018 (arXiv:1705.11146)."""
    v = 0.9 * state["v"] * (1 - state["s"]) + p["w"] @ state["s"] + p["u"] @ x
    return {"v": v, "s": spike(v - 0.5)}


def spiking(draw: Draw) -> Problem:
    params = {"w": draw(N, N), "u": draw(N, I)}
    states = [{"v": draw(N), "s": jnp.asarray(s, draw.dtype)} for s in ([0, 1, 0], [1, 0, 1])]
    return Problem(spiking_step, params, *states, draw(LONGEST, I))


@jax.custom_gradient
def rounded(v: Any) -> Any:
    return jnp.round(4 * v) / 4, lambda g: g * (1 - jnp.tanh(v) ** 2)


def rounded_step(w: Any, h: Any, x: Any) -> Any:
    return rounded(w @ h + x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fixed_point(f: Any, y: Any, consts: Any) -> Any:
    return jax.lax.fori_loop(0, 60, lambda i, y: f(y, *consts), y)


def _fixed_point_back(f: Any, kept: Any, g: Any) -> Any:
    y, consts = kept
    pull_y = jax.vjp(lambda y: f(y, *consts), y)[1]
    u = jax.lax.fori_loop(0, 60, lambda i, u: g + pull_y(u)[0], g)
    return jnp.zeros_like(y), jax.vjp(lambda consts: f(y, *consts), consts)[1](u)[0]


_fixed_point.defvjp(lambda f, y, consts: ((y := _fixed_point(f, y, consts)), (y, consts)), _fixed_point_back)


def implicit_step(w: Any, h: Any, x: Any) -> Any:
    """The implicit Euler method, differentiated by the implicit function theorem, as solvers do."""
    f, consts = jax.closure_convert(lambda y: h + 0.3 * jnp.tanh(w @ y + x), h)
    return _fixed_point(f, h, consts)


# --- Things that can be called


def scaled_step(p: Any, h: Any, x: Any, *, scale: float) -> Any:
    return scale * tanh_step(p, h, x)


class Physics:
    def __init__(self, rate: float) -> None:
        self.rate = rate

    def step(self, p: Any, h: Any, x: Any) -> Any:
        return h + self.rate * (tanh_step(p, h, x) - h)


physics = Physics(0.3)


class Module(eqx.Module):
    weight: jax.Array
    rate: float = eqx.field(static=True)

    def __call__(self, h: Any, x: Any) -> Any:
        return h + self.rate * jnp.tanh(self.weight @ h + x)


def module_step(module: Any, h: Any, x: Any) -> Any:
    return module(h, x)


# --- Time


def layers_step(params: None, h: Any, x: Any) -> Any:
    return jnp.tanh(x["w"] @ h + x["b"])


def layers_as_time(draw: Draw) -> Problem:
    xs = {"w": draw(LONGEST, N, N, scale=0.6), "b": draw(LONGEST, N)}
    return _of_vectors(layers_step, draw, None)._replace(xs=xs)


def keys_step(w: Any, h: Any, key: Any) -> Any:
    return jnp.tanh(w @ h + jax.random.bits(key, h.shape, jnp.uint16).astype(h.dtype) / 2**16)


def keys_as_inputs(draw: Draw) -> Problem:
    return _of_vectors(keys_step, draw, draw(N, N, scale=0.6))._replace(
        xs=jax.random.split(jax.random.key(1), LONGEST)
    )


def autonomous_step(w: Any, h: Any, x: None) -> Any:
    return jnp.tanh(w @ h)


def autonomous(draw: Draw) -> Problem:
    return _of_vectors(autonomous_step, draw, draw(N, N))._replace(xs=None)


# --- What a Jacobian can be


def linear_step(a: Any, h: Any, x: Any) -> Any:
    return a @ h + x


def nilpotent(draw: Draw) -> Problem:
    return _of_vectors(linear_step, draw, draw.exactly([[0, 2, 1], [0, 0, 3], [0, 0, 0]]))


def faint(draw: Draw) -> Problem:
    """Beyond the range of single precision after four steps."""
    return _of_vectors(linear_step, draw, draw.exactly(2.0**-40 * np.eye(N)))


def identity_step(params: None, h: Any, x: None) -> Any:
    return h


def identity(draw: Draw) -> Problem:
    return _of_vectors(identity_step, draw, None)._replace(xs=None)


def stabilised_step(p: Any, state: Any, x: Any) -> Any:
    """Exponential gates in the log domain, as of the mLSTM (Beck et al. 2024, arXiv:2405.04517, eq. 19 and on)."""
    log_f, log_i = jax.nn.log_sigmoid(p["f"] * x[0] + 1), p["i"] * x[1] + p["r"] @ state["c"]
    m = jnp.maximum(log_f + state["m"], log_i)
    f, i = jnp.exp(log_f + state["m"] - m), jnp.exp(log_i - m)
    return {"m": m, "c": f * state["c"] + i * jnp.tanh(p["z"] * x[0])}


def dead_first_step(draw: Draw) -> Problem:
    params = {"f": draw(N), "i": draw(N), "r": draw(N, N, scale=0.3), "z": draw(N)}
    start = {"m": jnp.full(N, -jnp.inf, draw.dtype), "c": jnp.zeros(N, draw.dtype)}
    return Problem(stabilised_step, params, start, start, draw(LONGEST, 2))


def hmm_step(p: Any, alpha: Any, symbol: Any) -> Any:
    """The forward algorithm of a hidden Markov model, in the log domain."""
    return logsumexp(alpha[:, None] + p["move"], axis=0) + p["emit"][:, symbol]


def hidden_markov(draw: Draw) -> Problem:
    params = {"move": draw(N, N), "emit": draw(N, 4)}
    return Problem(hmm_step, params, draw(N), draw(N), draw.integers(4, LONGEST))


STEPS: dict[str, Entry] = {
    "tanh": Entry(with_tanh_params(tanh_step)),
    "rnn": Entry(cell("rnn")),
    "gru": Entry(cell("gru")),
    "lstm": Entry(cell("lstm", 2)),
    "leaky_rnn": Entry(noisy_leaky_rnn),
    "two layers": Entry(two_layers),
    "lru": Entry(lru, linear=True),
    "min_gru": Entry(min_gru, linear=True),
    "diagonal": Entry(diagonal, linear=True),
    "leaky": Entry(with_tanh_params(leaky_step)),
    "relu orthogonal": Entry(relu_orthogonal),
    "complex": Entry(complex_state),
    "dict state, tokens": Entry(dict_state),
    "matrix state": Entry(matrix_state),
    "batch inside": Entry(batch_inside),
    "counter, flag, key": Entry(counter_and_key),
    "None leaf": Entry(none_leaf),
    "one number": Entry(one_number),
    "cond": Entry(with_tanh_params(cond_step)),
    "switch": Entry(switch),
    "while_loop": Entry(while_loop, pulls=False),
    "fori_loop": Entry(with_tanh_params(fori_step)),
    "inner scan": Entry(inner_scan),
    "checkpoint": Entry(with_tanh_params(jax.checkpoint(tanh_step))),
    "nested jit": Entry(with_tanh_params(jitted_step)),
    "stop_gradient": Entry(with_tanh_params(stopped_step)),
    "inner gradient": Entry(optimiser),
    "custom_jvp": Entry(lambda draw: _of_vectors(custom_jvp_step, draw, draw(N, N, scale=0.6))),
    "custom_vjp": Entry(spiking, pushes=False),
    "custom_gradient": Entry(lambda draw: _of_vectors(rounded_step, draw, draw(N, N, scale=0.6)), pushes=False),
    "closure_convert": Entry(lambda draw: _of_vectors(implicit_step, draw, draw(N, N, scale=0.6)), pushes=False),
    "partial": Entry(with_tanh_params(partial(scaled_step, scale=0.8))),
    "bound method": Entry(with_tanh_params(physics.step)),
    "equinox module": Entry(lambda draw: _of_vectors(module_step, draw, Module(draw(N, N, scale=0.6), 0.3))),
    "filter_jit": Entry(with_tanh_params(eqx.filter_jit(tanh_step))),
    "filter_checkpoint": Entry(with_tanh_params(eqx.filter_checkpoint(tanh_step))),
    "layers as time": Entry(layers_as_time),
    "keys as inputs": Entry(keys_as_inputs),
    "autonomous": Entry(autonomous),
    "zeros": Entry(zeros),
    "nilpotent": Entry(nilpotent),
    "faint": Entry(faint),
    "identity": Entry(identity),
    "dead first step": Entry(dead_first_step),
    "hidden Markov": Entry(hidden_markov),
    "thousands": Entry(thousands, large=True),
    "mixed precision": Entry(mixed_precision, tolerance=1e-2),
    "bfloat16": Entry(with_tanh_params(tanh_step), dtype="bfloat16"),
    "float16": Entry(cell("gru"), dtype="float16"),
}


# --- The atlas


def of_atlas(name: str) -> Callable[[Draw], Problem]:
    """A cell of N = 4 (heads and gates want an even number), its parameters moved from where they begin."""

    def make(draw: Draw) -> Problem:
        whole = bptt.cells.ATLAS[name].make(4, dtype=draw.dtype)
        begun = bptt.cells.ATLAS[name].make(4, dtype=jnp.float32).init(jax.random.key(0), I)
        params = jax.tree.map(lambda a: _moved(draw, 0.1, a), begun)
        states = [jax.tree.map(lambda a: _moved(draw, 0.5, a), whole.initial_state()) for _ in range(2)]
        return Problem(whole.step, params, *states, draw(LONGEST, I))

    return make


def _moved(draw: Draw, scale: float, a: Any) -> Any:
    if jnp.iscomplexobj(a):
        return jax.lax.complex(_moved(draw, scale, a.real), _moved(draw, scale, a.imag))
    if not jnp.issubdtype(a.dtype, jnp.floating):
        return a
    return draw.exactly(np.asarray(a, np.float64) + scale * np.asarray(draw(*a.shape), np.float64))


def is_linear(name: str) -> bool:
    return isinstance(bptt.cells.ATLAS[name].make(4).step, LinearStep)


CELLS: dict[str, Entry] = {
    name: Entry(of_atlas(name), linear=is_linear(name)) for name in bptt.cells.ATLAS if name not in STEPS
} | {
    f"{name} in bfloat16": Entry(of_atlas(name), dtype="bfloat16", linear=is_linear(name))
    for name in bptt.cells.ATLAS
    if takes_half(bptt.cells.ATLAS[name].make)
}
REGISTRY = STEPS | CELLS
