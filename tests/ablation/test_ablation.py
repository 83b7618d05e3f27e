"""A small table, end to end: what is finished is skipped, what fails is reported, what is claimed is in the file."""

import csv
import json

import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.ablation import runner
from dsv3_jax.ablation.report import markdown, smallest_effect, verdict, write_report
from dsv3_jax.ablation.runner import Row, run_ablation
from dsv3_jax.analysis.routing import RoutingMeter, RoutingRecord, entropy_share, max_over_mean
from dsv3_jax.training.step import TrainState
from tests.conftest import tiny_config


def ablation(corpus) -> c.Ablation:
    rows = {}
    for name, pattern in (("full", c.Full()), ("window", c.Windowed(4)), ("broken", c.Windowed(0))):
        steps = 4 if name == "window" else 3
        rows[name] = tiny_config(corpus, num_steps=steps, eval_every=steps)
        rows[name].model.attention.pattern = pattern
    settings = {"against": {"broken": "window"}, "own_length": ("window",)}
    return c.Ablation("Test table", rows, baseline="full", seeds=(0, 1), timing_steps=1, routing=True, **settings)


@pytest.fixture(scope="module")
def table(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("table")
    rows = run_ablation(ablation(corpus), workdir)
    text = write_report(ablation(corpus), rows, workdir, "patterns", "the command")
    return workdir, rows, text


def test_rows_hold_quality_by_seed_and_costs(table):
    _, rows, _ = table
    assert [row.name for row in rows] == ["full", "full (A/A)", "window", "broken"]
    for row in rows[:3]:
        assert len(row.quality()) == 2 and row.quality()[0] != row.quality()[1]
        assert row.tokens_per_second > 0 and row.peak_bytes > 0 and row.hlo_flops_a_token > 0
    assert rows[2].flops_a_token < rows[0].flops_a_token
    assert rows[0].quality() != rows[1].quality()


def test_the_report_says_what_failed_and_what_it_could_have_seen(table):
    workdir, rows, text = table
    assert "failed: seed 0: ConfigError: config.model.attention.pattern.window=0: must be at least 1" in text
    for said in ("baseline", "the command", "FLOP ledger", f"{smallest_effect(rows):.4f}", "full (A/A)"):
        assert said in text
    assert (workdir / "patterns.png").read_bytes().startswith(b"\x89PNG")
    lines = list(csv.DictReader((workdir / "patterns.csv").open()))
    assert len(lines) == 8 and float(lines[0]["bits_per_byte"]) == pytest.approx(rows[0].quality()[0], abs=1e-6)
    records = [json.loads(line) for line in (workdir / "rows.jsonl").read_text().splitlines()]
    assert [record["name"] for record in records] == [row.name for row in rows]


def test_every_run_leaves_its_routing_and_the_report_sums_it_up(table):
    workdir, rows, text = table
    for row in rows[:3]:
        assert len(row.routing) == 2
        for seed, record, path in zip(row.seeds, row.routing, row.bias_paths, strict=True):
            folder = workdir / "runs" / ("full_A_A_" if "A/A" in row.name else row.name) / f"seed{seed}"
            assert RoutingRecord.from_json((folder / "routing.json").read_text()).to_json() == record.to_json()
            # What training left in the last checkpoint: its biases, and what the log says of them.
            assert record.load_CLE.shape == (1, 1, 8) and np.abs(record.bias_LE).max() > 0
            assert path[0][-1] == pytest.approx(record.bias_LE.std(), rel=1e-4)
    line = next(line for line in text.split("## Routing")[1].splitlines() if line.startswith("| window"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    by_hand = [np.mean([measure(r.load_CLE[0]) for r in rows[2].routing]) for measure in (entropy_share, max_over_mean)]
    assert cells[1] == cells[2] == f"{by_hand[0]:.3f}" and cells[3] == f"{by_hand[1]:.2f}"
    assert cells[5:] == ["2.00", "0.00%"]
    assert (workdir / "patterns_routing.png").read_bytes().startswith(b"\x89PNG")


def test_what_fails_after_training_costs_its_own_row_only(table, corpus, monkeypatch):
    """Reading a run, measuring it, and counting its costs."""

    def fail(*_):
        raise ValueError("no more")

    (workdir, _, _), config, shared = table, ablation(corpus).rows["full"], runner._Shared()
    for name, said in (("_read_run", "seed 0"), ("_routing", "seed 0"), ("_static_costs", "costs")):
        monkeypatch.setattr(runner, name, fail)
        row = runner._train_row(Row("full", [0]), config, True, workdir, shared)
        monkeypatch.undo()
        assert row.error == f"{said}: ValueError: no more"


def test_layers_of_a_run_come_in_the_order_of_their_numbers(tmp_path):
    names = [f"router/bias_std/{layer}" for layer in ("moe_layers/0", "moe_layers/10", "moe_layers/2", "mtp/0")]
    lines = [
        {"step": step, "tokens_seen": 8.0, "loss/lm": 1.0} | {n: i for i, n in enumerate(names)} for step in (5, 10)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = Row("x", [0])
    runner._read_run(row, tmp_path)
    assert row.bias_paths == [[[0, 0], [2, 2], [1, 1], [3, 3]]] and row.steps == [5, 10]


def test_a_row_that_grows_is_timed_with_all_experts():
    biases = {"moe_layers": {"moe": {"bias": np.asarray([[0.5, -0.25, -np.inf, -np.inf]]), "mass": np.asarray([0.3])}}}
    state = TrainState(step=0, seed=0, params={}, selection_bias=biases, opt_state=())
    timed = runner._all_active(state).selection_bias["moe_layers"]["moe"]
    assert timed["bias"].tolist() == [[0.5, -0.25, 0, 0]] and float(timed["mass"][0]) == pytest.approx(0.3)


def test_a_row_of_its_own_length_is_named_and_its_flops_are_its_own(table):
    _, rows, text = table
    assert "384 a run, the same tokens for every run; window: 4 steps." in text
    assert [len(curve) for row in rows for curve in row.curves] == [3, 3, 3, 3, 4, 4]
    tokens = 4 * 4 * 32
    assert f"window {rows[2].flops_a_token * tokens / 1e12:.2f}." in text


def test_a_row_may_be_compared_with_another_than_the_baseline():
    values = {"x": [1.0, 1.1], "y": [3.0, 3.1], "z": [2.0, 2.1]}
    rows = [Row(name, [0, 1], {"a": quality}) for name, quality in values.items()]
    table = c.Ablation("t", {name: c.Config() for name in values}, baseline="x", against={"z": "y"})
    cells = {line.split("|")[1].strip(): line for line in markdown(table, rows, "").splitlines() if "|" in line}
    assert cells["y"].endswith("| worse |") and cells["z"].endswith("| better (against y) |")


def test_a_second_call_skips_finished_runs_and_gives_the_same_rows(table, corpus, capsys, monkeypatch):
    workdir, rows, _ = table
    monkeypatch.delattr(RoutingMeter, "measure")
    again = run_ablation(ablation(corpus), workdir)
    assert capsys.readouterr().out.count("nothing to do") == 6
    assert [row.quality() for row in again] == [row.quality() for row in rows]
    assert [r.to_json() for row in again for r in row.routing] == [r.to_json() for row in rows for r in row.routing]


def test_a_table_refuses_to_mix_budgets(table, corpus, tmp_path):
    workdir, _, _ = table
    longer = ablation(corpus)
    for config in longer.rows.values():
        config.train.num_steps = 5
    rows = run_ablation(longer, workdir)
    assert "num_steps=3, now 5; use another workdir" in rows[0].error
    file = tmp_path / "table.py"
    file.write_text(
        "from dsv3_jax import config as c\n"
        "def get_ablation():\n"
        "    rows = {'a': c.Config(), 'b': c.Config(train=c.TrainConfig(batch_size=16))}\n"
        "    return c.Ablation('t', rows, baseline='a')\n"
    )
    with pytest.raises(c.ConfigError, match="row 'b' differs from 'a'"):
        c.load_ablation(str(file))
    file.write_text(file.read_text().replace("baseline='a'", "baseline='a', own_length=('d',)"))
    with pytest.raises(c.ConfigError, match="against or own_length names 'd', which is not a row"):
        c.load_ablation(str(file))


def test_statistics_by_hand():
    rows = [Row(name, [0, 1], {"a": values}) for name, values in (("x", [1.0, 1.2]), ("y", [2.0, 2.2]))]
    # pooled s = sqrt(0.02), 2 degrees of freedom, t = 4.3027, n = 2
    assert smallest_effect(rows) == pytest.approx(4.3027 * np.sqrt(0.02), rel=1e-4)
    assert verdict(rows[1], rows[0], 0.5) == "worse" and verdict(rows[1], rows[0], 1.5) == "inconclusive at this scale"
    assert smallest_effect([Row("x", [0], {"a": [1.0]})]) == float("inf")
