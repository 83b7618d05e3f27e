"""Hugging Face checkpoints in and out: config.json and safetensors in the published layout."""

import dataclasses
import json
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import DTYPES, ConfigError, ModelConfig
from dsv3_jax.interop.config_json import IGNORED_TENSORS, MODULES, Published, check_modules, read_config, write_config
from dsv3_jax.interop.safetensors_files import (
    DTYPE_NAMES,
    FLOAT8,
    Layout,
    Stored,
    dequantize,
    open_directory,
    plan_shards,
    write_shards,
)
from dsv3_jax.interop.tensors import BIAS, BIASES, Tensor, leaf_shapes

CONFIG = "config.json"
SCALE = "_scale_inv"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 4096  # that are compared at a time
SHARD_BYTES = 5_000_000_000
# What a stored tensor becomes: float16 has too small a range to train in, float8 is dequantized.
KEPT = {
    np.dtype(np.float32): np.dtype(np.float32),
    np.dtype(np.float16): np.dtype(np.float32),
    np.dtype(jnp.bfloat16): np.dtype(jnp.bfloat16),
    FLOAT8: np.dtype(jnp.bfloat16),
}


class Opened(NamedTuple):
    """A checkpoint whose config and headers have been checked, and of which no tensor has been taken yet.

    leaves: path in our tree -> shape and dtype. What no tensor fills (the selection bias of a softmax router) is zero.
    """

    config: ModelConfig
    block: tuple[int, int] | None
    table: list[Tensor]
    stored: dict[str, Stored]
    leaves: dict[str, jax.ShapeDtypeStruct]

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        """A tensor in the published layout; float8 dequantized to `dtype`, others as stored."""
        stored = self.stored[name]
        if stored.dtype != FLOAT8:
            return stored.read()
        assert self.block is not None
        return dequantize(stored.read(), self.stored[name + SCALE].read(), self.block, dtype)


def is_hf_directory(directory: str | pathlib.Path) -> bool:
    """Whether it holds a config.json with a `model_type`; a run's config.json has none."""
    path = pathlib.Path(directory) / CONFIG
    try:
        return "model_type" in json.loads(path.read_text())
    except (OSError, ValueError, TypeError):
        return False


def open_hf(directory: str | pathlib.Path, dtype: str | None = None) -> Opened:
    """Reads config.json and the headers, and checks that they fit each other.

    Raises:
      ConfigError: no checkpoint, an unknown architecture, an unsupported field, a truncated file, a tensor that is
        missing, left over or of another shape, a head that differs from the embeddings it is tied to, or an embedding
        or a head of a multi-token-prediction module that is not the model's.
    """
    directory = pathlib.Path(directory)
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}, or none for the checkpoint's own")
    path = directory / CONFIG
    if not path.is_file():
        raise ConfigError(f"{directory}: no {CONFIG} there; expected the directory of a Hugging Face checkpoint")
    try:
        given = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: not a JSON object")
    published = read_config(given)  # before the headers: a wrong architecture is the first thing to say
    stored = open_directory(directory)
    embedding = stored.get(EMBEDDING)
    if embedding is not None:
        published = read_config(given, KEPT[embedding.dtype].name)
    if not _has_modules(published.config, stored):
        published = published._replace(config=dataclasses.replace(published.config, mtp=None))
    try:
        check_modules(published.config)
        table = published.table()
        _check_tensors(published, table, stored)
    except ConfigError as error:
        raise ConfigError(f"{directory}: {error}") from None
    config = published.config
    if dtype is not None:
        config.compute_dtype = dtype
    loaded = [tensor for tensor in table if not tensor.copy]
    opened = Opened(config, published.block, loaded, stored, _leaves(config, loaded, stored, dtype))
    if config.tie_embeddings and HEAD in stored and not _same(opened, HEAD, EMBEDDING):
        raise ConfigError(
            f"{directory}: tie_word_embeddings is true, but {HEAD} is not {EMBEDDING}; if the head is the model's "
            "own, set tie_word_embeddings to false in config.json, else delete the tensor"
        )
    originals = {tensor.path: tensor.name for tensor in loaded}
    for copy in [tensor for tensor in table if tensor.copy and tensor.name in stored]:
        original = originals[copy.path]
        if not _same(opened, copy.name, original):
            raise ConfigError(
                f"{directory}: {copy.name} is not {original}; a multi-token-prediction module shares the model's "
                f"embedding and head, so delete the tensor, or set {MODULES} to 0 in config.json and delete its layers"
            )
    return opened


