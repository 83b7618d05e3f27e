"""Attention by cuDNN, through `jax.nn.dot_product_attention`: full or a sliding window, one document a row.

For NVIDIA GPUs for which we have no kernel. It is chosen by name alone: on Hopper `pallas_gpu` covers more and is as
fast (docs/results/attention_speed.md). Elsewhere than on a GPU, XLA's implementation of the same call stands in, for
tests.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from dsv3_jax.config import ConfigError, Windowed, cudnn_refusal
from dsv3_jax.kernels.windowed_attention.call import Call

PIECE = 8  # widths are multiples of it
WIDEST = {False: 128, True: 256}  # of keys and of values; from Hopper on


def refusal(call: Call) -> str | None:
    """Why cuDNN cannot run this; None if it can. Of the arrays only shapes and dtypes are read."""
    if reason := cudnn_refusal(call.pattern, call.causal, call.softcap):
        return reason
    if call.max_segments != 1:
        return f"it takes one document a row, and max_segments={call.max_segments}: give 1 (data.max_segments=1)"
    if jax.default_backend() != "gpu":
        return None
    if call.q_BTHN.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {call.q_BTHN.dtype.name}"
    capability = jax.local_devices()[0].compute_capability
    if not re.fullmatch(r"\d+\.\d+", capability) or float(capability) < 8:
        return f"it is for NVIDIA GPUs of compute capability 8.0 and above; this GPU has {capability}"
    width, widest = max(call.q_BTHN.shape[-1], call.v_BTGM.shape[-1]), WIDEST[float(capability) >= 9]
    if width > widest:
        return f"a head is {width} wide, and on this GPU (compute capability {capability}) it takes at most {widest}"
    return None


@jax.custom_vjp
def _without_gradient(lse_BHT: jax.Array, q_BTHN: jax.Array, k_BTGN: jax.Array) -> jax.Array:
    """The log-sum-exp as it is. `jax.nn` gives no gradient through it to queries and keys, and says nothing."""
    return lse_BHT


def _backward(_: None, cotangent: Any) -> tuple[None, None, None]:
    if not isinstance(cotangent, SymbolicZero):
        raise ConfigError(
            "config.model.attention.implementation='cudnn': it gives no gradient through the log-sum-exp; use another "
            "implementation to train what reads it"
        )
    return None, None, None


_without_gradient.defvjp(lambda lse_BHT, *_: (lse_BHT.value, None), _backward, symbolic_zeros=True)


def cudnn_attention(call: Call) -> tuple[jax.Array, jax.Array]:
    """See `api.windowed_attention`. What is not of one document, at the beginning of the row, gives NaN or zeros.

    The log-sum-exp is rounded to the dtype of the inputs, and differentiating through it raises.
    """
    q_BTHN, k_BTGN, v_BTGM, (position_BT, segment_BT, _), pattern = call[:5]
    (T, _, N), M = q_BTHN.shape[1:], v_BTGM.shape[-1]
    width = -(-max(N, M) // PIECE) * PIECE
    q, k, v = (jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])]) for x in (q_BTHN, k_BTGN, v_BTGM))
    real_BT = segment_BT > 0
    # Under causality nothing of the document sees what is behind it.
    length_B = None if call.causal else jnp.sum(segment_BT == 1, axis=1, dtype=jnp.int32)
    out_BTHM, lse_BTH = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=call.scale,
        is_causal=call.causal,
        query_seq_lengths=length_B,
        key_value_seq_lengths=length_B,
        local_window_size=(pattern.window - 1, 0) if isinstance(pattern, Windowed) else None,
        implementation="cudnn" if jax.default_backend() == "gpu" else "xla",
        return_residual=True,
    )
    alien_BT = (segment_BT > 1) | (real_BT & (position_BT != jnp.arange(T)))

    def where_real(x: jax.Array, else_: float) -> jax.Array:
        of_rows = (..., *[None] * (x.ndim - 2))
        return jnp.where(alien_BT[of_rows], jnp.nan, jnp.where(real_BT[of_rows], x, else_))

    lse_BHT = jnp.swapaxes(where_real(lse_BTH.astype(jnp.float32), -jnp.inf), 1, 2)
    return where_real(out_BTHM[..., :M], 0).astype(v_BTGM.dtype), _without_gradient(lse_BHT, q_BTHN, k_BTGN)
