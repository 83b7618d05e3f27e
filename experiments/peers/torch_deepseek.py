"""Hugging Face transformers' DeepseekV3ForCausalLM on PyTorch, built from our config. Needs `make peers`.

Runs where ours does: on the GPU if jax has one and PyTorch too.
"""

import dataclasses

import jax
import numpy as np
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.interop.config_json import write_config


def device() -> str:
    """PyTorch's name for the platform that jax runs on."""
    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def make_model(config: Config) -> DeepseekV3ForCausalLM:
    """A randomly initialised model of the shapes of `config.model`."""
    published, _ = write_config(dataclasses.replace(config.model, context_length=config.data.sequence_length))
    if published["model_type"] != "deepseek_v3":
        raise ConfigError("the torch peer is DeepSeek-V3: config.model must be too")
    return DeepseekV3ForCausalLM(DeepseekV3Config.from_dict(published | {"use_cache": False}))


def make_train_step(config: Config, threads: int):
    """A function that takes one AdamW step on the next random batch and returns the loss."""
    torch.set_num_threads(threads)
    torch.manual_seed(config.train.seed)
    model = make_model(config).float().train().to(device())
    adamw = config.train.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(adamw.beta1, adamw.beta2), weight_decay=adamw.weight_decay
    )
    random = np.random.default_rng(config.train.seed)
    shape = (config.train.batch_size, config.data.sequence_length)
    bfloat16 = config.model.compute_dtype == "bfloat16"  # over float32 masters, as ours

    def step() -> float:
        tokens, loss = torch.from_numpy(random.integers(0, config.model.vocab_size, shape)).to(device()), 0.0
        for micro in tokens.chunk(config.train.microbatches):
            with torch.autocast(device(), torch.bfloat16, enabled=bfloat16):
                part = model(input_ids=micro, labels=micro).loss / config.train.microbatches
            part.backward()
            loss += float(part)
        torch.nn.utils.clip_grad_norm_(model.parameters(), adamw.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def make_generate(folder: str, threads: int):
    """(prompts [B, T], new tokens) -> the new tokens [B, new] by greedy `generate`, of the model in `folder`."""
    torch.set_num_threads(threads)
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device())
    model.generation_config.eos_token_id = None  # every row runs to its end

    @torch.inference_mode()
    def generate(prompts: np.ndarray, new_tokens: int) -> np.ndarray:
        tokens = torch.from_numpy(prompts).to(device())
        mask = torch.ones_like(tokens)
        out = model.generate(tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, use_cache=True)
        return out[:, tokens.shape[1] :].cpu().numpy()

    return generate
