"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), first and second half of the width paired."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RopeTable(NamedTuple):
    """cos_BTr and sin_BTr of position · theta^(−2i/R), float32, r = R / 2. Made once for all layers."""

    cos_BTr: jax.Array
    sin_BTr: jax.Array


def rope_table(positions_BT: jax.Array, width: int, theta: float) -> RopeTable:
    """The table for heads whose rotated width is `width`."""
    half = width // 2
    frequency_r = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BTr = positions_BT[..., None].astype(jnp.float32) * frequency_r
    return RopeTable(jnp.cos(angle_BTr), jnp.sin(angle_BTr))


def apply_rope(x_BTHR: jax.Array, table: RopeTable) -> jax.Array:
    """Rotates pair (i, i + R/2) of each head by its angle. Computed in float32, returned as given.

    Checkpoints that pair neighbours (2i, 2i + 1) agree after a permutation of the projection's output.
    """
    cos, sin = table.cos_BTr[:, :, None], table.sin_BTr[:, :, None]
    first, second = jnp.split(x_BTHR.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHR.dtype)
