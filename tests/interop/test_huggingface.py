"""Published checkpoints in and out, without torch: round trips, dtypes, shards, float8."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from dsv3_jax import config as c
from dsv3_jax.interop import huggingface
from dsv3_jax.interop.huggingface import flat, load_hf, save_hf
from dsv3_jax.interop.safetensors_files import dequantize
from dsv3_jax.interop.tensors import Tensor
from dsv3_jax.models.transformer import Transformer
from tests.interop.test_refused_checkpoints import refused
from tests.interop.tiny import SIGMOID, grouped, latent, models, random_variables, with_mtp

MODELS = models()


def assert_same(actual: dict, expected: dict) -> None:
    actual, expected = flat(actual), flat(expected)
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        assert actual[path].dtype == value.dtype, path
        np.testing.assert_array_equal(actual[path], value, err_msg=path)


def stored(directory) -> dict[str, np.ndarray]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.quick
@pytest.mark.parametrize("name", MODELS)
def test_save_then_load_gives_the_model_back(name, tmp_path):
    config, variables = MODELS[name], random_variables(MODELS[name])
    save_hf(tmp_path, config, variables)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == name
    loaded_config, loaded = load_hf(tmp_path)
    c_unused = {"dense_dim": config.dense_dim} if name == "mixtral" else {}  # it has no dense layers
    expected = c.flatten(config) | {"moe.router.balance_weight": None, "moe.router.bias_update_rate": None}
    actual = c.flatten(loaded_config) | {"moe.router.balance_weight": None, "moe.router.bias_update_rate": None}
    assert actual | c_unused == expected
    assert_same(loaded, variables)


@pytest.mark.parametrize("name", MODELS)
def test_the_loaded_tree_is_the_tree_of_the_model(name, tmp_path):
    save_hf(tmp_path, MODELS[name], random_variables(MODELS[name]))
    config, loaded = load_hf(tmp_path)
    shapes = nn.unbox(jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, shapes)


def test_published_names_and_shapes_of_one_architecture(tmp_path):
    """By hand, so that the table is not checked with itself alone."""
    config = MODELS["mixtral"]
    variables = random_variables(config)
    save_hf(tmp_path, config, variables)
    tensors, layers = stored(tmp_path), variables["params"]["moe_layers"]
    experts = "model.layers.2.block_sparse_moe.experts.5"
    np.testing.assert_array_equal(tensors[f"{experts}.w1.weight"], layers["moe"]["w_in"][2, 5, :, 0].T)
    np.testing.assert_array_equal(tensors[f"{experts}.w3.weight"], layers["moe"]["w_in"][2, 5, :, 1].T)
    np.testing.assert_array_equal(tensors[f"{experts}.w2.weight"], layers["moe"]["w_out"][2, 5].T)
    np.testing.assert_array_equal(
        tensors["model.layers.1.block_sparse_moe.gate.weight"], layers["moe"]["w_router"][1].T
    )
    keys = layers["attention"]["projection"]["w_kv"][0, :, 0].reshape(32, 20).T
    np.testing.assert_array_equal(tensors["model.layers.0.self_attn.k_proj.weight"], keys)
    out = layers["attention"]["w_out"][0].reshape(40, 32).T
    np.testing.assert_array_equal(tensors["model.layers.0.self_attn.o_proj.weight"], out)
    assert len(tensors) == 3 + 3 * (2 + 4 + 1 + 8 * 3)


@pytest.mark.quick
def test_rotated_features_are_neighbours_there_and_halves_here():
    tensor = Tensor("w", "w", (1, 1, 6), rotated=4)
    published = np.array([[0.0], [1], [2], [3], [4], [5]])  # two plain features, then the pairs (2, 3) and (4, 5)
    ours = tensor.to_ours(published)
    np.testing.assert_array_equal(ours[0, 0], [0, 1, 2, 4, 3, 5])
    np.testing.assert_array_equal(tensor.to_published(ours), published)


def test_many_shards_hold_the_same_tensors(tmp_path):
    config, variables = MODELS["deepseek_v3"], random_variables(MODELS["deepseek_v3"])
    save_hf(tmp_path / "one", config, variables)
    save_hf(tmp_path / "many", config, variables, max_shard_bytes=20_000)
    files = list((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and all(f.stat().st_size < 20_000 + 8_000 for f in files)  # 8 kB of header
    where = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(name in load_file(tmp_path / "many" / file) for name, file in where.items())
    assert stored(tmp_path / "many").keys() == stored(tmp_path / "one").keys() == where.keys()
    assert_same(load_hf(tmp_path / "many")[1], variables)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v32"])
def test_multi_token_prediction_modules_come_back(name, tmp_path):
    config = with_mtp(MODELS[name], 2)
    variables = random_variables(config)
    save_hf(tmp_path / "a", config, variables)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["num_nextn_predict_layers"] == 2
    tensors, mtp = stored(tmp_path / "a"), variables["params"]["mtp"]
    names = {k.removeprefix("model.layers.4.") for k in tensors if k.startswith("model.layers.4.")}
    assert {"enorm.weight", "hnorm.weight", "shared_head.norm.weight", "mlp.gate.e_score_correction_bias"} <= names
    assert ("self_attn.indexer.wk.weight" in names) == (name == "deepseek_v32")
    np.testing.assert_array_equal(tensors["model.layers.4.eh_proj.weight"], mtp["w_projection"][1].T)
    np.testing.assert_array_equal(tensors["model.layers.3.mlp.gate.weight"], mtp["block"]["moe"]["w_router"][0].T)
    for layer in (3, 4):
        prefix = f"model.layers.{layer}"
        np.testing.assert_array_equal(tensors[f"{prefix}.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
        np.testing.assert_array_equal(tensors[f"{prefix}.shared_head.head.weight"], tensors["lm_head.weight"])
    loaded_config, loaded = load_hf(tmp_path / "a")
    assert loaded_config.mtp == c.MultiToken(2)
    assert_same(loaded, variables)
    shapes = nn.unbox(jax.eval_shape(Transformer(loaded_config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, shapes)


def test_the_model_gives_the_same_logits_beside_prediction_modules(tmp_path):
    config = with_mtp(MODELS["deepseek_v3"])
    variables = random_variables(config)
    save_hf(tmp_path, config, variables)
    config, loaded = load_hf(tmp_path)
    plain = {collection: {k: v for k, v in tree.items() if k != "mtp"} for collection, tree in variables.items()}
    tokens = jnp.arange(6)[None]
    expected = jax.jit(Transformer(MODELS["deepseek_v3"]).apply)(plain, tokens).logits_BTV
    np.testing.assert_array_equal(jax.jit(Transformer(config).apply)(loaded, tokens).logits_BTV, expected)


def test_announced_prediction_modules_may_be_absent_but_not_in_part(tmp_path):
    config = with_mtp(MODELS["deepseek_v3"])
    save_hf(tmp_path, config, random_variables(config))
    tensors = stored(tmp_path)
    without = {k: v for k, v in tensors.items() if not k.startswith("model.layers.3.")}
    save_file(without, tmp_path / "model.safetensors")
    loaded_config, loaded = load_hf(tmp_path)
    assert loaded_config.mtp is None and "mtp" not in loaded["params"]
    save_file(without | {"model.layers.3.enorm.weight": np.ones(32, np.float32)}, tmp_path / "model.safetensors")
    refused(tmp_path, "model.layers.3.hnorm.weight is missing")


@pytest.mark.quick
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_of_a_prediction_module_are_the_models(tied, tmp_path):
    """Absent they are not missed; other values are refused."""
    config = with_mtp(latent(SIGMOID, tie_embeddings=tied))
    variables = random_variables(config)
    save_hf(tmp_path, config, variables)
    tensors, path = stored(tmp_path), tmp_path / "model.safetensors"
    copies = {"embed_tokens": "model.embed_tokens", "shared_head.head": "model.embed_tokens" if tied else "lm_head"}
    for name, original in copies.items():
        copy = f"model.layers.3.{name}.weight"
        other = tensors[copy].copy()
        other[-1, -1] += 1
        save_file(tensors | {copy: other}, path)
        refused(tmp_path, f"{copy} is not {original}.weight; a multi-token-prediction module shares")
    save_file({k: v for k, v in tensors.items() if not k.endswith(tuple(f"3.{name}.weight" for name in copies))}, path)
    assert_same(load_hf(tmp_path)[1], variables)


@pytest.mark.quick
def test_a_model_without_sparse_layers_comes_back_and_has_no_prediction_modules(tmp_path):
    config = latent(SIGMOID, num_dense_layers=3)
    variables = random_variables(config) | {"selection_bias": {}}  # as `Transformer` has it
    save_hf(tmp_path, config, variables)
    path = tmp_path / "config.json"
    given = json.loads(path.read_text())
    for more in ({}, {"first_k_dense_replace": 5}, {"num_nextn_predict_layers": 1}):  # announced and absent
        path.write_text(json.dumps(given | more))
        loaded_config, loaded = load_hf(tmp_path)
        assert loaded_config.num_dense_layers == 3 and loaded_config.mtp is None
        assert_same(loaded, variables)
    tensors = stored(tmp_path) | {"model.layers.3.enorm.weight": np.ones(32, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, "num_nextn_predict_layers=1: its layers have experts, and here no other layer has any")


@pytest.mark.quick
def test_an_architecture_without_prediction_modules_is_refused(tmp_path):
    config = with_mtp(MODELS["llama"])
    with pytest.raises(c.ConfigError, match="config.model.mtp.depth=1: the nearest published architecture, llama, has"):
        save_hf(tmp_path / "llama", config, random_variables(MODELS["llama"]))
    config = with_mtp(latent(SIGMOID, num_dense_layers=3))
    with pytest.raises(c.ConfigError, match="num_nextn_predict_layers=1: its layers have experts"):
        save_hf(tmp_path / "dense", config, {})


def test_dtypes(tmp_path):
    """bfloat16 stays, float16 becomes float32, the argument overrides both; the selection bias stays float32."""
    config = latent(SIGMOID, compute_dtype="bfloat16")
    variables = random_variables(config, dtype="bfloat16")
    save_hf(tmp_path, config, variables)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded_config, loaded = load_hf(tmp_path)
    assert loaded_config.compute_dtype == "bfloat16"
    assert_same(loaded, variables)
    loaded_config, loaded = load_hf(tmp_path, dtype="float32")
    assert loaded_config.compute_dtype == "float32"
    assert_same(loaded["params"], jax.tree.map(lambda x: x.astype(np.float32), variables["params"]))
    with pytest.raises(c.ConfigError, match="dtype='float64': must be one of float32, bfloat16"):
        load_hf(tmp_path, dtype="float64")

    half = {k: v.astype(np.float16) for k, v in stored(tmp_path).items()}
    save_file(half, tmp_path / "model.safetensors")
    given = json.loads((tmp_path / "config.json").read_text())
    del given["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(given | {"torch_dtype": "float16"}))
    loaded_config, loaded = load_hf(tmp_path)
    assert loaded_config.compute_dtype == "float32"
    assert {str(x.dtype) for x in jax.tree.leaves(loaded)} == {"float32"}
    np.testing.assert_array_equal(loaded["params"]["embedding"], half["model.embed_tokens.weight"])


def quantize(weight: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Block by block, by hand."""
    rows, columns = (-(-size // b) for size, b in zip(weight.shape, block, strict=True))
    quantized, scales = np.zeros(weight.shape, jnp.float8_e4m3fn), np.zeros((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            part = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = np.abs(weight[part]).max() / 448
            quantized[part] = (weight[part] / scales[i, j]).astype(jnp.float8_e4m3fn)
    return quantized, scales


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(8, 12), (9, 13), (3, 2)])
def test_blocks_of_float8_are_scaled_one_by_one(shape):
    weight = np.random.default_rng(0).normal(size=shape)
    quantized, scales = quantize(weight, (4, 6))
    actual = dequantize(quantized, scales, (4, 6), np.dtype(np.float32))
    for i, j in np.ndindex(shape):
        assert actual[i, j] == np.float32(quantized[i, j]) * scales[i // 4, j // 6]
    np.testing.assert_allclose(actual, weight, rtol=2**-4)  # 3 bits of mantissa, rounded
    assert dequantize(quantized, scales, (4, 6), jnp.dtype("bfloat16")).dtype == jnp.bfloat16


def save_float8(directory, config, block) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Saves a model with its matrices quantized; returns its tensors, and the float32 values that they stand for."""
    save_hf(directory, config, random_variables(config))
    tensors, values = stored(directory), {}
    for name, value in list(tensors.items()):
        if value.ndim == 2 and not any(word in name for word in ("embed", "head", "gate.weight")):
            tensors[name], tensors[name + "_scale_inv"] = quantize(value, block)
            values[name] = dequantize(tensors[name], tensors[name + "_scale_inv"], block, np.dtype(np.float32))
        else:
            values[name] = value
    save_file(tensors, directory / "model.safetensors")
    given = json.loads((directory / "config.json").read_text())
    given["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    (directory / "config.json").write_text(json.dumps(given))
    return tensors, values


def test_float8_checkpoints_are_dequantized(tmp_path):
    config = MODELS["deepseek_v3"]
    tensors, values = save_float8(tmp_path / "fp8", config, (16, 12))
    save_hf(tmp_path / "plain", config, random_variables(config))
    save_file(values, tmp_path / "plain" / "model.safetensors")
    assert_same(load_hf(tmp_path / "fp8", dtype="float32")[1], load_hf(tmp_path / "plain")[1])
    kept = load_hf(tmp_path / "fp8")[1]["params"]["moe_layers"]
    assert kept["moe"]["w_in"].dtype == jnp.bfloat16 and kept["mlp_norm"]["scale"].dtype == np.float32

    scale = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    save_file({k: v for k, v in tensors.items() if k != scale}, tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(c.ConfigError, match=f"{scale} is missing"):
        load_hf(tmp_path / "fp8")
    save_file(tensors | {scale: np.ones((1, 1), np.float32)}, tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(c.ConfigError, match=rf"{scale} has shape \(1, 1\), config.json asks for \(2, 2\)"):
        load_hf(tmp_path / "fp8")


def test_tied_embeddings_and_windows(tmp_path):
    config = grouped(None, tie_embeddings=True)
    save_hf(tmp_path / "tied", config, random_variables(config))
    assert "lm_head.weight" not in stored(tmp_path / "tied")
    loaded_config, loaded = load_hf(tmp_path / "tied")
    assert loaded_config.tie_embeddings and "head" not in loaded["params"]
    config = models()["mixtral"]
    config.attention.pattern = c.Windowed(7)
    save_hf(tmp_path / "windowed", config, random_variables(config))
    assert load_hf(tmp_path / "windowed")[0].attention.pattern == c.Windowed(7)


@pytest.mark.quick
def test_a_head_beside_tied_embeddings_is_a_copy_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "ROWS", 50)  # of 72
    config = grouped(None, tie_embeddings=True)
    save_hf(tmp_path, config, random_variables(config))
    tensors, path = stored(tmp_path), tmp_path / "model.safetensors"
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding}, path)
    assert "head" not in load_hf(tmp_path)[1]["params"]
    other = embedding.copy()
    other[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": other}, path)
    refused(tmp_path, "tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight")
    save_file(tensors | {"lm_head.weight": embedding[1:]}, path)
    refused(tmp_path, r"lm_head.weight has shape \(71, 32\), config.json asks for \(72, 32\)")
