"""Runs in a folder: exact resume, logs, evaluation, signals, and folders that must not be touched."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import dsv3_jax
from dsv3_jax import config as c
from dsv3_jax.data.pipeline import batches, load_dataset
from dsv3_jax.evaluation.bits_per_byte import evaluate
from dsv3_jax.models.transformer import Transformer
from dsv3_jax.sharding import make_mesh
from dsv3_jax.training.loop import read_metrics, train
from dsv3_jax.training.step import Trainer
from tests.conftest import ROOT, tiny_config


@pytest.fixture(scope="module")
def shared(corpus):
    """A trainer and a dataset for all runs of this module: one compilation."""
    config = tiny_config(corpus)
    return {"trainer": Trainer(config, make_mesh(config.mesh)), "dataset": load_dataset(config.data, 320)}


@pytest.fixture(scope="module")
def straight(corpus, shared, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    config = tiny_config(corpus, eval_every=10)
    return config, workdir, train(config, workdir, **shared)


def test_resume_is_exact(straight, corpus, shared, tmp_path):
    """20 steps, and 10 + 10 with everything built anew in between: the same losses and parameters, bit for bit."""
    _, workdir, result = straight
    config = tiny_config(corpus, num_steps=10)
    train(config, tmp_path / "run", **shared)
    config = tiny_config(corpus)
    fresh = {"trainer": Trainer(config, make_mesh(config.mesh)), "dataset": load_dataset(config.data, 320)}
    resumed = train(config, tmp_path / "run", **fresh)
    for a, b in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(result.state), strict=True):
        np.testing.assert_array_equal(a, b)
    keys = ("step", "loss", "loss/lm", "loss/balance", "grad_norm", "learning_rate", "tokens_seen")
    lines = [[{k: line[k] for k in keys} for line in read_metrics(w)] for w in (workdir, tmp_path / "run")]
    assert lines[0] == lines[1]


def test_metrics_have_a_line_a_step_with_what_is_promised(straight):
    config, workdir, _ = straight
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines] == list(range(1, 21))
    for line in lines:
        assert {"loss", "loss/lm", "loss/balance", "grad_norm", "learning_rate", "tokens_per_second"} <= set(line)
        assert {"router/max_over_mean", "router/dropped"} <= set(line)
        assert line["loss"] == pytest.approx(line["loss/lm"] + 1e-2 * line["loss/balance"], rel=1e-5)
        assert 1 <= line["router/max_over_mean"] <= 8 and line["router/dropped"] == 0
    assert lines[-1]["loss/lm"] < lines[0]["loss/lm"]
    assert "held_out/words/bits_per_byte" in lines[9] and "held_out/words/bits_per_byte" not in lines[10]
    assert list((workdir / "tensorboard").iterdir())
    assert c.from_json((workdir / "config.json").read_text()) == config


def test_held_out_bits_per_byte_is_the_sum_over_all_logits(straight, shared):
    config, _, result = straight
    dataset, variables = shared["dataset"], jax.device_get(result.state.variables())
    measured = evaluate(config, variables, dataset, make_mesh(config.mesh))["words"]
    nats = tokens = 0.0
    for batch in batches(dataset.held_out["words"], 4):
        output = Transformer(config.model).apply(variables, batch["tokens"], batch["positions"], batch["segment_ids"])
        log_probability = np.asarray(jax.nn.log_softmax(output.logits_BTV), np.float64)
        picked = np.take_along_axis(log_probability, batch["targets"][..., None], -1)[..., 0]
        nats -= picked[batch["segment_ids"] > 0].sum()
        tokens += (batch["segment_ids"] > 0).sum()
    text_bytes = dataset.held_out["words"]._file.text_bytes
    assert measured.bytes == text_bytes and measured.tokens == tokens
    assert measured.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


def test_a_restored_run_gives_the_same_logits(straight):
    _, workdir, result = straight
    model_config, variables = dsv3_jax.restore(workdir)
    tokens = np.arange(10)[None]
    model = dsv3_jax.Transformer(model_config)
    expected = model.apply(result.state.variables(), tokens).logits_BTV
    np.testing.assert_array_equal(model.apply(variables, tokens).logits_BTV, expected)


def test_a_finished_run_says_so_and_does_nothing(straight, shared, capsys):
    config, workdir, _ = straight
    before = (workdir / "metrics.jsonl").read_bytes()
    assert train(config, workdir, **shared).step == 20
    assert "already at step 20 of 20" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_init_from_takes_the_weights_and_nothing_else(straight, corpus, shared, tmp_path):
    _, workdir, result = straight
    config = tiny_config(corpus, num_steps=1)
    train(config, tmp_path / "run", init_from=str(workdir), **shared)
    first, last = read_metrics(tmp_path / "run")[0], read_metrics(workdir)[-1]
    assert first["step"] == 1 and first["loss/lm"] < last["loss/lm"] + 0.5
    other = tiny_config(corpus)
    other.model = dataclasses.replace(other.model, num_layers=3)
    with pytest.raises(c.ConfigError, match="its config.model.num_layers is 2, this run.s 3; the weights do not fit"):
        train(other, tmp_path / "other", init_from=str(workdir))
    assert not (tmp_path / "other").exists()
    (tmp_path / "unborn").mkdir()
    (tmp_path / "unborn" / "config.json").write_text(c.to_json(config))
    with pytest.raises(c.ConfigError, match="holds no checkpoint yet"):
        train(config, tmp_path / "other", init_from=str(tmp_path / "unborn"), **shared)
    assert not (tmp_path / "other").exists()


def folder_state(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_folder_of_another_config_or_of_other_files_is_left_alone(straight, corpus, shared, tmp_path):
    config, workdir, _ = straight
    before = folder_state(workdir)
    other = tiny_config(corpus)
    other.train.optimizer.learning_rate = 0.5
    with pytest.raises(c.ConfigError, match=r"config.train.optimizer.learning_rate=0.01, now 0.5"):
        train(other, workdir, **shared)
    assert folder_state(workdir) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(c.ConfigError, match="is not empty and holds no run"):
        train(config, tmp_path, **shared)
    assert folder_state(tmp_path) == {"notes.txt": b"mine"}


def test_a_run_is_tied_to_its_text(straight, corpus, shared, tmp_path):
    """The config names a folder; what is in it may change."""
    config, workdir, _ = straight
    changed = dataclasses.replace(shared["dataset"], fingerprints={"tokenizer": "other", "documents": "other"})
    before = folder_state(workdir)
    with pytest.raises(c.ConfigError, match="was trained with another tokenizer"):
        train(config, workdir, trainer=shared["trainer"], dataset=changed)
    with pytest.raises(c.ConfigError, match="was trained with another tokenizer"):
        train(config, tmp_path / "new", init_from=str(workdir), trainer=shared["trainer"], dataset=changed)
    assert folder_state(workdir) == before and not (tmp_path / "new").exists()
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    data = dataclasses.replace(config.data, domains=(c.Domain("words", c.TextFiles(str(copy))),))
    assert load_dataset(data, 320).fingerprints == shared["dataset"].fingerprints
    (copy / "00.txt").write_text("something else entirely")
    assert load_dataset(data, 320).fingerprints["documents"] != shared["dataset"].fingerprints["documents"]


def test_half_a_line_and_lines_after_the_checkpoint_are_dropped(corpus, shared, tmp_path):
    """As a killed process leaves them."""
    train(tiny_config(corpus, num_steps=10), tmp_path / "run", **shared)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 11, "loss": 1.0, "tokens_seen": 9}) + "\n" + '{"step": 12, "lo')
    train(tiny_config(corpus, num_steps=12), tmp_path / "run", **shared)
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert "grad_norm" in lines[10]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_exits_with_zero_and_the_run_goes_on(corpus, tmp_path, number):
    config_file = tmp_path / "config.json"
    config = tiny_config(corpus, num_steps=100_000, checkpoint_every=0)
    config.train.schedule.total_steps = 100_000
    config_file.write_text(c.to_json(config))
    command = [sys.executable, "experiments/train.py", f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(read_metrics(tmp_path / "run")) > 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    stopped = read_metrics(tmp_path / "run")[-1]["step"]
    assert f"stopped at step {stopped}" in output
    again = subprocess.run(
        [*command, f"--config.train.num_steps={stopped + 3}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert again.returncode == 0 and f"resuming at step {stopped}" in again.stdout, again.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, stopped + 4))
