"""Router statistics: how many tokens each expert of each layer gets, by domain. C domains, L layers, E experts."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.data.pipeline import Dataset, batches
from dsv3_jax.layers.mtp import shift
from dsv3_jax.models.transformer import head_weight, summed_loss
from dsv3_jax.ops.routing import Routing
from dsv3_jax.sharding import batch_sharding


def expert_counts(routing: Routing) -> np.ndarray:
    """Tokens sent to each expert by each layer, int64 [L, E], from a `TransformerOutput.routing`. Padding counts."""
    num_experts = routing.scores_BTE.shape[-1]
    experts_LN = np.asarray(routing.experts_BTK).reshape(routing.experts_BTK.shape[0], -1)
    counts = [np.bincount(experts, minlength=num_experts) for experts in experts_LN]
    return np.stack([count[:num_experts] for count in counts])  # one more is no expert


def entropy_share(load_E: np.ndarray, active_E: np.ndarray | bool = True) -> np.ndarray:
    """Entropy of loads over that of balance, over the last axis: 1 is perfect balance, 0 one expert for all.

    Balance is among the experts that are active, log of their number; of a single one it is perfect.
    """
    balance = np.log(_count(load_E, active_E))
    return np.where(balance > 0, _entropy(_share(load_E)) / np.where(balance > 0, balance, 1), 1.0)


def max_over_mean(load_E: np.ndarray, active_E: np.ndarray | bool = True) -> np.ndarray:
    """The largest load over the mean load of the active experts, over the last axis: from 1 to their number."""
    return np.max(load_E, axis=-1) * _count(load_E, active_E) / np.maximum(np.sum(load_E, axis=-1), 1e-9)


def _count(load_E: np.ndarray, active_E: np.ndarray | bool) -> np.ndarray:
    return np.sum(np.broadcast_to(active_E, np.shape(load_E)), axis=-1)


def specialisation(load_CLE: np.ndarray) -> np.ndarray:
    """How much the domains' loads differ, of each layer, float64 [L]: 0 where they are the same, 1 where no two domains
    share an expert.

    The Jensen-Shannon divergence (Lin 1991) of the domains' shares, each domain with the same weight, over log C. NaN
    with a single domain.
    """
    if len(load_CLE) == 1:
        return np.full(load_CLE.shape[1], np.nan)
    share_CLE = _share(load_CLE)
    between_L = _entropy(share_CLE.mean(axis=0)) - _entropy(share_CLE).mean(axis=0)
    return between_L / np.log(len(load_CLE))


def _share(load_E: np.ndarray) -> np.ndarray:
    load_E = np.asarray(load_E, np.float64)
    return load_E / np.maximum(load_E.sum(axis=-1, keepdims=True), 1e-9)


def _entropy(share_E: np.ndarray) -> np.ndarray:
    return -np.sum(share_E * np.log(np.where(share_E > 0, share_E, 1)), axis=-1)


@dataclasses.dataclass
class RoutingRecord:
    """Routing of a trained model on held-out rows of each domain.

    domains, layers: names along C and L; multi-token-prediction layers are the last. load_CLE: tokens that chose each
    expert, before any were dropped. tokens_CL: tokens that were routed. dropped_C: assignments that found no room.
    bias_LE: the selection biases, −inf where an expert is inactive. agreement_k: of module k of multi-token prediction,
    how often its best guess is the main model's one, k tokens on, both given the text: what a draft could hope for.
    """

    domains: list[str]
    layers: list[str]
    load_CLE: np.ndarray
    tokens_CL: np.ndarray
    dropped_C: np.ndarray
    bias_LE: np.ndarray
    agreement_k: np.ndarray

    @property
    def active_LE(self) -> np.ndarray:
        """Which experts can be chosen, bool."""
        return self.bias_LE > -np.inf

    def mean_k(self) -> float:
        """Experts a token uses, over domains and layers."""
        return float(self.load_CLE.sum() / max(self.tokens_CL.sum(), 1))

    def dropped(self) -> float:
        """Dropped assignments over all."""
        return float(self.dropped_C.sum() / max(self.load_CLE.sum(), 1))

    def to_json(self) -> str:
        """One object; null stands for −inf."""
        record = {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in vars(self).items()}
        record["bias_LE"] = [[b if np.isfinite(b) else None for b in row] for row in record["bias_LE"]]
        return json.dumps(record) + "\n"

    @staticmethod
    def from_json(text: str) -> "RoutingRecord":
        """Reads what `to_json` wrote."""
        record = json.loads(text)
        record["bias_LE"] = [[-np.inf if b is None else b for b in row] for row in record["bias_LE"]]
        arrays = {name: np.asarray(x) for name, x in record.items() if name not in ("domains", "layers")}
        return RoutingRecord(**(record | arrays))


def routed_layers(model: ModelConfig) -> list[str]:
    """Names of the layers with experts: by their number in the model, then multi-token prediction's."""
    if model.moe is None or model.num_dense_layers == model.num_layers:
        return []
    depth = 0 if model.mtp is None else model.mtp.depth
    stack = [f"layer {index}" for index in range(model.num_dense_layers, model.num_layers)]
    return stack + [f"MTP {index}" for index in range(1, depth + 1)]


