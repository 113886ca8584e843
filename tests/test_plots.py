"""The figure is read back from its artists: what it shows must be what was measured."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import to_rgb

import bptt_jax as bptt
from bptt_jax.plots.flow import plot_parts
from bptt_jax.plots.style import DecadeFormatter
from bptt_jax.plots.training import plot_training

LENGTH = 24


def _step(gain, h, x):
    return gain * h + x


def _flow(gain: float, stride: int = 1) -> bptt.analysis.GradientFlow:
    xs = jax.random.normal(jax.random.key(0), (3, LENGTH, 2))
    return jax.vmap(
        lambda x: bptt.gradient_flow(_step, gain, jnp.ones(2), x, lambda s: jnp.sum(s[-1]), stride=stride)
    )(xs)


@pytest.fixture(scope="module")
def flows() -> dict[str, bptt.analysis.GradientFlow]:
    return {"shrinks": _flow(0.5), "grows": _flow(1.5, stride=5)}


def test_norms_are_the_measured_ones_with_horizon(flows) -> None:
    figure = bptt.plot_gradient_flow(flows, title="two")
    norms = figure.axes[0]
    curves = {line.get_label().split(":")[0]: line for line in norms.lines if ":" in str(line.get_label())}
    assert set(curves) == {"shrinks", "grows"}
    t = np.arange(1, LENGTH + 1)
    for name, gain in (("shrinks", 0.5), ("grows", 1.5)):
        expected = ((LENGTH - t) * math.log(gain) + 0.5 * math.log(2)) / math.log(10)
        np.testing.assert_array_equal(curves[name].get_xdata(), t)
        np.testing.assert_allclose(curves[name].get_ydata(), expected, rtol=1e-5, atol=1e-5)
    assert curves["shrinks"].get_label() == "shrinks: vanishing, horizon 10 steps"
    (dot,) = [line for line in norms.lines if line.get_marker() == "o"]
    assert dot.get_xdata() == LENGTH - 10
    assert figure.get_suptitle() == "two"


def test_axes_are_named_and_the_legend_is_outside(flows) -> None:
    figure = bptt.plot_gradient_flow(flows)
    figure.draw_without_rendering()
    assert len(figure.axes) == 5
    for ax in figure.axes:
        assert ax.get_xlabel()
    assert all(figure.axes[i].get_ylabel() for i in (0, 1, 3))
    norms = figure.axes[0]
    legend = norms.get_legend().get_window_extent()
    assert legend.y0 >= norms.get_window_extent().y1 - 1
    curves = [line for line in norms.lines if ":" in str(line.get_label())]
    lightness = [np.dot(to_rgb(line.get_color()), (0.3, 0.6, 0.1)) for line in curves]
    assert len({line.is_dashed() for line in curves}) == 2
    assert abs(lightness[0] - lightness[1]) > 0.1


def test_singular_values_and_eigenvalues_are_the_measured_ones(flows) -> None:
    figure = bptt.plot_gradient_flow(flows)
    median = {line.get_label(): line for line in figure.axes[2].lines}["median"]
    np.testing.assert_array_equal(median.get_xdata(), [4, 9, 14, 19, 24])
    np.testing.assert_allclose(median.get_ydata(), 1.5, rtol=1e-6)
    (points,) = figure.axes[3].collections
    np.testing.assert_allclose(points.get_offsets(), np.tile([0.5, 0.0], (3 * LENGTH * 2, 1)), atol=1e-6)


@pytest.mark.exhaustive
def test_one_unbatched_flow_and_one_with_nan_are_drawn(tmp_path) -> None:
    one = bptt.gradient_flow(_step, 0.5, jnp.ones(2), jnp.ones((LENGTH, 2)), lambda s: jnp.sum(s[-1]))
    bad = bptt.gradient_flow(_step, jnp.nan, jnp.ones(2), jnp.ones((LENGTH, 2)), lambda s: jnp.sum(s[-1]))
    dead = bptt.gradient_flow(_step, 0.0, jnp.ones(2), jnp.ones((LENGTH, 2)), lambda s: jnp.sum(s[-1]))
    for i, flow in enumerate((one, bad, dead)):
        path = tmp_path / f"{i}.png"
        bptt.plot_gradient_flow(flow).savefig(path)
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flows", "error", "message"),
    [
        ({}, ValueError, "flows: expected at least one GradientFlow"),
        (3, TypeError, "flows: expected a GradientFlow or a mapping of them by name, got int"),
        ({"a": 1}, TypeError, "flows: expected a GradientFlow"),
    ],
)
def test_bad_flows(flows, error, message) -> None:
    with pytest.raises(error, match=message):
        bptt.plot_gradient_flow(flows)


def test_dot_counts_back_from_the_last_state_that_the_loss_reads() -> None:
    flow = bptt.gradient_flow(_step, 0.5, jnp.ones(2), jnp.ones((LENGTH, 2)), lambda s: jnp.sum(s[15]))
    (dot,) = [line for line in bptt.plot_gradient_flow(flow).axes[0].lines if line.get_marker() == "o"]
    assert dot.get_xdata() == 16 - 10
    assert np.isfinite(dot.get_ydata()).all()


def test_parts_show_what_the_whole_shows_and_fit_a_column(flows) -> None:
    whole, (norms, spectra) = bptt.plot_gradient_flow(flows), plot_parts(flows)
    parts = [norms.axes, *([v.axes[0] for v, _ in spectra.values()], [p.axes[0] for _, p in spectra.values()])]
    for ax, part in zip(whole.axes, [ax for axes in parts for ax in axes], strict=True):
        assert part.get_xlabel() == ax.get_xlabel()
        assert part.get_ylabel()
        for line, other in zip(ax.lines, part.lines, strict=True):
            np.testing.assert_array_equal(line.get_xydata(), other.get_xydata())
        for points, others in zip(ax.collections, part.collections, strict=True):
            np.testing.assert_array_equal(points.get_offsets(), others.get_offsets())
    long = {"a name too long for a line of a column, " * 3: flows["grows"]}
    for figure in (norms, plot_parts(long)[0], *(f for pair in spectra.values() for f in pair)):
        figure.draw_without_rendering()
        assert figure.get_tightbbox().xmin > -0.05
        assert figure.get_tightbbox().xmax < figure.get_figwidth() + 0.05
        legends = [legend.get_window_extent() for legend in figure.legends]
        assert all(not box.overlaps(ax.get_tightbbox()) for box in legends for ax in figure.axes)


def test_the_band_of_a_long_sequence_covers_every_peak(flows) -> None:
    norms = np.random.default_rng(0).standard_normal((3, 25_001)).cumsum(axis=1)
    signal = replace(flows["shrinks"].signal, adjoint_log_norms=norms)
    figure = bptt.plot_gradient_flow(replace(flows["shrinks"], signal=signal))
    (band,) = figure.axes[0].collections
    outline = band.get_paths()[0].vertices
    assert len(outline) < 2500
    assert outline[:, 0].min() == 1
    decades = norms / math.log(10)  # of three sequences the 10th and 90th percentiles are least and largest
    assert outline[:, 1].min() == pytest.approx(decades.min())
    assert outline[:, 1].max() == pytest.approx(decades.max())


def _chunk(updates: int, loss: list, **other) -> dict:
    norms = {"gradient_log_norm": [0.0] * len(loss), "gradient_log_norm_max": [math.log(5)] * len(loss)}
    return {
        "updates": updates,
        "loss": loss,
        "validation_loss": loss,
        "seeds": list(range(len(loss))),
        "non_finite": [None if v is None else int(v == "nan") for v in loss],
        "solved_at": [None] * len(loss),
        **norms,
        **other,
    }


def test_training_curves_are_the_records() -> None:
    event = {"event": "jump", "updates": 13}
    records = [
        _chunk(10, [1.0, 2.0]),
        event,
        _chunk(20, [0.1, "nan"]),
        _chunk(30, [None, None], solved_at=[20, None]),
    ]
    figure = plot_training(records, baseline=0.7, title="run")
    left, right = figure.axes
    assert figure.get_suptitle() == "run"
    thick = {line.get_label(): line for line in left.lines if line.get_linewidth() > 1}
    np.testing.assert_array_equal(thick["seed 0"].get_xdata(), [10, 20, 30])
    np.testing.assert_array_equal(thick["seed 0"].get_ydata(), [1.0, 0.1, np.nan])
    np.testing.assert_array_equal(thick["seed 1"].get_ydata(), [2.0, np.nan, np.nan])
    (dot,), (cross,) = ([line for line in left.lines if line.get_marker() == m] for m in "ox")
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (20, 0.1)
    assert cross.get_xdata()[0] == 20
    assert dot.get_color() == thick["seed 0"].get_color() != cross.get_color() == thick["seed 1"].get_color()
    assert 0.7 in [line.get_ydata()[0] for line in left.lines]
    np.testing.assert_allclose(sorted({float(y) for line in right.lines for y in line.get_ydata()}), [1.0, 5.0])
    assert left.get_yscale() == right.get_yscale() == "log"


def test_training_without_a_number_or_a_record(tmp_path) -> None:
    lost = _chunk(10, ["nan"], gradient_log_norm=["nan"], gradient_log_norm_max=["inf"])
    plot_training([lost]).savefig(tmp_path / "lost.png")
    with pytest.raises(ValueError, match="expected those of a training run, got no chunk"):
        plot_training([{"event": "jump", "updates": 3}])


def test_exponents_of_a_batch_are_the_pooled_ones() -> None:
    def measure(w):
        return bptt.lyapunov_exponents(lambda w, h, x: w * h, w, jnp.ones(2), length=30, warmup=25)

    spectra = jax.vmap(measure)(jnp.asarray([[2.0, 0.5], [8.0, 0.5]]))
    (ax,) = bptt.plots.plot_exponents(spectra).axes
    shown = ax.get_lines()[1].get_ydata()
    np.testing.assert_allclose(shown, np.log(2) * np.array([2, -1]), rtol=1e-5)
    (ax,) = bptt.plots.plot_exponents(jax.tree.map(lambda a: a[1:], spectra)).axes
    np.testing.assert_allclose(ax.get_lines()[1].get_ydata(), np.log([8, 0.5]), rtol=1e-5)
    with pytest.raises(ValueError, match="a batch of one axis, got a batch of shape"):
        bptt.plots.plot_exponents(jax.tree.map(lambda a: a[None], spectra))


def test_influence_map_shows_the_pairs() -> None:
    influence = bptt.influence_map(_step, jnp.float32(0.5), jnp.ones(2), jnp.zeros((20, 2)), intervals=4)
    figure = bptt.plots.plot_influence_map(influence, title="map")
    ax, bar = figure.axes
    shown = ax.collections[0].get_array().reshape(5, 5)
    for i in range(5):
        for k in range(5):
            if k > i:
                assert np.ma.is_masked(shown[i, k]) or np.isnan(shown[i, k])
            else:
                assert float(shown[i, k]) == pytest.approx(5 * (i - k) * math.log10(0.5), abs=1e-5)
    low, high = ax.collections[0].get_clim()
    assert -low == high == pytest.approx(20 * math.log10(2))
    assert "log" in bar.get_ylabel()
    none = replace(influence, log_norms=influence.log_norms.at[2, 1].set(-jnp.inf))
    zero = bptt.plots.plot_influence_map(none).axes[0].collections[0]
    assert zero.get_array().reshape(5, 5)[2, 1] == zero.get_clim()[0]
    with pytest.raises(ValueError, match="expected that of one sequence, got a batch"):
        bptt.plots.plot_influence_map(bptt.analysis.InfluenceMap(jnp.zeros((2, 3)), jnp.zeros((2, 3, 3))))


def test_audit_shows_the_shares_by_lag() -> None:
    one, nothing = jnp.ones(2), math.nan
    names = "bias", "bias_error", "share", "share_error", "cosine", "cosine_error", "variance", "sequence_variance"
    audit = bptt.estimators.Audit(
        names=("uoro", "tbptt"),
        **dict.fromkeys(names, one),
        exact_variance=one[0],
        exact_log_norm=one[0],
        in_range=one[0] > 0,
        lags=jnp.asarray([0, 1, 10]),
        lag_shares=jnp.asarray([[1.1, 0.9, 1.0], [1.0, 0.0, nothing]]),
        lag_share_errors=jnp.asarray([[0.1, 0.2, 0.3], [0.0, nothing, nothing]]),
    )
    (ax,) = bptt.plots.plot_audit(audit, title="judged").axes
    first, second = ax.containers
    np.testing.assert_allclose(first.lines[0].get_xydata(), [[0, 1.1], [1, 0.9], [10, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(second.lines[0].get_xydata(), [[0, 1], [1, 0]])
    bars = [segment[:, 1] for segment in first.lines[2][0].get_segments()]
    np.testing.assert_allclose(bars, [[1.0, 1.2], [0.7, 1.1], [0.7, 1.3]], rtol=1e-6)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["uoro: cosine 1.00", "tbptt: cosine 1.00"]
    assert ax.get_title() == "judged"
    assert ax.get_legend().get_title().get_text() == ""
    blind = replace(audit, cosine=jnp.asarray([0.5, nothing]), share=jnp.zeros(2))
    legend = bptt.plots.plot_audit(blind).axes[0].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == [
        "uoro: cosine 0.50",
        "tbptt: cosine undefined (it is zero)",
    ]
    lost = bptt.plots.plot_audit(replace(blind, in_range=one[0] < 0)).axes[0].get_legend()
    assert [t.get_text() for t in lost.get_texts()] == ["uoro: cosine unknown", "tbptt: cosine unknown"]
    assert lost.get_title().get_text() == "the gradient, log norm 1, is above the range of its dtype"
    with pytest.raises(ValueError, match="expected that of one problem, got a batch"):
        bptt.plots.plot_audit(jax.tree.map(lambda a: a[None], audit))
    with pytest.raises(ValueError, match="expected one with lags"):
        bptt.plots.plot_audit(replace(audit, lags=jnp.zeros(0), lag_shares=jnp.zeros((2, 0))))


def test_ticks_that_lie_close_are_told_apart():
    """A signal that loses 1 % at a step stays within a decade."""
    xs = jnp.zeros((LENGTH, 2))
    flow = bptt.gradient_flow(_step, 0.99, jnp.ones(2), xs, lambda s: jnp.sum(s[-1]))
    figure = bptt.plots.plot_norms(flow)
    figure.draw_without_rendering()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) > 2
    assert len(set(labels)) == len(labels)
    np.testing.assert_allclose([float(text) for text in DecadeFormatter().format_ticks([-0.02, -0.01, 0.01])],
        10.0 ** np.asarray([-0.02, -0.01, 0.01]), rtol=0.03)  # fmt: skip
    assert DecadeFormatter().format_ticks([-2.0, 0.0, 1.0]) == ["$10^{-2}$", "$10^{0}$", "$10^{1}$"]
    assert [float(text) for text in DecadeFormatter().format_ticks([-20.5, -20.25])] == pytest.approx(
        [10**-20.5, 10**-20.25], rel=0.1
    )


def test_a_horizon_beyond_what_was_measured_is_marked_and_has_no_dot():
    xs = jnp.zeros((LENGTH, 2))
    flow = bptt.gradient_flow(_step, 0.99, jnp.ones(2), xs, lambda s: jnp.sum(s[-1]))
    norms = bptt.plots.plot_norms({"slow": flow}).axes[0]
    (curve,) = [line for line in norms.lines if "slow" in str(line.get_label())]
    assert "extrapolated" in curve.get_label()
    assert not [line for line in norms.lines if line.get_marker() == "o"]


def test_padded_sequences_are_aligned_at_their_end():
    lengths = (LENGTH, 10)
    xs = jnp.where(jnp.arange(LENGTH)[None, :, None] < jnp.asarray(lengths)[:, None, None], 0.1, jnp.nan)
    trials = bptt.Sequence(jnp.broadcast_to(xs, (2, LENGTH, 2)), mask=~jnp.isnan(xs[..., 0]))
    flow = jax.vmap(
        lambda x: bptt.gradient_flow(_step, 0.5, jnp.ones(2), x, lambda s: jnp.sum(s[-1]), spectra=False)
    )(trials)
    figure = bptt.plot_gradient_flow(flow)
    (ax,) = figure.axes  # without spectra, the norms alone
    assert "aligned" in ax.get_xlabel()
    (curve,) = [line for line in ax.lines if "gradient" in str(line.get_label())]
    t = np.arange(1, LENGTH + 1)  # both fall by one half a step from the same end, so the median is each of them
    expected = ((LENGTH - t) * math.log(0.5) + 0.5 * math.log(2)) / math.log(10)
    np.testing.assert_allclose(curve.get_ydata(), expected, rtol=1e-5, atol=1e-5)
    (dot,) = [line for line in ax.lines if line.get_marker() == "o"]
    assert dot.get_xdata() == LENGTH - 10


def test_axes_that_are_given_are_drawn_on(flows):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 8))
    axes = np.ravel(figure.subplots(5, 1))
    assert bptt.plot_gradient_flow(flows, axes=axes) is figure
    assert all(ax.lines or ax.collections for ax in axes)
    for draw in (
        bptt.plots.plot_norms,
        bptt.plots.plot_singular_values,
        bptt.plots.plot_eigenvalues,
        bptt.plots.plot_leaves,
    ):
        figure = Figure(figsize=(4, 3))
        ax = figure.subplots()
        assert draw(flows["shrinks"], ax=ax) is figure
        assert ax.get_xlabel()
        assert ax.get_ylabel()
    with pytest.raises(ValueError, match="axes: expected 5, one for each panel, got 1"):
        bptt.plot_gradient_flow(flows, axes=[ax])
    with pytest.raises(ValueError, match="figsize: expected None"):
        bptt.plot_gradient_flow(flows, axes=axes, figsize=(3, 3))


def test_a_column_is_as_wide_as_asked_and_no_text_lies_on_another(flows):
    """3.4 inches, the width of a column in print."""
    figure = bptt.plot_gradient_flow(flows, figsize=(3.4, 9.0))
    assert tuple(figure.get_size_inches()) == (3.4, 9.0)
    figure.draw_without_rendering()
    boxes = []
    for ax in figure.axes:
        texts = [ax.xaxis.label, ax.yaxis.label, ax.title]
        for axis in (ax.xaxis, ax.yaxis):  # matplotlib keeps ticks beyond the ends, which it does not draw
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        legend = ax.get_legend()
        texts += legend.get_texts() if legend else []
        boxes += [text.get_window_extent() for text in texts if text.get_visible() and text.get_text()]
    assert len(boxes) > 30
    width = 3.4 * figure.dpi
    assert all(box.x0 >= -1 and box.x1 <= width + 1 for box in boxes)
    overlaps = [
        (a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.shrunk(0.9, 0.9).overlaps(b.shrunk(0.9, 0.9))
    ]
    assert overlaps == []


def test_a_notebook_shows_it_without_any_setup(flows):
    for figure in (bptt.plot_gradient_flow(flows), bptt.plots.plot_norms(flows)):
        assert figure._repr_png_().startswith(b"\x89PNG")


def test_leaves_are_told_apart():
    """One leaf keeps, the other forgets."""

    def step(_, h, x):
        return {"keeps": h["keeps"] + x, "forgets": 0.5 * h["forgets"] + x}

    h0 = {"keeps": jnp.ones(2), "forgets": jnp.ones(2)}

    def loss(states):
        return jnp.sum(states["keeps"][-1] + states["forgets"][-1])

    flow = bptt.gradient_flow(step, None, h0, jnp.zeros((LENGTH, 2)), loss, spectra=False)
    found = bptt.adjoints(step, None, h0, jnp.zeros((LENGTH, 2)), loss)
    for measured in (flow, found):
        lines = {line.get_label(): line.get_ydata() for line in bptt.plots.plot_leaves(measured).axes[0].lines}
        assert set(lines) == {"keeps", "forgets"}
        slopes = {name: np.nanmean(np.diff(y)) for name, y in lines.items()}
        assert slopes["keeps"] == pytest.approx(0, abs=1e-6)
        assert slopes["forgets"] == pytest.approx(math.log10(2), rel=1e-5)
    with pytest.raises(TypeError, match="found: expected a GradientFlow or Adjoints, got int"):
        bptt.plots.plot_leaves(3)


def test_adjoints_are_drawn_unit_by_unit():
    decay = jnp.asarray([0.5, 0.9, 0.0])
    found = bptt.adjoints(lambda w, h, x: w * h, decay, jnp.ones(3), jnp.zeros(12), lambda s: jnp.sum(s[-1]))
    figure = bptt.plots.plot_adjoints(found)
    shown = figure.axes[0].collections[0].get_array().reshape(3, 12)
    lags = np.arange(12)[::-1]
    np.testing.assert_allclose(shown[:2], np.log10([[0.5], [0.9]]) * lags, atol=1e-5)
    assert shown[2, 0] == shown.min()  # zero
    with pytest.raises(ValueError, match="adjoints: expected those of one sequence"):
        bptt.plots.plot_adjoints(jax.vmap(lambda w: bptt.adjoints(lambda w, h, x: w * h, w, jnp.ones(3), jnp.zeros(12),
            lambda s: jnp.sum(s[-1])))(jnp.ones((2, 3))))  # fmt: skip
