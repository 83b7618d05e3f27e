"""config.json <-> `ModelConfig`. Every field is understood, known not to matter, or refused."""

import copy
from typing import Any, NamedTuple

from dsv3_jax.config import (
    ConfigError,
    Full,
    ModelConfig,
    MultiToken,
    Windowed,
    flatten,
    validate_model,
)
from dsv3_jax.interop.architectures import ARCHITECTURES, WINDOW, Architecture, Json, refused
from dsv3_jax.interop.rope_json import read_rope, write_rope
from dsv3_jax.interop.tensors import Tensor, tensor_table


class Published(NamedTuple):
    """What config.json says. `block`: of float8 scales."""

    architecture: Architecture
    config: ModelConfig
    neighbours: bool
    block: tuple[int, int] | None

    def table(self) -> list[Tensor]:
        """The tensors of its checkpoint."""
        a = self.architecture
        return tensor_table(self.config, a.experts, a.has_bias, self.neighbours)


# Fields that say nothing about what a forward pass computes, or that repeat another field.
IGNORED = frozenset(
    {
        *("_name_or_path", "architectures", "auto_map", "transformers_version", "transformers.js_config"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "is_llama_config"),
        *("use_cache", "initializer_range", "pretraining_tp", "ep_size", "torchscript", "return_dict"),
        *("attention_dropout", "router_jitter_noise", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux"),
        *("output_router_logits", "output_attentions", "output_hidden_states", "qk_head_dim"),
        *("_attn_implementation", "_attn_implementation_autoset"),
    }
)
# Checkpoints may hold these; they are computed from config.json.
IGNORED_TENSORS = ("rotary_emb.inv_freq",)
# Training, speed and memory: a published file has no word for them.
FREE = (
    "init_std",
    "remat",
    "unroll",
    "attention.implementation",
    "attention.pattern.loss_weight",
    "moe.dispatch",
    "moe.router.bias_update_rate",
    "moe.router.balance_weight",
    "moe.router.z_weight",
    "moe.router_noise",
    "moe.expert_dropout",
    "mtp.weight",
    "mtp.late_weight",
    "mtp.late_step",
)
MODULES = "num_nextn_predict_layers"  # of multi-token prediction
# What tells the architectures apart.
PATTERN = "attention.pattern.kind"
KINDS = ("attention.projection.kind", PATTERN, "moe.router.kind", "attention.projection.qk_norm")
COMPUTE = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}


def _parent(config: ModelConfig, path: str) -> tuple[Any, str]:
    node: Any = config
    *parents, last = path.split(".")
    for name in parents:
        node = getattr(node, name)
    return node, last


def _fill(architecture: Architecture, left: Json) -> ModelConfig:
    """The template with the fields of `left`, which are taken out of it."""
    config = copy.deepcopy(architecture.template)
    left_or_default = architecture.defaults | left
    for name, path in architecture.fields.items():
        if name not in left_or_default:
            raise ConfigError(f"config.json: has no field {name}, which a {architecture.model_type} model needs")
        value = left_or_default[name]
        left.pop(name, None)
        if path == WINDOW["sliding_window"]:
            config.attention.pattern = Full() if value is None else Windowed(window=value)
            continue
        node, last = _parent(config, path)
        setattr(node, last, float(value) if isinstance(getattr(node, last), float) and type(value) is int else value)
    if architecture.template.moe is None:
        config.num_dense_layers = config.num_layers
    return config


def _read_quantization(left: Json) -> tuple[int, int] | None:
    """The block of float8 scales. How activations are rounded does not concern the weights and is not imitated."""
    given = left.pop("quantization_config", None)
    if given is None:
        return None
    known = given if isinstance(given, dict) else {}
    block: Any = known.get("weight_block_size")
    well_formed = isinstance(block, list) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)
    if known.get("quant_method") != "fp8" or known.get("fmt", "e4m3") != "e4m3" or not well_formed:
        raise refused(
            "quantization_config", given, "we read quant_method=fp8, fmt=e4m3 with a weight_block_size of two"
        )
    return block[0], block[1]


def _check_numbers(architecture: Architecture, left: Json) -> None:
    """Fields that are counted or calculated with before the model as a whole is checked."""
    for name, value in left.items():
        path = architecture.fields.get(name)
        if path is None and name != MODULES:
            continue
        if not isinstance(value, int | float):
            raise refused(name, value, "must be a number, true or false")
        counts = path is None or type(flatten(architecture.template).get(path)) is int
        if counts and (type(value) is not int or value < 0):
            raise refused(name, value, "must be of type int, 0 or more")


