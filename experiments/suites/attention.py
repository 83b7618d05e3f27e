"""Attention alone, causal: ours against XLA's, cuDNN's and PyTorch's, by length and window, with and without gradients.

Where there is a window, ours without one runs too: what a window is worth. Memory is of the compiled program.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from dsv3_jax.config import ConfigError, Full, Windowed
from experiments.suites import Case

UNIT = "tokens/s"


class Sizes(NamedTuple):
    """longest_dense: the longest row of which contenders that keep all scores are asked for."""

    lengths: tuple[int, ...]
    windows: tuple[int | None, ...]
    heads: int
    width: int
    dtype: str
    longest_dense: int


SIZES = {
    "cpu": Sizes((2048, 8192), (512, None), 2, 64, "float32", 8192),
    "gpu": Sizes((2048, 8192, 32768, 131072), (512, 4096, None), 16, 128, "bfloat16", 16384),
    "tpu": Sizes((2048, 8192, 32768, 131072), (512, 4096, None), 16, 128, "bfloat16", 16384),
}


def _ours(window: int | None) -> Callable:
    from dsv3_jax.kernels.windowed_attention import windowed_attention

    def attend(q, k, v):
        pattern = Full() if window is None else Windowed(window)
        return windowed_attention(q, k, v, pattern=pattern, scale=q.shape[-1] ** -0.5)[0]

    return attend


def _jax_nn(window: int | None, implementation: str) -> Callable:
    import jax

    sides = None if window is None else (window - 1, 0)
    attend: Any = jax.nn.dot_product_attention
    return functools.partial(attend, is_causal=True, local_window_size=sides, implementation=implementation)


def _timed(attend: Callable, inputs: tuple, gradients: bool) -> tuple[Callable[..., object], int]:
    """A call to time, and the bytes of its temporaries."""
    import jax
    import jax.numpy as jnp

    def loss(q, k, v):
        out = attend(q, k, v)
        return 0.5 * jnp.sum(jnp.square(out.astype(jnp.float32))), out  # its gradient depends on out

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True) if gradients else attend)
    compiled = step.lower(*inputs).compile()
    memory = compiled.memory_analysis()
    return lambda: jax.block_until_ready(compiled(*inputs)), memory.temp_size_in_bytes if memory else 0


def cases(config_path: str | None) -> tuple[list[Case], list[str]]:
    """A case for each length, window and pass; notes give the memory, and say who is missing.

    Raises:
      ConfigError: a config, which this suite has no use for.
    """
    import jax

    if config_path:
        raise ConfigError(f"--config={config_path}: --suite=attention has sizes of its own; leave --config out")
    platform = jax.default_backend()
    sizes, threads = SIZES[platform], len(os.sched_getaffinity(0))
    notes = [
        f"causal, {sizes.heads} heads of {sizes.width}, {sizes.dtype}, one row; {threads} threads; MiB: temporaries"
    ]
    torch_attention = None
    try:
        from experiments.peers import torch_attention
    except ImportError as error:
        notes.append(f"PyTorch left out: {error} (make peers installs it)")
    found = []
    for length in sizes.lengths:
        shape = (1, length, sizes.heads, sizes.width)
        inputs = tuple(jax.random.normal(key, shape, sizes.dtype) for key in jax.random.split(jax.random.key(0), 3))
        for window in (window for window in sizes.windows if window is None or window < length):
            contenders = {"dsv3_jax": _ours(window)}
            if window is not None:
                contenders["dsv3_jax, no window"] = _ours(None)
            if platform == "gpu":
                contenders["cuDNN"] = _jax_nn(window, "cudnn")
            if length <= sizes.longest_dense:
                contenders["XLA"] = _jax_nn(window, "xla")
            for gradients in (False, True):
                name = f"{length}, {'no window' if window is None else f'window {window}'}"
                name += ", forward and backward" if gradients else ", forward"
                calls, memory = {}, []
                for who, attend in contenders.items():
                    calls[who], temporary = _timed(attend, inputs, gradients)
                    memory.append(f"{who} {temporary / 2**20:,.0f} MiB")
                if torch_attention and length <= sizes.longest_dense:
                    calls["PyTorch SDPA"] = torch_attention.make_step(inputs, window, gradients, threads)
                notes.append(f"{name}: {', '.join(memory)}")
                found.append(Case(name, length, calls))
    return found, notes
