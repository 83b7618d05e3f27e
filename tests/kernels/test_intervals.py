"""Intervals, pairs of blocks and schedules against the whole mask."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.kernels.windowed_attention.intervals import (
    LOWER,
    MASKED,
    SKIPPED,
    UPPER,
    WHOLE,
    block_pairs,
    num_block_pairs,
    schedule_by_key,
    schedule_by_query,
    under_way,
    visible_interval,
)
from dsv3_jax.ops.patterns import Place, local_mask, same_document
from tests.kernels.test_windowed_attention import CASES, B, T, packed

pytestmark = pytest.mark.quick
Q, K, PART = 8, 16, 4  # blocks, and their parts
KEYS = np.arange(T)


def place_of(pattern: c.LayerPattern) -> Place:
    place = packed()
    if isinstance(pattern, c.RuntimeWindowed):
        window_BT = np.random.default_rng(0).integers(1, pattern.window + 1, (B, T))
        place = place._replace(window_BT=jnp.asarray(window_BT, jnp.int32))
    return place


def local_set(pattern: c.LayerPattern, causal: bool, place: Place) -> np.ndarray:
    """Which keys each query sees locally, bool [B, T, T], by the definition."""
    position, segment, window = place
    q_window = None if window is None else window[:, :, None]
    mask = local_mask(pattern, causal, position[:, :, None], position[:, None], q_window)
    return np.asarray(mask & same_document(segment[:, :, None], segment[:, None]))


@pytest.mark.parametrize(("pattern", "causal"), CASES, ids=str)
def test_the_interval_is_the_local_set_and_schedules_hold_what_is_seen(pattern, causal):
    place = place_of(pattern)
    mask_BTS = local_set(pattern, causal, place)
    first_BT, last_BT = map(np.asarray, visible_interval(pattern, causal, place))
    np.testing.assert_array_equal((first_BT[..., None] <= KEYS) & (last_BT[..., None] >= KEYS), mask_BTS)

    pairs = block_pairs(pattern, causal, T, Q, K)
    assert len(pairs) == num_block_pairs(pattern, causal, T, Q, K)
    padding = ((0, 0), (0, -T % 16))
    whole = np.pad(mask_BTS, (*padding, (0, -T % K)))
    blocks_BqQkK = whole.reshape(B, whole.shape[1] // Q, Q, -1, K)
    any_Bqk, all_Bqk = blocks_BqQkK.any((2, 4)), blocks_BqQkK.all((2, 4))
    held = np.zeros(any_Bqk.shape[1:], bool)
    held[tuple(pairs.T)] = True
    assert not any_Bqk[:, ~held].any()
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)

    rows = [jnp.pad(x, padding, constant_values=fill) for x, fill in ((first_BT, T), (last_BT, -1))]
    by_query = schedule_by_query(pairs, *rows, Q, K, PART)
    by_key = schedule_by_key(pairs, *rows, Q, K, PART)
    for schedule, q_S, k_S in (
        (by_query, by_query.owner_S, by_query.other_S),
        (by_key, by_key.other_S, by_key.owner_S),
    ):
        kind_BS, fetch_BS = np.asarray(schedule.kind_BS), np.asarray(schedule.fetch_BS)
        np.testing.assert_array_equal(kind_BS == SKIPPED, ~any_Bqk[:, q_S, k_S])
        np.testing.assert_array_equal(kind_BS == WHOLE, all_Bqk[:, q_S, k_S])
        assert np.all(np.diff(schedule.owner_S) >= 0)  # the steps of an owner follow each other
        loads = np.diff(fetch_BS, axis=1) != 0
        assert not np.any(loads & (kind_BS[:, 1:] == SKIPPED)), "what is skipped is not loaded"
        seen = kind_BS > SKIPPED
        np.testing.assert_array_equal(fetch_BS[seen], np.broadcast_to(schedule.other_S, kind_BS.shape)[seen])
        assert len(schedule.owner_S) == len(pairs)
    oldest_S, newest_S = under_way(by_key)
    for step, other in enumerate(others := by_key.other_S.tolist()):
        begins, completes = other not in others[:step], other not in others[step + 1 :]
        assert begins == (step == 0 or newest_S[step] > newest_S[step - 1])
        assert completes == (step == len(others) - 1 or oldest_S[step + 1] > oldest_S[step])
        assert not begins or newest_S[step] == other
        assert not completes or oldest_S[step] == other


def test_work_grows_with_length_times_window():
    def steps(pattern, length):
        return len(block_pairs(pattern, True, length, 512, 512))

    assert steps(c.Windowed(512), 32768) == 2 * 64 - 1
    assert steps(c.Windowed(4096), 32768) <= 9 * 64
    assert steps(c.Full(), 32768) == 64 * 65 // 2
    for pattern in (c.Windowed(512), c.Windowed(4096), c.Windowed(1024, stride=512), c.Segmented(1024)):
        assert steps(pattern, 131072) < 2.2 * steps(pattern, 65536)


@pytest.mark.parametrize(("pattern", "causal"), CASES, ids=str)
def test_triangles_hide_nothing_that_is_seen(pattern, causal):
    place, size = place_of(pattern), 16
    first_BT, last_BT = visible_interval(pattern, causal, place)
    padding = ((0, 0), (0, -T % size))
    rows = [jnp.pad(x, padding, constant_values=fill) for x, fill in ((first_BT, T), (last_BT, -1))]
    pairs = block_pairs(pattern, causal, T, size, size)
    kind_BS = np.asarray(schedule_by_query(pairs, *rows, size, size, PART).kind_BS)
    whole = np.pad(local_set(pattern, causal, place), (*padding, (0, -T % size)))
    parts = size // PART
    seen = whole.reshape(B, whole.shape[1] // size, parts, PART, -1, parts, PART).any((3, 6))  # [B, q, part, k, part]
    later = np.triu(np.ones((parts, parts), bool), 1)
    for kind, hidden in ((LOWER, later), (UPPER, later.T)):
        b, s = np.nonzero(kind_BS == kind)
        assert not np.any(seen[b, pairs[s, 0], :, pairs[s, 1]] & hidden)


def test_every_kind_occurs():
    """Or the checks above would check nothing."""

    def kinds(pattern, causal, size):
        first_BT, last_BT = visible_interval(pattern, causal, packed())
        rows = [jnp.pad(x, ((0, 0), (0, -T % size)), constant_values=e) for x, e in ((first_BT, T), (last_BT, -1))]
        pairs = block_pairs(pattern, causal, T, size, size)
        return set(np.asarray(schedule_by_query(pairs, *rows, size, size, PART).kind_BS).ravel().tolist())

    assert kinds(c.Full(), True, 8) == {SKIPPED, MASKED, WHOLE, LOWER, UPPER}
    assert kinds(c.Windowed(16), True, 16) >= {LOWER, UPPER}
    assert kinds(c.Windowed(16), False, 16) >= {LOWER, UPPER}
