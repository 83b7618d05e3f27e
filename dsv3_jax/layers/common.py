"""Weights and norm that every block uses."""

from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax import axes
from dsv3_jax.config import ModelConfig


def parameter(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, ...],
    logical: tuple[str | None, ...],
) -> jax.Array:
    """A float32 master parameter with logical axes."""
    boxed_init = nn.with_logical_partitioning(init, logical)
    return cast(jax.Array, module.param(name, boxed_init, shape, jnp.float32))


def weight(
    module: nn.Module,
    config: ModelConfig,
    name: str,
    shape: tuple[int, ...],
    logical: tuple[str | None, ...],
    fan_in: int,
    residual: bool = False,
) -> jax.Array:
    """A matrix with logical axes, cast to the compute dtype.

    Normal with std 1/sqrt(fan_in), divided by sqrt(2 · num_layers) where the product is added to the residual stream;
    or with `config.init_std` throughout, where that is set (the published model's rule).
    """
    std = config.init_std or fan_in**-0.5 * ((2 * config.num_layers) ** -0.5 if residual else 1.0)
    return parameter(module, name, nn.initializers.normal(std), shape, logical).astype(config.compute_dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · scale, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    epsilon: float

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        scale_D = parameter(self, "scale", nn.initializers.ones, (x_BTD.shape[-1],), (axes.NORM,))
        x32 = x_BTD.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * inverse * scale_D).astype(x_BTD.dtype)
