"""The table of combinations: refusals name both options, covers hold what they say, checks can fail, the grid says what
happened. The cover of every value once runs as a user runs it."""

import itertools
import json
import os
import pathlib
import subprocess
import sys
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.ablation import cell_checks, combinations_report
from dsv3_jax.ablation.combinations import (
    AXES,
    base_config,
    cover,
    decodes,
    default_cell,
    make_config,
    names_option,
    options,
    refusal,
    refused_pairs,
)
from dsv3_jax.config.attention import LayerPattern
from dsv3_jax.models.transformer import TransformerOutput
from dsv3_jax.ops.patterns import layer_patterns
from tests.conftest import ROOT

RESULT = ROOT / "docs" / "results" / "combinations.md"


@pytest.fixture(scope="module")
def pairwise():
    return cover(2)


@pytest.mark.quick
def test_every_value_alone_is_accepted_and_every_kind_of_every_union_is_a_value():
    for axis, name in options():
        assert refusal({axis: name}) is None, (axis, name)
        assert bool(AXES[axis][name]) == (name != default_cell()[axis]), "the first value, and it alone, is the base's"
    models = [make_config({axis: name}).model for axis, name in options()]
    mixtures = [model.moe for model in models if model.moe is not None]
    seen = {
        LayerPattern: [pattern for model in models for pattern in layer_patterns(model.attention.pattern)],
        c.Projection: [model.attention.projection for model in models],
        c.Router: [moe.router for moe in mixtures],
        c.Expert: [moe.expert for moe in mixtures],
        c.Dispatch: [moe.dispatch for moe in mixtures],
        c.Combination: [moe.combination for moe in mixtures],
    }
    for union, values in seen.items():
        assert {type(value) for value in values} == set(get_args(union))
    assert {model.compute_dtype for model in models} == set(c.DTYPES)
    assert {model.remat for model in models} == set(c.REMAT_POLICIES)


@pytest.mark.quick
def test_a_refused_pair_names_both_options():
    assert len(refused_pairs()) > 0
    for pair, text in refused_pairs().items():
        for option in pair:
            assert names_option(text, option), f"{text!r} does not name {option}"


@pytest.mark.quick
def test_a_refusal_that_names_one_option_is_noticed():
    text = "config.model.moe.expert=deep: is not possible"
    assert names_option(text, ("experts", "deep")) and not names_option(text, ("router", "no experts"))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda config: setattr(config.model, "num_dense_layers", 3), "num_dense_layers=3: leaves no layer for .*moe"),
        (lambda config: setattr(config.model, "mtp", c.MultiToken(24)), "mtp.depth=24: .* data.sequence_length=24"),
    ],
)
def test_what_would_do_nothing_is_refused(edit, says):
    config = base_config()
    edit(config)
    with pytest.raises(c.ConfigError, match=says):
        config.validate()


@pytest.mark.quick
def test_covers_hold_every_value_and_every_accepted_pair(pairwise):
    assert {option for cell in cover(1) for option in cell.items()} == set(options())
    cells = pairwise
    pairs = {frozenset(pair) for cell in cells for pair in itertools.combinations(cell.items(), 2)}
    possible = {frozenset(p) for p in itertools.combinations(options(), 2) if p[0][0] != p[1][0]}
    assert pairs == possible - refused_pairs().keys()
    refused = {("dispatch", "capacity"), ("experts", "deep")}
    assert {option for option in options() if not decodes(dict([option]))} == refused
    decoding = [cell for cell in cells if not refused & set(cell.items())]
    decoded = {frozenset(pair) for cell in decoding for pair in itertools.combinations(cell.items(), 2)}
    assert decoded == {pair for pair in pairs if not pair & refused}
    assert all(list(cell) == list(AXES) and refusal(cell) is None for cell in cells)
    assert cells == cover(2)
    assert len(cover(1)) < 12 and len(cells) < 80


# Checks of a cell, on outputs that are made up.


def fake_forward(leak: float):
    """Logits that say the token, its mean with those before it, and a little of all of them."""

    def forward(variables, tokens, positions, segment_ids, **tasks):
        x = np.asarray(tokens, np.float32) / 300
        before = np.cumsum(x, axis=1) / np.arange(1, x.shape[1] + 1)
        logits = np.stack([x, before + leak * x.mean(axis=1, keepdims=True)], axis=-1)
        return TransformerOutput(jnp.asarray(logits), jnp.zeros(()), None, {})

    return forward


@pytest.mark.quick
def test_the_check_of_causality_sees_a_leak():
    config = base_config()
    batch = cell_checks.make_batch(config)
    assert cell_checks._check_causality(config, fake_forward(0.0), {}, batch) < 1e-7
    with pytest.raises(cell_checks.CheckFailed, match="change what comes before them: relative error"):
        cell_checks._check_causality(config, fake_forward(0.1), {}, batch)
    still = lambda *args, **tasks: fake_forward(0.0)({}, np.zeros((2, 24)), *args[2:])  # noqa: E731
    with pytest.raises(cell_checks.CheckFailed, match="change nothing that comes after"):
        cell_checks._check_causality(config, still, {}, batch)


