"""The command ``bptt-jax``."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# numpy's, loaded by now, is not the OpenBLAS that jaxlib calls for spectra; that one comes with its first use and
# must not start threads of its own inside a loop over small matrices: two to four times slower, and two such
# loops at once can block each other for good.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax

from bptt_jax.command.diagnose import BadArgument, Settings, compile_all, measure, prepare, record
from bptt_jax.files import write_json, written

_EXAMPLES = """\
examples:
  bptt-jax diagnose
  bptt-jax diagnose --cells gru lstm --length 1000 --batch 4
  bptt-jax diagnose --cells rnn --gain 0.9 1 1.1 --text novel.txt --loss all
  bptt-jax diagnose --step my_cell.py:make --hidden 128 --out results

A FACTORY(input_size) returns (step, params, state0), or (step, params, state0, readout), where
step(params, state, x) -> state is pure and readout(state) gives one logit for each character of the text.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Exit status: 0; 1 if it cannot write; 2 for a bad argument; 130 if interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        return _diagnose(arguments)
    except BadArgument as error:
        print(f"bptt-jax diagnose: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"bptt-jax diagnose: could not write the results: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bptt-jax diagnose: interrupted; no file was written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bptt-jax", description="See what backpropagation through time does to gradients.")
    jobs = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    job = jobs.add_parser(
        "diagnose",
        help="measure the gradient flow of recurrences on text, side by side",
        description="Measures, for several recurrences at their initialisation on real text, how the gradient of "
        "the next character's cross-entropy flows back through time. Writes flow.png and flow.json.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = job.add_argument
    add("--cells", nargs="+", choices=("rnn", "gru", "lstm"), help="default: all three; with --step none")
    add("--gain", nargs="+", type=_positive_float, default=[0.5, 2.0], help="recurrent gains of rnn (0.5 2)")
    add("--hidden", type=_positive_int, default=64, help="units (64)")
    add("--length", type=_positive_int, default=200, help="time steps (200)")
    add("--batch", type=_positive_int, default=16, help="sequences (16)")
    add(
        "--loss", choices=("last", "all"), default="last", help="cross-entropy at the last step, or the mean of all"
    )
    add("--text", metavar="FILE", help="UTF-8 text (default: Python's help texts, some 450 kB of English)")
    add("--embed", type=_positive_int, metavar="SIZE", help="random embeddings of this size instead of one-hot")
    add("--step", metavar="FILE_OR_MODULE:FACTORY", help="a recurrent step of your own")
    add("--float64", action="store_true", help="compute in double precision")
    add("--seed", type=_seed, default=0, help="of texts and weights (0)")
    add("--out", type=Path, default=Path("."), metavar="FOLDER", help="where flow.png and flow.json go (.)")
    return parser


def _diagnose(arguments: argparse.Namespace) -> int:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        from bptt_jax.plots import plot_gradient_flow
    except ImportError:
        raise BadArgument("needs matplotlib and rich: python -m pip install 'bptt_jax[plot]'") from None
    cells = arguments.cells or ([] if arguments.step else ["rnn", "gru", "lstm"])
    options = {k: v for k, v in vars(arguments).items() if k != "out"}
    options |= {"cells": tuple(dict.fromkeys(cells)), "gain": tuple(dict.fromkeys(arguments.gain))}
    settings = Settings(**options)
    out = _writable(arguments.out)
    if settings.float64:
        jax.config.update("jax_enable_x64", True)
    data, recurrences = prepare(settings)
    gated = {r.name: r.gated for r in recurrences}
    flows = {}
    log = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=log, disable=not log.is_terminal, transient=True) as progress:
        task = progress.add_task("compiling", total=settings.batch * len(recurrences))
        for i, (recurrence, compiled) in enumerate(compile_all(recurrences, data, settings.loss)):
            name = recurrence.name
            progress.update(task, description=f"measuring {name}")
            if not log.is_terminal:
                print(f"measuring {name} ({i + 1} of {len(recurrences)})", file=sys.stderr, flush=True)
            flows[name] = measure(recurrence, compiled, data, lambda n: progress.advance(task, n))
    where = "at the last step" if settings.loss == "last" else "of all steps"
    title = f"{settings.batch} sequences of {settings.length} characters, cross-entropy {where}"
    figure, numbers = plot_gradient_flow(flows, title=title), record(settings, data, flows, gated)
    with written(out / "flow.png") as temporary:
        figure.savefig(temporary, dpi=120)
        write_json(out / "flow.json", numbers)
    Console(width=None if sys.stdout.isatty() else 132).print(_table(flows, gated))
    print(f"wrote {out / 'flow.png'} and {out / 'flow.json'}")
    return 0


def _table(flows: dict[str, Any], gated: dict[str, bool | None]) -> Any:
    from rich.table import Table

    table = Table(show_lines=True)
    for name in (
        "cell",
        "loss",
        "spectral\nnorm",
        "spectral\nradius",
        "growth rate\nnats/step back",
        "horizon\nsteps",
    ):
        table.add_column(name, justify="left" if name == "cell" else "right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("what to try")
    for name, flow in flows.items():
        s = flow.summary()
        total = sum(s["verdicts"].values())
        table.add_row(
            name,
            f"{s['loss']['mean']:.3f}",
            f"{s['spectral_norm']['mean']:.3f}",
            f"{s['spectral_radius']['mean']:.3f}",
            f"{s['growth_rate']['mean']:+.4f} ± {s['growth_rate']['std']:.4f}",
            f"{s['horizon']['median']:.0f}",
            f"{s['verdict']}\n({s['verdicts'][s['verdict']]} of {total})",
            "\n".join(flow.advice(gated=gated.get(name))),
        )
    return table


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written(folder / ".bptt-jax-probe"):
            pass
        (folder / ".bptt-jax-probe").unlink()
    except OSError as error:
        raise BadArgument(f"--out: {folder}: {error.strerror}") from None
    return folder


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"expected 0 to 2147483647, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
