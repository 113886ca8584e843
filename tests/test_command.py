"""The command, mostly in this process; what needs signals or global flags runs in one of its own."""

import json
import math
import os
import platform
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest
from slices import covering

import bptt_jax
from bptt_jax import checks, interrupts
from bptt_jax.cli import diagnose, own_step
from bptt_jax.cli.main import main
from bptt_jax.cli.report import BadArgument, in_options

SMALL = ["diagnose", "--hidden", "8", "--length", "20", "--batch", "2"]
STEP = """
import jax.numpy as jnp
def make(input_size):
    print("a word of the user's own")
    params = {"w": 0.5 * jnp.eye(4), "u": jnp.ones((4, input_size)) / input_size}
    def step(p, h, x):
        return {"h": jnp.tanh(p["w"] @ h["h"] + p["u"] @ x)}
    return step, params, {"h": jnp.zeros(4)}
def with_readout(input_size):
    step, params, state0 = make(input_size)
    return step, params, state0, lambda state: jnp.zeros(103).at[:4].set(state["h"])
def linear():
    return lambda p, h, x: p * h + x.sum(), jnp.float32(0.9), jnp.zeros(3)
def breaks(input_size):
    return lambda p, h, x: h[:1], None, jnp.zeros(3)
def raises(input_size):
    raise RuntimeError("no\\nluck")
def looks_up(input_size):
    return lambda p, h, x: p["w"] * h, {}, jnp.zeros(3)
number = 3
"""


@pytest.fixture
def step_file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(STEP)
    return str(path)


