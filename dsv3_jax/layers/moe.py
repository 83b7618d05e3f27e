"""Mixture of experts = router × experts × dispatch × combination."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax import axes
from dsv3_jax.config import (
    CapacityDispatch,
    CrossExpertAttention,
    DeepExpert,
    FeedForward,
    GroupedDispatch,
    MixtureOfExperts,
    ModelConfig,
    ProbabilityMass,
)
from dsv3_jax.kernels.grouped_matmul import grouped_experts
from dsv3_jax.layers.common import parameter, weight
from dsv3_jax.layers.cross_expert import CrossExpert
from dsv3_jax.layers.deep_experts import DeepExperts
from dsv3_jax.layers.inputs import Packing
from dsv3_jax.layers.mlp import SwiGLU
from dsv3_jax.ops.dispatch import capacity_dispatch, capacity_of, dense_dispatch, within_capacity
from dsv3_jax.ops.routing import Exploration, Routing, route
from dsv3_jax.sharding import constrain

BIAS_COLLECTION = "selection_bias"  # lives outside params: moved by loads, not by gradients


class MoE(nn.Module):
    """Σ_k weight_k · expert_k(x) + shared(x) (arXiv:2412.19437, equation 12). The router computes in float32.

    Returns y_BTD, the routing, and the sums of the shared experts' unit gate.
    """

    config: ModelConfig
    moe: MixtureOfExperts

    @nn.compact
    def __call__(self, x_BTD: jax.Array, packing: Packing) -> tuple[jax.Array, Routing, dict[str, jax.Array]]:
        config, moe = self.config, self.moe
        routing = self._route(x_BTD, packing)
        experts_BTK, E = routing.experts_BTK, moe.num_experts
        if isinstance(moe.dispatch, CapacityDispatch):
            T, K = experts_BTK.shape[1:]
            capacity = capacity_of(moe.dispatch.factor, T, K, E)
            keep_BTK = within_capacity(experts_BTK, E, capacity, packing.token_mask_BT)
            lost_BTK = (experts_BTK < E) & ~keep_BTK & packing.token_mask_BT[..., None]
            dropped = jnp.sum(lost_BTK.astype(jnp.float32))
            routing = routing._replace(sums=routing.sums | {"dropped": dropped})
            experts_BTK = jnp.where(keep_BTK, experts_BTK, E)
        weights_BTK = jnp.where(experts_BTK < E, routing.weights_BTK, 0)

        together = isinstance(moe.combination, CrossExpertAttention)
        match moe.expert:
            case DeepExpert() as deep:
                y_BTKD = DeepExperts(config, moe, deep, name="deep")(x_BTD, experts_BTK, packing)
                y_BTD = y_BTKD if together else _weighted_sum(weights_BTK, y_BTKD)
            case FeedForward() as feed_forward:
                y_BTD = self._feed_forward(feed_forward, x_BTD, weights_BTK, experts_BTK, not together)
        if isinstance(moe.combination, CrossExpertAttention):
            y_BTKD = CrossExpert(config, moe.combination, name="cross_expert")(y_BTD, experts_BTK < E)
            y_BTD = _weighted_sum(weights_BTK, y_BTKD)
        y_BTD = constrain(y_BTD, (axes.BATCH, axes.LENGTH, axes.EMBED))
        sums: dict[str, jax.Array] = {}
        if moe.num_shared_experts:
            shared_BTD, sums = SwiGLU(config, moe.num_shared_experts * moe.expert_dim, name="shared")(x_BTD, packing)
            y_BTD += shared_BTD
        return y_BTD, routing, sums

    def _route(self, x_BTD: jax.Array, packing: Packing) -> Routing:
        moe, D, E = self.moe, x_BTD.shape[-1], self.moe.num_experts
        router_init = nn.initializers.normal(self.config.init_std or D**-0.5)
        w_router_DE = parameter(self, "w_router", router_init, (D, E), (axes.FSDP_EMBED, axes.ROUTED))
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), w_router_DE)
        if moe.condition is not None:
            # From zero: at the start a condition changes nothing.
            shape = (moe.condition.dim, E)
            w_condition_CE = parameter(self, "w_condition", nn.initializers.zeros, shape, (None, axes.ROUTED))
            if packing.condition_BTC is not None:
                logits_BTE += jnp.einsum("BTC,CE->BTE", packing.condition_BTC, w_condition_CE)
        mass = None
        if isinstance(moe.router, ProbabilityMass):
            mass = self._router_state("mass", moe.router.mass)
        exploration = None
        if packing.key_B is not None and (moe.router_noise or moe.expert_dropout):
            exploration = Exploration(packing.key_B, moe.router_noise, moe.expert_dropout)
        bias_E = self._router_state("bias", 0.0, E)
        return route(moe.router, logits_BTE, bias_E, packing.token_mask_BT, mass, exploration)

    def _router_state(self, name: str, value: float, *shape: int) -> jax.Array:
        """A variable that loads move, not gradients."""
        logical = (axes.ROUTED,) * len(shape)
        make = lambda: nn.LogicallyPartitioned(jnp.full(shape, value, jnp.float32), logical)  # noqa: E731
        return cast(jax.Array, self.variable(BIAS_COLLECTION, name, make).value)

    def _feed_forward(
        self, expert: FeedForward, x_BTD: jax.Array, weights_BTK: jax.Array, experts_BTK: jax.Array, combine: bool
    ) -> jax.Array:
        """SwiGLU experts: y_BTD, or y_BTKD without `combine`."""
        config, moe = self.config, self.moe
        (B, T, D), K, E, F = x_BTD.shape, experts_BTK.shape[-1], moe.num_experts, moe.expert_dim
        w_in_axes = (axes.EXPERTS, axes.FSDP_EMBED, None, axes.EXPERT_MLP)
        w_in_ED2F = weight(self, config, "w_in", (E, D, 2, F), w_in_axes, D)
        w_out_axes = (axes.EXPERTS, axes.EXPERT_MLP, axes.FSDP_EMBED)
        w_out_EFD = weight(self, config, "w_out", (E, F, D), w_out_axes, F, residual=True)
        if expert.widths:
            width_E = jnp.asarray([expert.widths[e % len(expert.widths)] for e in range(E)])
            w_out_EFD *= (jnp.arange(F) < width_E[:, None])[..., None].astype(w_out_EFD.dtype)
        experts = (w_in_ED2F, w_out_EFD)
        if isinstance(moe.dispatch, CapacityDispatch):
            capacity = capacity_of(moe.dispatch.factor, T, K, E)
            return capacity_dispatch(x_BTD, weights_BTK, experts_BTK, *experts, capacity, combine=combine)
        dispatch = dense_dispatch
        if isinstance(moe.dispatch, GroupedDispatch):
            dispatch = functools.partial(grouped_experts, implementation=moe.dispatch.implementation)
        flat = (x_BTD.reshape(B * T, D), weights_BTK.reshape(B * T, K), experts_BTK.reshape(B * T, K))
        y = dispatch(*flat, *experts, combine=combine)
        return y.reshape(B, T, D) if combine else y.reshape(B, T, K, D)


def _weighted_sum(weights_BTK: jax.Array, y_BTKD: jax.Array) -> jax.Array:
    return jnp.einsum("BTK,BTKD->BTD", weights_BTK.astype(y_BTKD.dtype), y_BTKD)
