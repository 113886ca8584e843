"""Fixed points: known answers, the same by every route, implicit derivatives against differences."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slices import covering

import bptt_jax as bptt
from bptt_jax.analysis import fixed_point_search, sample_starts

METHODS = ("newton", "krylov", "gradient")


def tanh_step(w, h, x):
    return jnp.tanh(w @ h if x is None else w @ h + x)


def linear_step(a, h, x):
    return a @ h if x is None else a @ h + x


def logistic(r, h, x):
    return r * h * (1 - h)


def escape(e, h, x):
    return h + e + h * h


def draw(*shape, scale=1.0, seed=0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def symmetric(n, largest):
    """Weights whose largest eigenvalue is that, and the only one above 1.2."""
    basis = np.linalg.qr(draw(n, n))[0]
    return jnp.asarray(basis @ np.diag([largest, *np.linspace(1.2, -0.9, n - 1)]) @ basis.T)


# --- Known answers


@pytest.mark.parametrize("r", [2.5, 3.2])
def test_logistic_map(r, x64):
    """Zero and 1 - 1/r, with the multipliers r and 2 - r."""
    found = bptt.fixed_points(logistic, r, jnp.linspace(0.1, 0.95, 8)).distinct()
    upper, lower = (int(np.argmin(np.abs(found.points - v))) for v in (1 - 1 / r, 0.0))
    np.testing.assert_allclose(found.points[np.asarray([upper, lower])], [1 - 1 / r, 0], atol=1e-14)
    np.testing.assert_allclose(found.eigenvalues[np.asarray([upper, lower]), 0], [2 - r, r], atol=1e-12)
    assert [found.kinds[upper], found.kinds[lower]] == ["stable" if r < 3 else "unstable", "unstable"]
    np.testing.assert_allclose(found.time_constants(0.5)[upper], -0.5 / np.log(abs(2 - r)), rtol=1e-12)
    np.testing.assert_allclose(found.periods(0.5)[upper], 1.0)  # two steps: it changes its sign


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("slow", [0.99, 0.999, 0.9995])
def test_a_saddle_with_a_slow_direction(method, slow):
    """In single precision, where a short step along it changes nothing of F(h) - h."""
    found = bptt.fixed_points(linear_step, jnp.diag(jnp.array([0.5, slow, 1.5])), draw(16, 3), method=method)
    assert np.all(found.converged)
    np.testing.assert_allclose(found.points, 0, atol=1e-4 / (1 - slow))
    assert set(found.distinct().kinds) == {"saddle"}


@pytest.mark.parametrize("slow", [0.999, 0.9999])
def test_where_descent_is_stuck_on_its_way_is_no_slow_point(slow):
    """In single precision it ends along the slow direction, where the speed falls by a thousandth of its change."""
    rng = np.random.default_rng(0)
    basis = jnp.asarray(np.linalg.qr(rng.standard_normal((3, 3)))[0], jnp.float32)
    starts = jnp.asarray(rng.standard_normal((16, 3)), jnp.float32)

    def turned(values, h, x):
        return basis @ (values * (basis.T @ h)) + x

    given = turned, jnp.asarray([0.5, slow, 1.5]), starts, (1 - slow) * jnp.asarray([0.1, 0.2, 0.3])
    descent, newton = (bptt.fixed_points(*given, method=method) for method in ("gradient", "newton"))
    assert np.all(newton.converged)
    assert np.sum(~descent.converged) > 8
    assert not np.any(descent.stationary)
    assert np.all(bptt.fixed_points(given[0], given[1], descent.points, given[3], method="newton").converged)


def test_henon_map(x64):
    """Two saddles, from the quadratic formula, in a state that is a dict."""
    a, b = 1.4, 0.3

    def henon(p, s, x):
        return {"x": 1 - a * s["x"] ** 2 + s["y"], "y": b * s["x"]}

    starts = {"x": jnp.linspace(-2.0, 2.0, 20), "y": jnp.linspace(0.3, -0.3, 20)}
    found = bptt.fixed_points(henon, None, starts).distinct()
    roots = np.roots([a, 1 - b, -1])
    order = np.argsort(found.points["x"])
    np.testing.assert_allclose(found.points["x"][order], np.sort(roots), rtol=1e-13)
    np.testing.assert_allclose(found.points["y"], b * found.points["x"], rtol=1e-13)
    for x, values in zip(np.asarray(found.points["x"]), np.asarray(found.eigenvalues), strict=True):
        expected = np.roots([1, 2 * a * x, -b])  # of [[-2 a x, 1], [b, 0]]
        np.testing.assert_allclose(np.sort(values.real), np.sort(expected), rtol=1e-12)
    assert list(found.kinds) == ["saddle"] * 2


SIGMA, RHO, BETA, DT = 10.0, 28.0, 8 / 3, 0.01


def lorenz(p, s, x):
    return jnp.stack([p[0] * (s[1] - s[0]), s[0] * (p[1] - s[2]) - s[1], s[0] * s[1] - p[2] * s[2]])


def runge_kutta(p, s, x):
    k1 = lorenz(p, s, x)
    k2 = lorenz(p, s + DT / 2 * k1, x)
    k3 = lorenz(p, s + DT / 2 * k2, x)
    k4 = lorenz(p, s + DT * k3, x)
    return s + DT / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def test_lorenz_by_runge_kutta(x64):
    """Three points, and the flow's eigenvalues by the roots of the characteristic polynomial."""
    params, starts = (
        jnp.asarray([SIGMA, RHO, BETA]),
        jnp.asarray(draw(30, 3, scale=10.0)) + jnp.asarray([[0, 0, 20.0]]),
    )
    found = bptt.fixed_points(runge_kutta, params, starts, rhs=lorenz).distinct()
    wing = np.sqrt(BETA * (RHO - 1))
    expected = np.asarray([[-wing, -wing, RHO - 1], [0, 0, 0], [wing, wing, RHO - 1]])
    order = np.argsort(found.points[:, 0])
    np.testing.assert_allclose(found.points[order], expected, atol=1e-10)
    polynomials = {
        0: [1, SIGMA + BETA + 1, BETA * (SIGMA + RHO), 2 * SIGMA * BETA * (RHO - 1)],
        1: np.polymul([1, SIGMA + 1, SIGMA * (1 - RHO)], [1, BETA]),
    }
    for k, at in enumerate(order):
        roots = np.roots(polynomials[k % 2])
        roots = roots[np.lexsort((-roots.imag, -roots.real))]
        np.testing.assert_allclose(found.flow_eigenvalues()[at], roots, atol=1e-8)
        # The solver's own multipliers, to its order.
        near = np.log(np.asarray(found.eigenvalues[at])) / DT
        np.testing.assert_allclose(np.sort_complex(near), np.sort_complex(roots), rtol=1e-3)
    assert list(found.unstable) == [1, 2, 2]
    without = dataclasses.replace(found, rhs_eigenvalues=None)
    np.testing.assert_allclose(without.flow_eigenvalues(DT), np.log(np.asarray(found.eigenvalues)) / DT, rtol=1e-12)
    with pytest.raises(ValueError, match="dt: expected"):
        without.flow_eigenvalues()


