"""Published checkpoints into a run's folder and back: same weights, little memory, interruptions."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import dsv3_jax
from dsv3_jax import config as c
from dsv3_jax.data.published_tokenizers import open_tokenizer
from dsv3_jax.data.tokenizers import make_tokenizer, train_bpe
from dsv3_jax.inference.sources import tokenizer_of_run
from dsv3_jax.interop.config_json import write_config
from dsv3_jax.interop.huggingface import flat, load_hf, save_hf
from dsv3_jax.interop.tensors import leaf_shapes
from dsv3_jax.interop.weight_folder import WeightFolder
from dsv3_jax.sharding import make_mesh
from dsv3_jax.training.checkpoints import restore_run, run_config
from dsv3_jax.training.conversion import from_hf, to_hf
from dsv3_jax.training.loop import train
from dsv3_jax.training.step import Trainer
from tests.conftest import ROOT, tiny_config
from tests.interop.test_huggingface import save_float8
from tests.interop.tiny import SIGMOID, latent, random_variables, with_mtp


def model(**changes) -> c.ModelConfig:
    config = latent(SIGMOID, **changes)
    config.vocab_size = 320  # the least that a run's own tokenizer asks for
    return config


def assert_same(actual, expected) -> None:
    actual, expected = flat(actual), flat(expected)
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        assert actual[path].dtype == value.dtype, path
        np.testing.assert_array_equal(actual[path], value, err_msg=path)


def stored(directory) -> dict[str, np.ndarray]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture
def published(tmp_path):
    """bfloat16 weights and float32 biases in several files, with a multi-token-prediction module."""
    config = with_mtp(model(compute_dtype="bfloat16"))
    save_hf(tmp_path / "hf", config, random_variables(config, dtype="bfloat16"), 30_000)
    return tmp_path / "hf"


def test_there_and_back(published, tmp_path):
    seen = []
    from_hf(published, tmp_path / "run", show=lambda done, total: seen.append((done, total)))
    assert len(seen) > 4 and seen[-1][0] == seen[-1][1] and seen == sorted(seen)
    config, variables = dsv3_jax.restore(tmp_path / "run")
    expected_config, expected = load_hf(published)
    assert config == expected_config
    assert_same(variables, expected)
    seen.clear()
    to_hf(tmp_path / "run", tmp_path / "back", 30_000, lambda done, total: seen.append((done, total)))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 4 and seen[-1][0] == seen[-1][1]
    assert_same(stored(tmp_path / "back"), stored(published))


def test_a_small_vocabulary_converts_without_a_tokenizer(tmp_path):
    config = model()
    config.vocab_size = 72  # fewer than the bytes of a tokenizer that is made here
    save_hf(tmp_path / "hf", config, random_variables(config))
    from_hf(tmp_path / "hf", tmp_path / "run")
    assert_same(dsv3_jax.restore(tmp_path / "run")[1], load_hf(tmp_path / "hf")[1])


def test_float8_weights_are_dequantized_on_the_way(tmp_path):
    save_float8(tmp_path / "hf", model(), (16, 12))
    from_hf(tmp_path / "hf", tmp_path / "run")
    assert_same(dsv3_jax.restore(tmp_path / "run")[1], load_hf(tmp_path / "hf")[1])


def test_a_run_on_a_mesh_takes_its_parts(published, tmp_path):
    config = from_hf(published, tmp_path / "run")
    config.mesh = c.MeshConfig(fsdp=2, expert=2)
    trainer = Trainer(config, make_mesh(config.mesh))
    variables, step = restore_run(tmp_path / "run", trainer)
    _, expected = load_hf(published)
    assert step == 0 and variables.keys() == {"params", "selection_bias"} and "mtp" in variables["params"]
    for path, value in flat(expected).items():
        assert flat(variables)[path].dtype == np.float32
        np.testing.assert_array_equal(flat(variables)[path], value.astype(np.float32), err_msg=path)
    w_in = variables["params"]["moe_layers"]["moe"]["w_in"]
    assert {shard.data.shape for shard in w_in.addressable_shards} == {(2, 4, 16, 2, 16)}


def test_an_interrupted_conversion_goes_on_where_it_was(published, tmp_path):
    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        from_hf(published, tmp_path / "run", show=interrupt)
    folder = WeightFolder(tmp_path / "run")
    done = folder.done()
    assert 0 < len(done) < len(stored(published)) and not folder.finished
    with pytest.raises(c.ConfigError, match=r"conversion was interrupted; go on with .*convert.py --from_hf="):
        dsv3_jax.restore(tmp_path / "run")
    sizes = {name: value.nbytes for name, value in stored(published).items()}
    for _ in range(2):
        with (folder.path / "journal.txt").open("a") as journal:
            journal.write("model.layers.1.mlp")  # half a line
        first = []

        def stop_after_one(done, total, first=first):
            first.append(done)
            if len(first) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            from_hf(published, tmp_path / "run", show=stop_after_one)
        assert first[0] == sum(sizes[name] for name in done) < first[1]  # what was done is not done again
        assert done < folder.done() < sizes.keys()
        done = folder.done()
    from_hf(published, tmp_path / "run")
    assert_same(dsv3_jax.restore(tmp_path / "run")[1], load_hf(published)[1])


def test_folders_of_something_else_are_left_alone(published, tmp_path):
    from_hf(published, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.npy")}
    save_hf(tmp_path / "other", model(), random_variables(model(), seed=1))
    with pytest.raises(c.ConfigError, match=f"holds weights from {published}"):
        from_hf(tmp_path / "other", tmp_path / "run")
    with pytest.raises(c.ConfigError, match=r"holds .* as bfloat16 .*, this conversion makes it float32"):
        from_hf(published, tmp_path / "run", dtype="float32")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.npy")}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(c.ConfigError, match="is not empty and holds no converted weights"):
        from_hf(published, tmp_path / "mine")
    with pytest.raises(c.ConfigError, match="holds a checkpoint already"):
        to_hf(tmp_path / "run", published)
    with pytest.raises(c.ConfigError, match="holds no run"):
        to_hf(tmp_path / "nowhere", tmp_path / "new")


def test_a_mixed_checkpoint_is_not_taken_for_one_of_another_dtype(tmp_path):
    variables = random_variables(model(), dtype="bfloat16")
    variables["params"]["final_norm"]["scale"] = variables["params"]["final_norm"]["scale"].astype(np.float32)
    save_hf(tmp_path / "hf", model(), variables)
    config = from_hf(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(c.ConfigError, match=r"params/final_norm/scale as float32 \[32\], .* makes it bfloat16"):
        from_hf(tmp_path / "hf", tmp_path / "run", dtype="bfloat16")
    assert run_config(tmp_path / "run") == config


def test_a_config_that_was_edited_stays(published, tmp_path):
    config = from_hf(published, tmp_path / "run")
    config.data.sequence_length = 16
    (tmp_path / "run" / "config.json").write_text(c.to_json(config))
    assert from_hf(published, tmp_path / "run") == run_config(tmp_path / "run") == config
    config.model.compute_dtype = "float32"
    (tmp_path / "run" / "config.json").write_text(c.to_json(config))
    with pytest.raises(c.ConfigError, match=r"--dtype=bfloat16: .*config.json has compute_dtype='float32'"):
        from_hf(published, tmp_path / "run", dtype="bfloat16")


def test_a_bad_checkpoint_leaves_nothing_behind(published, tmp_path):
    file = sorted(published.glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(c.ConfigError, match=r"truncated"):
        from_hf(published, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_tokenizer_comes_along(published, corpus, tmp_path):
    texts = [path.read_text() for path in sorted(corpus.glob("*.txt"))]
    train_bpe(texts, 300).save(str(published / "tokenizer.json"))
    (published / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|eos|>"}}))
    given = json.loads((published / "config.json").read_text()) | {"bos_token_id": 1}
    (published / "config.json").write_text(json.dumps(given))
    config = from_hf(published, tmp_path / "run")
    path = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    assert config.data.tokenizer == c.TokenizerFile(str(path), "<|bos|>", "<|eos|>")
    assert config.data.sequence_length == 64  # the model's context
    named = json.loads((tmp_path / "run" / "data.json").read_text())["tokenizer"]
    assert named == make_tokenizer(config.data.tokenizer, {}).fingerprint
    to_hf(tmp_path / "run", tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (published / name).read_bytes()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["bos_token_id"] == 1


@pytest.mark.slow
def test_a_trained_run_becomes_a_checkpoint(corpus, tmp_path):
    config = tiny_config(corpus, num_steps=1)
    config.model.attention.pattern, config.model.mtp = c.Full(), c.MultiToken(1)
    result = train(config, tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "hf", 100_000)
    loaded_config, loaded = load_hf(tmp_path / "hf")
    assert loaded_config.attention == config.model.attention
    assert_same(loaded, jax.device_get(result.state.variables()))
    ours, theirs = tokenizer_of_run(tmp_path / "run"), open_tokenizer(tmp_path / "hf")
    np.testing.assert_array_equal(theirs.encode_prompt("the cat"), ours.encode_prompt("the cat"))
    assert theirs.add_bos and theirs.stop_ids == ours.stop_ids and theirs.special_tokens == ours.special_tokens


LARGE = {"num_layers": 7, "num_dense_layers": 1, "dense_dim": 4096}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 730 MB in files of 40 MB."""
    directory = tmp_path_factory.mktemp("large") / "hf"
    config = model(**LARGE)
    config.dim, config.moe.expert_dim, config.moe.num_experts, config.vocab_size = 1024, 512, 16, 4096
    random = np.random.default_rng(0)
    shapes = leaf_shapes(write_config(config)[1].table())
    save_hf(directory, config, {k: random.standard_normal(v, np.float32) for k, v in shapes.items()}, 40_000_000)
    return directory


