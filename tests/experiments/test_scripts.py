"""The scripts as a user runs them: help, errors of one line, exit codes."""

import os
import subprocess
import sys

import pytest

from dsv3_jax import config as c
from dsv3_jax.command_line import split_overrides
from tests.conftest import ROOT, tiny_config


def script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, f"experiments/{name}.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.quick
def test_overrides_are_taken_out_in_order():
    argv = ["x", "--config=a", "--config.b.c=1", "--workdir=w", "--config.b.d", "2", "-config.e=x=y"]
    rest, overrides = split_overrides(argv)
    assert rest == ["x", "--config=a", "--workdir=w"]
    assert overrides == [("b.c", "1"), ("b.d", "2"), ("e", "x=y")]
    with pytest.raises(c.ConfigError, match="needs a value"):
        split_overrides(["x", "--config.a"])


@pytest.mark.parametrize("name", ["train", "evaluate", "ablate", "benchmark"])
def test_help_has_an_example(name):
    result = script(name, "--help")
    assert "Example:" in result.stdout and f"experiments/{name}.py --" in result.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("train", ["--config=configs/tiny.py", "--workdir=W", "--config.model.dmi=3"], "did you mean 'dim'"),
        ("train", ["--config=configs/none.py", "--workdir=W"], "no such file"),
        ("train", ["--config=configs/tiny.py", "--workdir=W", "--config.model.moe.router.top_k=99"], "must be at most"),
        ("train", ["--config=configs/tiny.py"], "--workdir"),
        ("train", ["--config=configs/tiny.py", "--workdir=W", "--wrkdir=x"], "Unknown command line flag 'wrkdir'"),
        ("train", ["--config=configs/tiny.py", "--workdir=W", "--config.mesh.data=1024",
                   "--config.train.batch_size=1024"], "needs 1024 devices"),
        ("evaluate", ["--workdir=W"], "holds no run"),
        ("ablate", ["--table=nothing", "--workdir=W"], "there are: attention"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_nothing_is_left_behind(name, arguments, says, tmp_path):
    workdir = tmp_path / "run"
    result = script(name, *[a.replace("--workdir=W", f"--workdir={workdir}") for a in arguments])
    assert result.returncode != 0
    assert says in result.stderr and "Traceback" not in result.stderr
    assert sum(line.startswith("error:") for line in result.stderr.splitlines()) == 1
    assert not workdir.exists()


def test_train_resume_evaluate(corpus, tmp_path):
    config_file, workdir = tmp_path / "c.json", tmp_path / "run"
    config_file.write_text(c.to_json(tiny_config(corpus, num_steps=4, checkpoint_every=2)))
    first = script("train", f"--config={config_file}", f"--workdir={workdir}", "--config.train.num_steps=2")
    assert first.returncode == 0 and "finished at step 2" in first.stdout, first.stderr
    second = script("train", f"--config={config_file}", f"--workdir={workdir}")
    assert second.returncode == 0 and "resuming at step 2 of 4" in second.stdout, second.stderr
    result = script("evaluate", f"--workdir={workdir}")
    assert result.returncode == 0 and "bits/byte" in result.stdout, result.stderr
    assert (workdir / "eval.json").is_file()
