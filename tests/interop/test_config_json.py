"""config.json <-> ModelConfig: published files, every way to say RoPE, and what is refused."""

import dataclasses
import math
import re

import pytest

from dsv3_jax import config as c
from dsv3_jax.interop.config_json import read_config, write_config
from dsv3_jax.interop.tensors import leaf_shapes
from dsv3_jax.planning.flops import count_parameters
from tests.conftest import ROOT
from tests.interop.tiny import models

pytestmark = pytest.mark.quick

# Fields of published files, as their publishers wrote them.
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 100,
}
QWEN = LLAMA | {
    **{"model_type": "qwen3_moe", "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 16, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
}


def test_the_published_v3():
    published = read_config(DEEPSEEK_V3)
    config = c.load(str(ROOT / "configs" / "dsv3_671b.py")).model
    free = {"init_std": config.init_std, "remat": config.remat, "mtp": config.mtp}  # of training
    yarn = c.Yarn(40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    attention = dataclasses.replace(config.attention, rope_scaling=yarn)
    expected = dataclasses.replace(config, attention=attention, context_length=163840)
    assert dataclasses.replace(published.config, **free) == expected
    assert published.block == (128, 128) and published.config.mtp == c.MultiToken(1)
    shapes = leaf_shapes(published.table())
    assert sum(math.prod(v) for k, v in shapes.items() if k.startswith("params")) == count_parameters(config).total
    main = {k: v for k, v in shapes.items() if k.startswith("params") and "mtp" not in k.split("/")}
    assert sum(map(math.prod, main.values())) == 671_026_404_352
    # The multi-token-prediction module: one more MoE layer, eh_proj and three norms.
    per_layer = sum(math.prod(v) for k, v in main.items() if k.startswith("params/moe_layers")) // 58
    module = per_layer + 2 * 7168**2 + 3 * 7168
    assert count_parameters(config).total == 671_026_404_352 + module
    assert module == 11_610_067_968


def test_the_published_v3_has_as_many_values_as_its_files_by_dtype():
    """The numbers that the model's page gives (`safetensors.parameters`): 685B with a second copy of embedding and
    head, and the scales of float8 blocks."""
    counts = {"F8_E4M3": 0, "BF16": 0, "F32": 0}
    for tensor in read_config(DEEPSEEK_V3).table():
        shape, name = tensor.published_shape, tensor.name
        if name.endswith("e_score_correction_bias"):
            counts["F32"] += math.prod(shape)
        elif any(part in name for part in ("embed_tokens", "head.", "norm", "gate.weight", "eh_proj")):
            counts["BF16"] += math.prod(shape)
        else:
            counts["F8_E4M3"] += math.prod(shape)
            counts["F32"] += math.prod(-(-size // 128) for size in shape)
    assert counts == {"F8_E4M3": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_555_600}
    assert sum(counts.values()) == 684_531_386_000


def test_the_published_mixtral():
    config = read_config(MIXTRAL).config
    assert config.moe == c.MixtureOfExperts(8, 14336, 0, c.Softmax(top_k=2))
    assert config.attention == c.Attention(c.GroupedQuery(32, 8, 128), c.Full(), rope_theta=1e6)
    assert (config.num_dense_layers, config.compute_dtype, config.norm_epsilon) == (0, "bfloat16", 1e-5)
    assert read_config({k: v for k, v in MIXTRAL.items() if k != "rope_theta"}).config.attention.rope_theta == 1e6


def test_old_llama_files_leave_out_heads():
    projection = read_config(LLAMA).config.attention.projection
    assert projection == c.GroupedQuery(num_heads=4, num_kv_heads=4, head_dim=16)
    assert read_config(LLAMA).config.attention.rope_theta == 1e4
    assert read_config(LLAMA, "bfloat16").config.compute_dtype == "bfloat16"
    assert read_config(LLAMA | {"torch_dtype": "float16"}, "bfloat16").config.compute_dtype == "float32"


def scaling(given: dict, kind: dict = LLAMA) -> c.RopeScaling | None:
    old = read_config(kind | {"rope_theta": 5e5, "rope_scaling": given}).config.attention
    new = read_config(kind | {"rope_parameters": {"rope_theta": 5e5} | given}).config.attention
    assert old == new and old.rope_theta == 5e5
    return old.rope_scaling


def test_rope_scaling_in_the_old_form_and_the_new():
    assert scaling({"type": "default"}) is None
    assert scaling({"rope_type": "linear", "factor": 2}) == c.LinearScaling(2.0)
    llama3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
    assert scaling({"rope_type": "llama3"} | llama3) == c.Llama3Scaling(8.0, 8192, 1.0, 4.0)
    yarn = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32}
    assert scaling(yarn) == c.Yarn(4.0, 32, 32.0, 1.0, 1.0, 0.0)
    assert scaling(yarn | {"mscale": 1, "mscale_all_dim": 1}) == c.Yarn(4.0, 32, 32.0, 1.0, 0.0, 0.0)
    assert scaling(yarn | {"attention_factor": 1.0}) == c.Yarn(4.0, 32, 32.0, 1.0, 0.0, 0.0)
    v3 = {k: v for k, v in DEEPSEEK_V3.items() if not k.startswith("rope")}
    assert scaling(yarn, v3) == c.Yarn(4.0, 32, 32.0, 1.0, 1.0, 0.0)
    assert scaling(yarn | {"mscale": 0.7, "mscale_all_dim": 0.7}, v3) == c.Yarn(4.0, 32, 32.0, 1.0, 0.7, 0.7)


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize(
    "rope",
    [
        c.LinearScaling(3.0),
        c.Llama3Scaling(4.0, 16, 1.5, 3.0),
        c.Yarn(4.0, 16, 8.0, 2.0, 1.0, 0.0),
        c.Yarn(4.0, 16, 8.0, 2.0, 0.3, 0.0),
    ],
)
def test_what_is_written_is_read_back(name, rope):
    config = models()[name]
    config.attention.rope_scaling, config.attention.rope_theta = rope, 2e4
    assert read_config(write_config(config)[0]).config.attention == config.attention


def test_softmax_scales_are_latent_attentions_own():
    config = models()["deepseek_v3"]
    config.attention.rope_scaling = c.Yarn(4.0, 16, 8.0, 2.0, 0.5, 0.8)
    assert read_config(write_config(config)[0]).config.attention == config.attention
    config = models()["llama"]
    config.attention.rope_scaling = c.Yarn(4.0, 16, 8.0, 2.0, 0.5, 0.8)
    with pytest.raises(c.ConfigError, match="config.model.attention.rope_scaling.mscale"):
        write_config(config)


def test_windows_count_only_where_they_are_on():
    assert read_config(MIXTRAL | {"sliding_window": 4096}).config.attention.pattern == c.Windowed(4096)
    off = QWEN | {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1}
    assert read_config(off).config.attention.pattern == c.Full()
    assert read_config({k: v for k, v in off.items() if k != "use_sliding_window"}).config.attention.pattern == c.Full()
    on = QWEN | {"use_sliding_window": True, "sliding_window": 64}
    assert read_config(on).config.attention.pattern == c.Windowed(64)


def test_layers_without_experts_come_first():
    assert read_config(QWEN | {"mlp_only_layers": [0]}).config.num_dense_layers == 1
    v32 = write_config(models()["deepseek_v32"])[0]
    assert read_config(v32 | {"mlp_layer_types": ["dense", "dense", "sparse"]}).config.num_dense_layers == 2


@pytest.mark.parametrize("modules", [0, 1])
@pytest.mark.parametrize("dense", [2, 3, 5])
def test_a_cut_file_may_have_more_dense_layers_than_layers(dense, modules):
    """Whether announced modules, which would have experts, are there is seen when the tensors are."""
    given = DEEPSEEK_V3 | {"num_hidden_layers": 2, "first_k_dense_replace": dense, "num_nextn_predict_layers": modules}
    config = read_config(given).config
    assert (config.num_layers, config.num_dense_layers) == (2, 2) and config.moe is not None
    assert config.mtp == (c.MultiToken(1) if modules else None)
    assert read_config(write_config(config)[0]).config == config


# File -> fields of a wrong type, and how the error names them.
WRONG_TYPES = [
    (LLAMA, {"quantization_config": "fp8"}, "quantization_config='fp8': we read"),
    (LLAMA, {"rope_scaling": [1]}, r"rope_scaling=\[1\]: must be an object"),
    (LLAMA, {"rope_parameters": "x"}, "rope_parameters='x': must be an object"),
    (LLAMA, {"rope_parameters": {"rope_type": ["yarn"]}}, "rope type .*yarn.*: must be default"),
    (LLAMA, {"rope_theta": "big"}, "rope_theta='big': must be a number"),
    (LLAMA, {"original_max_position_embeddings": [1]}, r"original_max_position_embeddings=\[1\]: must be a number"),
    (LLAMA, {"model_type": ["llama"]}, r"model_type=\['llama'\]: we have"),
    (LLAMA, {"dtype": ["float32"]}, r"dtype=\['float32'\]: must be one of"),
    (LLAMA, {"num_attention_heads": 0}, "num_heads"),
    (LLAMA, {"num_hidden_layers": 2.5}, "num_hidden_layers=2.5: must be of type int"),
    (DEEPSEEK_V3, {"num_nextn_predict_layers": 1.5}, "num_nextn_predict_layers=1.5: must be of type int"),
    (DEEPSEEK_V3, {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1: must be of type int, 0 or more"),
    (DEEPSEEK_V3, {"first_k_dense_replace": 1.5}, "first_k_dense_replace=1.5: must be of type int"),
    (DEEPSEEK_V3, {"num_key_value_heads": 8}, "num_key_value_heads=8: must be num_attention_heads=128"),
    (QWEN, {"mlp_only_layers": ["a", 0]}, r"mlp_only_layers=\['a', 0\]"),
]


@pytest.mark.parametrize(("given", "change", "match"), WRONG_TYPES)
def test_fields_of_a_wrong_type_are_named(given, change, match):
    with pytest.raises(c.ConfigError, match=match):
        read_config(given | change)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
REFUSED = {
    "an unknown field": (LLAMA, {"logit_scale": 0.5}, "logit_scale=0.5: not a field of llama that we know"),
    "a missing field": (LLAMA, {"rms_norm_eps": None}, "has no field rms_norm_eps, which a llama model needs"),
    "biases": (LLAMA, {"attention_bias": True}, "attention_bias=True: we support False"),
    "mlp biases": (LLAMA, {"mlp_bias": True}, "mlp_bias=True"),
    "another activation": (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu': we support 'silu'"),
    "text for a number": (LLAMA, {"hidden_size": "64"}, "hidden_size='64': must be a number"),
    "a fraction of a head": (LLAMA, {"head_dim": 16.5}, "head_dim=16.5: must be of type int"),
    "heads that do not divide": (LLAMA, {"num_key_value_heads": 3}, "num_heads=4"),
    "part of a head rotated": (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
    "dynamic rope": (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic': must be"),
    "rope per layer kind": (LLAMA, {"rope_parameters": {"full_attention": {}}}, "rope parameter full_attention"),
    "a rope without factor": (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope type 'linear' needs factor"),
    "a factor below 1": (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0.5}}, "a factor of at least 1"),
    "a rope parameter": (LLAMA, {"rope_scaling": YARN | {"long_factor": 2}}, "rope parameter long_factor=2"),
    "untruncated yarn": (LLAMA, {"rope_scaling": YARN | {"truncate": False}}, "rope truncate must be True"),
    "two thetas": (LLAMA, {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta=10000.0 and"),
    "one yarn scale": (DEEPSEEK_V3, {"rope_scaling": YARN | {"mscale_all_dim": 0.7}}, "give both"),
    "a dtype": (LLAMA, {"torch_dtype": "float64"}, "dtype='float64': must be one of float32, bfloat16, float16"),
    "other quantization": (LLAMA, {"quantization_config": {"quant_method": "awq"}}, "quantization_config="),
    "scores": (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func='softmax': we support 'sigmoid'"),
    "a choice of experts": (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method='greedy'"),
    "sparse layers now and then": (DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq=2: we support 1"),
    "fewer keys than queries": (DEEPSEEK_V3, {"num_key_value_heads": 8}, "must be num_attention_heads=128"),
    "more experts than there are": (DEEPSEEK_V3, {"num_experts_per_tok": 300}, "top_k=300"),
    "dense layers last": (QWEN, {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]: must be the first layers"),
    "every other layer sparse": (QWEN, {"decoder_sparse_step": 2}, "decoder_sparse_step=2: we support 1"),
    "a window without a width": (QWEN, {"use_sliding_window": True}, "use_sliding_window=True: needs sliding_window"),
    "windows in some layers": (
        QWEN,
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "max_window_layers=1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_ignored_is_refused(name):
    given, change, match = REFUSED[name]
    read_config(given)
    with pytest.raises(c.ConfigError, match=match):
        read_config(given | change)


def test_normalised_weights_of_v2_are_refused():
    given = write_config(models()["deepseek_v2"])[0]
    with pytest.raises(c.ConfigError, match="norm_topk_prob=True: we support False"):
        read_config(given | {"norm_topk_prob": True})
    with pytest.raises(c.ConfigError, match="topk_method='noaux_tc': must be greedy or group_limited_greedy"):
        read_config(given | {"topk_method": "noaux_tc"})


def test_layer_kinds_of_v32_must_be_those_it_has():
    given = write_config(models()["deepseek_v32"])[0]
    expected = read_config(given)
    for kind in ("indexed_attention", "deepseek_sparse_attention", "full_attention"):  # as releases of theirs write it
        assert read_config(given | {"layer_types": [kind] * 3}) == expected
    for kinds in (["sliding_attention"] * 3, ["indexed_attention"] * 2, "indexed_attention"):
        with pytest.raises(
            c.ConfigError, match=re.escape(f"layer_types={kinds!r}: must be 3 times full_attention or ind")
        ):
            read_config(given | {"layer_types": kinds})
    v3 = write_config(models()["deepseek_v3"])[0]
    with pytest.raises(c.ConfigError, match=r"layer_types=\['indexed_attention', .*: must be 3 times full_attention$"):
        read_config(v3 | {"layer_types": ["indexed_attention"] * 3})
    with pytest.raises(c.ConfigError, match=r"mlp_layer_types=\['sparse', 'dense', 'sparse'\]: must be"):
        read_config(given | {"mlp_layer_types": ["sparse", "dense", "sparse"]})
    with pytest.raises(c.ConfigError, match="has no field q_lora_rank"):
        read_config(given | {"q_lora_rank": None})
