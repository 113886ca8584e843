"""The jobs of the command: each makes settings of its arguments, measures, and writes its files."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bptt_jax.cli import atlas, diagnose, dynamics, tables, train
from bptt_jax.cli.own_step import write_example
from bptt_jax.cli.parser import completion
from bptt_jax.cli.report import BadArgument, in_options, noise_in_words, provenance
from bptt_jax.cli.signals import raise_if_signalled
from bptt_jax.experiments.atlas import BASES, AtlasFileError, chosen, measure
from bptt_jax.experiments.progress import progress, progress_bar
from bptt_jax.experiments.records import Record
from bptt_jax.experiments.runfolder import last_checkpoint, write_prognosis
from bptt_jax.files import atomic_path, write_json
from bptt_jax.leaves import visible
from bptt_jax.results import counted

_OF_THE_COMMAND = ("command", "quiet", "json")  # and not of what is measured


class Outcome(NamedTuple):
    """What a job of the command hands back: numbers for --json, files, and how the rest is printed."""

    numbers: dict[str, Any]
    files: Sequence[Path]
    show: Callable[[], None]
    status: int = 0


def kept(arguments: argparse.Namespace) -> str:
    """What is left after an interruption, and what comes next."""
    if arguments.command == "train":
        return _kept_by_train(_folder_of_run(arguments), arguments.updates)
    if arguments.command == "atlas":
        return f"what is measured is kept, and the same command goes on from there: {arguments.out / 'atlas.json'}"
    return "no file was written"


def _kept_by_train(folder: Path, updates: int) -> str:
    update = last_checkpoint(folder)
    if update is None:
        return f"no checkpoint is in {folder} yet; the same command begins anew"
    return (
        f"{folder} holds the checkpoint of update {update} of {updates}; the same command resumes from the "
        "last checkpoint"
    )


def _diagnose(arguments: argparse.Namespace) -> Outcome:
    try:
        from rich.console import Console

        from bptt_jax.plots.flow import plot_gradient_flow

        if arguments.html:
            from bptt_jax.cli.page import flow_page
    except ImportError:
        raise BadArgument("needs matplotlib, Jinja2 and rich: python -m pip install 'bptt_jax[plot]'") from None
    settings = _diagnose_settings(arguments)
    out = _writable(arguments.out)
    if settings.float64:
        jax.config.update("jax_enable_x64", True)
    data, recurrences = diagnose.prepare(settings)
    settings = diagnose.resolved(settings, data)
    if not (arguments.quiet or arguments.json):
        for sentence in data.found:
            print(visible(sentence), flush=True)
    gated = {r.name: r.gated for r in recurrences}
    flows = {}
    total = data.batch * len(recurrences)
    with progress(total * (1 + data.tells_noise), "sequence", quiet=arguments.quiet) as shown:
        for i, (recurrence, compiled) in enumerate(diagnose.compile_all(recurrences, data)):
            what, done = f"measuring {visible(recurrence.name)}", i * data.batch
            shown.show(done, what, f"{what} ({i + 1} of {len(recurrences)})")

            def advance(sequences: int, what: str = what) -> None:
                nonlocal done
                raise_if_signalled()
                done += sequences
                shown.show(done, what)

            flows[recurrence.name] = diagnose.measure(recurrence, compiled, data, advance)

        def announce(ready: int) -> None:
            raise_if_signalled()
            what = f"measuring the noise of {visible(recurrences[ready].name)}"
            shown.show(total + ready * data.batch, what, what)

        noise = diagnose.noises(recurrences, data, announce)
    title, numbers = diagnose.title(settings, data), diagnose.record(settings, data, flows, gated, noise)
    drawn = {visible(name).replace("$", r"\$"): flow for name, flow in flows.items()}  # no name is mathematics
    figure = plot_gradient_flow(drawn, title=title)
    names = ["flow.png", "flow.json", *(["flow.html"] if arguments.html else [])]
    with contextlib.ExitStack() as files:
        figure.savefig(files.enter_context(atomic_path(out / "flow.png")), dpi=120)
        if arguments.html:
            text = flow_page(title, numbers, flows, gated)
            files.enter_context(atomic_path(out / "flow.html")).write_text(text, encoding="utf-8")
        write_json(out / "flow.json", numbers)

    def told() -> None:
        tables.console(Console).print(tables.of_flows(numbers))
        for name, words in noise_in_words(numbers["noise"]).items():
            print(f"{name}: {words}")

    return Outcome(numbers, [out / name for name in names], told)


def _diagnose_settings(arguments: argparse.Namespace) -> diagnose.Settings:
    given = {k: v for k, v in vars(arguments).items() if k not in (*_OF_THE_COMMAND, "out", "html")}
    if arguments.weights is None:
        if wrong := [f"--{k}" for k in ("prefix", "layer", "data", "readout") if given[k] is not None]:
            raise BadArgument(f"{wrong[0]}: expected --weights with it, got none")
    else:
        own = ["cells", "gain", "alpha", "hidden", "embed", "step", "checkpoint"]
        own += ["readout"] if arguments.data is None else ["text", "length"]
        if wrong := [f"--{k}" for k in own if given[k] is not None]:
            what = "the weights have" if arguments.data is None else "the weights and their data have"
            raise BadArgument(f"--weights: {what} settings of their own; drop {', '.join(wrong)}")
        on_text = (
            {"length": given["length"] or 200, "loss": given["loss"] or "last"} if given["data"] is None else {}
        )
        return diagnose.Settings(**given | on_text | {"cells": (), "gain": (), "prefix": given["prefix"] or ""})
    given["prefix"] = ""
    if arguments.checkpoint is not None:
        others = ("cells", "gain", "alpha", "hidden", "length", "loss", "embed", "step", "float64")
        if wrong := [f"--{k}" for k in others if given[k]]:
            raise BadArgument(f"--checkpoint: the run has its own settings; drop {', '.join(wrong)}")
        run = train.read(Path(arguments.checkpoint))
        return diagnose.Settings(
            **given
            | {
                "cells": (run.cell,),
                "gain": (),
                "alpha": run.alpha,
                "hidden": run.hidden,
                "length": run.length,
                "loss": run.task,
                "float64": run.float64,
            }
        )
    cells = given["cells"] or ([] if given["step"] else ["rnn", "gru", "lstm"])
    defaults = {"gain": [0.5, 2.0], "hidden": 64}
    given |= {k: v for k, v in defaults.items() if given[k] is None}
    given |= {"cells": tuple(dict.fromkeys(cells)), "gain": tuple(dict.fromkeys(given["gain"]))}
    return diagnose.Settings(**given)


def _train(arguments: argparse.Namespace) -> Outcome:
    try:
        from rich.console import Console

        from bptt_jax.plots.training import plot_training
    except ImportError:
        raise BadArgument("needs matplotlib and rich: python -m pip install 'bptt_jax[plot,train]'") from None
    options = {k: v for k, v in vars(arguments).items() if k not in (*_OF_THE_COMMAND, "out", "updates")}
    options["length"] = arguments.length or train.LENGTHS[arguments.task]
    settings = train.Settings(**options)
    if settings.float64:
        jax.config.update("jax_enable_x64", True)
    job = train.prepare(settings)
    folder = _folder_of_run(arguments)
    train.begun(job, settings, folder)  # what is refused is left as it was
    out = _writable(folder)
    with train.alone_in(out), progress_bar(arguments.updates, quiet=arguments.quiet) as show:

        def report(line: Record) -> None:
            raise_if_signalled()
            show(line)

        if resumed := train.begun(job, settings, out):  # now that no other process can begin it
            prognosis = train.kept_prognosis(out)
        else:
            foretold = train.foretell(job, settings, arguments.updates, lambda _: raise_if_signalled())
            prognosis = None if foretold is None else foretold.to_dict()
            write_prognosis(out, prognosis)
        if prognosis is not None:
            said = "said" if resumed else "says"
            pilot = f"a pilot of {counted(prognosis['updates'], 'update')}"
            show(f"{pilot} {said}: {visible(prognosis['statement'])}")
        done = train.run(job, settings, arguments.updates, out, report)
    task = job.network.task
    title = f"{settings.cell} of {counted(settings.hidden, 'unit')}, {settings.task}, T = {task.length}"
    figure = plot_training(done.records, baseline=task.baseline, title=title)
    numbers = train.record(job, settings, done, prognosis)
    with atomic_path(out / "train.png") as temporary:
        figure.savefig(temporary, dpi=120)
        write_json(out / "train.json", numbers)

    def shown() -> None:
        tables.console(Console).print(tables.of_training(numbers))
        if prognosis is not None:
            print(f"foretold {visible(prognosis['statement'])}")
        print(f"see bptt-jax diagnose --checkpoint {visible(str(out))}")

    return Outcome(numbers, [out / "train.png", out / "train.json"], shown)


def _dynamics(arguments: argparse.Namespace) -> Outcome:
    try:
        from rich.console import Console

        from bptt_jax.plots.dynamics import Drawn, plot_dynamics
    except ImportError:
        raise BadArgument("needs matplotlib and rich: python -m pip install 'bptt_jax[plot]'") from None
    if (arguments.checkpoint is None) == (arguments.step is None):
        raise BadArgument("--checkpoint, --step: expected one of them")
    of_source = {
        k: getattr(arguments, k) for k in ("checkpoint", "step", "text", "length", "batch", "float64", "seed")
    }
    others = ("cells", "gain", "alpha", "hidden", "embed", "loss", "weights", "prefix", "layer", "readout", "data")
    unset = dict.fromkeys(others)
    own = ("starts", "perturbation", "input", "vectors", "tol", "margin", "dt")
    settings = dynamics.Settings(
        source=_diagnose_settings(argparse.Namespace(**of_source | unset)),
        **{name: getattr(arguments, name) for name in own},
    )
    out = _writable(arguments.out)
    if settings.source.float64:
        jax.config.update("jax_enable_x64", True)
    data, recurrences = dynamics.prepare(settings)
    settings = replace(settings, source=diagnose.resolved(settings.source, data))
    measured = []
    with progress(len(recurrences), "recurrence", quiet=arguments.quiet) as show:
        for i, recurrence in enumerate(recurrences):
            raise_if_signalled()
            what = f"measuring {visible(recurrence.name)}"
            show.show(i, what, f"{what} ({i + 1} of {len(recurrences)})")
            measured.append(dynamics.measure(recurrence, data, settings))
    numbers = dynamics.record(settings, measured)
    figure = plot_dynamics({visible(d.name).replace("$", r"\$"): Drawn(*d[1:]) for d in measured}, dt=settings.dt)
    with atomic_path(out / "dynamics.png") as temporary:
        figure.savefig(temporary, dpi=120)
        write_json(out / "dynamics.json", numbers)

    def shown() -> None:
        console = tables.console(Console)
        for name, of_one in numbers["recurrences"].items():
            console.print(tables.of_dynamics(visible(name), of_one))
            for line in dynamics.statements(of_one):
                print(line)

    return Outcome(numbers, [out / "dynamics.png", out / "dynamics.json"], shown)


def _atlas(arguments: argparse.Namespace) -> Outcome:
    try:
        from rich.console import Console

        from bptt_jax.cli.page import atlas_page
        from bptt_jax.plots.atlas import plot_atlas
    except ImportError:
        raise BadArgument("needs matplotlib, Jinja2 and rich: python -m pip install 'bptt_jax[plot]'") from None
    given = {k: getattr(arguments, k) for k in ("task", "text", "length", "hidden", "batch", "seeds")}
    settings, task = atlas.prepare(**given)
    out = _writable(arguments.out)

    names = chosen(arguments.family, arguments.cells)
    with progress(len(names), "cell", quiet=arguments.quiet) as show:

        def tell(name: str, done: int, total: int) -> None:
            raise_if_signalled()
            show.show(done, f"measuring {name}", f"measuring {name} ({done + 1} of {total})")

        try:
            measured = measure(settings, task, names, out / "atlas.json", on_cell=tell)
        except AtlasFileError as error:
            raise BadArgument(f"--out: {error}") from None
    measured = measured._replace(failed={name: in_options(why) for name, why in measured.failed.items()})
    for name, why in measured.failed.items():
        print(f"bptt-jax atlas: {name} was not measured: {visible(why)}", file=sys.stderr)
    numbers = atlas.record(settings, measured)
    if not measured.cells:
        return Outcome(numbers, [], lambda: None, status=1)
    title, provided = atlas.title(settings), provenance()
    of = {basis: atlas.of_basis(measured, basis) for basis in BASES}
    maps = {basis: plot_atlas(of[basis], title=f"{atlas.TITLES[basis]}: {title}") for basis in BASES}
    parts = [
        atlas.AtlasPart(atlas.TITLES[k], maps[k], atlas.columns(of[k]), list(atlas.rows(of[k]))) for k in BASES
    ]
    computed = {**provided["versions"], "device": provided["device"]}
    text = atlas_page(title, parts, vars(settings), computed, atlas.MEANINGS, measured.failed)
    with contextlib.ExitStack() as files:
        maps["width"].savefig(files.enter_context(atomic_path(out / "atlas.png")), dpi=120)
        files.enter_context(atomic_path(out / "atlas.md")).write_text(
            atlas.markdown(settings, measured, provided), encoding="utf-8"
        )
        files.enter_context(atomic_path(out / "atlas.html")).write_text(text, encoding="utf-8")

    def shown() -> None:
        for part in parts:
            tables.console(Console, 200).print(tables.of_atlas(part))

    files_written = [out / f"atlas.{kind}" for kind in ("json", "md", "png", "html")]
    return Outcome(numbers, files_written, shown, status=1 if measured.failed else 0)


def _new_step(arguments: argparse.Namespace) -> Outcome:
    write_example(arguments.file)
    name = visible(str(arguments.file))
    return Outcome({}, [arguments.file], lambda: print(f"try bptt-jax diagnose --step {name}:make"))


def _completion(arguments: argparse.Namespace) -> Outcome:
    script = completion(arguments.shell)
    return Outcome({}, [], lambda: print(script))


def _folder_of_run(arguments: argparse.Namespace) -> Path:
    return arguments.out or Path(f"train-{arguments.task}")


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / ".bptt-jax-probe"):
            pass
        (folder / ".bptt-jax-probe").unlink()
    except OSError as error:
        raise BadArgument(f"--out: {folder}: {error.strerror}") from None
    return folder


JOBS: dict[str, Callable[[argparse.Namespace], Outcome]] = {
    "diagnose": _diagnose,
    "train": _train,
    "dynamics": _dynamics,
    "atlas": _atlas,
    "new-step": _new_step,
    "completion": _completion,
}
