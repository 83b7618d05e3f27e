"""Picks an implementation of attention by pattern."""

import jax
import jax.numpy as jnp

from dsv3_jax import axes
from dsv3_jax.config import ConfigError, LayerPattern, LearnedGlobal, RuntimeWindowed
from dsv3_jax.kernels import hopper, tpu
from dsv3_jax.kernels.windowed_attention import cudnn
from dsv3_jax.kernels.windowed_attention.blocked import blocked_attention
from dsv3_jax.kernels.windowed_attention.call import Call
from dsv3_jax.kernels.windowed_attention.pallas_gpu import WIDEST, WIDEST_PRODUCT, gpu_attention, padded_widths
from dsv3_jax.kernels.windowed_attention.pallas_tpu import tpu_attention
from dsv3_jax.kernels.windowed_attention.reference import pattern_attention
from dsv3_jax.ops.patterns import Place
from dsv3_jax.sharding import per_shard, repeat_key_heads

IMPLEMENTATIONS = {
    "blocked": blocked_attention,
    "cudnn": cudnn.cudnn_attention,
    "pallas_gpu": gpu_attention,
    "pallas_tpu": tpu_attention,
    "reference": pattern_attention,
}

KERNELS = ("cudnn", "pallas_gpu", "pallas_tpu")  # which XLA cannot split over devices


def refusal(name: str, call: Call) -> str | None:
    """Why an implementation cannot run this; None if it can. Of the arrays only shapes and dtypes are read."""
    dtype, widths = call.q_BTHN.dtype, (call.k_BTGN.shape[-1], call.v_BTGM.shape[-1])
    if name == "cudnn":
        return cudnn.refusal(call)
    if name == "pallas_tpu":
        return tpu.refusal(dtype)
    if name != "pallas_gpu":
        return None
    padded = padded_widths(*widths)
    if sum(padded) > WIDEST or max(padded) > WIDEST_PRODUCT:
        return (
            f"keys and values {widths[0]} and {widths[1]} wide do not fit the registers: in multiples of 64, at most "
            f"{WIDEST} together and {WIDEST_PRODUCT} each"
        )
    return hopper.refusal(dtype)


def default_implementation(call: Call) -> str:
    """What runs where none is named: the platform's kernel if it can, else "blocked"."""
    name = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}.get(jax.default_backend(), "blocked")
    return "blocked" if refusal(name, call) else name


def windowed_attention(
    q_BTHN: jax.Array,
    k_BTGN: jax.Array,
    v_BTGM: jax.Array,
    *,
    pattern: LayerPattern,
    scale: float,
    causal: bool = True,
    place: Place | None = None,
    gate_BT: jax.Array | None = None,
    softcap: float | None = None,
    max_segments: int = 16,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Grouped-query attention of a sequence to itself, through `pattern`.

    Args:
      place: positions within a document, rising by one from 0 in each; the document of each token, 1, 2, 3 … along the
        row, 0 on padding; and, for `RuntimeWindowed` alone, each query's window, at most the pattern's (None: the
        pattern's). Default: one document.
      gate_BT: float32, for `LearnedGlobal` alone: the score by which keys are chosen.
      softcap: see `ops.attention.soft_cap`.
      max_segments: the most documents a row may hold, where the pattern has one set of global keys for each; "cudnn"
        takes one. 1 without a `place`.
      implementation: "blocked" (plain JAX, skips blocks, memory linear in T · window but for the choice of learned
        global keys), "pallas_tpu" and "pallas_gpu" (Pallas; skip blocks; elsewhere than on a TPU or a Hopper GPU they
        are interpreted, for tests), "cudnn" (NVIDIA GPUs; see `cudnn`), or "reference". Default:
        `default_implementation`.

    Returns:
      out_BTHM in the dtype of `v`, and the log-sum-exp of each query's visible scores, lse_BHT float32 ("cudnn" rounds
      it to the dtype of `v`, and raises where a gradient through it is asked for). A query that sees nothing gives
      zeros and −inf; a document numbered above `max_segments` gives NaN, never a wrong result.

    Raises:
      ConfigError: an unknown implementation, or one that cannot run this (`refusal`). ValueError: arguments that do
        not fit.
    """
    B, T, H, N = q_BTHN.shape
    if k_BTGN.shape[:2] != (B, T) or v_BTGM.shape[:3] != k_BTGN.shape[:3] or k_BTGN.shape[3] != N:
        raise ValueError(f"q {q_BTHN.shape}, k {k_BTGN.shape}, v {v_BTGM.shape}: batch, length, heads or width differ")
    if not q_BTHN.dtype == k_BTGN.dtype == v_BTGM.dtype:
        raise ValueError(f"q {q_BTHN.dtype}, k {k_BTGN.dtype}, v {v_BTGM.dtype}: must be of one dtype")
    if H % k_BTGN.shape[2]:
        raise ValueError(f"{H} query heads are not a multiple of {k_BTGN.shape[2]} key heads")
    if (gate_BT is not None) != isinstance(pattern, LearnedGlobal):
        raise ValueError(f"gate_BT belongs to learned_global and to it alone; the pattern is {pattern.kind}")
    if place is None:
        place, max_segments = Place(jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.ones((B, T), jnp.int32)), 1
    if place.window_BT is not None and not isinstance(pattern, RuntimeWindowed):
        place = place._replace(window_BT=None)  # of other layers
    call = Call(q_BTHN, k_BTGN, v_BTGM, place, pattern, scale, causal, gate_BT, softcap, max_segments)
    name = implementation or default_implementation(call)
    if name not in IMPLEMENTATIONS:
        raise ConfigError(
            f"config.model.attention.implementation={name!r}: must be one of {', '.join(IMPLEMENTATIONS)}"
        )
    if reason := refusal(name, call):
        raise ConfigError(f"config.model.attention.implementation={name!r}: {reason}")
    if name in KERNELS:
        k_BTGN, v_BTGM = (repeat_key_heads(H, x_BTGN) for x_BTGN in (k_BTGN, v_BTGM))

    def attend(q, k, v, position_BT, segment_BT, window_BT, gate_BT):
        place = Place(position_BT, segment_BT, window_BT)
        return IMPLEMENTATIONS[name](call._replace(q_BTHN=q, k_BTGN=k, v_BTGM=v, place=place, gate_BT=gate_BT))

    keys, tokens = (axes.BATCH, axes.LENGTH, axes.KV_HEADS, None), (axes.BATCH, axes.LENGTH)
    inputs = [(q_BTHN, (axes.BATCH, axes.LENGTH, axes.HEADS, None)), (k_BTGN, keys), (v_BTGM, keys)]
    inputs += [(x_BT, tokens) for x_BT in (*place, gate_BT)]
    if name not in KERNELS:  # XLA splits them
        return attend(*(x for x, _ in inputs))
    return per_shard(attend, inputs, (inputs[0][1], (axes.BATCH, axes.HEADS, axes.LENGTH)))
