"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), first and second half of the width paired."""

import jax
import jax.numpy as jnp


def apply_rope(x_BTHR: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotates pair (i, i + R/2) of each head by positions · theta^(−2i/R). Computed in float32, returned as given.

    Checkpoints that pair neighbours (2i, 2i + 1) agree after a permutation of the projection's output.
    """
    half = x_BTHR.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BTHR.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHR.dtype)
