"""The published architectures. One is a value: a template that says which mechanisms it has, and the names of what may
vary."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dsv3_jax.config import (
    Attention,
    ConfigError,
    GroupedQuery,
    GroupedSigmoid,
    Latent,
    MixtureOfExperts,
    ModelConfig,
    Softmax,
    Sparse,
)
from dsv3_jax.interop.tensors import ExpertNames

Json = dict[str, Any]


def _same(left: Json) -> Json:
    return left


@dataclass(frozen=True)
class Architecture:
    """One `model_type`.

    Attributes:
      template: the mechanisms; `fields` says what of it varies.
      fields: name in config.json -> dotted path in `ModelConfig`.
      defaults: of fields that some published files leave out.
      fixed: name -> values under which it changes nothing; the first is written. Any other value is refused.
      read, write: what is not a plain field: `read` takes the file's fields to those of `fields` and `fixed` (an error
        if it cannot), `write` takes those of `fields` to the file's.
      has_bias: the selection bias is stored.
      neighbours: rotated features are stored as neighbouring pairs, unless `rope_interleave` is false.
      scales_softmax: YaRN scales the softmax too.
      has_prediction: multi-token-prediction layers may follow.
    """

    model_type: str
    class_name: str
    template: ModelConfig
    fields: dict[str, str]
    defaults: Json = field(default_factory=dict)
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    read: Callable[[Json], Json] = _same
    write: Callable[[Json], Json] = _same
    experts: ExpertNames | None = None
    default_theta: float = 10_000.0
    has_bias: bool = False
    neighbours: bool = False
    scales_softmax: bool = False
    has_prediction: bool = False


COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tie_embeddings",
    "max_position_embeddings": "context_length",
}
DENSE = {"intermediate_size": "dense_dim"}
GROUPED = {
    "num_attention_heads": "attention.projection.num_heads",
    "num_key_value_heads": "attention.projection.num_kv_heads",
    "head_dim": "attention.projection.head_dim",
}
LATENT = {
    "num_attention_heads": "attention.projection.num_heads",
    "q_lora_rank": "attention.projection.query_latent_dim",
    "kv_lora_rank": "attention.projection.latent_dim",
    "qk_nope_head_dim": "attention.projection.nope_head_dim",
    "qk_rope_head_dim": "attention.projection.rope_head_dim",
    "v_head_dim": "attention.projection.value_head_dim",
}
DEEPSEEK_EXPERTS = {
    "first_k_dense_replace": "num_dense_layers",
    "n_routed_experts": "moe.num_experts",
    "n_shared_experts": "moe.num_shared_experts",
    "moe_intermediate_size": "moe.expert_dim",
    "num_experts_per_tok": "moe.router.top_k",
    "n_group": "moe.router.num_groups",
    "topk_group": "moe.router.top_groups",
    "routed_scaling_factor": "moe.router.route_scale",
}
NORMALIZE = {"norm_topk_prob": "moe.router.normalize_weights"}
INDEXER = {
    "index_topk": "attention.pattern.top_k",
    "index_n_heads": "attention.pattern.index_heads",
    "index_head_dim": "attention.pattern.index_dim",
}
QWEN_EXPERTS = {
    "num_dense_layers": "num_dense_layers",
    "num_experts": "moe.num_experts",
    "moe_intermediate_size": "moe.expert_dim",
    "num_experts_per_tok": "moe.router.top_k",
}
MIXTRAL_EXPERTS = {
    "num_local_experts": "moe.num_experts",
    "intermediate_size": "moe.expert_dim",
    "num_experts_per_tok": "moe.router.top_k",
}
WINDOW = {"sliding_window": "attention.pattern.window"}
FIXED = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}
FIXED_LATENT = FIXED | {"moe_layer_freq": (1,)}
COMMON_DEFAULTS = {"tie_word_embeddings": False, "max_position_embeddings": None}


def _rename(left: Json, old: str, new: str) -> Json:
    """An older or newer name of a field."""
    return {new if name == old and new not in left else name: value for name, value in left.items()}


def refused(name: str, value: Any, expected: str) -> ConfigError:
    """The error for a field of config.json."""
    return ConfigError(f"config.json: {name}={value!r}: {expected}")


def _read_grouped(left: Json) -> Json:
    """Heads that older files leave out."""
    left = dict(left)
    left.setdefault("num_key_value_heads", left.get("num_attention_heads"))
    if "head_dim" not in left and {"hidden_size", "num_attention_heads"} <= left.keys():
        left["head_dim"] = left["hidden_size"] // max(left["num_attention_heads"], 1)
    return left


def _read_layer_kinds(left: Json, dense: int, layers: int) -> None:
    """Takes out what repeats other fields. The indexer's fields say whether attention is sparse: releases differ on the
    name of its layers."""
    expected = ["dense"] * dense + ["sparse"] * (layers - dense)
    given = left.pop("mlp_layer_types", expected)
    if given != expected:
        raise refused("mlp_layer_types", given, f"must be {expected}")
    kinds = ["full_attention", *(["indexed_attention", "deepseek_sparse_attention"] if "index_topk" in left else [])]
    given = left.pop("layer_types", kinds[:1] * layers)
    if not isinstance(given, list) or len(given) != layers or any(kind not in kinds for kind in given):
        raise refused("layer_types", given, f"must be {layers} times {' or '.join(kinds)}")


def _read_latent(left: Json) -> Json:
    """Latent attention has as many key heads as query heads; `head_dim` repeats `qk_rope_head_dim`."""
    left = _rename(dict(left), "num_local_experts", "n_routed_experts")
    left.pop("head_dim", None)
    heads = left.get("num_attention_heads")
    given = left.pop("num_key_value_heads", heads)
    if given != heads:
        raise refused("num_key_value_heads", given, f"must be num_attention_heads={heads} with latent attention")
    dense, layers = left.get("first_k_dense_replace", 0), left.get("num_hidden_layers", 0)
    _read_layer_kinds(left, dense, layers)
    if dense > layers:
        left["first_k_dense_replace"] = layers
    return left


def _write_latent(fields: Json) -> Json:
    return fields | {"num_key_value_heads": fields["num_attention_heads"]}


def _read_v2(left: Json) -> Json:
    """topk_method="greedy" has no groups, whatever their fields say."""
    left = _read_latent(left)
    method = left.pop("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise refused("topk_method", method, "must be greedy or group_limited_greedy")
    return left | ({"n_group": 1, "topk_group": 1} if method == "greedy" else {})


def _write_v2(fields: Json) -> Json:
    return _write_latent(fields) | {"topk_method": "group_limited_greedy" if fields["n_group"] > 1 else "greedy"}


def _read_window(left: Json) -> Json:
    """A sliding window counts unless `use_sliding_window` is false."""
    left = _read_grouped(left)
    if not left.pop("use_sliding_window", True):
        left.pop("sliding_window", None)
    if "sliding_window" not in left:
        left.pop("max_window_layers", None)
    return left


def _read_qwen(left: Json) -> Json:
    """The dense layers must come first. A sliding window counts only if `use_sliding_window` is true."""
    on = left.get("use_sliding_window", False)
    if on and "sliding_window" not in left:
        raise refused("use_sliding_window", on, "needs sliding_window, the width")
    left = _rename(_read_window(left | {"use_sliding_window": on}), "num_local_experts", "num_experts")
    dense = left.pop("mlp_only_layers", [])
    if not isinstance(dense, list) or set(map(str, dense)) != set(map(str, range(len(dense)))):
        raise refused("mlp_only_layers", dense, "must be the first layers: dense layers precede the others here")
    return left | {"num_dense_layers": len(dense)}


def _write_qwen(fields: Json) -> Json:
    dense = {"mlp_only_layers": list(range(fields.pop("num_dense_layers")))}
    return fields | dense | {"use_sliding_window": fields.get("sliding_window") is not None}


def _latent(router: GroupedSigmoid | Softmax, **attention: Any) -> ModelConfig:
    return ModelConfig(attention=Attention(Latent(), **attention), moe=MixtureOfExperts(router=router))


def _grouped(moe: MixtureOfExperts | None, qk_norm: bool = False) -> ModelConfig:
    return ModelConfig(attention=Attention(GroupedQuery(qk_norm=qk_norm)), moe=moe, num_dense_layers=0)


_PLAIN = MixtureOfExperts(num_shared_experts=0, router=Softmax())
_V3 = {
    "fields": COMMON | DENSE | LATENT | DEEPSEEK_EXPERTS | NORMALIZE,
    "defaults": COMMON_DEFAULTS | {"q_lora_rank": None, "n_shared_experts": 0},
    "fixed": FIXED_LATENT | {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    "read": _read_latent,
    "write": _write_latent,
    "experts": ExpertNames(),
    "has_bias": True,
    "neighbours": True,
    "scales_softmax": True,
    "has_prediction": True,
}
DEEPSEEK_V3 = Architecture("deepseek_v3", "DeepseekV3ForCausalLM", _latent(GroupedSigmoid()), **_V3)
DEEPSEEK_V32 = Architecture(
    "deepseek_v32",
    "DeepseekV32ForCausalLM",
    _latent(GroupedSigmoid(), pattern=Sparse()),
    **_V3 | {"fields": _V3["fields"] | INDEXER, "defaults": COMMON_DEFAULTS | {"n_shared_experts": 0}},
)
DEEPSEEK_V2 = Architecture(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    _latent(Softmax(normalize_weights=False)),
    COMMON | DENSE | LATENT | DEEPSEEK_EXPERTS,
    defaults=COMMON_DEFAULTS | {"q_lora_rank": None, "n_shared_experts": 0, "n_group": 1, "topk_group": 1},
    # Implementations differ on norm_topk_prob=true.
    fixed=FIXED_LATENT | {"scoring_func": ("softmax",), "norm_topk_prob": (False,)},
    read=_read_v2,
    write=_write_v2,
    experts=ExpertNames(),
    neighbours=True,
    scales_softmax=True,
)
QWEN3_MOE = Architecture(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _grouped(_PLAIN, qk_norm=True),
    COMMON | DENSE | GROUPED | QWEN_EXPERTS | NORMALIZE | WINDOW,
    defaults=COMMON_DEFAULTS | {"sliding_window": None},
    fixed=FIXED | {"decoder_sparse_step": (1,)},
    read=_read_qwen,
    write=_write_qwen,
    experts=ExpertNames(),
)
MIXTRAL = Architecture(
    "mixtral",
    "MixtralForCausalLM",
    _grouped(_PLAIN),
    COMMON | GROUPED | MIXTRAL_EXPERTS | WINDOW,
    defaults=COMMON_DEFAULTS | {"sliding_window": None},
    fixed=FIXED,
    read=_read_window,
    experts=ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
    default_theta=1e6,
)
LLAMA = Architecture(
    "llama",
    "LlamaForCausalLM",
    _grouped(None),
    COMMON | DENSE | GROUPED,
    defaults=COMMON_DEFAULTS,
    fixed=FIXED | {"rope_interleaved": (False,)},
    read=_read_grouped,
)
ARCHITECTURES = {a.model_type: a for a in (DEEPSEEK_V3, DEEPSEEK_V32, DEEPSEEK_V2, LLAMA, QWEN3_MOE, MIXTRAL)}
