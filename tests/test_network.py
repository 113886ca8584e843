"""A network against its cell unrolled in NumPy terms and a readout written out by hand."""

import warnings
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import watched
from slices import covering

import bptt_jax as bptt
from bptt_jax.experiments.network import Network, NetworkParams, Readout, apply_readout, network
from bptt_jax.experiments.tasks import Task, adding, memorization

TASKS = {"last": adding(7), "all": memorization(2, values=2, positions=2)}
CELLS = {"rnn": bptt.rnn(3), "lstm": bptt.lstm(3)}
both = pytest.mark.parametrize("reads", TASKS)


def example(net: Network) -> tuple[NetworkParams, jax.Array, jax.Array]:
    """Parameters, the bias not zero, and one sequence."""
    params = net.init(jax.random.key(1))
    bias = jnp.linspace(-1.0, 1.0, net.task.output_size)
    inputs, targets = net.task.sample(jax.random.key(2), 1)
    return params._replace(readout=params.readout._replace(bias=bias)), inputs[0], targets[0]


def leaves(tree) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(a)) for a in jax.tree.leaves(tree)])


def rnn_by_hand(params: NetworkParams, inputs: np.ndarray) -> np.ndarray:
    w, u, b = (np.asarray(a, np.float64) for a in params.cell)
    v, c = (np.asarray(a, np.float64) for a in params.readout)
    h, outputs = np.zeros(len(b)), []
    for x in np.asarray(inputs, np.float64):
        h = np.tanh(w @ h + u @ x + b)
        outputs.append(v @ h + c)
    return np.stack(outputs)


@both
def test_outputs_and_loss_by_hand(reads) -> None:
    net = network(CELLS["rnn"], TASKS[reads])
    params, inputs, target = example(net)
    want = rnn_by_hand(params, inputs)
    if reads == "last":
        want = want[-1:]
        loss = (want[0, 0] - float(target)) ** 2
    else:
        shares = np.exp(want) / np.exp(want).sum(axis=1, keepdims=True)
        loss = -np.mean(np.log(shares[np.arange(len(want)), np.asarray(target)]))
    got = jax.jit(net.outputs)(params, inputs)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(net.loss)(params, inputs, target), loss, rtol=2e-5)


@pytest.mark.parametrize(("cell", "reads"), covering(product(CELLS, TASKS), ("rnn", "last"), ("lstm", "all")))
def test_loss_of_states_is_the_loss(cell, reads) -> None:
    """As a function of the trajectory, so that `adjoints` gives the network's own gradient."""
    net = network(CELLS[cell], TASKS[reads])
    params, inputs, target = example(net)
    loss, gradient = jax.jit(jax.value_and_grad(net.loss))(params, inputs, target)

    @jax.jit
    def flow(params, inputs, target):
        args = net.loss_args(params, inputs, target)
        return bptt.adjoints(
            net.cell.step, params.cell, net.cell.initial_state(), inputs, net.loss_of_states, args=args
        )

    done = flow(params, inputs, target)
    np.testing.assert_allclose(done.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(leaves(done.params_grad), leaves(gradient.cell), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(leaves(done.args_grad.readout), leaves(gradient.readout), rtol=1e-4, atol=1e-6)


def test_loss_of_states_is_one_function() -> None:
    """Looked up anew for every call, it is no new loss: nothing is compiled again, and nothing warned of."""
    net = network(CELLS["rnn"], TASKS["last"])
    params, inputs, target = example(net)
    args = net.loss_args(params, inputs, target)
    with warnings.catch_warnings(), watched() as seen:
        warnings.simplefilter("error", bptt.RecompilationWarning)
        for count in range(5):
            bptt.adjoints(net.cell.step, params.cell, jnp.zeros(3), inputs, net.loss_of_states, args=args)
            if count == 0:
                assert seen
                seen.clear()
    assert seen == []


@pytest.mark.parametrize("reads", covering(TASKS, "last"))
def test_remat_changes_neither_values_nor_gradients(reads) -> None:
    plain = network(CELLS["lstm"], TASKS[reads])
    params, inputs, target = example(plain)
    want = jax.jit(jax.value_and_grad(plain.loss))(params, inputs, target)

    def rematerialised(net) -> int:  # the gates are in any case, see recurrence.activations
        return str(jax.make_jaxpr(jax.grad(net.loss))(params, inputs, target)).count("remat")

    for remat in (True, 4):
        net = network(CELLS["lstm"], TASKS[reads], remat=remat)
        assert rematerialised(net) > rematerialised(plain)
        got = jax.jit(jax.value_and_grad(net.loss))(params, inputs, target)
        np.testing.assert_allclose(leaves(got), leaves(want), rtol=1e-5, atol=1e-7)


def test_the_readout_of_an_lstm_sees_h_not_c() -> None:
    readout = Readout(jnp.array([[1.0, 10.0]]), jnp.array([100.0]))
    state = bptt.cells.LSTMState(jnp.array([1.0, 2.0]), jnp.array([5.0, 7.0]))
    np.testing.assert_array_equal(apply_readout(readout, state), [121.0])


def turning(dtype=jnp.complex64) -> bptt.Cell:
    """A state [2, 2] of complex numbers that turn by i at every step; the input comes in at one place."""

    def step(params, h, x):
        return jax.lax.complex(-h.imag, h.real) * params["size"].astype(dtype) + jnp.sum(x).astype(dtype)

    def init(key, input_size):
        return {"size": jnp.float32(0.5)}

    return bptt.Cell(init, lambda: jnp.zeros((2, 2), dtype), step)


def test_a_complex_state_is_raveled_and_read_by_its_real_part() -> None:
    net = network(turning(), TASKS["last"], readout_init=jax.nn.initializers.ones)
    params = net.init(jax.random.key(0))
    assert params.readout.weights.shape == (1, 4)
    assert params.readout.weights.dtype == jnp.float32
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(7, 2)), jnp.float32)
    want, h = [], 0j
    for x in np.asarray(inputs):
        h = 0.5j * h + x.sum()
        want.append(4 * h.real)
    assert abs(h.imag) > 0.1  # or real and imaginary part could not be told apart
    np.testing.assert_allclose(net.outputs(params, inputs), [[want[-1]]], rtol=1e-5)
    gradient = jax.grad(net.loss)(params, inputs, jnp.float32(0.0))
    np.testing.assert_allclose(gradient.readout.weights, np.full((1, 4), 2 * want[-1] * h.real), rtol=1e-5)


@both
def test_init_has_the_tasks_sizes(reads) -> None:
    task: Task = TASKS[reads]
    seen = []

    def readout_init(key, shape, dtype):
        seen.append(shape)
        return jnp.arange(np.prod(shape), dtype=dtype).reshape(shape)

    params = network(CELLS["lstm"], task, readout_init=readout_init).init(jax.random.key(0))
    assert seen == [(3, task.output_size)]
    assert params.cell.input.shape == (4 * 3, task.input_size)
    np.testing.assert_array_equal(
        params.readout.weights, np.arange(3 * task.output_size).reshape(3, task.output_size).T
    )
    np.testing.assert_array_equal(params.readout.bias, np.zeros(task.output_size))
