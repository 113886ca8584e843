"""Gradient clipping that recurrent networks need and Optax lacks, as Optax transformations, and the clip inside the
backward pass.

Every transformation here keeps a `ClipRecord` in its state, so that the norms before and after, and the shares of
clipped and skipped updates, can be read from any optimiser's state by `clip_records` and `skip_records`. Norms are
those of `optax.tree.norm`, computed so that they do not overflow: float32 gradients of 1e20 have squares beyond
its range, and `optax.clip_by_global_norm` turns them into zeros.

What is not finite is never clipped, for no factor mends it: it passes unchanged, for `skip_updates` to stop. Extra
arguments of an update (``value=``, ``grad=``) are passed on to the optimiser inside; a clip has no use for them. As
with Optax's own clips the state may be None, as in ``clip.update(gradient, None)``: then one begins.

To differentiation a clip is the identity wherever it lets a gradient pass, at a gradient of zero too.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Int

from bptt_jax.checks import check_function, check_leaves, check_positive, check_positive_int, check_share
from bptt_jax.linalg import logscale
from bptt_jax.step import Array, Input, Params, PyTree, State, Step


class ClipRecord(NamedTuple):
    """What one transformation has done so far; all scalars, with leading axes by ``jax.vmap``.

    Attributes:
      updates: number of updates seen, int32.
      acted: number of those that it clipped (or skipped, in `skip_updates`), int32.
      log_norm_before: natural log of the latest norm that came in; NaN or inf if that was not finite.
      log_norm_after: of what went out; -inf for a skipped update.
    """

    updates: Int[Array, "*batch"]
    acted: Int[Array, "*batch"]
    log_norm_before: Float[Array, "*batch"]
    log_norm_after: Float[Array, "*batch"]

    @property
    def share(self) -> Float[Array, "*batch"]:
        """Share of updates that were clipped (or skipped); 0 before the first."""
        return self.acted.astype(float) / jnp.maximum(self.updates, 1).astype(float)


class ClipState(NamedTuple):
    """State of `clip_by_global_norm`."""

    record: ClipRecord


class AutoClipState(NamedTuple):
    """State of `autoclip`: a ring of the latest finite log norms, and how many were `seen`."""

    record: ClipRecord
    log_norms: Float[Array, " window"]
    seen: Int[Array, ""]


class ZClipState(NamedTuple):
    """State of `zclip`: running mean and variance of the norm, and how many finite norms were `seen`."""

    record: ClipRecord
    mean: Float[Array, ""]
    variance: Float[Array, ""]
    seen: Int[Array, ""]


class SkipState(NamedTuple):
    """State of `skip_updates`.

    Attributes:
      record: its `acted` counts the skipped updates.
      in_a_row: how many of the latest updates were skipped, without a break.
      exhausted: whether that has ever reached the limit.
      inner: the wrapped optimiser's state, untouched by skipped updates.
    """

    record: ClipRecord
    in_a_row: Int[Array, ""]
    exhausted: Bool[Array, ""]
    inner: optax.OptState


def clip_by_global_norm(max_norm: float | Float[Array, ""]) -> optax.GradientTransformationExtraArgs:
    """Scales updates to a global norm of at most `max_norm` (Pascanu et al. 2013, arXiv:1211.5063, alg. 1).

    Gradients within the threshold pass bit for bit. Finite gradients of any size come back with norm `max_norm` and
    their own direction. NaN and infinities pass unchanged.

    Args:
      max_norm: the threshold, above 0. It may be traced (`optax.inject_hyperparams`), and is then checked when it
        runs.

    Returns:
      A transformation with a `ClipState`.

    Raises:
      TypeError, ValueError: `max_norm` is no number above 0.

    Example:
      >>> clip = bptt.clip_by_global_norm(1.0)
      >>> gradient = jnp.array([3e20, 4e20])
      >>> updates, state = clip.update(gradient, clip.init(gradient))
      >>> updates
      Array([0.6, 0.8], dtype=float32)
    """
    max_norm = check_positive("max_norm", max_norm)

    def update(
        updates: optax.Updates, state: ClipState | None, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, ClipState]:
        del params, extra
        record = _no_record() if state is None else state.record
        updates, before = _measured(updates, max_norm)
        clipped, after, acted = _clip(updates, before, jnp.log(max_norm))
        return clipped, ClipState(_note(record, acted, before, after))

    return optax.GradientTransformationExtraArgs(lambda params: ClipState(_no_record()), update)


def autoclip(
    quantile: float | Float[Array, ""] = 0.1, *, window: int = 1000, warmup: int = 10
) -> optax.GradientTransformationExtraArgs:
    """Clips at a quantile of the gradient norm's history (AutoClip: Seetharaman et al. 2020, arXiv:2007.14469).

    The paper keeps every norm; here the latest `window` count, so that the state has a fixed size. The current norm
    belongs to the history it is compared with, as in the paper. Norms that are not finite do not enter it. While the
    quantile is zero, as where more gradients than that are, nothing is clipped: nothing would move.

    Args:
      quantile: between 0 and 1; the paper's p / 100, with p = 10 recommended. It may be traced.
      window: how many norms are remembered.
      warmup: how many finite norms are needed before anything is clipped.

    Returns:
      A transformation with an `AutoClipState`.

    Raises:
      TypeError, ValueError: an argument is out of its range.

    Example:
      >>> clip = bptt.remedies.autoclip(warmup=2)
      >>> state = clip.init(None)
      >>> for norm in (1.0, 1.0, 50.0):
      ...     updates, state = clip.update(jnp.full(1, norm), state)
      >>> updates, int(state.record.acted)
      (Array([1.], dtype=float32), 1)
    """
    window, warmup = check_positive_int("window", window), check_positive_int("warmup", warmup)
    quantile = check_share("quantile", quantile)

    def init(params: optax.Params) -> AutoClipState:
        del params
        return AutoClipState(_no_record(), jnp.full(window, jnp.inf, jnp.float32), jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates, state: AutoClipState | None, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, AutoClipState]:
        del extra
        state = init(params) if state is None else state
        updates, before = _measured(updates, quantile)
        before = before.astype(jnp.float32)
        finite = before < jnp.inf  # False for NaN; -inf is the norm 0
        written = state.log_norms.at[state.seen % window].set(before)
        log_norms = jnp.where(finite, written, state.log_norms)
        count = state.seen + finite.astype(jnp.int32)
        known = jnp.minimum(count, window)
        # Empty places hold inf and stand last; the quantile is an entry of the history, so scale cannot blur it.
        share = jnp.asarray(quantile, float) * known.astype(float)
        index = jnp.ceil(share).astype(jnp.int32) - 1
        threshold = jnp.sort(log_norms)[jnp.clip(index, 0, window - 1)]
        threshold = jnp.where((count >= warmup) & (threshold > -jnp.inf), threshold, jnp.inf)
        clipped, after, acted = _clip(updates, before, threshold)
        return clipped, AutoClipState(_note(state.record, acted, before, after), log_norms, count)

    return optax.GradientTransformationExtraArgs(init, update)


def zclip(
    z_threshold: float | Float[Array, ""] = 2.5, *, decay: float | Float[Array, ""] = 0.97, warmup: int = 25
) -> optax.GradientTransformationExtraArgs:
    """Clips norms that stand out from their running mean (ZClip: Kumar et al. 2025, arXiv:2504.02507).

    With running mean m and standard deviation s of the norm, ``z = (norm - m) / s``; above the threshold z* the
    update is scaled to ``m + z*^2 s / z`` ("reciprocal clipping": the further out, the closer to the mean). The
    running statistics take in the clipped norm; they start as mean and variance of the first `warmup` finite norms,
    during which nothing is clipped. Norms that are not finite never enter them.

    Args:
      z_threshold: z*, above 0. It may be traced.
      decay: of the running mean and variance, between 0 and 1. It may be traced.
      warmup: how many finite norms start the statistics.

    Returns:
      A transformation with a `ZClipState`.

    Raises:
      TypeError, ValueError: an argument is out of its range.

    Example:
      >>> clip = bptt.remedies.zclip(warmup=2)
      >>> state = clip.init(None)
      >>> for norm in (1.0, 1.0, 50.0):
      ...     updates, state = clip.update(jnp.full(1, norm), state)
      >>> updates, int(state.record.acted)
      (Array([1.], dtype=float32), 1)
    """
    z_threshold, decay = check_positive("z_threshold", z_threshold), check_share("decay", decay)
    warmup = check_positive_int("warmup", warmup)

    def init(params: optax.Params) -> ZClipState:
        del params
        zero = jnp.zeros((), jnp.float32)
        return ZClipState(_no_record(), zero, zero, jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates, state: ZClipState | None, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, ZClipState]:
        del extra
        state = init(params) if state is None else state
        updates, before = _measured(updates, z_threshold, decay)
        before = before.astype(jnp.float32)
        warm = state.seen >= warmup
        z, keep = (jnp.asarray(setting, jnp.float32) for setting in (z_threshold, decay))
        spread = state.variance > 0
        deviation = jnp.where(spread, jnp.sqrt(jnp.where(spread, state.variance, 1.0)), 0.0)
        margin = deviation + 1e-6  # the released code's guard
        # Beside a mean of zero everything would be one, and would be clipped to zero for good.
        known = warm & (state.mean > 0)
        outlier = known & (jnp.exp(before) > state.mean + z * margin) & (before < jnp.inf)
        # What is chosen away must not bring a NaN into derivatives, and 1 / norm does not overflow where norm does:
        # z*^2 s / z = z*^2 s (s + 1e-6) / norm / (1 - m / norm).
        inverse = jnp.exp(-jnp.where(outlier, before, 0.0))
        excess = jnp.where(outlier, 1 - state.mean * inverse, 1.0)
        goal = jnp.where(outlier, state.mean + z * z * deviation * margin * inverse / excess, 1.0)
        clipped, after, acted = _clip(updates, before, jnp.where(outlier, jnp.log(goal), jnp.inf))
        # A norm whose square overflows would make the variance infinite for good.
        small = before < jnp.log(jnp.finfo(jnp.float32).max) / 2 - 1
        taken = jnp.where(outlier, goal, jnp.exp(jnp.where(small, before, 0.0)))
        mean, variance = _statistics(state, taken, warm, keep)
        usable = small | outlier
        return clipped, ZClipState(
            _note(state.record, acted, before, after),
            jnp.where(usable, mean, state.mean),
            jnp.where(usable, variance, state.variance),
            state.seen + usable.astype(jnp.int32),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def skip_updates(
    inner: optax.GradientTransformation,
    *,
    max_norm: float | Float[Array, ""] = jnp.inf,
    max_in_a_row: int = 10,
) -> optax.GradientTransformationExtraArgs:
    """Skips an update that is not finite or whose global norm exceeds `max_norm`: neither parameters nor the state
    of `inner` change.

    `optax.apply_if_finite` does the first, but lets non-finite updates through after its limit. Here nothing that
    is not finite ever passes; after `max_in_a_row` skips without a break a finite update passes whatever its norm,
    for then it is the threshold that is wrong, and `exhausted` in the state is set, for the training loop to read.

    Around `optax.MultiSteps` it leaves out the parts that are not finite; within, the first of them would spoil the
    mean of all later ones.

    Args:
      inner: the optimiser to protect.
      max_norm: above 0.
      max_in_a_row: at least 1.

    Returns:
      A transformation with a `SkipState`.

    Raises:
      TypeError, ValueError: an argument is out of its range.

    Example:
      >>> optimizer = bptt.remedies.skip_updates(optax.sgd(0.1))
      >>> updates, state = optimizer.update(jnp.array([jnp.nan]), optimizer.init(jnp.zeros(1)))
      >>> updates, int(state.in_a_row)
      (Array([0.], dtype=float32), 1)
    """
    max_norm = check_positive("max_norm", max_norm)
    max_in_a_row = check_positive_int("max_in_a_row", max_in_a_row)
    inner = optax.with_extra_args_support(check_optimizer("inner", inner))

    def init(params: optax.Params) -> SkipState:
        return SkipState(_no_record(), jnp.zeros((), jnp.int32), jnp.zeros((), bool), inner.init(params))

    def update(
        updates: optax.Updates, state: SkipState | None, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, SkipState]:
        if state is None:
            state = init(updates if params is None else params)
        updates, before = _measured(updates, max_norm)
        exhausted = state.in_a_row >= max_in_a_row
        finite = before < jnp.inf  # False for NaN too; -inf is the norm 0
        skip = ~finite | ((before > jnp.log(max_norm)) & ~exhausted)
        # What is skipped is replaced first: NaN must not reach the inner state even to be discarded, since a
        # gradient through this choice would be NaN.
        safe = jax.tree.map(lambda u: jnp.where(skip, jnp.zeros_like(u), u), updates)
        applied, new_inner = inner.update(safe, state.inner, params, **extra)
        kept = jax.tree.map(partial(jnp.where, skip), state.inner, new_inner)
        out = jax.tree.map(lambda u: jnp.where(skip, jnp.zeros_like(u), u), applied)
        in_a_row = jnp.where(skip, state.in_a_row + 1, 0)
        record = _note(state.record, skip, before, jnp.where(skip, -jnp.inf, before))
        return out, SkipState(record, in_a_row, state.exhausted | (in_a_row >= max_in_a_row), kept)

    return optax.GradientTransformationExtraArgs(init, update)


def with_clipping(
    optimizer: optax.GradientTransformation, max_norm: float | Float[Array, ""], *, max_in_a_row: int = 10
) -> optax.GradientTransformationExtraArgs:
    """An optimiser that skips gradients that are not finite and clips the others, in one line.

    ``skip_updates(optax.chain(clip_by_global_norm(max_norm), optimizer))``: what is not finite is skipped before it
    can reach the optimiser's moments, what is finite is clipped at any size, then the optimiser acts.

    What gathers the gradients of several parts goes inside, ``optimizer =
    optax.MultiSteps(optimizer, 2).gradient_transformation()``: each part is then clipped, and one that is not
    finite is left out. Around this chain it would keep a NaN in its sum for good. To clip the mean of the parts
    instead, ``skip_updates(optax.MultiSteps(optax.chain(clip_by_global_norm(max_norm), optimizer),
    2).gradient_transformation())``.

    Args:
      optimizer: any Optax transformation; extra arguments of an update are passed on to it.
      max_norm, max_in_a_row: as for `clip_by_global_norm` and `skip_updates`.

    Returns:
      A transformation with a `SkipState`.

    Raises:
      TypeError, ValueError: an argument is out of its range.

    Example:
      >>> optimizer = bptt.with_clipping(optax.sgd(1.0), max_norm=1.0)
      >>> updates, state = optimizer.update(jnp.array([3e20, 4e20]), optimizer.init(jnp.zeros(2)))
      >>> updates
      Array([-0.6, -0.8], dtype=float32)
      >>> [float(record.share) for record in bptt.remedies.clip_records(state)]
      [1.0]
    """
    check_optimizer("optimizer", optimizer)
    return skip_updates(optax.chain(clip_by_global_norm(max_norm), optimizer), max_in_a_row=max_in_a_row)


def check_optimizer(name: str, optimizer: Any) -> optax.GradientTransformation:
    """Returns `optimizer` if Optax can work with it; raises TypeError if not."""
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"{name}: expected an optax.GradientTransformation, got {type(optimizer).__name__}")
    return optimizer


def clip_records(opt_state: optax.OptState) -> list[ClipRecord]:
    """The records of all clips in an optimiser's state, outermost first; by ``vmap`` their fields are batched."""
    return [node for node in _nodes(opt_state) if isinstance(node, ClipRecord)]


