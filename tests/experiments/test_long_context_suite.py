"""benchmark.py --suite=long_context: rows say what the compiler planned or refused, next to full attention's."""

import importlib.util

import jax
import pytest

from dsv3_jax import config as c
from experiments.suites import long_context, long_context_programs
from experiments.suites.long_context import A1, KERNEL, SCORES, Line

GIB = 2**30


@pytest.mark.quick
def test_rows_compare_with_full_attention(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # nothing is compiled
    names = SCORES, KERNEL, A1
    monkeypatch.setattr(long_context, "lines", lambda: [Line("layer", name, "none", (8192, 20480)) for name in names])

    def compiled(line: Line) -> dict:
        temporaries = {SCORES: 12, KERNEL: 4, A1: 1}[line.contender]
        found = {"arguments": 1 * GIB, "temporaries": temporaries * GIB, "outputs": 1 * GIB}
        dead = {"error": "died"}
        refused = found | {"temporaries": 98 * GIB, "error": "Ran out of memory"}
        return {8192: found | {"flops": 2e12}, 20480: refused if line.contender == SCORES else dead}

    monkeypatch.setattr(long_context, "_compiled", compiled)
    rows, _ = long_context.table(None)
    found = {(row["attention"], row["tokens"]): row for row in rows}
    assert len(found) == len(rows) == 6
    assert [found[name, 8192]["peak GiB"] for name in names] == [14, 6, 3]
    assert [found[name, 8192]["against all scores"] for name in names] == ["+0%", "-57%", "-79%"]
    assert [found[name, 8192]["against full"] for name in names] == ["+133%", "+0%", "-50%"]
    assert found[SCORES, 20480]["peak GiB"] == 100 and found[SCORES, 20480]["fits"] == "no"
    assert found[A1, 20480]["peak GiB"] == "died" and "against full" not in found[A1, 20480]
    # Three passes; projections of 4 · 4096², a SwiGLU of 3 · 4096 · 11008; a query sees half the keys of its row.
    weights = 4 * 4096**2 + 3 * 4096 * 11008
    attention = 3 * 8192 * 4 * 4096 * 8193 / 2 / 1e12
    assert found[SCORES, 8192]["of it attention"] == pytest.approx(attention)
    assert found[SCORES, 8192]["TFLOP"] == pytest.approx(3 * 8192 * 2 * weights / 1e12 + attention)
    assert found[SCORES, 8192]["TFLOP (XLA)"] == 2 and found[A1, 8192]["of it attention"] < attention / 8


@pytest.mark.quick
def test_every_claim_has_its_lines():
    lines = long_context.lines()
    assert len(set(lines)) == len(lines)
    for line in lines:
        for length in line.lengths:
            config = long_context.make_config(line, length)  # valid
            assert config.data.sequence_length == length and config.model.remat == line.remat
    policies = {
        line.remat for line in lines if line.scope == "model" and line.contender == KERNEL and 40960 in line.lengths
    }
    assert policies == {"none", "dots", "full"}


@pytest.mark.quick
def test_a_refusal_gives_what_the_program_needs():
    class Lowered:
        def compile(self):
            message = "the total memory required for HLO temporaries (3.03T) exceeds available HBM (95.74G).\nmore"
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, {message}")

    found = long_context_programs._compile(Lowered(), 5, 7)
    assert found["arguments"] == 5 and found["outputs"] == 7 and found["temporaries"] == round(3.03 * 2**40)
    assert found["error"].endswith("(95.74G).")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: make peers")
def test_a_layer_is_compiled_once(capfd):
    line = Line("layer", A1, "none", (512,))
    found = long_context._compiled(line)[512]
    parameters = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert found["arguments"] == pytest.approx(4 * parameters + 2 * 512 * 4096, rel=1e-3)
    assert found["outputs"] == pytest.approx(found["arguments"], rel=1e-3) and found["temporaries"] > 0
    assert found["flops"] > 3 * 512 * 2 * 4 * 4096**2
    assert long_context._compiled(line)[512] == found  # from the cache
    assert "layer, A1: overlapping 512 + 3 global, remat none" in capfd.readouterr().err


@pytest.mark.quick
def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(c.ConfigError, match="--suite=long_context has sizes of its own"):
        long_context.table("configs/tiny.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(c.ConfigError, match="needs libtpu: make peers"):
        long_context.table(None)