def test_euler_has_the_flow_exactly(x64):
    a = jnp.asarray(draw(4, 4))

    def euler(a, h, x):
        return h + 0.1 * (a @ h + x)

    found = bptt.fixed_points(euler, a, jnp.ones((1, 4)), jnp.ones(4), rhs=linear_step)
    expected = np.sort_complex(np.linalg.eigvals(a))
    np.testing.assert_allclose(np.sort_complex(found.rhs_eigenvalues[0]), expected, rtol=1e-10)
    euler_values = dataclasses.replace(found, rhs_eigenvalues=None).flow_eigenvalues(0.1, method="euler")
    np.testing.assert_allclose(np.sort_complex(euler_values[0]), expected, rtol=1e-10)
    np.testing.assert_allclose(found.points[0], -np.linalg.solve(a, np.ones(4)), rtol=1e-10)


@pytest.mark.parametrize("dtype", covering(["float32", "float64"], "float32"), indirect=True)
def test_below_a_gain_of_one_there_is_the_origin_alone(dtype):
    w = draw(8, 8)
    w = jnp.asarray(0.9 * w / np.linalg.norm(w, 2), dtype)
    found = bptt.fixed_points(tanh_step, w, jnp.asarray(draw(200, 8), dtype))
    np.testing.assert_allclose(found.points, 0, atol=1e-4 if dtype == jnp.float32 else 1e-12)
    only = found.distinct()
    assert list(only.kinds) == ["stable"]
    expected = np.linalg.eigvals(np.asarray(w, np.float64))
    np.testing.assert_allclose(np.abs(only.eigenvalues[0]), -np.sort(-np.abs(expected)), rtol=1e-4)


