"""Cells of Equinox, Flax and Haiku as steps, against each library's own loop and own calls."""

import functools
import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles import Example, perturbation_gradients, relative_error

import bptt_jax as bptt

N, I, T = 3, 2, 4


class Case(NamedTuple):
    """A cell as a step, and the library's own ``unroll(params, h0, xs) -> (h_T, outputs [T, N])``."""

    step: bptt.Step
    params: Any
    state0: Any
    output: Callable[[Any], jax.Array]
    unroll: Callable[[Any, Any, jax.Array], tuple[Any, jax.Array]]
    call: Callable[[Any, Any, jax.Array], Any]


def drawn(tree: Any, dtype: Any, seed: int = 0) -> Any:
    """The tree with normal numbers for its floating leaves, drawn without compiling anything."""
    rng = np.random.default_rng(seed)

    def draw(a: Any) -> Any:
        floating = jnp.issubdtype(a.dtype, jnp.floating)
        return jnp.asarray(0.6 * rng.standard_normal(a.shape), dtype) if floating else a

    return jax.tree.map(draw, tree)


def itself(h: Any) -> Any:
    return h


def equinox_case(kind: str, dtype: Any) -> Case:
    make = getattr(eqx.nn, kind)
    cell = drawn(eqx.filter_eval_shape(make, I, N, key=jax.random.key(0), dtype=dtype), dtype)
    step, params = bptt.from_equinox(cell)
    lstm = kind == "LSTMCell"

    def unroll(cell: Any, h0: Any, xs: jax.Array) -> Any:
        outputs, h = [], h0
        for x in xs:
            h = cell(x, h)
            outputs.append(h[0] if lstm else h)
        return h, jnp.stack(outputs)

    state0 = drawn((jnp.zeros(N), jnp.zeros(N)) if lstm else jnp.zeros(N), dtype, 1)
    return Case(step, params, state0, lambda s: s[0] if lstm else s, unroll, lambda cell, h, x: cell(x, h))


def nnx_case(kind: str, dtype: Any) -> Case:
    make = getattr(nnx, kind)
    cell = nnx.eval_shape(lambda: make(I, N, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)))
    nnx.update(cell, drawn(nnx.state(cell, nnx.Param), dtype))
    step, params = bptt.from_nnx(nnx.RNN(cell) if kind == "GRUCell" else cell)
    graphdef, _ = nnx.split(cell)

    def unroll(params: Any, h0: Any, xs: jax.Array) -> Any:
        return nnx.RNN(nnx.merge(graphdef, params))(xs, initial_carry=h0, return_carry=True)

    lstm = "LSTM" in kind
    state0 = drawn((jnp.zeros(N), jnp.zeros(N)) if lstm else jnp.zeros(N), dtype, 1)
    return Case(
        step,
        params,
        state0,
        lambda s: s[1] if lstm else s,
        unroll,
        lambda params, h, x: nnx.merge(graphdef, params)(h, x)[0],
    )


def linen_case(kind: str, dtype: Any) -> Case:
    module = getattr(nn, kind)(N, dtype=dtype, param_dtype=dtype)
    lstm = "LSTM" in kind
    state0 = drawn((jnp.zeros(N), jnp.zeros(N)) if lstm else jnp.zeros(N), dtype, 1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), state0, jnp.zeros(I, dtype))
    step, params = bptt.from_linen(module, drawn(shapes, dtype))

    def unroll(params: Any, h0: Any, xs: jax.Array) -> Any:
        return nn.RNN(module).apply({"params": {"cell": params}}, xs, initial_carry=h0, return_carry=True)

    return Case(
        step,
        params,
        state0,
        lambda s: s[1] if lstm else s,
        unroll,
        lambda params, h, x: module.apply({"params": params}, h, x)[0],
    )


CORES = {
    "GRU": lambda: hk.GRU(N),
    "VanillaRNN": lambda: hk.VanillaRNN(N),
    "LSTM": lambda: hk.LSTM(N),
    "DeepRNN": lambda: hk.DeepRNN([hk.LSTM(2), jnp.tanh, hk.GRU(N)]),
}


def haiku_case(kind: str, dtype: Any) -> Case:
    make = CORES[kind]
    call = hk.without_apply_rng(hk.transform(lambda x, h: make()(x, h)))
    state0 = drawn(
        jax.eval_shape(lambda: hk.transform(lambda: make().initial_state(None)).apply({}, None)), dtype, 1
    )
    shapes = jax.eval_shape(
        hk.transform(lambda x, h: make()(x, h)).init, jax.random.key(0), jnp.zeros(I, dtype), state0
    )
    step, params = bptt.from_haiku(make, drawn(shapes, dtype))

    def unroll(params: Any, h0: Any, xs: jax.Array) -> Any:
        outputs, h = hk.without_apply_rng(hk.transform(lambda h: hk.dynamic_unroll(make(), xs, h))).apply(
            params, h0
        )
        return h, outputs

    output = {"LSTM": lambda s: s.hidden, "DeepRNN": lambda s: s[1]}.get(kind, itself)
    return Case(step, params, state0, output, unroll, lambda params, h, x: call.apply(params, x, h)[1])


