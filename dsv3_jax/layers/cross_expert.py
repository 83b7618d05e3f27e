"""Attention among the outputs of a token's experts."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax import axes
from dsv3_jax.config import CrossExpertAttention, ModelConfig
from dsv3_jax.layers.common import RMSNorm, weight


class CrossExpert(nn.Module):
    """y_k + Σ_j softmax_j(q_k · k_j / sqrt(N)) v_j W_out over the experts j that the token uses.

    Args of a call: y_BTKD, the experts' outputs, zeros where a token has fewer than K; used_BTK, bool. Returns
    [B, T, K, D]; the rows of experts that are not used mean nothing.
    """

    config: ModelConfig
    combination: CrossExpertAttention

    @nn.compact
    def __call__(self, y_BTKD: jax.Array, used_BTK: jax.Array) -> jax.Array:
        config, D, H, N = self.config, y_BTKD.shape[-1], self.combination.num_heads, self.combination.head_dim
        w_qkv_D3HN = weight(self, config, "w_qkv", (D, 3, H, N), (axes.FSDP_EMBED, None, axes.HEADS, axes.HEAD_DIM), D)
        out_axes = (axes.HEADS, axes.HEAD_DIM, axes.FSDP_EMBED)
        w_out_HND = weight(self, config, "w_out", (H, N, D), out_axes, H * N, residual=True)
        normed_BTKD = RMSNorm(config.norm_epsilon, name="norm")(y_BTKD)
        q_BTKHN, k_BTJHN, v_BTJHN = jnp.moveaxis(jnp.einsum("BTKD,DxHN->BTKxHN", normed_BTKD, w_qkv_D3HN), 3, 0)
        scores_BTHKJ = jnp.einsum("BTKHN,BTJHN->BTHKJ", q_BTKHN, k_BTJHN, preferred_element_type=jnp.float32)
        # An unused expert is the key of itself alone, so that no row of the softmax is empty.
        seen_BTKJ = used_BTK[..., None, :] | jnp.eye(used_BTK.shape[-1], dtype=bool)
        weights_BTHKJ = jax.nn.softmax(scores_BTHKJ * N**-0.5, axis=-1, where=seen_BTKJ[:, :, None])
        mixed_BTKHN = jnp.einsum("BTHKJ,BTJHN->BTKHN", weights_BTHKJ.astype(v_BTJHN.dtype), v_BTJHN)
        return y_BTKD + jnp.einsum("BTKHN,HND->BTKD", mixed_BTKHN, w_out_HND)
