"""Configs: overrides, JSON, and one clear line for what cannot run."""

import dataclasses
import pathlib

import pytest

from dsv3_jax import config as c
from tests.conftest import tiny_config, tiny_model

pytestmark = pytest.mark.quick
CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))
CONFIGS += sorted((pathlib.Path(__file__).parent.parent / "configs" / "attention").glob("*.py"))


def test_overrides_choose_union_members_and_set_their_fields():
    config = c.Config()
    for path, text in [
        ("model.attention.pattern", "windowed"),
        ("model.attention.pattern.window", "64"),
        ("model.attention.pattern.global_positions", "(0, 5)"),
        ("model.attention.projection.query_latent_dim", "none"),
        ("train.optimizer.learning_rate", "1e-4"),
        ("data.domains.1.weight", "2"),
        ("model.tie_embeddings", "true"),
    ]:
        c.apply_override(config, path, text)
    assert config.model.attention.pattern == c.Windowed(64, (0, 5))
    assert config.model.attention.projection.query_latent_dim is None
    assert config.train.optimizer.learning_rate == 1e-4
    assert config.data.domains[1].weight == 2.0
    assert config.model.tie_embeddings is True


@pytest.mark.parametrize(
    ("path", "text", "says"),
    [
        ("model.dmi", "3", "did you mean 'dim'"),
        ("model.attention.pattern.window", "64", "(full) has no field 'window'"),
        ("model.attention.pattern", "sliding", "full | windowed | runtime_windowed | segmented"),
        ("model.num_layers", "two", "must be of type int"),
        ("data.domains.7.weight", "1", "has 2 elements"),
        ("train.seed.x", "1", "which has no field 'x'"),
    ],
)
def test_a_wrong_override_names_the_field_and_what_is_possible(path, text, says):
    with pytest.raises(c.ConfigError) as error:
        c.apply_override(c.Config(), path, text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "text", "says"),
    [
        ("model.attention.projection", "grouped_query", None),
        ("model.attention.pattern", "windowed", None),
        ("model.moe.router.top_k", "100", "must be at most"),
        ("model.moe.router.top_groups", "9", "at most num_groups"),
        ("model.moe.num_experts", "4", "two best"),
        ("model.moe.num_experts", "15", "multiple of router.num_groups"),
        ("model.num_dense_layers", "9", "between 0 and model.num_layers"),
        ("model.compute_dtype", "float8", "must be one of float32, bfloat16"),
        ("train.microbatches", "3", "multiple of train.microbatches"),
        ("train.schedule.warmup_steps", "999", "at least the 999 steps"),
        ("mesh.data", "3", "must split over"),
        ("mesh.pipeline", "2", "no pipeline parallelism yet"),
        ("data.tokenizer.vocab_size", "9000", "at most model.vocab_size"),
        ("data.tokenizer.vocab_size", "10", "at least 259"),
        ("data.held_out_fraction", "0", "between 0 and 1"),
        ("model.moe", "none", "must equal model.num_layers"),
    ],
)
def test_validate_refuses_what_cannot_run(path, text, says):
    config = c.Config()
    config.model.moe.router.top_k = 2
    c.apply_override(config, path, text)
    if says is None:
        assert config.validate() is config
        return
    with pytest.raises(c.ConfigError) as error:
        config.validate()
    assert says in str(error.value) and "config." in str(error.value)


def test_validate_refuses_windows_of_nothing_and_heads_that_do_not_divide():
    with pytest.raises(c.ConfigError, match="window=0: must be at least 1"):
        c.Config(model=tiny_model(attention=c.Attention(pattern=c.Windowed(0)))).validate()
    with pytest.raises(c.ConfigError, match="distinct"):
        c.Config(model=tiny_model(attention=c.Attention(pattern=c.Windowed(4, (1, 1))))).validate()
    with pytest.raises(c.ConfigError, match="multiple of num_kv_heads=3"):
        c.Config(model=tiny_model(attention=c.Attention(projection=c.GroupedQuery(4, 3, 8)))).validate()


PATTERNS_REFUSED = [
    (c.Windowed(8, stride=9), "tokens between two windows would see nothing"),
    (c.Windowed(8, global_fractions=(0.5,)), "not known while a text grows: use global_positions"),
    (c.Windowed(8, global_fractions=(1.5,)), "between 0 and 1"),
    (c.RuntimeWindowed(8, tasks=(c.TaskWindow("prose", 9),)), "between 1 and the largest window, 8"),
    (c.RuntimeWindowed(8, tasks=(c.TaskWindow("a", 1), c.TaskWindow("a", 2))), "name each task once"),
    (c.Segmented(8, keys="some"), "must be one of segment, all"),
    (c.LearnedGlobal(8, 9, 2), "stride=9"),
    (c.LearnedGlobal(8, 8, 0), "top_k=0: must be at least 1"),
    (c.Sparse(8, 4, 4), "at least 8, the rotated width"),
    (c.Sparse(8, 4, 16, stage="dense"), "must be one of warmup, sparse"),
    (c.Sparse(8, 4, 16, stage="warmup"), 'must be ("indexer",) while a sparse pattern has stage=warmup'),
    (c.Sparse(1, 4, 16), "one key teaches nothing"),
    (c.Sparse(8, 4, 16, stage="warmup", loss_weight=0.0), "warm-up has no other loss"),
    (c.RuntimeWindowed(8, tasks=(c.TaskWindow("prsoe", 4),)), "the domains are prose, code"),
    (c.PerLayer(()), "at least one pattern"),
    (c.PerLayer((c.Full(), c.Windowed(0))), "patterns.1.window=0"),
    (c.PerLayer((c.Full(), c.LearnedGlobal())), "all patterns must be it, or none"),
    (c.PerLayer((c.Sparse(8, 4, 16), c.Sparse(8, 2, 16))), "must be the same in every layer"),
]


