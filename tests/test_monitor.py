"""`Monitor`: the numbers of `gradient_flow`, stable names, and NaN traced to where it began."""

import inspect
import json
import math
import re
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax import checks, devices

B, T, N = 4, 12, 3
TRACES = []  # one entry for every time that JAX traces the step


def step(params, h, x):
    """A cell `v`, a linear channel `s`, and `r` whose derivative is not finite where ``x["b"]`` is 0."""
    TRACES.append(None)
    v = jnp.tanh(params["w"] @ h["v"] + x["a"])
    return {"v": v, "s": params["grow"] * h["s"] + x["c"], "r": 0.5 + jnp.sqrt(h["r"] * x["b"])}


def loss(states, args):
    """The norm of v_T has no derivative at 0, the root of the scale none at 0 either."""
    read = jnp.dot(args["out"], states["v"][-1]) + jnp.linalg.norm(states["v"][-1]) + jnp.sum(states["r"][-1])
    return read + args["target"] * jnp.sum(states["s"][-1]) + jnp.sqrt(args["scale"])


AXES = {"out": None, "scale": None, "target": 0}
MONITOR = bptt.Monitor(step, loss, every=5, sequences=2, spectra=3, in_axes=(None, 0, AXES))


def example():
    """Of NumPy, to be spoiled in place: parameters, h_0, inputs, and what the loss is given."""
    rng = np.random.default_rng(0)
    params = {"w": 0.9 * np.linalg.qr(rng.standard_normal((N, N)))[0], "grow": np.ones(2)}
    state0 = {"v": np.zeros(N), "s": np.zeros(2), "r": np.ones(1)}
    xs = {"a": 0.1 * rng.standard_normal((B, T, N)), "b": np.full((B, T, 1), 0.5), "c": np.zeros((B, T, 2))}
    args = {"out": np.ones(N), "scale": np.ones(()), "target": np.ones(B)}
    return jax.tree.map(lambda a: np.asarray(a, np.float32), (params, state0, xs, args))


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bptt.analysis.MonitorWarning)
        return function(*arguments, **options)


def probe(*arguments):
    return quietly(MONITOR.probe, 0, *arguments)


def spoiled(where):
    """`example` with one number changed, the array that is to be named, the step, and the sequence."""
    params, state0, xs, args = example()
    match where:
        case "weight":
            params["w"][1, 2] = np.nan
            expected = "params['w']", 1, 0
        case "readout":
            args["out"][0] = np.inf
            expected = "args['out']", -1, 0
        case "input":
            xs["a"][3, 6, 0] = np.nan
            expected = "xs['a']", 7, 3
        case "target":
            args["target"][3] = np.nan
            expected = "args['target']", -1, 3
        case "gradient of what is shared":
            args["scale"][()] = 0
            expected = "dL/dargs['scale']", -1, 0
        case "state0":
            state0["s"][0] = np.inf
            expected = "state0['s']", 0, 0
        case "overflow":
            params["grow"][:] = 1e10
            xs["c"][3, 2] = 1  # s is 1 at step 3, 1e30 at step 6
            expected = "state['s']", 7, 3
        case "overflow backwards":
            params["grow"][:] = 1e10  # dL/ds_t is 1e10 ** (T - t)
            expected = "adjoint['s']", T - 4, 0
        case "Jacobian":
            xs["b"][1, 4] = 0
            expected = "Jacobian", 5, 1
        case "derivative of the loss":
            xs["a"][1] = 0
            expected = "dloss/dstate['v']", T, 1
    return (params, state0, xs, args), expected


@pytest.mark.parametrize(
    "where",
    [
        "weight",
        "readout",
        "input",
        "target",
        "gradient of what is shared",
        "state0",
        "overflow",
        "overflow backwards",
        "Jacobian",
        "derivative of the loss",
    ],
)
def test_nan_is_named(where):
    arguments, (array, at, sequence) = spoiled(where)
    found = MONITOR.locate(*arguments)
    assert (found.array, found.step, found.sequence) == (array, at, sequence)
    assert array in found.statement
    assert found.overflows == (where == "overflow backwards") == ("range" in found.statement)
    record = probe(*arguments)  # sequence 3 is not among the sampled ones
    assert record.nonfinite.to_dict() == found.to_dict()
    elsewhere = {"overflow backwards": "exploding", "gradient of what is shared": "steady"}
    assert record.verdict == elsewhere.get(where, "non-finite")
    assert record.scalars["bptt/non_finite/step"] == at
    assert record.scalars["bptt/non_finite/sequence"] == sequence


