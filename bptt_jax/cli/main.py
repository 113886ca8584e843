"""The command ``bptt-jax``."""

import argparse
import contextlib
import io
import json
import os
import platform
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

import jax
import numpy as np

from bptt_jax import interrupts
from bptt_jax.cells.atlas import ATLAS, Family
from bptt_jax.checks import check_positive_int
from bptt_jax.cli import atlas, diagnose, dynamics, train
from bptt_jax.cli.own_step import write_example
from bptt_jax.cli.report import COLUMNS, BadArgument, provenance, rows
from bptt_jax.experiments.atlas import BASES, AtlasFileError, chosen, measure
from bptt_jax.experiments.progress import progress, progress_bar
from bptt_jax.experiments.records import Record
from bptt_jax.experiments.runfolder import last_checkpoint
from bptt_jax.files import atomic_path, write_json
from bptt_jax.leaves import to_jsonable, visible

_DIAGNOSE_EXAMPLES = """\
examples:
  bptt-jax diagnose
  bptt-jax diagnose --cells gru lstm --length 1000 --batch 4
  bptt-jax diagnose --cells rnn --gain 0.9 1 1.1 --text novel.txt --loss all
  bptt-jax diagnose --step my_cell.py:make --hidden 128 --out results
  bptt-jax diagnose --checkpoint train-adding --batch 8 --html
  bptt-jax diagnose --weights model.safetensors --prefix encoder.rnn --data validation.npz

A FACTORY(input_size) returns (step, params, state0), where step(params, state, x) -> state is pure; then the step reads
text. It may also return data, a loss and a random key: bptt-jax new-step FILE.py writes a file that shows how.
"""
_TRAIN_EXAMPLES = """\
examples:
  bptt-jax train adding --cell lstm --length 200 --chrono
  bptt-jax train temporal-order --cell rnn --init sparse --omega 4 --optimizer sgd --rate 0.01 --seeds 5
  bptt-jax train flipflop --cell leaky_rnn --noise 0.05 --rate 0.003 --clip 1
  bptt-jax train characters --text novel.txt --cell gru --hidden 256 --updates 5000
  bptt-jax train characters --stateful --truncate 50 --cell gru
  bptt-jax train delayed-copy --length 10 --stateful --truncate auto --bias 0.3

After an interruption the same command resumes from the last checkpoint; --updates may be raised.
"""


_DYNAMICS_EXAMPLES = """\
examples:
  bptt-jax dynamics --checkpoint train-flipflop
  bptt-jax dynamics --step my_cell.py:make --length 500 --starts 2000 --dt 0.01

A FACTORY is as for bptt-jax diagnose. The search starts at states that the network visits; the input is constant.
"""
_ATLAS_EXAMPLES = """\
examples:
  bptt-jax atlas --out atlas
  bptt-jax atlas --family gated linear --hidden 128 --length 500
  bptt-jax atlas --cells rnn lstm lru --task copy-memory --length 100

After an interruption the same command continues; with other cells it adds them to the folder.
"""
_NEW_STEP_EXAMPLES = """\
examples:
  bptt-jax new-step my_step.py
  bptt-jax diagnose --step my_step.py:make --out results
  bptt-jax diagnose --step my_step.py:make_on_text --cells gru lstm --length 100
  bptt-jax dynamics --step my_step.py:make --dt 0.01
"""
_COMPLETION_EXAMPLES = """\
examples, for the shell as it starts:
  bash: echo 'eval "$(bptt-jax completion bash)"' >> ~/.bashrc
  zsh:  bptt-jax completion zsh > FOLDER/_bptt-jax, where FOLDER is one of $fpath
  fish: bptt-jax completion fish > ~/.config/fish/completions/bptt-jax.fish
"""
_SHELLS = ("bash", "zsh", "fish")
_STATUSES = """\
Each command has its own --help, with examples; all but completion take --quiet and --json.

exit status: 0 done; 1 a file could not be written, or a cell not measured; 2 an argument is wrong, or needs more memory
than there is; 130 interrupted (Ctrl-C); 143 terminated (SIGTERM). Of the last two the message says what was kept.
"""
_OF_THE_COMMAND = ("command", "job", "quiet", "json")  # and not of what is measured
_INTERRUPTED, _TERMINATED = interrupts.STATUS, 143


