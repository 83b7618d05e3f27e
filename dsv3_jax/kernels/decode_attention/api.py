"""Picks an implementation of attention to a cache."""

import math

import jax
import jax.numpy as jnp

from dsv3_jax import axes
from dsv3_jax.config import ConfigError
from dsv3_jax.kernels import hopper, tpu
from dsv3_jax.kernels.decode_attention.call import Call
from dsv3_jax.kernels.decode_attention.pallas_gpu import gpu_decode_attention, gpu_refusal
from dsv3_jax.kernels.decode_attention.pallas_tpu import fits, tpu_decode_attention
from dsv3_jax.kernels.decode_attention.reference import whole_attention
from dsv3_jax.sharding import per_shard, repeat_key_heads

IMPLEMENTATIONS = {
    "pallas_gpu": gpu_decode_attention,
    "pallas_tpu": tpu_decode_attention,
    "reference": whole_attention,
}


def refusal(name: str, call: Call) -> str | None:
    """Why an implementation cannot run this; None if it can. Of the arrays only shapes and dtypes are read."""
    dtype = call.k_BSGN.dtype
    if name == "pallas_tpu" and (reason := tpu.refusal(dtype)):
        return reason
    bytes_a_slot = sum(math.prod(x.shape[2:]) * x.dtype.itemsize for x in call.arrays)
    if name == "pallas_tpu" and not fits(bytes_a_slot):
        return f"{bytes_a_slot:,} bytes a slot of the cache do not fit on the chip; use 'reference'"
    return gpu_refusal(call) or hopper.refusal(dtype) if name == "pallas_gpu" else None


def default_implementation(call: Call) -> str:
    """The platform's kernel if it can run this (`refusal`), else "reference".

    On an H100, 32,768 slots in bfloat16 (docs/results/attention_speed.md): eight rows of grouped queries 3.2 times as
    fast as "reference", of latent attention 1.6 times; one row 0.9 times.
    """
    name = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}.get(jax.default_backend(), "reference")
    return "reference" if refusal(name, call) else name


def decode_attention(
    q_BTHN: jax.Array,
    k_BSGN: jax.Array,
    v_BSGM: jax.Array | int,
    mask_BTS: jax.Array,
    *,
    scale: float,
    bias_BTS: jax.Array | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax(softcap(scale · q kᵀ) + bias) v of T new tokens, one or a few, to the S slots of a cache.

    For inference: kernels have no gradient. S is read once whatever T.

    Args:
      v_BSGM: values, or their width M where they are the first M elements of the keys (latent attention, absorbed).
      mask_BTS: bool, which slots a token sees. bias_BTS: float32, added to the scores of those.
      implementation: "pallas_gpu" or "pallas_tpu" (elsewhere than on a Hopper GPU or a TPU they are interpreted, for
        tests), or "reference"; by default `default_implementation`.

    Returns:
      out_BTHM in the dtype of the cache, and lse_BHT float32. A token that sees nothing gives zeros and −inf.

    Raises:
      ConfigError: an unknown implementation, or one that cannot run this (`refusal`).
    """
    bias_BTS = jnp.where(mask_BTS, 0.0 if bias_BTS is None else bias_BTS, -jnp.inf).astype(jnp.float32)
    call = Call(q_BTHN, k_BSGN, v_BSGM, bias_BTS, scale, softcap)
    name = implementation or default_implementation(call)
    if name not in IMPLEMENTATIONS:
        raise ConfigError(f"implementation={name!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
    if reason := refusal(name, call):
        raise ConfigError(f"implementation={name!r}: {reason}")
    if name == "reference":  # XLA splits it
        return whole_attention(call)
    k_BSGN, *values = (repeat_key_heads(q_BTHN.shape[2], x) for x in call.arrays)

    def attend(q, bias, k, *values):
        return IMPLEMENTATIONS[name](Call(q, k, values[0] if values else v_BSGM, bias, scale, softcap))

    of_keys = (axes.BATCH, None, axes.KV_HEADS, None)
    inputs = [(q_BTHN, (axes.BATCH, None, axes.HEADS, None)), (bias_BTS, (axes.BATCH, None, None))]
    inputs += [(x_BSGN, of_keys) for x_BSGN in (k_BSGN, *values)]
    return per_shard(attend, inputs, (inputs[0][1], (axes.BATCH, axes.HEADS, None)))
