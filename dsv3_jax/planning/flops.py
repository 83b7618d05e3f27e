"""Parameters and FLOPs of a config, by hand: the formulas stand here, tests hold them against XLA's count."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax.config import (
    CrossExpertAttention,
    DeepExpert,
    FeedForward,
    Full,
    Latent,
    LayerPattern,
    LearnedGlobal,
    MixtureOfExperts,
    ModelConfig,
    ProbabilityMass,
    Router,
    Sparse,
)
from dsv3_jax.models.stack import layer_pattern, prediction_group
from dsv3_jax.models.transformer import Transformer
from dsv3_jax.ops.patterns import visible_keys


class ParameterCount(NamedTuple):
    """total: all parameters, as they are stored, multi-token-prediction modules included (they have no embedding and no
    head of their own). active: those that work for one token of the main model: no module; of the routed experts
    `experts_per_token` of num_experts, at their own width; of gated units the share that the gate is held at."""

    total: int
    active: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts the parameters that `Transformer` would create, by `jax.eval_shape`; embedding and head included."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens))["params"]
    total, active = 0, 0.0
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        size = math.prod(leaf.shape)
        total += size
        active += size * _active_share(config, [key.key for key in path])
    return ParameterCount(total, round(active))


def _active_share(config: ModelConfig, names: list[str]) -> float:
    """What share of a parameter works for one token, by its path."""
    moe, gate = config.moe, config.unit_gate
    last = names[-2:]
    if names[0] == "mtp":
        return 0.0
    if moe is not None and (last in (["moe", "w_in"], ["moe", "w_out"]) or "deep" in names):
        width = mean_width(moe) / moe.expert_dim
        return experts_per_token(moe.router) / moe.num_experts * width
    if gate is not None and last[0] in ("mlp", "shared") and last[1] in ("w_in", "w_out"):
        return gate.target
    return 1.0


def experts_per_token(router: Router) -> float:
    """Routed experts a token, on average: `target_k` where the gate decides, which is what its mass is moved to."""
    return router.target_k if isinstance(router, ProbabilityMass) else router.top_k


def mean_width(moe: MixtureOfExperts) -> float:
    """Units of a routed expert, averaged over the experts."""
    widths = moe.expert.widths if isinstance(moe.expert, FeedForward) else ()
    if not widths:
        return moe.expert_dim
    return sum(widths[e % len(widths)] for e in range(moe.num_experts)) / moe.num_experts


def forward_flops(config: ModelConfig, length: int) -> dict[str, float]:
    """Matmul FLOPs of a forward pass by part, per token of one document of `length` tokens.

    A product of a row with an [a, b] matrix counts 2 a b. Attention counts the visible keys only; norms, softmax,
    rotations and the embedding lookup are not counted. Routed experts count as if tokens were spread evenly over them,
    at their own widths; units that a gate switches off count nothing, and the share that is on is the gate's target.
    Multi-token prediction is not counted: see `prediction_flops`.
    """
    dense = config.num_dense_layers
    parts = _layer_flops(config, 0, dense, config.num_layers - dense, length)
    return parts | {"vocabulary head": 2.0 * config.dim * config.vocab_size}


def prediction_flops(config: ModelConfig, length: int) -> float:
    """What the multi-token-prediction modules add to `forward_flops` in training: of each its projection, its layer and
    the vocabulary head, on all positions, of which the last few of a document are computed in vain."""
    group, total = prediction_group(config), 0.0
    if group is None:
        return total
    dense, sparse = (1, 0) if group.moe is None else (0, 1)
    for index in range(group.count):
        layer = sum(_layer_flops(config, config.num_layers + index, dense, sparse, length).values())
        total += layer + 2.0 * 2 * config.dim * config.dim + 2.0 * config.dim * config.vocab_size
    return total


def _layer_flops(config: ModelConfig, first: int, dense: int, sparse: int, length: int) -> dict[str, float]:
    """Of `dense` and `sparse` layers from layer `first` on."""
    D, L, attention = config.dim, dense + sparse, config.attention
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
    patterns = [layer_pattern(config, layer) for layer in range(first, first + L)]
    keys = sum(visible_keys(pattern, length, attention.causal) for pattern in patterns)
    parts = {
        "attention projections": 2.0 * L * weights,
        "attention scores and values": 2.0 * H * (N + M) * keys,
        "learned patterns": sum(_pattern_flops(config, pattern, length) for pattern in patterns),
        "dense MLP": 2.0 * dense * 3 * D * config.dense_dim * _unit_share(config),
    }
    gated = dense
    if config.moe is not None:
        moe = config.moe
        parts |= {name: sparse * flops for name, flops in _expert_flops(config, moe, length).items()}
        gated += sparse if moe.num_shared_experts else 0
    if config.unit_gate is not None:
        parts["unit gate"] = 2.0 * gated * config.unit_gate.gate_dim * (D + config.unit_gate.blocks)
    return parts


def _unit_share(config: ModelConfig) -> float:
    """Of the units of dense MLPs and shared experts, those that are on."""
    return 1.0 if config.unit_gate is None else config.unit_gate.target


def _expert_flops(config: ModelConfig, moe: MixtureOfExperts, length: int) -> dict[str, float]:
    """Of one mixture-of-experts layer. Where the gate decides how many experts a token has, all count as the mean."""
    D, E, k = config.dim, moe.num_experts, experts_per_token(moe.router)
    condition = 0 if moe.condition is None else moe.condition.dim
    parts = {
        "router": 2.0 * (D + condition) * E,
        "routed experts": 2.0 * k * 3 * D * mean_width(moe),
        "shared experts": 2.0 * moe.num_shared_experts * 3 * D * moe.expert_dim * _unit_share(config),
    }
    match moe.expert:
        case DeepExpert(num_layers=n, num_heads=H, head_dim=N):
            parts["routed experts"] = 2.0 * k * n * (4 * D * H * N + 3 * D * moe.expert_dim)
            keys = 1 + (length - 1) / 2 * k / E  # itself, and of the earlier tokens those that chose this expert
            parts["attention in experts"] = 2.0 * k * n * 2 * H * N * keys
    if isinstance(moe.combination, CrossExpertAttention):
        H, N = moe.combination.num_heads, moe.combination.head_dim
        parts["cross-expert attention"] = 2.0 * k * (4 * D * H * N + 2 * k * H * N)
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
    """Matmul FLOPs a token of a training step: three times the forward pass with the multi-token-prediction modules,
    recomputation not counted."""
    return 3 * (sum(forward_flops(config, length).values()) + prediction_flops(config, length))
