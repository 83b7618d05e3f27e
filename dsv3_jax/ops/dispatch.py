"""Dispatch: sends tokens through their chosen SwiGLU experts and combines the results.

`dense_dispatch` is the oracle. `grouped_dispatch` and `capacity_dispatch` give the same result and gradients without
the wasted work. All take tokens, a routing's weights and experts, and the experts' weights. An assignment whose expert
is E, the number of experts, is absent: its output is zero, and no gradient comes from it. All return the weighted sum
over a token's experts, or with `combine=False` each expert's own output, for which the weights are not used.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

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


class Sorted(NamedTuple):
    """Assignments sorted by expert, in order within one; absent ones last.

    order_N: sorted place -> assignment. place_N: its inverse. rank_N: how many assignments before this one have its
    expert (of no meaning where absent). start_E, sizes_E: first place and number of each expert's assignments.
    """

    order_N: jax.Array
    place_N: jax.Array
    rank_N: jax.Array
    start_E: jax.Array
    sizes_E: jax.Array


def sort_by_expert(expert_N: jax.Array, num_experts: int) -> Sorted:
    """Sorts int32 experts [N], each in 0 … `num_experts`, the last meaning absent."""
    (N,) = expert_N.shape
    order_N = jnp.argsort(expert_N, stable=True)
    place_N = jnp.zeros(N, jnp.int32).at[order_N].set(jnp.arange(N, dtype=jnp.int32))
    sizes_E = jnp.sum(jax.nn.one_hot(expert_N, num_experts, dtype=jnp.int32), axis=0)
    start_E = jnp.cumsum(sizes_E) - sizes_E
    return Sorted(order_N, place_N, place_N - start_E[expert_N], start_E, sizes_E)


def _combined(y_PKD: jax.Array, weights_PK: jax.Array) -> jax.Array:
    return jnp.einsum("...KD,...K->...D", y_PKD, weights_PK.astype(y_PKD.dtype))


def dense_dispatch(
    x_PD: jax.Array,
    weights_PK: jax.Array,
    experts_PK: jax.Array,
    w_in_ED2F: jax.Array,
    w_out_EFD: jax.Array,
    *,
    combine: bool = True,
) -> jax.Array:
    """Every expert sees every token: y_p = Σ_k weights_pk · expert_{experts_pk}(x_p). The oracle.

    Returns:
      [P, D], or with `combine=False` y_pk = expert_{experts_pk}(x_p), [P, K, D]; zeros where absent.
    """
    E = w_in_ED2F.shape[0]
    hidden_PEF = swiglu(jnp.einsum("PD,EDxF->PExF", x_PD, w_in_ED2F))
    if not combine:
        chosen_PKE = jax.nn.one_hot(experts_PK, E, dtype=x_PD.dtype)
        return jnp.einsum("PEF,EFD,PKE->PKD", hidden_PEF, w_out_EFD, chosen_PKE)
    gates_PE = jnp.einsum("PK,PKE->PE", weights_PK, jax.nn.one_hot(experts_PK, E, dtype=weights_PK.dtype))
    return jnp.einsum("PEF,EFD,PE->PD", hidden_PEF, w_out_EFD, gates_PE.astype(x_PD.dtype))


def grouped_dispatch(
    x_PD: jax.Array,
    weights_PK: jax.Array,
    experts_PK: jax.Array,
    w_in_ED2F: jax.Array,
    w_out_EFD: jax.Array,
    grouped_matmul: GroupedMatmul,
    *,
    combine: bool = True,
) -> jax.Array:
    """The same as `dense_dispatch`, dropless: assignments sorted by expert, then two grouped matmuls.

    Args:
      grouped_matmul: (rows_ND sorted by group, w_EDF, group_sizes_E) -> rows_NF. Rows past the last group, where the
        absent assignments lie, may hold anything, in its results and in the gradients it passes to its rows.
    """
    (P, K), (E, D, _, F) = experts_PK.shape, w_in_ED2F.shape
    by_expert = sort_by_expert(experts_PK.reshape(P * K), E)
    present_N1 = (jnp.arange(P * K) < jnp.sum(by_expert.sizes_E))[:, None]
    # A `where` after a matmul clears what it leaves past the groups; one before it clears the gradient's.
    rows_ND = jnp.where(present_N1, jnp.take(x_PD, by_expert.order_N // K, axis=0, mode="clip"), 0)
    gate_up_NF = jnp.where(present_N1, grouped_matmul(rows_ND, w_in_ED2F.reshape(E, D, 2 * F), by_expert.sizes_E), 0)
    hidden_NF = swiglu(gate_up_NF.reshape(P * K, 2, F))
    out_ND = jnp.where(present_N1, grouped_matmul(hidden_NF, w_out_EFD, by_expert.sizes_E), 0)
    out_PKD = jnp.take(out_ND, by_expert.place_N, axis=0, mode="clip").reshape(P, K, D)
    return _combined(out_PKD, weights_PK) if combine else out_PKD


def capacity_of(factor: float, T: int, K: int, E: int) -> int:
    """ceil(factor · T · K / E): what an expert takes of a row of T tokens; at least 1, at most T (a token's experts are
    distinct)."""
    share = round(factor * T * K / E, 6)  # 1.1 · 10 is 11.000000000000002, and its ceiling 12
    return min(T, max(1, math.ceil(share)))


def _rank(experts_BTK: jax.Array, num_experts: int) -> jax.Array:
    """How many assignments of the same row and expert come before, by position, then k."""
    expert_BN = experts_BTK.reshape(len(experts_BTK), -1)
    rank_BN = jax.vmap(lambda expert_N: sort_by_expert(expert_N, num_experts).rank_N)(expert_BN)
    return rank_BN.reshape(experts_BTK.shape)


def within_capacity(experts_BTK: jax.Array, num_experts: int, capacity: int, token_mask_BT: jax.Array) -> jax.Array:
    """Which assignments find room when an expert takes `capacity` of each row, first come, first served.

    Priority is by position, then k, so that no later token pushes out an earlier one (Switch Transformer,
    arXiv:2101.03961, section 2.2, has capacities over the whole batch; those would leak between its rows).

    Args:
      experts_BTK: int32, `num_experts` where absent. token_mask_BT: False on padding. Neither takes capacity.

    Returns:
      keep_BTK, bool; False where absent and on padding. Drops are the other assignments that it does not keep.
    """
    experts_BTK = jnp.where(token_mask_BT[..., None], experts_BTK, num_experts)
    return (experts_BTK < num_experts) & (_rank(experts_BTK, num_experts) < capacity)


def capacity_dispatch(
    x_BTD: jax.Array,
    weights_BTK: jax.Array,
    experts_BTK: jax.Array,
    w_in_ED2F: jax.Array,
    w_out_EFD: jax.Array,
    capacity: int,
    *,
    combine: bool = True,
) -> jax.Array:
    """The same as `dense_dispatch` on rows: every expert has a bucket of `capacity` tokens for each row.

    Static shapes and plain matmuls, E · B · capacity rows of them whatever the routing; nothing moves between rows.
    What `within_capacity` does not keep of `experts_BTK` counts as absent.

    Returns:
      [B, T, D], or with `combine=False` [B, T, K, D].
    """
    T, (E, D) = x_BTD.shape[1], w_in_ED2F.shape[:2]
    rank_BTK = _rank(experts_BTK, E)
    keep_BTK = (experts_BTK < E) & (rank_BTK < capacity)
    no_slot, no_token = E * capacity, T
    slot_BTK = jnp.where(keep_BTK, experts_BTK * capacity + rank_BTK, no_slot)

    def fill(x_TD, slot_TK):
        token_S = jnp.full(E * capacity, no_token).at[slot_TK].set(jnp.arange(T)[:, None], mode="drop")
        return jnp.take(x_TD, token_S, axis=0, mode="fill", fill_value=0).reshape(E, capacity, D)

    x_EBcD = jax.vmap(fill, out_axes=1)(x_BTD, slot_BTK)
    hidden_EBcF = swiglu(jnp.einsum("EBcD,EDxF->EBcxF", x_EBcD, w_in_ED2F))
    y_EBcD = jnp.einsum("EBcF,EFD->EBcD", hidden_EBcF, w_out_EFD)

    def empty(y_EcD, slot_TK):
        return jnp.take(y_EcD.reshape(E * capacity, D), slot_TK, axis=0, mode="fill", fill_value=0)

    y_BTKD = jax.vmap(empty, in_axes=(1, 0))(y_EBcD, slot_BTK)
    return _combined(y_BTKD, weights_BTK) if combine else y_BTKD
