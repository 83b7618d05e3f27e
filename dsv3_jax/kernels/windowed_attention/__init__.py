"""Attention by pattern, skipping the blocks that no query sees."""

from dsv3_jax.kernels.windowed_attention.api import IMPLEMENTATIONS, windowed_attention

__all__ = ["IMPLEMENTATIONS", "windowed_attention"]
