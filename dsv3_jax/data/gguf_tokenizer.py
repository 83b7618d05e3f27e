"""The tokenizer inside a GGUF file: byte-level BPE ("gpt2"), or SentencePiece's BPE ("llama")."""

import pathlib
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from dsv3_jax.config import ConfigError
from dsv3_jax.data.gguf_file import GgufFile, open_gguf
from dsv3_jax.data.tokenizers import Tokenizer

KEY = "tokenizer.ggml."
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types of the format
SPACE = "▁"  # SentencePiece's

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is cut into words before pairs are merged: each expression cuts the pieces that those before it left.
PRE_TOKENIZERS = {
    "gpt-2": (GPT2_WORDS,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "smollm": (r"\p{N}", GPT2_WORDS),
    "llama-bpe": (LLAMA3_WORDS,),
    "qwen2": (LLAMA3_WORDS.replace("{1,3}", ""),),
}


def gguf_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """The tokenizer of a GGUF file, with its begin and end tokens and its chat template.

    Raises:
      ConfigError: the file has no tokenizer, or one of a kind that is not read (kinds that are read are named).
    """
    file = open_gguf(path)
    tokens = _get(file, "tokens")
    inner = _inner(file, tokens)
    special, stop_ids = {}, []
    for what in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        token_id = file.metadata.get(f"{KEY}{what}_token_id")
        if token_id is not None and 0 <= token_id < len(tokens):
            name = {"unknown": "unk", "padding": "pad"}.get(what, what)
            special[f"{name}_token"] = tokens[token_id]
            stop_ids += [token_id] if what in ("eos", "eot", "eom") else []
    return Tokenizer(
        inner,
        special.get("bos_token"),
        special.get("eos_token"),
        add_bos=file.metadata.get(f"{KEY}add_bos_token", _begins_with_bos(file)),
        stop_ids=stop_ids,
        special_tokens=special,
        chat_template=file.metadata.get("tokenizer.chat_template"),
    )


def _begins_with_bos(file: GgufFile) -> bool:
    """Where the file does not say: llama.cpp's rule."""
    return file.metadata[f"{KEY}model"] == "llama" or file.metadata.get(f"{KEY}pre") == "llama-bpe"


def _get(file: GgufFile, name: str) -> Any:
    if KEY + name not in file.metadata:
        raise ConfigError(f"{file.path}: has no {KEY}{name}; the tokenizer is not in the file")
    return file.metadata[KEY + name]


def _inner(file: GgufFile, tokens: list[str]) -> tokenizers.Tokenizer:
    model = _get(file, "model")
    match model:
        case "gpt2":
            inner = _byte_level(file, tokens)
        case "llama":
            inner = _sentence_piece(file, tokens)
        case _:
            raise ConfigError(f"{file.path}: {KEY}model={model!r} is not read; models that are: gpt2, llama")
    types = file.metadata.get(KEY + "token_type", [])
    for token, kind in zip(tokens, types, strict=False):
        if kind in (CONTROL, USER_DEFINED):
            added = AddedToken(token, special=kind == CONTROL, normalized=False)
            (inner.add_special_tokens if kind == CONTROL else inner.add_tokens)([added])
    return inner


def _byte_level(file: GgufFile, tokens: list[str]) -> tokenizers.Tokenizer:
    pre = file.metadata.get(KEY + "pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ConfigError(f"{file.path}: {KEY}pre={pre!r} is not read; those that are: {', '.join(PRE_TOKENIZERS)}")
    merges = [tuple(merge.split(" ", 1)) for merge in _get(file, "merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # A word that is a token as it stands is not cut: Llama 3's rule.
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    cuts = [pre_tokenizers.Split(tokenizers.Regex(words), "isolated") for words in PRE_TOKENIZERS[pre]]
    prefix_space = bool(file.metadata.get(KEY + "add_space_prefix", False))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentence_piece(file: GgufFile, tokens: list[str]) -> tokenizers.Tokenizer:
    """SentencePiece merges the neighbours whose joint token scores best; here the same as a list of merges."""
    scores, types = _get(file, "scores"), _get(file, "token_type")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = []
    for index, token in enumerate(tokens):
        if types[index] != NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-float(scores[index]), index, left, right))
    merges.sort()
    unknown = tokens[file.metadata.get(KEY + "unknown_token_id", 0)]
    pairs = [(left, right) for _, _, left, right in merges]
    model = models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    inner = tokenizers.Tokenizer(model)
    prefix = bool(file.metadata.get(KEY + "add_space_prefix", True))
    spaces = [normalizers.Replace(" ", SPACE)]
    inner.normalizer = normalizers.Sequence([*([normalizers.Prepend(SPACE)] if prefix else []), *spaces])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return inner
