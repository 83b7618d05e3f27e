"""Eight fake devices, a cache of compiled programs kept in the checkout, and tiny models on tiny text."""

import importlib.metadata
import os
import pathlib
import secrets

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Level 0 compiles tiny models twice as fast; speed is not tested here.
FLAGS = " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if importlib.metadata.version("jax").startswith("0.10."):  # later ones do not know the flag, and stop at it
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # the old emitters compile faster
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
# Kernels are tried on fresh numbers each run. Worker processes inherit the seed; set the variable to repeat a run.
os.environ.setdefault("DSV3_JAX_TEST_SEED", str(secrets.randbelow(2**31)))

import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax import config as c

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "one",
    "dog",
    "run",
    "far",
    "over",
    "hill",
    "and",
    "dale",
    "while",
    "rain",
    "fell",
]


def make_text(seed: int, words: int) -> str:
    random = np.random.default_rng(seed)
    return " ".join(random.choice(WORDS, words)) + "\n"


def pytest_report_header() -> str:
    return f"DSV3_JAX_TEST_SEED={os.environ['DSV3_JAX_TEST_SEED']}"


def pytest_runtest_logreport(report):
    if report.failed:  # `-q` shows no header
        print(f"\nDSV3_JAX_TEST_SEED={os.environ['DSV3_JAX_TEST_SEED']}")


def fresh_key(index: int = 0) -> jax.Array:
    """A random key of this run."""
    return jax.random.fold_in(jax.random.key(int(os.environ["DSV3_JAX_TEST_SEED"])), index)


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory):
    """Tokens and tokenizers of the tests stay out of the user's cache."""
    default = pathlib.Path("~/.cache/dsv3_jax").expanduser()
    os.environ.setdefault("DSV3_JAX_USER_CACHE", os.environ.get("DSV3_JAX_CACHE", str(default)))
    os.environ["DSV3_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> pathlib.Path:
    """24 documents of 20 to 250 words."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(24):
        (folder / f"{index:02d}.txt").write_text(make_text(index, 20 + 10 * index))
    return folder


def tiny_model(**changes) -> c.ModelConfig:
    """Two layers, one dense and one with eight experts, 27k parameters."""
    latent = c.Latent(
        num_heads=2, query_latent_dim=16, latent_dim=8, nope_head_dim=8, rope_head_dim=8, value_head_dim=8
    )
    moe = c.MixtureOfExperts(
        num_experts=8, expert_dim=16, router=c.GroupedSigmoid(top_k=2, num_groups=4, top_groups=2, balance_weight=1e-2)
    )
    model = c.ModelConfig(
        vocab_size=320,
        dim=32,
        num_layers=2,
        dense_dim=64,
        attention=c.Attention(projection=latent, pattern=c.Windowed(8, (0, 1))),
        moe=moe,
    )
    return dataclasses.replace(model, **changes)


def tiny_config(corpus: pathlib.Path, **train) -> c.Config:
    """A run of seconds on `corpus`."""
    settings = {"num_steps": 20, "batch_size": 4, "checkpoint_every": 10, "eval_every": 0, "eval_rows": 4}
    return c.Config(
        model=tiny_model(),
        data=c.DataConfig(
            domains=(c.Domain("words", c.TextFiles(str(corpus))),),
            tokenizer=c.BpeTokenizer(300),
            sequence_length=32,
            held_out_fraction=0.1,
        ),
        train=c.TrainConfig(
            **(settings | train),
            optimizer=c.AdamW(learning_rate=1e-2, base_dim=32),
            schedule=c.Cosine(total_steps=20, warmup_steps=2),
        ),
    )


def random_batch(config: c.Config, seed: int = 0, packed: bool = True) -> dict[str, np.ndarray]:
    """Random tokens; rows of two documents and some padding, or of one document."""
    random = np.random.default_rng(seed)
    B, T = config.train.batch_size, config.data.sequence_length
    tokens = random.integers(0, config.model.vocab_size, (B, T + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
    segments = np.ones((B, T), np.int32)
    if packed:
        for row in range(B):
            cut, end = sorted(random.choice(np.arange(2, T - 1), 2, replace=False))
            positions[row, cut:] -= cut
            segments[row, cut:] = 2
            positions[row, end:] = np.arange(T - end)
            segments[row, end:] = 0
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions, "segment_ids": segments}
    return batch | {"domain": np.zeros((B, T), np.int32)}


def assert_close(actual, expected, relative: float, what: str = "") -> None:
    """Trees equal to `relative` of each leaf's largest value: rounding differs with the order of sums."""
    actual_leaves, expected_leaves = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual_leaves) == len(expected_leaves)
    for a, e in zip(actual_leaves, expected_leaves, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        scale = max(np.abs(e).max(), 1e-6) if e.size else 1.0
        error = np.abs(a - e).max() / scale if e.size else 0.0
        assert error <= relative, f"{what}: relative error {error:.2e} > {relative:.0e}, shape {e.shape}"
