"""Routers: from a token's logits over experts to its experts and their weights. Shared by every layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import GroupedSigmoid, Router, Softmax


class Routing(NamedTuple):
    """What a router decides for the tokens of a batch.

    weights_BTK: combination weights, float32. experts_BTK: int32. scores_BTE: unbiased scores, float32.
    load_E: tokens sent to each expert, padding excluded, float32.
    balance: sum over sequences of the unweighted balance loss, scalar float32. sequences: their number.
    """

    weights_BTK: jax.Array
    experts_BTK: jax.Array
    scores_BTE: jax.Array
    load_E: jax.Array
    balance: jax.Array
    sequences: jax.Array


def _choose(router: Router, biased_BTE: jax.Array) -> jax.Array:
    """Experts by biased score within the best groups. Groups that are not chosen score −inf: a negative bias can
    otherwise lose to a masked zero."""
    *batch, E = biased_BTE.shape
    if router.num_groups > 1:
        grouped = biased_BTE.reshape(*batch, router.num_groups, E // router.num_groups)
        best_of_group = jax.lax.top_k(grouped, 2 if isinstance(router, GroupedSigmoid) else 1)[0]
        group_score = jnp.sum(best_of_group, axis=-1)
        best = jax.lax.top_k(group_score, router.top_groups)[1]
        chosen = jnp.any(jax.nn.one_hot(best, router.num_groups, dtype=bool), axis=-2)
        biased_BTE = jnp.where(chosen[..., None], grouped, -jnp.inf).reshape(*batch, E)
    return jax.lax.top_k(biased_BTE, router.top_k)[1]


def route(router: Router, logits_BTE: jax.Array, bias_E: jax.Array, token_mask_BT: jax.Array) -> Routing:
    """The published DeepSeek-V3 router (arXiv:2412.19437, equations 12-20), and DeepSeek-V2's and Mixtral's.

    s = sigmoid(logits), or softmax(logits); chosen by s + bias; weights s / Σ_chosen s · route_scale. The balance loss
    of a sequence is Σ_e f_e P_e with f_e = E / (K T) · #(tokens on e) and P_e = mean over tokens of s_e / Σ s.

    Args:
      logits_BTE: float32. bias_E: the selection bias; no gradient flows to it. token_mask_BT: False on padding, which
        is routed but counted nowhere.
    """
    E, K = logits_BTE.shape[-1], router.top_k
    match router:
        case GroupedSigmoid():
            scores_BTE = jax.nn.sigmoid(logits_BTE)
        case Softmax():
            scores_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    experts_BTK = _choose(router, jax.lax.stop_gradient(scores_BTE + bias_E))
    onehot_BTKE = jax.nn.one_hot(experts_BTK, E, dtype=jnp.float32)
    # A product with the one-hot, not take_along_axis: its gradient is a product too, no scatter.
    weights_BTK = jnp.einsum("BTKE,BTE->BTK", onehot_BTKE, scores_BTE)
    if router.normalize_weights:
        weights_BTK = weights_BTK / (jnp.sum(weights_BTK, axis=-1, keepdims=True) + 1e-20)
    real_BT1 = token_mask_BT[..., None].astype(jnp.float32)
    load_BE = jnp.sum(jnp.sum(onehot_BTKE, axis=2) * real_BT1, axis=1)
    tokens_B1 = jnp.maximum(jnp.sum(real_BT1, axis=1), 1)
    share_BTE = scores_BTE / (jnp.sum(scores_BTE, axis=-1, keepdims=True) + 1e-20)
    mean_share_BE = jnp.sum(share_BTE * real_BT1, axis=1) / tokens_B1
    balance_B = jnp.sum(load_BE * (E / K) / tokens_B1 * mean_share_BE, axis=-1)
    return Routing(
        weights_BTK=weights_BTK * router.route_scale,
        experts_BTK=experts_BTK.astype(jnp.int32),
        scores_BTE=scores_BTE,
        load_E=jnp.sum(load_BE, axis=0),
        balance=jnp.sum(balance_B),
        sequences=jnp.sum(jnp.any(token_mask_BT, axis=-1).astype(jnp.float32)),
    )


def update_selection_bias(bias_E: jax.Array, load_E: jax.Array, rate: float) -> jax.Array:
    """bias + rate · sign(mean load − load) (arXiv:2412.19437, section 2.1.2). Last axis is experts; leading ones map.

    `load` is summed over every token of the step, on all devices and micro-batches.
    """
    mean = jnp.mean(load_E, axis=-1, keepdims=True)
    return bias_E + rate * jnp.sign(mean - load_E)
