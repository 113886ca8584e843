"""Cells of Equinox, Flax and Haiku as steps, against each library's own loop and own calls."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

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


def test_what_is_no_equinox_cell():
    linear = eqx.filter_eval_shape(eqx.nn.Linear, I, N, key=jax.random.key(0))
    for wrong in (lambda x, h: h, jnp.tanh, 3, eqx.nn.GRUCell, linear):
        with pytest.raises(TypeError, match=r"cell: expected an equinox.Module called as cell\(x, h\), got "):
            bptt.from_equinox(wrong)


class Mixing(nnx.Module):
    """Called as a cell, but it returns no pair."""

    def __init__(self, inputs: int, hidden: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(inputs, hidden, rngs=rngs)

    def __call__(self, h: jax.Array, x: jax.Array) -> jax.Array:
        return h + self.linear(x)


def test_what_is_no_nnx_cell():
    linear = nnx_cell(nnx.Linear)
    for wrong in (lambda h, x: (h, h), 3, nnx.GRUCell, linear, nn.GRUCell(N), nnx.RNN(linear)):
        with pytest.raises(TypeError, match=r"cell: expected an nnx.Module called as cell\(carry, x\), got "):
            bptt.from_nnx(wrong)
    with pytest.raises(ValueError, match=r"cell: expected an nnx\.RNN that runs forwards"):
        bptt.from_nnx(nnx.RNN(nnx_cell(nnx.SimpleCell), reverse=True))
    step, params = bptt.from_nnx(nnx_cell(Mixing))
    with pytest.raises(TypeError, match=r"cell: expected a cell that returns \(carry, output\), got ") as caught:
        bptt.unroll(step, params, jnp.ones(N), jnp.ones((T, I)))
    assert "raised by step" in caught.value.__notes__[0]


def test_what_is_no_linen_cell():
    for wrong in (nn.GRUCell, nn.Dense(N), nn.RNN(nn.GRUCell(N)), 3, nnx_cell(nnx.SimpleCell)):
        with pytest.raises(TypeError, match=r"module: expected a linen.Module called as module\(carry, x\), got "):
            bptt.from_linen(wrong, {"params": {}})
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
    code = "import sys, bptt_jax; bptt_jax.from_haiku; print({'equinox', 'flax', 'haiku'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_step_itself_is_told_about_the_adapter(leaky):
    """An Equinox module as a step cannot be looked up again; the message says what can."""
    with pytest.raises(TypeError, match=r"bptt_jax\.from_equinox"):
        bptt.unroll(leaky, None, jnp.zeros(3), jnp.ones((4, 2)))
