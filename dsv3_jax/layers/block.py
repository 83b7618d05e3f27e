"""One pre-norm Transformer block, dense or mixture of experts."""

import jax
from flax import linen as nn

from dsv3_jax import axes
from dsv3_jax.config import MixtureOfExperts, ModelConfig
from dsv3_jax.layers.attention import Attention, Packing
from dsv3_jax.layers.common import RMSNorm, SwiGLU
from dsv3_jax.layers.moe import MoE
from dsv3_jax.ops.routing import Routing
from dsv3_jax.sharding import constrain


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). `moe=None` is a dense block and returns no routing."""

    config: ModelConfig
    moe: MixtureOfExperts | None

    @nn.compact
    def __call__(self, x_BTD: jax.Array, packing: Packing) -> tuple[jax.Array, Routing | None]:
        config, routing = self.config, None
        normed_BTD = RMSNorm(config.norm_epsilon, name="attention_norm")(x_BTD)
        x_BTD += Attention(config, name="attention")(normed_BTD, packing)
        normed_BTD = RMSNorm(config.norm_epsilon, name="mlp_norm")(x_BTD)
        if self.moe is None:
            y_BTD = SwiGLU(config, config.dense_dim, name="mlp")(normed_BTD)
        else:
            y_BTD, routing = MoE(config, self.moe, name="moe")(normed_BTD, packing.segment_ids_BT > 0)
        return constrain(x_BTD + y_BTD, (axes.BATCH, axes.LENGTH, axes.EMBED)), routing
