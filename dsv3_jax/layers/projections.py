"""The projections of attention: from x to queries, keys and values, and to what a cache keeps of a token."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from dsv3_jax import axes
from dsv3_jax.config import Attention, GroupedQuery, Latent, ModelConfig
from dsv3_jax.layers.common import RMSNorm, weight
from dsv3_jax.ops.rope import RopeTable, apply_rope, softmax_factor

LATENT_NORM_EPSILON = 1e-6  # whatever the model's: as the published code has it


@struct.dataclass
class Heads:
    """Queries, keys and values of one layer.

    stored: what a cache keeps of each token, [B, T, heads · width]. In the absorbed form, queries and stored keys are
    those of latent attention's latent space, and `w_value_CHM` turns what attention returns into values.
    query_input_BTQ: what an indexer makes its queries from.
    """

    q_BTHN: jax.Array
    k_BTGN: jax.Array
    v_BTGM: jax.Array
    stored: tuple[jax.Array, ...]
    query_input_BTQ: jax.Array
    w_value_CHM: jax.Array | None = None


def rotated_width(attention: Attention) -> int:
    """Width of the rotated part of a head."""
    projection = attention.projection
    return projection.head_dim if isinstance(projection, GroupedQuery) else projection.rope_head_dim


def softmax_scale(attention: Attention) -> float:
    """1/√N, N the width of a query head, times the factor of the RoPE scaling."""
    projection = attention.projection
    if isinstance(projection, GroupedQuery):
        width = projection.head_dim
    else:
        width = projection.nope_head_dim + projection.rope_head_dim
    return width**-0.5 * softmax_factor(attention.rope_scaling)


class GroupedQueryProjection(nn.Module):
    """x -> q_BTHN, k_BTGN, v_BTGN, rotated over the whole head width."""

    config: ModelConfig
    projection: GroupedQuery

    @nn.compact
    def __call__(self, x_BTD: jax.Array, rope: RopeTable, absorbed: bool = False) -> Heads:
        del absorbed  # there is nothing to absorb
        D, p = self.config.dim, self.projection
        H, G, N = p.num_heads, p.num_kv_heads, p.head_dim
        w_q_DHN = weight(self, self.config, "w_q", (D, H, N), (axes.FSDP_EMBED, axes.HEADS, axes.HEAD_DIM), D)
        kv_axes = (axes.FSDP_EMBED, None, axes.KV_HEADS, axes.HEAD_DIM)
        w_kv_D2GN = weight(self, self.config, "w_kv", (D, 2, G, N), kv_axes, D)
        q_BTHN = jnp.einsum("BTD,DHN->BTHN", x_BTD, w_q_DHN)
        kv_BT2GN = jnp.einsum("BTD,DxGN->BTxGN", x_BTD, w_kv_D2GN)
        k_BTGN, v_BTGN = kv_BT2GN[:, :, 0], kv_BT2GN[:, :, 1]
        if p.qk_norm:
            q_BTHN = RMSNorm(self.config.norm_epsilon, name="q_norm")(q_BTHN)
            k_BTGN = RMSNorm(self.config.norm_epsilon, name="k_norm")(k_BTGN)
        q_BTHN, k_BTGN = apply_rope(q_BTHN, rope), apply_rope(k_BTGN, rope)
        stored = tuple(x_BTGN.reshape(*x_BTGN.shape[:2], G * N) for x_BTGN in (k_BTGN, v_BTGN))
        return Heads(q_BTHN, k_BTGN, v_BTGN, stored, x_BTD)


class LatentProjection(nn.Module):
    """Multi-head latent attention (arXiv:2405.04434, equations 9-19): x -> q_BTHN, k_BTHN, v_BTHM, with N = nope + R.

    Keys and values are rebuilt from a normalised latent of width C; the rotated part of the key is shared by all heads.
    A cache keeps C + R numbers a token. The absorbed form (section 2.1.2) multiplies queries by the up-projection of
    keys instead: one key head of width C + R, whose first C are the value.
    """

    config: ModelConfig
    projection: Latent

    @nn.compact
    def __call__(self, x_BTD: jax.Array, rope: RopeTable, absorbed: bool = False) -> Heads:
        config, p = self.config, self.projection
        D, H, C, R, Q = config.dim, p.num_heads, p.latent_dim, p.rope_head_dim, p.query_latent_dim
        nope, N, M = p.nope_head_dim, p.nope_head_dim + p.rope_head_dim, p.value_head_dim
        up_axes = (axes.LATENT, axes.HEADS, axes.HEAD_DIM)
        query_input_BTQ = x_BTD
        if Q is None:
            w_q_DHN = weight(self, config, "w_q", (D, H, N), (axes.FSDP_EMBED, axes.HEADS, axes.HEAD_DIM), D)
            q_BTHN = jnp.einsum("BTD,DHN->BTHN", x_BTD, w_q_DHN)
        else:
            w_q_down_DQ = weight(self, config, "w_q_down", (D, Q), (axes.FSDP_EMBED, None), D)
            w_q_up_QHN = weight(self, config, "w_q_up", (Q, H, N), up_axes, Q)
            q_norm = RMSNorm(LATENT_NORM_EPSILON, name="q_norm")
            query_input_BTQ = q_norm(jnp.einsum("BTD,DQ->BTQ", x_BTD, w_q_down_DQ))
            q_BTHN = jnp.einsum("BTQ,QHN->BTHN", query_input_BTQ, w_q_up_QHN)
        w_kv_down = weight(self, config, "w_kv_down", (D, C + R), (axes.FSDP_EMBED, None), D)
        w_kv_up = weight(self, config, "w_kv_up", (C, H, nope + M), up_axes, C)
        # jnp.split, not slices: its gradient is one concatenation.
        latent_BTC, k_rope_BTR = jnp.split(jnp.einsum("BTD,DX->BTX", x_BTD, w_kv_down), [C], axis=-1)
        latent_BTC = RMSNorm(LATENT_NORM_EPSILON, name="kv_norm")(latent_BTC)
        k_rope_BT1R = apply_rope(k_rope_BTR[:, :, None], rope)
        q_nope, q_rope = jnp.split(q_BTHN, [nope], axis=-1)
        q_rope = apply_rope(q_rope, rope)
        stored_BTX = jnp.concatenate([latent_BTC, k_rope_BT1R[:, :, 0]], axis=-1)
        if absorbed:
            w_key_CHN, w_value_CHM = jnp.split(w_kv_up, [nope], axis=-1)
            q_BTHC = jnp.einsum("BTHN,CHN->BTHC", q_nope, w_key_CHN)
            q_BTHX = jnp.concatenate([q_BTHC, q_rope], axis=-1)
            k_BT1X, v_BT1C = stored_BTX[:, :, None], latent_BTC[:, :, None]
            return Heads(q_BTHX, k_BT1X, v_BT1C, (stored_BTX,), query_input_BTQ, w_value_CHM)
        k_nope, v_BTHM = jnp.split(jnp.einsum("BTC,CHX->BTHX", latent_BTC, w_kv_up), [nope], axis=-1)
        k_rope = jnp.broadcast_to(k_rope_BT1R, (*k_nope.shape[:3], R))
        q_BTHN = jnp.concatenate([q_nope, q_rope], axis=-1)
        k_BTHN = jnp.concatenate([k_nope, k_rope], axis=-1)
        return Heads(q_BTHN, k_BTHN, v_BTHM, (stored_BTX,), query_input_BTQ)


def make_projection(config: ModelConfig, name: str | None = None) -> GroupedQueryProjection | LatentProjection:
    """The module that turns x into queries, keys and values."""
    match config.attention.projection:
        case GroupedQuery() as projection:
            return GroupedQueryProjection(config, projection, name=name)
        case Latent() as projection:
            return LatentProjection(config, projection, name=name)


def stored_keys_values(config: ModelConfig, stored: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array | int]:
    """Keys and values [B, S, heads, width] for queries in the absorbed form, from what a cache keeps, [B, S, heads ·
    width]: a latent's value is the first elements of its key, and their number is given."""
    match config.attention.projection:
        case GroupedQuery(num_kv_heads=G, head_dim=N):
            k_BSGN, v_BSGN = (x_BSX.reshape(*x_BSX.shape[:2], G, N) for x_BSX in stored)
            return k_BSGN, v_BSGN
        case Latent(latent_dim=C):
            return stored[0][:, :, None], C


def stored_widths(config: ModelConfig) -> tuple[int, ...]:
    """Width of each array that a cache keeps of a token: of all its heads, which on TPUs are stored without gaps only
    if they are one dimension."""
    match config.attention.projection:
        case GroupedQuery(num_kv_heads=G, head_dim=N):
            return (G * N, G * N)
        case Latent(latent_dim=C, rope_head_dim=R):
            return (C + R,)
