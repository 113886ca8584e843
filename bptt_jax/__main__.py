"""``python -m bptt_jax`` is the command `bptt-jax`."""

from bptt_jax.cli.main import run

if __name__ == "__main__":
    run()
