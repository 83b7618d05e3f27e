"""What benchmark.py times: contenders do the same work, with the same result."""

import sys
import types
from typing import cast

import numpy as np
import pytest

from dsv3_jax import config as c
from experiments import benchmark
from experiments.suites import Case, decode
from tests.conftest import tiny_model

PROMPT, NEW, BATCHES = 9, 8, (1, 3)


@pytest.fixture
def config_path(tmp_path, monkeypatch) -> str:
    """A tiny model with full attention, as its publisher has it, and short texts."""
    for name, value in {"PROMPT_LENGTH": PROMPT, "NEW_TOKENS": NEW, "BATCHES": BATCHES}.items():
        monkeypatch.setattr(decode, name, value)
    model = tiny_model(context_length=64)
    model.attention.pattern = c.Full()
    config = c.Config(model=model, data=c.DataConfig(tokenizer=c.BpeTokenizer(300)))
    (tmp_path / "config.json").write_text(c.to_json(config))
    return str(tmp_path / "config.json")


def check_work(cases: list[Case]) -> None:
    assert [case.name for case in cases] == ["batch 1", "batch 3"]
    assert [case.work for case in cases] == [batch * NEW for batch in BATCHES]
    for case, batch in zip(cases, BATCHES, strict=True):
        tokens_BN = np.asarray(case.contenders["dsv3_jax"]())
        assert tokens_BN.shape == (batch, NEW) and len(np.unique(tokens_BN)) > 2


def test_both_contenders_generate_the_same_tokens(config_path):
    pytest.importorskip("torch", reason="the peer is transformers on torch: make peers")
    pytest.importorskip("transformers", reason="the peer is transformers on torch: make peers")
    cases, notes = decode.cases(config_path)
    check_work(cases)
    for case in cases:
        ours, theirs = (np.asarray(contender()) for contender in case.contenders.values())
        np.testing.assert_array_equal(ours, theirs, err_msg=case.name)
    assert notes[1:] == [f"batch {batch}: 100.0% of the new tokens are the same" for batch in BATCHES]


def test_without_the_peer_ours_runs_alone_and_the_notes_say_so(config_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "experiments.peers.torch_deepseek", None)
    cases, notes = decode.cases(config_path)
    check_work(cases)
    assert all(list(case.contenders) == ["dsv3_jax"] for case in cases)
    assert len(notes) == 2 and "left out" in notes[1] and "make peers" in notes[1]


@pytest.mark.quick
def test_repeated_calls_are_divided_and_no_case_is_begun_too_late(monkeypatch):
    made = []

    def each():
        for name in ("first", "second"):
            made.append(name)
            yield Case(name, 10.0, {"ours": lambda: None}, calls=4)

    notes: list[str] = []
    suite = types.SimpleNamespace(UNIT="work/s", cases=lambda config: (each(), notes))
    for flag, value in (("ROUNDS", 3), ("WARMUP", 1), ("SECONDS", 0), ("CONFIG", None)):
        monkeypatch.setattr(benchmark, flag, types.SimpleNamespace(value=value))
    monkeypatch.setattr(benchmark, "alternate", lambda contenders, *_: {name: [8.0] * 3 for name in contenders})
    (row,), _, lines = benchmark.timed_table(cast(types.ModuleType, suite))
    assert made == ["first"] and notes == ["no case was begun after 0 s (--seconds); the last is 'first'"]
    assert row["seconds"] == 2.0 and row["work/s"] == 5.0
    assert len(lines) == 3
