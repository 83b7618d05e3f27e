"""Thin Linen modules: here ops, kernels and parallel bodies are composed."""
