"""benchmark.py --suite=dispatch: contenders give the same output, the platform's own first."""

import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from experiments.suites import dispatch
from tests.conftest import assert_close


@pytest.fixture
def shapes(monkeypatch):
    shapes = (
        dispatch.Shape("train", 2, 16, K=2, E=4, D=8, F=6),
        dispatch.Shape("skewed", 2, 16, K=2, E=4, D=8, F=6, skew=4.0),
        dispatch.Shape("decode", 3, 1, K=2, E=4, D=8, F=6, gradients=False),
    )
    monkeypatch.setattr(dispatch, "SHAPES", shapes)
    monkeypatch.setattr(dispatch, "CALLS", 2)
    monkeypatch.setattr(dispatch, "FACTOR", 4.0)
    return shapes


def test_contenders_do_the_same_work(shapes):
    for shape in shapes:
        given = dispatch.operands(shape)
        outputs = {name: call(*given) for name, call in dispatch.contenders(shape).items()}
        assert list(outputs) == ["grouped, bucketed", "grouped, ragged_dot", "dense", "capacity 4.0"]
        for name, y in outputs.items():
            assert_close(y, outputs["dense"], 3e-6, f"{shape.name}, {name}")


def test_a_skewed_routing_is_skewed(shapes):
    loads = [np.bincount(np.asarray(dispatch.operands(shape)[2]).reshape(-1), minlength=4) for shape in shapes[:2]]
    assert loads[1][0] > loads[1][3] and loads[1].max() > loads[0].max()


def test_cases_run_and_notes_tell_loads_and_drops(shapes, monkeypatch):
    monkeypatch.setattr(dispatch, "FACTOR", 0.5)
    cases, notes = dispatch.cases(None)
    assert [case.work for case in cases] == [32, 32, 6]
    for case in cases:
        for call in case.contenders.values():
            call()
    assert len(notes) == 4 and "drops 0.0%" not in notes[2]


def test_a_config_is_refused():
    with pytest.raises(ConfigError, match="shapes of its own"):
        dispatch.cases("configs/small.py")
