"""Attention to a cache on TPU: a Pallas kernel that reads each slot that is seen once, and no block that is not.

The keys of all heads of a block of slots are in memory together; in the absorbed form of latent attention (DeepSeek-V2,
arXiv:2405.04434, section 2.1.2) the latent is the key of all heads, and its first elements are the value.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels.decode_attention.call import Call

LANES = 128
LOWEST = -1e30  # where running maxima begin
HIDDEN = -2e30  # the score of a slot that is not seen: its exponential is 0 beside LOWEST too
MEMORY = 60 * 2**20  # bytes on the chip that the kernel may take, of 64 MiB (v5p, TPU7x) or 128 MiB (v5e, v6e)
LARGEST_BLOCK = 2**22  # bytes of keys and values that are aimed at; twice that are in memory
LONGEST_BLOCK = 1024  # slots


def _kernel(scale: float, softcap: float | None, heads: int, slots: int, fetch_ref, seen_ref, q_ref, k_ref, *refs):
    *values, bias_ref, out_ref, lse_ref, peak_ref, total_ref, acc_ref = refs
    v_ref = values[0] if values else k_ref
    batch, step, steps = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    (T, H, N), M = q_ref.shape, out_ref.shape[2]
    group, block = H // heads, k_ref.shape[0]
    precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dot = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    @pl.when(step == 0)
    def _():
        peak_ref[...] = jnp.full_like(peak_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(seen_ref[batch * steps + step] > 0)
    def _():
        for token in range(T):
            bias_1S = bias_ref[pl.ds(token, 1)]
            for head in range(heads):
                rows = pl.ds(head * group, group)
                k_SN, v_SM = k_ref[:, pl.ds(head * N, N)], v_ref[:, pl.ds(head * M, M)]
                if slots % block:  # 0 · NaN is NaN
                    slot_S1 = jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0)
                    v_SM = jnp.where(slot_S1 < slots - fetch_ref[batch * steps + step] * block, v_SM, 0)
                scores_hS = dot(q_ref[token, rows], k_SN, (((1,), (1,)), ((), ()))) * scale
                scores_hS = scores_hS if softcap is None else softcap * jnp.tanh(scores_hS / softcap)
                scores_hS = jnp.where(bias_1S == -jnp.inf, HIDDEN, scores_hS + bias_1S)
                old_h1 = peak_ref[token, rows]
                peak_h1 = jnp.maximum(old_h1, jnp.max(scores_hS, axis=1, keepdims=True))
                exp_hS, shrink_h1 = jnp.exp(scores_hS - peak_h1), jnp.exp(old_h1 - peak_h1)
                out_hM = dot(exp_hS.astype(v_SM.dtype), v_SM, (((1,), (0,)), ((), ())))
                peak_ref[token, rows] = peak_h1
                total_ref[token, rows] = total_ref[token, rows] * shrink_h1 + jnp.sum(exp_hS, axis=1, keepdims=True)
                acc_ref[token, rows] = acc_ref[token, rows] * shrink_h1 + out_hM

    @pl.when(step == steps - 1)
    def _():
        total = total_ref[...]
        safe = jnp.where(total > 0, total, 1.0)
        out_ref[...] = (acc_ref[...] / safe).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(total > 0, peak_ref[...] + jnp.log(safe), -jnp.inf)


def block_size(slots: int, bytes_a_slot: int) -> int:
    """Slots of a block: a multiple of 128, as many as fit."""
    block = LARGEST_BLOCK // bytes_a_slot // LANES * LANES
    return min(max(block, LANES), LONGEST_BLOCK, -(-slots // LANES) * LANES)


def fits(bytes_a_slot: int) -> bool:
    """Whether the smallest block, read ahead and converted, fits on the chip."""
    return 3 * LANES * bytes_a_slot <= MEMORY // 2


def tpu_decode_attention(
    call: Call, *, block: int | None = None, interpret: bool | None = None
) -> tuple[jax.Array, jax.Array]:
    """See `api.decode_attention`.

    Args:
      block: slots in a step, a multiple of 128; by default `block_size`.
      interpret: runs the kernel without a TPU, slowly; by default wherever there is none.
    """
    q_BTHN, k_BSGN, _, bias_BTS, scale, softcap = call
    (B, T, H, N), (S, G), M = q_BTHN.shape, k_BSGN.shape[1:3], call.value_width
    arrays = [x_BSGN.reshape(B, S, -1) for x_BSGN in call.arrays]
    block = block or block_size(S, sum(x_BSX.shape[2] * x_BSX.dtype.itemsize for x_BSX in arrays))
    steps = pl.cdiv(S, block)  # the last block may end past the cache, with anything
    bias_BTS = jnp.pad(bias_BTS, ((0, 0), (0, 0), (0, steps * block - S)), constant_values=-jnp.inf)
    seen_Bn = jnp.any(bias_BTS.reshape(B, T, steps, block) > -jnp.inf, axis=(1, 3))
    # What is not seen is not loaded: the block before stays.
    fetch_Bn = jax.lax.cummax(jnp.where(seen_Bn, jnp.arange(steps), 0), axis=1).astype(jnp.int32)

    def of_slots(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, block, width), lambda b, s, fetch, seen: (b, fetch[b * steps + s], 0))

    def of_queries(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, T, H, width), lambda b, s, fetch, seen: (b, 0, 0, 0))

    of_bias = pl.BlockSpec((None, T, block), lambda b, s, fetch, seen: (b, 0, fetch[b * steps + s]))
    read = sum(x.size * x.dtype.itemsize for x in arrays)
    out_BTHM, lse_BTH1 = pl.pallas_call(
        functools.partial(_kernel, scale, softcap, G, S),
        [jax.ShapeDtypeStruct((B, T, H, M), k_BSGN.dtype), jax.ShapeDtypeStruct((B, T, H, 1), jnp.float32)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, steps),
            in_specs=[of_queries(N), *[of_slots(x.shape[-1]) for x in arrays], of_bias],
            out_specs=[of_queries(M), of_queries(1)],
            scratch_shapes=[pltpu.VMEM((T, H, width), jnp.float32) for width in (1, 1, M)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=MEMORY),
        cost_estimate=pl.CostEstimate(2 * B * T * H * S * (N + M), B * T * H * S, read + q_BTHN.size * 4),
        interpret=jax.default_backend() != "tpu" if interpret is None else interpret,
        name="decode_attention",
    )(fetch_Bn.reshape(-1), seen_Bn.reshape(-1).astype(jnp.int32), q_BTHN, *arrays, bias_BTS)
    return out_BTHM, jnp.swapaxes(lse_BTH1[..., 0], 1, 2)
