"""The page: what its text says, and what a real browser makes of it."""

import base64
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import browser
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_jax as bptt
from bptt_jax.cli import diagnose, report
from bptt_jax.cli.main import main
from bptt_jax.cli.page import flow_page
from bptt_jax.cli.report import COLUMNS, rows

GAINS = {
    "</title><script>alert(1)</script>": 0.5,
    "\"'><img src=x onerror=alert(1)> &amp; -->": 1.5,
    "steady" * 30: 1.0,
    "{nan}": jnp.nan,
}
VERDICTS = ["vanishing", "exploding", "steady", "non-finite"]
SETTINGS = diagnose.Settings(
    checkpoint=None, text="<i>novel</i>&.txt", embed=None, cells=(), gain=(0.5, 2.0), alpha=None, hidden=8, length=24,
    batch=3, loss="last", step='a"b.py:f', float64=False, seed=1,
)  # fmt: skip
TITLE = "3 sequences of <b>24</b>"


def _step(gain, h, x):
    return gain * h + x


@jax.jit
def _flows(gain, xs):
    return jax.vmap(lambda x: bptt.gradient_flow(_step, gain, jnp.ones(2), x, lambda s: jnp.sum(s[-1])))(xs)


@pytest.fixture(scope="module")
def flows() -> dict[str, bptt.analysis.GradientFlow]:
    xs = jax.random.normal(jax.random.key(0), (3, 24, 2))
    return {name: _flows(jnp.float32(gain), xs) for name, gain in GAINS.items()}


def _page(flows: dict[str, bptt.analysis.GradientFlow], settings=SETTINGS, title: str = TITLE) -> str:
    data = diagnose.Data("abc<", jnp.zeros(0), jnp.zeros(0))
    gated = dict.fromkeys(flows)
    return flow_page(title, diagnose.record(settings, data, flows, gated), flows, gated)


@pytest.fixture(scope="module")
def text(flows) -> str:
    return _page(flows)


class Outline(HTMLParser):
    """Every element, as (tag, attributes, text within); what is not closed in order is an error."""

    VOID = frozenset({"meta", "br", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes) -> None:
        assert len(dict(attributes)) == len(attributes)
        self.elements.append((tag, dict(attributes), []))
        if tag not in self.VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attributes) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag) -> None:
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data) -> None:
        for i in self._open:
            self.elements[i][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(a, "".join(t)) for name, a, t in self.elements if name == tag]


@pytest.fixture(scope="module")
def outline(text) -> Outline:
    return Outline(text)


def test_names_are_text_and_every_verdict_stands_first(outline, flows) -> None:
    items = [(a["class"], t) for a, t in outline.all("li") if "class" in a]
    assert items == [(v, f"{name}{v} (3 of 3)") for name, v in zip(GAINS, VERDICTS, strict=True)]
    tags = [tag for tag, _, _ in outline.elements]
    assert tags.index("ul") < tags.index("svg") < tags.index("table")
    assert [t for _, t in outline.all("h3")] == [f"{n}: {v}" for n, v in zip(GAINS, VERDICTS, strict=True)]
    assert [t for _, t in outline.all("title")] == [f"Gradient flow: {TITLE}"]


def test_what_to_try_stands_with_its_recurrence(outline, flows) -> None:
    sections = [said for a, said in outline.all("section") if a["class"] != "live"]
    for said, flow in zip(sections, flows.values(), strict=True):
        assert (flow.advice() == []) == ("Nothing to mend" in said)
        for advice in flow.advice():
            assert advice in said


def test_every_number_of_the_table_and_every_setting(outline, flows) -> None:
    cells = [t for _, t in outline.all("td")]
    for row, flow in enumerate(flows.values()):
        s = flow.summary()
        expected = [f"{s[name]['mean']:.3f}" for name in ("loss", "spectral_norm", "spectral_radius")]
        rate = s["growth_rate"]
        mean, std, steps = rate["mean"], rate["std"], s["horizon"]["median"]
        expected += ["unknown" if math.isnan(mean) else f"{mean:+.4f} ± {std:.4f}"]
        assert cells[6 * row + 4].split()[0] == ("unknown" if math.isnan(steps) else f"{steps:.0f}")
        assert cells[6 * row : 6 * row + 4] == expected
    heads = [t for a, t in outline.all("th") if a["scope"] == "row"][len(flows) :]
    shown = dict(zip(heads, cells[6 * len(flows) :], strict=True))
    assert shown["text"] == "<i>novel</i>&.txt"
    assert (shown["step"], shown["cells"], shown["gain"]) == ('a"b.py:f', "none", "0.5, 2.0")
    assert (shown["float64"], shown["seed"], shown["embed"], shown["hidden"]) == ("no", "1", "not given", "8")
    assert set(SETTINGS.__dict__) < set(shown)
    assert shown["jax"] == jax.__version__
    assert "device" in shown


