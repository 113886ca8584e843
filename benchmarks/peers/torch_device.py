"""PyTorch on the kind of device that JAX works on, in full single precision, which is what JAX is asked for too."""

from typing import Any

import jax
import numpy as np
import torch

ON_GPU = jax.default_backend() == "gpu"
if ON_GPU and not torch.cuda.is_available():
    raise ModuleNotFoundError("PyTorch without CUDA would run beside JAX on a GPU", name="torch with CUDA")
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def moved(array: Any) -> torch.Tensor:
    """A copy on that device."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.cuda() if ON_GPU else tensor


def done(result: Any) -> Any:
    """The result, waited for."""
    if ON_GPU:
        torch.cuda.synchronize()
    return result
