"""Tokamax's splash attention, the successor of the one that comes with JAX. Its public API takes no window on TPU."""

from collections.abc import Callable

from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernel
from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks


def make_attention(length: int, window: int, block: int, interpret: bool = False) -> Callable:
    """Causal attention, q, k, v [heads, T, N], unscaled; window 0: none. All blocks are of one size.

    The settings are those of tokamax's own API, and three buffers for dq: without them its backward grid holds every
    pair of blocks, seen or not. It adds up dq there in the dtype of q.
    """
    config = kernel.SplashConfig(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_base2_exp=True,
        use_experimental_scheduler=True,
        dq_reduction_steps=3,
        interpret=interpret,
    )
    square = (length, length)
    mask = masks.LocalMask(square, (window - 1, 0), 0) if window else masks.CausalMask(square)
    return kernel.make_splash_mha(mask, config=config, q_seq_shards=1)
