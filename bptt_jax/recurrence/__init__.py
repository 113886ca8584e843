"""Forward: cells, unrolling, Jacobians."""
