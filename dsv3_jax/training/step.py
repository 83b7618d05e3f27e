"""The train state and one training step."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax import axes
from dsv3_jax.config import AddedExpert, Config, ConfigError, ProbabilityMass
from dsv3_jax.evaluation.bits_per_byte import EvalStep, make_eval_step
from dsv3_jax.layers.moe import BIAS_COLLECTION
from dsv3_jax.models.transformer import Transformer, summed_loss
from dsv3_jax.ops.routing import (
    Routing,
    active_experts,
    load_by_context,
    load_entropy,
    update_mass,
)
from dsv3_jax.sharding import batch_sharding, constrain, shardings
from dsv3_jax.training import growth
from dsv3_jax.training.optimizer import keep_trainable, make_optimizer, make_schedule
from dsv3_jax.training.terms import layer_counts, loss_terms

Batch = dict[str, jax.Array]


class Load(NamedTuple):
    """Of the layers of a group: load_LE, tokens that chose each expert; tokens_L, all tokens; by_domain_LCE, the load
    of each domain, where routers know it."""

    load_LE: jax.Array
    tokens_L: jax.Array
    by_domain_LCE: jax.Array | None


@struct.dataclass
class TrainState:
    """step: int32, the number of updates made. seed: uint32, of what is random in a step. params: float32 masters.
    selection_bias: moved by loads."""

    step: jax.Array
    seed: jax.Array
    params: Any
    selection_bias: Any
    opt_state: Any

    def variables(self) -> dict[str, Any]:
        """What `Transformer.apply` takes."""
        return {"params": self.params, "selection_bias": self.selection_bias}


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a training batch."""
    shape = (config.train.batch_size, config.data.sequence_length)
    names = ("tokens", "targets", "positions", "segment_ids", "domain")
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}


def bias_statistics(selection_bias: Any) -> dict[str, jax.Array]:
    """How far the selection biases of each layer's active experts have moved."""
    metrics = {}
    for path, bias_LE in jax.tree_util.tree_flatten_with_path(selection_bias)[0]:
        if path[-1].key == "bias":
            std_L = jnp.std(bias_LE, axis=-1, where=active_experts(bias_LE))
            for layer, (std, high) in enumerate(zip(std_L, jnp.max(bias_LE, axis=-1))):
                metrics[f"router/bias_std/{path[0].key}/{layer}"] = std
                metrics[f"router/bias_max/{path[0].key}/{layer}"] = high
    return metrics


def active_counts(selection_bias: Any) -> dict[str, jax.Array]:
    """The number of active experts in each layer of a group, int32 [L], by the group's name."""
    leaves = jax.tree_util.tree_flatten_with_path(selection_bias)[0]
    return {path[0].key: jnp.sum(active_experts(x), axis=-1) for path, x in leaves if path[-1].key == "bias"}