CASES = {
    **{f"equinox {kind}": (equinox_case, kind) for kind in ("GRUCell", "LSTMCell")},
    **{f"nnx {kind}": (nnx_case, kind) for kind in ("GRUCell", "SimpleCell", "LSTMCell", "OptimizedLSTMCell")},
    **{
        f"linen {kind}": (linen_case, kind)
        for kind in ("GRUCell", "MGUCell", "SimpleCell", "LSTMCell", "OptimizedLSTMCell")
    },
    **{f"haiku {kind}": (haiku_case, kind) for kind in CORES},
}
SINGLE = ("equinox LSTMCell", "nnx LSTMCell", "linen GRUCell", "haiku LSTM")


@pytest.mark.parametrize(
    ("name", "double"), [*((name, True) for name in CASES), *((name, False) for name in SINGLE)]
)
def test_the_librarys_own_loop(name, double):
    """States and outputs, gradients of weights and of h_0, and every Jacobian."""
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else jnp.float32
        make, kind = CASES[name]
        case = make(kind, dtype)
        rng = np.random.default_rng(2)
        xs, weights = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((T, I), (T, N)))

        def loss(h: Any, outputs: jax.Array) -> jax.Array:
            return jnp.sum(weights * outputs) + sum(jnp.sum(jnp.square(a)) for a in jax.tree.leaves(h))

        def ours(params: Any, h0: Any) -> Any:
            states = bptt.unroll(case.step, params, h0, xs)
            last, outputs = jax.tree.map(lambda a: a[-1], states), case.output(states)
            return loss(last, outputs), (last, outputs, states)

        def theirs(params: Any, h0: Any) -> Any:
            last, outputs = case.unroll(params, h0, xs)
            return loss(last, outputs), (last, outputs)

        def call(v: jax.Array, params: Any, x: jax.Array) -> jax.Array:
            return bptt.ravel_state(case.call(params, bptt.ravel_state(case.state0)[1](v), x))[0]

        @jax.jit
        def both(params: Any, h0: Any) -> Any:
            (_, (*values, states)), gradients = jax.value_and_grad(ours, (0, 1), has_aux=True)(params, h0)
            (_, expected), expected_gradients = jax.value_and_grad(theirs, (0, 1), has_aux=True)(params, h0)
            starts = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b[:-1]]), h0, states)
            vectors = jax.vmap(lambda h: bptt.ravel_state(h)[0])(starts)
            jacobians = bptt.jacobians(case.step, params, h0, xs)
            expected_jacobians = jax.vmap(jax.jacrev(call), (0, None, 0))(vectors, params, xs)
            return (values, gradients, jacobians), (list(expected), expected_gradients, expected_jacobians)

        got, expected = both(case.params, case.state0)
        tolerance = 1e-12 if double else 1e-5
        for a, b in zip(got, expected, strict=True):
            assert {leaf.dtype for leaf in jax.tree.leaves((a, b))} == {jnp.dtype(dtype)}
            assert relative_error(a, b) < tolerance


class Leaky(eqx.Module):
    """A cell of one's own: a static field, an integer array, a nested module."""

    linear: eqx.nn.Linear
    order: jax.Array
    rate: float = eqx.field(static=True)

    def __call__(self, x, h):
        return self.rate * h + jnp.tanh(self.linear(jnp.concatenate([h, x]))[self.order])


@pytest.fixture(scope="module")
def leaky():
    shapes = eqx.filter_eval_shape(eqx.nn.Linear, 5, 3, key=jax.random.key(0))
    return Leaky(drawn(shapes, jnp.float32), jnp.asarray([2, 0, 1]), 0.5)


def test_parameters_are_the_floating_arrays(leaky):
    step, params = bptt.from_equinox(leaky)
    assert params.order is None
    assert len(jax.tree.leaves(params)) == 2
    new = step(params, jnp.ones(3), jnp.ones(2))
    np.testing.assert_allclose(new, leaky(jnp.ones(2), jnp.ones(3)), rtol=1e-6)


def test_gradients_fit_optax_and_equinox(leaky):
    """One step of gradient descent through `adjoints` lowers the loss that Equinox's own gradient belongs to."""
    step, params = bptt.from_equinox(leaky)
    h0, xs = jnp.zeros(3), jnp.ones((4, 2))

    def loss(states):
        return jnp.sum(jnp.square(states[-1] - 0.3))

    got = bptt.adjoints(step, params, h0, xs, loss)

    def value(module):
        h = h0
        for x in xs:
            h = module(x, h)
        return jnp.sum(jnp.square(h - 0.3))

    before, expected = eqx.filter_jit(eqx.filter_value_and_grad(value))(leaky)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got.params_grad, expected)
    optimiser = optax.sgd(0.01)
    updates, _ = optimiser.update(got.params_grad, optimiser.init(params))
    after = bptt.adjoints(step, eqx.apply_updates(params, updates), h0, xs, loss)
    np.testing.assert_allclose(got.loss, before, rtol=1e-5)
    assert after.loss < got.loss


def nnx_cell(make: Callable[..., nnx.Module]) -> nnx.Module:
    cell = nnx.eval_shape(lambda: make(I, N, rngs=nnx.Rngs(0)))
    nnx.update(cell, drawn(nnx.state(cell, nnx.Param), jnp.float32))
    return cell