def test_above_it_the_origin_is_unstable_and_points_come_in_pairs(x64):
    w = symmetric(8, 1.5)
    found = bptt.fixed_points(tanh_step, w, jnp.asarray(draw(200, 8))).distinct()
    points, kinds = np.asarray(found.points), list(found.kinds)
    apart = np.linalg.norm(points[:, None] + points[None], axis=2)
    np.testing.assert_allclose(apart.min(axis=1), 0, atol=1e-10)  # the minus of each is among them
    origin = int(np.argmin(np.linalg.norm(points, axis=1)))
    assert kinds[origin] in ("saddle", "unstable")
    assert int(found.unstable[origin]) == np.sum(np.abs(np.linalg.eigvalsh(w)) > 1)
    assert "stable" in kinds
    draws_near = jax.jit(lambda w, h: bptt.final_state(tanh_step, w, h + 1e-3, length=500))
    for k, kind in enumerate(kinds):
        back = np.allclose(draws_near(w, found.points[k]), points[k], atol=1e-3)
        assert back == (kind == "stable")


def test_hopfield_patterns_are_stable(x64):
    """Orthogonal patterns: each, and its negative, at m = tanh(beta m)."""
    rows = np.ones((1, 1))
    for _ in range(3):
        rows = np.block([[rows, rows], [rows, -rows]])
    patterns, beta = rows[1:4], 2.0
    stored = np.resize(np.concatenate([patterns, -patterns]), (200, 8))
    w = jnp.asarray(beta * patterns.T @ patterns / 8)
    found = bptt.fixed_points(tanh_step, w, jnp.asarray(stored * 0.9 + draw(200, 8, scale=0.05)))
    m = 1.0
    for _ in range(200):
        m = np.tanh(beta * m)
    np.testing.assert_allclose(found.points, m * stored, atol=1e-10)
    assert set(found.kinds) == {"stable"}
    assert len(found.distinct().speeds) == 6
    np.testing.assert_allclose(found.eigenvalues[:, 0], beta * (1 - m**2), rtol=1e-8)


def test_more_starts_than_go_on_at_a_time(x64, monkeypatch):
    """Every start comes to what it comes to alone, whichever lane takes it."""
    w, starts = symmetric(8, 1.5), jnp.asarray(draw(200, 8))
    alone = bptt.fixed_points(tanh_step, w, starts)
    monkeypatch.setattr(fixed_point_search, "_JACOBIAN_NUMBERS", 7 * 64)
    few = bptt.fixed_points(lambda *given: tanh_step(*given), w, starts)
    np.testing.assert_allclose(few.points, alone.points, atol=1e-10)
    np.testing.assert_allclose(few.iterations, alone.iterations, atol=1)  # by the last bit


