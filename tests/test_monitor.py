"""`Monitor`: the numbers of `gradient_flow`, stable names, and NaN traced to where it began."""

import inspect
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt

B, T, N = 4, 12, 3
TRACES = []  # one entry for every time that JAX traces the step


def step(params, h, x):
    """A cell `v`, a linear channel `s`, and `r` whose derivative is not finite where ``x["b"]`` is 0."""
    TRACES.append(None)
    v = jnp.tanh(params["w"] @ h["v"] + x["a"])
    return {"v": v, "s": params["grow"] * h["s"] + x["c"], "r": 0.5 + jnp.sqrt(h["r"] * x["b"])}


def loss(params, states, target):
    """The norm of v_T has no derivative at 0."""
    read = jnp.dot(params["out"], states["v"][-1]) + jnp.linalg.norm(states["v"][-1]) + jnp.sum(states["r"][-1])
    return read + target * jnp.sum(states["s"][-1])


MONITOR = bptt.Monitor(step, loss, every=5, sequences=2, spectra=3)


def example():
    """Of NumPy, to be spoiled in place: parameters, h_0, and a batch."""
    rng = np.random.default_rng(0)
    params = {"w": 0.9 * np.linalg.qr(rng.standard_normal((N, N)))[0], "grow": np.ones(2), "out": np.ones(N)}
    state0 = {"v": np.zeros(N), "s": np.zeros(2), "r": np.ones(1)}
    xs = {"a": 0.1 * rng.standard_normal((B, T, N)), "b": np.full((B, T, 1), 0.5), "c": np.zeros((B, T, 2))}
    return jax.tree.map(np.float32, (params, state0, (xs, np.ones(B))))


def probe(params, state0, batch, update=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bptt.MonitorWarning)
        return MONITOR.probe(update, params, state0, batch)


def spoiled(where):
    """`example` with one number changed, the array that is to be named, the step, and the sequence."""
    params, state0, (xs, targets) = example()
    match where:
        case "weight":
            params["w"][1, 2] = np.nan
            expected = "params['w']", 1, 0
        case "readout":
            params["out"][0] = np.inf
            expected = "params['out']", -1, 0
        case "input":
            xs["a"][3, 6, 0] = np.nan
            expected = "xs['a']", 7, 3
        case "target":
            targets[3] = np.nan
            expected = "targets", -1, 3
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
    return (params, state0, (xs, targets)), expected


