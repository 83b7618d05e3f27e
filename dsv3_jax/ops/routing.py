"""Routers: from a token's logits over experts to its experts and their weights. Shared by every layer.

An expert whose selection bias is −inf is inactive: it is chosen by no token, and neither scores nor group scores nor
the mean load see it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import GroupedSigmoid, ProbabilityMass, Router, Softmax

OUT_OF_REACH = 100.0  # taken off the score of an expert that dropout hides: chosen only where too few can be


class Routing(NamedTuple):
    """What a router decides for the tokens of a batch.

    weights_BTK: combination weights, float32. experts_BTK: int32; E, the number of experts, where a token has fewer
    than K. scores_BTE: unbiased scores, float32. load_E: tokens that chose each expert, padding excluded, float32.
    sums: unweighted loss terms, float32: `balance` summed over sequences, `z` over tokens; `dropped`, the number of
    assignments that found no room in their expert.
    """

    weights_BTK: jax.Array
    experts_BTK: jax.Array
    scores_BTE: jax.Array
    load_E: jax.Array
    sums: dict[str, jax.Array]


class Exploration(NamedTuple):
    """What makes routing random in training. key_B: a key a row. noise: standard deviation on the logits that choose.
    dropout: probability that an expert is out of reach of a row."""

    key_B: jax.Array
    noise: float = 0.0
    dropout: float = 0.0


def active_experts(bias_E: jax.Array) -> jax.Array:
    """Which experts can be chosen, bool."""
    return bias_E > -jnp.inf


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


def _scores(router: Router, logits_BTE: jax.Array, active_E: jax.Array) -> jax.Array:
    match router:
        case GroupedSigmoid():
            return jnp.where(active_E, jax.nn.sigmoid(logits_BTE), 0)
        case Softmax() | ProbabilityMass():
            return jax.nn.softmax(logits_BTE, axis=-1, where=active_E)


def route(
    router: Router,
    logits_BTE: jax.Array,
    bias_E: jax.Array,
    token_mask_BT: jax.Array,
    mass: jax.Array | float | None = None,
    exploration: Exploration | None = None,
) -> Routing:
    """The published DeepSeek-V3 router (arXiv:2412.19437, equations 12-20), and DeepSeek-V2's and Mixtral's.

    s = sigmoid(logits), or softmax(logits); chosen by s + bias; weights s / Σ_chosen s · route_scale. The balance loss
    of a sequence is Σ_e f_e P_e with f_e = E · (tokens on e) / (tokens on all) and P_e = mean over tokens of s_e / Σ s.
    With `ProbabilityMass` a token's experts beyond k_min are left out once those before them hold `mass`.

    Args:
      logits_BTE: float32. bias_E: the selection bias; no gradient flows to it. token_mask_BT: False on padding, which
        is routed but counted nowhere. mass: of `ProbabilityMass`; None takes the config's.
      exploration: noise and dropout on the choice, not on the weights.
    """
    E, K = logits_BTE.shape[-1], router.top_k
    active_E = active_experts(bias_E)
    scores_BTE = _scores(router, logits_BTE, active_E)
    choosing_BTE = scores_BTE
    if exploration is not None and exploration.noise:
        noise_BTE = jax.vmap(lambda key: jax.random.normal(key, logits_BTE.shape[1:]))(exploration.key_B)
        choosing_BTE = _scores(router, logits_BTE + exploration.noise * noise_BTE, active_E)
    hidden_BE = jnp.zeros((len(logits_BTE), E), bool)
    if exploration is not None and exploration.dropout:
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(exploration.key_B, 1)
        hidden_BE = jax.vmap(lambda key: jax.random.bernoulli(key, exploration.dropout, (E,)))(keys_B)
        choosing_BTE -= jnp.where(hidden_BE, OUT_OF_REACH, 0.0)[:, None]
    experts_BTK = _choose(router, jax.lax.stop_gradient(choosing_BTE + bias_E))
    onehot_BTKE = jax.nn.one_hot(experts_BTK, E, dtype=jnp.float32)
    # A product with the one-hot, not take_along_axis: its gradient is a product too, no scatter.
    weights_BTK = jnp.einsum("BTKE,BTE->BTK", onehot_BTKE, scores_BTE)
    if isinstance(router, ProbabilityMass):
        before_BTK = jnp.cumsum(weights_BTK, axis=-1) - weights_BTK
        optional_BTK = jnp.einsum("BTKE,BE->BTK", onehot_BTKE, (~hidden_BE).astype(jnp.float32)) > 0
        optional_BTK &= before_BTK < (router.mass if mass is None else mass)
        used_BTK = (jnp.arange(K) < router.k_min) | optional_BTK
        weights_BTK = jnp.where(used_BTK, weights_BTK, 0)
        onehot_BTKE = jnp.where(used_BTK[..., None], onehot_BTKE, 0)
        experts_BTK = jnp.where(used_BTK, experts_BTK, E)
    if router.normalize_weights:
        weights_BTK = weights_BTK / (jnp.sum(weights_BTK, axis=-1, keepdims=True) + 1e-20)

    real_BT1 = token_mask_BT[..., None].astype(jnp.float32)
    load_BE = jnp.sum(jnp.sum(onehot_BTKE, axis=2) * real_BT1, axis=1)
    share_BTE = scores_BTE / (jnp.sum(scores_BTE, axis=-1, keepdims=True) + 1e-20)
    mean_share_BE = jnp.sum(share_BTE * real_BT1, axis=1) / jnp.maximum(jnp.sum(real_BT1, axis=1), 1)
    load_share_BE = load_BE / jnp.maximum(jnp.sum(load_BE, axis=-1, keepdims=True), 1)
    balance = jnp.sum(active_E) * jnp.sum(load_share_BE * mean_share_BE)
    z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1, where=active_E))
    return Routing(
        weights_BTK=weights_BTK * router.route_scale,
        experts_BTK=experts_BTK.astype(jnp.int32),
        scores_BTE=scores_BTE,
        load_E=jnp.sum(load_BE, axis=0),
        sums={"balance": balance, "z": jnp.sum(z_BT * real_BT1[..., 0]), "dropped": jnp.float32(0)},
    )


def update_selection_bias(bias_E: jax.Array, load_E: jax.Array, rate: float) -> jax.Array:
    """bias + rate · sign(mean load − load) (arXiv:2412.19437, section 2.1.2). Last axis is experts; leading ones map.

    `load` is summed over every token of the step, on all devices and micro-batches. Inactive experts stay inactive and
    are no part of the mean.
    """
    active_E = active_experts(bias_E)
    mean = jnp.sum(load_E, axis=-1, keepdims=True) / jnp.sum(active_E, axis=-1, keepdims=True)
    return bias_E + jnp.where(active_E, rate * jnp.sign(mean - load_E), 0)


def update_mass(mass: jax.Array, mean_k: jax.Array, router: ProbabilityMass) -> jax.Array:
    """mass + rate · (target k − mean k), within 0 and 1: too few experts a token raise the mass they must reach."""
    return jnp.clip(mass + router.mass_update_rate * (router.target_k - mean_k), 0, 1)


def load_by_context(
    experts_LBTK: jax.Array, context_BT: jax.Array, token_mask: jax.Array, num_contexts: int, num_experts: int
) -> jax.Array:
    """Tokens of each context (a domain, a modality) that chose each expert of each layer, load_LCE, float32.

    token_mask: False on padding, [B, T], or [L, B, T] where layers count different tokens.
    """
    L = len(experts_LBTK)
    layer_L111 = jnp.arange(L)[:, None, None, None]
    context_BT1 = jnp.where(token_mask, context_BT, num_contexts)[..., None]  # padding: out of bounds, dropped
    load_LCE = jnp.zeros((L, num_contexts, num_experts), jnp.float32)
    return load_LCE.at[layer_L111, context_BT1, experts_LBTK].add(1.0, mode="drop")


def load_entropy(load_E: jax.Array) -> jax.Array:
    """Entropy of loads in nats over the last axis: log E is perfect balance, 0 one expert for all."""
    share_E = load_E / jnp.maximum(jnp.sum(load_E, axis=-1, keepdims=True), 1)
    return -jnp.sum(jnp.where(share_E > 0, share_E * jnp.log(jnp.where(share_E > 0, share_E, 1)), 0), axis=-1)