def read_config(given: Json, stored_dtype: str = "float32") -> Published:
    """What a config.json says. Every field is understood, known not to matter, or refused.

    Args:
      stored_dtype: of the weights, for files that name no dtype. float16 is computed in float32: we have no loss
        scaling, and float16's range is too small for some published activations.

    Raises:
      ConfigError: an architecture we lack, a field that is missing or unknown, or a value we do not support.
    """
    name = given.get("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ConfigError(f"config.json: model_type={name!r}: we have {', '.join(sorted(ARCHITECTURES))}")
    architecture = ARCHITECTURES[name]
    left = {k: v for k, v in given.items() if v is not None and k not in IGNORED and k != "model_type"}
    _check_numbers(architecture, left)
    dtypes = [left.pop(k) for k in ("dtype", "torch_dtype") if k in left] or [stored_dtype]
    if not isinstance(dtypes[0], str) or dtypes[0] not in COMPUTE:
        raise refused("dtype", dtypes[0], f"must be one of {', '.join(COMPUTE)}")
    block = _read_quantization(left)
    theta, scaling, left = read_rope(left, architecture.default_theta, architecture.scales_softmax)
    neighbours = architecture.neighbours and left.pop("rope_interleave", True)
    modules = left.pop(MODULES, 0) if architecture.has_prediction else 0
    left = architecture.read(left)
    config = _fill(architecture, left)
    config.compute_dtype = COMPUTE[dtypes[0]]
    config.attention.rope_theta, config.attention.rope_scaling = theta, scaling
    config.mtp = MultiToken(depth=modules) if modules else None
    for field_name, harmless in architecture.fixed.items():
        value = left.pop(field_name, harmless[0])
        if value not in harmless:
            raise refused(field_name, value, f"we support {' or '.join(map(repr, harmless))}")
    for field_name, value in left.items():
        raise refused(field_name, value, f"not a field of {name} that we know; its effect would be ignored")
    validate_model(config)
    return Published(architecture, config, neighbours, block)


def check_modules(config: ModelConfig) -> None:
    """Raises `ConfigError` for multi-token-prediction modules of a model whose layers are all dense."""
    if config.mtp is not None and config.num_dense_layers == config.num_layers:
        raise refused(MODULES, config.mtp.depth, "its layers have experts, and here no other layer has any; must be 0")


def _write(architecture: Architecture, config: ModelConfig) -> Json:
    fields: Json = {}
    for name, path in architecture.fields.items():
        node, last = _parent(config, path)
        fields[name] = getattr(node, last, None)
    if fields["max_position_embeddings"] is None:
        del fields["max_position_embeddings"]
    modules = {MODULES: 0 if config.mtp is None else config.mtp.depth} if architecture.has_prediction else {}
    return (
        {"model_type": architecture.model_type, "architectures": [architecture.class_name]}
        | architecture.write(fields)
        | write_rope(config.attention, architecture.scales_softmax)
        | {name: values[0] for name, values in architecture.fixed.items()}
        | modules
        | {"dtype": config.compute_dtype}
    )


def _flat(config: ModelConfig) -> Json:
    """What a published file must say of a model."""
    unused = ("dense_dim",) if config.num_dense_layers == 0 else ()
    return {k: v for k, v in flatten(config).items() if not k.startswith(FREE + unused)}


def write_config(config: ModelConfig) -> tuple[Json, Published]:
    """The config.json of a model, and what reading it gives.

    The architecture is the one whose template has the model's mechanisms; the file is accepted if reading it gives the
    model back, but for what only training, speed and memory know.

    Raises:
      ConfigError: no published architecture can express the model; names the field.
    """
    flat = _flat(config)

    def distance(architecture: Architecture) -> int:
        theirs = flatten(architecture.template)
        return sum(flat.get(kind) != theirs.get(kind) for kind in KINDS)

    architecture = min(ARCHITECTURES.values(), key=distance)
    template = flatten(architecture.template)
    for kind in KINDS:
        sliding = kind == PATTERN and flat[kind] == Windowed.kind and "sliding_window" in architecture.fields
        if flat.get(kind) != template.get(kind) and not sliding:
            raise _cannot(kind, flat.get(kind), architecture, template.get(kind))
    written = _write(architecture, config)
    published = read_config(written)
    back = _flat(published.config)
    for path in sorted(flat.keys() | back.keys()):
        if flat.get(path) != back.get(path):
            raise _cannot(path, flat.get(path), architecture, back.get(path))
    return written, published


def _cannot(path: str, given: Any, architecture: Architecture, expected: Any) -> ConfigError:
    return ConfigError(
        f"config.model.{path}={given!r}: the nearest published architecture, {architecture.model_type}, has "
        f"{expected!r}; none of {', '.join(sorted(ARCHITECTURES))} expresses this model"
    )
