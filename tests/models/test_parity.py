"""Agreement with transformers' DeepseekV3ForCausalLM on the same weights: logits and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.models.transformer import Transformer
from tests.conftest import assert_close, tiny_model

torch = pytest.importorskip("torch", reason="the oracle is transformers on torch: make peers")
pytest.importorskip("transformers", reason="the oracle is transformers on torch: make peers")
pytestmark = pytest.mark.slow

LATENT = tiny_model().attention.projection
MODELS = {
    "query compression": tiny_model(),
    "no query compression": tiny_model(
        attention=c.Attention(projection=dataclasses.replace(LATENT, query_latent_dim=None))
    ),
    "two dense layers, two shared experts": tiny_model(
        num_layers=4, num_dense_layers=2, moe=dataclasses.replace(tiny_model().moe, num_shared_experts=2)
    ),
    "one group": tiny_model(
        moe=dataclasses.replace(tiny_model().moe, router=c.GroupedSigmoid(top_k=3, num_groups=1, top_groups=1))
    ),
}


def to_ours(model: c.ModelConfig, weights: dict[str, np.ndarray]) -> dict:
    """The published layout in ours. Rotated widths pair neighbours there and halves here."""
    p = model.attention.projection
    H, nope, R, M = p.num_heads, p.nope_head_dim, p.rope_head_dim, p.value_head_dim
    halves = np.r_[np.arange(0, R, 2), np.arange(1, R, 2)]

    def block(i: int) -> dict:
        def w(name):
            return weights[f"model.layers.{i}.{name}.weight"]

        queries = w("self_attn.q_proj" if p.query_latent_dim is None else "self_attn.q_b_proj").T
        queries = queries.reshape(-1, H, nope + R)
        queries = np.concatenate([queries[..., :nope], queries[..., nope:][..., halves]], axis=-1)
        down = w("self_attn.kv_a_proj_with_mqa").T
        down = np.concatenate([down[:, : p.latent_dim], down[:, p.latent_dim :][:, halves]], axis=-1)
        projection = {
            "w_kv_down": down,
            "kv_norm": {"scale": w("self_attn.kv_a_layernorm")},
            "w_kv_up": w("self_attn.kv_b_proj").T.reshape(-1, H, nope + M),
        }
        if p.query_latent_dim is None:
            projection["w_q"] = queries
        else:
            projection |= {"w_q_down": w("self_attn.q_a_proj").T, "w_q_up": queries}
            projection["q_norm"] = {"scale": w("self_attn.q_a_layernorm")}

        def mlp(name):
            gate_up = np.stack([w(f"{name}.gate_proj").T, w(f"{name}.up_proj").T], axis=1)
            return {"w_in": gate_up, "w_out": w(f"{name}.down_proj").T}

        result = {
            "attention": {"projection": projection, "w_out": w("self_attn.o_proj").T.reshape(H, M, -1)},
            "attention_norm": {"scale": w("input_layernorm")},
            "mlp_norm": {"scale": w("post_attention_layernorm")},
        }
        if i < model.num_dense_layers:
            return result | {"mlp": mlp("mlp")}
        gate_up = weights[f"model.layers.{i}.mlp.experts.gate_up_proj"]  # [E, 2F, D]
        E, _, D = gate_up.shape
        moe = {
            "w_router": w("mlp.gate").T,
            "w_in": gate_up.reshape(E, 2, -1, D).transpose(0, 3, 1, 2),
            "w_out": weights[f"model.layers.{i}.mlp.experts.down_proj"].transpose(0, 2, 1),
            "shared": mlp("mlp.shared_experts"),
        }
        return result | {"moe": moe}

    def stack(layers):
        return jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs)), *[block(i) for i in layers])

    dense = model.num_dense_layers
    return {
        "embedding": jnp.asarray(weights["model.embed_tokens.weight"]),
        "head": jnp.asarray(weights["lm_head.weight"].T),
        "final_norm": {"scale": jnp.asarray(weights["model.norm.weight"])},
        "dense_layers": stack(range(dense)),
        "moe_layers": stack(range(dense, model.num_layers)),
    }


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_the_published_ones(name):
    from experiments.peers.torch_deepseek import make_model

    config = MODELS[name]
    config.attention.pattern = c.Full()
    torch.manual_seed(0)
    theirs = make_model(c.Config(model=config)).float().train()
    biases = []
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
        for layer in theirs.model.layers[config.num_dense_layers :]:
            layer.mlp.gate.e_score_correction_bias.normal_(std=0.05)  # both signs
            biases.append(layer.mlp.gate.e_score_correction_bias.numpy().copy())
    weights = {k: v.detach().numpy() for k, v in theirs.named_parameters()}
    variables = {
        "params": to_ours(config, weights),
        "selection_bias": {"moe_layers": {"moe": {"bias": jnp.asarray(np.stack(biases))}}},
    }
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 21))
    logits = theirs(input_ids=torch.from_numpy(tokens)).logits
    probe = np.random.default_rng(1).normal(size=logits.shape).astype(np.float32)
    (logits * torch.from_numpy(probe)).sum().backward()

    def loss(params):
        output = Transformer(config).apply(variables | {"params": params}, jnp.asarray(tokens))
        return jnp.sum(output.logits_BTV * probe), output.logits_BTV

    gradients, our_logits = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert_close(our_logits, logits.detach().numpy(), 1e-4, "logits")
    their_gradients = {
        k: np.zeros_like(weights[k]) if v.grad is None else v.grad.numpy() for k, v in theirs.named_parameters()
    }
    assert_close(gradients, to_ours(config, their_gradients), 1e-3, "gradients")