@pytest.fixture(scope="module")
def default_run(tmp_path_factory) -> tuple[str, dict, Path]:
    out = tmp_path_factory.mktemp("run")
    done = subprocess.run(
        [sys.executable, "-m", "bptt_jax", *SMALL, "--out", str(out)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((out / "flow.json").read_text()), out


def test_what_was_compiled_is_kept(default_run, tmp_path) -> None:
    """In the cache folder of the user; one that cannot be written, or is the user's own choice, is left alone."""
    kept = [path.name for path in Path(os.environ["XDG_CACHE_HOME"]).glob("bptt_jax/*/*")]
    assert any(name.startswith("jit_") for name in kept)
    program = (
        "import jax, bptt_jax.cli.main as m; m.main = lambda: print(jax.config.jax_compilation_cache_dir); m.run()"
    )
    (tmp_path / "file").touch()
    own = str(tmp_path / "own")
    for changed, expected in (
        ({"XDG_CACHE_HOME": str(tmp_path / "file" / "below")}, "None"),
        ({"JAX_COMPILATION_CACHE_DIR": own}, own),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | changed, capture_output=True, text=True, timeout=100
        )
        assert done.stdout == f"{expected}\n", done.stderr


def test_prints_the_table_and_says_where_the_files_are(default_run) -> None:
    printed, _, out = default_run
    for name in ("rnn (gain 0.5)", "rnn (gain 2)", "gru", "lstm", "vanishing", "nats/step back", "horizon"):
        assert name in printed
    assert f"wrote {out / 'flow.png'} and {out / 'flow.json'}" in printed
    assert "spectra: of 20 of the 20 steps of every sequence" in printed
    assert (out / "flow.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in out.iterdir()) == ["flow.json", "flow.png"]


def test_json_has_settings_versions_and_figures(default_run) -> None:
    _, content, _ = default_run
    assert content["settings"]["hidden"] == 8
    assert content["settings"]["cells"] == ["rnn", "gru", "lstm"]
    assert {"jax", "jaxlib", "numpy", "python", "bptt_jax"} <= set(content["versions"])
    vanishing = content["recurrences"]["rnn (gain 0.5)"]
    assert vanishing["verdict"] == "vanishing"
    assert len(vanishing["per_step"]["adjoint_log_norms"]["median"]) == 20
    # Of two sequences the outer quantiles are both of them, and the shares of each sum to one.
    shares, gains = (vanishing["per_step"][name] for name in ("contribution_shares", "error_log_gains"))
    assert sum(shares["q10"]) + sum(shares["q90"]) == pytest.approx(2, abs=1e-5)
    # The loss is a cross-entropy over the vocabulary, at initialisation near that of guessing.
    assert vanishing["loss"]["mean"] == pytest.approx(math.log(len(content["vocabulary"])), abs=1.5)
    slope = np.diff([gains["q10"], gains["q90"]]).mean()  # the rate is that of a fitted line
    assert vanishing["growth_rate"]["mean"] == pytest.approx(-slope, rel=0.2)


def test_a_step_of_ones_own_and_json_alone_on_stdout(step_file, tmp_path, capsys) -> None:
    """What the user's own code prints is not JSON."""
    assert main([*SMALL, "--step", f"{step_file}:make", "--out", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr()
    numbers = json.loads(printed.out, parse_constant=pytest.fail)
    assert numbers.pop("files") == [str(tmp_path / "flow.png"), str(tmp_path / "flow.json")]
    assert numbers == json.loads((tmp_path / "flow.json").read_text())
    assert list(numbers["recurrences"]) == ["make"]
    assert printed.err == "a word of the user's own\nmeasuring make (1 of 1)\n"


def test_a_readout_of_ones_own_and_a_factory_without_argument(step_file, tmp_path, capsys) -> None:
    assert main([*SMALL, "--step", f"{step_file}:with_readout", "--loss", "all", "--out", str(tmp_path)]) == 0
    first = json.loads((tmp_path / "flow.json").read_text())["recurrences"]["with_readout"]
    assert first["loss"]["mean"] == pytest.approx(math.log(103), abs=0.2)
    assert "with_readout" in capsys.readouterr().out
    linear = ["--step", f"{step_file}:linear", "--cells", "gru", "--quiet"]
    assert main([*SMALL, *linear, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    content = json.loads((tmp_path / "flow.json").read_text())["recurrences"]
    assert list(content) == ["gru", "linear"]
    assert content["linear"]["growth_rate"]["mean"] == pytest.approx(math.log(0.9), rel=1e-4)


@pytest.mark.parametrize("library", ["matplotlib", "json", "scipy", "bptt_jax", "xarray", "my.own"])
def test_a_file_takes_no_librarys_place(library, tmp_path, monkeypatch) -> None:
    """It has the library itself, its neighbours, which know it, and data classes, which look their module up."""
    path = tmp_path / f"{library}.py"
    path.write_text(f"""
import dataclasses, importlib, sys
import jax.numpy as jnp
import neighbour
@dataclasses.dataclass
class Gain:
    value: "float" = 0.5
def make():
    import late_neighbour
    if {library!r} != "my.own":
        assert importlib.import_module({library!r}).__file__ != __file__
    assert importlib.import_module("xarray.core").__file__ != __file__
    return lambda p, h, x: p * h, jnp.float32(Gain().value * neighbour.ONE), jnp.zeros(3)
""")
    (tmp_path / "neighbour.py").write_text("ONE = 1.0\n")
    (tmp_path / "late_neighbour.py").write_text("")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "xarray", raising=False)  # as before anything needs it
    before = dict(sys.modules)
    try:
        step, gain, state0, *rest = own_step.load(f"{path}:make", 5)
        assert (float(step(gain, 2.0, None)), state0.shape, rest) == (1.0, (3,), [None] * 5)
        changed = {name for name, module in before.items() if sys.modules.get(name) is not module}
        assert changed == set()
        assert sys.modules.get(library) is not sys.modules[step.__module__]
    finally:
        for name in sys.modules.keys() - before.keys():
            del sys.modules[name]


def test_a_file_and_its_neighbours_know_each_other_by_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "first_of_two.py").write_text(
        "import second_of_two\n"
        "class Kind: pass\n"
        "def make(): return lambda p, h, x: h, None, [0.0, second_of_two.kind() is Kind]\n"
    )
    (tmp_path / "second_of_two.py").write_text(
        "def kind():\n    import first_of_two\n    return first_of_two.Kind\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    for _ in range(2):
        assert own_step.load(f"{tmp_path / 'first_of_two.py'}:make", 5).state0 == [0.0, True]
    for name in ("first_of_two", "second_of_two"):
        monkeypatch.delitem(sys.modules, name)


SETTINGS = diagnose.Settings(
    checkpoint=None,
    text=None, embed=None, cells=("rnn",), gain=(1.0,), alpha=None, hidden=8, length=20, batch=3, loss="last",
    step=None, float64=False, seed=1,
)  # fmt: skip


def test_own_text_embedded(tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abracadabra " * 30)
    one_hot, _ = diagnose.prepare(replace(SETTINGS, text=str(text)))
    data, (recurrence,) = diagnose.prepare(replace(SETTINGS, text=str(text), embed=3))
    assert data.vocabulary == one_hot.vocabulary == " abcdr"
    np.testing.assert_array_equal(one_hot.inputs.sum(axis=-1), 1)
    # The same windows; equal characters have equal embeddings, others others.
    codes, vectors = np.argmax(one_hot.inputs, axis=-1).ravel(), np.asarray(data.inputs).reshape(-1, 3)
    assert vectors.shape == (60, 3)
    assert recurrence.params.input.shape == (8, 3)
    assert len(np.unique(vectors, axis=0)) == len(np.unique(codes)) > 3
    np.testing.assert_array_equal(data.targets[:, :-1], np.argmax(one_hot.inputs, axis=-1)[:, 1:])


def test_the_loss_of_the_last_step_and_of_all() -> None:
    _, (last,) = diagnose.prepare(SETTINGS)
    _, (all_steps,) = diagnose.prepare(replace(SETTINGS, loss="all"))
    states = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    targets, (weights, bias) = np.arange(3), last.readout_weights
    logits = states @ np.asarray(weights).T + np.asarray(bias)
    each = np.log(np.sum(np.exp(logits), axis=1)) - logits[np.arange(3), targets]
    for recurrence, expected in ((last, each[-1]), (all_steps, each.mean())):
        assert recurrence.loss(last.readout_weights, states, targets) == pytest.approx(expected, rel=1e-5)


def test_a_leaky_network_has_the_leak_that_it_is_given() -> None:
    _, recurrences = diagnose.prepare(replace(SETTINGS, cells=("leaky_rnn",), gain=(0.5, 2.0), alpha=0.25))
    assert [r.name for r in recurrences] == ["leaky_rnn (gain 0.5)", "leaky_rnn (gain 2)"]
    r = recurrences[1]
    nothing = r.params._make(np.zeros(a.shape, np.float32) for a in r.params)
    x = np.zeros(r.params.input.shape[1], np.float32)
    np.testing.assert_allclose(r.step(nothing, np.ones(8, np.float32), x), 0.75)


def test_groups_divide_the_batch() -> None:
    for batch, group in ((1, 1), (4, 4), (6, 3), (7, 1), (8, 4), (10, 2)):
        assert diagnose._group(diagnose.Data(None, None, np.zeros(batch))) == group


def test_spectra_are_of_fewer_steps_where_there_are_many_sequences(monkeypatch) -> None:
    told = []
    monkeypatch.setattr(diagnose, "_compile", lambda step, loss, spectra, *_: told.append(spectra))
    _, recurrences = diagnose.prepare(SETTINGS)
    for batch in (1, 8, 16, 64):
        data = diagnose.Data(None, np.zeros((batch, 200, 1)), np.zeros(batch))
        assert len(list(diagnose.compile_all(recurrences, data))) == 1
    assert told == [20, 20, 10, 5]


def test_same_seed_same_numbers_other_seed_others() -> None:
    (data1, (r1,)), (data2, (r2,)), (data3, (r3,)) = (
        diagnose.prepare(replace(SETTINGS, seed=seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(data1.inputs, data2.inputs)
    np.testing.assert_array_equal(r1.params.recurrent, r2.params.recurrent)
    assert np.any(data1.inputs != data3.inputs)
    assert np.any(r1.params.recurrent != r3.params.recurrent)


@pytest.mark.exhaustive
def test_double_precision(step_file, tmp_path) -> None:
    arguments = [*SMALL, "--float64", "--cells", "gru", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "bptt_jax", *arguments], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "flow.json").read_text())["recurrences"]["gru"]["singular_values"]["max"]
    assert max(values) < 2


BAD = [
    (["--hidden", "0"], "--hidden: expected at least 1, got 0"),
    (["--hidden", "many"], "--hidden: expected an integer, got 'many'"),
    (["--length", "-3"], "--length: expected at least 1, got -3"),
    (["--batch", "0"], "--batch: expected at least 1"),
    (["--cells", "transformer"], "--cells: invalid choice: 'transformer'"),
    (["--gain", "nan"], "--gain: expected a positive number, got nan"),
    (["--alpha", "1.5"], "--alpha: expected at most 1, got 1.5"),
    (["--gain", "0"], "--gain: expected a positive number, got 0"),
    (["--loss", "some"], "--loss: invalid choice"),
    (["--seed", "-1"], "--seed: expected 0 to"),
    (["--seed", "2147483648"], "--seed: expected 0 to 2147483647"),
    (["--embed", "0"], "--embed: expected at least 1"),
    (["--cells", "gla", "--hidden", "3"], "diagnose: gla: --hidden: expected a multiple of heads, 2, got 3"),
    (["--text", "absent.txt"], "--text: absent.txt: No such file or directory"),
    (["--text", "{tmp}/bytes.bin"], "expected UTF-8 text, got byte 0"),
    (["--text", "{tmp}/empty.txt"], "--text: expected at least one character"),
    (["--text", "{tmp}/short.txt"], "expected more than 20 characters for windows of 20, got 5"),
    (["--text", "{tmp}"], "Is a directory"),
    (["--step", "mine.py"], "--step: expected FILE_OR_MODULE:FACTORY, got 'mine.py'"),
    (["--step", "absent.py:make"], "--step: absent.py: no such file"),
    (["--step", "no_such_module_at_all:make"], "importing no_such_module_at_all raised ModuleNotFoundError"),
    (["--step", "{step}:absent"], "has no function absent"),
    (["--step", "{step}:number"], "has no function number"),
    (["--step", "{step}:raises"], "raises raised RuntimeError: no luck"),
    (["--step", "{step}:breaks"], "breaks: ValueError: step: must keep the shape of state, [3], got [1]"),
    (["--step", "{step}:looks_up"], "looks_up: KeyError: 'w'"),
    (["--step", "json:dumps"], "dumps must return (step, params, state0)"),
    (["--out", "{tmp}/short.txt"], "--out: "),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_argument_gets_one_line_and_status_2(arguments, message, step_file, tmp_path, capsys) -> None:
    (tmp_path / "bytes.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("abcde")
    arguments = [a.format(tmp=tmp_path, step=step_file) for a in arguments]
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    try:
        status = main([*SMALL, *arguments, *out])
    except SystemExit as stop:
        status = stop.code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("measuring ")]
    assert status == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not list((tmp_path / "out").glob("*"))


def test_what_would_take_hours_is_refused_without_arguments_that_the_command_has_not(
    monkeypatch, step_file, tmp_path, capsys
) -> None:
    monkeypatch.setattr(checks, "_MOST_OPERATIONS", 1e3)
    assert main([*SMALL, "--step", f"{step_file}:make", "--out", str(tmp_path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("measuring ")]
    assert "make: of a state of D = 4 numbers, norms of products and spectra over T = 20 steps would take" in line
    assert line.endswith("of fewer units or steps it would take less")
    assert not re.search(r"\w=", line)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("hidden_size: expected 2", "--hidden: expected 2"),
        ("ValueError: hidden_size: expected 2", "ValueError: --hidden: expected 2"),
        ("length: hidden_size: 2", "--length: hidden_size: 2"),
        ("RuntimeError: out of luck", "RuntimeError: out of luck"),
        ("out of length: 2", "out of length: 2"),
    ],
)
def test_arguments_of_the_library_are_options_of_the_command(message, shown) -> None:
    assert in_options(message) == shown


def test_all_commands_have_the_same_habits(capsys) -> None:
    """And the statuses are written down."""
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    commands = re.findall(r"^    ([a-z-]+)(?: |$)", told, re.MULTILINE)
    assert set(commands) >= {"diagnose", "train", "dynamics", "atlas", "completion"}
    for status in ("0 done", "1 a file", "2 an argument", "130 interrupted", "143 terminated"):
        assert status in told
    for command in set(commands) - {"completion"}:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        told = capsys.readouterr().out
        assert "--quiet" in told
        assert "--json" in told
        assert "examples:" in told


def test_version_says_what_is_computed_with_and_where(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"bptt_jax {metadata.version('bptt_jax')}, jax {jax.__version__}, jaxlib ")
    assert f"python {platform.python_version()}, {jax.devices()[0].platform}: " in line


@pytest.mark.parametrize("how", [["-m", "bptt_jax"], ["{}/bptt-jax"]])
def test_an_interrupt_while_it_is_imported_is_one_line(how, tmp_path) -> None:
    """Of `python -m bptt_jax`, and of the script that is installed."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt:\n    pass\n"
    )
    (tmp_path / "bptt-jax").write_text("from bptt_jax.cli.main import run\n")
    path = os.pathsep.join([str(tmp_path), str(Path(bptt_jax.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, *(a.format(tmp_path) for a in how), "diagnose"],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "bptt-jax: interrupted; nothing was begun\n"


def test_a_library_sets_no_signal() -> None:
    assert signal.getsignal(signal.SIGINT) is not interrupts.end


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], {"train"}),
        (["train", "copy"], {"copy-memory"}),
        (["diagnose", "--chec"], {"--checkpoint"}),
        (["diagnose", "--cells", "gru", "ls"], {"lstm"}),
        (["diagnose", "--weights", "mod"], {"model.npz", "models"}),
        (["diagnose", "--checkpoint", "mo"], {"models"}),
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="completes in bash")
def test_completion(words, expected, tmp_path, capsys) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "model.npz").touch()
    (tmp_path / "models").mkdir()
    line = " ".join(map(shlex.quote, ["bptt-jax", *words]))
    ask = f"source ./script; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _shtab_bptt_jax; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (set(done.stdout.split()), done.stderr) == (expected, "")


def test_completion_of_other_shells(capsys) -> None:
    for shell in ("zsh", "fish"):
        assert main(["completion", shell]) == 0
        told = capsys.readouterr().out
        assert "bptt-jax" in told
        assert "checkpoint" in told
        assert "gated_deltanet" in told
    with pytest.raises(SystemExit) as stop:
        main(["completion", "csh"])
    assert stop.value.code == 2


def test_as_a_module_it_has_the_same_status(monkeypatch) -> None:
    monkeypatch.setattr("bptt_jax.cli.main.run", lambda: 2)
    monkeypatch.delitem(sys.modules, "bptt_jax.__main__", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("bptt_jax", run_name="__main__")
    assert stop.value.code == 2


def test_help_has_examples(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["diagnose", "--help"])
    assert stop.value.code == 0
    assert "bptt-jax diagnose --cells gru lstm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "status"), covering([(signal.SIGINT, 130), (signal.SIGTERM, 143)], (signal.SIGTERM, 143))
)
def test_a_signal_that_something_caught(number, status, tmp_path) -> None:
    """JAX 0.8 catches everything where it looks whether an index is a number; so may a step of one's own."""
    (tmp_path / "greedy.py").write_text(
        "import signal\n"
        "def make(size):\n"
        "    try:\n"
        f"        signal.raise_signal({int(number)})\n"
        "    except BaseException:\n"
        "        pass\n"
        "    return (lambda w, h, x: w * h), 0.5, __import__('jax').numpy.ones(3)\n"
    )
    command = [sys.executable, "-m", "bptt_jax", *SMALL, "--step", "greedy.py:make", "--out", "results"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    assert done.stderr.endswith("; no file was written\n")
    assert not list((tmp_path / "results").iterdir())


def test_interrupted_leaves_nothing(tmp_path) -> None:
    """SIGINT while it measures: status 130, one line, and the files of an earlier run untouched."""
    (tmp_path / "flow.json").write_text("before")
    arguments = [
        "diagnose",
        "--cells",
        "rnn",
        "--gain",
        "1",
        "--length",
        "1000",
        "--batch",
        "64",
        "--out",
        str(tmp_path),
    ]
    command = [sys.executable, "-m", "bptt_jax", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline().startswith("measuring")
            process.send_signal(signal.SIGINT)
            _, rest = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "bptt-jax diagnose: interrupted; no file was written"
    assert "Traceback" not in rest
    assert [p.name for p in tmp_path.iterdir()] == ["flow.json"]
    assert (tmp_path / "flow.json").read_text() == "before"


def test_as_many_recurrences_as_are_asked_for() -> None:
    gains = tuple(np.linspace(0.5, 2, 70))
    cells = ("rnn", "lru", "slstm", "gated_deltanet")
    _, made = diagnose.prepare(replace(SETTINGS, cells=cells, gain=gains, hidden=2))
    assert [r.name for r in made[-4:]] == ["rnn (gain 2)", *cells[1:]]
    assert len(made) == 73
    assert [r.gated for r in made[-4:]] == [False, None, True, None]
    with pytest.raises(BadArgument, match="gated_deltanet: --hidden: expected a multiple of heads, 2, got 3"):
        diagnose.prepare(replace(SETTINGS, cells=cells, hidden=3))
