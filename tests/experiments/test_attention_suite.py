"""benchmark.py --suite=attention: contenders compute the same attention and the same gradients."""

import jax
import numpy as np
import pytest

from dsv3_jax import config as c
from experiments.suites import attention
from tests.conftest import assert_close


def test_contenders_compute_the_same(monkeypatch):
    monkeypatch.setitem(attention.SIZES, "cpu", attention.Sizes((40, 96), (16, None), 2, 8, "float32", 64))
    cases, notes = attention.cases(None)
    assert len(cases) == 8 and len(notes) >= 9
    for case in cases:
        long, windowed, both = case.name.startswith("96"), "window 16" in case.name, "backward" in case.name
        assert ("XLA" in case.contenders) == (not long), "what keeps all scores is not asked for long rows"
        assert ("dsv3_jax, no window" in case.contenders) == windowed
        results = {name: call() for name, call in case.contenders.items()}
        ours = results.pop("dsv3_jax")
        full = results.pop("dsv3_jax, no window", None)
        assert full is None or np.abs(np.asarray(jax.tree.leaves(full)[0] - jax.tree.leaves(ours)[0])).max() > 1e-3
        for name, result in results.items():
            if name == "PyTorch SDPA":
                heads_first = [x.detach().numpy().transpose(0, 2, 1, 3) for x in result]
                result = (tuple(heads_first[1:]), heads_first[0]) if both else heads_first[0]
            assert_close(result, ours, 1e-5, f"{case.name}: {name}")


@pytest.mark.quick
def test_a_config_is_refused():
    with pytest.raises(c.ConfigError, match="--suite=attention has sizes of its own"):
        attention.cases("configs/tiny.py")
