"""Within a `jax.shard_map`, and in a mesh with axes of type Explicit, every function gives what it gives elsewhere.

Types are checked by tracing, for two devices that need not be there; values in processes that have them.
"""

import inspect
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh
from slices import covering
from surface import PUBLIC
from test_devices import running, start
from test_transforms import ALWAYS, FUNCTIONS, KEY, MATRICES, XS, along, loss, step

import bptt_jax as bptt
from bptt_jax import remedies


def updated(link):
    def of_gradient(w):
        given, state = {"w": w}, link.init({"w": w})
        _, state = link.update(given, state, given)
        return link.update(jax.tree.map(lambda a: 30 * a, given), state, given)

    return of_gradient


def in_pieces(function, *arguments, **options):
    def of_weights(w):
        flags = jnp.asarray([True, False, True]), jnp.asarray([False, True, False])
        sequence = bptt.Sequence(jnp.asarray(XS, w.dtype), mask=flags[0], resets=flags[1], reset_state=w[1])
        return function(step, w, jnp.full(2, 0.1, w.dtype), sequence, *arguments, **options)

    return of_weights


def clipped(w):
    gentle = remedies.clip_adjoints(step, max_norm=0.5)
    return jax.grad(lambda w: loss(along(lambda _, *given: bptt.unroll(gentle, *given))(w)))(w)


def own(adjoints):
    """Without the gradients by what is the same for all sequences here, which are sums over the devices."""
    return lambda w: replace(adjoints(w), state0_grad=None, xs_grad=None, scaled=None)


MORE = {
    "adjoints": own(along(bptt.adjoints, loss)),
    "adjoints remat": own(along(bptt.adjoints, loss, remat=2, inputs=True)),
    "adjoints in pieces": own(in_pieces(bptt.adjoints, loss)),
    "gradient_flow in pieces": in_pieces(bptt.gradient_flow, loss),
    "gradient_flow num": along(bptt.gradient_flow, loss, num=1),
    "lyapunov_exponents in pieces": in_pieces(bptt.lyapunov_exponents),
    "covariant_vectors in pieces": in_pieces(bptt.covariant_vectors),
    "jacobians reverse": along(bptt.jacobians, mode="reverse"),
    "deer diagonal": lambda w: along(bptt.deer, jacobian="diagonal", damping="scale")(w).states,
    "tbptt": along(bptt.estimators.tbptt, loss, k1=1, k2=2),
    "truncation_bias": along(bptt.truncation_bias, loss),
    "rtrl": along(bptt.estimators.rtrl, loss),
    "snap": along(bptt.estimators.snap, loss, n=2),
    "rflo": in_pieces(bptt.estimators.rflo, loss),
    "uoro": in_pieces(partial(bptt.estimators.uoro, key=KEY), loss),
    "kf_rtrl": in_pieces(partial(bptt.estimators.kf_rtrl, key=KEY), loss),
    "audit": along(
        partial(bptt.audit, {"es": partial(bptt.estimators.es, pairs=2)}), loss, key=KEY, keys=2, lags=(1,)
    ),
    "es": along(bptt.estimators.es, loss, key=KEY, pairs=2),
    "pes": in_pieces(partial(bptt.estimators.pes, key=KEY, window=2, pairs=2), loss),
    "omega_terms": along(remedies.omega_terms, loss),
    "omega_penalty": jax.grad(lambda w: remedies.omega_penalty(along(remedies.omega_terms, loss)(w))),
    "flossing_penalty": jax.grad(along(remedies.flossing_penalty, num=1)),
    "clip_adjoints": clipped,
    "clip_by_global_norm": updated(bptt.clip_by_global_norm(1.0)),
    "setting": updated(optax.inject_hyperparams(bptt.clip_by_global_norm)(max_norm=1.0)),
    "with_clipping": updated(bptt.with_clipping(optax.sgd(0.1), 1.0)),
    "autoclip": updated(remedies.autoclip(0.5, warmup=1)),
    "zclip": updated(remedies.zclip(warmup=1)),
    "skip_updates": updated(remedies.skip_updates(optax.sgd(0.1), max_norm=1.0)),
}
ALL = FUNCTIONS | MORE
LINKS = {"clip_by_global_norm", "setting", "with_clipping", "autoclip", "zclip", "skip_updates"}
KINDS = "checked", "unchecked", "explicit"


def test_every_public_function_is_here():
    """Of those that take or give arrays."""
    functions = {
        member.__name__
        for name, member in PUBLIC.items()
        if inspect.isfunction(member) and not name.startswith(("plot", "cells.initializers", "cells.surrogates"))
    }
    assert functions <= {
        *ALL,
        "clip_records",
        "skip_records",
        "from_torchrecurrent",
        "report",
        "gradient_precision",
    }


def mesh_of(kind, make):
    return make((2,), ("batch",), axis_types=(AxisType.Explicit if kind == "explicit" else AxisType.Auto,))


def batched(name, kind, mesh):
    function = jax.vmap(ALL[name])
    if kind == "explicit":
        return jax.jit(function)
    along_batch, checked = PartitionSpec("batch"), kind == "checked"
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=along_batch, out_specs=along_batch, check_vma=checked)
    )