def test_every_number_stands_under_its_name() -> None:
    numbers = {"loss": 1.0, "spectral_norm": 2.0, "spectral_radius": 3.0}
    record = {name: {"mean": value} for name, value in numbers.items()} | {
        "growth_rate": {"mean": -0.5, "std": 0.25},
        "horizon": {"median": "inf"},
        "horizon_extrapolated": 3,
        "verdict": "steady",
        "verdicts": {"vanishing": 1, "steady": 2},
        "advice": ["this", "that"],
    }
    row = ("gru", "1.000", "2.000", "3.000", "-0.5000 ± 0.2500", "inf", "steady\n(2 of 3)", "- this\n- that")
    assert list(rows({"gru": record})) == [row]
    alone = {"growth_rate": {"mean": -0.5, "std": 0.0}, "verdicts": {"steady": 1, "unmeasured": 2}}
    assert next(rows({"gru": record | alone}))[4] == "-0.5000"  # of one sequence nothing is known of the scatter
    for beyond, horizon in (
        (1, "487"),
        (2, "487\n(extrapolated)"),
    ):  # the median is beyond the sequence if most are
        (row,) = rows({"gru": record | {"horizon": {"median": 487.4}, "horizon_extrapolated": beyond}})
        assert row[5] == horizon
    nothing = {"growth_rate": {"mean": "nan", "std": "nan"}, "horizon": {"median": "nan"}, "verdict": "unmeasured"}
    (row,) = rows({"gru": record | nothing | {"verdicts": {"unmeasured": 3}}})
    assert row[4:7] == ("unknown", "unknown", "unmeasured\n(3 of 3)")
    (row,) = rows({"gru": record | {"growth_rate": {"mean": "-inf", "std": "nan"}}})
    assert row[4] == "-inf"
    assert [name.split()[-1] for name in COLUMNS[1:5]] == ["loss", "norm", "radius", "back"]


def test_nothing_is_fetched_and_no_reference_leaves_the_page(text, outline) -> None:
    assert "://" not in text
    assert re.findall(r"@import|url\((?!#)", text) == []
    tags = {tag for tag, _, _ in outline.elements}
    assert tags.isdisjoint({"link", "iframe", "img", "object", "embed", "base", "form", "i", "b"})
    identifiers = [a["id"] for _, a, _ in outline.elements if "id" in a]
    assert len(identifiers) == len(set(identifiers)) > 100
    for tag, attributes, _ in outline.elements:
        assert not any(name.startswith("on") or name in ("src", "srcset", "xlink:href") for name in attributes)
        reference = attributes.get("href", "#norms-figure_1")
        assert reference[1:] in identifiers or (tag == "image" and reference.startswith("data:image/png;base64,"))
        for target in re.findall(r"url\(#(.*?)\)", " ".join(map(str, attributes.values()))):
            assert target in identifiers
    policy = next(a["content"] for a, _ in outline.all("meta") if "http-equiv" in a)
    (of_data, _), (of_code, code) = outline.all("script")
    assert (of_data, of_code) == ({"type": "application/json", "id": "data"}, {})
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    expected = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    assert policy == expected


