"""The MLP of dense layers and shared experts, and the gate that switches its units."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax import axes
from dsv3_jax.config import ModelConfig, UnitGate
from dsv3_jax.layers.common import parameter, weight
from dsv3_jax.layers.inputs import Packing
from dsv3_jax.ops.dispatch import swiglu
from dsv3_jax.sharding import constrain

# A layer's router draws from the same keys: its noise from the keys themselves, its dropout from stream 1.
KEY_STREAM = 2


def switch(logits: jax.Array, noise: jax.Array, temperature: float) -> jax.Array:
    """1 where logits + noise > 0, else 0; the gradient is that of sigmoid((logits + noise) / temperature).

    With the noise of a logistic distribution (the difference of two Gumbel ones) this is the straight-through
    Gumbel-softmax of two classes (Jang et al. 2017, arXiv:1611.01144); without noise the hard gate of evaluation.
    """
    soft = jax.nn.sigmoid((logits + noise) / temperature)
    hard = (logits + noise > 0).astype(soft.dtype)
    return soft + jax.lax.stop_gradient(hard - soft)


class BlockSwitches(nn.Module):
    """on_BTJ, 1 or 0 for each block of units, from silu(x W_1) W_2 + b in float32; and the sums of its statistics.

    Training draws which blocks are on; evaluation takes those with a logit above 0. The share that counts is that of
    evaluation, in training too: `activation` is Σ over sequences of (mean share − target)², `active_units` Σ over
    tokens of the share.
    """

    config: ModelConfig
    gate: UnitGate

    @nn.compact
    def __call__(self, x_BTD: jax.Array, packing: Packing) -> tuple[jax.Array, dict[str, jax.Array]]:
        gate, D = self.gate, x_BTD.shape[-1]
        init = nn.initializers.normal
        w_in_DH = parameter(self, "w_gate_in", init(D**-0.5), (D, gate.gate_dim), (axes.FSDP_EMBED, None))
        w_out_HJ = parameter(self, "w_gate_out", init(gate.gate_dim**-0.5), (gate.gate_dim, gate.blocks), (None, None))
        bias_J = parameter(self, "bias", nn.initializers.zeros, (gate.blocks,), (None,))
        hidden_BTH = jax.nn.silu(jnp.einsum("BTD,DH->BTH", x_BTD.astype(jnp.float32), w_in_DH))
        logits_BTJ = jnp.einsum("BTH,HJ->BTJ", hidden_BTH, w_out_HJ) + bias_J
        on_BTJ = steady_BTJ = switch(logits_BTJ, jnp.zeros_like(logits_BTJ), gate.temperature)
        if packing.key_B is not None:
            keys_B = jax.vmap(jax.random.fold_in, (0, None))(packing.key_B, KEY_STREAM)
            noise_BTJ = jax.vmap(lambda key: jax.random.logistic(key, logits_BTJ.shape[1:]))(keys_B)
            on_BTJ = switch(logits_BTJ, noise_BTJ, gate.temperature)
        real_BT = packing.token_mask_BT.astype(jnp.float32)
        share_BT = jnp.mean(steady_BTJ, axis=-1) * real_BT
        tokens_B = jnp.sum(real_BT, axis=-1)
        miss_B = jnp.sum(share_BT, axis=-1) / jnp.maximum(tokens_B, 1) - gate.target
        return on_BTJ, {
            "activation": jnp.sum(jnp.where(tokens_B > 0, jnp.square(miss_B), 0)),
            "active_units": jax.lax.stop_gradient(jnp.sum(share_BT)),
        }


class SwiGLU(nn.Module):
    """(silu(x W_gate) · x W_up) W_down, of width `hidden_dim`; and the sums of its unit gate, if the config has one."""

    config: ModelConfig
    hidden_dim: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array, packing: Packing) -> tuple[jax.Array, dict[str, jax.Array]]:
        D, F, gate = self.config.dim, self.hidden_dim, self.config.unit_gate
        w_in_D2F = weight(self, self.config, "w_in", (D, 2, F), (axes.FSDP_EMBED, None, axes.MLP), D)
        w_out_FD = weight(self, self.config, "w_out", (F, D), (axes.MLP, axes.FSDP_EMBED), F, residual=True)
        hidden_BTF = swiglu(jnp.einsum("BTD,DxF->BTxF", x_BTD, w_in_D2F))
        sums: dict[str, jax.Array] = {}
        if gate is not None:
            on_BTJ, sums = BlockSwitches(self.config, gate, name="gate")(x_BTD, packing)
            hidden_BTF *= jnp.repeat(on_BTJ, F // gate.blocks, axis=-1).astype(hidden_BTF.dtype)
        hidden_BTF = constrain(hidden_BTF, (axes.BATCH, axes.LENGTH, axes.MLP))
        return jnp.einsum("BTF,FD->BTD", hidden_BTF, w_out_FD), sums
