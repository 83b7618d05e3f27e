"""Attention to the global keys of a pattern alone, and its merge with attention to the local ones."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsv3_jax.config import LearnedGlobal
from dsv3_jax.kernels.windowed_attention.call import Call
from dsv3_jax.kernels.windowed_attention.key_sets import find_global_keys, global_mask, has_global_keys
from dsv3_jax.ops.attention import merge, reference_attention

BLOCK = 128  # queries, at most, that share their choice of learned global keys


def attend_globals(call: Call) -> tuple[jax.Array, jax.Array]:
    """(out_BTHM, lse_BHT) of the global keys that are not local too; scores are not kept for the gradient.

    Plain JAX: a document has few global keys.
    """
    q_BTHN, k_BTGN, v_BTGM, place, pattern = call[:5]
    causal, gate_BT, (B, T, H, _) = call.causal, call.gate_BT, q_BTHN.shape
    block = min(BLOCK, pattern.window) if isinstance(pattern, LearnedGlobal) and causal else T  # T: one key set for all
    keys = find_global_keys(pattern, causal, place, gate_BT, call.max_segments, block)
    (_, m, P), n = keys.row_BmP.shape, -(-T // block)

    def cut(x_BT):
        x_BT = jnp.pad(x_BT, [(0, 0), (0, -T % block)] + [(0, 0)] * (x_BT.ndim - 2))
        return x_BT.reshape(B, n, block, *x_BT.shape[2:])

    def pick(x_BTGN):
        picked = jnp.take_along_axis(x_BTGN, keys.row_BmP.reshape(B, m * P, *(1,) * (x_BTGN.ndim - 2)), axis=1)
        picked = picked.reshape(B, m, P, *x_BTGN.shape[2:])
        return jnp.broadcast_to(picked, (B, n, *picked.shape[2:])).reshape(B * n, *picked.shape[2:])

    q_place = jax.tree.map(cut, place)
    mask_BnSP = global_mask(pattern, causal, keys, *q_place)
    bias = None
    if gate_BT is not None:
        bias = jnp.broadcast_to(pick(jax.nn.log_sigmoid(gate_BT))[:, None], (B * n, block, P))
    q_nSHN = cut(q_BTHN).reshape(B * n, block, *q_BTHN.shape[2:])
    mask_nSP = jnp.broadcast_to(mask_BnSP, (B, n, block, P)).reshape(B * n, block, P)
    out, lse = reference_attention(q_nSHN, pick(k_BTGN), pick(v_BTGM), mask_nSP, call.scale, bias, call.softcap)
    if keys.owner_BmP is None:  # one key set for all documents, of a static size: never a wrong result
        beyond = (q_place.segment_BT > call.max_segments).reshape(B * n, block, 1, 1)
        out = jnp.where(beyond, jnp.nan, out).astype(out.dtype)
    lse_BHT = jnp.moveaxis(lse.reshape(B, n, H, block), 1, 2).reshape(B, H, n * block)[..., :T]
    return out.reshape(B, n * block, H, -1)[:, :T], lse_BHT


def attend_with_globals(
    local: Callable[[Call], tuple[jax.Array, jax.Array]], call: Call
) -> tuple[jax.Array, jax.Array]:
    """(out_BTHM, lse_BHT) of a pattern, whose local key set `local` attends to."""
    near = local(call)
    if not has_global_keys(call.pattern):
        return near

    @jax.checkpoint
    def far(q, k, v, gate_BT):
        return attend_globals(call._replace(q_BTHN=q, k_BTGN=k, v_BTGM=v, gate_BT=gate_BT))

    return merge(near, far(call.q_BTHN, call.k_BTGN, call.v_BTGM, call.gate_BT))
