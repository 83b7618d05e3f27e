"""Dispatch: sends tokens through their chosen SwiGLU experts and combines the results.

`dense_dispatch` is the oracle; `grouped_dispatch` gives the same result and gradients without the wasted work.
Both take tokens flattened to [P, D], a routing's weights and experts [P, K], and the experts' weights.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

GroupedMatmul = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@jax.custom_vjp
def swiglu(gate_up_2F: jax.Array) -> jax.Array:
    """silu(gate) · up, for [..., 2, F] (Shazeer 2020, arXiv:2002.05202). Its gradient is one fused pass."""
    return jax.nn.silu(gate_up_2F[..., 0, :]) * gate_up_2F[..., 1, :]


def swiglu_backward(gate_up_2F: jax.Array, dy_F: jax.Array) -> jax.Array:
    """The gradient of `swiglu` with respect to its input."""
    gate, up = gate_up_2F[..., 0, :], gate_up_2F[..., 1, :]
    sigmoid = jax.nn.sigmoid(gate)
    dgate = dy_F * up * sigmoid * (1 + gate * (1 - sigmoid))
    return jnp.stack([dgate, dy_F * gate * sigmoid], axis=-2)


swiglu.defvjp(lambda x: (swiglu(x), x), lambda x, dy: (swiglu_backward(x, dy),))


def dense_dispatch(
    x_PD: jax.Array, weights_PK: jax.Array, experts_PK: jax.Array, w_in_ED2F: jax.Array, w_out_EFD: jax.Array
) -> jax.Array:
    """Every expert sees every token: y_p = Σ_k weights_pk · expert_{experts_pk}(x_p). The oracle."""
    E = w_in_ED2F.shape[0]
    gates_PE = jnp.einsum("PK,PKE->PE", weights_PK, jax.nn.one_hot(experts_PK, E, dtype=weights_PK.dtype))
    hidden_PEF = swiglu(jnp.einsum("PD,EDxF->PExF", x_PD, w_in_ED2F))
    return jnp.einsum("PEF,EFD,PE->PD", hidden_PEF, w_out_EFD, gates_PE.astype(x_PD.dtype))


def grouped_dispatch(
    x_PD: jax.Array,
    weights_PK: jax.Array,
    experts_PK: jax.Array,
    w_in_ED2F: jax.Array,
    w_out_EFD: jax.Array,
    grouped_matmul: GroupedMatmul,
) -> jax.Array:
    """The same as `dense_dispatch`, dropless: assignments sorted by expert, then two grouped matmuls.

    Args:
      grouped_matmul: (rows_ND sorted by group, w_EDF, group_sizes_E) -> rows_NF.
    """
    (P, K), (E, D, _, F) = experts_PK.shape, w_in_ED2F.shape
    expert_of_row = experts_PK.reshape(P * K)
    order = jnp.argsort(expert_of_row, stable=True)  # sorted row -> assignment p * K + k
    place = jnp.zeros_like(order).at[order].set(jnp.arange(P * K, dtype=order.dtype))  # its inverse
    group_sizes_E = jnp.sum(jax.nn.one_hot(expert_of_row, E, dtype=jnp.int32), axis=0)
    rows_ND = jnp.take(x_PD, order // K, axis=0, mode="clip")
    gate_up_N2F = grouped_matmul(rows_ND, w_in_ED2F.reshape(E, D, 2 * F), group_sizes_E).reshape(P * K, 2, F)
    out_ND = grouped_matmul(swiglu(gate_up_N2F), w_out_EFD, group_sizes_E)
    out_PKD = jnp.take(out_ND, place, axis=0, mode="clip").reshape(P, K, D)
    return jnp.einsum("PKD,PK->PD", out_PKD, weights_PK.astype(out_PKD.dtype))
