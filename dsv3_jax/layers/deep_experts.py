"""Experts that are stacks of Transformer layers."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax import axes
from dsv3_jax.config import ConfigError, DeepExpert, DenseDispatch, Full, GroupedDispatch, MixtureOfExperts, ModelConfig
from dsv3_jax.kernels.grouped_matmul import pick_matmul
from dsv3_jax.kernels.windowed_attention import windowed_attention
from dsv3_jax.layers.common import parameter, weight
from dsv3_jax.layers.inputs import Packing
from dsv3_jax.ops.attention import reference_attention
from dsv3_jax.ops.dispatch import GroupedMatmul, sort_by_expert, swiglu
from dsv3_jax.ops.patterns import Place, same_document
from dsv3_jax.ops.rope import RopeTable, apply_rope, rope_table, softmax_factor
from dsv3_jax.sharding import constrain


class _Rows(Protocol):
    """The rows that experts work on, [..., D]: which they are, and whose."""

    def of_expert(self, scale_ED: jax.Array) -> jax.Array:
        """Each row's expert's vector; broadcasts against the rows."""
        ...

    def matmul(self, x_D: jax.Array, w_EDF: jax.Array) -> jax.Array:
        """Each row times its expert's matrix."""
        ...

    def attend(self, q_HN: jax.Array, k_HN: jax.Array, v_HN: jax.Array, scale: float) -> jax.Array:
        """Rotary attention to the rows of the same expert and document that are not later."""
        ...


class _EveryToken(NamedTuple):
    """Every expert on every token, x_BETD: the oracle. Keys are the tokens that chose the expert: routed_BET."""

    routed_BET: jax.Array
    place: Place
    rope: RopeTable

    def of_expert(self, scale_ED: jax.Array) -> jax.Array:
        return scale_ED[:, None]

    def matmul(self, x_D: jax.Array, w_EDF: jax.Array) -> jax.Array:
        return jnp.einsum("BETD,EDF->BETF", x_D, w_EDF)

    def attend(self, q_HN: jax.Array, k_HN: jax.Array, v_HN: jax.Array, scale: float) -> jax.Array:
        position_BT, segment_BT = self.place.position_BT, self.place.segment_BT
        seen_BTS = same_document(segment_BT[:, :, None], segment_BT[:, None]) & (
            position_BT[:, None] <= position_BT[:, :, None]
        )

        def one_expert(q_BTHN, k_BTHN, v_BTHN, routed_BT):
            q_BTHN, k_BTHN = apply_rope(q_BTHN, self.rope), apply_rope(k_BTHN, self.rope)
            return reference_attention(q_BTHN, k_BTHN, v_BTHN, seen_BTS & routed_BT[:, None], scale)[0]

        return jax.vmap(one_expert, in_axes=1, out_axes=1)(q_HN, k_HN, v_HN, self.routed_BET)


class _Assignments(NamedTuple):
    """Rows are the P = B · T · K assignments sorted by expert, x_PD, absent ones last and zero.

    For attention those of each sequence are together instead, by expert and then position: place and rope are of these
    N = T · K slots, and number each expert's part of a document as a document of its own. slot_P: row -> slot, flat;
    row_BN: slot -> row.
    """

    grouped_matmul: GroupedMatmul
    sizes_E: jax.Array
    expert_P: jax.Array
    slot_P: jax.Array
    row_BN: jax.Array
    place: Place
    rope: RopeTable

    def of_expert(self, scale_ED: jax.Array) -> jax.Array:
        return jnp.take(scale_ED, self.expert_P, axis=0, mode="clip")

    def matmul(self, x_D: jax.Array, w_EDF: jax.Array) -> jax.Array:
        present_P1 = (self.expert_P < len(w_EDF))[:, None]
        # The inner `where` clears the gradient of what a matmul leaves past the groups, the outer one the product.
        return jnp.where(present_P1, self.grouped_matmul(jnp.where(present_P1, x_D, 0), w_EDF, self.sizes_E), 0)

    def attend(self, q_HN: jax.Array, k_HN: jax.Array, v_HN: jax.Array, scale: float) -> jax.Array:
        q_BNHN, k_BNHN, v_BNHN = (jnp.take(x, self.row_BN, axis=0, mode="clip") for x in (q_HN, k_HN, v_HN))
        q_BNHN, k_BNHN = apply_rope(q_BNHN, self.rope), apply_rope(k_BNHN, self.rope)
        out, _ = windowed_attention(q_BNHN, k_BNHN, v_BNHN, pattern=Full(), scale=scale, place=self.place)
        return jnp.take(out.reshape(q_HN.shape), self.slot_P, axis=0, mode="clip")


