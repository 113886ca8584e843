"""The command ``bptt-jax``."""

import contextlib
import gc
import io
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from bptt_jax.cli import signals
from bptt_jax.cli.jobs import JOBS, kept
from bptt_jax.cli.parser import parser
from bptt_jax.cli.report import BadArgument
from bptt_jax.leaves import to_jsonable, visible


def run() -> int:
    """`main`, as a process of its own: with signals, and programs once compiled kept for the next time.

    The garbage collector is called less often: a trace makes millions of objects and few cycles, and at the end nothing
    needs to be looked through.
    """
    gc.set_threshold(50_000)
    _keep_programs()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr's, for tables where not even Latin-1 can be shown.
        sys.stdout.reconfigure(errors="backslashreplace")
    signals.listen()
    status = main()
    if status in (signals.INTERRUPTED, signals.TERMINATED):
        # Python's end would wait for what is still being computed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    gc.freeze()
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
      Exit status: 0; 1 if it cannot write, or a cell of the atlas could not be measured; 2 for a bad argument, or one
      for which there is not the memory; 130 if interrupted, 143 if terminated.
    """
    arguments = parser().parse_args(argv)
    name = f"bptt-jax {arguments.command}"
    try:
        # With --json, stdout is for that alone: what a step of the user's prints goes to stderr as well.
        with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
            outcome = JOBS[arguments.command](arguments)
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
        signals.ignore()  # it ends already
        left, terminated = kept(arguments), isinstance(stop, signals.Terminated)
        ended, status = ("terminated", signals.TERMINATED) if terminated else ("interrupted", signals.INTERRUPTED)
        print(f"{name}: {ended}; {visible(left)}", file=sys.stderr)
        return status


def _keep_programs() -> None:
    """In the user's cache folder, if that is not set otherwise."""
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "bptt_jax" / platform.node()  # another machine's processor may lack instructions
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # of small ones there are many
