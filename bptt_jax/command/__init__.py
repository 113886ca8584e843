"""Floor 6: the jobs of the command ``bptt-jax``."""