def skip_records(opt_state: optax.OptState) -> list[ClipRecord]:
    """The records of all `skip_updates` in an optimiser's state, outermost first; `acted` counts the skips."""
    return [node.record for node in _nodes(opt_state) if isinstance(node, SkipState)]


def clip_adjoints(
    step: Step,
    *,
    max_norm: float | Float[Array, ""] | None = None,
    max_value: float | Float[Array, ""] | None = None,
) -> Step:
    """The same step, whose adjoint dL/dh_t is clipped at every time step on its way back.

    In the manner of Graves 2013 (arXiv:1308.0850, section 2.1), who clips by value, but the derivatives at the
    inputs of an LSTM's gates; here it is those at the state, of any step.

    The forward pass is exact. Backwards, the total adjoint that arrives at each h_t (the later steps' and the
    loss's own) is first clipped by value, then scaled to `max_norm`; the gradient of everything before is that of
    the clipped one: no longer the derivative of the loss. Entries that are not finite stay so. Under `jax.vmap`
    each sequence is clipped on its own.

    Args:
      step: any recurrent step.
      max_norm: largest Euclidean norm of an adjoint, over the whole state.
      max_value: largest magnitude of an entry (of its real and imaginary part, where it is complex).

    Returns:
      A step. It has no Jacobian of its own (`jacobians` and `adjoints` want the bare step).

    Raises:
      TypeError, ValueError: `step` is no function; neither threshold is given, or one is not above 0.

    Example:
      >>> step = lambda w, h, x: w * h
      >>> gradient = jax.grad(lambda h0, step: bptt.final_state(step, 2.0, h0, length=5)[0])
      >>> gradient(jnp.ones(1), step), gradient(jnp.ones(1), bptt.remedies.clip_adjoints(step, max_norm=1.0))
      (Array([32.], dtype=float32), Array([2.], dtype=float32))
    """
    check_function("step", step, "step(params, state, x) -> state")
    if max_norm is None and max_value is None:
        raise ValueError("clip_adjoints: expected max_norm or max_value, got neither")
    largest = None if max_norm is None else check_positive("max_norm", max_norm)
    bound = jnp.inf if max_value is None else check_positive("max_value", max_value)

    def clip_value(a: Array) -> Array:
        if jnp.iscomplexobj(a):
            return jax.lax.complex(clip_value(a.real), clip_value(a.imag))
        # An infinity must not come out as an innocent number.
        return jnp.where(jnp.isfinite(a), jnp.clip(a, -bound, bound), a)

    @jax.custom_vjp
    def gate(state: State) -> State:
        return state

    def forward(state: State) -> tuple[State, None]:
        return state, None

    def backward(_: None, adjoint: State) -> tuple[State]:
        if max_value is not None:
            adjoint = jax.tree.map(clip_value, adjoint)
        if largest is not None:
            adjoint = _clip(adjoint, logscale.log_norm(adjoint), jnp.log(largest))[0]
        return (adjoint,)

    gate.defvjp(forward, backward)

    def clipped_step(params: Params, state: State, x: Input) -> State:
        new = step(params, state, x)
        check_leaves("the result of step", new)
        return gate(new)

    return clipped_step


