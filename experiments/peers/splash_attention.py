"""Splash attention, the Pallas TPU kernels that come with JAX."""

from collections.abc import Callable

from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks


def make_attention(
    length: int, window: int, block: int, heads: int = 1, interpret: bool = False, one_backward: bool = False
) -> Callable:
    """Causal attention, q, k, v [heads, T, N], unscaled; window 0: none. All blocks are of one size. one_backward: its
    fused backward kernel, which leaves a dq of each key block in memory, to be summed by XLA."""
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=None if one_backward else block,
        block_kv_dq=None if one_backward else block,
        use_fused_bwd_kernel=one_backward,
    )
    square = (length, length)
    mask = masks.LocalMask(square, (window - 1, 0), 0) if window else masks.CausalMask(square)
    return kernel.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
