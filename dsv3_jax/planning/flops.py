"""Parameters and FLOPs of a config, by hand: the formulas stand here, tests hold them against XLA's count."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax.config import Full, Latent, LayerPattern, LearnedGlobal, ModelConfig, Sparse
from dsv3_jax.models.transformer import Transformer
from dsv3_jax.ops.patterns import layer_patterns, visible_keys


class ParameterCount(NamedTuple):
    """total: all parameters. active: those that work for one token (of the routed experts, top_k of num_experts)."""

    total: int
    active: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts the parameters that `Transformer` would create, by `jax.eval_shape`; embedding and head included."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens))["params"]
    total = active = 0
    moe = config.moe
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        names, size = [key.key for key in path], math.prod(leaf.shape)
        total += size
        routed = moe is not None and names[-2:-1] == ["moe"] and names[-1] in ("w_in", "w_out")
        active += size * moe.router.top_k // moe.num_experts if moe and routed else size
    return ParameterCount(total, active)


def forward_flops(config: ModelConfig, length: int) -> dict[str, float]:
    """Matmul FLOPs of a forward pass by part, per token of one document of `length` tokens.

    A product of a row with an [a, b] matrix counts 2 a b. Attention counts the visible keys only; norms, softmax,
    rotations and the embedding lookup are not counted.
    """
    D, L, attention = config.dim, config.num_layers, config.attention
    projection = attention.projection
    H = projection.num_heads
    if isinstance(projection, Latent):
        N, M = projection.nope_head_dim + projection.rope_head_dim, projection.value_head_dim
        C, R, Q = projection.latent_dim, projection.rope_head_dim, projection.query_latent_dim
        queries = D * H * N if Q is None else D * Q + Q * H * N
        weights = queries + D * (C + R) + C * H * (projection.nope_head_dim + M) + H * M * D
    else:
        N = M = projection.head_dim
        weights = D * H * N + 2 * D * projection.num_kv_heads * N + H * M * D
    cycle = layer_patterns(attention.pattern)
    patterns = [cycle[layer % len(cycle)] for layer in range(L)]
    keys = sum(visible_keys(pattern, length, attention.causal) for pattern in patterns)
    parts = {
        "attention projections": 2.0 * L * weights,
        "attention scores and values": 2.0 * H * (N + M) * keys,
        "learned patterns": sum(_pattern_flops(config, pattern, length) for pattern in patterns),
        "dense MLP": 2.0 * config.num_dense_layers * 3 * D * config.dense_dim,
        "vocabulary head": 2.0 * D * config.vocab_size,
    }
    if config.moe is not None:
        moe, sparse = config.moe, L - config.num_dense_layers
        expert = 3 * D * moe.expert_dim
        parts["router"] = 2.0 * sparse * D * moe.num_experts
        parts["routed experts"] = 2.0 * sparse * moe.router.top_k * expert
        parts["shared experts"] = 2.0 * sparse * moe.num_shared_experts * expert
    return parts


def _pattern_flops(config: ModelConfig, pattern: LayerPattern, length: int) -> float:
    """Of the gate; of the indexer, which scores every earlier key."""
    projection, D = config.attention.projection, config.dim
    match pattern:
        case LearnedGlobal():
            return 2.0 * D
        case Sparse(index_heads=H, index_dim=N):
            Q = (projection.query_latent_dim if isinstance(projection, Latent) else None) or D
            keys = visible_keys(Full(), length, config.attention.causal)
            return 2.0 * (Q * H * N + D * N + D * H + keys * H * (N + 1))
    return 0.0


def training_flops(config: ModelConfig, length: int) -> float:
    """Matmul FLOPs a token of a training step: three times the forward pass, recomputation not counted."""
    return 3 * sum(forward_flops(config, length).values())