LONG = {name for name in ALL if " " in name or name not in ALWAYS | set(MORE)} | {
    "adjoints",
    "recommend_gain",
    "covariant_vectors",
    "predict_parallel",
    "parallel_adjoints",
    "omega_terms",
}


@pytest.mark.parametrize(
    ("name", "kind"),
    covering(
        [(name, kind) for name in ALL for kind in ("checked", "explicit")],
        *((name, "checked") for name in ALL if name not in LONG),
        *((name, "explicit") for name in ("unroll", "jacobians", "lyapunov_exponents", "prefix_products", "zclip")),
        *((name, "explicit") for name in ("singular_values", "eigenvalues", "tbptt")),
    ),
)
def test_types(name, kind):
    if jax_refuses(name, kind):
        pytest.skip("jnp.where of a constant and a batch, in plain JAX")
    mesh = mesh_of(kind, AbstractMesh)
    with use_abstract_mesh(mesh):
        given = jax.ShapeDtypeStruct((4, 2, 2), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("batch")))
        found = jax.eval_shape(batched(name, kind, mesh), given)
    for leaf in jax.tree.leaves(found):
        assert leaf.shape[0] == 4
        if name == "setting" and leaf.sharding is None:
            continue  # Optax keeps the setting itself, which is the same for all
        assert kind != "explicit" or leaf.sharding.spec[0] == "batch"


def jax_refuses(name, kind):
    """Links of Optax are run as they stand, for gradients are to stay divided as they are."""
    return kind == "explicit" and name in LINKS and jax.__version_info__ < (0, 10)


def compare(names, kinds):
    """Prints what differs; within a process that has two devices."""
    matrices = np.concatenate([MATRICES, MATRICES[:1].mT]).astype(np.float32)
    for name in names:
        expected = jax.jit(jax.vmap(ALL[name]))(matrices)
        for kind in kinds:
            if jax_refuses(name, kind):
                continue
            mesh = mesh_of(kind, jax.make_mesh)
            with jax.set_mesh(mesh):
                given = jax.device_put(matrices, NamedSharding(mesh, PartitionSpec("batch")))
                found = batched(name, kind, mesh)(given)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                if not np.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True):
                    print(name, kind, np.asarray(a), np.asarray(b))


# Some weights, some inputs and a factor of the loss are each device's own; gradients by all else are sums.
GRADIENTS = """
import sys
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
import bptt_jax as bptt

mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)

def numbers(*shape):
    return rng.standard_normal(shape).astype(np.float32)

params, h0, shared = {"w": 0.5 * numbers(3, 3), "u": numbers(6)}, numbers(3), numbers(7, 3)
xs, readout, scale = numbers(2, 7, 3), numbers(3), np.asarray([1e-20, 1e3], np.float32)

def own(params, h, x):
    return jnp.tanh(params["w"] @ h + params["u"] * (x[0] + x[1]))

LOSSES = {
    "own": lambda states, args: args["readout"] @ states[-1] * args["scale"][0],
    "psum": lambda states, args: jax.lax.psum(args["readout"] @ states[-1] ** 2, "batch"),
    "pmean": lambda states, args: jnp.sum(args["readout"]) * jax.lax.pmean(
        args["readout"] @ states[2] ** 2 * args["scale"][0], "batch"
    ),
}

def plain(loss, params, h, x, args):
    def run(params, h, x, args):
        start = h + 0 * x[0][0]  # what the states vary over
        return loss(jax.lax.scan(lambda h, x: (own(params, h, x),) * 2, start, x)[1], args)

    return jax.value_and_grad(run, (0, 1, 2, 3))(params, h, x, args)

def ours(loss, params, h, x, args):
    given = own, params, h, x, loss
    short = bptt.adjoints(*given, args=args, inputs=True)
    return short.loss, (short.params_grad, short.state0_grad, short.xs_grad, short.args_grad)

def by_params(loss, params, h, x, args):
    given = own, params, h, x, loss
    return (
        bptt.adjoints(*given, args=args, remat=3).params_grad,
        bptt.estimators.tbptt(*given, args=args, k1=2, k2=7),
        bptt.estimators.rtrl(*given, args=args),
    )

def spread(f, checked):
    def of_one(params, h, x, shared, args):
        return jax.tree.map(lambda a: jnp.asarray(a)[None], f(params, h, (x[0], shared), args))

    specs = {"w": P(), "u": P("batch")}, P(), P("batch"), P(), {"readout": P(), "scale": P("batch")}
    program = jax.shard_map(of_one, mesh=mesh, in_specs=specs, out_specs=P("batch"), check_vma=checked)
    return jax.jit(program)(params, h0, xs, shared, {"readout": readout, "scale": scale})

def compare(found, expected, *words):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if not np.allclose(a, b, rtol=1e-4, atol=1e-5 * np.max(np.abs(b))):
            print(*words, np.asarray(a), np.asarray(b))

def check(name, checked):
    loss = LOSSES[name]
    expected = spread(partial(plain, loss), checked)
    compare(spread(partial(ours, loss), checked), expected, name, checked)
    grads = spread(partial(by_params, loss), checked)
    for found in grads:
        compare(found, expected[1][0], name, checked, "params")
"""


