"""Picks an implementation of the routed experts."""

import functools

import jax

from dsv3_jax.config import ConfigError
from dsv3_jax.kernels.grouped_matmul.bucketed import bucketed_experts
from dsv3_jax.kernels.grouped_matmul.padded import padded_matmul
from dsv3_jax.kernels.grouped_matmul.reference import reference_matmul
from dsv3_jax.ops.dispatch import GroupedMatmul, grouped_dispatch

IMPLEMENTATIONS = {
    "bucketed": bucketed_experts,
    "ragged_dot": functools.partial(grouped_dispatch, grouped_matmul=jax.lax.ragged_dot),
    "reference": functools.partial(grouped_dispatch, grouped_matmul=reference_matmul),
}
MATMULS: dict[str, GroupedMatmul] = {
    "bucketed": padded_matmul,
    "ragged_dot": jax.lax.ragged_dot,
    "reference": reference_matmul,
}


def default_implementation() -> str:
    """The name of what `grouped_experts` picks here: "bucketed" on CPU, "ragged_dot" (XLA's own) elsewhere.

    The CPU's by measurement on a 2-core x86 VM (Xeon with AVX-512, float32; docs/results/dispatch.md, repeated by
    `benchmark.py --suite=dispatch`). Times of ragged_dot / bucketed, forward and backward of 2048 tokens: 12 with 4 of
    16 experts, 9 with these skewed, 27 with 2 of 128; forward alone of 4 tokens, 4 of 16 experts: 2.7. Times of dense /
    bucketed: 2.7, 1.8, 11 and 1.5. ragged_dot elsewhere is what XLA offers; neither GPU nor TPU was measured.
    """
    return "bucketed" if jax.default_backend() == "cpu" else "ragged_dot"


def grouped_experts(
    x_PD: jax.Array,
    weights_PK: jax.Array,
    experts_PK: jax.Array,
    w_in_ED2F: jax.Array,
    w_out_EFD: jax.Array,
    implementation: str | None = None,
    *,
    combine: bool = True,
) -> jax.Array:
    """y_p = Σ_k weights_pk · expert_{experts_pk}(x_p), dropless, each expert a SwiGLU.

    Args:
      x_PD: tokens, in the dtype of the experts' weights. experts_PK: int32, distinct in each row; E, the number of
        experts, where there is none: such a place gives nothing, no gradient either.
      implementation: "bucketed", "ragged_dot", or "reference" (gathers a matrix for every row); by default
        `default_implementation()`.
      combine: False gives each expert's own output, y_pk = expert_{experts_pk}(x_p); the weights are not used.

    Returns:
      [P, D], uncombined [P, K, D], in the dtype of `x`.

    Raises:
      ConfigError: an unknown implementation.
    """
    return IMPLEMENTATIONS[_name(implementation)](x_PD, weights_PK, experts_PK, w_in_ED2F, w_out_EFD, combine=combine)


def pick_matmul(implementation: str | None = None) -> GroupedMatmul:
    """(x_ND sorted by group, w_EDF, group sizes [E]) -> [N, F], for experts that are more than a SwiGLU.

    Rows past the last group may hold anything, in the result and in the gradient of x.

    Raises:
      ConfigError: an unknown implementation.
    """
    return MATMULS[_name(implementation)]


def _name(implementation: str | None) -> str:
    name = implementation or default_implementation()
    if name not in IMPLEMENTATIONS:
        raise ConfigError(
            f"config.model.moe.dispatch.implementation={name!r}: must be one of {', '.join(IMPLEMENTATIONS)}"
        )
    return name
