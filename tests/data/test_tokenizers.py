"""Tokenizers by name or path, and chat templates, those of strangers included."""

import json
import pathlib

import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.data.chat import render_chat
from dsv3_jax.data.published_tokenizers import open_tokenizer
from dsv3_jax.data.tokenizers import run_tokenizer, train_bpe
from tests.conftest import make_text

pytestmark = pytest.mark.quick
MESSAGES = [{"role": "user", "content": "hi <there> & é"}]
TEMPLATE = """
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- bos_token }}
    {%- endif %}
{{- '[' ~ message.role ~ '] ' ~ message.content ~ eos_token }}
{% endfor %}
{%- if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"""


def write_folder(folder: pathlib.Path, **files) -> pathlib.Path:
    """A tokenizer with these JSON files beside it."""
    inner = train_bpe([make_text(0, 300)], 300)
    inner.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_a_folder_says_how_texts_begin_and_end_and_what_a_chat_is(tmp_path):
    settings = {
        "bos_token": {"content": "<|bos|>", "special": True},
        "eos_token": "<|eos|>",
        "unk_token": None,
        "add_bos_token": True,
        "chat_template": TEMPLATE,
    }
    write_folder(tmp_path, tokenizer_config=settings, generation_config={"eos_token_id": [2, 0]}, config={})
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = open_tokenizer(path)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 2, {0, 2})
        assert tokenizer.special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
        assert tokenizer.encode_prompt("the cat").tolist() == [1, *tokenizer.encode("the cat")]
        ids = tokenizer.encode_chat([{"role": "user", "content": "the cat"}]).tolist()
        expected = [1, *tokenizer.encode("[user] the cat"), 2, *tokenizer.encode("\n[assistant] ")]
        assert ids == expected


def test_what_the_files_do_not_say_follows_from_the_others(tmp_path):
    write_folder(tmp_path, config={"bos_token_id": 1, "eos_token_id": 2})
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 2, {2})
    assert not tokenizer.add_bos  # nothing in the file puts it there
    inner = json.loads((tmp_path / "tokenizer.json").read_text())
    inner["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [1], "tokens": ["<|bos|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(inner))
    assert open_tokenizer(tmp_path).encode_prompt("x")[0] == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    assert open_tokenizer(tmp_path).encode_prompt("x")[0] != 1


def test_a_tokenizer_need_have_no_begin_and_no_end(tmp_path):
    tokenizer = open_tokenizer(write_folder(tmp_path))
    assert tokenizer.stop_ids == frozenset() and not tokenizer.add_bos
    assert tokenizer.decode(tokenizer.encode_prompt("the cat")) == "the cat"
    with pytest.raises(c.ConfigError, match="no token for the begin of a document"):
        _ = tokenizer.bos_id
    with pytest.raises(c.ConfigError, match="no chat template"):
        tokenizer.encode_chat(MESSAGES)


def test_named_templates_and_a_template_file(tmp_path):
    named = [{"name": "tool", "template": "tool"}, {"name": "default", "template": "plain"}]
    write_folder(tmp_path, tokenizer_config={"chat_template": named})
    assert open_tokenizer(tmp_path).chat_template == "plain"
    (tmp_path / "chat_template.jinja").write_text("from the file é", encoding="utf-8")
    assert open_tokenizer(tmp_path).chat_template == "from the file é"


def test_a_user_who_spells_a_special_token_stays_ordinary_text_outside_chats(tmp_path):
    tokenizer = open_tokenizer(write_folder(tmp_path, tokenizer_config={"eos_token": "<|eos|>"}))
    assert 2 not in tokenizer.encode_prompt("x <|eos|>") and 2 in tokenizer.encode("x <|eos|>", special=True)
    assert 2 not in tokenizer.encode("x <|eos|>")


