"""Agreement with transformers on checkpoints that one side writes and the other reads: logits in float32, gradients."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsv3_jax import config as c
from dsv3_jax.interop.huggingface import load_hf, nested, open_hf, save_hf
from dsv3_jax.models.transformer import Transformer
from tests.conftest import assert_close
from tests.interop.test_huggingface import save_float8, stored
from tests.interop.tiny import models, random_variables

torch = pytest.importorskip("torch", reason="the oracle is transformers on torch: make peers")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers on torch: make peers")

VOCABULARY, LENGTH = 72, 21
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
COMMON |= {"num_attention_heads": 4, "max_position_embeddings": 64}
LATENT = COMMON | {
    **{"num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "v_head_dim": 10},
    **{"qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "first_k_dense_replace": 1, "moe_intermediate_size": 16},
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1, "routed_scaling_factor": 2.5},
}
V3 = LATENT | {"n_group": 4, "topk_group": 2, "norm_topk_prob": True}
V32 = V3 | {"index_topk": 5, "index_n_heads": 16, "index_head_dim": 12}
V2 = LATENT | {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "n_shared_experts": 2}
LLAMA = COMMON | {"num_key_value_heads": 2}
QWEN = LLAMA | {"head_dim": 12, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3}
MIXTRAL = LLAMA | {"num_local_experts": 8, "num_experts_per_tok": 2}
ORIGINAL = {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 4, "beta_slow": 1} | ORIGINAL
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e3, "factor": 3.0}
SHARED_2 = {"n_shared_experts": 2, "first_k_dense_replace": 2, "num_hidden_layers": 4}

CASES = {
    "deepseek_v3": ("deepseek_v3", V3),
    "deepseek_v32": ("deepseek_v32", V32),
    "deepseek_v2": ("deepseek_v2", V2),
    "llama": ("llama", LLAMA),
    "qwen3_moe": ("qwen3_moe", QWEN),
    "mixtral": ("mixtral", MIXTRAL),
    "v3 without query compression": ("deepseek_v3", V3 | {"q_lora_rank": None}),
    "v3 of one group": ("deepseek_v3", V3 | {"n_group": 1, "topk_group": 1}),
    "v3 of two shared experts, two dense layers": ("deepseek_v3", V3 | SHARED_2),
    "v3 all sparse": ("deepseek_v3", V3 | {"first_k_dense_replace": 0}),
    "v3 weights not normalised": ("deepseek_v3", V3 | {"norm_topk_prob": False}),
    "v3 yarn": ("deepseek_v3", V3 | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    "v3 yarn, other scales": ("deepseek_v3", V3 | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}),
    "v3 yarn of the paper": ("deepseek_v3", V3 | {"rope_parameters": YARN}),
    "v3 yarn, attention factor": ("deepseek_v3", V3 | {"rope_parameters": YARN | {"attention_factor": 1.4}}),
    "v3 halves": ("deepseek_v3", V3 | {"rope_interleave": False}),
    "v3 tied": ("deepseek_v3", V3 | {"tie_word_embeddings": True}),
    "v32 of one group, yarn": (
        "deepseek_v32",
        V32 | {"n_group": 1, "topk_group": 1, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "v32 of as many keys as tokens": ("deepseek_v32", V32 | {"index_topk": LENGTH}),
    "v2 greedy, one shared expert": ("deepseek_v2", V2 | {"topk_method": "greedy", "n_shared_experts": 1}),
    "v2 without query compression": ("deepseek_v2", V2 | {"q_lora_rank": None}),
    "v2 yarn": ("deepseek_v2", V2 | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}),
    "llama as many keys as queries": ("llama", LLAMA | {"num_key_value_heads": 4}),
    "llama tied, wide heads": ("llama", LLAMA | {"tie_word_embeddings": True, "head_dim": 16}),
    "llama one key head, linear": ("llama", LLAMA | {"num_key_value_heads": 1, "rope_parameters": LINEAR}),
    "llama 3": ("llama", LLAMA | {"rope_parameters": LLAMA3 | ORIGINAL}),
    "llama yarn": ("llama", LLAMA | {"rope_parameters": YARN}),
    "llama yarn, both scales": ("llama", LLAMA | {"rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 1.0}}),
    "qwen dense first, normalised": ("qwen3_moe", QWEN | {"mlp_only_layers": [0], "norm_topk_prob": True}),
    "qwen window": ("qwen3_moe", QWEN | {"use_sliding_window": True, "sliding_window": 6}),
    "qwen tied": ("qwen3_moe", QWEN | {"tie_word_embeddings": True}),
    "mixtral window": ("mixtral", MIXTRAL | {"sliding_window": 5}),
}
FAST = ("deepseek_v3", "deepseek_v32", "llama")
ALL = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CASES]


def random_peer(kind: str, fields: dict):
    """transformers' model with norms away from 1, and selection biases of both signs that decide the choice."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name or name.endswith(".bias"):
                value.normal_(std=0.1)
            elif "norm" in name:
                value.normal_(1.0, 0.2)
            elif value.ndim > 1:
                value.normal_(std=0.2)
    return model


def batches() -> dict[str, np.ndarray]:
    """Tokens, and how many of them are real and where: all, the last ones (left padding), the first ones."""
    real = np.ones((6, LENGTH), np.int64)
    real[2, :4] = real[3, :9] = 0
    real[4, -4:] = real[5, -9:] = 0
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (6, LENGTH))
    return {"tokens": tokens, "real": real, "positions": np.maximum(np.cumsum(real, axis=1) - 1, 0) * real}


