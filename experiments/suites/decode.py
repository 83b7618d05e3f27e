"""Greedy generation: ours against Hugging Face transformers' `generate` on PyTorch, the same weights, 64 new tokens."""

import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from dsv3_jax.config import load
from experiments.suites import Case

UNIT = "new tokens/s"
DEFAULT_CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "small.py")
PROMPT_LENGTH, NEW_TOKENS, BATCHES = 64, 64, (1, 4)


def cases(config_path: str | None) -> tuple[list[Case], list[str]]:
    """A case for each batch size, and notes. Both contenders first show that they generate the same tokens."""
    import jax

    from dsv3_jax.inference.generation import Generator
    from dsv3_jax.interop.huggingface import save_hf
    from dsv3_jax.sharding import make_mesh
    from dsv3_jax.training.step import Trainer

    config = load(config_path or DEFAULT_CONFIG)
    variables = jax.device_get(Trainer(config, make_mesh(config.mesh)).init(config.train.seed).variables())
    generator = Generator(config.model, variables, PROMPT_LENGTH + NEW_TOKENS)
    threads = len(os.sched_getaffinity(0))
    notes = [
        f"prompt {PROMPT_LENGTH}, {NEW_TOKENS} new tokens, greedy, {config.model.compute_dtype}, {threads} threads"
    ]
    peer: Any = None
    try:
        from experiments.peers.torch_deepseek import make_generate
    except ImportError as error:
        notes.append(f"transformers on PyTorch left out: {error} (make peers installs it)")
    else:
        with tempfile.TemporaryDirectory() as folder:
            save_hf(folder, config.model, variables)
            peer = make_generate(folder, threads)
    found = []
    for batch in BATCHES:
        random = np.random.default_rng(batch)
        prompts = random.integers(0, config.model.vocab_size, (batch, PROMPT_LENGTH))

        def ours(prompts=prompts):
            return generator.generate(list(prompts), max_new_tokens=NEW_TOKENS)

        contenders: dict[str, Callable[..., object]] = {"dsv3_jax": ours}
        if peer is not None:
            contenders["transformers (PyTorch)"] = lambda prompts=prompts: peer(prompts, NEW_TOKENS)
            agreed = np.mean(np.asarray(ours()) == np.asarray(contenders["transformers (PyTorch)"]()))
            notes.append(f"batch {batch}: {agreed:.1%} of the new tokens are the same")
        found.append(Case(f"batch {batch}", batch * NEW_TOKENS, contenders))
    return found, notes
