"""The process: its cache folder, compiled programs kept across runs, and memory kept across steps."""

import ctypes
import os
import pathlib
import platform


def cache_folder() -> pathlib.Path:
    """`$DSV3_JAX_CACHE`, or `~/.cache/dsv3_jax`: packages, tokenizers, tokens and compiled programs."""
    return pathlib.Path(os.environ.get("DSV3_JAX_CACHE", "~/.cache/dsv3_jax")).expanduser()


def tune_process() -> None:
    """Call once, before the first computation.

    Keeps compiled programs across processes, unless `JAX_COMPILATION_CACHE_DIR` already says where. On glibc, keeps
    large freed blocks in the heap: XLA takes and frees its temporaries each step, and on CPU faulting those pages in
    again cost a seventh of a training step.
    """
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # malloc.h
        for option, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_arena_max, 1)):
            libc.mallopt(option, value)