class Trainer:
    """Initialises and updates a `TrainState` on a mesh. Compiles once; on one device the mesh is one of ones."""

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self._model = Transformer(config.model)
        train = config.train
        self._boxed = self._init_boxed()
        self.expert_axes = growth.find_expert_axes(self._boxed)
        self._optimizer = make_optimizer(train.optimizer, train.schedule, config.model.dim, self._keep)
        moe = config.model.moe
        noisy = moe is not None and (moe.router_noise > 0 or moe.expert_dropout > 0)
        self._is_random = noisy or config.model.unit_gate is not None
        self._schedule = make_schedule(config.train.schedule, config.train.optimizer.learning_rate)
        self.state_shapes = jax.eval_shape(self._init, np.uint32(0))
        self._check_trainable()
        self.state_shardings = self._state_shardings()
        self._batch_sharding = batch_sharding(mesh)
        replicated = NamedSharding(mesh, PartitionSpec())
        self._jit_init = jax.jit(self._init, out_shardings=self.state_shardings)
        self._jit_step = jax.jit(
            self._step,
            in_shardings=(self.state_shardings, self._batch_sharding),
            out_shardings=(self.state_shardings, replicated),
            donate_argnums=0,
        )
        self._jit_gradients = jax.jit(self._gradients)
        self._jit_grow = jax.jit(
            self._grow, out_shardings=self.state_shardings, donate_argnums=0, static_argnames="stage"
        )

    def init(self, seed: int) -> TrainState:
        """A fresh state, each array made where it lives."""
        with jax.set_mesh(self.mesh):
            return self._jit_init(np.uint32(seed))

    def abstract_state(self) -> Any:
        """Shapes, dtypes and shardings of the state, for restoring a checkpoint."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self.state_shapes, self.state_shardings
        )

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        """The compiled step: (state, batch) -> (state, metrics). The state is donated."""
        with jax.set_mesh(self.mesh):
            return self._jit_step.lower(self.abstract_state(), batch_shapes(self.config)).compile()

    @functools.cached_property
    def eval_step(self) -> EvalStep:
        """(params, selection_bias, batch) -> summed loss in nats."""
        return make_eval_step(self.config, self.mesh)

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update on a batch of numpy arrays. The old state is consumed."""
        return self.compiled(state, jax.device_put(batch, self._batch_sharding))

    def gradients(self, state: TrainState, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        """Gradients of the total loss and the loss terms, without an update: for tests and analysis."""
        with jax.set_mesh(self.mesh):
            gradients, terms, sums, _ = self._jit_gradients(
                state.params, state.selection_bias, batch, state.step, state.seed
            )
        return gradients, {name: sums[name] / term.count for name, term in terms.items()}

    def grow(self, state: TrainState, stage: growth.Stage) -> TrainState:
        """The state with the new experts of a stage. The old state is consumed."""
        with jax.set_mesh(self.mesh):
            return self._jit_grow(state, stage=stage)

    def _grow(self, state: TrainState, *, stage: growth.Stage) -> TrainState:
        settings = self.config.train.growth
        assert settings is not None
        return growth.grow(state, settings, self.expert_axes, stage)

    def _keep(self, tree: Any) -> Any:
        """Zeros for what is not trained."""
        train = self.config.train
        if isinstance(train.growth, AddedExpert):
            return growth.keep_added(tree, train.growth, self.expert_axes)
        return keep_trainable(tree, train.trainable)

    def _check_trainable(self) -> None:
        """Raises `ConfigError` for a word of `train.trainable` that names no parameter."""
        paths = jax.tree_util.tree_flatten_with_path(self.state_shapes.params)[0]
        known = {key.key for path, _ in paths for key in path} | {BIAS_COLLECTION}
        for word in self.config.train.trainable:
            if word not in known:
                words = ", ".join(sorted(known))
                raise ConfigError(f"config.train.trainable: {word!r} is in no parameter's path; known: {words}")

    def _init_boxed(self):
        tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        return jax.eval_shape(self._model.init, jax.random.key(0), tokens)

    def _init(self, seed):
        variables = nn.unbox(self._model.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32)))
        params = variables["params"]
        return TrainState(
            step=jnp.int32(0),
            seed=seed,
            params=params,
            selection_bias=growth.first_biases(
                self.config.train.growth, self.config.model.moe, variables.get("selection_bias", {})
            ),
            opt_state=self._optimizer.init(params),
        )

    def _state_shardings(self):
        tree = shardings(self.mesh, self._boxed)
        by_path = dict(jax.tree_util.tree_flatten_with_path(tree["params"])[0])
        replicated = NamedSharding(self.mesh, PartitionSpec())

        def optimizer_leaf(path, _):
            # A moment is laid out as its parameter: the parameter's path is the tail of the moment's.
            for start in range(len(path)):
                if path[start:] in by_path:
                    return by_path[path[start:]]
            return replicated

        return TrainState(
            step=cast(Any, replicated),
            seed=cast(Any, replicated),
            params=tree["params"],
            selection_bias=tree.get("selection_bias", {}),
            opt_state=jax.tree_util.tree_map_with_path(optimizer_leaf, self.state_shapes.opt_state),
        )

    def _loss_sums(self, params, selection_bias, batch: Batch, key_B):
        """Each loss term and statistic summed over the micro-batch, and the loads of each group of layers."""
        variables = {"params": params, "selection_bias": selection_bias}
        ahead = self.config.model.mtp is not None
        lm, output = summed_loss(self.config, variables, batch, key_B, predict_ahead=ahead)
        loads, domain_BT, prediction = {}, batch["domain"], output.prediction
        if output.routing is not None:
            segment_LBT = jnp.broadcast_to(batch["segment_ids"], (len(output.routing.load_E), *domain_BT.shape))
            loads["moe_layers"] = self._load(output.routing, segment_LBT, domain_BT)
        if prediction is not None and prediction.routing is not None:
            loads["mtp"] = self._load(prediction.routing, prediction.segment_ids_kBT, domain_BT)
        return {"lm": lm} | output.sums, loads

    def _load(self, routing: Routing, segment_LBT: jax.Array, domain_BT: jax.Array) -> Load:
        """Of layers that each count the tokens with a segment."""
        real_LBT, moe = segment_LBT > 0, self.config.model.moe
        tokens_L = jnp.sum(real_LBT, axis=(1, 2)).astype(jnp.float32)
        by_domain = None
        if moe is not None and moe.condition is not None:
            domains = len(self.config.data.domains)
            by_domain = load_by_context(routing.experts_BTK, domain_BT, real_LBT, domains, moe.num_experts)
        return Load(routing.load_E, tokens_L, by_domain)

    def _gradients(self, params, selection_bias, batch: Batch, step, seed):
        """Gradients of Σ weight · sum / count; the terms, all sums, and the loads, over all micro-batches."""
        terms = loss_terms(self.config, batch, step)
        batch = dict(batch)
        if self._is_random:  # a row's key depends on seed, step and its place in the batch, not on its micro-batch
            batch["row"] = jnp.arange(len(batch["tokens"]), dtype=jnp.uint32)
        step_key = jax.random.fold_in(jax.random.key(seed), step)

        def loss(params, micro):
            micro = dict(micro)
            row_B = micro.pop("row", None)
            key_B = None if row_B is None else jax.vmap(jax.random.fold_in, (None, 0))(step_key, row_B)
            sums, loads = self._loss_sums(params, selection_bias, micro, key_B)
            return sum(term.weight * (sums[name] / term.count) for name, term in terms.items()), (sums, loads)

        grad = jax.grad(loss, has_aux=True)
        count = self.config.train.microbatches
        if count == 1:
            gradients, (sums, loads) = grad(params, batch)
            return gradients, terms, sums, loads

        def cut(x):
            # Row r goes to micro-batch r % count: each device keeps its rows.
            x = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
            return constrain(x, (None, axes.BATCH, axes.LENGTH)[: x.ndim])

        def add(total, micro):
            return jax.tree.map(jnp.add, total, grad(params, micro)), None

        micros = jax.tree.map(cut, batch)
        shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], micros))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (gradients, (sums, loads)), _ = jax.lax.scan(add, zeros, micros)
        return gradients, terms, sums, loads

    def _step(self, state: TrainState, batch: Batch):
        gradients, terms, sums, loads = self._gradients(
            state.params, state.selection_bias, batch, state.step, state.seed
        )
        gradients = self._keep(gradients)  # before norm and moments: XLA then drops what makes the others
        updates, opt_state = self._optimizer.update(gradients, state.opt_state, state.params)
        trainable = self.config.train.trainable
        selection_bias = state.selection_bias
        if not trainable or BIAS_COLLECTION in trainable:
            selection_bias = self._update_selection(selection_bias, loads, state.step)
        values = {name: sums[name] / term.count for name, term in terms.items()}
        metrics: dict[str, Any] = {"loss": sum(terms[name].weight * value for name, value in values.items())}
        metrics |= {f"loss/{name}": value for name, value in values.items()}
        metrics["grad_norm"] = optax.global_norm(gradients)
        metrics["learning_rate"] = self._schedule(state.step)
        metrics |= self._statistics(sums, loads, batch, active_counts(selection_bias))
        metrics |= bias_statistics(selection_bias)
        new_state = TrainState(
            step=state.step + 1,
            seed=state.seed,
            params=optax.apply_updates(state.params, updates),
            selection_bias=selection_bias,
            opt_state=opt_state,
        )
        return new_state, metrics

    def _update_selection(self, selection_bias: Any, loads: dict[str, Load], step: jax.Array) -> Any:
        """Moves what loads move: biases towards balance, and the mass towards its mean k, in each layer."""
        moe = self.config.model.moe
        if moe is None:
            return selection_bias
        router = moe.router

        def update(path, x):
            load = loads[path[0].key]
            if path[-1].key == "mass":
                assert isinstance(router, ProbabilityMass)
                mean_k_L = jnp.sum(load.load_LE, axis=-1) / jnp.maximum(load.tokens_L, 1)
                return jnp.where(load.tokens_L > 0, update_mass(x, mean_k_L, router), x)
            return growth.update_bias(self.config.train.growth, moe, x, load.load_LE, step)

        return jax.tree_util.tree_map_with_path(update, selection_bias)

    def _statistics(
        self, sums: dict[str, jax.Array], loads: dict[str, Load], batch: Batch, active: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """What is logged of routers, gates and multi-token prediction; active: see `active_counts`.

        `router/entropy/X`, in nats, is of the load of domain X; where `router/tokens/X` is 0 it is 0 and says nothing.
        `tokens/mtp_k` counts what module k predicts.
        """
        seen = layer_counts(self.config.model, batch["segment_ids"])
        metrics = {f"tokens/mtp_{k}": count.tokens for k, (_, count) in enumerate(seen[1:], 1)}
        if loads:
            load_LE = jnp.concatenate([load.load_LE for load in loads.values()])
            tokens_L = jnp.concatenate([load.tokens_L for load in loads.values()])
            active_L = jnp.concatenate([active[group] for group in loads])
            mean_L = jnp.maximum(jnp.sum(load_LE, axis=-1) / active_L, 1e-9)
            metrics["router/active_experts"] = jnp.mean(active_L.astype(jnp.float32))
            metrics["router/max_over_mean"] = jnp.mean(jnp.max(load_LE, axis=-1) / mean_L)
            metrics["router/mean_k"] = jnp.sum(load_LE) / jnp.maximum(jnp.sum(tokens_L), 1)
            metrics["router/dropped"] = sums["dropped"] / jnp.maximum(jnp.sum(load_LE), 1)
            by_domain = [load.by_domain_LCE for load in loads.values() if load.by_domain_LCE is not None]
            for index, domain in enumerate(self.config.data.domains if by_domain else ()):
                load_LE = jnp.concatenate(by_domain)[:, index]
                metrics[f"router/entropy/{domain.name}"] = jnp.mean(load_entropy(load_LE))
                ours_BT = (batch["domain"] == index) & (batch["segment_ids"] > 0)
                metrics[f"router/tokens/{domain.name}"] = jnp.sum(ours_BT).astype(jnp.float32)
        if "active_units" in sums:
            tokens = sum(count.tokens * layers.gated for layers, count in seen)
            metrics["activation/active_share"] = sums["active_units"] / jnp.maximum(tokens, 1)
        return metrics