class _Outcome(NamedTuple):
    """What a job of the command hands back: numbers for --json, files, and how the rest is printed."""

    numbers: dict[str, Any]
    files: Sequence[Path]
    show: Callable[[], None]
    status: int = 0


class _Version(argparse.Action):
    """Package, JAX, Python and device."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        found = provenance()
        versions = found["versions"]
        names = ("bptt_jax", "jax", "jaxlib", "python")
        print(", ".join([*(f"{name} {versions[name]}" for name in names), found["device"]]))
        parser.exit()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {visible(message)} (see --help)\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Wraps what is one paragraph, and leaves examples as they stand."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # names of tasks and options stay whole

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return super()._fill_text(
            text if "\n" in text else textwrap.fill(text, width, break_on_hyphens=False), width, indent
        )


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as of a queue whose time is over: ends as an interrupt does."""


_signals: list[int] = []  # that have come: JAX, or a step, may catch everything just where the exception is raised


def _note_and_raise(number: int, _: object) -> None:
    _signals.append(number)
    _raise_if_signalled()


def _raise_if_signalled() -> None:
    if _signals:
        raise _Terminated if _signals[-1] == signal.SIGTERM else KeyboardInterrupt


def run() -> int:
    """`main`, where programs once compiled are kept for the next time, in the user's cache folder."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]  # not the user's own
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = caches / "bptt_jax" / platform.node()  # another machine's processor may lack instructions
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr's, for tables where not even Latin-1 can be shown.
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _note_and_raise)
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, interrupts.end):
        # Not ignored, as in a shell's background.
        signal.signal(signal.SIGINT, _note_and_raise)
    status = main()
    if status in (_INTERRUPTED, _TERMINATED):
        # Python's end would wait for what is still being computed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
      Exit status: 0; 1 if it cannot write, or a cell of the atlas could not be measured; 2 for a bad argument, or one
      for which there is not the memory; 130 if interrupted, 143 if terminated.
    """
    arguments = _parser().parse_args(argv)
    name = f"bptt-jax {arguments.command}"
    try:
        # With --json, stdout is for that alone: what a step of the user's prints goes to stderr as well.
        with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
            outcome: _Outcome = arguments.job(arguments)
        if arguments.json:
            numbers = outcome.numbers | {"files": [str(path) for path in outcome.files]}
            print(json.dumps(to_jsonable(numbers), indent=1, allow_nan=False))
        elif not arguments.quiet:
            outcome.show()
            if outcome.files:
                *first, last = (visible(str(path)) for path in outcome.files)
                print(f"wrote {', '.join(first)} and {last}" if first else f"wrote {last}")
        return outcome.status
    except BadArgument as error:
        print(f"{name}: {visible(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{name}: could not write the results: {visible(str(error))}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        if "Out of memory" not in str(error):
            raise
        told = str(error)[str(error).index("Out of memory") :].splitlines()[0]
        print(f"{name}: {visible(told)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is _note_and_raise:
                signal.signal(number, signal.SIG_IGN)  # it ends already
        left = "no file was written" if arguments.command not in _KEPT else _KEPT[arguments.command](arguments)
        terminated = isinstance(stop, _Terminated)
        ended, status = ("terminated", _TERMINATED) if terminated else ("interrupted", _INTERRUPTED)
        print(f"{name}: {ended}; {visible(left)}", file=sys.stderr)
        return status


def _kept_by_train(arguments: argparse.Namespace) -> str:
    folder = _folder_of_run(arguments)
    update = last_checkpoint(folder)
    if update is None:
        return f"no checkpoint is in {folder} yet; the same command begins anew"
    return (
        f"{folder} holds the checkpoint of update {update} of {arguments.updates}; the same command resumes from the "
        "last checkpoint"
    )


def _kept_by_atlas(arguments: argparse.Namespace) -> str:
    return f"what is measured is kept, and the same command goes on from there: {arguments.out / 'atlas.json'}"


_KEPT = {"train": _kept_by_train, "atlas": _kept_by_atlas}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bptt-jax",
        description="See what backpropagation through time does to gradients.",
        epilog=_STATUSES,
        formatter_class=_Help,
    )
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        dest=argparse.SUPPRESS,
        default=argparse.SUPPRESS,
        help="versions of the package, JAX and Python, and the device",
    )
    jobs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_diagnose(jobs)
    _add_train(jobs)
    _add_dynamics(jobs)
    _add_atlas(jobs)
    _add_new_step(jobs)
    _add_completion(jobs)
    return parser


