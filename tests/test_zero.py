"""Derivatives where something is exactly zero: never NaN, and right wherever there is one."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from slices import covering
from surface import PUBLIC

import bptt_jax as bptt
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.remedies import autoclip, clip_adjoints, clip_by_global_norm, skip_updates, with_clipping, zclip
from bptt_jax.results import Result

# --- All norms, and what is like one

SIZE = re.compile(r"norm|magnitude|gain|singular|eigenvalue|radius|condition|log_values|log_scale|^values$")
STILL = {
    "FixedPoints.eigenvalue_errors": "how sure the eigenvalues are",
    "LyapunovSpectrum.orthonormalised": "true or false",
    "BatchSums.values": "sums of growth",
    "Eigensystem.condition_numbers": "one at least",
    "CalibrationTrials.values": "constants: the trials of calibrate",
    "GainTrials.end_gain": "constants: the trials of recommend_gain",
    "GainTrials.peak_gain": "constants: the trials of recommend_gain",
    "RecommendedGain.log_gains": "constants: the trials of recommend_gain",
    "RecommendedGain.gain": "constants: the trials of recommend_gain",
    "analysis.recommend_gain": "constants: the trials of recommend_gain",
    "GradientFlow.leaf_log_norms": "of NumPy; those of LeafFlow are here",
    "Audit.exact_log_norm": "that of `adjoints`, of a batch",
    "GradientPrecision.log_norms": "on the host",
    "NonFinite.log_norms_before": "a word about what is not finite, on the host",
    "CellMeasurement.log_condition": "on the host, of measurements that are no longer traced",
    "plots.plot_eigenvalues": "a figure",
    "plots.plot_norms": "a figure",
    "plots.plot_singular_values": "a figure",
    "clip_by_global_norm": "a transformation, below",
}
XS = np.ones((3, 2), np.float32)
NOTHING = jnp.zeros(2)


def step(p, h, x):
    return {"h": p[:, None] * h["h"][None] @ jnp.ones(2) + x, "still": p[:1] * h["still"]}


def loss(states, weights):
    """Zero for weights of zero, and so is its error signal."""
    return jnp.sum(weights * states["h"][-1])


def measured(function, *arguments, **options):
    """At weights of zero, along `step`, at rest."""

    def of(weights):
        state = {"h": NOTHING, "still": jnp.ones(1)}
        return function(step, weights, state, jnp.zeros((3, 2)), *arguments, args=weights, **options)

    return of


def along_nothing(function, **options):
    """Steps that erase all, for these weights."""

    def of(weights):
        def alone(p, h, x):
            return step(p, {"h": h, "still": jnp.ones(1)}, x)["h"]

        return function(alone, weights, NOTHING, jnp.asarray(XS), **options)

    return of


def at_rest(weights):
    """At a fixed point of zero, where the Jacobian is zero too."""

    def still(p, h, x):
        return p * h

    return bptt.fixed_points(still, weights, jnp.ones((1, 2)), rhs=still)


def noise(weights):
    batch = jnp.zeros((4, 3, 2))
    return measured(
        lambda *given, **options: bptt.analysis.gradient_noise(
            *given[:3], batch, loss, in_axes=(None, 0, None), **options
        )
    )(weights)


def stacks(weights):
    matrices = jnp.stack([jnp.diag(weights), jnp.ones((2, 2)) + jnp.diag(weights)])
    names = ("eigenvalues", "singular_values", "linalg.condition_number", "linalg.spectral_norm")
    found = {name: PUBLIC[name](matrices) for name in (*names, "linalg.spectral_radius")}
    product = bptt.linalg.product_singular_vectors(matrices)
    found |= sizes(product) | {"linalg.product_singular_vectors": product.log_values}
    system, vectors = bptt.eigensystem(matrices), bptt.linalg.singular_vectors(matrices)
    found |= sizes(system) | sizes(vectors) | {"linalg.singular_vectors": vectors.values}
    return found | {"product_log_norms": bptt.product_log_norms(matrices)}


def parallel(weights):
    ones = jnp.ones((3, 2, 2))
    return bptt.parallel.parallel_adjoints(ones, jnp.stack([NOTHING, NOTHING, weights]))


def after_clips(weights):
    """The records in all states of clips."""
    found = {}
    for name, transformation in (("ClipRecord", clip_by_global_norm(1.0)), ("AutoClipState", autoclip(window=2))):
        state = transformation.update({"a": weights, "b": NOTHING}, transformation.init(None))[1]
        part = state.record if name == "ClipRecord" else state
        found |= {f"{name}.{key}": getattr(part, key) for key in part._fields if SIZE.search(key)}
    return found


CASES = {
    "adjoints": measured(bptt.adjoints, loss, inputs=True),
    "flow": measured(bptt.gradient_flow, loss),
    "by lag": measured(bptt.analysis.gradient_by_lag, loss),
    "noise": noise,
    "influence": along_nothing(bptt.influence_map, intervals=2),
    "leading singular values": along_nothing(bptt.analysis.leading_singular_values, num=1),
    "leading eigenvalues": along_nothing(bptt.analysis.leading_eigenvalues, num=1),
    "product": along_nothing(bptt.analysis.product_singular_values, num=1),
    "fixed points": at_rest,
    "spectra": stacks,
    "parallel": parallel,
    "clips": after_clips,
    "log scale": lambda weights: LogScaled.of({"a": weights, "b": jax.lax.complex(weights, weights)}),
}


def sizes(found):
    """Everything in a result that is a size, by its class and name; of groups too."""
    if isinstance(found, dict):
        return found
    kind = type(found)
    names = [f.name for f in dataclasses.fields(kind)]
    names += [name for name in dir(kind) if isinstance(getattr(kind, name), property)]
    wanted = {f"{kind.__name__}.{name}": name for name in names if SIZE.search(name)}
    own = {key: getattr(found, name) for key, name in wanted.items() if key not in STILL}
    for f in dataclasses.fields(kind):
        if isinstance(getattr(found, f.name), (Result, LogScaled)):
            own |= sizes(getattr(found, f.name))
    return own


FUNCTIONS = ("leading_singular_values", "leading_eigenvalues", "product_singular_values")


@pytest.mark.parametrize("name", covering(CASES, "adjoints", "spectra", "parallel", "clips", "log scale"))
def test_no_size_has_a_nan_for_a_derivative_at_zero(name):
    """Forwards, backwards, and where the others of the same result have a cotangent of zero."""

    def everything(weights):
        found = CASES[name](weights)
        floating = [a for a in jax.tree.leaves(found) if jnp.issubdtype(a.dtype, jnp.inexact)]
        return sizes(found), floating

    @jax.jit
    def both(weights):
        (found, _), push = jax.linearize(everything, weights)
        pull = jax.linear_transpose(push, weights)
        (moved, rest), nothing = push(jnp.ones(2)), partial(jax.tree.map, jnp.zeros_like)
        ones = jax.tree.map(jnp.ones_like, moved)
        return found, moved, pull((ones, nothing(rest))), pull((nothing(moved), nothing(rest)))

    found, moved, back, silent = both(NOTHING)
    for key, value in found.items():
        values = np.concatenate([np.ravel(a) for a in jax.tree.leaves(value)])
        assert np.any((values == 0) | ~np.isfinite(values)), key
    for key, tangent in moved.items():
        assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(tangent)), key
    assert np.all(np.isfinite(back[0]))
    np.testing.assert_array_equal(silent[0], 0)


def test_every_size_is_among_them():
    """A new one is to be added to a case, or to what has no derivative."""
    for module in pkgutil.walk_packages(bptt.__path__, "bptt_jax."):
        if not re.search("plots|cli|__main__", module.name):
            importlib.import_module(module.name)

    def below(kind):
        return {kind, *(k for sub in kind.__subclasses__() for k in below(sub))}

    kinds = {k for k in below(Result) if k.__module__.startswith("bptt_jax")}
    kinds |= {kind for kind in PUBLIC.values() if inspect.isclass(kind)}
    kinds |= {kind for kind in vars(importlib.import_module("bptt_jax.remedies.clipping")).values() if
              inspect.isclass(kind) and kind.__module__ == "bptt_jax.remedies.clipping"}  # fmt: skip
    cells = {entry.make for entry in bptt.cells.ATLAS.values()}
    functions = {name for name, member in PUBLIC.items() if inspect.isfunction(member) and member not in cells}
    expected = {name for name in functions if SIZE.search(name)}
    for kind in kinds:
        names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
        names += getattr(kind, "_fields", ())
        names += [name for name in dir(kind) if isinstance(getattr(kind, name, None), property)]
        expected |= {f"{kind.__name__}.{name}" for name in names if SIZE.search(name)}
    here = {key for name in CASES for key in jax.eval_shape(lambda w, n=name: sizes(CASES[n](w)), NOTHING)}
    assert expected == here | {f"analysis.{name}" for name in FUNCTIONS} | set(STILL)


@pytest.mark.parametrize("name", ["singular_values", "eigenvalues"])
def test_spectra_of_a_matrix_of_zero_have_no_slope(name):
    """Neither one of the many that would do, which none tells from the others."""
    nothing = jnp.zeros((2, 2, 2)).at[1, 0, 0].set(1.0)
    moved = jax.jvp(PUBLIC[name], (nothing,), (jnp.ones_like(nothing),))[1]
    np.testing.assert_array_equal(moved[0], 0)
    np.testing.assert_allclose(moved[1, 0], 1, rtol=1e-6)


# --- Numbers in log scale


def test_a_product_with_one_matrix_of_zero(x64):
    """Its derivative by that matrix is what the others make of it, at any size that plain numbers have."""
    a, b, moved = np.random.default_rng(0).standard_normal((3, 2, 2))
    nothing = jnp.zeros((2, 2))

    def product(scale, m):
        stack = jnp.stack([scale * a, m, b / scale, jnp.eye(2)])
        return (
            bptt.jacobian_product(stack).value,
            bptt.linalg.prefix_products(stack).value[-1],
            bptt.linalg.suffix_products(stack).value[0],
        )

    @jax.jit
    def pushed(scale):
        return jax.jvp(partial(product, scale), (nothing,), (jnp.asarray(moved),))[1]

    for scale in (1.0, 1e-40, 1e40):
        for tangent in pushed(scale):
            np.testing.assert_allclose(tangent, b @ moved @ a, rtol=1e-12)


@pytest.mark.parametrize("remat", covering([False, 2], False))
def test_second_derivatives_where_the_error_signal_is_zero(x64, remat):
    """At a perfect fit every adjoint is zero; the Hessian is not."""

    def tanh_step(w, h, x):
        return jnp.tanh(w @ h + x)

    w, h, xs = jnp.asarray([[0.5, 0.2], [0.1, 0.4]]), jnp.full(2, 0.3), jnp.asarray(XS[:, :1] * [[0.3, -0.2]])
    target = bptt.unroll(tanh_step, w, h, xs)

    def misfit(states, target):
        return jnp.sum(jnp.square(states - target))

    def gradients(w, target):
        found = bptt.adjoints(tanh_step, w, h, xs, misfit, args=target, remat=remat, inputs=True)
        return found.params_grad, found.state0_grad, found.xs_grad

    def plain(w, target):
        def of(w, h, xs):
            return misfit(bptt.unroll(tanh_step, w, h, xs), target)

        return jax.grad(of, (0, 1, 2))(w, h, xs)

    @jax.jit
    def both(target):
        return jax.jacfwd(gradients, (0, 1))(w, target), jax.jacrev(plain, (0, 1))(w, target)

    for got, expected in zip(*map(jax.tree.leaves, both(target)), strict=True):
        assert np.max(np.abs(expected)) > 0.01
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


# --- Clips

CLIPS = {
    "clip_by_global_norm": lambda: clip_by_global_norm(1.0),
    "autoclip": lambda: autoclip(0.6, window=4, warmup=2),
    "zclip": lambda: zclip(warmup=2),
    "skip_updates": lambda: skip_updates(optax.identity()),
    "with_clipping": lambda: with_clipping(optax.identity(), 1.0),
}
DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64)


@pytest.mark.parametrize("name", covering(CLIPS, "with_clipping"))
def test_the_identity_at_a_gradient_of_zero_in_every_dtype(name):
    """First and second derivatives, forwards and backwards, with the batch's other gradients being none."""
    transformation = CLIPS[name]()
    factors = jnp.asarray([1.0, 2.0])
    before = {str(d.dtype): jnp.full((2, 2), 0.5, d) * factors[:, None].astype(d) for d in DTYPES}
    nothing = jax.tree.map(jnp.zeros_like, before)

    @jax.jit
    @jax.vmap
    def derivatives(earlier, gradient):
        ones, state = jax.tree.map(jnp.ones_like, gradient), transformation.init(gradient)
        for _ in range(3):
            _, state = transformation.update(earlier, state)

        def of(g):
            return transformation.update(g, state)[0]

        def pulled(g):
            return jax.vjp(of, g)[1](ones)[0]

        def pushed(g):
            return jax.jvp(of, (g,), (ones,))[1]

        second = [jax.jvp(first, (gradient,), (ones,))[1] for first in (pulled, pushed)]
        return (pushed(gradient), pulled(gradient)), second

    first, second = derivatives(before, nothing)
    for a in jax.tree.leaves(first):
        np.testing.assert_array_equal(a, np.ones_like(a))
    for a in jax.tree.leaves(second):
        np.testing.assert_array_equal(a, np.zeros_like(a))