class _Norm(nn.Module):
    """RMSNorm with a scale for each expert."""

    epsilon: float
    num_experts: int

    @nn.compact
    def __call__(self, x_D: jax.Array, rows: _Rows) -> jax.Array:
        shape = (self.num_experts, x_D.shape[-1])
        scale_ED = parameter(self, "scale", nn.initializers.ones, shape, (axes.EXPERTS, axes.NORM))
        x32 = x_D.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * inverse * rows.of_expert(scale_ED)).astype(x_D.dtype)


class _Layer(nn.Module):
    """What one Transformer layer of each expert adds to its rows."""

    config: ModelConfig
    moe: MixtureOfExperts
    expert: DeepExpert

    @nn.compact
    def __call__(self, x_D: jax.Array, rows: _Rows) -> jax.Array:
        config, E, F, D = self.config, self.moe.num_experts, self.moe.expert_dim, x_D.shape[-1]
        H, N = self.expert.num_heads, self.expert.head_dim
        qkv_axes = (axes.EXPERTS, axes.FSDP_EMBED, None, axes.HEADS, axes.HEAD_DIM)
        w_qkv = weight(self, config, "w_qkv", (E, D, 3, H, N), qkv_axes, D)
        back_axes = (axes.EXPERTS, axes.HEADS, axes.HEAD_DIM, axes.FSDP_EMBED)
        w_back = weight(self, config, "w_attention_out", (E, H, N, D), back_axes, H * N, residual=True)
        in_axes = (axes.EXPERTS, axes.FSDP_EMBED, None, axes.EXPERT_MLP)
        w_in = weight(self, config, "w_in", (E, D, 2, F), in_axes, D)
        out_axes = (axes.EXPERTS, axes.EXPERT_MLP, axes.FSDP_EMBED)
        w_out = weight(self, config, "w_out", (E, F, D), out_axes, F, residual=True)

        normed_D = _Norm(config.norm_epsilon, E, name="attention_norm")(x_D, rows)
        qkv_3HN = rows.matmul(normed_D, w_qkv.reshape(E, D, 3 * H * N)).reshape(*x_D.shape[:-1], 3, H, N)
        q_HN, k_HN, v_HN = jnp.moveaxis(qkv_3HN, -3, 0)
        out_HN = rows.attend(q_HN, k_HN, v_HN, N**-0.5 * softmax_factor(config.attention.rope_scaling))
        y_D = rows.matmul(out_HN.reshape(*x_D.shape[:-1], H * N), w_back.reshape(E, H * N, D))
        normed_D = _Norm(config.norm_epsilon, E, name="mlp_norm")(x_D + y_D, rows)
        hidden_2F = rows.matmul(normed_D, w_in.reshape(E, D, 2 * F)).reshape(*x_D.shape[:-1], 2, F)
        return y_D + rows.matmul(swiglu(hidden_2F), w_out)