@pytest.mark.quick
def test_bfloat16_may_choose_otherwise_for_one_token_in_four_and_float32_never():
    exact = [np.ones((8, 3), np.float32)]
    config = base_config()

    def changed(rows: int, by: float) -> list[np.ndarray]:
        other = exact[0].copy()
        other[:rows] += by
        return [other]

    assert cell_checks._difference(config, "it", changed(8, 1e-5), exact) == pytest.approx(1e-5, rel=0.01)
    with pytest.raises(cell_checks.CheckFailed, match="it: relative error 1.0e-03 > 2e-05"):
        cell_checks._difference(config, "it", changed(1, 1e-3), exact)
    with pytest.raises(cell_checks.CheckFailed):
        cell_checks._difference(config, "it", [np.full((8, 3), np.nan)], exact)
    config.model.compute_dtype = "bfloat16"
    assert cell_checks._difference(config, "it", changed(2, 1.0), exact) == 0
    with pytest.raises(cell_checks.CheckFailed):
        cell_checks._difference(config, "it", changed(3, 1.0), exact)


# Journal and grid.


@pytest.mark.quick
def test_failed_cells_are_tried_again_passed_ones_are_not_and_the_grid_says_which(tmp_path, monkeypatch):
    cells, ran, broken = cover(1), [], {"pattern": "sparse"}

    def fake(cell):
        ran.append(cell)
        failed = broken.items() <= cell.items()
        return combinations_report.Outcome(cell, 1.0, "CheckFailed: it leaks" if failed else "", [3.0, 2.0], 0.0, 1e-7)

    monkeypatch.setattr(combinations_report, "run_cell", fake)
    first = combinations_report.run_cells(cells, tmp_path)
    assert ran == cells and [outcome.cell for outcome in first] == cells
    page = combinations_report.markdown(first, "once", "the command")
    assert f"**{len(cells) - 1} of {len(cells)} passed**" in page and "it leaks" in page and "the command" in page
    lines, reasons = combinations_report.grid(first, refused_pairs())
    rows = {(line.split(" | ")[1], int(line.split(" | ")[2])): line.split(" | ")[3:] for line in lines[2:]}
    number = {option: index for index, option in enumerate(options())}
    sparse, none = number["pattern", "sparse"], number["router", "no experts"]
    assert rows["sparse", sparse + 1][number["projection", "latent"]] == "✗"
    marks = rows["deep", number["experts", "deep"] + 1]
    assert reasons[int(marks[none]) - 1] == "config.model.moe is None, which has no field 'expert'"
    assert rows["full", number["pattern", "full"] + 1][number["projection", "latent"]] == "✓"
    ran.clear()
    broken["pattern"] = "none"
    again = combinations_report.run_cells(cells, tmp_path)
    assert [cell["pattern"] for cell in ran] == ["sparse"] and not any(outcome.error for outcome in again)
    ran.clear()
    combinations_report.run_cells(cells, tmp_path)
    assert not ran


@pytest.mark.quick
def test_what_breaks_in_a_cell_is_its_error(monkeypatch):
    def broken(config):
        raise ValueError("shapes differ\nmore")

    monkeypatch.setattr(combinations_report, "check_cell", broken)
    assert combinations_report.run_cell(default_cell()).error == "ValueError: shapes differ"


@pytest.mark.quick
def test_the_committed_table_is_of_these_axes_and_nothing_in_it_failed(pairwise):
    page = RESULT.read_text()
    for axis, name in options():
        assert f"| {name} |" in page and f"| {axis} |" in page
    cells = cover(2)
    assert (
        f"**{len(cells)} of {len(cells)} passed**" in page and "✗" not in page.split("## Cells")[0].split("\n| axis")[1]
    )
    assert all(combinations_report.describe(cell) in page for cell in cells)


# As a user runs it.


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    script = [sys.executable, "experiments/combinations.py", *arguments]
    return subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)


def test_help_has_an_example():
    result = command("--help")
    assert "Example:" in result.stdout and "experiments/combinations.py --" in result.stdout


@pytest.mark.slow
def test_every_value_once(tmp_path: pathlib.Path):
    result = command("--cover=once", f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stdout + result.stderr
    outcomes = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [outcome["cell"] for outcome in outcomes] == cover(1)
    for outcome in outcomes:
        assert outcome["losses"][-1] < outcome["losses"][0]
        refused = {("dispatch", "capacity"), ("experts", "deep")} & set(outcome["cell"].items())
        assert bool(refused) == (outcome["decoded"] is None)
        assert not refused or any(names_option(outcome["no_cache"], option) for option in refused)
    assert "| axis | value |" in (tmp_path / "combinations.md").read_text()
