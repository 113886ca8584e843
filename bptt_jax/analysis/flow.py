"""`gradient_flow`: all that one sequence tells about its gradient, in one streaming pass, with a verdict."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Complex, Float

from bptt_jax import devices
from bptt_jax.analysis import matrix_free
from bptt_jax.analysis.averages import pieces
from bptt_jax.analysis.backward import contributions, squared_norm
from bptt_jax.analysis.error_signal import ErrorSignal, propagate_error_signal
from bptt_jax.analysis.float_range import float_range
from bptt_jax.analysis.flow_results import (
    GradientFlow,
    LeafFlow,
    Numerics,
    ProductNorms,
    SignalFlow,
    Spectra,
)
from bptt_jax.analysis.loss import BoundLoss, bind_loss
from bptt_jax.checks import EIGEN, PRODUCT, SINGULAR, check_bool, check_cost, check_positive_int, check_share
from bptt_jax.leaves import dotted
from bptt_jax.linalg import logscale
from bptt_jax.linalg.logscale import LogScaled
from bptt_jax.linalg.products import identity, log_of_norm, log_spectral_norm
from bptt_jax.linalg.spectra import eigenvalues, singular_values, spectra_and_others
from bptt_jax.recurrence.jacobians import jacobians_at
from bptt_jax.recurrence.linearization import Linearization, Mode, linearize
from bptt_jax.results import counted
from bptt_jax.step import (
    Array,
    Instant,
    Loss,
    Params,
    PyTree,
    Recurrence,
    State,
    Step,
    bind,
    check_step,
    choose,
    full_precision,
    ravel_state,
    state_size,
)
from bptt_jax.timeline import real_steps_first

Levels: TypeAlias = tuple[Array | np.ndarray, Array | np.ndarray]

# Numbers in one chunk of Jacobians: 2 MB in float32, of which some ten copies live at a time.
_CHUNK_NUMBERS = 1 << 19


def gradient_flow(
    step: Step,
    params: Params,
    state0: State,
    xs: PyTree,
    loss: Loss,
    *,
    args: PyTree = None,
    has_aux: bool = False,
    length: int | None = None,
    spectra: bool = True,
    stride: int = 1,
    num: int | None = None,
    threshold: float | Float[Array, ""] = 1e-3,
    share: float | Float[Array, ""] = 1e-3,
) -> GradientFlow:
    """Measures what backpropagation through time does to the gradient of one sequence.

    Streams: memory is O(T * D + chunk * D^2), never T Jacobians at once; with `num`, and with ``spectra=False``,
    O(T * D) and a constant, beside the parameters and their gradient. Products of matrices, the step's and the
    loss's too, are in full precision on every device.

    Args:
      step, params, state0, xs, length: as for `bptt_jax.unroll`.
      loss, args, has_aux: as for `bptt_jax.adjoints`.
      spectra: whether norms of products and spectra of Jacobians are wanted, by far the dearest part. Rate, horizon
        and verdict need no D x D matrix, nor do they suffer where the forward Jacobian is NaN and the gradient is not.
      stride: spectra of every stride-th real step's Jacobian only, counted back from the last. `Spectra` then has
        ``ceil(T / stride)`` rows. Eigenvalues are the dearest of all.
      num: of the spectra the first `num` values only, found without any D x D matrix as
        `bptt_jax.analysis.leading_singular_values` and `bptt_jax.analysis.leading_eigenvalues` do, within the
        errors that these give; the norms of the products by 32 steps of Golub-Kahan bidiagonalisation each, good
        to 1e-3 nats even of random matrices. These norms cost some 20 T^2 Jacobian-vector products and as many
        vector-Jacobian ones, where the dense way multiplies T matrices: it pays where D is in the thousands and T
        small against it. Below that, and wherever all values are wanted, leave it None.
      threshold: where a signal counts as gone, and its inverse where it counts as blown up. The gradient of B
        sequences carries sampling noise of the order of 1 / sqrt(B) of itself: what is left of 1e-3 lies below the
        noise of any batch smaller than a million sequences, so no optimiser can act on it; and a growth of 1e3
        turns the customary learning rates of 1e-3 and above into steps of the size of the parameters.
      share: the last state that the loss reads in a segment is the last whose immediate derivative exceeds this
        share of the largest there. A small penalty on later states does not count. Where the statement says that the
        loss hardly depends on the later states, a smaller share makes them count.

    Returns:
      A `GradientFlow`. For a batch, ``jax.vmap`` over the sequences.

    Raises:
      TypeError, ValueError: an argument breaks the contract; `threshold` or `share` is not between 0 and 1; the
        dense path would take more than 5e13 operations. NaN or infinity in the trajectory raises nothing: the
        verdict is "non-finite", and the fields or `advice` say where it began.

    Example:
      >>> step = lambda w, h, x: w * h + x
      >>> flow = bptt.gradient_flow(step, 0.5, jnp.zeros(1), jnp.ones((20, 1)), lambda states: states[-1, 0])
      >>> flow.verdict, round(float(flow.growth_rate), 3)
      ('vanishing', -0.693)
      >>> flow.advice()[0]
      'the signal falls to 0.001 in 10 steps of 20: nothing older is learned'
    """
    recurrence, bound = bind(step, params, state0, xs, length), bind_loss(loss, args, has_aux)
    check_bool("spectra", spectra)
    stride = check_positive_int("stride", stride)
    if num is not None:
        num = matrix_free.check_num(num, state0)
    elif spectra:
        _check_cost(recurrence, stride)
    levels = check_levels(threshold, share)
    with full_precision():
        return _gradient_flow(recurrence, levels, bound, spectra=spectra, stride=stride, num=num)


def check_levels(threshold: float | Array, share: float | Array) -> Levels:
    """Returns both as arrays if they are numbers between 0 and 1."""
    return _check_level("threshold", threshold), _check_level("share", share)


def _check_level(name: str, value: float | Array) -> Array | np.ndarray:
    value = check_share(name, value)
    if isinstance(value, jax.core.Tracer):
        return jnp.asarray(value, float)
    return np.asarray(value, jnp.result_type(float))  # of NumPy: nothing is compiled for it


def _check_cost(recurrence: Recurrence, stride: int) -> None:
    steps = recurrence.length
    rows = -(-steps // stride)
    check_cost(
        "spectra",
        f"norms of products and spectra over T = {counted(steps, 'step')}",
        recurrence.size,
        steps * (PRODUCT + SINGULAR) + rows * (SINGULAR + EIGEN),
        "spectra=False measures rate, horizon and verdict without them, num= finds the first few values without any "
        "such matrix, stride= takes the spectra of fewer steps",
    )


@devices.compiled
def _gradient_flow(
    recurrence: Recurrence,
    levels: Levels,
    loss: BoundLoss,
    *,
    spectra: bool,
    stride: int,
    num: int | None,
) -> GradientFlow:
    return measure_flow(recurrence, levels, loss, spectra=spectra, stride=stride, num=num)[0]


def measure_flow(
    recurrence: Recurrence,
    levels: Levels,
    loss: BoundLoss,
    *,
    spectra: bool = True,
    stride: int = 1,
    num: int | None = None,
) -> tuple[GradientFlow, ErrorSignal]:
    """`gradient_flow` of checked arguments, to be traced, and the error signal that it comes from.

    Args:
      recurrence, loss: to be traced.
      levels: ``(threshold, share)``.
      spectra, stride, num: as for `gradient_flow`.
    """
    threshold, share = map(jnp.asarray, levels)
    recurrence = check_step(recurrence)
    signal = propagate_error_signal(recurrence, loss, threshold=threshold, share=share)
    done = signal.done
    along = done.along
    added, params_grad = contributions(done)
    norms = found = None
    if spectra:
        # Products and spectra are of whole Jacobians, whatever the loss reads.
        whole = along if num is None or all(along.live) else linearize(recurrence)
        norms, found = _dense(along, stride) if num is None else _leading(whole, stride, num)
    growth = signal.growth
    flow = GradientFlow(
        loss=done.loss.value,
        growth_rate=growth.rate,
        growth_rate_error=growth.rate_error,
        horizon=growth.horizon,
        horizon_error=growth.horizon_error,
        horizon_extrapolated=growth.extrapolated,
        cut_lag=growth.cut_lag,
        end_gain=growth.end_gain,
        peak_gain=signal.peak_gain,
        reach=signal.reach,
        threshold=threshold,
        signal=SignalFlow(
            adjoint_log_norms=signal.adjoint_log_norms,
            log_gains=signal.gains,
            lags=signal.lags,
            piece=jnp.asarray(pieces(recurrence)),
            weight=growth.weight,
        ),
        leaves=LeafFlow(
            log_norms=signal.leaf_gains,
            growth_rate=signal.leaf_growth.rate,
            growth_rate_error=signal.leaf_growth.rate_error,
            horizon=signal.leaf_growth.horizon,
            horizon_extrapolated=signal.leaf_growth.extrapolated,
            names=_leaf_names(along.no_cotangents),
            structure=jax.tree.structure(along.no_cotangents),
        ),
        contributions=added,
        products=norms,
        spectra=found,
        numerics=_numerics(signal, params_grad, threshold),
        aux=done.loss.aux,
        mode=along.mode,
    )
    return flow, signal


def _leaf_names(tree: PyTree) -> tuple[str, ...]:
    return tuple(dotted(path) or "state" for path, _ in jax.tree_util.tree_leaves_with_path(tree))


def _numerics(signal: ErrorSignal, params_grad: LogScaled, threshold: Array) -> Numerics:
    """`params_grad`: as one vector, normalized."""
    adjoints = signal.done.signal
    # `LogScaled.log_norm` would make sure of the mantissa's size once more.
    total = squared_norm(params_grad)
    log_norm = logscale.to_log(jnp.where(total == 0, 1, total), params_grad.exponent, half=True, zero=total == 0)
    grad_log_norm = log_norm.astype(signal.gains.dtype)
    dtypes = [a.dtype for a in jax.tree.leaves(signal.done.params_grad.mantissa)]
    found = float_range(adjoints, params_grad.exponent, dtypes, signal.lags, threshold)
    kinds = [jnp.finfo(a.dtype) for a in jax.tree.leaves(adjoints.mantissa)]
    return Numerics(
        finite=signal.finite & (grad_log_norm < jnp.inf),  # False for NaN too; -inf is the norm 0
        in_range=found.in_range & (grad_log_norm < jnp.inf),
        first_nonfinite_state=signal.first_nonfinite_state,
        first_nonfinite_adjoint=signal.first_nonfinite_adjoint,
        params_grad_log_norm=grad_log_norm,
        overflow_lag=found.overflow_lag,
        coarse_lag=found.coarse_lag,
        lost_lag=found.lost_lag,
        loss_scale_log2=found.loss_scale_log2,
        dtype=str(min(kinds, key=lambda info: float(info.max)).dtype),
    )


def _leading(along: Linearization, stride: int, num: int) -> tuple[ProductNorms, Spectra]:
    return ProductNorms(matrix_free.suffix_log_norms(along), None), _spectra(along, stride, num, None)


def _dense(along: Linearization, stride: int) -> tuple[ProductNorms, Spectra]:
    """The norms of dh_e/dh_t for all t, e the end of the segment, and the spectra of every stride-th Jacobian: of all
    in the same loop, for each routine is dear to compile."""
    recurrence = along.recurrence
    size, steps = recurrence.size, recurrence.length
    sizes = [state_size(leaf) for leaf in jax.tree.leaves(along.no_cotangents)]

    def one_more(product: LogScaled, at: tuple[Array, Array | None]) -> tuple[LogScaled, LogScaled]:
        jacobian, reset = at
        product = product @ jacobian
        return (product if reset is None else choose(reset, empty, product)), product

    def body(product: LogScaled, at: tuple[State, Instant]) -> tuple[LogScaled, tuple[Array, PyTree]]:
        starts, instants = at
        matrices = jacobians_at(recurrence.step, recurrence.params, starts, instants.x, along.mode)
        if instants.real is not None:
            matrices = jnp.where(instants.real[:, None, None], matrices, empty.mantissa[None])
        product, found = devices.scan(one_more, product, (matrices, instants.reset), reverse=True)
        if stride == 1:
            own, eigen, values = spectra_and_others(matrices, found.mantissa)
            norms = log_of_norm(values[:, 0], found.exponent)[:, None]
            spectra = own, eigen
        else:
            norms, spectra = log_spectral_norm(found)[:, None], None
        if len(sizes) > 1:
            blocks = _diagonal_blocks(found.mantissa, sizes)
            norms = jnp.concatenate([norms, log_spectral_norm(LogScaled(blocks, found.exponent[:, None]))], axis=1)
        return product, (norms, spectra)

    empty = identity(size, ravel_state(recurrence.state0)[0].dtype)
    # Padding goes in front, where the backward recursion arrives last: what it adds is cut off again.
    chunks = _in_chunks((along.starts, recurrence.instants), size, steps)
    _, found = devices.scan(body, empty, chunks, reverse=True)
    norms, values = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[-steps:], found)
    norms = jnp.where(recurrence.real[:, None], norms, jnp.nan)
    products = ProductNorms(norms[:, 0], norms[:, 1:] if len(sizes) > 1 else None)
    return products, _spectra(along, stride, None, values)


def _in_chunks(tree: PyTree, size: int, count: int) -> PyTree:
    """``[count, ...] -> [K, n, ...]``, with n as many D x D matrices as may be held; the first repeated in front."""
    chunks = -(-count // max(1, _CHUNK_NUMBERS // size**2))
    length = -(-count // chunks)

    def cut(a: Array) -> Array:
        a = jnp.concatenate([jnp.repeat(a[:1], chunks * length - count, axis=0), a])
        return a.reshape(chunks, length, *a.shape[1:])

    return jax.tree.map(cut, tree)


def _diagonal_blocks(matrices: Array, sizes: list[int]) -> Array:
    """``[K, D, D] -> [K, leaves, d, d]``, padded with zeros to the largest, which leaves their norm as it is."""
    largest, blocks, first = max(sizes), [], 0
    for size in sizes:
        block = matrices[:, first : first + size, first : first + size]
        blocks.append(jnp.pad(block, ((0, 0), (0, largest - size), (0, largest - size))))
        first += size
    return jnp.stack(blocks, axis=1)


def _spectra(along: Linearization, stride: int, num: int | None, found: tuple[Array, Array] | None) -> Spectra:
    """Of every stride-th real step, counted back from the last; `found`, if at hand, are those of all steps."""
    recurrence = along.recurrence
    steps, real = recurrence.length, recurrence.instants.real
    if real is None:
        chosen = jnp.arange((steps - 1) % stride, steps, stride)
        missing = jnp.zeros(chosen.shape, bool)
    else:
        count = jnp.sum(real)
        order = (count - 1) % stride + stride * jnp.arange(-(-steps // stride))
        missing = order >= count
        chosen = real_steps_first(real)[jnp.where(missing, 0, order)]
    if found is None:
        states, xs = jax.tree.map(lambda a: a[chosen], (along.starts, recurrence.instants.x))
        sv, ev = spectra_at(recurrence.step, recurrence.params, states, xs, num, along.mode)
    else:
        sv, ev = found if real is None else jax.tree.map(lambda a: a[chosen], found)
    return Spectra(
        jnp.where(missing[:, None], jnp.nan, sv),
        jnp.where(missing[:, None], jnp.nan, ev),
        jnp.where(missing, -1, 1 + chosen),
        sv.shape[1] == recurrence.size,
    )


def spectra_at(
    step: Step, params: Params, states: State, xs: PyTree, num: int | None, mode: Mode
) -> tuple[Float[Array, "K D"], Complex[Array, "K D"]]:
    """Singular values and eigenvalues, all or `num`, at each of K given states (leaves ``[K, ...]``) and inputs."""
    if num is not None:
        return (
            matrix_free.singular_values_at(step, params, states, xs, num, mode).values,
            matrix_free.eigenvalues_at(step, params, states, xs, num, mode).values,
        )

    def at(inputs: tuple[State, PyTree]) -> tuple[Array, Array]:
        matrices = jacobians_at(step, params, *inputs, mode)
        return singular_values(matrices), eigenvalues(matrices)

    count = jax.tree.leaves(states)[0].shape[0]
    size = state_size(jax.tree.map(lambda a: a[0], states))
    found = jax.lax.map(at, _in_chunks((states, xs), size, count))
    return jax.tree.map(lambda a: a.reshape(-1, a.shape[-1])[-count:], found)