def _nodes(opt_state: optax.OptState) -> list[Any]:
    """SkipStates and the ClipRecords that are not theirs."""
    nodes = []
    for node in jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, (ClipRecord, SkipState))):
        nodes.append(node)
        if isinstance(node, SkipState):
            nodes += _nodes(node.inner)
    return nodes


def _measured(updates: optax.Updates, *settings: Any) -> tuple[optax.Updates, Array]:
    """The updates as arrays of JAX, and the log of their global norm.

    The check of a traced setting is part of its value, and goes with it where the compiler finds that nothing needs
    it, as during a warm-up. So the updates need it: were a setting NaN, they would be.
    """
    check_leaves("updates", updates)
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            place = f"updates{jax.tree_util.keystr(path)}"
            raise TypeError(f"{place}: expected floating numbers, got {jnp.result_type(leaf)}")
    updates = jax.tree.map(jnp.asarray, updates)
    for setting in settings:
        if isinstance(setting, jax.core.Tracer):
            updates = jax.tree.map(partial(jnp.where, jnp.isnan(setting), jnp.nan), updates)
    return updates, logscale.log_norm(updates)


def _clip(tree: PyTree, log_norm: Array, log_threshold: Array) -> tuple[PyTree, Array, Array]:
    """The tree scaled to the threshold if it is finite and above; its log norm then; whether it was."""
    clipped, acts = logscale.clip(tree, jnp.zeros((), jnp.int32), log_norm, log_threshold)
    return clipped, jnp.where(acts, jnp.asarray(log_threshold).astype(log_norm.dtype), log_norm), acts


def _statistics(state: ZClipState, norm: Array, warm: Array, decay: Array) -> tuple[Array, Array]:
    # Welford's recursion while warming up gives exactly the mean and variance of the norms so far.
    n = (state.seen + 1).astype(norm.dtype)
    delta = norm - state.mean
    early_mean = state.mean + delta / n
    early_variance = state.variance + (delta * (norm - early_mean) - state.variance) / n
    mean = decay * state.mean + (1 - decay) * norm
    variance = decay * state.variance + (1 - decay) * jnp.square(norm - mean)
    return jnp.where(warm, mean, early_mean), jnp.where(warm, variance, early_variance)


def _no_record() -> ClipRecord:
    zero, none = jnp.zeros((), jnp.int32), jnp.full((), -jnp.inf, jnp.float32)
    return ClipRecord(zero, zero, none, none)


def _note(record: ClipRecord, acted: Array, before: Array, after: Array) -> ClipRecord:
    return ClipRecord(
        record.updates + 1,
        record.acted + acted.astype(jnp.int32),
        before.astype(record.log_norm_before.dtype),
        after.astype(record.log_norm_after.dtype),
    )
