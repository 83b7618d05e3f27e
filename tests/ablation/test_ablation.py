"""A small table, end to end: what is finished is skipped, what fails is reported, what is claimed is in the file."""

import csv
import json

import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.ablation.report import smallest_effect, verdict, write_report
from dsv3_jax.ablation.runner import Row, run_ablation
from tests.conftest import tiny_config


def ablation(corpus) -> c.Ablation:
    rows = {}
    for name, pattern in (("full", c.Full()), ("window", c.Windowed(4)), ("broken", c.Windowed(0))):
        rows[name] = tiny_config(corpus, num_steps=3, eval_every=3)
        rows[name].model.attention.pattern = pattern
    return c.Ablation("Test table", rows, baseline="full", seeds=(0, 1), timing_steps=1)


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


def test_a_second_call_skips_finished_runs_and_gives_the_same_quality(table, corpus, capsys):
    workdir, rows, _ = table
    again = run_ablation(ablation(corpus), workdir)
    assert capsys.readouterr().out.count("nothing to do") == 6
    assert [row.quality() for row in again] == [row.quality() for row in rows]


def test_a_table_refuses_to_mix_budgets(table, corpus, tmp_path):
    workdir, _, _ = table
    longer = ablation(corpus)
    for config in longer.rows.values():
        config.train.num_steps = 4
    rows = run_ablation(longer, workdir)
    assert "num_steps=3, now 4; use another workdir" in rows[0].error
    file = tmp_path / "table.py"
    file.write_text(
        "from dsv3_jax import config as c\n"
        "def get_ablation():\n"
        "    rows = {'a': c.Config(), 'b': c.Config(train=c.TrainConfig(batch_size=16))}\n"
        "    return c.Ablation('t', rows, baseline='a')\n"
    )
    with pytest.raises(c.ConfigError, match="row 'b' differs from 'a'"):
        c.load_ablation(str(file))


def test_statistics_by_hand():
    rows = [Row(name, [0, 1], {"a": values}) for name, values in (("x", [1.0, 1.2]), ("y", [2.0, 2.2]))]
    # pooled s = sqrt(0.02), 2 degrees of freedom, t = 4.3027, n = 2
    assert smallest_effect(rows) == pytest.approx(4.3027 * np.sqrt(0.02), rel=1e-4)
    assert verdict(rows[1], rows[0], 0.5) == "worse" and verdict(rows[1], rows[0], 1.5) == "inconclusive at this scale"
    assert smallest_effect([Row("x", [0], {"a": [1.0]})]) == float("inf")
