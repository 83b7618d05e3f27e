"""A published checkpoint into a run's folder, and a run into a published checkpoint, a tensor at a time."""

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dsv3_jax.config import (
    AdamW,
    BpeTokenizer,
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    TokenizerFile,
    TrainConfig,
    to_json,
)
from dsv3_jax.data.tokenizers import run_tokenizer
from dsv3_jax.interop.huggingface import SHARD_BYTES, Plan, check_target, open_hf, plan_hf, write_hf
from dsv3_jax.interop.tensors import BIAS
from dsv3_jax.interop.weight_folder import HELD_BYTES, WeightFolder, begin_conversion, fill, has_weights, open_weights
from dsv3_jax.training.checkpoints import Checkpoints, open_checkpoints, run_config

TOKENIZER, DATA = "tokenizer.json", "data.json"
SEQUENCE_LENGTH = 4096  # of a run that nobody has configured, at most
Show = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    del done, total


def _special_tokens(directory: pathlib.Path) -> tuple[str, str]:
    """Begin and end of a document; a tokenizer without a begin has its end twice."""

    def read(name: str) -> dict[str, Any]:
        path = directory / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    named = read("special_tokens_map.json") | read("tokenizer_config.json")
    contents = {token["id"]: token["content"] for token in read(TOKENIZER).get("added_tokens", [])}
    found = []
    for name in ("bos_token", "eos_token"):
        token, token_id = named.get(name), read("config.json").get(f"{name}_id")
        token = token["content"] if isinstance(token, dict) else token
        found.append(token or contents.get(token_id if isinstance(token_id, int) else None))
    bos, eos = found
    if eos is None:
        raise ConfigError(f"{directory}: its tokenizer names no token that ends a text")
    return bos or eos, eos


def published_tokenizer(directory: pathlib.Path, workdir: pathlib.Path) -> tuple[TokenizerFile, str] | None:
    """The directory's tokenizer as the run will have it, and its fingerprint; None if there is none that we can use."""
    if not (directory / TOKENIZER).is_file():
        return None
    try:
        config = TokenizerFile(str((workdir / TOKENIZER).resolve()), *_special_tokens(directory))
        return config, run_tokenizer(config, directory / TOKENIZER).fingerprint
    except ConfigError as error:
        print(f"the tokenizer is left out: {error}", flush=True)
        return None


def _config(model: ModelConfig, tokenizer: TokenizerFile | None) -> Config:
    """A run of this model, for the commands that work on a run: its text and training are the defaults."""
    size = min(BpeTokenizer().vocab_size, model.vocab_size)
    length = min(SEQUENCE_LENGTH, model.context_length or SEQUENCE_LENGTH)
    data = DataConfig(tokenizer=tokenizer or BpeTokenizer(size), sequence_length=length)
    return Config(model=model, data=data, train=TrainConfig(optimizer=AdamW(base_dim=model.dim))).validate()


def from_hf(
    directory: str | pathlib.Path, workdir: str | pathlib.Path, dtype: str | None = None, show: Show = _silent
) -> Config:
    """Converts a published checkpoint into a run's folder, or goes on with what was interrupted.

    Leaves `weights/` (see `interop.weight_folder`), `config.json`, and the tokenizer if there is one that we can use.

    Args:
      dtype: see `load_hf`.
      show: called now and then with the bytes of the checkpoint that are done, and their total.

    Raises:
      ConfigError: see `open_hf`; or the folder holds something else, or the disk is too small.
    """
    directory, workdir = pathlib.Path(directory), pathlib.Path(workdir)
    opened = open_hf(directory, dtype)
    tokenizer = published_tokenizer(directory, workdir)
    config = _config(opened.config, tokenizer and tokenizer[0])
    folder = begin_conversion(opened, directory, workdir)
    if tokenizer is not None:
        shutil.copyfile(directory / TOKENIZER, workdir / TOKENIZER)
        (workdir / DATA).write_text(json.dumps({"tokenizer": tokenizer[1]}))
    temporary = workdir / "config.json.part"
    temporary.write_text(to_json(config))
    os.replace(temporary, workdir / "config.json")
    fill(folder, opened, show)
    return config


def to_hf(
    workdir: str | pathlib.Path,
    directory: str | pathlib.Path,
    max_shard_bytes: int = SHARD_BYTES,
    show: Show = _silent,
) -> None:
    """Writes a run's newest checkpoint, or its converted weights, as a published checkpoint.

    Converted weights stream a tensor at a time. A checkpoint of training streams a leaf at a time (all layers of one
    parameter), and its files hold the tensors in that order.

    Raises:
      ConfigError: see `save_hf`; or there is nothing to convert.
    """
    config, directory = run_config(workdir).model, check_target(directory)
    if has_weights(workdir):
        folder = open_weights(workdir)
        plan = plan_hf(config, folder.open("r"), max_shard_bytes)
        write_hf(directory, plan, _shown(_mapped(folder, plan, max_shard_bytes), plan.nbytes, show))
    else:
        checkpoints = open_checkpoints(workdir)
        leaves: dict[str, Any] = checkpoints.leaves()
        if BIAS in leaves:
            leaves[BIAS] = checkpoints.read_leaf(BIAS, leaves[BIAS])
        plan = plan_hf(config, leaves, max_shard_bytes, by_leaf=True)
        write_hf(directory, plan, _shown(_restored(checkpoints, plan, leaves), plan.nbytes, show))
        checkpoints.close()
    if (pathlib.Path(workdir) / TOKENIZER).is_file():
        shutil.copyfile(pathlib.Path(workdir) / TOKENIZER, directory / TOKENIZER)


def _mapped(folder: WeightFolder, plan: Plan, max_shard_bytes: int) -> Iterator[np.ndarray]:
    """The tensors of a plan; pages that were read are given back."""
    maps, held = folder.open("r"), 0
    for tensor in plan.table:
        ours = maps[tensor.path][tensor.index]
        yield tensor.to_published(ours)
        held += ours.nbytes
        if held >= min(HELD_BYTES, max_shard_bytes // 4):
            folder.release()
            held = 0


def _restored(checkpoints: Checkpoints, plan: Plan, leaves: dict[str, Any]) -> Iterator[np.ndarray]:
    """The tensors of a plan in the order of its leaves, one of which is held."""
    path, leaf = "", np.empty(0)
    for tensor in plan.table:
        if tensor.path != path:
            path, leaf = tensor.path, checkpoints.read_leaf(tensor.path, leaves[tensor.path])
        yield tensor.to_published(leaf[tensor.index])


def _shown(values: Iterator[np.ndarray], total: int, show: Show) -> Iterator[np.ndarray]:
    done = 0
    show(done, total)
    for value in values:
        done += value.nbytes
        show(done, total)
        yield value