@pytest.mark.parametrize(("pattern", "says"), PATTERNS_REFUSED, ids=lambda x: x if isinstance(x, str) else x.kind)
def test_patterns_that_cannot_be_are_refused(pattern, says):
    attention = dataclasses.replace(tiny_model().attention, pattern=pattern)
    with pytest.raises(c.ConfigError) as error:
        c.Config(model=tiny_model(attention=attention)).validate()
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"implementation": "flash"},
            "none or one of blocked, cudnn, pallas_gpu, pallas_tpu, reference with the pattern",
        ),
        ({"implementation": "blocked", "pattern": c.Sparse(8, 4, 16)}, "none or one of chunked, reference"),
        ({"rope_scaling": c.Llama3Scaling(8.0, 64, 4.0, 4.0)}, "must be above low_factor=4.0"),
        ({"rope_scaling": c.Yarn(8.0, 0)}, "original_length=0: must be at least 1"),
        ({"rope_scaling": c.Yarn(8.0, 64, 1.0, 32.0)}, "must be above beta_slow"),
        ({"rope_scaling": c.LinearScaling(0.5)}, "factor=0.5: must be at least 1"),
        ({"softcap": 0.0}, "must be positive or none"),
        ({"implementation": "cudnn"}, "it knows the pattern full and, under causality, sliding windows without global"),
        ({"implementation": "cudnn", "pattern": c.Windowed(8, stride=4)}, "without global tokens; use another one"),
        ({"implementation": "cudnn", "pattern": c.Windowed(8), "causal": False}, "under causality, sliding windows"),
        ({"implementation": "cudnn", "pattern": c.Full(), "sinks": True}, "no gradient through the log-sum-exp"),
        ({"implementation": "cudnn", "pattern": c.Full(), "softcap": 5.0}, "it has no soft-cap"),
    ],
    ids=str,
)
def test_attention_that_cannot_be_is_refused(changes, says):
    with pytest.raises(c.ConfigError) as error:
        c.validate_model(tiny_model(attention=dataclasses.replace(tiny_model().attention, **changes)))
    assert says in str(error.value)


def test_next_token_training_with_sight_of_later_tokens_is_refused_and_building_such_a_model_is_not():
    attention = dataclasses.replace(
        tiny_model().attention, causal=False, pattern=c.Windowed(8, global_fractions=(0.0, 0.5, 1.0))
    )
    model = tiny_model(attention=attention)
    c.validate_model(model)
    with pytest.raises(c.ConfigError, match="would see the tokens they are to predict"):
        c.Config(model=model).validate()


def test_overrides_reach_the_patterns_of_layers():
    config = c.Config()
    c.apply_override(config, "model.attention.pattern", "per_layer")
    c.apply_override(config, "model.attention.pattern.patterns.1.window", "32")
    assert config.model.attention.pattern.patterns[1] == c.Windowed(32)
    assert c.from_json(c.to_json(config)) == config


def test_a_value_of_the_wrong_type_set_in_python_is_refused():
    config = c.Config()
    config.model.dim = "256"
    with pytest.raises(c.ConfigError, match=r"config.model.dim='256': must be of type int"):
        config.validate()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_validates_and_survives_json(path):
    config = c.load(str(path))
    assert c.from_json(c.to_json(config)) == config


def test_json_of_another_version_or_with_unknown_fields_is_refused():
    text = c.to_json(c.Config())
    with pytest.raises(c.ConfigError, match="schema 99"):
        c.from_json(text.replace('"schema": 1', '"schema": 99'))
    with pytest.raises(c.ConfigError, match="not a field of this version"):
        c.from_json(text.replace('"num_layers"', '"layers"'))


def test_differences_ignore_what_a_resumed_run_may_change(corpus):
    ours, theirs = tiny_config(corpus), tiny_config(corpus, num_steps=99, log_every=5)
    assert c.differences(ours, theirs) == {}
    theirs.model.attention.pattern = c.Full()
    theirs.train.seed = 7
    assert c.differences(ours, theirs)["train.seed"] == (0, 7)
    assert c.differences(ours, theirs)["model.attention.pattern.kind"] == ("windowed", "full")


def test_a_missing_config_file_says_so():
    with pytest.raises(c.ConfigError, match="no such file"):
        c.load("configs/nothing.py")


def test_parts_that_are_off_are_switched_on_by_their_kind():
    config = c.Config()
    for path, text in (
        ("model.mtp", "multi_token"),
        ("model.mtp.depth", "2"),
        ("model.unit_gate", "unit_gate"),
        ("model.moe.condition", "condition"),
        ("train.growth", "expansion"),
    ):
        c.apply_override(config, path, text)
    moe = config.model.moe
    assert config.model.mtp == c.MultiToken(depth=2) and config.model.unit_gate == c.UnitGate()
    assert moe is not None and moe.condition == c.Condition() and config.train.growth == c.Expansion()
    assert c.from_json(c.to_json(config)) == config


@pytest.mark.parametrize(
    ("router", "says"),
    [
        (c.Softmax(top_k=1), "must be false with model.moe.router.top_k=1"),
        (c.ProbabilityMass(mass_update_rate=0.0), "nothing else holds target_k"),
        (c.ProbabilityMass(k_min=2, k_max=4, target_k=5.0), "must be between k_min=2 and k_max=4"),
    ],
)
def test_routers_that_would_not_learn_are_refused(router, says):
    config = c.Config(model=c.ModelConfig(moe=c.MixtureOfExperts(router=router)))
    with pytest.raises(c.ConfigError, match=says):
        config.validate()
