"""From a `DataConfig` to packed rows by domain and split, and to an iterator over training batches."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.data import corpora
from dsv3_jax.data.packing import PackedRows, TokenFile
from dsv3_jax.data.tokenizers import Tokenizer, make_tokenizer
from dsv3_jax.runtime import cache_folder

FORMAT = 1  # of the token files
ENCODE_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Packed rows of each domain, split by document, and the tokenizer they were made with.

    `fingerprints` of the tokenizer and of all documents change when the text does.
    """

    config: DataConfig
    tokenizer: Tokenizer
    train: dict[str, PackedRows]
    held_out: dict[str, PackedRows]
    fingerprints: dict[str, str]

    def iterator(self, batch_size: int) -> Any:
        """An endless, checkpointable iterator over training batches: dicts of int32 [batch, length].

        Each domain is shuffled anew in every epoch; domains are mixed by weight. The order depends on `config.seed`
        and the count of batches alone.
        """
        parts, weights = [], []
        for index, domain in enumerate(self.config.domains):
            if not domain.weight:
                continue
            rows = grain.MapDataset.source(self.train[domain.name])
            parts.append(rows.seed(self.config.seed + index).shuffle().repeat())
            weights.append(domain.weight)
        mixed = grain.MapDataset.mix(parts, weights)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
        return iter(mixed.batch(batch_size, drop_remainder=True).to_iter_dataset(read_options=options))


def batches(rows: PackedRows, batch_size: int, limit: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Every row once, in order, or `limit` rows spread evenly; the last batch is filled up with empty rows."""
    count = len(rows) if limit is None else min(limit, len(rows))
    chosen = np.linspace(0, len(rows) - 1, count).round().astype(int) if count else []
    for start in range(0, count, batch_size):
        group = [rows[int(i)] for i in chosen[start : start + batch_size]]
        group += [{k: np.zeros_like(v) for k, v in group[0].items()}] * (batch_size - len(group))
        yield {name: np.stack([row[name] for row in group]) for name in group[0]}


def load_dataset(config: DataConfig, vocab_size: int) -> Dataset:
    """Fetches corpora, trains or reads the tokenizer, tokenizes (cached by content) and packs.

    Raises:
      ConfigError: missing or unusable corpora, a tokenizer that is not byte-level, or one larger than `vocab_size`.
    """
    found = {}
    for index, domain in enumerate(config.domains):
        if not domain.weight:
            continue
        documents = corpora.documents(domain.corpus)
        found[domain.name] = corpora.split(documents, config.held_out_fraction, f"config.data.domains.{index}")
    tokenizer = make_tokenizer(config.tokenizer, {name: [d.text for d in train] for name, (train, _) in found.items()})
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"config.model.vocab_size={vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens; raise it to that"
        )
    documents_key = hashlib.sha256()
    for name, splits in sorted(found.items()):
        for document in (*splits[0], *splits[1]):
            documents_key.update(hashlib.sha256(f"{name}/{document.name}/{document.text}".encode()).digest())
    index = {domain.name: number for number, domain in enumerate(config.domains)}
    length, max_segments = config.sequence_length, config.max_segments
    packed = [
        {
            name: PackedRows(_token_file(splits[side], tokenizer), length, max_segments, index[name])
            for name, splits in found.items()
        }
        for side in (0, 1)
    ]
    fingerprints = {"tokenizer": tokenizer.fingerprint, "documents": documents_key.hexdigest()}
    return Dataset(config, tokenizer, packed[0], packed[1], fingerprints)


def _token_file(documents: list[corpora.Document], tokenizer: Tokenizer) -> TokenFile:
    """Tokens of some documents, from the cache where they are there."""
    key = hashlib.sha256(json.dumps([FORMAT, tokenizer.fingerprint]).encode())
    for document in documents:
        key.update(hashlib.sha256(document.text.encode()).digest())
    folder = cache_folder() / "tokens" / key.hexdigest()[:24]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=folder.parent)
        try:
            encoded = []
            for start in range(0, len(documents), ENCODE_BATCH):
                texts = [document.text for document in documents[start : start + ENCODE_BATCH]]
                for ids in tokenizer.encode_batch(texts):
                    encoded.append(np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]).astype(np.uint32))
            text_bytes = sum(len(document.text.encode()) for document in documents)
            counted = sum(int(tokenizer.bytes_V[ids].sum()) for ids in encoded)
            if counted != text_bytes:
                raise ConfigError(
                    f"config.data.tokenizer: its tokens stand for {counted} bytes of {text_bytes}; it must be "
                    "byte-level, without normaliser, prefix space or truncation"
                )
            TokenFile.write(folder.parent / temporary / "new", encoded, text_bytes)
            if not folder.is_dir():
                os.replace(folder.parent / temporary / "new", folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return TokenFile.read(folder)
