"""PyTorch's scaled_dot_product_attention, where a window is a mask; and flex_attention, where it is blocks left out."""

import importlib.util
import shutil
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def flex_refusal(gradients: bool) -> str | None:
    """Why flex_attention cannot be compiled here; None if it can. Not compiled it computes all scores, which says
    nothing."""
    if torch.cuda.is_available():
        return None if importlib.util.find_spec("triton") else "it is compiled by triton, which is not installed"
    if gradients:
        return "on CPU it has no backward pass"
    return None if shutil.which("g++") else "on CPU it is compiled by g++, which is not installed"


def make_step(
    inputs: tuple, window: int | None, gradients: bool, threads: int, flex: bool = False, calls: int = 1
) -> Callable:
    """Causal attention of arrays [B, T, H, N]: the output, heads first, and with `gradients` those of its squares.

    calls: how often a step does it; it is waited for once.
    """
    torch.set_num_threads(threads)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

    def tensor(x):
        heads_first = np.asarray(x, np.float32).transpose(0, 2, 1, 3).copy()
        return torch.from_numpy(heads_first).to(device, dtype).requires_grad_(gradients)

    q, k, v = (tensor(x) for x in inputs)
    attend = (_flex if flex else _sdpa)(q.shape[2], window, device)

    def once():
        out = attend(q, k, v)
        return [out, *(torch.autograd.grad(0.5 * out.float().square().sum(), (q, k, v)) if gradients else ())]

    def step():
        for _ in range(calls):
            result = once()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return step


def _seen(query, key, window: int | None):
    """Whether a query sees a key; positions, of any shapes that broadcast."""
    seen = query >= key
    return seen if window is None else seen & (query - key < window)


def _sdpa(length: int, window: int | None, device: str) -> Callable:
    positions = torch.arange(length, device=device)
    mask = None if window is None else _seen(positions[:, None], positions, window)

    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)

    return attend


def _flex(length: int, window: int | None, device: str) -> Callable:
    torch._dynamo.reset()  # after a few shapes it would go on without compiling
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = create_block_mask(lambda b, h, query, key: _seen(query, key, window), None, None, length, length, device)

    def attend(q, k, v):
        return compiled(q, k, v, block_mask=mask)

    return attend
