"""One pre-norm Transformer block, dense or mixture of experts."""

from typing import NamedTuple

import jax
from flax import linen as nn

from dsv3_jax import axes
from dsv3_jax.config import LayerPattern, MixtureOfExperts, ModelConfig
from dsv3_jax.layers.attention import Attention
from dsv3_jax.layers.common import RMSNorm
from dsv3_jax.layers.inputs import Packing
from dsv3_jax.layers.mlp import SwiGLU
from dsv3_jax.layers.moe import MoE
from dsv3_jax.ops.caches import LayerCache
from dsv3_jax.ops.routing import Routing
from dsv3_jax.sharding import constrain


class BlockOutput(NamedTuple):
    """Beside x: the routing (None if dense); unweighted loss terms and statistics, summed over sequences or tokens; and
    the new cache (None if none)."""

    routing: Routing | None
    sums: dict[str, jax.Array]
    cache: LayerCache | None


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). `moe=None` is a dense block."""

    config: ModelConfig
    moe: MixtureOfExperts | None
    pattern: LayerPattern

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, packing: Packing, cache: LayerCache | None = None
    ) -> tuple[jax.Array, BlockOutput]:
        config, routing = self.config, None
        normed_BTD = RMSNorm(config.norm_epsilon, name="attention_norm")(x_BTD)
        y_BTD, sums, cache = Attention(config, self.pattern, name="attention")(normed_BTD, packing, cache)
        x_BTD += y_BTD
        normed_BTD = RMSNorm(config.norm_epsilon, name="mlp_norm")(x_BTD)
        if self.moe is None:
            y_BTD, more = SwiGLU(config, config.dense_dim, name="mlp")(normed_BTD, packing)
        else:
            y_BTD, routing, more = MoE(config, self.moe, name="moe")(normed_BTD, packing)
            more |= routing.sums
        output = BlockOutput(routing, sums | more, cache)
        return constrain(x_BTD + y_BTD, (axes.BATCH, axes.LENGTH, axes.EMBED)), output
