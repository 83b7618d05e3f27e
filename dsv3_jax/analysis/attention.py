"""Attention maps of a model on given tokens."""

from typing import Any, cast

import jax
import jax.numpy as jnp

from dsv3_jax.config import LearnedGlobal, ModelConfig, Sparse
from dsv3_jax.layers.block import Block
from dsv3_jax.layers.common import RMSNorm
from dsv3_jax.layers.indexer import Gate, Indexer
from dsv3_jax.layers.inputs import make_packing
from dsv3_jax.layers.projections import Heads, make_projection, softmax_scale
from dsv3_jax.models.stack import layer_groups, unstack_layers
from dsv3_jax.ops import attention as ops
from dsv3_jax.ops.indexing import Index, index_scores
from dsv3_jax.ops.patterns import Place, best_keys, layer_patterns, visible


def attention_weights(config: ModelConfig, variables: Any, tokens_BT: jax.Array, layer: int) -> jax.Array:
    """The probabilities weights_BHTS with which each query of a layer reads each key, float32.

    Rows sum to 1, or to less where the model has sinks. Runs the layers below one by one and computes the whole matrix:
    for looking at short texts. Raises IndexError for a layer that is not there.
    """
    if not 0 <= layer < config.num_layers:
        raise IndexError(f"layer {layer}: the model has layers 0 to {config.num_layers - 1}")
    position_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    place = Place(position_BT, jnp.ones_like(position_BT))
    packing, cycle = make_packing(config, place), layer_patterns(config.attention.pattern)
    x_BTD = jnp.take(variables["params"]["embedding"], tokens_BT, axis=0).astype(config.compute_dtype)
    unstacked, params = unstack_layers(config, variables), {}
    for group in layer_groups(config):
        for index in range(group.count):
            number = group.first + index
            own = {name: tree[group.name][index] for name, tree in unstacked.items() if group.name in tree}
            if number == layer:
                params = own["params"]
            if number < layer:
                block = Block(config, group.moe, cycle[number % len(cycle)])
                x_BTD = cast(Any, jax.jit(block.apply)(own, x_BTD, packing))[0]
    normed_BTD = cast(jax.Array, RMSNorm(config.norm_epsilon).apply({"params": params["attention_norm"]}, x_BTD))
    own, pattern = params["attention"], cycle[layer % len(cycle)]
    heads = cast(Heads, make_projection(config).apply({"params": own["projection"]}, normed_BTD, packing.rope))
    gate_BT = None
    if isinstance(pattern, LearnedGlobal):
        gate_BT = cast(jax.Array, Gate(config).apply({"params": own["gate"]}, normed_BTD))
    mask_BTS, bias_BTS = visible(pattern, place, place, causal=config.attention.causal, gate_BS=gate_BT)
    if isinstance(pattern, Sparse) and pattern.stage == "sparse":
        indexer = Indexer(config, pattern)
        args = (normed_BTD, heads.query_input_BTQ, packing.rope)
        scores_BTS = index_scores(cast(Index, indexer.apply({"params": own["indexer"]}, *args)))
        mask_BTS &= best_keys(jnp.where(mask_BTS, scores_BTS, -jnp.inf), pattern.top_k)
    scale, softcap = softmax_scale(config.attention), config.attention.softcap
    q, k, v = heads.q_BTHN, heads.k_BTGN, heads.v_BTGM
    _, lse_BHT = ops.reference_attention(q, k, v, mask_BTS, scale, bias_BTS, softcap)
    if config.attention.sinks:
        lse_BHT = jnp.logaddexp(lse_BHT, own["sinks"][:, None])
    return ops.attention_weights(q, k, mask_BTS, scale, lse_BHT, softcap, bias_BTS)
