"""Routed experts by grouped matmul: tokens sorted by expert, one matrix a group."""

from dsv3_jax.kernels.grouped_matmul.api import IMPLEMENTATIONS, default_implementation, grouped_experts, pick_matmul
from dsv3_jax.kernels.grouped_matmul.quantized import Quantized, dequantize, quantize

__all__ = [
    "IMPLEMENTATIONS",
    "Quantized",
    "default_implementation",
    "dequantize",
    "grouped_experts",
    "pick_matmul",
    "quantize",
]
