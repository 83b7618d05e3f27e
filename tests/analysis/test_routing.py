"""Router statistics by hand, and measured loads against those counted one token at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dsv3_jax import config as c
from dsv3_jax.analysis.routing import RoutingMeter, RoutingRecord, entropy_share, max_over_mean, specialisation
from dsv3_jax.data.pipeline import load_dataset
from dsv3_jax.models.transformer import Transformer, head_weight
from dsv3_jax.sharding import make_mesh
from dsv3_jax.training.step import Trainer, batch_shapes
from tests.conftest import tiny_config


@pytest.mark.quick
def test_entropy_and_largest_load_by_hand():
    load = np.asarray([[5, 5, 5, 5], [0, 9, 0, 0], [6, 2, 0, 0]])
    thirds = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(4)
    np.testing.assert_allclose(entropy_share(load), [1, 0, thirds], atol=1e-12)
    np.testing.assert_allclose(max_over_mean(load), [1, 4, 3])


@pytest.mark.quick
def test_balance_is_that_of_active_experts():
    load, active = np.asarray([[3, 3, 0, 0], [3, 3, 0, 0], [7, 0, 0, 0]]), np.tri(4, dtype=bool)[[1, 2, 0]]
    np.testing.assert_allclose(entropy_share(load, active), [1, np.log(2) / np.log(3), 1], atol=1e-12)
    np.testing.assert_allclose(max_over_mean(load, active), [1, 1.5, 1])
    assert entropy_share(np.asarray([5])) == 1 and entropy_share(np.asarray([[4, 0], [2, 2]])).tolist() == [0, 1]


@pytest.mark.quick
def test_specialisation_by_hand():
    same, apart, half = [[3, 1], [30, 10]], [[4, 0], [0, 9]], [[2, 2], [4, 0]]
    load_CLE = np.moveaxis(np.asarray([same, apart, half]), 0, 1)
    # half: shares (1/2, 1/2) and (1, 0); their mean (3/4, 1/4), entropies log 2 and 0
    expected = (-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) - 0.5 * np.log(2)) / np.log(2)
    np.testing.assert_allclose(specialisation(load_CLE), [0, 1, expected], atol=1e-12)
    three = np.eye(3)[:, None]
    np.testing.assert_allclose(specialisation(three), [1])
    assert np.isnan(specialisation(load_CLE[:1])).all()


@pytest.mark.quick
def test_a_record_is_read_back_as_it_was_written():
    record = RoutingRecord(
        domains=["a", "b"],
        layers=["layer 1"],
        load_CLE=np.asarray([[[3.0, 5.0]], [[8.0, 0.0]]]),
        tokens_CL=np.asarray([[4.0], [4.0]]),
        dropped_C=np.asarray([2.0, 0.0]),
        bias_LE=np.asarray([[0.25, -np.inf]]),
        agreement_k=np.zeros(0),
    )
    again = RoutingRecord.from_json(record.to_json())
    assert "Infinity" not in record.to_json()
    jax.tree.map(np.testing.assert_array_equal, vars(again), vars(record))
    assert again.mean_k() == 2 and again.dropped() == 2 / 16


def test_loads_and_agreement_are_those_counted_token_by_token(corpus):
    config = tiny_config(corpus)
    config.model.mtp = c.MultiToken(depth=2)
    domain = config.data.domains[0]
    config.data.domains = (domain, dataclasses.replace(domain, name="again"))
    config.validate()
    model, dataset = Transformer(config.model), load_dataset(config.data, config.model.vocab_size)
    rows = dataset.held_out["words"]
    tokens = np.stack([rows[i]["tokens"] for i in range(len(rows))])
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))
    record = RoutingMeter(config, make_mesh(config.mesh)).measure(variables, dataset, 1000)

    places = [np.stack([rows[i][name] for i in range(len(rows))]) for name in ("positions", "segment_ids")]
    output = jax.jit(lambda *x: model.apply(*x, predict_ahead=True))(variables, tokens, *places)
    assert record.layers == ["layer 1", "MTP 1", "MTP 2"] and record.domains == ["words", "again"]
    segments = places[1]
    counts, best = np.zeros((3, 8)), np.argmax(output.logits_BTV, axis=-1)
    routed, agreed, drafted = np.zeros(3), np.zeros(2), np.zeros(2)
    head_DV = head_weight(config.model, variables["params"])
    guesses = [np.argmax(hidden @ head_DV, axis=-1) for hidden in output.prediction.hidden_kBTD]
    for row, at in zip(*np.nonzero(segments), strict=True):
        for k in range(3):  # the layer of the stack, and modules that need token at + k of the same document
            if at + k < segments.shape[1] and segments[row, at + k] == segments[row, at]:
                routing, layer = (output.routing, 0) if k == 0 else (output.prediction.routing, k - 1)
                counts[k, routing.experts_BTK[layer, row, at]] += 1
                routed[k] += 1
                if k:
                    drafted[k - 1] += 1
                    agreed[k - 1] += guesses[k - 1][row, at] == best[row, at + k]
    np.testing.assert_array_equal(record.load_CLE, [counts, counts])
    np.testing.assert_array_equal(record.tokens_CL, [routed, routed])
    assert drafted[1] < drafted[0] < routed[0] and agreed.max() > 0
    np.testing.assert_allclose(record.agreement_k, agreed / drafted)
    assert record.mean_k() == 2 and record.dropped() == 0
    np.testing.assert_allclose(specialisation(record.load_CLE), 0, atol=1e-12)
    np.testing.assert_array_equal(record.bias_LE, np.zeros((3, 8)))


def test_guesses_of_a_model_in_bfloat16_are_of_float32_logits(corpus, monkeypatch):
    """As the model's own are: rounded to bfloat16, many of the best would tie."""
    config, seen, argmax = tiny_config(corpus), [], jnp.argmax
    config.model.mtp, config.model.compute_dtype = c.MultiToken(), "bfloat16"
    trainer = Trainer(config.validate(), make_mesh(config.mesh))
    monkeypatch.setattr(jnp, "argmax", lambda x, **axis: seen.append((x.shape[-1], x.dtype)) or argmax(x, **axis))
    meter = RoutingMeter(config, trainer.mesh)
    jax.eval_shape(meter._count, trainer.state_shapes.variables(), batch_shapes(config))
    assert [dtype for size, dtype in seen if size == config.model.vocab_size] == [jnp.float32] * 2
