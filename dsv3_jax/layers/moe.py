"""Mixture of experts = router × experts × dispatch."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax import axes
from dsv3_jax.config import DenseDispatch, GroupedDispatch, MixtureOfExperts, ModelConfig
from dsv3_jax.kernels.grouped_matmul import grouped_experts
from dsv3_jax.layers.common import SwiGLU, parameter, weight
from dsv3_jax.ops.dispatch import dense_dispatch
from dsv3_jax.ops.routing import Routing, route
from dsv3_jax.sharding import constrain

BIAS_COLLECTION = "selection_bias"  # lives outside params: moved by loads, not by gradients


class MoE(nn.Module):
    """Σ_k weight_k · expert_k(x) + shared(x) (arXiv:2412.19437, equation 12). The router computes in float32."""

    config: ModelConfig
    moe: MixtureOfExperts

    @nn.compact
    def __call__(self, x_BTD: jax.Array, token_mask_BT: jax.Array) -> tuple[jax.Array, Routing]:
        config, moe = self.config, self.moe
        (B, T, D), E, F = x_BTD.shape, moe.num_experts, moe.expert_dim
        router_init = nn.initializers.normal(config.init_std or D**-0.5)
        w_router_DE = parameter(self, "w_router", router_init, (D, E), (axes.FSDP_EMBED, None))
        bias = self.variable(
            BIAS_COLLECTION, "bias", lambda: nn.LogicallyPartitioned(jnp.zeros(E, jnp.float32), (None,))
        )
        bias_E = cast(jax.Array, bias.value)
        w_in_axes = (axes.EXPERTS, axes.FSDP_EMBED, None, axes.EXPERT_MLP)
        w_in_ED2F = weight(self, config, "w_in", (E, D, 2, F), w_in_axes, D)
        w_out_axes = (axes.EXPERTS, axes.EXPERT_MLP, axes.FSDP_EMBED)
        w_out_EFD = weight(self, config, "w_out", (E, F, D), w_out_axes, F, residual=True)

        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), w_router_DE)
        routing = route(moe.router, logits_BTE, bias_E, token_mask_BT)
        match moe.dispatch:
            case DenseDispatch():
                dispatch = dense_dispatch
            case GroupedDispatch(implementation):
                dispatch = functools.partial(grouped_experts, implementation=implementation)
        K = routing.experts_BTK.shape[-1]
        flat_weights, flat_experts = routing.weights_BTK.reshape(-1, K), routing.experts_BTK.reshape(-1, K)
        y_PD = dispatch(x_BTD.reshape(B * T, D), flat_weights, flat_experts, w_in_ED2F, w_out_EFD)
        y_BTD = constrain(y_PD.reshape(B, T, D), (axes.BATCH, axes.LENGTH, axes.EMBED))
        if moe.num_shared_experts:
            y_BTD += SwiGLU(config, moe.num_shared_experts * F, name="shared")(x_BTD)
        return y_BTD, routing
