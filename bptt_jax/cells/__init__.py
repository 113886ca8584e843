"""Cells, their initialisers, layers of them, and cells and weights of other libraries."""
