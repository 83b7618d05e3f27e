"""dsv3_jax: the DeepSeek-V3 family in JAX. Names below load on first use, so that configs import no jax."""

import importlib
from typing import Any

_LAZY = {
    "Transformer": "dsv3_jax.models.transformer",
    "load_hf": "dsv3_jax.interop.huggingface",
    "restore": "dsv3_jax.training.checkpoints",
    "save_hf": "dsv3_jax.interop.huggingface",
    "train": "dsv3_jax.training.loop",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dsv3_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
