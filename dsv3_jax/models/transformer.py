"""The language model."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax import axes
from dsv3_jax.config import MixtureOfExperts, ModelConfig
from dsv3_jax.layers.attention import make_packing
from dsv3_jax.layers.block import Block
from dsv3_jax.layers.common import RMSNorm, parameter
from dsv3_jax.ops.losses import cross_entropy
from dsv3_jax.ops.routing import Routing
from dsv3_jax.sharding import constrain

# What the backward pass keeps of a block; the rest is computed again.
REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class TransformerOutput(NamedTuple):
    """logits_BTV float32 (None if not asked for); hidden_BTD after the final norm; routing with a leading layer axis
    over the mixture-of-experts layers (None if there are none)."""

    logits_BTV: jax.Array | None
    hidden_BTD: jax.Array
    routing: Routing | None


class Transformer(nn.Module):
    """DeepSeek-V3-shaped decoder (arXiv:2412.19437): dense, then mixture-of-experts blocks, each kind scanned."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        *,
        max_segments: int = 16,
        return_logits: bool = True,
    ) -> TransformerOutput:
        """Runs the model on tokens, int32.

        Args:
          positions_BT, segment_ids_BT: see `ops.patterns`. Default: each row is one document.
          max_segments: the most documents a row holds; matters for patterns with global positions only.
          return_logits: False saves the vocabulary product; `head_weight` and `ops.losses.cross_entropy` go on.
        """
        config = self.config
        B, T = tokens_BT.shape
        if (positions_BT is None) != (segment_ids_BT is None):
            raise ValueError("give both positions and segment ids, or neither: positions restart in each document")
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones((B, T), jnp.int32)
        packing = make_packing(config, positions_BT, segment_ids_BT, max_segments)

        std = config.init_std or (config.dim**-0.5 if config.tie_embeddings else 1.0)
        shape, logical = (config.vocab_size, config.dim), (axes.VOCAB, axes.FSDP_EMBED)
        embedding_VD = parameter(self, "embedding", nn.initializers.normal(std), shape, logical)
        x_BTD = jnp.take(embedding_VD, tokens_BT, axis=0).astype(config.compute_dtype)
        x_BTD = constrain(x_BTD, (axes.BATCH, axes.LENGTH, axes.EMBED))

        dense, sparse = config.num_dense_layers, config.num_layers - config.num_dense_layers
        routing = None
        if dense:
            x_BTD, _ = self._layers("dense_layers", dense, None)(x_BTD, packing)
        if sparse:
            x_BTD, routing = self._layers("moe_layers", sparse, config.moe)(x_BTD, packing)
        hidden_BTD = RMSNorm(config.norm_epsilon, name="final_norm")(x_BTD)

        if not config.tie_embeddings:
            # std 1/D, not 1/sqrt(D): logits start small at every width (arXiv:2203.03466).
            init = nn.initializers.normal(config.init_std or 1 / config.dim)
            head_DV = parameter(self, "head", init, shape[::-1], logical[::-1])
        else:
            head_DV = embedding_VD.T
        logits_BTV = None
        if return_logits:
            head_DV = head_DV.astype(config.compute_dtype)
            logits_BTV = jnp.einsum("BTD,DV->BTV", hidden_BTD, head_DV, preferred_element_type=jnp.float32)
            logits_BTV = constrain(logits_BTV, (axes.BATCH, axes.LENGTH, axes.VOCAB))
        return TransformerOutput(logits_BTV, hidden_BTD, routing)

    def _layers(self, name: str, length: int, moe: MixtureOfExperts | None):
        """A scan over `length` blocks with stacked parameters."""
        config = self.config
        block = Block
        if config.remat != "none":
            # prevent_cse: not needed inside a scan, and it costs; an unrolled scan needs it.
            block = nn.remat(Block, policy=REMAT[config.remat], prevent_cse=self._unroll())
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "selection_bias": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, nn.broadcast),
            length=length,
            unroll=length if self._unroll() else 1,
            metadata_params={nn.PARTITION_NAME: axes.LAYERS},
        )
        return stack(config, moe, name=name)

    def _unroll(self) -> bool:
        return jax.default_backend() == "cpu" if self.config.unroll is None else self.config.unroll


def head_weight(config: ModelConfig, params: Any) -> jax.Array:
    """The vocabulary projection head_DV in the compute dtype, tied or not."""
    head_DV = params["embedding"].T if config.tie_embeddings else params["head"]
    return head_DV.astype(config.compute_dtype)


def summed_loss(
    config: ModelConfig, variables: Any, batch: dict[str, jax.Array], max_segments: int
) -> tuple[jax.Array, TransformerOutput]:
    """Σ over the real tokens of a packed batch of −log p(target), in nats, float32; and the output, without logits."""
    output = Transformer(config).apply(
        variables,
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        max_segments=max_segments,
        return_logits=False,
    )
    output = cast(TransformerOutput, output)
    weights_BT = (batch["segment_ids"] > 0).astype(jnp.float32)
    head_DV = head_weight(config, variables["params"])
    return cross_entropy(output.hidden_BTD, head_DV, batch["targets"], weights_BT), output