class DeepExperts(nn.Module):
    """Each expert is `expert.num_layers` pre-norm layers of its own: causal attention with RoPE among the tokens of a
    document that chose this expert, by their positions in the document, then a SwiGLU of `moe.expert_dim` units.
    RoPE and the norms are as `config` has them; its pattern, soft-cap and sinks are those of the blocks alone.

    Args of a call: x_BTD; experts_BTK, int32, distinct for a token, `moe.num_experts` where absent. Returns y_BTKD:
    what the expert's layers add to x, without x itself, which the block adds once; zeros where absent and on padding.

    `DenseDispatch` runs every expert on every token, the oracle. The others sort assignments by expert, multiply group
    by group, and attend within each sequence's T · K assignments: (K T)² / 2 scores, masked by expert and document.

    Raises:
      ConfigError: a cache is asked for: there is none for the tokens that an expert saw before.
    """

    config: ModelConfig
    moe: MixtureOfExperts
    expert: DeepExpert

    @nn.compact
    def __call__(self, x_BTD: jax.Array, experts_BTK: jax.Array, packing: Packing) -> jax.Array:
        if packing.cache_step is not None:
            raise ConfigError(
                "config.model.moe.expert=deep: cannot decode with a cache, which holds no keys of the experts' own"
                " attention; give the model whole texts"
            )
        E = self.moe.num_experts
        experts_BTK = jnp.where(packing.token_mask_BT[..., None], experts_BTK, E)
        if isinstance(self.moe.dispatch, DenseDispatch):
            chosen_BTKE = jax.nn.one_hot(experts_BTK, E, dtype=x_BTD.dtype)
            routed_BET = jnp.moveaxis(jnp.any(chosen_BTKE > 0, axis=2), 1, 2)
            rope = self._rope(packing.place.position_BT)
            x_BETD = jnp.repeat(x_BTD[:, None], E, axis=1)
            y_BETD = self._layers(x_BETD, _EveryToken(routed_BET, packing.place, rope))
            return jnp.einsum("BETD,BTKE->BTKD", y_BETD, chosen_BTKE)

        (B, T, D), K = x_BTD.shape, experts_BTK.shape[-1]
        expert_BN = experts_BTK.reshape(B, T * K)
        by_row = jax.vmap(lambda expert_N: sort_by_expert(expert_N, E))(expert_BN)
        token_BN = by_row.order_N // K
        position_BN, document_BN = (jnp.take_along_axis(x_BT, token_BN, axis=1) for x_BT in packing.place[:2])
        expert_BN = jnp.take_along_axis(expert_BN, by_row.order_N, axis=1)
        by_expert = sort_by_expert(expert_BN.reshape(-1), E)
        rows = _Assignments(
            grouped_matmul=self._grouped_matmul(),
            sizes_E=by_expert.sizes_E,
            expert_P=jnp.take(expert_BN, by_expert.order_N),
            slot_P=by_expert.order_N,
            row_BN=by_expert.place_N.reshape(B, T * K),
            place=_parts(expert_BN, document_BN, expert_BN < E),
            rope=self._rope(position_BN),
        )
        x_BND = jnp.take_along_axis(x_BTD, token_BN[..., None], axis=1)
        x_PD = jnp.take(x_BND.reshape(-1, D), rows.slot_P, axis=0, mode="clip")
        y_PD = self._layers(jnp.where((rows.expert_P < E)[:, None], x_PD, 0), rows)
        y_BND = jnp.take(y_PD, rows.row_BN, axis=0, mode="clip")
        y_BTKD = jnp.take_along_axis(y_BND, by_row.place_N[..., None], axis=1).reshape(B, T, K, D)
        return constrain(y_BTKD, (axes.BATCH, axes.LENGTH, None, axes.EMBED))

    def _layers(self, x_D: jax.Array, rows: _Rows) -> jax.Array:
        """The sum of what the layers add. Kept apart from x: their difference would lose what bfloat16 rounds away."""
        y_D = jnp.zeros_like(x_D)
        for index in range(self.expert.num_layers):
            y_D += _Layer(self.config, self.moe, self.expert, name=f"layer_{index}")(x_D + y_D, rows)
        return y_D

    def _rope(self, position_BT: jax.Array) -> RopeTable:
        attention = self.config.attention
        return rope_table(position_BT, self.expert.head_dim, attention.rope_theta, attention.rope_scaling)

    def _grouped_matmul(self) -> GroupedMatmul:
        dispatch = self.moe.dispatch
        name = dispatch.implementation if isinstance(dispatch, GroupedDispatch) else None
        return pick_matmul(name, self.config.compute_dtype)


def _parts(expert_BN: jax.Array, document_BN: jax.Array, present_BN: jax.Array) -> Place:
    """Runs of one expert and document as documents of their own: numbered from 1, positions from 0."""
    place_N = jnp.arange(expert_BN.shape[1])
    new_BN = (place_N == 0) | (jnp.roll(expert_BN, 1, axis=1) != expert_BN)
    new_BN |= jnp.roll(document_BN, 1, axis=1) != document_BN
    first_BN = jax.lax.cummax(jnp.where(new_BN, place_N, 0), axis=1)
    number_BN = jnp.where(present_BN, jnp.cumsum(new_BN, axis=1), 0)
    return Place(place_N - first_BN, number_BN.astype(jnp.int32))
