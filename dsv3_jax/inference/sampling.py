"""From logits to tokens: greedy, temperature, top-k, top-p, min-p."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dsv3_jax.config import ConfigError

LEAST_TEMPERATURE = 1e-6


@struct.dataclass
class Sampling:
    """How a token is chosen. A field that is None is off; a field that is on is a number, or one a row [B].

    temperature: divides the logits; None takes the most probable token. top_k: only the k most probable tokens.
    top_p: only the fewest most probable tokens whose probabilities reach p (Holtzman et al. 2020, arXiv:1904.09751).
    min_p: only tokens of at least min_p times the greatest probability (Nguyen et al. 2024, arXiv:2407.01082).
    Turning a field on or off compiles anew, another value does not.
    """

    temperature: Any = None
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None


GREEDY = Sampling()


def make_sampling(
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Sampling:
    """Settings from what a user gave; temperature 0 is greedy, and the other fields do not matter then.

    Raises:
      ConfigError: a value out of range.
    """
    for name, value, fits, expected in (
        ("temperature", temperature, temperature >= 0, "at least 0"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
        ("min_p", min_p, min_p is None or 0 <= min_p <= 1, "between 0 and 1"),
    ):
        if not fits:
            raise ConfigError(f"--{name}={value}: must be {expected}")
    if temperature == 0:
        return GREEDY
    return Sampling(temperature, top_k, None if top_p == 1 else top_p, min_p or None)


def row_keys(seed: jax.Array | int, num_rows: int) -> jax.Array:
    """A key for each row, keys_B: row i draws the same whatever the other rows are, and however many."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(num_rows))


def allowed_logits(logits_BV: jax.Array, settings: Sampling) -> jax.Array:
    """Logits over the temperature, the greatest at 0, −inf where a token may not be chosen; float32.

    The filters apply in the order that published implementations use: temperature, top-k, top-p (of the probabilities
    that top-k leaves), min-p. Each keeps the tokens of at least some logit, so tokens that tie with the last are kept.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    # A smaller temperature takes the best token too, and 0 / 0 none.
    temperature = jnp.maximum(_column(settings.temperature), LEAST_TEMPERATURE)
    scaled_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature
    floor_B1 = jnp.full((len(scaled_BV), 1), -jnp.inf)
    if settings.top_k is not None or settings.top_p is not None:
        sorted_BV = -jnp.sort(-scaled_BV, axis=-1)
        if settings.top_k is not None:
            last_B1 = jnp.broadcast_to(_column(settings.top_k), floor_B1.shape).astype(jnp.int32) - 1
            last_B1 = jnp.minimum(last_B1, scaled_BV.shape[-1] - 1)
            floor_B1 = jnp.take_along_axis(sorted_BV, last_B1, axis=-1)
        if settings.top_p is not None:
            p_BV = jax.nn.softmax(jnp.where(sorted_BV >= floor_B1, sorted_BV, -jnp.inf), axis=-1)
            needed_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < _column(settings.top_p)
            least_B1 = jnp.min(jnp.where(needed_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
            floor_B1 = jnp.maximum(floor_B1, least_B1)
    if settings.min_p is not None:
        floor_B1 = jnp.maximum(floor_B1, jnp.log(_column(settings.min_p)))  # the greatest is at 0
    return jnp.where(scaled_BV >= floor_B1, scaled_BV, -jnp.inf)


def probabilities(logits_BV: jax.Array, settings: Sampling) -> jax.Array:
    """How probable each token is to be chosen, float32; `settings` are not greedy."""
    return jax.nn.softmax(allowed_logits(logits_BV, settings), axis=-1)


def _column(value: Any) -> jax.Array:
    """A number, or one a row, beside [B, V]."""
    value = jnp.asarray(value, jnp.float32)
    return value[:, None] if value.ndim else value


def first_best(logits_BV: jax.Array) -> jax.Array:
    """The place of the greatest logit of each row, int32; the first of equals. Two plain reductions: XLA compiles an
    argmax to a scalar loop on CPU, which took 7 % of a decode step of 10.5M parameters."""
    best_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
    place_BV = jnp.where(best_BV, jnp.arange(logits_BV.shape[-1]), logits_BV.shape[-1] - 1)
    return jnp.min(place_BV, axis=-1).astype(jnp.int32)


def sample(logits_BV: jax.Array, keys_B: jax.Array, step: jax.Array | int, settings: Sampling) -> jax.Array:
    """Chooses a token a row, int32 [B]. A row's draw depends on its logits, its key and `step` alone."""
    if settings.temperature is None:
        return first_best(logits_BV)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
    return jax.vmap(jax.random.categorical)(keys_B, allowed_logits(logits_BV, settings)).astype(jnp.int32)
