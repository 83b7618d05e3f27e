"""A published checkpoint into a run's folder, and a run into a published checkpoint, a tensor at a time."""

import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dsv3_jax.config import (
    AdamW,
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    TokenizerFile,
    TrainConfig,
    to_json,
    validate_model,
)
from dsv3_jax.data.gguf_tokenizer import gguf_tokenizer
from dsv3_jax.data.packages import gguf_path
from dsv3_jax.data.published_tokenizers import MODEL, TOKENIZER, copy_tokenizer, open_tokenizer
from dsv3_jax.data.tokenizers import Tokenizer, run_tokenizer
from dsv3_jax.interop.huggingface import SHARD_BYTES, Plan, check_target, open_hf, plan_hf, write_hf
from dsv3_jax.interop.tensors import BIASES
from dsv3_jax.interop.weight_folder import HELD_BYTES, WeightFolder, begin_conversion, fill, has_weights, open_weights
from dsv3_jax.training.checkpoints import Checkpoints, open_checkpoints, run_config

TOKENIZER_FOLDER, DATA = "tokenizer", "data.json"
SEQUENCE_LENGTH = 4096  # of a run that nobody has configured, at most
Show = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    del done, total


def published_tokenizer(directory: pathlib.Path, folder: pathlib.Path) -> tuple[TokenizerFile, str] | None:
    """The directory's tokenizer as a run has it that finds it in `folder`, and its fingerprint; None if there is none
    to train with. One without a begin token has its end twice."""
    if not (directory / TOKENIZER).is_file():
        return None
    try:
        tokenizer = open_tokenizer(directory)
        eos = tokenizer.special_tokens.get("eos_token")
        if eos is None:
            raise ConfigError(f"{directory}: its tokenizer names no token that ends a text")
    except ConfigError as error:
        print(f"a run cannot use the tokenizer: {error}", flush=True)
        return None
    bos = tokenizer.special_tokens.get("bos_token", eos)
    return TokenizerFile(str((folder / TOKENIZER).resolve()), bos, eos), tokenizer.fingerprint


def gguf_file_tokenizer(name_or_path: str) -> tuple[TokenizerFile, str] | None:
    """The same of a GGUF file (see `packages.is_gguf`)."""
    tokenizer = gguf_tokenizer(gguf_path(name_or_path))
    eos = tokenizer.special_tokens.get("eos_token")
    if eos is None:
        return None
    bos = tokenizer.special_tokens.get("bos_token", eos)
    return TokenizerFile(name_or_path, bos, eos), tokenizer.fingerprint


def _config(model: ModelConfig, tokenizer: TokenizerFile) -> Config:
    """A run of this model, for the commands that work on a run: its text and training are the defaults."""
    length = min(SEQUENCE_LENGTH, model.context_length or SEQUENCE_LENGTH)
    data = DataConfig(tokenizer=tokenizer, sequence_length=length)
    validate_model(model)  # what only training needs, `train` asks of a config
    return Config(model=model, data=data, train=TrainConfig(optimizer=AdamW(base_dim=model.dim)))


def from_hf(
    directory: str | pathlib.Path, workdir: str | pathlib.Path, dtype: str | None = None, show: Show = _silent
) -> Config:
    """Converts a published checkpoint into a run's folder, or goes on with what was interrupted.

    Leaves `weights/` (see `interop.weight_folder`), `config.json`, and `tokenizer/`: its files as they were published,
    so that the same prompt is the same ids, and `data.json` with its fingerprint: null if there is none that a run can
    use. A `config.json` that is there already stays as it is.

    Args:
      dtype: see `load_hf`.
      show: called now and then with the bytes of the checkpoint that are done, and their total.

    Raises:
      ConfigError: see `open_hf`; or the folder holds something else, or the disk is too small.
    """
    directory, workdir = pathlib.Path(directory), pathlib.Path(workdir)
    opened = open_hf(directory, dtype)
    # Without a tokenizer the run names the place where it belongs, and no text can be put through another.
    nowhere = TokenizerFile(str((workdir / TOKENIZER_FOLDER / TOKENIZER).resolve())), None
    tokenizer, fingerprint = published_tokenizer(directory, workdir / TOKENIZER_FOLDER) or nowhere
    config = _config(opened.config, tokenizer)
    folder = begin_conversion(opened, directory, workdir)
    if (directory / TOKENIZER).is_file():
        copy_tokenizer(directory, workdir / TOKENIZER_FOLDER, model=True)
    (workdir / DATA).write_text(json.dumps({"tokenizer": fingerprint}))
    if (workdir / MODEL).is_file():
        config = run_config(workdir)
        if dtype not in (None, config.model.compute_dtype):
            given = config.model.compute_dtype
            raise ConfigError(f"--dtype={dtype}: {workdir}/{MODEL} has compute_dtype={given!r}; change it there")
    else:
        temporary = workdir / f"{MODEL}.part"
        temporary.write_text(to_json(config))
        os.replace(temporary, workdir / MODEL)
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
    workdir, directory = pathlib.Path(workdir), check_target(directory)
    run = run_config(workdir)
    if has_weights(workdir):
        folder = open_weights(workdir)
        plan = plan_hf(run.model, folder.open("r"), max_shard_bytes)
        plan.config_json.update(_token_ids(workdir / TOKENIZER_FOLDER / MODEL))
        write_hf(directory, plan, _shown(_mapped(folder, plan, max_shard_bytes), plan.nbytes, show))
    else:
        checkpoints = open_checkpoints(workdir)
        leaves: dict[str, Any] = checkpoints.leaves()
        leaves |= {path: checkpoints.read_leaf(path, leaf) for path, leaf in leaves.items() if path.startswith(BIASES)}
        plan = plan_hf(run.model, leaves, max_shard_bytes, by_leaf=True)
        write_hf(directory, plan, _shown(_restored(checkpoints, plan, leaves), plan.nbytes, show))
        checkpoints.close()
    copy_tokenizer(workdir / TOKENIZER_FOLDER, directory)
    if (workdir / TOKENIZER).is_file():
        _write_tokenizer(run_tokenizer(run.data.tokenizer, workdir / TOKENIZER), directory)


def _token_ids(path: pathlib.Path) -> dict[str, Any]:
    """What a published config.json says of the tokenizer."""
    given = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: value for name, value in given.items() if name.endswith("_token_id")}


def _write_tokenizer(tokenizer: Tokenizer, directory: pathlib.Path) -> None:
    """The tokenizer of a trained run, as published ones are."""
    class_name = {"tokenizer_class": "PreTrainedTokenizerFast"}  # transformers: take tokenizer.json as it is
    settings = tokenizer.special_tokens | {"add_bos_token": tokenizer.add_bos} | class_name
    (directory / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


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