def _finish(job: argparse.ArgumentParser, run: Callable[[argparse.Namespace], _Outcome]) -> None:
    """What all jobs have in common."""
    job.add_argument("--quiet", action="store_true", help="print errors alone: no progress, no table")
    job.add_argument(
        "--json", action="store_true", help="print the numbers as JSON, and nothing else, on standard output"
    )
    job.set_defaults(job=run)


def _add_diagnose(jobs: Any) -> None:
    job = jobs.add_parser(
        "diagnose",
        help="measure the gradient flow of recurrences on text, side by side",
        description="Measures, for several recurrences at their initialisation on real text, how the gradient of "
        "the next character's cross-entropy flows back through time; or, with --checkpoint, for a trained network "
        "on its task; or, with --weights, for one that PyTorch or Keras has trained, on data of "
        "yours. Writes flow.png and flow.json, with --html a page too.",
        epilog=_DIAGNOSE_EXAMPLES,
        formatter_class=_Help,
    )
    add = job.add_argument
    add(
        "--cells",
        nargs="+",
        choices=train.CELLS,
        metavar="CELL",
        help="names of cells (default: rnn gru lstm; none with --step)",
    )
    add(
        "--gain",
        nargs="+",
        type=_positive_float,
        help="gains of the recurrent weights of rnn and leaky_rnn (default: 0.5 2)",
    )
    add("--alpha", type=_share, help="leak of leaky_rnn: the time step over the time constant (default: 0.2)")
    add("--hidden", type=_positive_int, help="units (default: 64)")
    add("--length", type=_positive_int, help="time steps (default: 200)")
    add("--batch", type=_positive_int, default=16, help="sequences (default: 16)")
    add("--loss", choices=("last", "all"), help="cross-entropy at the last step (default), or the mean of all")
    add("--text", metavar="FILE", help="UTF-8 text (default: Python's help texts, some 450 kB of English)")
    add("--embed", type=_positive_int, metavar="SIZE", help="random embeddings of this size instead of one-hot")
    add("--step", metavar="FILE_OR_MODULE:FACTORY", help="a recurrent step of your own")
    add(
        "--checkpoint",
        metavar="FOLDER",
        help="run of bptt-jax train: its network before and after training, on its task",
    )
    add(
        "--weights",
        metavar="FILE",
        help="weights trained with PyTorch or Keras: .safetensors, .npz, .keras, .h5, .pt (no code in a file is run)",
    )
    add("--prefix", metavar="NAME", help="name of the recurrent layer in --weights, if there are several")
    add(
        "--data",
        metavar="FILE.npz",
        help="data for --weights: inputs [B, T, I]; optional: mask, resets, targets, loss",
    )
    add(
        "--readout",
        metavar="NAME",
        help="name of the linear layer in --weights that predicts the targets, if there are several",
    )
    add("--float64", action="store_true", help="compute in double precision")
    add("--seed", type=_seed, default=0, help="seed of texts and weights (default: 0)")
    add(
        "--out",
        type=Path,
        default=Path("."),
        metavar="FOLDER",
        help="folder for flow.png and flow.json (default: .)",
    )
    add("--html", action="store_true", help="also write flow.html, one page with figures, numbers and what to try")
    _finish(job, _diagnose)


