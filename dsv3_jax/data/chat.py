"""Chat templates: a conversation as the text that a model was tuned on. Templates come with checkpoints, as Jinja."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from dsv3_jax.config import ConfigError


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks what a model wrote, for training; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Plain JSON: Jinja's own filter also escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """A template can neither reach attributes that begin with an underscore nor change what it is given."""
    extensions = ["jinja2.ext.loopcontrols", _Generation]
    result = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    result.filters["tojson"] = _tojson
    result.globals["raise_exception"] = _raise_exception
    result.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return result


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    **variables: Any,
) -> str:
    """A conversation as text, special tokens spelt out.

    Args:
      template: Jinja, as in a published `tokenizer_config.json`.
      messages: each with a "role" ("system", "user", "assistant") and "content".
      special_tokens: what the template knows as `bos_token`, `eos_token`, ….
      add_generation_prompt: end with what begins the model's answer.
      tools, documents: what the template is told of functions to call and of texts to read; None if there are none.
      variables: others that the template reads, as `enable_thinking`.

    Raises:
      ConfigError: the template is not valid, refuses the conversation, or tries what the sandbox forbids.
    """
    try:
        return (
            _environment()
            .from_string(template)
            .render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                documents=documents,
                **special_tokens,
                **variables,
            )
        )
    except Exception as error:  # a template is a program: it may fail in any way
        message = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"the chat template cannot render this conversation: {message}") from None
