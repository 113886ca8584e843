"""The arguments of ``bptt-jax``: commands, options, their kinds and choices, and what ``--help`` says."""

import argparse
import textwrap
from pathlib import Path
from typing import Any, NoReturn, get_args

from bptt_jax.cells.atlas import ATLAS, Family
from bptt_jax.checks import check_positive_int
from bptt_jax.cli import train
from bptt_jax.cli.report import BadArgument, provenance
from bptt_jax.leaves import visible

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


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    made = _Parser(
        prog="bptt-jax",
        description="See what backpropagation through time does to gradients.",
        epilog=_STATUSES,
        formatter_class=_Help,
    )
    made.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        dest=argparse.SUPPRESS,
        default=argparse.SUPPRESS,
        help="versions of the package, JAX and Python, and the device",
    )
    jobs = made.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_diagnose(jobs)
    _add_train(jobs)
    _add_dynamics(jobs)
    _add_atlas(jobs)
    _add_new_step(jobs)
    _add_completion(jobs)
    return made


def completion(shell: str) -> str:
    """A script with which a shell completes commands, options, the names of cells and tasks, and files.

    Raises:
      BadArgument: shtab is missing.
    """
    try:
        import shtab
    except ImportError:
        raise BadArgument("needs shtab: python -m pip install 'bptt_jax[plot]'") from None
    whole = parser()
    (jobs,) = (action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
    for action in (action for job in jobs.choices.values() for action in job._actions):
        if isinstance(action.metavar, str) and action.metavar.startswith(("FILE", "FOLDER")):
            kind = shtab.FILE if action.metavar.startswith("FILE") else shtab.DIRECTORY
            action.complete = kind  # where shtab looks for it
    return shtab.complete(whole, shell=shell)


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


def _add_common(job: argparse.ArgumentParser) -> None:
    """What all jobs have in common."""
    job.add_argument("--quiet", action="store_true", help="print errors alone: no progress, no table")
    job.add_argument(
        "--json", action="store_true", help="print the numbers as JSON, and nothing else, on standard output"
    )


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
        "--layer", type=_layer, metavar="K", help="one layer alone of those stacked under that name, from 0 upwards"
    )
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
    _add_common(job)


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
    _add_common(job)


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
    _add_common(job)


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
    _add_common(job)


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
    _add_common(job)


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
    job.set_defaults(json=False, quiet=False)


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


def _layer(text: str) -> int:
    value = _number(int, text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or above, got {text}")
    return value


def _seed(text: str) -> int:
    value = _number(int, text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"expected 0 to 2147483647, got {text}")
    return value
