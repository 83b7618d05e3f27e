"""Experts' matrices in 8 bits: values with a scale for each expert and output channel. For inference: constants."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import ConfigError

DTYPES = ("int8", "float8_e4m3fn")


class Quantized(NamedTuple):
    """values · scale is the matrix. values: int8 or float8_e4m3fn, [E, rows, …]. scale: float32, [E, 1, …]."""

    values: jax.Array
    scale: jax.Array


Weights = jax.Array | Quantized


def quantize(w_ED: jax.Array, dtype: Any) -> Quantized:
    """Symmetric rounding, scaled so that the largest value of each output channel is the largest of `dtype`.

    Args:
      w_ED: [E, D, …]; D, the second dimension, is what a product sums over.
      dtype: int8 or float8_e4m3fn.

    Raises:
      ConfigError: another dtype.
    """
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ConfigError(f"dtype={name}: experts are quantized to {' or '.join(DTYPES)}")
    w_ED = w_ED.astype(jnp.float32)
    largest = 127.0 if name == "int8" else float(jnp.finfo(dtype).max)
    peak_E1 = jnp.max(jnp.abs(w_ED), axis=1, keepdims=True)
    scale_E1 = jnp.where(peak_E1 > 0, peak_E1 / largest, 1.0)
    values_ED = jnp.clip(w_ED / scale_E1, -largest, largest)
    return Quantized((jnp.round(values_ED) if name == "int8" else values_ED).astype(dtype), scale_E1)


def dequantize(w_ED: Weights, dtype: Any) -> jax.Array:
    """The matrix in `dtype`, a constant; one that is not quantized is returned as it is."""
    if not isinstance(w_ED, Quantized):
        return w_ED
    return jax.lax.stop_gradient((w_ED.values.astype(jnp.float32) * w_ED.scale).astype(dtype))
