"""Checkpoints that cannot be read, and models that cannot be saved, are refused with the reason."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsv3_jax import config as c
from dsv3_jax.interop import huggingface
from dsv3_jax.interop.huggingface import load_hf, save_hf
from tests.interop.tiny import SIGMOID, SPARSE, latent, models, random_leaves, random_variables, with_mtp

MODELS = models()


def refused(directory, match: str) -> None:
    with pytest.raises(c.ConfigError, match=match):
        load_hf(directory)


@pytest.fixture
def llama(tmp_path):
    save_hf(tmp_path, MODELS["llama"], random_variables(MODELS["llama"]))
    return tmp_path


@pytest.mark.quick
def test_a_directory_that_is_no_checkpoint(tmp_path):
    refused(tmp_path / "nowhere", "nowhere: no config.json there")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json: not JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "not a JSON object")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    refused(tmp_path, "model_type='gpt2': we have deepseek_v2, deepseek_v3, deepseek_v32, llama, mixtral, qwen3_moe")


@pytest.mark.quick
def test_files_that_are_not_whole(llama):
    path = llama / "model.safetensors"
    whole = path.read_bytes()
    for cut in (4, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(llama, rf"model.safetensors: {cut} bytes, .*truncated")
    path.write_bytes(whole + b"0")
    refused(llama, "its header describes")
    path.write_bytes((4).to_bytes(8, "little") + b"none")
    refused(llama, "its header is no JSON")
    path.unlink()
    refused(llama, "holds neither model.safetensors nor model.safetensors.index.json")


def test_indexes_that_do_not_fit(tmp_path):
    config = MODELS["llama"]
    save_hf(tmp_path, config, random_variables(config), max_shard_bytes=20_000)
    index = tmp_path / "model.safetensors.index.json"
    given = json.loads(index.read_text())
    files = sorted(f.name for f in tmp_path.glob("*.safetensors"))
    given["weight_map"]["model.norm.bias"] = files[0]
    index.write_text(json.dumps(given))
    refused(tmp_path, f"tensor model.norm.bias of model.safetensors.index.json is not in {files[0]}")
    (tmp_path / files[1]).unlink()
    refused(tmp_path, f"{files[1]}: no such file, but the checkpoint's index names it")
    index.write_text("{}")
    refused(tmp_path, "no weight_map")


def test_tensors_that_do_not_fit_are_named(llama):
    path = llama / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    refused(llama, f"tensor {name} is missing")
    save_file(tensors | {"model.layers.1.self_attn.q_proj.bias": np.zeros(40, np.float32)}, path)
    refused(llama, "tensor model.layers.1.self_attn.q_proj.bias is no part of the llama model")
    save_file(tensors | {name: tensors[name][1:]}, path)
    refused(llama, rf"tensor {name} has shape \(39, 32\), config.json asks for \(40, 32\)")
    save_file(tensors | {name: tensors[name].astype(np.int8)}, path)
    refused(llama, f"tensor {name} is I8; we read F32, F16, BF16, F8_E4M3")
    save_file(tensors | {name: tensors[name].astype(jnp.float8_e4m3fn)}, path)
    refused(llama, f"tensor {name} is float8, but config.json has no quantization_config")
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32)}, path)
    load_hf(llama)  # known to be harmless


@pytest.mark.quick
@pytest.mark.parametrize("path", ["moe_layers/moe/bias", "mtp/block/moe/bias"])
def test_inactive_experts_are_not_published(path, tmp_path):
    """Those of the modules neither: an added expert is never active there."""
    config = with_mtp(MODELS["deepseek_v3"])
    leaves = random_leaves(config)
    leaves[f"selection_bias/{path}"][0, 1] = -np.inf
    with pytest.raises(c.ConfigError, match=f"selection_bias/{path}: some experts are inactive .*=expansion .* alone"):
        save_hf(tmp_path / "new", config, huggingface.nested(leaves))
    assert not (tmp_path / "new").exists()


def test_what_no_architecture_expresses_is_not_saved(tmp_path):
    def refuse(config, match, **variables):
        with pytest.raises(c.ConfigError, match=match):
            save_hf(tmp_path / "new", config, random_variables(MODELS["deepseek_v3"]) | variables)
        assert not (tmp_path / "new").exists()

    config = latent(SIGMOID, c.Windowed(8))
    refuse(config, "config.model.attention.pattern.kind='windowed': the nearest .* deepseek_v3, has 'full'")
    config = latent(SIGMOID)
    config.attention.sinks = True
    refuse(config, "config.model.attention.sinks=True")
    config = models()["mixtral"]
    config.attention.pattern = c.Windowed(8, stride=4)
    refuse(config, "config.model.attention.pattern.stride=4: the nearest")
    refuse(latent(SIGMOID, dataclasses.replace(SPARSE, stage="warmup")), "stage")
    refuse(latent(c.Softmax(normalize_weights=True)), "config.model.moe.router.normalize_weights=True")
    refuse(latent(SIGMOID), "selection_bias/moe_layers/moe/bias has shape None", selection_bias={})
    extra = random_variables(MODELS["deepseek_v3"])["params"] | {"gate": np.ones(3, np.float32)}
    refuse(latent(SIGMOID), r"params/gate has shape \(3,\), this config's model has None", params=extra)
    biased = random_leaves(MODELS["mixtral"])
    biased["selection_bias/moe_layers/moe/bias"] += 1
    with pytest.raises(c.ConfigError, match="a mixtral has no selection bias"):
        save_hf(tmp_path / "new", MODELS["mixtral"], biased)


def test_a_checkpoint_is_not_written_over_another(llama):
    before = (llama / "model.safetensors").read_bytes()
    with pytest.raises(c.ConfigError, match="holds a checkpoint already"):
        save_hf(llama, MODELS["llama"], random_variables(MODELS["llama"], seed=1))
    assert (llama / "model.safetensors").read_bytes() == before
