"""What Ctrl-C and SIGTERM do to a job: it ends, and says what is kept."""

import signal

from bptt_jax import interrupts

INTERRUPTED, TERMINATED = interrupts.STATUS, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, as of a queue whose time is over: ends as an interrupt does."""


_signals: list[int] = []  # that have come: JAX, or a step, may catch everything just where the exception is raised


def listen() -> None:
    """From here on a signal is an exception, here and wherever a job asks for it by `raise_if_signalled`."""
    signal.signal(signal.SIGTERM, _note_and_raise)
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, interrupts.end):
        # Not ignored, as in a shell's background.
        signal.signal(signal.SIGINT, _note_and_raise)


def ignore() -> None:
    """Where the process ends already."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is _note_and_raise:
            signal.signal(number, signal.SIG_IGN)


def raise_if_signalled() -> None:
    """Raises the exception of a signal that has come, whatever caught it."""
    if _signals:
        raise Terminated if _signals[-1] == signal.SIGTERM else KeyboardInterrupt


def _note_and_raise(number: int, _: object) -> None:
    _signals.append(number)
    raise_if_signalled()
