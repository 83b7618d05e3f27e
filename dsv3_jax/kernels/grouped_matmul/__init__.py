"""Routed experts by grouped matmul: tokens sorted by expert, one matrix a group."""

from dsv3_jax.kernels.grouped_matmul.api import IMPLEMENTATIONS, default_implementation, grouped_experts, pick_matmul

__all__ = ["IMPLEMENTATIONS", "default_implementation", "grouped_experts", "pick_matmul"]
