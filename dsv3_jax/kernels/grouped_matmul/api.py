"""Picks an implementation of the routed experts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax import axes
from dsv3_jax.config import ConfigError
from dsv3_jax.kernels import hopper, tpu
from dsv3_jax.kernels.grouped_matmul.bucketed import bucketed_experts
from dsv3_jax.kernels.grouped_matmul.padded import padded_matmul
from dsv3_jax.kernels.grouped_matmul.pallas_gpu import gpu_experts, gpu_matmul
from dsv3_jax.kernels.grouped_matmul.pallas_tpu import tpu_experts, tpu_matmul
from dsv3_jax.kernels.grouped_matmul.quantized import Weights, dequantize
from dsv3_jax.kernels.grouped_matmul.reference import reference_matmul
from dsv3_jax.ops.dispatch import GroupedMatmul, grouped_dispatch
from dsv3_jax.sharding import num_shards, per_shard

IMPLEMENTATIONS = {
    "bucketed": bucketed_experts,
    "pallas_gpu": gpu_experts,
    "pallas_tpu": tpu_experts,
    "ragged_dot": functools.partial(grouped_dispatch, grouped_matmul=jax.lax.ragged_dot),
    "reference": functools.partial(grouped_dispatch, grouped_matmul=reference_matmul),
}
MATMULS: dict[str, GroupedMatmul] = {
    "bucketed": padded_matmul,
    "pallas_gpu": gpu_matmul,
    "pallas_tpu": tpu_matmul,
    "ragged_dot": jax.lax.ragged_dot,
    "reference": reference_matmul,
}
KERNELS = (
    "pallas_gpu",
    "pallas_tpu",
)  # which XLA cannot split over devices, and which take quantized weights as they are


def refusal(name: str, dtype: Any) -> str | None:
    """Why an implementation cannot run inputs of this dtype; None if it can."""
    if name == "pallas_gpu":
        return hopper.refusal(dtype)
    return tpu.refusal(dtype) if name == "pallas_tpu" else None


def default_implementation(dtype: Any) -> str:
    """What runs where none is named: "bucketed" on CPU, the kernel on TPU if it can, XLA's "ragged_dot" elsewhere.

    XLA's too where a mesh splits the experts' weights: the kernels would gather all of them on every device.

    The CPU's by measurement on a 2-core x86 VM (Xeon with AVX-512, float32; docs/results/dispatch.md, repeated by
    `benchmark.py --suite=dispatch`). Times of ragged_dot / bucketed, forward and backward of 2048 tokens: 12 with 4 of
    16 experts, 9 with these skewed, 27 with 2 of 128; forward alone of 4 tokens, 4 of 16 experts: 2.7. Times of dense /
    bucketed: 2.7, 1.8, 11 and 1.5. Neither GPU nor TPU was measured: `benchmark.py --suite=grouped_matmul` does.
    """
    name = {"cpu": "bucketed", "gpu": "pallas_gpu", "tpu": "pallas_tpu"}.get(jax.default_backend(), "ragged_dot")
    gathers = name in KERNELS and num_shards(axes.EXPERTS) * num_shards(axes.EXPERT_MLP) > 1
    return "ragged_dot" if gathers or refusal(name, dtype) else name


def grouped_experts(
    x_PD: jax.Array,
    weights_PK: jax.Array,
    experts_PK: jax.Array,
    w_in_ED2F: Weights,
    w_out_EFD: Weights,
    implementation: str | None = None,
    *,
    combine: bool = True,
) -> jax.Array:
    """y_p = Σ_k weights_pk · expert_{experts_pk}(x_p), dropless, each expert a SwiGLU.

    Under a mesh the kernels work on each device's own tokens, with all the experts, whose weights are gathered there.

    Args:
      x_PD: tokens, in the dtype of the experts' weights. experts_PK: int32, distinct in each row; E, the number of
        experts, where there is none: such a place gives nothing, no gradient either.
      w_in_ED2F, w_out_EFD: arrays, or `Quantized`: these are constants, through which gradients of x and of the weights
        of a routing pass.
      implementation: "bucketed", "pallas_gpu" or "pallas_tpu" (Pallas; elsewhere than on a Hopper GPU or a TPU they are
        interpreted, for tests), "ragged_dot", or "reference" (gathers a matrix for every row); by default
        `default_implementation`.
      combine: False gives each expert's own output, y_pk = expert_{experts_pk}(x_p); the weights are not used.

    Returns:
      [P, D], uncombined [P, K, D], in the dtype of `x`.

    Raises:
      ConfigError: an unknown implementation, or one that cannot run this dtype.
    """
    name = _name(implementation, x_PD.dtype)
    if name not in KERNELS:  # XLA splits them
        w_in_ED2F, w_out_EFD = (dequantize(w, x_PD.dtype) for w in (w_in_ED2F, w_out_EFD))
        return IMPLEMENTATIONS[name](x_PD, weights_PK, experts_PK, w_in_ED2F, w_out_EFD, combine=combine)
    parts, structure = jax.tree.flatten((w_in_ED2F, w_out_EFD))

    def on_a_device(x_PD, weights_PK, experts_PK, *parts):
        experts = jax.tree.unflatten(structure, parts)
        return IMPLEMENTATIONS[name](x_PD, weights_PK, experts_PK, *experts, combine=combine)

    inputs = [(x, (axes.BATCH, None)) for x in (x_PD, weights_PK, experts_PK)] + [_whole(part) for part in parts]
    return per_shard(on_a_device, inputs, (axes.BATCH, None) if combine else (axes.BATCH, None, None))


def pick_matmul(implementation: str | None = None, dtype: Any = jnp.float32) -> GroupedMatmul:
    """(x_ND sorted by group, w_EDF, group sizes [E]) -> [N, F], for experts that are more than a SwiGLU.

    Rows past the last group may hold anything, in the result and in the gradient of x. Under a mesh every device runs
    the kernels on all rows.

    Raises:
      ConfigError: an unknown implementation, or one that cannot run this dtype, of x and w.
    """
    name = _name(implementation, dtype)
    return functools.partial(_on_every_device, name) if name in KERNELS else MATMULS[name]


def _on_every_device(name: str, x_ND: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    return per_shard(MATMULS[name], [_whole(x) for x in (x_ND, w_EDF, group_sizes_E)], (None, None))


def _whole(x: jax.Array) -> tuple[jax.Array, tuple[None, ...]]:
    """An input of `per_shard` that every device has all of."""
    return x, (None,) * x.ndim


def _name(implementation: str | None, dtype: Any) -> str:
    name = implementation or default_implementation(dtype)
    if name not in IMPLEMENTATIONS:
        raise ConfigError(
            f"config.model.moe.dispatch.implementation={name!r}: must be one of {', '.join(IMPLEMENTATIONS)}"
        )
    if reason := refusal(name, dtype):
        raise ConfigError(f"config.model.moe.dispatch.implementation={name!r}: {reason}")
    return name
