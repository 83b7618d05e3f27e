"""One optimizer step of a DeepSeek-V3-shaped model: ours against Hugging Face transformers on PyTorch."""

import os
import pathlib
from collections.abc import Callable

import numpy as np

from dsv3_jax.config import load
from experiments.suites import Case

UNIT = "tokens/s"
DEFAULT_CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "small.py")


def cases(config_path: str | None) -> tuple[list[Case], list[str]]:
    """One step of each contender, and notes on who is missing or what was equal."""
    import jax

    from dsv3_jax.sharding import make_mesh
    from dsv3_jax.training.step import Trainer, batch_shapes

    config = load(config_path or DEFAULT_CONFIG)
    threads = len(os.sched_getaffinity(0))
    trainer = Trainer(config, make_mesh(config.mesh))
    state = trainer.init(config.train.seed)
    random = np.random.default_rng(config.train.seed)
    (B, T) = batch_shapes(config)["tokens"].shape

    def ours() -> float:
        nonlocal state
        tokens = random.integers(0, config.model.vocab_size, (B, T + 1), dtype=np.int32)
        positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions}
        same = {"segment_ids": np.ones((B, T), np.int32), "domain": np.zeros((B, T), np.int32)}
        state, metrics = trainer.step(state, batch | same)
        return float(metrics["loss"])

    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    notes = [
        f"{parameters / 1e6:.1f}M parameters, batch {B} x {T} random tokens, {config.model.compute_dtype}, AdamW, "
        f"clip {config.train.optimizer.clip_norm}, {threads} threads each"
    ]
    found: dict[str, Callable[..., object]] = {"dsv3_jax": ours}
    try:
        from experiments.peers.torch_deepseek import make_train_step
    except ImportError as error:
        notes.append(f"transformers on PyTorch left out: {error} (make peers installs it)")
    else:
        found["transformers (PyTorch)"] = make_train_step(config, threads)
    return [Case("train step", B * T, found)], notes