@pytest.mark.parametrize(
    "where",
    [
        "weight",
        "readout",
        "input",
        "target",
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
    record = probe(*arguments)  # sequence 3 is not among the sampled ones
    assert record.nonfinite == found
    assert record.verdict == ("exploding" if where == "overflow backwards" else "non-finite")
    assert record.scalars["bptt/non_finite/step"] == at
    assert record.scalars["bptt/non_finite/sequence"] == sequence


def test_norms_before():
    """The norms of s are 1, 1e10, .. before it overflows; of dL/ds, before the others count, powers of 1e10."""
    forward = MONITOR.locate(*spoiled("overflow")[0]).log_norms_before
    assert np.all(np.isneginf(forward[:2]))
    np.testing.assert_allclose(forward[2:], np.log(np.sqrt(2)) + 10 * np.log(10) * np.arange(4), rtol=1e-5)
    backward = MONITOR.locate(*spoiled("overflow backwards")[0]).log_norms_before
    assert len(backward) == 4
    np.testing.assert_allclose(backward[1:], np.log(np.sqrt(2)) + 10 * np.log(10) * np.arange(1, 4), rtol=1e-5)
    params, state0, (xs, _) = spoiled("input")[0]
    xs = {name: a[3] for name, a in xs.items()}
    states = jax.vmap(lambda a: jnp.linalg.norm(bptt.ravel_state(a)[0]))(bptt.unroll(step, params, state0, xs))
    np.testing.assert_allclose(MONITOR.locate(*spoiled("input")[0]).log_norms_before, np.log(states[:6]), rtol=1e-5)


def test_what_the_step_masks_is_no_nan():
    """A NaN among inputs that nothing reads."""
    params, state0, (xs, targets) = example()
    unread = xs | {"unread": np.full((B, T), np.nan, np.float32)}
    assert MONITOR.locate(params, state0, (unread, targets)) is None


def test_scalars_are_those_of_gradient_flow():
    params, state0, (xs, targets) = example()
    record = probe(params, state0, (xs, targets))

    @jax.jit
    def flows(params, state0, xs, targets):
        def one(x, y):
            return bptt.gradient_flow(step, params, state0, x, lambda states: loss(params, states, y))

        return jax.vmap(one)(xs, targets)

    flow = flows(params, state0, *jax.tree.map(lambda a: a[:2], (xs, targets)))
    adjoints, sv, ev = (np.asarray(a) for a in (flow.adjoint_log_norms, flow.singular_values, flow.eigenvalues))
    owners, at = [0, 1, 0], [3, 7, 11]  # three Jacobians, spread over time, from two sequences

    def median(values):
        return np.quantile(values, 0.5, method="inverted_cdf")

    expected = {
        "loss": np.mean(flow.loss),
        "growth_rate": median(flow.growth_rate),
        "horizon": median(flow.horizon),
        "end_gain": median(flow.end_gain),
        "peak_gain": median(flow.peak_gain),
        "gradient_log_norm": median(flow.params_grad_log_norm),
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
        params, state0, (xs, targets) = example()
        params["grow"][:] = grow
        params["w"] *= 0.1
        xs["b"][:] = 0.01
        return params, state0, (xs, targets)

    # 0.1 ** 12 is lost, 5 ** 12 is an explosion.
    sequence = [at(1), at(1), at(0.1), at(0.1), at(5), *[spoiled("input")[0]] * 2, at(5)]
    probe(*sequence[0])
    messages = []
    for update, arguments in enumerate(sequence):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            MONITOR.probe(update, *arguments)
        assert all(w.category is bptt.MonitorWarning and w.filename == __file__ for w in caught)
        messages.append([str(w.message) for w in caught])
    assert [len(m) for m in messages] == [0, 0, 1, 0, 1, 1, 0, 1]
    assert "update 2: the verdict changes from steady to vanishing" in messages[2][0]
    assert "from vanishing to exploding" in messages[4][0]
    assert "xs['a'] is the first to be NaN or infinite, at step 7 of sequence 3" in messages[5][0]
    assert "from non-finite to exploding" in messages[7][0]


def diagonal(params, h, x):
    return params * h + x


def last(params, states, target):
    return jnp.sum(states[-1])


def test_large_states_and_states_carried_over():
    """2000 numbers, whose Jacobian would have 4 million; a state for every sequence."""
    monitor = bptt.Monitor(diagonal, last, num=2, sequences=2, spectra=1, state_axis=0)
    size = 2000
    params = np.linspace(-0.3, 0.3, size, dtype=np.float32)
    params[:2] = 0.9, -0.7
    state0 = np.zeros((3, size), np.float32)
    state0[1, 0] = 1.0
    record = monitor.probe(0, params, state0, (np.zeros((3, 4, size), np.float32), None))
    np.testing.assert_allclose(record.histograms["bptt/singular_values"], [0.9, 0.7], rtol=1e-5)
    np.testing.assert_allclose(record.histograms["bptt/eigenvalue_moduli"], [0.9, 0.7], rtol=1e-5)
    np.testing.assert_allclose(record.scalars["bptt/loss"], 0.9**4 / 2, rtol=1e-5)


def test_bad_input():
    params, state0, (xs, targets) = example()

    def raises(error, match, *arguments):
        with pytest.raises(error, match=match):
            MONITOR.probe(0, *arguments)

    raises(TypeError, r"batch: expected a tuple \(xs, targets\), got dict", params, state0, xs)
    raises(ValueError, "batch: expected one number of sequences", params, state0, (xs, targets[:2]))
    raises(ValueError, r"xs\['b'\]: expected batch and time", params, state0, (xs | {"b": targets}, targets))
    raises(ValueError, "xs: expected inputs", params, state0, (None, targets))
    raises(TypeError, r"params\['w'\]: expected an array", params | {"w": "w"}, state0, (xs, targets))
    raises(ValueError, "xs: expected one number of steps", params, state0, (xs | {"b": xs["b"][:, 1:]}, targets))
    raises(ValueError, "loss: must return a scalar", params, state0, (xs, np.ones((B, 2), np.float32)))
    for error, name, options in [
        (ValueError, "every", {"every": 0}),
        (TypeError, "sequences", {"sequences": 1.5}),
        (ValueError, "spectra", {"spectra": 0}),
        (ValueError, "num", {"num": 0}),
        (ValueError, "fraction", {"fraction": 2.0}),
        (ValueError, "state_axis", {"state_axis": 1}),
    ]:
        with pytest.raises(error, match=f"{name}: expected"):
            bptt.Monitor(step, loss, **options)
    with pytest.raises(TypeError, match="loss: expected a function"):
        bptt.Monitor(step, None)
