"""Where a step rests, and what is seen from there: kinds, time constants, periods, tangents."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Complex, Float, Int

from bptt_jax import devices
from bptt_jax.checks import check_choice, check_positive
from bptt_jax.results import Result, counted, field
from bptt_jax.step import Array, State

_KINDS = ("stable", "marginal", "saddle", "unstable", "unknown", "not a fixed point")


class FixedPoints(Result):
    """What `fixed_points` found, one entry for each of K starts; `distinct` selects.

    Attributes:
      points: where the starts came to, like them: leaves ``[K, ...]``. What is no floating number is the start's.
      speeds: ``|step(h) - h|`` there, the Euclidean norm of D numbers.
      converged: whether the speed is within the tolerance.
      stationary: not converged, but a minimum of the speed, about, whose gradient is below 0.01: a slow point. Of
        "gradient", which may get stuck where the speed falls but slowly, on the way to a fixed point along a slow
        direction, only where Newton's step leads farther than the point's norm and that of the starts; on the
        matrix-free route, which has no such step, either of the two.
      finite: False where the start, its input or the step at the start is not: the point is the start itself then,
        and all else NaN.
      iterations: how many were made.
      representatives: the number of the slowest point within `distance`; its own, of a point that stands for itself
        and those near it; -1 where nothing is finite.
      arrivals: how many starts came to the point: those with the same representative. Of starts that were drawn at
        random, their share tells how much of what was visited leads there.
      outlier: whether the point is far from all starts; nowhere, where these are all one.
      jacobians: ``[K, D, D]``, of the step at the representative of each point, as are the eigenvalues and the counts;
        None of the matrix-free route.
      eigenvalues: ``[K, num]``, by descending modulus, num = D but for the matrix-free route.
      eigenvalue_errors: ``[K, num]`` of the matrix-free route, as of `leading_eigenvalues`; else None.
      rhs_eigenvalues: ``[K, D]`` of the Jacobian of `rhs`, by descending real part; None without it.
      unstable: how many eigenvalues have a modulus above 1 (with `rhs`: a real part above 0), beyond the margin. Of
        the matrix-free route it counts among num.
      neutral: how many have one of 1 (0), within the margin.
    """

    points: State = field(dims=("start", ...))
    speeds: Float[Array, " K"] = field(dims=("start",))
    converged: Bool[Array, " K"] = field(dims=("start",))
    stationary: Bool[Array, " K"] = field(dims=("start",))
    finite: Bool[Array, " K"] = field(dims=("start",))
    iterations: Int[Array, " K"] = field(dims=("start",))
    representatives: Int[Array, " K"] = field(dims=("start",))
    arrivals: Int[Array, " K"] = field(dims=("start",))
    outlier: Bool[Array, " K"] = field(dims=("start",))
    jacobians: Float[Array, "K D D"] | None = field(dims=("start", "unit", "unit_before"))
    eigenvalues: Complex[Array, "K num"] = field(dims=("start", "mode"))
    eigenvalue_errors: Float[Array, "K num"] | None = field(dims=("start", "mode"))
    rhs_eigenvalues: Complex[Array, "K D"] | None = field(dims=("start", "mode"))
    unstable: Int[Array, " K"] = field(dims=("start",))
    neutral: Int[Array, " K"] = field(dims=("start",))

    @property
    def kinds(self) -> np.ndarray:
        """Of each point, in words, shape ``[K]``: "stable"; "marginal" (nothing grows, and something neither grows
        nor shrinks: on a line, a ring or a plane of fixed points, or the centre of rotations that last); "saddle"
        (something grows, and something shrinks); "unstable" (something grows, and nothing shrinks); "unknown" where the
        step has no finite derivative; "not a fixed point" where it has not converged."""
        stable = self.eigenvalues.shape[-1] - np.asarray(self.unstable) - np.asarray(self.neutral)
        some = np.asarray(self.unstable) > 0
        number = np.where(some, np.where(stable > 0, 2, 3), np.where(np.asarray(self.neutral) > 0, 1, 0))
        number = np.where(np.isnan(np.asarray(self.eigenvalues)).any(axis=-1), 4, number)
        return np.asarray(_KINDS)[np.where(self.converged, number, 5)]

    def time_constants(self, dt: float | Float[Array, ""] = 1.0) -> Float[Array, "K num"]:
        """``-dt / log |lambda|``: how long a perturbation along each mode takes to fall by e; negative where it grows,
        infinite where it stays.

        Args:
          dt: how long one step is; by default the unit is the step.

        Raises:
          TypeError, ValueError: `dt` is not one number above 0.
        """
        rates = -jnp.log(jnp.abs(self.eigenvalues))
        stays = rates == 0  # a zero of either sign
        return jnp.where(stays, jnp.inf, check_positive("dt", dt) / jnp.where(stays, 1, rates))

    def periods(self, dt: float | Float[Array, ""] = 1.0) -> Float[Array, "K num"]:
        """``2 pi dt / |arg lambda|``: how long a turn takes; infinite of a mode that does not turn, 2 steps of one that
        changes its sign. `dt` as for `time_constants`."""
        return 2 * jnp.pi * check_positive("dt", dt) / jnp.abs(jnp.angle(self.eigenvalues))

    def flow_eigenvalues(
        self, dt: float | Float[Array, ""] | None = None, *, method: str = "exact"
    ) -> Complex[Array, "K num"]:
        """Of the flow in continuous time, per unit of time, that the step follows for `dt`.

        Args:
          dt: how long one step is; not needed where `rhs` was given, whose eigenvalues these then are.
          method: "exact": ``log(lambda) / dt``, of a step that is the flow itself, and of a good solver nearly so;
            rotations by more than half a turn a step cannot be told from slower ones. "euler":
            ``(lambda - 1) / dt``, exactly right where the step is ``h + dt f(h)``.

        Raises:
          TypeError, ValueError: `dt` is not one number above 0, or `method` is neither.
        """
        check_choice("method", method, "exact", "euler")
        if self.rhs_eigenvalues is not None:
            return self.rhs_eigenvalues
        if dt is None:
            raise ValueError("dt: expected how long one step is, since no rhs was given, got None")
        dt = check_positive("dt", dt)
        return (self.eigenvalues - 1) / dt if method == "euler" else jnp.log(self.eigenvalues) / dt

    def tangents(self, k: int, *, margin: float = 1e-3) -> Float[np.ndarray, "m D"]:
        """Directions in which nothing grows or shrinks about point k: along a line or a ring of fixed points, in the
        plane of a rotation that lasts. Outside of `jax.jit`.

        Args:
          k: the number of the point.
          margin: how far from 1 the modulus of an eigenvalue may be.

        Returns:
          Orthonormal rows, by the real Schur form: of the invariant subspace of those eigenvalues.

        Raises:
          ValueError: there are no Jacobians, of the matrix-free route.
        """
        from scipy.linalg import schur

        if self.jacobians is None:
            raise ValueError("jacobians: expected those of the points, got None, of the matrix-free route (num=)")
        margin = check_positive("margin", margin)

        def is_neutral(real: float, imaginary: float) -> bool:
            return bool(abs(np.hypot(real, imaginary) - 1) <= margin)

        _, vectors, count = schur(np.asarray(self.jacobians[k], np.float64), sort=is_neutral)
        return vectors[:, :count].T

    def distinct(self, *, converged: bool = True, outliers: bool = False) -> "FixedPoints":
        """The points that stand for themselves, by ascending number of unstable directions. Outside of `jax.jit`.

        Args:
          converged: of those that converged alone; else slow points too.
          outliers: also those far from all starts.

        Raises:
          ValueError: it is a batch, of `jax.vmap`; take one of it by `jax.tree.map`.

        Example:
          >>> step = lambda w, h, x: jnp.tanh(w * h)
          >>> found = bptt.fixed_points(step, 2.0, jnp.linspace(-1, 1, 7)[:, None])
          >>> found.distinct().points.ravel()
          Array([-0.958,  0.958,  0.   ], dtype=float32)
        """
        if np.ndim(self.speeds) != 1:
            raise ValueError(f"distinct: expected one search, got a batch of {np.shape(self.speeds)[:-1]}")
        kept = np.asarray(self.representatives) == np.arange(len(self.speeds))
        kept &= np.asarray(self.converged) if converged else np.asarray(self.finite)
        kept &= outliers | ~np.asarray(self.outlier)
        index = np.flatnonzero(kept)
        index = index[np.argsort(np.asarray(self.unstable)[index], kind="stable")]
        chosen: FixedPoints = _taken(self, index)
        return replace(chosen, representatives=jnp.arange(len(index), dtype=jnp.int32))

    def _headline(self) -> str:
        kinds = self.distinct().kinds.tolist()
        of_each = ", ".join(f"{kinds.count(kind)} {kind}" for kind in _KINDS if kind in kinds)
        starts, good = len(self.speeds), int(np.sum(self.converged))
        said = f"{len(kinds)} distinct" + (f" ({of_each})" if kinds else "")
        lost = int(np.sum(~np.asarray(self.finite)))
        far = int(np.sum(np.asarray(self.outlier) & np.asarray(self.converged)))
        return (
            f"{said} of {counted(starts, 'start')}, {good} converged"
            + (f", {lost} not finite" if lost else "")
            + (f", {far} far from all starts" if far else "")
        )


@devices.compiled
def _taken(found: FixedPoints, index: Array) -> FixedPoints:
    """The entries of these numbers, by one program instead of one for each leaf."""
    chosen: FixedPoints = jax.tree.map(lambda a: a[index], found)
    return chosen
