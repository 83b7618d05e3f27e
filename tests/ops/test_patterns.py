"""Patterns against matrices drawn by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.ops import patterns

pytestmark = pytest.mark.quick


def drawn(text: str) -> np.ndarray:
    return np.array([[ch != "." for ch in row.split()] for row in text.strip().splitlines()])


# Causal, then bidirectional. 1 local, g global.
MASKS = {
    "full": (
        c.Full(),
        "1 . . . .\n1 1 . . .\n1 1 1 . .\n1 1 1 1 .\n1 1 1 1 1",
        "1 1 1 1 1\n1 1 1 1 1\n1 1 1 1 1\n1 1 1 1 1\n1 1 1 1 1",
    ),
    "window 2": (
        c.Windowed(2),
        "1 . . . .\n1 1 . . .\n. 1 1 . .\n. . 1 1 .\n. . . 1 1",
        "1 1 . . .\n1 1 1 . .\n. 1 1 1 .\n. . 1 1 1\n. . . 1 1",
    ),
    "window 1": (
        c.Windowed(1),
        "1 . . . .\n. 1 . . .\n. . 1 . .\n. . . 1 .\n. . . . 1",
        "1 . . . .\n. 1 . . .\n. . 1 . .\n. . . 1 .\n. . . . 1",
    ),
    "first is global": (
        c.Windowed(2, global_positions=(0,)),
        "1 . . . .\n1 1 . . .\ng 1 1 . .\ng . 1 1 .\ng . . 1 1",
        "1 1 . . .\n1 1 1 . .\ng 1 1 1 .\ng . 1 1 1\ng . . 1 1",
    ),
    "third is global": (
        c.Windowed(1, global_positions=(2,)),
        "1 . . . .\n. 1 . . .\n. . 1 . .\n. . g 1 .\n. . g . 1",
        "1 . g . .\n. 1 g . .\n. . 1 . .\n. . g 1 .\n. . g . 1",
    ),
    "first, middle and last": (
        c.Windowed(1, global_fractions=(0.0, 0.5, 1.0)),
        None,
        "1 . g . g\ng 1 g . g\ng . 1 . g\ng . g 1 g\ng . g . 1",
    ),
    "overlapping windows": (
        c.Windowed(4, stride=2),
        "1 . . . . .\n1 1 . . . .\n1 1 1 . . .\n1 1 1 1 . .\n. . 1 1 1 .\n. . 1 1 1 1",
        "1 1 1 1 . .\n1 1 1 1 . .\n1 1 1 1 1 1\n1 1 1 1 1 1\n. . 1 1 1 1\n. . 1 1 1 1",
    ),
    "disjoint windows": (
        c.Windowed(2, stride=2),
        "1 . . . .\n1 1 . . .\n. . 1 . .\n. . 1 1 .\n. . . . 1",
        "1 1 . . .\n1 1 . . .\n. . 1 1 .\n. . 1 1 .\n. . . . 1",
    ),
    "segments of 2": (
        c.Segmented(2),
        "1 . . . .\n1 1 . . .\n. . 1 . .\n. . 1 1 .\n. . . . 1",
        "1 1 . . .\n1 1 . . .\n. . 1 1 .\n. . 1 1 .\n. . . . 1",
    ),
    "segments over all keys": (
        c.Segmented(2, keys="all"),
        "1 . . . .\n1 1 . . .\n1 1 1 . .\n1 1 1 1 .\n1 1 1 1 1",
        "1 1 1 1 1\n1 1 1 1 1\n1 1 1 1 1\n1 1 1 1 1\n1 1 1 1 1",
    ),
    "window of each query": (
        c.RuntimeWindowed(3, (0,)),  # windows 1 2 3 1 2
        "1 . . . .\n1 1 . . .\n1 1 1 . .\ng . . 1 .\ng . . 1 1",
        "1 . . . .\n1 1 1 . .\n1 1 1 1 1\ng . . 1 .\ng . . 1 1",
    ),
    "best of the blocks before": (
        c.LearnedGlobal(2, 2, 1),  # gate 2 0 5 1 9
        "1 . . . .\n1 1 . . .\ng . 1 . .\ng . 1 1 .\n. . g . 1",
        "1 1 . . g\n1 1 . . g\n. . 1 1 g\n. . 1 1 g\n. . . . 1",
    ),
    "two best, overlapping windows": (
        c.LearnedGlobal(4, 2, 2),  # the best two before 4 are 2 and 0; 2 is local already
        "1 . . . . .\n1 1 . . . .\n1 1 1 . . .\n1 1 1 1 . .\ng . 1 1 1 .\ng . 1 1 1 1",
        "1 1 1 1 g .\n1 1 1 1 g .\n1 1 1 1 1 1\n1 1 1 1 1 1\n. . 1 1 1 1\n. . 1 1 1 1",
    ),
}
GATE = jnp.array([[2.0, 0.0, 5.0, 1.0, 9.0, 3.0]])
WINDOWS = jnp.array([[1, 2, 3, 1, 2, 2]])
DRAWINGS = [(name, causal) for name in MASKS for causal in (True, False) if MASKS[name][1 if causal else 2]]


def seen(pattern, length, causal=True):
    place = patterns.Place(jnp.arange(length)[None], jnp.ones((1, length), jnp.int32))
    if isinstance(pattern, c.RuntimeWindowed):
        place = place._replace(window_BT=WINDOWS[:, :length])
    gate = GATE[:, :length] if isinstance(pattern, c.LearnedGlobal) else None
    mask, bias = patterns.visible(pattern, place, place, causal=causal, gate_BS=gate)
    return np.asarray(mask[0]), None if bias is None else np.asarray(bias[0])


@pytest.mark.parametrize(("name", "causal"), DRAWINGS)
def test_mask_is_the_drawn_one(name, causal):
    pattern, *texts = MASKS[name]
    text = texts[0] if causal else texts[1]
    mask, bias = seen(pattern, len(text.splitlines()), causal)
    np.testing.assert_array_equal(mask, drawn(text))
    if bias is not None:  # on global keys alone, the log-sigmoid of the gate
        is_global = np.array([[ch == "g" for ch in row.split()] for row in text.splitlines()])
        log_sigmoid = -np.log1p(np.exp(-np.asarray(GATE[0, : len(is_global)])))
        np.testing.assert_allclose(bias, np.where(is_global, log_sigmoid, 0), rtol=1e-6)


@pytest.mark.parametrize(("name", "causal"), DRAWINGS)
def test_local_keys_are_within_reach(name, causal):
    pattern = MASKS[name][0]
    q, k = jnp.arange(9)[:, None], jnp.arange(9)[None, :]
    local, bound = patterns.local_mask(pattern, causal, q, k), patterns.reach(pattern)
    assert np.any(local)
    assert bound is None or not np.any(local & (abs(q - k) > bound))


def test_packed_documents_see_only_themselves_and_padding_sees_nothing():
    place = patterns.Place(jnp.array([[0, 1, 0, 1, 2, 0]]), jnp.array([[1, 1, 2, 2, 2, 0]]))
    mask = patterns.visible(c.Windowed(2, global_positions=(0,)), place, place)[0][0]
    expected = drawn("1 . . . . .\n1 1 . . . .\n. . 1 . . .\n. . 1 1 . .\n. . g 1 1 .\n. . . . . .")
    np.testing.assert_array_equal(mask, expected)
    ends = c.Windowed(1, global_fractions=(1.0,))
    mask = patterns.visible(ends, place, place, causal=False)[0][0]
    expected = drawn("1 g . . . .\n. 1 . . . .\n. . 1 . g .\n. . . 1 g .\n. . . . 1 .\n. . . . . .")
    np.testing.assert_array_equal(mask, expected)
    best = c.LearnedGlobal(1, 1, 1)
    mask = patterns.visible(best, place, place, gate_BS=GATE)[0][0]
    expected = drawn("1 . . . . .\ng 1 . . . .\n. . 1 . . .\n. . g 1 . .\n. . g . 1 .\n. . . . . .")
    np.testing.assert_array_equal(mask, expected)


COUNTED = [
    c.Full(),
    c.Windowed(4),
    c.Windowed(3, (0, 2, 7)),
    c.Windowed(6, stride=3),
    c.Segmented(4),
    c.LearnedGlobal(2, 2, 3),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 5, 6])
@pytest.mark.parametrize("pattern", COUNTED, ids=str)
def test_visible_keys_counts_the_mask(pattern, length, causal):
    mask, _ = seen(pattern, length, causal)
    if isinstance(pattern, c.LearnedGlobal) and not causal:
        assert patterns.visible_keys(pattern, length, causal) >= mask.sum() / length  # counts local ones as well
    else:
        assert patterns.visible_keys(pattern, length, causal) == pytest.approx(float(mask.sum()) / length)


def test_a_pattern_that_needs_a_gate_says_so():
    place = patterns.Place(jnp.arange(4)[None], jnp.ones((1, 4), jnp.int32))
    with pytest.raises(ValueError, match="learned_global needs the gate"):
        patterns.visible(c.LearnedGlobal(2, 2, 1), place, place)