def _add_train(jobs: Any) -> None:
    job = jobs.add_parser(
        "train",
        help="train a recurrence on one of the field's tasks",
        description="Trains a recurrence with an affine readout on a task until it is solved. Writes train.png and "
        "train.json, log.jsonl as it goes, and a checkpoint after every chunk of updates.",
        epilog=_TRAIN_EXAMPLES,
        formatter_class=_Help,
    )
    add = job.add_argument
    others = ", ".join(f"{task} {length}" for task, length in train.LENGTHS.items() if length != 100)
    add("task", metavar="TASK", choices=tuple(train.LENGTHS), help=", ".join(train.LENGTHS))
    add(
        "--length",
        type=_positive_int,
        help=f"time steps, or of the memory tasks the delay (default: 100; {others})",
    )
    add("--text", metavar="FILE", help="UTF-8 text for characters (default: Python's help texts)")
    add("--cell", choices=train.CELLS, default="lstm", metavar="CELL", help="name of the cell (default: lstm)")
    add("--hidden", type=_positive_int, default=64, help="units (default: 64)")
    add("--activation", choices=tuple(train.ACTIVATIONS), help="activation of rnn and leaky_rnn (default: tanh)")
    add("--gain", type=_positive_float, help="factor of the recurrent weights of rnn and leaky_rnn (default: 1)")
    add("--alpha", type=_share, help="leak of leaky_rnn: the time step over the time constant (default: 0.2)")
    add("--noise", type=_nonnegative_float, help="noise in the input of the units of leaky_rnn (default: 0)")
    add("--init", choices=tuple(train.RECURRENT), help="initial recurrent weights, for cells that take them")
    add("--chrono", action="store_true", help="gate biases for memories as long as the whole sequence")
    add("--optimizer", choices=tuple(train.OPTIMIZERS), default="adam", help="optimiser (default: adam)")
    add("--rate", type=_positive_float, default=1e-3, help="learning rate (default: 0.001)")
    add(
        "--clip",
        type=_nonnegative_float,
        default=1.0,
        metavar="NORM",
        help="clip the gradient's norm (default: 1; 0: never)",
    )
    add("--clip-adjoints", type=_positive_float, metavar="NORM", help="clip dL/dh_t at every step on its way back")
    add(
        "--omega",
        type=_nonnegative_float,
        default=0.0,
        metavar="WEIGHT",
        help="Pascanu's regulariser as in his code (default: 0; his is 4)",
    )
    add("--updates", type=_positive_int, default=5000, help="largest number of updates (default: 5000)")
    add("--batch", type=_positive_int, default=20, help="sequences in each update (default: 20)")
    add("--seeds", type=_positive_int, default=1, help="independent runs, side by side (default: 1)")
    add(
        "--chunk",
        type=_positive_int,
        default=100,
        help="updates between evaluations and checkpoints (default: 100)",
    )
    add(
        "--truncate",
        type=_window,
        metavar="K",
        help="end the backward pass after K steps; auto, with --stateful, chooses K while training",
    )
    add(
        "--stateful",
        action="store_true",
        help=f"read {' or '.join(train.STREAMS)} as endless streams, in windows of --truncate steps; carry the state",
    )
    add(
        "--bias",
        type=_positive_float,
        metavar="BOUND",
        help="largest relative bias of the gradient that --truncate auto allows (default: 0.5)",
    )
    add("--remat", action="store_true", help="memory O(sqrt(T)) in the backward pass (except for Omega)")
    add("--float64", action="store_true", help="compute in double precision")
    add("--out", type=Path, metavar="FOLDER", help="folder of the run (default: train-TASK)")
    _finish(job, _train)


def _add_dynamics(jobs: Any) -> None:
    job = jobs.add_parser(
        "dynamics",
        help="fixed points, modes, exponents and covariant vectors of a trained network",
        description="Finds the fixed points of a trained network, their stability and time constants, and the Lyapunov "
        "exponents and covariant vectors along its trajectories: for a run of bptt-jax train, or for a step of your "
        "own. Writes dynamics.png and dynamics.json.",
        epilog=_DYNAMICS_EXAMPLES,
        formatter_class=_Help,
    )
    add = job.add_argument
    add("--checkpoint", metavar="FOLDER", help="run of bptt-jax train: its trained network, on its task")
    add("--step", metavar="FILE_OR_MODULE:FACTORY", help="a recurrent step of your own")
    add("--text", metavar="FILE", help="UTF-8 text (default: Python's help texts, some 450 kB of English)")
    add("--length", type=_positive_int, help="time steps of a step of your own (default: 200)")
    add("--batch", type=_positive_int, default=16, help="sequences (default: 16)")
    add(
        "--starts", type=_positive_int, default=512, help="states from which fixed points are sought (default: 512)"
    )
    add(
        "--perturbation",
        type=_nonnegative_float,
        default=0.3,
        help="noise added to these states, relative to their standard deviation (default: 0.3)",
    )
    add("--input", choices=("zero", "mean"), default="zero", help="input that is held constant (default: zero)")
    add(
        "--vectors",
        type=_positive_int,
        help="number of covariant vectors, those of the largest exponents (default: at most 16)",
    )
    add(
        "--tol",
        type=_positive_float,
        help="speed below which a state counts as a fixed point (default: rounding errors)",
    )
    add(
        "--margin",
        type=_positive_float,
        default=1e-2,
        help="distance of a modulus from 1 that counts as neutral (default: 0.01)",
    )
    add("--dt", type=_positive_float, default=1.0, help="duration of one step, for time constants (default: 1)")
    add("--float64", action="store_true", help="compute in double precision")
    add("--seed", type=_seed, default=0, help="seed of sequences and starts (default: 0)")
    add("--out", type=Path, default=Path("."), metavar="FOLDER", help="folder for the files (default: .)")
    _finish(job, _dynamics)