def test_the_tokenizer_of_a_run_comes_back_with_the_same_fingerprint(tmp_path):
    from dsv3_jax.data.tokenizers import make_tokenizer

    made = make_tokenizer(c.BpeTokenizer(300), {"a": [make_text(1, 300)]})
    (tmp_path / "tokenizer.json").write_text(made.to_json(), encoding="utf-8")
    read = run_tokenizer(c.BpeTokenizer(300), tmp_path / "tokenizer.json")
    assert read.fingerprint == made.fingerprint and (read.bos_id, read.eos_id) == (made.bos_id, made.eos_id)
    np.testing.assert_array_equal(read.encode("the cat é"), made.encode("the cat é"))
    with pytest.raises(c.ConfigError, match="has no token <s>; set bos"):
        run_tokenizer(c.TokenizerFile("", bos="<s>"), tmp_path / "tokenizer.json")


def test_what_is_no_tokenizer_is_said(tmp_path):
    with pytest.raises(c.ConfigError, match="'nothing': no such file or folder, nor a name; names: deepseek"):
        open_tokenizer("nothing")
    with pytest.raises(c.ConfigError, match="no such file; expected a tokenizer.json"):
        open_tokenizer(tmp_path)
    write_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(c.ConfigError, match="tokenizer_config.json: not JSON"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(c.ConfigError, match="not a tokenizer.json"):
        open_tokenizer(tmp_path)


# Chat templates


def test_the_features_that_published_templates_use():
    template = "{{ messages | tojson }}{% generation %}!{% endgeneration %}{% for i in [1, 2, 3] %}{% if i == 2 %}"
    template += "{% break %}{% endif %}{{ i }}{% endfor %} {{ strftime_now('%Y') | length }} {{ bos_token }} {{ deep }}"
    text = render_chat(template, MESSAGES, {"bos_token": "<s>"}, deep=True)
    assert text == '[{"role": "user", "content": "hi <there> & é"}]!1 4 <s> True'


@pytest.mark.parametrize("add", [False, True])
def test_lines_of_blocks_leave_no_spaces(add):
    text = render_chat(TEMPLATE, MESSAGES, {"bos_token": "<s>", "eos_token": "</s>"}, add_generation_prompt=add)
    assert text == "<s>[user] hi <there> & é</s>\n" + "[assistant] " * add


def test_a_template_is_rendered_as_transformers_does():
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="the oracle: make peers")
    rendered, _ = utils.render_jinja_template(
        [MESSAGES], chat_template=TEMPLATE, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert render_chat(TEMPLATE, MESSAGES, {"bos_token": "<s>", "eos_token": "</s>"}) == rendered[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ messages[0].__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
        "{{ self.__init__.__globals__.__builtins__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ range(10**9) | list }}",
    ],
)
def test_a_malicious_template_reaches_nothing(template):
    messages = [dict(message) for message in MESSAGES]
    try:
        text = render_chat(template, messages, {})
    except c.ConfigError as error:
        assert "the chat template cannot render this conversation" in str(error)
    else:
        assert text == ""  # an attribute that is not there renders as nothing
    assert messages == MESSAGES


TOOLS = "{% if tools is none and documents is none %}plain{% else %}{{ tools | length }}{% endif %}"


def test_tools_and_documents_that_are_not_given_are_none():
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="the oracle: make peers")
    rendered, _ = utils.render_jinja_template([MESSAGES], chat_template=TOOLS)
    assert render_chat(TOOLS, MESSAGES, {}) == rendered[0] == "plain"
    assert render_chat(TOOLS, MESSAGES, {}, tools=[{"name": "add"}]) == "1"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.index(3, 4, 5, 6) }}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ '{x}'.format() }}", "KeyError"),
        ("{{ '{0}'.format() }}", "IndexError"),
    ],
)
def test_a_template_that_fails_is_one_error(template, says):
    with pytest.raises(c.ConfigError, match=f"the chat template cannot render this conversation: {says}"):
        render_chat(template, MESSAGES, {})


def test_a_template_that_refuses_says_why():
    with pytest.raises(c.ConfigError, match="roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", MESSAGES, {})
    with pytest.raises(c.ConfigError, match="cannot render"):
        render_chat("{% if %}", MESSAGES, {})
