"""Attention maps of a model on given tokens."""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig
from dsv3_jax.layers.attention import make_packing, make_projection
from dsv3_jax.layers.block import Block
from dsv3_jax.layers.common import RMSNorm
from dsv3_jax.ops.patterns import visible


def _layer_variables(config: ModelConfig, variables: Any, layer: int) -> tuple[Any, Any]:
    """The variables of one block, cut out of its stack, and the block's mixture of experts (None if dense)."""
    dense = config.num_dense_layers
    group, index = ("dense_layers", layer) if layer < dense else ("moe_layers", layer - dense)
    own = {name: tree[group] for name, tree in variables.items() if group in tree}
    return jax.tree.map(lambda x: x[index], own), None if layer < dense else config.moe


def attention_weights(config: ModelConfig, variables: Any, tokens_BT: jax.Array, layer: int) -> jax.Array:
    """The probabilities weights_BHTS with which each query of a layer reads each key, float32. Rows sum to 1.

    Runs the layers below one by one and computes softmax(scale · q kᵀ + mask) from the layer's projections, whole: for
    looking at short texts. Raises IndexError for a layer that is not there.
    """
    if not 0 <= layer < config.num_layers:
        raise IndexError(f"layer {layer}: the model has layers 0 to {config.num_layers - 1}")
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    packing = make_packing(config, positions_BT, jnp.ones_like(positions_BT))
    x_BTD = jnp.take(variables["params"]["embedding"], tokens_BT, axis=0).astype(config.compute_dtype)
    for below in range(layer):
        block_variables, moe = _layer_variables(config, variables, below)
        x_BTD = jax.jit(Block(config, moe).apply)(block_variables, x_BTD, packing)[0]
    params = _layer_variables(config, variables, layer)[0]["params"]
    normed_BTD: Any = RMSNorm(config.norm_epsilon).apply({"params": params["attention_norm"]}, x_BTD)
    projection = {"params": params["attention"]["projection"]}
    projected: Any = make_projection(config).apply(projection, normed_BTD, packing.rope)
    q_BTHN, k_BTGN, _ = projected
    k_BTHN = jnp.repeat(k_BTGN, q_BTHN.shape[2] // k_BTGN.shape[2], axis=2)
    scores_BHTS = jnp.einsum("BTHN,BSHN->BHTS", q_BTHN, k_BTHN, preferred_element_type=jnp.float32)
    mask_BTS = visible(config.attention.pattern, positions_BT)
    scores_BHTS = jnp.where(mask_BTS[:, None], scores_BHTS * q_BTHN.shape[-1] ** -0.5, -jnp.inf)
    return jax.nn.softmax(scores_BHTS, axis=-1)