def _add_atlas(jobs: Any) -> None:
    job = jobs.add_parser(
        "atlas",
        help="measure every cell of the atlas: how far its gradient reaches, and what it costs",
        description="Measures every cell of bptt_jax.cells.ATLAS at its initialisation, at equal width and at an equal "
        "number of parameters: growth rate and horizon of the gradient, exponents, time and memory of a step. Writes "
        "atlas.json as it goes, then atlas.md, atlas.png and atlas.html.",
        epilog=_ATLAS_EXAMPLES,
        formatter_class=_Help,
    )
    add = job.add_argument
    add(
        "--family",
        nargs="+",
        choices=get_args(Family),
        default=[],
        metavar="FAMILY",
        help=f"families of cells: {', '.join(get_args(Family))}",
    )
    add(
        "--cells", nargs="+", choices=tuple(ATLAS), default=[], metavar="CELL", help="names of cells (default: all)"
    )
    add(
        "--hidden",
        type=_positive_int,
        default=64,
        help="units of each cell at equal width, and of the rnn whose parameters the others match (default: 64)",
    )
    add("--length", type=_positive_int, default=200, help="time steps (default: 200)")
    add("--batch", type=_positive_int, default=8, help="sequences (default: 8)")
    add("--seeds", type=_positive_int, default=4, help="number of initial weights (default: 4)")
    add("--text", metavar="FILE", help="UTF-8 text, embedded at random (default: Python's help texts)")
    add(
        "--task",
        choices=tuple(train.LENGTHS),
        metavar="TASK",
        help=f"task to read instead of a text: {', '.join(train.LENGTHS)}",
    )
    add("--out", type=Path, default=Path("atlas"), metavar="FOLDER", help="folder for the files (default: atlas)")
    _finish(job, _atlas)


def _add_new_step(jobs: Any) -> None:
    job = jobs.add_parser(
        "new-step",
        help="write a file with a step, data and a loss, as a beginning for a step of your own",
        description="Writes a commented file that works as it is: a network with noise, trials of different lengths, "
        "targets and a loss, and a second one that reads text. Change it into yours.",
        epilog=_NEW_STEP_EXAMPLES,
        formatter_class=_Help,
    )
    job.add_argument(
        "file", type=Path, metavar="FILE", help="Python file to write; an existing one is left as it is"
    )
    _finish(job, _new_step)


def _new_step(arguments: argparse.Namespace) -> _Outcome:
    write_example(arguments.file)
    name = visible(str(arguments.file))
    return _Outcome({}, [arguments.file], lambda: print(f"try bptt-jax diagnose --step {name}:make"))


def _add_completion(jobs: Any) -> None:
    job = jobs.add_parser(
        "completion",
        help="print a script with which a shell completes commands, options, cells and file names",
        description="Prints a script for a shell: options, the names of cells and tasks, and files are then completed "
        "by the Tab key.",
        epilog=_COMPLETION_EXAMPLES,
        formatter_class=_Help,
    )
    job.add_argument("shell", metavar="SHELL", choices=_SHELLS, help=", ".join(_SHELLS))
    job.set_defaults(job=_completion, json=False, quiet=False)


