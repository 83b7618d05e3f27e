"""PyTorch's scaled_dot_product_attention, where a window is a mask."""

from collections.abc import Callable

import numpy as np
import torch


def make_step(inputs: tuple, window: int | None, gradients: bool, threads: int) -> Callable[..., object]:
    """Causal attention of arrays [B, T, H, N]: the output, heads first, and with `gradients` those of its squares."""
    torch.set_num_threads(threads)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

    def tensor(x):
        heads_first = np.asarray(x, np.float32).transpose(0, 2, 1, 3).copy()
        return torch.from_numpy(heads_first).to(device, dtype).requires_grad_(gradients)

    q, k, v = (tensor(x) for x in inputs)
    mask = None
    if window is not None:
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        mask = ((distance >= 0) & (distance < window)).to(device)

    def step():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        result = [out]
        if gradients:
            result += torch.autograd.grad(0.5 * out.float().square().sum(), (q, k, v))
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return step
