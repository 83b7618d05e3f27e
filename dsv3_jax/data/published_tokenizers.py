"""Tokenizers that come with published models: by name, from a folder or `tokenizer.json`, or from a GGUF file."""

import json
import pathlib
import shutil
from typing import Any

from dsv3_jax.config import ConfigError, DeepSeekTokenizer
from dsv3_jax.data.gguf_tokenizer import gguf_tokenizer
from dsv3_jax.data.tokenizers import Tokenizer, make_tokenizer, read_tokenizer_json

NAMES = ("deepseek",)
TOKENIZER = "tokenizer.json"
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
MODEL = "config.json"  # may name begin and end tokens too


def open_tokenizer(name_or_path: str | pathlib.Path) -> Tokenizer:
    """A tokenizer to generate text with.

    Args:
      name_or_path: "deepseek" (fetched); a `.gguf` file; a folder with `tokenizer.json`, or that file. Beside it
        `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`, `generation_config.json` and
        `config.json` are read where they are there: begin and end tokens, ids that end a text, the chat template.

    Raises:
      ConfigError: there is no such tokenizer, or it cannot be read.
    """
    if name_or_path == "deepseek":
        return make_tokenizer(DeepSeekTokenizer(), {})
    path = pathlib.Path(name_or_path).expanduser()
    if not path.exists():
        raise ConfigError(
            f"tokenizer {str(name_or_path)!r}: no such file or folder, nor a name; names: {', '.join(NAMES)}"
        )
    if path.suffix == ".gguf":
        return gguf_tokenizer(path)
    return _from_json(path / TOKENIZER if path.is_dir() else path)


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path, model: bool = False) -> None:
    """Copies the files that `open_tokenizer` reads, those that are there, into a folder; config.json if `model`."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (TOKENIZER, *SETTINGS, *([MODEL] if model else [])):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _from_json(path: pathlib.Path) -> Tokenizer:
    inner = read_tokenizer_json(path)
    settings = _object(path.parent / "special_tokens_map.json") | _object(path.parent / "tokenizer_config.json")
    special = {name: _content(value) for name, value in settings.items() if name.endswith("_token")}
    special = {name: token for name, token in special.items() if token is not None}
    stop_ids: set[int] = set()
    for name in (MODEL, "generation_config.json"):
        ids = _object(path.parent / name)
        eos_ids = ids.get("eos_token_id")
        stop_ids |= set(eos_ids if isinstance(eos_ids, list) else [] if eos_ids is None else [eos_ids])
        for what in ("bos", "eos"):
            token_id = ids.get(f"{what}_token_id")
            if f"{what}_token" not in special and isinstance(token_id, int):
                token = inner.id_to_token(token_id)
                special |= {} if token is None else {f"{what}_token": token}
    bos, eos = special.get("bos_token"), special.get("eos_token")
    add_bos = settings.get("add_bos_token")
    if add_bos is None:
        begin = inner.encode("", add_special_tokens=True).tokens[:1]
        add_bos = bos is not None and begin == [bos]
    return Tokenizer(
        inner,
        bos,
        eos,
        add_bos=add_bos,
        stop_ids=stop_ids,
        special_tokens=special,
        chat_template=_chat_template(path.parent, settings),
    )


def _object(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


def _content(token: Any) -> str | None:
    """A token is written as its text, or as an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _chat_template(folder: pathlib.Path, settings: dict[str, Any]) -> str | None:
    """`chat_template.jinja`, or what `tokenizer_config.json` holds: one template, or a list of named ones."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
