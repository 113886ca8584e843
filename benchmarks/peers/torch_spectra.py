"""Spectra of a stack of matrices with PyTorch."""

from collections.abc import Callable

import numpy as np
import torch


def singular_values(matrices: np.ndarray) -> Callable[[], torch.Tensor]:
    stack = torch.from_numpy(matrices)
    return lambda: torch.linalg.svdvals(stack)


def eigenvalues(matrices: np.ndarray) -> Callable[[], torch.Tensor]:
    stack = torch.from_numpy(matrices)
    return lambda: torch.linalg.eigvals(stack)
