"""Routed SwiGLU experts for CPU: batched matmuls over equal buckets, and a loop over what does not fit.

XLA runs a batched matmul with equal group sizes at the speed of a plain one on CPU, and nothing else nearly as fast.
So the first `capacity` assignments of every expert are gathered into [E, capacity, D]; the assignments beyond, of the
fuller experts, follow in blocks, in a loop whose number of trips is known at run time. None is dropped; the work is at
most capacity · E + N + BLOCK · E rows, however unbalanced. The combination weights scale the hidden units,
so that both products and both gathers see each assignment once. An absent assignment takes no slot and no block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.ops.dispatch import sort_by_expert, swiglu, swiglu_backward

HEADROOM = 1.1  # bucket capacity / mean assignments an expert
FEW_TOKENS = 8  # up to here reading weights is what costs: buckets that hold every token leave nothing to a loop
BLOCK = 128  # assignments a trip of the loop


class _Layout(NamedTuple):
    """Where the N = P · K assignments go. `order` sorts them by expert; rows are sorted assignments.

    assignment_Ec: what each bucket slot holds; used_Ec: whether it is the expert's own.
    slot_PK: the slot of each assignment; fits_PK: whether it has one.
    first_E, end_E, blocks_E: rows beyond the capacity, and the running number of blocks for them.
    """

    order_N: jax.Array
    assignment_Ec: jax.Array
    used_Ec: jax.Array
    slot_PK: jax.Array
    fits_PK: jax.Array
    first_E: jax.Array
    end_E: jax.Array
    blocks_E: jax.Array


def _capacity(P: int, K: int, E: int) -> int:
    """Slots of a bucket. A token's experts are distinct: none gets more than P."""
    return P if P <= FEW_TOKENS else min(P, max(1, round(HEADROOM * P * K / E)))


