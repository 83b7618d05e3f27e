"""benchmark.py --suite=attention: contenders compute the same attention and the same gradients."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from experiments.suites import attention
from tests.conftest import assert_close

TINY = attention.Sizes((40, 96), (16, None), 2, 8, "float32", 64, longest_blocked=96, matmul=64, copy=64, flex=(40, 96))


@pytest.fixture
def torch_attention(monkeypatch):
    """The peer; flex_attention is not compiled, which takes longer than all else."""
    pytest.importorskip("torch", reason="the peer is torch: make peers")
    from experiments.peers import torch_attention

    monkeypatch.setattr(torch_attention, "flex_refusal", lambda gradients: "not in this test")
    return torch_attention


def test_contenders_compute_the_same(monkeypatch, torch_attention):
    monkeypatch.setitem(attention.SIZES, "cpu", TINY)
    lazy, notes = attention.cases(None)
    cases = list(lazy)
    assert len(cases) == 8 and sum("MiB" in note and "dsv3_jax" in note for note in notes) == 8
    assert sum("flex_attention left out: not in this test" in note for note in notes) == 8
    assert sum("SDPA left out: there a window is a mask of 96²" in note for note in notes) == 2
    for who in ("cuDNN", "splash", "tokamax"):
        assert f"{who} left out: no kernel for cpu" in notes
    for case in cases:
        long, windowed, both = case.name.startswith("96"), "window 16" in case.name, "backward" in case.name
        assert ("XLA" in case.contenders) == (not long), "what keeps all scores is not asked for long rows"
        assert ("PyTorch SDPA" in case.contenders) == (not (long and windowed))
        assert ("dsv3_jax, no window" in case.contenders) == windowed
        assert all(seconds > 0 for seconds in case.limits.values()) and len(case.limits) == 2
        results = {name: call() for name, call in case.contenders.items()}
        ours = results.pop("dsv3_jax")
        full = results.pop("dsv3_jax, no window", None)
        assert full is None or np.abs(np.asarray(jax.tree.leaves(full)[0] - jax.tree.leaves(ours)[0])).max() > 1e-3
        for name, result in results.items():
            if name == "PyTorch SDPA":
                heads_first = [x.detach().numpy().transpose(0, 2, 1, 3) for x in result]
                result = (tuple(heads_first[1:]), heads_first[0]) if both else heads_first[0]
            assert_close(result, ours, 1e-5, f"{case.name}: {name}")


def test_who_is_missing_or_fails_is_named(monkeypatch, torch_attention):
    sizes = TINY._replace(lengths=(40, 96), windows=(16, None), longest_blocked=40)
    monkeypatch.setitem(attention.SIZES, "cpu", sizes)
    monkeypatch.setattr(torch_attention, "make_step", lambda *_: 1 / 0)
    lazy, notes = attention.cases(None)
    first = next(lazy)
    assert set(first.contenders) == {"dsv3_jax", "dsv3_jax, no window", "XLA"}
    assert any("PyTorch SDPA left out: ZeroDivisionError: division by zero" in note for note in notes)
    cases = [first, *lazy]
    assert not any(case.name.startswith("96, no window") for case in cases)
    assert any(note.startswith("96, no window, forward: dsv3_jax left out: the program of 'blocked'") for note in notes)
    assert any(note.startswith("96, window 16, forward: dsv3_jax, no window left out") for note in notes)


@pytest.mark.quick
def test_shares_count_visible_keys():
    # Token i of 4 sees min(i + 1, 2) keys with a window of 2: 7 pairs. 2 heads of 8, two products of 2 · 8 each.
    limits = attention._limits(TINY, (1.0, 1.0), 4, 2, gradients=False)
    assert limits == {"of matmul peak": 7 * 2 * 4 * 8, "of bandwidth": 4 * 4 * 2 * 8 * 4}
    limits = attention._limits(TINY, (2.0, 4.0), 4, None, gradients=True)
    assert limits == {"of matmul peak": 3 * 10 * 2 * 4 * 8 / 2, "of bandwidth": 12 * 4 * 2 * 8 * 4 / 4}


@pytest.mark.quick
def test_the_plot_has_a_line_for_each_contender_and_window(tmp_path):
    rows = [
        {"case": f"{length}, {window}, {passes}", "name": name, "seconds": length * 1e-6}
        for length in (2048, 8192)
        for window in ("window 512", "no window")
        for passes in ("forward", "forward and backward")
        for name in ("dsv3_jax", "XLA")
    ]
    attention.plot(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("window", [200, None])
def test_splash_computes_the_same(window):
    q, k, v = (jax.random.normal(key, (1, 256, 2, 128)) for key in jax.random.split(jax.random.key(0), 3))
    splash = attention._splash(256, window, 2, interpret=True)
    assert_close(splash(q, k, v), attention._ours(window)(q, k, v), 1e-4)


@pytest.mark.slow
def test_flex_attention_computes_the_same():
    pytest.importorskip("torch", reason="the peer is torch: make peers")
    if shutil.which("g++") is None:
        pytest.skip("flex_attention is compiled by g++ on CPU, and is not installed")
    from experiments.peers import torch_attention

    assert torch_attention.flex_refusal(gradients=False) is None
    assert "no backward pass" in (torch_attention.flex_refusal(gradients=True) or "")
    inputs = tuple(jax.random.normal(key, (1, 256, 2, 16)) for key in jax.random.split(jax.random.key(0), 3))
    (out,) = torch_attention.make_step(inputs, 200, False, 1, flex=True)()
    ours = attention._ours(200)(*(jnp.asarray(x) for x in inputs))
    assert_close(out.numpy().transpose(0, 2, 1, 3), ours, 1e-5)


@pytest.mark.quick
def test_a_config_is_refused():
    with pytest.raises(c.ConfigError, match="--suite=attention has sizes of its own"):
        attention.cases("configs/tiny.py")