def _completion(arguments: argparse.Namespace) -> _Outcome:
    try:
        import shtab
    except ImportError:
        raise BadArgument("needs shtab: python -m pip install 'bptt_jax[plot]'") from None
    parser = _parser()
    (jobs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for action in (action for job in jobs.choices.values() for action in job._actions):
        if isinstance(action.metavar, str) and action.metavar.startswith(("FILE", "FOLDER")):
            kind = shtab.FILE if action.metavar.startswith("FILE") else shtab.DIRECTORY
            action.complete = kind  # where shtab looks for it
    script = shtab.complete(parser, shell=arguments.shell)
    return _Outcome({}, [], lambda: print(script))


def _diagnose(arguments: argparse.Namespace) -> _Outcome:
    try:
        from rich.console import Console

        from bptt_jax.cli.page import flow_page
        from bptt_jax.plots.flow import plot_gradient_flow
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
    with progress(data.batch * len(recurrences), "sequences", quiet=arguments.quiet) as shown:
        for i, (recurrence, compiled) in enumerate(diagnose.compile_all(recurrences, data)):
            what, done = f"measuring {visible(recurrence.name)}", i * data.batch
            shown.show(done, what, f"{what} ({i + 1} of {len(recurrences)})")

            def advance(sequences: int, what: str = what) -> None:
                nonlocal done
                _raise_if_signalled()
                done += sequences
                shown.show(done, what)

            flows[recurrence.name] = diagnose.measure(recurrence, compiled, data, advance)
    title, numbers = diagnose.title(settings, data), diagnose.record(settings, data, flows, gated)
    drawn = {visible(name).replace("$", r"\$"): flow for name, flow in flows.items()}  # no name is mathematics
    figure = plot_gradient_flow(drawn, title=title)
    names = ["flow.png", "flow.json", *(["flow.html"] if arguments.html else [])]
    with contextlib.ExitStack() as files:
        figure.savefig(files.enter_context(atomic_path(out / "flow.png")), dpi=120)
        if arguments.html:
            text = flow_page(title, numbers, flows, gated)
            files.enter_context(atomic_path(out / "flow.html")).write_text(text, encoding="utf-8")
        write_json(out / "flow.json", numbers)
    return _Outcome(numbers, [out / name for name in names], lambda: _console(Console).print(_table(numbers)))


def _diagnose_settings(arguments: argparse.Namespace) -> diagnose.Settings:
    given = {k: v for k, v in vars(arguments).items() if k not in (*_OF_THE_COMMAND, "out", "html")}
    if arguments.weights is None:
        if wrong := [f"--{k}" for k in ("prefix", "data", "readout") if given[k] is not None]:
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
            }
            | {"float64": run.float64}
        )
    cells = given["cells"] or ([] if given["step"] else ["rnn", "gru", "lstm"])
    defaults = {"gain": [0.5, 2.0], "hidden": 64}
    given |= {k: v for k, v in defaults.items() if given[k] is None}
    given |= {"cells": tuple(dict.fromkeys(cells)), "gain": tuple(dict.fromkeys(given["gain"]))}
    return diagnose.Settings(**given)


def _train(arguments: argparse.Namespace) -> _Outcome:
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
    out = _writable(_folder_of_run(arguments))
    with progress_bar(arguments.updates, quiet=arguments.quiet) as show:

        def report(line: Record) -> None:
            _raise_if_signalled()
            show(line)

        foretold = train.foretell(job, settings, arguments.updates, lambda _: _raise_if_signalled())
        if foretold is not None:
            show(f"a pilot of {foretold.updates} updates says: {foretold.statement}")
        done = train.run(job, settings, arguments.updates, out, report)
    task = job.network.task
    title = f"{settings.cell} of {settings.hidden} units, {settings.task}, T = {task.length}"
    figure = plot_training(done.records, baseline=task.baseline, title=title)
    numbers = train.record(job, settings, done, foretold)
    with atomic_path(out / "train.png") as temporary:
        figure.savefig(temporary, dpi=120)
        write_json(out / "train.json", numbers)

    def shown() -> None:
        _console(Console).print(_training_table(numbers))
        if foretold is not None:
            print(f"foretold {foretold.statement}")
        print(f"see bptt-jax diagnose --checkpoint {visible(str(out))}")

    return _Outcome(numbers, [out / "train.png", out / "train.json"], shown)


def _dynamics(arguments: argparse.Namespace) -> _Outcome:
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
    others = ("cells", "gain", "alpha", "hidden", "embed", "loss", "weights", "prefix", "readout", "data")
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
    with progress(len(recurrences), "recurrences", quiet=arguments.quiet) as show:
        for i, recurrence in enumerate(recurrences):
            _raise_if_signalled()
            what = f"measuring {visible(recurrence.name)}"
            show.show(i, what, f"{what} ({i + 1} of {len(recurrences)})")
            measured.append(dynamics.measure(recurrence, data, settings))
    numbers = dynamics.record(settings, measured)
    figure = plot_dynamics({visible(d.name).replace("$", r"\$"): Drawn(*d[1:]) for d in measured}, dt=settings.dt)
    with atomic_path(out / "dynamics.png") as temporary:
        figure.savefig(temporary, dpi=120)
        write_json(out / "dynamics.json", numbers)

    def shown() -> None:
        console = _console(Console)
        for name, of_one in numbers["recurrences"].items():
            console.print(_dynamics_table(visible(name), of_one))
            for line in dynamics.statements(of_one):
                print(line)

    return _Outcome(numbers, [out / "dynamics.png", out / "dynamics.json"], shown)


