"""Where a model to generate with comes from: a run's folder, a Hugging Face folder, or a GGUF file."""

import dataclasses
import json
import pathlib
import sys
from typing import Any, NamedTuple

from dsv3_jax.config import CapacityDispatch, ConfigError, GroupedDispatch, ModelConfig
from dsv3_jax.data import packages
from dsv3_jax.data.pipeline import load_dataset
from dsv3_jax.data.published_tokenizers import open_tokenizer
from dsv3_jax.data.tokenizers import Tokenizer, run_tokenizer
from dsv3_jax.interop.gguf import load_gguf
from dsv3_jax.interop.weight_folder import has_weights
from dsv3_jax.training.checkpoints import restore, run_config
from dsv3_jax.training.conversion import TOKENIZER_FOLDER
from dsv3_jax.training.loop import check_data


class Source(NamedTuple):
    """A model, its weights as numpy arrays, its tokenizer, and the longest text it was made for (None: not known)."""

    config: ModelConfig
    variables: Any
    tokenizer: Tokenizer
    max_length: int | None


def open_run(workdir: str | pathlib.Path) -> Source:
    """A trained run, or a converted checkpoint, which is as it was published. A capacity dispatch, which no text that
    grows can have, becomes the grouped one; stderr is told. Raises `ConfigError` if there is none, or its tokenizer is
    lost."""
    run = run_config(workdir)
    if has_weights(workdir):
        return _published(*restore(workdir), open_tokenizer(pathlib.Path(workdir) / TOKENIZER_FOLDER))
    tokenizer = tokenizer_of_run(pathlib.Path(workdir))
    config, variables = restore(workdir)
    return Source(_dropless(config), variables, tokenizer, run.data.sequence_length)


def open_hf(folder: str | pathlib.Path) -> Source:
    """A folder as Hugging Face publishes it. Raises `ConfigError` if it cannot be read."""
    from dsv3_jax.interop.huggingface import load_hf

    config, variables = load_hf(folder)
    return _published(config, variables, open_tokenizer(folder))


def open_gguf(path: str | pathlib.Path) -> Source:
    """A GGUF file, tokenizer included. Raises `ConfigError` if it cannot be read."""
    config, variables = load_gguf(path)
    return _published(config, variables, open_tokenizer(path))


def open_published(name_or_path: str) -> Source:
    """A published model: "smollm2" (fetched once), a .gguf file, or a Hugging Face folder."""
    return open_gguf(packages.gguf_path(name_or_path)) if packages.is_gguf(name_or_path) else open_hf(name_or_path)


def _dropless(config: ModelConfig) -> ModelConfig:
    """The model with the grouped dispatch in place of a capacity."""
    if config.moe is None or not isinstance(config.moe.dispatch, CapacityDispatch):
        return config
    print("config.model.moe.dispatch: capacity is for training; generating with grouped, no drops", file=sys.stderr)
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, dispatch=GroupedDispatch()))


def _published(config: ModelConfig, variables: Any, tokenizer: Tokenizer) -> Source:
    return Source(config, variables, tokenizer, config.context_length)


def tokenizer_of_run(workdir: pathlib.Path) -> Tokenizer:
    """The tokenizer a run was trained with: the one it saved, or else made again from its text.

    Raises:
      ConfigError: neither is the tokenizer that the run names in `data.json`.
    """
    run, path, data = run_config(workdir), workdir / "tokenizer.json", workdir / "data.json"
    if not path.is_file():
        if not data.is_file():
            raise ConfigError(f"--workdir={workdir}: has no tokenizer.json; put the model's own there")
        dataset = load_dataset(run.data, run.model.vocab_size)
        check_data(workdir, dataset, "tokenizer")
        return dataset.tokenizer
    tokenizer = run_tokenizer(run.data.tokenizer, path)
    stored = json.loads(data.read_text()) if data.is_file() else {}
    if stored.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise ConfigError(f"{path}: is not the tokenizer that this run was trained with; delete it to make it again")
    return tokenizer
