"""The command `bptt-jax`."""
