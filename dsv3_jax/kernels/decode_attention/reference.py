"""The oracle, and what runs without an accelerator: the whole score matrix, which is small for a few queries."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.decode_attention.call import Call
from dsv3_jax.ops.attention import reference_attention


def whole_attention(call: Call) -> tuple[jax.Array, jax.Array]:
    """See `api.decode_attention`."""
    values = call.arrays[-1][..., : call.value_width]
    mask_BTS = call.bias_BTS > -jnp.inf
    bias_BTS = jnp.where(mask_BTS, call.bias_BTS, 0)
    return reference_attention(call.q_BTHN, call.k_BSGN, values, mask_BTS, call.scale, bias_BTS, call.softcap)
