"""Picks an implementation of the routed experts."""

import functools

import jax

from dsv3_jax.config import ConfigError
from dsv3_jax.kernels.grouped_matmul.bucketed import bucketed_experts
from dsv3_jax.kernels.grouped_matmul.reference import reference_matmul
from dsv3_jax.ops.dispatch import grouped_dispatch

IMPLEMENTATIONS = {
    "bucketed": bucketed_experts,
    "ragged_dot": functools.partial(grouped_dispatch, grouped_matmul=jax.lax.ragged_dot),
    "reference": functools.partial(grouped_dispatch, grouped_matmul=reference_matmul),
}


def default_implementation() -> str:
    """The name of what `grouped_experts` picks here."""
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
      x_PD: tokens, in the dtype of the experts' weights. experts_PK: int32, distinct in each row.
      implementation: "bucketed" (default on CPU: an order of magnitude faster there than ragged_dot), "ragged_dot"
        (default elsewhere: XLA's own), or "reference" (gathers a matrix for every row).

    Returns:
      [P, D] in the dtype of `x`.

    Raises:
      ConfigError: an unknown implementation.
    """
    name = implementation or default_implementation()
    if name not in IMPLEMENTATIONS:
        raise ConfigError(
            f"config.model.moe.dispatch.implementation={name!r}: must be one of {', '.join(IMPLEMENTATIONS)}"
        )
    return IMPLEMENTATIONS[name](x_PD, weights_PK, experts_PK, w_in_ED2F, w_out_EFD, combine=combine)
