"""The learned parts of patterns: the gate of learned global keys, the indexer of sparse attention."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax import axes
from dsv3_jax.config import ModelConfig, Sparse
from dsv3_jax.layers.common import parameter, weight
from dsv3_jax.layers.projections import LATENT_NORM_EPSILON, rotated_width
from dsv3_jax.ops.indexing import Index
from dsv3_jax.ops.rope import RopeTable, apply_rope


class Gate(nn.Module):
    """x -> the score of each token as a global key, float32 [B, T]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        D = self.config.dim
        w_gate_D = weight(self, self.config, "w_gate", (D,), (axes.FSDP_EMBED,), D)
        return jnp.einsum("BTD,D->BT", x_BTD, w_gate_D, preferred_element_type=jnp.float32)


class LayerNorm(nn.Module):
    """(x − mean) / sqrt(variance + ε) · scale + bias, in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],), (axes.NORM,))
        bias = parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],), (axes.NORM,))
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.epsilon)
        return (centred * inverse * scale + bias).astype(x.dtype)


class Indexer(nn.Module):
    """The lightning indexer (DeepSeek-V3.2, section 2.1; published inference code): x -> its queries, keys, weights.

    Queries come from the query latent where there is one. The first R of its width are rotated. Its inputs are
    detached: only its own loss trains it, and it trains nothing else.
    """

    config: ModelConfig
    pattern: Sparse

    @nn.compact
    def __call__(self, x_BTD: jax.Array, query_input_BTQ: jax.Array, rope: RopeTable) -> Index:
        config, H, N = self.config, self.pattern.index_heads, self.pattern.index_dim
        x_BTD, query_input_BTQ = jax.lax.stop_gradient((x_BTD, query_input_BTQ))
        D, Q, R = config.dim, query_input_BTQ.shape[-1], rotated_width(config.attention)
        q_axes = (axes.LATENT if Q != D else axes.FSDP_EMBED, axes.HEADS, axes.HEAD_DIM)
        w_q_QHN = weight(self, config, "w_q", (Q, H, N), q_axes, Q)
        w_k_DN = weight(self, config, "w_k", (D, N), (axes.FSDP_EMBED, axes.HEAD_DIM), D)
        w_head_DH = weight(self, config, "w_head", (D, H), (axes.FSDP_EMBED, axes.HEADS), D)

        def rotate(x_BTHN):
            rotated, rest = jnp.split(x_BTHN, [R], axis=-1)
            return jnp.concatenate([apply_rope(rotated, rope), rest], axis=-1)

        q_BTHN = rotate(jnp.einsum("BTQ,QHN->BTHN", query_input_BTQ, w_q_QHN))
        k_BTN = LayerNorm(LATENT_NORM_EPSILON, name="k_norm")(jnp.einsum("BTD,DN->BTN", x_BTD, w_k_DN))
        w_BTH = jnp.einsum("BTD,DH->BTH", x_BTD, w_head_DH, preferred_element_type=jnp.float32) * (H * N) ** -0.5
        return Index(q_BTHN, rotate(k_BTN[:, :, None])[:, :, 0], w_BTH)
