"""Router statistics."""

import numpy as np

from dsv3_jax.ops.routing import Routing


def expert_counts(routing: Routing) -> np.ndarray:
    """Tokens sent to each expert by each layer, int64 [L, E], from a `TransformerOutput.routing`."""
    experts_LN = np.asarray(routing.experts_BTK).reshape(routing.experts_BTK.shape[0], -1)
    num_experts = routing.scores_BTE.shape[-1]
    return np.stack([np.bincount(experts, minlength=num_experts) for experts in experts_LN])


def routing_entropy(routing: Routing) -> np.ndarray:
    """Entropy of each layer's load in nats, [L]: log(E) is perfect balance, 0 one expert for all."""
    share_LE = expert_counts(routing) / expert_counts(routing).sum(axis=-1, keepdims=True)
    return -np.sum(np.where(share_LE > 0, share_LE * np.log(np.where(share_LE > 0, share_LE, 1)), 0), axis=-1)
