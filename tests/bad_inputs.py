"""Bad inputs to every public function, and the judge of what each comes to.

A target is a function with good arguments, each of a kind; a kind has its spoilers (`spoilers`). Every spoiler of
every argument is a bad input, which must be refused clearly, before anything is compiled, or answered rightly.
"""

import contextlib
import dataclasses
import functools
import inspect
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from compilations import watched
from equinox import nn as eqx_nn
from flax import linen
from spoilers import KINDS, XS, H, Spoiler, W, batch_loss, coefficients, loss, step
from surface import PUBLIC, takes_half

import bptt_jax as bptt
from bptt_jax.cli.main import main
from bptt_jax.experiments import loop, tasks
from bptt_jax.experiments import text as texts
from bptt_jax.experiments.influence_balancing import influence_balancing
from bptt_jax.experiments.network import network
from bptt_jax.remedies.regularizers import OmegaTerms

PACKAGE, TESTS = str(Path(bptt.__file__).parent), str(Path(__file__).parent)
Outcome = Literal["refused", "answered", "wrong"]


def finite(result: Any) -> bool:
    return all(np.all(np.isfinite(_numbers(a))) for a in jax.tree.leaves(result))


def has_nan(result: Any) -> bool:
    return any(np.any(np.isnan(_numbers(a))) for a in jax.tree.leaves(result))


class Target(NamedTuple):
    """A public function.

    Attributes:
      name: as users write it.
      call: by keyword.
      good: arguments that it takes.
      kinds: of those that are spoiled.
      says: whether a result says that there was a NaN or an infinity.
    """

    name: str
    call: Callable[..., Any]
    good: Mapping[str, Any]
    kinds: Mapping[str, str]
    says: Callable[[Any], bool] = lambda result: not finite(result)


class Case(NamedTuple):
    """One bad input."""

    target: Target
    argument: str
    name: str
    spoiler: Spoiler

    @property
    def id(self) -> str:
        return f"{self.target.name}({self.argument}={self.name})"


# --- The functions.

RECURRENCE = {"step": step, "params": {"w": W}, "state0": H, "xs": XS}
RECURRENCE_KINDS = {"step": "step", "params": "params", "state0": "state", "xs": "inputs", "length": "length"}
LINEAR = RECURRENCE | {"step": bptt.parallel.DiagonalStep(coefficients)}
JS = np.random.default_rng(0).standard_normal((4, 3, 3)).astype(np.float32)


def recurrence(name: str, **options: Any) -> Target:
    """A function of a recurrence; of each option a good value and its kind."""
    good = RECURRENCE | {"length": 3} | {k: v for k, (v, _) in options.items()}
    kinds = RECURRENCE_KINDS | {k: kind for k, (_, kind) in options.items()}
    says = SAYS.get(name, Target._field_defaults["says"])
    return Target(f"bptt.{name}", PUBLIC[name], good, kinds, says)


SAYS: dict[str, Callable[[Any], bool]] = {
    "gradient_flow": lambda flow: flow.verdict == "non-finite" and not flow.numerics.finite,
    "analysis.recommend_gain": lambda found: bool(np.isnan(found.factor)) and "not finite" in found.statement,
    "covariant_vectors": lambda found: found.spectrum.first_nonfinite >= 0 and not np.any(found.kept),
    "calibrate": lambda found: bool(np.isnan(found.value)) and "not finite" in found.statement,
    "lyapunov_exponents": lambda found: found.first_nonfinite >= 0 and "not finite" in found.statement,
    "predict_parallel": lambda found: not finite(found.exponent),
    "deer": lambda found: not found.converged and bool(np.all(np.isnan(found.states))),
}
LOSS, NUM = (loss, "loss"), (1, "at most")
ONLINE = {"carry": (None, "optional"), "has_carry": (False, "flag")}
PERTURBED = {"key": (jax.random.key(0), "key"), "sigma": (0.1, "finite above zero"), "pairs": (2, "integer")}


def family(value: Any) -> Any:
    return step, {"w": value * W}


def rnn_family(gain: Any) -> bptt.Cell:
    return bptt.rnn(2, gain=gain)


def cell(make: Callable[..., bptt.Cell], **options: Any) -> Callable[..., Any]:
    def initialised(key: Any, input_size: Any, **options: Any) -> Any:
        return make(**options).init(key, input_size)

    return initialised


def cell_target(entry: bptt.cells.AtlasEntry) -> Target:
    """A cell of the atlas, with all its options."""
    good, kinds = dict(CELL_OPTIONS), dict(CELL_KINDS)
    for option, parameter in inspect.signature(entry.make).parameters.items():
        if option not in CELL_OPTIONS:
            good[option], kinds[option] = OPTIONS_OF_CELLS[option]
            if parameter.default is None:
                kinds[option] = f"optional {kinds[option]}"
                if callable(good[option]):  # instead of another option
                    good[option] = None
    if not takes_half(entry.make):
        kinds["dtype"] = "real dtype"
    name = entry.make.__name__
    return Target(f"bptt.{name}" if name in bptt.__all__ else f"bptt.cells.{name}", cell(entry.make), good, kinds)


