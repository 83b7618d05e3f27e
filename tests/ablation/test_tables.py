"""The tables of configs/ablations: every row can run, and costs what the table says."""

import dataclasses

import pytest

from dsv3_jax import config as c
from dsv3_jax.planning.flops import training_flops
from tests.conftest import ROOT

pytestmark = pytest.mark.quick
FILES = sorted((ROOT / "configs" / "ablations").glob("*.py"))


def load(name: str) -> c.Ablation:
    ablation = c.load_ablation(str(ROOT / "configs" / "ablations" / f"{name}.py"))
    assert isinstance(ablation, c.Ablation)
    return ablation


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_row_can_run(file):
    ablation = c.load_ablation(str(file))
    if isinstance(ablation, c.Ablation):
        configs = [config.validate() for config in ablation.rows.values()]
        assert len({c.to_json(config) for config in configs}) == len(configs)  # no row is another one


def test_experts_are_compared_at_equal_flops():
    ablation = load("moe")
    costs = {name: training_flops(row.model, row.data.sequence_length) for name, row in ablation.rows.items()}
    expected = costs[ablation.baseline]
    cheaper = costs.pop("dense, 70 % on, not widened")
    assert cheaper < 0.98 * expected
    assert {name: cost / expected for name, cost in costs.items()} == pytest.approx(dict.fromkeys(costs, 1), abs=0.005)
    # The row that costs less is the dense one with units switched off, and nothing else.
    narrow, dense = (ablation.rows[name].model for name in ("dense, 70 % on, not widened", "dense"))
    assert 0 <= dense.dense_dim - narrow.dense_dim < 16
    assert dataclasses.replace(narrow, unit_gate=None, dense_dim=dense.dense_dim) == dense


def test_multi_token_prediction_is_compared_at_equal_tokens_and_at_equal_flops():
    ablation = load("mtp")

    def flops(name):
        row = ablation.rows[name]
        return row.train.num_steps * training_flops(row.model, row.data.sequence_length)

    longer = ablation.own_length[0]
    assert flops(longer) == pytest.approx(flops(ablation.against[longer]), rel=0.01)
    assert flops("depth 0") < flops("depth 1") < flops("depth 2") < flops("depth 3")
    assert ablation.rows[longer].model == ablation.rows["depth 0"].model