def test_what_a_step_adds_may_overflow_alone():
    """1e25 of the loss times 1e20 of the input, at a weight of 1e-30: all else is in range."""

    def step(w, h, x):
        return h + w * x

    monitor = bptt.Monitor(step, lambda states: 1e25 * states[-1], in_axes=(None, 0, None))
    given = np.float32(1e-30), np.float32(0), np.asarray([[1e10, 1e20, 1.0]], np.float32)
    found = monitor.locate(*given)
    assert (found.array, found.step, found.overflows) == ("dL/dparams", 2, True)
    assert monitor.locate(*given[:2], given[2] / 1e10) is None


def test_norms_before():
    """The norms of s are 1, 1e10, .. before it overflows; of dL/ds, before the others count, powers of 1e10."""
    forward = MONITOR.locate(*spoiled("overflow")[0]).log_norms_before
    assert np.all(np.isneginf(forward[:2]))
    np.testing.assert_allclose(forward[2:], np.log(np.sqrt(2)) + 10 * np.log(10) * np.arange(4), rtol=1e-5)
    backward = MONITOR.locate(*spoiled("overflow backwards")[0]).log_norms_before
    assert len(backward) == 4
    np.testing.assert_allclose(backward[1:], np.log(np.sqrt(2)) + 10 * np.log(10) * np.arange(1, 4), rtol=1e-5)
    params, state0, xs, _ = spoiled("input")[0]
    xs = {name: a[3] for name, a in xs.items()}
    states = jax.vmap(lambda a: jnp.linalg.norm(bptt.ravel_state(a)[0]))(bptt.unroll(step, params, state0, xs))
    np.testing.assert_allclose(MONITOR.locate(*spoiled("input")[0]).log_norms_before, np.log(states[:6]), rtol=1e-5)


def test_norms_before_a_bad_contribution_begin_with_that_of_its_own_step():
    """sqrt(w x) at x = 0 has the derivative 0 / 0 by w, while states and adjoints, 2^(t - T), are finite."""
    monitor = bptt.Monitor(lambda w, h, x: 0.5 * h + jnp.sqrt(w * x), lambda states: states[-1].sum())
    found = monitor.locate(jnp.ones(()), jnp.ones(1), jnp.ones((1, 6, 1)).at[0, 2].set(0))
    assert (found.array, found.step) == ("dL/dparams", 3)
    np.testing.assert_allclose(found.log_norms_before, -np.log(2) * np.arange(4), rtol=1e-6)


def test_what_the_step_masks_is_no_nan():
    """A NaN among inputs that nothing reads."""
    params, state0, xs, args = example()
    unread = xs | {"unread": np.full((B, T), np.nan, np.float32)}
    assert MONITOR.locate(params, state0, unread, args) is None


