"""Figures of dynamics, read back from their artists."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax.plots.dynamics import (
    Drawn,
    plot_angles,
    plot_dynamics,
    plot_fixed_points,
    plot_flow_field,
    plot_modes,
)

# Of diag(w) the first two numbers are bistable, each for itself, and the third decays: 9 points, of which 4 are stable
# and 1 is unstable in two directions.
W = jnp.diag(jnp.asarray([1.5, 1.5, 0.3]))


def step(w, h, x):
    return {"h": jnp.tanh(w @ h["h"])}


@pytest.fixture(scope="module")
def found():
    corners = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], [0.1]), axis=-1).reshape(-1, 3).astype(np.float32)
    return bptt.fixed_points(step, W, {"h": corners}, distance=1e-2)


@pytest.fixture(scope="module")
def states():
    starts = jax.random.normal(jax.random.key(0), (5, 3)) * jnp.asarray([[1.0, 0.7, 0.01]])
    return jax.vmap(lambda h: bptt.unroll(step, W, {"h": h}, length=12))(starts)


def test_points_and_trajectories_in_principal_components(found, states) -> None:
    figure = plot_fixed_points(found, states, title="nine")
    (ax,) = figure.axes
    assert ax.get_title() == "nine"
    legend = ax.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["stable (4)", "saddle (5)"]
    visited = np.asarray(states["h"], np.float64)
    centred = visited.reshape(-1, 3) - visited.mean(axis=(0, 1))
    values, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors[:, ::-1][:, :2].T
    axes *= np.sign(axes[[0, 1], np.argmax(np.abs(axes), axis=1)])[:, None]
    assert len(ax.lines) == 5
    for line, path in zip(ax.lines, visited, strict=True):
        np.testing.assert_allclose(line.get_xydata(), (path - visited.mean(axis=(0, 1))) @ axes.T, atol=1e-5)
    assert ax.get_xlabel() == f"principal component 1 ({values[2] / values.sum():.0%})"
    m = float(jnp.max(found.points["h"][:, 0]))
    assert math.isclose(m, math.tanh(1.5 * m), rel_tol=1e-5)
    stable = {(a, b) for a in (-1, 1) for b in (-1, 1)}
    of_stable, of_saddles = (np.asarray(c.get_offsets()) for c in ax.collections)
    places = (np.asarray([(a * m, b * m, 0) for a, b in sorted(stable)]) - visited.mean(axis=(0, 1))) @ axes.T
    for place in places:
        assert np.min(np.linalg.norm(of_stable - place, axis=1)) < 1e-4
    assert len(of_saddles) == 5


def test_arrows_show_where_a_step_leads() -> None:
    def rotate(w, h, x):
        return w @ h + x

    w, x = jnp.asarray([[0.9, -0.2], [0.2, 0.9]]), jnp.asarray([0.1, 0.2])
    found = bptt.fixed_points(rotate, w, jnp.asarray([[0.0, 0.0], [1.0, 1.0]]), x)
    (point,) = np.asarray(found.distinct().points, np.float64)
    np.testing.assert_allclose(point, np.linalg.solve(np.eye(2) - np.asarray(w), np.asarray(x)), rtol=1e-5)
    states = jnp.asarray([[-1.0, -1.0], [1.0, 2.0]])
    figure = plot_flow_field(rotate, w, found, x, states=states)
    (quiver,) = figure.axes[0].collections
    places, arrows = quiver.get_offsets(), np.stack([quiver.U, quiver.V], axis=-1)
    moved = (places - point) @ (np.asarray(w, np.float64) - np.eye(2)).T
    np.testing.assert_allclose(arrows[:, 0] * moved[:, 1], arrows[:, 1] * moved[:, 0], atol=1e-5)
    assert np.all(np.sum(arrows * moved, axis=1) > 0)
    lengths = np.linalg.norm(arrows, axis=1)
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-5)
    assert np.corrcoef(quiver.get_array(), np.linalg.norm(moved, axis=1))[0, 1] > 0.99
    assert np.all(places.min(axis=0) <= states.min(axis=0))
    assert plot_fixed_points(found, states, ax=figure.axes[0]) is figure


def test_modes_with_rings_of_time_constants(found) -> None:
    (ax,) = plot_modes(found).axes
    kinds = {c.get_label(): np.asarray(c.get_offsets())[:, 0] for c in ax.collections}
    assert set(kinds) == {"stable", "saddle"}
    assert len(kinds["stable"]) == 4 * 3
    assert np.all(kinds["stable"] < 1)
    assert np.max(kinds["saddle"]) == pytest.approx(1.5, rel=1e-5)
    radii = sorted(patch.radius for patch in ax.patches)
    np.testing.assert_allclose(radii, [*np.exp(-1 / np.asarray([1.0, 3, 10, 30, 100])), 1.0])
    assert ax.get_xlim()[1] > 1.5
    matrices = jnp.asarray([[[0.0, -0.5], [0.5, 0.0]], [[2.0, 0.0], [0.0, jnp.nan]]])
    (ax,) = plot_modes(bptt.eigensystem(matrices), dt=0.1).axes
    (points,) = ax.collections
    np.testing.assert_allclose(np.sort_complex(points.get_offsets() @ [1, 1j]), [-0.5j, 0.5j], atol=1e-6)
    assert [text.get_text() for text in ax.texts][:2] == ["0.1", "0.3"]


def test_angles_are_those_measured() -> None:
    def sheared(m, h, x):
        return m @ h

    # Eigenvectors [1, 0] and [1, 1]: 45 degrees.
    m = jnp.asarray([[2.0, -1.5], [0.0, 0.5]])
    found = bptt.covariant_vectors(sheared, m, jnp.ones(2) * 1e-9, length=40, warmup=12, cooldown=12)
    (ax,) = plot_angles(found, title="shear").axes
    filled = [bar for bar in ax.patches if bar.get_height() > 0]
    assert [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in filled] == [(44.0, 46.0)]
    assert ax.texts[0].get_text() == "smallest: 45°"
    steady = bptt.covariant_vectors(sheared, 0.4 * m, jnp.ones(2), length=40)
    with pytest.raises(ValueError, match="found: expected some angles, got none"):
        plot_angles(steady)


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda f: plot_fixed_points("points"), TypeError, "found: expected FixedPoints, got str"),
        (
            lambda f: plot_fixed_points(f, jnp.ones((4, 3))),
            ValueError,
            "states: expected trajectories of the states",
        ),
        (lambda f: plot_fixed_points(f, {"h": jnp.ones(3)}), ValueError, "states: expected trajectories"),
        (lambda f: plot_fixed_points(jax.tree.map(lambda a: a[None], f)), ValueError, "found: expected one search"),
        (lambda f: plot_modes(3), TypeError, "found: expected FixedPoints or an Eigensystem, got int"),
        (lambda f: plot_modes(f, dt=0.0), ValueError, "dt: expected a number above 0, got 0.0"),
        (lambda f: plot_angles(f), TypeError, "found: expected CovariantVectors, got FixedPoints"),
    ],
)
def test_what_cannot_be_drawn(draw, error, message, found) -> None:
    with pytest.raises(error, match=message):
        draw(found)


@pytest.mark.exhaustive
def test_nothing_found_is_drawn_too(found, tmp_path) -> None:
    """A step that drifts has no fixed point; a start may be NaN."""

    def drift(w, h, x):
        return h + w

    none = bptt.fixed_points(drift, jnp.ones(3), jnp.asarray([[0.0, 0.0, 0.0], [jnp.nan, 0.0, 0.0]]))
    for figure in (plot_fixed_points(none), plot_modes(none), plot_flow_field(drift, jnp.ones(3), none)):
        figure.savefig(tmp_path / "none.png")


def test_a_state_of_one_number_has_modes_and_no_plane() -> None:
    def one(w, h, x):
        return jnp.tanh(w * h)

    w = jnp.float32(1.5)
    found = bptt.fixed_points(one, w, jnp.asarray([[-1.0], [0.0], [1.0]]))
    assert len(plot_modes(found).axes[0].collections) == 2
    states = jax.vmap(lambda h: bptt.unroll(one, w, h, length=4))(jnp.ones((2, 1)))
    vectors = jax.vmap(lambda h: bptt.covariant_vectors(one, w, h, length=4))(jnp.ones((2, 1)))
    figure = plot_dynamics({"one": Drawn(one, w, None, states, found, vectors)})
    assert [ax.axison for ax in figure.axes] == [False, True, True, False]
    with pytest.raises(ValueError, match="found: expected states of at least two numbers, got one"):
        plot_fixed_points(found)
