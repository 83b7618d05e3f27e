"""Multi-token prediction: the modules one after another, each on the hidden states of the one before."""

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig
from dsv3_jax.layers.block import BlockOutput
from dsv3_jax.layers.inputs import Packing
from dsv3_jax.layers.mtp import PredictionModule, segments_ahead, shift
from dsv3_jax.models.stack import REMAT, add_sums, cut, layer_pattern, prediction_group, stack
from dsv3_jax.ops.caches import LayerCache
from dsv3_jax.ops.routing import Routing


class Prediction(NamedTuple):
    """Of each multi-token-prediction module, on a leading axis of modules: hidden_kBTD after its final norm, of which
    the head makes the logits of the token at i + 1 + k; segment_ids_kBT, 0 where no such token is in the document; its
    routing (None if dense)."""

    hidden_kBTD: jax.Array
    segment_ids_kBT: jax.Array
    routing: Routing | None


def run_module(
    config: ModelConfig,
    index: int,
    variables: Any,
    hidden_BTD: jax.Array,
    embedded_BTD: jax.Array,
    packing: Packing,
    cache: LayerCache | None = None,
) -> tuple[jax.Array, jax.Array, BlockOutput]:
    """Module `index`, from 0, with its own variables; see `layers.mtp.PredictionModule`."""
    group, layer = prediction_group(config), config.num_layers + index
    assert group is not None
    module = PredictionModule(config, group.moe, layer_pattern(config, layer), parent=None)
    return cast(Any, module.apply)(variables, hidden_BTD, embedded_BTD, packing.at_layer(layer), cache)


def predict_all(
    config: ModelConfig, variables: Any, hidden_BTD: jax.Array, embedded_BTD: jax.Array, packing: Packing
) -> tuple[Prediction, dict[str, jax.Array]]:
    """Runs every module on a batch, and adds up their sums.

    Module k joins hidden i with the embedding of token i + k of the same row. Where that is of another document, or the
    row has ended, i counts as padding: nothing attends to it, and no load, loss or statistic sees it.

    Args:
      variables: by collection, stacked on a leading axis of modules, or a tuple of modules.
      hidden_BTD: of the main model after its final norm. embedded_BTD: its tokens.
    """
    depth = 0 if config.mtp is None else config.mtp.depth
    modules = {name: tree if isinstance(tree, tuple) else tuple(cut(tree, depth)) for name, tree in variables.items()}
    normed, segments, routings, sums = [], [], [], {}
    for index in range(depth):
        segment_BT = segments_ahead(packing.place.segment_BT, index + 1)
        ahead = dataclasses.replace(packing, place=packing.place._replace(segment_BT=segment_BT))
        own = {name: trees[index] for name, trees in modules.items()}
        run = functools.partial(run_module, config, index)
        if config.remat != "none":
            run = jax.checkpoint(run, policy=REMAT[config.remat])
        hidden_BTD, normed_BTD, output = run(own, hidden_BTD, shift(embedded_BTD, index + 1), ahead)
        normed.append(normed_BTD)
        segments.append(segment_BT)
        routings.append(output.routing)
        sums = add_sums(sums, output.sums)
    return Prediction(jnp.stack(normed), jnp.stack(segments), stack(routings)), sums