def initializer(make: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    def initialised(key: Any, shape: Any, dtype: Any = np.float32, **options: Any) -> Any:
        return make(**options, **fixed)(key, shape, dtype)

    return initialised


def surrogate(make: Callable[..., Any], x: Any, **options: Any) -> Any:
    spike = make(**options)
    return jax.value_and_grad(lambda x: spike(x).sum())(x)


def clip(make: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
    """Of gradients by a new transformation."""

    def clipped(updates: Any, **options: Any) -> Any:
        transformation = make(**options)
        return transformation.update(updates, transformation.init({"w": W}), {"w": W})[0]

    return clipped


def monitor(**options: Any) -> Any:
    return bptt.Monitor(**MONITOR | options)


def probe(
    update: Any = 0, params: Any = None, state0: Any = None, xs: Any = None, args: Any = None, **options: Any
) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bptt.analysis.MonitorWarning)
        known = all(options[name] is MONITOR[name] for name in MONITOR)
        watch = WATCH if known else monitor(**options)  # whose programs are its own
        record = watch(update, params, state0, xs, args)
    return {k: v for k, v in record.scalars.items() if "monitor/" not in k}


def clipped_step(**options: Any) -> Any:
    return bptt.unroll(bptt.remedies.clip_adjoints(**options), {"w": W}, H, XS)


def fixed_points(**arguments: Any) -> Any:
    """Without what depends on the way there: where a search has ended in vain, nothing."""
    found = bptt.fixed_points(**arguments)
    there = np.asarray(found.converged)[:, None]
    return np.where(there, found.points, np.nan), there, np.where(there, found.eigenvalues, np.nan)


FIXED_POINTS = {
    "step": step,
    "params": {"w": W},
    "starts": np.stack([H, 2 * H, -H]),
    "x": XS[0],
    "x_per_start": False,
    "method": "newton",
    "tol": 1e-5,
    "max_iterations": 100,
    "distance": 1e-3,
    "outlier": 10.0,
    "margin": 1e-4,
}
MONITOR: dict[str, Any] = {"step": step, "loss": batch_loss}
WATCH = bptt.Monitor(step, batch_loss)
PROBED = MONITOR | {"update": 0, "params": {"w": W}, "state0": H, "xs": XS[None], "args": H[None]}
KEY = jax.random.key(0)
CELL_OPTIONS = {"hidden_size": 2, "key": KEY, "input_size": 2, "dtype": np.float32}
CELL_KINDS = {"hidden_size": "integer", "key": "key", "input_size": "integer", "dtype": "dtype"}
INIT = jax.nn.initializers.normal()
# Of the options of cells: what they may be, and of which kind.
OPTIONS_OF_CELLS: dict[str, tuple[Any, str]] = {
    "activation": (jnp.tanh, "activation"),
    "alpha": (0.2, "above zero"),
    "backbone_units": (4, "integer"),
    "beta": (0.5, "finite"),
    "bias_init": (INIT, "initializer"),
    "connections": (2, "integer"),
    "context_size": (3, "integer"),
    "decay": (0.9, "fraction"),
    "delay": (2, "integer"),
    "depth": (2, "integer"),
    "discretization": ("zoh", "choice"),
    "dt": (0.1, "above zero"),
    "dt_max": (0.1, "above zero"),
    "dt_min": (0.001, "above zero"),
    "epsilon": (0.1, "above zero"),
    "forget_bias": (1.0, "finite"),
    "gain": (1.0, "finite"),
    "gamma": (0.1, "at least zero"),
    "heads": (2, "integer"),
    "input_init": (INIT, "initializer"),
    "input_scale": (0.5, "finite"),
    "key_size": (4, "integer"),
    "longest": (5, "integer"),
    "lower_bound": (0.5, "fraction"),
    "map": ("exp", "choice"),
    "max_phase": (1.0, "above zero"),
    "modules": (2, "integer"),
    "negative": (1, "count"),
    "noise": (0.1, "finite"),
    "nu": (-4.0, "finite"),
    "order": (4, "integer"),
    "r_max": (0.9, "radius"),
    "r_min": (0.1, "radius"),
    "rank": (2, "integer"),
    "recurrent_init": (INIT, "initializer"),
    "reflections": (2, "integer"),
    "reset": ("subtract", "choice"),
    "reset_after": (True, "flag"),
    "rho": (0.9, "fraction"),
    "scale": (0.5, "finite"),
    "spectral_radius": (0.9, "above zero"),
    "spectrum": ("lin", "choice"),
    "spike": (bptt.cells.surrogates.fast_sigmoid(), "activation"),
    "state_size": (4, "integer"),
    "stiffness": (1.0, "at least zero"),
    "theta": (10.0, "above zero"),
    "threshold": (1.0, "above zero"),
    "transform_bias": (-2.0, "finite"),
    "zeta": (1.0, "finite"),
}
SQUARE_KINDS = {"shape": "square shape", "key": "key", "dtype": "dtype"}
TINY = network(bptt.rnn(2), tasks.adding(4))
TRAINING = {"network": TINY, "optimizer": optax.sgd(0.1), "updates": 1, "batch": 2, "seeds": (0,), "chunk": 1}
TORCH = {f"rnn.weight_{what}_l{k}": W for what in ("ih", "hh") for k in range(2)}
TERMS = OmegaTerms(np.ones(3, np.float32), np.ones(3, bool))


def equinox_cell(cell: Any) -> Any:
    return bptt.from_equinox(cell)[1]


def product_singular_vectors(**given: Any) -> Any:
    """With whether the errors are those of rounding, not how large they happen to be."""
    found = bptt.linalg.product_singular_vectors(**given)
    return dataclasses.replace(found, errors=found.errors < 1e-5)


TARGETS: list[Target] = [
    recurrence("unroll", unroll=(1, "optional integer"), remat=(2, "remat")),
    recurrence("final_state", unroll=(1, "optional integer"), remat=(2, "remat")),
    recurrence("jacobians"),
    recurrence("adjoints", loss=LOSS),
    recurrence("temporal_contributions", loss=LOSS),
    recurrence(
        "gradient_flow",
        loss=LOSS,
        stride=(1, "integer"),
        num=(2, "at most or none"),
        threshold=(1e-3, "fraction"),
        share=(1e-3, "fraction"),
        spectra=(True, "flag"),
    ),
    recurrence("analysis.recommend_gain", loss=LOSS, threshold=(1e-3, "fraction"), share=(1e-3, "fraction")),
    Target(
        "bptt.calibrate",
        bptt.calibrate,
        {"make": family, "state0": H, "xs": XS, "length": 3, "loss": loss}
        | {"low": 0.1, "high": 2.0, "target": -1.0, "batched": False},
        {
            "make": "function",
            "state0": "state",
            "xs": "inputs",
            "length": "length",
            "loss": "optional loss",
            "low": "finite",
        }
        | {"high": "finite", "target": "finite", "batched": "flag"},
        SAYS["calibrate"],
    ),
    Target(
        "bptt.analysis.calibrate_cell",
        bptt.analysis.calibrate_cell,
        {"make": rnn_family, "xs": XS, "low": 0.1, "high": 2.0, "target": -1.0, "warmup": 1},
        {"make": "function", "low": "finite", "high": "finite", "warmup": "warmup"},
        SAYS["calibrate"],
    ),
    recurrence("lyapunov_exponents", num=(2, "at most or none"), warmup=(1, "warmup")),
    recurrence("analysis.leading_singular_values", num=NUM),
    recurrence("analysis.leading_eigenvalues", num=NUM),
    recurrence("analysis.product_singular_values", num=NUM),
    recurrence("influence_map", intervals=(2, "integer")),
    recurrence(
        "deer",
        jacobian=("full", "choice"),
        damping=("kalman", "optional choice"),
        window=(2, "optional integer"),
        max_iterations=(100, "integer"),
    ),
    Target(
        "bptt.deer",
        lambda **arguments: bptt.deer(**arguments).states,
        RECURRENCE | {"guess": 0 * XS},
        {"guess": "guess"},
    ),
    recurrence("predict_parallel"),
    recurrence("remedies.omega_terms", loss=LOSS),
    recurrence("remedies.flossing_penalty", num=NUM, warmup=(1, "warmup")),
    recurrence("estimators.tbptt", loss=LOSS, k1=(1, "integer"), k2=(2, "integer")),
    recurrence("truncation_bias", loss=LOSS, longest=(2, "optional integer")),
    recurrence("analysis.gradient_by_lag", loss=LOSS, longest=(2, "optional integer")),
    Target(
        "bptt.analysis.gradient_noise",
        bptt.analysis.gradient_noise,
        RECURRENCE
        | {"xs": np.stack([XS, 2 * XS]), "loss": batch_loss, "args": np.stack([H, H]), "longest": 2, "batch": 4}
        | {"in_axes": (None, 0, 0)},
        {"step": "step", "params": "params", "state0": "state", "xs": "batch", "loss": "loss", "args": "targets"}
        | {"longest": "optional integer", "batch": "optional integer", "in_axes": "axes"},
    ),
    Target(
        "bptt.analysis.gradient_precision",
        jax.enable_x64(True)(bptt.analysis.gradient_precision),
        RECURRENCE | {"loss": loss, "dtype": np.float32, "longest": 2, "length": 3},
        {"step": "step", "loss": "loss", "dtype": "dtype", "longest": "optional integer", "length": "length"},
    ),
    recurrence("estimators.rtrl", loss=LOSS, **ONLINE),
    recurrence("estimators.snap", loss=LOSS, n=(1, "integer"), **ONLINE),
    recurrence("estimators.rflo", loss=LOSS, **ONLINE),
    recurrence("estimators.uoro", loss=LOSS, key=PERTURBED["key"], **ONLINE),
    recurrence("estimators.kf_rtrl", loss=LOSS, key=PERTURBED["key"], **ONLINE),
    recurrence(
        "audit",
        loss=LOSS,
        estimators=({"rtrl": bptt.estimators.rtrl}, "estimators"),
        key=(jax.random.key(0), "key"),
        keys=(2, "integer"),
        lags=((0, 1), "lags"),
        in_axes=((None, None, None), "optional axes"),
    ),
    recurrence("estimators.es", loss=LOSS, **PERTURBED),
    recurrence(
        "estimators.pes",
        loss=LOSS,
        **PERTURBED,
        window=(2, "integer"),
        **ONLINE,
    ),
    Target(
        "bptt.analysis.adaptive_window",
        bptt.analysis.adaptive_window,
        {"log_norms": -0.5 * np.arange(6, dtype=np.float32), "gradient_log_norm": 0.9, "tolerance": 0.1, "k1": 2},
        {
            "log_norms": "log norms",
            "gradient_log_norm": "log",
            "tolerance": "above zero",
            "k1": "optional integer",
        },
    ),
    Target(
        "bptt.unroll_linear",
        bptt.unroll_linear,
        LINEAR | {"length": 3},
        RECURRENCE_KINDS | {"step": "linear step", "state0": "linear state", "xs": "linear inputs"},
    ),
    Target(
        "bptt.parallel.DiagonalStep",
        bptt.parallel.DiagonalStep,
        {"coefficients": coefficients},
        {"coefficients": "function"},
    ),
    Target(
        "bptt.parallel.DeltaStep",
        bptt.parallel.DeltaStep,
        {"coefficients": coefficients},
        {"coefficients": "function"},
    ),
    Target("bptt.ravel_state", lambda state: bptt.ravel_state(state)[0], {"state": H}, {"state": "any state"}),
    *(
        Target(f"bptt.{name}", PUBLIC[name], {"matrices": JS}, {"matrices": kind})
        for name, kind in (
            ("singular_values", "matrices"),
            ("linalg.spectral_norm", "matrices"),
            ("linalg.condition_number", "matrices"),
            ("eigenvalues", "square"),
            ("linalg.spectral_radius", "square"),
        )
    ),
    *(
        Target(f"bptt.{name}", PUBLIC[name], {"jacobians": JS}, {"jacobians": "jacobians"})
        for name in ("jacobian_product", "product_log_norms", "linalg.prefix_products", "linalg.suffix_products")
    ),
    Target(
        "bptt.parallel.parallel_adjoints",
        bptt.parallel.parallel_adjoints,
        {"jacobians": JS, "immediate": JS[:, 0]},
        {"jacobians": "jacobians", "immediate": "immediate"},
    ),
    *map(cell_target, bptt.cells.ATLAS.values()),
    Target(
        "bptt.cells.initializers.identity",
        initializer(bptt.cells.initializers.identity),
        {"scale": 1.0, "key": KEY, "shape": (2, 2), "dtype": np.float32},
        {"scale": "finite", "shape": "square shape", "dtype": "dtype"},
    ),
    Target(
        "bptt.cells.initializers.sparse",
        initializer(bptt.cells.initializers.sparse),
        {"nonzeros": 2, "spectral_radius": 0.9, "key": KEY, "shape": (2, 2), "dtype": np.float32},
        SQUARE_KINDS | {"nonzeros": "integer", "spectral_radius": "above zero"},
    ),
    Target(
        "bptt.cells.initializers.chrono",
        initializer(bptt.cells.initializers.chrono),
        {"longest": 9, "key": KEY, "shape": (4, 2), "dtype": np.float32},
        {"longest": "integer", "key": "key", "shape": "gate shape", "dtype": "dtype"},
    ),
    Target(
        "bptt.cells.initializers.ring",
        initializer(bptt.cells.initializers.ring),
        {"r_min": 0.1, "r_max": 0.9, "max_phase": 1.0, "key": KEY, "shape": (2, 2), "dtype": np.float32},
        {
            "r_min": "radius",
            "r_max": "radius",
            "max_phase": "above zero",
            "key": "key",
            "shape": "gate shape",
            "dtype": "dtype",
        },
    ),
    *(
        Target(
            f"bptt.cells.surrogates.{make.__name__}",
            functools.partial(surrogate, make),
            {option: 2.0, "x": H},
            {option: "above zero"},
        )
        for make, option in (
            (bptt.cells.surrogates.fast_sigmoid, "slope"),
            (bptt.cells.surrogates.triangular, "height"),
            (bptt.cells.surrogates.arctan, "alpha"),
        )
    ),
    Target(
        "bptt.stack",
        lambda steps, output: bptt.unroll(bptt.stack(*steps, output=output), ({"w": W}, {"w": W}), (H, H), XS),
        {"steps": (step, step), "output": lambda h: h},
        {"steps": "layers", "output": "output"},
    ),
    Target(
        "bptt.clip_by_global_norm",
        clip(bptt.clip_by_global_norm),
        {"max_norm": 0.1, "updates": {"w": W}},
        {"max_norm": "above zero", "updates": "updates"},
    ),
    Target(
        "bptt.remedies.autoclip",
        clip(bptt.remedies.autoclip),
        {"quantile": 0.1, "window": 4, "warmup": 1, "updates": {"w": W}},
        {"quantile": "fraction", "window": "integer", "warmup": "integer", "updates": "updates"},
    ),
    Target(
        "bptt.remedies.zclip",
        clip(bptt.remedies.zclip),
        {"z_threshold": 2.0, "decay": 0.9, "warmup": 4, "updates": {"w": W}},
        {"z_threshold": "above zero", "decay": "fraction", "warmup": "integer", "updates": "updates"},
    ),
    Target(
        "bptt.remedies.skip_updates",
        clip(bptt.remedies.skip_updates),
        {"inner": optax.sgd(0.1), "max_norm": 9.0, "max_in_a_row": 3, "updates": {"w": W}},
        {"inner": "anything", "max_norm": "above zero", "max_in_a_row": "integer", "updates": "skipped updates"},
    ),
    Target(
        "bptt.with_clipping",
        clip(bptt.with_clipping),
        {"optimizer": optax.sgd(0.1), "max_norm": 0.1, "max_in_a_row": 3, "updates": {"w": W}},
        {
            "optimizer": "anything",
            "max_norm": "above zero",
            "max_in_a_row": "integer",
            "updates": "skipped updates",
        },
    ),
    Target(
        "bptt.remedies.clip_adjoints",
        clipped_step,
        {"step": step, "max_norm": 1.0, "max_value": 1.0},
        {"step": "step", "max_norm": "threshold", "max_value": "threshold"},
    ),
    Target(
        "bptt.remedies.omega_penalty",
        bptt.remedies.omega_penalty,
        {"terms": TERMS, "version": "paper"},
        {"terms": "anything", "version": "choice"},
    ),
    Target(
        "bptt.Monitor",
        monitor,
        MONITOR
        | {"has_aux": False, "every": 100, "sequences": 4, "spectra": 2, "num": None, "noise": 2}
        | {"threshold": 1e-3, "in_axes": (None, 0, 0)},
        {
            "step": "function",
            "loss": "function",
            "every": "integer",
            "sequences": "integer",
            "spectra": "integer",
            "noise": "optional integer",
            "threshold": "fraction",
            "in_axes": "axes",
        },
    ),
    Target(
        "bptt.Monitor()",
        probe,
        PROBED,
        {
            "step": "step",
            "loss": "loss",
            "update": "update",
            "params": "params",
            "state0": "state",
            "xs": "batch",
            "args": "targets",
        },
        lambda scalars: scalars["bptt/verdict"] == 3 and scalars["bptt/non_finite/sequence"] >= -1,
    ),
    Target("bptt.from_equinox", equinox_cell, {"cell": eqx_nn.GRUCell(2, 2, key=KEY)}, {"cell": "anything"}),
    Target(
        "bptt.from_nnx",
        lambda cell: bptt.from_nnx(cell)[1],
        {"cell": None},
        {"cell": "anything"},
    ),
    Target(
        "bptt.from_linen",
        lambda module, variables: bptt.from_linen(module, variables)[1],
        {"module": linen.GRUCell(2), "variables": {"params": {"w": W}}},
        {"module": "anything", "variables": "variables"},
    ),
    Target(
        "bptt.from_haiku",
        lambda make, params: bptt.from_haiku(make, params)[1],
        {"make": lambda: hk.GRU(2), "params": {}},
        {"make": "anything", "params": "variables"},
    ),
    Target(
        "bptt.from_torch",
        lambda **given: bptt.from_torch(**given)[1:],
        {"module_or_state_dict": TORCH, "prefix": "rnn.", "layer": 1, "direction": None, "nonlinearity": "tanh"},
        {
            "module_or_state_dict": "anything",
            "prefix": "prefix",
            "layer": "layer",
            "direction": "optional choice",
            "nonlinearity": "optional choice",
        },
    ),
    Target("bptt.from_torchrecurrent", bptt.from_torchrecurrent, {"module": None}, {"module": "anything"}),
    Target("bptt.from_keras", bptt.from_keras, {"layer": None}, {"layer": "anything"}),
    Target("bptt.plot_gradient_flow", bptt.plot_gradient_flow, {"flows": None}, {"flows": "anything"}),
    Target("bptt.plots.plot_norms", bptt.plots.plot_norms, {"flows": None}, {"flows": "anything"}),
    Target(
        "bptt.plots.plot_singular_values", bptt.plots.plot_singular_values, {"flow": None}, {"flow": "anything"}
    ),
    Target("bptt.plots.plot_eigenvalues", bptt.plots.plot_eigenvalues, {"flow": None}, {"flow": "anything"}),
    *(
        Target(f"bptt.plots.{name}", getattr(bptt.plots, name), {"found": None}, {"found": "anything"})
        for name in ("plot_angles", "plot_calibration", "plot_fixed_points", "plot_modes")
    ),
    Target(
        "bptt.plots.plot_flow_field",
        bptt.plots.plot_flow_field,
        {"step": step, "params": W, "found": None},
        {"found": "anything"},
    ),
    Target("bptt.report", bptt.report, {"results": None, "path": "page.html", "title": 3}, {"results": "anything"}),
    Target("bptt.plots.plot_atlas", bptt.plots.plot_atlas, {"results": []}, {"results": "anything"}),
    Target("bptt.plots.plot_leaves", bptt.plots.plot_leaves, {"found": None}, {"found": "anything"}),
    Target("bptt.plots.plot_adjoints", bptt.plots.plot_adjoints, {"adjoints": None}, {"adjoints": "anything"}),
    Target(
        "bptt.plots.plot_gradient_lags", bptt.plots.plot_gradient_lags, {"by_lag": None}, {"by_lag": "anything"}
    ),
    Target(
        "bptt.plots.plot_gradient_noise", bptt.plots.plot_gradient_noise, {"noise": None}, {"noise": "anything"}
    ),
    Target(
        "bptt.plots.plot_gradient_precision",
        lambda precisions: bptt.plots.plot_gradient_precision(precisions),
        {"precisions": None},
        {"precisions": "anything"},
    ),
    Target("bptt.plots.plot_exponents", bptt.plots.plot_exponents, {"spectrum": None}, {"spectrum": "anything"}),
    Target("bptt.plots.plot_audit", bptt.plots.plot_audit, {"audit": None}, {"audit": "anything"}),
    Target(
        "bptt.plots.plot_influence_map",
        bptt.plots.plot_influence_map,
        {"influence": None},
        {"influence": "anything"},
    ),
    Target(
        "bptt.plots.plot_training",
        bptt.plots.plot_training,
        {"records": [], "baseline": 1.0},
        {"records": "records"},
    ),
    *(
        Target(
            f"tasks.{name}",
            lambda length, key, batch, name=name: getattr(tasks, name)(length).sample(key, batch),
            {"length": 20, "key": KEY, "batch": 2},
            {"length": "integer", "key": "key", "batch": "integer"},
        )
        for name in (
            "adding",
            "multiplication",
            "temporal_order",
            "random_permutation",
            "copy_memory",
            "memorization",
            "flipflop",
            "context_decision",
        )
    ),
    Target(
        "tasks.temporal_order",
        tasks.temporal_order,
        {"length": 10, "symbols": 2},
        {"symbols": "symbols"},
    ),
    Target(
        "tasks.characters",
        tasks.characters,
        {"text": "abracadabra" * 9, "length": 3, "split": "train"},
        {"text": "own text", "length": "at most", "split": "choice"},
    ),
    Target("tasks.digits", tasks.digits, {"split": "train"}, {"split": "choice"}),
    Target("text.corpus", texts.corpus, {"text": "abc"}, {"text": "own text"}),
    Target(
        "text.windows",
        texts.windows,
        {"key": KEY, "codes": np.arange(20), "batch": 2, "length": 3},
        {"key": "key", "codes": "codes", "batch": "integer", "length": "at most"},
    ),
    Target(
        "influence_balancing",
        influence_balancing,
        {"theta": 0.0, "size": 23, "positive": 10},
        {"theta": "finite", "size": "integer", "positive": "at most"},
    ),
    Target(
        "network", network, {"cell": bptt.rnn(2), "task": tasks.adding(4)}, {"cell": "anything", "task": "anything"}
    ),
    Target(
        "loop.train",
        loop.train,
        TRAINING,
        {
            "network": "anything",
            "optimizer": "anything",
            "updates": "counted",
            "batch": "counted",
            "chunk": "counted",
            "seeds": "seeds",
            "penalty": "penalty",
            "probes": "probes",
            "validation": "optional",
            "on_record": "no function",
            "on_chunk": "no function",
            "settings": "settings",
            "folder": "folder",
        },
    ),
    recurrence("covariant_vectors", num=(2, "at most or none"), warmup=(1, "warmup or none")),
    Target(
        "bptt.linalg.product_singular_vectors",
        product_singular_vectors,
        {"jacobians": JS, "num": 2},
        {"jacobians": "jacobians", "num": "at most or none"},
    ),
    Target(
        "bptt.analysis.modal_coordinates",
        bptt.analysis.modal_coordinates,
        {"states": XS, "system": bptt.linalg.Eigensystem(*np.ones((3, 2, 2), np.complex64))},
        {"states": "any state"},
    ),
    Target("bptt.eigensystem", bptt.eigensystem, {"matrices": JS}, {"matrices": "square"}),
    Target(
        "bptt.linalg.singular_vectors",
        bptt.linalg.singular_vectors,
        {"matrices": JS, "num": 2},
        {"matrices": "matrices", "num": "at most or none"},
    ),
    Target(
        "bptt.fixed_points",
        fixed_points,
        FIXED_POINTS,
        {
            "step": "step",
            "params": "params",
            "starts": "state",
            "x": "input",
            "x_per_start": "flag",
            "rhs": "no function",
            "method": "optional choice",
            "tol": "at least zero",
            "max_iterations": "optional integer",
            "distance": "above zero",
            "outlier": "above zero",
            "margin": "above zero",
        },
    ),
    Target("bptt.fixed_points", fixed_points, FIXED_POINTS | {"num": 2}, {"num": "at most or none"}),
    Target(
        "bptt.analysis.sample_starts",
        bptt.analysis.sample_starts,
        {"states": XS, "num": 4, "key": KEY, "noise": 1e-9, "axes": 1},
        {"states": "visited", "num": "integer", "key": "key", "noise": "at least zero", "axes": "integer"},
    ),
]


def cases() -> list[Case]:
    """Every spoiler of every argument of every function."""
    return [
        Case(target, argument, name, spoiler)
        for target in TARGETS
        for argument, kind in target.kinds.items()
        for name, spoiler in KINDS[kind].items()
    ]


# --- The judge.


_DRAWN: set[str] = set()


def _draw_once(target: Target) -> None:
    """Cells draw keys and numbers, and the states of clips zeros, by programs of their own, which no check of an
    initialiser or of gradients can come before."""
    if target.name in _DRAWN:
        return
    _DRAWN.add(target.name)
    if any(name.endswith("_init") for name in target.good):
        target.call(**target.good)
    if "updates" in target.good:
        for made in (bptt.remedies.autoclip(window=4), bptt.remedies.zclip()):
            made.init({"w": W})
        jnp.zeros((), bool)  # of skipped updates


@contextlib.contextmanager
def judging() -> Iterator[None]:
    """JAX as users have it, but for the frames of its own, which it keeps in tracebacks."""
    before = jax.config.values["jax_traceback_filtering"]
    jax.config.update("jax_traceback_filtering", "off")
    try:
        with (
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("error")
            # As an error it would end the process, within JAX: a number beyond the range becomes infinite.
            warnings.filterwarnings("ignore", "overflow encountered in cast", RuntimeWarning)
            warnings.simplefilter("ignore", bptt.RecompilationWarning)  # every case makes its functions anew
            warnings.filterwarnings("ignore", "jax.(array_ref|ArrayRef) is deprecated")  # as in pyproject.toml
            yield
    finally:
        jax.config.update("jax_traceback_filtering", before)


def judge(case: Case) -> tuple[Outcome, str]:
    """What a bad input comes to, and why if that is wrong; to be called within `judging`."""
    target, spoiler, argument = case.target, case.spoiler, case.argument
    _draw_once(target)
    good, bad = _arguments(case)
    try:
        with watched() as compiled:
            result = jax.block_until_ready(target.call(**bad))
    except Exception as error:
        faults = _faults(error, target, argument, len(compiled))
        if faults and spoiler.clean is not None and _raises_alike(error, target, argument, good, spoiler):
            return "refused", str(error)  # for what it comes to, which is no good either
        return ("wrong", f"{type(error).__name__}: {error}: {faults}") if faults else ("refused", str(error))
    if spoiler.clean is not None:
        clean = good | {argument: spoiler.clean(good[argument])}
        if _same(result, target.call(**clean), spoiler.tolerance):
            return "answered", "the same"
    spoiled_by_nan = spoiler.clean is None
    if spoiler.marked and (target.says(result) or (not spoiled_by_nan and has_nan(result))):
        return "answered", "marked"
    return "wrong", f"answered {jax.tree.map(np.asarray, result)!r:.300}"


def _arguments(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Good ones, and with the bad one among them."""
    argument = case.argument
    # Without the length it is the inputs that are judged.
    good = {k: v for k, v in case.target.good.items() if not (argument == "xs" and k == "length")}
    bad = good | {argument: case.spoiler.spoil(good.get(argument))}
    for leaf in jax.tree.leaves(bad[argument]):
        if isinstance(leaf, float):
            jnp.asarray(leaf)  # JAX 0.8 compiles the conversion of a number, once
    return good, bad


def refused_late(refused: list[Case]) -> list[str]:
    """Of inputs to one function that `judge` has found refused those before whose refusal something is compiled if
    nothing has been, as in a new process; to be called within `judging`."""
    jax.clear_caches()
    _DRAWN.clear()
    late = []
    for case in refused:
        _draw_once(case.target)
        good, bad = _arguments(case)
        try:
            with watched() as compiled:
                case.target.call(**bad)
        except Exception as error:
            clean = case.spoiler.clean is not None
            if compiled and not (clean and _raises_alike(error, case.target, case.argument, good, case.spoiler)):
                late.append(case.id)
    return late


def _raises_alike(error: Exception, target: Target, argument: str, good: dict[str, Any], spoiler: Spoiler) -> bool:
    try:
        jax.block_until_ready(target.call(**good | {argument: spoiler.clean(good[argument])}))
    except Exception as other:
        return type(other) is type(error) and str(other).split("Error: ")[-1] == str(error).split("Error: ")[-1]
    return False


def _faults(error: Exception, target: Target, argument: str, compiled: int) -> str:
    """What is not clear about a refusal."""
    faults = []
    notes = "; ".join(getattr(error, "__notes__", ()))
    text = f"{error}; {notes}"
    frames, at = [], error.__traceback__
    while at is not None:
        frames.append(at.tb_frame.f_code.co_filename)
        at = at.tb_next
    ours = [i for i, name in enumerate(frames) if name.startswith(PACKAGE)]
    if compiled:
        faults.append(f"{compiled} programs were compiled before")
    if notes.startswith("raised by ") and any(name.startswith(TESTS) for name in frames[max(ours, default=0) :]):
        return ", ".join(faults)  # what a function of the user's raises passes through
    if notes.startswith("raised by ") and frames[-1].startswith(PACKAGE):
        return ", ".join(faults)  # it takes other arguments
    if not frames[-1].startswith(PACKAGE):
        faults.append(f"raised in {frames[-1]}")
    if not isinstance(error, (TypeError, ValueError, ImportError, OSError)):
        faults.append("neither TypeError nor ValueError")
    # Where two arguments do not fit together it may be the other one that is named.
    head = re.match(r"\w*", text)[0]
    if argument not in text and head not in {*target.good, *target.kinds, "step", "coefficients", "delay", "text"}:
        faults.append(f"does not name {argument}")
    if not ("expected" in text or "must" in text) or "got" not in text:
        faults.append("does not say what was expected and what came")
    return ", ".join(faults)


def _numbers(leaf: Any) -> np.ndarray:
    a = np.asarray(leaf)
    if a.dtype.kind not in "biufcV":
        return np.zeros(0)  # a name, a function
    return a.astype(np.complex128 if a.dtype.kind == "c" else np.float64)


def _same(got: Any, want: Any, tolerance: float) -> bool:
    """Leaf by leaf, NaN for NaN and infinity for infinity; what is of another dtype may be as good."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    if len(got) != len(want):
        return False
    for a, b in zip(map(_numbers, got), map(_numbers, want), strict=True):
        known = np.isfinite(b)
        scale = np.max(np.abs(b[known]), initial=1e-30)
        if a.shape != b.shape or not np.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True):
            return False
    return True


# --- The command.

_WHAT = ("0", "-1", "1.5", "many", "nan", "", "1e400", "99999999999999999999")
_COMMANDS = {
    "diagnose": {
        **dict.fromkeys(("--hidden", "--length", "--batch", "--embed"), _WHAT),
        "--gain": ("0", "-1", "nan", "inf", "much", ""),
        "--seed": ("-1", "1.5", "one", "", "4294967296"),
        "--cells": ("transformer", "", "RNN"),
        "--loss": ("some", "", "ALL"),
        "--text": ("absent.txt", "", "/", "/dev/null"),
        "--step": (
            "mine.py",
            "absent.py:make",
            "no_such_module:make",
            "json:absent",
            "json:dumps",
            ":",
            "a:",
            ":b",
        ),
        "--checkpoint": ("absent", "/dev/null", "/"),
        "--weights": ("absent.npz", "weights", "/", ""),
        "--data": ("absent.npz",),
        "--prefix": ("rnn",),
        "--layer": ("0", "-1", "much", ""),
    },
    "train adding": {
        **dict.fromkeys(("--hidden", "--length", "--batch", "--updates", "--seeds", "--chunk"), _WHAT),
        **dict.fromkeys(("--rate", "--gain", "--clip-adjoints"), ("0", "-1", "nan", "inf", "much", "")),
        **dict.fromkeys(("--clip", "--omega"), ("-1", "nan", "inf", "much", "")),
        **dict.fromkeys(("--cell", "--activation", "--init", "--optimizer"), ("none", "", "LSTM")),
        "--text": ("absent.txt", ""),
    },
}


def commands() -> list[list[str]]:
    """Bad arguments of the command."""
    options = [
        [*job.split(), option, value]
        for job, bad in _COMMANDS.items()
        for option, values in bad.items()
        for value in values
    ]
    jobs = ([], ["diagnose", "--nonsense"], ["train"], ["train", "nothing"], ["dance"], ["diagnose", "more"])
    together = (
        ["train", "digits", "--length", "9"],
        ["train", "adding", "--cell", "rnn", "--chrono"],
        ["train", "adding", "--cell", "gru", "--gain", "2"],
        ["train", "adding", "--length", "2", "--chrono"],
        ["diagnose", "--checkpoint", "absent", "--hidden", "3"],
    )
    return [*options, *jobs, *together]


def judge_command(arguments: list[str], folder: Path) -> tuple[Outcome, str]:
    """Right are status 2 and one line that names the option."""
    out = ["--out", str(folder / "out")] if arguments and arguments[0] in ("diagnose", "train") else []
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()):
        try:
            status: Any = main([*arguments, *out])
        except SystemExit as stop:
            status = stop.code
        except Exception as error:
            return "wrong", f"{type(error).__name__}: {error}"
    errors = stderr.getvalue()
    option = arguments[-2] if len(arguments) > 2 and arguments[-2].startswith("--") else ""
    clear = errors.count("\n") == 1 and any(said in errors for said in (option, option.strip("-"), *arguments[-1:]))
    left = [p for p in folder.rglob("*") if p.is_file()]
    return ("refused" if status == 2 and clear and not left else "wrong"), f"status {status}: {errors}; left {left}"