@pytest.mark.parametrize("method", covering(METHODS, "newton"))
def test_line_attractor(method, x64):
    """Each start goes to a point on the line, about the nearest; its direction is the tangent."""
    basis = np.linalg.qr(draw(5, 5))[0]
    a = jnp.asarray(basis @ np.diag([1.0, 0.8, 0.5, -0.4, 0.0]) @ basis.T)
    starts = draw(12, 5)
    found = bptt.fixed_points(linear_step, a, jnp.asarray(starts), method=method)
    assert np.all(found.converged)
    along = starts @ basis[:, 0]
    np.testing.assert_allclose(found.points, along[:, None] * basis[:, 0], atol=0.02)
    assert set(found.kinds) == {"marginal"}
    assert np.all(np.asarray(found.neutral) == 1)
    stays = dataclasses.replace(found, eigenvalues=jnp.asarray([[1.0, -1j, 0.5, 0.0]]))
    np.testing.assert_allclose(stays.time_constants(2.0), [[np.inf, np.inf, 2 / np.log(2), 0]])
    (tangent,) = found.tangents(3)
    assert abs(tangent @ basis[:, 0]) > 1 - 1e-8
    assert len(found.distinct().speeds) >= 10  # points of a line are many


def test_ring_attractor(x64):
    """A ring of fixed points in the plane, and a direction that decays."""

    def ring(p, h, x):
        radius = jnp.sqrt(jnp.sum(jnp.square(h[:2])))
        return jnp.concatenate([h[:2] * (1 + 0.5 * (1 - radius)), 0.3 * h[2:]])

    starts = draw(20, 3)
    starts[:, :2] /= np.hypot(starts[:, :1], starts[:, 1:2]) / np.linspace(0.7, 1.5, 20)[:, None]
    found = bptt.fixed_points(ring, None, jnp.asarray(starts))
    points = np.asarray(found.points)
    assert np.all(found.converged)
    np.testing.assert_allclose(np.hypot(points[:, 0], points[:, 1]), 1, atol=1e-6)
    assert set(found.kinds) == {"marginal"}
    for k in range(3):
        (tangent,) = found.tangents(k)
        np.testing.assert_allclose(tangent @ points[k], 0, atol=1e-6)
        np.testing.assert_allclose(tangent[2], 0, atol=1e-6)


def test_a_rotation_that_lasts_is_marginal_with_its_plane(x64):
    turn, basis = np.diag([0.0, 0.0, 0.2, -0.5, 0.7]), np.linalg.qr(draw(5, 5))[0]
    turn[:2, :2] = [[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]]
    found = bptt.fixed_points(linear_step, jnp.asarray(basis @ turn @ basis.T), jnp.asarray(draw(12, 5)))
    np.testing.assert_allclose(found.points, 0, atol=1e-12)
    assert set(found.kinds) == {"marginal"}
    plane = found.tangents(0)
    np.testing.assert_allclose(plane.T @ plane, basis[:, :2] @ basis[:, :2].T, atol=1e-10)
    np.testing.assert_allclose(found.periods()[0, :2], 2 * np.pi / 0.7, rtol=1e-12)


@pytest.mark.parametrize("method", covering(METHODS, "newton"))
def test_slow_points_that_are_no_fixed_points(method, x64):
    """h + e + h^2 has none, and its slowest point at zero, where it moves by e."""
    found = bptt.fixed_points(escape, 0.01, jnp.asarray([[-0.3], [0.1], [0.4]]), method=method)
    assert not np.any(found.converged)
    assert np.all(found.stationary)
    np.testing.assert_allclose(found.points, 0, atol=2e-3)
    np.testing.assert_allclose(found.speeds, 0.01, rtol=1e-3)
    assert set(found.kinds) == {"not a fixed point"}
    assert len(found.distinct().speeds) == 0
    assert 1 <= len(found.distinct(converged=False).speeds) <= 3


@pytest.mark.exhaustive
def test_every_method_finds_the_same(x64):
    w, starts = symmetric(6, 1.8), jnp.asarray(draw(60, 6))
    found = [bptt.fixed_points(tanh_step, w, starts, method=method).distinct() for method in METHODS]
    stable = [np.asarray(f.points)[np.asarray(f.unstable) == 0] for f in found]
    for points in stable:
        apart = np.linalg.norm(stable[0][:, None] - points[None], axis=2)
        np.testing.assert_allclose(apart.min(axis=1), 0, atol=1e-6)
        np.testing.assert_allclose(apart.min(axis=0), 0, atol=1e-6)