class RoutingMeter:
    """Measures the routing of models of one config, by one compiled program."""

    def __init__(self, config: Config, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._jitted = jax.jit(self._count, in_shardings=(None, batch_sharding(mesh)))

    def measure(self, variables: Any, dataset: Dataset, limit: int) -> RoutingRecord:
        """On `limit` held-out rows of each domain, spread evenly."""
        settings, model = self._config.train, self._config.model
        sums: dict[str, list[Any]] = {}
        for rows in dataset.held_out.values():
            total: dict[str, Any] = {}
            for batch in batches(rows, settings.batch_size // settings.microbatches, limit):
                with jax.set_mesh(self._mesh):
                    counts = jax.device_get(self._jitted(variables, batch))
                total = {name: np.asarray(x, np.float64) + total.get(name, 0.0) for name, x in counts.items()}
            for name, x in total.items():
                sums.setdefault(name, []).append(x)
        leaves = jax.tree_util.tree_flatten_with_path(variables.get("selection_bias", {}))[0]
        biases = {path[0].key: np.asarray(x) for path, x in leaves if path[-1].key == "bias"}
        order = [biases[name] for name in ("moe_layers", "mtp") if name in biases]
        return RoutingRecord(
            domains=list(dataset.held_out),
            layers=routed_layers(model),
            load_CLE=np.stack(sums["load"]),
            tokens_CL=np.stack(sums["tokens"]),
            dropped_C=np.stack(sums["dropped"]),
            bias_LE=np.concatenate(order) if order else np.zeros((0, 0)),
            agreement_k=np.sum(sums["agreed"], axis=0) / np.maximum(np.sum(sums["drafted"], axis=0), 1),
        )

    def _count(self, variables, batch):
        config = self._config
        _, output = summed_loss(config, variables, batch, predict_ahead=config.model.mtp is not None)
        real = jnp.sum(batch["segment_ids"] > 0)
        loads, tokens, agreed, drafted = [], [], [], []
        if output.routing is not None:
            loads.append(output.routing.load_E)
            tokens.append(jnp.broadcast_to(real, len(output.routing.load_E)))
        if output.prediction is not None:
            head_DV, prediction = head_weight(config.model, variables["params"]), output.prediction
            real_kBT = prediction.segment_ids_kBT > 0
            # As the model computes them: logits in bfloat16 have many ties.
            logits = functools.partial(jnp.einsum, "BTD,DV->BTV", preferred_element_type=jnp.float32)
            best_BT = jnp.argmax(logits(output.hidden_BTD, head_DV), axis=-1)
            for index, hidden_BTD in enumerate(prediction.hidden_kBTD):
                same_BT = jnp.argmax(logits(hidden_BTD, head_DV), axis=-1) == shift(best_BT, index + 1)
                agreed.append(jnp.sum(same_BT & real_kBT[index]))
                drafted.append(jnp.sum(real_kBT[index]))
            if prediction.routing is not None:
                loads.append(prediction.routing.load_E)
                tokens.append(jnp.sum(real_kBT, axis=(1, 2)))
        return {
            "load": jnp.concatenate(loads) if loads else jnp.zeros((0, 0)),
            "tokens": jnp.concatenate(tokens) if tokens else jnp.zeros(0),
            "dropped": jnp.asarray(output.sums.get("dropped", 0.0)),
            "agreed": jnp.asarray(agreed),
            "drafted": jnp.asarray(drafted),
        }
