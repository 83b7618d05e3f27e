"""Losses as sums and counts, so that micro-batches and devices add up to the same mean."""

import functools

import jax
import jax.numpy as jnp


def reference_cross_entropy(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    """Σ weights · −log softmax(hidden · head)[target], with all logits in memory: the oracle. Scalar float32."""
    logits_BTV = jnp.einsum("BTD,DV->BTV", hidden_BTD, head_DV, preferred_element_type=jnp.float32)
    log_probability = jax.nn.log_softmax(logits_BTV, axis=-1)
    picked_BT = jnp.take_along_axis(log_probability, targets_BT[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked_BT * weights_BT)


def cross_entropy(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int = 64,
) -> jax.Array:
    """`reference_cross_entropy` without the [B, T, V] logits: `chunk` positions at a time, gradients in the same pass.

    The softmax and the three matmuls of head and gradients are computed once a chunk while its logits are in cache;
    the backward pass only scales the saved gradients. Weights and targets get none.

    Args:
      hidden_BTD: after the final norm. head_DV: same dtype; products accumulate in float32.
      weights_BT: float32, 0 where nothing is predicted.

    Returns:
      Scalar float32, summed over tokens, in nats.
    """
    return _cross_entropy(hidden_BTD, head_DV, targets_BT, weights_BT, chunk)


def _chunks(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[B, T, ...] -> [T / chunk, B, chunk, ...], padded with zeros: the batch axis stays whole, so sharding does."""

    def cut(x):
        B, T, *rest = x.shape
        count = -(-T // chunk)
        x = jnp.pad(x, [(0, 0), (0, count * chunk - T)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(x.reshape(B, count, chunk, *rest), 1, 0)

    return tuple(cut(x) for x in arrays)


def _chunk_loss(h_BcD, head_DV, targets_Bc, weights_Bc):
    """Loss of a chunk and what its gradient needs: unnormalised probabilities and their normaliser."""
    logits_BcV = jnp.einsum("BcD,DV->BcV", h_BcD, head_DV, preferred_element_type=jnp.float32)
    peak_Bc1 = jnp.max(logits_BcV, axis=-1, keepdims=True)
    exp_BcV = jnp.exp(logits_BcV - peak_Bc1)
    total_Bc1 = jnp.sum(exp_BcV, axis=-1, keepdims=True)
    picked_Bc1 = jnp.take_along_axis(logits_BcV, targets_Bc[..., None], axis=-1)
    loss = jnp.sum((jnp.log(total_Bc1) + peak_Bc1 - picked_Bc1)[..., 0] * weights_Bc)
    return loss, exp_BcV, total_Bc1


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden_BTD, head_DV, targets_BT, weights_BT, chunk):
    def body(total, args):
        h, targets, weights = args
        return total + _chunk_loss(h, head_DV, targets, weights)[0], None

    return jax.lax.scan(body, jnp.float32(0), _chunks(chunk, hidden_BTD, targets_BT, weights_BT))[0]


def _forward(hidden_BTD, head_DV, targets_BT, weights_BT, chunk):
    V = head_DV.shape[1]

    def body(carry, args):
        total, dhead_DV = carry
        h_BcD, targets_Bc, weights_Bc = args
        loss, exp_BcV, total_Bc1 = _chunk_loss(h_BcD, head_DV, targets_Bc, weights_Bc)
        onehot_BcV = targets_Bc[..., None] == jnp.arange(V)
        weight_Bc1 = weights_Bc[..., None]
        # d loss / d logits = weight · (softmax − onehot)
        dlogits_BcV = exp_BcV * (weight_Bc1 / total_Bc1) - jnp.where(onehot_BcV, weight_Bc1, 0)
        dlogits_BcV = dlogits_BcV.astype(h_BcD.dtype)
        dh_BcD = jnp.einsum("BcV,DV->BcD", dlogits_BcV, head_DV)
        dhead_DV += jnp.einsum("BcD,BcV->DV", h_BcD, dlogits_BcV, preferred_element_type=jnp.float32)
        return (total + loss, dhead_DV), dh_BcD

    start = (jnp.float32(0), jnp.zeros(head_DV.shape, jnp.float32))
    chunks = _chunks(chunk, hidden_BTD, targets_BT, weights_BT)
    (total, dhead_DV), dh_nBcD = jax.lax.scan(body, start, chunks)
    B, T, D = hidden_BTD.shape
    dhidden_BTD = jnp.moveaxis(dh_nBcD, 0, 1).reshape(B, -1, D)[:, :T]
    return total, (dhidden_BTD, dhead_DV.astype(head_DV.dtype))


def _backward(chunk, saved, cotangent):
    dhidden_BTD, dhead_DV = saved
    scaled = (dhidden_BTD * cotangent.astype(dhidden_BTD.dtype), dhead_DV * cotangent.astype(dhead_DV.dtype))
    return *scaled, None, None


_cross_entropy.defvjp(_forward, _backward)
