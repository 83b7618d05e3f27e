"""The language model."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dsv3_jax import axes
from dsv3_jax.config import CapacityDispatch, Config, ConfigError, DeepExpert, LearnedGlobal, ModelConfig, Sparse
from dsv3_jax.layers.block import Block, BlockOutput
from dsv3_jax.layers.common import RMSNorm, parameter
from dsv3_jax.layers.inputs import CacheStep, Packing, make_packing
from dsv3_jax.layers.moe import BIAS_COLLECTION
from dsv3_jax.layers.mtp import PredictionModule, shift
from dsv3_jax.layers.projections import stored_widths
from dsv3_jax.models.prediction import Prediction, predict_all, run_module
from dsv3_jax.models.stack import (
    LayerGroup,
    add_sums,
    layer_groups,
    layer_of,
    layer_pattern,
    prediction_group,
    run_layers,
)
from dsv3_jax.ops.caches import Cache, LayerCache, cache_layout
from dsv3_jax.ops.losses import cross_entropy
from dsv3_jax.ops.patterns import Place, task_windows
from dsv3_jax.ops.routing import Routing
from dsv3_jax.sharding import constrain


class TransformerOutput(NamedTuple):
    """logits_BTV float32 (None if not asked for); hidden_BTD after the final norm; routing with a leading layer axis
    over the mixture-of-experts layers (None if there are none); sums, unweighted loss terms and statistics summed over
    sequences or real tokens, and layers, by name; the new cache if one was given; what the multi-token-prediction
    modules give, if asked for (their sums are in `sums`)."""

    logits_BTV: jax.Array | None
    hidden_BTD: jax.Array
    routing: Routing | None
    sums: dict[str, jax.Array]
    cache: Cache | None = None
    prediction: Prediction | None = None


class Transformer(nn.Module):
    """DeepSeek-V3-shaped decoder (arXiv:2412.19437): dense, then mixture-of-experts blocks, each kind stacked."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        *,
        window_BT: jax.Array | None = None,
        condition: jax.Array | None = None,
        key_B: jax.Array | None = None,
        cache: Cache | None = None,
        num_tokens_B: jax.Array | None = None,
        max_segments: int = 16,
        return_logits: bool = True,
        predict_ahead: bool = False,
    ) -> TransformerOutput:
        """Runs the model on tokens, int32.

        Args:
          positions_BT, segment_ids_BT: see `ops.patterns`. Default: each row is one document.
          window_BT: for layers whose window is set at run time, the window of each query, at most the pattern's.
          condition: what routers with a condition know of each token: int32 [B, T], 1 + its index in
            `config.moe.condition.tasks`, 0 for any other task; or embeddings [B, T, dim]. Default: 0.
          key_B: a random key a row, for noise, dropout and sampled gates; None, as in evaluation, for none of these.
          cache: from `make_cache` or from the last call: the tokens go on where each row stands. The first call may
            bring any number of tokens, later ones at most `cache.step` of them.
          num_tokens_B: with a cache, the real tokens of each row; the rest of the row is padding. Default: all. A row
            that grows beyond the cache's `max_length` gives NaN.
          max_segments: the most documents a row holds; matters for patterns with global positions, and to cuDNN's
            attention, which takes one. 1 without positions.
          return_logits: False saves the vocabulary product; `head_weight` and `ops.losses.cross_entropy` go on.
          predict_ahead: also runs the multi-token-prediction modules, for training; for decoding see `predict`.
        """
        config = self.config
        packing = self._packing(tokens_BT, positions_BT, segment_ids_BT, window_BT, cache, num_tokens_B, max_segments)
        std = config.init_std or (config.dim**-0.5 if config.tie_embeddings else 1.0)
        shape, logical = (config.vocab_size, config.dim), (axes.VOCAB, axes.FSDP_EMBED)
        embedding_VD = parameter(self, "embedding", nn.initializers.normal(std), shape, logical)
        x_BTD = embedded_BTD = self._embed(embedding_VD, tokens_BT)

        table_NC = None
        if config.moe is not None and config.moe.condition is not None:
            rows = len(config.moe.condition.tasks) + 1, config.moe.condition.dim
            table_NC = parameter(self, "condition_embedding", nn.initializers.normal(1.0), rows, (None, None))
        condition_BTC = self._condition(table_NC, tokens_BT, condition)
        packing = dataclasses.replace(packing, condition_BTC=condition_BTC, key_B=key_B)

        routing, sums, caches = None, {}, ()
        for group in layer_groups(config):
            before = None if cache is None else cache.layers[group.first : group.first + group.count]
            x_BTD, output = self._layers(group, x_BTD, packing, before)
            routing = output.routing or routing
            sums = add_sums(sums, output.sums)
            caches += output.cache or ()
        hidden_BTD = RMSNorm(config.norm_epsilon, name="final_norm")(x_BTD)
        if cache is not None:
            hidden_BTD, cache = _after_step(cache, packing, hidden_BTD, caches)
        logits_BTV = self._logits(embedding_VD, hidden_BTD, return_logits)
        prediction, group = None, prediction_group(config)
        if group is not None and self.is_initializing():
            self._initialise(PredictionModule, group, hidden_BTD, hidden_BTD, packing)
        elif predict_ahead:
            if group is None or cache is not None:
                raise ValueError("predict_ahead needs config.mtp, and goes without a cache; with one use `predict`")
            modules = self._stored(group)
            prediction, more = predict_all(config, modules, hidden_BTD, embedded_BTD, packing)
            sums = add_sums(sums, more)
        return TransformerOutput(logits_BTV, hidden_BTD, routing, sums, cache, prediction)

    def predict(
        self,
        module_index: int,
        hidden_BTD: jax.Array,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        *,
        window_BT: jax.Array | None = None,
        condition: jax.Array | None = None,
        cache: Cache | None = None,
        num_tokens_B: jax.Array | None = None,
        max_segments: int = 16,
    ) -> tuple[jax.Array, jax.Array, Cache | None]:
        """Runs one multi-token-prediction module: `apply(variables, ..., method="predict")`.

        Args:
          module_index: from 0.
          hidden_BTD: of position i, for module 0 `TransformerOutput.hidden_BTD`, else the first result of the module
            before.
          tokens_BT: the token at i + 1 + module_index.
          cache: from `make_prediction_cache` for this module, or from the last call.
          others: as `__call__` takes them, of position i.

        Returns:
          hidden_BTD for the next module; the same after the module's final norm, of which `head_weight` makes the
          logits of the token at i + 2 + module_index; the new cache if one was given.
        """
        config, group = self.config, _modules(self.config, module_index)
        packing = self._packing(tokens_BT, positions_BT, segment_ids_BT, window_BT, cache, num_tokens_B, max_segments)
        embedding_VD = nn.unbox(self.get_variable("params", "embedding"))
        table_NC = nn.unbox(self.get_variable("params", "condition_embedding"))
        packing = dataclasses.replace(packing, condition_BTC=self._condition(table_NC, tokens_BT, condition))
        own = {name: layer_of(tree, module_index) for name, tree in self._stored(group).items()}
        x_BTD, normed_BTD, output = run_module(
            config,
            module_index,
            own,
            hidden_BTD,
            self._embed(embedding_VD, tokens_BT),
            packing,
            None if cache is None else cache.layers[0],
        )
        if cache is not None:
            normed_BTD, cache = _after_step(cache, packing, normed_BTD, (output.cache,))
        return x_BTD, normed_BTD, cache

    def _embed(self, embedding_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = jnp.take(embedding_VD, tokens_BT, axis=0).astype(self.config.compute_dtype)
        return constrain(x_BTD, (axes.BATCH, axes.LENGTH, axes.EMBED))

    def _logits(self, embedding_VD: jax.Array, hidden_BTD: jax.Array, return_logits: bool) -> jax.Array | None:
        """Logits in float32, if asked for. The head is made either way."""
        config, head_DV = self.config, embedding_VD.T
        if not config.tie_embeddings:
            # std 1/D, not 1/sqrt(D): logits start small at every width (arXiv:2203.03466).
            init = nn.initializers.normal(config.init_std or 1 / config.dim)
            head_DV = parameter(self, "head", init, head_DV.shape, (axes.FSDP_EMBED, axes.VOCAB))
        if not return_logits:
            return None
        head_DV = head_DV.astype(config.compute_dtype)
        logits_BTV = jnp.einsum("BTD,DV->BTV", hidden_BTD, head_DV, preferred_element_type=jnp.float32)
        return constrain(logits_BTV, (axes.BATCH, axes.LENGTH, axes.VOCAB))

    def _condition(
        self, table_NC: jax.Array | None, tokens_BT: jax.Array, condition: jax.Array | None
    ) -> jax.Array | None:
        """Embeddings of the tasks, unless the caller brought embeddings of its own."""
        if table_NC is None:
            if condition is not None:
                raise ValueError("condition was given, and config.moe.condition is none: no router would see it")
            return None
        width = table_NC.shape[1]
        if condition is None:
            condition = jnp.zeros(tokens_BT.shape, jnp.int32)
        if jnp.issubdtype(condition.dtype, jnp.integer):
            condition = jnp.take(table_NC, condition, axis=0)
        if condition.shape != (*tokens_BT.shape, width):
            raise ValueError(f"condition has shape {condition.shape}, expected {(*tokens_BT.shape, width)}")
        return condition

    def _packing(
        self, tokens_BT, positions_BT, segment_ids_BT, window_BT, cache: Cache | None, num_tokens_B, max_segments
    ) -> Packing:
        B, T = tokens_BT.shape
        if window_BT is not None and task_windows(self.config.attention.pattern, ()) is None:
            raise ValueError("window_BT was given, and no layer has the pattern runtime_windowed")
        if (positions_BT is None) != (segment_ids_BT is None):
            raise ValueError("give both positions and segment ids, or neither: positions restart in each document")
        if cache is None:
            if num_tokens_B is not None:
                raise ValueError("num_tokens_B goes with a cache; without one, padding has segment id 0")
            if positions_BT is None:
                positions_BT, segment_ids_BT = jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.ones((B, T), jnp.int32)
                max_segments = 1
            return make_packing(self.config, Place(positions_BT, segment_ids_BT, window_BT), max_segments)
        if positions_BT is not None:
            raise ValueError("positions and segment ids follow from the cache; give num_tokens_B for padded rows")
        allowed = cache.max_length if cache.fresh else cache.step
        if allowed < T:
            bound = f"max_length={cache.max_length}" if cache.fresh else f"step={cache.step}"
            raise ValueError(f"{T} tokens a row were given to a cache of {bound}; make_cache takes both")
        new_B = jnp.full((B,), T, jnp.int32) if num_tokens_B is None else jnp.clip(num_tokens_B, 0, T)
        positions_BT = cache.length_B[:, None] + jnp.arange(T)
        segment_ids_BT = (jnp.arange(T) < new_B[:, None]).astype(jnp.int32)
        step = CacheStep(cache.length_B + new_B, cache.max_length, cache.step, cache.fresh)
        return make_packing(self.config, Place(positions_BT, segment_ids_BT, window_BT), 1, step)

    def _layers(
        self, group: LayerGroup, x_BTD: jax.Array, packing: Packing, caches: tuple[LayerCache, ...] | None
    ) -> tuple[jax.Array, BlockOutput]:
        config = self.config
        if self.is_initializing():
            self._initialise(Block, group, x_BTD, packing)
            return x_BTD, BlockOutput(None, {}, None)
        unroll = jax.default_backend() == "cpu" if config.unroll is None else config.unroll
        return run_layers(config, group, self._stored(group), x_BTD, packing, caches, unroll)

    def _initialise(self, module: type[Block] | type[PredictionModule], group: LayerGroup, *inputs: Any) -> None:
        """Makes the variables of a group, stacked on a leading layer axis."""
        make = nn.vmap(
            module,
            variable_axes={"params": 0, BIAS_COLLECTION: 0},
            split_rngs={"params": True},
            in_axes=cast(Any, None),
            axis_size=group.count,
            metadata_params={nn.PARTITION_NAME: axes.LAYERS},
        )
        make(self.config, group.moe, layer_pattern(self.config, 0), name=group.name)(*inputs)

    def _stored(self, group: LayerGroup) -> dict[str, Any]:
        """The variables of a group, by collection."""
        return {
            collection: self.get_variable(collection, group.name)
            for collection in ("params", BIAS_COLLECTION)
            if self.has_variable(collection, group.name)
        }


def _after_step(cache: Cache, packing: Packing, x_BTD: jax.Array, layers: tuple[Any, ...]) -> tuple[jax.Array, Cache]:
    """The cache after a call, and x, NaN in rows that it cannot hold: it has lost tokens, and nothing right is left."""
    assert packing.cache_step is not None
    length_B = packing.cache_step.length_B
    full_B11 = (length_B > cache.max_length)[:, None, None]
    cache = dataclasses.replace(cache, length_B=length_B, layers=layers, fresh=False)
    return jnp.where(full_B11, jnp.nan, x_BTD).astype(x_BTD.dtype), cache


def make_cache(config: ModelConfig, batch: int, max_length: int, step: int = 1) -> Cache:
    """An empty cache for `Transformer`: texts of up to `max_length` tokens, of which calls after the first add `step`.

    Raises:
      ConfigError: the model is not causal, or its experts need the whole text: a capacity, or deep experts.
    """
    return _make_cache(config, range(config.num_layers), batch, max_length, step)


def make_prediction_cache(config: ModelConfig, module_index: int, batch: int, max_length: int, step: int = 1) -> Cache:
    """An empty cache for one multi-token-prediction module (`Transformer.predict`), as `make_cache` for the model. It
    depends on the module, whose attention pattern may be its own. Raises `ValueError` if there is no such module."""
    layer = _modules(config, module_index).first + module_index
    return _make_cache(config, [layer], batch, max_length, step)


def _modules(config: ModelConfig, module_index: int) -> LayerGroup:
    """The multi-token-prediction modules, of which `module_index` is one."""
    group = prediction_group(config)
    if group is None or not 0 <= module_index < group.count:
        raise ValueError(f"module_index={module_index}: config.mtp is {config.mtp}")
    return group


def _make_cache(config: ModelConfig, layer_numbers: Sequence[int], batch: int, max_length: int, step: int) -> Cache:
    if not config.attention.causal:
        raise ConfigError("config.model.attention.causal=False: there is nothing to cache; only causal models decode")
    if config.moe is not None and isinstance(config.moe.dispatch, CapacityDispatch):
        raise ConfigError(
            "config.model.moe.dispatch=capacity: cannot decode, as it is a share of a length that is not known while a "
            "text grows; use GroupedDispatch(), which drops nothing"
        )
    if config.moe is not None and isinstance(config.moe.expert, DeepExpert):
        raise ConfigError(
            "config.model.moe.expert=deep: cannot decode, as no cache holds the keys of the experts' own layers; run "
            "the whole text through the model for each token, or train a model with FeedForward() experts"
        )
    layers = []
    for layer in layer_numbers:
        pattern = layer_pattern(config, layer)
        slots = cache_layout(pattern, max_length, step).slots
        arrays = [jnp.zeros((batch, slots, width), config.compute_dtype) for width in stored_widths(config)]
        if isinstance(pattern, LearnedGlobal):
            arrays.append(jnp.zeros((batch, slots), jnp.float32))
        if isinstance(pattern, Sparse):
            arrays.append(jnp.zeros((batch, slots, pattern.index_dim), config.compute_dtype))
        layers.append(tuple(arrays))
    return Cache(jnp.zeros((batch,), jnp.int32), tuple(layers), max_length, step)


def head_weight(config: ModelConfig, params: Any) -> jax.Array:
    """The vocabulary projection head_DV in the compute dtype, tied or not."""
    head_DV = params["embedding"].T if config.tie_embeddings else params["head"]
    return head_DV.astype(config.compute_dtype)


def task_conditions(config: ModelConfig, tasks: Sequence[str]) -> np.ndarray | None:
    """The condition of each task, int32: 0 for one that the config does not name; None if no router has a condition."""
    if config.moe is None or config.moe.condition is None:
        return None
    known = config.moe.condition.tasks
    return np.asarray([1 + known.index(task) if task in known else 0 for task in tasks], np.int32)


def summed_loss(
    config: Config,
    variables: Any,
    batch: dict[str, jax.Array],
    key_B: jax.Array | None = None,
    predict_ahead: bool = False,
) -> tuple[jax.Array, TransformerOutput]:
    """Σ over the real tokens of a packed batch of −log p(target), in nats, float32; and the output, without logits.

    Where a pattern or a router knows tasks, a token's task is its domain. `key_B` as `Transformer` takes it. With
    `predict_ahead` the output's sums hold the loss of each multi-token-prediction module, `mtp_1`, `mtp_2`, …, over the
    tokens whose target is of their own document.
    """
    domains = [domain.name for domain in config.data.domains]
    window_D = task_windows(config.model.attention.pattern, domains)
    condition_D = task_conditions(config.model, domains)
    output = Transformer(config.model).apply(
        variables,
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        window_BT=None if window_D is None else jnp.asarray(window_D)[batch["domain"]],
        condition=None if condition_D is None else jnp.asarray(condition_D)[batch["domain"]],
        key_B=key_B,
        max_segments=config.data.max_segments,
        return_logits=False,
        predict_ahead=predict_ahead,
    )
    output = cast(TransformerOutput, output)
    head_DV = head_weight(config.model, variables["params"])
    if output.prediction is not None:
        modules = zip(output.prediction.hidden_kBTD, output.prediction.segment_ids_kBT, strict=True)
        for k, (hidden_BTD, segment_BT) in enumerate(modules, 1):
            weights_BT = (segment_BT > 0).astype(jnp.float32)
            targets_BT = shift(batch["targets"], k)
            loss = cross_entropy(hidden_BTD, head_DV, targets_BT, weights_BT)
            output = output._replace(sums=output.sums | {f"mtp_{k}": loss})
    weights_BT = (batch["segment_ids"] > 0).astype(jnp.float32)
    return cross_entropy(output.hidden_BTD, head_DV, batch["targets"], weights_BT), output
