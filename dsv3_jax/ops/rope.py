"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), first and second half of the width paired."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import LinearScaling, Llama3Scaling, RopeScaling, Yarn


class RopeTable(NamedTuple):
    """cos_BTr and sin_BTr of position · frequency_r, float32, r = R / 2. Made once for all layers."""

    cos_BTr: jax.Array
    sin_BTr: jax.Array


def frequencies(width: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians a position of each pair, float32 [width / 2]: theta^(−2i / width), scaled by the rule of `scaling`."""
    plain = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    match scaling:
        case None:
            scaled = plain
        case LinearScaling(factor):
            scaled = plain / factor
        case Yarn():
            scaled = _yarn(plain, width, theta, scaling)
        case Llama3Scaling():
            scaled = _llama3(plain, scaling)
    return scaled.astype(np.float32)


def _yarn(plain: np.ndarray, width: int, theta: float, yarn: Yarn) -> np.ndarray:
    """arXiv:2309.00071, equations 17-23, with the bounds of the ramp rounded to whole pairs as published models do."""

    def pair_with(rotations: float) -> float:
        """The pair that makes this many turns over the original length."""
        return width * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)
    return plain / yarn.factor * ramp + plain * (1 - ramp)


def _llama3(plain: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    turns = plain * scaling.original_length / (2 * math.pi)  # over the original length
    kept = np.clip((turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor), 0, 1)
    return plain / scaling.factor * (1 - kept) + plain * kept


def _yarn_m(yarn: Yarn, s: float) -> float:
    return 0.1 * s * math.log(yarn.factor) + 1 if yarn.factor > 1 else 1.0


def rotation_factor(scaling: RopeScaling | None) -> float:
    """What cos and sin are multiplied by: not 1 with `Yarn` alone."""
    if not isinstance(scaling, Yarn):
        return 1.0
    return _yarn_m(scaling, scaling.mscale) / _yarn_m(scaling, scaling.mscale_all_dim)


def softmax_factor(scaling: RopeScaling | None) -> float:
    """What the softmax scale is multiplied by: not 1 with `Yarn` alone."""
    return _yarn_m(scaling, scaling.mscale_all_dim) ** 2 if isinstance(scaling, Yarn) else 1.0


def rope_table(positions_BT: jax.Array, width: int, theta: float, scaling: RopeScaling | None = None) -> RopeTable:
    """The table for heads whose rotated width is `width`."""
    angle_BTr = positions_BT[..., None].astype(jnp.float32) * frequencies(width, theta, scaling)
    factor = rotation_factor(scaling)
    return RopeTable(jnp.cos(angle_BTr) * factor, jnp.sin(angle_BTr) * factor)


def apply_rope(x_BTHR: jax.Array, table: RopeTable) -> jax.Array:
    """Rotates pair (i, i + R/2) of each head by its angle. Computed in float32, returned as given.

    Checkpoints that pair neighbours (2i, 2i + 1) agree after a permutation of the projection's output.
    """
    cos, sin = table.cos_BTr[:, :, None], table.sin_BTr[:, :, None]
    first, second = jnp.split(x_BTHR.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHR.dtype)