def _atlas(arguments: argparse.Namespace) -> _Outcome:
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
    with progress(len(names), "cells", quiet=arguments.quiet) as show:

        def tell(name: str, done: int, total: int) -> None:
            _raise_if_signalled()
            show.show(done, f"measuring {name}", f"measuring {name} ({done + 1} of {total})")

        try:
            measured = measure(settings, task, names, out / "atlas.json", on_cell=tell)
        except AtlasFileError as error:
            raise BadArgument(f"--out: {error}") from None
    for name, why in measured.failed.items():
        print(f"bptt-jax atlas: {name} was not measured: {visible(why)}", file=sys.stderr)
    numbers = atlas.record(settings, measured)
    if not measured.cells:
        return _Outcome(numbers, [], lambda: None, status=1)
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
            _console(Console, 200).print(_atlas_table(part))

    files_written = [out / f"atlas.{kind}" for kind in ("json", "md", "png", "html")]
    return _Outcome(numbers, files_written, shown, status=1 if measured.failed else 0)


def _console(console: Any, width: int = 132) -> Any:
    """Of the terminal's width, or where there is none of one that tables fit in."""
    return console(width=None if sys.stdout.isatty() else width)


def _atlas_table(part: atlas.AtlasPart) -> Any:
    """A few of the columns; all of them are in the files."""
    from rich.table import Table

    shown = ("cell", "family", "units", "growth rate", "horizon", "exponent", "living", "gradient", "in parallel")
    table = Table(title=part.heading, title_justify="left", title_style="")
    for name in shown:
        table.add_column(
            name, justify="left" if name in ("cell", "family", "in parallel") else "right", no_wrap=True
        )
    for row in part.rows:
        table.add_row(*(cell for name, cell in zip(part.columns, row, strict=True) if name in shown))
    return table


def _dynamics_table(name: str, numbers: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(name), title_justify="left", title_style="")
    for column in dynamics.COLUMNS:
        table.add_column(column, justify="left" if column == "kind" else "right", no_wrap=True)
    for row in dynamics.rows(numbers):
        table.add_row(*map(escape, row))
    return table


def _training_table(numbers: dict[str, Any]) -> Any:
    from rich.table import Table

    title = f"trivial loss {numbers['trivial_loss']:.4g}; solved: {numbers['criterion']}"
    table = Table(title=title, title_justify="left", title_style="")
    for name in ("seed", "updates", "solved at", "loss", "error", "gradient norm", "clipped", "skipped"):
        table.add_column(name, justify="right", no_wrap=True)

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    for s in numbers["seeds"]:
        table.add_row(
            str(s["seed"]),
            str(s["updates"]),
            "-" if s["solved_at"] is None else str(s["solved_at"]),
            f"{s['validation_loss']:.4g}",
            f"{s['validation_error']:.2%}",
            f"{np.exp(s['gradient_log_norm']):.3g}",
            share(s["clipped"]),
            share(s["skipped"]),
        )
    return table


def _table(numbers: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_lines=True)
    for name in COLUMNS[:-1]:
        table.add_column(name, justify="left" if name in ("cell", "verdict") else "right", no_wrap=True)
    table.add_column(COLUMNS[-1])
    for row in rows(numbers["recurrences"]):
        table.add_row(*map(escape, row))
    return table


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


def _number(kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected {'an integer' if kind is int else 'a number'}, got {text!r}"
        ) from None


def _positive_int(text: str) -> int:
    value = _number(int, text)
    try:
        return check_positive_int("", value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from None


def _window(text: str) -> int | str:
    return text if text == "auto" else _positive_int(text)


def _positive_float(text: str) -> float:
    value = _number(float, text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _share(text: str) -> float:
    value = _positive_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected at most 1, got {text}")
    return value


def _nonnegative_float(text: str) -> float:
    return 0.0 if _number(float, text) == 0 else _positive_float(text)


def _seed(text: str) -> int:
    value = _number(int, text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"expected 0 to 2147483647, got {text}")
    return value