def their_logits(model) -> np.ndarray:
    batch = {name: torch.from_numpy(value) for name, value in batches().items()}
    with torch.no_grad():
        output = model(batch["tokens"], attention_mask=batch["real"], position_ids=batch["positions"], use_cache=False)
    return output.logits.numpy()


def our_logits(config: c.ModelConfig, variables) -> np.ndarray:
    batch = batches()
    positions, real = batch["positions"].astype(np.int32), batch["real"].astype(np.int32)
    output = jax.jit(Transformer(config).apply)(variables, batch["tokens"].astype(np.int32), positions, real)
    return np.asarray(output.logits_BTV)


def assert_parity(ours: np.ndarray, theirs: np.ndarray) -> None:
    """float32 on both sides; sums in another order."""
    real = batches()["real"] > 0
    assert np.isfinite(theirs[real]).all()
    assert_close(ours[real], theirs[real], 1e-4, "logits")


@pytest.mark.parametrize("name", ALL)
def test_logits_of_their_checkpoint(name, tmp_path):
    theirs = random_peer(*CASES[name])
    theirs.save_pretrained(tmp_path / "theirs")
    config, variables = load_hf(tmp_path / "theirs")
    assert_parity(our_logits(config, variables), their_logits(theirs))
    save_hf(tmp_path / "ours", config, variables)
    saved = stored(tmp_path / "ours")
    if not theirs.config.to_dict().get("rope_interleave", True):
        return  # saved with neighbours, as published
    for key, value in stored(tmp_path / "theirs").items():
        np.testing.assert_array_equal(saved.pop(key), value, err_msg=key)
    assert not saved


def scaled(name: str, scaling: c.RopeScaling) -> c.ModelConfig:
    config = models()[name]
    config.attention.rope_scaling = scaling
    return config


OURS = models() | {
    "v3 yarn": scaled("deepseek_v3", c.Yarn(4.0, 16, 4.0, 1.0, mscale=0.5, mscale_all_dim=0.0)),
    "v2 yarn": scaled("deepseek_v2", c.Yarn(4.0, 16, 4.0, 1.0, mscale=0.0, mscale_all_dim=0.5)),
    "llama yarn": scaled("llama", c.Yarn(4.0, 16, 4.0, 1.0, mscale=0.5, mscale_all_dim=0.0)),
    "llama 3": scaled("llama", c.Llama3Scaling(4.0, 16)),
    "mixtral linear": scaled("mixtral", c.LinearScaling(3.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_logits_of_our_checkpoint(name, tmp_path):
    config = OURS[name]
    if isinstance(config.attention.pattern, c.Sparse):
        config.attention.pattern.index_heads = 16  # fewer often score 0, and ties are broken differently
    variables = random_variables(config)
    save_hf(tmp_path, config, variables, max_shard_bytes=30_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert theirs.dtype == torch.float32
    assert_parity(our_logits(config, variables), their_logits(theirs))


def test_float8_weights_are_those_that_the_blocks_stand_for(tmp_path):
    config = models()["deepseek_v3"]
    _, values = save_float8(tmp_path / "fp8", config, (16, 12))
    save_hf(tmp_path / "plain", config, random_variables(config))
    save_file(values, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation="eager")
    assert_parity(our_logits(*load_hf(tmp_path / "fp8", dtype="float32")), their_logits(theirs))


def published_gradients(model) -> dict[str, np.ndarray]:
    """By published name: transformers keeps the experts of a layer in two arrays."""
    gradients = {}
    for name, value in model.named_parameters():
        gradient = np.zeros(tuple(value.shape), np.float32) if value.grad is None else value.grad.numpy()
        prefix, fused, kind = name.rpartition("experts.")
        if fused and kind == "gate_up_proj":
            for expert, both in enumerate(gradient):
                for half, part in zip(("gate_proj", "up_proj"), np.split(both, 2), strict=True):
                    gradients[f"{prefix}experts.{expert}.{half}.weight"] = part
        elif fused and kind == "down_proj":
            gradients |= {f"{prefix}experts.{e}.down_proj.weight": part for e, part in enumerate(gradient)}
        else:
            gradients[name] = gradient
    return gradients


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0] == "deepseek_v3"])
def test_gradients_are_theirs(name, tmp_path):
    theirs = random_peer(*CASES[name])
    theirs.save_pretrained(tmp_path)
    config, variables = load_hf(tmp_path)
    tokens = batches()["tokens"][:2]
    logits = theirs(torch.from_numpy(tokens), use_cache=False).logits
    probe = np.random.default_rng(1).normal(size=logits.shape).astype(np.float32)
    (logits * torch.from_numpy(probe)).sum().backward()

    def loss(params):
        return (Transformer(config).apply(variables | {"params": params}, tokens).logits_BTV * probe).sum()

    ours = jax.jit(jax.grad(loss))(variables["params"])
    opened, expected = open_hf(tmp_path), {}
    gradients = published_gradients(theirs)
    for tensor in opened.table:
        if tensor.name in gradients:
            shape = opened.leaves[tensor.path].shape
            leaf = expected.setdefault(tensor.path, np.full(shape, np.nan, np.float32))
            leaf[tensor.index] = tensor.to_ours(gradients.pop(tensor.name))
    assert not gradients
    assert_close(ours, nested(expected)["params"], 1e-3, "gradients")
