"""Each transformation against a restatement in NumPy float64 (Python floats), inside jit, vmap and scan."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import relative_error, users_jit
from slices import covering

import bptt_jax as bptt
from bptt_jax.remedies.clipping import (
    autoclip,
    clip_adjoints,
    clip_by_global_norm,
    clip_records,
    skip_records,
    skip_updates,
    with_clipping,
    zclip,
)

DIRECTION = np.array([0.6, -0.64, 0.48])  # of norm 1
SIZES = [0.3, 1.0, 7.0, 1e20, 3e38, 1e-30, 0.0, math.nan, math.inf, 5.0]


def gradient(size: float) -> dict[str, jax.Array]:
    if math.isinf(size):
        return {"a": jnp.array([1.0, jnp.inf]), "b": jnp.array([[2.0]])}
    return {
        "a": jnp.asarray(DIRECTION[:2] * size, jnp.float32),
        "b": jnp.asarray([[DIRECTION[2] * size]], jnp.float32),
    }


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(a, np.float64)) for a in jax.tree.leaves(tree)])


def run(transformation, sizes, how="jit"):
    """The updates that come out, one after the other, and the final state."""
    state = transformation.init(gradient(1.0))
    if how == "scan":
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *map(gradient, sizes))

        def body(state, g):
            updates, state = transformation.update(g, state)
            return state, updates

        state, out = users_jit(lambda s, g: jax.lax.scan(body, s, g))(state, stacked)
        return [jax.tree.map(lambda a, i=i: a[i], out) for i in range(len(sizes))], state
    update = users_jit(transformation.update)
    out = []
    for size in sizes:
        updates, state = update(gradient(size), state)
        out.append(updates)
    return out, state


@pytest.mark.parametrize("how", ["jit", "scan"])
def test_global_norm(how) -> None:
    out, state = run(clip_by_global_norm(2.0), SIZES, how)
    for size, got in zip(SIZES, out, strict=True):
        if not math.isfinite(size) or size <= 2.0:
            np.testing.assert_array_equal(flat(got), flat(gradient(size)))  # bit for bit
        else:
            np.testing.assert_allclose(flat(got), 2.0 * DIRECTION, rtol=1e-5)
    (record,) = clip_records(state)
    assert int(record.updates) == len(SIZES)
    assert int(record.acted) == sum(2 < s < math.inf for s in SIZES)
    assert float(record.share) == pytest.approx(4 / 10)
    assert float(record.log_norm_before) == pytest.approx(math.log(5))
    assert float(record.log_norm_after) == pytest.approx(math.log(2))


def test_global_norm_where_optax_returns_zeros() -> None:
    """Why it exists: the same gradient through both."""
    sizes = 1e20, 0.3, 7.0
    theirs, _ = run(optax.clip_by_global_norm(2.0), sizes)
    ours, _ = run(clip_by_global_norm(2.0), sizes)
    assert np.linalg.norm(flat(theirs[0])) == 0
    assert np.linalg.norm(flat(ours[0])) == pytest.approx(2, rel=1e-5)
    for got, expected in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(flat(got), flat(expected), rtol=1e-5)


def test_global_norm_under_vmap_clips_each() -> None:
    transformation = clip_by_global_norm(2.0)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *map(gradient, SIZES))
    out, state = jax.jit(jax.vmap(lambda g: transformation.update(g, transformation.init(g))))(stacked)
    singles = [run(transformation, [s])[0][0] for s in SIZES]
    for i, single in enumerate(singles):
        np.testing.assert_allclose(flat(jax.tree.map(lambda a, i=i: a[i], out)), flat(single), rtol=1e-6)
    np.testing.assert_array_equal(state.record.acted, [2 < s < math.inf for s in SIZES])


def reference_autoclip(norms, quantile, window, warmup):
    history, out = [], []
    for norm in norms:
        if math.isfinite(norm):
            history.append(norm)
        recent = sorted(history[-window:])
        threshold = recent[math.ceil(quantile * len(recent)) - 1] if len(history) >= warmup else math.inf
        out.append(min(norm, threshold) if math.isfinite(norm) else norm)
    return out


def test_autoclip() -> None:
    rng = np.random.default_rng(0)
    norms = [*np.exp(rng.normal(size=40)), math.nan, 1e20, math.inf, *np.exp(rng.normal(size=10)), 1e-30, 0.0, 3.0]
    norms[0] = math.nan  # a NaN in the warm-up
    out, state = run(autoclip(0.3, window=16, warmup=5), norms, "scan")
    expected = reference_autoclip(norms, 0.3, 16, 5)
    for got, want, size in zip(out, expected, norms, strict=True):
        if math.isfinite(size):
            np.testing.assert_allclose(flat(got), want * DIRECTION, rtol=2e-5, atol=1e-37)
        else:
            np.testing.assert_array_equal(flat(got), flat(gradient(size)))
    assert state.log_norms.shape == (16,)
    assert int(state.seen) == sum(map(math.isfinite, norms))


def reference_zclip(norms, z_star, decay, warmup):
    first, out, mean, variance = [], [], 0.0, 0.0
    for norm in norms:
        if not math.isfinite(norm):
            out.append(norm)
            continue
        if len(first) < warmup:
            out.append(norm)
            first.append(norm)
            mean, variance = np.mean(first), np.var(first)
            continue
        z = (norm - mean) / (math.sqrt(variance) + 1e-6)
        taken = mean + z_star**2 * math.sqrt(variance) / z if z > z_star else norm
        out.append(taken)
        mean = decay * mean + (1 - decay) * taken
        variance = decay * variance + (1 - decay) * (taken - mean) ** 2
    return out


def test_zclip() -> None:
    rng = np.random.default_rng(1)
    norms = [
        *(3 + 0.3 * rng.normal(size=30)),
        30.0,
        math.nan,
        1e20,
        math.inf,
        *(3 + 0.3 * rng.normal(size=20)),
        4.5,
    ]
    norms[3] = math.nan
    norms[4] = math.inf
    norms[5] = 0.0
    out, state = run(zclip(2.5, decay=0.9, warmup=10), norms, "scan")
    expected = reference_zclip(norms, 2.5, 0.9, 10)
    for got, want, size in zip(out, expected, norms, strict=True):
        if math.isfinite(size):
            np.testing.assert_allclose(flat(got), want * DIRECTION, rtol=2e-4)
        else:
            np.testing.assert_array_equal(flat(got), flat(gradient(size)))
    assert int(state.record.acted) >= 2
    assert np.isfinite([float(state.mean), float(state.variance)]).all()


def test_zclip_warmup_is_not_poisoned_by_a_norm_whose_square_overflows() -> None:
    _, state = run(zclip(warmup=3), [1.0, 1e30, 2.0, 3.0])
    assert float(state.mean) == pytest.approx(2.0)
    assert float(state.variance) == pytest.approx(np.var([1, 2, 3]))


def test_skip_keeps_parameters_and_inner_state() -> None:
    inner = optax.adam(0.1)
    with jax.numpy_dtype_promotion("standard"):  # adam's own bias correction mixes dtypes
        both, _ = run(inner, [1.0, 2.0])
        out, state = run(skip_updates(inner, max_norm=10.0), [1.0, math.nan, 1e20, math.inf, 2.0])
    np.testing.assert_allclose(flat(out[0]), flat(both[0]))
    np.testing.assert_allclose(flat(out[4]), flat(both[1]))  # as if the three had never been
    for skipped in out[1:4]:
        np.testing.assert_array_equal(flat(skipped), 0)
    assert int(state.record.acted) == 3
    assert int(state.in_a_row) == 0
    assert not bool(state.exhausted)


def test_skip_limit_lets_large_but_never_nonfinite_updates_pass() -> None:
    transformation = skip_updates(optax.identity(), max_norm=1.0, max_in_a_row=2)
    out, state = run(transformation, [5.0, 5.0, math.nan, 5.0, 0.5], "scan")
    np.testing.assert_array_equal([bool(np.any(flat(o) != 0)) for o in out], [False, False, False, True, True])
    np.testing.assert_allclose(flat(out[3]), 5 * DIRECTION, rtol=1e-6)
    assert bool(state.exhausted)
    again, _ = run(transformation, [5.0] * 6, "scan")  # two are skipped, not three, and then two once more
    np.testing.assert_array_equal([bool(np.any(flat(o) != 0)) for o in again], [False, False, True] * 2)


def test_a_skipped_nan_does_not_spoil_derivatives() -> None:
    """Of what is left of the update with respect to the rate: none, and not 0 * NaN."""

    def moved(rate):
        transformation = skip_updates(optax.sgd(rate))
        return jnp.sum(transformation.update(gradient(math.nan), transformation.init(gradient(1.0)))[0]["a"])

    assert float(jax.jit(jax.grad(moved))(0.1)) == 0


def test_clipped_chain_survives_everything_and_tells() -> None:
    transformation = with_clipping(optax.sgd(1.0), 2.0)
    out, state = run(transformation, SIZES, "scan")
    for size, got in zip(SIZES, out, strict=True):
        want = -min(size, 2.0) * DIRECTION if math.isfinite(size) else np.zeros(3)
        np.testing.assert_allclose(flat(got), want, rtol=1e-5)
    (skipping,), (clipping,) = skip_records(state), clip_records(state)
    assert (int(skipping.acted), int(clipping.acted)) == (2, 4)


def test_clip_adjoints_by_norm_and_value() -> None:
    """Scalar map h = 3 h: without the clip dL/dh_0 = 3^5; with it every adjoint is at most the threshold."""

    def step(p, h, x):
        return p * h + x

    def loss(p, step):
        return jnp.sum(bptt.unroll(step, p, jnp.ones(2), jnp.ones((5, 2)))[-1])

    value, bare = jax.value_and_grad(loss)(jnp.float32(3.0), step)
    states = np.asarray(bptt.unroll(step, 3.0, jnp.ones(2), jnp.ones((5, 2))), np.float64)
    starts = np.concatenate([np.ones((1, 2)), states[:-1]])
    cases = [
        ({"max_norm": 0.5}, lambda a: a * min(1, 0.5 / np.linalg.norm(a))),
        ({"max_value": 2.0}, lambda a: np.clip(a, -2, 2)),
        (
            {"max_value": 2.0, "max_norm": 2.5},
            lambda a: np.clip(a, -2, 2) * min(1, 2.5 / np.linalg.norm(np.clip(a, -2, 2))),
        ),
    ]
    for options, rule in cases:
        wrapped = clip_adjoints(step, **options)
        same, got = jax.jit(jax.value_and_grad(lambda p, w=wrapped: loss(p, w)))(jnp.float32(3.0))
        assert same == value  # exact forward
        adjoint, want = np.ones(2), 0.0
        for h in starts[::-1]:
            adjoint = rule(adjoint)
            want += adjoint @ h
            adjoint = 3 * adjoint
        assert float(got) == pytest.approx(want, rel=1e-5)
        assert float(got) != pytest.approx(float(bare), rel=1e-2)


def test_clip_adjoints_under_vmap_clips_each_sequence() -> None:
    step = clip_adjoints(lambda p, h, x: p * h + x, max_norm=1.0)

    def one(scale):
        return jax.grad(lambda p: scale * jnp.sum(bptt.unroll(step, p, jnp.ones(2), jnp.ones((4, 2)))[-1]))(2.0)

    scales = jnp.array([0.1, 10.0])
    np.testing.assert_allclose(jax.vmap(one)(scales), [one(s) for s in scales], rtol=1e-6)


def test_clip_adjoints_leaves_what_is_within_and_finite_alone() -> None:
    step = clip_adjoints(lambda p, h, x: p * h, max_norm=1e3)
    grad = jax.grad(lambda p: jnp.sum(bptt.unroll(step, p, jnp.ones(2), length=3)[-1]))(0.5)
    assert float(grad) == pytest.approx(2 * 3 * 0.25)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: clip_by_global_norm(0.0), ValueError, "max_norm: expected a number above 0, got 0.0"),
        (lambda: clip_by_global_norm(math.nan), ValueError, "max_norm"),
        (lambda: autoclip(1.0), ValueError, "quantile: expected a number between 0 and 1, got 1.0"),
        (lambda: autoclip(window=0), ValueError, "window: expected at least 1"),
        (lambda: zclip(-1.0), ValueError, "z_threshold"),
        (lambda: zclip(decay=1.0), ValueError, "decay: expected a number between 0 and 1, got 1.0"),
        (lambda: zclip(warmup=2.5), TypeError, "warmup: expected an integer"),
        (lambda: skip_updates(optax.sgd(1.0), max_in_a_row=0), ValueError, "max_in_a_row"),
        (lambda: clip_adjoints(lambda p, h, x: h), ValueError, "expected max_norm or max_value, got neither"),
        (lambda: clip_adjoints(lambda p, h, x: h, max_value=-1), ValueError, "max_value"),
    ],
)
def test_bad_arguments(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()


def test_clip_adjoints_keeps_infinities_and_clips_complex_parts() -> None:
    step = clip_adjoints(lambda p, h, x: p * h, max_value=2.0)
    _, pull = jax.vjp(lambda h: step(1.0, h, None), jnp.ones(3))
    np.testing.assert_array_equal(pull(jnp.array([jnp.inf, 5.0, -5.0]))[0], [np.inf, 2, -2])
    _, pull = jax.vjp(
        lambda h: clip_adjoints(lambda p, h, x: h, max_value=2.0)(None, h, None), jnp.ones(1, complex)
    )
    np.testing.assert_array_equal(pull(jnp.array([3.0 - 5.0j], jnp.complex64))[0], [2 - 2j])


def test_thresholds_may_be_traced_and_a_bad_one_is_found_when_it_runs() -> None:
    with jax.numpy_dtype_promotion("standard"):
        transformation = optax.inject_hyperparams(clip_by_global_norm)(max_norm=2.0)
        out, _ = run(transformation, [7.0])
        np.testing.assert_allclose(flat(out[0]), 2 * DIRECTION, rtol=1e-5)

        def update(max_norm):
            bad = clip_by_global_norm(max_norm)
            return bad.update(gradient(7.0), bad.init(None))[0]

        with pytest.raises(Exception, match="max_norm: expected a number above 0"):
            jax.block_until_ready(jax.jit(update)(-1.0))


@pytest.mark.parametrize(
    ("make", "setting", "message"),
    [
        (clip_by_global_norm, -1.0, "max_norm: expected a number above 0"),
        (autoclip, -5.0, "quantile: expected a number between 0 and 1"),
        (zclip, 0.0, "z_threshold: expected a number above 0"),
        (lambda decay: zclip(decay=decay), 7.0, "decay: expected a number between 0 and 1"),
        (lambda n: skip_updates(optax.identity(), max_norm=n), -1.0, "max_norm: expected a number above 0"),
        (lambda n: with_clipping(optax.identity(), n), math.nan, "max_norm: expected a number above 0"),
    ],
)
def test_traced_settings_are_refused_when_run(make, setting, message) -> None:
    """From the first update on, though none of them has an effect before the warm-up is over."""

    def update(setting, g):
        transformation = make(setting)
        return transformation.update(g, transformation.init(g))[0]

    compiled = jax.jit(update)
    np.testing.assert_array_equal(flat(compiled(0.5, gradient(0.25))), flat(gradient(0.25)))
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(compiled(setting, gradient(0.25)))


@pytest.mark.parametrize("setting", ["max_norm", "max_value"])
def test_traced_thresholds_of_adjoints_are_refused_when_run(setting) -> None:
    def pulled(bound):
        step = clip_adjoints(lambda p, h, x: p * h, **{setting: bound})
        return jax.grad(lambda h: step(2.0, h, None))(1.0)

    compiled = jax.jit(pulled)
    assert float(compiled(0.5)) == 1
    with pytest.raises(Exception, match=f"{setting}: expected a number above 0"):
        jax.block_until_ready(compiled(-0.5))


def test_the_state_may_be_none_as_with_optax() -> None:
    updates, state = clip_by_global_norm(2.0).update(gradient(7.0), None)
    theirs, _ = optax.clip_by_global_norm(2.0).update(gradient(7.0), None)
    np.testing.assert_allclose(flat(updates), flat(theirs), rtol=1e-6)
    updates, state = clip_by_global_norm(2.0).update(gradient(1.0), state)
    assert (int(state.record.updates), int(state.record.acted)) == (2, 1)


TRANSFORMATIONS = {
    "clip_by_global_norm": lambda: clip_by_global_norm(1.0),
    "autoclip": lambda: autoclip(warmup=1),
    "zclip": lambda: zclip(warmup=1),
    "skip_updates": lambda: skip_updates(optax.identity()),
    "with_clipping": lambda: with_clipping(optax.identity(), 1.0),
}


@pytest.mark.parametrize("name", covering(TRANSFORMATIONS, "autoclip", "with_clipping"))
@pytest.mark.parametrize(("factors", "constants"), [((2, 2), ()), ((1, 2), (0, 1e30, math.inf, math.nan))])
def test_what_passes_has_the_identity_as_its_derivative(name, factors, constants) -> None:
    """At zero and at an ordinary gradient; and none with respect to the gradients before, whatever they were."""
    transformation = {"autoclip": autoclip(0.5), "zclip": zclip(warmup=2)}.get(name) or TRANSFORMATIONS[name]()

    def last(u, v):
        state = transformation.init(u)
        for before in (*(k * u for k in factors), *(jnp.full_like(u, size) for size in constants)):
            _, state = transformation.update(before, state)
        return transformation.update(v, state)[0]

    u, z = jnp.asarray([0.5, 0.0, 0.0]), jnp.zeros(1, complex)
    derivatives = jax.jit(jax.jacobian(last, (0, 1)))
    for v in (0 * u, u):
        of_first, own = derivatives(u, v)
        np.testing.assert_array_equal(own, np.eye(3))
        np.testing.assert_array_equal(of_first, 0)
    along = jax.jit(lambda tangent: jax.jvp(partial(last, z), (z,), (tangent,))[1])
    np.testing.assert_array_equal(along(z + 1j), [1j])


def to_norm_one(u):
    return u * jnp.minimum(1, 1 / jnp.linalg.norm(u))


def reciprocal(u):
    """After norms 1 and 2, of mean 3/2 and deviation 1/2, the threshold 2.5 deviations above."""
    norm = jnp.linalg.norm(u)
    return jnp.where(norm > 1.5 + 2.5 * 0.5, u / norm * (1.5 + 2.5**2 * 0.5**2 / (norm - 1.5)), u)


FORMULAS = {
    "clip_by_global_norm": to_norm_one,
    "autoclip": to_norm_one,
    "zclip": reciprocal,
    "skip_updates": lambda u: u,
    "with_clipping": to_norm_one,
}


@cache
def derivatives_of(name):
    """After two gradients; and those of the formula."""
    transformation = zclip(warmup=2) if name == "zclip" else TRANSFORMATIONS[name]()

    def after_two(u):
        state = transformation.init(u)
        for earlier in (DIRECTION, 2 * DIRECTION):
            _, state = transformation.update(jnp.asarray(earlier), state)
        return transformation.update(u, state)[0]

    return jax.jit(lambda u: (jax.jacobian(after_two)(u), jax.jacobian(FORMULAS[name])(u)))


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("size", [0.5, 7.0, 1e30])
def test_derivatives_are_those_of_the_formulas(name, size, x64) -> None:
    got, expected = derivatives_of(name)(jnp.asarray(DIRECTION * size))
    assert relative_error(got, expected) < 3e-6  # norms are remembered in single precision


def test_zclip_goes_on_after_gradients_of_zero() -> None:
    """Beside a mean of zero every gradient would stand out, and be clipped to zero for good."""
    out, state = run(zclip(warmup=2), [0.0, 0.0, 1.0, 2.0, 2.0])
    np.testing.assert_allclose(flat(out[2]), DIRECTION, rtol=1e-6)
    assert float(state.mean) > 0


def test_autoclip_moves_on_where_many_gradients_are_zero() -> None:
    """One of two: at a threshold of zero no gradient would ever pass."""
    out, state = run(autoclip(0.3, window=8, warmup=2), [0.0, 1.0] * 6, "scan")
    np.testing.assert_allclose(flat(out[-1]), DIRECTION, rtol=1e-6)
    assert int(state.record.acted) == 0


def test_parts_of_a_gradient_that_are_not_finite_are_left_out() -> None:
    """Gathering inside the chain, as the docstring says; around it a NaN stays in the sum."""
    sizes = [1.0, math.nan, 1.0, 1.0]
    inside = with_clipping(optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(), 0.5)
    around = optax.MultiSteps(with_clipping(optax.sgd(1.0), 0.5), 2).gradient_transformation()
    with jax.numpy_dtype_promotion("standard"):
        recovered, lost = run(inside, sizes)[0], run(around, sizes)[0]
    np.testing.assert_allclose(flat(recovered[2]), -0.5 * DIRECTION, rtol=1e-6)
    assert not np.any([flat(update) for update in lost])


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_extra_arguments_are_taken_and_handed_on(name) -> None:
    """By every link, alone and in a chain; to the optimiser inside, where there is one."""
    given = []

    def keep(updates, state, params=None, *, value, **extra):
        given.append((value, sorted(extra)))
        return updates, state

    listener = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), keep)
    inside = {"skip_updates": skip_updates(listener), "with_clipping": with_clipping(listener, 1.0)}
    links = [optax.chain(TRANSFORMATIONS[name](), listener), *([inside[name]] if name in inside else [])]
    for link in links:
        updates, _ = link.update(gradient(0.5), link.init(gradient(1.0)), value=3.0, grad=gradient(0.5))
        np.testing.assert_allclose(flat(updates), 0.5 * DIRECTION, rtol=1e-6)
    assert given == [(3.0, ["grad"])] * len(links)


def test_reduce_on_plateau_and_optimisers_that_want_no_extra_arguments() -> None:
    with jax.numpy_dtype_promotion("standard"):
        for inner in (optax.contrib.reduce_on_plateau(), optax.identity()):
            transformation = with_clipping(inner, 1.0)
            update = jax.jit(lambda g, t=transformation: t.update(g, t.init(g), value=jnp.float32(1.0))[0])
            updates = update(gradient(0.5))
            np.testing.assert_allclose(flat(updates), 0.5 * DIRECTION, rtol=1e-6)


def test_double_precision_gradients() -> None:
    with jax.enable_x64(True):
        for transformation in (clip_by_global_norm(2.0), autoclip(warmup=1), zclip(warmup=1)):
            g = {"a": jnp.asarray(DIRECTION * 7)}
            updates = jax.jit(lambda g, t=transformation: t.update(g, t.init(g))[0])(g)
            assert updates["a"].dtype == jnp.float64
