"""GPUs and TPUs multiply float32 in reduced precision by default. A CPU never does, so programs are read here."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import pytest
from slices import covering

import bptt_jax as bptt
from bptt_jax.analysis import matrix_free
from bptt_jax.linalg.lq import orthonormal
from bptt_jax.recurrence.jacobians import jacobians_at

XS = jnp.ones((6, 2))


def products(program):
    """The precision of every product of matrices in it."""
    found = []
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.params["precision"])
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += products(inner)
    return found


@jax.jit
def jitted(w, h, x):
    return jnp.tanh(w @ h + x[0])


def parts(name):
    if name == "jitted":
        return jitted, jnp.eye(3), jnp.zeros(3)
    cell = getattr(bptt.cells, name)(3)
    return cell.step, cell.init(jax.random.key(0), 2), cell.initial_state()


def total(states):
    return jnp.sum(jax.tree.leaves(states)[0])


def at_states(function, step, params, state0, xs, **options):
    states = jax.tree.map(lambda h: jnp.stack([h] * len(xs)), state0)
    return function(step, params, states, xs, mode="forward", **options)


EXACT = {
    "jacobians": partial(at_states, jacobians_at),
    "singular values": partial(at_states, matrix_free.singular_values_at, num=1),
    "eigenvalues": partial(at_states, matrix_free.eigenvalues_at, num=1),
    "singular values of the product": partial(bptt.analysis.product_singular_values, num=1),
    "flow": partial(bptt.gradient_flow, loss=total),
    "flow, leading values": partial(bptt.gradient_flow, loss=total, num=1),
    "parallel time": lambda *arguments: bptt.deer(*arguments).states,
    "exponents": bptt.lyapunov_exponents,
    "exponents in segments": partial(bptt.lyapunov_exponents, segments=2),
}


# Each of the simplest network; of the others their Jacobians, the frames carried by them, and parallel time.
OF_OTHERS = ("jacobians", "exponents", "parallel time")


@pytest.mark.parametrize(
    ("what", "name"),
    covering(
        product(EXACT, ["rnn", "gru", "lstm", "jitted"]),
        *product(EXACT, ["rnn"]),
        *product(OF_OTHERS, ["gru", "lstm", "jitted"]),
    ),
)
def test_whatever_must_be_exact_is_in_full_precision(what, name):
    step, params, state0 = parts(name)
    with jax.default_matmul_precision("bfloat16"):  # the user's own wish for everything else
        program = jax.make_jaxpr(partial(EXACT[what], step))(params, state0, XS)
    found = products(program.jaxpr)
    assert len(found) > 0
    assert set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.parametrize("size", [3, 100])
def test_derivatives_of_orthonormal_frames_are_in_full_precision(size):
    program = jax.make_jaxpr(partial(jax.jvp, orthonormal))((jnp.eye(size),), (jnp.eye(size),))
    assert set(products(program.jaxpr)) == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.parametrize("function", [bptt.unroll, bptt.jacobians])
def test_the_trajectory_is_the_users_own(function):
    step, params, state0 = parts("gru")
    with jax.default_matmul_precision("bfloat16"):
        program = jax.make_jaxpr(partial(function, step))(params, state0, XS)
    assert (jax.lax.Precision.DEFAULT,) * 2 in products(program.jaxpr)
