"""Attention to the keys that an indexer picks, and the indexer's loss."""

from dsv3_jax.kernels.sparse_attention.api import IMPLEMENTATIONS, sparse_attention

__all__ = ["IMPLEMENTATIONS", "sparse_attention"]
