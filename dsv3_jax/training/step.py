"""The train state and one training step."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax import axes
from dsv3_jax.config import Config, ConfigError, Sparse
from dsv3_jax.evaluation.bits_per_byte import EvalStep, make_eval_step
from dsv3_jax.layers.moe import BIAS_COLLECTION
from dsv3_jax.models.transformer import Transformer, summed_loss
from dsv3_jax.ops.patterns import layer_patterns
from dsv3_jax.ops.routing import update_selection_bias
from dsv3_jax.sharding import batch_sharding, constrain, shardings
from dsv3_jax.training.optimizer import keep_trainable, make_optimizer, make_schedule

Batch = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """step: int32, the number of updates made. params: float32 masters. selection_bias: moved by loads."""

    step: jax.Array
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


class Trainer:
    """Initialises and updates a `TrainState` on a mesh. Compiles once; on one device the mesh is one of ones."""

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self._model = Transformer(config.model)
        train = config.train
        self._optimizer = make_optimizer(train.optimizer, train.schedule, config.model.dim, train.trainable)
        self._schedule = make_schedule(config.train.schedule, config.train.optimizer.learning_rate)
        self.state_shapes = jax.eval_shape(self._init, jax.random.key(0))
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

    def init(self, seed: int) -> TrainState:
        """A fresh state, each array made where it lives."""
        with jax.set_mesh(self.mesh):
            return self._jit_init(jax.random.key(seed))

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
            gradients, terms, _ = jax.jit(self._gradients)(state.params, state.selection_bias, batch)
        return gradients, terms

    def _check_trainable(self) -> None:
        """Raises `ConfigError` for a word of `train.trainable` that names no parameter."""
        paths = jax.tree_util.tree_flatten_with_path(self.state_shapes.params)[0]
        known = {key.key for path, _ in paths for key in path} | {BIAS_COLLECTION}
        for word in self.config.train.trainable:
            if word not in known:
                words = ", ".join(sorted(known))
                raise ConfigError(f"config.train.trainable: {word!r} is in no parameter's path; known: {words}")

    def _boxed(self):
        tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        return jax.eval_shape(self._model.init, jax.random.key(0), tokens)

    def _init(self, key):
        variables = nn.unbox(self._model.init(key, jnp.zeros((1, 2), jnp.int32)))
        params = variables["params"]
        return TrainState(
            step=jnp.int32(0),
            params=params,
            selection_bias=variables.get("selection_bias", {}),
            opt_state=self._optimizer.init(params),
        )

    def _state_shardings(self):
        tree = shardings(self.mesh, self._boxed())
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
            params=tree["params"],
            selection_bias=tree.get("selection_bias", {}),
            opt_state=jax.tree_util.tree_map_with_path(optimizer_leaf, self.state_shapes.opt_state),
        )

    def _loss_sums(self, params, selection_bias, batch: Batch):
        """Each loss term summed over the micro-batch, and each layer's load [L, E]."""
        variables = {"params": params, "selection_bias": selection_bias}
        lm, output = summed_loss(self.config, variables, batch)
        sums = {"lm": lm} | output.losses
        load_LE = jnp.zeros((0, 1))
        if output.routing is not None:
            sums["balance"] = jnp.sum(output.routing.balance)
            load_LE = output.routing.load_E
        return sums, load_LE

    def term_weights(self) -> dict[str, float]:
        """Weight of each loss term in the total."""
        moe = self.config.model.moe
        sparse = self.config.model.num_layers > self.config.model.num_dense_layers
        weights = {"lm": 1.0} | ({"balance": moe.router.balance_weight} if moe and sparse else {})
        indexers = [p.loss_weight for p in layer_patterns(self.config.model.attention.pattern) if isinstance(p, Sparse)]
        return weights | ({"indexer": indexers[0]} if indexers else {})

    def _indexed_layers(self) -> int:
        patterns = layer_patterns(self.config.model.attention.pattern)
        return sum(isinstance(patterns[layer % len(patterns)], Sparse) for layer in range(self.config.model.num_layers))

    def _term_counts(self, batch: Batch) -> dict[str, jax.Array]:
        """What each term's sum is divided by, over the whole batch: real tokens; sequences or tokens × layers."""
        real_BT = batch["segment_ids"] > 0
        sequences = jnp.sum(jnp.any(real_BT, axis=-1))
        sparse = self.config.model.num_layers - self.config.model.num_dense_layers
        tokens = jnp.sum(real_BT)
        counts = {"lm": tokens, "balance": sequences * sparse, "indexer": tokens * self._indexed_layers()}
        return {name: jnp.maximum(counts[name], 1).astype(jnp.float32) for name in self.term_weights()}

    def _gradients(self, params, selection_bias, batch: Batch):
        """Gradients of Σ weight · sum / count, the terms sum / count, and the loads, over all micro-batches.

        Counts are of the whole batch, so that micro-batches add up to exactly the loss of the undivided batch.
        """
        weights, counts = self.term_weights(), self._term_counts(batch)

        def loss(params, micro):
            sums, load_LE = self._loss_sums(params, selection_bias, micro)
            terms = {name: sums[name] / counts[name] for name in weights}
            return sum(weights[name] * term for name, term in terms.items()), (terms, load_LE)

        grad = jax.grad(loss, has_aux=True)
        count = self.config.train.microbatches
        if count == 1:
            gradients, (terms, load_LE) = grad(params, batch)
            return gradients, terms, load_LE

        def cut(x):
            # Row r goes to micro-batch r % count: each device keeps its rows.
            x = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
            return constrain(x, (None, axes.BATCH, axes.LENGTH))

        def add(total, micro):
            return jax.tree.map(jnp.add, total, grad(params, micro)), None

        micros = jax.tree.map(cut, batch)
        shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], micros))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (gradients, (terms, load_LE)), _ = jax.lax.scan(add, zeros, micros)
        return gradients, terms, load_LE

    def _step(self, state: TrainState, batch: Batch):
        gradients, terms, load_LE = self._gradients(state.params, state.selection_bias, batch)
        updates, opt_state = self._optimizer.update(gradients, state.opt_state, state.params)
        selection_bias = state.selection_bias
        moe = self.config.model.moe
        trainable = self.config.train.trainable
        gradients = keep_trainable(gradients, trainable)  # before the norm: XLA then drops what makes the others
        frozen = trainable and BIAS_COLLECTION not in trainable
        if load_LE.shape[0] and moe is not None and not frozen:
            update = functools.partial(update_selection_bias, load_E=load_LE, rate=moe.router.bias_update_rate)
            selection_bias = jax.tree.map(update, selection_bias)
        weights = self.term_weights()
        metrics: dict[str, Any] = {"loss": sum(weights[name] * term for name, term in terms.items())}
        metrics |= {f"loss/{name}": term for name, term in terms.items()}
        metrics["grad_norm"] = optax.global_norm(gradients)
        metrics["learning_rate"] = self._schedule(state.step)
        if load_LE.shape[0] and moe is not None:
            metrics["router/max_over_mean"] = jnp.mean(jnp.max(load_LE, axis=-1) / jnp.mean(load_LE, axis=-1))
            assigned = jnp.sum(batch["segment_ids"] > 0) * (moe.router.top_k * load_LE.shape[0])
            # 0 with the dropless dispatches; a dispatch with a capacity will count what it kept.
            metrics["router/dropped"] = 1 - jnp.sum(load_LE) / jnp.maximum(assigned, 1)
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            selection_bias=selection_bias,
            opt_state=opt_state,
        )
        return new_state, metrics
