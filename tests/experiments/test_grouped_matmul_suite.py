"""benchmark.py --suite=grouped_matmul: contenders compute the same products, experts and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from experiments.peers import megablox
from experiments.suites import grouped_matmul
from tests.conftest import assert_close


def test_contenders_compute_the_same(monkeypatch):
    sizes = grouped_matmul.Sizes((24,), 2, 4, 16, 8, "float32", 32)
    monkeypatch.setitem(grouped_matmul.SIZES, "cpu", sizes)
    found, notes = grouped_matmul.cases(None)
    found = list(found)
    assert [case.name for case in found] == [
        f"{what}, forward{backward}"
        for what in ("48 rows, 16 to 16", "48 rows, 8 to 16", "24 tokens, 2 of 4 experts")
        for backward in ("", " and backward")
    ]
    flops = [2 * 48 * 16 * 16, 2 * 48 * 16 * 8, 6 * 48 * 16 * 8]
    np.testing.assert_allclose([case.work * 1e9 for case in found], np.outer(flops, [1, 3]).ravel())
    for case in found:
        assert list(case.contenders) == ["dsv3_jax, bucketed", "XLA ragged_dot"]
        ours, xla = (call() for call in case.contenders.values())
        assert_close(ours, xla, 3e-6, case.name)
        assert case.limits["of matmul peak"] > 0
    assert "megablox left out: no kernel for cpu" in notes and "tokamax left out: no kernel for cpu" in notes


@pytest.mark.quick
@pytest.mark.parametrize(("platform", "ours"), [("cpu", ["bucketed"]), ("tpu", ["pallas_tpu"])])
def test_kernels_that_would_be_interpreted_are_not_timed(platform, ours):
    assert grouped_matmul.implementations(platform, "bfloat16") == ours


@pytest.mark.quick
def test_a_peer_that_is_not_installed_is_left_out_with_a_line(monkeypatch):
    monkeypatch.setitem(grouped_matmul.PEERS, "tokamax", ("experiments.peers.not_installed", ("tpu",)))
    notes: list[str] = []
    assert list(grouped_matmul.peers("tpu", notes)) == ["XLA ragged_dot", "megablox"]
    assert notes == ["tokamax left out: No module named 'experiments.peers.not_installed'"]


def test_megablox_is_asked_for_the_same_product():
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = jax.random.normal(keys[0], (256, 128)), jax.random.normal(keys[1], (3, 128, 128))
    sizes = jnp.array([100, 0, 156], jnp.int32)
    assert_close(megablox.matmul(x, w, sizes, interpret=True), jax.lax.ragged_dot(x, w, sizes), 1e-5)


@pytest.mark.quick
def test_a_config_is_refused():
    with pytest.raises(ConfigError, match="--suite=grouped_matmul has sizes of its own"):
        grouped_matmul.cases("configs/tiny.py")
