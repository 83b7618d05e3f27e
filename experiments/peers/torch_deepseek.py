"""Hugging Face transformers' DeepseekV3ForCausalLM on PyTorch, built from our config. Needs `make peers`."""

import numpy as np
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dsv3_jax.config import Config, ConfigError, Full, Latent


def make_model(config: Config) -> DeepseekV3ForCausalLM:
    """A randomly initialised model of the shapes of `config.model`."""
    model, moe = config.model, config.model.moe
    projection = model.attention.projection
    if not isinstance(projection, Latent) or moe is None:
        raise ConfigError("the torch peer is DeepSeek-V3: config.model needs latent attention and experts")
    if not isinstance(model.attention.pattern, Full) or model.compute_dtype != "float32":
        raise ConfigError("the torch peer has full attention in float32: config.model must have it too")
    hf_config = DeepseekV3Config(
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        intermediate_size=model.dense_dim,
        moe_intermediate_size=moe.expert_dim,
        num_hidden_layers=model.num_layers,
        first_k_dense_replace=model.num_dense_layers,
        num_attention_heads=projection.num_heads,
        num_key_value_heads=projection.num_heads,
        n_shared_experts=moe.num_shared_experts,
        n_routed_experts=moe.num_experts,
        num_experts_per_tok=moe.router.top_k,
        n_group=moe.router.num_groups,
        topk_group=moe.router.top_groups,
        routed_scaling_factor=moe.router.route_scale,
        norm_topk_prob=moe.router.normalize_weights,
        q_lora_rank=projection.query_latent_dim,
        kv_lora_rank=projection.latent_dim,
        qk_nope_head_dim=projection.nope_head_dim,
        qk_rope_head_dim=projection.rope_head_dim,
        v_head_dim=projection.value_head_dim,
        rms_norm_eps=model.norm_epsilon,
        rope_theta=model.attention.rope_theta,
        tie_word_embeddings=model.tie_embeddings,
        max_position_embeddings=config.data.sequence_length,
        use_cache=False,
    )
    return DeepseekV3ForCausalLM(hf_config)


def make_train_step(config: Config, threads: int):
    """A function that takes one AdamW step on the next random batch and returns the loss."""
    torch.set_num_threads(threads)
    torch.manual_seed(config.train.seed)
    model = make_model(config).float().train()
    adamw = config.train.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(adamw.beta1, adamw.beta2), weight_decay=adamw.weight_decay
    )
    random = np.random.default_rng(config.train.seed)
    shape = (config.train.batch_size, config.data.sequence_length)

    def step() -> float:
        tokens = torch.from_numpy(random.integers(0, config.model.vocab_size, shape))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), adamw.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step
