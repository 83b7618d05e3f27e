"""benchmark.py --suite=draft: a short training, then the same tokens with the draft and without."""

import numpy as np
import pytest

from dsv3_jax import config as c
from experiments.suites import draft
from tests.conftest import tiny_config

PROMPT, NEW = 6, 8


@pytest.fixture
def suite(corpus, tmp_path, monkeypatch):
    """The suite on tiny text, and a function that writes its config file."""
    settings = {"PROMPT_LENGTH": PROMPT, "NEW_TOKENS": NEW, "BATCHES": (2,), "TRAIN_STEPS": 10, "ROW_LENGTH": 32}
    for name, value in settings.items():
        monkeypatch.setattr(draft, name, value)
    monkeypatch.setattr(draft, "DOMAINS", (c.Domain("words", c.TextFiles(str(corpus))),))
    monkeypatch.setattr(draft.tempfile, "gettempdir", lambda: str(tmp_path))

    def config_path(mtp: c.MultiToken | None) -> str:
        config = tiny_config(corpus)
        config.model.mtp = mtp
        (tmp_path / "config.json").write_text(c.to_json(config))
        return str(tmp_path / "config.json")

    return config_path


@pytest.mark.slow
def test_contenders_generate_the_same_tokens_and_notes_tell_what_was_accepted(suite):
    cases, notes = draft.cases(suite(c.MultiToken(depth=1)))
    assert [case.name for case in cases] == ["batch 2, temperature 0.0", "batch 2, temperature 0.8"]
    for case in cases:
        assert list(case.contenders) == ["draft", "no draft"] and case.work == 2 * NEW
        rows = {name: np.asarray(contender()) for name, contender in case.contenders.items()}
        assert all(tokens_BN.shape == (2, NEW) for tokens_BN in rows.values())
        same = (rows["draft"] == rows["no draft"]).all()
        assert same == case.name.endswith("0.0")
    assert "trained for 10 steps of 4 x 32 tokens (lm " in notes[0] and "mtp_1 " in notes[0]
    assert "drafts accepted" in notes[2] and notes[2].endswith("; 100.0% of the new tokens are the same")
    assert "drafts accepted" in notes[3] and notes[3].endswith(" tokens a round")


@pytest.mark.quick
def test_a_config_without_modules_is_refused(suite):
    with pytest.raises(c.ConfigError, match="--suite=draft needs a model with config.model.mtp"):
        draft.cases(suite(None))
