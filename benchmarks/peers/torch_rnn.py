"""Recurrent networks with PyTorch: `torch.nn.RNN`, `GRU` and `LSTM`."""

from typing import Any

import jax
import numpy as np
import torch

from peers import TrainingStep
from peers.torch_device import done, moved

THREADS = torch.get_num_threads()
LAYERS = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}


def training_step(cell: str, params: Any, xs: jax.Array, threads: int = THREADS) -> TrainingStep:
    """With PyTorch's own number of threads, or another: small products may be faster on one."""
    size = params.recurrent.shape[1]
    layer = LAYERS[cell](xs.shape[-1], size, batch_first=True)
    second_bias = np.zeros(params.bias.shape, np.float32)
    if cell == "gru":
        second_bias[2 * size :] = params.recurrent_bias
    weights = (params.input, params.recurrent, params.bias, second_bias)
    with torch.no_grad():
        for own, weight in zip(layer.parameters(), weights, strict=True):
            own.copy_(torch.from_numpy(np.array(weight)))
    inputs = moved(xs)
    layer.to(inputs.device)

    def run() -> Any:
        torch.set_num_threads(threads)
        layer.zero_grad()
        outputs, _ = layer(inputs)
        loss = outputs.square().mean()
        loss.backward()
        return done((loss.detach(), [p.grad for p in layer.parameters()]))

    def as_ours(g: Any) -> Any:
        inward, recurrent, bias, second_bias = (a.cpu().numpy() for a in g)
        own = (recurrent, inward, bias)
        return type(params)(*own, second_bias[2 * size :]) if cell == "gru" else type(params)(*own)

    return TrainingStep(run, as_ours, None)
