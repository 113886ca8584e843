"""Parallel over time: Newton on whole trajectories, diagonal recurrences, and whether it will pay."""