def test_a_leaf_of_zero_beside_one_that_is_clipped(x64):
    """As of the formula, with squares of moduli, which have derivatives at zero where moduli have none."""

    def formula(tree):
        c = tree["c"]
        norm = jnp.sqrt(jnp.sum(jnp.square(tree["a"])) + jnp.sum(jnp.square(c.real) + jnp.square(c.imag)))
        return jax.tree.map(lambda a: a / norm.astype(a.dtype), tree)

    def ours(tree):
        return with_clipping(optax.identity(), 1.0).update(tree, None)[0]

    tree = {"a": jnp.asarray([3.0, 4.0]), "c": jnp.zeros(2, complex)}
    moved = {"a": jnp.asarray([1.0, 0.5]), "c": jnp.asarray([1.0 + 2j, -1j])}

    def twice(f):
        return jax.jvp(lambda t: jax.jvp(f, (t,), (moved,))[1], (tree,), (moved,))

    for got, expected in zip(*map(jax.tree.leaves, jax.jit(lambda: (twice(ours), twice(formula)))()), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", covering(CLIPS, "zclip", "with_clipping"))
def test_gradients_through_an_inner_loop_that_meets_a_gradient_of_zero(name, x64):
    """Of five clipped steps of descent, the first from the very minimum, against differences."""
    transformation = optax.chain(CLIPS[name](), optax.sgd(0.3))
    pulls = jnp.asarray([1.0, 0.2, 0.1, 9.0, 0.0])  # some gradients beyond the norm of 1, and one more of zero

    def outer(minimum):
        def body(carry, pull):
            w, state = carry
            gradient = jax.grad(lambda w: pull * jnp.sum(jnp.square(w - minimum) * jnp.asarray([1.0, 2.0])))(w)
            updates, state = transformation.update(gradient, state)
            return (w + updates + jnp.asarray([0.4, -0.3]), state), None

        start = jnp.asarray([0.5, -0.7])
        (w, _), _ = jax.lax.scan(body, (start, transformation.init(start)), pulls)
        return jnp.sum(jnp.square(w) * jnp.asarray([1.0, 3.0]))

    at, eps = jnp.asarray([0.5, -0.7]), 1e-3
    value, got = jax.jit(jax.value_and_grad(outer))(at)
    evaluate = jax.jit(jax.vmap(outer))
    shifts = eps * jnp.asarray([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    found = evaluate(at[None] + shifts)
    slopes = (found[::2] - found[1::2]) / (2 * eps)
    assert math.isfinite(value)
    # Truncation of the order of eps^2, and norms that are remembered in single precision.
    np.testing.assert_allclose(got, slopes, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"max_value": 1.0}, {"max_norm": 1.0, "max_value": 0.9}])
def test_clip_adjoints_at_an_adjoint_of_zero(options):
    """The pull is linear there: as of the bare step."""

    def bare(p, h, x):
        return jax.tree.map(lambda a: p.astype(a.dtype) * a, h)

    state = [jnp.ones(2, d) for d in DTYPES]
    _, pull = jax.vjp(lambda h: clip_adjoints(bare, **options)(jnp.float32(2.0), h, None), state)
    nothing, ones = jax.tree.map(jnp.zeros_like, state), jax.tree.map(jnp.ones_like, state)

    @jax.jit
    def both():
        return jax.jvp(pull, (nothing,), (ones,))[1], jax.vjp(pull, nothing)[1]((ones,))

    for a in jax.tree.leaves(both()):
        np.testing.assert_array_equal(a, np.full_like(a, 2))


@pytest.mark.parametrize("name", CLIPS)
def test_updates_without_parameters_and_without_a_state(name):
    """As Optax's own tests call them; a state then begins."""
    transformation = CLIPS[name]()
    gradient = {"a": jnp.asarray([0.3, 0.4])}
    for arguments in (
        (transformation.init(gradient),),
        (transformation.init(gradient), None),
        (None,),
        (None, None),
    ):
        updates, state = transformation.update(gradient, *arguments)
        np.testing.assert_allclose(updates["a"], gradient["a"], rtol=1e-6)
        assert jax.tree.structure(state) == jax.tree.structure(transformation.init(gradient))
        assert int(state.record.updates) == 1


# --- Gradients beyond the range


@pytest.mark.parametrize(("factor", "steps"), [(4.0, 100), (1.0, 3)])
def test_a_gradient_of_any_size_comes_back_at_its_threshold(factor, steps):
    """As one in double precision, clipped; a smaller one stays as it is."""

    def linear(p, h, x):
        return {"a": factor * h["a"] + p["a"], "b": factor * h["b"] + 0.1 * h["a"] + p["b"]}

    def ends(states):
        return 1e-3 * states["a"][-1] + 2e-3 * states["b"][-1]

    def at(dtype):
        nothing = {"a": jnp.zeros((), dtype), "b": jnp.zeros((), dtype)}
        return linear, nothing, nothing, x_of_steps, ends

    x_of_steps = jnp.zeros((steps, 0))

    @jax.jit
    def single(max_norm):
        found = bptt.adjoints(*at(jnp.float32))
        return found.scaled.params_grad.clipped(max_norm), found.params_log_norm, found.params_grad

    clipped, log_norm, plain = single(3.0)
    with jax.enable_x64(True):
        exact = bptt.adjoints(*at(jnp.float64)).params_grad
        norm = np.sqrt(sum(np.sum(np.square(a)) for a in jax.tree.leaves(exact)))
    np.testing.assert_allclose(log_norm, np.log(norm), rtol=1e-5)
    for got, bare, expected in zip(*map(jax.tree.leaves, (clipped, plain, exact)), strict=True):
        np.testing.assert_allclose(got, np.asarray(expected) * min(1, 3 / norm), rtol=1e-4, atol=1e-37)
        if norm < 3:
            np.testing.assert_array_equal(got, bare)
        else:
            assert factor < 4 or np.any(np.isinf(bare))


def test_clipped_of_a_batch_and_of_what_is_not_finite():
    numbers = jnp.asarray([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [jnp.nan, 1.0], [jnp.inf, 1.0]])
    rows = LogScaled(numbers, jnp.zeros(5, jnp.int32))
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(
            rows.clipped(1.0), [[0.6, 0.8], [0.3, 0.4], [0, 0], [np.nan, 1], [np.inf, 1]], rtol=1e-6
        )
    with pytest.raises(ValueError, match="max_norm: expected a number above 0"):
        rows.clipped(0.0)
    with pytest.raises(Exception, match="max_norm: expected a number above 0"):
        jax.block_until_ready(jax.jit(rows.clipped)(-1.0))
