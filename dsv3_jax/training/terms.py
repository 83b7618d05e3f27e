"""The loss terms of a config: their weights, and what each sum is divided by."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import Config, ModelConfig, MultiToken, Sparse
from dsv3_jax.layers.mtp import segments_ahead
from dsv3_jax.models.stack import layer_pattern, prediction_group
from dsv3_jax.ops.patterns import layer_patterns

# Terms that may be exactly zero while they are on: the share of units that are on can be the target's.
MAY_BE_ZERO = ("activation",)


class Term(NamedTuple):
    """weight: in the total; a number, or an array if it depends on the step. count: of what `sums` were summed over."""

    weight: Any
    count: jax.Array


class Counts(NamedTuple):
    """Real tokens, and sequences with any; float32."""

    tokens: jax.Array
    sequences: jax.Array


class Layers(NamedTuple):
    """How many layers have a mixture of experts, how many an indexer, and how many MLPs a unit gate."""

    moe: int
    indexed: int
    gated: int


def count_batch(segment_ids_BT: jax.Array) -> Counts:
    """Counts what is not padding."""
    real_BT = segment_ids_BT > 0
    return Counts(*(jnp.sum(x).astype(jnp.float32) for x in (real_BT, jnp.any(real_BT, axis=-1))))


def _describe(model: ModelConfig, dense: int, moe: int, first: int) -> Layers:
    """`dense` and `moe` layers from layer `first` on."""
    patterns = [layer_pattern(model, layer) for layer in range(first, first + dense + moe)]
    shared = model.moe is not None and model.moe.num_shared_experts > 0
    gated = 0 if model.unit_gate is None else dense + (moe if shared else 0)
    return Layers(moe, sum(isinstance(pattern, Sparse) for pattern in patterns), gated)


def stack_layers(model: ModelConfig) -> Layers:
    """Of the main model."""
    moe = 0 if model.moe is None else model.num_layers - model.num_dense_layers
    return _describe(model, model.num_layers - moe, moe, 0)


def module_layers(model: ModelConfig) -> list[Layers]:
    """Of each multi-token-prediction module."""
    group = prediction_group(model)
    if group is None:
        return []
    dense, moe = (1, 0) if group.moe is None else (0, 1)
    return [_describe(model, dense, moe, group.first + index) for index in range(group.count)]


def layer_counts(model: ModelConfig, segment_ids_BT: jax.Array) -> list[tuple[Layers, Counts]]:
    """What the main model and each multi-token-prediction module have, and what they see of a batch."""
    modules = module_layers(model)
    ahead = [count_batch(segments_ahead(segment_ids_BT, k)) for k in range(1, len(modules) + 1)]
    return [(stack_layers(model), count_batch(segment_ids_BT)), *zip(modules, ahead, strict=True)]


def prediction_weight(mtp: MultiToken, step: Any) -> Any:
    """Of the loss of each module (arXiv:2412.19437, equation 25), at a step."""
    if mtp.late_step is None:
        return mtp.weight / mtp.depth
    if isinstance(step, int):
        return (mtp.weight if step < mtp.late_step else mtp.late_weight) / mtp.depth
    return jnp.where(step < mtp.late_step, mtp.weight, mtp.late_weight) / mtp.depth


def term_weights(config: Config, step: Any = 0) -> dict[str, Any]:
    """The weight of each term of the total loss, by name."""
    model, weights = config.model, {"lm": 1.0}
    if model.moe is not None and stack_layers(model).moe:
        router = model.moe.router
        weights |= {"balance": router.balance_weight} | ({"z": router.z_weight} if router.z_weight else {})
    indexed = [pattern for pattern in layer_patterns(model.attention.pattern) if isinstance(pattern, Sparse)]
    if any(layers.indexed for layers in (stack_layers(model), *module_layers(model))):
        weights["indexer"] = indexed[0].loss_weight
    if model.unit_gate is not None:
        weights["activation"] = model.unit_gate.budget_weight
    if model.mtp is not None:
        weight = prediction_weight(model.mtp, step)
        weights |= {f"mtp_{k}": weight for k in range(1, model.mtp.depth + 1)}
    return weights


def loss_terms(config: Config, batch: dict[str, jax.Array], step: jax.Array | int) -> dict[str, Term]:
    """Every term of the total loss by name: Σ weight · sum / count.

    Counts are of the whole batch, so that micro-batches add up to exactly the loss of the undivided batch. A
    multi-token-prediction module counts the tokens that it predicts, in the terms of its router and the like too.
    """
    seen = layer_counts(config.model, batch["segment_ids"])
    counts = {
        "lm": seen[0][1].tokens,
        "balance": sum(count.sequences * layers.moe for layers, count in seen),
        "z": sum(count.tokens * layers.moe for layers, count in seen),
        "indexer": sum(count.tokens * layers.indexed for layers, count in seen),
        "activation": sum(count.sequences * layers.gated for layers, count in seen),
    }
    counts |= {f"mtp_{k}": count.tokens for k, (_, count) in enumerate(seen[1:], 1)}
    return {name: Term(weight, jnp.maximum(counts[name], 1)) for name, weight in term_weights(config, step).items()}
