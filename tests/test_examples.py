"""The scripts in examples/ run, a few updates each, and write what they promise."""

import csv
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Runs one with JAX as users have it; gives the folder that it wrote to."""

    def run(name: str, updates: int = 5, every: int = 2) -> Path:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(tmp_path, updates=updates, every=every)
        return tmp_path

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Other libraries' own warnings are not ours, nor is a verdict that changes.
pytestmark = pytest.mark.filterwarnings("default")


def test_every_example_is_run() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"csv_optax", "tensorboard_optax", "wandb_optax", "flax_nnx", "flipflop"}


def test_csv_optax(run: Callable[[str], Path]) -> None:
    folder = run("csv_optax")
    with (folder / "monitor.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["update"] for row in rows] == ["0", "2", "4"]
    assert all(float(row["bptt/growth_rate"]) < 0 for row in rows)
    records = lines(folder / "monitor.jsonl")
    assert [len(record["histograms"]["bptt/singular_values"]) for record in records] == [64] * 3


def test_tensorboard_optax(run: Callable[[str], Path]) -> None:
    events = pytest.importorskip("tensorboardX.proto.event_pb2")
    folder = run("tensorboard_optax")
    (path,) = folder.glob("events.out.tfevents.*")
    tags = []
    data = path.read_bytes()
    while data:  # TFRecord: length (8 bytes), its checksum (4), the event, its checksum (4)
        size = int.from_bytes(data[:8], "little")
        event = events.Event.FromString(data[12 : 12 + size])
        tags += [(event.step, value.tag, value.WhichOneof("value")) for value in event.summary.value]
        data = data[16 + size :]
    assert {step for step, _, _ in tags} == {0, 2, 4}
    assert (4, "bptt/growth_rate", "simple_value") in tags
    assert (4, "bptt/singular_values", "histo") in tags


def test_wandb_optax(run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = run("wandb_optax")
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content = path.read_bytes()
    assert b"bptt/growth_rate" in content
    assert b"bptt/singular_values" in content


def test_flax_nnx(run: Callable[[str], Path]) -> None:
    pytest.importorskip("flax")
    folder = run("flax_nnx")
    records = lines(folder / "monitor.jsonl")
    assert [record["update"] for record in records] == [0, 2, 4]
    assert {"bptt/growth_rate", "bptt/horizon", "bptt/monitor/share"} <= records[0]["scalars"].keys()


@pytest.mark.exhaustive
def test_flipflop(run: Callable[..., Path]) -> None:
    """A cube: corners, and saddles on its edges, on its faces and in its centre, of which a few may be missed."""
    folder = run("flipflop", updates=2000, every=100)
    points = json.loads((folder / "flipflop.json").read_text())
    unstable = [p["unstable"] for p in points]
    corners = [p["outputs"] for p in points if p["unstable"] == 0]
    assert {p["kind"] for p in points if p["unstable"] == 0} == {"stable"}
    assert sorted([round(b) for b in bits] for bits in corners) == [
        list(c) for c in itertools.product((-1, 1), repeat=3)
    ]
    assert {p["kind"] for p in points if p["unstable"] > 0} == {"saddle"}
    assert 10 <= unstable.count(1) <= 12
    assert 4 <= unstable.count(2) <= 6
    assert unstable.count(3) <= 1
    for p in points:  # as many bits as there are unstable directions are undecided
        assert p["slowest"] < 1 if p["unstable"] == 0 else p["slowest"] > 1
        if p["unstable"] == 3:
            assert max(map(abs, p["outputs"])) < 0.3
    assert (folder / "flipflop.png").read_bytes().startswith(b"\x89PNG")
