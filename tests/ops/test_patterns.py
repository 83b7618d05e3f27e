"""Patterns against matrices drawn by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.ops import patterns

pytestmark = pytest.mark.quick


def drawn(text: str) -> np.ndarray:
    return np.array([[ch != "." for ch in row.split()] for row in text.strip().splitlines()])


MASKS = {
    "full": (c.Full(), "1 . . . .\n1 1 . . .\n1 1 1 . .\n1 1 1 1 .\n1 1 1 1 1"),
    "window 2": (c.Windowed(2), "1 . . . .\n1 1 . . .\n. 1 1 . .\n. . 1 1 .\n. . . 1 1"),
    "window 1": (c.Windowed(1), "1 . . . .\n. 1 . . .\n. . 1 . .\n. . . 1 .\n. . . . 1"),
    "first is global": (c.Windowed(2, (0,)), "1 . . . .\n1 1 . . .\n1 1 1 . .\n1 . 1 1 .\n1 . . 1 1"),
    "third is global": (c.Windowed(1, (2,)), "1 . . . .\n. 1 . . .\n. . 1 . .\n. . 1 1 .\n. . 1 . 1"),
    "segments of 2": (c.Segmented(2), "1 . . . .\n1 1 . . .\n. . 1 . .\n. . 1 1 .\n. . . . 1"),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_is_the_drawn_one(name):
    pattern, text = MASKS[name]
    positions = jnp.arange(5)[None]
    np.testing.assert_array_equal(patterns.visible(pattern, positions)[0], drawn(text))


@pytest.mark.parametrize("name", MASKS)
def test_local_and_global_sets_are_disjoint_and_local_keys_are_within_reach(name):
    pattern, _ = MASKS[name]
    q, k = jnp.arange(9)[:, None], jnp.arange(9)[None, :]
    local, far = patterns.local_mask(pattern, q, k), patterns.global_mask(pattern, q, k)
    assert not np.any(local & far)
    reach = patterns.lookback(pattern)
    assert reach is None or not np.any(local & (q - k > reach))


def test_packed_documents_see_only_themselves_and_padding_sees_nothing():
    positions, segments = jnp.array([[0, 1, 0, 1, 2, 0]]), jnp.array([[1, 1, 2, 2, 2, 0]])
    mask = patterns.visible(c.Windowed(2, (0,)), positions, segments)[0]
    expected = drawn("1 . . . . .\n1 1 . . . .\n. . 1 . . .\n. . 1 1 . .\n. . 1 1 1 .\n. . . . . .")
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("length", [1, 5, 23])
@pytest.mark.parametrize("pattern", [c.Full(), c.Windowed(4), c.Windowed(3, (0, 2, 7)), c.Segmented(4)], ids=str)
def test_visible_keys_counts_the_mask(pattern, length):
    mask = patterns.visible(pattern, jnp.arange(length)[None])
    assert patterns.visible_keys(pattern, length) == pytest.approx(float(mask.sum()) / length)