def test_it_is_read_aloud(outline) -> None:
    assert outline.all("html")[0][0] == {"lang": "en"}
    levels = [int(tag[1]) for tag, _, _ in outline.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert max(np.diff(levels)) == 1
    assert len(outline.all("caption")) == len(outline.all("table")) == 3
    assert all(a["scope"] in ("row", "col") for a, _ in outline.all("th"))
    figures = outline.all("svg")
    assert len(figures) == len(outline.all("figcaption")) == 1 + 2 * len(GAINS) + 3
    assert all(a["role"] == "img" and {"aria-label", "aria-labelledby"} & set(a) for a, _ in figures)
    identifiers = {a["id"] for _, a, _ in outline.elements if "id" in a}
    for _, attributes, _ in outline.elements:
        assert attributes.get("aria-labelledby", "numbers") in identifiers
        assert attributes.get("for", "numbers") in identifiers
    assert figures[0][0]["aria-label"].endswith("{nan}: non-finite")


def test_every_colour_of_a_figure_has_one_for_the_dark(text, outline) -> None:
    _, dark = outline.all("style")[0][1].split("prefers-color-scheme: dark")
    used = set()
    for tag, attributes, _ in outline.elements:
        if tag in ("path", "use", "g") and "style" in attributes:
            assert re.findall(r": #", attributes["style"]) == []
            used |= set(re.findall(r"var\((--c[0-9a-f]{6}), ", attributes["style"]))
    assert len(used) >= 8
    for name in used:
        assert f"{name}: #" in dark


RTL = "\u05d0\u05d1"  # Hebrew: seen, and written from right to left
HIDDEN = "a\u202eb\x00c\x1b[31m\u2066d\u200f\ue000\ud800e\u2028f\n" + RTL
SHOWN = r"a\u202eb\x00c\x1b[31m\u2066d\u200f\ue000\ud800e\u2028f\n" + RTL


def test_what_cannot_be_seen_is_shown_and_orders_nothing_anew(flows) -> None:
    text = _page({HIDDEN: flows["{nan}"]}, replace(SETTINGS, text=HIDDEN, step=HIDDEN), HIDDEN)
    assert {c for c in text if not c.isprintable()} == {"\n"}
    outline = Outline(text)
    assert [t for _, t in outline.all("bdi")] == [
        SHOWN,
        SHOWN,
    ]  # a name from right to left keeps its verdict behind it
    assert [t for _, t in outline.all("h3")] == [f"{SHOWN}: non-finite"]
    assert [t for _, t in outline.all("title")] == [f"Gradient flow: {SHOWN}"]
    assert next(t for a, t in outline.all("th") if a["scope"] == "row") == SHOWN
    assert [t for _, t in outline.all("td")].count(SHOWN) == 2
    assert SHOWN in outline.all("svg")[0][0]["aria-label"]


def test_same_numbers_same_page(text, flows) -> None:
    assert _page(flows) == text


def test_a_long_sequence_and_many_eigenvalues_stay_small(flows) -> None:
    rng = np.random.default_rng(0)
    norms = rng.standard_normal((3, 6_000)).cumsum(axis=1)
    cloud = rng.standard_normal((3, 20, 128)) + 1j * rng.standard_normal((3, 20, 128))
    flow = flows["{nan}"]
    steps = np.tile(np.arange(1, 21), (3, 1))
    spectra = replace(flow.spectra, eigenvalues=cloud, singular_values=np.abs(cloud), steps=steps)
    flow = jax.tree.map(lambda a: np.repeat(a, 6_000, 1)[:, :6_000] if a.shape[1:2] == (24,) else a, flow)
    signal = replace(flow.signal, adjoint_log_norms=norms)
    flow = replace(flow, signal=signal, spectra=spectra, products=replace(flow.products, log_norms=norms))
    text = _page({"long": flow})
    assert text.count("<image") == 1
    assert len(text) < 1_200_000


def test_the_command_writes_it_beside_the_others_or_nothing(flows, tmp_path, capsys, monkeypatch) -> None:
    """With a name that is HTML, mathematics to matplotlib and markup to rich; and one that is not Unicode."""
    folder, out = tmp_path / "<i>$a^$ [" / "b]&", tmp_path / "out"
    folder.mkdir(parents=True)
    novel = tmp_path / ("novel\udcff.txt" if sys.platform == "linux" else "novel.txt")
    novel.write_text("To be, or not to be, that is the question.")
    step = folder / "mine.py"
    step.write_text("def gru():\n    return lambda p, h, x: h, 0.0, [0.0]\n")
    monkeypatch.setattr(diagnose, "compile_all", lambda recurrences, data: ((r, None) for r in recurrences))
    monkeypatch.setattr(diagnose, "measure", lambda *_: flows["{nan}"])
    arguments = ["diagnose", "--cells", "gru", "--step", f"{step}:gru", "--text", str(novel), "--length", "20"]
    arguments += ["--html", "--out", str(out)]
    assert main(arguments) == 0
    assert f"wrote {out / 'flow.png'}, {out / 'flow.json'} and {out / 'flow.html'}" in capsys.readouterr().out
    names = list(json.loads((out / "flow.json").read_text())["recurrences"])
    assert names == ["gru", f"{step}:gru"]
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert set(before) == {"flow.png", "flow.json", "flow.html"}
    outline = Outline(before["flow.html"].decode())
    assert [t for _, t in outline.all("a")] == names
    assert str(novel).replace("\udcff", r"\udcff") in [t for _, t in outline.all("td")]

    def full(path: Path, *_, **__) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    assert main([*arguments, "--seed", "1"]) == 1
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith("bptt-jax diagnose: could not write the results: [Errno 28] No space left on device")
    assert ".flow.html" in said
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.fixture(scope="module")
def opened(text, tmp_path_factory) -> Iterator[browser.Tab]:
    if browser.executable() is None:
        pytest.skip(f"no browser on the PATH ({', '.join(browser.EXECUTABLES)})")
    folder = tmp_path_factory.mktemp("browser")
    (folder / "flow.html").write_text(text, encoding="utf-8")
    with ExitStack() as stack:
        try:
            tab = stack.enter_context(browser.tab(folder / "profile"))
        except (ConnectionError, TimeoutError) as error:
            pytest.skip(f"{browser.executable()} does not start: {error}")
        tab.resize(360, 800)
        tab.open((folder / "flow.html").as_uri())
        yield tab


def test_a_browser_fetches_nothing_and_complains_of_nothing(opened) -> None:
    urls = [e["request"]["url"] for e in opened.seen("Network.requestWillBeSent")]
    assert [u.split(":")[0] for u in urls if not u.startswith("data:image/png;base64,")] == ["file"]
    assert len(urls) > 1
    assert opened.seen("Network.loadingFailed") == []
    assert opened.seen("Log.entryAdded") == opened.seen("Runtime.consoleAPICalled") == []
    assert opened.seen("Runtime.exceptionThrown") == opened.seen("Page.javascriptDialogOpening") == []
    assert opened.evaluate("document.compatMode") == "CSS1Compat"
    names = opened.evaluate("[...document.querySelectorAll('.verdicts a')].map(a => a.textContent)")
    assert names == list(GAINS)


LEFT, RIGHT = (
    f"((...all) => Math.{of}(...all.map(s => document.querySelector(s).getBoundingClientRect().{side})))"
    for of, side in (("min", "left"), ("max", "right"))
)


@pytest.mark.parametrize("width", [320, 400, 800, 1280])
def test_it_fits_the_window_and_its_figures_can_be_read(opened, width) -> None:
    opened.resize(width, 800)
    assert opened.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    beyond = (
        "e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth || e.getBoundingClientRect().right > innerWidth"
    )
    assert (
        opened.evaluate(
            f"[...document.querySelectorAll('main *:not(svg *, thead, thead *, fieldset bdi)')].filter({beyond}).length"
        )
        == 0
    )
    left, right = opened.evaluate(f"[{LEFT}('.verdicts', 'main figure'), {RIGHT}('.verdicts', 'main figure')]")
    assert right - left > 0.95 * (min(width, 1088) - 32)
    # Text of matplotlib's 10 points, in pixels of the screen.
    scale = "s => s.getBoundingClientRect().width / s.viewBox.baseVal.width"
    shown = "[...document.querySelectorAll('svg.drawn')].filter(s => s.getBoundingClientRect().width)"
    scales = opened.evaluate(f"{shown}.map({scale})")
    assert len(scales) == 2 * len(GAINS)
    assert 10 < 10 * min(scales) <= 10 * max(scales) < 20


# Colours as computed: of the ground, of all words (those in a figure are filled as it is), of the curves.
COLOURS = """
(() => {
  const of = (name, elements) => [...elements].map(e => getComputedStyle(e)[name]);
  const curves = [...document.querySelectorAll("svg path")].filter(e => parseFloat(e.style.strokeWidth) >= 1.2);
  const words = of("color", document.querySelectorAll("body *:not(svg *)"));
  const fills = of("fill", document.querySelectorAll("svg"));
  return [of("backgroundColor", [document.body])[0], [...words, ...fills], of("stroke", curves)];
})()
"""


def _luminance(color: str) -> float:
    """Relative, of sRGB (WCAG 2.2)."""
    levels = np.array(re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", color).groups(), np.float64) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


def test_dark_and_light_as_the_user_prefers_and_readable_in_both(opened) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        opened.prefer(scheme)
        color, words, curves = opened.evaluate(COLOURS)
        ground = _luminance(color)
        assert min(_contrast(ground, _luminance(c)) for c in set(words)) > 4.5  # WCAG 2.2, level AA
        assert len(curves) > 4 * 3
        assert min(_contrast(ground, _luminance(c)) for c in set(curves)) > 2
        grounds.append(ground)
    assert grounds[0] > 0.9
    assert grounds[1] < 0.05


def test_large_numbers_keep_a_column_narrow() -> None:
    names = ("loss", "spectral_norm", "spectral_radius")
    numbers = {k: {"mean": v} for k, v in zip(names, (0.12345, 1e38, "inf"), strict=True)}
    rest = {
        "growth_rate": {"mean": 0, "std": 0},
        "horizon": {"median": 1},
        "horizon_extrapolated": 0,
        "verdict": "steady",
    }
    (row,) = rows({"a": numbers | rest | {"verdicts": {"steady": 1}, "advice": []}})
    assert row[1:4] == ("0.123", "1e+38", "inf")


def test_provenance_of_sources_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(report, "version", version)
    assert report.provenance()["versions"]["bptt_jax"] == "not installed"


def test_a_long_message_is_cut() -> None:
    assert report.one_line(ValueError("a\nb")) == "ValueError: a b"
    assert report.one_line(ValueError("a " * 9999)) == "ValueError: " + "a " * 250 + " ..."
