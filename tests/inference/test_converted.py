"""A converted checkpoint generates what the published one does: the same ids, the same text, the same context."""

import json

import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.data.tokenizers import train_bpe
from dsv3_jax.inference.generation import Generator
from dsv3_jax.inference.sources import Source, open_hf, open_run
from dsv3_jax.inference.text import Completion, complete
from dsv3_jax.interop.huggingface import save_hf
from dsv3_jax.training.conversion import from_hf, to_hf
from tests.conftest import make_text
from tests.interop.tiny import models, random_variables

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
TOKENS = {"bos_token": {"content": "<|bos|>"}, "eos_token": "<|eos|>"}
# File -> what it says, config.json's fields being added to those that the model has.
BEGINS = {
    "tokenizer_config.json": TOKENS | {"add_bos_token": True, "chat_template": TEMPLATE},
    "generation_config.json": {"eos_token_id": [2, 7]},
}
BEGINS_NOT = {
    "config.json": {"bos_token_id": 1, "eos_token_id": 2},
    "tokenizer_config.json": {"add_bos_token": False},
    "chat_template.jinja": TEMPLATE,
}


def publish(folder, files: dict, context_length: int = 64) -> None:
    """A random Llama with a tokenizer and these files."""
    config = models()["llama"]
    config.vocab_size, config.context_length = 300, context_length
    save_hf(folder, config, random_variables(config))
    train_bpe([make_text(0, 300)], 300).save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        if name == "config.json":
            value = json.loads((folder / name).read_text()) | value
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def continuations(source: Source) -> tuple[list[np.ndarray], list[Completion]]:
    """Ids of a prompt and of a chat, and what comes after them, greedily."""
    chat = [{"role": "user", "content": "one dog"}]
    prompts = [source.tokenizer.encode_prompt("the cat sat"), source.tokenizer.encode_chat(chat)]
    generator = Generator(source.config, source.variables, source.max_length)
    return prompts, complete(generator, source.tokenizer, prompts, max_new_tokens=12)


@pytest.mark.parametrize(("files", "first", "context"), [(BEGINS, 1, 64), (BEGINS_NOT, None, 8192)])
def test_the_same_ids_and_the_same_text(files, first, context, tmp_path):
    publish(tmp_path / "hf", files, context)
    from_hf(tmp_path / "hf", tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "back")
    published = open_hf(tmp_path / "hf")
    prompts, expected = continuations(published)
    assert (prompts[0][0] == 1) == (first == 1) and prompts[1][0] == 1 and prompts[1][-1] == 2
    assert all(completion.num_tokens > 0 for completion in expected)
    for source in (open_run(tmp_path / "run"), open_hf(tmp_path / "back")):
        assert source.max_length == published.max_length == context
        assert source.config == published.config
        assert source.tokenizer.stop_ids == published.tokenizer.stop_ids == ({2, 7} if first else {2})
        ids, actual = continuations(source)
        for ours, theirs in zip(ids, prompts, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert actual == expected


def test_a_tokenizer_that_no_run_could_train_with_still_generates(tmp_path, capsys):
    """It names no token that ends a text."""
    publish(tmp_path / "hf", {"chat_template.jinja": "{{ messages[0].content }}"})
    config = from_hf(tmp_path / "hf", tmp_path / "run")
    assert "a run cannot use the tokenizer" in capsys.readouterr().out
    assert config.data.tokenizer == c.TokenizerFile(str(tmp_path / "run" / "tokenizer" / "tokenizer.json"))
    assert json.loads((tmp_path / "run" / "data.json").read_text()) == {"tokenizer": None}
    assert continuations(open_run(tmp_path / "run"))[1] == continuations(open_hf(tmp_path / "hf"))[1]


def test_a_checkpoint_without_a_tokenizer_says_where_it_belongs(tmp_path):
    publish(tmp_path / "hf", {})
    (tmp_path / "hf" / "tokenizer.json").unlink()
    from_hf(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(c.ConfigError, match=f"{tmp_path / 'run' / 'tokenizer'}': no such file"):
        open_run(tmp_path / "run")
