"""A tiny model of each published architecture, with random weights, made without running the model."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsv3_jax import config as c
from dsv3_jax.interop.config_json import write_config
from dsv3_jax.interop.huggingface import nested
from dsv3_jax.interop.tensors import BIAS, leaf_shapes


def latent(router, pattern=None, query_latent_dim: int | None = 12, shared: int = 1, **changes) -> c.ModelConfig:
    projection = c.Latent(
        num_heads=2,
        query_latent_dim=query_latent_dim,
        latent_dim=8,
        nope_head_dim=6,
        rope_head_dim=4,
        value_head_dim=10,
    )
    settings: dict[str, Any] = {"num_layers": 3, "num_dense_layers": 1, "dense_dim": 40, "context_length": 64} | changes
    return c.ModelConfig(
        vocab_size=72,
        dim=32,
        attention=c.Attention(projection=projection, pattern=pattern or c.Full()),
        moe=c.MixtureOfExperts(num_experts=8, expert_dim=16, num_shared_experts=shared, router=router),
        **settings,
    )


def grouped(moe: c.MixtureOfExperts | None, qk_norm: bool = False, **changes) -> c.ModelConfig:
    settings: dict[str, Any] = {
        "num_layers": 3,
        "num_dense_layers": 0 if moe else 3,
        "dense_dim": 40,
        "context_length": 64,
    } | changes
    projection = c.GroupedQuery(num_heads=4, num_kv_heads=2, head_dim=10, qk_norm=qk_norm)
    return c.ModelConfig(vocab_size=72, dim=32, attention=c.Attention(projection=projection), moe=moe, **settings)


def softmax(**router) -> c.MixtureOfExperts:
    return c.MixtureOfExperts(num_experts=8, expert_dim=16, num_shared_experts=0, router=c.Softmax(**router))


SIGMOID = c.GroupedSigmoid(top_k=3, num_groups=4, top_groups=2)
SPARSE = c.Sparse(top_k=4, index_heads=3, index_dim=8)


def models() -> dict[str, c.ModelConfig]:
    """Model type -> config."""
    return {
        "deepseek_v3": latent(SIGMOID),
        "deepseek_v32": latent(SIGMOID, SPARSE, num_dense_layers=2),
        "deepseek_v2": latent(c.Softmax(top_k=3, normalize_weights=False, route_scale=2.0), None, None, shared=2),
        "llama": grouped(None),
        "qwen3_moe": grouped(softmax(normalize_weights=False), qk_norm=True, num_dense_layers=1),
        "mixtral": grouped(softmax(), norm_epsilon=1e-5),
    }


def with_mtp(config: c.ModelConfig, depth: int = 1) -> c.ModelConfig:
    """With multi-token-prediction modules."""
    return dataclasses.replace(config, mtp=c.MultiToken(depth))


def random_leaves(config: c.ModelConfig, seed: int = 0, dtype: str = "float32") -> dict:
    """Path -> weights: norms around 1, matrices of std 0.2, selection biases of both signs."""
    random = np.random.default_rng(seed)
    _, published = write_config(config)
    leaves = {}
    for path, shape in leaf_shapes(published.table()).items():
        value = random.normal(size=shape, scale=0.05 if "bias" in path else 0.2) + path.endswith("scale")
        leaves[path] = value.astype(np.float32 if "selection_bias" in path else jnp.dtype(dtype))
    if config.moe is not None and BIAS not in leaves:
        leaves[BIAS] = np.zeros((config.num_layers - config.num_dense_layers, config.moe.num_experts), np.float32)
    return leaves


def random_variables(config: c.ModelConfig, **settings) -> dict:
    """The same as a tree."""
    return nested(random_leaves(config, **settings))
