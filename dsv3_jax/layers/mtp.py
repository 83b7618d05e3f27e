"""Multi-token prediction (arXiv:2412.19437, section 2.2): modules that each look one token further."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax import axes
from dsv3_jax.config import LayerPattern, MixtureOfExperts, ModelConfig
from dsv3_jax.layers.block import Block, BlockOutput
from dsv3_jax.layers.common import RMSNorm, weight
from dsv3_jax.layers.inputs import Packing
from dsv3_jax.ops.caches import LayerCache


def shift(x_BT: jax.Array, offset: int) -> jax.Array:
    """What stands `offset` positions further on in each row [B, T, ...]; zeros past its end."""
    length = x_BT.shape[1]
    padded = jnp.pad(x_BT, [(0, 0), (0, min(offset, length))] + [(0, 0)] * (x_BT.ndim - 2))
    return padded[:, min(offset, length) :]


def segments_ahead(segment_ids_BT: jax.Array, offset: int) -> jax.Array:
    """The document of each token that has `offset` more of it in its row; 0, as on padding, of the others."""
    return jnp.where(shift(segment_ids_BT, offset) == segment_ids_BT, segment_ids_BT, 0)


class PredictionModule(nn.Module):
    """Module k: block([norm(Emb(token i + k)); norm(hidden i)] W), where hidden is the main model's output after its
    final norm for k = 1, else what the block of module k − 1 gave.

    The embedding comes first, as in the published weights (`eh_proj`); the paper writes the hidden state first.
    `moe=None` has a dense block.

    Returns x_BTD of the block, for module k + 1; the same after this module's final norm, for the head; and the block's
    output.
    """

    config: ModelConfig
    moe: MixtureOfExperts | None
    pattern: LayerPattern

    @nn.compact
    def __call__(
        self, hidden_BTD: jax.Array, embedded_BTD: jax.Array, packing: Packing, cache: LayerCache | None = None
    ) -> tuple[jax.Array, jax.Array, BlockOutput]:
        config, D = self.config, self.config.dim
        embedded_BTD = RMSNorm(config.norm_epsilon, name="embedding_norm")(embedded_BTD)
        hidden_BTD = RMSNorm(config.norm_epsilon, name="hidden_norm")(hidden_BTD)
        both_BTI = jnp.concatenate([embedded_BTD, hidden_BTD], axis=-1)
        w_projection_ID = weight(self, config, "w_projection", (2 * D, D), (axes.FSDP_EMBED, None), 2 * D)
        x_BTD = jnp.einsum("BTI,ID->BTD", both_BTI, w_projection_ID)
        x_BTD, output = Block(config, self.moe, self.pattern, name="block")(x_BTD, packing, cache)
        return x_BTD, RMSNorm(config.norm_epsilon, name="final_norm")(x_BTD), output