MEASURE = """
import resource, sys
from dsv3_jax.training.conversion import from_hf, to_hf
import jax; jax.devices()
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
def reset():
    open("/proc/self/clear_refs", "w").write("5")
warm, source, run, back = sys.argv[1:]
from_hf(warm, run + "_warm"); to_hf(run + "_warm", back + "_warm", 10_000)
reset(); start = peak(); from_hf(source, run); print(peak() - start)
reset(); start = peak(); to_hf(run, back, 40_000_000); print(peak() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from /proc")
def test_memory_stays_below_twice_the_largest_file(large, published, tmp_path):
    """Resident memory beyond that of a process that has converted a tiny checkpoint before."""
    largest = max(file.stat().st_size for file in large.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert total > 300e6 and total > 8 * largest
    arguments = [str(published), str(large), str(tmp_path / "run"), str(tmp_path / "back")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    into, out = map(int, done.stdout.split())
    print(f"largest file {largest / 1e6:.0f} MB, all {total / 1e6:.0f} MB; in {into / 1e6:.0f}, out {out / 1e6:.0f} MB")
    assert 0 < into < 2 * largest and 0 < out < 2 * largest
    assert_same(stored(tmp_path / "back"), stored(large))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_conversion_goes_on(large, tmp_path, number):
    command = [sys.executable, "experiments/convert.py", f"--from_hf={large}", f"--workdir={tmp_path / 'run'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    journal = tmp_path / "run" / "weights" / "journal.txt"
    deadline = time.monotonic() + 60
    while not (journal.exists() and "\n" in journal.read_text()):  # the file is there before its first line is
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait(60) == -number
    folder = WeightFolder(tmp_path / "run")
    assert folder.done() and not folder.finished
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "MB/s" in again.stdout and "left" in again.stdout
    assert_same(dsv3_jax.restore(tmp_path / "run")[1], load_hf(large)[1])
