"""Fixed points of a leaky network as fixed-point-finder looks for them in PyTorch (Golub and Sussillo 2018, JOSS 3).

All starts at once by Adam on the mean of ``q = |F(h) - h|^2 / 2``, rate 0.05 times 0.7 after every 500 iterations,
until every q is below 1e-12 or has stopped to change, 2,000 at most: the settings of its class for PyTorch.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from peers.torch_device import moved


def finder(params: Any, alpha: float, starts: jax.Array) -> Callable[[], np.ndarray]:
    """``() -> points [K, N]`` of ``(1 - alpha) h + alpha tanh(W h + b)``, the input being zero."""
    weights, begin = jax.tree.map(moved, (params, starts))

    def run() -> np.ndarray:
        h = begin.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([h], lr=0.05)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=500, gamma=0.7)
        before = torch.zeros(len(h), device=h.device)
        for _ in range(2000):
            optimizer.zero_grad()
            after = (1 - alpha) * h + alpha * torch.tanh(h @ weights.recurrent.T + weights.bias)
            q = 0.5 * torch.sum(torch.square(after - h), dim=1)
            torch.mean(q).backward()
            optimizer.step()
            schedule.step()
            if bool(torch.all((torch.abs(q - before) < 1e-20) | (q < 1e-12))):
                break
            before = q.detach().clone()
        return h.detach().cpu().numpy()

    return run
