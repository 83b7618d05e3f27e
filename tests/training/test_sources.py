"""Weights that a new run starts from: other runs, converted weights, published checkpoints."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.data.pipeline import load_dataset
from dsv3_jax.data.tokenizers import train_bpe
from dsv3_jax.interop.huggingface import flat, load_hf, save_hf
from dsv3_jax.sharding import make_mesh
from dsv3_jax.training.conversion import from_hf
from dsv3_jax.training.loop import _check_source, check_data, read_metrics, train
from dsv3_jax.training.sources import check_fit, open_source, take
from dsv3_jax.training.step import Trainer
from tests.conftest import tiny_config, tiny_model
from tests.interop.tiny import random_variables, with_mtp


def full() -> c.ModelConfig:
    model = tiny_model()
    model.attention.pattern = c.Full()
    return model


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A model with full attention and a multi-token-prediction module, in bfloat16."""
    directory, config = tmp_path_factory.mktemp("source") / "hf", with_mtp(full())
    save_hf(directory, config, random_variables(config, dtype="bfloat16"))
    return directory


def taken(directory, model: c.ModelConfig, mesh: c.MeshConfig | None = None) -> tuple[dict, dict]:
    """Path -> array of what a run of `model` starts with, and of what it would have started with."""
    config = c.Config(model=model, data=c.DataConfig(tokenizer=c.BpeTokenizer(300)), mesh=mesh or c.MeshConfig())
    trainer = Trainer(config, make_mesh(config.mesh))
    source, abstract = open_source(str(directory)), trainer.abstract_state().variables()
    source = check_fit(source, model, flat(abstract))
    fresh = trainer.init(0).variables()
    result = take(source, fresh, abstract)
    for path, leaf in flat(abstract).items():
        assert flat(result)[path].sharding == leaf.sharding and flat(result)[path].dtype == leaf.dtype
    return flat(result), flat(fresh)


@pytest.mark.parametrize("kind", ["published", "converted"])
def test_all_weights_are_taken(kind, published, tmp_path, capsys):
    source = published if kind == "published" else tmp_path / "run"
    if kind == "converted":
        from_hf(published, source)
    result, _ = taken(source, full(), c.MeshConfig(fsdp=2, expert=2))
    expected = flat(load_hf(published, dtype="float32")[1])
    assert result.keys() == {path for path in expected if "mtp" not in path.split("/")}
    for path, value in result.items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
    assert f"starting from {source}; its multi-token-prediction layers are left out\n" == capsys.readouterr().out


def test_prediction_modules_are_taken_or_start_fresh(published, tmp_path, capsys):
    result, _ = taken(published, with_mtp(full()))
    expected = flat(load_hf(published, dtype="float32")[1])
    assert result.keys() == expected.keys() and "params/mtp/w_projection" in result
    for path, value in result.items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
    assert f"starting from {published}\n" == capsys.readouterr().out

    with pytest.raises(c.ConfigError, match=r"its config.model.mtp.depth is 1, this run's 2; the weights do not fit"):
        taken(published, with_mtp(full(), 2))

    plain = random_variables(full())
    save_hf(tmp_path / "plain", full(), plain)
    result, fresh = taken(tmp_path / "plain", with_mtp(full()))
    for path, value in result.items():
        source = fresh if "mtp" in path.split("/") else flat(plain)
        np.testing.assert_array_equal(value, source[path], err_msg=path)
    assert "; multi-token-prediction layers start fresh\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pattern", "part", "note"),
    [
        (c.LearnedGlobal(8, 8, 2), "/gate/", "gates of learned global keys"),
        (c.Sparse(top_k=4, index_heads=2, index_dim=16), "/indexer/", "indexers"),
    ],
)
def test_what_a_pattern_adds_starts_fresh(pattern, part, note, published, capsys):
    model = full()
    model.attention.pattern, model.attention.rope_theta, model.context_length = pattern, 5e5, 99
    result, fresh = taken(published, model)
    assert any(part in path for path in result)
    expected = flat(load_hf(published, dtype="float32")[1])
    for path, value in result.items():
        np.testing.assert_array_equal(value, fresh[path] if part in path else expected[path], err_msg=path)
    said = capsys.readouterr().out
    assert f"; {note} start fresh; its multi-token" in said
    for change in ("pattern.kind was 'full', is ", "rope_theta was 10000.0, is 500000.0"):
        assert f"config.model.attention.{change}" in said
    assert "config.model.context_length was None, is 99" in said


def test_what_a_pattern_no_longer_needs_is_left_out(tmp_path, capsys):
    model = full()
    model.attention.pattern = c.Sparse(top_k=4, index_heads=2, index_dim=16)
    save_hf(tmp_path / "hf", model, random_variables(model))
    result, _ = taken(tmp_path / "hf", tiny_model())
    assert not any("indexer" in path for path in result)
    assert "its indexers are left out" in capsys.readouterr().out
    model.attention.pattern.index_heads = 4
    with pytest.raises(c.ConfigError, match=r"indexer/.* has shape .*, not"):
        taken(tmp_path / "hf", model)


