"""Attention = projection × pattern: the projections, and their composition with the windowed-attention kernel."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from dsv3_jax import axes
from dsv3_jax.config import GroupedQuery, Latent, ModelConfig
from dsv3_jax.kernels.windowed_attention import windowed_attention
from dsv3_jax.layers.common import RMSNorm, weight
from dsv3_jax.ops.rope import RopeTable, apply_rope, rope_table
from dsv3_jax.sharding import constrain


@struct.dataclass
class Packing:
    """Where the tokens of a batch stand: positions and segment ids [B, T] (see `ops.patterns`), and their rotations."""

    positions_BT: jax.Array
    segment_ids_BT: jax.Array
    rope: RopeTable
    max_segments: int = struct.field(pytree_node=False, default=16)


def make_packing(
    config: ModelConfig, positions_BT: jax.Array, segment_ids_BT: jax.Array, max_segments: int = 16
) -> Packing:
    """The packing of a batch, with the rotations that the config's projection needs."""
    projection = config.attention.projection
    width = projection.head_dim if isinstance(projection, GroupedQuery) else projection.rope_head_dim
    return Packing(
        positions_BT, segment_ids_BT, rope_table(positions_BT, width, config.attention.rope_theta), max_segments
    )


class GroupedQueryProjection(nn.Module):
    """x -> q_BTHN, k_BTGN, v_BTGN, rotated over the whole head width."""

    config: ModelConfig
    projection: GroupedQuery

    @nn.compact
    def __call__(self, x_BTD: jax.Array, rope: RopeTable) -> tuple[jax.Array, jax.Array, jax.Array]:
        D, p = self.config.dim, self.projection
        H, G, N = p.num_heads, p.num_kv_heads, p.head_dim
        w_q_DHN = weight(self, self.config, "w_q", (D, H, N), (axes.FSDP_EMBED, axes.HEADS, axes.HEAD_DIM), D)
        kv_axes = (axes.FSDP_EMBED, None, axes.KV_HEADS, axes.HEAD_DIM)
        w_kv_D2GN = weight(self, self.config, "w_kv", (D, 2, G, N), kv_axes, D)
        q_BTHN = jnp.einsum("BTD,DHN->BTHN", x_BTD, w_q_DHN)
        kv_BT2GN = jnp.einsum("BTD,DxGN->BTxGN", x_BTD, w_kv_D2GN)
        k_BTGN, v_BTGN = kv_BT2GN[:, :, 0], kv_BT2GN[:, :, 1]
        return apply_rope(q_BTHN, rope), apply_rope(k_BTGN, rope), v_BTGN


class LatentProjection(nn.Module):
    """Multi-head latent attention (arXiv:2405.04434, equations 9-19): x -> q_BTHN, k_BTHN, v_BTHM, with N = nope + R.

    Keys and values are rebuilt from a normalised latent of width C; the rotated part of the key is shared by all heads.
    """

    config: ModelConfig
    projection: Latent

    @nn.compact
    def __call__(self, x_BTD: jax.Array, rope: RopeTable) -> tuple[jax.Array, jax.Array, jax.Array]:
        config, p = self.config, self.projection
        D, H, C, R, Q = config.dim, p.num_heads, p.latent_dim, p.rope_head_dim, p.query_latent_dim
        nope, N, M = p.nope_head_dim, p.nope_head_dim + p.rope_head_dim, p.value_head_dim
        up_axes = (axes.LATENT, axes.HEADS, axes.HEAD_DIM)
        if Q is None:
            w_q_DHN = weight(self, config, "w_q", (D, H, N), (axes.FSDP_EMBED, axes.HEADS, axes.HEAD_DIM), D)
            q_BTHN = jnp.einsum("BTD,DHN->BTHN", x_BTD, w_q_DHN)
        else:
            w_q_down_DQ = weight(self, config, "w_q_down", (D, Q), (axes.FSDP_EMBED, None), D)
            w_q_up_QHN = weight(self, config, "w_q_up", (Q, H, N), up_axes, Q)
            latent_BTQ = RMSNorm(config.norm_epsilon, name="q_norm")(jnp.einsum("BTD,DQ->BTQ", x_BTD, w_q_down_DQ))
            q_BTHN = jnp.einsum("BTQ,QHN->BTHN", latent_BTQ, w_q_up_QHN)
        w_kv_down = weight(self, config, "w_kv_down", (D, C + R), (axes.FSDP_EMBED, None), D)
        w_kv_up = weight(self, config, "w_kv_up", (C, H, nope + M), up_axes, C)
        # jnp.split, not slices: its gradient is one concatenation.
        latent_BTC, k_rope_BTR = jnp.split(jnp.einsum("BTD,DX->BTX", x_BTD, w_kv_down), [C], axis=-1)
        latent_BTC = RMSNorm(config.norm_epsilon, name="kv_norm")(latent_BTC)
        k_nope, v_BTHM = jnp.split(jnp.einsum("BTC,CHX->BTHX", latent_BTC, w_kv_up), [nope], axis=-1)
        q_nope, q_rope = jnp.split(q_BTHN, [nope], axis=-1)
        q_rope = apply_rope(q_rope, rope)
        k_rope = apply_rope(k_rope_BTR[:, :, None], rope)
        k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:3], R))
        q_BTHN = jnp.concatenate([q_nope, q_rope], axis=-1)
        k_BTHN = jnp.concatenate([k_nope, k_rope], axis=-1)
        return q_BTHN, k_BTHN, v_BTHM


def make_projection(config: ModelConfig, name: str | None = None) -> GroupedQueryProjection | LatentProjection:
    """The module that turns x into queries, keys and values."""
    match config.attention.projection:
        case GroupedQuery() as projection:
            return GroupedQueryProjection(config, projection, name=name)
        case Latent() as projection:
            return LatentProjection(config, projection, name=name)


class Attention(nn.Module):
    """Projection, attention through the pattern, output projection."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, packing: Packing) -> jax.Array:
        attention = self.config.attention
        q_BTHN, k_BTGN, v_BTGM = make_projection(self.config, name="projection")(x_BTD, packing.rope)
        q_BTHN = constrain(q_BTHN, (axes.BATCH, axes.LENGTH, axes.HEADS, axes.HEAD_DIM))
        k_BTGN = constrain(k_BTGN, (axes.BATCH, axes.LENGTH, axes.KV_HEADS, axes.HEAD_DIM))
        v_BTGM = constrain(v_BTGM, (axes.BATCH, axes.LENGTH, axes.KV_HEADS, axes.HEAD_DIM))
        out_BTHM, _ = windowed_attention(
            q_BTHN,
            k_BTGN,
            v_BTGM,
            pattern=attention.pattern,
            scale=q_BTHN.shape[-1] ** -0.5,
            positions_BT=packing.positions_BT,
            segment_ids_BT=packing.segment_ids_BT,
            max_segments=packing.max_segments,
            implementation=attention.implementation,
        )
        H, M, D = out_BTHM.shape[2], out_BTHM.shape[3], self.config.dim
        out_axes = (axes.HEADS, axes.HEAD_DIM, axes.FSDP_EMBED)
        w_out_HMD = weight(self, self.config, "w_out", (H, M, D), out_axes, H * M, residual=True)
        return jnp.einsum("BTHM,HMD->BTD", out_BTHM, w_out_HMD)
