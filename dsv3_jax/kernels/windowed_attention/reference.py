"""The oracle: the whole mask of the pattern, then reference attention."""

import jax

from dsv3_jax.kernels.windowed_attention.call import Call
from dsv3_jax.ops.attention import reference_attention
from dsv3_jax.ops.patterns import visible


def pattern_attention(call: Call) -> tuple[jax.Array, jax.Array]:
    """See `api.windowed_attention`. Quadratic in T; knows no bound on documents a row."""
    q, k, v, place = call[:4]
    mask_BTS, bias_BTS = visible(call.pattern, place, place, causal=call.causal, gate_BS=call.gate_BT)
    return reference_attention(q, k, v, mask_BTS, call.scale, bias_BTS, call.softcap)