def run(code):
    search = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    flag = "--xla_force_host_platform_device_count=2"
    process = start(code + "\nprint('done')", PYTHONPATH=search, XLA_FLAGS=flag)
    with running(process):
        out, err = process.communicate(timeout=500)
    assert out == "done\n", out + err


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ALL)
def test_values(name):
    run(f"import test_sharding\ntest_sharding.compare([{name!r}], test_sharding.KINDS)")


@pytest.mark.parametrize(
    ("name", "checked"),
    covering([(name, checked) for name in ("own", "psum", "pmean") for checked in (True, False)], ("own", True)),
)
def test_gradients_by_what_is_the_same_on_all_devices(name, checked):
    """Those of `jax.value_and_grad` at the same place; the devices' gradients lie 23 orders of magnitude apart."""
    run(GRADIENTS + f"check({name!r}, {checked})")


@pytest.mark.parametrize("checked", [True, False])
def test_a_step_that_sums_over_devices_is_refused(checked):
    def together(w, h, x):
        return jnp.tanh(w @ jax.lax.pmean(h, "batch") + x)

    def gradient(w):
        return bptt.adjoints(together, w[0], w[0, 0], jnp.asarray(XS, w.dtype), loss).params_grad[None]

    mesh = mesh_of("checked", AbstractMesh)
    given = jax.ShapeDtypeStruct((2, 2, 2), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("batch")))
    along_batch = PartitionSpec("batch")
    spread = jax.shard_map(gradient, mesh=mesh, in_specs=along_batch, out_specs=along_batch, check_vma=checked)
    with use_abstract_mesh(mesh), pytest.raises(TypeError, match="step: expected one that sees nothing of other"):
        jax.eval_shape(jax.jit(spread), given)


def test_a_step_that_sums_over_sequences_is_refused():
    """Outside of it; where the batch is within, the gradient is that of a plain scan."""

    def together(w, h, x):
        return jnp.tanh(w @ jax.lax.pmean(h, "batch") + x)

    w, h, xs = jnp.ones((2, 2)) / 2, jnp.zeros((3, 2)), jnp.stack([XS, 2 * XS, -XS], axis=1).astype(jnp.float32)
    alone = jax.vmap(lambda h, x: bptt.adjoints(together, w, h, x, loss).params_grad, (0, 1), axis_name="batch")
    with pytest.raises(TypeError, match="step: expected one that sees nothing of other sequences"):
        alone(h, xs)

    step = jax.vmap(together, (None, 0, 0), axis_name="batch")
    expected = jax.grad(lambda w: loss(jax.lax.scan(lambda h, x: (new := step(w, h, x), new), h, xs)[1]))(w)
    found = bptt.adjoints(step, w, h, xs, loss).params_grad
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.exhaustive
def test_second_derivatives_where_the_signal_of_one_device_is_zero():
    """As `jax.grad` of the gradients' sum has them: one device is at a perfect fit, the adjoints of the other large."""
    run("""
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import bptt_jax as bptt

mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
step = lambda p, h, x: p * h + x
given = jnp.asarray([[1.0, 0.0, 0.0, 0.0], [3.0, 1.0, 2.0, 1.0]])
targets = bptt.final_state(step, 0.5, 0.0, given[0]), jnp.float32(-1e4)

def loss(states, target):
    return jnp.square(states[-1] - target)

def ours(p):
    one = lambda x, y: bptt.adjoints(step, p, 0.0, x[0], loss, args=y[0]).params_grad[None]
    spread = jax.shard_map(one, mesh=mesh, in_specs=(P("batch"), P("batch")), out_specs=P("batch"))
    return spread(given, jnp.stack(targets))[0]

def plain(p):
    return jax.grad(lambda p: sum(loss(bptt.unroll(step, p, 0.0, x), y) for x, y in zip(given, targets)))(p)

for derivative in jax.grad, jax.jacfwd:
    got, expected = jax.jit(derivative(ours))(0.5), derivative(plain)(0.5)
    assert jnp.allclose(got, expected, rtol=1e-4), (got, expected)
""")


@pytest.mark.parametrize("checked", [True, False])
def test_a_loop_of_no_steps(checked):
    """As `lyapunov_exponents` has with two segments, from the first to the last of which there is one step less."""

    def step(w, h, x):
        return jnp.tanh(w * h + x)

    def exponents(x):
        return bptt.lyapunov_exponents(step, 0.5, jnp.zeros(2), x[0], segments=2).exponents[None]

    mesh = mesh_of("checked", AbstractMesh)
    along_batch = PartitionSpec("batch")
    given = jax.ShapeDtypeStruct((2, 6, 2), jnp.float32, sharding=NamedSharding(mesh, along_batch))
    spread = jax.shard_map(exponents, mesh=mesh, in_specs=along_batch, out_specs=along_batch, check_vma=checked)
    with use_abstract_mesh(mesh):
        assert jax.eval_shape(jax.jit(spread), given).shape == (2, 2)