# --- States, inputs, what is not finite


def test_states_of_every_kind(x64):
    """A cell with two leaves, a complex one, and a counter and a key that pass through."""
    cell = bptt.lstm(3, dtype=jnp.float64)
    params = cell.init(jax.random.key(0), 2)
    starts = jax.tree.map(lambda a: jnp.asarray(draw(5, *a.shape)), cell.initial_state())
    found = bptt.fixed_points(cell.step, params, starts, jnp.ones(2))
    again = jax.jit(jax.vmap(lambda h: cell.step(params, h, jnp.ones(2))))(found.points)
    for a, b in zip(*map(jax.tree.leaves, (found.points, again)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    assert found.jacobians.shape == (5, 6, 6)

    def mixed(z, state, x):
        return {"z": z * state["z"] + x, "count": state["count"] + 1, "key": state["key"]}

    z = 0.9 * jnp.exp(0.4j)
    state = {
        "z": jnp.asarray([1.0 + 1j, 3.0]),
        "count": jnp.asarray([3, 5]),
        "key": jax.random.split(jax.random.key(0), 2),
    }
    found = bptt.fixed_points(mixed, z, state, jnp.asarray(1.0 + 0j))
    np.testing.assert_allclose(found.points["z"], 1 / (1 - np.asarray(z)) * np.ones(2), rtol=1e-12)
    np.testing.assert_array_equal(found.points["count"], [3, 5])
    np.testing.assert_allclose(np.sort_complex(found.eigenvalues[0]), np.sort_complex([z, z.conj()]), rtol=1e-12)
    assert found.points["key"].dtype == state["key"].dtype


def test_one_input_for_each_start(x64):
    w, xs = jnp.asarray(draw(4, 4, scale=0.3)), jnp.asarray(draw(5, 4))
    found = bptt.fixed_points(tanh_step, w, jnp.zeros((5, 4)), xs, x_per_start=True)
    h = np.zeros((5, 4))
    for _ in range(300):
        h = np.tanh(h @ np.asarray(w).T + np.asarray(xs))
    np.testing.assert_allclose(found.points, h, atol=1e-12)


@pytest.mark.parametrize("method", covering(METHODS, "newton"))
def test_a_start_that_is_not_finite_spoils_nothing(method, x64):
    w, starts = jnp.asarray(draw(4, 4, scale=0.4)), draw(5, 4)
    xs = draw(5, 4)
    bad, bad_xs = starts.copy(), xs.copy()
    bad[1, 2], bad[3, 0], bad_xs[4, 1] = np.nan, np.inf, np.nan
    run = jax.jit(partial(bptt.fixed_points, tanh_step, method=method, x_per_start=True))

    def total(w, starts, xs):
        found = run(w, starts, xs)
        return jnp.sum(jnp.where(found.converged[:, None], found.points, 0)[jnp.asarray([0, 2])]), found

    good, spoilt = (jax.value_and_grad(total, has_aux=True)(w, s, x) for s, x in ((starts, xs), (bad, bad_xs)))
    found = spoilt[0][1]
    np.testing.assert_array_equal(found.finite, [True, False, True, False, False])
    np.testing.assert_array_equal(found.converged, found.finite)
    np.testing.assert_array_equal(found.representatives < 0, ~np.asarray(found.finite))
    np.testing.assert_allclose(found.points[np.asarray([0, 2])], good[0][1].points[np.asarray([0, 2])], atol=1e-7)
    np.testing.assert_allclose(spoilt[1], good[1], atol=1e-6)
    assert np.all(np.isnan(found.eigenvalues[1]))
    assert "3 not finite" in repr(found)


def test_points_near_each_other_are_one_and_far_ones_are_marked(x64):
    """Six roots of h - sin h = ..., seen from starts near the middle: distances are relative to the starts."""

    def step(p, h, x):
        return h + jnp.sin(h)

    starts = jnp.asarray([[0.5], [-0.5], [0.51], [0.4], [2.0], [-2.0]])
    found = bptt.fixed_points(step, None, starts, outlier=1.5)
    points = np.asarray(found.points[:, 0])
    np.testing.assert_allclose(points, np.round(points / np.pi) * np.pi, atol=1e-10)
    for k, leader in enumerate(np.asarray(found.representatives)):
        assert abs(points[leader] - points[k]) < 1e-3
        assert found.representatives[leader] == leader
    assert len(set(np.asarray(found.representatives))) == len(set(np.round(points / np.pi)))
    middle = np.median(starts)
    radius = np.median(np.abs(np.asarray(starts) - middle))
    np.testing.assert_array_equal(found.outlier, np.abs(points - middle) > 1.5 * radius)
    assert np.any(found.outlier)
    assert len(found.distinct(outliers=True).speeds) > len(found.distinct().speeds)


def test_where_all_starts_are_one_no_point_is_far():
    found = bptt.fixed_points(lambda p, h, x: p * h + x, jnp.array([0.5, 0.99]), jnp.zeros((3, 2)), x=jnp.ones(1))
    np.testing.assert_allclose(found.distinct().points, [[2, 100]], rtol=1e-4)
    assert not np.any(found.outlier)


@pytest.mark.exhaustive
def test_without_a_jacobian(x64):
    """`num` eigenvalues by products with vectors, for a state that would be large."""
    w = jnp.asarray(draw(30, 30, scale=0.5 / 30**0.5))
    x = jnp.asarray(draw(30))
    starts = jnp.asarray(draw(3, 30))
    few, all_of = (bptt.fixed_points(tanh_step, w, starts, x, num=num) for num in (4, None))
    np.testing.assert_allclose(few.points, all_of.points, atol=1e-8)
    np.testing.assert_allclose(np.abs(few.eigenvalues), np.abs(all_of.eigenvalues[:, :4]), rtol=1e-6)
    assert few.jacobians is None
    with pytest.raises(ValueError, match="jacobians: expected"):
        few.tangents(0)


# --- Derivatives


def implicit(params, x, num=None):
    found = bptt.fixed_points(tanh_step, params, jnp.full((1, 3), 0.1), x, num=num)
    values = found.eigenvalues
    return jnp.sum(found.points * jnp.asarray([[1.0, 2.0, -1.0]])), jnp.sum(values.real[:, :1])


@pytest.mark.parametrize("num", covering([None, 3], None))
def test_implicit_derivatives(num, x64):
    """Forwards, backwards and twice, against differences."""
    w, x = jnp.asarray(draw(3, 3, scale=0.5)), jnp.asarray(draw(3))
    dw, dx = jnp.asarray(draw(3, 3, seed=1)), jnp.asarray(draw(3, seed=2))

    @jax.jit
    def along(s):
        return jnp.stack(implicit(w + s * dw, x + s * dx, num))

    eps = 1e-5
    slope = (along(eps) - along(-eps)) / (2 * eps)
    rtol = 1e-6 if num is None else 1e-5
    np.testing.assert_allclose(jax.jvp(along, (0.0,), (1.0,))[1], slope, rtol=rtol, atol=1e-8)
    by_w, by_x = jax.jit(jax.grad(lambda *given: implicit(*given, num)[0], (0, 1)))(w, x)
    np.testing.assert_allclose(jnp.vdot(by_w, dw) + jnp.vdot(by_x, dx), slope[0], rtol=rtol)


@pytest.mark.parametrize("method", covering(METHODS, "newton"))
def test_a_step_that_has_a_backward_pass_alone(method, x64):
    """Its Jacobian is that of the backward pass."""

    @jax.custom_vjp
    def smooth(v):
        return jnp.tanh(v)

    smooth.defvjp(lambda v: (jnp.tanh(v), v), lambda v, g: (g * (1 - jnp.tanh(v) ** 2),))

    def step(w, h, x):
        return smooth(w @ h + x)

    w, x = draw(3, 3, scale=0.5), draw(3)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def total(w):
        found = bptt.fixed_points(step, w, jnp.asarray(draw(4, 3)), jnp.asarray(x), method=method)
        return jnp.sum(jnp.square(found.points[0])), found

    (_, found), slope = total(jnp.asarray(w))
    h = np.zeros(3)
    for _ in range(500):
        h = np.tanh(w @ h + x)
    np.testing.assert_allclose(found.points, np.tile(h, (4, 1)), atol=1e-10)
    d = 1 - h**2
    expected = np.outer(d * np.linalg.solve((np.eye(3) - d[:, None] * w).T, 2 * h), h)
    np.testing.assert_allclose(slope, expected, rtol=1e-8)


def test_derivatives_of_what_did_not_converge_are_zero(x64):
    @jax.jit
    @jax.grad
    def slope(e, starts):
        return bptt.fixed_points(escape, e, starts).points[2, 0]

    starts = jnp.asarray([[0.3], [0.2], [0.5]])
    assert float(slope(0.01, starts)) == 0
    assert abs(float(slope(-0.01, starts)) + 5) < 1e-6  # h = sqrt(0.01), and dh/de = -1 / 2 h
    assert float(slope(0.01, 0 * starts)) == 0  # where I - J is zero
    assert float(slope(0.01, jnp.nan * starts)) == 0


@pytest.mark.parametrize("num", [None, 1])
def test_in_a_batch_what_found_nothing_leaves_the_derivatives_of_the_others_alone(num, x64):
    def total(e, starts):
        found = jax.vmap(lambda start: bptt.fixed_points(escape, e, start, num=num).points)(starts)
        return jnp.nansum(found[:, 0, 0])

    starts = jnp.asarray([[[0.3]], [[jnp.nan]], [[3.0]]])
    np.testing.assert_allclose(jax.jit(jax.grad(total))(-0.01, starts[:2]), -5, rtol=1e-6)


# --- Starts


def test_sampled_starts():
    states = {
        "h": jnp.asarray(draw(2, 50, 3), jnp.float32) * jnp.asarray([[[1.0, 10.0, 0.0]]]),
        "n": jnp.ones((2, 50), int),
    }
    states["h"] = states["h"].at[0, 7].set(jnp.nan)
    drawn = sample_starts(states, 4000, key=jax.random.key(0), noise=0.0, axes=2)
    assert drawn["h"].shape == (4000, 3)
    assert drawn["n"].dtype == states["n"].dtype
    visited = {tuple(row) for row in np.asarray(states["h"]).reshape(-1, 3)}
    assert {tuple(row) for row in np.asarray(drawn["h"])} == {row for row in visited if not np.isnan(row[0])}
    noisy = sample_starts(states, 4000, key=jax.random.key(0), noise=0.1, axes=2)
    spread = np.nanstd(np.asarray(states["h"]) - np.nanmean(np.asarray(states["h"]), axis=(0, 1)))
    np.testing.assert_allclose(np.std(noisy["h"] - drawn["h"]), 0.1 * spread, rtol=0.05)
    other = sample_starts(states, 4000, key=jax.random.key(1), axes=2)
    assert not np.array_equal(other["h"], noisy["h"])


# --- What it says


def test_what_it_says_of_itself(x64):
    starts = jnp.asarray([0.25, 0.1, 0.8, jnp.nan, 0.9, 0.7, 0.65, 0.05])
    found = bptt.fixed_points(logistic, 2.5, starts)
    assert repr(found).startswith("FixedPoints: 2 distinct (1 stable, 1 unstable) of 8 starts, 7 converged, 1 not")
    batch = jax.tree.map(lambda a: jnp.stack([a, a]), found)
    assert batch.kinds.shape == (2, 8)
    with pytest.raises(ValueError, match="distinct: expected one search"):
        batch.distinct()
    assert set(found.to_dict()) >= {"points", "speeds", "eigenvalues"}
    assert found.to_xarray()["eigenvalues"].dims == ("start", "mode")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"starts": jnp.ones(())}, "starts: expected an axis of starts"),
        ({"starts": jnp.ones((0, 2))}, "starts: expected one number of starts"),
        ({"starts": (jnp.ones((3, 2)), jnp.ones(4))}, "starts: expected one number of starts"),
        ({"starts": jnp.ones((3, 2), int)}, "starts: expected at least one floating number"),
        ({"x": bptt.Sequence(jnp.ones(2))}, "x: expected one constant input"),
        ({"x": jnp.ones((2, 2)), "x_per_start": True}, "x: expected 3 in front"),
        ({"x_per_start": True}, "x: expected one input for each start"),
        ({"x_per_start": 1}, "x_per_start: expected True or False"),
        ({"method": "adam"}, "method: expected"),
        ({"num": 3}, "num: expected at most 2"),
        ({"tol": -1.0}, "tol: expected"),
        ({"max_iterations": 0}, "max_iterations: expected at least 1"),
        ({"distance": 0.0}, "distance: expected"),
        ({"rhs": 3}, "rhs: expected a function"),
        ({"rhs": lambda p, h, x: h[:1]}, "rhs: must return"),
        ({"rhs": tanh_step, "num": 1}, "rhs: expected a state of at most"),
        ({"step": lambda p, h, x: h[:1]}, "step: must keep the shape"),
    ],
)
def test_bad_arguments(options, says):
    good = {"step": tanh_step, "params": jnp.eye(2), "starts": jnp.ones((3, 2))}
    with pytest.raises((TypeError, ValueError), match=says):
        bptt.fixed_points(**good | options)