def _same(opened: Opened, name: str, original: str) -> bool:
    """Whether two stored matrices hold the same values."""
    count, width = opened.stored[original].shape

    def rows(name: str, begin: int) -> np.ndarray:
        stored = opened.stored[name]
        if stored.dtype == FLOAT8:
            return opened.read(name, np.dtype(np.float32))[begin : begin + ROWS]
        offset = stored.offset + begin * width * stored.dtype.itemsize
        return stored._replace(offset=offset, shape=(min(ROWS, count - begin), width)).read().astype(np.float32)

    return all(np.array_equal(rows(name, begin), rows(original, begin)) for begin in range(0, count, ROWS))


def _has_modules(config: ModelConfig, stored: Collection[str]) -> bool:
    """Announced multi-token-prediction modules may be absent altogether (transformers drops them)."""
    depth = 0 if config.mtp is None else config.mtp.depth
    prefixes = tuple(f"model.layers.{config.num_layers + index}." for index in range(depth))
    return depth > 0 and any(name.startswith(prefixes) for name in stored)


def _check_tensors(published: Published, table: list[Tensor], stored: dict[str, Stored]) -> None:
    expected = {tensor.name: tensor.published_shape for tensor in table}
    if published.config.tie_embeddings and HEAD in stored:
        expected[HEAD] = expected[EMBEDDING]
    for name in [name for name in expected if name in stored and stored[name].dtype == FLOAT8]:
        if published.block is None:
            raise ConfigError(f"tensor {name} is float8, but config.json has no quantization_config to scale it by")
        sizes = zip(expected[name], published.block, strict=True)
        expected[name + SCALE] = tuple(-(-size // block) for size, block in sizes)
    copies = {tensor.name for tensor in table if tensor.copy}
    missing = [name for name in expected if name not in stored and name not in copies]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ConfigError(
            f"tensor {missing[0]} is missing{more}; the download is incomplete, or config.json is of another model"
        )
    for name, tensor in stored.items():
        if name.endswith(IGNORED_TENSORS):
            continue
        if name not in expected:
            kind = published.architecture.model_type
            raise ConfigError(f"tensor {name} is no part of the {kind} model that config.json describes")
        if tensor.shape != expected[name]:
            raise ConfigError(f"tensor {name} has shape {tensor.shape}, config.json asks for {expected[name]}")


def _leaves(
    config: ModelConfig, table: list[Tensor], stored: dict[str, Stored], dtype: str | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """A leaf has the widest dtype of its tensors; the selection bias is always float32."""
    dtypes: dict[str, np.dtype] = {}
    for tensor in table:
        kept = KEPT[stored[tensor.name].dtype] if dtype is None else jnp.dtype(dtype)
        if "selection_bias" in tensor.path:
            kept = np.dtype(np.float32)
        dtypes[tensor.path] = jnp.promote_types(dtypes.get(tensor.path, kept), kept)
    leaves = {path: jax.ShapeDtypeStruct(shape, dtypes[path]) for path, shape in leaf_shapes(table).items()}
    sparse = config.num_layers - config.num_dense_layers
    if sparse and config.moe is not None:
        leaves.setdefault(BIAS, jax.ShapeDtypeStruct((sparse, config.moe.num_experts), jnp.float32))
    return leaves


def copy_tensors(
    opened: Opened, leaves: Mapping[str, np.ndarray], done: Collection[str] = ()
) -> Iterator[tuple[Tensor, int]]:
    """Copies each tensor that is not `done` into its place in `leaves`, in the order of the files.

    Yields the tensor and its size in the file, when it has been copied. Holds one tensor at a time.
    """
    for tensor in sorted(opened.table, key=lambda t: opened.stored[t.name][:2]):
        if tensor.name not in done:
            leaf = leaves[tensor.path]
            leaf[tensor.index] = tensor.to_ours(opened.read(tensor.name, leaf.dtype))
            yield tensor, opened.stored[tensor.name].nbytes


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nested`. Empty branches vanish."""
    leaves = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return leaves


def load_hf(directory: str | pathlib.Path, dtype: str | None = None) -> tuple[ModelConfig, dict[str, Any]]:
    """Model config and variables of a published checkpoint: `Transformer(config).apply(variables, tokens)`.

    Architectures: deepseek_v3, deepseek_v32, deepseek_v2, llama, qwen3_moe, mixtral.

    Weights stay float32 or bfloat16 as stored; float16 becomes float32, float8 with block scales is dequantized to
    bfloat16. `config.compute_dtype` follows config.json, float16 again as float32. Multi-token-prediction modules that
    the checkpoint holds are `config.mtp` and `params/mtp`; the copies of embedding and head that are stored with them
    are compared with the model's and not loaded.

    Args:
      dtype: "float32" or "bfloat16", for the weights and for `compute_dtype`. The selection bias stays float32.

    Raises:
      ConfigError: see `open_hf`. Nothing has been loaded then.
    """
    opened = open_hf(directory, dtype)
    leaves = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in opened.leaves.items()}
    for _ in copy_tensors(opened, leaves):
        pass
    return opened.config, nested(leaves)


class Plan(NamedTuple):
    """A checkpoint to be written: config.json, and what each file will hold."""

    config_json: dict[str, Any]
    table: list[Tensor]
    shards: list[list[Layout]]

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(layout.nbytes for shard in self.shards for layout in shard)


def plan_hf(
    config: ModelConfig, leaves: Mapping[str, Any], max_shard_bytes: int = SHARD_BYTES, by_leaf: bool = False
) -> Plan:
    """Checks that a published architecture can express the model and its leaves.

    Args:
      leaves: path -> array; of all but the selection biases shape and dtype are enough.
      by_leaf: tensors of one leaf follow each other; otherwise those of one layer.

    Raises:
      ConfigError: it cannot; names the field or the leaf.
    """
    config_json, published = write_config(config)
    check_modules(config)
    table = published.table()
    expected = leaf_shapes(table)
    for path in [path for path in leaves if path.startswith(BIASES)]:
        if not np.all(np.isfinite(np.asarray(leaves[path]))):
            raise ConfigError(
                f"{path}: some experts are inactive (−inf), and published routers have no such thing;"
                " train.growth=expansion makes all of them active if training goes on, added_expert those of one layer"
                " alone: then only the run itself can be used"
            )
    if BIAS in leaves and BIAS not in expected:
        if np.any(np.asarray(leaves[BIAS])):
            raise ConfigError(f"{BIAS}: a {config_json['model_type']} has no selection bias, and this one is not zero")
        expected[BIAS] = leaves[BIAS].shape
    for path in sorted(expected.keys() | leaves.keys()):
        given = leaves[path].shape if path in leaves else None
        if given != expected.get(path):
            raise ConfigError(f"variables: {path} has shape {given}, this config's model has {expected.get(path)}")
        if np.dtype(leaves[path].dtype) not in DTYPE_NAMES:
            raise ConfigError(f"variables: {path} is {leaves[path].dtype}; cast it to float32 or bfloat16")
    if by_leaf:
        table.sort(key=lambda tensor: tensor.path)
    layouts = [Layout(t.name, np.dtype(leaves[t.path].dtype), t.published_shape) for t in table]
    return Plan(config_json, table, plan_shards(layouts, max_shard_bytes))


def check_target(directory: str | pathlib.Path) -> pathlib.Path:
    """A folder to write a checkpoint into. Raises `ConfigError` if there is one already."""
    directory = pathlib.Path(directory)
    if (directory / CONFIG).exists() or any(directory.glob("*.safetensors")):
        raise ConfigError(f"{directory}: holds a checkpoint already; give a new directory")
    return directory


def write_hf(directory: pathlib.Path, plan: Plan, values: Iterator[np.ndarray]) -> None:
    """Writes the files of a plan; `values` are its tensors, in order. config.json comes last."""
    directory.mkdir(parents=True, exist_ok=True)
    write_shards(directory, plan.shards, values)
    (directory / CONFIG).write_text(json.dumps(plan.config_json, indent=2) + "\n")


def save_hf(
    directory: str | pathlib.Path,
    config: ModelConfig,
    variables: Mapping[str, Any],
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model as a published checkpoint that transformers opens, in the dtypes of its leaves.

    The architecture is found from the config. The inverse of `load_hf`: multi-token-prediction modules are written with
    copies of embedding and head.

    Raises:
      ConfigError: no published architecture expresses the model (names the field), or the folder holds a checkpoint.
    """
    directory, leaves = check_target(directory), flat(variables)
    plan = plan_hf(config, leaves, max_shard_bytes)
    arrays = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    write_hf(directory, plan, (t.to_published(arrays[t.path][t.index]) for t in plan.table))
