"""What the benchmarks share: a case that fails, or runs out of time, takes nothing with it."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_day
    import measure

    return measure, gpu_day


def test_rows_are_on_disk_after_every_case_and_a_failure_is_named(benchmarks, tmp_path, capsys) -> None:
    measure, _ = benchmarks
    rows = measure.Rows(tmp_path, "name", {"size": 2})

    def run(a, b):
        if a == b:
            raise SystemExit("the same")
        return {"both": a + b}

    rows.measure(run, 1, 2)
    rows.measure(run, 3, 3)
    assert json.loads((tmp_path / "name.part.json").read_text())["results"] == {
        "rows": [{"both": 3}],
        "failed": {"3 3": "SystemExit: the same"},
    }
    rows.measure(run, 4, 5)
    assert [row["both"] for row in rows] == [3, 9]
    with pytest.raises(SystemExit, match="3 3: SystemExit: the same"):
        rows.end()
    assert not (tmp_path / "name.part.json").exists()
    assert "failed: ('3 3'" in capsys.readouterr().out
    measure.Rows(tmp_path, "name", {}).end()  # of none: none failed


def test_a_part_that_runs_out_of_time_ends_with_its_children(benchmarks, tmp_path, monkeypatch) -> None:
    measure, _ = benchmarks
    log = tmp_path / "log"

    class WhenItHasBegun(threading.Thread):  # in place of a timer: the time is over as soon as there is a line
        def __init__(self, _, end):
            super().__init__(target=self.watch, args=(end,), daemon=True)

        def watch(self, end):
            while not (log.exists() and log.read_text().endswith("\n")):
                time.sleep(0.01)
            end()

        def cancel(self):
            pass

    monkeypatch.setattr(measure.threading, "Timer", WhenItHasBegun)
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    command = [sys.executable, "-c", child + "print(p.pid, flush=True); p.wait()"]
    assert measure.run_within(command, log, 60.0)[0] is None
    grandchild = int(log.read_text())
    for _ in range(1000):  # it is dead at once, and gone when init has seen it
        try:
            os.kill(grandchild, 0)
        except ProcessLookupError:
            break
        if Path(f"/proc/{grandchild}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.01)
    else:
        pytest.fail("it runs on")


def test_status_and_output_of_a_part(benchmarks, tmp_path, capsys) -> None:
    measure, _ = benchmarks
    assert (
        measure.run_within([sys.executable, "-c", "print(1); raise SystemExit(3)"], tmp_path / "log", 60.0)[0] == 3
    )
    assert measure.run_within([sys.executable, "-c", "print(2)"], tmp_path / "log", 60.0)[0] == 0
    assert (tmp_path / "log").read_text() == capsys.readouterr().out == "1\n2\n"


def test_every_part_names_scripts_that_exist(benchmarks) -> None:
    _, gpu_day = benchmarks
    assert all(
        (BENCHMARKS / f"{script}.py").is_file() for part in gpu_day.PARTS.values() for script, *_ in part.scripts
    )


def test_the_commands_of_the_day_name_every_part_and_leave_half_a_minute_of_ten(benchmarks) -> None:
    _, gpu_day = benchmarks
    commands = [line.split() for line in gpu_day.__doc__.splitlines() if line.startswith("    PYTHONPATH=.")]
    parts = [[word for word in words[3:] if word in gpu_day.PARTS] for words in commands]
    assert sorted(name for names in parts for name in names) == sorted(gpu_day.PARTS)
    minutes = [sum(gpu_day.PARTS[name].minutes for name in names) for names in parts]
    assert max(minutes) <= 9.5
    assert parts[-1] == ["routes"]  # apart
    assert sum(minutes[:-1]) <= 27


def test_launches_operations_and_bytes_are_counted(benchmarks) -> None:
    import launches

    def looped(a, x):
        """Five rounds of a product of [3, 3] and [3] in float32 and what is fused with it, then a reduction."""
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(a @ x) + 1, None), x, length=5)
        return jnp.sum(jax.jit(lambda x: 2 * x)(x))

    count = launches.cost_of(jax.make_jaxpr(looped)(jnp.ones((3, 3)), jnp.ones(3)).jaxpr)
    moved = 5 * 4 * (9 + 3 + 3) + 4 * (3 + 1)
    assert count == launches.Cost(rounds=5, kernels=5 * 2 + 1 + 1, flops=5 * 18 + 3, bytes=moved)


def test_of_branches_that_of_the_card_counts_and_else_the_dearest(benchmarks) -> None:
    import launches

    def branched(a):
        return jax.lax.platform_dependent(a, cpu=lambda a: a @ a @ a, default=lambda a: a)

    def either(a):
        return jax.lax.cond(a[0, 0] > 0, lambda a: a @ a @ a, lambda a: a, a)

    def until(a):
        return jax.lax.while_loop(lambda a: a[0, 0] > 1, lambda a: a @ a, a)

    of_card, of_both, open_ended = (
        launches.cost_of(jax.make_jaxpr(f)(jnp.ones((2, 2))).jaxpr) for f in (branched, either, until)
    )
    assert of_card.flops == 0
    assert of_both.flops == 2 * 16
    assert (open_ended.open, open_ended.flops, of_both.open) == (1, 16, 0)


def test_shares_of_what_a_machine_could_do(benchmarks) -> None:
    import limits

    def looped(a, xs):
        """Five rounds of a product of [3, 3] and [3] in float32, which take and leave [3] each."""
        return jax.jit(lambda a: jax.lax.scan(lambda h, x: (a @ h, x + h), xs[0], xs))(a)

    given = jnp.ones((3, 3)), jnp.ones((5, 3))
    found = limits.shares(looped, *given, taken=2.0, machine=limits.Machine(flops=9.0, bytes=4.0, round=0.1))
    arguments_and_results, along_the_loop = 9 + 15 + 3 + 15, 15 + 15
    assert found == pytest.approx(
        {"flops": 5 * 18 / 9 / 2, "bytes": (arguments_and_results + along_the_loop) / 2, "launches": 5 * 0.1 / 2}
    )
    assert limits.named(found) == "bytes 36"

    def until_small(a, xs):
        return jax.lax.while_loop(lambda h: h[0] > 1, lambda h: looped(a, xs + h[None])[1][-1], xs[0])

    found = limits.shares(until_small, *given, taken=2.0, machine=limits.Machine(flops=9.0, bytes=4.0, round=0.1))
    assert found["bytes"] == (9 + 15 + 3 + along_the_loop) / 2
    assert all(rate > 0 for rate in limits.measured(quick=True))
