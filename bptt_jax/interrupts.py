"""What Ctrl-C does while the command still imports JAX, which takes a second: one line and status 130.

Imported first, before JAX. Sets nothing in a process that is not the command's, or where interrupts are ignored.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

STATUS = 130  # 128 + SIGINT, as of a shell


def end(number: int, frame: FrameType | None) -> None:
    """Ends the process at once: libraries that are half imported can neither be caught nor cleaned up."""
    os.write(2, b"bptt-jax: interrupted; nothing was begun\n")
    os._exit(STATUS)


def _is_command() -> bool:
    script = Path(next(iter(getattr(sys, "argv", [])), "")).stem
    return script == "bptt-jax" or (script == "-m" and "bptt_jax" in sys.orig_argv)


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end)