def test_scalars_are_those_of_gradient_flow():
    params, state0, xs, args = example()
    record = probe(params, state0, xs, args)

    @jax.jit
    def flows(params, state0, xs, args):
        def one(x, y):
            return bptt.gradient_flow(step, params, state0, x, loss, args=y)

        return jax.vmap(one, (0, AXES))(xs, args)

    flow = flows(params, state0, jax.tree.map(lambda a: a[:2], xs), args | {"target": args["target"][:2]})
    adjoints, sv, ev = map(
        np.asarray, (flow.signal.adjoint_log_norms, flow.spectra.singular_values, flow.spectra.eigenvalues)
    )
    pooled = flow.pooled()
    owners, at = [0, 1, 0], [3, 7, 11]  # three Jacobians, spread over time, from two sequences

    def median(values):
        return np.quantile(values, 0.5, method="inverted_cdf")

    expected = {
        "loss": np.mean(flow.loss),
        "growth_rate": pooled.growth_rate,
        "growth_rate_error": pooled.growth_rate_error,
        "horizon": pooled.horizon,
        "horizon_extrapolated": 1,
        "end_gain": median(flow.end_gain),
        "peak_gain": median(flow.peak_gain),
        "gradient_log_norm": median(flow.numerics.params_grad_log_norm),
        "adjoint_log_norm/first": median(adjoints[:, 0]),
        "adjoint_log_norm/last": median(adjoints[:, -1]),
        "adjoint_log_norm/max": median(adjoints.max(axis=1)),
        "spectral_norm": median(sv[owners, at, 0]),
        "spectral_radius": median(np.abs(ev[owners, at, 0])),
        "verdict": 0,
        "verdict_share/steady": 1,
        "verdict_share/vanishing": 0,
        "non_finite/step": -1,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(record.scalars[f"bptt/{name}"], value, rtol=2e-5, atol=1e-6, err_msg=name)
    assert record.verdict == flow.verdict == "steady"
    assert record.nonfinite is None
    histograms = {
        "adjoint_log_norms": adjoints,
        "singular_values": sv[owners, at],
        "eigenvalue_moduli": np.abs(ev[owners, at]),
    }
    for name, values in histograms.items():
        got = record.histograms[f"bptt/{name}"]
        np.testing.assert_allclose(np.sort(got), np.sort(values, axis=None), rtol=1e-4, atol=1e-6)


def without_time(record):
    return {name: value for name, value in record.scalars.items() if not name.startswith("bptt/monitor")}


def padded(tree, at, length, axis=1):
    """Of `length` steps, NaN but for those at the given places."""

    def one(a):
        shape = list(np.shape(a))
        shape[axis] = length
        out = np.full(shape, np.nan, np.float32)
        out[(slice(None),) * axis + (at,)] = a
        return out

    return jax.tree.map(one, tree)


def test_what_is_measured_does_not_depend_on_padding():
    """In front, in between and behind, where there is nothing but NaN."""
    params, state0, xs, args = example()
    at = np.array([1, 2, 4, 5, 6, 9, 10, 11, 12, 13, 14, 17])
    mask = np.isin(np.arange(20), at)
    long = bptt.Sequence(padded(xs, at, 20), mask=np.tile(mask, (B, 1)))
    record, want = probe(params, state0, long, args), probe(params, state0, xs, args)
    assert record.nonfinite is None
    assert record.verdict == want.verdict
    for name, value in without_time(want).items():
        np.testing.assert_allclose(record.scalars[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for name, values in want.histograms.items():
        np.testing.assert_allclose(np.sort(record.histograms[name]), np.sort(values), rtol=1e-4, atol=1e-6)


@pytest.mark.exhaustive
def test_trials_of_different_lengths_are_measured_each_as_it_is():
    """Of one padded batch the first four are sampled: with the numbers that `gradient_flow` gives of each alone."""
    params, state0, xs, args = example()
    lengths = np.array([12, 2, 7, 4])
    mask = np.arange(T) < lengths[:, None]
    monitor = bptt.Monitor(step, loss, spectra=4, in_axes=(None, 0, AXES))
    spoilt = jax.tree.map(lambda a: np.where(mask[..., None], a, np.nan), xs)
    record = quietly(monitor.probe, 0, params, state0, bptt.Sequence(spoilt, mask=mask), args)
    flows = [
        bptt.gradient_flow(
            step,
            params,
            state0,
            jax.tree.map(lambda a, i=i, n=n: a[i, :n], xs),
            loss,
            args=args | {"target": args["target"][i]},
        )
        for i, n in enumerate(lengths)
    ]
    # Each has one of the four Jacobians, from the first quarter of the first to the end of the last.
    at = [(i + 1) * n // min(4, n) - 1 if i < n else None for i, n in enumerate(lengths)]
    norms = [f.spectra.singular_values[k, 0] for f, k in zip(flows, at, strict=True) if k is not None]
    assert len(norms) == 4
    np.testing.assert_allclose(record.histograms["bptt/singular_values"].reshape(4, -1)[:, 0], norms, rtol=1e-4)
    adjoints = [np.asarray(f.signal.adjoint_log_norms) for f in flows]

    def median(values):
        return np.quantile(np.asarray(values), 0.5, method="inverted_cdf")

    expected = {
        "loss": np.mean([f.loss for f in flows]),
        "horizon": median([f.horizon for f in flows]),
        "end_gain": median([f.end_gain for f in flows]),
        "gradient_log_norm": median([f.numerics.params_grad_log_norm for f in flows]),
        "adjoint_log_norm/first": median([a[0] for a in adjoints]),
        "adjoint_log_norm/last": median([a[-1] for a in adjoints]),
        "adjoint_log_norm/max": median([a.max() for a in adjoints]),
        "spectral_norm": median(norms),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(record.scalars[f"bptt/{name}"], value, rtol=2e-5, atol=1e-6, err_msg=name)
    got = np.sort(record.histograms["bptt/adjoint_log_norms"])
    np.testing.assert_allclose(got, np.sort(np.concatenate(adjoints)), rtol=1e-4, atol=1e-6)


@pytest.mark.exhaustive
def test_episodes_are_measured_as_gradient_flow_measures_them():
    params, state0, xs, args = example()
    resets = np.isin(np.arange(T), [4, 9])[None] & np.array([[True]] * B)
    start = jax.tree.map(lambda a: a + np.float32(0.25), state0)
    sequence = bptt.Sequence(xs, resets=resets, reset_state=start)
    axes = bptt.Sequence(0, resets=0, reset_state=None)
    monitor = bptt.Monitor(step, loss, sequences=B, in_axes=(None, axes, AXES))
    record = quietly(monitor.probe, 0, params, state0, sequence, args)

    def one(xs, args):
        return bptt.gradient_flow(step, params, state0, xs, loss, args=args, spectra=False)

    flow = jax.vmap(one, (axes, AXES))(sequence, args)
    pooled = flow.pooled()
    assert record.verdict == flow.verdict
    for name in ("growth_rate", "growth_rate_error", "horizon"):
        np.testing.assert_allclose(record.scalars[f"bptt/{name}"], getattr(pooled, name), rtol=1e-4, err_msg=name)
    # What goes wrong is told with the norms of its own episode alone.
    xs["a"][2, 10, 0] = np.nan
    found = monitor.locate(params, state0, sequence, args)
    assert (found.array, found.step, found.sequence) == ("xs['a']", 11, 2)
    assert len(found.log_norms_before) == 1
    # A start that only a reset brings in; and one that no step sees, since the stream begins with a reset.
    xs["a"][2, 10, 0] = 0
    start["s"][1] = np.inf
    found = monitor.locate(params, state0, sequence, args)
    assert (found.array, found.step, found.sequence) == ("reset_state['s']", 5, 0)
    assert found.log_norms_before == ()
    start["s"][1], state0["s"][:] = 0, np.nan
    assert monitor.locate(params, state0, sequence, args).array == "state0['s']"
    resets[:, 0] = True
    assert monitor.locate(params, state0, sequence, args) is None
    # The derivative at the start of an episode counts, as it does of a sequence alone.
    state0["s"][:] = 0
    resets[:, 0] = False
    xs["b"][1, 4] = 0
    found = monitor.locate(params, state0, sequence, args)
    assert (found.array, found.step, found.sequence) == ("Jacobian", 5, 1)


def test_a_bad_derivative_at_the_end_of_an_episode_is_told_without_the_next():
    def at_fourth(states):
        return jnp.linalg.norm(states["v"][3]) + jnp.sum(states["r"][-1])

    params, state0, xs, _ = example()
    xs["a"][1] = 0
    stream = bptt.Sequence(xs, resets=np.tile(np.arange(T) == 4, (B, 1)))
    found = bptt.Monitor(step, at_fourth).locate(params, state0, stream)
    assert (found.array, found.step, found.sequence) == ("dloss/dstate['v']", 4, 1)
    assert found.log_norms_before == ()


def test_of_what_the_loss_is_given_only_what_is_shared_is_trained():
    def rooted(states, args):
        return jnp.sum(states[-1]) + jnp.sqrt(args)

    xs, zeros = np.ones((B, T, 2), np.float32), np.zeros(B, np.float32)
    own = bptt.Monitor(diagonal, rooted)
    assert own.locate(np.float32(0.5), np.zeros(2, np.float32), xs, zeros) is None
    shared = bptt.Monitor(diagonal, rooted, in_axes=(None, 0, None))
    assert shared.locate(np.float32(0.5), np.zeros(2, np.float32), xs, zeros[0]).array == "dL/dargs"


def test_a_loss_that_reads_no_state_warns_of_nothing():
    monitor = bptt.Monitor(diagonal, lambda states: 0.0 * jnp.sum(states))
    record = monitor.probe(0, np.float32(0.5), np.zeros(2, np.float32), np.ones((B, T, 2), np.float32))
    assert (record.verdict, record.scalars["bptt/verdict"]) == ("unmeasured", -1)


def test_a_bad_derivative_of_the_loss_in_padding_is_that_of_the_last_real_step():
    """It reads the state that is held."""
    (params, state0, xs, args), (array, at, sequence) = spoiled("derivative of the loss")
    at_real = np.arange(1, T + 1)
    mask = np.isin(np.arange(T + 4), at_real)
    long = bptt.Sequence(padded(xs, at_real, T + 4), mask=np.tile(mask, (B, 1)))
    found = MONITOR.locate(params, state0, long, args)
    assert (found.array, found.step, found.sequence) == (array, at + 1, sequence)
    assert found.log_norms_before == ()


class Mixed(NamedTuple):
    """A state of which one leaf of four is differentiated."""

    h: jax.Array
    steps: jax.Array
    key: jax.Array
    seen: jax.Array


def mixed(params, state, x):
    key, noise = jax.random.split(state.key)
    h = jnp.tanh(params @ state.h + 0.1 * jax.random.normal(noise, (N,)) + x["a"])
    return Mixed(h, state.steps + 1, key, state.seen | (x["code"] > 2))


def of_mixed(states):
    return jnp.sum(states.h[-1])


def test_counters_keys_and_flags_in_the_state():
    monitor = bptt.Monitor(mixed, of_mixed, sequences=2)
    rng = np.random.default_rng(0)
    params = jnp.asarray(0.3 * rng.standard_normal((N, N)), jnp.float32)
    state0 = Mixed(jnp.zeros(N), jnp.int32(0), jax.random.key(3), jnp.zeros((), bool))
    xs = {"a": rng.standard_normal((B, T, N)).astype(np.float32), "code": np.arange(B * T).reshape(B, T) % 4}
    xs["code"] = xs["code"].astype(np.int32)
    record = quietly(monitor.probe, 0, params, state0, xs)
    assert record.nonfinite is None
    assert len(record.histograms["bptt/singular_values"]) == 2 * N
    flow = bptt.gradient_flow(mixed, params, state0, jax.tree.map(lambda a: a[0], xs), of_mixed)
    assert record.scalars["bptt/adjoint_log_norm/max"] <= float(np.max(flow.signal.adjoint_log_norms)) + 5
    xs["a"][1, 3, 2] = np.nan
    found = monitor.locate(params, state0, xs)
    assert (found.array, found.step, found.sequence) == ("xs['a']", 4, 1)
    assert monitor.locate(params, state0._replace(h=jnp.full(N, jnp.nan)), xs).array == "state0.h"


def test_autonomous_steps_without_parameters():
    """As many sequences as there are states, or one; what is not finite is found all the same."""
    monitor = bptt.Monitor(lambda params, h, x: 0.5 * h, lambda states: jnp.sum(states[-1]), in_axes=(0, 0, 0))
    record = quietly(monitor.probe, 0, None, np.ones((3, 2), np.float32), length=20)
    assert record.verdict == "vanishing"
    assert record.scalars["bptt/growth_rate"] == pytest.approx(-math.log(2), rel=1e-5)
    assert record.scalars["bptt/gradient_log_norm"] == -math.inf
    start = np.ones((3, 2), np.float32)
    start[1, 1] = np.nan
    found = monitor.locate(None, start, bptt.Sequence(length=20))
    assert (found.array, found.step, found.sequence) == ("state0", 0, 1)
    single = bptt.Monitor(lambda params, h, x: 0.5 * h, lambda states: jnp.sum(states[-1]))
    assert quietly(single.probe, 0, None, np.ones(2, np.float32), length=20).verdict == "vanishing"


def test_the_logarithm_of_zero_is_no_fault():
    """Log-domain states, here of a Viterbi recursion, hold -inf throughout; a NaN is one."""

    def best(params, h, x):
        return jnp.maximum(params + h, x)

    def read(states, args):
        return states[-1, 0] * args

    monitor = bptt.Monitor(best, read, in_axes=(None, 0, None))
    params, state0 = jnp.float32(-0.3), np.full(2, -np.inf, np.float32)
    xs = np.full((B, T, 2), -np.inf, np.float32)
    xs[:, 0, 0] = 0
    record = quietly(monitor.probe, 0, params, state0, xs, np.float32(2))
    assert (record.nonfinite, record.verdict) == (None, "steady")
    assert monitor.locate(params, state0, xs, np.float32("nan")).array == "args"
    xs[1, 5, 0] = np.nan
    found = monitor.locate(params, state0, xs, np.float32(2))
    assert (found.array, found.step, found.sequence) == ("xs", 6, 1)


def test_what_can_never_happen_is_no_fault_of_the_parameters():
    """Log-probabilities of -inf, here of the moves of a hidden Markov model: its gradient is finite."""

    def forward(params, h, x):
        return jax.nn.logsumexp(h[:, None] + params, axis=0) + x

    monitor = bptt.Monitor(forward, last)
    params = np.log(np.asarray([[0.5, 0.5], [1.0, 0.1]], np.float32))
    xs, state0 = np.zeros((B, T, 2), np.float32), np.zeros(2, np.float32)
    params[1, 0] = -np.inf
    record = quietly(monitor.probe, 0, params, state0, xs)
    assert (record.nonfinite, record.verdict) == (None, "steady")
    xs[1, 5, 0] = np.nan
    found = monitor.locate(params, state0, xs)
    assert (found.array, found.step, found.sequence) == ("xs", 6, 1)
    xs[1, 5, 0] = 0
    params[:, 0] = -np.inf  # of nothing but impossible ways the derivative is NaN, for `jax.grad` too
    assert monitor.locate(params, state0, xs).array == "params"


@pytest.mark.parametrize("where", [None, "input", "weight"])
def test_a_record_is_valid_json(where):
    params, state0, xs, args = example() if where is None else spoiled(where)[0]
    args["target"][:] = 0  # s has no gradient, and its log norm is -inf
    record = probe(params, state0, xs, args)

    def refuse(name):
        pytest.fail(f"not JSON: {name}")

    read = json.loads(json.dumps(record.to_dict()), parse_constant=refuse)
    scalars = {name: float(value) for name, value in read["scalars"].items()}
    assert scalars == pytest.approx(record.scalars, nan_ok=True)
    assert read["verdict"] == record.verdict
    assert (read["nonfinite"] is None) == (where is None)
    if where is not None:
        assert read["nonfinite"]["array"] == record.nonfinite.array
    assert "horizon horizon" not in record.statement
    for text in (repr(record), record.statement):
        assert record.verdict in text
        assert len(text.splitlines()) <= 10
    assert ("nats per step" in record.statement) == (where is None)


def test_it_is_told_where_a_loss_hardly_depends_on_most_of_a_sequence():
    """In the words of the flow that is measured, of a loss of squares and states that decay."""
    step, states = lambda a, h, x: a * h + x, jnp.zeros((3, 100, 2))
    xs = states.at[:, 0].set(1.0)
    monitor = bptt.Monitor(step, lambda states: jnp.mean(states**2), in_axes=(None, 0, None))
    record = monitor.probe(0, 0.5, jnp.zeros(2), xs)
    flow = bptt.gradient_flow(step, 0.5, jnp.zeros(2), xs[0], lambda states: jnp.mean(states**2))
    said = "; the loss hardly depends on the 90 later states"
    assert said in flow.statement
    assert record.statement.endswith(said)
    assert record.scalars["bptt/hardly_read"] == 90
    last = bptt.Monitor(step, lambda states: jnp.sum(states[-1]), in_axes=(None, 0, None))
    record = last.probe(0, 0.5, jnp.zeros(2), xs)
    assert record.scalars["bptt/hardly_read"] == 0
    assert "later states" not in record.statement
    quietly(monitor.probe, 1, 1.0, jnp.zeros(2), xs)
    with pytest.warns(
        bptt.analysis.MonitorWarning, match="steady to vanishing .*hardly depends on the 90 later states"
    ):
        monitor.probe(2, 0.5, jnp.zeros(2), xs)


def test_names_are_those_of_the_table():
    documented = re.findall(r"^ *(bptt/\S+)", inspect.getdoc(bptt.Monitor), re.MULTILINE)
    for arguments in (example(), spoiled("weight")[0]):
        record = probe(*arguments)
        assert [*record.scalars, *record.histograms] == documented
        assert all(type(value) is float for value in record.scalars.values())
        assert all(a.ndim == 1 and np.all(np.isfinite(a)) for a in record.histograms.values())


def test_acts_at_every_nth_and_compiles_once():
    arguments = example()
    probe(*arguments)
    before = len(TRACES)
    records = [MONITOR(update, *arguments) for update in range(11)]
    assert [record.update for record in records if record is not None] == [0, 5, 10]
    assert len(TRACES) == before


def test_warns_when_the_verdict_changes_and_once_of_a_nan():
    def at(grow):
        params, state0, xs, args = example()
        params["grow"][:] = grow
        params["w"] *= 0.1
        xs["b"][:] = 0.01
        return params, state0, xs, args

    # 0.1 ** 12 is lost, 5 ** 12 is an explosion.
    sequence = [at(1), at(1), at(0.1), at(0.1), at(5), *[spoiled("input")[0]] * 2, at(5)]
    probe(*sequence[0])
    messages = []
    for update, arguments in enumerate(sequence):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            MONITOR.probe(update, *arguments)
        assert all(w.category is bptt.analysis.MonitorWarning and w.filename == __file__ for w in caught)
        messages.append([str(w.message) for w in caught])
    assert [len(m) for m in messages] == [0, 0, 1, 0, 1, 1, 0, 1]
    assert "update 2: the verdict changes from steady to vanishing" in messages[2][0]
    assert "from vanishing to exploding" in messages[4][0]
    assert "xs['a'] is the first to be NaN or infinite, at step 7 of sequence 3" in messages[5][0]
    assert "from non-finite to exploding" in messages[7][0]


def diagonal(params, h, x):
    return params * h + x


def last(states):
    return jnp.sum(states[-1])


def test_a_nan_that_follows_adjoints_that_overflow_is_named_too():
    monitor, messages = bptt.Monitor(diagonal, last), []
    for update, weight in enumerate((1.0, 5.0, 5.0, math.nan, math.nan)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            monitor.probe(update, jnp.full(2, weight), jnp.zeros(2), jnp.zeros((3, 100, 2)))
        messages.append([str(w.message) for w in caught])
    assert [len(m) for m in messages] == [0, 1, 0, 1, 0]
    assert "adjoint is the first to leave the range" in messages[1][0]
    assert "from exploding to non-finite" in messages[3][0]
    assert "params is the first to be NaN or infinite" in messages[3][0]


def test_large_states_and_states_carried_over():
    """2000 numbers, whose Jacobian would have 4 million; a state for every sequence."""
    monitor = bptt.Monitor(diagonal, last, num=2, sequences=2, spectra=1, in_axes=(0, 0, None))
    size = 2000
    params = np.linspace(-0.3, 0.3, size, dtype=np.float32)
    params[:2] = 0.9, -0.7
    state0 = np.zeros((3, size), np.float32)
    state0[1, 0] = 1.0
    record = monitor.probe(0, params, state0, np.zeros((3, 4, size), np.float32))
    np.testing.assert_allclose(record.histograms["bptt/singular_values"], [0.9, 0.7], rtol=1e-5)
    np.testing.assert_allclose(record.histograms["bptt/eigenvalue_moduli"], [0.9, 0.7], rtol=1e-5)
    np.testing.assert_allclose(record.scalars["bptt/loss"], 0.9**4 / 2, rtol=1e-5)


def test_spectra_that_take_hours_are_refused():
    monitor = bptt.Monitor(lambda params, h, x: params * h, last)
    with pytest.raises(
        ValueError, match=r"spectra: of a state of D = 16384 numbers.* 1\.1e\+14 operations.*num= fi"
    ):
        monitor.probe(0, np.float32(0.5), np.ones(16384, np.float32), length=2)


def test_bad_input():
    params, state0, xs, args = example()
    short, wide, scalar = ({"target": a} for a in (args["target"][:2], np.ones((B, 2), np.float32), 1.0))

    def raises(error, match, *arguments, **options):
        with pytest.raises(error, match=match):
            MONITOR.probe(0, *arguments, **options)

    raises(ValueError, "in_axes: expected for args a prefix of its structure", params, state0, xs, args["target"])
    raises(ValueError, "batch: expected one number of sequences", params, state0, xs, args | short)
    raises(ValueError, r"args\['target'\]: expected the batch as axis 0", params, state0, xs, args | scalar)
    raises(ValueError, r"xs\['b'\]: expected time", params, state0, xs | {"b": args["target"]}, args)
    raises(ValueError, "length: expected the number of steps", params, state0, None, args)
    raises(ValueError, "length: expected 12, the first axis of xs, got 5", params, state0, xs, args, length=5)
    raises(TypeError, r"params\['w'\]: expected an array", params | {"w": "w"}, state0, xs, args)
    raises(ValueError, "xs: expected one number of steps", params, state0, xs | {"b": xs["b"][:, 1:]}, args)
    raises(ValueError, "loss: must return a scalar", params, state0, xs, args | wide)
    for error, name, options in [
        (ValueError, "every", {"every": 0}),
        (TypeError, "sequences", {"sequences": 1.5}),
        (ValueError, "spectra", {"spectra": 0}),
        (ValueError, "num", {"num": 0}),
        (ValueError, "threshold", {"threshold": 2.0}),
        (ValueError, "share", {"share": 0.0}),
        (TypeError, "in_axes", {"in_axes": (None, 0)}),
        (TypeError, "in_axes", {"in_axes": (None, 0.0, 0)}),
    ]:
        with pytest.raises(error, match=f"{name}: expected"):
            bptt.Monitor(step, loss, **options)
    with pytest.raises(TypeError, match="loss: expected a function"):
        bptt.Monitor(step, None)


def test_batches_of_any_length_are_noticed(monkeypatch) -> None:
    monkeypatch.setattr(checks, "_run", {})
    monkeypatch.setattr(checks, "_MANY", 2)
    monitor = bptt.Monitor(lambda w, h, x: w * h + x, lambda states: jnp.sum(states[-1]), spectra=1)
    for length, noticed in ((2, False), (2, False), (3, True)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", bptt.RecompilationWarning)
            monitor.probe(0, jnp.float32(0.5), jnp.zeros(1), np.ones((2, length, 1), np.float32))
        assert [w.category for w in caught] == [bptt.RecompilationWarning] * noticed
        assert all(w.filename == __file__ for w in caught)


def test_once_there_are_more_programs_than_allowed_all_are_let_go(compilations) -> None:
    xs = [np.ones(n, np.float32) for n in (1, 2, 3)]
    double = devices.compiled(lambda x: 2 * x, most=2)
    for new, x in ((1, xs[0]), (1, xs[1]), (0, xs[0]), (1, xs[2]), (1, xs[0]), (1, xs[2]), (0, xs[0])):
        del compilations[:]
        double(x)
        assert len(compilations) == new


def test_noise_is_that_of_the_sampled_sequences_at_the_size_of_the_batch():
    params, state0, xs, args = example()
    monitor = bptt.Monitor(step, loss, sequences=3, noise=4, in_axes=(None, 0, AXES))
    scalars = quietly(monitor.probe, 0, params, state0, xs, args).scalars
    three = jax.tree.map(lambda a: a[:3], xs), {**args, "target": args["target"][:3]}
    found = bptt.analysis.gradient_noise(
        step, params, state0, three[0], loss, args=three[1], in_axes=(None, 0, AXES), longest=4, batch=B
    )
    assert scalars["bptt/noise_scale"] == pytest.approx(float(found.noise_scale), rel=1e-4)
    assert scalars["bptt/noise_horizon"] == float(found.horizon)
    assert math.isnan(probe(params, state0, xs, args).scalars["bptt/noise_scale"])
