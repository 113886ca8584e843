"""``bptt-jax dynamics``: what is measured is what the functions measure (of a run: tests/test_train_command.py)."""

import json
import math

import numpy as np
import pytest

from bptt_jax.cli import dynamics
from bptt_jax.cli.main import main
from bptt_jax.leaves import to_jsonable

# Two units, each for itself: h1 is bistable about 0, h2 decays by a factor of 0.5.
STEP = """
import jax, jax.numpy as jnp
import bptt_jax as bptt
def make(input_size):
    u = jnp.zeros((2, input_size)).at[0].set(0.1)
    def step(w, h, x):
        return jnp.array([jnp.tanh(w * h[0] + u[0] @ x), 0.5 * h[1]])
    return step, jnp.float32(1.5), jnp.array([0.3, 0.4])
def raises(input_size):
    def step(w, h, x):
        raise RuntimeError("no luck")
    return step, None, jnp.zeros(2)
def padded():
    step, w, h = make(1)
    xs = jnp.array([[1.0, 3.0, jnp.nan], [5.0, jnp.nan, jnp.nan]])[:, :, None]
    sequences = jax.vmap(lambda x, real: bptt.Sequence(x, mask=real))(xs, jnp.isfinite(xs[:, :, 0]))
    return {"step": step, "params": w, "state0": h, "xs": sequences, "loss": lambda states: states[-1, 0]}
"""


@pytest.fixture
def step_file(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(STEP)
    return str(tmp_path / "mine.py")


@pytest.mark.exhaustive
def test_a_step_of_ones_own(step_file, tmp_path, capsys) -> None:
    options = ["--length", "30", "--batch", "2", "--starts", "40", "--dt", "0.5", "--perturbation", "10"]
    assert main(["dynamics", "--step", f"{step_file}:make", *options, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "dynamics.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "dynamics.json").read_text())
    (found,) = numbers["recurrences"].values()
    assert found["kinds"] == {"stable": 2, "saddle": 1}
    h = 0.5
    for _ in range(200):
        h = math.tanh(1.5 * h)
    slope = 1.5 * (1 - h * h)
    for point in found["fixed_points"][:2]:
        assert abs(point["state"][0][0]) == pytest.approx(h, rel=1e-4)
        assert point["modulus"] == pytest.approx(max(slope, 0.5), rel=1e-4)
        assert point["slowest_time"] == pytest.approx(-0.5 / math.log(max(slope, 0.5)), rel=1e-3)
        assert point["escape_time"] is None
    (saddle,) = found["fixed_points"][2:]
    assert saddle["escape_time"] == pytest.approx(0.5 / math.log(1.5), rel=1e-4)
    assert sum(point["starts"] for point in found["fixed_points"]) == found["search"]["converged"] == 40
    assert len(found["exponents"]["rates"]) == 2
    assert found["angles"] is None  # nothing grows
    assert "2 stable, 1 saddle, from 40 of 40 starts" in printed
    assert "│ saddle │" in printed
    assert "nats per step" in printed
    assert main(["dynamics", "--step", f"{step_file}:make", *options, "--out", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.pop("files") == [str(tmp_path / "dynamics.png"), str(tmp_path / "dynamics.json")]
    assert told == json.loads((tmp_path / "dynamics.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--checkpoint, --step: expected one of them"),
        (["--checkpoint", "a", "--step", "b:c"], "--checkpoint, --step: expected one of them"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--checkpoint", "nowhere", "--length", "3"], "the run has its own settings; drop --length"),
        (["--step", "nowhere.py:make"], "--step: nowhere.py: no such file"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["dynamics", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bptt-jax dynamics: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_raises(step_file, tmp_path, capsys) -> None:
    few = ["--length", "3", "--batch", "1"]
    assert main(["dynamics", "--step", f"{step_file}:raises", *few, "--out", str(tmp_path)]) == 2
    assert "raises: RuntimeError: no luck" in capsys.readouterr().err
    assert not (tmp_path / "dynamics.json").exists()


def test_a_single_sequence_has_its_own_exponents(step_file, tmp_path, capsys) -> None:
    options = ["--length", "30", "--starts", "5", "--vectors", "1", "--out", str(tmp_path), "--json"]
    found = []
    for batch in ("1", "2"):
        assert main(["dynamics", "--step", f"{step_file}:make", "--batch", batch, *options]) == 0
        (of_one,) = json.loads(capsys.readouterr().out)["recurrences"].values()
        found.append(of_one["exponents"])
    np.testing.assert_allclose(found[0]["rates"], found[1]["rates"], rtol=0.5)
    assert 0 < found[0]["errors"][0] < 0.1


def test_the_mean_input_is_that_of_real_steps(step_file, tmp_path, capsys) -> None:
    options = ["--starts", "5", "--vectors", "1", "--out", str(tmp_path), "--json"]
    assert main(["dynamics", "--step", f"{step_file}:padded", "--input", "mean", *options]) == 0
    (found,) = json.loads(capsys.readouterr().out)["recurrences"].values()
    h = 0.5
    for _ in range(200):
        h = math.tanh(1.5 * h + 0.1 * (1 + 3 + 5) / 3)
    assert found["fixed_points"][0]["state"][0][0] == pytest.approx(h, rel=1e-4)


def test_of_many_points_the_first_are_shown() -> None:
    point = dict.fromkeys(("speed", "modulus", "slowest_time", "slowest_period", "escape_time"), 0.5)
    numbers = {
        "fixed_points": 40 * [point | {"kind": "stable", "starts": 1, "unstable": 0}],
        "search": {"starts": 40, "converged": 40, "outliers": 0},
        "kinds": {"stable": 40},
        "exponents": {"rates": [0.1, 0.05, math.nan], "errors": [0.02, math.nan, math.nan]},
        "angles": {"min": 0.25, "max": 1.5},
    }
    assert [row[0] for row in dynamics.rows(numbers)] == [str(k) for k in range(1, 31)]
    first, second, third = dynamics.statements(numbers)
    assert first == "fixed points: 40 stable, from 40 of 40 starts; the first 30 are shown"
    assert second == "largest Lyapunov exponents, driven: +0.1000 ± 0.0200, +0.0500, unknown nats per step"
    assert third == "angle between unstable and other directions: 0.25 to 1.5 rad"


def test_exponents_of_what_a_step_erases_and_points_far_away() -> None:
    """As JSON has them."""
    exponents = to_jsonable({"rates": [-0.5, -math.inf, math.nan], "errors": [0.25, 0.0, math.nan]})
    numbers = {
        "fixed_points": [],
        "search": {"starts": 1, "converged": 1, "outliers": 1},
        "kinds": {},
        "angles": None,
    }
    first, second = dynamics.statements(numbers | {"exponents": exponents})
    assert (
        first == "fixed points: none, from 1 of 1 start; 1 came to points far from all starts, which are left out"
    )
    assert second == "largest Lyapunov exponents, driven: -0.5000 ± 0.2500, -inf, unknown nats per step"