def test_where_a_step_has_no_finite_derivative_it_is_not_called_stable():
    """The root repels from 0, with a slope of infinity."""
    found = bptt.fixed_points(lambda p, h, x: jnp.sqrt(h), None, jnp.array([[4.0], [0.0]]))
    assert found.kinds.tolist() == ["stable", "unknown"]
    assert "1 stable, 1 unknown" in str(found)


@pytest.mark.parametrize(("kind", "unit"), [("float32", 1e30), ("float32", 1e-30), ("float16", 2e4)])
def test_starts_from_states_whose_squares_leave_the_range(kind, unit):
    """The noise is in their unit."""
    visited = jnp.asarray(draw(50, 1), kind)
    drawn, scaled = (
        np.asarray(sample_starts(states, 20, key=jax.random.key(0)), np.float64)
        for states in (visited, visited * jnp.asarray(unit, kind))
    )
    np.testing.assert_allclose(scaled / unit, drawn, atol=4 * float(jnp.finfo(kind).eps))


@pytest.mark.parametrize("method", covering(METHODS, "newton"))
@pytest.mark.parametrize("unit", [1e-20, 1e-36])
def test_starts_that_have_decayed(method, unit):
    """Under an input, where all is of another size, and without, where their roundings are no numbers any more."""
    w = jnp.asarray(0.4 * np.linalg.qr(draw(4, 4))[0], jnp.float32)
    starts, x = jnp.asarray(draw(8, 4, scale=unit, seed=1), jnp.float32), jnp.ones(4)
    driven = bptt.fixed_points(tanh_step, w, starts, x, method=method)
    assert driven.converged.all()
    expected = bptt.final_state(tanh_step, w, jnp.zeros(4), jnp.ones((100, 4)))
    np.testing.assert_allclose(driven.points, np.tile(expected, (8, 1)), rtol=1e-5)
    left_alone = bptt.fixed_points(tanh_step, w, starts, method=method)
    assert left_alone.converged.all()
    assert len(left_alone.distinct().speeds) == 1


def test_noise_of_starts_is_finite():
    with pytest.raises(ValueError, match="noise: expected a finite number of at least 0, got inf"):
        sample_starts(jnp.ones((3, 1)), 2, key=jax.random.key(0), noise=np.inf)
