"""Tasks, networks, the training loop, run folders."""
