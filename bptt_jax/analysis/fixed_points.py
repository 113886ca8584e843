"""Where does a trained network rest, and what is stable there?"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key

from bptt_jax import devices
from bptt_jax.analysis.fixed_point_derivatives import attached_to_equation
from bptt_jax.analysis.fixed_point_results import FixedPoints
from bptt_jax.analysis.fixed_point_search import Map, Method, search, size
from bptt_jax.analysis.matrix_free import eigenvalues_at
from bptt_jax.checks import (
    at_path,
    call_user_function,
    check_bool,
    check_function,
    check_key,
    check_leaves,
    check_nonnegative_finite,
    check_number,
    check_positive,
    check_positive_int,
    describe_shapes,
)
from bptt_jax.leaves import along_leading
from bptt_jax.linalg.lapack import solve
from bptt_jax.linalg.precision import wide
from bptt_jax.linalg.spectra import eigenvalues
from bptt_jax.recurrence.jacobians import jacobians_at
from bptt_jax.recurrence.linearization import Mode, differentiation_mode, linearize, require_pulls, require_pushes
from bptt_jax.slips import takes_whole
from bptt_jax.step import (
    Array,
    Input,
    Params,
    Recurrence,
    Sequence,
    State,
    Step,
    bind,
    check_step,
    differentiable_part,
    is_differentiable,
    ravel_state,
    state_size,
)

_DENSE = 512  # numbers of a state up to which its Jacobian is formed
_LEADING = 16  # eigenvalues of a larger one
_ROUNDINGS = 100.0  # how many of them a fixed point may be off
_FEW = 4.0  # how many are good enough to stop at once
_ITERATIONS = {"newton": 100, "krylov": 200, "gradient": 20_000}
_TOGETHER = 64  # points whose eigenvalues are sought at one time, and at most so many numbers in their Jacobians
_JACOBIAN_NUMBERS = 1 << 20


def fixed_points(
    step: Step,
    params: Params,
    starts: State,
    x: Input = None,
    *,
    x_per_start: bool = False,
    rhs: Callable[[Params, State, Input], State] | None = None,
    method: Method | None = None,
    num: int | None = None,
    tol: float | Float[Array, ""] | None = None,
    max_iterations: int | None = None,
    distance: float | Float[Array, ""] = 1e-3,
    outlier: float | Float[Array, ""] = 10.0,
    margin: float | Float[Array, ""] = 1e-4,
) -> FixedPoints:
    """Fixed points ``h = step(params, h, x)`` of a step under a constant input, from many starts at once.

    Sussillo and Barak 2013 (Neural Computation 25) look for them, and for slow points, by descent on the speed. Here
    every start goes by the better of Newton's step and that of Levenberg and Marquardt, with the exact Jacobian: after
    some ten iterations all digits are there, at stable points and saddles alike, and where there is no fixed point
    it ends in a minimum of the speed. Where fixed points form a line or a ring it goes to one nearby.

    Args:
      step, params: as for `bptt_jax.unroll`.
      starts: states with an axis in front, leaves ``[K, ...]``: those of trajectories, say
        (`bptt_jax.analysis.sample_starts`).
      x: the input, as the step takes it; None for an autonomous step. Another one: `jax.vmap` over it.
      x_per_start: whether `x` is one for each start, leaves ``[K, ...]``.
      rhs: of a step that follows a flow, the right-hand side ``rhs(params, h, x) -> dh/dt``, like the state, by
        whatever solver. Eigenvalues of the flow are then its own, and decide what is stable.
      method: "newton", as described. "krylov": the step of Levenberg and Marquardt by conjugate gradients, from
        products of the Jacobian with vectors. "gradient": descent on ``|step(h) - h|^2 / 2`` by steps of Barzilai and
        Borwein, from pulls alone, the field's habit; it takes hundreds of iterations to thousands, and gives up where
        200 in a row each gain less than a thousandth, as along a slow direction: "newton" goes on from there. None:
        "newton" up to 512 numbers of state, beyond "krylov".
      num: how many eigenvalues, those of largest modulus, without a D x D matrix. None: all, with the Jacobians, up
        to 512 numbers of state; beyond, 16.
      tol: the speed up to which a point counts as one ("gradient" stops there, the others go on while they gain).
        None: 100 roundings of the point's norm, or, if that is larger, of `scale`, the median norm of the starts
        (1 where all are zero).
      max_iterations: None: 100, of "krylov" 200, of "gradient" 20,000.
      distance: points within this, relative to `scale`, are one.
      outlier: a point is far from what was visited if it is farther from the median of the starts than this many
        times the median distance of these. Where they are all one, nothing tells what is far, and no point is.
      margin: an eigenvalue counts as neutral if its modulus is within this of 1; with `rhs`, if its real part is
        within this of 0, relative to the largest modulus. Networks that were trained to remember want more, 1e-2 say.

    Returns:
      `FixedPoints`. Points that converged have the derivatives with respect to `params` and `x` that the implicit
      function theorem gives, ``(I - J) dh = dF``, forwards and backwards, and eigenvalues and Jacobians those that
      follow; none with respect to `starts`. Others are constants, as speeds are.

    Raises:
      TypeError, ValueError: an argument breaks the contract; the step cannot be differentiated, or, by a route that
        needs it, not backwards.

    Jacobians and eigenvalues are computed once for all points that are taken for one. Memory is that of the Jacobians
    returned, twice, and some tens of MB. A start that is not finite, or whose step is not, is marked as such (`finite`)
    and leaves the others alone.

    Example:
      >>> logistic = lambda r, h, x: r * h * (1 - h)
      >>> found = bptt.fixed_points(logistic, 2.5, jnp.array([0.1, 0.4, 0.9])).distinct()
      >>> jnp.abs(found.points), found.kinds.tolist()  # 1 - 1 / r and 0
      (Array([0.6, 0. ], dtype=float32), ['stable', 'unstable'])
      >>> found.eigenvalues.real.ravel()  # 2 - r and r
      Array([-0.5,  2.5], dtype=float32)
    """
    step = check_function("step", step, "step(params, state, x) -> state")
    if rhs is not None:
        rhs = check_function("rhs", rhs, "rhs(params, state, x) -> dh/dt, like the state")
    for name, tree in (("params", params), ("starts", starts), ("x", x)):
        check_leaves(name, tree)
    if isinstance(x, Sequence):
        raise TypeError("x: expected one constant input, got a Sequence")
    check_bool("x_per_start", x_per_start)
    count = _check_starts(starts)
    if x_per_start:
        _check_per_start(x, count)
    dim = state_size(starts) // count
    if num is not None and check_positive_int("num", num) > dim:
        raise ValueError(f"num: expected at most {dim}, the numbers of the state, got {num}")
    if method is not None and not (isinstance(method, str) and method in _ITERATIONS):
        raise ValueError(f"method: expected None, {', '.join(map(repr, _ITERATIONS))}, got {method!r}")
    large = num is not None or dim > _DENSE
    if large and rhs is not None:
        raise ValueError(
            f"rhs: expected a state of at most {_DENSE} numbers and num=None, got D = {dim} and num={num}; "
            "flow_eigenvalues(dt) of the result needs none"
        )
    method = method or ("krylov" if large else "newton")
    settings = {
        "tol": tol if tol is None else check_number("tol", tol, "a number of at least 0", lambda v: v >= 0),
        "distance": check_positive("distance", distance),
        "outlier": check_positive("outlier", outlier),
        "margin": check_positive("margin", margin),
    }
    most = _ITERATIONS[method] if max_iterations is None else check_positive_int("max_iterations", max_iterations)
    return _fixed_points(
        params,
        starts,
        x,
        settings,
        step=step,
        rhs=rhs,
        x_per_start=x_per_start,
        method=method,
        num=min(dim, _LEADING) if large and num is None else num,
        max_iterations=most,
    )


def sample_starts(
    states: State,
    num: int,
    *,
    key: Key[Array, ""],
    noise: float | Float[Array, ""] = 0.1,
    axes: int = 1,
) -> State:
    """States drawn at random from trajectories, with Gaussian noise, to start `fixed_points` from.

    Args:
      states: those visited, as of `bptt_jax.unroll`: leaves ``[T, ...]``, or more axes in front.
      num: how many to draw; each may come several times.
      key: random key.
      noise: its standard deviation, relative to that of each leaf's numbers about their mean over what was visited.
      axes: how many of the axes in front are times and sequences: 2 of a batch ``[B, T, ...]``.

    Returns:
      Leaves ``[num, ...]``. What is no floating number is drawn along, without noise. States that are not finite are
      not drawn, where there are others.

    Raises:
      TypeError, ValueError: an argument is not as described.

    Example:
      >>> states = bptt.unroll(lambda w, h, x: w * h, 0.5, jnp.ones(3), length=10)
      >>> bptt.analysis.sample_starts(states, 100, key=jax.random.key(0)).shape
      (100, 3)
    """
    check_leaves("states", states)
    num, axes = check_positive_int("num", num), check_positive_int("axes", axes)
    key = check_key("key", key)
    noise = check_nonnegative_finite("noise", noise)
    shapes = {jnp.shape(leaf)[:axes] for leaf in jax.tree.leaves(states)}
    if len(shapes) != 1 or len(next(iter(shapes))) != axes or 0 in next(iter(shapes)):
        front = "one axis" if axes == 1 else f"{axes} axes"
        raise ValueError(
            f"states: expected {front} in front, of one size in all leaves, got {describe_shapes(states)}"
        )
    if state_size(states) == 0:
        raise ValueError(f"states: expected at least one floating number, got {describe_shapes(states)}")
    return _sample_starts(states, key, noise, num=num, axes=axes)


@devices.compiled
def _sample_starts(states: State, key: Array, noise: Array, *, num: int, axes: int) -> State:
    states = jax.tree.map(lambda a: jnp.asarray(a).reshape(-1, *jnp.shape(a)[axes:]), states)
    floating = jax.tree.leaves(differentiable_part(states)[0])
    finite = jnp.stack([jnp.all(jnp.isfinite(a.reshape(len(a), -1)), axis=1) for a in floating]).all(axis=0)
    weights = jnp.where(jnp.any(finite), finite, True).astype(jnp.float32)
    keys = jax.random.split(key, 1 + len(floating))
    drawn = jax.random.choice(keys[0], len(finite), (num,), p=weights / jnp.sum(weights))
    part, merge = differentiable_part(jax.tree.map(lambda a: a[drawn], states))
    leaves, treedef = jax.tree.flatten(part)

    def moved(key: Array, visited: Array, start: Array) -> Array:
        known = along_leading(finite, visited)
        mean = jnp.mean(visited, axis=0, where=known)
        away = jnp.abs(visited - mean[None])
        largest = jnp.max(away, where=known, initial=0)
        unit = jnp.where(largest > 0, largest, 1)  # so that no square leaves the range
        spread = unit * jnp.sqrt(jnp.mean(jnp.square(away / unit), where=known))
        scale = (jnp.asarray(noise, spread.dtype) * spread).astype(start.dtype)
        return start + scale * jax.random.normal(key, start.shape, start.dtype)

    each = zip(keys[1:], floating, leaves, strict=True)
    return merge(jax.tree.unflatten(treedef, [moved(*given) for given in each]))


def _check_starts(starts: State) -> int:
    """K."""
    leaves = jax.tree_util.tree_leaves_with_path(starts)
    if not any(is_differentiable(leaf) for _, leaf in leaves):
        got = describe_shapes(starts) if leaves else "an empty state"
        raise ValueError(f"starts: expected at least one floating number, got {got}")
    for path, leaf in leaves:
        if jnp.ndim(leaf) == 0:
            raise ValueError(f"{at_path('starts', path)}: expected an axis of starts in front, got a scalar")
    counts = {jnp.shape(leaf)[0] for _, leaf in leaves}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"starts: expected one number of starts, at least 1, in all leaves, got {describe_shapes(starts)}"
        )
    count: int = counts.pop()
    if state_size(starts) == 0:
        raise ValueError(f"starts: expected at least one floating number, got {describe_shapes(starts)}")
    return count


def _of_axes(step: Step, params: Params, starts: State, x: Input, first: State, x_per_start: bool) -> str:
    """One state for many, many inputs for one; empty if it is neither."""
    if takes_whole(step, params, starts, x):
        give = "starts[None]" if jax.tree_util.all_leaves([starts]) else "jax.tree.map(lambda a: a[None], starts)"
        return f"starts: expected an axis of starts in front, got one state, {describe_shapes(starts)}; give {give}"
    if x_per_start or not jax.tree.leaves(x) or not all(any(jnp.shape(leaf)[:1]) for leaf in jax.tree.leaves(x)):
        return ""
    if takes_whole(step, params, first, jax.tree.map(lambda a: a[0], x)):
        return (
            f"x: expected one constant input, got {describe_shapes(x)}, many of them; give one, or jax.vmap over "
            "them, or, of one for each start, x_per_start=True"
        )
    return ""


def _check_per_start(x: Input, count: int) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(x)
    if not leaves:
        raise ValueError("x: expected one input for each start, got none")
    for path, leaf in leaves:
        if jnp.shape(leaf)[:1] != (count,):
            raise ValueError(
                f"{at_path('x', path)}: expected {count} in front, one for each start, got {list(jnp.shape(leaf))}"
            )


@devices.compiled
def _fixed_points(
    params: Params,
    starts: State,
    x: Input,
    settings: dict[str, Any],
    *,
    step: Step,
    rhs: Callable[..., Any] | None,
    x_per_start: bool,
    method: Method,
    num: int | None,
    max_iterations: int,
) -> FixedPoints:
    starts, settings = jax.lax.stop_gradient((jax.tree.map(jnp.asarray, starts), settings))
    inputs = x if x_per_start else jax.tree.map(lambda a: jnp.asarray(a)[None], x)
    first = jax.tree.map(lambda a: a[0], starts)
    length = jnp.shape(jax.tree.leaves(inputs)[0])[0] if jax.tree.leaves(inputs) else 1
    try:
        recurrence = check_step(bind(step, params, first, inputs, length))
    except Exception as error:
        if said := _of_axes(step, params, starts, x, first, x_per_start):
            raise ValueError(said) from error
        if str(error).startswith("state0"):
            raise ValueError(f"starts: expected states with one axis in front; of the first, {error}") from error
        if str(error).startswith("xs: expected inputs"):
            raise ValueError("x: expected the input at which to rest, since the step uses it, got None") from error
        if str(error).startswith("xs"):
            raise ValueError(f"x: expected an input of the step; with an axis in front, {error}") from error
        raise
    if rhs is not None:
        _check_rhs(rhs, recurrence)
    mode = differentiation_mode(recurrence)
    if method != "newton":
        _require_products(recurrence, method)
    others = [leaf for leaf in jax.tree.leaves(starts) if not is_differentiable(leaf)]
    vectors = jax.vmap(lambda h: ravel_state(h)[0])(starts)
    vectors = devices.vary(vectors, devices.axes_of((recurrence, vectors)))

    of = Map(jax.lax.stop_gradient(recurrence), others)
    kinds = [jnp.finfo(a.dtype) for a in jax.tree.leaves(first) if is_differentiable(a)]
    eps, tiny = (max(float(getattr(kind, name)) for kind in kinds) for name in ("eps", "tiny"))
    scale, centre, radius = _visited(wide(vectors), tiny / eps)
    distance, outlier, margin = (jnp.asarray(settings[k], scale.dtype) for k in ("distance", "outlier", "margin"))

    def rounding(vector: Array) -> Array:
        return eps * jnp.maximum(scale, size(wide(vector)))

    def tolerance(vector: Array) -> Array:
        tol = settings["tol"]
        return _ROUNDINGS * rounding(vector) if tol is None else jnp.asarray(tol, scale.dtype)

    def enough(vector: Array) -> Array:
        if method == "gradient" and settings["tol"] is not None:
            return tolerance(vector)
        return jnp.minimum(tolerance(vector), _FEW * rounding(vector))

    found = search(of, vectors, tolerance, enough, scale, method=method, mode=mode, max_iterations=max_iterations)
    numbers = jnp.arange(len(vectors), dtype=jnp.int32)
    speeds = jax.vmap(lambda v, k: size(of.residual(v, k)))(found.vectors, numbers)
    finite = jnp.isfinite(speeds) & jnp.all(jnp.isfinite(found.vectors), axis=1)
    converged = finite & (speeds <= jax.vmap(tolerance)(found.vectors))
    representatives = _representatives(wide(found.vectors), speeds, finite, distance * scale)
    leaders = jnp.maximum(representatives, 0)
    arrivals = jnp.where(finite, jnp.zeros_like(leaders).at[leaders].add(finite.astype(jnp.int32))[leaders], 0)
    far = jax.vmap(lambda v: size(wide(v) - centre))(found.vectors) > outlier * radius

    attached = attached_to_equation(recurrence, others, found.vectors, converged, num is None)
    seen = partial(
        _seen_from,
        Map(recurrence, others),
        rhs=rhs,
        mode=mode,
        num=num,
        newton=method == "gradient" and num is None,
    )
    values, errors, matrices, of_flow, ahead = _of_representatives(seen, attached, representatives)
    stationary = found.stationary & finite & ~converged
    if ahead is not None:
        # Where |F(h) - h| has a minimum other than zero, J - I is singular. Where Newton's step is short enough to be
        # believed, a fixed point lies ahead, and descent was stuck on the small slope along a slow direction.
        stationary &= ~(ahead <= jax.vmap(lambda v: jnp.maximum(scale, size(wide(v))))(found.vectors))
    excess = jnp.abs(values) - 1 if of_flow is None else of_flow.real / _largest(of_flow)
    excess = jax.lax.stop_gradient(excess)
    points = jax.vmap(Map(recurrence, others).state)(attached, numbers)
    return FixedPoints(
        points,
        jax.lax.stop_gradient(jnp.where(finite, speeds, jnp.nan)),
        converged,
        stationary,
        finite,
        found.iterations,
        representatives,
        arrivals,
        far & finite,
        matrices,
        values,
        errors,
        of_flow,
        jnp.sum(excess > margin, axis=1, dtype=jnp.int32),
        jnp.sum(jnp.abs(excess) <= margin, axis=1, dtype=jnp.int32),
    )


def _largest(values: Array) -> Array:
    largest = jnp.max(jnp.abs(values), axis=1, keepdims=True)
    return jnp.where(largest > 0, largest, 1)


def _check_rhs(rhs: Callable[..., Any], recurrence: Recurrence) -> None:
    """Raises TypeError or ValueError unless it returns what is like the state."""
    state, x = recurrence.state0, jax.tree.map(lambda a: a[0], recurrence.instants.x)
    on = f"(params, state, x) on state {describe_shapes(state)} and x {describe_shapes(x)}"
    new = jax.eval_shape(lambda *given: call_user_function("rhs", on, rhs, *given), recurrence.params, state, x)
    expected: Any = jax.eval_shape(lambda h: h, state)
    structures: list[Any] = [jax.tree.structure(tree) for tree in (new, expected)]
    if structures[0] != structures[1] or any(
        a.shape != b.shape or (is_differentiable(b) and a.dtype != b.dtype)
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True)
    ):
        raise ValueError(
            f"rhs: must return dh/dt like the state, {describe_shapes(expected)}, got {describe_shapes(new)}"
        )


def _require_products(recurrence: Recurrence, method: Method) -> None:
    """Raises TypeError where the step lacks the products with vectors that the method needs."""
    one = jax.tree.map(lambda a: a[:1], recurrence.instants)
    along = linearize(recurrence.stretch(recurrence.state0, one, 1))
    require_pulls(along, f'fixed_points by "{method}"')
    if method == "krylov":
        require_pushes(along, f'fixed_points by "{method}"')


def _visited(vectors: Float[Array, "K D"], least: float) -> tuple[Array, Array, Array]:
    """Of the starts that are finite the median norm, the medians of all numbers, and the median distance from these,
    infinite where they are all one. The norm is 1 where all are zero, and else no less than `least`, whose roundings
    are the smallest numbers.

    Medians, so that a start that has gone astray does not change what is near and far for the others.
    """
    finite = jnp.all(jnp.isfinite(vectors), axis=1)

    def typical(rows: Array) -> Array:
        sizes = jnp.where(finite, jax.vmap(size)(rows), jnp.nan)
        middle = jnp.nanmedian(sizes)
        return jnp.where(middle > 0, middle, jnp.nanmax(sizes))

    known = jnp.where(finite[:, None], vectors, jnp.nan)
    scale = typical(known)
    scale = jnp.where((scale > 0) & jnp.isfinite(scale), jnp.maximum(scale, least), 1)
    centre = jnp.nanmedian(known, axis=0)
    radius = typical(known - centre[None])
    return scale, centre, jnp.where(radius > _ROUNDINGS * jnp.finfo(scale.dtype).eps * scale, radius, jnp.inf)


def _representatives(
    vectors: Float[Array, "K D"], speeds: Float[Array, " K"], finite: Bool[Array, " K"], radius: Array
) -> Int[Array, " K"]:
    """The slowest that is left stands for all within the radius that have none yet, and so on; -1 if not finite."""
    none = jnp.where(finite, -2, -1).astype(jnp.int32)

    def body(found: Array) -> Array:
        leader = jnp.argmin(jnp.where(found == -2, speeds, jnp.inf)).astype(jnp.int32)
        near = jax.vmap(lambda v: size(v - vectors[leader]))(vectors) <= radius
        return jnp.where((found == -2) & near, leader, found).at[leader].set(leader)

    return devices.while_loop(lambda found: jnp.any(found == -2), body, none)


def _of_representatives(
    seen: Callable[[Array, Array], Any], vectors: Float[Array, "K D"], representatives: Int[Array, " K"]
) -> Any:
    """What is seen from the point that stands for each; NaN where there is none.

    Those that stand for others come first, some at a time, and where there are no more of them nothing is done.
    """
    count, dim = vectors.shape
    numbers = jnp.arange(count, dtype=jnp.int32)
    leads = representatives == numbers
    together = min(count, _TOGETHER, max(1, _JACOBIAN_NUMBERS // dim**2))
    parts = -(-count // together)
    order = jnp.argsort(~leads, stable=True).astype(jnp.int32)
    order = jnp.concatenate([order, jnp.repeat(order[-1:], parts * together - count)]).reshape(parts, together)

    def part(index: Array) -> Any:
        # Of what is not finite nothing is computed: the derivatives of the others would be NaN too.
        index = jnp.where(leads[index], index, jnp.argmax(leads).astype(jnp.int32))
        given = vectors[index], index
        shapes = jax.eval_shape(seen, *given)

        def nothing(*given: Array) -> Any:
            return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

        return devices.cond(leads[index[0]], seen, nothing, *given)

    found = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), jax.lax.map(part, order))
    place = (jnp.cumsum(leads, dtype=jnp.int32) - 1)[representatives]

    def gathered(a: Array) -> Array:
        known = along_leading(representatives >= 0, a)
        return jnp.where(known, a[place], jnp.nan)

    return jax.tree.map(gathered, found)


def _seen_from(
    of: Map,
    vectors: Array,
    numbers: Array,
    *,
    rhs: Callable[..., Any] | None,
    mode: Mode,
    num: int | None,
    newton: bool,
) -> tuple[Array, Array | None, Array | None, Array | None, Array | None]:
    """Eigenvalues at points, their errors, Jacobians, eigenvalues of the right-hand side, and, if wanted, the length of
    Newton's step, which may be NaN."""
    recurrence = of.recurrence
    states, xs = jax.vmap(of.state)(vectors, numbers), jax.vmap(of.input)(numbers)
    if num is not None:
        leading = eigenvalues_at(recurrence.step, recurrence.params, states, xs, num, mode)
        return leading.values, leading.errors, None, None, None
    matrices = jacobians_at(recurrence.step, recurrence.params, states, xs, mode)
    ahead = (
        jax.vmap(partial(_newton_length, of))(*jax.lax.stop_gradient((vectors, matrices)), numbers)
        if newton
        else None
    )
    if rhs is None:
        return eigenvalues(matrices), None, matrices, None, ahead
    rhs_mode = differentiation_mode(replace(recurrence, step=rhs))
    of_flow = eigenvalues(jacobians_at(rhs, recurrence.params, states, xs, rhs_mode))
    order = jnp.argsort(-of_flow.real, axis=-1, stable=True)  # so that conjugate pairs stay together
    return eigenvalues(matrices), None, matrices, jnp.take_along_axis(of_flow, order, axis=-1), ahead


def _newton_length(of: Map, vector: Array, jacobian: Array, k: Array) -> Array:
    residual = jax.lax.stop_gradient(of.residual(vector, k))
    a = wide(jacobian) - jnp.eye(len(residual), dtype=residual.dtype)
    (step,) = solve(jnp.concatenate([a, -residual[:, None]], axis=1))
    return size(step)
