"""`bptt.report`: what the page knows is what was measured, and in a browser it can be explored."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import browser
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax.pages import embedded

STEPS, BATCH = 24, 3
LENGTHS = [24, 18, 24]
RESET = 9  # before this step, counted from 0
NAME = "</script><b>two leaves"


def _two(w, state, x):
    return {"a": jnp.tanh(w * state["a"] + x), "b": 0.5 * state["b"] + 0.3 * state["a"]}


@pytest.fixture(scope="module")
def results() -> dict:
    xs = jax.random.normal(jax.random.key(0), (BATCH, STEPS, 2))
    state0 = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    resets = jnp.arange(STEPS) == RESET

    @jax.jit
    @jax.vmap
    def flow(x, length):
        given = bptt.Sequence(x, mask=jnp.arange(STEPS) < length, resets=resets)
        return bptt.gradient_flow(_two, jnp.float32(0.9), state0, given, lambda s: jnp.sum(s["a"] + s["b"]))

    def step(w, h, x):
        return jnp.tanh(w @ h)

    w = jnp.array([[1.2, 0.5], [-0.5, 1.2]])
    return {
        NAME: flow(xs, jnp.array(LENGTHS)),
        "exponents": bptt.lyapunov_exponents(step, w, jnp.ones(2), length=200),
        "influence": bptt.influence_map(step, w, jnp.ones(2), length=12, intervals=6),
        "points": bptt.fixed_points(step, w, jax.random.normal(jax.random.key(1), (6, 2))),
        "matrices": bptt.eigensystem(jnp.stack([w, 0.5 * w])),
    }


@pytest.fixture(scope="module")
def text(results, tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("page") / "page.html"
    assert bptt.report(results, file, title="everything") == file
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data(text) -> dict:
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert set("<>&").isdisjoint(block)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(block, parse_constant=refuse)


def _numbers(values) -> np.ndarray:
    return np.asarray(values).astype(np.float64)  # "nan" and "-inf" too


def test_what_the_page_knows_of_a_flow_is_what_was_measured(results, data) -> None:
    flow, (told,) = results[NAME], data["flows"]
    assert (told["name"], told["steps"], told["sequences"]) == (NAME, STEPS, BATCH)
    assert told["at"] == list(range(STEPS))
    expected = {
        "adjoint": flow.signal.adjoint_log_norms,
        "signal": flow.signal.log_gains,
        "product": flow.products.log_norms,
        "contribution": flow.contributions.log_norms,
        "leaf:a": flow.leaf_log_norms["a"],
        "leaf:b": flow.leaf_log_norms["b"],
    }
    assert set(told["curves"]) == set(expected)
    for name, values in expected.items():
        rows = _numbers(told["curves"][name]["rows"])
        np.testing.assert_allclose(rows, values, rtol=5e-6)
        assert name == "contribution" or np.isnan(rows[1, LENGTHS[1] :]).all()  # padding
        for of, level in (("low", 0.1), ("median", 0.5), ("high", 0.9)):
            row = _numbers(told["curves"][name][of])
            for t in range(STEPS):
                known = np.sort(rows[:, t][~np.isnan(rows[:, t])])
                if len(known):  # an entry, the least that so many are not above
                    assert row[t] == known[int(np.ceil(level * len(known))) - 1]
    assert -np.inf in _numbers(told["curves"]["contribution"]["rows"])
    for i, spectrum in enumerate(told["spectra"]):
        real = np.asarray(flow.spectra.steps[i]) > 0
        assert spectrum["steps"] == np.asarray(flow.spectra.steps[i])[real].tolist()
        np.testing.assert_allclose(_numbers(spectrum["singular"]), flow.spectra.singular_values[i][real], rtol=5e-6)
        pairs = _numbers(spectrum["eigenvalues"])
        expected_pairs = np.asarray(flow.spectra.eigenvalues[i])[real]
        np.testing.assert_allclose(pairs[:, ::2] + 1j * pairs[:, 1::2], expected_pairs, rtol=5e-6)
    assert len(told["spectra"]) == BATCH


def test_padding_and_resets_are_where_they_were(data) -> None:
    (told,) = data["flows"]
    assert told["padded"] == [[], [[LENGTHS[1] + 1, STEPS]], []]
    assert told["resets"] == [[RESET + 1]] * BATCH


def test_what_the_page_knows_of_the_others(results, data) -> None:
    exponents, influence, points, matrices = data["parts"].values()
    np.testing.assert_allclose(
        _numbers(exponents["rows"]).T, results["exponents"].running[np.asarray(exponents["at"]) - 1], rtol=5e-6
    )
    np.testing.assert_allclose(_numbers(influence["rows"]), results["influence"].log_norms, rtol=5e-6)
    assert influence["times"] == [0, 2, 4, 6, 8, 10, 12]
    distinct = results["points"].distinct()
    for told, values in ((points, distinct.eigenvalues), (matrices, results["matrices"].values)):
        pairs = _numbers(told["rows"])
        np.testing.assert_allclose(pairs[:, ::2] + 1j * pairs[:, 1::2], values, rtol=5e-6)
    assert [label.split(", ")[1] for label in points["labels"]] == distinct.kinds.tolist()


def test_long_curves_are_thinned_and_keep_their_extremes(results) -> None:
    flow = jax.tree.map(
        lambda a: (
            np.repeat(np.asarray(a)[:1], 40, 0).repeat(400, 1)
            if a.shape[1:2] == (STEPS,)
            else np.repeat(a[:1], 40, 0)
        ),
        results[NAME],
    )
    norms = np.array(flow.signal.adjoint_log_norms)
    norms[2, 4321], norms[5, 1234] = 77.0, -99.0
    norms[2, 0], norms[5, 0] = -np.inf, np.inf  # no extremes of what is drawn
    flow = replace(flow, signal=replace(flow.signal, adjoint_log_norms=norms))
    (told,), notes = embedded.of_flows({"long": flow})
    rows = _numbers(told["curves"]["adjoint"]["rows"])
    assert (rows[2].max(), rows[5].min()) == (77.0, -99.0)
    assert rows[2, told["at"].index(4321)] == 77.0
    assert told["at"][-1] == STEPS * 400 - 1
    assert len(rows) == 8
    count = sum(len(row) for curve in told["curves"].values() for row in curve["rows"])
    assert count < 1.1 * embedded._CURVES
    said = " ".join(notes)
    assert "of 9600 steps" in said
    assert "of 40 sequences, the first 8" in said


def test_a_batch_of_two_axes_and_a_flow_without_spectra(results, tmp_path) -> None:
    flow = jax.tree.map(lambda a: a[None, :2], results[NAME])
    bare = replace(jax.tree.map(lambda a: a[0], results[NAME]), spectra=None, products=None)
    text = bptt.report({"grid": flow, "bare": bare}, tmp_path / "page.html").read_text(encoding="utf-8")
    block = json.loads(text.split('id="data">')[1].split("</script>")[0])
    grid, alone = block["flows"]
    assert (grid["sequences"], alone["sequences"]) == (2, 1)
    assert "spectra" not in alone
    assert "product" not in alone["curves"]
    np.testing.assert_allclose(_numbers(alone["curves"]["signal"]["rows"][0]), bare.signal.log_gains, rtol=5e-6)
    assert "median" not in alone["curves"]["adjoint"]


def test_a_page_is_there_whole_or_not(results, tmp_path, monkeypatch) -> None:
    file = tmp_path / "page.html"
    file.write_text("before")

    def full(path: Path, *_, **__) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        bptt.report(results["matrices"], file)
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert file.read_bytes() == b"before"


def test_what_is_no_result_is_refused(results, tmp_path) -> None:
    path = tmp_path / "page.html"
    for given in (None, {"a": None}, {"a": jnp.ones(3)}, {1: results["matrices"]}, {"a": results}):
        with pytest.raises(TypeError, match="results: expected"):
            bptt.report(given, path)
    with pytest.raises(ValueError, match="at least one"):
        bptt.report({}, path)
    with pytest.raises(TypeError, match="path: expected"):
        bptt.report(results["matrices"], 3)
    with pytest.raises(TypeError, match="title: expected"):
        bptt.report(results["matrices"], path, title=3)
    with pytest.raises(ValueError, match="one sequence"):
        bptt.report(jax.tree.map(lambda a: a[None], results["influence"]), path)
    assert not path.exists()


@pytest.fixture(scope="module")
def browsing(text, tmp_path_factory) -> Iterator[tuple[browser.Tab, str]]:
    if browser.executable() is None:
        pytest.skip(f"no browser on the PATH ({', '.join(browser.EXECUTABLES)})")
    folder = tmp_path_factory.mktemp("browser")
    (folder / "page.html").write_text(text, encoding="utf-8")
    with ExitStack() as stack:
        try:
            tab = stack.enter_context(browser.tab(folder / "profile"))
        except (ConnectionError, TimeoutError) as error:
            pytest.skip(f"{browser.executable()} does not start: {error}")
        tab.resize(1280, 900)
        yield tab, (folder / "page.html").as_uri()


@pytest.fixture
def tab(browsing) -> Iterator[browser.Tab]:
    """With the page just opened; in the end it has asked for nothing and complained of nothing."""
    tab, url = browsing
    tab.open(url)
    yield tab
    urls = [e["request"]["url"].split(":")[0] for e in tab.seen("Network.requestWillBeSent")]
    assert urls.count("file") == 1
    assert set(urls) <= {"file", "data"}
    assert tab.seen("Log.entryAdded") == tab.seen("Runtime.consoleAPICalled") == []
    assert tab.seen("Runtime.exceptionThrown") == []


def _row(tab: browser.Tab, number: int = 0) -> list[str]:
    return tab.evaluate(
        f"[...document.querySelectorAll('#flows-values tbody tr')[{number}].children].map(e => e.textContent)"
    )


# Where the marks are in the complex plane, from the unit circle beside them.
PLANE = """
(() => {
  const svg = document.getElementById("flows-plane"), circle = svg.querySelector(".circle");
  const [cx, cy, r] = ["cx", "cy", "r"].map(n => Number(circle.getAttribute(n)));
  return [...svg.querySelectorAll(".dot")].map(e => {
    const [x, y] = e.getAttribute("transform").match(/-?[0-9.]+/g).map(Number);
    return [(x - cx) / r, (cy - y) / r];
  });
})()
"""
# Of a line that stands upright; of another NaN, which is null here.
CURSOR = (
    "(e => e.x1.baseVal.value === e.x2.baseVal.value ? e.x1.baseVal.value : NaN)(document.querySelector('.cursor'))"
)


def test_the_slider_moves_values_and_points_by_keys_alone(tab, results) -> None:
    flow = results[NAME]
    for _ in range(5):
        tab.press("Tab")
        if tab.evaluate("document.activeElement.id") == "flows-time":
            break
    assert tab.evaluate("document.activeElement.id") == "flows-time"
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.press("Home")
    begin, seen = tab.evaluate(CURSOR), set()
    tab.press("ArrowRight", 9)
    for t in (10, 11):
        tab.press("ArrowRight")
        assert tab.evaluate("document.activeElement.value") == str(t)
        name, at, norm, measured, largest, smallest, radius = _row(tab)
        assert (name, at, measured) == (f"{NAME}, median", str(t), str(t))
        assert float(norm) == pytest.approx(
            float(np.exp(np.sort(flow.signal.adjoint_log_norms[:, t - 1])[1])), rel=6e-3
        )
        singular = np.asarray(flow.spectra.singular_values[0, t - 1])
        np.testing.assert_allclose([float(largest), float(smallest)], singular[[0, -1]], rtol=1e-3)
        eigen = np.asarray(flow.spectra.eigenvalues[0, t - 1])
        assert float(radius) == pytest.approx(abs(eigen[0]), rel=1e-3)
        np.testing.assert_allclose(tab.evaluate(PLANE), np.stack([eigen.real, eigen.imag], 1), atol=2e-3)
        seen.add(tab.evaluate(CURSOR))
    assert len(seen) == 2
    assert min(seen) > begin + 100
    tab.wait_for("document.getElementById('flows-told').textContent.startsWith('t = 11 of 24: gradient norm')")
    assert tab.evaluate("document.activeElement.getAttribute('aria-valuetext')") == "t = 11 of 24"


LINES = "[...document.querySelectorAll('#flows-curve .line')].map(e => e.dataset.name)"


def _boxes(tab: browser.Tab, group: str) -> list[bool]:
    return tab.evaluate(f"[...document.querySelectorAll('#flows-{group} input')].map(e => e.checked)")


def test_sequences_and_leaves_are_switched_on_and_off(tab) -> None:
    assert tab.evaluate(LINES) == [f"{NAME}, median"]
    assert tab.evaluate("document.querySelectorAll('#flows-curve .band').length") > 0
    assert tab.evaluate("document.getElementById('flows-names').hidden")  # there is one
    assert _boxes(tab, "rows") == [True, False, False, False]
    tab.evaluate("document.querySelectorAll('#flows-rows input')[2].focus()")
    tab.press(" ")
    assert tab.evaluate(LINES) == [f"{NAME}, median", f"{NAME}, sequence 2"]
    tab.evaluate("document.querySelector('#flows-rows input').click()")
    assert tab.evaluate(LINES) == [f"{NAME}, sequence 2"]
    assert tab.evaluate("document.querySelectorAll('#flows-curve .band').length") == 0
    tab.press(" ")  # the last one stays
    assert _boxes(tab, "rows") == [False, False, True, False]
    assert tab.evaluate("document.getElementById('flows-leaves').hidden")
    tab.evaluate("""
      (() => {
        const select = document.getElementById("flows-quantity");
        select.value = "signal";
        select.dispatchEvent(new Event("change"));
        document.querySelectorAll("#flows-leaves input")[2].click();
      })()
    """)
    assert tab.evaluate(LINES) == [f"{NAME}, sequence 2", f"{NAME}, b, sequence 2"]


def test_padding_is_shaded_and_resets_are_marked(tab) -> None:
    tab.evaluate("[...document.querySelectorAll('#flows-rows input')].slice(0, 3).forEach(e => e.click())")
    # The first box is off again, the first two sequences are on.
    extent = "(e => [e.x.baseVal.value, e.x.baseVal.value + e.width.baseVal.value])"
    (left, right), reset, cursor = tab.evaluate(f"""
      (() => {{
        const svg = document.getElementById("flows-curve"), padding = svg.querySelectorAll(".padding");
        if (padding.length !== 1) throw new Error(`${{padding.length}} stretches`);
        return [{extent}(padding[0]), svg.querySelector(".reset").x1.baseVal.value, {CURSOR}];
      }})()
    """)
    to_the_start = "(e => { e.value = 0; e.dispatchEvent(new Event('input')); })"
    tab.evaluate(f"{to_the_start}(document.getElementById('flows-time'))")
    zero = tab.evaluate(CURSOR)
    step = (cursor - zero) / STEPS
    np.testing.assert_allclose([left, right, reset], zero + step * np.array([LENGTHS[1], STEPS, RESET]), atol=0.2)


def test_what_is_under_the_pointer_says_what_it_is(tab, results) -> None:
    eigen = np.asarray(results[NAME].spectra.eigenvalues[0, STEPS - 1])
    middle = """(e => {
      e.scrollIntoView({block: "center"});
      const box = e.getBoundingClientRect();
      return [box.x + box.width / 2, box.y + box.height / 2];
    })"""
    tab.point(*tab.evaluate(f"{middle}(document.querySelector('#flows-plane .dot'))"))
    told = tab.evaluate("document.getElementById('flows-plane').parentElement.querySelector('.tip').textContent")
    assert told.startswith(f"{NAME}, sequence 1, t = {STEPS}")
    assert float(told.split("|λ| = ")[1]) == pytest.approx(np.abs(eigen[0]), rel=1e-3)
    tab.point(*tab.evaluate(f"{middle}(document.getElementById('flows-curve'))"))
    told = tab.evaluate("document.querySelector('#flows .tip').textContent")
    t, value = re.fullmatch(rf"t = (\d+)\n{re.escape(NAME)}, median: (.*)", told).groups()
    expected = np.exp(np.sort(results[NAME].signal.adjoint_log_norms[:, int(t) - 1])[1])
    assert float(value) == pytest.approx(float(expected), rel=6e-3)


def test_the_others_can_be_gone_through(tab, results) -> None:
    def slide(which: str, value: int) -> None:
        tab.evaluate(
            f"(e => {{ e.value = {value}; e.dispatchEvent(new Event('input')); }})(document.querySelector('{which}'))"
        )

    slide("[data-kind=map] .time:nth-child(1) input", 1)
    slide("[data-kind=map] .time:nth-child(2) input", 4)
    norm = np.exp(results["influence"].log_norms[4, 1])
    tab.wait_for("document.querySelector('[data-kind=map] output').textContent.startsWith('s = 2, t = 8')")
    told = tab.evaluate("document.querySelector('[data-kind=map] output').textContent")
    assert float(told.split(" = ")[-1]) == pytest.approx(float(norm), rel=6e-3)
    slide("[data-key=part-3] input", 1)
    tab.wait_for(
        "document.querySelector('[data-key=part-3] output').textContent.startsWith('matrix 2: 2 eigenvalues')"
    )
    slide("[data-kind=series] input", 100)
    tab.wait_for("document.querySelector('[data-kind=series] output').textContent.startsWith('t = 100 of 200')")
    told = tab.evaluate("document.querySelector('[data-kind=series] output').textContent")
    values = [float(v) for v in re.findall(r"exponent \d+ (\S+?)[;,]", told)]
    np.testing.assert_allclose(values, results["exponents"].running[99], rtol=1e-3)


VISIBLE = "(s => [...document.querySelectorAll(s)].filter(e => e.getClientRects().length).length)"


def test_without_scripts_and_in_print_the_figures_are_there(tab) -> None:
    live, still, drawn = "'.live'", "'.still'", "'svg.drawn'"
    assert tab.evaluate(f"[{VISIBLE}({live}), {VISIBLE}({still})]") == [5, 0]
    tab.send("Emulation.setEmulatedMedia", media="print")
    assert tab.evaluate(f"[{VISIBLE}({live}), {VISIBLE}({still}), {VISIBLE}({drawn})]") == [0, 4, 8]
    tab.send("Emulation.setEmulatedMedia", media="")
    tab.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(tab.evaluate("location.href"))
        assert tab.evaluate(f"[{VISIBLE}({live}), {VISIBLE}({still}), {VISIBLE}({drawn})]") == [0, 4, 8]
    finally:
        tab.send("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(tab, width) -> None:
    tab.resize(width, 844)
    tab.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    inside = "e => e.getBoundingClientRect().right <= innerWidth + 1"
    assert tab.evaluate(
        f"[...document.querySelectorAll('figcaption, caption, output, select, fieldset')].every({inside})"
    )
    tab.resize(1280, 900)
