"""Spectra of a stack of matrices with PyTorch."""

from collections.abc import Callable

import numpy as np
import torch


def singular_values(matrices: np.ndarray) -> Callable[[], torch.Tensor]:
    stack = torch.from_numpy(matrices)
    return lambda: torch.linalg.svdvals(stack)


def spectral_norms(matrices: np.ndarray) -> Callable[[], torch.Tensor]:
    stack = torch.from_numpy(matrices)
    return lambda: torch.linalg.matrix_norm(stack, 2)


def eigenvalues(matrices: np.ndarray) -> Callable[[], torch.Tensor]:
    stack = torch.from_numpy(matrices)
    return lambda: torch.linalg.eigvals(stack)
