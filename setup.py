"""Packaging of dsv3_jax. Tool settings live in pyproject.toml, pinned versions in requirements.lock."""

from setuptools import find_packages, setup

NOTEBOOKS = ["ipykernel", "nbclient", "nbformat"]
PEERS = ["transformers>=5.23"]  # torch and tokamax come apart: see the Makefile

setup(
    name="dsv3_jax",
    version="0.1.0",
    description="A research codebase for the DeepSeek-V3 family of Transformers in JAX and Flax Linen",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["dsv3_jax", "dsv3_jax.*"]),
    install_requires=[
        "absl-py",
        "flax>=0.12.8",
        "gguf>=0.19.0",
        "grain>=0.2.18",
        "jax>=0.10.2",
        "jinja2",
        "matplotlib",
        "numpy",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pyarrow",
        "rich",
        "safetensors>=0.8.0",
        "tensorboardX",
        "tokenizers",
    ],
    extras_require={
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "notebooks": NOTEBOOKS,
        "peers": PEERS,
        "dev": ["basedpyright", "pytest", "pytest-xdist", "ruff", "setuptools>=77", *NOTEBOOKS],
    },
)
