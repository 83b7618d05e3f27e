"""AdamW with the width rule, schedules and moment dtypes of the config."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config import AdamW, Cosine, Schedule, WarmupStableDecay

# Matrices whose fan-in is a width of its own (of conditions, of the unit gate's hidden layer), not the model's.
OWN_FAN_IN = ("w_condition", "w_gate_out")


def make_schedule(schedule: Schedule, peak: float) -> optax.Schedule:
    """Learning rate by step. The first step has a positive rate already: step s of the warm-up (s + 1) / warm-up."""
    warmup, total = schedule.warmup_steps, schedule.total_steps
    ramp = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    match schedule:
        case Cosine():
            rest = [optax.cosine_decay_schedule(peak, max(1, total - warmup), alpha=schedule.final_ratio)]
            boundaries = [warmup]
        case WarmupStableDecay():
            decay = optax.linear_schedule(peak, peak * schedule.final_ratio, max(1, schedule.decay_steps))
            rest = [optax.constant_schedule(peak), decay]
            boundaries = [warmup, total - schedule.decay_steps]
    return optax.join_schedules([ramp, *rest], boundaries)


def is_matrix(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is a matrix inside the network: everything but norm scales, biases and embeddings."""
    return not is_vector(path) and not path[-1].key.endswith("embedding")


def is_vector(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is a norm scale, a bias or a sink, however many layers are stacked in it."""
    return path[-1].key in ("scale", "bias", "sinks")


def make_optimizer(
    config: AdamW, schedule: Schedule, dim: int, keep: Callable[[Any], Any] = lambda tree: tree
) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled decay (not on norms and biases), rate by schedule and by width.

    Matrices train at learning_rate · base_dim / dim; embeddings, norms and `OWN_FAN_IN` at learning_rate (see
    `config.AdamW`). The decay is decoupled from the width: a matrix decays by rate · weight_decay of the schedule, at
    every width. `keep` zeroes the updates, decay included, of what is not trained.
    """
    width = config.base_dim / dim

    def grows(path):
        return is_matrix(path) and path[-1].key not in OWN_FAN_IN

    def scale_matrices(updates, params=None):
        del params
        return jax.tree_util.tree_map_with_path(lambda path, u: u * width if grows(path) else u, updates)

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: not is_vector(path), params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        _scale_by_adam(config),
        optax.stateless(scale_matrices),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(make_schedule(schedule, config.learning_rate)),
        optax.stateless(lambda updates, params: keep(updates)),
    )


def keep_trainable(updates: Any, words: tuple[str, ...]) -> Any:
    """Zeros for parameters without one of the words in their path; no words keep all."""
    if not words:
        return updates
    return jax.tree_util.tree_map_with_path(
        lambda path, u: u if any(key.key in words for key in path) else jnp.zeros_like(u), updates
    )


def _scale_by_adam(config: AdamW) -> optax.GradientTransformation:
    """Adam with the first and second moment stored in the config's dtypes; the arithmetic is float32."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)

    def store(state):
        return state._replace(
            mu=_cast(state.mu, config.first_moment_dtype), nu=_cast(state.nu, config.second_moment_dtype)
        )

    def update(updates, state, params=None):
        state = state._replace(mu=_cast(state.mu, jnp.float32), nu=_cast(state.nu, jnp.float32))
        updates, state = adam.update(updates, state, params)
        return updates, store(state)

    return optax.GradientTransformation(lambda params: store(adam.init(params)), update)


def _cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)
