"""The contract: the state as a vector, and what a bad argument gets before anything is compiled."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from surface import PUBLIC

import bptt_jax as bptt
from bptt_jax.step import bind, check_step, differentiable_part, prepend

P, H, XS = np.ones(3, np.float32), np.ones(3, np.float32), np.ones((4, 3), np.float32)


def step(p, h, x):
    return jnp.tanh(p * h + x)


def loss(states):
    return jnp.sum(states[-1])


class Unhashable:
    __hash__ = None

    def __call__(self, *arguments):
        return arguments[1]


run = partial(bptt.unroll, step, P)
analyses = (bptt.adjoints, bptt.temporal_contributions, bptt.gradient_flow)
measure = partial(bptt.gradient_flow, step, P, H, XS)


def made(new, state0=H):
    """Unrolls a step that returns `new`."""
    return lambda: bptt.unroll(lambda p, h, x: new(h), P, state0, XS)


# (call, exception, message), in which … stands for anything.
BAD = [
    # the functions
    (
        lambda: bptt.unroll(3, P, H, XS),
        TypeError,
        "step: expected a function step(params, state, x) -> state, got int",
    ),
    (
        lambda: bptt.jacobians(None, P, H, XS),
        TypeError,
        "step: expected a function step(params, state, x) -> state, got None",
    ),
    (lambda: bptt.unroll(Unhashable(), P, H, XS), TypeError, "step: expected a hashable function…got Unhashable"),
    (lambda: measure(1.0), TypeError, "loss: expected a function loss(states) -> scalar, got float"),
    (lambda: measure(Unhashable()), TypeError, "loss: expected a hashable function…got Unhashable"),
    # the arrays
    (
        lambda: bptt.unroll(step, {"w": "abc"}, H, XS),
        TypeError,
        "params['w']: expected an array of numbers, got str",
    ),
    (
        lambda: bptt.unroll(step, [P, object()], H, XS),
        TypeError,
        "params[1]: expected an array of numbers, got object",
    ),
    (lambda: run(H, np.asarray(["a", "b"])), TypeError, "xs: expected an array of numbers, got one of <U1"),
    (
        lambda: run(np.ones(3, np.int32), XS),
        ValueError,
        "state0: expected at least one floating number, got int32[3]",
    ),
    (lambda: run((), XS), ValueError, "state0: expected at least one floating number, got "),
    (lambda: run(None, XS), ValueError, "state0: expected at least one floating number, got "),
    (lambda: run(H[:0], XS), ValueError, "state0: expected at least one floating number, got "),
    # the number of steps
    (lambda: run(H), ValueError, "length: expected the number of steps, since xs is None, got None"),
    (lambda: run(H, length=0), ValueError, "length: expected at least 1, got 0"),
    (lambda: run(H, length=2.5), TypeError, "length: expected an integer known before compilation, got float"),
    (lambda: run(H, length=True), TypeError, "length: expected an integer known before compilation, got bool"),
    (lambda: run(H, length=np.ones(1)), TypeError, "length: expected an integer…got ndarray"),
    (lambda: run(H, XS, length=5), ValueError, "length: expected 4, the first axis of xs, got 5"),
    (lambda: run(H, XS[:0]), ValueError, "xs: expected at least one step, got a first axis of 0"),
    (lambda: run(H, {"x": 1.0}), ValueError, "xs['x']: expected time as the first axis, got a scalar"),
    (
        lambda: run(H, (XS, XS[:3])),
        ValueError,
        "xs: expected one number of steps in all leaves, got…xs[0]…4…xs[1]…3",
    ),
    # what the step returns
    (
        made(lambda h: (h, h)),
        ValueError,
        "step: must return the new state alone…got a pair, both entries like state0; return step(params, "
        "state, x)[0] if…or, of one called as (params, x, state) -> (output, state), step(params, x, state)[1]",
    ),
    (
        made(lambda h: (h, h[:2])),
        ValueError,
        "step: must return the new state alone…got a pair whose first entry is like state0; return…)[0]",
    ),
    (
        made(lambda h: (h[:2], h)),
        ValueError,
        "step: must return the new state alone…got a pair whose second entry is like state0; return…)[1], or, of",
    ),
    (
        made(lambda h: {"g": h["h"]}, {"h": H}),
        ValueError,
        "step: must return a state of the structure of state0…'h'…got…'g'",
    ),
    (made(lambda h: h[:2]), ValueError, "step: must keep the shape of state, [3], got [2]"),
    (
        made(lambda h: {"h": h["h"].astype(jnp.bfloat16)}, {"h": H}),
        TypeError,
        "step: must keep the dtype of state['h'], float32, got bfloat16",
    ),
    (
        lambda: run(H, XS[:, :2]),
        TypeError,
        "incompatible shapes…raised by step(params, state, x) on state float32[3] and x float32[2]",
    ),
    # arguments in another order, a batch
    (
        lambda: bptt.unroll(lambda p, x, h: jnp.tanh(p * h + x.sum()), P, H, XS[:, :2]),
        ValueError,
        "step: expected a function called as step(params, state, x), got one that works as step(params, x, state); "
        "wrap it: lambda params, state, x: step(params, x, state)",
    ),
    (
        lambda: bptt.jacobians(lambda p, x, h: (x, jnp.tanh(p * h + x.sum())), P, H, XS[:, :2]),
        ValueError,
        "got one that works as step(params, x, state)[1]; wrap it: lambda params, state, x: step(params, ",
    ),
    (
        lambda: bptt.unroll(lambda h, x, p: p["w"] * h + x, {"w": P}, H, XS),
        ValueError,
        "step: expected…got one that works as step(state, x, params); wrap it",
    ),
    (
        lambda: run(H, XS[:, None]),
        ValueError,
        "xs: expected one sequence [T, ...], got float32[4,1,3], of which step takes one axis less: a batch; ",
    ),
    # what the loss returns
    (lambda: measure(lambda states: states[-1]), ValueError, "loss: must return a scalar, got shape [3]"),
    (
        lambda: measure(lambda states: (1.0, 2.0)),
        TypeError,
        "loss: must return one number, got (float32[], float32[]); a pair (loss, aux) wants has_aux=True",
    ),
    (lambda: measure(lambda states: None), TypeError, "loss: must return one number, got PyTreeDef(None)"),
    (lambda: measure(lambda states: 3), TypeError, "loss: must return a real floating number, got int32"),
    (
        lambda: measure(lambda states: jax.lax.complex(states[0, 0], states[0, 0])),
        TypeError,
        "loss: must return a real floating number, got complex64",
    ),
    # options
    (lambda: run(H, XS, unroll=0), ValueError, "unroll: expected at least 1, got 0"),
    (lambda: bptt.final_state(step, P, H, XS, unroll=1.5), TypeError, "unroll: expected an integer…got float"),
    (lambda: run(H, XS, remat=0), ValueError, "remat: expected at least 1, got 0"),
    (lambda: bptt.final_state(step, P, H, XS, remat=None), TypeError, "remat: expected an integer…got None"),
    (lambda: measure(loss, stride=0), ValueError, "stride: expected at least 1, got 0"),
    (lambda: measure(loss, stride=0.5), TypeError, "stride: expected an integer…got float"),
    (lambda: measure(loss, threshold=0.0), ValueError, "threshold: expected a number between 0 and 1, got 0.0"),
    (lambda: measure(loss, threshold=1), ValueError, "threshold: expected a number between 0 and 1, got 1"),
    (lambda: measure(loss, threshold=np.nan), ValueError, "threshold: expected a number between 0 and 1, got nan"),
    (
        lambda: measure(loss, threshold=np.ones(2)),
        ValueError,
        "threshold: expected a number between 0 and 1, got float32[2]",
    ),
    (lambda: measure(loss, threshold="1e-3"), TypeError, "threshold: expected a number between 0 and 1, got str"),
    (lambda: measure(loss, threshold=None), TypeError, "threshold: expected a number between 0 and 1, got None"),
    # matrices
    (lambda: bptt.singular_values(np.float32(3)), ValueError, "matrices: expected shape [..., M, N], got []"),
    (lambda: bptt.linalg.spectral_norm(P), ValueError, "matrices: expected shape [..., M, N], got [3]"),
    (lambda: bptt.singular_values([[1.0, 2.0]]), TypeError, "matrices: expected an array, got list"),
    (lambda: bptt.linalg.condition_number(None), TypeError, "matrices: expected an array, got None"),
    (
        lambda: bptt.singular_values(np.asarray([["a"]])),
        TypeError,
        "matrices: expected an array of numbers, got one of <U1",
    ),
    (
        lambda: bptt.singular_values(np.ones((2, 0, 3))),
        ValueError,
        "matrices: expected no empty axis, got [2, 0, 3]",
    ),
    (lambda: bptt.eigenvalues(XS), ValueError, "matrices: expected square matrices, got [4, 3]"),
    (lambda: bptt.linalg.spectral_radius(XS), ValueError, "matrices: expected square matrices, got [4, 3]"),
    (lambda: bptt.product_log_norms(np.eye(3)), ValueError, "jacobians: expected shape [T, D, D], got [3, 3]"),
    (
        lambda: bptt.jacobian_product(np.ones((2, 3, 4))),
        ValueError,
        "expected square matrices, got [2, 3, 4]",
    ),
    (
        lambda: bptt.jacobian_product(np.ones((0, 3, 3))),
        ValueError,
        "expected no empty axis, got [0, 3, 3]",
    ),
    # cells
    (lambda: bptt.rnn(0), ValueError, "hidden_size: expected at least 1, got 0"),
    (lambda: bptt.gru(2.5), TypeError, "hidden_size: expected an integer…got float"),
    (lambda: bptt.lstm("3"), TypeError, "hidden_size: expected an integer…got str"),
    (lambda: bptt.gru(3).init(None, 0), ValueError, "input_size: expected at least 1, got 0"),
    (lambda: bptt.lstm(3).init(None, P), TypeError, "input_size: expected an integer…got ndarray"),
    (lambda: bptt.from_equinox(step), TypeError, "cell: expected an equinox.Module…got function"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(call, error, message, compilations):
    with pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in message.split("…"))):
        call()
    assert compilations == []


@pytest.mark.parametrize("function", [bptt.final_state, bptt.jacobians, *analyses])
def test_every_function_checks_its_arguments(function, compilations):
    arguments = (loss,) if function in analyses else ()
    for xs, length, message in (
        (XS, 5, "length: expected 4"),
        (XS[:0], None, "at least one step"),
        (None, None, "is None"),
    ):
        with pytest.raises(ValueError, match=message):
            function(step, P, H, xs, *arguments, length=length)
    with pytest.raises(ValueError, match="must keep the shape"):
        function(lambda p, h, x: h[:2], P, H, XS, *arguments)
    assert compilations == []


@pytest.mark.parametrize("function", analyses)
def test_every_analysis_checks_its_loss(function, compilations):
    with pytest.raises(ValueError, match="loss: must return a scalar"):
        function(step, P, H, XS, lambda states: states[-1])
    assert compilations == []


def test_a_dtype_alone_is_no_reason_to_think_of_another_order():
    """In another order it would keep the dtype, of what is then the state."""
    with pytest.raises(TypeError, match="step: must keep the dtype of state, bfloat16, got float32"):
        bptt.unroll(lambda p, h, x: (h + x.astype(h.dtype)).astype(p.dtype), P, jnp.asarray(H, jnp.bfloat16), XS)


def test_a_step_that_raises_says_on_what():
    def failing(p, h, x):
        raise KeyError("no such gate")

    with pytest.raises(KeyError, match="no such gate") as caught:
        bptt.unroll(failing, P, {"h": H}, {"x": XS})
    notes = "\n".join(caught.value.__notes__)
    assert "raised by step(params, state, x) on state {h: float32[3]} and x {x: float32[3]}" in notes


@pytest.mark.parametrize("key", ["h", "another"])
def test_a_step_that_writes_into_its_state_is_refused(key):
    """JAX would not notice: what is written while it traces is there no more when the program runs."""

    def step(p, state, x):
        new = {"h": 0.5 * state["h"]}
        state[key] = new["h"]
        return new

    with pytest.raises(ValueError, match="step: expected a pure function, got one that writes into its arguments"):
        bptt.unroll(step, None, {"h": jnp.ones(2)}, length=3)


def test_ravel_state_and_back():
    state = {
        "z": np.asarray([1 + 2j, 3 - 4j], np.complex64),
        "a": np.asarray([[5, 6]], np.float32),
        "s": np.float32(7),
    }
    vector, unravel = bptt.ravel_state(state)
    np.testing.assert_array_equal(vector, [5, 6, 7, 1, 3, 2, -4])  # keys in order; real parts, then imaginary ones
    back = unravel(vector)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    assert back["z"].dtype == np.complex64


def test_leaves_of_several_dtypes_are_one_vector_of_the_one_that_holds_them_all():
    state = {"low": jnp.asarray([1.5, -2.0], jnp.bfloat16), "h": jnp.asarray(0.1, jnp.float32)}
    vector, unravel = bptt.ravel_state(state)
    np.testing.assert_array_equal(vector, np.asarray([0.1, 1.5, -2], np.float32))
    back = unravel(vector)
    assert {name: leaf.dtype for name, leaf in back.items()} == {"low": jnp.bfloat16, "h": jnp.float32}
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_prepend():
    starts = prepend({"h": jnp.zeros(2)}, {"h": jnp.asarray([[1.0, 1], [2, 2], [3, 3]])})
    np.testing.assert_array_equal(starts["h"], [[0, 0], [1, 1], [2, 2]])


def test_python_numbers_are_states():
    """Their weak type would change after the first step, which `lax.scan` refuses."""
    assert not check_step(bind(lambda p, h, x: h * p, 0.5, 1.0, length=3)).state0.weak_type
    np.testing.assert_allclose(bptt.unroll(lambda p, h, x: h * p, 0.5, 1.0, length=3), [0.5, 0.25, 0.125])


def test_differentiable_part():
    params = {"w": np.ones(2, np.float32), "n": np.arange(2), "on": True, "b": 0.5}
    part, merge = differentiable_part(params)
    assert (part["n"], part["on"], part["b"]) == (None, None, 0.5)
    doubled = merge(jax.tree.map(lambda a: 2 * a, part))
    assert (doubled["on"], doubled["b"]) == (True, 1.0)
    np.testing.assert_array_equal(doubled["w"], [2, 2])
    np.testing.assert_array_equal(doubled["n"], [0, 1])


def test_public_names_are_there():
    assert len(PUBLIC) > 60
    assert all(member is not None for member in PUBLIC.values())
    assert set(bptt.__all__) <= set(dir(bptt))
    with pytest.raises(AttributeError, match="no_such_name"):
        bptt.no_such_name  # noqa: B018
