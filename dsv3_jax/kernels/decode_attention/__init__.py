"""Attention of a few new tokens to a cache."""

from dsv3_jax.kernels.decode_attention.api import IMPLEMENTATIONS, decode_attention, default_implementation

__all__ = ["IMPLEMENTATIONS", "decode_attention", "default_implementation"]
