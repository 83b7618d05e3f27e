"""The table without training on a tiny GGUF file: its numbers, its journal, its report, and what it refuses."""

import csv
import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.ablation import pretrained
from dsv3_jax.ablation.pretrained import Cell, held_out_texts, run_pretrained
from dsv3_jax.ablation.pretrained_report import kept, write_report
from dsv3_jax.data import corpora
from dsv3_jax.data.published_tokenizers import open_tokenizer
from dsv3_jax.data.tokenizers import train_bpe
from dsv3_jax.interop.gguf import load_gguf
from dsv3_jax.models.transformer import Transformer
from tests.conftest import make_text
from tests.experiments.test_scripts import script
from tests.interop import gguf_files

CONTEXTS, TOKENS = (8, 16), 48
ROWS: dict[str, c.Pattern] = {"full": c.Full(), "segments": c.Segmented(5, keys="all"), "window": c.Windowed(3, (0,))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A model, and two domains of three documents."""
    folder = tmp_path_factory.mktemp("pretrained")
    bpe = train_bpe([make_text(0, 400)], 300)
    gguf_files.write(folder / "a.gguf", gguf_files.make_tensors(300), gguf_files.metadata(), bpe)
    for seed, domain in enumerate(("stories", "letters")):
        (folder / domain).mkdir()
        for index in range(3):
            (folder / domain / f"{index}.txt").write_text(make_text(10 * seed + index, 150))
    return folder


def table(folder: pathlib.Path, **changes) -> c.PretrainedAblation:
    ablation = c.PretrainedAblation(
        title="Test table",
        rows=dict(ROWS),
        baseline="full",
        repeat="segments",
        model=str(folder / "a.gguf"),
        contexts=CONTEXTS,
        tokens=TOKENS,
        domains=tuple(c.Domain(name, c.TextFiles(str(folder / name))) for name in ("stories", "letters")),
        held_out_fraction=0.3,
    )
    return dataclasses.replace(ablation, **changes)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> tuple[pathlib.Path, list[Cell]]:
    workdir = tmp_path_factory.mktemp("table")
    return workdir, run_pretrained(table(folder), workdir)


def naive(config: c.ModelConfig, variables, pattern: c.Pattern, texts: np.ndarray, context: int) -> list[float]:
    """Mean loss of the second half of each context: one forward pass each, all logits, softmax in float64."""
    config = dataclasses.replace(config, attention=dataclasses.replace(config.attention, pattern=pattern))
    apply, losses = jax.jit(Transformer(config).apply), []
    for text in texts:
        for begin in range(0, len(text) - 1, context):
            inputs = text[None, begin : begin + context]
            logits_TV = np.asarray(apply(variables, inputs).logits_BTV, np.float64)[0]
            peak_T1 = logits_TV.max(axis=-1, keepdims=True)
            logp_TV = logits_TV - peak_T1 - np.log(np.exp(logits_TV - peak_T1).sum(axis=-1, keepdims=True))
            losses.append(-np.mean([logp_TV[t, text[begin + t + 1]] for t in range(context // 2, context)]))
    return losses


def test_texts_are_spread_over_the_held_out_documents(folder):
    tokenizer, longest = open_tokenizer(folder / "a.gguf"), max(CONTEXTS)
    texts = held_out_texts(table(folder), tokenizer)
    assert list(texts) == ["stories", "letters"]
    for name, rows in texts.items():
        assert rows.shape == (TOKENS // longest, longest + 1) and rows.dtype == np.int32
        _, held_out = corpora.split(corpora.documents(c.TextFiles(str(folder / name))), 0.3, "")
        (document,) = held_out
        ids = tokenizer.encode(document.text).tolist()
        last = (len(ids) - 1) // longest * longest
        assert last >= 5 * longest  # more than is asked for: a choice is made
        starts = [next(at for at in range(0, last, longest) if ids[at : at + longest + 1] == list(row)) for row in rows]
        assert starts[0] == 0 and starts[-1] == last - longest
        assert abs((starts[1] - starts[0]) - (starts[2] - starts[1])) <= longest


def test_cells_are_those_of_a_naive_computation(folder, finished):
    _, cells = finished
    assert [(cell.row, cell.context) for cell in cells] == [(row, n) for row in ROWS for n in CONTEXTS]
    config, variables = load_gguf(folder / "a.gguf")
    texts = held_out_texts(table(folder), open_tokenizer(folder / "a.gguf"))
    for cell in cells:
        assert list(cell.nats) == ["stories", "letters"]
        for domain, losses in cell.nats.items():
            assert len(losses) == TOKENS // cell.context
            expected = naive(config, variables, ROWS[cell.row], texts[domain], cell.context)
            np.testing.assert_allclose(losses, expected, rtol=1e-5)  # float32 against a float64 softmax


def test_the_repeat_agrees_and_a_window_costs_less(finished):
    _, cells = finished
    by_place = {(cell.row, cell.context): cell for cell in cells}
    for context in CONTEXTS:
        full, again, window = (by_place[name, context] for name in ROWS)
        for domain in full.nats:
            np.testing.assert_allclose(again.nats[domain], full.nats[domain], rtol=1e-5)  # another order of sums
            assert np.abs(np.subtract(window.nats[domain], full.nats[domain])).max() > 1e-3
        assert again.flops_a_token == full.flops_a_token > window.flops_a_token > 0
        per_token = 2 * gguf_files.L * gguf_files.G * gguf_files.N * 4  # float32 keys and values
        assert full.cache_bytes == context * per_token > window.cache_bytes > 0


def test_an_interrupted_table_goes_on_where_it_was(folder, finished, tmp_path, monkeypatch):
    measure, calls = pretrained._measure, []

    def counted(source, variables, row, pattern, context, texts):
        calls.append((row, context))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(source, variables, row, pattern, context, texts)

    monkeypatch.setattr(pretrained, "_measure", counted)
    with pytest.raises(KeyboardInterrupt):
        run_pretrained(table(folder), tmp_path)
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"row": "segments", "cont')  # half a line
    before = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert len(before) == 1 + 2 + 1
    cells = run_pretrained(table(folder), tmp_path)
    order = [(row, n) for row in ROWS for n in CONTEXTS]
    assert calls == order[:3] + order[2:]
    assert [cell.nats for cell in cells] == [cell.nats for cell in finished[1]]
    after = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert after[:3] == before[:3] and [json.loads(line)["row"] for line in after[1:]] == [row for row, _ in order]
    assert run_pretrained(table(folder), tmp_path) == cells and len(calls) == 7  # nothing is left to do


def test_a_journal_that_was_cut_in_its_first_line_begins_anew(folder, tmp_path):
    (tmp_path / "cells.jsonl").write_text('{"rows": ')
    one = table(folder, rows={"full": c.Full()}, contexts=(8,), domains=table(folder).domains[:1], tokens=16)
    (cell,) = run_pretrained(one, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [record.get("row", "settings") for record in records] == ["settings", "full"]
    assert len(cell.nats["stories"]) == 2


def other_pattern(folder):
    return table(folder, rows=ROWS | {"window": c.Windowed(4, (0,))})


def other_text(folder):
    return table(folder, held_out_fraction=0.6)


def other_domain(folder):
    return table(folder, domains=table(folder).domains[:1])


def other_weights(folder):
    tensors = gguf_files.make_tensors(300, seed=1)
    bpe = train_bpe([make_text(0, 400)], 300)
    path = gguf_files.write(folder / "b.gguf", tensors, gguf_files.metadata(), bpe)
    return table(folder, model=str(path))


@pytest.mark.parametrize("change", [other_pattern, other_text, other_domain, other_weights])
def test_another_table_is_refused_and_the_folder_left_as_it_is(change, folder, finished):
    workdir, _ = finished
    before = (workdir / "cells.jsonl").read_text()
    with pytest.raises(c.ConfigError, match="holds cells of another table, model, text or hardware"):
        run_pretrained(change(folder), workdir)
    assert (workdir / "cells.jsonl").read_text() == before


def test_what_is_kept_by_hand():
    def cell(*nats):
        return Cell("x", 8, {"a": list(nats)}, 1.0, 1, 1)

    value = kept(cell(1.1, 1.3), cell(1.0, 1.0), "a")
    # differences −0.1 and −0.3: mean −0.2, standard error 0.1
    assert value.perplexity == pytest.approx(np.exp(1.2)) and value.share == pytest.approx(np.exp(-0.2))
    assert value.margin == pytest.approx(2 * np.exp(-0.2) * 0.1)
    assert kept(cell(1.0, 2.0), cell(1.0, 2.0), "a")[1:] == (1.0, 0.0)


def test_the_report_says_what_is_kept_with_margins(folder, finished):
    workdir, cells = finished
    text = write_report(table(folder), cells, workdir, "patterns", "the command")
    assert (workdir / "patterns.md").read_text() == text
    assert text.index("## Context 16") < text.index("## Context 8")
    by_place = {(cell.row, cell.context): cell for cell in cells}
    for context, part in zip((16, 8), text.split("## Context ")[1:], strict=True):
        rows = {line.split(" | ")[0].removeprefix("| "): line for line in part.splitlines() if line.startswith("| ")}
        assert list(rows) == ["row", *ROWS]
        for domain in ("stories", "letters"):
            value = kept(by_place["window", context], by_place["full", context], domain)
            assert f"| {value.perplexity:.2f} | {value.share:.1%} ± {value.margin:.1%} |" in rows["window"]
        assert "±" not in rows["full"] and rows["full"].count("100.0%") == 2
    pairs = [(by_place["segments", context], by_place["full", context]) for context in CONTEXTS]
    gaps = [abs(kept(*pair, domain).share - 1) for pair in pairs for domain in ("stories", "letters")]
    for said in (f"differs by at most {max(gaps):.2%}", "`the command`", f"{TOKENS:,} tokens"):
        assert said in text
    assert (workdir / "patterns.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_a_cell_and_domain(folder, finished):
    workdir, cells = finished
    write_report(table(folder), cells, workdir, "patterns", "the command")
    lines = list(csv.DictReader((workdir / "patterns.csv").open()))
    places = [(cell, domain) for cell in cells for domain in cell.nats]
    for line, (cell, domain) in zip(lines, places, strict=True):
        assert (line["row"], line["context"], line["domain"]) == (cell.row, str(cell.context), domain)
        assert float(line["nats"]) == pytest.approx(np.mean(cell.nats[domain]), abs=1e-6)
        assert int(line["contexts"]) == TOKENS // cell.context and int(line["cache_bytes"]) == cell.cache_bytes
    records = [json.loads(line) for line in (workdir / "rows.jsonl").read_text().splitlines()]
    assert [Cell(**record) for record in records] == cells


def test_texts_that_are_too_short_and_contexts_that_are_too_long(folder, tmp_path):
    with pytest.raises(c.ConfigError, match=r"config.contexts=\(128,\): .*a.gguf was made for 64 tokens"):
        run_pretrained(table(folder, contexts=(128,), tokens=256), tmp_path / "w")
    with pytest.raises(c.ConfigError, match=r"config.tokens=16384: the held-out documents of stories hold \d+ texts"):
        run_pretrained(table(folder, tokens=16384), tmp_path / "w")
    assert not (tmp_path / "w").exists()


FILE = """
from dsv3_jax import config as c
def get_ablation():
    rows = {{"full": c.Full(), "again": c.Segmented(8, keys="all"), "third": {third}}}
    return c.PretrainedAblation("t", rows, baseline="full", repeat="again", contexts=(8, 16), tokens=64)
"""


@pytest.mark.quick
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"contexts": "(6, 16)"}, r"config.contexts=\(6, 16\): must each be at least 2 and divide the longest, 16"),
        ({"contexts": "(1, 16)"}, "must each be at least 2"),
        ({"contexts": "(16, 16)"}, "must name each length once"),
        ({"contexts": "()"}, "must hold at least one length"),
        ({"contexts": "(8.5, 17.0)"}, "must be of type tuple"),
        ({"repeat": "other"}, "config.repeat='other': must be another row: again, third"),
        ({"repeat": "full"}, "config.repeat='full': must be another row"),
        ({"baseline": "other"}, "config.baseline='other': must be a row: full, again, third"),
        ({"tokens": "16"}, "config.tokens=16: must be a multiple of the longest context, 16, and at least twice that"),
        ({"tokens": "40"}, "must be a multiple of the longest context"),
        ({"held_out_fraction": "1.5"}, "config.held_out_fraction=1.5: must be between 0 and 1"),
        ({"domains.1.name": "prose"}, "config.domains=.*must have distinct names"),
        ({"domains.1.corpus": "text"}, "config.domains.1.corpus.path='': must name a file or folder"),
        ({"domain": "x"}, "has no field 'domain'; did you mean 'domains'"),
        ({"rows.full": "x"}, "rows"),
    ],
)
def test_settings_that_cannot_be(overrides, says, tmp_path):
    file = tmp_path / "table.py"
    file.write_text(FILE.format(third="c.Windowed(4)"))
    assert isinstance(c.load_ablation(str(file)), c.PretrainedAblation)
    with pytest.raises(c.ConfigError, match=says):
        c.load_ablation(str(file), list(overrides.items()))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("c.Windowed(0)", r"config.rows\['third'\].window=0: must be at least 1"),
        ("c.Windowed(2.5)", r"config.rows\['third'\].window=2.5: must be of type int"),
        ("c.LearnedGlobal()", r"config.rows\['third'\]='learned_global': has weights of its own"),
        ("c.PerLayer((c.Sparse(), c.Sparse()))", r"config.rows\['third'\]='sparse': has weights of its own"),
    ],
)
def test_patterns_that_cannot_be(pattern, says, tmp_path):
    file = tmp_path / "table.py"
    file.write_text(FILE.format(third=pattern))
    with pytest.raises(c.ConfigError, match=says):
        c.load_ablation(str(file))


@pytest.mark.quick
def test_the_script_refuses_in_one_line_and_leaves_nothing_behind(tmp_path):
    workdir = tmp_path / "w"
    result = script("ablate", "--table=pretrained_attention", f"--workdir={workdir}", "--config.tokens=3000")
    assert result.returncode != 0 and "Traceback" not in result.stderr and not workdir.exists()
    assert "error: config.tokens=3000: must be a multiple of the longest context, 2048" in result.stderr


@pytest.mark.quick
def test_overrides_set_fields_of_the_table(tmp_path):
    file = tmp_path / "table.py"
    file.write_text(FILE.format(third="c.Windowed(4)"))
    ablation = c.load_ablation(str(file), [("contexts", "(4, 32)"), ("tokens", "128"), ("model", "/m/a.gguf")])
    assert isinstance(ablation, c.PretrainedAblation)
    assert (ablation.contexts, ablation.tokens, ablation.model) == ((4, 32), 128, "/m/a.gguf")
