"""The loss terms of a config: their weights, and what each sum is divided by."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import Config, ModelConfig, Sparse
from dsv3_jax.ops.patterns import layer_patterns


class Term(NamedTuple):
    """weight: in the total; a number, or an array if it depends on the step. count: of what `sums` were summed over."""

    weight: Any
    count: jax.Array


class Counts(NamedTuple):
    """Of a whole batch: real tokens, and sequences with any; float32, at least 1."""

    tokens: jax.Array
    sequences: jax.Array


def count_batch(segment_ids_BT: jax.Array) -> Counts:
    """Counts what is not padding."""
    real_BT = segment_ids_BT > 0
    tokens, sequences = jnp.sum(real_BT), jnp.sum(jnp.any(real_BT, axis=-1))
    return Counts(*(jnp.maximum(x, 1).astype(jnp.float32) for x in (tokens, sequences)))


def moe_layers(model: ModelConfig) -> int:
    """Mixture-of-experts layers of the stack."""
    return 0 if model.moe is None else model.num_layers - model.num_dense_layers


def indexed_layers(model: ModelConfig) -> list[Sparse]:
    """The patterns of the layers with an indexer."""
    cycle = layer_patterns(model.attention.pattern)
    patterns = [cycle[layer % len(cycle)] for layer in range(model.num_layers)]
    return [pattern for pattern in patterns if isinstance(pattern, Sparse)]


def gated_mlps(model: ModelConfig) -> int:
    """MLPs with a unit gate: of the dense layers, and the shared experts."""
    if model.unit_gate is None:
        return 0
    shared = model.moe is not None and model.moe.num_shared_experts > 0
    return model.num_dense_layers + (moe_layers(model) if shared else 0)


def term_weights(config: Config, step: Any = 0) -> dict[str, Any]:
    """The weight of each term of the total loss, by name."""
    model, weights = config.model, {"lm": 1.0}
    if model.moe is not None and moe_layers(model):
        router = model.moe.router
        weights |= {"balance": router.balance_weight} | ({"z": router.z_weight} if router.z_weight else {})
    indexed = indexed_layers(model)
    if indexed:
        weights["indexer"] = indexed[0].loss_weight
    if model.unit_gate is not None:
        weights["activation"] = model.unit_gate.budget_weight
    return weights


def loss_terms(config: Config, batch: dict[str, jax.Array], step: jax.Array | int) -> dict[str, Term]:
    """Every term of the total loss by name: Σ weight · sum / count.

    Counts are of the whole batch, so that micro-batches add up to exactly the loss of the undivided batch.
    """
    model = config.model
    tokens, sequences = count_batch(batch["segment_ids"])
    counts = {
        "lm": tokens,
        "balance": sequences * moe_layers(model),
        "z": tokens * moe_layers(model),
        "indexer": tokens * len(indexed_layers(model)),
        "activation": sequences * gated_mlps(model),
    }
    return {name: Term(weight, counts[name]) for name, weight in term_weights(config, step).items()}
