"""Greedy generation equals transformers' `generate`, token for token, from the same checkpoint, in float32."""

import numpy as np
import pytest

from dsv3_jax.inference.generation import Generator
from dsv3_jax.interop.huggingface import load_hf
from tests.interop.test_parity import CASES

torch = pytest.importorskip("torch", reason="the oracle is transformers on torch: make peers")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers on torch: make peers")
pytestmark = pytest.mark.slow
NEW = 64


NAMES = ["llama", "deepseek_v3", "v3 yarn", "deepseek_v32", "deepseek_v2", "qwen3_moe", "mixtral"]


@pytest.mark.parametrize("name", NAMES)
def test_64_tokens_are_the_same(name, tmp_path):
    model_type, settings = CASES[name]
    settings = settings | {"max_position_embeddings": 128}
    their_config = transformers.AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(their_config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    config, variables = load_hf(tmp_path)
    generator = Generator(config, variables)
    random = np.random.default_rng(0)
    prompts = [random.integers(3, config.vocab_size, length) for length in (7, 19, 1)]
    ours = generator.generate(prompts, max_new_tokens=NEW)
    assert len({tuple(row) for row in ours}) == 3 and len(set(ours[0])) > 3
    for prompt, row in zip(prompts, ours, strict=True):
        expected = theirs.generate(
            input_ids=torch.from_numpy(prompt[None]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert row == expected[0, len(prompt) :].tolist()