def test_nnx_parameters_are_a_copy_and_go_back():
    """What is written to the cell later is not seen, and what an optimiser made of the parameters goes back."""
    cell = nnx_cell(nnx.SimpleCell)
    h, x = jnp.full(N, 0.1), jnp.ones(I)
    step, params = bptt.from_nnx(cell)
    before = step(params, h, x)
    np.testing.assert_allclose(before, cell(h, x)[0], rtol=1e-6)
    nnx.update(cell, jax.tree.map(lambda a: 2 * a, params))
    assert relative_error(cell(h, x)[0], before) > 0.1
    np.testing.assert_array_equal(step(params, h, x), before)
    nnx.update(cell, params)
    np.testing.assert_allclose(cell(h, x)[0], before, rtol=1e-6)


class LinenDropout(nn.Module):
    @nn.compact
    def __call__(self, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return nn.SimpleCell(N)(nn.Dropout(0.5, deterministic=False)(h), x)


class HaikuDropout(hk.RNNCore):
    def __call__(self, x: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        return hk.GRU(N)(x, hk.dropout(hk.next_rng_key(), 0.5, h))

    def initial_state(self, batch_size: int | None) -> jax.Array:
        return jnp.zeros(N)


class EquinoxDropout(eqx.Module):
    dropout: eqx.nn.Dropout

    def __call__(self, x: jax.Array, h: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return jnp.tanh(self.dropout(h, key=key) + x[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: bptt.from_linen(LinenDropout(), {"params": {}}),
        lambda: bptt.from_haiku(lambda: HaikuDropout(), {}),
        lambda: bptt.from_equinox(EquinoxDropout(eqx.nn.Dropout(0.5))),
    ],
    ids=["linen", "haiku", "equinox"],
)
def test_a_cell_that_draws_without_a_key_is_told_where_it_comes_from(make):
    """The libraries recommend to give one to their own functions, which a step does not call."""
    step, params = make()
    with pytest.raises(Exception, match=r"PRNG|requires a key") as raised:
        step(params, jnp.zeros(N), jnp.ones(I))
    assert "the key of each instant with its input, x = (x, key)" in " ".join(raised.value.__notes__)


class Counting(nnx.Module):
    """Remembers outside of its variables, which JAX does not see."""

    def __init__(self, inputs: int, hidden: int, *, rngs: nnx.Rngs):
        self.cell, self.calls = nnx.SimpleCell(inputs, hidden, rngs=rngs), 0

    def __call__(self, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        self.calls += 1
        return self.cell(h, self.calls * x)


class Sowing(nnx.Module):
    def __init__(self, inputs: int, hidden: int, *, rngs: nnx.Rngs):
        self.cell = nnx.SimpleCell(inputs, hidden, rngs=rngs)

    def __call__(self, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        self.sow(nnx.Intermediate, "inputs", x)
        return self.cell(h, x)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_what_a_cell_remembers_and_what_it_only_reports():
    h, x = jnp.full(N, 0.3), jnp.ones(I)
    counting = Counting(I, N, rngs=nnx.Rngs(0))
    step, params = bptt.from_nnx(counting)
    with pytest.raises(ValueError, match=r"changes its attribute calls; make .* a part of the carry"):
        step(params, h, x)
    sowing = nnx_cell(Sowing)
    for calls in range(2):  # what is sown already is none of the variables that it writes to
        step, params = bptt.from_nnx(sowing)
        assert jax.tree.structure(params) == jax.tree.structure(nnx.state(sowing, nnx.Param))
        np.testing.assert_array_equal(step(params, h, x), sowing.cell(h, x)[0])
        assert len(jax.tree.leaves(nnx.state(sowing, nnx.Intermediate))) == calls
        sowing(h, x)


def normalised(a: jax.Array, gain: jax.Array, bias: jax.Array) -> jax.Array:
    """Layer normalisation (Ba, Kiros, Hinton 2016, arXiv:1607.06450, eq. 3), Flax's epsilon inside the root."""
    centred = a - jnp.mean(a)
    return gain * centred / jnp.sqrt(jnp.mean(jnp.square(centred)) + 1e-6) + bias


class Normalised(nnx.Module):
    """A layer-normalised cell with recurrent dropout: a key with every input."""

    def __init__(self, inputs: int, hidden: int, *, rate: float = 0.4, rngs: nnx.Rngs):
        self.recurrent = nnx.Linear(hidden, hidden, use_bias=False, rngs=rngs)
        self.input = nnx.Linear(inputs, hidden, use_bias=False, rngs=rngs)
        self.norm = nnx.LayerNorm(hidden, rngs=rngs)
        self.dropout = nnx.Dropout(rate)

    def __call__(self, h: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        x, key = inputs
        h = jnp.tanh(self.norm(self.recurrent(self.dropout(h, rngs=key)) + self.input(x)))
        return h, h


def test_dropout_and_layer_normalisation():
    """A key per step in xs: each step drops what its own key says, forward and backward."""
    step, params = bptt.from_nnx(nnx_cell(Normalised))
    steps = 8
    xs = jnp.asarray(np.random.default_rng(3).standard_normal((steps, I)), jnp.float32)
    h0 = jnp.full(N, 0.3)

    def plain_step(params: Any, h: jax.Array, inputs: Any) -> jax.Array:
        x, mask = inputs
        recurrent, inner = (params[name]["kernel"][...] for name in ("recurrent", "input"))
        a = (mask * h / 0.6) @ recurrent + x @ inner
        return jnp.tanh(normalised(a, params["norm"]["scale"][...], params["norm"]["bias"][...]))

    def loss(states: jax.Array) -> jax.Array:
        return jnp.sum(states[-1] * jnp.arange(1.0, N + 1))

    @jax.jit
    def results(keys: jax.Array, raw: jax.Array) -> Any:
        masks = jax.vmap(lambda key: jax.random.bernoulli(key, 0.6, (N,)).astype(float))(keys)
        plain = Example(plain_step, params, h0, (xs, masks))
        flow = bptt.gradient_flow(step, params, h0, (xs, keys), loss, stride=steps)
        pairs = [
            (bptt.jacobians(step, params, h0, (xs, keys)), bptt.jacobians(*plain[:4])),
            (bptt.unroll(step, params, h0, (xs, raw), remat=3), bptt.unroll(*plain[:4])),
            (bptt.adjoints(step, params, h0, (xs, keys), loss).params_grad, perturbation_gradients(plain, loss)[0]),
        ]
        return masks, flow.products.log_norms, pairs

    raw = jax.random.split(jax.random.PRNGKey(5), steps)
    masks, log_norms, pairs = results(jax.random.wrap_key_data(raw), raw)
    assert set(np.ravel(masks).tolist()) == {0.0, 1.0}
    for got, expected in pairs:
        assert relative_error(got, expected) < 1e-4
    product = np.eye(N)
    for jacobian, log_norm in zip(np.float64(pairs[0][1])[::-1], log_norms[::-1], strict=True):
        product = product @ jacobian
        np.testing.assert_allclose(log_norm, np.log(np.linalg.norm(product, 2)), atol=1e-3)


class Undecided(nnx.Module):
    """Draws from a stream of its own, which no step can."""

    def __init__(self, inputs: int, hidden: int, *, rngs: nnx.Rngs):
        self.cell = nnx.SimpleCell(inputs, hidden, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.cell(self.dropout(h), x)


def test_a_cell_that_changes_itself():
    cell = Undecided(I, N, rngs=nnx.Rngs(0))
    step, params = bptt.from_nnx(cell)
    with pytest.raises(
        ValueError, match=r"cell: expected no call .* writes to .*rngs.*count.*; switch it by cell.eval"
    ):
        bptt.unroll(step, params, jnp.zeros(N), jnp.ones((T, I)))
    assert cell.dropout.rngs.count[...] == 0
    cell.eval()
    step, params = bptt.from_nnx(cell)
    h, x = jnp.full(N, 0.3), jnp.ones(I)
    np.testing.assert_array_equal(step(params, h, x), cell.cell(h, x)[0])


class Scaled(nn.Module):
    """A Linen cell with a collection beside its parameters, and dropout by a key among its inputs."""

    @nn.compact
    def __call__(self, h: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
        x, key = inputs
        scale = self.variable("constants", "scale", jnp.ones, N)
        h = nn.Dropout(0.5, deterministic=False)(h, rng=key)
        return jnp.tanh(scale.value * nn.Dense(N)(h) + jnp.sum(x)), None


def test_linen_collections_and_keys():
    variables = {
        "constants": {"scale": jnp.arange(1.0, N + 1)},
        "params": {"Dense_0": {"kernel": jnp.eye(N), "bias": jnp.zeros(N)}},
    }
    step, params = bptt.from_linen(Scaled(), variables)
    assert params is variables["params"]
    key, h, x = jax.random.key(2), jnp.full(N, 0.1), jnp.zeros(I)
    mask = np.asarray(jax.random.bernoulli(key, 0.5, (N,)))
    assert 0 < np.sum(mask) < N
    np.testing.assert_allclose(step(params, h, (x, key)), np.tanh(np.arange(1, N + 1) * 0.2 * mask), rtol=1e-6)


def test_haiku_finds_its_own_among_the_parameters_of_a_network():
    def network(x: jax.Array, h: Any) -> Any:
        hk.Linear(1)(x)
        hk.GRU(N)(x, h)
        return hk.GRU(N)(x, h)[1]

    transformed = hk.without_apply_rng(hk.transform(network))
    x, h = jnp.ones(I), jnp.full(N, 0.2)
    params = drawn(jax.eval_shape(transformed.init, jax.random.key(0), x, h), jnp.float32)
    assert set(params) == {"linear", "gru", "gru_1"}
    step, same = bptt.from_haiku(lambda: hk.GRU(N, name="gru_1"), params)
    assert same is params
    np.testing.assert_allclose(step(params, h, x), transformed.apply(params, x, h), rtol=1e-6)
    step, _ = bptt.from_haiku(lambda: hk.GRU(N, name="other"), params)
    with pytest.raises(ValueError, match="'w_i' for module 'other'"):
        step(params, h, x)


class Centred(hk.RNNCore):
    """With a mean in Haiku's state, which it reads and, in training, sets."""

    def __init__(self, training: bool):
        super().__init__(name="centred")
        self.training = training

    def __call__(self, x: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean = hk.get_state("mean", (I,), init=jnp.zeros)
        if self.training:
            hk.set_state("mean", 0.9 * mean + 0.1 * x)
        return hk.GRU(N)(x - mean, h)

    def initial_state(self, batch_size: int | None) -> jax.Array:
        return jnp.zeros(N)


def test_state_of_haiku_stays_and_is_not_set():
    x, h = jnp.arange(1.0, I + 1), jnp.full(N, 0.2)
    transformed = hk.transform_with_state(lambda x, h, training: Centred(training)(x, h))
    shapes = jax.eval_shape(lambda key: transformed.init(key, x, h, True), jax.random.key(0))
    params, state = drawn(shapes, jnp.float32)
    step, same = bptt.from_haiku(lambda: Centred(False), (params, state))
    assert same is params
    np.testing.assert_allclose(
        step(params, h, x), transformed.apply(params, state, None, x, h, False)[0][1], rtol=1e-6
    )
    step, _ = bptt.from_haiku(lambda: Centred(True), (params, state))
    with pytest.raises(ValueError, match="sets no state of Haiku's, got one that sets centred/mean"):
        step(params, h, x)
    with pytest.raises(TypeError, match="params: expected a mapping of Haiku's parameters"):
        bptt.from_haiku(lambda: Centred(False), (params, None))


def advanced(h: jax.Array, x: jax.Array) -> jax.Array:
    """A state of one's own; with arguments exchanged it runs as well, and gives another."""
    return jnp.tanh(0.5 * h - jnp.sum(x * jnp.arange(1.0, x.size + 1)))


def own_nnx(first: str, second: str, state: int, result: Callable[[Any, Any], Any] = lambda h, y: (h, y)) -> Any:
    """A module called with arguments of these names, of which the one at the place `state` is the state."""

    def call(self: Any, *both: jax.Array) -> Any:
        h, x = both if state == 0 else both[::-1]
        if x.shape[0] > h.shape[0]:
            raise ValueError("the input is too long")
        new = advanced(h, x)
        pair = result(new, -new)
        return pair if state == 0 or not isinstance(pair, tuple) else pair[::-1]

    names = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", first, second)]
    call.__signature__ = inspect.Signature(names)
    return type("Own", (nnx.Module,), {"__call__": call})()


TOLD = [
    *(
        ("carry", "x", 0),
        ("h", "inputs", 0),
        ("hidden", "a", 0),
        ("a", "input", 0),
        ("V", "x", 0),
        ("h_prev", "x_t", 0),
    ),
    *(
        ("x", "h", 1),
        ("inputs", "prev_state", 1),
        ("x", "VT", 1),
        ("obs", "core_state", 1),
        ("u", "state", 1),
        ("x1", "h0", 1),
    ),
]
UNTOLD = [("a", "b"), ("x", "u"), ("x", "t"), ("h", "state"), ("x", "inputs"), ("input_state", "x"), ("v", "a")]
H0, XS = np.asarray([0.1, -0.2, 0.3], np.float32), np.asarray([[1.0, 0.5, -0.3]], np.float32)


@pytest.mark.parametrize(("first", "second", "state"), TOLD)
def test_the_names_of_the_arguments_tell_the_order(first, second, state):
    for result in (lambda h, y: (h, y), lambda h, y: h):
        step, params = bptt.from_nnx(own_nnx(first, second, state, result))
        np.testing.assert_allclose(step(params, H0, XS[0]), advanced(H0, XS[0]), rtol=1e-6)


@pytest.mark.parametrize(("first", "second"), UNTOLD)
@pytest.mark.parametrize("state", [0, 1])
def test_where_the_names_do_not_tell(first, second, state):
    """The shapes do; where they are alike the call is refused, with the way out, until `order` says it."""
    cell = own_nnx(first, second, state)
    step, params = bptt.from_nnx(cell)
    np.testing.assert_allclose(step(params, H0, XS[0, :2]), advanced(H0, XS[0, :2]), rtol=1e-6)
    with pytest.raises(
        ValueError, match=r'cell: expected a call that tells .*; give order="state first" or order="inp'
    ):
        bptt.unroll(step, params, H0, XS)
    step, params = bptt.from_nnx(cell, order=("state first", "input first")[state])
    np.testing.assert_allclose(bptt.unroll(step, params, H0, XS)[0], advanced(H0, XS[0]), rtol=1e-6)


def test_an_order_that_is_none():
    for make in (
        lambda order: bptt.from_nnx(own_nnx("h", "x", 0), order=order),
        lambda order: bptt.from_equinox(InputFirst(jnp.eye(N)), order=order),
        lambda order: bptt.from_linen(LinenInputFirst(), {"params": {}}, order=order),
        lambda order: bptt.from_haiku(lambda: HaikuStateFirst(), {}, order=order),
    ):
        with pytest.raises(ValueError, match="order: expected 'state first' or 'input first', got 'state'"):
            make("state")


def test_a_pair_whose_entries_are_told_by_their_shapes():
    """A state that comes back at the other place than it went."""
    cell = own_nnx("x", "h", 1, lambda h, y: (y[:2], h))
    step, params = bptt.from_nnx(cell)
    np.testing.assert_allclose(step(params, H0, XS[0]), advanced(H0, XS[0]), rtol=1e-6)
    never = own_nnx("x", "h", 1, lambda h, y: (h[:1], y[:2]))
    with pytest.raises(ValueError, match=r"step: must keep the shape of state, \[3\], got \[1\]"):
        bptt.unroll(*bptt.from_nnx(never), H0, XS)


class InputFirst(eqx.Module):
    """In the manner of Haiku and Spyx; a state that it can make itself is no less a state."""

    weight: jax.Array
    rate: float = eqx.field(static=True, default=0.5)

    def __call__(self, x: jax.Array, state: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        h = self.advance(jnp.zeros(N) if state is None else state, x)
        return 2 * h, h

    def advance(self, state: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.weight @ state - self.rate * x)


class LinenInputFirst(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(self.param("weight", nn.initializers.ones, (N, N)) @ state - 0.5 * x)
        return 2 * h, h


class HaikuStateFirst(hk.Module):
    def __call__(self, state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(hk.get_parameter("weight", (N, N), init=jnp.ones) @ state - 0.5 * x)
        return h, 2 * h


def test_modules_called_in_the_other_order():
    """State and input of one shape: Equinox with a pair or by a method, Linen and Haiku the other way round."""
    w = jnp.asarray(np.random.default_rng(5).standard_normal((N, N)), jnp.float32)
    cell = InputFirst(w)
    expected = cell.advance(H0, XS[0])
    for step, params in (
        bptt.from_equinox(cell, order="input first"),
        bptt.from_equinox(cell.advance),
        bptt.from_linen(LinenInputFirst(), {"params": {"weight": w}}),
        bptt.from_haiku(lambda: HaikuStateFirst(name="core"), {"core": {"weight": w}}),
    ):
        got, pull = jax.vjp(lambda p, step=step: step(p, H0, XS[0]), params)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        (gradient,) = jax.tree.leaves(pull(jnp.ones(N)))
        np.testing.assert_allclose(
            gradient, jax.grad(lambda w: jnp.sum(InputFirst(w).advance(H0, XS[0])))(w), rtol=1e-6
        )


class Read(eqx.Module):
    """Its new state, and a readout as wide, at any of two places."""

    outputs: int
    first: bool

    def __call__(self, x: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = advanced(h, x)
        pair = h, 2 * h[: self.outputs]
        return pair if self.first else pair[::-1]


@pytest.mark.parametrize("first", [True, False])
def test_a_pair_of_equinox_that_could_be_either_way(first):
    """It was its second that was taken, the readout for the state."""
    step, params = bptt.from_equinox(Read(N, first))
    with pytest.raises(ValueError, match=r'got two alike; with order="input first" it is the second'):
        bptt.unroll(step, params, H0, XS)
    for step, params in (
        bptt.from_equinox(Read(N - 1, first)),
        *([] if first else [bptt.from_equinox(Read(N, first), order="input first")]),
    ):
        np.testing.assert_allclose(bptt.unroll(step, params, H0, XS)[0], advanced(H0, XS[0]), rtol=1e-6)


# Steps as people have them, of params, state and input with 3 numbers each.


def plain(params: jax.Array, h: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(params * h + jnp.roll(h, 1) - x)


class Simulator:
    def __init__(self, rate: float):
        self.rate = rate

    def step(self, params: Any, h: jax.Array, x: jax.Array) -> jax.Array:
        return self.rate * plain(params, h, x)


class Rates(eqx.Module):
    weight: jax.Array
    rate: float = eqx.field(static=True)
    activation: Callable[[jax.Array], jax.Array] = eqx.field(static=True)

    def __call__(self, h: jax.Array, x: jax.Array) -> jax.Array:
        return self.rate * self.activation(self.weight * h + jnp.roll(h, 1) - x)


@jax.custom_gradient
def surrogate(v: jax.Array) -> Any:
    return jnp.heaviside(v, 0.0), lambda g: (g / jnp.square(1 + 10 * jnp.abs(v)),)


@eqx.filter_custom_vjp
def saturating(v: jax.Array, slope: float) -> jax.Array:
    return jnp.tanh(slope * v)


@saturating.def_fwd
def _(perturbed: Any, v: jax.Array, slope: float) -> Any:
    y = jnp.tanh(slope * v)
    return y, y


@saturating.def_bwd
def _(y: jax.Array, g: jax.Array, perturbed: Any, v: jax.Array, slope: float) -> Any:
    return g * slope * (1 - y * y)


@eqx.filter_custom_jvp
def bent(v: jax.Array) -> jax.Array:
    return jnp.tanh(v)


@bent.def_jvp
def _(primals: Any, tangents: Any) -> Any:
    (v,), (t,) = primals, tangents
    return jnp.tanh(v), None if t is None else 0.5 * t


def converted(params: Any, h: jax.Array, x: jax.Array) -> jax.Array:
    """In the manner of differential-equation solvers: what a vector field closes over is made an argument."""
    field, constants = jax.closure_convert(lambda h: plain(params, h, x) - h, h)

    @jax.custom_vjp
    def move(h: jax.Array, constants: Any) -> jax.Array:
        return h + 0.1 * field(h, *constants)

    def forward(h: jax.Array, constants: Any) -> Any:
        return jax.vjp(lambda h, constants: h + 0.1 * field(h, *constants), h, constants)

    move.defvjp(forward, lambda pull, g: pull(g))
    return move(h, constants)


def tsit5(params: jax.Array, h: jax.Array, x: jax.Array) -> jax.Array:
    diffrax = pytest.importorskip("diffrax")
    term = diffrax.ODETerm(lambda t, h, args: plain(args[0], h, args[1]) - h)
    solver = diffrax.Tsit5()
    memory = solver.init(term, 0.0, 0.1, h, (params, x))
    return solver.step(term, 0.0, 0.1, h, (params, x), memory, made_jump=False)[0]


RATE = np.asarray([0.9, -0.4, 0.5], np.float32)
STEPS: dict[str, tuple[Any, Any]] = {
    "jit": (jax.jit(plain), RATE),
    "filter_jit": (eqx.filter_jit(plain), RATE),
    "filter_checkpoint": (eqx.filter_checkpoint(plain), RATE),
    "filter_vmap": (eqx.filter_vmap(lambda p, h, x: jnp.tanh(p * h - x)), RATE),
    "filter_closure_convert": (eqx.filter_closure_convert(plain, jnp.asarray(RATE), jnp.asarray(H0), XS[0]), RATE),
    "functools.partial": (functools.partial(lambda rate, *given: rate * plain(*given), 0.9), RATE),
    "partial of an array": (functools.partial(lambda a, *given: a * plain(*given), jnp.float32(0.9)), RATE),
    "Partial": (jax.tree_util.Partial(lambda a, *given: a * plain(*given), jnp.float32(0.9)), RATE),
    "bound method": (Simulator(0.9).step, RATE),
    "method of a module": (Rates.__call__, Rates(jnp.asarray(RATE), 0.9, jnp.tanh)),
    "filtered method": (eqx.filter_jit(Rates.__call__), Rates(jnp.asarray(RATE), 0.9, jnp.tanh)),
    "module as params": (lambda module, h, x: module(h, x), Rates(jnp.asarray(RATE), 0.9, jnp.sin)),
    "filter_custom_jvp": (lambda p, h, x: bent(p * h + jnp.roll(h, 1) - x), RATE),
    "filter_custom_vjp": (lambda p, h, x: saturating(p * h + jnp.roll(h, 1) - x, 0.8), RATE),
    "custom_gradient": (lambda p, h, x: p * h - jnp.roll(surrogate(h - x), 1), RATE),
    "closure_convert": (converted, RATE),
    "diffrax Tsit5": (tsit5, RATE),
}


def quadratic(states: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(states[-1] + 0.1 * states[0]))


@pytest.mark.parametrize("name", STEPS)
def test_steps_as_people_have_them(name):
    """States, Jacobians and gradients against a Python loop and `jax.grad` over it."""
    step, params = STEPS[name]
    xs = jnp.asarray(np.random.default_rng(6).standard_normal((2, 3)), jnp.float32)

    def by_hand(params: Any, h: Any) -> Any:
        states = []
        for x in xs:
            h = step(params, h, x)
            states.append(h)
        return quadratic(jnp.stack(states)), jnp.stack(states)

    @jax.jit
    def expected(params: Any, h0: Any) -> Any:
        (loss, states), gradients = jax.value_and_grad(by_hand, (0, 1), has_aux=True)(params, h0)
        starts = jnp.concatenate([h0[None], states[:-1]])
        jacobians = jax.vmap(lambda h, x: jax.jacrev(lambda h: step(params, h, x))(h))(starts, xs)
        return (loss, states, *gradients), jacobians

    of_loss, jacobians = expected(params, jnp.asarray(H0))
    found = bptt.adjoints(step, params, H0, xs, quadratic)
    chex.assert_trees_all_close(
        (found.loss, found.states, found.params_grad, found.state0_grad),
        of_loss,
        rtol=1e-5,
        atol=1e-6,
    )
    chex.assert_trees_all_close(bptt.jacobians(step, params, H0, xs), jacobians, rtol=1e-5, atol=1e-6)


def test_a_function_without_a_hash_is_compiled_once(compilations):
    """It is looked up as itself: the same object is no new function, and another is."""
    step = eqx.filter_vmap(lambda p, h, x: jnp.tanh(p * h - x))
    bptt.jacobians(step, RATE, H0, XS)
    compilations.clear()
    bptt.jacobians(step, RATE, H0, XS)
    assert compilations == []
    other = eqx.filter_vmap(lambda p, h, x: p * h)
    np.testing.assert_array_equal(bptt.jacobians(other, RATE, H0, XS)[0], np.diag(RATE))


def test_what_holds_arrays_and_has_no_hash_is_refused():
    """They would be constants, without a gradient."""
    module = InputFirst(jnp.eye(N))
    for step in (module, module.advance, eqx.filter_vmap(module)):
        with pytest.raises(TypeError, match=r"step: expected a hashable function.*bptt_jax\.from_equinox"):
            bptt.unroll(step, None, H0, XS)
    with pytest.raises(TypeError, match=r"params\.activation: expected an array .*; equinox\.partition\(module"):
        bptt.unroll(plain, eqx.nn.MLP(1, 1, 1, 1, key=jax.random.key(0)), H0, XS)


def spyx_loop(module: Any, params: Any, h: Any, xs: jax.Array) -> Any:
    graphdef, _ = nnx.split(module)
    states = []
    for x in xs:
        _, h = nnx.merge(graphdef, params)(x, h)
        states.append(h)
    return jax.tree.map(lambda *a: jnp.stack(a), *states)


@pytest.mark.parametrize("kind", ["IF", "LIF", "ALIF", "CuBaLIF", "RLIF", "LI", "Sequential"])
def test_spyx(kind):
    """Called as ``cell(x, V)``, with V as large as x, and a surrogate for the derivative of its spikes."""
    spyx = pytest.importorskip("spyx")

    def make(rngs: nnx.Rngs) -> Any:
        if kind == "Sequential":
            return spyx.nn.Sequential(
                nnx.Linear(I, N, rngs=rngs), spyx.nn.LIF((N,), rngs=rngs), spyx.nn.LI((N,), rngs=rngs)
            )
        return getattr(spyx.nn, kind)((N,), rngs=rngs)

    module = make(nnx.Rngs(0))
    nnx.update(module, drawn(nnx.state(module, nnx.Param), jnp.float32))
    step, params = bptt.from_nnx(module)
    h0 = jax.tree.map(lambda a: a[0], module.initial_state(1))
    size = I if kind == "Sequential" else N
    xs = jnp.asarray(2 * np.random.default_rng(4).standard_normal((T, size)), jnp.float32)

    def loss(states: Any) -> jax.Array:
        return sum(jnp.sum(jnp.square(a)) for a in jax.tree.leaves(states))

    expected = jax.jit(jax.value_and_grad(lambda p, h: loss(spyx_loop(module, p, h, xs)), (0, 1)))(params, h0)
    found = bptt.adjoints(step, params, h0, xs, loss)
    chex.assert_trees_all_close(
        (found.loss, (found.params_grad, found.state0_grad)), expected, rtol=1e-4, atol=1e-5
    )


def test_what_is_no_equinox_cell():
    linear = eqx.filter_eval_shape(eqx.nn.Linear, I, N, key=jax.random.key(0))
    for wrong in (lambda x, h: h, jnp.tanh, 3, eqx.nn.GRUCell, linear):
        with pytest.raises(TypeError, match=r"cell: expected an equinox.Module called as cell\(x, h\), got "):
            bptt.from_equinox(wrong)


class Triple(nnx.Module):
    """Called as a cell, but what it returns is none."""

    def __init__(self, inputs: int, hidden: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(inputs, hidden, rngs=rngs)

    def __call__(self, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return h, h, self.linear(x)


def test_what_is_no_nnx_cell():
    linear = nnx_cell(nnx.Linear)
    for wrong in (lambda h, x: (h, h), 3, nnx.GRUCell, linear, nn.GRUCell(N), nnx.RNN(linear)):
        with pytest.raises(TypeError, match=r"cell: expected an nnx.Module called as cell\(carry, x\), got "):
            bptt.from_nnx(wrong)
    with pytest.raises(ValueError, match=r"cell: expected an nnx\.RNN that runs forwards"):
        bptt.from_nnx(nnx.RNN(nnx_cell(nnx.SimpleCell), reverse=True))

    class Own(nnx.RNN):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return 2 * super().__call__(*arguments, **options)

    with pytest.raises(TypeError, match=r"cell: expected the call of nnx\.RNN, got Own, which has one of its own"):
        bptt.from_nnx(Own(nnx_cell(nnx.SimpleCell)))
    step, params = bptt.from_nnx(nnx_cell(Triple))
    with pytest.raises(
        TypeError, match=r"cell: expected a cell that returns \(carry, output\), or the state alone, got tuple"
    ) as caught:
        bptt.unroll(step, params, jnp.ones(N), jnp.ones((T, I)))
    assert "raised by step" in caught.value.__notes__[0]


def test_what_is_no_linen_cell():
    for wrong in (nn.GRUCell, nn.Dense(N), nn.RNN(nn.GRUCell(N)), 3, nnx_cell(nnx.SimpleCell)):
        with pytest.raises(TypeError, match=r"module: expected a linen.Module called as module\(carry, x\), got "):
            bptt.from_linen(wrong, {"params": {}})
    with pytest.raises(TypeError, match=r"got RNN; give its cell, with the cell's part of the variables"):
        bptt.from_linen(nn.RNN(nn.GRUCell(N)), {"params": {}})
    with pytest.raises(TypeError, match=r"variables: expected what module\.init returns, got NoneType"):
        bptt.from_linen(nn.GRUCell(N), None)
    with pytest.raises(ValueError, match=r"""variables: expected a collection "params", got \['hn', 'hr'\]"""):
        bptt.from_linen(nn.GRUCell(N), {"hn": {}, "hr": {}})


def test_what_is_no_haiku_core():
    for wrong in (hk.LSTM, hk.transform(lambda x: x), None, lambda: hk.Linear(N), lambda: 3, lambda: hk.LSTM):
        with pytest.raises(
            TypeError, match=r"make: expected a function that returns a core called as core\(x, state"
        ):
            bptt.from_haiku(wrong, {})
    with pytest.raises(
        TypeError, match="params: expected a mapping of Haiku's parameters by module name, got NoneType"
    ):
        bptt.from_haiku(CORES["LSTM"], None)


@pytest.mark.parametrize(
    ("function", "module", "command"),
    [("from_nnx", "flax", "flax"), ("from_linen", "flax", "flax"), ("from_haiku", "haiku", "dm-haiku")],
)
def test_a_missing_library(function, module, command, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    arguments = (None,) if function == "from_nnx" else (None, None)
    with pytest.raises(ImportError, match=rf"^{function} needs \w+: python -m pip install {command}$"):
        getattr(bptt, function)(*arguments)


def test_no_library_is_imported_before_it_is_used():
    dear = "{'equinox', 'flax', 'haiku', 'optax', 'matplotlib', 'scipy.linalg', 'torch', 'keras'}"
    code = f"import sys, bptt_jax; bptt_jax.from_haiku; print({dear} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_step_itself_is_told_about_the_adapter(leaky):
    """An Equinox module as a step cannot be looked up again; the message says what can."""
    with pytest.raises(TypeError, match=r"bptt_jax\.from_equinox"):
        bptt.unroll(leaky, None, jnp.zeros(3), jnp.ones((4, 2)))
