"""The weights of another model, from which a new run starts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax.config import ConfigError, ModelConfig, flatten
from dsv3_jax.data import packages
from dsv3_jax.interop.config_json import FREE as UNSEEN
from dsv3_jax.interop.gguf import load_gguf
from dsv3_jax.interop.huggingface import copy_tensors, flat, is_hf_directory, nested, open_hf
from dsv3_jax.interop.weight_folder import has_weights, open_weights
from dsv3_jax.training.checkpoints import open_checkpoints, place, run_config

# What a run may change of the model it starts from; it is told what it does. Any other field, but for those that only
# training, speed and memory know, would make other sense of the weights.
CHANGES = (
    "attention.pattern",
    "attention.rope_theta",
    "attention.rope_scaling",
    "attention.softcap",
    "compute_dtype",
    "context_length",
)
# Parts of the tree that start fresh where the source has none: of a pattern, and multi-token prediction.
FRESH_PARTS = ("indexer", "gate", "mtp")
Abstract = dict[str, jax.ShapeDtypeStruct]


class Source(NamedTuple):
    """Weights that have been checked but not read.

    Attributes:
      name: as messages call it.
      model: its config.
      leaves: path -> shape and dtype.
      load: reads the leaves it is given, on their shardings.
      notes: what to say of it when a run starts.
      fresh: words of the paths of leaves that it lacks and that start fresh.
    """

    name: str
    model: ModelConfig
    leaves: Abstract
    load: Callable[[Abstract], Any]
    notes: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()


def open_source(init_from: str) -> Source:
    """A run with a checkpoint, converted weights, a Hugging Face directory, or a GGUF file, which is read at once.

    Raises:
      ConfigError: none of these is there, or it cannot be read.
    """
    if packages.is_gguf(init_from):
        model, variables = load_gguf(packages.gguf_path(init_from))
        arrays = flat(variables)
        leaves = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in arrays.items()}
        return Source(init_from, model, leaves, lambda wanted: place(arrays, nested(wanted)))
    if is_hf_directory(init_from):
        opened = open_hf(init_from)

        def load(wanted: Abstract) -> Any:
            arrays = {path: np.zeros(x.shape, opened.leaves[path].dtype) for path, x in wanted.items()}
            others = {tensor.name for tensor in opened.table if tensor.path not in wanted}
            for _ in copy_tensors(opened, arrays, others):
                pass
            return place(arrays, nested(wanted))

        return Source(init_from, opened.config, opened.leaves, load)
    model = run_config(init_from).model
    if has_weights(init_from):
        folder = open_weights(init_from)
        return Source(init_from, model, folder.leaves, lambda wanted: place(folder.open("r"), nested(wanted)))
    checkpoints = open_checkpoints(init_from)
    name, leaves = f"step {checkpoints.latest_step()} of {init_from}", checkpoints.leaves()
    checkpoints.close()

    def restore(wanted: Abstract) -> Any:
        checkpoints = open_checkpoints(init_from)
        variables = checkpoints.restore_part(nested(wanted))
        checkpoints.close()
        return variables

    return Source(name, model, leaves, restore)


def check_fit(source: Source, model: ModelConfig, wanted: Abstract) -> Source:
    """The source, with a note of each of `CHANGES`.

    Raises:
      ConfigError: its weights do not fit: another model, but for `CHANGES`, or other shapes.
    """
    unseen = (*UNSEEN, "dense_dim") if model.num_dense_layers == 0 else UNSEEN
    theirs, ours = flatten(source.model), flatten(model)
    notes = []
    for field in sorted(theirs.keys() | ours.keys()):
        if theirs.get(field) == ours.get(field) or field.startswith(unseen):
            continue
        if field.startswith("mtp") and (source.model.mtp is None or model.mtp is None):
            continue
        if not field.startswith(CHANGES):
            raise ConfigError(
                f"--init_from={source.name}: its config.model.{field} is {theirs.get(field)!r}, this run's "
                f"{ours.get(field)!r}; the weights do not fit"
            )
        notes.append(f"config.model.{field} was {theirs.get(field)!r}, is {ours.get(field)!r}")
    for path, leaf in wanted.items():
        there = source.leaves.get(path)
        if there is None and not {*FRESH_PARTS, *source.fresh} & set(path.split("/")):
            raise ConfigError(f"--init_from={source.name}: has no {path}")
        if there is not None and tuple(there.shape) != leaf.shape:
            raise ConfigError(f"--init_from={source.name}: {path} has shape {tuple(there.shape)}, not {leaf.shape}")
    return source._replace(notes=(*source.notes, *notes))


def take(source: Source, fresh: dict[str, Any], abstract: dict[str, Any]) -> dict[str, Any]:
    """The source's weights, in the dtypes and shardings of `abstract`; those it lacks are the `fresh` ones.

    Says in one line what starts fresh, what of the source is left out, and its notes.
    """
    wanted = flat(abstract)
    known = {path: leaf for path, leaf in wanted.items() if path in source.leaves}
    taken = flat(source.load(known))
    notes = [f"{what} start fresh" for what in _parts(wanted.keys() - known.keys())]
    notes += [f"its {what} are left out" for what in _parts(source.leaves.keys() - wanted.keys())]
    print("; ".join([f"starting from {source.name}", *notes, *source.notes]), flush=True)
    merged = nested(flat(fresh) | taken)
    return {name: merged.get(name, {}) for name in abstract}


def _parts(paths: set[str]) -> list[str]:
    """What a reader calls these leaves."""
    names = {"mtp": "multi-token-prediction layers", "indexer": "indexers", "gate": "gates of learned global keys"}
    names |= {"w_router": "routers", "selection_bias": "selection biases"}
    found = {next((name for part, name in names.items() if part in path.split("/")), path) for path in paths}
    return sorted(found)
