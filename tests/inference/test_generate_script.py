"""generate.py as a user runs it, on a run and on a GGUF file; and where its models come from."""

import re
import shutil

import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.data.tokenizers import train_bpe
from dsv3_jax.inference.generation import Generator
from dsv3_jax.inference.sources import open_gguf, open_hf, open_run, tokenizer_of_run
from dsv3_jax.inference.text import complete
from dsv3_jax.interop.huggingface import save_hf
from dsv3_jax.training.checkpoints import run_config
from dsv3_jax.training.loop import train
from tests.conftest import make_text, tiny_config
from tests.experiments.test_scripts import script
from tests.interop import gguf_files
from tests.interop.tiny import models, random_variables, with_mtp


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """The folder of a run of a few steps, with multi-token prediction."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    config = tiny_config(corpus, num_steps=6)
    config.model.mtp = c.MultiToken(depth=1)
    train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory):
    bpe = train_bpe([make_text(0, 400)], 320)
    tensors = gguf_files.make_tensors(bpe.get_vocab_size())
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "a.gguf", tensors, gguf_files.metadata(), bpe)


def test_a_prompt_is_continued_by_a_run(run):
    result = script("generate", f"--workdir={run}", "--prompt=the cat", "--max_new_tokens=12")
    assert result.returncode == 0, result.stderr
    source = open_run(run)
    generator = Generator(source.config, source.variables, source.max_length)
    prompt = source.tokenizer.encode_prompt("the cat")
    (expected,) = complete(generator, source.tokenizer, [prompt], max_new_tokens=12)
    assert result.stdout == expected.text + "\n" and expected.num_tokens > 0
    assert re.search(rf"{expected.num_tokens} tokens in .* tokens/s", result.stderr)


def test_a_draft_changes_no_text_and_says_what_it_gains(run):
    flags = [f"--workdir={run}", "--prompt=the cat", "--prompt=a", "--max_new_tokens=16"]
    plain, drafted = script("generate", *flags), script("generate", *flags, "--draft=mtp")
    assert drafted.returncode == 0, drafted.stderr
    assert drafted.stdout == plain.stdout
    found = re.search(r"(\d+) of (\d+) drafts accepted \((.*)%\), (.*) tokens a round", drafted.stderr)
    assert found is not None
    accepted, checked = int(found[1]), int(found[2])
    assert 0 <= accepted <= checked > 0 and found[3] == f"{100 * accepted / checked:.1f}" and float(found[4]) >= 1
    gain = r"compilation excluded: (.*) tokens/s with the draft, (.*) without: (.*) times as fast"
    speeds = [float(x) for x in re.search(gain, drafted.stderr).groups()]
    assert speeds[2] == pytest.approx(speeds[0] / speeds[1], abs=0.02)


def test_no_gain_is_told_where_no_draft_was_needed(tmp_path):
    """The first token is a stop id."""
    config = with_mtp(models()["deepseek_v3"])
    variables = random_variables(config)
    variables["params"]["head"][:] = 0  # so that all tokens are equal, and the first one is chosen
    save_hf(tmp_path, config, variables)
    train_bpe(["a"], 60).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    result = script("generate", f"--hf={tmp_path}", "--prompt=a", "--draft=mtp")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "\n" and "0 tokens in" in result.stderr
    assert "no drafts were needed" in result.stderr and "again" not in result.stderr


def test_a_model_that_cannot_draft_is_refused(gguf_path):
    result = script("generate", f"--gguf={gguf_path}", "--prompt=a", "--draft=mtp")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: --draft=mtp: this model has no multi-token-prediction modules (config.model.mtp)" in result.stderr


def test_a_run_of_a_capacity_dispatch_generates_dropless(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = run_config(run)
    config.model.moe.dispatch = c.CapacityDispatch(factor=0.5)
    (copy / "config.json").write_text(c.to_json(config))
    source, dropless = open_run(copy), open_run(run)
    assert source.config == dropless.config and isinstance(source.config.moe.dispatch, c.GroupedDispatch)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "model.moe.dispatch" in said and "grouped" in said


def test_a_batch_from_a_gguf_file_is_seeded_and_stops(gguf_path):
    flags = ["--prompt=the cat", "--prompt=a", "--temperature=1.0", "--top_k=50", "--top_p=0.9", "--min_p=0.01"]
    flags += [f"--gguf={gguf_path}", "--max_new_tokens=16", "--chat"]
    first = script("generate", *flags, "--seed=1")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("--- the cat\n") and "--- a\n" in first.stdout
    assert script("generate", *flags, "--seed=1").stdout == first.stdout
    text = first.stdout.split("--- a\n")[0].removeprefix("--- the cat\n").removesuffix("\n")
    stop = text[3:5]
    cut = script("generate", *flags, "--seed=1", f"--stop={stop}").stdout
    assert cut.startswith("--- the cat\n" + text[: text.index(stop)] + "\n")


def test_a_folder_as_published(tmp_path):
    config = models()["llama"]
    save_hf(tmp_path, config, random_variables(config))
    train_bpe(["a"], 60).save(str(tmp_path / "tokenizer.json"))
    source = open_hf(tmp_path)
    assert source.max_length == config.context_length == 64
    generator = Generator(source.config, source.variables, source.max_length)
    assert len(generator.generate([np.asarray([5, 6, 7])], max_new_tokens=5)[0]) == 5


@pytest.mark.quick
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prompt=x"], "give one of --workdir, --hf and --gguf; none was given"),
        (["--prompt=x", "--workdir=a", "--gguf=b"], "workdir and gguf was given"),
        (["--prompt=x", "--workdir=nowhere"], "holds no run"),
        (["--prompt=x", "--gguf=nowhere.gguf"], "no such file"),
        (["--prompt=x", "--hf=nowhere"], "nowhere"),
        (["--workdir=a"], "--prompt"),
        (["--prompt=x", "--workdir=a", "--top_p=2"], "--top_p=2.0: must be above 0"),
        (["--prompt=x", "--workdir=a", "--min_p=0.1"], "--min_p=0.1: changes nothing at --temperature=0; set --temp"),
    ],
)
def test_what_is_wrong_is_one_line(flags, says):
    result = script("generate", *flags)
    assert result.returncode != 0 and says in result.stderr and "Traceback" not in result.stderr
    assert sum(line.startswith("error:") for line in result.stderr.splitlines()) == 1


def test_a_prompt_longer_than_the_context_is_refused(run):
    result = script("generate", f"--workdir={run}", f"--prompt={'the cat ' * 50}")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(r"error: --prompt: has \d+ tokens, and the context holds 32", result.stderr)


@pytest.mark.quick
def test_help_has_an_example():
    result = script("generate", "--help")
    assert "Example:" in result.stdout and "experiments/generate.py --" in result.stdout


def test_the_tokenizer_of_a_run_needs_no_text(run, tmp_path, corpus):
    saved = tokenizer_of_run(run)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "tokenizer.json").unlink()
    assert tokenizer_of_run(copy).fingerprint == saved.fingerprint  # made again from the text
    train_bpe([make_text(9, 300)], 290).save(str(copy / "tokenizer.json"))
    with pytest.raises(c.ConfigError, match="is not the tokenizer that this run was trained with"):
        tokenizer_of_run(copy)
    (copy / "tokenizer.json").unlink()
    (copy / "data.json").unlink()
    with pytest.raises(c.ConfigError, match="has no tokenizer.json"):
        tokenizer_of_run(copy)


def test_a_gguf_source_has_its_context(gguf_path):
    source = open_gguf(gguf_path)
    assert source.max_length == 64 and source.tokenizer.bos_id == 1
