"""The cache folder: packages, tokenizers, tokens and compiled programs."""

import os
import pathlib


def cache_folder() -> pathlib.Path:
    """`$DSV3_JAX_CACHE`, or `~/.cache/dsv3_jax`."""
    return pathlib.Path(os.environ.get("DSV3_JAX_CACHE", "~/.cache/dsv3_jax")).expanduser()


def enable_compilation_cache() -> None:
    """Keeps compiled programs across processes, unless `JAX_COMPILATION_CACHE_DIR` already says where."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
