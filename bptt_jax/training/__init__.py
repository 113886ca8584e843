"""Data to run on."""