def test_other_models_are_refused(published, tmp_path):
    def refuse(match, **changes):
        with pytest.raises(c.ConfigError, match=match):
            taken(published, dataclasses.replace(full(), **changes))

    refuse("config.model.dense_dim is 64, this run's 96; the weights do not fit", dense_dim=96)
    refuse("config.model.moe.num_experts is 8, this run's 16", moe=dataclasses.replace(full().moe, num_experts=16))
    refuse("attention.sinks is False, this run's True", attention=dataclasses.replace(full().attention, sinks=True))
    attention = full().attention
    refuse("config.model.norm_epsilon is 1e-06, this run's 0.001", norm_epsilon=1e-3)
    refuse("attention.causal is True, this run's False", attention=dataclasses.replace(attention, causal=False))
    for field, value in {"top_k": 3, "num_groups": 2, "top_groups": 1, "route_scale": 1.0}.items():
        router = dataclasses.replace(full().moe.router, **{field: value})
        refuse(f"moe.router.{field} is ", moe=dataclasses.replace(full().moe, router=router))
    router = dataclasses.replace(full().moe.router, normalize_weights=False)
    refuse("moe.router.normalize_weights is True", moe=dataclasses.replace(full().moe, router=router))
    refuse("moe.router.kind is 'grouped_sigmoid'", moe=dataclasses.replace(full().moe, router=c.Softmax(top_k=2)))
    with pytest.raises(c.ConfigError, match="holds no run"):
        open_source(str(tmp_path))


def test_how_it_is_trained_is_a_runs_own(published, capsys):
    model = dataclasses.replace(full(), remat="full", init_std=0.01)
    model.moe.router = dataclasses.replace(model.moe.router, balance_weight=0.5, bias_update_rate=0.1)
    taken(published, model)
    assert "config.model" not in capsys.readouterr().out


def test_converted_weights_are_no_run_to_resume(published, corpus, tmp_path):
    from_hf(published, tmp_path / "run")
    config = tiny_config(corpus)
    with pytest.raises(c.ConfigError, match="holds converted weights; use another folder, and --init_from"):
        train(config, tmp_path / "run")


def test_another_tokenizer_is_refused(corpus, tmp_path):
    directory = tmp_path / "hf"
    save_hf(directory, full(), random_variables(full()))
    train_bpe(["another text"], 260).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|eos|>", "bos_token": "<|bos|>"}')
    config = tiny_config(corpus)
    dataset = load_dataset(config.data, 320)
    with pytest.raises(c.ConfigError, match=r"config.data.tokenizer is not its tokenizer; use TokenizerFile\(path="):
        train(config, tmp_path / "run", init_from=str(directory), dataset=dataset)
    from_hf(directory, tmp_path / "converted")
    with pytest.raises(c.ConfigError, match="was trained with another tokenizer"):
        train(config, tmp_path / "run", init_from=str(tmp_path / "converted"), dataset=dataset)
    assert not (tmp_path / "run").exists()


def test_weights_without_a_tokenizer_are_said_to_have_none(corpus, tmp_path, capsys):
    save_hf(tmp_path / "hf", full(), random_variables(full()))
    from_hf(tmp_path / "hf", tmp_path / "converted")
    config = tiny_config(corpus)
    config.model = full()
    dataset = load_dataset(config.data, 320)
    with pytest.raises(
        c.ConfigError, match=r"converted from weights without a tokenizer .* \(data.json has tokenizer: nu"
    ):
        check_data(tmp_path / "converted", dataset, "tokenizer", "documents")
    trainer = Trainer(config, make_mesh(config.mesh))
    for name in ("hf", "converted"):
        notes = _check_source(str(tmp_path / name), config, trainer, dataset).notes
        assert notes == ("its tokenizer is not known: config.data.tokenizer must be the one it was trained with",)


@pytest.mark.slow
def test_training_starts_where_the_source_is(corpus, tmp_path, capsys):
    """A run, saved as a published checkpoint, and a run with a window from either: the same first step."""
    config = tiny_config(corpus, num_steps=12)
    config.model = full()
    result = train(config, tmp_path / "first")
    save_hf(tmp_path / "hf", config.model, jax.device_get(result.state.variables()))
    windowed = tiny_config(corpus, num_steps=1)
    windowed.model.attention.pattern = c.Windowed(24)
    lines = {}
    for name in ("first", "hf"):
        train(windowed, tmp_path / f"from_{name}", init_from=str(tmp_path / name))
        lines[name] = read_metrics(tmp_path / f"from_{name}")[0]
    assert "starting from step 12 of" in capsys.readouterr().out
    assert lines["first"]["loss"] == lines["hf"]["loss"]
    assert lines["hf"]["loss/lm"] < read_metrics(tmp_path / "first")[-1]["loss/lm"] + 0.5
    assert lines["hf"]["loss/lm"] < read_metrics(tmp_path / "first")[0]["loss/lm"] - 0.5
