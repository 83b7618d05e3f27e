"""Experts that are stacks of Transformer layers."""

import jax
from flax import linen as nn

from dsv3_jax.config import DeepExpert, MixtureOfExperts, ModelConfig
from dsv3_jax.layers.inputs import Packing


class DeepExperts(nn.Module):
    """In the making."""

    config: ModelConfig
    moe: MixtureOfExperts
    expert: DeepExpert

    @nn.compact
    def __call__(self, x_BTD: jax.Array, experts_BTK: jax.Array, packing: Packing) -> jax.Array:
        raise NotImplementedError
