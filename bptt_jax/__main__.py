"""``python -m bptt_jax`` is the command `bptt-jax`."""

import sys

from bptt_jax.cli.main import run

if __name__ == "__main__":
    sys.exit(run())
