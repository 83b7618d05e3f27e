"""Layers that are alike, one after another: parameters stacked on a leading layer axis, patterns taken in turn."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import LayerPattern, MixtureOfExperts, ModelConfig
from dsv3_jax.layers.block import Block, BlockOutput
from dsv3_jax.layers.inputs import Packing
from dsv3_jax.ops.caches import LayerCache
from dsv3_jax.ops.patterns import layer_patterns

# What the backward pass keeps of a block; the rest is computed again.
REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class LayerGroup(NamedTuple):
    """Layers first … first + count − 1 of the model, dense if `moe=None`; `name` is their place in the variables."""

    name: str
    first: int
    count: int
    moe: MixtureOfExperts | None


def layer_groups(config: ModelConfig) -> list[LayerGroup]:
    """The dense layers, then those with experts; groups that are there."""
    dense = config.num_dense_layers
    groups = [
        LayerGroup("dense_layers", 0, dense, None),
        LayerGroup("moe_layers", dense, config.num_layers - dense, config.moe),
    ]
    return [group for group in groups if group.count]


def prediction_group(config: ModelConfig) -> LayerGroup | None:
    """The multi-token-prediction modules, if there are any: layers that follow the last one, and are like it."""
    if config.mtp is None:
        return None
    moe = config.moe if config.num_dense_layers < config.num_layers else None
    return LayerGroup("mtp", config.num_layers, config.mtp.depth, moe)


def layer_pattern(config: ModelConfig, layer: int) -> LayerPattern:
    """The attention pattern of a layer; patterns take turns."""
    cycle = layer_patterns(config.attention.pattern)
    return cycle[layer % len(cycle)]


def layer_of(tree: Any, index: int) -> Any:
    """One layer of a stacked tree, or of a tuple of layers."""
    return tree[index] if isinstance(tree, tuple) else jax.tree.map(lambda x: x[index], tree)


def unstack_layers(config: ModelConfig, variables: Any) -> Any:
    """Variables whose groups are tuples of layers instead of stacked arrays: decoding then slices no weights."""
    groups = [*layer_groups(config), prediction_group(config)]
    counts = {group.name: group.count for group in groups if group is not None}

    def unstack(name, tree):
        if name not in counts or isinstance(tree, tuple):
            return tree
        return tuple(layer_of(tree, i) for i in range(counts[name]))

    return {collection: {k: unstack(k, v) for k, v in tree.items()} for collection, tree in variables.items()}


def cut(tree: Any, count: int) -> list[Any]:
    """Leading axis into `count` parts, and the axis of one away: the gradient is one concatenation."""
    leaves, structure = jax.tree.flatten(tree)
    parts = [[jnp.squeeze(part, 0) for part in jnp.split(leaf, count)] for leaf in leaves]
    return [jax.tree.unflatten(structure, [part[i] for part in parts]) for i in range(count)]


def stack(trees: list[Any]) -> Any:
    """The inverse of `cut`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def add_sums(total: dict[str, jax.Array], more: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Sums by name, those of several layers added up."""
    return total | {name: jnp.sum(value) + total.get(name, 0.0) for name, value in more.items()}


def run_layers(
    config: ModelConfig,
    group: LayerGroup,
    variables: Any,
    x_BTD: jax.Array,
    packing: Packing,
    caches: tuple[LayerCache, ...] | None,
    unroll: bool,
) -> tuple[jax.Array, BlockOutput]:
    """Runs a group of layers. Each collection of `variables` is stacked on a leading axis, or a tuple of layers.

    A scan over the period of the patterns; layer by layer with caches, which are updated in place, one array a layer.
    Routing and sums come back with a leading layer axis, caches as a tuple.
    """
    cycle = layer_patterns(config.attention.pattern)
    patterns = [layer_pattern(config, group.first + i) for i in range(group.count)]

    def run_block(pattern, x_BTD, variables, layer, cache=None):
        block = Block(config, group.moe, pattern, parent=None)
        return block.apply(variables, x_BTD, packing.at_layer(layer), cache)

    if config.remat != "none":
        # prevent_cse: not needed inside a scan, and it costs; an unrolled scan needs it.
        run_block = jax.checkpoint(
            run_block, policy=REMAT[config.remat], prevent_cse=unroll or len(cycle) > 1, static_argnums=0
        )

    unstacked = any(isinstance(tree, tuple) for tree in variables.values())
    if unstacked or caches is not None:
        outputs: list[Any] = []
        for i, pattern in enumerate(patterns):
            own = {name: layer_of(tree, i) for name, tree in variables.items()}
            x_BTD, output = run_block(pattern, x_BTD, own, group.first + i, None if caches is None else caches[i])
            outputs.append(output)
        new_caches = None if caches is None else tuple(output.cache for output in outputs)
        stacked = stack([output._replace(cache=None) for output in outputs])
        return x_BTD, stacked._replace(cache=new_caches)

    def run_slots(x_BTD, slots, count):
        """Layers that follow each other, each with the pattern of its place in the period."""
        variables, layers, outputs = *slots, []
        for i, (pattern, own) in enumerate(zip(patterns, cut(variables, count))):
            x_BTD, output = run_block(pattern, x_BTD, own, layers[i])
            outputs.append(output)
        return x_BTD, stack(outputs)

    n = len(cycle)
    whole, rest = divmod(group.count, n)
    slots, outputs = (variables, group.first + jnp.arange(group.count)), []
    head = jax.tree.map(lambda x: x[: whole * n], slots)
    tail = jax.tree.map(lambda x: x[whole * n :], slots)
    if whole:
        periods = jax.tree.map(lambda x: x.reshape(whole, n, *x.shape[1:]), head)
        x_BTD, output = jax.lax.scan(lambda x, own: run_slots(x, own, n), x_BTD, periods, unroll=whole if unroll else 1)
        outputs.append(jax.tree.map(lambda x: x.reshape(whole * n, *x.shape[2:]), output))
    if rest:  # of the last, unfinished period
        x_BTD, output = run_slots(x_BTD, tail, rest)
        outputs.append(output)
    return x_BTD, jax.tree.map(lambda *xs: jnp.concatenate(xs), *outputs)
