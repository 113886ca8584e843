"""How the dynamics of a recurrence look: where it rests, its modes, the flow between, and the angles of its vectors."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.patches import Circle

from bptt_jax.analysis.calibration import Calibration, draw_calibration
from bptt_jax.analysis.covariant import CovariantVectors
from bptt_jax.analysis.fixed_point_results import FixedPoints
from bptt_jax.analysis.lyapunov import as_one, draw_exponents
from bptt_jax.checks import check_positive
from bptt_jax.linalg.eigensystem import Eigensystem
from bptt_jax.plots.style import LINES, Axes, Figure, NotebookFigure, figure_of, finish, new_axes, text_size
from bptt_jax.step import Input, Params, State, Step, ravel_state, state_size

# Of each kind of point its colour, its mark and whether that is filled: told apart in grey too.
_KINDS = {
    "stable": (LINES[2][0], "o", True),
    "marginal": (LINES[3][0], "D", True),
    "saddle": (LINES[1][0], "^", False),
    "unstable": (LINES[0][0], "s", False),
    "unknown": ("0.35", "P", True),
}
_TIMES = (1, 3, 10, 30, 100)  # time constants for which there is a ring, in steps
_SHADES = LinearSegmentedColormap.from_list("speeds", ["0.1", "0.8"])
_GRID = 23  # arrows each way
_TRAJECTORIES = 30  # drawn, of those given
_ROWS = 10_000  # states from which components are computed


class _Plane(NamedTuple):
    """Two directions ``axes [2, D]`` through `centre`, and what part of the variance each has (NaN: units)."""

    centre: np.ndarray
    axes: np.ndarray
    shares: np.ndarray

    def of(self, vectors: np.ndarray) -> np.ndarray:
        """``[..., D]`` to ``[..., 2]``."""
        return (vectors - self.centre) @ self.axes.T

    def label(self, ax: Axes) -> None:
        """Names of both axes."""
        names = ["first number of the state", "second number of the state"]
        if not np.isnan(self.shares).any():
            names = [f"principal component {k} ({share:.0%})" for k, share in enumerate(self.shares, 1)]
        ax.set(xlabel=names[0], ylabel=names[1])
        finish(ax)


def plot_fixed_points(
    found: FixedPoints, states: State | None = None, *, ax: Axes | None = None, title: str | None = None
) -> Figure:
    """Draws the distinct fixed points, a mark for each kind, and the trajectories from which they are seen.

    In the plane of the first two principal components of `states`, or of the points; a state of two numbers as it is.

    Args:
      found: from `bptt_jax.fixed_points`, of one search.
      states: trajectories, leaves ``[T, ...]`` or ``[B, T, ...]``, as of `bptt_jax.unroll`; some thirty are drawn.
      ax: to draw on; by default the axes of a new figure.
      title: above the axes.

    Returns:
      The figure of the axes.

    Raises:
      TypeError, ValueError: `found` is none, or a batch; `states` are none of its states, or the state is one number.

    Example:
      >>> step = lambda w, h, x: jnp.tanh(w @ h)
      >>> found = bptt.fixed_points(step, 2 * jnp.eye(2), jax.random.normal(jax.random.key(0), (20, 2)))
      >>> bptt.plots.plot_fixed_points(found).axes[0].get_xlabel()
      'first number of the state'
    """
    distinct = _distinct(found)
    points, paths, plane = _seen(found, distinct, states)
    ax = new_axes(ax, (5.0, 4.4))
    for path in () if paths is None else paths.reshape(-1, *paths.shape[-2:])[:_TRAJECTORIES]:
        ax.plot(*plane.of(path).T, color=LINES[5][0], linewidth=0.7, zorder=1)
    kinds, places = np.asarray(distinct.kinds), plane.of(points)
    for kind in _KINDS:
        of_kind = places[kinds == kind]
        if len(of_kind):
            label = f"{kind} ({len(of_kind)})"
            ax.scatter(of_kind[:, 0], of_kind[:, 1], s=34, linewidths=1.4, label=label, zorder=3, **_mark(kind))
    plane.label(ax)
    if len(places):
        ax.legend(frameon=False, fontsize=text_size(ax))
    return _titled(ax, title)


def plot_flow_field(
    step: Step,
    params: Params,
    found: FixedPoints,
    x: Input = None,
    *,
    states: State | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """Draws where one step leads from each point of a plane: arrows ``step(h) - h``, darker where it is slow.

    The plane is that of `plot_fixed_points`, which may be drawn into the same axes, through the mean of the states:
    what leaves the plane is not seen. A state of two numbers is seen whole.

    Args:
      step, params: as for `bptt_jax.fixed_points`.
      found: from there: the plane goes as far as its distinct points and `states` do.
      x: the constant input.
      states: as for `plot_fixed_points`.
      ax: to draw on; by default the axes of a new figure.
      title: above the axes.

    Returns:
      The figure of the axes.

    Raises:
      TypeError, ValueError: as `plot_fixed_points`.

    Example:
      >>> step = lambda w, h, x: jnp.tanh(w @ h)
      >>> found = bptt.fixed_points(step, 2 * jnp.eye(2), jax.random.normal(jax.random.key(0), (20, 2)))
      >>> figure = bptt.plots.plot_flow_field(step, 2 * jnp.eye(2), found)
      >>> bptt.plots.plot_fixed_points(found, ax=figure.axes[0]) is figure
      True
    """
    points, paths, plane = _seen(found, _distinct(found), states)
    seen = np.concatenate([plane.of(v).reshape(-1, 2) for v in (points, paths) if v is not None])
    seen = seen[np.isfinite(seen).all(axis=1)]
    low, high = (seen.min(axis=0), seen.max(axis=0)) if len(seen) else (np.zeros(2), np.zeros(2))
    wide = np.maximum(high - low, 1e-3 + 0.2 * np.max(high - low))
    middle = (low + high) / 2
    first, second = (np.linspace(m - 0.6 * w, m + 0.6 * w, _GRID) for m, w in zip(middle, wide, strict=True))
    grid = np.stack(np.meshgrid(first, second), axis=-1)
    one, unravel = ravel_state(jax.tree.map(lambda a: jnp.asarray(a)[0], found.points))
    vectors = jnp.asarray(plane.centre + grid.reshape(-1, 2) @ plane.axes, one.dtype)
    after = jax.jit(jax.vmap(lambda v: ravel_state(step(params, unravel(v), x))[0]))(vectors)
    moved = np.asarray(after - vectors, np.float64)
    speeds, arrows = np.linalg.norm(moved, axis=1), moved @ plane.axes.T
    lengths = np.maximum(np.linalg.norm(arrows, axis=1, keepdims=True), 1e-300)
    drawn = np.isfinite(arrows).all(axis=1) & (speeds > 0)
    ax = new_axes(ax, (5.0, 4.4))
    if drawn.any():
        arrows = arrows / lengths * math.hypot(first[1] - first[0], second[1] - second[0]) * 0.7
        shades = LogNorm(max(speeds[drawn].min(), 1e-3 * speeds[drawn].max()), speeds[drawn].max() * (1 + 1e-9))
        given: Any = (*grid.reshape(-1, 2)[drawn].T, *arrows[drawn].T, np.clip(speeds[drawn], shades.vmin, None))
        how: Any = {"angles": "xy", "scale_units": "xy", "scale": 1.0, "width": 0.004}
        ax.quiver(*given, cmap=_SHADES, norm=shades, zorder=0, **how)
    plane.label(ax)
    ax.grid(False)
    return _titled(ax, title)


def plot_modes(
    found: FixedPoints | Eigensystem,
    *,
    dt: float = 1.0,
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """Draws eigenvalues in the complex plane, with the unit circle and a ring for each of some time constants.

    On the ring of a time constant tau a mode falls by e within tau: its radius is ``exp(-dt / tau)``.

    Args:
      found: of one search, of whose distinct points each kind has a mark of its own; or an `Eigensystem`, of any
        number of matrices.
      dt: how long one step is; by default the unit is the step.
      ax: to draw on; by default the axes of a new figure.
      title: above the axes.

    Returns:
      The figure of the axes.

    Raises:
      TypeError, ValueError: `found` is neither, or a batch of searches; `dt` is not above 0.

    Example:
      >>> figure = bptt.plots.plot_modes(bptt.eigensystem(jnp.diag(jnp.array([0.9, 0.5]))))
      >>> [text.get_text() for text in figure.axes[0].texts]
      ['1', '3', '10', '30', '100']
    """
    if isinstance(found, Eigensystem):
        groups = {"": np.ravel(np.asarray(found.values))}
    elif isinstance(found, FixedPoints):
        distinct = _distinct(found)
        kinds, values = np.asarray(distinct.kinds), np.asarray(distinct.eigenvalues)
        groups = {kind: values[kinds == kind].ravel() for kind in _KINDS if (kinds == kind).any()}
    else:
        raise TypeError(f"found: expected FixedPoints or an Eigensystem, got {type(found).__name__}")
    dt = float(check_positive("dt", dt))
    ax = new_axes(ax, (4.2, 4.0))
    reach = 1.15
    for kind, all_values in reversed(groups.items()):
        values = all_values[np.isfinite(all_values)]
        mark = _mark(kind or "stable")
        ax.scatter(values.real, values.imag, s=12, linewidths=0.8, alpha=0.8, label=kind, zorder=3, **mark)
        reach = max(reach, 1.05 * float(np.max(np.abs(values), initial=0.0)))
    ax.add_patch(Circle((0, 0), 1.0, fill=False, color="0.35", linewidth=1.0))
    size = text_size(ax)
    for tau in _TIMES:
        radius = math.exp(-1 / tau)
        ax.add_patch(Circle((0, 0), radius, fill=False, color="0.6", linewidth=0.6, linestyle=":"))
        # Side by side they would cover each other near the circle: one after the other on the way round.
        angle = math.radians(200 + 22 * _TIMES.index(tau))
        words = f"{tau * dt:.3g}"
        place = (radius * math.cos(angle), radius * math.sin(angle))
        ax.text(*place, words, fontsize=size - 2, color="0.4", ha="center", va="center")
    ax.set_xlim(-reach, reach)
    ax.set_ylim(-reach, reach)
    ax.set_aspect("equal")
    ax.set_xlabel(r"Re $\lambda$; rings: time constants" + (", steps" if dt == 1 else ""))
    ax.set_ylabel(r"Im $\lambda$")
    finish(ax)
    ax.grid(False)
    if any(groups):
        ax.legend(frameon=False, fontsize=size, loc="upper right")
    return _titled(ax, title)


def plot_angles(found: CovariantVectors, *, ax: Axes | None = None, title: str | None = None) -> Figure:
    """Draws how often each angle between the unstable directions and the others occurs along the trajectory.

    Where angles come near zero the dynamics is not hyperbolic: directions that grow and directions that shrink can
    hardly be told apart there.

    Args:
      found: from `bptt_jax.covariant_vectors`, of one sequence or a batch, whose angles are counted together.
      ax: to draw on; by default the axes of a new figure.
      title: above the axes.

    Returns:
      The figure of the axes.

    Raises:
      TypeError: `found` is none.
      ValueError: there are no angles: all directions or none are unstable, or all steps belong to warm-ups.

    Example:
      >>> step = lambda m, h, x: (m @ h) % 1.0
      >>> found = bptt.covariant_vectors(step, jnp.array([[2.0, 1.0], [1.0, 1.0]]), jnp.array([0.1, 0.2]), length=60)
      >>> bptt.plots.plot_angles(found).axes[0].get_ylabel()
      'density, per degree'
    """
    if not isinstance(found, CovariantVectors):
        raise TypeError(f"found: expected CovariantVectors, got {type(found).__name__}")
    angles = np.degrees(np.ravel(np.asarray(found.angles, np.float64)))
    angles = angles[np.isfinite(angles)]
    if not len(angles):
        raise ValueError("found: expected some angles, got none: no direction, or every one, is unstable")
    ax = new_axes(ax, (4.2, 3.0))
    ax.hist(angles, bins=np.linspace(0, 90, 46).tolist(), color=LINES[2][0], density=True)
    ax.axvline(float(angles.min()), color=LINES[1][0], linestyle="--", linewidth=1.2)
    ax.text(
        0.98,
        0.95,
        f"smallest: {angles.min():.3g}°",
        transform=ax.transAxes,
        ha="right",
        va="top",
        fontsize=text_size(ax),
    )
    ax.set_xlim(0, 90)
    ax.set_xlabel("angle between unstable and other directions, degrees")
    ax.set_ylabel("density, per degree")
    finish(ax)
    return _titled(ax, title)


def plot_calibration(found: Calibration, *, ax: Axes | None = None, title: str | None = None) -> Figure:
    """Draws the critical value and the rates measured on the way to it, with bars of two standard errors.

    Args:
      found: from `bptt_jax.calibrate`, no batch.
      ax: to draw on; by default the axes of a new figure.
      title: above the axes.

    Returns:
      The figure of the axes.

    Raises:
      TypeError, ValueError: `found` is none, or a batch.

    Example:
      >>> make = lambda gain: (lambda w, h, x: gain * h, None)
      >>> found = bptt.calibrate(make, jnp.ones(1), length=30, low=0.5, high=2.0)
      >>> bptt.plots.plot_calibration(found).axes[0].get_ylabel()
      'nats per step'
    """
    if not isinstance(found, Calibration):
        raise TypeError(f"found: expected a Calibration, got {type(found).__name__}")
    if np.ndim(found.value):
        raise ValueError(f"found: expected one, got a batch of {np.shape(found.value)}")
    ax = new_axes(ax, (4.2, 3.0))
    draw_calibration(ax, found)
    finish(ax)
    return _titled(ax, title)


class Drawn(NamedTuple):
    """What `plot_dynamics` draws of one recurrence: arguments of the functions above."""

    step: Step
    params: Params
    x: Input
    states: State
    found: FixedPoints
    vectors: CovariantVectors


def plot_dynamics(of_each: Mapping[str, Drawn], *, dt: float = 1.0) -> Figure:
    """The figure of ``bptt-jax dynamics``: a row for each recurrence, of points, modes, exponents and angles."""
    rows = len(of_each)
    figure = NotebookFigure(figsize=(15.0, 4.0 * rows), layout="constrained")
    grid = figure.subplots(rows, 4, squeeze=False)
    for (name, (step, params, x, states, found, vectors)), axes in zip(of_each.items(), grid, strict=True):
        if state_size(found.points) == len(found.speeds) or not len(found.distinct().speeds):  # one number, or none
            axes[0].set_axis_off()
        else:
            plot_flow_field(step, params, found, x, states=states, ax=axes[0])
            plot_fixed_points(found, states, ax=axes[0])
        plot_modes(found, dt=dt, ax=axes[1])
        draw_exponents(axes[2], as_one(vectors.spectrum))
        if np.isfinite(np.asarray(vectors.angles)).any():
            plot_angles(vectors, ax=axes[3])
        else:
            axes[3].set_axis_off()
        axes[0].set_title(name)
    return figure


def _distinct(found: Any) -> FixedPoints:
    if not isinstance(found, FixedPoints):
        raise TypeError(f"found: expected FixedPoints, got {type(found).__name__}")
    if np.ndim(found.speeds) != 1:
        raise ValueError(f"found: expected one search, got a batch of {np.shape(found.speeds)[:-1]}")
    return found.distinct()


def _seen(
    found: FixedPoints, distinct: FixedPoints, states: State | None
) -> tuple[np.ndarray, np.ndarray | None, _Plane]:
    """The points ``[K, D]``, the trajectories ``[..., T, D]`` and the plane that both are seen in."""
    points = _vectors(distinct.points, found.points)
    if points.shape[-1] < 2:
        raise ValueError("found: expected states of at least two numbers, got one")
    paths = None if states is None else _vectors(states, found.points)
    return points, paths, _plane(points if paths is None else paths)


def _vectors(states: State, like: State) -> np.ndarray:
    """``[..., D]``; `like` has one axis in front."""
    leaves, wanted = jax.tree.leaves(states), jax.tree.leaves(like)
    extra = {np.ndim(a) - np.ndim(b) + 1 for a, b in zip(leaves, wanted, strict=False)}
    structures: list[Any] = [jax.tree.structure(tree) for tree in (states, like)]
    if structures[0] != structures[1] or len(extra) != 1 or not 1 <= min(extra) <= 2:
        raise ValueError("states: expected trajectories of the states of `found`, leaves [T, ...] or [B, T, ...]")
    (axes,) = extra
    front = np.shape(leaves[0])[:axes]
    flat = jax.tree.map(lambda a: jnp.asarray(a).reshape(-1, *np.shape(a)[axes:]), states)
    if not front or 0 in front:
        return np.zeros((*front, state_size(jax.tree.map(lambda a: jnp.asarray(a)[0], like))))
    vectors = jax.vmap(lambda state: ravel_state(state)[0])(flat)
    return np.asarray(vectors, np.float64).reshape(*front, -1)


def _plane(vectors: np.ndarray) -> _Plane:
    size = vectors.shape[-1]
    if size == 2:
        return _Plane(np.zeros(2), np.eye(2), np.full(2, np.nan))
    rows = vectors.reshape(-1, size)
    rows = rows[np.isfinite(rows).all(axis=1)]
    rows = rows[:: max(1, -(-len(rows) // _ROWS))]
    centre = rows.mean(axis=0) if len(rows) else np.zeros(size)
    _, lengths, axes = np.linalg.svd(np.concatenate([rows - centre, np.zeros((2, size))]), full_matrices=False)
    axes = axes[:2] * np.sign(axes[np.arange(2), np.argmax(np.abs(axes[:2]), axis=1)])[:, None]
    variance = lengths**2
    return _Plane(centre, axes, variance[:2] / max(variance.sum(), 1e-300))


def _mark(kind: str) -> dict[str, Any]:
    """Of a kind of point, as arguments of `scatter`."""
    color, marker, filled = _KINDS[kind]
    return {"marker": marker, **({"c": color} if filled else {"facecolors": "none", "edgecolors": color})}


def _titled(ax: Axes, title: str | None) -> Figure:
    if title is not None:
        ax.set_title(title)
    return figure_of(ax)