def _layout(experts_PK: jax.Array, num_experts: int, capacity: int) -> _Layout:
    expert_N = experts_PK.reshape(-1)
    (N,) = expert_N.shape
    block = min(N, BLOCK)
    order_N, _, rank_N, start_E, sizes_E = sort_by_expert(expert_N, num_experts)
    slot_c = jnp.arange(capacity)
    row_Ec = jnp.minimum(start_E[:, None] + slot_c, N - 1)
    blocks_E = -(-jnp.maximum(sizes_E - capacity, 0) // block)
    total_E = jnp.cumsum(blocks_E)
    return _Layout(
        order_N=order_N,
        assignment_Ec=order_N[row_Ec],
        used_Ec=slot_c < sizes_E[:, None],
        slot_PK=(expert_N * capacity + jnp.minimum(rank_N, capacity - 1)).reshape(experts_PK.shape),
        fits_PK=((expert_N < num_experts) & (rank_N < capacity)).reshape(experts_PK.shape),
        first_E=start_E + capacity - block * (total_E - blocks_E),
        end_E=start_E + sizes_E,
        blocks_E=total_E,
    )


def _overflow_block(layout: _Layout, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Expert of a block, the assignments it covers, and which of them are its own."""
    (N,) = layout.order_N.shape
    block = min(N, BLOCK)
    expert = jnp.sum(index >= layout.blocks_E)
    first = layout.first_E[expert] + block * index
    start = jnp.minimum(first, N - block)
    row = start + jnp.arange(block)
    own = (row >= first) & (row < layout.end_E[expert])
    return expert, jax.lax.dynamic_slice_in_dim(layout.order_N, start, block), own


def _block_experts(x_bD, weights_b, w_in_D2F, w_out_FD):
    hidden_bF = swiglu(jnp.einsum("bD,DxF->bxF", x_bD, w_in_D2F)) * weights_b[:, None]
    return jnp.einsum("bF,FD->bD", hidden_bF, w_out_FD)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(x, index, axis=0, mode="clip")


def bucketed_experts(
    x_PD: jax.Array,
    weights_PK: jax.Array,
    experts_PK: jax.Array,
    w_in_ED2F: jax.Array,
    w_out_EFD: jax.Array,
    *,
    combine: bool = True,
) -> jax.Array:
    """See `api.grouped_experts`. Uncombined, every assignment is a token of its own, with one expert of weight 1."""
    (P, K), E, D = experts_PK.shape, *w_in_ED2F.shape[:2]
    capacity = _capacity(P, K, E)
    if combine:
        return _combined_experts(capacity, x_PD, weights_PK, experts_PK, w_in_ED2F, w_out_EFD)
    x_ND, experts_N1 = jnp.repeat(x_PD, K, axis=0), experts_PK.reshape(P * K, 1)
    ones_N1 = jnp.ones_like(experts_N1, x_PD.dtype)
    return _combined_experts(capacity, x_ND, ones_N1, experts_N1, w_in_ED2F, w_out_EFD).reshape(P, K, D)


def _forward(capacity, x_PD, weights_PK, experts_PK, w_in_ED2F, w_out_EFD):
    D, K = x_PD.shape[1], experts_PK.shape[1]
    layout = _layout(experts_PK, w_in_ED2F.shape[0], capacity)
    weights_N = weights_PK.reshape(-1).astype(x_PD.dtype)
    weights_Ec = jnp.where(layout.used_Ec, weights_N[layout.assignment_Ec], 0)
    x_EcD = _take(x_PD, layout.assignment_Ec // K)
    gate_up_Ec2F = jnp.einsum("EcD,EDxF->EcxF", x_EcD, w_in_ED2F)
    y_EcD = jnp.einsum("EcF,EFD->EcD", swiglu(gate_up_Ec2F) * weights_Ec[..., None], w_out_EFD)
    y_PKD = _take(y_EcD.reshape(-1, D), layout.slot_PK)
    y_PD = jnp.sum(jnp.where(layout.fits_PK[..., None], y_PKD, 0), axis=1)

    def body(index, y_PD):
        expert, assignment, own = _overflow_block(layout, index)
        weights_b = jnp.where(own, weights_N[assignment], 0)
        y_bD = _block_experts(_take(x_PD, assignment // K), weights_b, w_in_ED2F[expert], w_out_EFD[expert])
        return y_PD.at[assignment // K].add(y_bD)

    y_PD = jax.lax.fori_loop(0, layout.blocks_E[-1], body, y_PD)
    return y_PD, (x_PD, weights_PK, layout, w_in_ED2F, w_out_EFD, gate_up_Ec2F)


def _output(*args) -> jax.Array:
    return _forward(*args)[0]


def _backward(_, saved, dy_PD):
    x_PD, weights_PK, layout, w_in_ED2F, w_out_EFD, gate_up_Ec2F = saved
    (P, K), D = weights_PK.shape, x_PD.shape[1]
    weights_N = weights_PK.reshape(-1).astype(x_PD.dtype)
    weights_Ec1 = jnp.where(layout.used_Ec, weights_N[layout.assignment_Ec], 0)[..., None]
    x_EcD, dy_EcD = _take(x_PD, layout.assignment_Ec // K), _take(dy_PD, layout.assignment_Ec // K)
    hidden_EcF = swiglu(gate_up_Ec2F)
    dhidden_EcF = jnp.einsum("EcD,EFD->EcF", dy_EcD, w_out_EFD)
    dw_out_EFD = jnp.einsum("EcF,EcD->EFD", hidden_EcF * weights_Ec1, dy_EcD)
    dweights_Ec = jnp.sum(hidden_EcF * dhidden_EcF, axis=-1, dtype=jnp.float32)
    dgate_up_Ec2F = swiglu_backward(gate_up_Ec2F, dhidden_EcF * weights_Ec1)
    dw_in_ED2F = jnp.einsum("EcD,EcxF->EDxF", x_EcD, dgate_up_Ec2F)
    dx_EcD = jnp.einsum("EcxF,EDxF->EcD", dgate_up_Ec2F, w_in_ED2F)
    fits_PK1 = layout.fits_PK[..., None]
    dx_PD = jnp.sum(jnp.where(fits_PK1, _take(dx_EcD.reshape(-1, D), layout.slot_PK), 0), axis=1)
    dweights_PK = jnp.where(layout.fits_PK, _take(dweights_Ec.reshape(-1), layout.slot_PK), 0)

    def body(index, totals):
        dx_PD, dweights_N, dw_in, dw_out = totals
        expert, assignment, own = _overflow_block(layout, index)
        operands = (_take(x_PD, assignment // K), weights_N[assignment], w_in_ED2F[expert], w_out_EFD[expert])
        dy_bD = jnp.where(own[:, None], _take(dy_PD, assignment // K), 0)
        dx_bD, dweights_b, dw_in_D2F, dw_out_FD = jax.vjp(_block_experts, *operands)[1](dy_bD)
        return (
            dx_PD.at[assignment // K].add(dx_bD),
            dweights_N.at[assignment].add(dweights_b.astype(jnp.float32)),
            dw_in.at[expert].add(dw_in_D2F.astype(jnp.float32)),
            dw_out.at[expert].add(dw_out_FD.astype(jnp.float32)),
        )

    # Many blocks of one expert add up: in bfloat16 all but the first few would be lost.
    totals = (dx_PD, dweights_PK.reshape(-1), dw_in_ED2F.astype(jnp.float32), dw_out_EFD.astype(jnp.float32))
    dx_PD, dweights_N, dw_in_ED2F, dw_out_EFD = jax.lax.fori_loop(0, layout.blocks_E[-1], body, totals)
    dtype = w_in_ED2F.dtype
    dweights_PK = dweights_N.reshape(P, K).astype(weights_PK.dtype)
    return dx_PD, dweights_PK, None, dw_in_ED2F.astype(dtype), dw_out_EFD.astype(dtype)


_combined_experts = jax.custom_vjp(_output, nondiff_argnums=(0,))
_combined_experts.defvjp(_forward, _backward)
